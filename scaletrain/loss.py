"""The arithmetic of the loss: a part of a mean, weighted so that the parts add up to the whole."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scaletrain.batches import Batch
from scaletrain.devices import Devices
from scaletrain.errors import InputError


def shares(
    micro_batches: Sequence[tuple[Batch, int]],
    batch_size: int,
    weight: Callable[[Batch], Tensor] | None,
    devices: Devices,
) -> Sequence[float | Tensor]:
    """Return each micro-batch's share of the step's weight over all processes; 0 for a repeated one.

    Counts of examples are known everywhere. A recipe's own ``weight`` costs one small reduction: every rank must reach
    this line.
    """
    if weight is None:
        return [counted / batch_size for _, counted in micro_batches]
    dtype, device = devices.sums_in, devices.device
    own = [torch.as_tensor(weight(b) if counted else 0, dtype=dtype, device=device) for b, counted in micro_batches]
    if own[-1].ndim:
        raise InputError(f"weight returned a tensor of shape {tuple(own[-1].shape)}; return one number for the batch")
    weights = torch.stack(own)
    total = devices.sum(weights.sum())
    return list(weights / total.clamp(min=torch.finfo(dtype).tiny))


def weighted(loss: Tensor, share: float | Tensor) -> Tensor:
    """Multiply a micro-batch's mean loss by its share of the step's weight; both 0-d.

    Where the share is 0, even a NaN counts for nothing, and nothing flows back from it. Raises InputError
    for a loss that is not a scalar with a gradient.
    """
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.requires_grad:
        raise InputError(_wrong(loss))
    if isinstance(share, Tensor):
        return torch.where(share > 0, loss * share.to(loss.dtype), torch.zeros_like(loss))
    if share == 0:
        return torch.where(torch.zeros_like(loss, dtype=torch.bool), loss, torch.zeros_like(loss))
    return loss if share == 1 else loss * share


def _wrong(loss: object) -> str:
    if not isinstance(loss, Tensor):
        got = "None (is its return missing?)" if loss is None else f"a {type(loss).__name__}"
    elif loss.ndim:
        got = f"a tensor of shape {tuple(loss.shape)}"
    else:
        got = "a scalar that depends on no trainable parameter"
    return f"loss returned {got}; return a scalar tensor, the mean over the batch, computed from the model's output"
