"""Agents of launch/torchrun.sh that come, are killed, and come back; and a recipe that records what each step read.

The recipe is ``noisy`` without its hooks, slowed down so that there is time to disturb it. Each rank appends a line
after each step: which start of the run it belongs to, the rows it read, and its share of the loss.
"""

import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import noisy
import numpy as np
import psutil
from killing import wait_for
from launching import ROOT
from worlds import WORLD, end_processes

from scaletrain import main, train_step
from scaletrain.agreement import gather_texts
from scaletrain.order import Shuffled

SCRIPT = Path(__file__).resolve()
QUICK = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=8"
"""A lost machine is noticed in 8 s, and others are waited for 3 s; on a busy machine less would lose living ones."""


@dataclass(frozen=True, kw_only=True)
class ElasticConfig(noisy.NoisyConfig):
    pause: float = 0.0
    """Seconds that each step takes longer, until there is a file ``go`` beside the record."""


rows = []
about = {}
"""Which start of the run this is, by rank 0's mark, this rank, and how many there are."""
mark = uuid.uuid4().hex


def loss(model, batch, cfg):
    rows[:] = batch["row"].tolist()
    return noisy.loss(model, batch, cfg)


def step(run, micro_batches):
    """Do a step and record it at once: a SIGKILL must not lose what was done, and hooks may come after a restart."""
    info = train_step(run, micro_batches)
    if not about:
        first = gather_texts(mark, run.devices.control)[0]
        about.update(start=first, rank=run.devices.rank, world=run.devices.world_size)
    line = about | {"step": info.step, "rows": rows, "loss": float(info.loss).hex(), "digest": noisy.digest(run)}
    with (Path(run.cfg.record) / f"{mark}.jsonl").open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")
    if not (Path(run.cfg.record) / "go").exists():
        time.sleep(run.cfg.pause)
    return info


recipe = replace(noisy.recipe, config=ElasticConfig, loss=loss, hooks=None)


def recorded(folder):
    """Each step of each start of the run: (start, step) -> the lines of its ranks."""
    found = defaultdict(list)
    for path in Path(folder).glob("*.jsonl"):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            found[line["start"], line["step"]].append(line)
    return found


def steps_of(folder, world):
    """How many steps so many ranks have done."""
    return sum(len(lines) == lines[0]["world"] == world for lines in recorded(folder).values())


def curve(folder, steps, batch_size=24, n=101, seed=0):
    """The losses of each step, which may have been done again, and on how many ranks; each read what the order says."""
    losses, worlds = defaultdict(list), set()
    for (_, step), lines in recorded(folder).items():
        order = Shuffled(n, seed)(np.arange((step - 1) * batch_size, step * batch_size)).tolist()
        read = [row for line in lines for row in line["rows"]]
        world = lines[0]["world"]
        if len(lines) == world:
            assert sorted(read) == sorted(order), step
            losses[step].append(sum(float.fromhex(line["loss"]) for line in lines))
            worlds.add(world)
        else:  # a kill came between two ranks' lines
            assert len(lines) < world, step
            assert set(read) <= set(order), step
    assert set(losses) == set(range(1, steps + 1))
    return losses, worlds


class Agent:
    """One machine's launch/torchrun.sh, and the processes that it started."""

    def __init__(self, world, log, arguments, within=(), **env):
        self.world, self.log, self.within = world, log, within
        quiet = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "RENDEZVOUS": QUICK}
        environment = os.environ | quiet | {"GPUS": "0", WORLD: world} | {k: str(v) for k, v in env.items()}
        words = [str(word) for word in (*within, ROOT / "launch/torchrun.sh", SCRIPT, *arguments)]
        with log.open("w") as file:
            self.process = subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)

    def workers(self):
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def kill(self):
        """End the machine: agent and workers at once."""
        for process in [psutil.Process(self.process.pid), *self.workers()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)

    def tell_to_leave(self):
        """Send SIGTERM to the agent, as a scheduler does; to the first process of its container where it has one."""
        told = psutil.Process(self.process.pid)
        if self.within:
            wait_for(told.children)
            (told,) = told.children()
        told.send_signal(signal.SIGTERM)

    def code(self, timeout=120):
        """Wait for its end; return its exit code. A hang is a failure."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.said()[-6000:]}") from None

    def said(self):
        return self.log.read_text()


@contextmanager
def machines(folder, *arguments, **env):
    """Start agents: ``join(**env)`` is a machine that comes. What is left over at the end is killed, and a failure."""
    world, agents = uuid.uuid4().hex, []
    shared = {"HEAD": f"localhost:{free_port()}", "WAIT": 60, "GRACE": 10} | env

    def join(**own):
        agents.append(Agent(world, folder / f"agent{len(agents)}.log", arguments, **(shared | own)))
        if len(agents) == 1 and shared["HEAD"].startswith(
            "localhost:"
        ):  # all are on this host: the first is to meet at
            wait_for(lambda: agents[0].process.poll() is not None or listens(shared["HEAD"]))
        return agents[-1]

    try:
        yield join
    except BaseException:
        for agent in agents:
            print(f"--- {agent.log.name} ---\n{agent.said()[-6000:]}")
        end_processes(world)
        for agent in agents:
            agent.process.wait(10)
        raise
    left = end_processes(world)
    assert not left, f"processes were left over: {left}"


def listens(endpoint):
    with suppress(OSError):
        socket.create_connection(endpoint.split(":"), timeout=1).close()
        return True
    return False


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    main(recipe, step=step)
