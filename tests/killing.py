"""Runs to kill: ranks forked from a process that has imported everything, so that a start costs a fraction of a second.

They are real processes on real gloo; only the launcher is missing (a sample of the tests goes through torchrun).
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Ranks:
    """One trial: ``world_size`` ranks that run ``main(noisy.recipe, argv)``."""

    def __init__(self, nursery, world_size, argv, log):
        self._nursery, self.log = nursery, Path(log)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        order = {"world_size": world_size, "port": port, "argv": [str(a) for a in argv], "log": str(log)}
        nursery.stdin.write(json.dumps(order) + "\n")
        nursery.stdin.flush()
        self.pids = json.loads(self._answer(30))

    def kill(self, *ranks, how=signal.SIGKILL):
        for rank in ranks or range(len(self.pids)):
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], how)

    def codes(self, timeout=60):
        """Wait for all ranks; return their exit codes, negative for a signal. A hang is a failure."""
        try:
            return json.loads(self._answer(timeout))
        except TimeoutError:
            self.kill(how=signal.SIGABRT)
            self._answer(10)
            raise AssertionError(f"still running after {timeout} s:\n{self.said()[-6000:]}") from None

    def said(self):
        return "".join(path.read_text() for path in sorted(self.log.parent.glob(self.log.name + ".*")))

    def _answer(self, timeout):
        ready, _, _ = select.select([self._nursery.stdout], [], [], timeout)
        if not ready:
            raise TimeoutError
        return self._nursery.stdout.readline()


@contextmanager
def nursery():
    """A process that forks ranks on request."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    process = subprocess.Popen([sys.executable, __file__], env=environment, cwd=HERE.parent, **pipes)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def serve():
    """Fork ranks for each line of standard input; answer with their process ids, then with their exit codes."""
    sys.path.insert(0, str(HERE))
    import faulthandler

    import noisy  # and with it torch and scaletrain
    import torch.distributed.checkpoint
    import torch.distributed.tensor  # noqa: F401

    from scaletrain import main
    from scaletrain.checkpoint.commit import Commit

    noisy.shard_where_asked()
    noisy.tell_what_was_loaded()
    commit = Commit.__call__

    def commit_and_tell(self, step, *args):
        commit(self, step, *args)
        with (self.folder.parent / "committed").open("a") as file:
            file.write(f"{step}\n")

    Commit.__call__ = commit_and_tell
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    answers.write("ready\n")
    for line in sys.stdin:
        order = json.loads(line)
        pids = []
        for rank in range(order["world_size"]):
            pid = os.fork()
            if pid == 0:
                log = os.open(f"{order['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                faulthandler.enable()
                if order["world_size"] > 1:
                    os.environ |= {
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                        "WORLD_SIZE": str(order["world_size"]), "LOCAL_WORLD_SIZE": str(order["world_size"]),
                        "MASTER_PORT": str(order["port"]),
                    }  # fmt: skip
                main(noisy.recipe, order["argv"])
                sys.exit(0)
            pids.append(pid)
        answers.write(json.dumps(pids) + "\n")
        codes = dict.fromkeys(pids)
        for _ in pids:
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
        answers.write(json.dumps([codes[pid] for pid in pids]) + "\n")


def wait_for(condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.005)


if __name__ == "__main__":
    serve()
