"""Text from a language model, as it is decoded.

model, tokenizer = ophis.load("runs/first"), load_tokenizer("runs/first")
generate_text(model, tokenizer, "Once upon a time", write=lambda text: print(text, end="", flush=True))
"""

from ophis.generation.text import TextStreamer, check_vocabulary, generate_text, load_tokenizer

__all__ = ["TextStreamer", "check_vocabulary", "generate_text", "load_tokenizer"]
