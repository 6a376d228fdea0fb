"""Compare ways of doing the same work side by side, in one process, on a machine that is never quiet.

Each round runs every arm once, in random order; figures are medians of the ratios within a round, with a
bootstrap confidence interval. Rounds in which the machine lent its time to others (steal above 1 %) are
dropped. An A/A row, an arm against a copy of itself, shows the noise.
"""

import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

Arm = Callable[[], float]
"""Do the work once and return the seconds it took, set-up left out."""


@dataclass
class Rounds:
    """Seconds of each arm in each round, and what was dropped."""

    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]
    dropped: int = 0
    load: list[float] = field(default_factory=list)

    def ratio(self, arm: str, base: str) -> tuple[float, float, float]:
        """Return the median of arm / base over the rounds, and the ends of its 95 % interval."""
        ratios = [a / b for a, b in zip(self.seconds[arm], self.seconds[base], strict=True)]
        draw = random.Random(0)
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
        return statistics.median(ratios), medians[50], medians[1949]


def run_rounds(arms: dict[str, Arm], rounds: int, *, warmup: int = 1, any_of: Callable[[bool], bool] = bool) -> Rounds:
    """Run ``rounds`` rounds that were not disturbed, after ``warmup`` uncounted ones; where all were, the last stands.

    ``any_of`` tells whether something holds on any of several processes that run the arms together.
    """
    result = Rounds({name: [] for name in arms}, {name: [] for name in arms})
    shuffle = random.Random(0)
    while len(next(iter(result.seconds.values()))) < rounds and result.dropped < rounds:
        names = list(arms)
        shuffle.shuffle(names)
        before, seconds, cpu = _stolen(), {}, {}
        for name in names:
            start = _cpu_seconds()
            seconds[name] = arms[name]()
            cpu[name] = _cpu_seconds() - start
        disturbed = any_of(_stolen_share(before, _stolen()) > 0.01)
        last_chance = result.dropped + 1 == rounds and not result.load
        if warmup:
            warmup -= 1
        elif disturbed and not last_chance:
            result.dropped += 1
        else:
            for name in arms:
                result.seconds[name].append(seconds[name])
                result.cpu_seconds[name].append(cpu[name])
            result.load.append(Path("/proc/loadavg").read_text().split()[0])
    return result


def conditions(command: str, packages: tuple[str, ...] = ("torch", "accelerate")) -> list[str]:
    """Return the lines that must stand beside every figure: date, commit, versions, machine.

    COMMIT says which it is where there is no git to ask.
    """
    git = ["git", "describe", "--always", "--dirty"] if shutil.which("git") else ["true"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    return [
        f"* {time.strftime('%Y-%m-%d')}, commit {commit or os.environ.get('COMMIT', 'unknown')}, `{command}`",
        f"* Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages),
        f"* {cpu}, {len(_lines('/proc/cpuinfo', 'processor'))} cores, {platform.system()} {platform.release()}",
    ]


def aims(title: str, *found: tuple[bool, str]) -> list[str]:
    """Return the lines that say of each aim whether it was met."""
    return [f"{title}:", "", *(f"* {'met' if met else 'MISSED'}: {said}" for met, said in found)]


def _lines(path: str, start: str = "") -> list[str]:
    file = Path(path)
    return [line for line in file.read_text().splitlines() if line.startswith(start)] if file.exists() else []


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _stolen() -> tuple[int, int]:
    """Return (stolen, all) ticks of this machine so far; zeros where /proc/stat does not say."""
    ticks = [int(t) for line in _lines("/proc/stat", "cpu ") for t in line.split()[1:9]]
    return (ticks[7], sum(ticks)) if ticks else (0, 0)


def _stolen_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    return (after[0] - before[0]) / max(1, after[1] - before[1])
