"""G4: how long a checkpoint of a billion parameters and AdamW's moments holds up a training on the device.

python -m benchmarks.gpu.saving --way NAME --folder FOLDER --parameters N measures one way and prints it as JSON.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.children import PeakMemory, in_child
from benchmarks.gpu.speed import Length
from benchmarks.gpu.turns import device_here, wait
from benchmarks.pairs import aims
from benchmarks.ways_to_save import (
    DistributedCheckpoint,
    MemoryCopy,
    Scaletrain,
    State,
    TorchSave,
    TorchSaveSynced,
    Way,
)

BILLION = 1_000_000_000
BYTES = 12
"""Of a parameter: float32, and two moments."""
SECONDS_BEFORE = 1.0


class PinnedCopy(MemoryCopy):
    """The floor: copy everything into pinned host memory that is there already, and wait for it."""

    def __init__(self, state: State, folder: Path) -> None:
        Way.__init__(self, state, folder)
        pin = device_here().type == "cuda"
        self.copies = {n: torch.empty(t.shape, device="cpu", pin_memory=pin) for n, t in state.tensors().items()}

    def save(self, step: int) -> None:
        for copy, tensor in zip(self.copies.values(), self.state.tensors().values(), strict=True):
            copy.copy_(tensor, non_blocking=tensor.is_cuda)
        wait(device_here())

    def busy(self) -> bool:
        return False


class PinnedCheckpoint(DistributedCheckpoint):
    pinned = torch.cuda.is_available()


class SaveState(Way):
    """``accelerator.save_state``."""

    def __init__(self, state: State, folder: Path) -> None:
        from accelerate import Accelerator

        super().__init__(state, folder)
        self.accelerator = Accelerator(cpu=device_here().type == "cpu")
        self.accelerator.prepare(state.module, state.optimizer)

    def save(self, step: int) -> None:
        self.accelerator.save_state(str(self.folder / str(step)))


FLOOR, OURS, TORCH = "copy to pinned memory", "scaletrain", "torch.save"
WAYS: dict[str, type[Way]] = {
    FLOOR: PinnedCopy,
    OURS: Scaletrain,
    TORCH: TorchSave,
    "torch.save + fsync": TorchSaveSynced,
    "accelerator.save_state": SaveState,
    "DCP async_save (thread, pinned)": PinnedCheckpoint,
}


def training(toy: bool) -> Callable[[], float]:
    """Return a training step of some milliseconds, which returns the seconds that it and the device took."""
    device, width = device_here(), 64 if toy else 4096
    with device:
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        x, y = torch.randn(2048 if not toy else 8, width), torch.randn(2048 if not toy else 8, width)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        wait(device)
        return time.perf_counter() - started

    return step


def measure(name: str, folder: Path, parameters: int) -> dict[str, Any]:
    """Save twice beside a training, cold and warm; scaletrain once more while the weights change."""
    with device_here():
        state = State(parameters)
    step = training(toy=parameters < BILLION // 100)
    for _ in range(20):
        step()
    memory = PeakMemory()
    way = WAYS[name](state, folder)
    cold = saved(way, 1, step)
    state.fill(2)
    found = saved(way, 2, step) | {"cold": cold["stall"], "host_bytes": memory.grown_bytes(), "nbytes": state.nbytes}
    if isinstance(way, Scaletrain):
        state.fill(3)
        way.save(3)
        state.fill(4)
        way.wait()
        found["race_held"] = state.is_of(3, way.read(3))
    return found


def saved(way: Way, number: int, step: Callable[[], float]) -> dict[str, float]:
    """Save once. The stall ends when the step after it has been done, whose own time is taken off."""
    deadline, before, during = time.perf_counter() + SECONDS_BEFORE, [step()], []
    while time.perf_counter() < deadline:
        before.append(step())
    own = statistics.median(before)
    started = time.perf_counter()
    way.save(number)
    called = time.perf_counter() - started
    step()
    stall = time.perf_counter() - started - own
    while way.busy():
        during.append(step())
    way.wait()
    done = time.perf_counter() - started
    found = {"called": called, "stall": max(stall, 0.0), "step": own, "done": done}
    if way.durable_at is not None:
        found["durable"] = way.durable_at - started
    if during:
        found["slowdown"] = statistics.mean(during) / statistics.mean(before)
    return found


def fitting(folder: Path, toy: bool) -> int:
    """Return how many parameters this machine has room for: three checkpoints on the disk, two copies in memory."""
    if toy:
        return 30_000
    memory = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    room = (shutil.disk_usage(folder).free / 3.2, memory / 2.5, torch.cuda.mem_get_info()[0] / 1.5)
    return min(BILLION, int(min(room) / BYTES))


def stall(toy: bool, length: Length) -> list[str]:
    folder = Path("runs").resolve()
    folder.mkdir(exist_ok=True)
    parameters = fitting(folder, toy)
    found: dict[str, dict[str, Any]] = {}
    for name in WAYS:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            arguments = ["--way", name, "--folder", own, "--parameters", parameters]
            found[name] = in_child("benchmarks.gpu.saving", *arguments, timeout_seconds=95)
    lines = ["# G4: what a checkpoint costs a training on the device", ""]
    less = "" if toy or parameters == BILLION else "; fewer than a billion: disk or memory has no room for more"
    lines += [
        f"{parameters:,} float32 parameters and AdamW's moments, {parameters * BYTES / 1e9:.2f} GB{less}. Each way "
        "once, in a fresh process.",
        "",
        "* Stall: from the call to the end of the next step, a step's own time taken off; second save of the process.",
        "* Slowdown: mean step while it is written / before. Done: nothing is left to do.",
        "* Race: every tensor is overwritten as soon as the call returns; held: what is read back is the state before.",
        "",
        "| way | stall s | first save s | call alone s | slowdown | durable s | done s | resident GB | race |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(name, one) for name, one in found.items()),
        "",
    ]
    ours, theirs, floor = (found[name].get("stall") for name in (OURS, TORCH, FLOOR))
    if ours is None or theirs is None or floor is None:
        return [*lines, *aims("Aims", (False, "scaletrain, torch.save or the copy did not end well")), ""]
    slower = found[OURS].get("slowdown", 1.0)
    return [
        *lines,
        *aims(
            "Aims of scaletrain's way",
            (ours <= 1.3 * floor, f"stall {ours:.3f} s, {ours / max(floor, 1e-9):.2f}x of the copy, at most 1.3x"),
            (30 * ours <= theirs, f"stall {theirs / max(ours, 1e-9):.0f}x under that of torch.save, at least 30x"),
            (slower <= 1.05, f"steps {(slower - 1) * 100:.0f} % slower while writing, at most 5 %"),
            (bool(found[OURS].get("race_held")), "the race is held"),
        ),
        "",
    ]


def row(name: str, found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"| {name} | failed: {found['failed']} |"
    cells = [f"{found[key]:.3f}" if key in found else "" for key in ("stall", "cold", "called", "slowdown")]
    cells += [f"{found[key]:.1f}" if key in found else "" for key in ("durable", "done")]
    race = {True: "held", False: "NOT held", None: ""}[found.get("race_held")]
    return f"| {name} | {' | '.join(cells)} | {found['host_bytes'] / 1e9:.1f} | {race} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", required=True, choices=list(WAYS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parameters", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(args.way, args.folder, args.parameters)))


if __name__ == "__main__":
    main()
