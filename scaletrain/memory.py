"""Out of memory: told from other errors, and mended by smaller micro-batches, the same on every process.

The global batch stays, and with it the curve: only how it is divided changes.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scaletrain.agreement import gather_texts
from scaletrain.errors import InputError
from scaletrain.folder import short, write_json

if TYPE_CHECKING:
    import torch.distributed as dist

    from scaletrain.run import Run

FILE = "micro_batch_size.json"
"""In the run folder: what did not fit, and what is to be tried at the next start."""
TEXTS = ("out of memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "ALLOC_FAILED")
ADVICE = "--precision bf16, --activation-checkpointing, accelerate_configs/fsdp2.yaml or a smaller model need less"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on an accelerator or on the host, in torch or outside of it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in TEXTS)


def has_limit() -> bool:
    """Whether the memory of this process was limited, as ``ulimit -v`` does."""
    try:
        import resource
    except ImportError:  # not on Windows
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def short_of_memory(work: Callable[[], object], group: dist.ProcessGroup | None) -> list[int]:
    """Do ``work`` and return the ranks on which memory ran out. It must not wait for other ranks.

    Every rank must reach this line.
    """
    failed = ""
    try:
        work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = "short"
    if failed:  # here nothing refers to the tensors of the traceback any more
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [rank for rank, said in enumerate(gather_texts(failed, group)) if said]


def largest(run: Run) -> int:
    """Return how many examples the largest micro-batch of any process has."""
    share = -(-run.cfg.batch_size // run.devices.world_size)
    return -(-share // run.loader.micro_batches)


def halved(run: Run, ranks: list[int]) -> int:
    """Return the next micro-batch size to try. Raises InputError where a single example is too much."""
    size = largest(run)
    who = f"rank {', '.join(map(str, ranks))}"
    if size == 1:
        raise InputError(f"out of memory on {who} with a micro-batch of 1 example; {ADVICE}")
    return size // 2


def remember(run: Run) -> str:
    """Write into the run folder what the next start is to try; return what happened and what will be done.

    Any rank may call it, alone: the others may wait for one that has no memory left.
    """
    size = largest(run)
    where = f"rank {run.devices.rank} ran out of memory in {run.pulse.phase} of step {run.state.step + 1}"
    sizes = f"with a micro-batch of {size} of the {run.cfg.batch_size} examples"
    if size == 1:
        return f"{where}, {sizes}; {ADVICE}"
    write_json(run.folder / FILE, {"failed": size, "next": size // 2})
    return (
        f"{where}, {sizes}; start the same command with --out {short(run.folder)} again: it goes on with a micro-batch "
        f"of {size // 2} and the same global batch; {ADVICE}"
    )


def remembered(folder: Path, size: int, group: dist.ProcessGroup | None) -> int | None:
    """Return the micro-batch size that an earlier start has left to try, where one of ``size`` did not fit.

    Every rank must reach this line.
    """
    try:
        said = json.loads((folder / FILE).read_text())
        found = int(said["next"]) if size >= int(said["failed"]) and int(said["next"]) >= 1 else 0
    except (OSError, ValueError, KeyError, TypeError):
        found = 0
    return int(gather_texts(str(found), group)[0]) or None
