"""Every counter of a run."""

from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any


@dataclass
class State:
    """All that a run counts, in one place, equal on every process. A checkpoint holds the whole of it."""

    step: int = 0
    """Optimizer steps attempted, completed; the schedule follows it."""
    samples_seen: int = 0
    """Positions of the endless stream that were read: where the data stands."""
    skipped: int = 0
    """Steps whose gradient was not finite and that changed nothing; counted up to the last log line."""
    train_loss_from: int = 0
    """Step after which the training loss of the next validation line is averaged."""
    validated_step: int = -1
    """Step of the last validation; -1 before the first."""
    best: float | None = None
    """Best value of the monitored metric so far."""
    best_step: int = -1
    """Step at which ``best`` was measured."""
    validations_without_progress: int = 0
    """Validations since ``best``, compared with the patience."""
    best_metrics: dict[str, float] = field(default_factory=dict)
    """All validation metrics measured together with ``best``."""
    lr_factor: float = 1.0
    """What the schedule's rate is multiplied by: below 1 after a plateau."""
    tested_step: int = -1
    """Step of the last test; -1 before the first."""
    stop_reason: str = ""
    """Why training ended before its last step; empty if it did not."""

    def judge(self, metrics: dict[str, float], value: float, *, higher_is_better: bool) -> None:
        """Take note of a validation: whether ``value``, of the monitored metric, is the best so far."""
        self.validated_step = self.step
        better = self.best is None or (value > self.best if higher_is_better else value < self.best)
        if better and isfinite(value):
            self.best, self.best_step, self.best_metrics = value, self.step, metrics
            self.validations_without_progress = 0
        else:
            self.validations_without_progress += 1

    def to_dict(self) -> dict[str, Any]:
        """Return every counter by name."""
        return asdict(self)
