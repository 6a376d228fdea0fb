"""What it costs to go on at 0.9 of an epoch of n examples, from a thousand to a billion.

    python -m benchmarks.resume_position [--largest 9] [--out FILE]

There are no examples: a batch is the indices it would read, so what is timed is finding the position. Each figure
comes from a process of its own, which has resumed once at n = 1,000 before (imports, first calls). scaletrain's
Shuffled, Share and Loader are made anew and asked for the first batch. The others, each with a shuffling sampler:
Accelerate's ``skip_first_batches`` over a prepared DataLoader (what the HF Trainer resumes with), and torch's
RandomSampler and BatchSampler with the batches before dropped. They run under a cap on memory and time.

Then the proof: the next 1,000 batches after resuming are those of a stream that was never interrupted, in epochs 0
and 3, on one process and on two.
"""

import argparse
import hashlib
import json
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from benchmarks.children import GIB, PeakMemory, in_child
from benchmarks.pairs import conditions
from scaletrain.loader import Loader
from scaletrain.order import Shuffled
from scaletrain.readers import Read, Request
from scaletrain.share import Share

BATCH_SIZE, SEED = 64, 0
WHOLE = 10**6
"""Up to so many examples the stream that was never interrupted is read from its beginning."""
BEFORE = 10_000
"""Of larger ones it is read from so many batches before."""
COMPARED = 1_000
TIMEOUT_SECONDS, CAP_GIB = 60.0, 8
LIMIT_SECONDS, LIMIT_BYTES = 5e-3, 1 << 20


class Virtual(Dataset[int]):
    """n examples, each its own index."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


class Indices:
    """A reader that reads nothing: a batch is the indices."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, request: Request) -> Read:
        return Read(torch.from_numpy(request[1]))


def scaletrain(
    n: int, epoch: int = 0, *, rank: int = 0, world_size: int = 1, first: int | None = None
) -> Iterator[Any]:
    """Batches of fresh objects from position ``first`` on, by default 0.9 of ``epoch``, to a step's boundary."""
    share = Share(Shuffled(n, SEED), BATCH_SIZE, rank, world_size)
    reader: Any = Indices(n)
    loader = Loader(reader, share, 1, workers=0, device=torch.device("cpu"))
    return (step[0].batch for step in loader.steps(position(n, epoch) if first is None else first))


def position(n: int, epoch: int) -> int:
    """Return 0.9 of ``epoch`` in the endless stream, a whole number of steps from its start."""
    return (epoch * n + 9 * n // 10) // BATCH_SIZE * BATCH_SIZE


def accelerate(n: int, *, skip: bool = True) -> Iterator[Any]:
    """Accelerate's way, which is the HF Trainer's: prepare the DataLoader, then skip_first_batches."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    torch.manual_seed(SEED)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    loader = accelerator.prepare(DataLoader(Virtual(n), batch_size=BATCH_SIZE, shuffle=True))
    return iter(accelerator.skip_first_batches(loader, skipped(n)) if skip else loader)


def random_sampler(n: int, *, skip: bool = True) -> Iterator[Any]:
    """Torch's shuffling, the batches of indices before dropped without reading their examples."""
    sampler = RandomSampler(Virtual(n), generator=torch.Generator().manual_seed(SEED))
    batches = iter(BatchSampler(sampler, BATCH_SIZE, drop_last=False))
    return map(torch.tensor, islice(batches, skipped(n) if skip else 0, None))


def skipped(n: int) -> int:
    """Return the number of batches before 0.9 of the epoch."""
    return position(n, 0) // BATCH_SIZE


WAYS: dict[str, Callable[[int], Iterator[Any]]] = {
    "scaletrain": scaletrain,
    "accelerate": accelerate,
    "torch": random_sampler,
}
PEERS = {"accelerate": accelerate, "torch": random_sampler}


def resume(way: str, n: int) -> dict[str, Any]:
    """Return seconds to the first batch, the memory it took, and for a peer whether it goes on the same."""
    next(WAYS[way](1000))
    memory = PeakMemory()
    started = time.perf_counter()
    batches = WAYS[way](n)
    next(batches)
    found: dict[str, Any] = {"seconds": time.perf_counter() - started, "bytes": memory.grown_bytes()}
    if way == "scaletrain":
        found["allocated"] = allocated(n)
    if way in PEERS and n <= WHOLE:
        uninterrupted = islice(PEERS[way](n, skip=False), skipped(n), None)
        found["same"] = digest(islice(uninterrupted, 100)) == digest(islice(PEERS[way](n), 100))
    return found


def allocated(n: int) -> int:
    """Return the most bytes that scaletrain's objects and their first batch hold at a time, as tracemalloc counts."""
    tracemalloc.start()
    next(scaletrain(n))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def digest(batches: Iterable[Tensor]) -> str:
    """Hash batches of indices, each with its length."""
    found = hashlib.sha256()
    for batch in batches:
        found.update(len(batch).to_bytes(8, "big") + batch.numpy().tobytes())
    return found.hexdigest()


def goes_on_the_same(n: int, epoch: int, world_size: int) -> bool:
    """Whether the next batches of fresh objects are the uninterrupted stream's, on each rank and put together."""
    at = position(n, epoch)
    first = 0 if (epoch + 1) * n <= 4 * WHOLE else max(0, at - BEFORE * BATCH_SIZE)
    alone = list(islice(scaletrain(n, first=first), (at - first) // BATCH_SIZE, (at - first) // BATCH_SIZE + COMPARED))
    together = []
    for rank in range(world_size):
        stream = scaletrain(n, rank=rank, world_size=world_size, first=first)
        uninterrupted = list(islice(stream, (at - first) // BATCH_SIZE, (at - first) // BATCH_SIZE + COMPARED))
        resumed = list(islice(scaletrain(n, epoch, rank=rank, world_size=world_size), COMPARED))
        if digest(uninterrupted) != digest(resumed):
            return False
        together.append(resumed)
    return digest(alone) == digest(torch.cat(parts) for parts in zip(*together, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=9, help="largest n, as a power of ten")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, help="seconds that each may take")
    parser.add_argument("--cap", type=int, default=CAP_GIB, help="GiB of address space that each may use")
    parser.add_argument("--way", choices=WAYS, help="resume once in this way, with --n, and print it as JSON")
    parser.add_argument("--n", type=int, help="number of examples for --way")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if args.way:
        torch.set_num_threads(1)
        print(json.dumps(resume(args.way, args.n)))
        return

    lines = ["# What it costs to go on at 0.9 of an epoch", ""]
    lines += conditions("python -m benchmarks.resume_position", ("torch", "accelerate", "numpy"))
    lines += [
        f"* batches of {BATCH_SIZE}; time to the first batch's indices; growth of the peak of resident memory over",
        "  what a resume at n = 1,000 left behind; for scaletrain also the most that it held at a time (tracemalloc)",
        f"* each in a process of its own, at most {args.cap} GiB of address space and {args.timeout:.0f} s (all of it)",
        "* same: the next 100 batches are those of the uninterrupted epoch (compared up to a million examples)",
        "",
        "| examples | scaletrain | accelerate skip_first_batches | torch RandomSampler, skipped |",
        "|---|---|---|---|",
    ]
    flat = True
    for power in range(3, args.largest + 1):
        cells = []
        for way in WAYS:
            found = in_child(
                "benchmarks.resume_position",
                *("--way", way, "--n", 10**power),
                timeout_seconds=args.timeout,
                cap_bytes=args.cap * GIB,
            )
            cells.append(_cell(found))
            if way == "scaletrain":
                flat &= found["seconds"] <= LIMIT_SECONDS and max(found["bytes"], found["allocated"]) <= LIMIT_BYTES
        lines.append(f"| 1e{power} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    lines += ["", f"scaletrain's aim, at most 5 ms and 1 MiB whatever n: {'met' if flat else 'MISSED'}.", ""]
    lines += [
        f"The next {COMPARED:,} batches after resuming against the stream that was never interrupted, read from its",
        f"beginning up to {4 * WHOLE:,} positions, else from {BEFORE:,} batches before; and two ranks' parts put",
        "together against one process's batches:",
        "",
        "| examples | epoch 0, 1 process | epoch 0, 2 | epoch 3, 1 | epoch 3, 2 |",
        "|---|---|---|---|---|",
    ]
    wrong = []
    for power in range(3, args.largest + 1):
        cases = [(10**power, epoch, world_size) for epoch in (0, 3) for world_size in (1, 2)]
        same = [goes_on_the_same(*case) for case in cases]
        wrong += [case for case, held in zip(cases, same, strict=True) if not held]
        lines.append(f"| 1e{power} | {' | '.join('same' if held else 'DIFFERENT' for held in same)} |")
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    if wrong:
        raise SystemExit(f"does not go on the same: (n, epoch, processes) in {wrong}")


def _cell(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    seconds = found["seconds"]
    shown = f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.1f} s"
    held = f" (held {found['allocated'] / 1e6:.2f})" if "allocated" in found else ""
    same = {True: ", same", False: ", NOT same", None: ""}[found.get("same")]
    return f"{shown}, {found['bytes'] / 1e6:.2f} MB{held}{same}"


if __name__ == "__main__":
    main()
