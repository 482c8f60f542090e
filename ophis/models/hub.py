"""Models by their names on the Hugging Face hub, through its own client: its cache, offline mode and credentials."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ophis.models.weight_files import PICKLE_PATTERNS, SAFETENSORS_PATTERNS

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
]
GENERATION, CARD = "generation_config.json", "README.md"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/model


def local_folder(name_or_folder: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """Where that model, or its tokenizer alone, is on this machine: as given, or else fetched from the hub.

    Args:
        name_or_folder: a folder or file here, or "owner/name" on the hub.
        revision: a branch, tag or commit of the hub's.
        weights: whether the configuration and the weights are needed, or the tokenizer's files only.

    Raises:
        FileNotFoundError: neither here nor there, or there and out of reach.
        ConnectionError: the hub was reached and failed.
    """
    if Path(name_or_folder).exists():
        return Path(name_or_folder)
    if not isinstance(name_or_folder, str) or not _NAME.fullmatch(name_or_folder):
        raise FileNotFoundError(f"no folder {name_or_folder}")
    wanted = [*TOKENIZER_FILES, GENERATION, CARD, "config.json"]
    folder = _fetch(name_or_folder, revision, wanted + (SAFETENSORS_PATTERNS if weights else []))
    if weights and not any(folder.glob("*.safetensors")):
        folder = _fetch(name_or_folder, revision, wanted + PICKLE_PATTERNS)
    return folder


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    neither = f"there is no folder {name} here, and"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{name} is given out on conditions: accept them on its page on the hub, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{neither} no model of that name on the hub (a private one needs `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision!r} on the hub") from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "there is no connection to it"
        raise FileNotFoundError(
            f"{neither} the hub's {name} is not whole in the cache, {constants.HF_HUB_CACHE}, nor can be fetched: {why}"
        ) from error
    except Exception as error:  # a proxy or a certificate fails in a class of the HTTP client's, which changes
        reason = " ".join(str(error).split())
        raise ConnectionError(f"{neither} the hub's {name} could not be fetched: {reason}") from error
