"""One gateway over embedded engines, for clients that people use. They have an environment of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

UP = re.compile(r"serving on (http://\S+)/v1")


@pytest.fixture(scope="session")
def gateway() -> Iterator[str]:
    """Serve the tiny model on two instances, prefill on one and decode on the other; yield the base URL."""
    command = [os.environ.get("TIDEGATE", "tidegate"), "serve", "--port", "0", "--instances", "2"]
    command += ["--model", "tiny", "--system", "static", "--split", "1:1"]
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
