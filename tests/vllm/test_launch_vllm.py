"""``tidegate serve --launch vllm``: a gateway with real servers of its own; one of them dies, then itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.vllm_servers import MODELS, ROOT, RUNTIME, START_S, VLLM
from tidegate.fleet.keeper import descendants

SERVER_ARGS = (
    "--dtype float32 --enforce-eager --max-model-len 4096 --block-size 32 --kv-cache-memory-bytes 33554432"
)
GONE_S = 60.0
"""When a process that should end by itself counts as left behind, on a machine that does much else."""
PROFILE = "h100_sxm/llama-3.1-8b"
"""Of something else: a server that is not as fast as predicted is no matter here."""


class Gateway:
    """A ``tidegate serve`` with servers of its own, whose output is kept in a file."""

    def __init__(self, folder: Path, instances: str = "2", *serve: str, gpus: str = "") -> None:
        self._output = folder / "gateway.log"
        kept = ("PYTHONPATH", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS")
        own = {name: RUNTIME[name] for name in kept} | {"CUDA_VISIBLE_DEVICES": gpus}
        command = [
            *(sys.executable, "-m", "tidegate.cli.main", "serve", "--port", "0", "--launch", "vllm"),
            *("--model", str(MODELS / "tiny-llama"), "--instances", instances),
            *("--vllm-bin", str(VLLM), "--vllm-logs", str(folder / "logs"), "--vllm-args", SERVER_ARGS),
            *(serve or ("--system", "round-robin")),
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

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 60.0) -> Any:
        """POST ``body``, or GET without one, and return the answer. Raises urllib's HTTPError."""
        found = re.search(r"serving on (\S+)/v1", self.output())
        assert found is not None
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(found[1] + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.loads(answer.read())

    def complete(self, prompt: str, max_tokens: int = 24) -> list[str]:
        """Return a greedy completion through the gateway."""
        body = {"model": "tiny-llama", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return [choice["text"] for choice in self.ask("/v1/completions", body)["choices"]]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    yield from running(Gateway(tmp_path))


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Gateway]:
    yield from running(Gateway(tmp_path, "1..2", "--system", "colocated", "--profile", PROFILE))


@pytest.fixture
def budgeted(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that takes its server, which is on the CPU, for one on a GPU: there it chooses a budget."""
    words = ("--system", "colocated", "--profile", PROFILE, "--slo", "ttft:500,tpot:50")
    yield from running(Gateway(tmp_path, "1", *words, gpus="0"))


def running(one: Gateway) -> Iterator[Gateway]:
    """Give a gateway to a test, and see that nothing of it is left behind."""
    yield one
    processes = descendants(one.process.pid)
    if one.process.poll() is None:
        one.process.terminate()
        try:
            one.process.wait(60)
        except subprocess.TimeoutExpired:
            one.process.kill()
    wait_until_gone(processes)


def wait_until_gone(processes: Iterable[int]) -> None:
    """Return once none of them is there: some end by themselves once the one that they served has ended."""
    ends_s = time.monotonic() + GONE_S
    while left := [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < ends_s, f"left behind: {left}"
        time.sleep(0.1)


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
    wait_until_gone(everything)


def test_a_server_is_added_and_one_drained_under_load(growing: Gateway) -> None:
    gateway = growing
    gateway.until(lambda: "serving on" in gateway.output())
    prompts = [f"The tide comes in for the {n}. time" for n in range(4)]
    expected = [gateway.complete(prompt, 60) for prompt in prompts]
    done = threading.Event()

    def load(n: int) -> int:
        rounds = 0
        while not done.is_set():
            assert gateway.complete(prompts[n], 60) == expected[n]
            rounds += 1
        return rounds

    with ThreadPoolExecutor(len(prompts)) as clients:
        loads = [clients.submit(load, n) for n in range(len(prompts))]
        try:
            gateway.ask("/tidegate/instances", {"role": "mixed"})
            gateway.until(lambda: bool(gateway.server_urls("i1")))
            with pytest.raises(urllib.error.HTTPError, match="409"):
                gateway.ask("/tidegate/instances", {"role": "mixed"})
            gateway.until(
                lambda: any(row["decode_requests"] for row in rows_of(gateway) if row["id"] == "i1")
            )
            pid = gateway.server_process(gateway.server_urls("i0")[0])
            gateway.ask("/tidegate/instances/i0/drain", {"remove": True})
            gateway.until(lambda: not Path(f"/proc/{pid}").exists())
            gateway.until(lambda: [row["id"] for row in rows_of(gateway)] == ["i1"])
        finally:
            done.set()
        assert all(one.result(120) > 0 for one in loads)
    assert [gateway.complete(prompt, 60) for prompt in prompts] == expected


def rows_of(gateway: Gateway) -> list[dict[str, Any]]:
    """Return what the gateway says of its instances."""
    rows: list[dict[str, Any]] = gateway.ask("/tidegate/state")["instances"]
    return rows


def test_a_server_has_the_step_that_keeps_the_target(budgeted: Gateway, tmp_path: Path) -> None:
    gateway = budgeted
    gateway.until(lambda: "serving on" in gateway.output())
    assert "on i0: 1280 tokens, a step of 50 ms at most" in gateway.output()
    (url,) = gateway.server_urls("i0")
    command = Path(f"/proc/{gateway.server_process(url)}/cmdline").read_bytes()
    assert b"\0--max-num-batched-tokens\x001280\0" in command
    assert "enabled with max_num_batched_tokens=1280" in (tmp_path / "logs" / "i0.log").read_text()
    assert gateway.ask("/tidegate/state")["instances"][0]["step_tokens"] == 1280
    assert gateway.complete("The tide comes in " * 200, 8), "a prompt of more than a step"
