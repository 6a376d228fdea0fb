"""Draw the curves of 1, 2 and 4 processes on each other: the same recipe, the same curve.

    python -m benchmarks.curves [--out docs/curves.png]

Trains recipes/cnn.py (dropout 0, so that no random number depends on the number of processes) for four epochs
in float32 through torchrun on this machine, and prints the largest relative difference.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.pairs import conditions

OPTIONS = ["--dropout", "0", "--epochs", "4", "--log-every", "1", "--threads", "1"]
WORLDS = {1: "-", 2: "--", 4: ":"}


def losses(processes: int, folder: Path) -> list[float]:
    out = folder / str(processes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run([*launcher, "recipes/cnn.py", *OPTIONS, "--out", str(out)], check=True, capture_output=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/curves.png"), help="the picture")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = {processes: losses(processes, Path(folder)) for processes in WORLDS}

    figure, axes = plt.subplots(figsize=(7, 3.2), dpi=140)
    for width, (processes, style) in zip((5, 3, 1.5), WORLDS.items(), strict=True):
        name = "1 process" if processes == 1 else f"{processes} processes"
        axes.plot(range(1, len(curves[processes]) + 1), curves[processes], style, linewidth=width, label=name)
    axes.set(xlabel="optimizer step (128 images each)", ylabel="training loss", ylim=(0, None))
    axes.set_title("recipes/cnn.py on 1, 2 and 4 processes", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(args.out)

    print("\n".join(conditions("python -m benchmarks.curves")))
    for processes in (2, 4):
        pairs = list(zip(curves[processes], curves[1], strict=True))
        first, whole = (max(abs(a - b) / b for a, b in part) for part in (pairs[:10], pairs))
        print(f"* {processes} processes against 1: {first:.1e} in the first 10 steps, {whole:.1e} in {len(pairs)}")


if __name__ == "__main__":
    main()
