"""Bits per byte of recipes/lm.py on held-out text, beside byte counts, compressors and a plain loop.

    python -m benchmarks.language [--minutes 10 | --steps 6064] [--seeds 2] [--out FILE]

The recipe and a hand-written PyTorch loop train the same network, with the same optimizer and schedule, for as many
steps, on windows in orders of their own. How many is found by timing some steps of the loop first, unless it is said.
"""

import argparse
import gzip
import json
import lzma
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.pairs import aims, conditions
from benchmarks.references.language import byte_models, lm_loop
from recipes import lm

METRIC = "val_bits_per_byte"
SAME = ("size", "optimizer", "lr", "seed", "max_steps", "threads")
"""Options that the recipe is given as the loop has them; all others are the recipe's defaults."""
TIMED_STEPS = 40
"""Steps that are timed to know how many fit into the minutes."""


def steps_within(minutes: float, cfg: lm.LMConfig) -> int:
    """Return how many steps of the plain loop fit into ``minutes``, without its validation."""
    data = lm.load_data(cfg)
    data.val.tokens = data.val.tokens[: 2 * cfg.length + 2]
    seconds = []
    for steps in (5, 5, 5 + TIMED_STEPS):  # the first warms up
        started = time.perf_counter()
        lm_loop(replace(cfg, max_steps=steps), data)
        seconds.append(time.perf_counter() - started)
    return max(1, int(60 * minutes * TIMED_STEPS / max(1e-3, seconds[2] - seconds[1])))


def recipe(cfg: lm.LMConfig, folder: Path) -> tuple[float, float]:
    """Run the recipe as a script; return the bits per byte and the seconds that it took from start to end."""
    out = folder / f"lm-{cfg.seed}"
    options = {"out": out} | {name: getattr(cfg, name) for name in SAME}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    started = time.perf_counter()
    subprocess.run([sys.executable, lm.__file__, *words], check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "result.json").read_text())["metrics"][METRIC], time.perf_counter() - started


def loop(cfg: lm.LMConfig) -> tuple[float, float]:
    """Train by hand; return the bits per byte and the seconds spent."""
    started = time.perf_counter()
    return lm_loop(cfg)[METRIC], time.perf_counter() - started


def row(name: str, found: Sequence[tuple[float, float]]) -> str:
    bits = [one for one, _ in found]
    seconds = ", ".join(f"{s:.0f}" for _, s in found)
    return f"| {name} | {statistics.mean(bits):.3f} | {', '.join(f'{one:.4f}' for one in bits)} | {seconds} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="training time of each run")
    parser.add_argument("--steps", type=int, help="of each run, in place of the minutes")
    parser.add_argument("--seeds", type=int, default=2, help="runs of the recipe and of the plain loop")
    parser.add_argument("--size", default="base", help="of the model, as the recipe's option")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    cfg = lm.LMConfig(size=args.size, threads=args.threads, optimizer="muon", lr=8e-3)
    budget = f"--minutes {args.minutes:g}" if args.steps is None else f"--steps {args.steps}"
    head = conditions(f"python -m benchmarks.language {budget} --seeds {args.seeds} --size {args.size}")
    cfg = replace(cfg, max_steps=args.steps or steps_within(args.minutes, cfg))
    data = lm.load_data(cfg)
    held_out = data.val.tokens.tobytes()
    ours, by_hand = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            ours.append(recipe(replace(cfg, seed=seed), Path(folder)))
            by_hand.append(loop(replace(cfg, seed=seed)))

    orders = byte_models(data.train.tokens, data.val.tokens)
    packed = {
        "gzip -9": len(gzip.compress(held_out, 9)),
        "xz -9": len(lzma.compress(held_out, preset=9)),
    }
    tokens = cfg.max_steps * cfg.batch_size * cfg.length
    lines = ["# Bits per byte of Python's standard library", "", *head, ""]
    lines += [
        f"Training text {len(data.train.tokens):,} bytes, held out {len(held_out):,}. The recipe and the loop: "
        f"--size {cfg.size} --optimizer {cfg.optimizer} --lr {cfg.lr:g}, "
        f"{cfg.max_steps:,} steps of {cfg.batch_size} x {cfg.length} bytes "
        f"({tokens / len(data.train.tokens):.2f} epochs), {args.threads} threads. The byte models are counted on the "
        "training text, each order smoothed towards the one below. gzip and xz see the held-out text alone, so they "
        "know nothing of Python when they begin.",
        "",
        "| on the held-out text | bits per byte | at each seed | seconds |",
        "|---|---|---|---|",
        *(f"| order-{order} byte model | {bits:.3f} | | |" for order, bits in enumerate(orders)),
        *(f"| {name}, held-out text alone | {8 * size / len(held_out):.3f} | | |" for name, size in packed.items()),
        row("recipes/lm.py", ours),
        row("PyTorch loop by hand", by_hand),
        "",
    ]
    means = [statistics.mean(bits for bits, _ in found) for found in (ours, by_hand)]
    apart = means[0] - means[1]
    said = f"the recipe's mean less the loop's is {apart:+.4f}"
    if args.seeds > 1:  # of a difference of two means, seeds being all that differs
        spread = [statistics.variance([bits for bits, _ in found]) for found in (ours, by_hand)]
        error = (sum(spread) / args.seeds) ** 0.5
        said += f", standard error {error:.4f} over {args.seeds} seeds"
    lines += aims(
        "Aims",
        (means[0] < min(orders[1:]), f"below order 1 ({orders[1]:.3f}) and order 2 ({orders[2]:.3f}): {means[0]:.3f}"),
        (abs(apart) < 0.02, f"as good as the loop by hand, within 0.02: {said}"),
    )
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
