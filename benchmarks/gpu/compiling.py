"""G5: what compiling costs: with an empty cache and a full one, the model as a whole and each block alone.

python -m benchmarks.gpu.compiling --way NAME [--toy] measures one way in this process and prints it as JSON.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import nn

from benchmarks.children import in_child
from benchmarks.gpu.speed import Length
from benchmarks.gpu.turns import device_here, wait
from benchmarks.gpu.workloads import Workload, gpt2
from benchmarks.loops import Job, raw, with_scaletrain
from benchmarks.pairs import aims
from scaletrain import Config

EVERY, STEPS = 10, 30
"""Steps between validations, and in all; the first validation ends the warm-up."""
STEADY = (2 * EVERY + 1, 3 * EVERY - 1)
"""Steps between which the speed is taken: no validation lies there."""
WHOLE, BLOCKS = "raw loop, whole", "raw loop, per block"
OURS, OURS_BLOCKS = "scaletrain --compile", "scaletrain --compile-blocks"
Loop = Callable[[Job], None]
WAYS: dict[str, tuple[Loop, dict[str, bool], bool]] = {
    "raw loop, eager": (raw, {}, False),
    WHOLE: (raw, {"compile": True}, False),
    BLOCKS: (raw, {}, True),
    "scaletrain, eager": (with_scaletrain, {}, False),
    OURS: (with_scaletrain, {"compile": True}, False),
}
if "compile_blocks" in {option.name for option in fields(Config)}:
    WAYS[OURS_BLOCKS] = (with_scaletrain, {"compile_blocks": True}, False)
AS_TOYS = [way for way in WAYS if way in (BLOCKS, OURS, OURS_BLOCKS)]


@dataclass
class Watch:
    """When a loop had done which step, and how many frames were compiled by then."""

    workload: Workload
    validates: bool
    """Whether to validate here: the loop itself does not."""
    model: nn.Module = field(default_factory=nn.Identity)
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[int, float] = field(default_factory=dict)
    frames: dict[int, int] = field(default_factory=dict)

    def note(self, step: int) -> None:
        if self.validates and step % EVERY == 0:
            self._validate()
        if step in (1, EVERY, *STEADY, STEPS):
            wait(device_here())
            self.seconds[step] = time.perf_counter() - self.started
            self.frames[step] = compiled_frames()

    def built(self, model: nn.Module) -> None:
        self.model = model

    def _validate(self) -> None:
        """Evaluate as scaletrain does: twice as many examples at a time, the last ones fewer."""
        recipe, cfg, device = self.workload.recipe, self.workload.cfg, device_here()
        tokens = recipe.data(cfg).val["tokens"].to(device)
        self.model.eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            for batch in tokens.split(2 * cfg.batch_size):
                recipe.evaluate(self.model, {"tokens": batch}, cfg)
        self.model.train()


def compiled_frames() -> int:
    """Return how many frames torch.compile has compiled in this process: one again counts again."""
    return torch._dynamo.utils.counters["frames"]["ok"]


def measure(way: str, toy: bool) -> dict[str, float]:
    """Train some steps with validations; return seconds, and frames compiled in the warm-up and after it."""
    loop, options, by_block = WAYS[way]
    workload = gpt2(toy, held_out=11 if toy else 99)  # the last batch of a validation is smaller
    cfg = replace(workload.cfg, max_steps=STEPS, validate_every=EVERY, log_every=EVERY, **options)
    watch = Watch(workload, validates=loop is raw)
    job = Job(workload.recipe, cfg, watch.note, watch.built, device=device_here(), compile_blocks=by_block)
    with contextlib.redirect_stdout(io.StringIO()):
        loop(job)
    first, last = STEADY
    return {
        "first": watch.seconds[1],
        "validated": watch.seconds[EVERY],
        "all": watch.seconds[STEPS],
        "step": (watch.seconds[last] - watch.seconds[first]) / (last - first),
        "frames": watch.frames[EVERY],
        "again": watch.frames[STEPS] - watch.frames[EVERY],
    }


def compile_times(toy: bool, length: Length) -> list[str]:
    found: dict[str, list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    for way in AS_TOYS if toy else WAYS:
        with tempfile.TemporaryDirectory() as cache:
            if not toy:  # which finds what is there
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            arguments = ["--way", way, *["--toy"] * toy]
            times = 1 if toy or "eager" in way else 2
            children = [in_child("benchmarks.gpu.compiling", *arguments) for _ in range(times)]
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        if why := next((child["failed"] for child in children if "failed" in child), ""):
            failed[way] = why
        else:
            found[way] = children
    lines = ["# G5: compiling", ""]
    lines += [
        f"{gpt2(toy).name}, each way in fresh processes: cold with an empty cache of inductor, warm with the one that "
        "the cold one left."
        if not toy
        else f"{gpt2(toy).name}. Left out: other ways, caches of their own, cold beside warm.",
        "",
        f"* Seconds from before the model is built; a validation every {EVERY} steps, whose last batch is smaller.",
        "* Frames: what torch.compile compiled up to the end of the first validation, and after it.",
        "",
        "| way | cold: to step 1 | to the first validation's end | warm: to step 1 | to the first validation's end "
        "| ms per step | frames | after the warm-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, children in found.items():
        cold, warm = children[0], children[-1]
        warmed = ["", ""] if "eager" in way else [f"{warm['first']:.1f}", f"{warm['validated']:.1f}"]
        cells = [way, f"{cold['first']:.1f}", f"{cold['validated']:.1f}", *warmed]
        cells += [f"{warm['step'] * 1e3:.2f}", f"{warm['frames']}", f"{warm['again']}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {way} | left out: {why} |" for way, why in failed.items()]
    return [*lines, "", *aims("Aims", *judged(found)), ""]


def judged(found: dict[str, list[dict[str, float]]]) -> list[tuple[bool, str]]:
    ours = [way for way in (OURS, OURS_BLOCKS) if way in found]
    again = {way: max(child["again"] for child in found[way]) for way in ours}
    said = ", ".join(f"{way} {n}" for way, n in again.items())
    judged = [(bool(ours) and not any(again.values()), f"frames compiled after the warm-up: {said}, none allowed")]
    if WHOLE in found and BLOCKS in found:
        whole, blocks = found[WHOLE], found[BLOCKS]
        less, speed = whole[0]["first"] / blocks[0]["first"], whole[-1]["step"] / blocks[-1]["step"]
        said = f"per block {less:.1f}x sooner at step 1 (cold), at {speed:.3f} of the speed; at least 3x and 0.97"
        judged.append((less >= 3 and speed >= 0.97, said))
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", required=True, choices=list(WAYS))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    print(json.dumps(measure(args.way, args.toy)))


if __name__ == "__main__":
    main()
