"""What SLURM says of a process: its place among the tasks that srun started without a launcher."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping

import torch

from scaletrain.errors import InputError

LAUNCHED = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK")
"""Who has set one of these has placed the processes."""


def join_srun() -> None:
    """Set what torchrun would, where srun alone started several tasks, each of them a rank; else do nothing.

    Call it before anything asks for this process's rank. Raises InputError where the first node has no address.
    """
    os.environ |= place(os.environ)


def place(env: Mapping[str, str]) -> dict[str, str]:
    """Return torch's variables for one of several tasks of srun; none where there is a launcher or a single task."""
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")  # a job's script, which is no step, has none
    if (
        tasks == "1"
        or "SLURM_PROCID" not in env
        or any(name in env for name in LAUNCHED)
        or env.get("PMI_SIZE", tasks) != tasks
    ):
        return {}
    node, job, step = (int(env.get(name, "0")) for name in ("SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID"))
    here = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", tasks))[node]
    own_gpu = here > 1 and torch.accelerator.is_available() and torch.accelerator.device_count() == 1
    found = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": "0" if own_gpu else env["SLURM_LOCALID"],  # --gpus-per-task: its GPU is all that it sees
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_PORT": env.get("MASTER_PORT") or str(port(job, step)),
    }
    return found | {"MASTER_ADDR": env.get("MASTER_ADDR") or _address(env)}


def port(job: int, step: int) -> int:
    """Choose where the ranks meet: another for each step, below the ports that systems hand out themselves."""
    return 15000 + (101 * job + step % 101) % 15000


def tasks_per_node(text: str) -> list[int]:
    """Read SLURM's short form: ``2(x3),1`` are nodes with 2, 2, 2 and 1 tasks."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in runs for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """Return the first name of SLURM's short form: ``gpu007`` of ``gpu[007-010,12],cpu1``."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first.group() if first else nodes)


def _address(env: Mapping[str, str]) -> str:
    """The first node's name, or SLURM's own address of it where names of nodes mean nothing to the resolver."""
    if env.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    host = first_host(env.get("SLURM_STEP_NODELIST", ""))
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        known = _told_by_scontrol(host) if shutil.which("scontrol") else None
    if known is None:
        raise InputError(
            f"the job's first node '{host}' has no known address; set MASTER_ADDR to one that all nodes reach"
        )
    return known


def _told_by_scontrol(host: str) -> str | None:
    said = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"NodeAddr=(\S+)", said.stdout)
    return found.group(1) if found else None
