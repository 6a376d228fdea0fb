"""Where a run goes on: which checkpoint, whether it is this run's, and what has changed since."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scaletrain.agreement import gather_texts
from scaletrain.checkpoint.format import FOLDER
from scaletrain.checkpoint.verify import Checkpoint, checkpoint_at, newest_first, newest_whole, open_checkpoint, verify
from scaletrain.config import NOT_LEARNED_FROM, Config
from scaletrain.errors import CheckpointError, InputError
from scaletrain.folder import short, strict
from scaletrain.order import Order
from scaletrain.run.restore import start_anew

if TYPE_CHECKING:
    import torch.distributed as dist

    from scaletrain.run.run import Run


def find(
    folder: Path, resume: str, group: dist.ProcessGroup | None, first: bool
) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint to go on from, if any, and what was skipped to get there.

    Rank 0 looks and verifies, the others follow. Raises CheckpointError where there are some but none is whole,
    InputError where ``resume`` asks for what cannot be. Every rank must reach this line.
    """
    answer: dict[str, Any] = {}
    if first:
        try:
            path, skipped = _choose(folder, resume)
            answer = {"path": str(path or ""), "skipped": skipped}
        except InputError as error:
            answer = {"input": str(error)}
        except OSError as error:
            answer = {"input": f"cannot read the checkpoints of {short(folder)}: {error.strerror}"}
        except CheckpointError as error:
            answer = {"checkpoint": str(error), "rule": error.rule}
    answer = json.loads(gather_texts(json.dumps(answer), group)[0])
    if "input" in answer:
        raise InputError(answer["input"])
    if "checkpoint" in answer:
        raise CheckpointError(answer["rule"], answer["checkpoint"])
    return (open_checkpoint(Path(answer["path"])) if answer["path"] else None), answer["skipped"]


def _choose(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    own = folder / FOLDER
    started = next(newest_first(own), None) is not None
    if resume == "never" and started:
        raise InputError(f"--resume never, but {short(folder)} holds checkpoints; choose another --out")
    if resume == "never":
        return None, []
    if not started and resume != "auto":
        path = checkpoint_at(Path(resume))
        verify(open_checkpoint(path))
        return path, []
    checkpoint, skipped = newest_whole(own)
    if resume != "auto" and checkpoint is not None:
        asked = Path(resume).resolve()
        if asked.is_relative_to(folder.resolve()) and asked not in (
            folder.resolve(),
            own.resolve(),
            checkpoint.path.resolve(),
        ):
            raise InputError(
                f"--resume {resume}: {short(folder)} has gone on to step {checkpoint.step}; to branch off from an "
                "earlier step, choose another --out"
            )
    return (None if checkpoint is None else checkpoint.path), skipped


def check_same(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Raise InputError unless the checkpoint belongs to a run on the same data in the same order."""
    saved = checkpoint.state.get("identity")
    for what, value in identity.items():
        before = saved.get(what) if isinstance(saved, dict) else None
        if before != value:
            words = {"data": "other training or validation data", "order": "another order of the examples"}
            how = words.get(what, f"{what} {ascii(before)[:80]}, this run has {value}")
            raise InputError(
                f"{short(checkpoint.path)} was made with {how}; what it counts means nothing here; "
                f"{start_anew(checkpoint)}"
            )


def identity(cfg: Config, data: str, order: Order) -> dict[str, Any]:
    """Return what must be the same for a run to go on: seeds, data, and the order of the examples."""
    positions = np.concatenate([np.arange(64), np.geomspace(64, 2**40, 64).astype(np.int64)])
    indices = np.ascontiguousarray(order(positions), dtype="<i8")
    return {
        "seed": cfg.seed,
        "split_seed": cfg.split_seed,
        "data": data,
        "order": hashlib.sha256(indices.tobytes()).hexdigest(),
    }


def changes(run: Run, checkpoint: Checkpoint) -> list[str]:
    """Say which options differ from those the checkpoint was made with."""
    saved, total = checkpoint.state.get("config"), checkpoint.state.get("total_steps")
    now = strict(asdict(run.cfg))
    before = saved if isinstance(saved, dict) else {}
    found = [
        f"{name} {before[name]} -> {value}"
        for name, value in now.items()
        if name in before and before[name] != value and name not in NOT_LEARNED_FROM
    ]
    if total != run.total_steps:
        found.append(f"total steps {total} -> {run.total_steps}")
    return found
