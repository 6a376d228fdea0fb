"""The benchmarks of saving and resuming run, at tiny sizes, and what they prove on the way holds."""

import multiprocessing.forkserver
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from faultload import ALL
from launching import ROOT, launch

from benchmarks import checkpoint_stall, kill_and_resume, resume_position, ways_to_save
from benchmarks.children import GIB, in_child
from benchmarks.same_run import NEEDS, PROGRAMS, SCALETRAIN

TINY = 30_000


@pytest.fixture(scope="module", autouse=True)
def a_server_that_imports_meanwhile():
    """The last tests fork from a process that has imported every library; it does so while the others run."""
    multiprocessing.forkserver.ensure_running()


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Measure a way of saving, on one thread."""
    monkeypatch.setattr(ways_to_save, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(ways_to_save, "MATRICES", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def measure(name):
        folder = tmp_path / name
        folder.mkdir()
        return checkpoint_stall.measure(name, folder, TINY, seconds_before=0.01)

    yield measure
    torch.set_num_threads(threads)


def test_every_way_of_saving_is_measured_and_tabulated(measured):
    found = {name: [measured(name)] * 2 for name in ways_to_save.WAYS}
    rounds = checkpoint_stall.Measured(found, load=["0", "0"])
    lines = checkpoint_stall.report(rounds, TINY, "the command")
    assert [line.split(" | ")[0] for line in lines if "held, 2 of 2" in line] == [
        f"| {name}" for name in ways_to_save.WAYS if not name.startswith(ways_to_save.DISK)
    ]
    ours = found[ways_to_save.OURS][0]
    assert ours["durable"] > ours["stall"] > 0
    assert ours["extra_bytes"] >= 0
    assert sum("met: " in line or "MISSED: " in line for line in lines) == 4


def test_the_race_finds_a_way_that_saves_what_the_weights_became(measured, monkeypatch):
    class Reference(ways_to_save.MemoryCopy):
        def save(self, step):
            super().save(step)
            self.copies = self.state.tensors()  # not copies at all

    monkeypatch.setitem(ways_to_save.WAYS, "reference", Reference)
    assert not measured("reference")["race_held"]


def test_resuming_at_a_position_goes_on_the_same():
    for n, epoch, world_size in ((1000, 3, 2), (10**9, 0, 1)):
        assert resume_position.goes_on_the_same(n, epoch, world_size)


def test_the_proof_finds_another_continuation(monkeypatch):
    right = resume_position.scaletrain
    monkeypatch.setattr(  # resumes an epoch too late
        resume_position, "scaletrain", lambda n, epoch=0, **at: right(n, epoch + ("first" not in at), **at)
    )
    assert not resume_position.goes_on_the_same(1000, 0, 1)


def test_ways_of_resuming_at_a_position_are_measured():
    found = resume_position.resume("scaletrain", 10**9)
    assert found["seconds"] > 0
    assert 0 < found["allocated"] <= resume_position.LIMIT_BYTES
    assert resume_position.resume("torch", 1000)["same"]
    assert resume_position.resume("accelerate", 1000)["same"]


def test_what_does_not_fit_under_the_cap_is_said_to_need_more():
    found = in_child("benchmarks.resume_position", "--way", "torch", "--n", 10**9, cap_bytes=4 * GIB)
    assert found == {"failed": "out of memory at 4 GiB"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_is_ended_and_resumed_and_ours_is_exact(program, tmp_path):
    if program in NEEDS and not find_spec(NEEDS[program]):
        pytest.skip("bench extra not installed")
    case = {"save_every": 3, "stop_after": 5}
    found = kill_and_resume.interrupt(program, tmp_path, case, steps=9, pause_seconds=0)
    assert 5 <= found.resumed_from < 9
    assert kill_and_resume.row(program, found).startswith(f"| {program} | {'**yes**' if found.exact else 'no'} |")
    if program == SCALETRAIN:
        assert found.exact
    if program == "Accelerate, load_state alone":  # it begins the epoch again
        assert not found.exact
        assert not found.same_examples
        assert found.first == 6
        assert found.weights_apart > 0


def test_a_kill_while_saving_leaves_something_to_go_on_from(tmp_path):
    saving = kill_and_resume.WhileSaving(SCALETRAIN, tmp_path, hidden=16)
    assert saving.trial(0, 0.3) in {"earlier", "this", "missed"}


def test_a_torn_state_is_told_from_a_whole_one(tmp_path):
    saving = kill_and_resume.WhileSaving(SCALETRAIN, tmp_path, hidden=16)
    saving.whole.steps[0][5]["state"] = saving.whole.steps[0][10]["state"] = "another"
    assert saving.trial(0, 0.3) in {"torn", "missed"}


def run_benchmark(module, *options, timeout=240):
    out = Path("result.md")
    command = (sys.executable, "-m", module, *options, "--out", out.resolve())
    ended = launch(*command, timeout=timeout, PYTHONPATH=str(ROOT))
    assert ended.returncode == 0, ended.stderr
    return out.read_text()


def test_reading_is_measured_beside_other_loaders():
    said = run_benchmark("benchmarks.loading", "--rounds", "2", "--batches", "4")
    for name in ("bare X[indices]", "DataLoader(TensorDataset)", "nanoGPT's get_batch", "scaletrain"):
        assert f"| {name} |" in said


def test_validation_is_measured_beside_a_raw_loop_with_the_same_figures():
    said = run_benchmark("benchmarks.evaluating", "--rounds", "2", "--rows", "3001")
    assert "| scaletrain validate |" in said


def test_two_processes_send_the_same_bytes_in_one_micro_batch_and_in_eight():
    said = run_benchmark("benchmarks.two_processes", "--toy", "--rounds", "1", "--steps", "2")
    assert said.count("| scaletrain |") == 4
    assert "* met: CNN: 269,448 bytes per step in 1 micro-batch, 269,448 in 8, raw 269,448" in said
    assert "* met: MLP: " in said


@pytest.mark.skipif(not ALL, reason="takes minutes: make test-faults runs it")
def test_the_benchmarks_of_a_gpu_run_at_toy_size_and_say_what_is_left_out():
    said = run_benchmark("benchmarks.gpu", "--toy", "--rounds", "1", timeout=900)
    for part in ("G1: GPT-2", "G2: models", "G3: a CNN", "G4: what a checkpoint costs", "G5: compiling", "G6: memory"):
        assert f"# {part}" in said
    assert said.count("| scaletrain | ") == 7
    assert "| failed: " not in said
    assert "| left out: " not in said
    assert "met: frames compiled after the warm-up: scaletrain --compile 0" in said
    if not torch.cuda.is_available():
        assert "Left out: waits and kernels per step, which only CUDA has." in said
