"""A model's state and the ways to save it that ``benchmarks.checkpoint_stall`` compares."""

import os
import subprocess
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaletrain.checkpoint.export import named_tensors
from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.format import step_folder
from scaletrain.checkpoint.load import load, load_new
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.strict import dump
from scaletrain.checkpoint.tensors import Parts
from scaletrain.checkpoint.verify import open_checkpoint, verify
from scaletrain.optimizer_state import hyperparameters, saved_state

MATRICES = 96
IDLE_SECONDS = 1.5
"""How long steps are timed after a memory copy, when nothing is written: the noise of the slowdown."""
MEMORY, AGAIN, DISK, BESIDE = "memory copy", "memory copy again", "disk alone", "disk alone, in a process beside"
OURS, DCP = "scaletrain", "DCP async_save (thread)"
TORCH, SYNCED, SAFETENSORS = "torch.save", "torch.save + fsync", "safetensors + fsync"


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
            torch.equal(torch.add(self._ramp, step + i, out=expected), found[name].to(expected.device))
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


class Way(ABC):
    """A way of saving, complete when ``save`` returns unless it overrides ``busy``."""

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.folder = state, folder
        self.durable_at: float | None = None
        """When the last save was on the disk, by ``time.perf_counter``; None where it never says."""

    @abstractmethod
    def save(self, step: int) -> None:
        """Save the state after ``step``, or begin to."""

    def busy(self) -> bool:
        """Whether the last save is still being written."""
        return False

    def wait(self) -> None:
        """Wait for the last save."""
        return


class Readable(Way):
    """A way whose files hold the state, and not just as many bytes."""

    @abstractmethod
    def read(self, step: int) -> dict[str, Tensor]:
        """Return what was saved for ``step``, by the names of ``State.tensors``."""


class MemoryCopy(Readable):
    """The floor: copy everything into memory that is there already."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self.copies = {name: torch.zeros_like(tensor) for name, tensor in state.tensors().items()}

    def save(self, step: int) -> None:
        for copy, tensor in zip(self.copies.values(), self.state.tensors().values(), strict=True):
            copy.copy_(tensor)
        self._until = time.perf_counter() + IDLE_SECONDS

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


class Scaletrain(Readable):
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


class TorchSave(Readable):
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


class Safetensors(Readable):
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


class DistributedCheckpoint(Readable):
    """``torch.distributed.checkpoint.async_save`` in a thread, with a stager that is kept; it syncs by default."""

    pinned = False
    """Copy into host memory that is pinned, without waiting for each tensor."""

    def __init__(self, state: State, folder: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(state, folder)
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is one process
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=self.pinned,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=self.pinned,
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
        block = memoryview(torch.rand(1 << 18).numpy()).cast("B")  # 1 MiB
        with (self.folder / f"{step}.bytes").open("wb", buffering=0) as file:
            for start in range(0, self.state.nbytes, len(block)):
                file.write(block[: self.state.nbytes - start])
            os.fsync(file.fileno())
        self.durable_at = time.perf_counter()


class DiskBeside(Way):
    """The same by another process at low priority: what any writing beside it costs a training on this machine."""

    def save(self, step: int) -> None:
        program = (
            "import os, sys\nos.nice(10)\npath, size = sys.argv[1], int(sys.argv[2])\nblock = os.urandom(1 << 20)\n"
            "with open(path, 'wb', buffering=0) as file:\n"
            "    for start in range(0, size, len(block)):\n        file.write(block[: size - start])\n"
            "    os.fsync(file.fileno())\n"
        )
        arguments = [sys.executable, "-S", "-c", program, self.folder / f"{step}.bytes", str(self.state.nbytes)]
        self.process = subprocess.Popen(arguments)

    def busy(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> None:
        assert self.process.wait() == 0
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
    BESIDE: DiskBeside,
}
