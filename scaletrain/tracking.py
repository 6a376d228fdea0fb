"""What a run tells: the console, metrics.jsonl and timing.jsonl, and a tracker where one is asked for."""

import json
import os
import time
from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker, WandBTracker
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from scaletrain.errors import CheckpointError
from scaletrain.folder import short, strict, write_json

PLAIN_LINE_SECONDS = 10
"""Without a terminal, training says where it is at most this often; validations always print."""
REDRAW_SECONDS = 0.1
FLUSH_SECONDS = 1


class Tracking:
    """The voice of a run: rank 0's. Without a folder, as on the other ranks, every method does nothing."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        total_steps: int = 0,
        by_epoch: bool = True,
        keep: tuple[int, int] = (0, 0),
    ) -> None:
        """``keep`` counts the lines of metrics.jsonl and timing.jsonl that stay from before."""
        self.folder, self.by_epoch = folder, by_epoch
        self._told = Told(folder) if folder else None
        self._metrics = JsonLines(folder / "metrics.jsonl", keep[0]) if folder else None
        self._timing = JsonLines(folder / "timing.jsonl", keep[1]) if folder else None
        self.tracker_run = ""
        """The tracker's own name for this run, by which a later process goes on with it."""
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress = StepLine(self._console, total_steps)
        self._tracker: WandBTracker | TensorBoardTracker | None = None

    def say(self, text: str) -> None:
        """Print a line."""
        if self.folder is not None:
            self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print a line that asks for attention."""
        if self.folder is not None:
            self._console.print(f"warning: {text}", style="yellow", markup=False)

    @property
    def lines(self) -> tuple[int, int]:
        """How many lines metrics.jsonl and timing.jsonl have by now, written or pending."""
        return (self._metrics.count, self._timing.count) if self._metrics and self._timing else (0, 0)

    def flush(self) -> None:
        """Write the lines that are pending."""
        for lines in (self._metrics, self._timing):
            if lines is not None:
                lines.flush()

    def start_tracker(self, track: str, name: str, config: Mapping[str, Any], run: str = "") -> None:
        """Connect the tracker that ``--track`` names; wandb is offline unless it has a key or WANDB_MODE says more.

        TensorBoard's files lie in the run folder.

        ``run`` is the ``tracker_run`` of before: it goes on, and lines it has been told are not told again.
        """
        if self.folder is None or self._told is None or self._metrics is None or track == "none":
            return
        run = self._told.run or run
        try:
            if track == "tensorboard":
                where = f"tensorboard --logdir {short(self.folder)}"
                self._tracker = TensorBoardTracker("tensorboard", logging_dir=str(self.folder))
            else:
                mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
                where = f"wandb, {mode}"
                known = {"id": run, "resume": "allow"} if run.startswith("wandb:") else {}
                known |= {"id": run.removeprefix("wandb:")} if known else {}
                run_name = f"{name}/{self.folder.name}"
                self._tracker = WandBTracker("scaletrain", name=run_name, dir=str(self.folder), mode=mode, **known)
            self._tracker.start()
            told = {key: value for key, value in strict(config).items() if value is not None}
            self._tracker.store_init_configuration(told)  # older ones begin an offline run of wandb anew here
            self.tracker_run = f"{track}:{getattr(self._tracker.tracker, 'id', '')}"
            self._told.begin(self.tracker_run, self._metrics.count)
        except Exception as error:  # whatever a tracker does, training goes on
            self._drop_tracker(error)
        else:
            self.say(f"tracking with {where}")

    def log(self, values: Mapping[str, float], *, step: int, epoch: float, samples_seen: int) -> None:
        """Record figures of this step: a line in metrics.jsonl, the tracker, the console."""
        if self._metrics is None or self._told is None:
            return
        known = self._metrics.count < self._told.lines
        self._metrics.add({"step": step, "epoch": epoch, "samples_seen": samples_seen, **values})
        if self._tracker is not None and not known:
            self._metrics.flush()  # the file is never behind the tracker, so it tells which lines that knows
            try:
                self._tracker.log(dict(values), step=step)
            except Exception as error:  # whatever a tracker does, training goes on
                self._drop_tracker(error)
        if "loss" in values:
            self._progress.show(step, epoch, values)
        else:
            self.say(_result_line(f"epoch {int(epoch):02d}" if self.by_epoch else f"step {step}", values))

    def timing(self, step: int, seconds: float, examples_per_second: float, waiting: float) -> None:
        """Record the speed since the line before; wall-clock values go to timing.jsonl alone."""
        self._progress.examples_per_second = examples_per_second
        if self._timing is not None:
            speed = round(examples_per_second, 1)
            line = {"step": step, "seconds": round(seconds, 3), "examples_per_second": speed}
            self._timing.add({**line, "waiting_for_data": round(waiting, 4)})

    def close(self) -> None:
        """Finish the bar, the tracker and the files."""
        self._progress.close()
        if self._tracker is not None:
            try:
                self._tracker.finish()
            except Exception as error:  # whatever a tracker does, the run ends as it would have
                self._drop_tracker(error)
            self._tracker = None
        self.flush()

    def _drop_tracker(self, error: Exception) -> None:
        """Warn once; the run goes on without its tracker."""
        self._tracker = None
        first_line = (str(error).strip().splitlines() or [""])[0]
        why = f"{type(error).__name__}: {first_line}"
        self.warn(f"the tracker failed and is off from here on ({why}); metrics.jsonl has everything")


class Told:
    """How many lines of metrics.jsonl the tracker knows, through any number of kills: ``tracker.json``.

    Line k of a run that goes on is the line k of before, so none is told twice and none is left out.
    """

    def __init__(self, folder: Path) -> None:
        """Call it before metrics.jsonl is cut: whatever was in there while a tracker listened, it was told."""
        self._path = folder / "tracker.json"
        self.run, self.lines = "", 0
        try:
            note = json.loads(self._path.read_text())
            self.run, self.lines = str(note["run"]), int(note["lines"])
            if note["listening"]:
                self.lines = max(self.lines, (folder / "metrics.jsonl").read_bytes().count(b"\n"))
            self._write(listening=False)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):  # unreadable: the tracker gets a run of its own
            self.run, self.lines = "", 0

    def begin(self, run: str, lines: int) -> None:
        """Take note of the tracker's run; a new one is told what comes after the first ``lines``."""
        if run != self.run:
            self.run, self.lines = run, lines
        self._write(listening=True)

    def _write(self, *, listening: bool) -> None:
        write_json(self._path, {"run": self.run, "lines": self.lines, "listening": listening})


class JsonLines:
    """A file of one JSON object a line, written about once a second: a line at a time would cost 30 us more.

    The first ``keep`` lines stay from before; the rest was written after the checkpoint that the run goes on from.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self._path = path
        before = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        self.count = min(keep, len(before))
        """Lines there are, the pending ones included."""
        path.open("ab").close()
        os.truncate(path, sum(len(line) for line in before[:keep]))
        self._pending: list[Mapping[str, Any]] = []
        self._flushed = time.monotonic()

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record; NaN becomes null."""
        self._pending.append(record)
        self.count += 1
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is pending. Raises CheckpointError where the disk does not take it: the run is not lost."""
        if self._pending:
            lines = "".join(json.dumps(strict(record)) + "\n" for record in self._pending)
            try:
                with self._path.open("a") as file:
                    file.write(lines)
            except OSError as error:
                raise CheckpointError("disk", f"{self._path}: disk: {error.strerror}; start again to go on") from None
            self._pending.clear()
        self._flushed = time.monotonic()


class StepLine:
    """Where training stands: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self.examples_per_second = 0.0
        self._console, self._total_steps = console, total_steps
        self._on_terminal = console.is_terminal
        self._seconds = REDRAW_SECONDS if self._on_terminal else PLAIN_LINE_SECONDS
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._shown = time.monotonic()

    def show(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Show this step, unless another was shown a moment ago."""
        now = time.monotonic()
        if now - self._shown < self._seconds:
            return
        self._shown = now
        speed = f"{self.examples_per_second:,.0f} examples/s" if self.examples_per_second else ""
        told = f"loss {values.get('loss', nan):.4f}  lr {values.get('lr', nan):.1e}  {speed}"
        if not self._on_terminal:
            self._console.print(f"step {step}/{self._total_steps}  epoch {epoch:.1f}  {told}", markup=False)
            return
        if self._bar is None:
            self._bar = self._make_bar()
        self._bar.update(self._task, completed=step, epoch=epoch, told=told)
        self._bar.refresh()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _make_bar(self) -> Progress:
        bar = Progress(
            TextColumn("epoch {task.fields[epoch]:.1f}  step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._task = bar.add_task("train", total=self._total_steps, epoch=0.0, told="")
        bar.start()
        return bar


def _result_line(place: str, values: Mapping[str, float]) -> str:
    """The tutorial's line: ``epoch 03  train 0.1234  val 0.1200  accuracy 0.9712``."""
    losses = [name for name in ("train_loss", "val_loss", "test_loss") if name in values]
    words = [f"{name.removesuffix('_loss')} {values[name]:.4f}" for name in losses]
    told = [name for name in values if name not in losses and "/" not in name and not name.endswith("_examples")]
    words += [f"{name.removeprefix('val_')} {values[name]:.4f}" for name in told]
    return "  ".join([place, *words])


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace")
