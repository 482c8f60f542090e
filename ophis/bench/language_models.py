"""The 130M language models on this machine's CPU, beside transformers' on weights of the same shapes: ophis' own, or
transformers' themselves on ophis' operators.

Each side runs in a process of its own, so that its peak memory is its own, and the two take turns, so that a machine
that slows down slows both.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ophis.bench.provenance import provenance
from ophis.integrations.transformers import accelerate_transformers

MODELS = ("mamba-130m", "mamba2-130m")
PROMPT, NEW = 16, 32  # tokens, when decoding
THREADS = 2
MINUTES = 60.0  # seconds above which a measurement is not repeated


def forward(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        return _seconds(lambda: model(ids, use_cache=False))


def training_step(model: Any, ids: Tensor) -> float:
    model.zero_grad()
    return _seconds(lambda: model(ids, labels=ids, use_cache=False).loss.backward())


def first_token(model: Any, ids: Tensor) -> float:
    return _seconds(lambda: _generate(model, ids, 1))


def decoding(model: Any, ids: Tensor) -> float:
    """Seconds a token, the prompt's time taken off."""
    short = _seconds(lambda: _generate(model, ids, 1))
    return (_seconds(lambda: _generate(model, ids, 1 + NEW)) - short) / NEW


# work -> (what is timed, length of the input, repeats)
WORKS: dict[str, tuple[Callable[[Any, Tensor], float], int, int]] = {
    "forward": (forward, 512, 5),
    "training step": (training_step, 512, 3),
    "first token": (first_token, PROMPT, 5),
    "decoding, per token": (decoding, PROMPT, 5),
}

# Transformers' own training step of Mamba grows with the square of the length: 8 s at 128, seven minutes at 512.
ACCELERATED_LENGTHS = {("mamba-130m", "training step"): 128}


def run(
    models: tuple[str, ...] = MODELS, works: tuple[str, ...] = tuple(WORKS), side: str = "ophis"
) -> Iterator[dict[str, Any]]:
    """One row for each model and work, as soon as it is measured.

    Args:
        models: of `MODELS`.
        works: of `WORKS`.
        side: what stands beside transformers: "ophis", or "accelerated" for transformers after
            `ophis.accelerate_transformers()`.
    """
    source = provenance()
    sides = (side, "transformers")
    for name in models:
        for work in works:
            _, length, repeats = WORKS[work]
            if side == "accelerated":
                length = ACCELERATED_LENGTHS.get((name, work), length)
            workers = {each: Worker(each, name, work, length) for each in sides}
            times: dict[str, list[float]] = {each: [] for each in sides}
            warm_up = {each: worker.measure() for each, worker in workers.items()}
            if slow := warm_up["transformers"] > MINUTES:  # one turn of it says enough
                times["transformers"].append(warm_up["transformers"])
            for _ in range(repeats):
                for each, worker in workers.items():
                    if each == side or not slow:
                        times[each].append(worker.measure())
            memory = {each: worker.close() for each, worker in workers.items()}
            ours, theirs = (statistics.median(times[each]) for each in sides)
            yield {
                "model": name,
                "work": work,
                "batch": 1,
                "length": length,
                "dtype": "float32",
                "threads": THREADS,
                f"{side}_s": f"{ours:.4f}",
                "transformers_s": f"{theirs:.4f}",
                "times_faster": f"{theirs / ours:.2f}",
                f"{side}_spread": _spread(times[side]),
                "transformers_spread": _spread(times["transformers"]),
                f"{side}_peak_mib": f"{memory[side]:.0f}",
                "transformers_peak_mib": f"{memory['transformers']:.0f}",
                **source,
            }


class Worker:
    """A process that holds one side's model and does the work when told."""

    def __init__(self, *job: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_work, args=(end, *job), daemon=True)
        self.process.start()
        self._receive()

    def measure(self) -> float:
        self.pipe.send("again")
        return self._receive()

    def close(self) -> float:
        """Peak memory in MiB above the model's own."""
        self.pipe.send("end")
        peak = self._receive()
        self.process.join()
        return peak

    def _receive(self) -> float:
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError("the benchmark's process died; its message is above") from None


def _work(pipe: Any, side: str, name: str, work: str, length: int) -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    function = WORKS[work][0]
    model = (_ours if side == "ophis" else _theirs)(name).eval()
    if side == "accelerated":
        accelerate_transformers()
    ids = torch.randint(model.config.vocab_size, (1, length))
    peak = Peak()
    pipe.send(0.0)
    while pipe.recv() == "again":
        pipe.send(function(model, ids))
    pipe.send(peak())


def _ours(name: str) -> Any:
    from ophis.models import LanguageModel, preset

    return LanguageModel(preset(name))


def _theirs(name: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    if name.startswith("mamba2"):
        from transformers import Mamba2Config, Mamba2ForCausalLM

        config = Mamba2Config(vocab_size=50288, hidden_size=768, num_hidden_layers=24, num_heads=24, n_groups=1,
                              tie_word_embeddings=True)  # fmt: skip
        return Mamba2ForCausalLM(config)
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(num_hidden_layers=24))


def _generate(model: Any, ids: Tensor, count: int) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                          do_sample=False, pad_token_id=0)  # fmt: skip


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Peak:
    """Memory of this process above what it holds now: the highest it rises to, in MiB."""

    def __init__(self):
        self.status = Path("/proc/self/status")
        if self.status.exists():
            Path("/proc/self/clear_refs").write_text("5")  # Linux starts the high-water mark anew
        self.start = self._now("VmRSS:")

    def __call__(self) -> float:
        return max(0.0, self._now("VmHWM:") - self.start)

    def _now(self, field: str) -> float:
        if self.status.exists():
            line = next(line for line in self.status.read_text().splitlines() if line.startswith(field))
            return int(line.split()[1]) / 2**10
        # Elsewhere the mark since the process began: it can hide what is smaller than the building of the model.
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _spread(times: list[float]) -> str:
    return f"{min(times):.4f}-{max(times):.4f} of {len(times)}"
