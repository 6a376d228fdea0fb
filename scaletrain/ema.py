"""A moving average of the trainable weights, used in their place wherever a result is measured or kept."""

import torch
from torch import Tensor, nn

from scaletrain.checkpoint.tensors import local_part
from scaletrain.sharding import reshard


class EMA:
    """The exponential moving average of a module's trainable parameters; buffers are the module's own.

    After step t it becomes ``d * average + (1 - d) * weights`` with ``d = min(decay, (1 + t) / (10 + t))``: early
    on it forgets faster, so that it is no average with the random weights of the start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.in_use = False
        """Whether the module holds the average, and ``tensors`` the weights."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().clone() for name, p in trained.items()}
        self._pairs = [(local_part(p), local_part(self.tensors[name])) for name, p in trained.items()]
        self._module = module

    @torch.no_grad()
    def update(self, step: int, finite: Tensor) -> None:
        """Take the weights of ``step`` in, unless its gradient was not ``finite``; nothing waits for an accelerator."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        weights, averages = [weight for weight, _ in self._pairs], [average for _, average in self._pairs]
        if finite.device.type != "cpu":
            differences = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(differences, finite * share)
            torch._foreach_add_(averages, differences)
        elif finite.item():
            torch._foreach_lerp_(averages, weights, share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and the average, in place."""
        for weight, average in self._pairs:
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        reshard(self._module)  # what FSDP2 has gathered is no longer so
        self.in_use = not self.in_use

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are."""
        for weight, average in self._pairs:
            average.copy_(weight)
