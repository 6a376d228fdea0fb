"""What a step tells of itself, and how a run ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor


class StepInfo(NamedTuple):
    """What one optimizer step did. The tensors stay on the device: reading one waits for it."""

    step: int
    """Optimizer steps attempted, completed, this one included."""
    epoch: float
    """Passes over the training examples completed, this step included."""
    samples_seen: int
    lr: float
    """Learning rate of the first parameter group in this step."""
    loss: Tensor
    """0-d: this process's share of the step's mean loss; ``run.mean(info.loss)`` is the whole."""
    grad_norm: Tensor | None
    """0-d: L2 norm of the gradient before clipping; None without ``max_grad_norm``."""
    finite: Tensor
    """0-d bool: whether the gradient was finite; where not, weights and optimizer are as before."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    metrics: dict[str, float]
    """The last value of each validation and test metric: those of the exported weights."""
    step: int
    """Optimizer steps attempted, completed."""
    best: float | None
    """Best value of the monitored metric."""
    best_step: int
    stop_reason: str
    """Why it ended before its last step; empty if it did not."""
    folder: Path
