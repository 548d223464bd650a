"""Answers as OpenAI's API has them, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from typing import Any

from halfbyte.reply import Reply, TokenLogprobs
from halfbyte.scheduler import Request
from halfbyte.tokenizer import Tokenizer

# Ours, then OpenAI's: it knows no limit but one of length.
FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length"}


class Answer:
    """What all chunks of one answer share."""

    def __init__(self, model: str, requests: list[Request], tokenizer: Tokenizer) -> None:
        self.requests, self.tokenizer = requests, tokenizer
        adapter = requests[0].adapter
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        if adapter is not None:
            self.head["adapter_generation"] = adapter.generation
        # Log-probabilities that chunks have shown already, for each choice.
        self.shown = [0] * len(requests)

    prefix: str
    kind: str
    chunk_kind: str

    def whole(self, usage: dict[str, int]) -> dict[str, Any]:
        choices = [self._whole(i, request.reply) for i, request in enumerate(self.requests)]
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_kind, "choices": choices, **fields}

    def _whole(self, choice: int, reply: Reply) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text."""
        return []

    def piece(self, choice: int, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def end(self, choice: int) -> dict[str, Any]:
        raise NotImplementedError

    def _reason(self, choice: int) -> str:
        return FINISH_REASONS[str(self.requests[choice].reply.finish_reason)]

    def _new_logprobs(self, choice: int) -> list[TokenLogprobs] | None:
        """Those of the tokens since the last chunk; None if none were asked for."""
        request = self.requests[choice]
        if request.sampling.logprobs is None:
            return None
        entries = request.reply.logprobs[self.shown[choice] :]
        self.shown[choice] += len(entries)
        return entries

    def _begins(self, choice: int, place: int) -> bool:
        """Whether a token of the reply is the first of its text."""
        text = self.requests[choice].reply.text
        return place == 0 and not (text and text.continues)


class ChatAnswer(Answer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _whole(self, choice: int, reply: Reply) -> dict[str, Any]:
        text = reply.text.given if reply.text else ""
        return {
            "index": choice,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(choice),
            "finish_reason": self._reason(choice),
        }

    def opening(self) -> list[dict[str, Any]]:
        deltas = [{"role": "assistant", "content": ""} for _ in self.requests]
        return [self._delta(choice, delta) for choice, delta in enumerate(deltas)]

    def piece(self, choice: int, text: str) -> dict[str, Any]:
        return self._delta(choice, {"content": text}, logprobs=self._logprobs(choice))

    def end(self, choice: int) -> dict[str, Any]:
        logprobs = self._logprobs(choice)
        return self._delta(choice, {}, self._reason(choice), logprobs)

    def _delta(
        self, choice: int, delta: dict[str, str], reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        entry = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.chunk([entry])

    def _logprobs(self, choice: int) -> dict[str, Any] | None:
        start = self.shown[choice]
        entries = self._new_logprobs(choice)
        if entries is None:
            return None
        content = []
        for place, entry in enumerate(entries, start):
            first = self._begins(choice, place)
            others = [self._token(*other, first) for other in entry.top]
            content.append(
                self._token(entry.token, entry.logprob, first) | {"top_logprobs": others}
            )
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float, first: bool) -> dict[str, Any]:
        written = list(self.tokenizer.token_bytes(token, first))
        text = self.tokenizer.piece(token, first)
        return {"token": text, "logprob": logprob, "bytes": written}


class TextAnswer(Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _whole(self, choice: int, reply: Reply) -> dict[str, Any]:
        text = reply.text.given if reply.text else ""
        return self._entry(choice, text, self._reason(choice))

    def piece(self, choice: int, text: str) -> dict[str, Any]:
        return self.chunk([self._entry(choice, text)])

    def end(self, choice: int) -> dict[str, Any]:
        return self.chunk([self._entry(choice, "", self._reason(choice))])

    def _entry(self, choice: int, text: str, reason: str | None = None) -> dict[str, Any]:
        return {
            "index": choice,
            "text": text,
            "logprobs": self._logprobs(choice),
            "finish_reason": reason,
        }

    def _logprobs(self, choice: int) -> dict[str, Any] | None:
        start = self.shown[choice]
        entries = self._new_logprobs(choice)
        if entries is None:
            return None
        text = self.requests[choice].reply.text
        begins = text.ends[start : start + len(entries)] if text else []
        tokens, tops = [], []
        for place, entry in enumerate(entries, start):
            first = self._begins(choice, place)
            tokens.append(self.tokenizer.piece(entry.token, first))
            tops.append({self.tokenizer.piece(token, first): p for token, p in entry.top})
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": tops,
            "text_offset": begins,
        }
