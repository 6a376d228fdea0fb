"""How long a run has between a SIGTERM and a SIGKILL, as far as the launch script or SLURM say."""

import os
import time
from math import inf


def grace_seconds() -> float | None:
    """Return what SCALETRAIN_GRACE_SECONDS says; None where nobody does."""
    return _number("SCALETRAIN_GRACE_SECONDS")


def seconds_left() -> float:
    """Return how long a run just told to leave may take: its grace, or what is left of a SLURM job; else infinity."""
    end = _number("SLURM_JOB_END_TIME")
    known = [grace_seconds(), None if end is None else max(0.0, end - time.time())]
    return min((seconds for seconds in known if seconds is not None), default=inf)


def _number(name: str) -> float | None:
    try:
        return float(os.environ.get(name, ""))
    except ValueError:
        return None
