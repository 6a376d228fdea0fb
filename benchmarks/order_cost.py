"""What the order of the examples costs: time per index and memory, from a thousand examples to a trillion.

    python -m benchmarks.order_cost [--out FILE]

One process of one reads blocks of 8,192 indices at 0.9 of the first epoch, as after a resume. Beside it
``torch.randperm``, which must be drawn whole, as far as memory allows.
"""

import argparse
import statistics
import time
import tracemalloc
from pathlib import Path

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, RandomSampler

from benchmarks.pairs import conditions
from scaletrain.order import Shuffled
from scaletrain.share import Share

STEPS, BATCH_SIZE, REPEATS = 128, 64, 50
WORLD_N = 10_000_000


def cost(n: int) -> tuple[float, float, float]:
    """Return ns per index, us until the first block after a resume, and peak MB."""
    started = time.perf_counter()
    share = Share(Shuffled(n, 0), BATCH_SIZE)
    share.block(9 * n // 10, STEPS)
    first = time.perf_counter() - started
    seconds = []
    for repeat in range(REPEATS):
        started = time.perf_counter()
        share.block(9 * n // 10 + repeat * STEPS * BATCH_SIZE, STEPS)
        seconds.append(time.perf_counter() - started)
    tracemalloc.start()
    share.block(9 * n // 10, STEPS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return statistics.median(seconds) / (STEPS * BATCH_SIZE) * 1e9, first * 1e6, peak / 1e6


def cost_of_world(world_size: int) -> tuple[float, float]:
    """Return us a step of index work on rank 0 of ``world_size``, 32 examples each: ours, and Accelerate's sampler."""
    share = Share(Shuffled(WORLD_N, 0), 32 * world_size, 0, world_size)
    started = time.perf_counter()
    for repeat in range(REPEATS):
        share.block(repeat * STEPS * share.batch_size, STEPS)
    ours = (time.perf_counter() - started) / (REPEATS * STEPS)
    sampler = BatchSampler(RandomSampler(range(WORLD_N)), 32, drop_last=False)
    sharded = iter(BatchSamplerShard(sampler, world_size, 0))
    next(sharded)
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < 0.5 and steps < 200 and next(sharded, None) is not None:
        steps += 1
    return ours * 1e6, (time.perf_counter() - started) / max(1, steps) * 1e6


def randperm(n: int) -> str:
    if n > 10**8:
        return "not tried"
    started = time.perf_counter()
    torch.randperm(n)
    return f"{(time.perf_counter() - started) * 1e3:.1f} ms, {n * 8 / 1e6:.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    cost(1000)
    lines = ["# What the order costs", "", *conditions("python -m benchmarks.order_cost", ("torch", "numpy")), ""]
    lines += [
        "| examples | ns per index | us to the first block at 0.9 n | peak MB | torch.randperm |",
        "|---|---|---|---|---|",
    ]
    for power in range(3, 13):
        per_index, first, peak = cost(10**power)
        lines.append(f"| 1e{power} | {per_index:.0f} | {first:.0f} | {peak:.2f} | {randperm(10**power)} |")
    lines += [
        "",
        f"Rank 0 of W processes, 32 examples each a step, {WORLD_N:.0e} examples; beside it Accelerate's",
        "BatchSamplerShard, which counts out every rank's batches, without the RandomSampler's start:",
        "",
        "| W | us a step | BatchSamplerShard | times |",
        "|---|---|---|---|",
    ]
    for world_size in (1, 4, 16, 64, 256, 1024, 4096):
        ours, theirs = cost_of_world(world_size)
        lines.append(f"| {world_size} | {ours:.1f} | {theirs:.0f} | {theirs / ours:.0f} |")
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
