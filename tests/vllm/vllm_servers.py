"""Real vLLM servers on this machine's CPU, for tests: started together, killed, restarted, read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tidegate.fleet.vllm import free_ports, nixl_config
from tidegate_testing.vllm_cpu import on_cpu

ROOT = Path(__file__).parents[2]
VLLM = Path(os.environ.get("VLLM_BIN", ROOT / ".venv-vllm" / "bin" / "vllm"))
MODELS = ROOT / ".cache" / "models"
SERVED_NAME = "tiny"
BLOCK_TOKENS = 32
START_S = 400.0
"""Long: several start at once on a few cores."""
POLL_S = 0.2
TAIL_LINES = 25
RUNTIME = {**on_cpu(ROOT), "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}


@dataclass(frozen=True)
class ServerOptions:
    """How one server is started. ``kv`` None means without KV transfer; ``args`` come last and win; an
    ``env`` value None removes the variable."""

    arch: str = "llama"
    kv: Mapping[str, Any] | None = field(default_factory=nixl_config)
    block_tokens: int = BLOCK_TOKENS
    kv_bytes: int = 32 << 20
    args: Sequence[str] = ()
    env: Mapping[str, str | None] = field(default_factory=dict)

    def argv(self, port: int) -> list[str]:
        """Return the command line of a server on ``port``. float32 keeps greedy tokens equal over all ways
        to compute them."""
        kv = ["--kv-transfer-config", json.dumps(self.kv)] if self.kv is not None else []
        return [
            *(str(VLLM), "serve", str(MODELS / f"tiny-{self.arch}"), "--served-model-name", SERVED_NAME),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "4096", "--block-size", str(self.block_tokens)),
            *("--kv-cache-memory-bytes", str(self.kv_bytes), "--scheduling-policy", "priority"),
            *("--enable-scale-out", "--enable-prompt-tokens-details", "--enable-per-request-metrics"),
            *("--enable-server-load-tracking", *kv, *self.args),
        ]


def nixl_variant(*, role: str = "kv_both", failure_policy: str = "fail", **extra: object) -> dict[str, Any]:
    """Return the gateway's configuration of NixlConnector with something else in it."""
    config = nixl_config() | {"kv_role": role, "kv_load_failure_policy": failure_policy}
    config["kv_connector_extra_config"] |= extra
    return config


class VllmServer:
    """One server with ports of its own, which it keeps over restarts. All calls block."""

    def __init__(self, name: str, folder: Path, options: ServerOptions, taken: Sequence[int] = ()) -> None:
        self.name = name
        self.options = options
        self.port = free_ports(taken)
        self.bootstrap_port = self.port + 1
        self.side_port = self.port + 2
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._began_s = 0.0

    def start(self) -> None:
        """Start the process and return at once; its output is added to the log."""
        assert not self.alive(), f"{self.name} runs already"
        own = {
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.side_port),
            "VLLM_MOONCAKE_BOOTSTRAP_PORT": str(self.bootstrap_port),
        }
        merged = {**os.environ, **RUNTIME, **own, **self.options.env}
        env = {name: value for name, value in merged.items() if value is not None}
        self._began_s = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.options.argv(self.port),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, deadline_s: float = START_S) -> None:
        """Return once the server is healthy. Fails with the log's end when it dies or takes too long."""
        while not self.healthy():
            if not self.alive():
                raise AssertionError(f"{self.name} ended while it started\n{self.tail()}")
            if time.monotonic() - self._began_s > deadline_s:
                raise AssertionError(f"{self.name} is not healthy after {deadline_s:g} s\n{self.tail()}")
            time.sleep(POLL_S)

    def alive(self) -> bool:
        """Tell whether the server's first process runs."""
        return self._process is not None and self._process.poll() is None

    def healthy(self) -> bool:
        """Ask /health once."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """End all processes of the server with SIGKILL; returns when the first one is reaped."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    def freeze(self) -> None:
        """Stop all processes of the server where they are, until ``thaw``."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self, grace_s: float = 20.0) -> None:
        """Ask the server to end, and kill what is left of it. Idempotent."""
        if self._process is not None and self.alive():
            self._process.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def tail(self, lines: int = TAIL_LINES) -> str:
        """Return the end of the log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join([f"--- {self.log}", *text.splitlines()[-lines:]])

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        """POST ``body`` as JSON past any gateway and return the answer. Raises urllib's HTTPError."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            decoded: dict[str, Any] = json.loads(answer.read())
            return decoded

    def complete(self, prompt: Sequence[int] | str, max_tokens: int, **more: Any) -> dict[str, Any]:
        """Ask the server itself for a greedy completion of exactly ``max_tokens``."""
        greedy = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        body = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": max_tokens, **greedy, **more}
        return self.post("/v1/completions", body)

    def reference(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Return the token ids of a greedy run here alone, which shares no cached KV with other requests."""
        answer = self.complete(prompt, max_tokens, cache_salt=f"reference-{time.monotonic_ns()}")
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids

    def counters(self) -> Counters:
        """Read /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            return Counters.parse(answer.read().decode())


@dataclass(frozen=True)
class Counters:
    """What tests ask a server's /metrics for; counters grow from the server's start."""

    running: float
    waiting: float
    kv_cache_usage: float
    """Share of the KV blocks in use, pinned ones among them."""
    computed_tokens: float
    """Prompt tokens by source: computed, found in the server's own cache, pulled from another server."""
    cached_tokens: float
    pulled_tokens: float
    nixl_bytes: float

    @classmethod
    def parse(cls, text: str) -> Counters:
        """Sum the samples over engines; what a server does not have is 0."""
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = sample.name.removeprefix("vllm:")
                key += f"/{sample.labels['source']}" if "source" in sample.labels else ""
                totals[key] = totals.get(key, 0.0) + sample.value

        def value(key: str) -> float:
            return totals.get(key, 0.0)

        return cls(
            running=value("num_requests_running"),
            waiting=value("num_requests_waiting"),
            kv_cache_usage=value("kv_cache_usage_perc"),
            computed_tokens=value("prompt_tokens_by_source_total/local_compute"),
            cached_tokens=value("prompt_tokens_by_source_total/local_cache_hit"),
            pulled_tokens=value("prompt_tokens_by_source_total/external_kv_transfer"),
            nixl_bytes=value("nixl_bytes_transferred_sum"),
        )

    def __sub__(self, earlier: Counters) -> Counters:
        """Return the difference to an earlier reading, field by field."""
        return Counters(
            *(now - then for now, then in zip(vars(self).values(), vars(earlier).values(), strict=True))
        )


class VllmCluster:
    """Servers named s0, s1, ... that start together. Use as a context manager, or call ``stop``."""

    live: list[VllmCluster] = []  # noqa: RUF012 - who to show the logs of when a test fails
    """All clusters that have not been stopped."""

    def __init__(self, folder: Path, options: Sequence[ServerOptions]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.servers: list[VllmServer] = []
        for index, one in enumerate(options):
            taken = [server.port for server in self.servers]
            self.servers.append(VllmServer(f"s{index}", folder, one, taken))

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    def __iter__(self) -> Iterator[VllmServer]:
        return iter(self.servers)

    def __getitem__(self, index: int) -> VllmServer:
        return self.servers[index]

    def __enter__(self) -> VllmCluster:
        VllmCluster.live.append(self)
        try:
            self.ensure_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ensure_up(self) -> None:
        """Start all servers that do not run, together, and wait until every one is healthy."""
        for server in self.servers:
            if not server.alive():
                server.kill()
                server.start()
        for server in self.servers:
            server.wait_ready()

    def stop(self) -> None:
        """End all servers. Idempotent."""
        for server in self.servers:
            server.stop()
        if self in VllmCluster.live:
            VllmCluster.live.remove(self)


Start = Callable[[Sequence[ServerOptions]], VllmCluster]
"""What the fixture ``start`` gives: starts servers with options of their own."""
