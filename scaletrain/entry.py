"""From the command line to a trained model, and every way a run can end."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from scaletrain.build import start
from scaletrain.config import is_first_process, parse
from scaletrain.errors import FAILED, INPUT, INTERRUPTED, RANK_ENDED_EARLY, InputError
from scaletrain.folder import write_json
from scaletrain.loop import train
from scaletrain.recipe import Recipe
from scaletrain.run import Result, Run, Step


def main(recipe: Recipe, argv: Sequence[str] | None = None, *, step: Step | None = None) -> Result:
    """Parse the command line, train the recipe, export the weights: the last line of a recipe file.

    ``step`` replaces ``train_step``. When the run cannot be finished, the process ends with a code of
    ``scaletrain.errors``: after one line for what the user can mend, after a traceback for what is a bug.
    """
    run: Run | None = None
    try:
        cfg = parse(recipe.config, argv, description=_about(recipe))
        run = start(recipe, cfg, source=_script() if argv is None else None, step=step)
        train(run)
        return run.finish()
    except InputError as error:
        _end(run, INPUT, f"error: {error}")
    except FloatingPointError as error:
        _end(run, FAILED, f"error: {error}")
    except KeyboardInterrupt:
        _end(run, INTERRUPTED, "interrupted")
    except SystemExit as ended:
        if run is not None and ended.code in (0, None):  # the other ranks would wait for this one
            _record(run, RANK_ENDED_EARLY, f"rank {run.devices.rank} called exit before the end of training")
            _leave(run, RANK_ENDED_EARLY)
        raise
    except BaseException as error:
        _record(run, FAILED, f"{type(error).__name__}: {error}")
        raise


def _end(run: Run | None, code: int, reason: str) -> NoReturn:
    """Say on rank 0 why the run ended, and leave with ``code``."""
    if run is None or run.devices.is_first:
        _record(run, code, reason)
    if is_first_process():
        print(reason, file=sys.stderr, flush=True)
    _leave(run, code)


def _record(run: Run | None, code: int, reason: str) -> None:
    """Close what is open and leave the outcome in exit.json, which launch scripts read.

    The rank that fails first writes it; what then fails on the others is a consequence.
    """
    if run is not None:
        run.tracking.close()
        if not (run.folder / "exit.json").exists():
            write_json(run.folder / "exit.json", {"code": code, "reason": reason})


def _leave(run: Run | None, code: int) -> NoReturn:
    if run is not None and run.devices.world_size > 1:
        sys.stdout.flush()
        os._exit(code)  # an exchange with ranks that may be gone would hold an orderly exit
    sys.exit(code)


def _about(recipe: Recipe) -> str:
    """The docstring of the recipe's file, for --help."""
    return (sys.modules[recipe.loss.__module__].__doc__ or "").strip()


def _script() -> str | None:
    """The file that Python was started with."""
    return getattr(sys.modules["__main__"], "__file__", None)
