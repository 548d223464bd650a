"""Conversations: one answer, a history of turns, and the terminal chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.engine import Engine, Stream
from halfbyte.errors import CheckpointError, ContextLengthError
from halfbyte.generate import stream
from halfbyte.sampling import Sampling

if TYPE_CHECKING:
    from rich.console import Console

    from halfbyte.models import Decoder
    from halfbyte.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

HELP = """\
/help             this list
/system TEXT      set the system prompt and start over; without TEXT, none
/reset            forget the conversation, keep the system prompt
/set NAME VALUE   a sampling setting, e.g. /set temperature 0.7 (seed: none for a new one each time)
/show             the system prompt, the sampling settings and the length so far
/save FILE        write the conversation as JSON
/load FILE        go on with a saved one
/exit             leave; Ctrl-D does too, Ctrl-C stops an answer"""

# What a terminal would obey instead of showing: escape sequences must not come from a model.
CONTROLS = dict.fromkeys([*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)])


def chat(
    model: Decoder, messages: str | Messages, sampling: Sampling | None = None, **overrides: Any
) -> str:
    """The assistant's answer to `messages`: a question, or dicts with "role" and "content".

    sampling: greedy by default; overrides are its fields, e.g. `temperature=0.7`.
    Raises CheckpointError when the model has no tokenizer or chat template, ValueError or TypeError
    for messages the template refuses, ContextLengthError for too long a conversation.
    """
    return "".join(stream_chat(model, messages, sampling, **overrides))


def stream_chat(
    model: Decoder, messages: str | Messages, sampling: Sampling | None = None, **overrides: Any
) -> Stream:
    """Like `chat`, as an iterator over pieces of the answer; see `halfbyte.generate.Stream`."""
    if isinstance(messages, str):
        messages = [_message("user", messages)]
    return stream(model, _prompt(model, messages), sampling, **overrides)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _tokenizer(model: Decoder) -> Tokenizer:
    if model.tokenizer is None:
        raise CheckpointError(
            f"{model.source}: the model has no tokenizer. hint: put its tokenizer.json and "
            "tokenizer_config.json beside the weights"
        )
    return model.tokenizer


def _prompt(model: Decoder, messages: Messages) -> list[int]:
    ids = _tokenizer(model).chat_ids(messages)
    context = model.config.max_position_embeddings
    if len(ids) >= context:
        raise ContextLengthError(
            f"the conversation is {len(ids)} tokens long, which leaves no room for an answer in "
            f"the model's {context}. hint: start over (/reset), or send less"
        )
    return ids


class Conversation:
    """A chat with a memory: every question is asked with all turns before it.

    An engine of its own keeps what the model has read, so a turn costs its own length only.

    messages: the turns so far, the system prompt not among them. system: the system prompt, None
    for the template's own. sampling: how answers are chosen. finish_reason: how the last answer
    ended: "stop", "length", "context" or "cancelled".
    """

    def __init__(
        self,
        model: Decoder,
        system: str | None = None,
        sampling: Sampling | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        self.model = model
        self.system = system
        self.sampling = sampling or Sampling()
        self.kv_dtype = kv_dtype
        self.messages: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self._engine: Engine | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """What the template gets: the system prompt, if any, and the turns."""
        return self._opening() + self.messages

    def _opening(self) -> list[dict[str, Any]]:
        return [] if self.system is None else [_message("system", self.system)]

    def send(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer to `text`; question and answer join `messages` when it ends.

        An answer that is closed or interrupted joins as far as it came; if it had not begun, it
        is as if the question was not asked. Raises like `chat`, before the first piece.
        """
        turns = [*self.messages, _message("user", text)]
        prompt = _prompt(self.model, self._opening() + turns)
        return self._answer(turns, self._engine_now().stream(prompt, self.sampling))

    def complete(self, text: str) -> Stream:
        """Plain text that goes on after `text`: no template, no memory."""
        return self._engine_now().stream(text, self.sampling)

    def _engine_now(self) -> Engine:
        """The engine, without memory if weights have moved or may have changed."""
        if self._engine is None or self._engine.misplaced:
            self._engine = Engine(self.model, max_batch=1, kv_dtype=self.kv_dtype)
        trained = any(parameter.requires_grad for parameter in self.model.parameters())
        if trained or self._engine.stale:
            self._engine.refresh()
        return self._engine

    def _answer(self, turns: list[dict[str, Any]], pieces: Stream) -> Generator[str, None, None]:
        said = ""
        try:
            for piece in pieces:
                said += piece
                yield piece
        finally:
            whole = pieces.finish_reason not in (None, "cancelled", "error")
            pieces.close()
            self.finish_reason = pieces.finish_reason
            if said or whole:
                self.messages = [*turns, _message("assistant", said)]

    def reset(self) -> None:
        """Forget the turns; the system prompt and the sampling stay."""
        self.messages = []
        self.finish_reason = None

    def save(self, path: str | Path) -> None:
        """Write {"messages", "sampling"} as JSON; the messages are also a row to train on."""
        saved = {"messages": self.history, "sampling": asdict(self.sampling)}
        text = json.dumps(saved, ensure_ascii=False, indent=2) + "\n"
        Path(path).expanduser().write_text(text, encoding="utf-8")

    def load(self, path: str | Path) -> None:
        """Go on with what `save` wrote. Raises ValueError for another kind of file."""
        text = Path(path).expanduser().read_text(encoding="utf-8")
        try:
            messages, sampling = _parse(json.loads(text))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: expected a saved conversation, got: {error!r}") from error
        system = messages.pop(0)["content"] if _starts_with_system(messages) else None
        self.system, self.messages, self.sampling = system, messages, sampling
        self.finish_reason = None


def _parse(saved: Any) -> tuple[list[dict[str, Any]], Sampling]:
    messages = [dict(message) for message in saved["messages"]]
    for message in messages:
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise TypeError(f"a message whose role and content are text expected, got {message}")
    sampling = saved.get("sampling", {})
    # JSON has names for keys where ids are meant.
    bias = {int(token): value for token, value in sampling.get("logit_bias", {}).items()}
    return messages, Sampling(**{**sampling, "logit_bias": bias})


def _starts_with_system(messages: list[dict[str, Any]]) -> bool:
    return bool(messages) and messages[0]["role"] == "system"


def repl(conversation: Conversation, raw: bool = False, console: Console | None = None) -> None:
    """The terminal chat, until /exit or the end of standard input.

    raw: no chat template and no memory; each line is completed as plain text, which is what a base
    model can do. Raises CheckpointError at once when a template is needed and the model has none.
    """
    if raw:
        _tokenizer(conversation.model)
    else:
        _prompt(conversation.model, [_message("user", "hi")])
    _Terminal(conversation, raw, console).run()


class _Terminal:
    def __init__(self, conversation: Conversation, raw: bool, console: Console | None) -> None:
        from rich.console import Console

        self.conversation = conversation
        self.raw = raw
        self.console = console or Console()

    def run(self) -> None:
        if _asks():
            self._note("/help lists the commands, Ctrl-D leaves")
        for line in self._lines():
            try:
                if line.strip() == "/exit":
                    return
                self._take(line)
            except (ValueError, TypeError, OSError, ArithmeticError) as error:
                self._note(f"{error}", "red")

    def _lines(self) -> Iterator[str]:
        if not _asks():
            yield from (line.rstrip("\r\n") for line in sys.stdin or ())
            return
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() a history and keys to edit with
        while True:
            try:
                yield input("> ")
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print()
                self._note("/exit or Ctrl-D leaves")

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            name, _, rest = line.partition(" ")
            self._command(name, rest.strip())
        elif line.strip():
            self._answer(line)

    def _answer(self, line: str) -> None:
        try:
            reason = self._complete(line) if self.raw else self._reply(line)
        except KeyboardInterrupt:
            self.console.print()
            self._note("stopped")
            return
        self.console.print()
        limit = self.conversation.sampling.max_new_tokens
        if reason == "length":
            self._note(f"stopped after {limit} tokens; /set max_new_tokens {4 * limit} allows more")
        if reason == "context":
            self._note("the model's context is full; /reset starts over")

    def _reply(self, line: str) -> str | None:
        with closing(self.conversation.send(line)) as pieces:
            self._say(pieces)
        return self.conversation.finish_reason

    def _complete(self, line: str) -> str | None:
        with closing(self.conversation.complete(line)) as pieces:
            self._say(pieces)
            return pieces.finish_reason

    def _say(self, pieces: Iterable[str]) -> None:
        for piece in pieces:
            # Past rich, which would turn tabs into spaces.
            self.console.file.write(piece.translate(CONTROLS))
            self.console.file.flush()

    def _note(self, text: str, style: str = "dim") -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _command(self, name: str, rest: str) -> None:
        conversation = self.conversation
        match name:
            case "/help":
                self._note(HELP)
            case "/system":
                conversation.system = rest or None
                conversation.reset()
            case "/reset":
                conversation.reset()
            case "/set":
                conversation.sampling = _with_setting(conversation.sampling, rest)
            case "/show":
                self._note(self._state())
            case "/save":
                conversation.save(_file(rest))
            case "/load":
                conversation.load(_file(rest))
            case _:
                raise ValueError(f"{name}: no such command. hint: /help lists them")

    def _state(self) -> str:
        conversation = self.conversation
        lines = [f"system: {conversation.system}"]
        lines += [f"{name}: {value}" for name, value in asdict(conversation.sampling).items()]
        turns, used = conversation.messages, 0
        if turns:
            used = len(_tokenizer(conversation.model).chat_ids(conversation.history))
        context = conversation.model.config.max_position_embeddings
        return "\n".join([*lines, f"length: {len(turns)} messages, {used} of {context} tokens"])


def _asks() -> bool:
    """Whether a person sits there; standard input may be closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def _file(name: str) -> Path:
    if not name:
        raise ValueError("expected the name of a file")
    return Path(name)


def _with_setting(sampling: Sampling, text: str) -> Sampling:
    """`sampling` with one field set from "NAME VALUE"; ValueError names what is wrong."""
    name, _, value = text.partition(" ")
    names = [field.name for field in fields(Sampling) if "python_only" not in field.metadata]
    if name not in names:
        raise ValueError(f"/set: expected one of {', '.join(names)}, got {name!r}")
    return replace(sampling, **{name: _parsed(name, value.strip())})


def _parsed(name: str, value: str) -> Any:
    if name == "stop":
        return (value,) if value else ()
    if name == "seed" and value == "none":
        return None
    try:
        return float(value) if isinstance(getattr(Sampling(), name), float) else int(value)
    except ValueError:
        raise ValueError(f"/set {name}: expected a number, got {value!r}") from None
