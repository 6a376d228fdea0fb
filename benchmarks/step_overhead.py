"""What the loop costs per step: the tutorial's loop, a tight one, raw Accelerate, and ``train`` with everything on.

    python -m benchmarks.step_overhead [--rounds 15] [--steps 3000] [--out FILE]

A tiny MLP (20-64-64-3, batch 64, one thread), so that the step itself is short and what surrounds it shows.
The tight loop, Accelerate's and ``train`` do the same work with the same optimizer: their final weights are
compared bit by bit after the last round. The tutorial's loop is what one writes first: DataLoader, default AdamW,
``loss.item()`` each step. The last two add clipping and a warm-up + cosine schedule to both. ``train`` also writes
its log and, at the end, a checkpoint that it waits for: some 10 ms a run, which no other loop here spends.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.pairs import conditions, run_rounds
from recipes.mlp import mlp
from scaletrain import Config, Data, Recipe, parameter_groups, start, train, warmup_cosine
from scaletrain.order import Shuffled

BATCH_SIZE, EXAMPLES = 64, 64 * 100


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Config):
    batch_size: int = BATCH_SIZE
    threads: int | None = 1


def loss(model: nn.Module, batch: dict[str, Tensor], cfg: BenchConfig) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


class Arms:
    """The loops to compare, each returning the seconds of ``steps`` steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(EXAMPLES, 20, generator=generator)
        self.y = torch.randint(0, 3, (EXAMPLES,), generator=generator)
        self.indices = torch.from_numpy(Shuffled(EXAMPLES)(np.arange(steps * BATCH_SIZE))).view(steps, BATCH_SIZE)
        self.recipe = Recipe(config=BenchConfig, data=self._data, model=lambda cfg, data: mlp(20, 3), loss=loss)
        self.weights: dict[str, list[Tensor]] = {}

    def _data(self, cfg: BenchConfig) -> Data:
        return Data({"x": self.x, "y": self.y})

    def _model(self) -> nn.Module:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        return mlp(20, 3)

    def tutorial(self) -> float:
        model = self._model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
        loader = DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH_SIZE, shuffle=True)
        started, done = time.perf_counter(), 0
        while done < self.steps:
            model.train()
            running = 0.0
            for x, y in loader:
                optimizer.zero_grad()
                step_loss = F.cross_entropy(model(x), y)
                step_loss.backward()
                optimizer.step()
                running += step_loss.item()
                done += 1
                if done == self.steps:
                    break
        return time.perf_counter() - started

    def tight(self, name: str = "tight", *, extras: bool = False) -> float:
        model = self._model()
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4), lr=1e-3, weight_decay=1e-4, fused=True)
        cfg = BenchConfig()
        started = time.perf_counter()
        for step, indices in enumerate(self.indices):
            if extras:
                factor = warmup_cosine(step, self.steps, cfg)
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 * factor
            optimizer.zero_grad()
            F.cross_entropy(model(self.x[indices]), self.y[indices]).backward()
            if extras:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        seconds = time.perf_counter() - started
        self.weights[name] = list(model.parameters())
        return seconds

    def tight_with_extras(self) -> float:
        return self.tight("tight + clip + schedule", extras=True)

    def tight_again(self) -> float:
        return self.tight("tight again")

    def accelerate(self) -> float:
        model = self._model()
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4), lr=1e-3, weight_decay=1e-4, fused=True)
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        started = time.perf_counter()
        for indices in self.indices:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(self.x[indices]), self.y[indices]))
            optimizer.step()
        seconds = time.perf_counter() - started
        self.weights["accelerate"] = list(model.parameters())
        return seconds

    def scaletrain(self, *, extras: bool = False) -> float:
        recipe = replace(self.recipe, schedule=warmup_cosine) if extras else self.recipe
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            cfg = BenchConfig(max_steps=self.steps, out=folder, max_grad_norm=1.0 if extras else None)
            run = start(recipe, cfg)
            started = time.perf_counter()
            train(run)
            seconds = time.perf_counter() - started
            run.finish()
        self.weights["train + clip + schedule" if extras else "train"] = list(run.module.parameters())
        return seconds

    def scaletrain_with_extras(self) -> float:
        return self.scaletrain(extras=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps per arm and round")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()

    arms = Arms(args.steps)
    named = {
        "tutorial": arms.tutorial,
        "tight": arms.tight,
        "tight again": arms.tight_again,
        "accelerate": arms.accelerate,
        "train": arms.scaletrain,
        "tight + clip + schedule": arms.tight_with_extras,
        "train + clip + schedule": arms.scaletrain_with_extras,
    }
    rounds = run_rounds(named, args.rounds)
    for name, weights in arms.weights.items():
        reference = arms.weights["tight + clip + schedule" if "+" in name else "tight"]
        if not all(torch.equal(a, b) for a, b in zip(weights, reference, strict=True)):
            raise SystemExit(f"{name} did not end with the tight loop's weights: not the same work")

    lines = ["# What the loop costs per step", "", *conditions("python -m benchmarks.step_overhead"), ""]
    lines += [
        f"* MLP 20-64-64-3, batch {BATCH_SIZE}, 1 thread, {args.steps} steps per arm and round, {args.rounds} rounds"
    ]
    lines += [f"  in random order, {rounds.dropped} dropped for steal; load {rounds.load[0]} to {rounds.load[-1]}"]
    lines += ["* final weights of tight, accelerate and train, and of the two with extras: bit-equal", ""]
    lines += ["| loop | us per step (median) | CPU us | ratio to tight (95 % interval) | ratio to tutorial |"]
    lines += ["|---|---|---|---|---|"]
    for name in named:
        wall = statistics.median(rounds.seconds[name]) / args.steps * 1e6
        cpu = statistics.median(rounds.cpu_seconds[name]) / args.steps * 1e6
        (tight, low, high), (tutorial, *_) = rounds.ratio(name, "tight"), rounds.ratio(name, "tutorial")
        lines.append(f"| {name} | {wall:.0f} | {cpu:.0f} | {tight:.3f} ({low:.3f}-{high:.3f}) | {tutorial:.3f} |")
    extra, low, high = rounds.ratio("train + clip + schedule", "tight + clip + schedule")
    lines += ["", f"With clipping and schedule in both: train / tight = {extra:.3f} ({low:.3f}-{high:.3f})."]
    raw = {name: [round(s / args.steps * 1e6, 1) for s in seconds] for name, seconds in rounds.seconds.items()}
    lines += ["", "Raw us per step, round by round:", "", *(f"* {name}: {values}" for name, values in raw.items())]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
