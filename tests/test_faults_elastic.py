"""Machines that are lost and come back, through launch/torchrun.sh: the same examples in each step, the same curve."""

import json
import signal
import subprocess
import time
from collections import defaultdict

import elastic
import pytest
from faultload import ALL, amount, cannot, draw, report
from killing import wait_for

from scaletrain import start
from scaletrain.loop import train

PLAIN = ("--plain", "--checkpoint-every", 3, "--validate-every", 40, "--log-every", 1)
SECONDS = 100
"""What a restart may take on two busy cores."""


@pytest.fixture
def home(tmp_path):
    (tmp_path / "record").mkdir()
    return tmp_path


def arguments(home, steps, *more):
    return ("--max-steps", steps, "--out", home / "run", "--record", home / "record", *more)


def never_stopped(folder, steps):
    """The losses of one process that nobody disturbs, and its metrics.jsonl."""
    (folder / "record").mkdir(parents=True)
    options = {"checkpoint_every": 3, "validate_every": 40, "log_every": 1, "plain": True}
    cfg = elastic.ElasticConfig(max_steps=steps, out=str(folder / "run"), record=str(folder / "record"), **options)
    run = start(elastic.recipe, cfg, step=elastic.step)
    train(run)
    run.finish()
    losses, worlds = elastic.curve(folder / "record", steps)
    assert worlds == {1}
    return {step: loss for step, (loss,) in losses.items()}, metrics(folder)


def metrics(home):
    return [json.loads(line) for line in (home / "run/metrics.jsonl").read_text().splitlines()]


def furthest_from(whole, home, steps):
    """Check all that a disturbed run did; return how far its losses are from those of a run never stopped."""
    losses, worlds = elastic.curve(home / "record", steps)
    wanted, lines = whole
    for found, one in zip(metrics(home), lines, strict=True):
        assert found == pytest.approx(one, rel=1e-9)
    return max(abs(loss - wanted[step]) / wanted[step] for step, all_of in losses.items() for loss in all_of), worlds


LOSSES = {"2 -> 1 -> 2": ("1:2", 2, 8), "3 -> 2 -> 3": ("2:3", 3, 6)}
"""NODES, how many machines at first, and how many are lost in all: each of them comes back before the next."""


@pytest.mark.parametrize("case", LOSSES if ALL else ["3 -> 2 -> 3"])
def test_the_others_go_on_without_a_machine_that_is_killed_and_with_it_when_it_is_back(case, home):
    nodes, many, kills = LOSSES[case]
    kills, random = amount(kills, 1), draw(f"T7 {case}")
    steps = 200 * kills
    options = arguments(home, steps, *PLAIN, "--pause", 0.15)
    with elastic.machines(home, *options, NODES=nodes, RESTARTS=3 * kills) as join:

        def wait_for_steps(world):
            before = elastic.steps_of(home / "record", world)
            wait_for(lambda: elastic.steps_of(home / "record", world) > before + 2, SECONDS)

        # the first hosts the meeting; ranks go by address, so that rank 0 moves with each that comes and goes
        *others, last = [join(ADDRESS=f"127.0.0.{many - k}") for k in range(many)]
        for _ in range(kills):
            wait_for_steps(many)
            time.sleep(random.uniform(0, 2))
            last.kill()
            wait_for_steps(many - 1)
            last = join(ADDRESS="127.0.0.1")
        wait_for_steps(many)
        (home / "record/go").touch()
        for agent in (*others, last):
            assert agent.code() == 0, agent.said()
    furthest, worlds = furthest_from(never_stopped(home / "whole", steps), home, steps)
    assert worlds == {many, many - 1}
    assert furthest < 1e-9
    curve = f"each step's examples those of the order; losses {furthest:.1e} apart at most (float64)"
    report(f"T7 SIGKILL of one of {many} machines and its return, {case}", kills, curve)


@pytest.mark.skipif(not ALL, reason="a minute; tests/test_leaving.py has its decisions")
def test_a_machine_that_is_told_to_leave_makes_room_and_all_told_to_leave_end_with_75(home):
    options = arguments(home, 400, *PLAIN, "--pause", 0.1)
    with elastic.machines(home, *options, NODES="1:2", RESTARTS=3) as join:
        first, second = join(), join()
        wait_for(lambda: elastic.steps_of(home / "record", 2) > 2, SECONDS)
        second.tell_to_leave()
        assert second.code() == 75, second.said()
        wait_for(lambda: elastic.steps_of(home / "record", 1) > 2, SECONDS)
        first.tell_to_leave()
        assert first.code() == 75, first.said()
        (home / "record/go").touch()
        assert join().code() == 0
    furthest, worlds = furthest_from(never_stopped(home / "whole", 400), home, 400)
    assert worlds == {1, 2}
    assert furthest < 1e-9


SAVING = ("--checkpoint-every", 2, "--validate-every", 10)


def bits_of(home):
    """The digests of each rank's steps; more than one where a step had other bits when it was done again."""
    bits = defaultdict(set)
    for line in (line for lines in elastic.recorded(home / "record").values() for line in lines):
        bits[line["rank"], line["step"]].add(line["digest"])
    return bits


def two_processes(home, kills, random):
    """Train to the end under --max-restarts=3 while single workers are killed."""
    (home / "record").mkdir(parents=True)
    with elastic.machines(home, *arguments(home, 60, *SAVING, "--pause", 0.1), PROCESSES=2, RESTARTS=3) as join:
        agent = join()
        for _ in range(kills):
            before = elastic.steps_of(home / "record", 2)
            wait_for(lambda before=before: elastic.steps_of(home / "record", 2) > before + 2, SECONDS)
            time.sleep(random.uniform(0, 0.5))
            random.choice(agent.workers()).kill()
        (home / "record/go").touch()
        assert agent.code() == 0, agent.said()


def test_processes_that_are_killed_are_started_again_and_end_with_the_bits_of_those_never_killed(tmp_path):
    kills, random = amount(6, 1), draw("T7 workers")
    whole = tmp_path / "whole"
    two_processes(whole, 0, random)
    for number in range(0, kills, 3):
        home = tmp_path / str(number)
        two_processes(home, min(3, kills), random)
        assert bits_of(home) == bits_of(whole)
        for name in ("model.safetensors", "metrics.jsonl", "result.json"):
            assert (home / "run" / name).read_bytes() == (whole / "run" / name).read_bytes(), name
    report("T7 SIGKILL of a worker under --max-restarts=3, 2 processes", kills, "all bits equal")


def test_processes_that_were_told_to_leave_are_not_trained_on_by_their_launcher(home):
    with elastic.machines(home, *arguments(home, 400, *PLAIN, "--pause", 0.1), PROCESSES=2, RESTARTS=1) as join:
        agent = join()
        wait_for(lambda: elastic.steps_of(home / "record", 2) > 2, SECONDS)
        agent.workers()[0].send_signal(signal.SIGTERM)
        assert agent.code() == 75, agent.said()
    assert len({line["start"] for found in elastic.recorded(home / "record").values() for line in found}) == 1


CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
"""Makes the command the first process of a process namespace, as in a pod: signals without a handler are ignored."""


def test_a_container_that_is_told_to_leave_at_any_time_ends_with_75_and_its_successor_goes_on(home):
    if subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode != 0:
        cannot("this machine lets nobody make a process namespace")
    signals, random, steps = amount(10, 1), draw("T6"), 600
    options = arguments(home, steps, *PLAIN, "--pause", 0.05)
    with elastic.machines(home, *options, PROCESSES=2, within=CONTAINER) as join:
        for number in range(signals):
            pod, before = join(), elastic.steps_of(home / "record", 2)
            if number % 3 == 0:  # else also while it starts
                wait_for(lambda before=before: elastic.steps_of(home / "record", 2) > before + 2, SECONDS)
            time.sleep(random.uniform(0, 6))
            pod.tell_to_leave()
            assert pod.code(30) == 75, pod.said()
        (home / "record/go").touch()
        assert join().code() == 0
    furthest, _ = furthest_from(never_stopped(home / "whole", steps), home, steps)
    assert furthest < 1e-9
    report("T6 SIGTERM to the first process of a container, 2 processes", signals,
           f"exit code 75, the successor goes on; losses {furthest:.1e} apart at most (float64)")  # fmt: skip
