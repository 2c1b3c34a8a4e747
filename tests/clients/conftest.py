"""Gateways for clients that people use, which have an environment of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

UP = re.compile(r"serving on (http://\S+)/v1")


@contextmanager
def served(*flags: str) -> Iterator[str]:
    """Serve with prefill on one instance and decode on another; yield the base URL."""
    command = [os.environ.get("TIDEGATE", "tidegate"), "serve", "--port", "0", *flags]
    command += ["--system", "static", "--split", "1:1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if up := UP.search(line):
            yield up[1]
            break
    else:
        pytest.fail("the gateway did not come up:\n" + "".join(said))
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode in (0, 130)


@pytest.fixture(scope="session")
def gateway() -> Iterator[str]:
    """Serve the tiny model on two embedded engines; yield the base URL."""
    with served("--instances", "2", "--model", "tiny") as url:
        yield url


@pytest.fixture(scope="session")
def emulated() -> Iterator[str]:
    """Serve two emulated instances; yield the base URL."""
    with served("--emulate", "h100_sxm/llama-3.1-8b:2") as url:
        yield url
