"""SIGINT and SIGTERM: the first one ends the run after the current step, a second one at once;
once all is saved already the first."""

from __future__ import annotations

import os
import signal
from typing import Any


class StopSignal:
    """Remembers the first signal; `received` is its number, or 0."""

    default = int(signal.SIGTERM)  # what a process reports that learns of another one's signal

    def __init__(self) -> None:
        self.received = 0
        self._all_saved = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM, until `remove`."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)

    def remove(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def all_saved(self) -> None:
        """From now on there is nothing to finish: a signal ends the process at once."""
        self._all_saved = True

    def _handle(self, number: int, frame) -> None:
        if self.received or self._all_saved:
            os._exit(self.exit_code(number))
        self.received = int(number)
        name = self.name_of(number)
        message = f"\n{name}: finishing this step, then saving; once more to exit at once\n"
        os.write(2, message.encode())

    @staticmethod
    def name_of(number: int) -> str:
        return signal.Signals(number).name

    @staticmethod
    def exit_code(number: int) -> int:
        """128 + the signal's number, as a shell reports it."""
        return 128 + int(number)
