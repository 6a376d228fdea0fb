"""Out of memory on one rank: smaller micro-batches on all, at the start by trying, later by starting again."""

import json
import re
import resource
import sys

import pytest
import torch
from killing import Ranks, nursery
from launching import TORCHRUN, launch, script
from noisy import HUNGRY

from scaletrain import InputError
from scaletrain.checkpoint.verify import newest_whole
from scaletrain.errors import OUT_OF_MEMORY
from scaletrain.memory import is_out_of_memory

WIDE = """
import os, resource
from pathlib import Path

WIDTH = 80_000  # a micro-batch of 512 has 160 MB a layer, and some four of them in the backward pass

def model(cfg, data):
    net = torch.nn.Sequential(torch.nn.Linear(5, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 3))
    if os.environ.get("RANK", "0") == os.environ["LIMITED"]:
        torch.ones(512, WIDTH).tanh().sum()  # what the first use of the library takes
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + int(os.environ["MIB"]) * 2**20,) * 2)
    return net

def data(cfg):
    return Data(tiny.table(n=2048), val=tiny.table(53, seed=1))

recipe = replace(tiny.recipe, model=model, data=data, hooks=lambda cfg: [lambda run, info: run.log({"each": run.mean(info.loss)})])
argv = ["--max-steps", "2", "--batch-size", os.environ["BATCH"], "--lr", "1e-4", "--out"]
"""  # noqa: E501


def each_loss(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["each"] for line in lines if "each" in line]


def launched_until_done(folder, command, **env):
    """Start it again while memory runs out later than where it is tried out, as a launch script would."""
    for _ in range(4):
        ended = launch(*command, **env)
        if ended.returncode == 0:
            return ended.stdout + ended.stderr
        assert json.loads((folder / "exit.json").read_text())["code"] == OUT_OF_MEMORY, ended.stderr
    raise AssertionError(ended.stderr)


def test_one_rank_with_little_memory_makes_all_divide_and_the_curve_stays(tmp_path):
    run = [*TORCHRUN, script(tmp_path, WIDE + "main(recipe, [*argv, 'run'])")]
    said = launched_until_done(tmp_path / "run", run, LIMITED="1", MIB="550", BATCH="1024")
    found = re.findall(r"micro-batch (\d+): \d+ do not fit into the memory of rank 1", said)
    found += re.findall(r"micro-batch (\d+): \d+ did not fit into memory before", said)
    smallest = min(map(int, found))
    assert smallest in (256, 128, 64)
    assert f"global batch 1024 = 2 x {smallest} x {512 // smallest}" in said
    plenty = [*TORCHRUN, script(tmp_path, WIDE + "main(recipe, [*argv, 'plenty'])")]
    assert launch(*plenty, LIMITED="none", BATCH="1024").returncode == 0
    assert each_loss(tmp_path / "run") == pytest.approx(each_loss(tmp_path / "plenty"), rel=1e-5)


def test_a_process_alone_divides_too(tmp_path):
    run = [sys.executable, script(tmp_path, WIDE + "main(recipe, [*argv, 'run'])")]
    said = launched_until_done(tmp_path / "run", run, LIMITED="0", MIB="550", BATCH="512")
    assert re.search(
        "micro-batch (256: 512 do not fit into the memory of rank 0|.* did not fit into memory before)", said
    )


def test_one_example_that_is_too_large_is_one_line(tmp_path):
    body = """
import resource

def loss(model, batch, cfg):
    return tiny.loss(model, batch, cfg) + torch.zeros(2**36).sum()

resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
main(replace(tiny.recipe, loss=loss), ["--max-steps", "3", "--batch-size", "4"])
"""
    ended = launch(sys.executable, script(tmp_path, body))
    assert ended.returncode == 2, ended.stderr
    assert "error: out of memory on rank 0 with a micro-batch of 1 example; --precision bf16" in ended.stderr


@pytest.fixture(scope="module")
def forks():
    with nursery() as process:
        yield process


@pytest.mark.parametrize(
    ("phase", "more"), [*((phase, ()) for phase in HUNGRY), *((phase, ("--fsdp", "--plain")) for phase in HUNGRY[:2])]
)
def test_out_of_memory_later_ends_the_run_and_the_next_start_has_smaller_micro_batches(phase, more, forks, tmp_path):
    argv = ["--max-steps", "8", "--checkpoint-every", "2", "--validate-every", "4", *more, "--out", tmp_path / "run"]
    ranks = Ranks(forks, 2, [*argv, "--hungry", phase], tmp_path / "log")
    codes = ranks.codes(timeout=40)
    assert codes[1] == OUT_OF_MEMORY, ranks.said()
    assert codes[0] != 0
    told = json.loads((tmp_path / "run/exit.json").read_text())
    assert told["code"] == OUT_OF_MEMORY
    assert re.search(
        rf"rank 1 ran out of memory in {phase} of step \d, with a micro-batch of 12 of the 24", told["reason"]
    )
    assert "it goes on with a micro-batch of 6 and the same global batch; --precision bf16" in told["reason"]
    assert ranks.said().count("ran out of memory") == 1
    assert newest_whole(tmp_path / "run/checkpoints")[0] is not None
    again = Ranks(forks, 2, argv, tmp_path / "log2")
    assert again.codes() == [0, 0], again.said()
    assert "micro-batch 6: 12 did not fit into memory before" in again.said()
    assert "global batch 24 = 2 x 6 x 2" in again.said()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("std::bad_alloc")],
)
def test_what_is_out_of_memory(error):
    assert is_out_of_memory(error)


def test_torchs_own_error_on_the_cpu_is_known_and_others_are_not():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert not any(map(is_out_of_memory, (RuntimeError("shapes"), InputError("memory"), ValueError("out of memory"))))
