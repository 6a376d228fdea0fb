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
    """Parse the command line, train the recipe, export the weights; the last line of a recipe file.

    ``step`` replaces ``train_step``. Ends the process with a code of ``scaletrain.errors`` when the run cannot
    be finished: one line for what the user can mend, a traceback for what is a bug.
    """
    run: Run | None = None
    try:
        cfg = parse(recipe.config, argv, description=(sys.modules[recipe.loss.__module__].__doc__ or "").strip())
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
        if run is None:  # --help
            raise
        _end(
            run,
            RANK_ENDED_EARLY if ended.code in (0, None) else int(ended.code or 0),
            f"a process ended the run early: exit({ended.code})",
        )
    except BaseException as error:
        _record(run, FAILED, f"{type(error).__name__}: {error}")
        raise


def _end(run: Run | None, code: int, reason: str) -> NoReturn:
    """Say why the run ended, on rank 0, and leave with ``code``."""
    _record(run, code, reason)
    if is_first_process():
        print(reason, file=sys.stderr, flush=True)
    if run is not None and run.devices.world_size > 1:
        sys.stdout.flush()
        os._exit(code)  # the others may be waiting in a collective, which would hold this process at exit
    sys.exit(code)


def _record(run: Run | None, code: int, reason: str) -> None:
    """Close the progress bar and the files, and leave the outcome in exit.json, which launch scripts read."""
    if run is None or not run.devices.is_first:
        return
    run.tracking.close()
    write_json(run.folder / "exit.json", {"code": code, "reason": reason})


def _script() -> str | None:
    """The file that Python was started with."""
    return getattr(sys.modules["__main__"], "__file__", None)
