"""Jobs on a real SLURM of two nodes (tests/slurm.py): whatever stops them, they go on and end as if nothing had.

Rows T1, T2, T3 and T5 of the fault matrix. ``make test-slurm`` runs these; ``make test`` leaves them out.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import noisy
import psutil
import pytest
from faultload import ALL, draw, report
from killing import wait_for
from launching import ROOT
from slurm import Cluster, missing

pytestmark = pytest.mark.skipif("SCALETRAIN_SLURM" not in os.environ, reason="make test-slurm starts a SLURM for these")

STEPS, GRACE = 800, 15
OPTIONS = (
    "--max-steps", STEPS, "--validate-every", 10, "--micro-batch-size", 6, "--log-every", 1, "--checkpoint-every", 7,
)  # fmt: skip
PACED = f"""
import sys, time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, {str(ROOT / "tests")!r})
import noisy
from scaletrain import main


def pace(run, info):
    if Path("slow").exists():  # long enough to be stopped many times
        time.sleep(0.2)


main(replace(noisy.recipe, hooks=lambda cfg: [*noisy.hooks(cfg), pace]))
"""


@pytest.fixture(scope="module")
def cluster():
    if why := missing():
        pytest.skip(why)
    with Cluster() as cluster:
        yield cluster
        wait_for(lambda: not cluster.left(), 30)


class Checkout:
    """A folder that looks like the repository, with a recipe of its own, and what is done there on a cluster."""

    def __init__(self, folder, cluster):
        self.folder, self.cluster, self.record = folder, cluster, folder / "record"
        self.record.mkdir(parents=True)
        for name in ("Makefile", "launch", "accelerate_configs", "recipes"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "paced.py").write_text(PACED)
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        quiet = {
            "PYTHONWARNINGS": "ignore",
            "WANDB_MODE": "offline",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        no_outer_make = {"MAKEFLAGS": "", "MAKELEVEL": ""}
        self.env = {"GRACE": str(GRACE), "SBATCH": "--time=10", **quiet, **no_outer_make}

    def make_train(self, *variables, check=True):
        command = ("make", "-s", "-C", self.folder, "-o", ".venv/.installed", "train", "CLUSTER=slurm", *variables)
        return self.cluster.user(*command, check=check, **self.env)

    def submit(self, recipe, *options):
        """Queue a job of two nodes with one CPU process each; return its number."""
        words = " ".join(map(str, options))
        said = self.make_train(f"RECIPE={recipe}", "NODES=2", "GPUS=0", "PROCESSES=1", f"ARGS={words}").stdout
        return int(said.removeprefix("job ").partition(";")[0])

    def log(self, job, recipe="paced"):
        path = self.folder / f"runs/{recipe}/slurm-{job}.log"
        return path.read_text() if path.exists() else ""

    def wait_for_state(self, job, *states, timeout=120):
        try:
            wait_for(lambda: self.cluster.job(job)["JobState"] in states, timeout)
        except AssertionError:
            raise AssertionError(f"{self.cluster.job(job)}\n{self.log(job)[-6000:]}") from None

    def srun(self, *words, launcher=(sys.executable,), **env):
        """Start the recipe with srun, by Python alone or a launcher, on two nodes; return srun's process."""
        command = ["srun", "--nodes=2", "--ntasks=2", *launcher, "paced.py", *words]
        environment = os.environ | self.env | self.cluster.env | env
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([str(w) for w in command], cwd=self.folder, env=environment, **pipes)

    def running(self, *words):
        """The processes of jobs whose command line begins so; what ends meanwhile is left out."""
        found = []
        for process in self.cluster.left():
            with suppress(psutil.Error):
                if [Path(word).name for word in process.cmdline()[: len(words)]] == list(words):
                    found.append(process)
        return found

    def ranks(self):
        """The processes of the recipe by rank; those that have begun."""
        return {int(p.environ()["SLURM_PROCID"]): p for p in self.running(Path(sys.executable).name, "paced.py")}

    def steps(self):
        return sum(path.read_bytes().count(b"\n") for path in self.record.glob("rank*.jsonl"))

    def wait_for_steps(self, more, job=None):
        until = self.steps() + more
        try:
            wait_for(lambda: self.steps() >= until, 120)
        except AssertionError:
            said = f"{self.cluster.job(job)}\n{self.log(job)[-6000:]}" if job else "no steps"
            raise AssertionError(said) from None

    def slow(self, slow=True):
        (self.folder / "slow").touch() if slow else (self.folder / "slow").unlink()


@pytest.fixture
def checkout(cluster, tmp_path):
    yield Checkout(tmp_path / "checkout", cluster)
    cluster.user("scancel", "--user=root")  # of a test that failed in its midst
    wait_for(lambda: not cluster.left(), 60)


@pytest.fixture(scope="module")
def never_stopped(cluster, tmp_path_factory):
    """What a run leaves that nobody disturbs: its folder and its record."""
    checkout = Checkout(tmp_path_factory.mktemp("whole") / "checkout", cluster)
    process = checkout.srun(*OPTIONS, "--out", "run", "--record", "record")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "2 processes on cpu" in said
    return checkout.folder / "run", noisy.recorded(checkout.record)


def assert_same(found, checkout, never_stopped):
    whole, record = never_stopped
    assert noisy.recorded(checkout.record) == record
    for name in ("metrics.jsonl", "model.safetensors", "result.json"):
        assert (found / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((found / "exit.json").read_text()) == {"code": 0, "reason": "done"}


def by_time_limit(cluster, job):
    """Let the job's time run out: SLURM looks twice a minute, so one must be left for the signal."""
    hours, minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":"))
    limit = -(-(3600 * hours + 60 * minutes + seconds + 50) // 60)
    cluster.user("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")


def starts_now(cluster, job):
    """Whether a job that was queued again runs; SLURM lets two minutes pass, and here it need not."""
    known = cluster.job(job)
    if known["Reason"] == "BeginTime":
        cluster.user("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=10", check=False)
    return known["JobState"] == "RUNNING"


INTERRUPTIONS = {
    "time limit": by_time_limit,
    "scontrol requeue": lambda cluster, job: cluster.user("scontrol", "requeue", job),
    "scancel --signal=TERM": lambda cluster, job: cluster.user("scancel", "--signal=TERM", job),
    "preemption": lambda cluster, job: cluster.user("srun", "-p", "urgent", "-N2", "--exclusive", "true", timeout=120),
    "while starting": lambda cluster, job: cluster.user("scancel", "--signal=TERM", job),
}
ALL_OF_THEM = [*INTERRUPTIONS, *INTERRUPTIONS, "scontrol requeue", "preemption", "scancel --signal=TERM"]


def test_a_job_goes_on_through_requeues_and_ends_as_one_never_stopped(cluster, checkout, never_stopped):
    checkout.slow()
    job = checkout.submit("paced.py", *OPTIONS, "--record", "record", "--track", "wandb")
    run = checkout.folder / f"runs/paced/slurm-{job}"
    interruptions = ALL_OF_THEM if ALL else list(INTERRUPTIONS)
    for number, how in enumerate(interruptions):
        if how == "while starting":
            wait_for(lambda: checkout.running("python", "accelerate"), 60)
        else:
            checkout.wait_for_steps(4, job)
        began = time.monotonic()
        INTERRUPTIONS[how](cluster, job)
        checkout.wait_for_state(job, "PENDING")
        print(f"{how}: queued again after {time.monotonic() - began:.0f} s")
        wait_for(lambda: not cluster.left(), 30)
        assert int(cluster.job(job)["Restarts"]) == number + 1
        if how in ("time limit", "scancel --signal=TERM"):
            assert json.loads((run / "exit.json").read_text())["code"] == 75, checkout.log(job)
        time.sleep(5)  # SLURM itself waits: what it still hears of this attempt it would take for the next one's end
        try:
            wait_for(lambda: starts_now(cluster, job), 150)
        except AssertionError:
            told = cluster.user("sinfo", "--long").stdout + (cluster.folder / "slurmctld.log").read_text()[-3000:]
            raise AssertionError(f"{cluster.job(job)}\n{told}") from None
        print(f"{how}: running again after {time.monotonic() - began:.0f} s")
    checkout.wait_for_steps(4, job)
    checkout.slow(False)
    checkout.wait_for_state(job, "COMPLETED", "FAILED")
    after, said = cluster.job(job), checkout.log(job)
    assert (after["JobState"], after["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert int(after["Restarts"]) == len(interruptions)
    assert said.count("going on after step") == len(interruptions) - interruptions.count("while starting")
    assert_same(run, checkout, never_stopped)
    assert sorted(p.name for p in run.parent.iterdir()) == [run.name, f"{run.name}.log"]
    ids = {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}
    assert len(ids) == 1
    assert json.loads((run / "tracker.json").read_text())["run"] == f"wandb:{ids.pop()}"
    report("T5 requeues of a real SLURM job, 2 nodes", len(interruptions),
           "one run folder, one wandb run, all bits and metrics.jsonl equal, COMPLETED")  # fmt: skip


WAYS = ("one rank", "all", "twice", "SIGUSR1", "validating", "saving")


def test_under_srun_alone_any_signal_at_any_time_is_heard_and_the_run_goes_on_exactly(checkout, never_stopped):
    random, signals = draw("T1 srun"), 3 * WAYS if ALL else WAYS
    checkout.slow()
    for way in signals:
        moment = ("--moment", way) if way in noisy.MOMENTS else ()
        process = checkout.srun(*OPTIONS, "--out", "run", "--record", "record", *moment)
        if not moment:
            checkout.wait_for_steps(2)
            time.sleep(random.uniform(0, 0.3))
            ask(checkout, way, random)
        said, _ = process.communicate(timeout=60)
        code = json.loads((checkout.folder / "run/exit.json").read_text())["code"] if way != "SIGUSR1" else None
        assert (code, process.returncode) == ((None, 137) if way == "SIGUSR1" else (75, 75)), f"{way}\n{said}"
    checkout.slow(False)
    process = checkout.srun(*OPTIONS, "--out", "run", "--record", "record")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert_same(checkout.folder / "run", checkout, never_stopped)
    report("T1, T2, T3 signals under srun alone, 2 nodes", len(signals), "the same step on both ranks, all bits equal")


def ask(checkout, way, random):
    """Ask the ranks to leave, or to save, after which they are killed."""
    ranks = checkout.ranks()
    assert set(ranks) == {0, 1}
    if way == "one rank":
        ranks[random.randrange(2)].send_signal(signal.SIGTERM)
    elif way == "all":
        checkout.cluster.user("scancel", "--signal=TERM", ranks[0].environ()["SLURM_JOB_ID"])
    elif way == "twice":
        for number in (0, 1, 0, 1):
            ranks[number].send_signal(signal.SIGTERM)
    else:
        saved = len(list((checkout.folder / "run/checkpoints").glob("step-*")))
        newest = checkout.folder / "run/checkpoints"
        before = {path.name for path in newest.glob("step-*")}
        ranks[random.randrange(2)].send_signal(signal.SIGUSR1)
        wait_for(lambda: {path.name for path in newest.glob("step-*")} - before, 30)
        for process in ranks.values():
            process.kill()
        assert saved


def test_where_slurm_signals_the_task_alone_the_recipe_hears_it_too(checkout):
    checkout.slow()
    launcher = ("launch/slurm_node.sh", "accelerate_configs/cpu_2proc.yaml")
    options = (*OPTIONS, "--checkpoint-every", STEPS, "--out", "run", "--record", "record")
    process = checkout.srun(*options, launcher=launcher, FORWARD="yes", PROCESSES="1")
    checkout.wait_for_steps(2)
    tasks = [p for p in checkout.running("bash", "slurm_node.sh") if p.parent().name() == "slurmstepd"]
    assert len(tasks) == 2
    tasks[0].send_signal(signal.SIGUSR1)  # as with proctrack/cgroup
    wait_for(lambda: list((checkout.folder / "run/checkpoints").glob("step-*")), 30)
    for task in tasks:
        task.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert json.loads((checkout.folder / "run/exit.json").read_text())["code"] == 75
    assert max(noisy.recorded(checkout.record))[1] > 2


def test_a_job_that_fails_says_so_with_the_runs_own_code_and_is_not_queued_again(cluster, checkout):
    job = checkout.submit("mlp", "--lr", "fast")
    checkout.wait_for_state(job, "FAILED", "COMPLETED", "PENDING" if cluster.job(job)["Restarts"] != "0" else "FAILED")
    after = cluster.job(job)
    assert (after["JobState"], after["ExitCode"], after["Restarts"]) == ("FAILED", "2:0", "0")
    said = checkout.log(job, "mlp").splitlines()
    assert sum(line.startswith("error: ") for line in said) == 1
    assert said[-1].startswith("slurm: failed with 2: error: --lr fast")


def test_what_an_earlier_attempt_left_is_not_taken_for_this_ones(cluster, checkout):
    (checkout.folder / "run").mkdir()
    (checkout.folder / "run/exit.json").write_text('{\n  "code": 75,\n  "reason": "told to leave: saved"\n}\n')
    (checkout.folder / "paced.py").write_text("import sys\n\nsys.exit(9)\n")
    job = checkout.submit("paced.py", "--out", "run")
    checkout.wait_for_state(job, "FAILED", "COMPLETED")
    assert (cluster.job(job)["ExitCode"], cluster.job(job)["Restarts"]) == ("1:0", "0")
    assert checkout.log(job).splitlines()[-1] == "slurm: failed with 1: the launcher ended with 1"


def test_a_cancelled_job_does_not_rise_again(cluster, checkout):
    checkout.slow()
    job = checkout.submit("paced.py", *OPTIONS, "--record", "record")
    checkout.wait_for_steps(2, job)
    cluster.user("scancel", job)
    checkout.wait_for_state(job, "CANCELLED")
    wait_for(lambda: not cluster.left(), 60)
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("CANCELLED", "0")


MISTAKES = {
    "GPUS not given": (("RECIPE=mlp",), "GPUS is not given; say how many each node has, or GPUS=0 PROCESSES=4 "),
    "GPUS no number": (("RECIPE=mlp", "GPUS=all"), "GPUS=all is not a number"),
    "no processes": (("RECIPE=mlp", "GPUS=0"), "GPUS=0 needs PROCESSES, the number of processes on each node"),
    "unknown recipe": (("RECIPE=cn", "GPUS=8"), "no recipe 'cn'; there are: binary cnn "),
    "unknown config": (("RECIPE=mlp", "GPUS=8", "CONFIG=dpp"), "no config 'dpp'; there are: cpu cpu_2proc ddp "),
    "one process": (
        ("RECIPE=mlp", "GPUS=8", "CONFIG=single_gpu"),
        "CONFIG=single_gpu is for a single process; use ddp",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_queued(mistake, cluster, checkout):
    variables, line = MISTAKES[mistake]
    ended = checkout.make_train(*variables, check=False)
    assert ended.returncode == 2
    first, rest = ended.stderr.split("\n", 1)
    assert first.startswith(f"error: {line}")
    assert rest.startswith("make: ***")
    assert rest.count("\n") == 1


@pytest.mark.parametrize("rank", ["0", "'$SLURM_NODEID'"])
def test_a_node_that_takes_itself_for_another_is_refused(rank, cluster, checkout):
    command = f"SLURM_NODEID={rank} exec launch/slurm_node.sh accelerate_configs/cpu_2proc.yaml recipes/mlp.py"
    srun = ("srun", "--nodes=2", "--ntasks=2", "--wait=3", f"--chdir={checkout.folder}")
    ended = cluster.user(*srun, "bash", "-c", command, check=False, **checkout.env, PROCESSES="1")
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "n2: task 1: Exited with exit code 2" in ended.stderr
    assert len(lines) == (1 if rank == "0" else 2)
    told = rank.strip("'")
    for line in lines:
        assert f"was told that SLURM_NODEID is '{told}', so several nodes would be the first" in line
