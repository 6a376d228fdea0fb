"""Learning rates before a run: what its schedule will do, and which rates its loss can bear."""

from dataclasses import dataclass, replace
from math import isfinite
from statistics import mean
from typing import Any

from scaletrain.build import assemble, total_steps
from scaletrain.config import Config
from scaletrain.data import Data, count, is_stream
from scaletrain.errors import InputError
from scaletrain.feed import seed_everything
from scaletrain.loop import steps as steps_of
from scaletrain.recipe import Recipe

DIVERGED = 3
"""The loss may rise above its lowest by so many times its first value before the test ends."""
SMOOTHED = 3
"""Neighbours on each side that a loss is averaged with."""


@dataclass(frozen=True)
class Rates:
    """What a schedule does over a run."""

    steps: list[float]
    curves: dict[str, list[float]]
    """``lr`` of each step, and ``momentum`` as a factor where the schedule has one."""
    words: list[str]


def rates_of(recipe: Recipe, cfg: Config) -> Rates:
    """Return the learning rate of each step of a run; reads the data where it decides how many there are."""
    examples = 0
    if cfg.max_steps is None:
        seed_everything(cfg.split_seed or 0)
        data = recipe.data(cfg)
        if not isinstance(data, Data) or is_stream(data.train):
            raise InputError("the training data has no length; say --max-steps")
        examples = data.order.n if data.order is not None else count(data.train)
    total = total_steps(cfg, examples)
    factors = [recipe.schedule(step, total, cfg) for step in range(total)]
    lr = [cfg.lr * (f.get("lr", 1.0) if isinstance(f, dict) else f) for f in factors]
    curves = {"lr": lr}
    momentum = [f.get("momentum", 1.0) if isinstance(f, dict) else 1.0 for f in factors]
    of = f", {cfg.epochs:g} epochs of {examples:,} examples at batch size {cfg.batch_size}" if examples else ""
    words = [
        f"{total:,} steps{of}",
        f"lr {lr[0]:.3g} in step 1, highest {max(lr):.3g} in step {lr.index(max(lr)) + 1}, {lr[-1]:.3g} in the last",
    ]
    if len(set(momentum)) > 1:
        words.append(f"momentum times {min(momentum):.3g} to {max(momentum):.3g}")
    return Rates([step + 1.0 for step in range(total)], curves, words)


@dataclass(frozen=True)
class Range:
    """What a range test found."""

    rates: list[float]
    losses: list[float]
    """Loss of each step before it diverged, over all processes."""
    smoothed: list[float]
    suggestion: float | None
    """A rate to begin with; None where the loss never fell."""
    words: str


def range_test(recipe: Recipe, cfg: Config, *, low: float = 1e-6, high: float = 10.0, steps: int = 100) -> Range:
    """Train ``steps`` steps at rates from ``low`` to ``high``, until the loss diverges; nothing is kept of it.

    The suggestion is a tenth of the rate at which the smoothed loss is lowest (Smith, "Cyclical Learning Rates for
    Training Neural Networks", 2017, calls the test so). Rates per layer keep their ratios. Every process calls it.
    """
    if not 0 < low < high < float("inf"):
        raise InputError(f"--low {low} and --high {high}: two rates above 0 are wanted, the second higher")
    if steps < 10:
        raise InputError(f"--steps {steps}: too few to see where the loss falls; at least 10")
    ratio = (high / low) ** (1 / (steps - 1))

    def rising(step: int, total_steps: int, cfg: Any) -> float:
        return float(low * ratio**step / cfg.lr)

    short = replace(cfg, max_steps=steps, patience=None)
    run = assemble(replace(recipe, schedule=rising, hooks=None), short)
    rates: list[float] = []
    losses: list[float] = []
    for info in steps_of(run):
        rate, loss = low * ratio ** (info.step - 1), run.mean(info.loss)  # waits for the device
        if run.gradients.scaler is not None and not info.finite and isfinite(loss):
            continue  # fp16's scaler looks for its scale
        if not isfinite(loss) or not info.finite or loss - min([loss, *losses]) > DIVERGED * abs([*losses, loss][0]):
            return _judged(rates, losses, diverged=rate)
        rates.append(rate)
        losses.append(loss)
    return _judged(rates, losses, diverged=None)


def _judged(rates: list[float], losses: list[float], diverged: float | None) -> Range:
    """Smooth the losses and suggest a rate; ``diverged`` is the rate at which the test ended early."""
    smoothed = [mean(losses[max(0, k - SMOOTHED) : k + SMOOTHED + 1]) for k in range(len(losses))]
    if not smoothed or min(smoothed) > 0.99 * smoothed[0]:
        words = (
            "the loss did not fall at any of these rates; look at the data and the loss, or try others (--low, --high)"
        )
        return Range(rates, losses, smoothed, None, words)
    lowest = rates[smoothed.index(min(smoothed))]
    end = "" if diverged is None else f", and diverges at {diverged:.1e}"
    words = f"suggestion: --lr {lowest / 10:.1e} (the loss is lowest at {lowest:.1e}{end})"
    return Range(rates, losses, smoothed, lowest / 10, words)
