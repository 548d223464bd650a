"""JSON by a schema: which tokens may come next in a reply."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from halfbyte.errors import SchemaError
from halfbyte.tokenizer import Tokenizer

T = TypeVar("T")

# JSON allows any space between two tokens, but a model that cannot decide may never leave it.
SPACE = r"[ \n\t]{0,32}"
# On integers that round to this or less the library calls itself until no stack is deep enough.
TOO_SMALL = -(2.0**63)
# The library follows references by recursion, each a call of some KB; what it takes for too large a
# schema has some ten thousand of them. Memory of a stack that nobody touches costs nothing.
STACK_BYTES = 256 << 20
# It is one setting for all threads.
_stack_size = threading.Lock()


class Vocabulary:
    """A model's tokens as llguidance knows them, made once for all grammars.

    vocab_size: that of the model's logits. ends: ids that may follow what is complete.
    Raises ImportError without the extra `json`.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Iterable[int]) -> None:
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise ImportError(
                f"json_schema needs {error.name}. hint: pip install 'halfbyte[json]'"
            ) from error
        self._library = llguidance
        self.vocab_size = vocab_size
        backend = tokenizer.backend.to_str()
        self._tokens = llguidance.LLTokenizer(backend, vocab_size, sorted(ends) or None)

    def grammar(self, schema: Mapping[str, Any], device: torch.device) -> Grammar:
        """A reply's grammar. Raises SchemaError if it is none or is not supported."""
        try:
            text = json.dumps(schema)
            json.loads(text, parse_int=_check_number, parse_float=_check_number)
        except (TypeError, ValueError, RecursionError) as error:
            raise SchemaError(f"json_schema: expected values of JSON, got {error}") from None
        kind, spaces = self._library.LLMatcher, {"whitespace_pattern": SPACE}
        source = kind.grammar_from_json_schema(text, overrides=spaces)
        limits = self._library.LLParserLimits(verbose_errors=False)
        matcher = _on_a_deep_stack(lambda: kind(self._tokens, source, log_level=0, limits=limits))
        return Grammar(matcher, self.vocab_size, device)


class Grammar:
    """Where a reply is in the language of its schema.

    mask: int32 [ceil(vocab_size / 32)] on the CPU; bit t % 32 of word t // 32 says whether token
    t may come next. device: where it will be copied to.
    """

    def __init__(self, matcher: Any, vocab_size: int, device: torch.device) -> None:
        self._matcher = matcher
        words = (vocab_size + 31) // 32
        pinned = device.type == "cuda"
        self.mask = torch.zeros(words, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self.fill()

    def fill(self) -> Tensor:
        """Write the mask of the next token. Raises SchemaError where the grammar is too complex."""
        mask = self.mask
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        if self._matcher.is_error():
            said, *_ = self._matcher.get_error().partition("\n<backtrace>")
            raise SchemaError(f"json_schema: {said}")
        return mask

    def accept(self, token: int) -> bool:
        """Take the reply's next token; whether nothing can follow."""
        self._matcher.consume_token(token)
        return self._matcher.is_stopped() and not self._matcher.is_error()


def _check_number(number: str) -> None:
    if float(number) <= TOO_SMALL:
        raise ValueError(f"{number}, too small a number")


def _on_a_deep_stack(work: Callable[[], T]) -> T:
    """What `work` returns, or raises."""
    with ThreadPoolExecutor(max_workers=1) as one:
        with _stack_size:
            before = threading.stack_size(STACK_BYTES)
            try:
                found = one.submit(work)
            finally:
                threading.stack_size(before)
        return found.result()
