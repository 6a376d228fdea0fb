"""Processes and machines that cannot meet: one clear line, an exit code, and nobody waits for ever."""

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import elastic
import pytest
from faultload import amount, draw, report
from launching import RECIPES

SECONDS = 60
"""Until all have ended: python and torch start in some seconds on two busy cores."""


@contextmanager
def foreign_program():
    """A port on which another program listens, which never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def last_error(said):
    """The one line that is ours."""
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


MACHINES = {
    "the port of HEAD is in use": (
        "localhost:{port}",
        "1:2",
        r"localhost:\d+ \(HEAD\) is taken by a program that is no meeting point of a run; choose another port",
    ),
    "the host of HEAD is dead": ("192.0.2.1:29400", "2", r"192\.0\.2\.1:29400 \(HEAD\) does not answer .* within 4 s"),
    "the host of HEAD has no address": (
        "nowhere.invalid:29400",
        "2",
        r"nowhere\.invalid:29400 \(HEAD\) does not answer",
    ),
    "a machine is missing": ("localhost:0", "2", r"fewer than 2 machines \(NODES\) came within 4 s \(WAIT\); start"),
}
SAMPLE = ("a machine is missing", "the port of HEAD is in use")


@pytest.mark.parametrize("case", MACHINES if amount(2, 1) == 2 else SAMPLE)
def test_machines_that_cannot_meet_say_so_in_one_line_and_in_time(case, tmp_path):
    head, nodes, wanted = MACHINES[case]
    (tmp_path / "record").mkdir()
    options = ("--max-steps", 2, "--out", tmp_path / "run", "--record", tmp_path / "record")
    with (
        foreign_program() as port,
        elastic.machines(tmp_path, *options, HEAD=head.format(port=port), NODES=nodes, WAIT=4) as join,
    ):
        agent = join()
        assert agent.code(SECONDS) == 1
    assert re.search(wanted, last_error(agent.said())), agent.said()
    assert not (tmp_path / "run").exists()
    report(f"N6 {case}", 1, "one line, exit code 1")


def by_hand(*ranks, world_size, wait=4, **env):
    """Start ranks as srun or a shell would; return what each said and its exit code."""
    shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "SCALETRAIN_WAIT_SECONDS": wait} | env
    environment = os.environ | {k: str(v) for k, v in shared.items()} | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(RECIPES / "mlp.py"), "--max-steps", "2", "--out", "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, **pipes) for rank in ranks]
    deadline = time.monotonic() + SECONDS
    try:
        said = [process.communicate(timeout=deadline - time.monotonic())[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return said, [process.returncode for process in processes]


def test_a_rank_that_never_comes_is_named():
    said, codes = by_hand(0, 2, world_size=4, MASTER_PORT=elastic.free_port())
    line = last_error("".join(said))  # rank 0 speaks for both
    assert re.fullmatch(
        r"error: 2 of 4 ranks \(WORLD_SIZE\) came to 127\.0\.0\.1:\d+ within 4 s, from \S+; missing: 1, 3; "
        r"start them, or make WORLD_SIZE what was started",
        line,
    )
    assert codes == [2, 2]
    report("N6 two of four ranks are missing", 1, "named by number, exit code 2")


CASES = ("the port of rank 0 is taken", "rank 0 is missing", "a rank is started twice", "a rank beyond the world")


@pytest.mark.parametrize("case", CASES if amount(2, 1) == 2 else draw("N6", seed=1).sample(CASES, 1))
def test_ranks_that_cannot_meet_say_so_in_one_line(case):
    with foreign_program() as taken:
        port = elastic.free_port()
        if case == "the port of rank 0 is taken":
            said, codes = by_hand(0, world_size=2, MASTER_PORT=taken)
            wanted = f"error: 127.0.0.1:{taken} (MASTER_ADDR:MASTER_PORT) is taken by another program"
        elif case == "rank 0 is missing":
            said, codes = by_hand(1, world_size=2, MASTER_PORT=port)
            wanted = f"error: rank 1: 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT) was not opened by rank 0 within 4 s"
        elif case == "a rank is started twice":
            said, codes = by_hand(0, 1, 1, world_size=3, MASTER_PORT=port, wait=8)
            said = [text for text in said if "2 times" in text]  # the others then miss rank 2
            wanted = "error: rank 1: rank 1 was started 2 times"
        else:
            said, codes = by_hand(2, world_size=2, MASTER_PORT=port)
            wanted = "error: rank 2: RANK=2 is not below WORLD_SIZE=2"
    assert set(codes) == {2}
    assert last_error("".join(said)).startswith(wanted)
    report(f"N6 {case}", 1, "one line, exit code 2")


def test_ranks_that_meet_train_together():
    said, codes = by_hand(0, 1, world_size=2, MASTER_PORT=elastic.free_port(), wait=60)
    assert codes == [0, 0], said
