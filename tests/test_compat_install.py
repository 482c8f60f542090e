"""Ophis under the names mamba_ssm and causal_conv1d: only when asked, and only for as long."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from ophis import compat

ROOT = Path(__file__).parent.parent
BOTH = ("mamba_ssm", "causal_conv1d")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is not None for name in BOTH), reason="the real packages are installed here"
)

# What repositories import.
IMPORTS = """
import mamba_ssm, causal_conv1d
from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel, mamba_inner_fn, selective_scan_fn
from mamba_ssm.modules.mamba_simple import Mamba, Block
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.mlp import GatedMLP
from mamba_ssm.modules.mha import MHA
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref, mamba_inner_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated, LayerNorm, rmsnorm_fn
from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, MixerModel, create_block, _init_weights
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.generation import InferenceParams, GenerationMixin, decode, sample
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_ref, causal_conv1d_update
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
"""


@pytest.fixture(autouse=True)
def clean():
    before = list(sys.meta_path)
    yield
    compat.uninstall()
    assert not {name for name in sys.modules if name.partition(".")[0] in BOTH}
    assert sys.meta_path == before


@pytest.fixture
def real(tmp_path, monkeypatch) -> Path:
    """A mamba_ssm that is really installed."""
    package = tmp_path / "site" / "mamba_ssm"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").write_text("real = True")
    (package / "ops" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield package.parent
    compat.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


def test_nothing_happens_on_import():
    importlib.reload(compat)
    assert importlib.util.find_spec("mamba_ssm") is None


def test_every_import_of_repositories_works_and_is_undone():
    with pytest.raises(ModuleNotFoundError):
        exec(IMPORTS, {})
    assert compat.install() == BOTH
    names: dict = {}
    exec(IMPORTS, names)
    assert names["RMSNormGated"] is compat.RMSNormGated
    assert names["Mamba"] is names["mamba_ssm"].Mamba is compat.Mamba
    assert Version(names["mamba_ssm"].__version__) >= Version("2.2")
    assert Version(names["causal_conv1d"].__version__) >= Version("1.4")
    assert importlib.util.find_spec("mamba_ssm") is not None  # for code that looks first
    assert compat.install() == BOTH  # again is no harm
    layer = names["Mamba"](16)
    compat.uninstall()
    with pytest.raises(ModuleNotFoundError):
        exec(IMPORTS, {})
    assert layer(torch.randn(1, 3, 16)).shape == (1, 3, 16)  # what was imported goes on working


def test_within_a_with_statement():
    with compat.installed() as packages:
        assert packages == BOTH
        exec(IMPORTS, {})
        with compat.installed():  # the inner one leaves what the outer one did
            pass
        exec(IMPORTS, {})
    assert "mamba_ssm" not in sys.modules
    with pytest.raises(RuntimeError, match="in the middle"), compat.installed():
        raise RuntimeError("in the middle")
    assert "mamba_ssm" not in sys.modules


@pytest.mark.parametrize(
    "statement",
    [
        "from mamba_ssm import Mamba3",
        "import mamba_ssm.modules.mamba3",
        "from mamba_ssm.modules import mamba2_simple",
        "from mamba_ssm.ops.triton.layer_norm import layer_norm_linear_fn",
        "from mamba_ssm.distributed.tensor_parallel import ColumnParallelLinear",
        "from causal_conv1d.cpp_functions import causal_conv1d_fwd_function",
    ],
)
def test_what_is_missing_is_named(statement: str):
    compat.install()
    package, missing = statement.split()[1].partition(".")[0], statement.split()[-1].rpartition(".")[2]
    with pytest.raises(
        ImportError, match=f"{package}.* is not among what Ophis offers under the names of {package}"
    ) as e:
        exec(statement)
    assert missing in str(e.value) or "distributed" in str(e.value) or "cpp_functions" in str(e.value)
    assert "docs/compat.md" in str(e.value)
    import mamba_ssm  # type: ignore[import-not-found]

    assert not hasattr(mamba_ssm, "Mamba3")
    assert getattr(mamba_ssm, "selective_state_update", None) is None


def test_a_real_package_is_left_alone(real):
    assert compat.install() == ("causal_conv1d",)
    import mamba_ssm  # type: ignore[import-not-found]

    assert mamba_ssm.real
    assert compat.install(force=True) == BOTH
    import mamba_ssm

    assert mamba_ssm.Mamba is compat.Mamba
    compat.uninstall()
    import mamba_ssm

    assert mamba_ssm.real


def test_a_real_package_comes_back_as_it_was(real):
    importlib.import_module("mamba_ssm.ops")
    before = sys.modules["mamba_ssm"], sys.modules["mamba_ssm.ops"]
    with compat.installed(force=True):
        assert sys.modules["mamba_ssm.ops"] is not before[1]
        exec(IMPORTS, {})
    assert (sys.modules["mamba_ssm"], sys.modules["mamba_ssm.ops"]) == before


def test_a_bare_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "causal_conv1d" / "csrc").mkdir(parents=True)  # as in a checkout of its sources
    monkeypatch.syspath_prepend(str(tmp_path))
    assert compat.install() == BOTH


# python -m ophis.compat

SCRIPT = """
import sys
from pathlib import Path
import helper
from mamba_ssm import Mamba
print(Mamba.__module__, __name__, Path(__file__).name, *sys.argv)
sys.exit(3)
"""


def run(folder: Path, *arguments: str, module: str = "-mophis.compat", code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *filter(None, [module]), *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def scripts(tmp_path) -> Path:
    folder = tmp_path / "repository" / "tools"
    folder.mkdir(parents=True)
    (folder / "train.py").write_text(SCRIPT)
    (folder / "helper.py").write_text("")  # beside the script, as Python finds it
    return folder


def test_a_script_as_it_is(scripts):
    done = run(scripts.parent, "tools/train.py", "--force", "-m", "x y", code=3)
    expected = "ophis.compat.mamba_ssm.modules.mamba_simple __main__ train.py tools/train.py --force -m x y\n"
    assert (done.stdout, done.stderr) == (expected, "")
    done = run(scripts, "-m", "train", "--epochs", "3", code=3)
    assert done.stdout.startswith("ophis.compat.mamba_ssm.modules.mamba_simple __main__ train.py /")
    assert done.stdout.endswith("train.py --epochs 3\n")
    assert "no script nowhere.py" in run(scripts, "nowhere.py", code=2).stderr
    assert "SCRIPT" in run(scripts, code=2).stderr


def test_a_script_where_the_real_package_is(scripts):
    (scripts / "mamba_ssm").mkdir()
    (scripts / "mamba_ssm" / "__init__.py").write_text("class Mamba: ...")
    done = run(scripts, "train.py", code=3)
    assert done.stdout.startswith("mamba_ssm __main__")
    assert done.stderr == "ophis.compat: mamba_ssm is installed here and used; --force puts Ophis there\n"
    done = run(scripts, "--force", "train.py", code=3)
    assert done.stdout.startswith("ophis.compat.mamba_ssm.modules.mamba_simple __main__")


HUGGING_FACE = """
import functools, importlib, torch
import ophis.compat
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
sizes = dict(hidden_size=32, num_hidden_layers=2, vocab_size=48, state_size=4)
heads = dict(num_heads=8, head_dim=8, n_groups=2, pad_token_id=0, eos_token_id=0)

def results():
    mamba, mamba2 = MambaConfig(**sizes), Mamba2Config(**sizes, **heads)
    for model_class, config in ((modeling_mamba.MambaForCausalLM, mamba), (modeling_mamba2.Mamba2ForCausalLM, mamba2)):
        torch.manual_seed(0)
        model, ids = model_class(config), torch.arange(1, 20)[None]
        for training in (True, False):
            model.train(training).zero_grad()
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            yield torch.stack([loss, *(p.grad.norm() for p in model.parameters())])
        yield model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)

before, called = list(results()), set()

def watch(path, name):
    module = importlib.import_module("ophis.compat." + path)
    function = getattr(module, name)
    def watched(*args, **kwargs):
        called.add(name)
        return function(*args, **kwargs)
    setattr(module, name, functools.wraps(function)(watched))

watch("causal_conv1d", "causal_conv1d_fn")
watch("causal_conv1d", "causal_conv1d_update")
for name in ("selective_scan_fn", "mamba_inner_fn"):
    watch("mamba_ssm", name)
    watch("mamba_ssm.ops.selective_scan_interface", name)
for name in ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"):
    watch("mamba_ssm.ops.triton.ssd_combined", name)
watch("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
ophis.compat.install()
for module in (modeling_mamba, modeling_mamba2):
    importlib.reload(module)  # it looks for the packages when it is imported
for plain, ours in zip(before, results(), strict=True):
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
print(*sorted(called))
"""


def test_transformers_takes_these_functions_and_gets_the_same(tmp_path):
    (tmp_path / "script.py").write_text(HUGGING_FACE)
    done = run(tmp_path, "-W", "ignore", "script.py", module="")
    assert done.stdout.split() == [
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "mamba_chunk_scan_combined",
        "mamba_inner_fn",
        "mamba_split_conv1d_scan_combined",
        "selective_scan_fn",
        "selective_state_update",
    ]
