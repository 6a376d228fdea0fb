"""What becomes of examples that cannot be read, or make no batch: a line that names them, or others in their place."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import default_collate

from scaletrain.batches import Batch
from scaletrain.errors import InputError
from scaletrain.order import Indices, Order
from scaletrain.permutation import seed_for

Collate = Callable[[list[Any]], Batch]
MOST_TRIES = 100
"""Replacements tried for an example that cannot be read."""
MEND = "mend it, or in training let a few be replaced with --skip-bad"


class Bad(NamedTuple):
    """An example that could not be read, and the one that took its place."""

    example: int
    reason: str
    replaced_by: int


def readable(
    read: Callable[[int, int], Any], position: int, index: int, bad: list[Bad], *, instead: Order | None, seed: int
) -> Any:
    """Return ``read(position, index)``, or where that raises the same of another index, noted in ``bad``.

    The other one is what the order ``instead`` shows elsewhere in the epoch; where depends on the seed and the position
    alone, so a run that goes on takes the same. Raises InputError where nothing may be replaced or can be read.
    """
    other, reason = index, ""
    for attempt in range(1, MOST_TRIES + 1):
        try:
            found = read(position, other)
        except Exception as error:  # whatever reading raises, the example is bad
            if instead is None:
                raise unreadable(error, f"example {index}", MEND) from error
            reason, n = reason or reason_of(error), instead.n
            place = position - position % n + seed_for(seed, 4, position, attempt) % n
            other = int(instead(np.array([place]))[0])
            continue
        if attempt > 1:
            bad.append(Bad(index, reason, other))
        return found
    raise InputError(f"example {index} cannot be read ({reason}), nor can {MOST_TRIES - 1} others in its place")


def collated(collate: Collate | None, examples: list[Any], indices: Indices | None = None) -> Batch:
    """Make a batch. Raises InputError where that fails, naming two examples that differ in shape if there are such."""
    try:
        return (collate or default_collate)(examples)
    except InputError:
        raise
    except Exception as error:
        which = "examples of the stream" if indices is None else shown(indices)
        if unlike := _unlike(examples):
            which = which if indices is None else f"the examples {indices[0]} and {indices[unlike[0]]}"
            which += f" ({unlike[1]})"
        advice = "give the recipe a collate that pads or packs them" if collate is None else "mend the recipe's collate"
        raise InputError(f"{which} make no batch: {reason_of(error)}; {advice}") from error


def _unlike(examples: list[Any]) -> tuple[int, str] | None:
    """Return the first example that differs from the one at the beginning, and in what."""
    first = dict(_leaves(examples[0]))
    for k, example in enumerate(examples):
        other = dict(_leaves(example))
        for name in first | other:
            if first.get(name) != other.get(name):
                return k, f"{name}{first.get(name, 'missing')} and {other.get(name, 'missing')}"
    return None


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name of each leaf, and its shape or type."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}{key} ")
    elif isinstance(value, tuple | list):
        for k, part in enumerate(value):
            yield from _leaves(part, f"{name}{k} ")
    else:
        yield name, f"{tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def shown(indices: Indices) -> str:
    """Name the first few examples."""
    return f"the examples {', '.join(map(str, indices[:8].tolist()))}{', ...' * (len(indices) > 8)}"


def unreadable(error: Exception, what: str, advice: str = "mend it") -> InputError:
    """Return the error for what cannot be read: which, why, where in the code, and what to do."""
    if isinstance(error, InputError):
        return error
    return InputError(f"{what} cannot be read: {reason_of(error)}; {advice}")


def reason_of(error: Exception) -> str:
    """Say in one line what was raised, and where."""
    if isinstance(error, InputError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rpartition('/')[2]}, line {frames[-1].lineno})" if frames else ""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}{where}"
