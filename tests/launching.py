"""Start recipes as users do: as scripts, through torchrun, through accelerate launch."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

from worlds import WORLD, end_processes

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")


def launch(*command, timeout=120, **env):
    """Run a command to its end; returns it with ``stdout`` and ``stderr`` as text."""
    quiet = {"PYTHONWARNINGS": "ignore", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
    environment = {k: v for k, v in os.environ.items() if k != "MAKEFLAGS"} | quiet | env  # make test's own options
    words = [str(word) for word in command]
    world = uuid.uuid4().hex
    try:
        return subprocess.run(
            words, env=environment | {WORLD: world}, capture_output=True, text=True, timeout=timeout, check=False
        )
    finally:
        left = end_processes(world)
        assert not left, f"processes were left over: {left}"


def script(folder, body):
    """Write a recipe file with ``body``, which finds tests/tiny.py and scaletrain imported; returns its path."""
    path = folder / "own_recipe.py"
    head = (
        f"import sys\nfrom dataclasses import replace\n\nimport torch\n\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    )
    path.write_text(f"{head}import tiny\nfrom scaletrain import *\n\n{body}\n")
    return path
