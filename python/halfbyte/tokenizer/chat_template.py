"""A chat template: messages as text, and which part of that text the assistant says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from halfbyte.errors import CheckpointError

Span = tuple[int, int]

# Unicode reserves these for internal use, so text does not hold them.
NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REASONING = ("reasoning_content", "thinking", "reasoning")
SCALARS: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
}


@lru_cache(maxsize=16)
def compile_template(source: str) -> ChatTemplate:
    """The template of this source, compiled once."""
    return ChatTemplate(source)


class ChatTemplate:
    """A jinja2 chat template with the semantics of transformers' `apply_chat_template`.

    Raises CheckpointError when `source` is not valid jinja2.
    """

    def __init__(self, source: str) -> None:
        from jinja2 import TemplateSyntaxError

        from halfbyte.tokenizer.sandbox import environment

        try:
            self._template = environment().from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"chat template, line {error.lineno}: expected jinja2, got: {error.message}"
            ) from error
        self._tagged = bool(GENERATION_TAG.search(source))

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **variables: Any
    ) -> str:
        """The conversation as text.

        messages: dicts with a "role" and, usually, a "content" of text; None values are dropped and
        "thinking" or "reasoning" is also given as "reasoning_content". variables: seen by the
        template under their names; like messages they may hold only JSON's types.
        Raises TypeError or ValueError for messages that are malformed or that the template refuses.
        """
        return self._render(_checked(messages), add_generation_prompt, _plain(variables))

    def assistant_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        end_tokens: Iterable[str] = (),
        **variables: Any,
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and the [start, end) characters the assistant is to produce.

        They come from the template's `{% generation %}` tags. Without these, a turn starts where
        the text before it, with its generation prompt, ends, and goes on up to its end token, one
        of `end_tokens`. Raises ValueError where neither can be told for certain.
        """
        checked, plain = _checked(messages), _plain(variables)
        text = self._render(checked, False, plain)
        spans = self._tagged_spans(checked, text, plain) if self._tagged else None
        if spans is None:
            spans = self._turn_spans(checked, text, tuple(end_tokens), plain)
        return text, spans

    def _render(
        self, messages: list[dict[str, Any]], prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        from jinja2 import TemplateError

        given = {"tools": None, "documents": None, **variables}
        given |= {"messages": messages, "add_generation_prompt": prompt}
        failures = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
        try:
            return self._template.render(given)
        except (*failures, ArithmeticError, RecursionError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def _tagged_spans(
        self, messages: list[dict[str, Any]], text: str, variables: Mapping[str, Any]
    ) -> list[Span] | None:
        """The spans between marks; None if a template works on marked text in another way."""
        from halfbyte.tokenizer.sandbox import MARKS

        free = [mark for mark in NONCHARACTERS if mark not in text]
        if len(free) < 2:
            return None
        opening, closing = free[:2]
        marked = self._render(messages, False, {**variables, MARKS: (opening, closing)})
        pieces = re.split(f"[{opening}{closing}]", marked)
        if "".join(pieces) != text:
            return None
        return _odd_pieces(pieces)

    def _turn_spans(
        self,
        messages: list[dict[str, Any]],
        text: str,
        end_tokens: tuple[str, ...],
        variables: Mapping[str, Any],
    ) -> list[Span]:
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            span = _Turn(self, messages, index, text, variables).span(end_tokens)
            if span is None or (spans and span[0] < spans[-1][1]):
                raise ValueError(
                    f"message {index}: where the chat template puts this assistant turn cannot be "
                    "told for certain, so no loss mask can be made. hint: put the template's "
                    "assistant text between {% generation %} and {% endgeneration %}"
                )
            spans.append(span)
        return spans


class _Turn:
    """Where message `index`, by the assistant, lies in the rendered conversation `text`."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        index: int,
        text: str,
        variables: Mapping[str, Any],
    ) -> None:
        self.template, self.messages, self.index = template, messages, index
        self.text, self.variables = text, variables

    def span(self, end_tokens: tuple[str, ...]) -> Span | None:
        upto = self._rendered(self.messages[: self.index + 1], False)
        if upto is None:
            return None
        body = self._body()
        start = self._prompt_end()
        if start is None and body is not None:
            start = body[0]
        end = self._end(upto, body, _ending(upto, end_tokens))
        if start is None or end is None or start > end:
            return None
        return start, end

    def _prompt_end(self) -> int | None:
        """Where a prompt for this turn ends; None if the template writes none, or another one."""
        before = self.messages[: self.index]
        prompt = self._rendered(before, True)
        if prompt is None or prompt == self._rendered(before, False):
            return None
        return len(prompt) if self.text.startswith(prompt) else None

    def _end(self, upto: str, body: Span | None, ending: str) -> int | None:
        """The end of the turn's end token, or of the turn where it has none."""
        if self.text.startswith(upto):
            return len(upto.rstrip()) if ending else len(upto)
        if body is None:
            return None
        after = self.text[body[1] :]
        gap = len(after) - len(after.lstrip())
        closed = bool(ending) and after.startswith(ending, gap)
        return body[1] + gap + len(ending) if closed else body[1]

    def _body(self) -> Span | None:
        """Where this message's content lies: what changes when another text stands for it."""
        content = self.messages[self.index].get("content")
        if not isinstance(content, str):
            return None
        probe = "probe"
        while probe in self.text:
            probe += "x"
        swapped = [*self.messages]
        swapped[self.index] = {**self.messages[self.index], "content": probe}
        around = (self._rendered(swapped, False) or "").split(probe)
        if len(around) != 2:
            return None
        start, end = len(around[0]), len(self.text) - len(around[1])
        same = self.text.startswith(around[0]) and self.text.endswith(around[1])
        if not same or start > end or self.text[start:end].strip() not in content:
            return None
        return start, end

    def _rendered(self, messages: list[dict[str, Any]], prompt: bool) -> str | None:
        """None where the template refuses a part of a conversation that it takes as a whole."""
        try:
            return self.template._render(messages, prompt, self.variables)
        except ValueError:
            return None


def _ending(text: str, end_tokens: tuple[str, ...]) -> str:
    """The longest of `end_tokens` that `text` ends with, but for white space; else ""."""
    tail = text.rstrip()
    return max((token for token in end_tokens if tail.endswith(token)), key=len, default="")


def _odd_pieces(pieces: list[str]) -> list[Span]:
    spans, start = [], 0
    for number, piece in enumerate(pieces):
        if number % 2 and piece:
            spans.append((start, start + len(piece)))
        start += len(piece)
    return spans


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Fresh plain dicts, since a template is another's code and must not reach the caller's."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: expected a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: expected at least one, got none")
    return [_checked_message(number, message) for number, message in enumerate(messages)]


def _checked_message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(
            f"message {number}: expected a dict with role and content, got {type(message).__name__}"
        )
    if not isinstance(message.get("role"), str):
        raise ValueError(f"message {number}: expected a role, got {message.get('role')!r}")
    plain = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A copy of `value` out of JSON's types alone, whose methods the sandbox knows."""
    if value is None or isinstance(value, bool):
        return value
    for kind, exact in SCALARS.items():
        if isinstance(value, kind):
            return exact(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        rebuild = tuple if isinstance(value, tuple) else list
        return rebuild(map(_plain, value))
    raise TypeError(
        "a chat template takes text, numbers, lists and dicts, "
        f"got {type(value).__module__}.{type(value).__name__}"
    )
