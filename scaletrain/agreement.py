"""How processes agree: short texts at once, wishes one step late.

Everything here runs on the ``control`` group (gloo) in the main thread. No message is pickled.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.errors import InputError

T = TypeVar("T")


class Wishes:
    """Requests any process may make (stop), known to all one step later.

    Each step one MAX all-reduce of int64 is started, and read at the next step, so nobody waits for it. With
    one process the delay is the same: the number of processes never changes at which step a wish is granted.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._mine = 0  # this process's rank + 1 once it asks, so that the maximum names one that did
        self._sent = 0  # what a lone process said at the call before
        self._flying: tuple[Tensor, dist.Work] | None = None

    def stop(self) -> None:
        """Ask for the end of training."""
        self._mine = 1 + (0 if self._group is None else dist.get_rank())

    def exchange(self) -> int | None:
        """Return the rank that had asked to stop at the call before, else None; send this process's own wish.

        Every rank must reach this line, once a step.
        """
        if self._group is None:
            asked, self._sent = self._sent, self._mine
            return asked - 1 if asked else None
        granted = self.drain()
        wish = torch.tensor(self._mine, dtype=torch.int64)
        self._flying = (wish, dist.all_reduce(wish, dist.ReduceOp.MAX, self._group, async_op=True))
        return granted

    def drain(self) -> int | None:
        """Wait for the exchange in flight, if any; return the rank that asked to stop, else None."""
        if self._flying is None:
            return None
        wish, work = self._flying
        work.wait()
        self._flying = None
        return int(wish) - 1 if wish else None


def gather_texts(text: str, group: dist.ProcessGroup | None) -> list[str]:
    """Return every rank's text, in order of rank. Every rank must reach this line."""
    if group is None:
        return [text]
    mine = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(mine)] = mine
    texts: list[Tensor] = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=group)
    return [bytes(t[: int(size)].tolist()).decode() for t, size in zip(texts, sizes, strict=True)]


def together(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Do ``work`` on every process; an InputError or OSError on any becomes the same InputError on all.

    Every rank must reach this line. Without it, the ranks that succeeded would wait for ever.
    """
    result: list[T] = []
    error = ""
    try:
        result.append(work())
    except (InputError, OSError) as mistake:
        error = str(mistake) or type(mistake).__name__
    for said in gather_texts(error, group):
        if said:
            raise InputError(said)
    return result[0]


def first_then_others(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Do ``work`` on rank 0 and then on the others, so that what rank 0 downloads or caches is there for them.

    Every rank must reach this line; errors as in ``together``.
    """
    rank = 0 if group is None else dist.get_rank()
    done = together(work if rank == 0 else lambda: None, group)
    later = together(work if rank != 0 else lambda: None, group)
    return done if rank == 0 else later  # type: ignore[return-value]  # the other is None
