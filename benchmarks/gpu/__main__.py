"""On one GPU, in bf16: what scaletrain adds to a loop that never waits for the device, beside other libraries.

    python -m benchmarks.gpu [--parts G1,G2,G3,G4,G5,G6] [--rounds 7] [--steps 20] [--out FILE]
    python -m benchmarks.gpu --toy

G1 GPT-2 of 124 million parameters, eager and compiled. G2 models so small that launching kernels is all there is, with
the waits of each step counted. G3 a ResNet in channels_last. G4 how long a checkpoint of a billion parameters holds
training up. G5 compiling: cold and warm, whole and per block, recompiles. G6 the most memory at rising batch sizes.
Each part takes some minutes on an H100; the file is written again after each. ``--toy`` runs the same on any machine
at toy size and says what is left out there.
"""

import argparse
import contextlib
import io
import sys
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu import compiling, memory, saving, speed
from benchmarks.pairs import conditions

PARTS = {
    "G1": speed.language,
    "G2": speed.launch_bound,
    "G3": speed.images,
    "G4": saving.stall,
    "G5": compiling.compile_times,
    "G6": memory.most,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, by their names with commas")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU too")
    parser.add_argument("--rounds", type=int, help="counted rounds; default 7")
    parser.add_argument("--steps", type=int, help="optimizer steps of a loop and round; default 20, in G2 ten times")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.toy:
        parser.error("there is no CUDA device here; --toy runs everything at toy size")
    rounds, steps, warmup = (2, 2, 1) if args.toy else (7, 20, 20)
    length = speed.Length(args.rounds or rounds, args.steps or steps, warmup)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # all loops compile the same functions
    lines = heading(args)
    for name in args.parts.split(","):
        started = time.perf_counter()
        with quiet():
            found = PARTS[name](args.toy, length)
        found += [f"{name} took {time.perf_counter() - started:.0f} s.", ""]
        lines += found
        print("\n".join(found), flush=True)
        if args.out:
            args.out.write_text("\n".join(lines))


def heading(args: argparse.Namespace) -> list[str]:
    packages = [name for name in ("torch", "accelerate", "lightning", "transformers", "safetensors") if installed(name)]
    command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    lines = ["# On one GPU", "", *conditions(command, tuple(packages))]
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        runtime = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        lines += [f"* {device.name}, {device.total_memory / 2**30:.0f} GiB, {runtime}"]
    else:
        lines += ["* no GPU: toy sizes on the CPU, which show that everything runs and nothing else"]
    lines += ["* bf16 autocast, SDPA, fused AdamW, float32 products in TF32, data on the device, one CPU thread"]
    lines += ["* loops take turns in random order, built and compiled once; the device is waited for around each turn"]
    print("\n".join(lines), flush=True)
    return [*lines, ""]


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


@contextlib.contextmanager
def quiet():
    """Keep what the libraries print and warn of out of the tables."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    main()
