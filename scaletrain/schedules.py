"""The learning rate as a pure function of the step.

A schedule ``(step, total_steps, cfg)`` gives the factor on the optimizer's own learning rate for the step
numbered ``step`` (0 is the first), or ``{"lr": factor, "momentum": factor}``. It keeps no state, so a
resumed run needs none. Give other constants with ``functools.partial(step_decay, gamma=0.5)``.
"""

import warnings
from collections.abc import Callable
from math import ceil, cos, pi
from typing import TYPE_CHECKING, Any

from scaletrain.errors import InputError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from scaletrain.config import Config

Factors = float | dict[str, float]
Schedule = Callable[[int, int, Any], Factors]


def constant(step: int, total_steps: int, cfg: "Config") -> float:
    """Keep the optimizer's own rate."""
    return 1.0


def step_decay(step: int, total_steps: int, cfg: "Config", *, every: float = 1 / 3, gamma: float = 0.1) -> float:
    """Multiply the rate by ``gamma`` after each ``every`` (share of the steps, rounded up), as torch's StepLR."""
    return float(gamma ** (step // max(1, ceil(every * total_steps - 1e-9))))


def cosine(step: int, total_steps: int, cfg: "Config", *, final: float = 0.0) -> float:
    """Fall from 1 to ``final`` along half a cosine, as torch's CosineAnnealingLR."""
    return _anneal(1.0, final, step / total_steps)


def warmup_cosine(step: int, total_steps: int, cfg: "Config", *, final: float = 0.0) -> float:
    """Rise linearly over ``cfg.warmup`` of the steps, then fall to ``final`` along half a cosine."""
    rising = warmup_steps(total_steps, cfg)
    if step < rising:
        return _rise(step, total_steps, cfg)
    return _anneal(1.0, final, (step - rising) / max(1, total_steps - rising))


def warmup_stable_decay(step: int, total_steps: int, cfg: "Config", *, decay: float = 0.2, final: float = 0.0) -> float:
    """Rise over ``cfg.warmup`` of the steps, stay at 1, fall linearly to ``final`` over the last ``decay`` of them."""
    falling = max(1, round(decay * total_steps))
    left = (total_steps - step) / falling
    return _rise(step, total_steps, cfg) * (final + (1 - final) * min(1.0, left))


def one_cycle(
    step: int,
    total_steps: int,
    cfg: "Config",
    *,
    rise: float = 0.3,
    start: float = 1 / 25,
    final: float = 1e-4 / 25,
    low_momentum: float = 0.85 / 0.95,
) -> dict[str, float]:
    """Rise from ``start`` to 1 over ``rise`` of the steps and fall to ``final``; momentum moves the other way.

    As torch's OneCycleLR with the optimizer's rate as ``max_lr`` and its momentum as ``max_momentum``
    (Smith and Topin, "Super-Convergence", 2018). Momentum is Adam's first beta.
    """
    peak = rise * total_steps - 1
    if step < peak or peak == total_steps - 1:
        part = step / peak if peak else 1.0
        return {"lr": _anneal(start, 1.0, part), "momentum": _anneal(1.0, low_momentum, part)}
    part = (step - peak) / (total_steps - 1 - peak)
    return {"lr": _anneal(1.0, final, part), "momentum": _anneal(low_momentum, 1.0, part)}


def torch_schedule(make: "Callable[[Optimizer, int, Any], LRScheduler]") -> Schedule:
    """Turn one of torch's schedulers into a schedule; ``make(optimizer, total_steps, cfg)`` returns it.

    As in ``torch_schedule(lambda optimizer, total_steps, cfg: PolynomialLR(optimizer, total_steps, power=2))``. It is
    stepped through the whole run once, on one dummy parameter whose optimizer has the config's lr and momentum 0.9,
    and what it sets becomes factors of those. Raises InputError for ReduceLROnPlateau, which is no function of the
    step: ``Plateau`` is the hook.
    """
    known: tuple[int, Any, list[Factors]] = (-1, None, [])

    def schedule(step: int, total_steps: int, cfg: Any) -> Factors:
        nonlocal known
        if known[0] != total_steps or known[1] is not cfg:
            known = total_steps, cfg, _table(make, total_steps, cfg)
        return known[2][step]

    return schedule


def _table(make: "Callable[[Optimizer, int, Any], LRScheduler]", total_steps: int, cfg: Any) -> list[Factors]:
    """Return the factors of each step."""
    import torch
    from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

    momentum = 0.9
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr, momentum=momentum)
    scheduler: Any = make(optimizer, total_steps, cfg)
    if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
        raise InputError(
            f"torch_schedule got a {type(scheduler).__name__}; return one of torch.optim.lr_scheduler whose rate "
            "depends on the step alone (for a plateau: hooks=lambda cfg: [Plateau()])"
        )
    group, table = optimizer.param_groups[0], list[Factors]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some schedulers step others in a way that they warn of
        for _ in range(total_steps):
            table.append({"lr": float(group["lr"]) / cfg.lr, "momentum": group["momentum"] / momentum})
            optimizer.step()
            scheduler.step()
    return table


def warmup_steps(total_steps: int, cfg: "Config") -> int:
    """Number of steps that ``cfg.warmup``, a share of ``total_steps``, stands for."""
    return round(cfg.warmup * total_steps)


def _rise(step: int, total_steps: int, cfg: "Config") -> float:
    rising = warmup_steps(total_steps, cfg)
    return min(1.0, (step + 1) / rising) if rising else 1.0


def _anneal(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + cos(pi * min(1.0, part))) / 2
