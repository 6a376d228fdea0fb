"""Train every recipe at its documented size, and hold what comes out to the recipe's ``expect``.

    python -m benchmarks.expectations [--seeds 5] [--out FILE]

Exits 1 when an expectation is missed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from benchmarks.pairs import conditions
from scaletrain.recipe import unmet

RECIPES = ("mlp", "cnn", "cnn_sam")


def train(name: str, seed: int, folder: Path) -> tuple[dict[str, float], float]:
    """Run a recipe as a script; return its metrics and the seconds spent training."""
    out = folder / f"{name}-{seed}"
    command = [sys.executable, f"recipes/{name}.py", "--seed", str(seed), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    timing = (out / "timing.jsonl").read_text().splitlines()
    return json.loads((out / "result.json").read_text())["metrics"], json.loads(timing[-1])["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="seeds per recipe")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    command = f"python -m benchmarks.expectations --seeds {args.seeds}"
    lines = ["# What the recipes reach", "", *conditions(command, ("torch", "scikit-learn")), ""]
    lines += ["| recipe | expected | metric at each seed | training seconds (with validation) |", "|---|---|---|---|"]
    missed: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in RECIPES:
            expect = import_module(f"recipes.{name}").recipe.expect
            runs = [train(name, seed, Path(folder)) for seed in range(args.seeds)]
            missed += [f"{name}: {miss}" for metrics, _ in runs for miss in unmet(expect, metrics)]
            for metric, wanted in expect.items():
                values = ", ".join(f"{metrics[metric]:.4f}" for metrics, _ in runs)
                seconds = [f"{s:.0f}" for _, s in runs]
                lines.append(f"| {name} | {metric} {wanted} | {values} | {', '.join(seconds)} |")
    lines += ["", f"{time.monotonic() - started:.0f} s in all."]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    if missed:
        raise SystemExit("\n".join(missed))


if __name__ == "__main__":
    main()
