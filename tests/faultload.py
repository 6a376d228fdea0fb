"""How much of the fault matrix runs: a sample with ``make test``, all of it with ``make test-faults``.

``SCALETRAIN_FAULTS=all`` asks for all; ``SCALETRAIN_FAULTS_REPORT`` names a file to which each row appends what it
counted, one JSON object a line.
"""

import json
import os
import random
from pathlib import Path

import pytest

ALL = os.environ.get("SCALETRAIN_FAULTS") == "all"


def amount(everything, sample=None):
    """How many injections to do: ``everything``, or a sample (a tenth unless given)."""
    return everything if ALL else sample or max(1, everything // 10)


def draw(row, seed=0):
    """A random generator of its own for each row of the matrix; the seed is printed so that a failure can be redone."""
    print(f"{row}: seed {seed}")
    return random.Random(f"{row} {seed}")


def cannot(why):
    """Skip a row that this machine cannot run, as a container without mount rights; where all is asked for, fail."""
    (pytest.fail if ALL else pytest.skip)(why)


def report(row, injections, outcome):
    """Record what a row of the matrix did: how many injections, and what came of them."""
    print(f"{row}: {injections} injections: {outcome}")
    if path := os.environ.get("SCALETRAIN_FAULTS_REPORT"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"row": row, "injections": injections, "outcome": outcome}) + "\n")
