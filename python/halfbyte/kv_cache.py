"""Keys and values of the tokens a batch of sequences has seen so far."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.errors import ContextLengthError


class CacheShape(Protocol):
    """The part of a model's config that gives a cache its shape."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class KVCache:
    """One [batch, max_len, num_key_value_heads, head_dim] tensor of keys and of values per layer.

    Every row has a length of its own, so sequences of different lengths decode together: a new
    token's key is written at its row's length and attends to the keys at or before it. Rows are
    never padded on the left. `lengths` lists the tokens of each row, on the host, so that no
    forward has to wait for the device to know them.

    Raises ContextLengthError when a forward would pass `max_len`.
    """

    def __init__(
        self,
        config: CacheShape,
        batch: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if batch < 1 or max_len < 1:
            raise ValueError(f"KVCache: expected batch and max_len >= 1, got {batch} and {max_len}")
        shape = (batch, max_len, config.num_key_value_heads, config.head_dim)
        # Zeros, because a masked key still multiplies its value by zero, and 0 * NaN is NaN.
        self.keys = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.max_len = max_len
        self.lengths = [0] * batch
        self._starts = torch.zeros(batch, dtype=torch.int64, device=device)
        self._rows = torch.arange(batch, device=device)[:, None]
        self._counts: list[int] | None = None

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether all rows hold the same number of tokens."""
        return min(self.lengths) == max(self.lengths)

    @property
    def counts(self) -> list[int] | None:
        """Real tokens per row of the next forward; None when no row of it is padded."""
        return self._counts

    def expect(self, counts: Sequence[int]) -> None:
        """Say how many tokens of each row of the next forward are real; the rest is right padding.

        The keys of padding are written past the row's length, where the next token replaces them
        before anything attends to them.
        """
        if len(counts) != self.batch or min(counts) < 1:
            raise ValueError(
                f"KVCache.expect: expected {self.batch} counts >= 1, got {list(counts)}"
            )
        self._counts = list(counts)

    def check(self, batch: int, tokens: int) -> None:
        """Raise ValueError or ContextLengthError if ids [batch, tokens] cannot be appended."""
        if batch != self.batch:
            raise ValueError(f"KVCache: expected ids of {self.batch} rows, got {batch}")
        if self._counts is not None and max(self._counts) > tokens:
            raise ValueError(
                f"KVCache: expected at least {max(self._counts)} tokens a row, got {tokens}"
            )
        if max(self.lengths) + tokens > self.max_len:
            raise ContextLengthError(
                f"KVCache: {max(self.lengths)} cached + {tokens} new tokens exceed its length of "
                f"{self.max_len}; shorten the prompt or ask for fewer new tokens"
            )

    def positions(self, tokens: int) -> Tensor:
        """int64 [batch, tokens] (or [1, tokens] when uniform): positions of the next tokens."""
        if self.uniform:
            start = self.lengths[0]
            return torch.arange(start, start + tokens, device=self._starts.device)[None]
        return self._starts[:, None] + torch.arange(tokens, device=self._starts.device)

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys, values [batch, tokens, num_key_value_heads, head_dim] at `positions`."""
        if self.uniform:
            span = slice(self.lengths[0], self.lengths[0] + keys.shape[1])
            self.keys[layer][:, span] = keys
            self.values[layer][:, span] = values
            return
        self.keys[layer][self._rows, positions] = keys.to(self.keys[layer].dtype)
        self.values[layer][self._rows, positions] = values.to(self.values[layer].dtype)

    def read(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values at positions first to last (exclusive), as views."""
        return self.keys[layer][:, first:last], self.values[layer][:, first:last]

    def advance(self, tokens: int) -> None:
        """Count the tokens of a finished forward."""
        counts = self._counts or [tokens] * self.batch
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self._starts += tokens if self._counts is None else self._starts.new_tensor(counts)
        self._counts = None

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._starts.device)
        self.keys = [keys.index_select(0, index) for keys in self.keys]
        self.values = [values.index_select(0, index) for values in self.values]
        self._starts = self._starts.index_select(0, index)
        self._rows = self._rows[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]
