"""Forecasts whose sources take long: a process of their own fits, and the plane hears of it when it is done.

The process reads a period per line from its standard input and answers with what it expects. It ends when
that closes, which it does however the gateway ends.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from tidegate.signals.forecast.arima import arima_installed
from tidegate.signals.forecast.choice import gateway_forecaster
from tidegate.signals.forecast.load import LoadPeriod

COMMAND = (sys.executable, "-m", "tidegate.gateway.load_fits")
Answered = Callable[[int, Mapping[str, Any]], None]


class LoadFits:
    """Has a process of its own forecast the load with ``arima`` among its sources.

    ``fit`` hands it a period; ``answered`` hears the period's number and what is expected from its end on. A
    process that ends is started no more: forecasts are then those of the sources that fit nothing. Without
    the library none is started.
    """

    def __init__(self, answered: Answered, command: tuple[str, ...] | None = None) -> None:
        self._answered = answered
        self._command = command or COMMAND
        self._process: subprocess.Popen[bytes] | None = None
        self._over = command is None and not arima_installed()
        self._received = b""

    def fit(self, number: int, period: LoadPeriod) -> bool:
        """Have the process take the period, and tell whether it has; called in the event loop."""
        if self._over:
            return False
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        line = orjson.dumps((number, list(period))) + b"\n"
        try:
            taken = self._process.stdin.write(line) == len(line)
        except BrokenPipeError:
            taken = False
        if not taken:
            self.close()
        return taken

    def close(self) -> None:
        """End the process."""
        self._over = True
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            asyncio.get_running_loop().remove_reader(process.stdout.fileno())
            process.kill()
            process.stdin.close()
            process.stdout.close()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        # A session of its own: a Ctrl-C is the gateway's alone.
        process = subprocess.Popen(self._command, bufsize=0, stdin=pipe, stdout=pipe, start_new_session=True)
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        asyncio.get_running_loop().add_reader(process.stdout.fileno(), self._read, process)
        return process

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        received = process.stdout.read(1 << 16)
        if not received:
            self.close()
            return
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            self._answered(*orjson.loads(line))


def main() -> None:
    """Answer each period of the standard input on the standard output."""
    forecaster = gateway_forecaster(fitting=arima_installed())
    for line in sys.stdin.buffer:
        number, period = orjson.loads(line)
        forecaster.push(LoadPeriod(*(float("nan") if value is None else value for value in period)))
        answer = (number, {name: each.plain() for name, each in forecaster.forecast.items()})
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
