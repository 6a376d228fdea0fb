"""How a step is divided: among processes, and into micro-batches."""

from dataclasses import dataclass

import numpy as np

from scaletrain.order import Indices, Order


@dataclass(frozen=True, eq=False)
class Share:
    """What one process reads of each step: shares differ by at most one and partition the step's positions."""

    order: Order
    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def size(self) -> int:
        """Examples of each step that this process reads."""
        part = part_of(self.batch_size, self.world_size, self.rank)
        return int(part.stop - part.start)

    def block(self, first: int, steps: int) -> tuple[Indices, Indices]:
        """Return (positions, example indices), each (steps, size), of the steps from position ``first`` on."""
        part = part_of(self.batch_size, self.world_size, self.rank)
        starts = first + self.batch_size * np.arange(steps, dtype=np.int64)
        positions = starts[:, None] + np.arange(part.start, part.stop, dtype=np.int64)
        return positions, self.order(positions)


def split(size: int, parts: int) -> list[slice]:
    """Cut ``range(size)`` into ``parts`` slices whose sizes differ by at most one."""
    return [part_of(size, parts, i) for i in range(parts)]


def part_of(size: int, parts: int, i: int) -> slice:
    """Return the slice numbered ``i`` of ``split(size, parts)``, whatever their number."""
    return slice(size * i // parts, size * (i + 1) // parts)


def micro_batch_count(batch_size: int, world_size: int, micro_batch_size: int | None) -> int:
    """Number of micro-batches of every process in every step: enough for the largest share."""
    largest = -(-batch_size // world_size)
    return 1 if micro_batch_size is None else -(-largest // micro_batch_size)
