"""Forecasts whose sources take long: a process of their own fits, and the plane hears of it when it is done.

The process reads a period per line from its standard input and answers with what it expects. It ends when
that closes, which it does however the gateway ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from tidegate.signals.forecast.choice import ForecastSettings, gateway_forecaster
from tidegate.signals.forecast.load import LoadPeriod

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "tidegate.gateway.load_fits")
Answered = Callable[[int, Mapping[str, Any]], None]
GONE = -1
"""In place of a period's number, where nothing is expected any more."""


class LoadFits:
    """Has a process of its own forecast the load with ``arima`` among its sources.

    ``fit`` hands it a period; ``answered`` hears the period's number and what is expected from its end on. A
    process that ends, which ``answered`` hears as nothing expected, is started no more: forecasts are then
    those of the sources that fit nothing. Such an end, and the first answer that comes too late, are logged.
    """

    def __init__(
        self, settings: ForecastSettings, answered: Answered, command: tuple[str, ...] = COMMAND
    ) -> None:
        self._answered = answered
        self._command = (*command, settings.source, str(settings.period_s), str(settings.steps))
        self._process: subprocess.Popen[bytes] | None = None
        self._period_s = settings.period_s
        self._newest = 0
        self._late = False
        self._over = False
        self._received = b""

    def fit(self, number: int, periods: Sequence[LoadPeriod]) -> None:
        """Have the process take a period, or with number 0 those of an earlier run; called in the event
        loop."""
        if self._over:
            return
        self._newest = number
        line = orjson.dumps((number, [tuple(period) for period in periods])) + b"\n"
        try:
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            os.set_blocking(process.stdin.fileno(), not number)  # many periods fill the pipe
            if process.stdin.write(line) != len(line):
                self.close("it is far behind")
        except OSError as error:
            self.close(error.strerror or "it takes no more")

    def close(self, trouble: str = "") -> None:
        """End the process, because of some trouble if there is one."""
        if trouble and not self._over:
            log.warning("no more fits of the load, simpler sources forecast alone: %s", trouble)
        if not self._over:
            self._over = True
            self._answered(GONE, {})
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
        assert process.stdout is not None
        asyncio.get_running_loop().add_reader(process.stdout.fileno(), self._read, process)
        return process

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        received = process.stdout.read(1 << 16)
        if not received:
            self.close("the process that fits has ended")
            return
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            number, expected = orjson.loads(line)
            if number < self._newest and not self._late:
                self._late = True
                log.warning(
                    "a fit of the load took longer than a period of %g s: where one does, simpler sources "
                    "forecast; a longer --forecast-period leaves it the time",
                    self._period_s,
                )
            self._answered(number, expected)


def main(source: str, period_s: str, steps: str) -> None:
    """Answer each period of the standard input on the standard output."""
    settings = ForecastSettings(source, float(period_s), int(steps))
    forecaster = gateway_forecaster(settings, fitting=True)
    for line in sys.stdin.buffer:
        number, plain = orjson.loads(line)
        periods = [LoadPeriod.of(period) for period in plain]
        if number:
            forecaster.push(periods[0])
        else:
            forecaster.warm(periods)
        answer = (number, {name: each.plain() for name, each in forecaster.forecast.items()})
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
