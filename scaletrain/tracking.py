"""What a run tells: the console, metrics.jsonl and timing.jsonl, and a tracker where one is asked for."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from accelerate.tracking import WandBTracker
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from scaletrain.folder import strict

PLAIN_LINE_SECONDS = 10
"""Without a terminal, training says where it is at most this often; validations always print."""
REDRAW_SECONDS = 0.1


class Tracking:
    """The voice of a run: rank 0's. Without a folder, as on the other ranks, every method does nothing."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        total_steps: int = 0,
        by_epoch: bool = True,
        console: Console | None = None,
    ) -> None:
        self.folder, self.total_steps, self.by_epoch = folder, total_steps, by_epoch
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._metrics: TextIO | None = None
        self._timing: TextIO | None = None
        self._tracker: WandBTracker | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._drawn = 0.0
        self._examples_per_second = 0.0
        if folder is not None:
            self._metrics = (folder / "metrics.jsonl").open("w", buffering=1)
            self._timing = (folder / "timing.jsonl").open("w", buffering=1)

    def say(self, text: str) -> None:
        """Print a line."""
        if self.folder is not None:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print a line that asks for attention."""
        if self.folder is not None:
            self.console.print(f"warning: {text}", style="yellow", markup=False)

    def start_tracker(self, track: str, name: str, config: Mapping[str, Any]) -> None:
        """Connect the tracker that ``--track`` names; wandb is offline unless it has a key or WANDB_MODE says more."""
        if self.folder is None or track == "none":
            return
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        try:
            self._tracker = WandBTracker(
                "scaletrain", name=f"{name}/{self.folder.name}", dir=str(self.folder), mode=mode
            )
            self._tracker.start()
            self._tracker.store_init_configuration(strict(config))
        except Exception as error:  # whatever a tracker does, training goes on
            self._drop_tracker(error)
        else:
            self.say(f"tracking with wandb, {mode}")

    def log(self, values: Mapping[str, float], *, step: int, epoch: float, samples_seen: int) -> None:
        """Record ``values`` of this step: a line in metrics.jsonl, the tracker, the console."""
        if self._metrics is None:
            return
        place = {"step": step, "epoch": epoch, "samples_seen": samples_seen}
        self._metrics.write(json.dumps(strict({**place, **values})) + "\n")
        if self._tracker is not None:
            try:
                self._tracker.log(dict(values), step=step)
            except Exception as error:  # whatever a tracker does, training goes on
                self._drop_tracker(error)
        if any(name.startswith(("val_", "test_")) for name in values):
            self.say(_result_line(f"epoch {int(epoch):02d}" if self.by_epoch else f"step {step}", values))
        else:
            self._progress(step, epoch, values)

    def timing(self, step: int, seconds: float, examples_per_second: float) -> None:
        """Record the speed since the line before: wall-clock values go to timing.jsonl alone."""
        self._examples_per_second = examples_per_second
        if self._timing is not None:
            line = {"step": step, "seconds": round(seconds, 3), "examples_per_second": round(examples_per_second, 1)}
            self._timing.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Finish the bar, the tracker and the files."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._tracker is not None:
            try:
                self._tracker.finish()
            except Exception as error:  # whatever a tracker does, the run has ended well
                self._drop_tracker(error)
            self._tracker = None
        for file in (self._metrics, self._timing):
            if file is not None:
                file.close()

    def _progress(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        speed = f"{self._examples_per_second:,.0f} examples/s" if self._examples_per_second else ""
        if self.console.is_terminal:
            if now - self._drawn < REDRAW_SECONDS and step < self.total_steps:
                return
            if self._bar is None:
                self._bar, self._task = _make_bar(self.console, self.total_steps)
            told = f"loss {values.get('loss', float('nan')):.4f}  lr {values.get('lr', float('nan')):.1e}  {speed}"
            self._bar.update(self._task, completed=step, epoch=f"{epoch:5.1f}", told=told)
            self._bar.refresh()
        elif now - self._drawn < PLAIN_LINE_SECONDS:
            return
        elif self._drawn:  # not at the first step: there is no speed yet
            loss, lr = values.get("loss", float("nan")), values.get("lr", float("nan"))
            self.say(f"step {step}/{self.total_steps}  epoch {epoch:.1f}  loss {loss:.4f}  lr {lr:.1e}  {speed}")
        self._drawn = now

    def _drop_tracker(self, error: Exception) -> None:
        """Warn once; afterwards the run goes on without its tracker."""
        self._tracker = None
        lines = str(error).strip().splitlines() or [""]
        self.warn(
            f"the tracker failed and is off from here on ({type(error).__name__}: {lines[0]}); metrics.jsonl has everything"
        )


def _result_line(place: str, values: Mapping[str, float]) -> str:
    """The tutorial's line: ``epoch 03  train 0.1234  val 0.1200  accuracy 0.9712``."""
    first = [name for name in ("train_loss", "val_loss", "test_loss") if name in values]
    words = [f"{name.removesuffix('_loss')} {values[name]:.4f}" for name in first]
    words += [f"{name.removeprefix('val_')} {value:.4f}" for name, value in values.items() if name not in first]
    return "  ".join([place, *words])


def _make_bar(console: Console, total_steps: int) -> tuple[Progress, TaskID]:
    columns = ["epoch {task.fields[epoch]}", "step {task.completed:.0f}/{task.total:.0f}", "{task.fields[told]}"]
    texts = [TextColumn(column) for column in columns]
    bar = Progress(
        *texts[:2], BarColumn(bar_width=20), texts[2], TimeRemainingColumn(), console=console, auto_refresh=False
    )
    task = bar.add_task("train", total=total_steps, epoch="", told="")
    bar.start()
    return bar, task


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace")
