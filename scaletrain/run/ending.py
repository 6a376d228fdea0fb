"""How a run ends: with the best weights, a result, and a word about both."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from scaletrain.agreement import gather_texts
from scaletrain.checkpoint.export import WEIGHTS, export, load_trained, named_tensors
from scaletrain.checkpoint.format import FOLDER, step_folder
from scaletrain.checkpoint.verify import open_checkpoint, whole
from scaletrain.errors import DONE, CheckpointError
from scaletrain.folder import record_exit, short, write_json
from scaletrain.recipe import unmet
from scaletrain.run.info import Result

if TYPE_CHECKING:
    from scaletrain.run.run import Run


def take_best(run: Run) -> None:
    """Wait for what is being saved, then put the best weights into the model. Every rank must reach this line."""
    if run.saver is None:
        return
    run.pulse.at("saving")
    run.saver.wait()
    state = run.state
    run.result_step = state.step
    if state.best_step in (-1, state.step):
        _take_average(run)
        return
    path = run.folder / FOLDER / step_folder(state.best_step)
    found = whole(path) if run.devices.is_first else ""
    problem = gather_texts(found if isinstance(found, str) else "", run.devices.control)[0]
    if problem:
        run.tracking.warn(f"the best weights, of step {state.best_step}, cannot be had ({problem}): the last are used")
        _take_average(run)
        return
    load_trained(open_checkpoint(path), named_tensors(run.module))
    run.ema = None
    run.result_step = state.best_step
    run.metrics.update(state.best_metrics)


def _take_average(run: Run) -> None:
    """Put the moving average of the weights into the model, where there is one, for good."""
    if run.ema is not None:
        run.ema.swap()
        run.ema = None


def replaced(run: Run) -> dict[str, str]:
    """Return which examples could not be read, and why, on any process. Every rank must reach this line."""
    said = gather_texts(json.dumps(run.loader.bad), run.devices.control)
    return {example: reason for text in said for example, reason in sorted(json.loads(text).items())}


def write_outcome(run: Run, bad: dict[str, str]) -> None:
    """Export the weights and write result.json, then exit.json; rank 0 does. Raises CheckpointError for a full disk."""
    try:
        _write_outcome(run, bad)
    except OSError as error:
        where = error.filename or run.folder
        again = "the checkpoints are untouched; when it is mended, start again to export them"
        raise CheckpointError("disk", f"{where}: disk: {error.strerror or error}; {again}") from None


def _write_outcome(run: Run, bad: dict[str, str]) -> None:
    export(open_checkpoint(run.folder / FOLDER / step_folder(run.result_step)), run.folder / WEIGHTS)
    outcome = {"metrics": run.metrics, **run.state.to_dict(), "expect_missed": unmet(run.recipe.expect, run.metrics)}
    if bad:
        outcome["examples_replaced"] = bad
    write_json(run.folder / "result.json", outcome)
    record_exit(run.folder, DONE, run.state.stop_reason or "done")


def say_outcome(run: Run) -> Result:
    """Say how the run ended, close what is open, and return the result."""
    state, say = run.state, run.tracking.say
    say(f"{state.stop_reason or 'done'}: {state.step} steps, {state.samples_seen / run.examples:.4g} epochs")
    if state.best is not None:
        say(f"best {run.cfg.monitored_metric} {state.best:.4f} at step {state.best_step}")
    say(f"weights of step {run.result_step}: {short(run.folder / WEIGHTS)}")
    run.tracking.close()
    return Result(run.metrics, state.step, state.best, state.best_step, state.stop_reason, run.folder)
