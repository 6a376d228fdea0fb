"""A batch: a dict, tuple or list of tensors, in each other or alone, whose first dimension is the examples."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from scaletrain.devices import copies_without_waiting
from scaletrain.errors import InputError

Batch = Any


class NamedColumns(dict[str, Any]):
    """Columns by name that say what there is when asked for what there is not."""

    def __missing__(self, name: str) -> Any:
        raise InputError(f"there is no column '{name}'; the columns are {', '.join(map(repr, self))}")


def length(batch: Batch) -> int:
    """Return the number of examples: the first dimension of the first leaf."""
    leaf = next(tensors_of(batch), None)
    if leaf is None or leaf.ndim == 0:
        raise InputError(
            f"a batch is a {type(batch).__name__}; it must hold tensors with one row an example, in a dict or tuple"
        )
    return len(leaf)


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """Yield the leaves of a dict, tuple, list or tensor."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(part)


def mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return the batch with every tensor changed; dicts name their columns, what is no tensor stays."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return NamedColumns({name: mapped(leaf, change) for name, leaf in batch.items()})
    if isinstance(batch, tuple | list):
        leaves = [mapped(leaf, change) for leaf in batch]
        return type(batch)(*leaves) if hasattr(batch, "_fields") else type(batch)(leaves)
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor; from pinned memory the copy overlaps with computing on CUDA."""
    if device.type == "cpu":
        return batch
    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=copies_without_waiting(device.type)))


def narrow(batch: Batch) -> Batch:
    """Turn float64 into float32, which is what models compute in, and name the columns of a dict."""
    return mapped(batch, lambda tensor: tensor.float() if tensor.dtype == torch.float64 else tensor)
