"""Where a run computes: processes, device, number format, threads, process groups."""

import atexit
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from scaletrain.agreement import SAVING, gather_texts
from scaletrain.errors import FAILED, InputError
from scaletrain.meeting import meet
from scaletrain.sharding import asked_for, shard_on_cpu
from scaletrain.slurm import join_srun

NOTHING = nullcontext()
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True)
class Launch:
    """What the environment says about this process and the others."""

    world_size: int = 1
    local_world_size: int = 1
    by_launcher: bool = False


@dataclass(frozen=True)
class Devices:
    """This process's place in the run and the means to compute there. Every process holds its own."""

    accelerator: Accelerator
    device: torch.device
    rank: int
    world_size: int
    local_world_size: int
    precision: Precision
    threads: int
    control: dist.ProcessGroup | None
    """gloo group for flags and short texts; None with one process. Only the main thread uses it."""
    checkpoint: dist.ProcessGroup | None
    """gloo group for the thread that saves: a group serves one thread only."""
    processes: tuple[str, ...] = ()
    """Of each rank: its process id and host."""
    sharded: bool = False
    """Whether the model is divided over the processes (FSDP2), not copied."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    @property
    def sums_in(self) -> torch.dtype:
        """The widest float the device has, for adding up metrics: float64, but float32 on MPS."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def autocast(self) -> AbstractContextManager[None]:
        """Enter the run's number format; does nothing in fp32."""
        return NOTHING if self.precision in ("fp32", "tf32") else self.accelerator.autocast()

    def sum(self, values: Tensor) -> Tensor:
        """Add ``values`` over all processes. Every rank must reach this line."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gone(self) -> list[int]:
        """Return the ranks on this host that have ended, where that can be seen."""
        processes = [text.partition(" ") for text in self.processes]
        return [r for r, (pid, _, host) in enumerate(processes) if host == platform.node() and not _is_running(pid)]

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Give every process rank 0's buffers: BatchNorm's differ. Every rank must reach this line."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


def set_up(precision: str = "auto", threads: int | None = None) -> Devices:
    """Join the other processes and choose device, precision and threads.

    Raises InputError where the choices cannot work together, and where the launcher started several processes
    that would each train alone.
    """
    join_srun()
    launch = read_launch(os.environ)
    sharded = asked_for(os.environ)
    device_type = available_device()
    check_processes(device_type, launch)
    chosen = choose_precision(precision, device_type, os.environ.get("ACCELERATE_MIXED_PRECISION"), _gpu_has_bf16())
    number = choose_threads(threads, os.environ, cores(), launch) or torch.get_num_threads()
    met = meet(os.environ)
    AcceleratorState._reset_state()  # a second run in the same process may choose another precision
    with _omp_num_threads(number):
        accelerator = Accelerator(
            cpu=device_type == "cpu", mixed_precision=chosen if chosen in ("bf16", "fp16") else "no"
        )
    del met  # its process group has the same store now
    torch.set_num_threads(number)
    if device_type == "cuda":  # fp32 means it; torch's own default computes convolutions in TF32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = chosen != "fp32"
    if accelerator.num_processes != launch.world_size:
        raise InputError(
            f"the launcher started {launch.world_size} processes, but this one sees {accelerator.num_processes}: "
            "each would train alone; launch with torchrun or accelerate launch and one of accelerate_configs/"
        )
    if sharded and device_type == "cpu" and accelerator.num_processes > 1:
        shard_on_cpu()
    atexit.unregister(_close_groups)
    atexit.register(_close_groups)
    control, checkpoint = _own_groups() if accelerator.num_processes > 1 else (None, None)
    return Devices(
        accelerator=accelerator,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        local_world_size=launch.local_world_size,
        precision=chosen,
        threads=torch.get_num_threads(),
        control=control,
        checkpoint=checkpoint,
        processes=tuple(gather_texts(f"{os.getpid()} {platform.node()}", control)),
        sharded=sharded and accelerator.is_fsdp2,
    )


def read_launch(env: Mapping[str, str]) -> Launch:
    """Read how many processes the launcher started: torchrun, Open MPI, or srun without either."""

    def first(*names: str, default: int) -> int:
        return next((int(env[name]) for name in names if env.get(name, "").isdigit()), default)

    world = first("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", default=1)
    local = first("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", default=world)
    return Launch(world, local, "WORLD_SIZE" in env or any(name.startswith("ACCELERATE_") for name in env))


def available_device() -> str:
    """The type of this machine's accelerator: cuda, mps, xpu, ..., or cpu where there is none."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes") or not torch.accelerator.is_available():
        return "cpu"
    device = torch.accelerator.current_accelerator()
    return "cpu" if device is None else device.type


def check_processes(device_type: str, launch: Launch) -> None:
    """Raise InputError where this kind of device cannot serve so many processes."""
    if device_type == "mps" and launch.world_size > 1:
        raise InputError(f"{launch.world_size} processes on an Apple GPU: MPS serves one; launch a single process")


def choose_precision(asked: str, device_type: str, launcher: str | None, gpu_has_bf16: bool) -> Precision:
    """Choose the number format: what was asked for, else what the launcher said, else what the device does well.

    A plain ``accelerate launch`` exports "no", which counts as unsaid.
    """
    if asked == "auto" and launcher in ("bf16", "fp16"):
        asked = launcher
    if asked == "auto":
        asked = ("bf16" if gpu_has_bf16 else "fp16") if device_type == "cuda" else "fp32"
    if asked == "fp16" and device_type in ("cpu", "mps"):
        raise InputError(f"--precision fp16 does not train on {device_type}; use bf16 or fp32")
    if asked == "tf32" and device_type != "cuda":
        raise InputError(f"--precision tf32 is a format of NVIDIA GPUs, not of {device_type}; use bf16 or fp32")
    if asked not in ("fp32", "tf32", "bf16", "fp16"):
        raise InputError(f"--precision {asked}: expected auto, fp32, tf32, bf16 or fp16")
    return asked  # type: ignore[return-value]  # narrowed by the line above


def choose_threads(asked: int | None, env: Mapping[str, str], cores: int, launch: Launch) -> int | None:
    """Choose the CPU threads of this process; None leaves torch's own choice.

    Launchers export OMP_NUM_THREADS=1 for every process, which counts as unsaid.
    """
    said = env.get("OMP_NUM_THREADS")
    if asked is not None:
        return asked
    if said is None or (launch.by_launcher and said == "1"):
        return max(1, cores // launch.local_world_size)
    return None


def copies_without_waiting(device_type: str) -> bool:
    """Whether host-to-device copies may overlap: on CUDA; on MPS they returned garbage (pytorch #139550)."""
    return device_type == "cuda"


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's default generators of the CPU and ``device``; 300 times faster than torch.manual_seed."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)  # mps, xpu


def _is_running(pid: str) -> bool:
    """Whether a process of this host runs; one that has ended and waits for its launcher to notice does not."""
    status = Path("/proc") / pid / "stat"
    try:
        os.kill(int(pid), 0)
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


_groups: list[dist.ProcessGroup] = []
"""The default group that ours were made beside, ``control`` and ``checkpoint``."""


def _own_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Make the groups ``control`` and ``checkpoint``, once: a group's thread stays as long as the process.

    A later run in the same process takes them again, when what an earlier one was saving is written.
    """
    default = dist.group.WORLD
    assert default is not None
    if not _groups or _groups[0] is not default:
        _groups[:] = [default, dist.new_group(backend="gloo"), dist.new_group(backend="gloo")]
    for thread in threading.enumerate():
        if thread.name == SAVING:
            thread.join()
    return _groups[1], _groups[2]


def _close_groups() -> None:
    """Leave the process groups before the interpreter ends: gloo's threads abort about 1 in 100 exits that do not.

    After an error nobody is waited for: a message in flight would hold the process until it times out.
    """
    if dist.is_initialized():
        if getattr(sys, "last_value", None) is not None:
            sys.stdout.flush()
            os._exit(FAILED)
        _groups.clear()
        dist.destroy_process_group()


@contextmanager
def _omp_num_threads(number: int) -> Iterator[None]:
    """Say the number of threads while Accelerate sets up: where nobody has, it warns and chooses its own."""
    said = "OMP_NUM_THREADS" in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", str(number))
    try:
        yield
    finally:
        if not said:
            del os.environ["OMP_NUM_THREADS"]


def _gpu_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def cores() -> int:
    """Return how many CPU cores this process may use."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1
