"""Ranks that must be alike: one with another config, code, data set or model would train something else."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from scaletrain.agreement import gather_texts
from scaletrain.checkpoint.tensors import local_part
from scaletrain.config import Config
from scaletrain.errors import InputError

SAMPLED = 64
"""Numbers of each tensor of the model that are compared."""
OWN = ("out", "threads", "workers")
"""Options that may differ: what a rank's machine has, and a folder that is agreed on later."""


def check_alike(what: str, own: dict[str, str], group: dist.ProcessGroup | None) -> None:
    """Raise InputError, on all ranks, where one holds something else than rank 0, naming it and ``what`` differs.

    Every rank must reach this line.
    """
    text = json.dumps(own)
    if len(set(gather_texts(hashlib.sha256(text.encode()).hexdigest(), group))) == 1:
        return
    every = [json.loads(other) for other in gather_texts(text, group)]
    found = []
    for rank, other in enumerate(every):
        names = [name for name in {**every[0], **other} if other.get(name) != every[0].get(name)]
        if names:
            shown = ", ".join(f"{name} {other.get(name)} instead of {every[0].get(name)}" for name in names[:3])
            found.append(f"rank {rank} has {shown}")
    if found:
        raise InputError(f"the {what} differs between the ranks: {'; '.join(found[:4])}; start all of them alike")


def of_config(cfg: Config, source: str | None) -> dict[str, str]:
    """Return the options by name, and a hash of the recipe's file.

    Of a file or folder, only what it is called: machines may have it in different places, and what is read from it is
    compared elsewhere.
    """
    values = {name: str(value) for name, value in asdict(cfg).items() if name not in OWN}
    options = {
        f"--{name.replace('_', '-')}": Path(value).name if _is_path(value) else value for name, value in values.items()
    }
    code = Path(source).read_bytes() if source and Path(source).is_file() else b""
    return options | {f"code {Path(source or '').name}": hashlib.sha256(code).hexdigest()[:12]}


def _is_path(value: str) -> bool:
    try:
        return "/" in value and Path(value).exists()
    except OSError:  # too long for one
        return False


def of_model(module: nn.Module) -> dict[str, str]:
    """Return of each parameter and buffer its shape, type, and a hash of some of its numbers."""
    found = {}
    for name, tensor in module.state_dict().items():
        flat = local_part(tensor).detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
        numbers = hashlib.sha256(some.view(torch.uint8).numpy().tobytes()).hexdigest()[:12] if len(some) else ""
        found[name] = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} {numbers}"
    return found
