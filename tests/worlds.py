"""Tests on several processes: a test marked ``world_size(n)`` runs on n gloo processes through torchrun.

Its body runs on every rank; each rank has its own ``tmp_path``, all share ``shared_path``. A failure shows every
rank's traceback. After ``timeout`` seconds the stacks are dumped and the world is killed. A process left over
fails the test.
"""

import faulthandler
import os
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

WORLD = "SCALETRAIN_TEST_WORLD"
SHARED = "SCALETRAIN_TEST_SHARED"
TIMEOUT = "SCALETRAIN_TEST_TIMEOUT"


@pytest.fixture
def shared_path(tmp_path):
    """A folder that all ranks of a world see."""
    return Path(os.environ.get(SHARED, tmp_path))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    marker = pyfuncitem.get_closest_marker("world_size")
    if marker is None or WORLD in os.environ:
        return None  # the body runs here
    folder, root = pyfuncitem.funcargs["tmp_path"], pyfuncitem.config.rootpath
    run_world(pyfuncitem.nodeid, folder, root, *marker.args, **marker.kwargs)
    return True


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("world_size") and "tmp_path" not in item.fixturenames:
            item.fixturenames.append("tmp_path")


def run_world(nodeid, folder, root, n, timeout=120):
    """Run the test ``nodeid`` on ``n`` ranks; raise with their logs unless all of them passed."""
    world = uuid.uuid4().hex
    env = os.environ | {WORLD: world, SHARED: str(folder), TIMEOUT: str(timeout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", __file__, nodeid]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    launcher = subprocess.Popen(command, env=env, cwd=root, **pipes)
    try:
        said, _ = launcher.communicate(timeout=timeout)
        problem = f"torchrun ended with {launcher.returncode}" if launcher.returncode else ""
    except subprocess.TimeoutExpired:
        problem, said = f"still running after {timeout} s", ""
    left = end_processes(world)
    if launcher.poll() is None:
        launcher.kill()
        launcher.wait()
    launcher.stdout.close()
    problem = problem or (f"processes were left over: {left}" if left else "")
    if problem:
        logs = [f"--- rank {r} ---\n{log_of(folder, r)}" for r in range(n)]
        pytest.fail("\n".join([problem, *logs, "--- torchrun ---", said[-1500:]]), pytrace=False)


def log_of(folder, rank):
    path = folder / f"rank{rank}.log"
    return path.read_text()[-6000:] if path.exists() else "(no output)"


def end_processes(world):
    """Kill every process of a world that is still there; return what they were."""
    left = [process for process in psutil.process_iter() if belongs_to(process, world)]
    for process in left:
        process.kill()
    return [process.pid for process in left]


def belongs_to(process, world):
    try:
        return process.environ().get(WORLD) == world and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def run_rank(nodeid):
    """Run the test in this process, a rank of a world."""
    folder, rank = Path(os.environ[SHARED]), os.environ["RANK"]
    log = (folder / f"rank{rank}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(float(os.environ[TIMEOUT]) - 5, file=log)
    options = [f"--basetemp={folder / f'rank{rank}'}", "-p", "no:cacheprovider", "-q", "--no-header"]
    code = pytest.main([nodeid, *options])
    sys.stdout.flush()
    os._exit(code)  # a rank that failed must not wait for the others at exit


if __name__ == "__main__":
    run_rank(sys.argv[1])
