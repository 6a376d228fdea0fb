"""Kill it anywhere, any time: the run goes on from its newest checkpoint and ends with the bits of one never killed."""

import json
import signal
import time

import noisy
import pytest
from faultload import ALL, amount, draw, report
from killing import nursery, wait_for

STEPS = 120 if ALL else 30
GRACE_SECONDS = 30
"""What torchrun gives its processes between SIGTERM and SIGKILL."""
CRASH_LOOP = (500, 50) if ALL else (60, 3)
"""Steps of the run and how often it is killed."""


def argv(steps):
    return ["--max-steps", steps, "--validate-every", 10, "--micro-batch-size", 6, "--log-every", 1]


@pytest.fixture(scope="module")
def ranks():
    """Start ranks: ``ranks(world_size, argv, log)``."""
    from killing import Ranks

    with nursery() as process:
        yield lambda *args: Ranks(process, *args)


@pytest.fixture(scope="module")
def never_killed(ranks, tmp_path_factory):
    """The record of a run that nobody disturbs, by number of processes and steps."""
    known = {}

    def record_of(world_size, steps):
        if (world_size, steps) not in known:
            folder = tmp_path_factory.mktemp(f"whole{world_size}")
            trial = ranks(world_size, [*argv(steps), "--out", folder / "run", "--record", folder], folder / "log")
            assert trial.codes() == [0] * world_size
            known[world_size, steps] = noisy.recorded(folder), folder
        return known[world_size, steps]

    return record_of


class Trials:
    """A run that is disturbed again and again, and begun anew in another folder whenever it is done."""

    def __init__(self, ranks, never_killed, folder):
        self.ranks, self.never_killed, self.folder = ranks, never_killed, folder
        self.max_steps, self.number, self.runs, self.resumed = STEPS, 0, 0, 0

    def start(self, world_size, *more):
        """Start the ranks of the next trial."""
        if is_done(self.home(world_size)):
            self.runs += 1
        home = self.home(world_size)
        home.mkdir(exist_ok=True)
        self.committed, self.number = committed(home), self.number + 1
        saving = ["--checkpoint-every", 1, "--out", home / "run", "--record", home, *more]
        self.trial = self.ranks(world_size, argv(self.max_steps) + saving, home / f"log{self.number:03d}")
        return self.trial

    def home(self, world_size):
        return self.folder / f"{world_size}-{self.runs}"

    def steps(self, world_size):
        """How many steps have been recorded so far in this folder, on all ranks together."""
        return sum(path.read_bytes().count(b"\n") for path in self.home(world_size).glob("rank*.jsonl"))

    def wait_for_steps(self, world_size, steps):
        """Wait until so many steps are recorded, or the run is done: it may have had no more than its end to do."""
        wait_for(lambda: self.steps(world_size) >= steps or is_done(self.home(world_size)))

    def check(self, world_size):
        """What went on did so at the newest committed step or later, and no step ever had other bits."""
        home = self.home(world_size)
        for line in self.trial.said().splitlines():
            assert "not whole" not in line, line
            if line.startswith("going on after step"):
                self.resumed += 1
                assert int(line.split()[4]) >= self.committed, (line, self.committed)
            if self.committed > 0:
                assert "starts over" not in line, line
        whole, _ = self.never_killed(world_size, self.max_steps)
        for step, bits in noisy.recorded(home).items():
            assert bits == whole[step], f"{step}: {bits} instead of {whole[step]}"

    def finish(self, world_size):
        """Let the run come to its end and compare all it leaves with the run never killed."""
        assert self.start(world_size).codes() == [0] * world_size, self.trial.said()
        self.check(world_size)
        _, whole = self.never_killed(world_size, self.max_steps)
        lines = (self.home(world_size) / "run/metrics.jsonl").read_text()
        assert lines == (whole / "run/metrics.jsonl").read_text()
        for name in ("result.json", "model.safetensors"):
            assert (self.home(world_size) / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()


def is_done(home):
    outcome = home / "run/exit.json"
    try:
        return json.loads(outcome.read_text())["code"] == 0
    except FileNotFoundError:
        return False


def committed(home):
    """The newest step that a rank has said was committed."""
    path = home / "run" / "committed"
    return max((int(line) for line in path.read_text().split()), default=0) if path.exists() else 0


@pytest.fixture
def trials(ranks, never_killed, tmp_path):
    return Trials(ranks, never_killed, tmp_path)


def test_a_group_killed_at_any_time_while_saving_loses_nothing_committed(trials):
    kills, random = amount(200, 4), draw("C1")
    for _ in range(kills):
        trial, before = trials.start(2), trials.steps(2)
        trials.wait_for_steps(2, before + 1)
        time.sleep(random.uniform(0, 0.7))
        trial.kill()
        assert set(trial.codes()) <= {-9, 0}
        trials.check(2)
    trials.finish(2)
    assert trials.resumed >= kills // 2, "it was hardly ever killed after a save"
    report("C1 SIGKILL of the group while saving at each step, 2 processes", kills,
           f"went on {trials.resumed} times, all bits equal, 0 committed steps lost")  # fmt: skip


def test_a_rank_killed_at_any_time_takes_the_others_down_by_name_and_loses_nothing(trials):
    kills, random, ended = amount(200, 2), draw("C2"), 0
    for _ in range(kills):
        trial, before, victim = trials.start(2), trials.steps(2), random.randrange(2)
        trials.wait_for_steps(2, before + 1)
        time.sleep(random.uniform(0, 0.5))
        trial.kill(victim)
        codes = trial.codes(timeout=10)
        trials.check(2)
        if is_done(trials.home(2)):  # killed when all was written
            ended += 1
        else:
            assert codes[victim] == -9
            assert codes[1 - victim] == 70, (codes, trial.said())
            assert f"rank {victim} ended early" in trial.said()
    trials.finish(2)
    assert ended < max(2, kills // 5)
    report(
        "C2 SIGKILL of one rank, 2 processes",
        kills,
        f"{kills - ended} times the other named it and left with 70 within 10 s, else all was done; all bits equal",
    )


@pytest.mark.parametrize("world_size", [2, 3, 4] if ALL else [3])
def test_sigterm_to_any_rank_saves_the_same_step_on_all_and_leaves_with_75(trials, world_size):
    share = {2: (40, 2), 3: (30, 2), 4: (30, 2)}[world_size]
    signals, random, left = amount(*share), draw(f"T1 {world_size}"), 0
    for _ in range(signals):
        trial, before = trials.start(world_size), trials.steps(world_size)
        if random.random() < 0.8:
            trials.wait_for_steps(world_size, before + 1)
        time.sleep(random.uniform(0, 0.3))
        trial.kill(random.randrange(world_size), how=signal.SIGTERM)
        codes = trial.codes(GRACE_SECONDS)
        started = trials.steps(world_size) > before
        # before the first step of a start, and when all is done, it may end by the signal itself, as any process does
        ended = not started or is_done(trials.home(world_size))
        assert codes in ([75] * world_size, [0] * world_size) or ended, (codes, trial.said())
        if codes == [75] * world_size:
            left += 1
            assert len(last_steps(trials.home(world_size))) == 1
            assert json.loads((trials.home(world_size) / "run/exit.json").read_text())["code"] == 75
        trials.check(world_size)
    trials.finish(world_size)
    assert left >= signals // 2
    report(
        f"T1 SIGTERM to a random rank, {world_size} processes",
        signals,
        f"{left} left with 75 at the same step; all bits equal",
    )


@pytest.mark.parametrize("how", ["to all", "twice", "SIGUSR1", "SIGINT", "SIGINT twice"] if ALL else ["SIGINT twice"])
def test_any_way_of_asking_is_heard_and_a_second_signal_does_no_harm(trials, how):
    signals, random = amount(10, 1), draw(f"T2 {how}")
    for _ in range(signals):
        trial, before = trials.start(2), trials.steps(2)
        trials.wait_for_steps(2, before + 1)
        time.sleep(random.uniform(0, 0.2))
        ask(trial, how, random)
        codes = trial.codes()
        trials.check(2)
        if how == "SIGUSR1":
            assert codes == [0, 0] or set(codes) == {-9}
        else:
            assert codes in ([130 if "INT" in how else 75] * 2, [0, 0]), (codes, trial.said())
    trials.finish(2)
    report(f"T2 {how}", signals, "heard, all bits equal")


def ask(trial, how, random):
    if how == "SIGUSR1":
        trial.kill(random.randrange(2), how=signal.SIGUSR1)
        time.sleep(random.uniform(0, 0.2))
        trial.kill()
        return
    number = signal.SIGINT if "INT" in how else signal.SIGTERM
    trial.kill(how=number)
    if "twice" in how:
        time.sleep(random.uniform(0, 0.05))
        trial.kill(how=number)


@pytest.mark.parametrize("moment", noisy.MOMENTS if ALL else ["accumulating"])
def test_whatever_a_sigterm_interrupts_is_finished_saved_and_gone_on_with(trials, moment):
    signals = amount(10, 1)
    for _ in range(signals):
        codes = trials.start(2, "--moment", moment).codes()
        assert codes in ([75, 75], [0, 0]), (codes, trials.trial.said())
        assert codes == [75, 75] or moment == "after the last step"
        trials.check(2)
        if codes == [75, 75]:
            assert trials.start(2).codes() == [0, 0]
            trials.check(2)
        trials.runs += 1
    report(f"T3 SIGTERM while {moment}", signals, "the same step on all, all bits equal")


def test_a_grace_too_short_for_the_save_costs_no_more_than_the_save(trials):
    kills, random = amount(20, 1), draw("T4")
    for _ in range(kills):
        trial, before = trials.start(2, "--slow-disk", 0.3), trials.steps(2)
        trials.wait_for_steps(2, before + 1)
        trial.kill(how=signal.SIGTERM)
        time.sleep(random.uniform(0.1, 0.8))
        trial.kill()
        trial.codes()
        trials.check(2)
    trials.finish(2)
    report("T4 SIGKILL in the midst of the save that a SIGTERM asked for", kills, "all bits equal")


def test_a_crash_loop_ends_with_the_bits_of_a_run_never_killed(trials):
    trials.max_steps, kills = CRASH_LOOP
    random = draw("C9")
    for _ in range(kills):
        until = trials.steps(2) + random.randint(2, 2 * trials.max_steps // kills - 4)
        trial = trials.start(2)
        trials.wait_for_steps(2, until)
        trial.kill()
        trial.codes()
        trials.check(2)
        assert trials.runs == 0, "it ended before it was killed often enough"
    trials.finish(2)
    lines = [json.loads(line) for line in (trials.home(2) / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, trials.max_steps + 1))
    done = trials.steps(2) / 2
    assert done <= trials.max_steps + 2 * kills  # a step or two are lost where each is saved
    report(
        f"C9 crash loop in one run of {trials.max_steps} steps",
        kills,
        f"the final bits and metrics.jsonl of a run never killed; {done - trials.max_steps:.0f} steps done twice",
    )


def test_kills_during_start_resume_and_the_first_save_lose_nothing(trials):
    kills, random = amount(60, 2), draw("C10")
    for i in range(kills):
        if i % 3 == 0:
            trials.runs += 1  # a first save
        trial = trials.start(2)
        time.sleep(random.uniform(0.1, 1.2))
        trial.kill()
        trial.codes()
        trials.check(2)
    trials.finish(2)
    report("C10 SIGKILL during start, resume, retention and the first save", kills, "all bits equal")


def last_steps(home):
    lines = [path.read_text().splitlines() for path in home.glob("rank*.jsonl")]
    return {json.loads(recorded[-1])["step"] if recorded else 0 for recorded in lines}
