"""Row formats: what a row of each data set means as source and target text.

The names and templates are those of qlora.py (artidoro/qlora, make_data_module), plus the three
common shapes `messages`, `prompt-completion` and `text`, and rows that are tokenized already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.data.files import Malformed
from halfbyte.errors import DataError

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)
ROWS_LOOKED_AT = 20


@dataclass(frozen=True)
class Pair:
    """Source text, masked unless train_on_source, and target text; tokenized apart."""

    source: str
    target: str


@dataclass(frozen=True)
class Chat:
    """Messages of one conversation; the assistant's are trained on."""

    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Text:
    """Plain text; everything is trained on."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Ids and labels of a row that was tokenized elsewhere; labels are ids or -100."""

    ids: list[int]
    labels: list[int]


Sample = Pair | Chat | Text | Tokens


class BadRow(ValueError):
    """This row cannot be used; the message is the reason a user reads."""


def _text(row: dict[str, Any], field: str) -> str:
    if row.get(field) is None:
        raise BadRow(f"no field {field!r}")
    return _checked(row[field], f"field {field!r}")


def _checked(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} is no valid Unicode: {error.reason}") from error
    return value


def _optional(row: dict[str, Any], field: str) -> str:
    return "" if row.get(field) is None else _text(row, field)


def alpaca(row: dict[str, Any]) -> list[Sample]:
    instruction, context = _text(row, "instruction"), _optional(row, "input")
    template = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
    source = template.format(instruction=instruction, input=context)
    return [Pair(source, _text(row, "output"))]


def chip2(row: dict[str, Any]) -> list[Sample]:
    parts = _text(row, "text").split("\n<bot>: ")
    if len(parts) < 2:
        raise BadRow(r"field 'text' has no '\n<bot>: '")
    return [Pair(parts[0].replace("<human>: ", ""), parts[1])]


def hh_rlhf(row: dict[str, Any]) -> list[Sample]:
    return [Pair("", _text(row, "chosen"))]


def oasst1(row: dict[str, Any]) -> list[Sample]:
    return [Pair("", _text(row, "text"))]


def input_output(row: dict[str, Any]) -> list[Sample]:
    return [Pair(_text(row, "input"), _text(row, "output"))]


def prompt_completion(row: dict[str, Any]) -> list[Sample]:
    return [Pair(_text(row, "prompt"), _text(row, "completion"))]


def unnatural_instructions(row: dict[str, Any]) -> list[Sample]:
    instances = row["instances"] if "instances" in row else [row]
    if not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances):
        raise BadRow("field 'instances' is not a list of objects")
    if not instances:
        raise BadRow("field 'instances' is empty")
    return [Pair(_text(one, "instruction_with_input"), _text(one, "output")) for one in instances]


def flan(row: dict[str, Any]) -> list[Sample]:
    """FLAN v2's inputs and targets; in P3 dumps prompt and completion, with GPT's end mark."""
    fields = ("inputs", "targets") if "inputs" in row else ("prompt", "completion")
    source, target = (_text(row, field) for field in fields)
    return [Pair(source, target.removesuffix("<|endoftext|>"))]


def messages(row: dict[str, Any]) -> list[Sample]:
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise BadRow("field 'messages' is not a list of messages")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise BadRow("a message is not an object with a role")
        _checked(turn.get("content"), f"the content of a message by {turn['role']}")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRow("no assistant message to learn from")
    return [Chat(turns)]


def plain_text(row: dict[str, Any]) -> list[Sample]:
    return [Text(_text(row, "text"))]


def tokenized(row: dict[str, Any]) -> list[Sample]:
    ids = _ids(row, "input_ids")
    labels = _ids(row, "labels") if "labels" in row else ids
    if len(labels) != len(ids):
        raise BadRow(f"{len(labels)} labels for {len(ids)} ids")
    if any(label not in (token, -100) for token, label in zip(ids, labels, strict=True)):
        raise BadRow("a label is neither its own id nor -100")
    return [Tokens(ids, labels)]


def _ids(row: dict[str, Any], field: str) -> list[int]:
    ids = row.get(field)
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise BadRow(f"field {field!r} is not a list of integers")
    return ids


FORMATS: dict[str, Callable[[dict[str, Any]], list[Sample]]] = {
    "messages": messages,
    "prompt-completion": prompt_completion,
    "text": plain_text,
    "tokenized": tokenized,
    "alpaca": alpaca,
    "alpaca-clean": alpaca,
    "chip2": chip2,
    "self-instruct": prompt_completion,
    "hh-rlhf": hh_rlhf,
    "oasst1": oasst1,
    "guanaco": oasst1,
    "longform": input_output,
    "unnatural-instructions": unnatural_instructions,
    "flan": flan,
    "input-output": input_output,
}


def check_format(name: str) -> None:
    """Raise ValueError if `name` is no row format."""
    if name == "vicuna":
        raise ValueError("dataset_format 'vicuna': the data of Vicuna was never released")
    if name not in FORMATS:
        raise ValueError(f"unknown dataset_format {name!r}; expected one of {', '.join(FORMATS)}")


def detect_format(rows: Sequence[Any]) -> str:
    """Name the format whose columns most of the first rows have, each of them all.

    Raises DataError if there is none, or if some rows are in one format and some in another.
    """
    first = [row for row in rows[:ROWS_LOOKED_AT] if isinstance(row, dict)]
    if not first:
        count = min(len(rows), ROWS_LOOKED_AT)
        said = f"none of the first {count} rows is an object with named columns"
        why = [r.reason if isinstance(r, Malformed) else f"got {r!r:.60}" for r in rows[:1]]
        raise DataError(": ".join([said, *why]))
    found = Counter(name for name in map(_format_of, first) if name is not None)
    unknown = len(first) - found.total()
    if len(found) > 1:
        counts = ", ".join(f"{count} rows in {name}" for name, count in found.most_common())
        raise DataError(f"mixed row formats: {counts} among the first. {_HINT}")
    if unknown > len(first) // 2:
        seen = {column for row in first for column, value in row.items() if value is not None}
        raise DataError(
            f"cannot tell the row format from the columns {sorted(map(str, seen))}, which fit none "
            f"in {unknown} of the first {len(first)} rows. {_HINT}"
        )
    (name,) = found
    return _format_of_text(first) if name == "text" else name


def _format_of(row: dict[str, Any]) -> str | None:
    columns = {column for column, value in row.items() if value is not None}
    return next((name for needed, name in _BY_COLUMNS if needed <= columns), None)


_HINT = (
    f"hint: name it with dataset_format ({', '.join(FORMATS)}) or rename columns to messages, "
    "prompt/completion or text"
)


_BY_COLUMNS = (
    ({"input_ids"}, "tokenized"),
    ({"messages"}, "messages"),
    ({"instruction_with_input", "output"}, "unnatural-instructions"),
    ({"instances", "instruction"}, "unnatural-instructions"),
    ({"instruction", "output"}, "alpaca"),
    ({"prompt", "completion"}, "prompt-completion"),
    ({"input", "output"}, "input-output"),
    ({"inputs", "targets"}, "flan"),
    ({"chosen"}, "hh-rlhf"),
    ({"text"}, "text"),
)


def _format_of_text(rows: list[dict[str, Any]]) -> str:
    texts = [row["text"] for row in rows if isinstance(row.get("text"), str)]
    if texts and all(text.startswith("<human>: ") and "\n<bot>: " in text for text in texts):
        return "chip2"
    if texts and all(text.startswith("### Human:") for text in texts):
        return "oasst1"
    return "text"
