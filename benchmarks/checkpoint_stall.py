"""What saving costs a training that goes on: how long it waits, how much slower it steps, how much memory it needs.

    python -m benchmarks.checkpoint_stall [--parameters 100_000_000] [--rounds 5] [--out FILE]

100 million float32 parameters with AdamW are 1.2 GB: weights and two moments. Beside them a small MLP trains on one
thread. Each way of saving, in a process of its own, saves twice: once cold, when it takes its memory, and once as
every time after. Then the race: it saves, every tensor is overwritten as soon as the call returns, and what is
read back must be the state before. The floor is a copy into memory that is already there; beside it the disk alone,
the same bytes written in order and synced.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.children import PeakMemory, in_child
from benchmarks.pairs import Rounds, aims, conditions
from benchmarks.ways_to_save import DISK, MEMORY, OURS, TORCH, WAYS, Readable, State, Way

SECONDS_BEFORE = 1.5
"""How long the small training is timed before each save."""
FULL_SIZE = 100_000_000


def small_training() -> Callable[[], float]:
    """Return a real training step of a few milliseconds, which returns the seconds it took."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = torch.randn(64, 256), torch.randint(0, 10, (64,))

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return time.perf_counter() - started

    return step


def measure(name: str, folder: Path, parameters: int, *, seconds_before: float = SECONDS_BEFORE) -> dict[str, Any]:
    """Save three times in the way called ``name`` beside a small training; return what it cost.

    Seconds but for ``extra_bytes`` (most memory above what was there), ``slowdown`` (step while writing /
    before) and ``race_held``.
    """
    state, step = State(parameters), small_training()
    for _ in range(20):
        step()
    memory = PeakMemory()
    way = WAYS[name](state, folder)
    cold = _save(way, 1, step, seconds_before)
    state.fill(2)
    found = _save(way, 2, step, seconds_before)
    found |= {"cold_stall": cold["stall"], "extra_bytes": memory.grown_bytes(), "nbytes": state.nbytes}
    if hasattr(way, "load"):
        state.fill(0)
        found["load"] = min(_seconds(partial(way.load, 2)) for _ in range(2))
        if not state.is_of(2, state.tensors()):
            raise SystemExit(f"{name} loaded another state than it saved")
    if isinstance(way, Readable):
        state.fill(3)
        way.save(3)
        state.fill(4)
        way.wait()
        found["race_held"] = state.is_of(3, way.read(3))
    return found


def _save(way: Way, number: int, step: Callable[[], float], seconds_before: float) -> dict[str, Any]:
    before, during = [], []
    deadline = time.perf_counter() + seconds_before
    while time.perf_counter() < deadline:
        before.append(step())
    cpu, started = time.process_time(), time.perf_counter()
    way.save(number)
    stall, trained = time.perf_counter() - started, time.thread_time()
    while way.busy():
        during.append(step())
    cpu += time.thread_time() - trained
    way.wait()
    found = {"stall": stall, "cpu": time.process_time() - cpu, "before": statistics.median(before)}
    if during:
        found["slowdown"] = statistics.mean(during) / statistics.mean(before)
        found["median_slowdown"] = statistics.median(during) / found["before"]
        found["lost"] = stall + sum(during) - len(during) * statistics.mean(before)
    if way.durable_at is not None:
        found["durable"] = way.durable_at - started
    return found


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@dataclass
class Measured:
    """What the processes measured, by way and round."""

    found: dict[str, list[dict[str, Any]]]
    load: list[str]
    """Of the machine, after each round."""

    def median(self, name: str, key: str) -> float | None:
        """Return the median over the rounds; None for what ``name`` does not measure."""
        values = [found[key] for found in self.found[name] if key in found]
        return statistics.median(values) if values else None

    def ratio(self, name: str, base: str, key: str = "stall") -> tuple[float, float, float]:
        """Return the median of name / base over the rounds, and the ends of its 95 % interval."""
        seconds = {way: [found[key] for found in self.found[way]] for way in (name, base)}
        return Rounds(seconds, {}).ratio(name, base)


def measure_all(folder: Path, parameters: int, rounds: int) -> Measured:
    """Run every way in a fresh process in each round, in random order.

    No round is dropped for steal: writing to a virtual disk itself costs the machine 1 to 2 %.
    """
    measured, shuffle = Measured({name: [] for name in WAYS}, []), random.Random(0)
    for _ in range(rounds):
        for name in shuffle.sample(list(WAYS), len(WAYS)):
            os.sync()  # what the one before left to write
            with tempfile.TemporaryDirectory(dir=folder) as own:
                arguments = ("--way", name, "--folder", own, "--parameters", parameters)
                found = in_child("benchmarks.checkpoint_stall", *arguments)
            if "failed" in found:
                raise SystemExit(f"{name}: {found['failed']}")
            measured.found[name].append(found)
        measured.load.append(Path("/proc/loadavg").read_text().split()[0])
    return measured


def report(rounds: Measured, parameters: int, command: str) -> list[str]:
    """Write the tables."""
    nbytes = int(rounds.median(MEMORY, "nbytes") or 0)
    small = (rounds.median(MEMORY, "before") or 0) * 1e3
    lines = ["# What saving costs a training that goes on", ""]
    lines += conditions(command, ("torch", "safetensors"))
    lines += [
        f"* {parameters:,} parameters with AdamW, {nbytes / 1e9:.2f} GB; beside them an MLP on one thread, "
        f"{small:.1f} ms a step",
        f"* {len(rounds.load)} rounds of one fresh process per way, in random order, none dropped; load after each: "
        f"{', '.join(rounds.load)}; medians",
        "* stall: time of the call on the training thread, second save of the process (the first takes its memory)",
        "* slowdown: mean step while writing / before, and that of the median step; of a memory copy: the steps after",
        "  it, the noise; of the disk alone in a process beside: what any writing costs a training on this machine",
        "* lost: stall + what the steps took longer while it was written, to the end of removing old checkpoints",
        "* durable: committed, or fsync returned; fsync in all ways but the plain torch.save; one disk, ext4",
        "* CPU: of the process while it saves, the steps' left out",
        "* memory: most resident above what was there, in bytes and in copies of the state",
        "* race: every tensor is overwritten as soon as the call returns; held: what is read back is the state before",
        "",
        "| way | stall ms | / memory copy (95 % interval) | first save ms | slowdown | of the median | lost ms | CPU s "
        "| durable s | / disk alone | memory MB | copies | race |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in WAYS:
        ratio, low, high = rounds.ratio(name, MEMORY)
        extra = rounds.median(name, "extra_bytes") or 0
        races = [found["race_held"] for found in rounds.found[name] if "race_held" in found]
        durable = rounds.ratio(name, DISK, "durable")[0] if rounds.median(name, "durable") else None
        cells = [
            name,
            _number(rounds.median(name, "stall"), 1e3, ".0f"),
            f"{ratio:.2f} ({low:.2f}-{high:.2f})",
            _number(rounds.median(name, "cold_stall"), 1e3, ".0f"),
            _number(rounds.median(name, "slowdown"), 1, ".3f"),
            _number(rounds.median(name, "median_slowdown"), 1, ".3f"),
            _number(rounds.median(name, "lost"), 1e3, ".0f"),
            _number(rounds.median(name, "cpu"), 1, ".2f"),
            _number(rounds.median(name, "durable"), 1, ".2f"),
            _number(durable, 1, ".2f"),
            f"{extra / 1e6:.0f}",
            f"{extra / nbytes:.2f}",
            f"{'held' if all(races) else 'NOT held'}, {sum(races)} of {len(races)}" if races else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    ours, theirs = rounds.median(OURS, "load"), rounds.median(TORCH, "load")
    lines += [
        "",
        f"Loading, page cache warm: scaletrain (open, verify every byte, read into place) {ours:.2f} s; "
        f"torch.load(weights_only=True, mmap=False) and load_state_dict {theirs:.2f} s.",
        "",
        *_aims(rounds, nbytes),
        "",
        "Raw stalls in ms, round by round:",
        "",
        *(f"* {name}: {[round(found['stall'] * 1e3, 1) for found in every]}" for name, every in rounds.found.items()),
    ]
    return lines


def _number(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else format(value * scale, form)


def _aims(rounds: Measured, nbytes: int) -> list[str]:
    """Say of each aim whether it is met."""
    stall, sync = rounds.ratio(OURS, MEMORY)[0], 1 / rounds.ratio(OURS, TORCH)[0]
    slowdown, extra = rounds.median(OURS, "slowdown") or 1, (rounds.median(OURS, "extra_bytes") or 0) / nbytes
    return aims(
        "Aims of scaletrain's way",
        (stall <= 1.3, f"stall {stall:.2f}x of the memory copy, at most 1.3x"),
        (sync >= 5, f"stall {sync:.1f}x under that of torch.save without fsync, at least 5x"),
        (slowdown <= 1.1, f"steps {(slowdown - 1) * 100:.0f} % slower while writing, at most 10 %"),
        (extra <= 1.02, f"{extra:.2f} copies of extra memory, at most one (and 2 % for buffers)"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=FULL_SIZE, help="float32 parameters of the model")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where to write: the disk measured")
    parser.add_argument("--way", help="measure this one way here and print it as JSON")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if args.way:
        torch.set_num_threads(1)
        print(json.dumps(measure(args.way, args.folder, args.parameters)))
        return

    args.folder.mkdir(exist_ok=True)
    rounds = measure_all(args.folder.resolve(), args.parameters, args.rounds)
    command = "python -m benchmarks.checkpoint_stall"
    command += f" --parameters {args.parameters}" if args.parameters != FULL_SIZE else ""
    lines = report(rounds, args.parameters, command)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    if not all(found["race_held"] for found in rounds.found[OURS]):
        raise SystemExit("scaletrain's file holds another state than it claims")


if __name__ == "__main__":
    main()
