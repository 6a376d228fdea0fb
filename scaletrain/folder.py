"""The run folder: which one, made once, seen by every process; and the JSON files in it."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scaletrain.agreement import gather_texts, together
from scaletrain.checkpoint.files import put_in_place
from scaletrain.devices import Devices
from scaletrain.errors import PREEMPTED, InputError
from scaletrain.permutation import seed_for

ENVIRONMENT = "environment.json"
OURS = ("config.json", "metrics.jsonl", "timing.jsonl", "result.json", "recipe.py", "model.safetensors", "checkpoints")
_TOKEN = ".seen-by-rank-0"


def agree_on_folder(out: str | None, name: str, group: dist.ProcessGroup | None) -> Path:
    """Choose and make the run folder on rank 0, and check that every process sees it.

    ``out``, else SCALETRAIN_OUT, else one of its own per SLURM job, else per second. Raises InputError where it
    cannot be written, is not shared between the ranks, or is none of ours. Every rank must reach this line.
    """
    first = group is None or dist.get_rank() == 0
    folder = Path(gather_texts(together(lambda: str(_make(out, name)) if first else "", group), group)[0])
    token = gather_texts(str(seed_for(os.getpid(), time.time_ns())), group)[0]
    together(lambda: (folder / _TOKEN).write_text(token) if first else 0, group)
    rank = 0 if group is None else dist.get_rank()
    together(lambda: _check_token(folder, token, rank), group)
    if first:
        (folder / _TOKEN).unlink()
    return folder


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` so that the file is either whole or not there; NaN becomes null, as JSON has none."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        draft.write_text(json.dumps(strict(content), indent=2) + "\n")
        put_in_place(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def short(path: Path) -> str:
    """Return ``path`` as seen from the working directory, where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def strict(value: Any) -> Any:
    """Replace what JSON cannot say: NaN and infinities by null, anything unknown by its text."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def describe_environment(devices: Devices) -> dict[str, Any]:
    """Return what a later reader needs to know about where a run ran; never environment variables."""
    packages = ("torch", "accelerate", "datasets", "safetensors", "numpy")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: version(package) for package in packages},
        "processes": devices.world_size,
        "device": devices.device.type,
        "precision": devices.precision,
        "threads": devices.threads,
    }


def launch_id() -> str:
    """Return what tells one launch from another, the same for the restarts of one on as many processes."""
    names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "WORLD_SIZE")
    return " ".join(os.environ.get(name, "") for name in names).strip()


def record_exit(folder: Path, code: int, reason: str) -> None:
    """Write exit.json, which launch scripts read; ``launch`` is for ``left_before_restart``."""
    launch = {"launch": launch_id()} if code == PREEMPTED else {}
    write_json(folder / "exit.json", {"code": code, "reason": reason, **launch})


def keep_source(folder: Path, source: str | None) -> None:
    """Copy the recipe's source as a record of what ran; nothing ever imports it."""
    if source and Path(source).is_file() and Path(source).resolve() != (folder / "recipe.py").resolve():
        shutil.copyfile(source, folder / "recipe.py")


def _make(out: str | None, name: str) -> Path:
    job = os.environ.get("SLURM_JOB_ID")
    given = out or os.environ.get("SCALETRAIN_OUT") or (f"runs/{name}/slurm-{job}" if job else None)
    if given is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise InputError("a launcher that restarts needs the same folder each time: give --out or set SCALETRAIN_OUT")
    try:
        if given is None:
            return _make_new(Path("runs") / name)
        folder = Path(given)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _TOKEN).write_text("")
    except OSError as error:
        raise InputError(
            f"cannot write the run folder {given or 'runs/' + name}: {error.strerror}; choose another --out"
        ) from None
    foreign = [name for name in OURS if (folder / name).exists()] if not (folder / ENVIRONMENT).exists() else []
    if foreign:
        raise InputError(f"{folder} is no run folder and its {foreign[0]} would be overwritten; choose another --out")
    return folder.absolute()


def _make_new(parent: Path) -> Path:
    """Make a folder named by the second; a second run in the same second gets a name of its own."""
    for attempt in range(100):
        folder = parent / (time.strftime("%Y%m%d-%H%M%S") + (f"-{attempt}" if attempt else ""))
        try:
            folder.mkdir(parents=True)
            return folder.absolute()
        except FileExistsError:
            continue
    raise InputError(f"cannot find a free name in {parent}; choose --out")


def exit_code(folder: Path) -> int | None:
    """Return how the run in ``folder`` ended, if it says so."""
    try:
        return int(json.loads((folder / "exit.json").read_text())["code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def left_before_restart(folder: Path) -> bool:
    """Whether this very launch left because it was told to, and its launcher took that for a failure.

    Only where all ranks say so: a launcher that has just come, or processes that are fewer, came to go on.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or exit_code(folder) != PREEMPTED:
        return False
    said = json.loads((folder / "exit.json").read_text())
    return bool(said.get("launch") == launch_id())


def _check_token(folder: Path, token: str, rank: int) -> None:
    path = folder / _TOKEN
    if not path.is_file() or path.read_text() != token:
        raise InputError(
            f"rank {rank} does not see the run folder {folder} that rank 0 made; choose an --out on a shared disk"
        )
