"""How processes agree: short texts at once, wishes one step late.

In the main thread everything runs on the ``control`` group (gloo). No message is pickled.
"""

import json
from collections.abc import Callable
from math import prod
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.errors import CheckpointError, InputError

T = TypeVar("T")
SAVING = "saving"
"""Name of the thread that writes a checkpoint, on a group of its own."""


class Wish(NamedTuple):
    """What processes may ask of all: each a number, 0 for nothing; of several, the highest is heard."""

    stop: int = 0
    """1 + the rank that asks for the end of training."""
    save: int = 0
    leave: int = 0
    """The exit code to leave with, once everything is saved."""
    failed: int = 0
    """1 where saving has failed."""


NO_WISH = Wish()


class Wishes:
    """Requests any process may make, known to all one step later.

    Each step one MAX all-reduce of int64 is started, and read at the next step, so nobody waits for it. With
    one process the delay is the same: the number of processes never changes at which step a wish is granted.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._sent = NO_WISH  # by a lone process, at the call before
        self._held = NO_WISH  # heard by ``drain`` and not yet handed out
        self._flying: tuple[Tensor, dist.Work] | None = None

    def read(self) -> Wish:
        """Return what was asked for when the processes last sent their wishes, and what is held."""
        granted = self.drain()
        self._held = NO_WISH
        return granted

    def send(self, mine: Wish) -> None:
        """Send this process's own wish. Every rank must reach this line."""
        if self._group is None:
            self._sent = mine
        else:
            wish = torch.tensor(mine, dtype=torch.int64)
            self._flying = (wish, dist.all_reduce(wish, dist.ReduceOp.MAX, self._group, async_op=True))

    def drain(self) -> Wish:
        """Wait for the wishes in flight, if any; return what the next ``read`` will."""
        if self._group is None:
            self.hold(self._sent)
            self._sent = NO_WISH
        elif self._flying is not None:
            wish, work = self._flying
            work.wait()
            self._flying = None
            self.hold(Wish(*wish.tolist()))
        return self._held

    def hold(self, wish: Wish) -> None:
        """Let the next ``read`` return ``wish`` as well."""
        if any(wish):
            self._held = Wish(*map(max, self._held, wish))


def gather_texts(text: str, group: dist.ProcessGroup | None) -> list[str]:
    """Return every rank's text, in order of rank. Every rank must reach this line."""
    if group is None:
        return [text]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    content = text.encode()
    dist.all_gather(sizes, torch.tensor([len(content)]), group=group)
    longest = max(int(size) for size in sizes)
    if longest == 0:
        return [""] * len(sizes)
    padded = torch.frombuffer(bytearray(content.ljust(longest)), dtype=torch.uint8)
    texts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=group)
    return [t[: int(size)].numpy().tobytes().decode() for t, size in zip(texts, sizes, strict=True)]


def gather_tensors(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Return every rank's tensor on the CPU, of any shape and dtype each. Every rank must reach this line."""
    if group is None:
        return [tensor]
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    heads = [json.loads(text) for text in gather_texts(json.dumps([str(tensor.dtype), *tensor.shape]), group)]
    wholes = [(getattr(torch, dtype.removeprefix("torch.")), shape) for dtype, *shape in heads]
    sizes = [dtype.itemsize * prod(shape) for dtype, shape in wholes]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(content)] = content
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=group)
    return [f[:size].view(dtype).view(shape) for f, size, (dtype, shape) in zip(found, sizes, wholes, strict=True)]


def together(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Do ``work`` on every process; what it raises on one is raised on all.

    An InputError and a CheckpointError are raised as they are, an OSError as InputError. Every rank must reach this
    line. Without it, the ranks that succeeded would wait for ever.
    """
    result: list[T] = []
    error = None
    try:
        result.append(work())
    except (InputError, OSError) as mistake:
        error = ["", str(mistake) or type(mistake).__name__]
    except CheckpointError as mistake:
        error = [mistake.rule, str(mistake)]
    for said in gather_texts(json.dumps(error), group):
        if said != "null":
            rule, message = json.loads(said)
            raise CheckpointError(rule, message) if rule else InputError(message)
    return result[0]


def first_then_others(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Do ``work`` on rank 0 and then on the others, so that what rank 0 downloads or caches is there for them.

    Every rank must reach this line; errors as in ``together``.
    """
    rank = 0 if group is None else dist.get_rank()
    done = together(work if rank == 0 else lambda: None, group)
    later = together(work if rank != 0 else lambda: None, group)
    return done if rank == 0 else later  # type: ignore[return-value]  # the other is None
