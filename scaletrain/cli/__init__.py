"""Begin a recipe, look at its learning rate, predict with its weights, look after its checkpoints."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import tyro

from scaletrain.cli.ckpt import Ckpt
from scaletrain.cli.recipes import LrFind, New, Predict, Schedule
from scaletrain.errors import BROADCASTS, CHECKPOINT, DONE, INPUT, CheckpointError, InputError

COMMANDS = Annotated[
    Annotated[New, tyro.conf.subcommand("new")]
    | Annotated[Schedule, tyro.conf.subcommand("schedule")]
    | Annotated[LrFind, tyro.conf.subcommand("lr-find")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Ckpt, tyro.conf.subcommand("ckpt")],
    tyro.conf.arg(name=""),
]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``scaletrain new|schedule|lr-find|predict|ckpt ...``; the exit code says how it went."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command: Any
    command, rest = tyro.cli(COMMANDS, prog="scaletrain", args=args, description=__doc__, return_unknown_args=True)
    warnings.filterwarnings("error", BROADCASTS)
    try:
        if isinstance(command, Schedule | LrFind):
            code = command.action(rest)
        elif rest:
            raise InputError(f"unknown option {rest[0]}; see --help")
        else:
            code = command.action()
        sys.stdout.flush()
    except InputError as error:
        _fail(INPUT, str(error))
    except CheckpointError as error:
        _fail(CHECKPOINT, str(error))
    except BrokenPipeError:  # as in: scaletrain ckpt list RUN | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(DONE)
    except OSError as error:
        _fail(INPUT, f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        from scaletrain.misfit import explain

        if line := explain(error):
            _fail(INPUT, line)
        raise
    sys.exit(code)


def _fail(code: int, reason: str) -> NoReturn:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {reason}", file=sys.stderr)
    sys.exit(code)
