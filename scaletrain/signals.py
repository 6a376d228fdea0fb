"""What the outside asks of a process by signals: SIGTERM and SIGINT to leave, SIGUSR1 to save.

A handler only notes it; the step is finished, and all processes act together (saving inside a handler would
deadlock in whatever the signal interrupted).
"""

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


def ignore() -> None:
    """Leave signals to the process that trains: in its workers, which end when it does."""
    for name in (*LEAVE, SAVE):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
