"""The harness itself: what fails in a world fails the test, and says on which rank."""

import subprocess
import sys

import pytest
from worlds import WORLD, end_processes, run_world

BODY = """
import os, subprocess, sys, time
import pytest
pytest_plugins = ["worlds"]

@pytest.mark.world_size(2)
def test_inner(shared_path):
    rank = int(os.environ["RANK"])
    {body}
"""


def run(tmp_path, body, timeout=60):
    (tmp_path / "test_inner.py").write_text(BODY.format(body=body))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = world_size\n")
    folder = tmp_path / "shared"
    folder.mkdir()
    run_world("test_inner.py::test_inner", folder, tmp_path, 2, timeout)


@pytest.fixture(autouse=True)
def find_the_plugin(monkeypatch, request):
    monkeypatch.setenv("PYTHONPATH", str(request.path.parent))


def test_a_world_that_passes_runs_on_every_rank(tmp_path):
    run(tmp_path, '(shared_path / f"was-here-{rank}").touch()')
    assert {path.name for path in (tmp_path / "shared").glob("was-here-*")} == {"was-here-0", "was-here-1"}


def test_an_assertion_on_one_rank_fails_the_test_with_its_traceback(tmp_path):
    with pytest.raises(pytest.fail.Exception) as failed:
        run(tmp_path, "assert rank == 0, 'rank 1 saw otherwise'")
    said = str(failed.value)
    assert "AssertionError: rank 1 saw otherwise" in said.split("--- rank1 ---")[1]


def test_a_world_that_hangs_is_ended_and_shows_where_it_stood(tmp_path):
    with pytest.raises(pytest.fail.Exception) as failed:
        run(tmp_path, "time.sleep(1000) if rank else None", timeout=15)
    assert "still running after 15 s" in str(failed.value)
    assert 'test_inner.py", line' in str(failed.value).split("--- rank1 ---")[1]


def test_a_process_left_over_fails_the_test_and_is_ended(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="processes were left over"):
        run(
            tmp_path,
            'rank or subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)',
        )


def test_ending_processes_finds_those_of_a_world_alone(monkeypatch):
    monkeypatch.setenv(WORLD, "a-world")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as process:
        monkeypatch.delenv(WORLD)
        assert end_processes("another-world") == []
        assert end_processes("a-world") == [process.pid]
    assert process.returncode < 0
