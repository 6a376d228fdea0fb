"""Training data that can only be read from front to back: shared out, shuffled in windows, resumed exactly."""

import copy
import json
import time
from collections.abc import Iterator
from itertools import combinations, islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from scaletrain import workers
from scaletrain.agreement import gather_texts, together
from scaletrain.content import content_hash
from scaletrain.errors import InputError
from scaletrain.loader import MicroBatch, copied_ahead, to_device
from scaletrain.order import Share, seed_for, seeds_for, split
from scaletrain.randomness import seed_all
from scaletrain.readers import Collate, collated, narrow, unreadable
from scaletrain.workers import BROKEN_PIPE, Failure, answers_of, as_is, leave_signals, worker_is_lost

COMPARED = 32
"""Examples by which the processes find out whether they read the same."""
NEW = {"pass": 0, "read": 0, "source": None, "window": 0, "taken": 0}
"""The state of a stream that nobody has read from."""


class Stream:
    """The examples that one process reads, pass after pass without end, and where it stands.

    They are read in windows, and each window is handed out in an order of its own, a function of (seed, number of the
    window). So all there is to a shuffle's state is where its window begins and how much of it has been handed out.
    """

    def __init__(self, dataset: Any, window: int, seed: int, rank: int = 0) -> None:
        """``dataset`` is an IterableDataset; one with ``state_dict`` goes on at once, another reads again what it has.

        ``window`` examples are shuffled together; 1 leaves the order as it is.
        """
        self._dataset, self.window, self._seed, self._rank = dataset, window, seed, rank
        self.state: dict[str, Any] = dict(NEW)
        """Where the next example comes from; ``source`` is what the dataset itself says."""

    def __iter__(self) -> Iterator[Any]:
        number, taken, done = self.state["window"], self.state["taken"], self.state["pass"]
        source, read = self._open(done, self.state["source"]), self.state["read"]
        examples = self._draw(source, done, read if self.state["source"] is not None else 0)
        if self.state["source"] is None:
            for _ in islice(examples, read):
                continue
        while True:
            begin = {"pass": done, "read": read, "source": _state_of(source), "window": number}
            rows = list(islice(examples, self.window))
            read += len(rows)
            keys = seeds_for(seed_for(self._seed, 7, self._rank, number), np.arange(len(rows)))
            for k in np.argsort(keys)[taken:]:
                taken += 1
                self.state = {**begin, "taken": taken}
                yield rows[k if self.window > 1 else taken - 1]
            number, taken = number + 1, 0
            if len(rows) < self.window:
                if read == 0:
                    raise InputError("the stream of training examples is empty; it needs at least one")
                done, read = done + 1, 0
                source = self._open(done, None)
                examples = self._draw(source, done, 0)

    def _draw(self, source: Any, done: int, read: int) -> Iterator[Any]:
        """Read on; what is random in reading depends on the seed, the rank and the example's place alone.

        Where a pass begins it does not depend on the rank: files that are shuffled then are so alike everywhere.
        """
        seed_all(seed_for(self._seed, 2, done, self._rank, read) if read else seed_for(self._seed, 2, done))
        try:
            for example in iter(source):
                yield example
                read += 1
                seed_all(seed_for(self._seed, 2, done, self._rank, read))
        except InputError:
            raise
        except Exception as error:
            raise unreadable(
                error, f"example {read} of pass {done} of the stream", "mend it, or do not yield it"
            ) from error

    def _open(self, done: int, source: Any) -> Any:
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
        self._collate, self._double = collate, double
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

    @property
    def advice(self) -> str:
        """What to change when training waits for data."""
        ahead = "" if self.workers else "--workers 1 reads ahead in a process of its own; "
        return f"{ahead}a stream is read by one process: files in Parquet are read by several, many rows at a time"

    def steps(self, first: int) -> Iterator[list[MicroBatch]]:
        """Yield each step's micro-batches from where the stream stands; ``first`` is known to it.

        A worker that dies or hangs is replaced once: the stream goes on after the last step that was handed out.
        """
        try:
            yield from self._steps()
        except (RuntimeError, *BROKEN_PIPE) as error:
            if not self.workers or not worker_is_lost(error):
                raise
            yield from self._steps()

    def _steps(self) -> Iterator[list[MicroBatch]]:
        found = copied_ahead(answers_of(self._loader()) if self.workers else iter(_Steps(self)), self.device)
        while True:
            started = time.perf_counter()
            batches, self.state = next(found)
            self.waited_seconds += time.perf_counter() - started
            yield [MicroBatch(batch, n) for batch, n in zip(batches, self._counted, strict=True)]

    def _loader(self) -> DataLoader[Any]:
        return DataLoader(
            _Steps(self, careful=True),
            batch_size=None,
            collate_fn=as_is,
            num_workers=1,
            timeout=workers.TIMEOUT_SECONDS,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals,
            generator=torch.Generator(),
        )

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
        batches = [collated(self._collate, part) for part in parts]
        return batches if self._double else [narrow(batch) for batch in batches]


class _Steps(IterableDataset[Any]):
    """Steps with the state after each, here or in a worker; ``careful`` answers with a Failure instead of raising."""

    def __init__(self, loader: StreamLoader, *, careful: bool = False) -> None:
        self.loader, self.careful = loader, careful

    def __iter__(self) -> Iterator[Any]:
        examples = iter(self.loader.stream)
        while True:
            try:
                step = self.loader.read_step(examples), self.loader.stream.state
            except InputError as error:
                if not self.careful:
                    raise
                yield Failure(str(error))
                return
            yield step


def shared_out(
    dataset: Any, rank: int, world_size: int, group: dist.ProcessGroup | None, *, divided: bool = False
) -> Any:
    """Return this process's part of a stream: whole shards where it has enough of them, else every W-th example.

    One that is ``divided``, or of which every process already sees other examples, stays as it is. Raises InputError
    where two processes would read the same. Every rank must reach this line.
    """
    together(lambda: _check(dataset), group)
    if world_size == 1 or divided:
        return dataset
    part = _divided(dataset, rank, world_size, group)
    if pairs := _alike(_samples(part, group)):
        raise InputError(
            f"ranks {pairs[0][0]} and {pairs[0][1]} read the same examples of the stream; where it divides itself by "
            "rank, and these only look the same, say Data(divided=True)"
        )
    return part


def _divided(dataset: Any, rank: int, world_size: int, group: dist.ProcessGroup | None) -> Any:
    if type(dataset).__module__.startswith("datasets."):
        from datasets.distributed import split_dataset_by_node

        return dataset if dataset._distributed else split_dataset_by_node(dataset, rank, world_size)
    seen = _samples(dataset, group)
    if any(sample != seen[0] for sample in seen):
        return dataset
    if hasattr(dataset, "shard") and getattr(dataset, "num_shards", 0) >= world_size:
        return dataset.shard(num_shards=world_size, index=rank)
    return EveryNth(dataset, rank, world_size)


def _samples(dataset: Any, group: dist.ProcessGroup | None) -> list[list[str]]:
    """Return hashes of the first few examples that each process sees. Every rank must reach this line."""
    own = together(lambda: _sample(dataset), group)
    return [json.loads(text) for text in gather_texts(json.dumps(own), group)]


def _alike(seen: list[list[str]]) -> list[tuple[int, int]]:
    """Return the pairs of processes that see the same examples, one after the other."""
    return [(a, b) for a, b in combinations(range(len(seen)), 2) if seen[a] and seen[a] == seen[b]]


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
    for layer in _layers(getattr(dataset, "_ex_iterable", None)):
        if type(layer).__name__ == "BufferShuffledExamplesIterable":
            raise InputError(
                "the stream is shuffled in a buffer of its own, whose content no checkpoint has; leave .shuffle() out "
                "and say Data(..., shuffle_buffer=1000)"
            )


def _layers(layer: Any) -> Iterator[Any]:
    """Yield what a stream of datasets is made of, from what it was given last down to its files."""
    yield layer
    inner = getattr(layer, "ex_iterables", None) or [getattr(layer, "ex_iterable", None)]
    for part in inner:
        if part is not None:
            yield from _layers(part)


def _state_of(dataset: Any) -> Any:
    return dataset.state_dict() if hasattr(dataset, "state_dict") else None


def _sample(dataset: Any) -> list[str]:
    """Hash each of the first few examples. Raises InputError for one that cannot be read or hashed."""
    seed_all(0)
    try:
        examples = list(islice(iter(copy.copy(dataset)), COMPARED))
    except Exception as error:
        raise unreadable(
            error, f"one of the first {COMPARED} examples of the stream", "mend it, or do not yield it"
        ) from error
    try:
        return [content_hash(example)[:16] for example in examples]
    except TypeError as error:
        raise InputError(
            f"the processes cannot compare what they read of the stream: {error} has no content to hash; give tensors, "
            "arrays, images, numbers and text, or divide it by rank yourself and say Data(divided=True)"
        ) from error
