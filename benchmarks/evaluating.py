"""What validation costs beside a raw inference loop over the same examples: time, and memory.

    python -m benchmarks.evaluating [--rounds 15] [--out FILE]

50,000 rows and an MLP, on one process and one thread. The raw loop slices the rows, computes logits, loss and accuracy,
and adds them up on the device; scaletrain's ``validate`` does the same by the recipe's ``evaluate``, twice as many rows
at a time as in training, since nothing is kept for a backward pass. Both figures must be equal.
"""

import argparse
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.pairs import Arm, aims, conditions, run_rounds
from recipes import mlp
from scaletrain import Data, start, validate

ROWS, FEATURES, BATCH = 50_003, 64, 512
RAW, AGAIN, TWICE = (
    "raw inference loop",
    "raw inference loop again",
    "raw inference loop, twice as many rows at a time",
)
OURS = "scaletrain validate"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds")
    parser.add_argument("--rows", type=int, default=ROWS, help="examples to validate on")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    x, y = torch.randn(args.rows, FEATURES), torch.randint(0, 10, (args.rows,))
    columns = {"features": x, "label": y}
    recipe = replace(mlp.recipe, data=lambda cfg: Data(columns, columns, classes=[str(i) for i in range(10)]))
    with tempfile.TemporaryDirectory() as folder:
        cfg = mlp.MLPConfig(batch_size=BATCH, max_steps=1, threads=1, out=folder)
        run = start(recipe, cfg)
        figures = {}

        def raw(size: int = BATCH) -> float:
            started = time.perf_counter()
            run.module.eval()
            total_loss, right = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            with torch.inference_mode():
                for at in range(0, args.rows, size):
                    logits, label = run.module(x[at : at + size]), y[at : at + size]
                    total_loss += F.cross_entropy(logits, label, reduction="sum")
                    right += (logits.argmax(1) == label).sum()
            figures[RAW] = (total_loss.item() / args.rows, right.item() / args.rows)
            return time.perf_counter() - started

        def ours() -> float:
            started = time.perf_counter()
            found = validate(run)
            figures[OURS] = (found["val_loss"], found["val_accuracy"])
            return time.perf_counter() - started

        arms: dict[str, Arm] = {RAW: raw, AGAIN: raw, TWICE: lambda: raw(2 * BATCH), OURS: ours}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rounds = run_rounds(arms, args.rounds)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert abs(figures[RAW][0] - figures[OURS][0]) < 1e-6
    assert figures[RAW][1] == figures[OURS][1]
    lines = ["# What validation costs", "", *conditions("python -m benchmarks.evaluating")]
    lines += [
        f"* {args.rows:,} rows of {FEATURES} float32, MLP 64-64-64-10, batches of {BATCH}, one process, one thread",
        f"* {args.rounds} rounds in random order, {rounds.dropped} dropped; loss and accuracy equal",
        f"* resident memory grew by {grown / 1024:.1f} MB at most meanwhile",
        "",
        "| way | rows/s | time / raw (95 % interval) |",
        "|---|---|---|",
    ]
    for name, seconds in rounds.seconds.items():
        ratio, low, high = rounds.ratio(name, RAW)
        lines.append(
            f"| {name} | {args.rows / sorted(seconds)[len(seconds) // 2]:,.0f} | {ratio:.3f} ({low:.3f}-{high:.3f}) |"
        )
    share = rounds.ratio(RAW, OURS)[0]
    lines += ["", *aims("Aims", (share >= 0.98, f"{share:.3f} of the raw loop's rows per second, at least 0.98"))]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
