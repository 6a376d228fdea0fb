"""The errors a user may see as one line, and the exit codes of a run."""

from pathlib import Path

DONE = 0
FAILED = 1
"""A bug, or training that diverged: Python's own code for an uncaught exception."""
INPUT = 2
CHECKPOINT = 3
"""A checkpoint could not be written, or none could be read."""
RANK_ENDED_EARLY = 70
"""A rank ended or hung while the others went on."""
OUT_OF_MEMORY = 71
"""Start the same command again: it goes on with smaller micro-batches."""
PREEMPTED = 75
"""Asked to leave (SIGTERM); everything is saved: start the same command again to continue."""
INTERRUPTED = 130


BROADCASTS = "Using a target size"
"""What torch's warning begins with where a loss compares each output with every target: an error in a run."""


class InputError(ValueError):
    """Something the user gave cannot work: shown as one line without a traceback, exit code 2."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or must not be read: exit code 3.

    ``rule`` is the short name of what was violated, as ``sha256`` or ``disk``; docs/checkpoints.md lists them.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class Preempted(BaseException):  # as KeyboardInterrupt: no recipe's ``except Exception`` may swallow it
    """The run was told to leave and is saved, on every process at the same step; ``code`` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Finished(Exception):  # noqa: N818  # no error: there is nothing left to do
    """The run in ``folder`` is done; the message says how to go further."""

    def __init__(self, folder: Path, message: str) -> None:
        super().__init__(message)
        self.folder = folder
