"""G6: the most memory of the device that each loop needs, at rising batch sizes."""

from dataclasses import replace

import torch

from benchmarks.gpu.speed import INSIDE, Length, loops
from benchmarks.gpu.turns import Turns, device_here, let_go
from benchmarks.gpu.workloads import gpt2
from benchmarks.loops import ACCELERATE, HF, OURS, RAW, Job
from benchmarks.pairs import aims

STEPS = 3
GIB = 2**30


def most(toy: bool, length: Length) -> list[str]:
    sizes = (2, 4) if toy else (8, 16, 32, 64, 96, 128)
    found = {
        name: [peak(name, toy, size) for size in sizes]
        for name in (RAW, OURS, ACCELERATE, INSIDE, HF)
        if name in loops()
    }
    lines = ["# G6: memory", "", f"GPT-2, eager, most GiB allocated (`max_memory_allocated`) in {STEPS} steps:", ""]
    if not torch.cuda.is_available():
        lines[-1:] = ["", "Left out: the figures, which only CUDA has. The steps were done.", ""]
    lines += [f"| loop | {' | '.join(f'batch {size}' for size in sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(map(shown, row))} |" for name, row in found.items()]
    if not torch.cuda.is_available():
        return [*lines, ""]
    pairs = [(a, b) for a, b in zip(found[OURS], found[RAW], strict=True) if isinstance(a, int) and isinstance(b, int)]
    worst = max(ours / theirs for ours, theirs in pairs)
    fits = [sum(isinstance(cell, int) for cell in found[name]) for name in (OURS, RAW)]
    said = f"{worst:.4f} of the raw loop's memory at most, at most 1.00; {fits[0]} of {len(sizes)} batch sizes fit"
    return [*lines, "", *aims("Aim", (worst < 1.005 and fits[0] == fits[1], f"{said}, {fits[1]} in the raw loop")), ""]


def peak(name: str, toy: bool, batch_size: int) -> int | str:
    """Return the bytes of some steps, or why there are none."""
    let_go()
    workload = gpt2(toy, batch_size)
    cfg = replace(workload.cfg, max_steps=STEPS + 1)
    turn = Turns(Job(workload.recipe, cfg, print, print, device=device_here()), loops()[name], 1, STEPS)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        turn()
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else "done"
    except RuntimeError as error:
        return "out of memory" if "OutOfMemoryError" in str(error) else str(error)
    finally:
        turn.close()


def shown(found: int | str) -> str:
    return found if isinstance(found, str) else f"{found / GIB:.2f}"
