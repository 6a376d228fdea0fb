"""Saving beside training: copy, then write and commit in a thread, one checkpoint at a time."""

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from scaletrain.agreement import SAVING
from scaletrain.checkpoint.commit import Commit
from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.retain import Keep
from scaletrain.checkpoint.tensors import Parts, Snapshot
from scaletrain.checkpoint.verify import Checkpoint


class Saver:
    """Saves the checkpoints of a run; ``copying`` is the main thread's group, ``writing`` the saving thread's."""

    def __init__(
        self,
        folder: Path,
        *,
        copying: dist.ProcessGroup | None = None,
        writing: dist.ProcessGroup | None = None,
        keep: Keep | None = None,
        files: Files | None = None,
    ) -> None:
        self.folder, self.keep = folder, keep or Keep()
        self.failure: BaseException | None = None
        """Why the last save failed, known on this rank; ``wait`` raises it."""
        self.saved_step = -1
        """Step of the newest checkpoint that was begun, or resumed from."""
        self.seconds = 0.0
        """How long the last save took, from the first copy to the commit."""
        self._snapshot = Snapshot(copying)
        self._commit = Commit(folder, writing, files or Files(), self.keep)
        self._thread: threading.Thread | None = None

    def resumed(self, checkpoint: Checkpoint) -> None:
        """Take note of the checkpoint that the run goes on from: it is whole, and it stays as long as this process."""
        self.saved_step = self.keep.also = checkpoint.step
        self.keep.verified.add(checkpoint.path.name)

    def save(self, step: int, parts: Parts, state: bytes, *, beside: Iterable[Path] = (), best_step: int = -1) -> None:
        """Begin to save ``step``: returns when ``parts`` are copied. Waits for the one before.

        Every rank must reach this line.
        """
        self.wait()
        began = time.monotonic()
        self._snapshot.take(parts)
        self.saved_step = step
        self._thread = threading.Thread(
            target=self._work, args=(began, step, state, tuple(beside), best_step), name=SAVING, daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was begun is committed; raise what went wrong, the same on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def _work(self, began: float, step: int, state: bytes, beside: Iterable[Path], best_step: int) -> None:
        _be_nice()
        try:
            self._commit(step, self._snapshot, state, beside, best_step)
            self.seconds = time.monotonic() - began
        except BaseException as error:  # a thread that dies in silence would let training go on unsaved
            self.failure = error


def _be_nice() -> None:
    """Let training go first where both want the same core; on Linux a thread has a priority of its own."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    except (AttributeError, OSError):
        return
