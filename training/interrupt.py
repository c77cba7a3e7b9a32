"""Signals that ask for an end: the first one ends the run after the current step or batch, a
second one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any


class StopSignal:
    """Remembers the first signal; `received` is its number, or 0."""

    default = int(signal.SIGTERM)  # what a process reports that learns of another one's signal

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Takes over SIGINT, SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 (a cluster's warning
        before SIGTERM), until `remove`; not what is ignored, as by nohup. Python hears signals in
        its main thread alone: elsewhere (a notebook's, a test's) nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is None or signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)

    def remove(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame) -> None:
        if self.received:
            if self.name_of(number) != "SIGHUP":  # a closing terminal sends it more than once
                os._exit(self.exit_code(number))
            return
        self.received = int(number)
        name = self.name_of(number)
        message = f"\n{name}: finishing this step, then saving; once more to exit at once\n"
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            os.write(2, message.encode())

    @staticmethod
    def name_of(number: int) -> str:
        return signal.Signals(number).name

    @staticmethod
    def exit_code(number: int) -> int:
        """128 + the signal's number, as a shell reports it."""
        return 128 + int(number)
