"""What may be asked of a run from inside and outside: to stop, to save, to leave."""

import time
from signal import SIGINT

from scaletrain.agreement import NO_WISH, Wish, Wishes
from scaletrain.devices import Devices
from scaletrain.errors import INTERRUPTED, PREEMPTED
from scaletrain.signals import Signals


class Requests:
    """This process's wishes, and what all processes have agreed on."""

    def __init__(self, devices: Devices, signals: Signals, save_minutes: float) -> None:
        self.signals = signals
        self.wishes = Wishes(devices.control)
        self.stop = ""
        """Why this process asks for the end of training, if it does."""
        self.save_granted = False
        """Whether all have agreed to save after this step."""
        self._devices, self._save_seconds = devices, 60 * save_minutes
        self._save_at = time.monotonic() + self._save_seconds

    def exchange(self, *, failed: bool) -> Wish:
        """Return what was agreed on a step ago, and tell the others what this process asks for now.

        ``failed``: saving has failed here. Every rank must reach this line, once a step.
        """
        granted = self.wishes.read()
        if granted.save:
            self.save_granted, self.signals.save = True, False
        self.wishes.send(self._mine(failed))
        return granted

    def told_to_leave(self) -> int:
        """Return the exit code if all have agreed to leave, else 0; what else was agreed on waits for ``exchange``.

        Every rank must reach this line.
        """
        granted = self.wishes.read()
        self.wishes.hold(granted)
        self.wishes.send(Wish(leave=self._leave_with()))
        return granted.leave

    def saved(self) -> None:
        """Take note that saving has begun."""
        self.save_granted, self._save_at = False, time.monotonic() + self._save_seconds

    def _mine(self, failed: bool) -> Wish:
        clock = self._devices.is_first and time.monotonic() > self._save_at  # rank 0's decides for all
        save = (clock or self.signals.save) and not self.save_granted
        if not (save or self.stop or self.signals.leave or failed):
            return NO_WISH
        return Wish(1 + self._devices.rank if self.stop else 0, int(save), self._leave_with(), int(failed))

    def _leave_with(self) -> int:
        return 0 if not self.signals.leave else INTERRUPTED if self.signals.leave == SIGINT else PREEMPTED
