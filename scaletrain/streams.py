"""Training data that can only be read from front to back: shared out, shuffled in windows, resumed exactly."""

import copy
import hashlib
import time
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, default_collate

from scaletrain.agreement import gather_texts
from scaletrain.errors import InputError
from scaletrain.loader import MicroBatch, to_device
from scaletrain.order import Share, seed_for, seeds_for, split
from scaletrain.readers import Collate, narrow, seed_all
from scaletrain.workers import TIMEOUT_SECONDS, answers_of, as_is, leave_signals

COMPARED = 8
"""Examples by which the processes find out whether they read the same."""
NEW = {"pass": 0, "read": 0, "source": None, "window": 0, "taken": 0}
"""The state of a stream that nobody has read from."""


def is_stream(examples: Any) -> bool:
    """Whether ``examples`` can be iterated, but neither counted nor indexed."""
    return hasattr(examples, "__iter__") and not hasattr(examples, "__len__")


class Stream:
    """The examples that one process reads, pass after pass without end, and where it stands.

    They are read in windows, and each window is handed out in an order of its own, a function of (seed, number of the
    window). So all there is to a shuffle's state is where its window begins and how much of it has been handed out.
    """

    def __init__(self, dataset: Any, window: int, seed: int) -> None:
        """``dataset`` is an IterableDataset; one with ``state_dict`` goes on at once, another reads again what it has.

        ``window`` examples are shuffled together; 1 leaves the order as it is.
        """
        self._dataset, self.window, self._seed = dataset, window, seed
        self.state: dict[str, Any] = dict(NEW)
        """Where the next example comes from; ``source`` is what the dataset itself says."""

    def __iter__(self) -> Iterator[Any]:
        number, taken, done = self.state["window"], self.state["taken"], self.state["pass"]
        source, read = self._open(done, self.state["source"], self.state["read"]), self.state["read"]
        examples = iter(source)
        if self.state["source"] is None:
            for _ in islice(examples, read):
                continue
        while True:
            begin = {"pass": done, "read": read, "source": _state_of(source), "window": number}
            rows = list(self._draw(examples, done, read))
            read += len(rows)
            for k in np.argsort(seeds_for(seed_for(self._seed, 7, number), np.arange(len(rows))))[taken:]:
                taken += 1
                self.state = {**begin, "taken": taken}
                yield rows[k if self.window > 1 else taken - 1]
            number, taken = number + 1, 0
            if len(rows) < self.window:
                if read == 0:
                    raise InputError("the stream of training examples is empty; it needs at least one")
                done, read = done + 1, 0
                source = self._open(done, None, 0)
                examples = iter(source)

    def _draw(self, examples: Iterator[Any], done: int, read: int) -> Iterator[Any]:
        """Read a window; what is random in reading depends on the seed and the example's place alone."""
        for i in range(self.window):
            seed_all(seed_for(self._seed, 2, done, read + i))
            try:
                yield next(examples)
            except StopIteration:
                return

    def _open(self, done: int, source: Any, read: int) -> Any:
        dataset = copy.copy(self._dataset)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(done)
        if source is not None:
            dataset.load_state_dict(source)
        return dataset


class StreamLoader:
    """The training data of one process from a stream: what ``Loader`` is for data with a length."""

    in_memory = False

    def __init__(
        self, stream: Stream, share: Share, micro_batches: int, collate: Collate | None, *,
        steps: int, workers: int, device: torch.device, double: bool,
    ) -> None:  # fmt: skip
        """``steps`` is the length of the run, which stands for an epoch."""
        self.stream, self.share, self.micro_batches = stream, share, micro_batches
        self.workers, self.device = min(workers, 1), device
        self.examples = steps * share.batch_size
        self.waited_seconds = 0.0
        self.bad: dict[int, str] = {}
        self._collate, self._double = collate or default_collate, double
        self._counted = [part.stop - part.start for part in split(share.size, micro_batches)]

    @property
    def state(self) -> dict[str, Any]:
        """Where the stream stands after the last step handed out."""
        return self.stream.state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.stream.state = state

    def order_hash(self) -> str:
        """Say how the stream is divided and shuffled, which cannot change when a run goes on."""
        return f"a stream for {self.share.world_size} processes, shuffled {self.stream.window} at a time"

    def steps(self, first: int) -> Iterator[list[MicroBatch]]:
        """Yield each step's micro-batches from where the stream stands; ``first`` is known to it."""
        source: Any = _Steps(self)
        if self.workers:
            source = DataLoader(
                source,
                batch_size=None,
                collate_fn=as_is,
                num_workers=1,
                timeout=TIMEOUT_SECONDS,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=leave_signals,
                generator=torch.Generator(),
            )
        found = answers_of(source) if self.workers else iter(source)
        while True:
            started = time.perf_counter()
            batches, self.state = next(found)
            self.waited_seconds += time.perf_counter() - started
            yield [MicroBatch(to_device(b, self.device), n) for b, n in zip(batches, self._counted, strict=True)]

    def first(self) -> list[MicroBatch]:
        """Return a step's micro-batches without moving on."""
        state = self.state
        batches, _ = next(iter(_Steps(self)))
        self.state = state
        return [MicroBatch(to_device(b, self.device), n) for b, n in zip(batches, self._counted, strict=True)]

    def read_step(self, examples: Iterator[Any]) -> list[Any]:
        """Read one step; a process short of a micro-batch repeats its last example."""
        rows = list(islice(examples, self.share.size))
        parts = [rows[part] or rows[-1:] for part in split(len(rows), self.micro_batches)]
        batches = [self._collate(part) for part in parts]
        return batches if self._double else [narrow(batch) for batch in batches]


class _Steps(IterableDataset[Any]):
    """Steps with the state after each, here or in a worker."""

    def __init__(self, loader: StreamLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        examples = iter(self.loader.stream)
        while True:
            yield self.loader.read_step(examples), self.loader.stream.state


def shared_out(dataset: Any, rank: int, world_size: int, group: dist.ProcessGroup | None) -> Any:
    """Return this process's part of a stream: whole shards where it has enough of them, else every W-th example.

    A stream that is divided already stays as it is. Raises InputError where two processes would read the same. Every
    rank must reach this line.
    """
    _check(dataset)
    if world_size == 1:
        return dataset
    if len(set(gather_texts(_sample(dataset), group))) > 1:
        return dataset
    if type(dataset).__module__.startswith("datasets."):
        from datasets.distributed import split_dataset_by_node

        part = split_dataset_by_node(dataset, rank, world_size)
    elif hasattr(dataset, "shard") and hasattr(dataset, "num_shards") and dataset.num_shards % world_size == 0:
        part = dataset.shard(num_shards=world_size, index=rank)
    else:
        part = EveryNth(dataset, rank, world_size)
    seen = gather_texts(_sample(part), group)
    for other in range(world_size):
        if other != rank and seen[other] == seen[rank]:
            raise InputError(f"ranks {min(rank, other)} and {max(rank, other)} read the same examples of the stream")
    return part


class EveryNth:
    """The examples ``rank``, ``rank`` + W, ... of a stream: each process reads all and keeps its own."""

    def __init__(self, dataset: Any, rank: int, world_size: int) -> None:
        self.dataset, self.rank, self.world_size = dataset, rank, world_size

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.dataset), self.rank, None, self.world_size)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _check(dataset: Any) -> None:
    """Raise InputError for a stream whose place cannot be kept."""
    if type(getattr(dataset, "_ex_iterable", None)).__name__ == "BufferShuffledExamplesIterable":
        raise InputError(
            "the stream is shuffled in a buffer of its own, whose content no checkpoint has; leave .shuffle() out and "
            "say Data(..., shuffle_buffer=1000)"
        )


def _state_of(dataset: Any) -> Any:
    return dataset.state_dict() if hasattr(dataset, "state_dict") else None


def _sample(dataset: Any) -> str:
    """Hash the first few examples."""
    digest = hashlib.sha256()
    seed_all(0)
    for example in islice(iter(copy.copy(dataset)), COMPARED):
        for leaf in chain.from_iterable(example.items()) if isinstance(example, dict) else [example]:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
