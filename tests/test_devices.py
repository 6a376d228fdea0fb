"""The choices of device, number format, threads and copies; MPS and CUDA by what they are told, not by hardware."""

from dataclasses import replace

import psutil
import pytest
import tiny
import torch

from scaletrain import InputError, devices, start, train
from scaletrain.devices import (
    Launch,
    check_processes,
    choose_precision,
    choose_threads,
    copies_without_waiting,
    read_launch,
    set_up,
)
from scaletrain.opening import introduction


@pytest.mark.parametrize(
    ("asked", "device", "launcher", "has_bf16", "chosen"),
    [
        ("auto", "cpu", None, False, "fp32"),
        ("auto", "mps", None, False, "fp32"),
        ("auto", "cuda", None, True, "bf16"),
        ("auto", "cuda", None, False, "fp16"),
        ("auto", "cuda", "no", True, "bf16"),  # a plain accelerate launch exports "no"
        ("auto", "cuda", "fp16", True, "fp16"),
        ("auto", "cpu", "bf16", False, "bf16"),
        ("fp32", "cuda", "bf16", True, "fp32"),
        ("bf16", "cpu", None, False, "bf16"),
    ],
)
def test_the_number_format_is_what_was_asked_for_else_what_suits_the_device(asked, device, launcher, has_bf16, chosen):
    assert choose_precision(asked, device, launcher, has_bf16) == chosen


@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize(("asked", "launcher"), [("fp16", None), ("auto", "fp16")])
def test_fp16_needs_a_gpu(device, asked, launcher):
    with pytest.raises(InputError, match=f"fp16 does not train on {device}; use bf16 or fp32"):
        choose_precision(asked, device, launcher, False)


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_tf32_needs_an_nvidia_gpu(device):
    assert choose_precision("tf32", "cuda", None, True) == "tf32"
    with pytest.raises(InputError, match=f"tf32 is a format of NVIDIA GPUs, not of {device}; use bf16 or fp32"):
        choose_precision("tf32", device, None, False)


def test_mps_runs_one_process_and_waits_for_its_copies():
    with pytest.raises(InputError, match="MPS serves one"):
        check_processes("mps", Launch(world_size=2))
    check_processes("mps", Launch(world_size=1))
    check_processes("cuda", Launch(world_size=8))
    assert not copies_without_waiting("mps")  # they returned garbage: pytorch #139550
    assert not copies_without_waiting("cpu")
    assert copies_without_waiting("cuda")


def test_a_fake_apple_gpu_is_found_and_gets_one_process_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert devices.available_device() == "mps"
    assert choose_precision("auto", devices.available_device(), None, False) == "fp32"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes on an Apple GPU"):
        devices.set_up()


@pytest.mark.parametrize("said", ["true", "True", "1"])
def test_the_launcher_may_ask_for_the_cpu(said, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    assert devices.available_device() == "cpu"


@pytest.mark.parametrize(
    ("asked", "said", "launcher", "local", "threads"),
    [
        (3, "1", True, 2, 3),  # the user wins
        (None, None, False, 1, 8),
        (None, None, True, 2, 4),
        (None, "1", True, 2, 4),  # what launchers export counts as unsaid
        (None, "1", True, 16, 1),
        (None, "5", True, 2, None),  # somebody chose
        (None, "1", False, 1, None),
    ],
)
def test_threads_share_the_cores_unless_somebody_chose(asked, said, launcher, local, threads):
    env = {} if said is None else {"OMP_NUM_THREADS": said}
    assert choose_threads(asked, env, 8, Launch(local, local, launcher)) == threads


@pytest.mark.parametrize(
    ("env", "launch"),
    [
        ({}, Launch(1, 1, False)),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, Launch(8, 4, True)),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Launch(4, 2, False)),
        ({"SLURM_STEP_NUM_TASKS": "4"}, Launch(4, 4, False)),
        ({"WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "1"}, Launch(2, 2, True)),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, Launch(1, 1, True)),
    ],
)
def test_the_launcher_is_read_from_its_variables(env, launch):
    assert read_launch(env) == launch


@pytest.mark.world_size(2)
def test_a_process_knows_its_place_and_the_three_groups_are_apart(shared_path):
    here = start(tiny.recipe, tiny.TinyConfig(max_steps=1, out=str(shared_path / "run"), threads=None)).devices
    assert (here.world_size, here.local_world_size, here.device.type) == (2, 2, "cpu")
    assert here.control is not here.checkpoint
    assert {here.control, here.checkpoint}.isdisjoint({None, torch.distributed.group.WORLD})
    assert torch.get_num_threads() == here.threads == max(1, devices.cores() // 2)


def test_the_introduction_counts_the_machines():
    run = start(tiny.recipe, tiny.TinyConfig(max_steps=1))
    run.devices = replace(run.devices, world_size=3, processes=("7 node1", "8 node1", "7 node2"))
    assert "3 processes of 2 machines on cpu" in "\n".join(introduction(run, "tiny"))


@pytest.mark.world_size(2)
def test_validation_uses_rank_0s_buffers_on_every_rank(shared_path):
    def model(cfg, data):
        return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))

    from scaletrain import steps

    run = start(replace(tiny.recipe, model=model), tiny.TinyConfig(max_steps=5, out=str(shared_path / "run")))
    for _ in steps(run):
        pass
    mean = run.module[1].running_mean

    def on_both():
        everyone = [torch.zeros_like(mean) for _ in range(2)]
        torch.distributed.all_gather(everyone, mean.clone())
        return everyone

    assert not torch.equal(*on_both())  # each saw its own examples
    with run.evaluating():
        assert torch.equal(*on_both())


@pytest.mark.world_size(2)
def test_a_second_run_in_the_same_process_takes_the_same_groups(shared_path):
    first = set_up()
    before = psutil.Process().num_threads()
    for k in range(5):
        run = start(tiny.recipe, tiny.TinyConfig(max_steps=3, checkpoint_every=1, out=str(shared_path / str(k))))
        train(run)
        assert (run.devices.control, run.devices.checkpoint) == (first.control, first.checkpoint)
    assert psutil.Process().num_threads() <= before + 2
