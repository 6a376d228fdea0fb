"""Who goes on exactly: the same training under four libraries, killed and resumed, against itself uninterrupted.

    python -m benchmarks.kill_and_resume [--trials 20] [--out FILE]

Each program of ``benchmarks.same_run`` is run to its end, then again and ended on the way: by SIGKILL in the middle of
an epoch, by SIGKILL after a checkpoint at an epoch's end, and in an orderly way. It is started anew as its
documentation says, and every later step is compared with the uninterrupted run of the same program: the examples, the
loss and the state to the last bit. Then SIGKILL while a checkpoint is being written, at moments spread evenly over the
time that a save takes.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.pairs import conditions
from benchmarks.resumed import Compared, Told, begin, compare, messages, run, said, server
from benchmarks.same_run import NEEDS, PROGRAMS, SCALETRAIN, Job

CASES = {
    "SIGKILL after step 13, checkpoints every 5": {"save_every": 5, "kill_after": 13},
    "SIGKILL after step 17, checkpoint at an epoch's end (step 14)": {"save_every": 7, "kill_after": 17},
    "Orderly end after step 13": {"save_every": 5, "stop_after": 13},
}
OF_LIGHTNING = "neither the loader's position nor the generators' states are in the checkpoint"
WHY_EXAMPLES = {
    "Accelerate, load_state alone": "neither the position in the epoch nor what its order was drawn with is saved",
    "Accelerate, skip_first_batches": "the order of the epoch is drawn anew: what it was drawn with is not saved",
    "Lightning": OF_LIGHTNING,
}
"""Likely reasons, from reading the libraries' source, where the examples are others."""
WHY_RANDOM = {
    "Accelerate, skip_first_batches, seedable sampler": "making the loader's iterator draws a number from the "
    "generator that load_state had just restored (restored once more after that, it is exact)",
    "Lightning": OF_LIGHTNING,
}
"""Where the examples are the same and dropout is not."""
OUTCOMES = ("earlier", "this", "incomplete", "anew", "fails", "torn", "missed")


def available() -> list[str]:
    """Return the programs whose packages are installed."""
    return [name for name in PROGRAMS if name not in NEEDS or find_spec(NEEDS[name])]


def interrupt(program: str, folder: Path, case: dict[str, int], *, world_size: int = 1, **sizes: Any) -> Compared:
    """Run to the end; end on the way and resume; compare."""
    whole = Job(folder / "whole", "whole", save_every=case["save_every"], **sizes)
    ended = Job(folder / "ended", "ended", **case, **sizes)
    resumed = replace(ended, name="resumed", resume=True, kill_after=0, stop_after=0)
    if any(codes := run(program, whole, world_size=world_size)):
        raise SystemExit(f"{program} ends with {codes}: {said(whole)}")
    run(program, ended, world_size=world_size)
    if any(codes := run(program, resumed, world_size=world_size)):
        raise SystemExit(f"{program} does not resume, {codes}: {said(resumed)}")
    return compare(whole, resumed, world_size)


def row(program: str, found: Compared) -> str:
    """Write a row of the first tables."""
    why = "" if found.exact else (WHY_RANDOM if found.same_examples else WHY_EXAMPLES).get(program, "not looked into")
    differs = "none" if not found.first else f"{found.first}: {found.losses[0]:.4f}, {found.losses[1]:.4f}"
    cells = [
        program,
        "**yes**" if found.exact else "no",
        str(found.resumed_from),
        "the same" if found.same_examples else "others",
        differs,
        "equal" if found.weights_apart == 0 else f"{found.weights_apart:.2g}",
        why,
    ]
    return f"| {' | '.join(cells)} |"


class WhileSaving:
    """Kills a program while it saves step 10, and looks at what it then resumes from."""

    STEPS, SAVE_EVERY, KILLED_AT = 14, 5, 10

    def __init__(self, program: str, folder: Path, *, hidden: int = 1024) -> None:
        self.program, self.folder = program, folder
        self.job = Job(folder / "whole", "whole", steps=self.STEPS, save_every=self.SAVE_EVERY, hidden=hidden)
        seconds, begun = [], 0.0
        with self._running(self.job) as (_, told):
            for _, word in messages(told):
                seconds += [time.perf_counter() - begun] if word == "done" else []
                begun = time.perf_counter()
        self.seconds = max(seconds)
        """What a save takes at most, from its beginning to when it is complete."""
        self.whole = Told.by(self.job)
        self._reference: Told | None = None

    @contextlib.contextmanager
    def _running(self, job: Job) -> Iterator[Any]:
        told, tell = server.Pipe(duplex=False)
        (process,) = begin(self.program, replace(job, tell=tell))
        tell.close()
        try:
            yield process, told
        finally:
            process.join()

    def trial(self, number: int, moment: float) -> str:
        """Kill at ``moment`` (0 to 1) of the time that a save takes; say in a word what resuming came to.

        ``missed``: the save had ended before the kill. ``this``, ``earlier``: a whole checkpoint was loaded, of the
        save that was killed or of the one before. ``incomplete``: weights and moments of the save that was killed,
        but the run goes on otherwise than from a whole one. ``anew``: none was found. ``fails``: resuming ended in
        an error. ``torn``: weights and moments are not those that the uninterrupted run had at that step.
        """
        ended = replace(self.job, folder=self.folder / f"killed-{number}", name="ended")
        with self._running(ended) as (process, told):
            if (self.KILLED_AT, "begun") not in messages(told):
                raise SystemExit(f"{self.program} did not save step {self.KILLED_AT}: {said(ended)}")
            time.sleep(moment * self.seconds)
            process.kill()
            if (self.KILLED_AT, "done") in messages(told):
                return "missed"
        self.resumed = replace(ended, name="resumed", resume=True)
        return self._resuming(self.resumed)

    def by_hand(self) -> str:
        """Remove what the killed save left, as one would after ``fails``; say what resuming comes to now."""
        again = replace(self.resumed, name="again")
        for path in again.folder.glob(f"*[_-]{self.KILLED_AT}"):
            shutil.rmtree(path)
        return self._resuming(again)

    def _resuming(self, job: Job) -> str:
        if any(run(self.program, job)):
            return "fails"
        told = Told.by(job)
        if told.loaded is None:
            return "anew"
        step, state = told.loaded
        if state != self.whole.steps[0][step]["state"]:
            return "torn"
        if step < self.KILLED_AT:
            return "earlier"
        return "this" if told.steps == self._from_a_whole_one().steps else "incomplete"

    def _from_a_whole_one(self) -> Told:
        """Return how the run goes on from its checkpoint of step 10 when that was complete before the kill."""
        if self._reference is None:
            slow = 5 * self.seconds
            killed = replace(self.job, folder=self.folder / "reference", name="ended", pause_seconds=slow)
            run(self.program, replace(killed, kill_after=self.KILLED_AT + 1))
            resumed = replace(killed, name="resumed", resume=True)
            run(self.program, resumed)
            self._reference = Told.by(resumed)
        return self._reference


def killed_while_saving(program: str, folder: Path, trials: int) -> tuple[str, dict[str, int]]:
    """Return a row of the last table, and how often each outcome came."""
    saving, outcomes, errors, mended = WhileSaving(program, folder), dict.fromkeys(OUTCOMES, 0), set(), 0
    for number in range(trials):
        outcome = saving.trial(number, (number + 0.5) / trials)
        outcomes[outcome] += 1
        if outcome == "fails":
            errors.add(said(saving.resumed).replace(f"{saving.resumed.folder}/", "").replace("|", "/")[:80])
            mended += saving.by_hand() == "earlier"
    by_hand = f"{mended} of {outcomes['fails']}" if outcomes["fails"] else ""
    cells = [program, f"{saving.seconds * 1e3:.0f}", *map(str, outcomes.values()), by_hand, "; ".join(sorted(errors))]
    return f"| {' | '.join(cells)} |", outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="kills per program while it saves")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    programs = available()
    if missing := [name for name in PROGRAMS if name not in programs]:
        print(f"not installed (pip install 'scaletrain[bench]'): {', '.join(missing)}", file=sys.stderr)

    packages = ["torch", "accelerate", *(NEEDS[name] for name in programs if name in NEEDS)]
    lines = ["# Killed and resumed", "", *conditions("python -m benchmarks.kill_and_resume", tuple(packages))]
    lines += [
        "* an MLP with dropout, AdamW, a schedule, 100 shuffled examples in batches of 16, 30 steps, float32, 1 thread",
        "* an epoch has 7 steps, the last of 4 examples; scaletrain's have 16 each, and an epoch may end inside one",
        "* exact: every step after resuming has the examples, loss and state (weights, moments) of the same program's",
        "  uninterrupted run to the last bit; differs: the first step that does not, and its loss there and here",
        "* an orderly end: Accelerate, Lightning and the Trainer save and stop after the step, by their own means;",
        "  scaletrain gets SIGTERM, and all its processes end together one step later",
        "* likely reasons are from reading the libraries' source; each program is in benchmarks/same_run.py",
        "* not measured: torchdata's StatefulDataLoader, with which Accelerate and Lightning can save the loader's",
        "  position; it is not among what this project installs",
    ]
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, 2):
            for title, case in CASES.items():
                lines += ["", f"## {title}, {world_size} process{'es' if world_size > 1 else ''}", ""]
                lines += ["| program | exact | goes on after | examples | differs | weights apart | likely reason |"]
                lines += ["|---|---|---|---|---|---|---|"]
                for program in programs:
                    found = interrupt(program, Path(tempfile.mkdtemp(dir=folder)), case, world_size=world_size)
                    wrong += [f"{title}, {world_size}"] if program == SCALETRAIN and not found.exact else []
                    lines.append(row(program, found))
                    print(lines[-1], flush=True)
        lines += [
            "",
            f"## SIGKILL while saving, at {args.trials} moments spread over a save of 13 MB",
            "",
            "Killed in its second save, of step 10; each program keeps as many checkpoints as it does by default. Then",
            "resumed as before. From 5, from 10: from the very state (weights, moments) of that step. Incomplete: from",
            "that of step 10, but it goes on otherwise than from a whole checkpoint. Anew: as if there were none.",
            "Fails: ends with an error. Torn: from a state that was never there. Missed: the save had ended before the",
            "kill. By hand: where it failed, it goes on from step 5 once what the killed save left is removed.",
            "",
            "| program | save ms | from 5 | from 10 | incomplete | anew | fails | torn | missed | by hand | errors |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for program in programs:
            if program == "Accelerate, load_state alone":
                continue  # it saves as the next one does
            line, outcomes = killed_while_saving(program, Path(tempfile.mkdtemp(dir=folder)), args.trials)
            bad = [word for word in ("incomplete", "anew", "fails", "torn") if outcomes[word]]
            wrong += [f"while saving: {bad}"] if program == SCALETRAIN and bad else []
            lines.append(line)
            print(line, flush=True)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")
    if wrong:
        raise SystemExit(f"scaletrain does not go on exactly: {wrong}")


if __name__ == "__main__":
    main()
