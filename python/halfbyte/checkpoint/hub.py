"""A hub id -> a local folder in huggingface_hub's cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.folder import INDEX, SINGLE, read_weight_map

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Everything but the weights; their names are in the index, and repositories often hold copies.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    INDEX,
)


def download(repo_id: str) -> Path:
    """The folder of `repo_id` in the hub's cache, with what is needed of it downloaded.

    Raises FileNotFoundError when there is no such id, PermissionError when it is gated, and
    ConnectionError when the hub cannot be reached and the cache does not hold it, CheckpointError
    for an index that cannot be read.
    """
    folder = _snapshot(repo_id, list(SMALL_FILES))
    index = folder / INDEX
    weights = set(read_weight_map(index).values()) if index.exists() else {SINGLE}
    return _snapshot(repo_id, [*SMALL_FILES, *sorted(weights)])


def download_config(repo_id: str) -> Path:
    """The config.json of `repo_id` in the hub's cache. Raises as `download` does."""
    return _snapshot(repo_id, ["config.json"]) / "config.json"


def _snapshot(repo_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    # A connection that drops raises the base error of the HTTP library, which is another one in
    # each major version of huggingface_hub, or a RuntimeError of hf_xet.
    dropped: Any = (OSError, RuntimeError, *errors.HfHubHTTPError.__bases__)
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise PermissionError(
            f"{repo_id}: access is gated. Hint: accept the model's licence on its page and log in "
            "with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repo_id}: neither a local path nor a model on the hub. Hint: check the spelling; "
            "for a private model log in with `hf auth login`"
        ) from None
    except errors.HFValidationError as error:
        raise FileNotFoundError(
            f"{repo_id}: neither a local path nor a hub id: {_first_line(error)}"
        ) from None
    except dropped as error:
        raise ConnectionError(
            f"{repo_id}: not a local path, and the hub cannot be reached ({_first_line(error)}). "
            "Hint: check the network, or pass a local folder or .gguf file"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
