"""Measuring a language model: how well it predicts a text, and the tasks of lm-eval.

    model, tokenizer = ophis.load("runs/first"), tokenizer_of("runs/first")
    score_text(model, tokenizer, Path("book.txt").read_text()).bits_per_byte

`ophis evaluate` does both. The tasks take `pip install 'ophis[evaluate]'`; importing `ophis.evaluation.harness` gives
lm-eval the model "ophis".
"""

from ophis.evaluation.loading import device_of, dtype_of, tokenizer_of
from ophis.evaluation.perplexity import TextScore, score_text

__all__ = ["TextScore", "device_of", "dtype_of", "score_text", "tokenizer_of"]
