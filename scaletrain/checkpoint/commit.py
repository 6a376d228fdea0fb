"""The one sequence in which a checkpoint comes to be. Whatever interrupts it, no half of one is ever taken for whole.

Agree; write beside; sync every file; the manifest last; sync the folder; rename; sync the parent: only then is
it committed. This is the order that leaves no bad state when a crash may lose or keep anything that was not synced.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist

from scaletrain.agreement import gather_texts
from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.format import MANIFEST, STATE, Listed, Manifest, step_folder
from scaletrain.checkpoint.reading import folder_descriptor, regular_file
from scaletrain.checkpoint.retain import Keep, discard, prune
from scaletrain.checkpoint.tensors import Snapshot, write_file, write_shares
from scaletrain.checkpoint.verify import is_valid
from scaletrain.errors import CheckpointError

SPARE_BYTES = 1 << 20
"""Room for headers, JSON and folders, beside the tensors."""
UNTOUCHED = "the checkpoints there are untouched; when it is mended, start again to continue from the newest"


class Commit:
    """Commits checkpoints into ``folder``; every rank holds one. Its group serves no other thread meanwhile."""

    def __init__(self, folder: Path, group: dist.ProcessGroup | None, files: Files, keep: Keep) -> None:
        self.folder, self._group, self._files, self._keep = folder, group, files, keep
        self._rank = 0 if group is None else dist.get_rank(group)
        self._world_size = 1 if group is None else dist.get_world_size(group)
        self._anchored = False

    def __call__(self, step: int, snapshot: Snapshot, state: bytes, beside: Iterable[Path], best_step: int) -> None:
        """Write the checkpoint of ``step``: the tensors of ``snapshot`` and ``state``, the content of state.json.

        ``beside`` are files outside that must be as old as the checkpoint at least. Raises the same
        CheckpointError on all ranks. Every rank must reach this line.
        """
        temporary = self._agreed(lambda: str(self._prepare(step, snapshot)) if self._rank == 0 else "")[0]
        try:
            said = self._agreed(lambda: self._write(Path(temporary), snapshot, state, beside))
            self._compare_replicas(said, snapshot)
            self._agreed(lambda: self._publish(step, Path(temporary), said) if self._rank == 0 else "")
        except CheckpointError:
            if self._rank == 0:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    discard(self._files, Path(temporary))
            raise
        self._agreed(lambda: prune(self._files, self.folder, self._keep, best_step) if self._rank == 0 else "")

    def _prepare(self, step: int, snapshot: Snapshot) -> Path:
        if not (self._anchored and self.folder.is_dir()):
            self._anchor()
        needed, free = snapshot.total_bytes + SPARE_BYTES, self._files.free_bytes(self.folder)
        if needed > free:
            raise CheckpointError(
                "disk",
                f"{self.folder}: disk: a checkpoint needs {needed:,} bytes and {free:,} are free; {UNTOUCHED}",
            )
        temporary = self.folder / f".tmp-{step_folder(step)}-{secrets.token_hex(4)}"
        self._files.mkdir(temporary)
        return temporary

    def _anchor(self) -> None:
        """Make the folder if need be, and sync its name and those on the way to it.

        Once per process: one that was killed may have made them and not come to syncing them.
        """
        if not self.folder.is_symlink() and not self.folder.exists():
            self._files.mkdir(self.folder)
        with folder_descriptor(self.folder):  # what could not be read later is not written
            pass
        run = self.folder.parent.resolve()  # may be a link to another disk
        for above in (run, *run.parents):
            if above.stat().st_dev != run.stat().st_dev or not os.access(above, os.R_OK):
                break  # no folder of this run's making
            self._files.fsync_folder(above)
        self._anchored = True

    def _write(self, folder: Path, snapshot: Snapshot, state: bytes, beside: Iterable[Path]) -> str:
        """Write and sync this rank's files; return what the manifest says of them, and what replicas hold."""
        snapshot.finish_copying()
        written = write_shares(self._files, folder, self._rank, snapshot.shares)
        if self._rank == 0:
            written[STATE] = write_file(self._files, folder / STATE, [memoryview(state)])
            for path in beside:
                self._files.fsync_file(path)
        return json.dumps({"files": written, "replicas": snapshot.replicas})

    def _compare_replicas(self, said: list[str], snapshot: Snapshot) -> None:
        everyones = [json.loads(text)["replicas"] for text in said]
        for rank, replicas in enumerate(everyones):
            for name in snapshot.replicas:
                if replicas.get(name) != everyones[0].get(name):
                    raise CheckpointError(
                        "replicas",
                        f"replicas: {name} on rank {rank} differs from rank 0's, though all ranks compute the same: "
                        "a fault of memory or of a custom step; nothing was saved",
                    )

    def _publish(self, step: int, temporary: Path, said: list[str]) -> str:
        files = {name: Listed(*entry) for text in said for name, entry in json.loads(text)["files"].items()}
        with folder_descriptor(temporary) as folder:
            for name, (size, _) in files.items():
                what = f"{temporary / name}"
                with regular_file(folder, name, what) as (_, found):
                    if found != size:
                        raise CheckpointError("size", f"{what}: size: {found:,} bytes, {size:,} were written")
        manifest = Manifest(step, self._world_size, files).to_json()
        write_file(self._files, temporary / MANIFEST, [memoryview(manifest)])
        self._files.fsync_folder(temporary)
        final = self.folder / step_folder(step)
        if final.exists():  # a damaged one that resuming skipped
            if is_valid(final):
                raise CheckpointError(
                    "exists", f"{final}: exists: another process works in this folder; stop one of them"
                )
            discard(self._files, final)
        self._files.rename(temporary, final)
        self._files.fsync_folder(self.folder)
        self._keep.verified.add(final.name)
        return ""

    def _agreed(self, work: Callable[[], str]) -> list[str]:
        """Do ``work`` on every rank and gather what it returns; what fails on one fails on all with the same words."""
        error, said = ["", ""], ""
        try:
            said = work()
        except CheckpointError as failure:
            error = [failure.rule, str(failure)]
        except OSError as failure:
            why = f"{failure.filename or self.folder}: disk: {failure.strerror or failure} (on rank {self._rank})"
            error = ["disk", f"{why}; {UNTOUCHED}"]
        except Exception as failure:  # whatever it is, the other ranks wait for an answer
            why = f"{self.folder}: saving: {type(failure).__name__}: {failure} (on rank {self._rank})"
            error = ["saving", f"{why}; {UNTOUCHED}"]
        answers = [json.loads(text) for text in gather_texts(json.dumps([*error, said]), self._group)]
        for rule, message, _ in answers:
            if rule:
                raise CheckpointError(rule, message)
        return [said for _, _, said in answers]
