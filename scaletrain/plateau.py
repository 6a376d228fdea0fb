"""A lower learning rate when validation brings nothing better any more."""

from __future__ import annotations

from typing import Any

from scaletrain.errors import InputError
from scaletrain.run import Run, StepInfo


class Plateau:
    """A hook that multiplies the rate by ``factor`` when the monitored metric is on a plateau, as ReduceLROnPlateau.

    A plateau is more than ``patience`` validations in a row none of which is better than the best by ``threshold``
    (a share of it). The factor, at least ``smallest``, multiplies what the schedule says; it is part of the run's
    state, so a run that goes on has it. ``Recipe(hooks=lambda cfg: [Plateau(patience=3)])``.
    """

    def __init__(self, factor: float = 0.1, patience: int = 10, threshold: float = 1e-4, smallest: float = 0.0) -> None:
        if not 0 < factor < 1:
            raise InputError(f"Plateau: factor is {factor}; it must lie between 0 and 1")
        if not 0 <= smallest < 1 or patience < 0:
            raise InputError(f"Plateau: smallest is {smallest}, from 0 to below 1; patience is {patience}, at least 0")
        self.factor, self.patience, self.threshold, self.smallest = factor, patience, threshold, smallest
        self._best: float | None = None
        self._without_progress = 0

    def __call__(self, run: Run, info: StepInfo) -> None:
        """Judge the validation of this step, if there was one."""
        if "val" not in run.held_out:
            raise InputError("Plateau needs validation examples, but the recipe's data has no val")
        if run.state.validated_step != info.step:
            return
        value = run.metrics[run.cfg.monitored_metric]
        if self._is_better(value, run.cfg.higher_is_better):
            self._best, self._without_progress = value, 0
            return
        self._without_progress += 1
        if self._without_progress > self.patience:
            self._without_progress = 0
            run.state.lr_factor = max(self.smallest, run.state.lr_factor * self.factor)
            run.tracking.say(f"{run.cfg.monitored_metric} is on a plateau: learning rate times {run.state.lr_factor:g}")

    def _is_better(self, value: float, higher_is_better: bool) -> bool:
        if value != value:
            return False
        if self._best is None:
            return True
        margin = self.threshold * abs(self._best)
        return value > self._best + margin if higher_is_better else value < self._best - margin

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs."""
        return {"best": self._best, "without_progress": self._without_progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        best = state["best"]
        self._best, self._without_progress = None if best is None else float(best), int(state["without_progress"])
