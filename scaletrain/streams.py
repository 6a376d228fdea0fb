"""Training data that can only be read from front to back: shuffled in windows, resumed exactly."""

import copy
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from scaletrain import workers
from scaletrain.batches import narrow, to_device
from scaletrain.errors import InputError
from scaletrain.loader import MicroBatch, copied_ahead
from scaletrain.permutation import seed_for, seeds_for
from scaletrain.randomness import seed_all
from scaletrain.share import Share, split
from scaletrain.unreadable import Collate, collated, unreadable
from scaletrain.workers import BROKEN_PIPE, Failure, answers_of, as_is, leave_signals, worker_is_lost

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


def checked_state(content: Any) -> dict[str, Any]:
    """Return the state that a checkpoint has of a stream; raise ValueError unless it is as ``Stream`` says it."""
    if not isinstance(content, dict) or content.keys() != NEW.keys():
        raise ValueError(f"the stream stands at {content!a:.200}")
    for name in NEW.keys() - {"source"}:
        if type(content[name]) is not int or not 0 <= content[name] <= 2**62:
            raise ValueError(f"the stream's {name} is {content[name]!a}")
    return content


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


def _state_of(dataset: Any) -> Any:
    return dataset.state_dict() if hasattr(dataset, "state_dict") else None
