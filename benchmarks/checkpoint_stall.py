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
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.children import PeakMemory, in_child
from benchmarks.pairs import Rounds, conditions, run_rounds
from scaletrain.checkpoint.export import named_tensors
from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.format import dump, step_folder
from scaletrain.checkpoint.load import load, load_new
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.tensors import Parts
from scaletrain.checkpoint.verify import open_checkpoint, verify
from scaletrain.optimizers import hyperparameters, saved_state

MATRICES = 96
SECONDS_BEFORE = 1.5
"""How long the small training is timed before each save."""
MEMORY, AGAIN, OURS, TORCH, SYNCED = (
    "memory copy",
    "memory copy again",
    "scaletrain",
    "torch.save",
    "torch.save + fsync",
)
SAFETENSORS, DCP, DISK = "safetensors + fsync", "DCP async_save (thread)", "disk alone"
FULL_SIZE = 100_000_000


class State:
    """The weights and AdamW's moments of a model of equal matrices, filled so that each step's bits are known."""

    def __init__(self, parameters: int) -> None:
        side = max(2, round((parameters / MATRICES) ** 0.5))
        self.module = nn.ParameterList(nn.Parameter(torch.empty(side, side)) for _ in range(MATRICES))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), fused=True)
        for p in self.module:
            moments = {"exp_avg": torch.empty_like(p.data), "exp_avg_sq": torch.empty_like(p.data)}
            self.optimizer.state[p] = {"step": torch.zeros(()), **moments}
        self._ramp = torch.linspace(0, 1, side * side).view(side, side)
        self.nbytes = sum(t.nbytes for t in self.tensors().values())
        self.fill(1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the big tensors by the names that scaletrain gives them."""
        found = {}
        for name, p in self.module.named_parameters():
            moments = self.optimizer.state[p]
            found |= {
                name: p.data,
                f"{name}|exp_avg": moments["exp_avg"],
                f"{name}|exp_avg_sq": moments["exp_avg_sq"],
            }
        return found

    def fill(self, step: int) -> None:
        """Overwrite every tensor with what it holds after ``step``."""
        for i, tensor in enumerate(self.tensors().values()):
            torch.add(self._ramp, step + i, out=tensor)

    def is_of(self, step: int, found: Mapping[str, Tensor]) -> bool:
        """Whether ``found`` is exactly the state after ``step``."""
        expected = torch.empty_like(self._ramp)
        return found.keys() == self.tensors().keys() and all(
            torch.equal(torch.add(self._ramp, step + i, out=expected), found[name])
            for i, name in enumerate(self.tensors())
        )

    def parts(self) -> tuple[Parts, bytes]:
        """Return what a run gives to its saver: tensors by part, and state.json."""
        tensors, kept = saved_state(self.module, self.optimizer, hyperparameters(self.optimizer))
        return {"model": named_tensors(self.module), "optimizer": tensors}, dump({"optimizer": kept})

    def dicts(self) -> dict[str, Any]:
        """Return what one usually gives to ``torch.save``."""
        return {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def named(self, dicts: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of ``dicts`` under the names of ``tensors``."""
        found = {}
        for i, (name, weight) in enumerate(dicts["model"].items()):
            moments = dicts["optimizer"]["state"][i]
            found |= {
                name: weight,
                f"{name}|exp_avg": moments["exp_avg"],
                f"{name}|exp_avg_sq": moments["exp_avg_sq"],
            }
        return found


class Way:
    """A way of saving, complete when ``save`` returns unless it overrides ``busy``."""

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.folder = state, folder
        self.durable_at: float | None = None
        """When the last save was on the disk, by ``time.perf_counter``; None where it never says."""

    def save(self, step: int) -> None:
        raise NotImplementedError

    def busy(self) -> bool:
        """Whether the last save is still being written."""
        return False

    def wait(self) -> None:
        """Wait for the last save."""

    def read(self, step: int) -> dict[str, Tensor]:
        """Return what was saved for ``step``, by the names of ``State.tensors``."""
        raise NotImplementedError


class MemoryCopy(Way):
    """The floor: copy everything into memory that is there already."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self.copies = {name: torch.zeros_like(tensor) for name, tensor in state.tensors().items()}

    def save(self, step: int) -> None:
        for copy, tensor in zip(self.copies.values(), self.state.tensors().values(), strict=True):
            copy.copy_(tensor)
        self._until = time.perf_counter() + SECONDS_BEFORE

    def busy(self) -> bool:  # nothing is: the steps after it show the noise of the slowdown
        return time.perf_counter() < self._until

    def read(self, step: int) -> dict[str, Tensor]:
        return self.copies


class Telling(Files):
    """Notes when a checkpoint is committed: its folder renamed, and the folder above synced."""

    def __init__(self) -> None:
        self.committed_at: float | None = None
        self._renamed = False

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._renamed = target.name.startswith("step-")

    def fsync_folder(self, path: Path) -> None:
        super().fsync_folder(path)
        if self._renamed:
            self.committed_at, self._renamed = time.perf_counter(), False


class Scaletrain(Way):
    """scaletrain's own."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self.files = Telling()
        self.saver = Saver(folder / "checkpoints", files=self.files)

    def save(self, step: int) -> None:
        parts, facts = self.state.parts()
        self.saver.save(step, parts, facts)

    def busy(self) -> bool:
        return any(thread.name == "saving" for thread in threading.enumerate())

    def wait(self) -> None:
        self.saver.wait()
        self.durable_at = self.files.committed_at

    def read(self, step: int) -> dict[str, Tensor]:
        checkpoint = open_checkpoint(self.folder / "checkpoints" / step_folder(step))
        verify(checkpoint)
        tensors = load_new(checkpoint, "model") | load_new(checkpoint, "optimizer")
        return {name: tensors[name] for name in self.state.tensors()}

    def load(self, step: int) -> None:
        """Open, verify and read into the tensors that are there."""
        checkpoint = open_checkpoint(self.folder / "checkpoints" / step_folder(step))
        verify(checkpoint)
        for part, tensors in self.state.parts()[0].items():
            load(checkpoint, part, tensors)


class TorchSave(Way):
    """``torch.save``; without fsync it returns before the disk has the bytes."""

    synced = False

    def save(self, step: int) -> None:
        with (self.folder / f"{step}.pt").open("wb") as file:
            torch.save(self.state.dicts(), file)
            if self.synced:
                file.flush()
                os.fsync(file.fileno())
        self.durable_at = time.perf_counter() if self.synced else None

    def read(self, step: int) -> dict[str, Tensor]:
        return self.state.named(torch.load(self.folder / f"{step}.pt", weights_only=True))

    def load(self, step: int) -> None:
        """Read, without checking the bytes, and put into the tensors that are there."""
        dicts = torch.load(self.folder / f"{step}.pt", weights_only=True, mmap=False)
        self.state.module.load_state_dict(dicts["model"])
        self.state.optimizer.load_state_dict(dicts["optimizer"])


class TorchSaveSynced(TorchSave):
    synced = True


class Safetensors(Way):
    """``safetensors.torch.save_file``, then fsync."""

    def save(self, step: int) -> None:
        from safetensors.torch import save_file

        path = self.folder / f"{step}.safetensors"
        save_file(self.state.tensors(), path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        self.durable_at = time.perf_counter()

    def read(self, step: int) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / f"{step}.safetensors")


class DistributedCheckpoint(Way):
    """``torch.distributed.checkpoint.async_save`` in a thread, with a stager that is kept; it syncs by default."""

    def __init__(self, state: State, folder: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(state, folder)
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is one process
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        checkpoint_id = str(self.folder / str(step))
        self.future = dcp.async_save(
            self.state.dicts(), checkpoint_id=checkpoint_id, async_stager=self.stager, no_dist=True
        )
        self.future.add_done_callback(self._done)

    def _done(self, future: Any) -> None:
        self.durable_at = time.perf_counter()

    def busy(self) -> bool:
        return not self.future.done()

    def wait(self) -> None:
        self.future.result()

    def read(self, step: int) -> dict[str, Tensor]:
        import torch.distributed.checkpoint as dcp

        state = State(self.state.module[0].numel() * MATRICES)
        dicts = state.dicts()
        dcp.load(dicts, checkpoint_id=str(self.folder / str(step)), no_dist=True)
        return state.named(dicts)


class DiskAlone(Way):
    """The same bytes in order into one file, then fsync: what the disk takes."""

    def save(self, step: int) -> None:
        block = memoryview(torch.rand(1 << 21).numpy()).cast("B")  # 8 MiB
        with (self.folder / f"{step}.bytes").open("wb", buffering=0) as file:
            for start in range(0, self.state.nbytes, len(block)):
                file.write(block[: self.state.nbytes - start])
            os.fsync(file.fileno())
        self.durable_at = time.perf_counter()


WAYS: dict[str, type[Way]] = {
    MEMORY: MemoryCopy,
    AGAIN: MemoryCopy,
    OURS: Scaletrain,
    TORCH: TorchSave,
    SYNCED: TorchSaveSynced,
    SAFETENSORS: Safetensors,
    DCP: DistributedCheckpoint,
    DISK: DiskAlone,
}


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

    Seconds but for ``extra_bytes`` (most memory above what was there), ``slowdown`` (median step while writing /
    before) and ``race_held``.
    """
    state, step = State(parameters), small_training()
    for _ in range(20):
        step()
    os.sync()  # what others left to write
    memory = PeakMemory()
    way = WAYS[name](state, folder)
    cold = _save(way, 1, step, seconds_before)
    state.fill(2)
    found = _save(way, 2, step, seconds_before)
    found |= {"cold_stall": cold["stall"], "extra_bytes": memory.grown_bytes(), "nbytes": state.nbytes}
    if hasattr(way, "load"):
        found["load"] = min(_seconds(partial(way.load, 2)) for _ in range(2))
        if not state.is_of(2, state.tensors()):
            raise SystemExit(f"{name} loaded another state than it saved")
    if name != DISK:
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
    stall = time.perf_counter() - started
    while way.busy():
        during.append(step())
    way.wait()
    found = {"stall": stall, "cpu": time.process_time() - cpu, "before": statistics.median(before)}
    if during:
        found["slowdown"] = statistics.median(during) / found["before"]
        found["lost"] = stall + sum(during) - len(during) * found["before"]
    if way.durable_at is not None:
        found["durable"] = way.durable_at - started
    return found


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Stall(float):
    """Seconds of stall, as ``run_rounds`` wants them, with all that the child measured."""

    found: dict[str, Any]


def arm(name: str, folder: Path, parameters: int) -> Stall:
    """Measure one way in a fresh process."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        found = in_child("benchmarks.checkpoint_stall", "--way", name, "--folder", own, "--parameters", parameters)
    if "failed" in found:
        raise SystemExit(f"{name}: {found['failed']}")
    stall = Stall(found["stall"])
    stall.found = found
    return stall


def median(rounds: Rounds, name: str, key: str) -> float | None:
    """Return the median over the rounds of what the children of ``name`` measured; None where they did not."""
    values = [stall.found[key] for stall in rounds.seconds[name] if key in stall.found]
    return statistics.median(values) if values else None


def report(rounds: Rounds, parameters: int, command: str) -> list[str]:
    """Write the tables."""
    nbytes = int(median(rounds, MEMORY, "nbytes") or 0)
    small = (median(rounds, MEMORY, "before") or 0) * 1e3
    lines = ["# What saving costs a training that goes on", ""]
    lines += conditions(command, ("torch", "safetensors"))
    lines += [
        f"* {parameters:,} parameters with AdamW, {nbytes / 1e9:.2f} GB; beside them an MLP on one thread, "
        f"{small:.1f} ms a step",
        f"* {len(rounds.load)} rounds of one fresh process per way, in random order, {rounds.dropped} dropped for "
        f"steal; load {rounds.load[0]} to {rounds.load[-1]}; medians",
        "* stall: time of the call on the training thread, second save of the process (the first takes its memory)",
        "* slowdown: median step while writing / before; of a memory copy: the steps after it, the noise",
        "* lost: stall + what the steps took longer while it was written, to the end of removing old checkpoints",
        "* durable: committed, or fsync returned; fsync in all ways but the plain torch.save; one disk, ext4",
        "* memory: most resident above what was there, in bytes and in copies of the state",
        "* race: every tensor is overwritten as soon as the call returns; held: what is read back is the state before",
        "",
        "| way | stall ms | / memory copy (95 % interval) | first save ms | slowdown | lost ms | CPU s | durable s "
        "| / disk alone | memory MB | copies | race |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in rounds.seconds:
        ratio, low, high = rounds.ratio(name, MEMORY)
        extra = median(rounds, name, "extra_bytes") or 0
        races = [stall.found["race_held"] for stall in rounds.seconds[name] if "race_held" in stall.found]
        durable = _of_disk(rounds, name)
        cells = [
            name,
            _number(median(rounds, name, "stall"), 1e3, ".0f"),
            f"{ratio:.2f} ({low:.2f}-{high:.2f})",
            _number(median(rounds, name, "cold_stall"), 1e3, ".0f"),
            _number(median(rounds, name, "slowdown"), 1, ".3f"),
            _number(median(rounds, name, "lost"), 1e3, ".0f"),
            _number(median(rounds, name, "cpu"), 1, ".2f"),
            _number(median(rounds, name, "durable"), 1, ".2f"),
            _number(durable, 1, ".2f"),
            f"{extra / 1e6:.0f}",
            f"{extra / nbytes:.2f}",
            f"{'held' if all(races) else 'NOT held'}, {sum(races)} of {len(races)}" if races else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    ours, theirs = median(rounds, OURS, "load"), median(rounds, TORCH, "load")
    lines += [
        "",
        f"Loading, page cache warm: scaletrain (open, verify every byte, read into place) {ours:.2f} s; "
        f"torch.load(weights_only=True, mmap=False) and load_state_dict {theirs:.2f} s.",
        "",
        *_aims(rounds, nbytes),
        "",
        "Raw stalls in ms, round by round:",
        "",
        *(f"* {name}: {[round(s * 1e3, 1) for s in seconds]}" for name, seconds in rounds.seconds.items()),
    ]
    return lines


def _of_disk(rounds: Rounds, name: str) -> float | None:
    """Return the median over the rounds of the time until durable / that of the disk alone."""
    pairs = zip(rounds.seconds[name], rounds.seconds[DISK], strict=True)
    ratios = [a.found["durable"] / b.found["durable"] for a, b in pairs if "durable" in a.found]
    return statistics.median(ratios) if ratios else None


def _number(value: float | None, scale: float, form: str) -> str:
    return "" if value is None else format(value * scale, form)


def _aims(rounds: Rounds, nbytes: int) -> list[str]:
    """Say of each aim whether it is met."""
    stall, sync = rounds.ratio(OURS, MEMORY)[0], 1 / rounds.ratio(OURS, TORCH)[0]
    slowdown, extra = median(rounds, OURS, "slowdown") or 1, (median(rounds, OURS, "extra_bytes") or 0) / nbytes
    aims = (
        (stall <= 1.3, f"stall {stall:.2f}x of the memory copy, at most 1.3x"),
        (sync >= 5, f"stall {sync:.1f}x under that of torch.save without fsync, at least 5x"),
        (slowdown <= 1.1, f"steps {(slowdown - 1) * 100:.0f} % slower while writing, at most 10 %"),
        (extra <= 1.02, f"{extra:.2f} copies of extra memory, at most one (and 2 % for buffers)"),
    )
    return ["Aims of scaletrain's way:", "", *(f"* {'met' if met else 'MISSED'}: {said}" for met, said in aims)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=FULL_SIZE, help="float32 parameters of the model")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write: the disk that is measured")
    parser.add_argument("--way", help="measure this one way here and print it as JSON")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if args.way:
        torch.set_num_threads(1)
        print(json.dumps(measure(args.way, args.folder, args.parameters)))
        return

    arms = {name: partial(arm, name, args.folder.resolve(), args.parameters) for name in WAYS}
    rounds = run_rounds(arms, args.rounds, warmup=0)
    lost = [name for name in WAYS for s in rounds.seconds[name] if not s.found.get("race_held", True)]
    command = "python -m benchmarks.checkpoint_stall"
    command += f" --parameters {args.parameters}" if args.parameters != FULL_SIZE else ""
    lines = report(rounds, args.parameters, command)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    if OURS in lost:
        raise SystemExit("scaletrain's file holds another state than it claims")


if __name__ == "__main__":
    main()
