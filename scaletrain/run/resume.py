"""Where a run goes on: which checkpoint, whether it is this run's, and what has changed since."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletrain.agreement import gather_texts, together
from scaletrain.checkpoint.format import FOLDER
from scaletrain.checkpoint.verify import Checkpoint, newest_first, newest_whole, open_checkpoint, open_whole
from scaletrain.config import NOT_LEARNED_FROM, Config
from scaletrain.errors import InputError
from scaletrain.folder import describe_environment, short, strict
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

    def look() -> tuple[Path | None, list[str]]:
        try:
            return _choose(folder, resume) if first else (None, [])
        except OSError as error:
            raise InputError(f"cannot read the checkpoints of {short(folder)}: {error.strerror}") from None

    path, skipped = together(look, group)
    path, skipped = json.loads(gather_texts(json.dumps([str(path or ""), skipped]), group)[0])
    return (open_checkpoint(Path(path)) if path else None), skipped


def _choose(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    own = folder / FOLDER
    started = next(newest_first(own), None) is not None
    if resume == "never" and started:
        raise InputError(f"--resume never, but {short(folder)} holds checkpoints; choose another --out")
    if resume == "never":
        return None, []
    if not started and resume != "auto":
        found, skipped = open_whole(Path(resume))
        return found.path, skipped
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
            advice = start_anew(checkpoint)
            if what == "order" and "stream" in str(before):
                words["order"] = f"{before:.100}, and now it is {value:.100}"
                advice = f"go on with the processes and the shuffle_buffer it had, or, {advice}"
            how = words.get(what, f"{what} {ascii(before)[:80]}, this run has {value}")
            raise InputError(
                f"{short(checkpoint.path)} was made with {how}; what it counts means nothing here; {advice}"
            )


def identity(cfg: Config, data: str, order: str) -> dict[str, Any]:
    """Return what must be the same for a run to go on: seeds, data, and the order of the examples."""
    return {"seed": cfg.seed, "split_seed": cfg.split_seed, "data": data, "order": order}


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


def other_rounding(run: Run, checkpoint: Checkpoint) -> list[str]:
    """Say what differs of that which the last bits depend on: processes, threads, device, versions."""
    saved = checkpoint.state.get("environment")
    before, now = (_flat(one) for one in (saved, describe_environment(run.devices)))
    config = checkpoint.state.get("config")
    if isinstance(config, dict) and "compile" in config:
        before["compile"], now["compile"] = config["compile"], run.cfg.compile
    return [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]


def _flat(environment: Any) -> dict[str, Any]:
    """Return what of an environment the arithmetic depends on."""
    if not isinstance(environment, dict):
        return {}
    versions = environment.get("versions")
    found = {name: environment[name] for name in ("processes", "threads", "device", "precision") if name in environment}
    return found | ({"torch": versions["torch"]} if isinstance(versions, dict) and "torch" in versions else {})
