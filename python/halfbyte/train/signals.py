"""Ctrl-C and SIGTERM as a request that the loop honours after the step at hand."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

NOTICE = b"\nstopping after this step, then saving; Ctrl-C again stops at once\n"


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `signum`; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no handlers, it never asks to stop.
    """

    def __init__(self, shown: bool):
        self.signum: int | None = None
        self.shown = shown
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if self.shown:
            # Not print: the signal may have come in the middle of one.
            os.write(2, NOTICE)
