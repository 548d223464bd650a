"""A reply in the making: tokens in, certain text out, stops and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from halfbyte.grammar import Grammar
from halfbyte.tokenizer import Detokenizer


class StopStrings:
    """Cuts a text that arrives in pieces at the first stop string to be complete in it.

    Text that may yet turn out to begin a stop string is held back, so what is given out never has
    to be taken back, and the cut does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.cut: int | None = None
        self._held = ""
        self._given = 0

    def push(self, text: str) -> str:
        """Take the next piece, give out what is certain; nothing after the cut."""
        if self.cut is not None:
            return ""
        self._held += text
        ends = [(at + len(s), at) for s in self.stops if (at := self._held.find(s)) >= 0]
        if ends:
            start = min(ends)[1]
            self.cut = self._given + start
        else:
            start = len(self._held) - self._undecided()
        return self._give(start)

    def flush(self) -> str:
        """Give out what was held back, at the end of the text."""
        return "" if self.cut is not None else self._give(len(self._held))

    def _give(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        self._given += length
        return piece

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self.stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self.stops):
                return length
        return 0


class ReplyText:
    """A reply's text: tokens in, certain text out, and which tokens lie before the cut.

    continues: whether it goes on with the prompt's. given: what is out so far.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], continues: bool = False) -> None:
        self.continues = continues
        self.detokenizer = Detokenizer(tokenizer, continues=continues)
        self.stops = StopStrings(stops)
        self.ends = [0]
        self.given = ""

    def push(self, token: int) -> str:
        text = self.detokenizer.push(token)
        self.ends.append(self.ends[-1] + len(text))
        return self._give(self.stops.push(text))

    def flush(self) -> str:
        return self._give(self.stops.push(self.detokenizer.flush()) + self.stops.flush())

    def _give(self, piece: str) -> str:
        self.given += piece
        return piece

    def tokens_before(self, cut: int) -> int:
        """How many tokens it takes to write the text that ends at or before `cut` characters."""
        return self.ends.index(max(end for end in self.ends if end <= cut))


class TokenLogprobs(NamedTuple):
    """Log-probabilities by the model alone: of the token, and of the likeliest ones, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Reply:
    """The tokens that answer a prompt of `prompt_tokens` tokens, and their text if there is one.

    ends: ids that end the reply. limit: most tokens. context: most tokens with the prompt's.
    grammar: what the tokens must follow; the reply ends where it is complete.
    finish_reason: None until it is "stop" (an end or a stop string), "length", "context",
    "cancelled" or "error".
    """

    def __init__(
        self,
        prompt_tokens: int,
        ends: set[int],
        limit: int,
        context: int,
        text: ReplyText | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.ends = ends
        self.limit = limit
        self.context = context
        self.text = text
        self.grammar = grammar
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason = "context" if prompt_tokens >= context else None

    @property
    def most_tokens(self) -> int:
        """No reply to this prompt is longer."""
        return min(self.limit, self.context - self.prompt_tokens)

    @property
    def usage(self) -> dict[str, int]:
        """Token counts, named as in OpenAI's API."""
        prompt, reply = self.prompt_tokens, len(self.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply,
            "total_tokens": prompt + reply,
        }

    def accept(self, token: int, logprobs: TokenLogprobs | None = None) -> str:
        """Take a sampled token; return the text that became certain by it."""
        if token in self.ends:
            return self.finish("stop")
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        piece = self.text.push(token) if self.text else ""
        if self.text and self.text.stops.cut is not None:
            return piece + self.finish("stop")
        if self.grammar is not None and self.grammar.accept(token):
            return piece + self.finish("stop")
        if len(self.tokens) == self.limit:
            return piece + self.finish("length")
        if self.prompt_tokens + len(self.tokens) == self.context:
            return piece + self.finish("context")
        return piece

    def finish(self, reason: str) -> str:
        """End here; return the text that was held back."""
        self.finish_reason = reason
        if self.text is None:
            return ""
        piece = self.text.flush()
        if self.text.stops.cut is not None:
            self.finish_reason = "stop"
            kept = self.text.tokens_before(self.text.stops.cut)
            del self.tokens[kept:], self.logprobs[kept:]
        return piece
