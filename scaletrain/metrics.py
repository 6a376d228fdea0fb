"""Means over examples that lie on several processes: sums and counts, added up once at the end."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scaletrain.errors import InputError


class Sums:
    """Weighted sums of named figures, kept on the device; one reduction gives the means."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._totals: dict[str, Tensor] = {}  # name -> (2,) sum, count
        self.examples = 0

    def add(self, values: dict[str, Any], examples: int, weight: Tensor | float, *, counted: bool) -> None:
        """Add one batch of ``examples``: per-example values (B,), 0-d means over ``weight``, or (sum, count).

        With ``counted`` False only the names are noted: the batch repeats examples to keep step with others.
        """
        if not isinstance(values, dict):
            raise InputError(f"evaluate returned a {type(values).__name__}; return a dict of named figures")
        for name, value in values.items():
            total, count = self._sum_and_count(name, value, examples, weight)
            pair = torch.stack([self._scalar(total), self._scalar(count)])
            if not counted:
                pair = torch.zeros_like(pair)
            self._totals[name] = self._totals[name] + pair if name in self._totals else pair
        self.examples += examples if counted else 0

    @property
    def names(self) -> list[str]:
        """The figures added so far, in the same order on every process."""
        return sorted(self._totals)

    def means(self, add_up: Callable[[Tensor], Tensor], *, expected: int) -> dict[str, float]:
        """Return each figure's mean over all processes; ``add_up`` adds a tensor over them.

        Raises RuntimeError unless exactly ``expected`` examples were counted. Waits for the device.
        """
        names = self.names
        rows = torch.stack([self._totals[name] for name in names])
        examples = rows.new_tensor([[self.examples, 0.0]])
        *sums, counted = add_up(torch.cat([rows, examples])).tolist()
        if counted[0] != expected:
            raise RuntimeError(f"{counted[0]:.0f} examples were evaluated instead of {expected}")
        return {name: total / count if count else math.nan for name, (total, count) in zip(names, sums, strict=True)}

    def _scalar(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=self.dtype, device=self.device).detach()

    def _sum_and_count(
        self, name: str, value: Any, examples: int, weight: Tensor | float
    ) -> tuple[Tensor, Tensor | float]:
        if isinstance(value, tuple) and len(value) == 2:
            return torch.as_tensor(value[0]), value[1]
        if isinstance(value, Tensor) and value.ndim == 0:
            return value.to(self.dtype) * weight, weight
        if isinstance(value, Tensor) and value.shape == (examples,):
            return value.sum(dtype=self.dtype), float(examples)
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(
            f"evaluate returned {got} for '{name}' on a batch of {examples}; "
            f"return one value per example ({examples},), a 0-d mean, or a pair (sum, count)"
        )
