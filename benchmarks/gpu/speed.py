"""G1 to G3: the speed of GPT-2, of models so small that launching is all there is, and of a ResNet."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.gpu.turns import Counted, Turns, counting, device_here, let_go
from benchmarks.gpu.workloads import PEAK_FLOPS, Sized, Workload, gpt2, resnet, small_mlp, small_transformer
from benchmarks.loops import ACCELERATE, AGAIN, LOOPS, OURS, RAW, Job, loops_here, raw, with_accelerate
from benchmarks.pairs import Rounds, aims, run_rounds

Loops = dict[str, Callable[[Job], None]]
ITEM, INSIDE = "raw loop with loss.item()", "Accelerate, the model returns its loss"


@dataclass(frozen=True)
class Length:
    """How long each loop is timed: ``rounds`` times ``steps`` after ``warmup``."""

    rounds: int
    steps: int
    warmup: int

    @property
    def most(self) -> int:
        """Steps of a loop that has all its turns, those that are dropped or counted included."""
        return self.warmup + (2 * self.rounds + 2) * self.steps


def loops() -> Loops:
    found = loops_here() | {ITEM: partial(raw, item=True), INSIDE: partial(with_accelerate, loss_inside=True)}
    first = [RAW, AGAIN, OURS, ITEM, ACCELERATE, INSIDE]
    return {name: found[name] for name in [*first, *(name for name in found if name not in first)]}


def measure(
    workload: Workload, length: Length, *, compiled: bool = False, count: bool = False, only: Loops | None = None
) -> list[str]:
    """Train in every loop, taking turns; return the table and whether the aim was met."""
    device = device_here()
    cfg = replace(workload.cfg, max_steps=length.most, compile=compiled)
    job = Job(workload.recipe, cfg, print, print, device=device)
    turns = {name: Turns(job, work, length.steps, length.warmup) for name, work in (only or loops()).items()}
    failed: dict[str, str] = {}
    counted: dict[str, Counted] = {}
    for name, turn in list(turns.items()):
        failed[name] = begun(turn)
        if failed[name]:
            turns.pop(name).close()
            let_go()
        elif count and device.type == "cuda":
            with counting() as counted[name]:
                turn()
    if missing := [name for name in (RAW, AGAIN, OURS) if failed[name]]:
        raise SystemExit(f"{missing[0]}: {failed[missing[0]]}")
    rounds = run_rounds(dict(turns), length.rounds, warmup=0)
    lines = [f"## {workload.name}, {'compiled' if compiled else 'eager'}", ""]
    lines += table(workload, length, turns, rounds, counted)
    lines += [f"| {name} | left out: {why} |" for name, why in failed.items() if why]
    ratio, low, high = rounds.ratio(RAW, OURS)
    noise = rounds.ratio(RAW, AGAIN)
    said = f"{ratio:.3f} ({low:.3f}-{high:.3f}) of the raw loop's speed; the raw loop again {noise[0]:.3f}"
    lines += ["", f"{rounds.dropped} rounds dropped for steal. {difference(turns)}", ""]
    lines += [*aims("Aim", (ratio >= 0.99, f"{said} ({noise[1]:.3f}-{noise[2]:.3f}), at least 0.99")), ""]
    for turn in turns.values():
        turn.close()
    let_go()
    return lines


def begun(turn: Turns) -> str:
    """Let a loop warm up; return why it cannot."""
    try:
        turn()
    except RuntimeError as error:
        return str(error)
    return ""


def table(
    workload: Workload, length: Length, turns: dict[str, Turns], rounds: Rounds, counted: dict[str, Counted]
) -> list[str]:
    heads = ["loop", f"{workload.unit}/s", "steps/s", "ms per step p50", "p99", "time / raw (95 % interval)"]
    share = workload.flops_per_unit / (peak_flops() or float("inf"))
    heads += ["MFU"] * bool(share)
    heads += ["waits per step by torch", "by the driver", "kernels per step"] * bool(counted)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, turn in turns.items():
        seconds = statistics.median(rounds.seconds[name]) / length.steps
        speed = workload.cfg.batch_size * workload.units / seconds
        each = sorted(turn.step_seconds)
        ratio, low, high = rounds.ratio(name, RAW)
        cells = [name, f"{speed:,.0f}", f"{1 / seconds:,.1f}", f"{each[len(each) // 2] * 1e3:.3f}"]
        cells += [f"{each[len(each) * 99 // 100] * 1e3:.3f}", f"{ratio:.3f} ({low:.3f}-{high:.3f})"]
        cells += [f"{speed * share:.1%}"] * bool(share)
        if counted:
            found = counted[name]
            cells += [f"{n / length.steps:.2f}" for n in (found.warned, found.waited, found.launched)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def difference(turns: dict[str, Turns]) -> str:
    """Say how far apart the weights are after as many steps of each loop."""
    wanted = turns[RAW].weights()
    if not bool(wanted.isfinite().all()):
        raise SystemExit("the raw loop's weights are not finite")
    apart = {n: float((turns[n].weights() - wanted).abs().max()) for n in turns if n != RAW}
    return "Largest difference of a weight from the raw loop's: " + ", ".join(f"{n} {d:.2g}" for n, d in apart.items())


def peak_flops() -> float:
    """Return the device's bf16 operations per second; 0 where they are not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), 0.0)


def language(toy: bool, length: Length) -> list[str]:
    """G1."""
    workload = gpt2(toy)
    lines = ["# G1: GPT-2", ""]
    if peak := peak_flops():
        lines += [
            f"MFU: tokens/s x (6 x parameters without positions + 12 x blocks x width x context) = "
            f"{workload.flops_per_unit / 1e9:.3f} GFLOP per token, over {peak / 1e12:.0f} TFLOP/s.",
            "",
        ]
    else:
        lines += ["Left out: MFU (not a device whose peak is known here).", ""]
    for compiled in (False, True):
        only = {RAW: raw, AGAIN: raw, OURS: LOOPS[OURS]} if toy and compiled else None
        lines += measure(workload, length, compiled=compiled, only=only)
    return lines


def launch_bound(toy: bool, length: Length) -> list[str]:
    """G2."""
    lines = ["# G2: models that launching bounds", ""]
    if torch.cuda.is_available():
        lines += ["Waits are counted in a turn of their own, log lines every 10 steps included in scaletrain's.", ""]
    else:
        lines += ["Left out: waits and kernels per step, which only CUDA has.", ""]
    longer = length if toy else replace(length, steps=10 * length.steps)
    sized: tuple[Sized, ...] = (small_transformer, small_mlp)
    for workload in sized:
        lines += measure(workload(toy), longer, count=True)
    return lines


def images(toy: bool, length: Length) -> list[str]:
    """G3."""
    return ["# G3: a CNN", "", *measure(resnet(toy), length)]
