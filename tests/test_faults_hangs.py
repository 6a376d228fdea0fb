"""A rank that fails, dies, is stopped or hangs: the run ends soon, and says which rank it was, and in what."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import noisy
import pytest
import tiny
import torch.distributed as dist
from faultload import ALL, amount, draw, report
from killing import Ranks, nursery, wait_for

from recipes import mlp
from scaletrain import InputError, start
from scaletrain.alike import check_alike, of_config
from scaletrain.devices import set_up
from scaletrain.watchdog import Heartbeat, verdict

LIMIT_SECONDS = 6
ARGV = ["--max-steps", 400, "--validate-every", 100, "--checkpoint-every", 100, "--stuck-minutes", LIMIT_SECONDS / 60]
ALWAYS = ("sleep", "SIGSTOP", "interpreter held", "segfault", "raise")
"""What ``make test`` tries, once each; ``make test-faults`` tries all of noisy.MISHAPS ten times."""


@pytest.fixture(scope="module")
def forks():
    with nursery() as process:
        yield process


def told(folder):
    return json.loads((folder / "exit.json").read_text())


def check(mishap, codes, said, folder):
    """Hold the end of a run in which ``mishap`` befell rank 1 in the forward pass of step 3."""
    if mishap in ("SIGINT", "SIGTERM"):
        assert codes == [{"SIGINT": 130, "SIGTERM": 75}[mishap]] * 2
        return
    assert 0 not in codes
    if mishap in ("raise", "async exception"):
        error = "ValueError" if mishap == "raise" else "ZeroDivisionError"
        assert error in said
        assert told(folder)["code"] == 1
        assert told(folder)["reason"].startswith(error)
        return
    assert codes[0] == 70
    assert told(folder)["code"] == 70
    reason = told(folder)["reason"]
    if mishap in ("SIGKILL", "abort", "segfault"):
        assert reason.startswith("rank 1 ended early, in or after step 2")
    elif mishap == "sleep":
        assert re.search(
            r"no progress for \d+ s: rank 1 is in forward of step 3 \(noisy.py, line \d+, in <lambda>\), and the",
            reason,
        )
        assert "befall" in (folder / "heartbeats/stacks-00001.txt").read_text()
    else:
        assert re.search(r"no progress for \d+ s: rank 1 was last heard of in .*step \d", reason)
    assert len(re.findall("^error: ", said, re.MULTILINE)) == 1
    if mishap in ("sleep", "SIGSTOP", "interpreter held"):
        assert "scaletrain/loop.py" in (folder / "heartbeats/stacks-00000.txt").read_text()


@pytest.mark.parametrize("mishap", list(noisy.MISHAPS) if ALL else ALWAYS)
def test_a_mishap_of_one_rank_ends_the_run_in_time_and_names_the_rank(mishap, forks, tmp_path):
    times = amount(10, 1)
    for k in range(times):
        folder = tmp_path / str(k)
        ranks = Ranks(forks, 2, [*ARGV, "--out", folder, "--stuck", mishap], tmp_path / f"log{k}")
        codes = ranks.codes(timeout=90)
        ended = time.time()
        took = ended - (folder / "befallen").stat().st_mtime
        assert took <= LIMIT_SECONDS + 10, ranks.said()
        check(mishap, codes, ranks.said(), folder)
    report(f"N1 {mishap} on one rank", times, f"ended within {LIMIT_SECONDS} s + 10 s, rank and phase named")


def test_a_process_alone_that_hangs_ends_and_leaves_its_stacks(forks, tmp_path):
    ranks = Ranks(forks, 1, [*ARGV, "--out", tmp_path / "run", "--stuck", "sleep"], tmp_path / "log")
    assert ranks.codes(timeout=90) == [70]
    assert re.search(
        r"the process is in forward of step 3 \(noisy.py, line \d+, in <lambda>\); the stacks",
        told(tmp_path / "run")["reason"],
    )


def test_a_rank_that_is_stopped_for_less_than_the_limit_changes_nothing(forks, tmp_path):
    argv = ["--max-steps", 60, "--validate-every", 30, "--stuck-minutes", 0.2, "--log-every", 1]
    whole = Ranks(forks, 2, [*argv, "--out", tmp_path / "whole"], tmp_path / "log")
    assert whole.codes() == [0, 0], whole.said()
    times, rng = amount(20, 1), draw("N2")
    for k in range(times):
        run = tmp_path / f"run{k}"
        ranks = Ranks(forks, 2, [*argv, "--out", run], tmp_path / f"log{k}")
        wait_for((run / "metrics.jsonl").exists)
        stopped = rng.randrange(2)
        ranks.kill(stopped, how=signal.SIGSTOP)
        time.sleep(3)  # what is tested is a pause of three seconds
        ranks.kill(stopped, how=signal.SIGCONT)
        assert ranks.codes() == [0, 0], ranks.said()
        for name in ("model.safetensors", "metrics.jsonl"):
            assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    report("N2 SIGSTOP for 3 s", times, "no false alarm, same bits")


def beats(*states):
    return [Heartbeat(rank, *state) for rank, state in enumerate(states)]


@pytest.mark.parametrize(
    ("every", "silent", "said"),
    [
        (beats((4, "backward"), (4, "forward")), [], "rank 1 is in forward of step 5, and the others wait for it"),
        (beats((4, "backward"), (4, "reading data")), [], "rank 1 is in reading data of step 5, and the others"),
        (beats((4, "waiting for the others"), (4, "after the step")), [], "rank 1 is in after step 4, and"),
        (beats((4, "validation"), (4, "validation")), [], "all ranks are in validation of step 4"),
        (beats((4, "backward"), (3, "optimizer"), (3, "optimizer")), [], "rank 1, 2 is in optimizer of step 4, and"),
        (beats((4, "backward"), (4, "forward")), [1], "rank 1 was last heard of in forward of step 5"),
        (
            beats((4, "forward"), (4, "forward", 0.0, "r.py, line 3, in f"))[1:],
            [],
            "the process is in forward of step 5 (r.py",
        ),
        (beats((4, "forward", 0.0, "", True), (4, "forward")), [], "rank 1 is in forward of step 5, and"),
        (beats((4, "forward")), [], "the process is in forward of step 5"),
    ],
)
def test_who_is_waited_for(every, silent, said):
    assert said in verdict(every, silent, 61.0)


# Ranks that differ


DIFFERENT = {
    "config": "the configuration differs between the ranks: rank 1 has --lr 0.5 instead of 0.01",
    "code": "the configuration differs between the ranks: rank 1 has code ",
    "model": "the model differs between the ranks: rank 1 has 0.weight float32 (16, 5) ",
    "data": "got different examples; data(cfg) must return the same on all",
}


def different(what, out, rank):
    """Return the recipe, config and source of a rank; rank 1 differs in ``what``."""
    odd = rank == 1
    cfg = tiny.TinyConfig(max_steps=2, out=str(out), lr=0.5 if odd and what == "config" else 0.01)
    recipe, source = tiny.recipe, Path(tiny.__file__)
    if odd and what == "code":
        source = Path(noisy.__file__)
    if odd and what == "model":

        def model(cfg, data):
            net = tiny.model(cfg, data)
            net[0].weight.data += 1e-3
            return net

        recipe = replace(recipe, model=model)
    if odd and what == "data":
        recipe = replace(recipe, data=lambda cfg: replace(tiny.data(cfg), train=tiny.table(seed=5)))
    return recipe, cfg, str(source)


@pytest.mark.world_size(2)
def test_ranks_may_differ_in_where_their_files_lie_and_what_their_machines_have(shared_path, tmp_path):
    (tmp_path / "table.csv").write_text("the same")
    options = {"data": str(tmp_path / "table.csv"), "threads": 1 + rank(), "out": str(tmp_path)}
    cfg = mlp.MLPConfig(**options)
    set_up()
    group = dist.new_group(backend="gloo")
    check_alike("configuration", of_config(cfg, None), group)
    with pytest.raises(InputError, match=r"rank 1 has --lr 1\.0 instead of 0\.5"):
        check_alike("configuration", of_config(replace(cfg, lr=0.5 + rank() / 2), None), group)


@pytest.mark.world_size(3)
def test_a_rank_with_another_config_code_model_or_data_is_refused_by_name(shared_path):
    for what, said in DIFFERENT.items():
        recipe, cfg, source = different(what, shared_path / what, rank())
        with pytest.raises(InputError) as refused:
            start(recipe, cfg, source=source)
        assert said in str(refused.value), (what, refused.value)
        assert "rank 1" in str(refused.value)
    if rank() == 0:
        report("N4 rank with another config, code, model or data", len(DIFFERENT), "refused at the start, rank named")


def rank():
    return int(os.environ["RANK"])
