"""The errors a user may see as one line, and the exit codes of a run."""

DONE = 0
FAILED = 1
"""A bug, or training that diverged: Python's own code for an uncaught exception."""
INPUT = 2
RANK_ENDED_EARLY = 70
INTERRUPTED = 130


class InputError(ValueError):
    """Something the user gave cannot work: shown as one line without a traceback, exit code 2."""
