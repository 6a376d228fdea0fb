"""Tasks of srun without a launcher become ranks, by SLURM's variables alone; and what little time a run is given."""

import json
import time
from dataclasses import replace

import pytest
import tiny
import torch

from scaletrain import InputError, main, slurm
from scaletrain.checkpoint.saver import Saver
from scaletrain.grace import seconds_left
from scaletrain.slurm import first_host, place, port, tasks_per_node

TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[007-010]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
RANK = {
    "RANK": "5",
    "WORLD_SIZE": "7",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "15709",
}


def test_a_task_of_srun_is_the_rank_that_slurm_numbers():
    assert place(TASK) == RANK
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    assert place(TASK | given) == RANK | given


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the script of a job
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        TASK | {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun in a task
        TASK | {"OMPI_COMM_WORLD_SIZE": "14"},  # mpirun, whose daemons srun has started
        TASK | {"PMI_SIZE": "14"},
    ],
)
def test_who_has_a_launcher_or_is_alone_is_left_as_it_is(env):
    assert place(env) == {}


@pytest.mark.parametrize(("gpus", "local_rank"), [(1, "0"), (8, "1")])
def test_a_task_that_sees_one_gpu_alone_takes_that(gpus, local_rank, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    assert place(TASK)["LOCAL_RANK"] == local_rank


def test_slurms_short_forms_are_read():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]
    assert first_host("gpu[007-010,12],cpu1") == "gpu007"
    assert first_host("cpu1,gpu[007-010]") == "cpu1"
    assert first_host("rack[3-4]node[01-16]") == "rack3node01"
    ports = [port(job, step) for job in (1, 2, 148) for step in (0, 1, 4294967291)]
    assert len(set(ports)) == len(ports)
    assert all(15000 <= number < 30000 for number in ports)


def test_a_first_node_that_nobody_knows_is_named(monkeypatch):
    def unknown(*_):
        raise OSError

    monkeypatch.setattr(slurm.socket, "getaddrinfo", unknown)
    monkeypatch.setattr(slurm.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="first node 'gpu007' has no known address; set MASTER_ADDR"):
        place(TASK | {"SLURM_STEP_NUM_NODES": "4"})


def test_what_is_left_is_the_grace_or_the_rest_of_the_jobs_time(monkeypatch):
    assert seconds_left() == float("inf")
    monkeypatch.setenv("SCALETRAIN_GRACE_SECONDS", "30")
    assert seconds_left() == 30
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 10))
    assert 8 < seconds_left() <= 10
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 10))
    assert seconds_left() == 0


@pytest.mark.parametrize(("grace", "warnings"), [("0.05", 1), ("60", 0)])
def test_saving_that_takes_longer_than_the_grace_is_told_once(grace, warnings, monkeypatch, capsys):
    monkeypatch.setenv("SCALETRAIN_GRACE_SECONDS", grace)
    work = Saver._work

    def slow_work(self, began, *rest):
        work(self, began - 0.1, *rest)

    monkeypatch.setattr(Saver, "_work", slow_work)
    main(tiny.recipe, ["--max-steps", "40", "--checkpoint-every", "2", "--out", "run"])
    said = capsys.readouterr().out
    assert said.count("s are given after a SIGTERM") == warnings


def test_an_end_before_there_is_a_run_is_left_where_the_launch_script_looks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCALETRAIN_OUT", "told")
    for _ in range(2):
        with pytest.raises(SystemExit, match="2"):
            main(tiny.recipe, ["--lr", "fast"])
    said = json.loads((tmp_path / "told/exit.json").read_text())
    assert said["code"] == 2
    assert said["reason"].startswith("error: --lr fast")
    main(replace(tiny.recipe), ["--max-steps", "2"])
    assert json.loads((tmp_path / "told/exit.json").read_text()) == {"code": 0, "reason": "done"}
