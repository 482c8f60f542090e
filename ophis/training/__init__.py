"""Training: text, tokens, the recipe of the papers, and transformers' Trainer writing into a folder of its own.

    from ophis import LanguageModel
    from ophis.training import Data, Recipe, RunFolder, byte_tokenizer, model_config, read_documents, train

    recipe, tokenizer = Recipe(steps=500), byte_tokenizer()
    data = Data.of(read_documents("texts/").texts, tokenizer, length=recipe.length)
    model = LanguageModel(model_config(tokenizer, hidden_size=256))
    folder = RunFolder("runs/first")
    folder.begin(model, tokenizer, record={})
    train(model, tokenizer, data, recipe, folder)

Running it takes `pip install 'ophis[train]'`.
"""

from ophis.training.architecture import model_config
from ophis.training.data import Data, Sequences, Stream, collate
from ophis.training.documents import Documents, hold_out, read_documents
from ophis.training.optimizer import decaying, parameter_groups
from ophis.training.recipe import Recipe
from ophis.training.run import Result, require_extra, train
from ophis.training.run_folder import RunFolder
from ophis.training.tokenizer import byte_tokenizer, encode, is_bytes, read_tokenizer

__all__ = [
    "Data",
    "Documents",
    "Recipe",
    "Result",
    "RunFolder",
    "Sequences",
    "Stream",
    "byte_tokenizer",
    "collate",
    "decaying",
    "encode",
    "hold_out",
    "is_bytes",
    "model_config",
    "parameter_groups",
    "read_documents",
    "read_tokenizer",
    "require_extra",
    "train",
]
