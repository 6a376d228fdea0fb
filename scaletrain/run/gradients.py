"""The gradients of a step: gathered from its micro-batches and the processes, clipped, and used unless not finite."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from scaletrain.checkpoint.tensors import is_sharded, local_part
from scaletrain.config import Config
from scaletrain.devices import NOTHING, Devices
from scaletrain.optimizers import begin_momentum
from scaletrain.pulse import Pulse


class Gradients:
    """The gradients of the parameters that ``optimizer`` trains."""

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        optimizer: optim.Optimizer,
        devices: Devices,
        cfg: Config,
        pulse: Pulse,
    ) -> None:
        """``model`` is ``module`` as it is wrapped for several processes; ``cfg`` says how to clip."""
        self._pulse = pulse
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.sharded = any(map(is_sharded, self.parameters))
        self.skipped = torch.zeros((), device=devices.device)
        """Steps skipped that nobody has counted yet."""
        self._model, self._optimizer, self._devices = model, optimizer, devices
        self._max_norm, self._max_value = cfg.max_grad_norm, cfg.max_grad_value
        self.scaler = devices.accelerator.scaler
        sparse = any(getattr(part, "sparse", False) for part in module.modules())
        self._plain = not sparse and all(p.dtype == torch.float32 for p in self.parameters)
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._skips_on_device = fused and devices.device.type == "cuda"
        self._one = torch.ones((), device=devices.device)
        self._true = torch.ones((), dtype=torch.bool, device=devices.device)
        self._found = torch.zeros((), device=devices.device)
        self._looked = False
        begin_momentum(optimizer)

    def zero(self) -> None:
        """Forget the gradients, without the 8 us that ``optimizer.zero_grad()`` takes on a small model."""
        self._looked = False
        for parameter in self.parameters:
            parameter.grad = None

    def exchanging(self, last: bool) -> AbstractContextManager[None]:
        """Average over processes in the last micro-batch only; forward and backward go inside."""
        self._pulse.at("forward")
        if last or self._devices.world_size == 1:
            return NOTHING
        return self._devices.accelerator.no_sync(self._model)  # type: ignore[no-any-return]  # accelerate has no types

    def backward(self, part: Tensor) -> None:
        """Add the gradient of this process's part of the mean loss; the exchange averages, so it is scaled up."""
        self._pulse.at("backward")
        if self._devices.world_size > 1:
            part = part * self._devices.world_size
        (part if self.scaler is None else self.scaler.scale(part)).backward()

    def clip(self) -> Tensor | None:
        """Cut the gradient down to the longest norm or largest value allowed; return its norm before, 0-d."""
        self._pulse.at("optimizer")
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer)
        if self._max_value is not None:
            self._look()  # before an infinite gradient is cut off like any other
            clip_grad_value_(self.parameters, self._max_value)
        if self._max_norm is None:
            return None
        norm = clip_grad_norm_(self.parameters, self._max_norm)
        return norm.full_tensor() if is_sharded(norm) else norm  # type: ignore[attr-defined]  # one number on all ranks

    def update(self) -> Tensor:
        """Update the weights unless a gradient is NaN or infinite; return whether it was finite, 0-d bool.

        The gradient is averaged by now, or the flag is shared, so every process decides alike. Optimizers that
        take ``found_inf`` skip on the device; for others on an accelerator this waits for the device.
        """
        found = self._found if self._looked else self._look()
        if self.scaler is not None:
            self.scaler.step(self._optimizer)
            self.scaler.update()
        elif self._skips_on_device:
            self._optimizer.found_inf = found  # type: ignore[attr-defined]  # what torch's GradScaler does
            self._optimizer.step()
        elif not found.item():
            self._optimizer.step()
            return self._true
        self.skipped += found
        return found == 0

    def _look(self) -> Tensor:
        """Return whether a gradient is NaN or infinite, 0-d, above 0 if so. Every rank must reach this line."""
        found, self._looked = self._found.zero_(), True
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.sharded:
            gradients = [local_part(gradient) for gradient in gradients]
        if self._plain:  # 3 us on a small model, where a norm takes 25
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, self._one)
        else:
            found.copy_(any_not_finite(gradients))
        if self.sharded:  # each rank has seen its own part alone
            self._devices.sum(found)
        return found


def any_not_finite(gradients: list[Tensor]) -> Tensor:
    """Whether a gradient of any dtype, sparse ones too, holds NaN or infinity, 0-d bool."""
    values = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    largest = [v.abs().amax().float() for v in values if v.numel()]
    return ~torch.stack(largest).isfinite().all() if largest else torch.tensor(False)
