"""Train on 50 million rows in a memory map: resident memory, and the time from the start to the first batch.

    python -m benchmarks.large_map [--rows 50_000_000] [--out FILE]

A .npy file of 16 float32 a row (3.2 GB) and one of labels, sparse on the disk; a small MLP, a tenth held out by
``load``, 200 steps of 256 shuffled rows. In a process of its own.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.children import in_child
from benchmarks.pairs import aims, conditions
from scaletrain import Config, Recipe, load, start, steps

FEATURES = 16


@dataclass(frozen=True, kw_only=True)
class LargeConfig(Config):
    folder: str = ""
    """Where x.npy and label.npy are."""
    batch_size: int = 256
    threads: int | None = 1


def load_data(cfg):
    arrays = {name: np.lib.format.open_memmap(f"{cfg.folder}/{name}.npy", mode="r") for name in ("x", "label")}
    data = load(arrays, split_seed=cfg.split_seed, val_share=0.1)
    data.val = {name: column[:1000].clone() for name, column in data.val.whole.items()}
    return data


recipe = Recipe(
    config=LargeConfig,
    data=load_data,
    model=lambda cfg, data: nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 2)),
    loss=lambda model, batch, cfg: F.cross_entropy(model(batch["x"]), batch["label"]),
)


def make_files(folder: Path, rows: int) -> None:
    for name, shape, dtype in (("x", (rows, FEATURES), np.float32), ("label", (rows,), np.int64)):
        array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        array[:: rows // 100] = 1
        array.flush()


def resident_bytes(line: str = "VmRSS") -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in status if text.startswith(f"{line}:"))


def measure(folder: Path, steps_done: int) -> dict[str, float]:
    """Train, and return seconds from the start to the first step done, and bytes."""
    imported, started = resident_bytes(), time.perf_counter()
    run = start(recipe, LargeConfig(folder=str(folder), max_steps=steps_done, out=str(folder / "run")))
    first = 0.0
    for info in steps(run):
        first = first or time.perf_counter() - started
        assert torch.isfinite(info.loss)
    return {"first": first, "peak": resident_bytes("VmHWM"), "imported": imported, "examples": run.examples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="measure here and print it as JSON")
    parser.add_argument("--out", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(measure(args.folder, args.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), args.rows)
        found = in_child("benchmarks.large_map", "--folder", folder, "--steps", args.steps)
    lines = [
        "# Fifty million rows in a memory map",
        "",
        *conditions("python -m benchmarks.large_map"),
        f"* {args.rows:,} rows of {FEATURES} float32 and a label, sparse files; {args.steps} steps of 256 shuffled",
        "",
        f"First step done {found['first']:.2f} s after the start, imports left out. Most resident memory "
        f"{found['peak'] / 1e6:,.0f} MB, of which {found['imported'] / 1e6:,.0f} MB are imports.",
        "",
        *aims(
            "Aims",
            (found["first"] < 2, "the first batch within 2 s"),
            (found["peak"] < 1e9, "resident memory under 1 GB"),
        ),
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
