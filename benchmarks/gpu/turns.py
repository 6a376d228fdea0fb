"""Loops that train side by side and take turns, so that none is built or compiled twice: each waits in a thread."""

import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from benchmarks.loops import Job


class Enough(BaseException):
    """Ends a loop whose turns are over."""


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Turns:
    """A loop in a thread of its own. Each call lets it go on for ``steps`` steps, the first for ``warmup``.

    A call returns its seconds, the device waited for at both ends.
    """

    job: Job
    work: Callable[[Job], None]
    steps: int
    warmup: int
    model: nn.Module = field(default_factory=nn.Identity)
    failed: str = ""
    step_seconds: list[float] = field(default_factory=list)
    """Of each step after the warm-up, by the device's own clock where it has one."""

    def __post_init__(self) -> None:
        self._go, self._done, self._over = threading.Semaphore(0), threading.Semaphore(0), False
        self._marks: list[torch.cuda.Event | float] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._until = self.warmup
        self._seconds = 0.0

    def __call__(self) -> float:
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._done.acquire()
        if self.failed:
            raise RuntimeError(self.failed)
        return self._seconds

    def close(self) -> None:
        """End the loop and let go of its model."""
        self._over = True
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()
        self.model = nn.Identity()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def _run(self) -> None:
        torch.set_num_threads(1)  # a thread has a number of its own
        try:
            self._begin()
            self.work(replace(self.job, note=self._note, built=self._built))
            self.failed = "ended before its time"
        except Enough:
            pass
        except BaseException as error:  # an out of memory is a result too
            self.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._done.release()

    def _begin(self) -> None:
        """Wait for the next turn."""
        self._go.acquire()
        if self._over:
            raise Enough
        wait(self.job.device)
        self._marks = [self._mark()]
        self._began = time.perf_counter()

    def _note(self, step: int) -> None:
        self._marks.append(self._mark())
        if step < self._until:
            return
        wait(self.job.device)
        self._seconds = time.perf_counter() - self._began
        if self._until > self.warmup:
            self.step_seconds += [between(a, b) for a, b in zip(self._marks, self._marks[1:], strict=False)]
        self._until += self.steps
        self._done.release()
        self._begin()

    def _built(self, model: nn.Module) -> None:
        self.model = model

    def _mark(self) -> torch.cuda.Event | float:
        if self.job.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def between(first: torch.cuda.Event | float, second: torch.cuda.Event | float) -> float:
    if isinstance(first, float):
        return second - first
    return first.elapsed_time(second) / 1e3


def let_go() -> None:
    """Give back what ended loops held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Counted:
    """What happened on the way to the device."""

    warned: int = 0
    """Operations that torch knows to wait for the device (``set_sync_debug_mode``)."""
    waited: int = 0
    """Calls of the driver that wait for a stream or an event."""
    launched: int = 0
    """Kernels."""


@contextmanager
def counting() -> Iterator[Counted]:
    """Count what synchronizes and what is launched meanwhile, on any thread; CUDA alone."""
    found = Counted()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with torch.profiler.profile() as profiler:
                yield found
                wait(device_here())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.warned = sum("synchronizing CUDA operation" in str(one.message) for one in caught)
    calls = {event.key: event.count for event in profiler.key_averages()}
    found.waited = calls.get("cudaStreamSynchronize", 0) + calls.get("cudaEventSynchronize", 0)
    found.launched = sum(
        count for key, count in calls.items() if key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
    )
