"""Finding the newest whole checkpoint, and telling one that is whole from one that is not."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain.checkpoint.format import (
    FOLDER,
    MANIFEST,
    STATE,
    STEP_FOLDER,
    Manifest,
    Piece,
    parse_manifest,
    read_header,
)
from scaletrain.checkpoint.reading import folder_descriptor, read_small, regular_file
from scaletrain.checkpoint.strict import parse_json
from scaletrain.errors import CheckpointError

READ_BYTES = 4 << 20
HASHING_THREADS = 4


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names, sizes and headers are as they should be; ``verify`` adds the hashes."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    """The content of state.json."""
    pieces: dict[str, dict[str, Piece]]
    """Of each tensor file by name: its pieces by tensor name."""
    extra: list[str]
    """Names of files that the manifest does not list; they are never opened."""

    @property
    def step(self) -> int:
        """Optimizer steps attempted, completed, when it was written."""
        return self.manifest.step

    def part(self, name: str) -> dict[str, dict[str, Piece]]:
        """Return the files of one part, as model or optimizer."""
        return {file: pieces for file, pieces in self.pieces.items() if file.rpartition("-")[0] == name}


def open_checkpoint(path: Path) -> Checkpoint:
    """Read all of a checkpoint but the tensors' bytes. Raises CheckpointError naming file and rule."""
    with folder_descriptor(path) as folder:
        manifest = parse_manifest(read_small(folder, MANIFEST, f"{path / MANIFEST}"), f"{path / MANIFEST}")
        if STEP_FOLDER.fullmatch(path.name) and int(path.name.removeprefix("step-")) != manifest.step:
            raise CheckpointError("step", f"{path}: step: the manifest says step {manifest.step}")
        pieces = {}
        for name, listed in manifest.files.items():
            what = f"{path / name}"
            with regular_file(folder, name, what) as (descriptor, size):
                if size != listed.size:
                    raise CheckpointError("size", f"{what}: size: {size:,} bytes, the manifest says {listed.size:,}")
                if name != STATE:
                    pieces[name] = read_header(descriptor, size, what)
        state = parse_json(read_small(folder, STATE, f"{path / STATE}"), f"{path / STATE}")
        if not isinstance(state, dict):
            raise CheckpointError("state", f"{path / STATE}: state: not an object")
        extra = sorted(set(os.listdir(folder)) - set(manifest.files) - {MANIFEST})  # noqa: PTH208  # by descriptor
    return Checkpoint(path, manifest, state, pieces, extra)


def verify(checkpoint: Checkpoint, names: list[str] | None = None) -> None:
    """Hash ``names`` (all files by default); raise CheckpointError for the first that is not what was written."""
    with folder_descriptor(checkpoint.path) as folder, ThreadPoolExecutor(HASHING_THREADS) as threads:
        files = list(checkpoint.manifest.files) if names is None else names
        found = threads.map(lambda name: _sha256(folder, name, checkpoint), files)
        for name, sha256 in zip(files, found, strict=True):
            if sha256 != checkpoint.manifest.files[name].sha256:
                raise CheckpointError(
                    "sha256", f"{checkpoint.path / name}: sha256: its bytes are not the ones that were written"
                )


def whole(path: Path) -> Checkpoint | str:
    """Return the checkpoint at ``path``, or why it is not whole."""
    try:
        checkpoint = open_checkpoint(path)
        verify(checkpoint)
    except CheckpointError as error:
        return str(error)
    return checkpoint


def is_valid(path: Path) -> bool:
    """Whether the checkpoint at ``path`` is whole to the last bit."""
    return isinstance(whole(path), Checkpoint)


def newest_first(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints of a run's folder ``checkpoints``, newest first, whole or not."""
    if not os.path.lexists(folder):
        return
    with folder_descriptor(folder) as descriptor:
        names = [name for name in os.listdir(descriptor) if STEP_FOLDER.fullmatch(name)]  # noqa: PTH208
    for name in sorted(names, key=lambda name: int(name.removeprefix("step-")), reverse=True):
        yield folder / name


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest whole checkpoint of ``folder``, and what was skipped on the way and why.

    None only where there is no checkpoint at all; raises CheckpointError where there are some and none is whole.
    """
    skipped: list[str] = []
    for path in newest_first(folder):
        found = whole(path)
        if isinstance(found, Checkpoint):
            return found, skipped
        skipped.append(found)
    if skipped:
        raise CheckpointError("none", f"{folder}: none: it has checkpoints but none is whole: " + "; ".join(skipped))
    return None, []


def open_whole(path: Path) -> tuple[Checkpoint, list[str]]:
    """Open and verify the checkpoint that a user means: one itself, or the newest whole one of a run's folder.

    Also returns which newer ones were skipped and why. Raises CheckpointError.
    """
    path = Path(os.path.realpath(path))
    if os.path.lexists(path / MANIFEST) or STEP_FOLDER.fullmatch(path.name):
        found = open_checkpoint(path)
        verify(found)
        return found, []
    checkpoint, skipped = newest_whole(path if path.name == FOLDER else path / FOLDER)
    if checkpoint is None:
        raise CheckpointError("missing", f"{path}: missing: neither a checkpoint nor a run's folder with some")
    return checkpoint, skipped


def _sha256(folder: int, name: str, checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    with regular_file(folder, name, f"{checkpoint.path / name}") as (descriptor, _):
        while got := os.readv(descriptor, [buffer]):
            digest.update(buffer[:got])
    return digest.hexdigest()
