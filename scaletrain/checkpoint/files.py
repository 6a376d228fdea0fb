"""Every change that a checkpoint makes to a disk goes through ``Files``; tests put a failing one in its place."""

import os
from pathlib import Path


class Files:
    """The system calls of saving, one method each. All raise OSError."""

    def mkdir(self, path: Path) -> None:
        """Make a folder that is not there yet."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Create a file that is not there yet, with the mode the umask leaves; return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write from ``data``; return how many bytes were."""
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        """Wait until a file's bytes are on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a file; the last chance of some file systems to say that a write failed."""
        os.close(descriptor)

    def fsync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        self._fsync_path(path, os.O_DIRECTORY)

    def fsync_file(self, path: Path) -> None:
        """Wait until a file that others wrote is on the disk."""
        self._fsync_path(path, 0)

    def rename(self, source: Path, target: Path) -> None:
        """Give ``source`` another name in the same folder, at once."""
        source.rename(target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def free_bytes(self, path: Path) -> int:
        """Return how many bytes may still be written to the disk that ``path`` is on."""
        disk = os.statvfs(path)
        return disk.f_bavail * disk.f_frsize

    def _fsync_path(self, path: Path, flags: int) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def put_in_place(draft: Path, path: Path, files: Files | None = None) -> None:
    """Give a complete file its name, so that a power cut leaves the old one or the new one, never half of it."""
    files = files or Files()
    files.fsync_file(draft)
    files.rename(draft, path)
    files.fsync_folder(path.parent)
