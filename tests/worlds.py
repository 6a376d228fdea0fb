"""Tests on several processes: a test marked ``world_size(n)`` runs on n gloo processes of torchrun's agent.

Its body runs on every rank; each rank has its own ``tmp_path``, all share ``shared_path``. A failure shows every
rank's traceback. After ``timeout`` seconds the stacks are dumped and the world is killed. A process left over
fails the test. The ranks are forked from a process that has imported torch, which saves them 4 s each.
"""

import faulthandler
import json
import os
import select
import subprocess
import sys
import uuid
from functools import cache
from pathlib import Path

import psutil
import pytest

WORLD = "SCALETRAIN_TEST_WORLD"
SHARED = "SCALETRAIN_TEST_SHARED"


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


def pytest_unconfigure():
    if nursery.cache_info().currsize:
        with nursery() as process:
            process.stdin.close()


@cache
def nursery():
    """A process that has imported everything and forks a launcher for each line it reads; ends with this one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen([sys.executable, __file__], env=environment, **pipes)


def run_world(nodeid, folder, root, n, timeout=120):
    """Run the test ``nodeid`` on ``n`` ranks; raise with their logs unless all of them passed."""
    world = uuid.uuid4().hex
    env = {WORLD: world, SHARED: str(folder), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    order = {"nodeid": nodeid, "root": str(root), "n": n, "env": env, "timeout": timeout}
    nursery().stdin.write(json.dumps(order) + "\n")
    launcher = int(_answer(30))
    code = _answer(timeout)
    problem = f"still running after {timeout} s" if code is None else f"torchrun ended with {code}" if int(code) else ""
    left = end_processes(world, launcher)
    if code is None:
        _answer(30)
    problem = problem or (f"processes were left over: {left}" if left else "")
    if problem:
        logs = [f"--- {path.stem} ---\n{path.read_text()[-30_000:]}" for path in sorted(folder.glob("*.log"))]
        pytest.fail("\n".join([problem, *logs]), pytrace=False)


def _answer(timeout):
    ready, _, _ = select.select([nursery().stdout], [], [], timeout)
    return nursery().stdout.readline() if ready else None


def end_processes(world, launcher=None):
    """Kill every process of a world that is still there; return what they were."""
    left = [process for process in psutil.process_iter() if belongs_to(process, world, launcher)]
    for process in left:
        process.kill()
    return [process.pid for process in left]


def belongs_to(process, world, launcher=None):
    """Whether a process was started with the world's mark, or forked by its launcher, which leads a session."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.environ().get(WORLD) == world or (launcher is not None and os.getsid(process.pid) == launcher)
    except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
        return False


def serve():
    """Start a world for each line of standard input; answer with its launcher's process id, then its exit code."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    import scaletrain.entry
    import scaletrain.hooks  # noqa: F401

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            lead(**order)
        answers.write(f"{pid}\n")
        _, status = os.waitpid(pid, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")


def lead(nodeid, root, n, env, timeout):
    """Be torchrun: start and watch the ranks, and end with their exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ |= env
    os.chdir(root)
    sys.path[:0] = [path for path in env["PYTHONPATH"].split(os.pathsep) if path]
    _write_to("torchrun")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=n, run_id=env[WORLD], rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.05, start_method="fork",
    )  # fmt: skip
    code = 0
    try:
        elastic_launch(config, run_rank)(nodeid, timeout)
    except ChildFailedError as error:
        code = 1
        print(error)
    sys.stdout.flush()
    os._exit(code)


def run_rank(nodeid, timeout):
    """Run the test in this process, a rank of a world."""
    folder, rank = Path(os.environ[SHARED]), os.environ["RANK"]
    log = _write_to(f"rank{rank}")
    faulthandler.dump_traceback_later(timeout - 5, file=log)
    options = [f"--basetemp={folder / f'rank{rank}'}", "-p", "no:cacheprovider", "-q", "--no-header"]
    code = pytest.main([nodeid, *options])
    sys.stdout.flush()
    if code:
        os._exit(code)  # a rank that failed must not wait for the others at exit


def _write_to(name):
    log = (Path(os.environ[SHARED]) / f"{name}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    return log


if __name__ == "__main__":
    serve()
