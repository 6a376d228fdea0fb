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

from benchmarks.pairs import conditions
from scaletrain.order import Share, Shuffled

STEPS, BATCH_SIZE, REPEATS = 128, 64, 50


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
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
