"""``tidegate serve --launch vllm``: a gateway with real servers of its own; one of them dies, then itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vllm.vllm_servers import MODELS, ROOT, RUNTIME, START_S, VLLM
from tidegate.fleet.keeper import descendants

SERVER_ARGS = (
    "--dtype float32 --enforce-eager --max-model-len 4096 --block-size 32 --kv-cache-memory-bytes 33554432"
)


class Gateway:
    """A ``tidegate serve`` with two servers, whose output is kept in a file."""

    def __init__(self, folder: Path) -> None:
        self._output = folder / "gateway.log"
        kept = ("PYTHONPATH", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS")
        own = {name: RUNTIME[name] for name in kept} | {"CUDA_VISIBLE_DEVICES": ""}
        command = [
            *(sys.executable, "-m", "tidegate.cli.main", "serve", "--port", "0", "--launch", "vllm"),
            *("--model", str(MODELS / "tiny-llama"), "--instances", "2", "--vllm-bin", str(VLLM)),
            *("--vllm-logs", str(folder / "logs"), "--vllm-args", SERVER_ARGS, "--system", "round-robin"),
        ]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=os.environ | own, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def until(self, condition: Callable[[], bool], deadline_s: float = START_S) -> None:
        """Return once ``condition`` holds; fail with the gateway's output when it does not in time."""
        ends_s = time.monotonic() + deadline_s
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < ends_s, self.output()
            time.sleep(0.2)

    def server_urls(self, name: str) -> list[str]:
        """Return where an instance was, for each time that it came up."""
        return re.findall(rf"  {name} up after .* at (http://\S+),", self.output())

    def server_process(self, url: str) -> int:
        """Return the process that serves ``url``."""
        words = b"\0--port\0" + url.rpartition(":")[2].encode() + b"\0"
        for pid in descendants(self.process.pid):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if words in command and b"tidegate.fleet.keeper" not in command:
                return pid
        raise AssertionError(f"nothing serves {url}")

    def complete(self, prompt: str) -> list[str]:
        """Return a greedy completion through the gateway."""
        found = re.search(r"serving on (\S+/v1)", self.output())
        assert found is not None
        body = {"model": "tiny-llama", "prompt": prompt, "max_tokens": 24, "temperature": 0}
        request = urllib.request.Request(
            f"{found[1]}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [choice["text"] for choice in json.loads(answer.read())["choices"]]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    one = Gateway(tmp_path)
    yield one
    processes = descendants(one.process.pid)
    if one.process.poll() is None:
        one.process.terminate()
        try:
            one.process.wait(60)
        except subprocess.TimeoutExpired:
            one.process.kill()
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()], "left behind"


def test_a_killed_server_comes_back_and_none_outlives_the_gateway(gateway: Gateway) -> None:
    gateway.until(lambda: "serving on" in gateway.output())
    expected = gateway.complete("The tide comes in")
    first = gateway.server_urls("i1")
    os.kill(gateway.server_process(first[0]), signal.SIGKILL)
    gateway.until(lambda: len(gateway.server_urls("i1")) == 2)
    for _ in range(4):
        assert gateway.complete("The tide comes in") == expected, "from both servers"
    everything = descendants(gateway.process.pid)
    assert len(everything) >= 8, "two keepers with three processes or more each"
    gateway.process.kill()
    gateway.process.wait()
    ends_s = time.monotonic() + 20
    while left := [pid for pid in everything if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < ends_s, f"still there: {left}"
        time.sleep(0.1)
