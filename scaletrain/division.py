"""How a stream is divided among the processes, so that none reads what another reads."""

import copy
import json
from collections.abc import Iterator
from itertools import combinations, islice
from typing import Any

import torch.distributed as dist

from scaletrain.agreement import gather_texts, together
from scaletrain.content import content_hash
from scaletrain.errors import InputError
from scaletrain.randomness import seed_all
from scaletrain.unreadable import unreadable

COMPARED = 32
"""Examples by which the processes find out whether they read the same."""


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
