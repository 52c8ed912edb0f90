# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""An orderly end at SIGTERM (schedulers, `kill`) and SIGINT (Ctrl-C)."""

import os
import signal
import threading
from types import FrameType


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """`with StopSignals(grace) as stop:` a first signal is kept in `stop.received`, for the work to end when it can.

    After `grace` seconds, or at a second signal, the signal has the effect it had before: SIGINT raises `KeyboardInterrupt`,
    SIGTERM ends the process. Outside the main thread, where Python takes no handlers, nothing is changed; and a signal that
    is ignored, as SIGINT is in a shell's background jobs, stays so.
    """

    INTERRUPT = signal.SIGINT

    def __init__(self, grace: float):
        self.grace = grace
        self.received: int | None = None
        self._before: dict[int, object] = {}
        self._timer: threading.Timer | None = None
        self._process = os.getpid()

    def __enter__(self) -> "StopSignals":
        self.received, self._process = None, os.getpid()
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *exception) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # a worker that was forked in the meantime has no checkpoint to save
        if self.received is not None or self.grace == 0 or os.getpid() != self._process:
            self._restore()
            signal.raise_signal(number)
            return
        self.received = number
        self._timer = threading.Timer(self.grace, os.kill, (self._process, number))
        self._timer.daemon = True
        self._timer.start()
