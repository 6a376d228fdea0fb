"""Going on is not an event: from every step, on any number of processes, with every optimizer and schedule."""

import itertools
import os
import shutil
from dataclasses import replace

import noisy
import pytest
import torch.distributed as dist
from faultload import ALL, draw, report

from scaletrain import start, train

STEPS = 8
CASES = list(itertools.product((1, 3), noisy.OPTIMIZERS, noisy.SCHEDULES))
"""Micro-batches, optimizer, schedule."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Ranks of a world see its folder, and record their bits in memory alone."""
    monkeypatch.setattr("scaletrain.tracking.Tracking.say", lambda self, text: None)


def config(out, micro_batches=1, optimizer="adamw", schedule="warmup_cosine", **more):
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    micro = -(-24 // world_size // micro_batches)
    options = {"max_steps": STEPS, "validate_every": 3, "micro_batch_size": micro} | more
    return noisy.NoisyConfig(out=str(out), optimizer=optimizer, schedule=schedule, **options)


def run_to_the_end(recipe, cfg):
    """Train; return the bits after each step, and the run."""
    bits = {}
    own = [*recipe.hooks(cfg), lambda run, info: bits.update({info.step: noisy.digest(run)})]
    run = start(replace(recipe, hooks=lambda cfg: own), cfg)
    train(run)
    run.finish()
    return bits, run


def barrier():
    if dist.is_initialized():
        dist.barrier()


def copy_checkpoint(source, step, target):
    """A run folder that was left right after the checkpoint of ``step``; rank 0 makes it."""
    if int(os.environ.get("RANK", 0)) == 0:
        shutil.rmtree(target, ignore_errors=True)
        (target / "checkpoints").mkdir(parents=True)
        name = f"checkpoints/step-{step:09d}"
        shutil.copytree(source / name, target / name)
        for kept in ("environment.json", "metrics.jsonl", "timing.jsonl"):
            shutil.copyfile(source / kept, target / kept)
    barrier()


def check_every_step(recipe, folder, case):
    """Go on from each step of a run and compare the bits of all steps that follow."""
    whole = folder / "whole"
    wanted, _ = run_to_the_end(recipe, config(whole, *case, checkpoint_every=1, keep_last=99))
    lines = (whole / "metrics.jsonl").read_text()
    for step in range(1, STEPS + 1):
        copy_checkpoint(whole, step, folder / "again")
        found, run = run_to_the_end(recipe, config(folder / "again", *case))
        assert found == {k: bits for k, bits in wanted.items() if k > step}, (case, step)
        assert run.metrics == run.state.best_metrics or run.state.best_step == STEPS
        assert (folder / "again/metrics.jsonl").read_text() == lines, (case, step)
        barrier()
    if int(os.environ.get("RANK", 0)) == 0:
        shutil.rmtree(whole)
    barrier()
    return STEPS


def check_cases(recipe, folder, sample, row):
    cases = CASES if ALL else draw(row).sample(CASES, sample)
    resumed = sum(check_every_step(recipe, folder, case) for case in cases)
    if int(os.environ.get("RANK", 0)) == 0:
        report(row, resumed, f"{len(cases)} configurations, every step: bits and metrics.jsonl equal")


def test_one_process_goes_on_from_every_step_with_the_same_bits(tmp_path):
    check_cases(noisy.recipe, tmp_path, 4, "E1 resume at every step, 1 process")


@pytest.mark.world_size(2, timeout=600 if ALL else 120)
def test_two_processes_go_on_from_every_step_with_the_same_bits(shared_path):
    check_cases(noisy.recipe, shared_path, 1, "E1 resume at every step, 2 processes (DDP)")


@pytest.mark.world_size(3, timeout=900 if ALL else 120)
def test_three_processes_go_on_from_every_step_with_the_same_bits(shared_path):
    check_cases(noisy.recipe, shared_path, 1, "E1 resume at every step, 3 processes (DDP)")


@pytest.mark.world_size(4, timeout=900 if ALL else 120)
def test_four_processes_go_on_from_every_step_with_the_same_bits(shared_path):
    check_cases(noisy.recipe, shared_path, 1, "E1 resume at every step, 4 processes (DDP)")
