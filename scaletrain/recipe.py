"""What an experiment is: a recipe, a value made of plain functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, optim

from scaletrain.batches import Batch
from scaletrain.config import Config
from scaletrain.data import Data
from scaletrain.errors import InputError
from scaletrain.optimizers import adamw
from scaletrain.schedules import Schedule, constant

Metric = Tensor | tuple[Tensor, Tensor]
Hook = Callable[[Any, Any], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An experiment: data, model, loss and schedule. Make variants with ``dataclasses.replace``.

    ``model``, ``loss``, ``evaluate`` and the rest are plain functions; the config is the last argument of
    all but ``schedule``'s steps. Shapes: B is the number of examples in a micro-batch.
    """

    config: type[Config]
    """A frozen keyword-only dataclass that inherits Config."""
    data: Callable[[Any], Data]
    """``data(cfg)``; called on rank 0 first, then on the others."""
    model: Callable[[Any, Data], nn.Module]
    """``model(cfg, data)``, on the CPU, under ``seed``: the same weights on every process."""
    loss: Callable[[nn.Module, Batch, Any], Tensor]
    """``loss(model, batch, cfg)``: a scalar, the mean over ``weight(batch)``. The model may be wrapped for
    several processes: call it, do not reach for its attributes."""
    evaluate: Callable[[nn.Module, Batch, Any], dict[str, Metric]] | None = None
    """``evaluate(model, batch, cfg)``: named figures, each per example (B,), or a 0-d mean over
    ``weight(batch)``, or (sum, count); ``outputs`` goes to ``metrics``. Without it ``val_loss`` comes from
    ``loss``."""
    predict: Callable[[nn.Module, Batch, Any], dict[str, Tensor]] | None = None
    """``predict(model, batch, cfg)``: columns (B, ...) for ``scaletrain predict``, which never asks for labels.
    Default: what ``evaluate`` returns for each example."""
    metrics: Callable[[Any, Data], Mapping[str, Any]] | None = None
    """``metrics(cfg, data)``: torchmetrics objects by name, for figures that are not means (AUROC, F1, a confusion
    matrix), fed with what ``evaluate`` returns as ``outputs``: the arguments of their ``update``."""
    optimizer: Callable[[nn.Module, Any], optim.Optimizer] = adamw
    """``optimizer(model, cfg)``."""
    schedule: Schedule = constant
    """``schedule(step, total_steps, cfg)``: factors on the optimizer's own values."""
    weight: Callable[[Batch], Tensor] | None = None
    """``weight(batch)``, 0-d: what ``loss`` is the mean over, as valid tokens. Default: the number of examples.
    Where it may be 0, ``loss`` must not divide by it: ``clamp(min=1)``."""
    augment: Callable[[Batch, Any], Batch] | None = None
    """``augment(batch, cfg)``: on the device, in training only, with torch's default generators."""
    collate: Callable[[list[Any]], Batch] | None = None
    """``collate(examples)``: only for a dataset that is read example by example."""
    hooks: Callable[[Any], Sequence[Hook]] | None = None
    """``hooks(cfg)``: fresh callables ``hook(run, info)``, called after each step on every process."""
    expect: Mapping[str, str] | None = None
    """What the exported weights must reach at default settings, as in ``{"val_accuracy": ">=0.97"}``."""

    def __post_init__(self) -> None:
        """Raise InputError for a class of torch's where a function is called for."""
        for name, base, instead in (
            ("optimizer", optim.Optimizer, "lambda model, cfg: torch.optim.{0}(model.parameters(), lr=cfg.lr)"),
            (
                "schedule",
                optim.lr_scheduler.LRScheduler,
                "torch_schedule(lambda optimizer, total_steps, cfg: {0}(...))",
            ),
        ):
            given = getattr(self, name)
            if isinstance(given, type) and issubclass(given, base):
                raise InputError(
                    f"the recipe's {name} is the class {given.__name__}; give a function: "
                    f"{name}={instead.format(given.__name__)}"
                )


def unmet(expect: Mapping[str, str] | None, metrics: Mapping[str, float]) -> list[str]:
    """Return a sentence for each expectation that ``metrics`` misses."""
    compare = {">=": lambda got, want: got >= want, "<=": lambda got, want: got <= want}
    misses = []
    for name, wanted in (expect or {}).items():
        got = metrics.get(name, float("nan"))
        if not compare[wanted[:2]](got, float(wanted[2:])):
            misses.append(f"{name} is {got:.4g}, expected {wanted}")
    return misses
