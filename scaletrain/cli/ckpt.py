"""``scaletrain ckpt``: look at, check and convert the checkpoints of a run."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from scaletrain.errors import CHECKPOINT, DONE, CheckpointError, InputError

if TYPE_CHECKING:
    from scaletrain.checkpoint.verify import Checkpoint

RUN = tyro.conf.Positional[Path]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


@dataclass(frozen=True)
class List:
    """List the checkpoints of a run, newest first: step, bytes, processes, best."""

    run: RUN
    """Folder of a run."""

    def __call__(self) -> int:
        """Print a line for each checkpoint; those that cannot be opened say why."""
        from scaletrain.checkpoint.verify import newest_first

        found = [_try_open(path) for path in newest_first(_checkpoints(self.run))]
        if not found:
            raise CheckpointError("missing", f"{self.run}: missing: no checkpoints there")
        good = [one for one in found if not isinstance(one, CheckpointError)]
        counters = good[0].state.get("state") if good else None
        best = counters.get("best_step") if isinstance(counters, dict) else None  # as the newest one knows it
        for one in found:
            if isinstance(one, CheckpointError):
                _say(f"not whole: {one}")
                continue
            size = sum(listed.size for listed in one.manifest.files.values())
            mark = "  best" if one.step == best else ""
            _say(f"{one.path.name}  {size:,} bytes  written by {one.manifest.world_size}{mark}")
        return DONE if len(good) == len(found) else CHECKPOINT


@dataclass(frozen=True)
class Verify:
    """Check every byte of the checkpoints of a run, or of one; exit code 3 if any is not whole."""

    run: RUN
    """Folder of a run, or a checkpoint."""

    def __call__(self) -> int:
        """Print a line for each checkpoint: ok, or file and rule."""
        from scaletrain.checkpoint.format import MANIFEST, STEP_FOLDER
        from scaletrain.checkpoint.verify import newest_first, whole

        paths = list(newest_first(_checkpoints(self.run)))
        if not paths and not (STEP_FOLDER.fullmatch(self.run.resolve().name) or (self.run / MANIFEST).exists()):
            raise CheckpointError("missing", f"{self.run}: missing: no checkpoints there")
        paths = paths or [self.run.resolve()]
        bad = 0
        for path in paths:
            found = whole(path)
            if isinstance(found, str):
                bad += 1
                _say(f"{path.name}  not whole: {found}")
            else:
                extra = f"  (not in the manifest, ignored: {', '.join(map(ascii, found.extra))})" if found.extra else ""
                _say(f"{path.name}  ok{extra}")
        return CHECKPOINT if bad else DONE


@dataclass(frozen=True)
class Show:
    """Show what a checkpoint holds: counters, config, versions, tensors."""

    run: RUN
    """A checkpoint, or the folder of a run (its newest one)."""

    def __call__(self) -> int:
        """Print state.json without what is not for reading, and a line for each tensor."""
        from scaletrain.checkpoint.load import whole_shapes

        found = _open(self.run)
        _say(str(found.path))
        for name in ("state", "metrics", "config", "total_steps", "identity", "environment"):
            _say(f"{name}: {json.dumps(found.state.get(name))}")
        for part in ("model", "ema", "optimizer", "hooks"):
            for name, (shape, dtype) in whole_shapes(found, part).items():
                _say(f"{part}  {ascii(name)[1:-1]}  {str(dtype).removeprefix('torch.')} {list(shape)}")
        return DONE


@dataclass(frozen=True)
class Export:
    """Write the weights of a checkpoint as one safetensors file with plain names."""

    run: RUN
    """A checkpoint, or the folder of a run (its newest one)."""
    to: tyro.conf.Positional[Path]
    """File to write, as model.safetensors."""
    dtype: Literal["same", "fp32", "bf16", "fp16", "fp64"] = "same"
    """Number format of the floating-point tensors."""

    def __call__(self) -> int:
        """Verify, convert and write."""
        import torch

        from scaletrain.checkpoint.export import export

        if self.to.exists():
            raise InputError(f"{self.to} is there already; name another file")
        found = _open(self.run)
        export(found, self.to, None if self.dtype == "same" else getattr(torch, DTYPES[self.dtype]))
        _say(f"weights of step {found.step}: {self.to}")
        return DONE


@dataclass(frozen=True)
class Diff:
    """Say in what two checkpoints differ; exit code 1 if they do."""

    run: RUN
    """A checkpoint, or the folder of a run (its newest one)."""
    other: tyro.conf.Positional[Path]
    """Another one."""

    def __call__(self) -> int:
        """Print a line for each difference in counters, config and tensors."""
        from scaletrain.checkpoint.compare import differences
        from scaletrain.config import NOT_LEARNED_FROM

        found = differences(_open(self.run), _open(self.other), NOT_LEARNED_FROM)
        for line in found:
            _say(line)
        if not found:
            _say("the same, to the last bit")
        return 1 if found else DONE


ACTIONS = Annotated[
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Diff, tyro.conf.subcommand("diff")],
    tyro.conf.arg(name=""),
]


@dataclass(frozen=True)
class Ckpt:
    """Checkpoints: list, verify, show, export, diff."""

    action: ACTIONS


def _open(path: Path) -> Checkpoint:
    from scaletrain.checkpoint.verify import open_whole

    found, skipped = open_whole(path)
    for why in skipped:
        print(f"skipped: {why}", file=sys.stderr)
    return found


def _try_open(path: Path) -> Checkpoint | CheckpointError:
    from scaletrain.checkpoint.verify import open_checkpoint

    try:
        return open_checkpoint(path)
    except CheckpointError as error:
        return error


def _checkpoints(run: Path) -> Path:
    from scaletrain.checkpoint.format import FOLDER

    if not run.exists():
        raise InputError(f"{run} does not exist")
    return run if run.resolve().name == FOLDER else run / FOLDER


def _say(text: str) -> None:
    print(text)
