"""Figures of a validation over examples that lie on several processes, each counted once."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.agreement import gather_tensors
from scaletrain.errors import InputError

EXAMPLES = "examples"
"""What the number of examples measured is called among the figures."""
OUTPUTS = "outputs"
"""What ``evaluate`` calls the arguments of the metric objects."""
MOST_VALUES = 10_000


class Objects:
    """Metrics that are not means, as AUROC or F1: torchmetrics objects, whose states the processes share at the end."""

    def __init__(
        self,
        metrics: Mapping[str, Any],
        classes: Sequence[str] | None,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        if not isinstance(metrics, Mapping):
            raise InputError(f"metrics returned a {type(metrics).__name__}; return torchmetrics objects by name")
        self.metrics, self.classes, self._group = dict(metrics), classes, group
        for name, metric in self.metrics.items():
            if isinstance(metric, type):
                raise InputError(f"metrics returned the class {metric.__name__} as '{name}'; return an object of it")
            if not callable(getattr(metric, "update", None)) or not callable(getattr(metric, "compute", None)):
                raise InputError(f"metrics returned a {type(metric).__name__} as '{name}'; return torchmetrics objects")
            metric.to(device)
            for part in metric.modules():
                part.dist_sync_fn = self._share
                part.distributed_available_fn = lambda: group is not None
            metric.reset()

    def add(self, outputs: Any, *, counted: bool) -> None:
        """Show one batch to every metric: ``outputs`` are the arguments of its ``update``, as a tuple or by name."""
        if not self.metrics:
            return
        if outputs is None:
            raise InputError(
                f"evaluate returns no '{OUTPUTS}', which the recipe's metrics are fed with: a tuple or a dict"
            )
        for name, metric in self.metrics.items() if counted else ():
            _show(name, metric, outputs)

    def reset(self) -> None:
        """Forget what was shown."""
        for metric in self.metrics.values():
            if getattr(metric, "_is_synced", False):  # compute has raised between the two
                metric.unsync()
            metric.reset()

    def values(self) -> dict[str, float]:
        """Return the value of every metric; one for each class gets the class's name behind a slash.

        Every rank must reach this line.
        """
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            for part in metric.modules():
                _pack_lists(part)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*was called before the ``update`` method")  # nothing on this rank
                value = metric.compute()
            for key, one in value.items() if isinstance(value, Mapping) else [(None, value)]:
                if not isinstance(one, Tensor | int | float):
                    raise InputError(f"the metric '{name}' is a {type(one).__name__}; only numbers can be recorded")
                found |= self._named(name if key is None else f"{name}/{key}", torch.as_tensor(one))
            metric.reset()
        return found

    def _named(self, name: str, value: Tensor) -> dict[str, float]:
        if value.numel() > MOST_VALUES:
            raise InputError(f"the metric '{name}' has {value.numel():,} values; at most {MOST_VALUES:,} are recorded")
        if value.ndim == 0:
            return {name: float(value)}
        known = self.classes is not None and len(self.classes) == len(value)
        names = self.classes if known else range(len(value))
        rows = zip(names, value.unbind(), strict=True)  # type: ignore[arg-type]  # known
        return {n: v for cls, row in rows for n, v in self._named(f"{name}/{cls}", row).items()}

    def _share(self, state: Tensor, group: Any = None) -> list[Tensor]:
        """Gather a metric's state; the empty ones of ranks that saw nothing are of any shape, and left out."""
        gathered = gather_tensors(state, self._group)
        return [part.to(state.device) for part in gathered if part.numel()] or [state]


def _show(name: str, metric: Any, outputs: Any) -> None:
    try:
        if isinstance(outputs, Mapping):
            metric.update(**outputs)
        else:
            metric.update(*(outputs if isinstance(outputs, tuple | list) else (outputs,)))
    except (TypeError, ValueError, RuntimeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the metric '{name}' cannot take what evaluate returns as outputs: {why}") from error


def _pack_lists(metric: Any) -> None:
    """Make one tensor of each state that is a list, so that every rank has as many to share."""
    for name in getattr(metric, "_reductions", ()):
        state = getattr(metric, name)
        if isinstance(state, list):
            setattr(
                metric,
                name,
                [torch.cat([part.reshape(1) if part.ndim == 0 else part for part in state])]
                if state
                else [torch.zeros(0)],
            )


class Sums:
    """Weighted sums of named figures, kept on the device; one reduction gives the means.

    ``objects`` are the metrics that are not means.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, objects: Objects | None = None) -> None:
        self.dtype, self.device, self.objects = dtype, device, objects
        self._totals: dict[str, tuple[Tensor, Tensor | float]] = {}  # name -> sum, count
        self._taken = [EXAMPLES, *(objects.metrics if objects else ())]
        self.examples = 0

    def add(self, values: dict[str, Any], rows: int, weight: Tensor | float, counted: int) -> None:
        """Add one batch of ``counted`` examples: per-row values (rows,), 0-d means over ``weight``, or (sum, count).

        With ``counted`` 0 only the names are noted: the batch repeats an example to keep step with others.
        """
        if not isinstance(values, dict):
            raise InputError(f"evaluate returned a {type(values).__name__}; return a dict of named figures")
        for name in self._taken:
            if name in values:
                raise InputError(f"evaluate returns '{name}', which is also the name of another figure; rename it")
        if self.objects is not None:
            self.objects.add(values.get(OUTPUTS), counted=counted > 0)
        for name, value in values.items():
            if name == OUTPUTS:
                continue
            total, count = self._sum_and_count(name, value, rows, weight)
            if not counted:
                total, count = torch.zeros_like(total), 0.0
            if name in self._totals:
                total, count = self._totals[name][0] + total, self._totals[name][1] + count
            self._totals[name] = total, count
        self.examples += counted

    @property
    def names(self) -> list[str]:
        """The means added so far, in the same order on every process."""
        return sorted(self._totals)

    def means(self, add_up: Callable[[Tensor], Tensor], *, expected: int) -> dict[str, float]:
        """Return each figure over all processes, and the number of ``examples``; ``add_up`` adds a tensor over them.

        Raises RuntimeError unless exactly ``expected`` examples were counted. Waits for the device.
        """
        names = self.names
        rows = [torch.stack([self._scalar(part) for part in self._totals[name]]) for name in names]
        examples = torch.tensor([self.examples, 0.0], dtype=self.dtype, device=self.device)
        *sums, counted = add_up(torch.stack([*rows, examples])).tolist()
        if counted[0] != expected:
            raise RuntimeError(f"{counted[0]:.0f} examples were evaluated instead of {expected}")
        means = {name: total / count if count else math.nan for name, (total, count) in zip(names, sums, strict=True)}
        return means | (self.objects.values() if self.objects else {}) | {EXAMPLES: expected}

    def _scalar(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=self.dtype, device=self.device).detach()

    def _sum_and_count(self, name: str, value: Any, rows: int, weight: Tensor | float) -> tuple[Tensor, Tensor | float]:
        if isinstance(value, tuple) and len(value) == 2:
            return torch.as_tensor(value[0], dtype=self.dtype), torch.as_tensor(value[1], dtype=self.dtype)
        if isinstance(value, Tensor) and value.ndim == 0:
            total = value.detach().to(self.dtype) * weight
            if isinstance(weight, Tensor):
                return torch.where(weight.to(value.device) > 0, total, 0), weight  # 0 * NaN is NaN
            return total if weight > 0 else torch.zeros_like(total), weight
        if isinstance(value, Tensor) and value.shape == (rows,):
            return value.detach().sum(dtype=self.dtype), float(rows)
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(
            f"evaluate returned {got} for '{name}' on a batch of {rows}; "
            f"return one value per example ({rows},), a 0-d mean, or a pair (sum, count)"
        )
