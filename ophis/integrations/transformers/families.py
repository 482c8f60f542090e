"""Which of transformers' models are of the Mamba family, and what of each is replaced by what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ophis.integrations.transformers import functions, mixers
from ophis.integrations.transformers.mixers import standing_in

MAMBA = ("causal_conv1d_fn", "causal_conv1d_update", "mamba_selective_scan", "mamba_selective_state_update",
         "mamba_inner_fn")  # fmt: skip
MAMBA2 = ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba2_selective_state_update",
          "mamba2_split_conv1d_scan_combined")  # fmt: skip

Way = tuple[tuple[str, str], ...]


class Kind(NamedTuple):
    """Mixers that compute the same way."""

    functions: tuple[str, ...]  # that they may call, by name, in their model's module
    forward: Callable[[Callable[..., Any]], Callable[..., Any]]  # what stands in for theirs, given it
    known: frozenset[str]  # fingerprints of those that it was written against


class Family(NamedTuple):
    """A model of transformers, in transformers.models.NAME.modeling_NAME."""

    name: str
    kind: Kind
    mixer: str  # names of its classes
    stack: str
    known: frozenset[str]  # fingerprints of the stack's `forward`, to which packed sequences are explained
    # How keyword arguments come from the language model to its mixers: classes, and what their `forward` calls.
    way: Way

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"

    def function(self, name: str, mixer_is_ours: bool) -> Callable[..., Any]:
        if name == "causal_conv1d_fn" and self.kind.functions == MAMBA and not mixer_is_ours:
            return functions.causal_conv1d_fn_of_mamba
        return getattr(functions, name)


def _known(fingerprints: str) -> frozenset[str]:
    return frozenset(fingerprints.split())


def _mamba(known: str) -> Kind:
    return Kind(MAMBA, standing_in(mixers.mamba, "conv1d", "dt_proj"), _known(known))


def _way(model: str, *layers: tuple[str, str], base: str = "self.model", loop: str = "decoder_layer") -> Way:
    return (f"{model}ForCausalLM", base), (f"{model}Model", loop), *((model + name, callee) for name, callee in layers)


def _without_attention(model: str) -> Way:
    return _way(model, ("Block", "self.mixer"), base="self.backbone", loop="mixer_block")


# The fingerprints are of transformers 5.15 to 5.24. The last is 5.24's, which gave caches another name; of two before
# it, the second is from 5.21 on unless another is named.
OF_ZAMBA = _known("cfb1a60d e1158795 fef1ff30 2ee07746")  # the second: 5.18
ZAMBA = Kind(MAMBA, standing_in(mixers.zamba, "conv1d"), OF_ZAMBA)
SSD = Kind(MAMBA2, standing_in(mixers.mamba2, "conv1d"), _known("0a285e56 d834519f 79e9d5b7"))
FALCON_H1 = Kind(MAMBA2, standing_in(mixers.falcon_h1, "conv1d"), _known("db31fbec b639e2cc c1c157a8"))
LAYER = ("DecoderLayer", "self.mamba")
SHARING = (("HybridLayer", "self.mamba_decoder"), ("MambaDecoderLayer", "self.mamba"))

FAMILIES = (
    Family("mamba", _mamba("09b66b9f 2235e4ff 30858d33"), "MambaMixer", "MambaModel", _known("e9fd0475 a203ad4b"),
           _without_attention("Mamba")),
    Family("falcon_mamba", _mamba("ef4cde3e 4ea4bb4b 90fa88de"), "FalconMambaMixer", "FalconMambaModel",
           _known("5ae039cd 626936dc"), _without_attention("FalconMamba")),
    Family("jamba", _mamba("c55600ac 707d47e8 d725cc4b"), "JambaMambaMixer", "JambaModel", _known("d9d012e2 a66e8093"),
           _way("Jamba", ("MambaDecoderLayer", "self.mamba"))),
    Family("zamba", ZAMBA, "ZambaMambaMixer", "ZambaModel", _known("fe8c12aa 1ba78cbc"),
           _way("Zamba", *SHARING, loop="layer")),
    Family("mamba2", SSD, "Mamba2Mixer", "Mamba2Model", _known("5378b0ca 77fc5caa 8aa7a719"),  # 5.17
           _without_attention("Mamba2")),
    Family("bamba", SSD, "BambaMixer", "BambaModel", _known("48d4c7d1 c5230576"), _way("Bamba", LAYER)),
    Family("zamba2", SSD, "Zamba2MambaMixer", "Zamba2Model", _known("433bfeaa bd106a08"),
           _way("Zamba2", *SHARING, loop="layer")),
    Family("falcon_h1", FALCON_H1, "FalconH1Mixer", "FalconH1Model", _known("b32f9e6c 1b97db35 0a106cc1"),  # 5.17
           _way("FalconH1", LAYER)),
    Family("nemotron_h", SSD, "NemotronHMamba2Mixer", "NemotronHModel", _known("3a61662e 627dbdcf a92897dd"),  # 5.19
           _way("NemotronH", ("Block", "self.mixer(cache_params|cache)"), loop="mixer_block")),
    Family("granitemoehybrid", SSD, "GraniteMoeHybridMambaLayer", "GraniteMoeHybridModel", _known("822f3a1f 8b2ec1aa"),
           _way("GraniteMoeHybrid", LAYER)),
)  # fmt: skip
