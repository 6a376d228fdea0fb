"""Going on is not an event: from every step, on any number of processes, with every optimizer and schedule."""

import itertools
import json
import os
import shutil
from dataclasses import replace

import noisy
import pytest
import torch
import torch.distributed as dist
from faultload import ALL, amount, draw, report
from killing import Ranks, nursery

from scaletrain import build, start, train
from scaletrain.checkpoint.format import STATE
from scaletrain.checkpoint.load import load_new
from scaletrain.checkpoint.tensors import is_sharded
from scaletrain.checkpoint.verify import newest_whole, open_checkpoint
from scaletrain.optimizer_state import saved_state

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
    barrier()  # rank 0 has closed its files
    return bits, run


def barrier():
    if dist.is_initialized():
        dist.barrier()


def as_left_after(step, source, target):
    """Make a run folder as a process killed after ``step`` leaves it; rank 0 does."""
    if int(os.environ.get("RANK", 0)) == 0:
        shutil.rmtree(target, ignore_errors=True)
        later = [f"step-{k:09d}" for k in range(step + 1, STEPS + 1)]
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*later, "exit.json", "result.json"))
    barrier()


def check_every_step(recipe, folder, case, steps=range(1, STEPS + 1), **more):
    """Go on from each step of a run, or from ``steps``, and compare the bits of all steps that follow."""
    whole = folder / "whole"
    wanted, _ = run_to_the_end(recipe, config(whole, *case, checkpoint_every=1, keep_last=99, **more))
    lines = (whole / "metrics.jsonl").read_text()
    for step in steps:
        as_left_after(step, whole, folder / "again")
        found, run = run_to_the_end(recipe, config(folder / "again", *case, **more))
        assert found == {k: bits for k, bits in wanted.items() if k > step}, (case, step)
        assert run.metrics == run.state.best_metrics, (case, step)
        assert (folder / "again/metrics.jsonl").read_text() == lines, (case, step)
        barrier()
    if int(os.environ.get("RANK", 0)) == 0:
        shutil.rmtree(whole)
    barrier()
    return len(steps)


def ranks_of(world_size, timeout):
    return pytest.mark.world_size(world_size, timeout=timeout if ALL else 120)


WORLDS = {
    "DDP on 3 processes": (ranks_of(3, 1500), 30, {}),
    "FSDP2 on 2 processes": (ranks_of(2, 1500), 10, {"plain": True, "fsdp": True}),
    "one process": ((), 30, {}),
    "DDP on 2 processes": (ranks_of(2, 1500), 30, {}),
    "DDP on 4 processes": (ranks_of(4, 1500), 30, {}),
    "FSDP2 on 4 processes": (ranks_of(4, 1500), 10, {"plain": True, "fsdp": True}),
}
"""What wraps the model, how many configurations are tried in all, and with what options."""


@pytest.fixture
def sharding(monkeypatch):
    monkeypatch.setattr(build, "assemble", build.assemble)  # put back what the next line replaces
    for name in noisy.SHARDED:
        monkeypatch.delenv(name, raising=False)
    noisy.shard_where_asked()


@pytest.mark.parametrize("world", [pytest.param(w, marks=WORLDS[w][0]) for w in (WORLDS if ALL else [*WORLDS][:3])])
def test_from_every_step_a_run_goes_on_with_the_same_bits(world, shared_path, sharding):
    row = f"E1 resume at every step, {world}"
    cases = draw(row).sample(CASES, amount(WORLDS[world][1], 1))
    resumed = sum(check_every_step(noisy.recipe, shared_path, case, **WORLDS[world][2]) for case in cases)
    if int(os.environ.get("RANK", 0)) == 0:
        report(row, resumed, f"{len(cases)} configurations, every step: bits and metrics.jsonl equal")


def full(tensor):
    return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()


@pytest.mark.world_size(4 if ALL else 2)
def test_what_fsdp2_wrote_ddp_reads_and_the_other_way_round_to_the_last_bit(shared_path, sharding):
    for wrote, reads in ((True, False), (False, True), (True, True)):
        out = shared_path / f"{wrote}-{reads}"
        run_to_the_end(noisy.recipe, config(out, plain=True, fsdp=wrote))
        whole = open_checkpoint(out / f"checkpoints/step-{STEPS:09d}")
        run = start(noisy.recipe, config(out, plain=True, fsdp=reads, max_steps=2 * STEPS))
        assert run.state.step == STEPS
        for name, tensor in load_new(whole, "model").items():
            assert torch.equal(full(run.module.state_dict()[name]), tensor), name
        kept = saved_state(run.module, run.optimizer, run.built)[0]
        for name, tensor in load_new(whole, "optimizer").items():
            assert torch.equal(full(kept[name]), tensor), name
        train(run)
    if dist.get_rank() == 0:
        report(
            f"E4 DDP to FSDP2 and back, {dist.get_world_size()} processes",
            3,
            "weights and optimizer bit-equal right after loading",
        )


CHAINS = {
    "DDP 2 -> FSDP2 4 -> FSDP2 3 -> DDP 1": [(2, 7, ()), (4, 11, ("--fsdp",)), (3, 16, ("--fsdp",)), (1, 0, ())],
    "4 -> 2 -> 1 -> 4": [(4, 6, ()), (2, 12, ()), (1, 15, ()), (4, 0, ())],
    "1 -> 3 -> 2 with accumulation": [
        (1, 5, ()),
        (3, 13, ("--micro-batch-size", 3)),
        (2, 0, ("--micro-batch-size", 5)),
    ],
}


@pytest.fixture(scope="module")
def ranks():
    with nursery() as process:
        yield lambda *args: Ranks(process, *args)


@pytest.mark.parametrize("chain", CHAINS if ALL else [*CHAINS][:1])
def test_another_number_of_processes_sees_the_same_examples_and_the_same_curve(chain, ranks, tmp_path):
    argv = ["--max-steps", 22, "--validate-every", 5, "--plain"]
    for folder in ("whole", "chain"):
        (tmp_path / folder).mkdir()
    wanted = tmp_path / "whole"
    assert ranks(1, [*argv, "--out", wanted / "run", "--record", wanted], wanted / "log").codes() == [0]
    found = tmp_path / "chain"
    loaded = 0
    for world_size, until, more in CHAINS[chain]:
        saved, _ = newest_whole(found / "run/checkpoints")
        leaving = ["--leave-at", until] if until else []
        trial = ranks(world_size, [*argv, "--out", found / "run", "--record", found, *more, *leaving], found / "log")
        assert trial.codes() == [75 if until else 0] * world_size, trial.said()
        if saved is not None:
            told = (found / f"loaded-{saved.step}").read_text().splitlines()
            there = noisy.of_tensors(load_new(saved, "model"), load_new(saved, "optimizer"))
            assert told == [f"{world_size} {there}"] * world_size
            loaded += 1
    assert loaded == len(CHAINS[chain]) - 1
    whole, pieces = noisy.losses(wanted), noisy.losses(found)
    assert pieces.keys() == whole.keys() == set(range(1, 23))
    furthest = max(abs(pieces[step] - loss) / loss for step, loss in whole.items())
    assert furthest < 1e-9
    lines = [[json.loads(line) for line in (f / "run/metrics.jsonl").read_text().splitlines()] for f in (wanted, found)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for one, other in zip(*lines, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    curve = f"same curve, furthest {furthest:.1e} apart (float64)"
    report(f"E3, E4 processes {chain}", loaded, f"weights and optimizer bit-equal right after loading; {curve}")


CHANGED = ("environment", "config", "total_steps")
"""What the second start says otherwise: it is told to go further."""
AGAIN = {name: WORLDS[name] for name in ("DDP on 3 processes", "FSDP2 on 2 processes", "one process")}


@pytest.mark.parametrize("world", [pytest.param(w, marks=WORLDS[w][0]) for w in AGAIN])
def test_saving_again_without_training_writes_the_same_bytes(world, shared_path, sharding):
    cases = draw(f"E2 {world}").sample(CASES, amount(7, 1))
    for number, case in enumerate(cases):
        out = shared_path / f"{number}"
        first, run = run_to_the_end(noisy.recipe, config(out, *case, **WORLDS[world][2]))
        for times in range(2):  # two resumes in a row
            run = start(noisy.recipe, config(out, *case, **WORLDS[world][2], max_steps=2 * STEPS))
            run.saver.saved_step = -1
            run.saver.folder = run.saver._commit.folder = shared_path / f"again {number} {times}"
            run.save()
            run.saver.wait()
        saved = [open_checkpoint(f / f"step-{STEPS:09d}") for f in (out / "checkpoints", run.saver.folder)]
        one, other = [{n: f for n, f in c.manifest.files.items() if n != STATE} for c in saved]
        assert one == other, case
        one, other = [{k: v for k, v in c.state.items() if k not in CHANGED} for c in saved]
        assert one == other, case
        assert len(first) == STEPS
    if int(os.environ.get("RANK", 0)) == 0:
        report(
            f"E2 resumed twice and saved again, {world}", len(cases), "the same bytes but for options and environment"
        )
