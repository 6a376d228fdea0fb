"""Train every recipe at its documented size, hold what comes out to its ``expect``, and set it beside references.

    python -m benchmarks.expectations                                  each once, held to what it expects
    python -m benchmarks.expectations --seeds 5 --references --out FILE

References are scikit-learn's models and raw PyTorch loops on the same split (benchmarks/references/). Exits 1 when an
expectation is missed, or a mean over the seeds is worse than a reference's by more than two standard errors of the
difference.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from importlib import import_module
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.pairs import conditions
from scaletrain.recipe import unmet

RECIPES = ("cnn", "lm", "text", "vit", "cnn_sam", "mlp", "regression", "binary", "multilabel", "finetune")
"""The longest first, but for cnn, whose networks finetune adapts."""
REFERENCES = ("tables", "images", "language")

Metrics = dict[str, float]


def use_one_thread() -> None:
    """Let a worker compute in one thread: as many work at a time as there are cores."""
    import torch

    torch.set_num_threads(1)


def train(name: str, seed: int, folder: Path) -> tuple[Metrics, float]:
    """Run a recipe as a script; return its metrics and the seconds that it took, imports included."""
    out = folder / f"{name}-{seed}"
    command = [sys.executable, f"recipes/{name}.py", "--seed", str(seed), "--threads", "1", "--out", str(out)]
    command += ["--weights", str(folder / f"cnn-{seed}")] if name == "finetune" else []
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "result.json").read_text())["metrics"], time.monotonic() - started


def refer(name: str, module: str, index: int, seed: int) -> tuple[Metrics, float]:
    """Measure a reference of a recipe."""
    _, reference = import_module(f"benchmarks.references.{module}").REFERENCES[name][index]
    started = time.monotonic()
    return reference(seed), time.monotonic() - started


def measured(
    names: Sequence[str], seeds: int, with_references: bool, folder: Path
) -> Iterator[tuple[str, dict[str, list[tuple[Metrics, float]]]]]:
    """Yield the metrics and seconds of each seed of a recipe and its references; each core works on one at a time."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), use_one_thread) as pool:
        found: dict[str, dict[str, list[Any]]] = {}
        for name in names:
            if name == "finetune":
                wait(found["cnn"]["recipe"])
            found[name] = {"recipe": [pool.submit(train, name, seed, folder) for seed in range(seeds)]}
            for module in REFERENCES if with_references else ():
                known = import_module(f"benchmarks.references.{module}").REFERENCES.get(name, ())
                for index, (label, _) in enumerate(known):
                    found[name][label] = [pool.submit(refer, name, module, index, seed) for seed in range(seeds)]
        for name in names:
            yield name, {label: [run.result() for run in runs] for label, runs in found[name].items()}


def is_worse(ours: list[float], theirs: list[float], wanted: str) -> bool:
    """Whether our mean lies on the wrong side of theirs by more than two standard errors of the difference."""
    if len(ours) < 2 or len(theirs) < 2:
        return False
    better = 1 if wanted.startswith(">") else -1
    error = sqrt((stdev(ours) ** 2 + stdev(theirs) ** 2) / len(ours))
    return better * (mean(theirs) - mean(ours)) > 2 * error


def rows(name: str, found: dict[str, list[tuple[Metrics, float]]], faults: list[str]) -> list[str]:
    """Return a row for each expected metric of the recipe and its references; add what is missed to ``faults``."""
    expect, lines = import_module(f"recipes.{name}").recipe.expect, []
    faults += [f"{name}: {miss}" for metrics, _ in found["recipe"] for miss in unmet(expect, metrics)]
    for metric, wanted in expect.items():
        ours = [metrics[metric] for metrics, _ in found["recipe"]]
        for label, runs in found.items():
            theirs = [metrics[metric] for metrics, _ in runs if metric in metrics]
            if not theirs:
                continue
            if label != "recipe" and is_worse(ours, theirs, wanted):
                faults.append(f"{name}: {metric} {mean(ours):.4f} is worse than {label}'s {mean(theirs):.4f}")
            each = ", ".join(f"{value:.4f}" for value in theirs)
            seconds = mean(seconds for _, seconds in runs)
            what = f"**{name}** | {metric} {wanted}" if label == "recipe" else f"{label} | {metric}"
            lines.append(f"| {what} | {mean(theirs):.4f} | {each} | {seconds:.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each recipe and reference")
    parser.add_argument("--references", action="store_true", help="measure the references too")
    parser.add_argument("--only", nargs="*", default=RECIPES, help="recipes; finetune goes after cnn")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    command = f"python -m benchmarks.expectations --seeds {args.seeds}{' --references' if args.references else ''}"
    lines = ["# What the recipes reach", "", *conditions(command, ("torch", "scikit-learn")), ""]
    lines += [
        "| recipe or reference | metric | mean | each seed | seconds |",
        "|---|---|---|---|---|",
    ]
    faults: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, found in measured(args.only, args.seeds, args.references, Path(folder)):
            new = rows(name, found, faults)
            print("\n".join(new), flush=True)
            lines += new
    lines += [
        "",
        "Recipes and raw loops keep the epoch that is best on the validation examples that are reported here; "
        "scikit-learn's models get no such choice. The raw loops of tables have no averaged weights. Test examples had "
        "no part in any choice within a run.",
    ]
    lines += ["", f"{time.monotonic() - started:.0f} s in all: one thread each, as many at a time as there are cores."]
    lines += ["", *(f"* MISSED: {fault}" for fault in faults)] if faults else []
    print(lines[-1 - len(faults)])
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
