"""Who holds which blocks of a KVCache, and which finished blocks a new prompt can start from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from halfbyte.ops.paged_attention import BLOCK


class PrefixCache:
    """The blocks 1 .. blocks - 1 of a cache: free, held by sequences, or kept for their prefix.

    A kept block is known by its 16 tokens and by the block before it, the first one by its root,
    which names everything else that its keys depend on: the adapter's generation. Kept blocks that
    no sequence holds are given away when free ones run out, least recently used first.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks - 1
        self.hits = 0
        self._free = list(range(blocks - 1, 0, -1))
        self._holders = [0] * blocks
        # (the entry before, or the root; tokens) -> entry; entries are never numbered twice.
        self._entries: dict[tuple[Hashable, tuple[int, ...]], tuple[int, int]] = {}
        self._key_of: dict[int, tuple[Hashable, tuple[int, ...]]] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()
        self._next_entry = 0

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._unheld)

    @property
    def held(self) -> int:
        return self.blocks - self.available

    def match(self, root: Hashable, tokens: Sequence[int]) -> list[int]:
        """Hold and return the kept blocks of the longest known prefix of `tokens`.

        At least one token is left over, since a sequence needs the logits of its last one.
        """
        found: list[int] = []
        before: Hashable = ("root", root)
        for first in range(0, len(tokens) - BLOCK, BLOCK):
            entry = self._entries.get((before, tuple(tokens[first : first + BLOCK])))
            if entry is None:
                break
            before, block = entry
            found.append(block)
        for block in found:
            self._hold(block)
        self.hits += len(found)
        return found

    def take(self, count: int) -> list[int] | None:
        """Hold `count` blocks of no particular content; None, and nothing held, if too few."""
        if count > self.available:
            return None
        while len(self._free) < count:
            block, _ = self._unheld.popitem(last=False)
            self._forget(block)
            self._free.append(block)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def keep(self, root: Hashable, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Remember held blocks, as far as `tokens` fill them, for `match` to find."""
        before: Hashable = ("root", root)
        for place in range(min(len(tokens) // BLOCK, len(blocks))):
            key = (before, tuple(tokens[place * BLOCK : (place + 1) * BLOCK]))
            entry = self._entries.get(key)
            if entry is None:
                entry = (self._next_entry, blocks[place])
                self._next_entry += 1
                self._forget(blocks[place])
                self._entries[key] = entry
                self._key_of[blocks[place]] = key
            before = entry[0]

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of held blocks, each once; the last ones will be given away first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._key_of:
                    self._unheld[block] = None
                else:
                    self._free.append(block)

    def clear(self) -> None:
        """Forget all prefixes; what sequences hold stays theirs."""
        for block in list(self._key_of):
            self._forget(block)
        self._free += self._unheld
        self._unheld.clear()

    def _hold(self, block: int) -> None:
        self._holders[block] += 1
        self._unheld.pop(block, None)

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._entries[key]
