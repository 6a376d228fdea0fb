"""Measure in a child process: a fresh one for each figure, with its own memory to look at and, where asked, a cap."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[1]


def in_child(
    module: str, *arguments: object, timeout_seconds: float = 600, cap_bytes: int | None = None
) -> dict[str, Any]:
    """Run ``python -m module arguments`` and return the JSON object in its last line.

    ``cap_bytes`` is a limit on its address space (RLIMIT_AS). Returns ``{"failed": why}`` where it did not end well.
    """

    def cap() -> None:
        if cap_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (cap_bytes, cap_bytes))

    command = [sys.executable, "-m", module, *map(str, arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONPATH": path}
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            preexec_fn=cap,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {timeout_seconds:.0f} s"}
    if ended.returncode:
        memory = "MemoryError" in ended.stderr or "can't allocate memory" in ended.stderr
        last = (ended.stderr.strip().splitlines() or [f"code {ended.returncode}"])[-1]
        return {"failed": f"out of memory at {(cap_bytes or 0) // GIB} GiB" if memory and cap_bytes else last}
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answer


class PeakMemory:
    """The most resident memory of this process since it was made, above what it had then (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
        self._before = _kilobytes("VmRSS")

    def grown_bytes(self) -> int:
        return max(0, _kilobytes("VmHWM") - self._before) * 1024


def _kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
