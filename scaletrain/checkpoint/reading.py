"""Opening and reading the files of a checkpoint: regular files in plain folders, never what a link points to."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scaletrain.checkpoint.strict import JSON_BYTES
from scaletrain.errors import CheckpointError

SPARSE_BYTES = 64 << 20
"""Files above this must be stored at least to an eighth: a hole of a terabyte would be read for an hour."""


@contextmanager
def folder_descriptor(path: Path) -> Iterator[int]:
    """Open a folder itself, never what a link points to."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError("folder", f"{path}: folder: {error.strerror}; a plain folder is expected") from None


@contextmanager
def regular_file(folder: int, name: str, what: str) -> Iterator[tuple[int, int]]:
    """Open a regular file in the folder ``folder`` (a descriptor); yield its descriptor and size.

    Links are not followed, and a FIFO or device is refused without waiting for it.
    """
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            yield descriptor, _regular_size(descriptor, what)
        finally:
            os.close(descriptor)
    except OSError as error:  # of opening and of reading
        rule = "missing" if isinstance(error, FileNotFoundError) else "file"
        raise CheckpointError(rule, f"{what}: {rule}: {error.strerror}") from None


def read_small(folder: int, name: str, what: str) -> bytes:
    """Read a file of JSON, of at most ``JSON_BYTES``."""
    with regular_file(folder, name, what) as (descriptor, size):
        if size > JSON_BYTES:
            raise CheckpointError("size", f"{what}: size: {size:,} bytes of JSON, at most {JSON_BYTES:,} are read")
        return read_exactly(descriptor, size, what)


def _regular_size(descriptor: int, what: str) -> int:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("file", f"{what}: file: not a regular file")
    if found.st_size > SPARSE_BYTES and found.st_blocks * 512 * 8 < found.st_size:
        raise CheckpointError("sparse", f"{what}: sparse: {found.st_size:,} bytes, of which hardly any are stored")
    return found.st_size


def read_exactly(descriptor: int, length: int, what: str) -> bytes:
    """Read ``length`` bytes; raise CheckpointError where the file ends before."""
    parts, missing = [], length
    while missing:
        part = os.read(descriptor, min(missing, 1 << 20))
        if not part:
            raise CheckpointError("size", f"{what}: size: ends {missing:,} bytes early")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
