"""Which checkpoints stay, and how the others go: only after a newer one is committed."""

from dataclasses import dataclass, field
from pathlib import Path

from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.format import STEP_FOLDER, step_folder
from scaletrain.checkpoint.verify import is_valid


@dataclass
class Keep:
    """Three independent rules: the last ``last``, the best, and every ``every``-th step for ever."""

    last: int = 2
    every: int | None = None
    also: int = -1
    """The step that the run was resumed from."""
    verified: set[str] = field(default_factory=set)
    """Names of those that this process wrote or has read and found whole: the only ones that count."""


def prune(files: Files, folder: Path, keep: Keep, best_step: int) -> str:
    """Remove what no rule keeps. One that is not whole never counts; among the newest it stays, to be looked at."""
    steps = sorted((step_of(e.name) for e in folder.iterdir() if STEP_FOLDER.fullmatch(e.name)), reverse=True)
    whole = 0
    for step in steps:
        name = step_folder(step)
        ruled = step in (best_step, keep.also) or (keep.every is not None and step % keep.every == 0)
        if whole >= keep.last and not ruled:
            discard(files, folder / name)
        elif name in keep.verified or (whole < keep.last and is_valid(folder / name)):
            keep.verified.add(name)
            whole += 1
    return ""


def discard(files: Files, folder: Path) -> None:
    """Remove a folder of files: under another name first, so that no crash leaves a part of it in its place."""
    trash = folder
    if STEP_FOLDER.fullmatch(folder.name):
        trash = folder.with_name(f".trash-{folder.name}")
        if trash.exists():
            _remove(files, trash)
        files.rename(folder, trash)
        files.fsync_folder(folder.parent)
    _remove(files, trash)


def clear_leftovers(files: Files, folder: Path) -> None:
    """Remove what a killed process had not finished writing or removing."""
    for entry in folder.iterdir():
        if entry.name.startswith((".tmp-step-", ".trash-step-")):
            _remove(files, entry)


def step_of(name: str) -> int:
    """Return the step in a checkpoint's name."""
    return int(name.removeprefix("step-"))


def _remove(files: Files, folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        files.unlink(folder)
        return
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            _remove(files, entry)
        else:
            files.unlink(entry)
    files.rmdir(folder)
