"""In what two checkpoints differ."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from scaletrain.checkpoint.load import load_new
from scaletrain.checkpoint.verify import Checkpoint

NOT_COMPARED = ("environment", "ranks", "lines", "tracker")
"""Where and when it ran, rather than what it has learned."""


def differences(first: Checkpoint, second: Checkpoint, options: Sequence[str] = ()) -> list[str]:
    """Return a line for each difference; tensors are compared as a whole, however many processes wrote them.

    Of the configs, ``options`` are left out.
    """
    one, other = ({k: v for k, v in c.state.items() if k not in NOT_COMPARED} for c in (first, second))
    for state in (one, other):
        if isinstance(state.get("config"), dict):
            state["config"] = {name: value for name, value in state["config"].items() if name not in options}
    found = list(_json(one, other, ""))
    for part in sorted({name.rpartition("-")[0] for c in (first, second) for name in c.pieces}):
        found += _tensors(part, load_new(first, part), load_new(second, part))
    return found


def _tensors(part: str, one: dict[str, Tensor], other: dict[str, Tensor]) -> Iterator[str]:
    for name in sorted(one.keys() | other.keys()):
        where = f"{part} {ascii(name)[1:-1]}"
        if name not in one or name not in other:
            yield f"{where}: only in the {'second' if name in other else 'first'}"
            continue
        a, b = one[name], other[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"{where}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        elif not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            largest = (a.double() - b.double()).abs().max().item()
            yield f"{where}: differs in {int((a != b).sum()):,} of {a.numel():,} elements, by at most {largest:.3g}"


def _json(one: Any, other: Any, where: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from _json(one.get(key), other.get(key), f"{where}.{key}" if where else key)
    elif one != other:
        yield f"{where}: {one!a} and {other!a}"
