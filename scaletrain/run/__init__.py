"""What the loop touches: ``Run``, what each step tells of itself, and how a run ends."""

from scaletrain.run.info import Result, StepInfo
from scaletrain.run.run import Run, Step

__all__ = ["Result", "Run", "Step", "StepInfo"]
