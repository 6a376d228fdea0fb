"""What happens after a step, on every process, in this order."""

import time
from collections.abc import Sequence
from math import isfinite

from scaletrain.grace import grace_seconds
from scaletrain.recipe import Hook
from scaletrain.run import Run, StepInfo


def all_hooks(own: Sequence[Hook]) -> list[Hook]:
    """Return the hooks of a run in the order in which they are called; ``own`` are the recipe's.

    Saving comes last but for what looks at it: what it saves is the end of the step.
    """
    return [stop_when_not_finite, stop_without_progress, Throughput(), *own, save_when_due, SavesInTime()]


def stop_when_not_finite(run: Run, info: StepInfo) -> None:
    """Raise FloatingPointError at the first log line after a gradient was NaN or infinite, or with such a loss.

    The weights were not touched by such a gradient (``Run.update``). fp16 skips such steps while its scaler looks for
    a scale. A loss may be NaN with a gradient that is finite, as that of ``log(-x)``.
    """
    if not run.log_due(info):
        return
    skipped = run.newly_skipped()
    if not skipped:
        if not isfinite(run.logged.get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss of step {info.step} is {run.logged['loss']:.4g}, though its gradient is finite; look for "
                "the logarithm or root of a negative number in the loss"
            )
        return
    if (
        run.gradients.scaler is not None and run.gradients.scaler.get_scale() >= 1
    ):  # below 1 the fault is not the scale's
        run.log({"skipped": run.state.skipped})
        return
    first = info.step == 1
    where = "at step 1" if first else f"in {skipped} of the steps up to {info.step}"
    advice = "look for log(0), a division by 0 or NaN in the data" if first else "try a lower lr or max_grad_norm"
    raise FloatingPointError(
        f"the gradient was NaN or infinite {where} and no weight was changed by it; the loss of step {info.step} is "
        f"{run.mean(info.loss):.4g}, a finite number is expected; {advice}"
    )


def stop_without_progress(run: Run, info: StepInfo) -> None:
    """Stop early when ``patience`` validations in a row brought nothing better."""
    patience = run.cfg.patience
    if patience is not None and run.state.validations_without_progress >= patience:
        best = "a finite number" if run.state.best is None else f"{run.state.best:.4f}"
        run.stop(f"{run.cfg.monitored_metric} was not better than {best} in {patience} validations")


def save_when_due(run: Run, info: StepInfo) -> None:
    """Save a checkpoint beside training: every so many steps or minutes, after a best score, and on SIGUSR1."""
    if run.save_due(info):
        run.save()


class SavesInTime:
    """Warn once when a save took longer than a run has that is told to leave: it would be lost."""

    def __init__(self) -> None:
        self._grace = grace_seconds()

    def __call__(self, run: Run, info: StepInfo) -> None:
        if self._grace is None or run.saver is None or run.saver.seconds <= self._grace:
            return
        run.tracking.warn(
            f"saving takes {run.saver.seconds:.1f} s, but only {self._grace:.0f} s are given after a SIGTERM: the run "
            "would go on from the checkpoint before; give it more (GRACE or SCALETRAIN_GRACE_SECONDS)"
        )
        self._grace = None


MOST_WAITING = 0.1
"""Share of the time that training may wait for data before a run says so."""
JUDGED_SECONDS = 5
"""How long it looks before it does."""


class Throughput:
    """Measure between log lines, validation left out: examples per second, and the share of waiting for data.

    On an accelerator a process may wait for data while the device still computes: what is measured is the process.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._last = (self._started, 0.0, 0, 0.0)
        self._seconds = self._waited = 0.0
        self._told = False

    def __call__(self, run: Run, info: StepInfo) -> None:
        """Write a line of timing.jsonl; the device has just been waited for by the log line."""
        if not run.log_due(info):
            return
        now = (time.perf_counter(), run.paused_seconds, info.samples_seen, run.loader.waited_seconds)
        seconds = max(now[0] - self._last[0] - (now[1] - self._last[1]), 1e-9)
        waited = now[3] - self._last[3]
        if info.step > 1:  # the first step pays for warming up
            run.tracking.timing(info.step, now[0] - self._started, (now[2] - self._last[2]) / seconds, waited / seconds)
            self._seconds, self._waited = self._seconds + seconds, self._waited + waited
            self._judge(run)
        self._last = now

    def _judge(self, run: Run) -> None:
        """Say once that training waits for data, and what to change."""
        share = self._waited / self._seconds
        if self._told or self._seconds < JUDGED_SECONDS or share <= MOST_WAITING or run.loader.in_memory:
            return
        self._told = True
        run.tracking.warn(f"training waits for data {share:.0%} of the time; {run.loader.advice}; see docs/data.md")
