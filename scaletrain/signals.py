"""What the outside asks of a process by signals: SIGTERM and SIGINT to leave, SIGUSR1 to save.

A handler only notes it; the step is finished, and all processes act together (saving inside a handler would
deadlock in whatever the signal interrupted).
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LEAVE, SAVE = ("SIGTERM", "SIGINT"), "SIGUSR1"


class Signals:
    """What signals have asked for so far."""

    def __init__(self, alone: bool = True) -> None:
        self.alone = alone
        """Whether no launcher stands by that sends the terminal's Ctrl-C a second time."""
        self.leave = 0
        """The signal that asked to leave; 0 for none."""
        self.save = False
        self.training = False
        """Before training there is nothing to save, and Ctrl-C ends the process as it does any other."""

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Take note of a signal. A second Ctrl-C to a process of its own means at once."""
        if number == signal.SIGUSR1:
            self.save = True
        elif number == signal.SIGINT and (not self.training or (self.leave and self.alone)):
            raise KeyboardInterrupt
        else:
            self.leave = self.leave or number


@contextmanager
def noting(alone: bool) -> Iterator[Signals]:
    """Note signals for as long as the context lasts; outside the main thread Python allows none."""
    signals = Signals(alone)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = [getattr(signal, name) for name in (*LEAVE, SAVE) if hasattr(signal, name)]
    before = {number: signal.signal(number, signals.note) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def obey_parent_alone() -> None:
    """Leave signals to the process that trains: in its workers, which end when it says so.

    A scheduler sends SIGTERM to every process; a worker that ended by it would take the step with it that is to
    be finished and saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says_so, daemon=True).start()


def _end_when_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)
