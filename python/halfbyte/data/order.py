"""Which rows make up which optimizer step: a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from halfbyte.errors import DataError

MEGA_BATCH = 50


def split_rows(count: int, eval_count: int, seed: int = 42) -> tuple[list[int], list[int]]:
    """Indices of training and evaluation rows, as datasets' train_test_split shuffles them.

    Raises DataError if no training row would be left.
    """
    if not 0 <= eval_count < count:
        raise DataError(
            f"eval_dataset_size {eval_count} of {count} usable rows leaves none to train on"
        )
    if eval_count == 0:
        return list(range(count)), []
    order = np.random.default_rng(seed).permutation(count).tolist()
    return order[eval_count:], order[:eval_count]


def grouped_by_length(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> list[int]:
    """Random order in which neighbours have similar lengths.

    transformers' get_length_grouped_indices: mega-batches of 50 batches (fewer if there are less
    than 200), each sorted from long to short, and the longest row of all first, so that memory
    that does not suffice shows in the first step.
    """
    mega = max(1, min(len(lengths) // (batch_size * 4), MEGA_BATCH)) * batch_size
    shuffled = torch.randperm(len(lengths), generator=generator, device="cpu").tolist()
    batches = [shuffled[start : start + mega] for start in range(0, len(shuffled), mega)]
    batches = [sorted(batch, key=lambda row: lengths[row], reverse=True) for batch in batches]
    longest = max(range(len(batches)), key=lambda number: lengths[batches[number][0]])
    batches[0][0], batches[longest][0] = batches[longest][0], batches[0][0]
    return [row for batch in batches for row in batch]


@dataclass(frozen=True, eq=False)
class Batches:
    """The global batches of a run.

    Every optimizer step takes `per_device * accumulation * world_size` rows; the last one of an
    epoch takes what is left. The order depends on the seed and the epoch alone, so the number of
    the step is the whole data position.
    """

    lengths: tuple[int, ...]
    per_device: int
    accumulation: int
    world_size: int
    seed: int
    group_by_length: bool

    @property
    def rows_per_step(self) -> int:
        return self.per_device * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.rows_per_step)

    def rows(self, step: int) -> list[int]:
        """Row indices of optimizer step `step` (from 0), over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.rows_per_step
        return epoch_order(self, epoch)[start : start + self.rows_per_step]

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """One rank's share of the step: slice `rank` of each world_size * per_device rows.

        So the ranks together see the micro-batches of one process with world_size times the
        batch. Near the end of an epoch a rank may have fewer.
        """
        rows, stride = self.rows(step), self.per_device * self.world_size
        first = rank * self.per_device
        starts = range(first, len(rows), stride)
        return [rows[start : start + self.per_device] for start in starts]


@lru_cache(maxsize=2)
def epoch_order(batches: Batches, epoch: int) -> list[int]:
    """The order of all rows in an epoch."""
    generator = torch.Generator().manual_seed(batches.seed + epoch)
    if batches.group_by_length:
        return grouped_by_length(batches.lengths, batches.rows_per_step, generator)
    return torch.randperm(len(batches.lengths), generator=generator, device="cpu").tolist()
