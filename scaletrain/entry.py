"""From the command line to a trained model, and every way a run can end."""

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from scaletrain.build import start
from scaletrain.config import is_first_process, parse
from scaletrain.errors import (
    BROADCASTS,
    CHECKPOINT,
    FAILED,
    INPUT,
    INTERRUPTED,
    OUT_OF_MEMORY,
    RANK_ENDED_EARLY,
    CheckpointError,
    Finished,
    InputError,
    Preempted,
)
from scaletrain.folder import record_exit, short
from scaletrain.loop import train
from scaletrain.memory import is_out_of_memory, largest, remember
from scaletrain.misfit import explain
from scaletrain.recipe import Recipe
from scaletrain.run import Result, Run, Step
from scaletrain.signals import noting
from scaletrain.slurm import join_srun
from scaletrain.watchdog import watching

OTHERS_SECONDS = 2
"""A rank that fails alone waits so long for rank 0 to speak before it speaks itself."""


def main(
    recipe: Recipe,
    argv: Sequence[str] | None = None,
    *,
    step: Step | None = None,
    loop: Callable[[Run], None] = train,
) -> Result:
    """Parse the command line, train the recipe, export the weights: the last line of a recipe file.

    ``step`` replaces ``train_step``, ``loop`` replaces ``train``. When the run cannot be finished, the process
    ends with a code of ``scaletrain.errors``: after one line for what the user can mend, after a traceback for
    what is a bug.
    """
    run: Run | None = None
    with noting(alone=not {"LOCAL_RANK", "SLURM_STEP_ID"} & os.environ.keys()) as signals, warnings.catch_warnings():
        warnings.filterwarnings("error", BROADCASTS)  # what is learned then is not what was meant
        try:
            join_srun()
            cfg = parse(recipe.config, argv, description=_about(recipe))
            run = start(recipe, cfg, source=_script() if argv is None else None, step=step, signals=signals)
            with watching(run):
                loop(run)
                return run.finish()
        except Finished as done:
            if is_first_process():
                print(done)
            return earlier_result(done.folder)
        except Preempted as told:
            _end(run, told.code, _saved(run, told.code))
        except InputError as error:
            _end(run, INPUT, f"error: {error}")
        except CheckpointError as error:
            _end(run, CHECKPOINT, f"error: {error}")
        except FloatingPointError as error:
            _end(run, FAILED, f"error: {error}")
        except KeyboardInterrupt:
            _end(run, INTERRUPTED, "interrupted")
        except SystemExit as ended:
            if run is not None and ended.code in (0, None):  # the other ranks would wait for this one
                _record(run, RANK_ENDED_EARLY, f"rank {run.devices.rank} called exit before the end of training")
                _leave(RANK_ENDED_EARLY)
            raise
        except BaseException as error:
            if run is not None and is_out_of_memory(error):
                code = OUT_OF_MEMORY if largest(run) > 1 else INPUT  # what no smaller micro-batch mends
                _end(run, code, f"error: {remember(run)}", at_once=True)
            if run is not None and _is_about_others(error):
                _end_alone(run, error)
            if line := explain(error):
                _end(run, INPUT, f"error: {line}")
            _record(run, FAILED, f"{type(error).__name__}: {error}")
            raise


def _is_about_others(error: BaseException) -> bool:
    """Whether an exchange failed because another process is no longer there."""
    broken = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Gloo")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in broken)
    )


def _end_alone(run: Run, error: BaseException) -> NoReturn:
    """Say which rank is missed, unless it said why itself, and leave: what failed here is only a consequence."""
    if (run.folder / "exit.json").exists():
        _leave(RANK_ENDED_EARLY)
    deadline = time.monotonic() + OTHERS_SECONDS
    while not (gone := run.devices.gone()) and time.monotonic() < deadline:  # it may still be ending
        time.sleep(0.05)
    who = f"rank {', '.join(map(str, gone))} ended early" if gone else f"lost contact with another rank ({error})"
    reason = f"{who}, in or after step {run.state.step}; see what it said; the checkpoints are untouched"
    _record(run, RANK_ENDED_EARLY, reason)
    print(f"error: rank {run.devices.rank}: {reason}", file=sys.stderr, flush=True)
    _leave(RANK_ENDED_EARLY)


def _saved(run: Run | None, code: int) -> str:
    """Say that nothing is lost and how to go on."""
    if run is None:  # restarted by the launcher after it had left
        return "told to leave; all is saved"
    who = "interrupted" if code == INTERRUPTED else "told to leave"
    return f"{who}: saved after step {run.state.step}; to go on: the same command with --out {short(run.folder)}"


def earlier_result(folder: Path) -> Result:
    """Return what a run said of itself when it was done."""
    try:
        said = json.loads((folder / "result.json").read_text())
        return Result(said["metrics"], said["step"], said["best"], said["best_step"], said["stop_reason"], folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _end(None, INPUT, f"error: {folder} is done but its result.json cannot be read ({error}); choose another --out")


def _end(run: Run | None, code: int, reason: str, *, at_once: bool = False) -> NoReturn:
    """Say once why the run ended, on rank 0 where it failed too, and leave with ``code``.

    ``at_once``: only this rank can know, whichever it is.
    """
    if is_first_process() or at_once:
        problem = _record(run, code, reason)
        print(f"{reason}{problem}", file=sys.stderr, flush=True)
    elif run is not None and not _somebody_spoke(run):
        problem = _record(run, code, f"{reason} (on rank {run.devices.rank})")
        print(f"{reason} (on rank {run.devices.rank}){problem}", file=sys.stderr, flush=True)
    _leave(code)


def _somebody_spoke(run: Run) -> bool:
    deadline = time.monotonic() + OTHERS_SECONDS
    while not (run.folder / "exit.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return (run.folder / "exit.json").exists()


def _record(run: Run | None, code: int, reason: str) -> str:
    """Leave the outcome in exit.json and close what is open; return what could not be written, to be said too.

    The rank that fails first writes it; what then fails on the others is a consequence.
    """
    if run is None:
        _record_early(code, reason)
        return ""
    if run.saver is not None and run.devices.world_size == 1 and code != INTERRUPTED:
        with contextlib.suppress(Exception):  # with several processes the others could be waited for in vain
            run.saver.wait()
    problem = ""
    try:
        if not (run.folder / "exit.json").exists():
            record_exit(run.folder, code, reason)
    except OSError as error:
        problem = f"; exit.json could not be written: {error.strerror}"
    with contextlib.suppress(CheckpointError):  # the last lines of metrics.jsonl, which going on would cut anyway
        run.tracking.close()
    return problem


def _record_early(code: int, reason: str) -> None:
    """Leave exit.json, before there is a run, where a launch script looks for it: launchers hide the exit code."""
    folder = Path(os.environ.get("SCALETRAIN_OUT", ""))
    if "SCALETRAIN_OUT" in os.environ and is_first_process() and not (folder / "exit.json").exists():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            record_exit(folder, code, reason)


def _leave(code: int) -> NoReturn:
    if dist.is_initialized():  # an exchange with ranks that may be gone would hold or abort an orderly exit
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _about(recipe: Recipe) -> str:
    """The docstring of the script, or else of the recipe's file, for --help."""
    home = sys.modules.get(getattr(recipe.loss, "__module__", "__main__"))
    return (sys.modules["__main__"].__doc__ or (home and home.__doc__) or "").strip()


def _script() -> str | None:
    """The file that Python was started with."""
    return getattr(sys.modules["__main__"], "__file__", None)
