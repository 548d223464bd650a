"""The tokenizer's files in a model folder, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

CONVERT_HINT = (
    "hint: transformers converts it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


def read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in `path`; `missing` if there is no such file and it may be absent.

    Raises CheckpointError when the file is not a JSON object.
    """
    if missing is not None and not path.exists():
        return missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_backend(folder: Path) -> Backend:
    """tokenizer.json, loaded."""
    from tokenizers import Tokenizer as Backend

    path = folder / TOKENIZER
    if not path.exists():
        raise CheckpointError(f"{path}: no such file{_other_tokenizer(folder)}")
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: expected a tokenizer, got: {error}") from error


def _other_tokenizer(folder: Path) -> str:
    if (folder / "tokenizer.model").exists():
        return f"; the SentencePiece file tokenizer.model alone is not read. {CONVERT_HINT}"
    if (folder / "vocab.json").exists():
        return f"; vocab.json and merges.txt alone are not read. {CONVERT_HINT}"
    return ". hint: copy tokenizer.json from the model's original folder"


def read_special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Role ("bos_token", "eos_token", ..) to text, from the config and the older token map.

    The map counts only for configs without added_tokens_decoder, as in transformers.
    """
    given = {**config}
    if "added_tokens_decoder" not in config:
        given |= read_json(folder / SPECIAL_TOKENS_MAP, missing={})
    extra = given.get("extra_special_tokens")
    if isinstance(extra, dict):
        given |= extra
    roles = {role: content(token) for role, token in given.items() if role.endswith("_token")}
    return {role: text for role, text in roles.items() if text is not None}


def content(token: Any) -> str | None:
    """A token is written as a string or as an object; add_bos_token and its like are neither."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def add_listed_tokens(backend: Backend, folder: Path, config: Mapping[str, Any]) -> None:
    """Make `backend` know the added tokens that only the config or added_tokens.json list.

    Raises CheckpointError where one would not get the id that it is listed with.
    """
    known = backend.get_added_tokens_decoder()
    for token_id, token in sorted(_listed_tokens(folder, config).items()):
        if token == known.get(token_id):
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{folder}: the added token {token.content!r} is listed with id {token_id}, but "
                f"{TOKENIZER} gives it id {backend.token_to_id(token.content)}. "
                "hint: the files are of different tokenizers"
            )


def _listed_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    from tokenizers import AddedToken

    listed = config.get("added_tokens_decoder")
    try:
        if listed is not None:
            return {int(key): AddedToken(**_flags(value)) for key, value in listed.items()}
        plain = read_json(folder / ADDED_TOKENS, missing={})
        in_backend = {entry["content"] for entry in _backend_tokens(folder)}
        return {int(i): AddedToken(text) for text, i in plain.items() if text not in in_backend}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: malformed list of added tokens: {error!r}") from error


def _backend_tokens(folder: Path) -> list[dict[str, Any]]:
    return read_json(folder / TOKENIZER, missing={}).get("added_tokens", [])


def _flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "__type"}


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name to source; the model's own template is "default". Files win over the config."""
    templates = _inline_templates(folder, config.get("chat_template"))
    for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    if (folder / TEMPLATE).exists():
        templates["default"] = _read_text(folder / TEMPLATE)
    return templates


def _inline_templates(folder: Path, given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    try:
        templates = {entry["name"]: entry["template"] for entry in given}
    except (TypeError, KeyError):
        templates = {"": None}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise CheckpointError(
            f"{folder / CONFIG}: chat_template: expected text or a list of "
            f"{{name, template}}, got {str(given)[:80]}"
        )
    return templates


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: expected UTF-8, got: {error}") from error


def write_chat_templates(folder: Path, templates: Mapping[str, str]) -> str | list[dict] | None:
    """Write the .jinja files; returns the same templates as tokenizer_config.json has them."""
    if "default" in templates:
        (folder / TEMPLATE).write_text(templates["default"], encoding="utf-8", newline="")
    named = {name: text for name, text in templates.items() if name != "default"}
    for name, text in named.items():
        # A name comes with the model, so it must not lead out of the folder.
        if TEMPLATE_NAME.fullmatch(name):
            (folder / MORE_TEMPLATES).mkdir(exist_ok=True)
            path = folder / MORE_TEMPLATES / f"{name}.jinja"
            path.write_text(text, encoding="utf-8", newline="")
    if not named:
        return templates.get("default")
    return [{"name": name, "template": text} for name, text in templates.items()]
