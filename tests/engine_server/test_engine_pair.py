"""Two real instances with the tiny model: what crosses between them does not change a token."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.engine_server.engine_fakes import wait_until
from tests.engine_server.engine_processes import EXIT_S, Client, EngineProcess, completion, said, swapped
from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.__main__ import _check_length
from tidegate.engines.embedded.options import parse_options
from tidegate.engines.embedded.tiny_model import make_tiny_model
from tidegate.engines.serving.process import announce

PIN = {"do_remote_decode": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_len=2048)


@pytest.fixture(scope="module")
def instances(model: Path) -> Iterator[list[EngineProcess]]:
    """A and B share memory; C pulls over TCP and is there to be killed."""
    started = [
        EngineProcess(model, "A", "--lease-s", "6"),
        EngineProcess(model, "B", "--lease-s", "6"),
        EngineProcess(model, "C", "--no-shared-memory"),
    ]
    try:
        yield [one.wait_ready() for one in started]
    finally:
        statuses = [one.close() for one in started]
    assert statuses[:2] == [0, 0]


def prompt_of(tokens: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(5, 512) for _ in range(tokens)]


async def settled(client: Client, *instances: EngineProcess) -> None:
    """Wait until nothing is held on ``instances``; all blocks must then be free."""
    for one in instances:
        end_s = time.monotonic() + 20.0
        while not (stats := await client.stats(one))["idle"]:
            assert time.monotonic() < end_s, (one.name, stats)
            await asyncio.sleep(0.01)
        assert stats["free_blocks"] == stats["total_blocks"], (one.name, stats)
        assert stats["consistent"]


def test_the_announcement_is_complete(instances: list[EngineProcess]) -> None:
    ready = instances[0].ready
    assert (ready["event"], ready["engine_id"], ready["model"]) == ("ready", "A", "tiny")
    assert ready["pid"] == instances[0].process.pid
    assert ready["max_model_len"] == 2048
    assert ready["kv_capacity_tokens"] == (64 << 20) // ready["kv_bytes_per_token"]
    assert ready["kv_port"] != ready["port"]


@pytest.mark.parametrize("route", ["AB", "BA", "AC", "CA"])
async def test_prefill_here_and_decode_there_equals_one_run(
    instances: list[EngineProcess], route: str
) -> None:
    by_name = {one.name: one for one in instances}
    here, there = by_name[route[0]], by_name[route[1]]
    prompt = prompt_of(100, seed=1000 + 7 * ord(route[0]) + ord(route[1]))
    async with Client() as client:
        before = await client.stats(there)
        first = await client.complete(here, prompt, 1, PIN)
        assert first["kv_transfer_params"]["remote_num_tokens"] == 100
        ids, text, last = await client.stream(there, prompt, 24, first["kv_transfer_params"])
        after = await client.stats(there)
        # The last prompt token is computed again, for its logits.
        assert last["metrics"]["kv_loaded_tokens"] == 99
        assert after["pulled_prompt_tokens"] - before["pulled_prompt_tokens"] == 99
        assert after["pull_failures"] == before["pull_failures"]
        whole = await client.complete(here, prompt, 24, cache_salt="unbroken")
        assert ids == said(whole)
        assert text == whole["choices"][0]["text"]
        assert said(first) == ids[:1]
        await settled(client, here, there)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "seed": 11}])
async def test_a_chain_of_leases_equals_one_run(
    instances: list[EngineProcess], sampling: dict[str, Any]
) -> None:
    prompt = prompt_of(60, seed=1005 + len(sampling))
    spoken: list[int] = []
    text = ""
    handle: dict[str, Any] = dict(PIN)
    async with Client() as client:
        before = await client.stats(instances[1])
        for hop, tokens in enumerate((9, 7, 16, 8)):
            kv = handle if hop == 0 else swapped(handle, generated=len(spoken))
            answer = await client.complete(instances[hop % 2], prompt + spoken, tokens, kv, **sampling)
            spoken += said(answer)
            text += answer["choices"][0]["text"]
            handle = answer["kv_transfer_params"]
        kv = {**handle, "tidegate_generated": len(spoken)}
        ids, rest, _ = await client.stream(instances[0], prompt + spoken, 12, kv, **sampling)
        after = await client.stats(instances[1])
        whole = await client.complete(instances[0], prompt, 52, cache_salt="unbroken", **sampling)
        assert spoken + ids == said(whole)
        assert text + rest == whole["choices"][0]["text"]
        assert after["pulled_prompt_tokens"] > before["pulled_prompt_tokens"]
        assert after["pull_failures"] == before["pull_failures"]
        await settled(client, *instances[:2])


async def test_another_models_kv_is_recomputed_not_used(
    instances: list[EngineProcess], tmp_path: Path
) -> None:
    """Same layout, other weights: the pull is refused and the answer is right."""
    other = EngineProcess(make_tiny_model(tmp_path / "other", seed=1, max_len=2048), "D")
    try:
        other.wait_ready()
        async with Client() as client:
            prompt = prompt_of(80, seed=1009)
            handle = (await client.complete(other, prompt, 1, PIN))["kv_transfer_params"]
            before = await client.stats(instances[1])
            ids, _, last = await client.stream(instances[1], prompt, 8, handle)
            whole = await client.complete(instances[0], prompt, 8)
            assert ids == said(whole)
            assert last["metrics"]["kv_loaded_tokens"] == 0
            after = await client.stats(instances[1])
            assert after["pull_failures"] == before["pull_failures"] + 1
            await settled(client, other, *instances[:2])
            await _running_requests_survive_sigterm(client, other, prompt)
    finally:
        other.close()


async def _running_requests_survive_sigterm(
    client: Client, instance: EngineProcess, prompt: list[int]
) -> None:
    asked = asyncio.create_task(client.stream(instance, prompt, 200))
    end_s = time.monotonic() + 10.0
    while (await client.stats(instance))["running"] == 0:
        assert time.monotonic() < end_s, "the request never ran"
        await asyncio.sleep(0.002)
    instance.process.send_signal(signal.SIGTERM)
    ids, _, last = await asked
    assert (len(ids), last["choices"][0]["finish_reason"]) == (200, "length")
    assert instance.process.wait(EXIT_S) == 0


async def test_two_hundred_streams_and_an_abort_storm_leave_nothing(
    instances: list[EngineProcess],
) -> None:
    draw = random.Random(3)
    a, b = instances[:2]

    async def one(client: Client, index: int) -> None:
        here, there = (a, b) if index % 2 else (b, a)
        prompt = prompt_of(draw.randrange(20, 120), seed=index)
        kv = (await client.complete(here, prompt, 1, PIN))["kv_transfer_params"]
        body = completion(prompt, 30, kv, stream=True, request_id=f"storm-{index}")
        async with client.session.post(f"{there.url}/v1/completions", json=body) as answer:
            if index % 3 == 0:
                await answer.content.readuntil(b"\n\n")
                return
            if index % 3 == 1:
                ask = {"request_ids": [f"storm-{index}"]}
                async with client.session.post(f"{there.url}/tidegate/abort", json=ask) as aborted:
                    assert aborted.status == 200
            raw = await answer.read()
            assert raw.endswith(b"data: [DONE]\n\n")

    async def impatient(client: Client, index: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(index / 200 if index % 10 == 9 else None):
                await one(client, index)

    async with Client() as client:
        await asyncio.gather(*(impatient(client, index) for index in range(200)))
        # Pins whose client left before it had the handle end with their lease.
        await settled(client, a, b)


async def test_a_killed_owner_means_recomputation(instances: list[EngineProcess]) -> None:
    b, c = instances[1], instances[2]
    prompt = prompt_of(90, seed=1021)
    async with Client() as client:
        handle = (await client.complete(c, prompt, 1, PIN))["kv_transfer_params"]
        c.kill()
        before = await client.stats(b)
        ids, _, last = await client.stream(b, prompt, 8, handle)
        after = await client.stats(b)
        assert last["metrics"]["kv_loaded_tokens"] == 0
        assert after["pull_failures"] == before["pull_failures"] + 1
        whole = await client.complete(instances[0], prompt, 8)
        assert ids == said(whole)


def test_the_process_ends_when_stdin_closes(model: Path) -> None:
    orphan = EngineProcess(model, "orphan")
    assert orphan.process.stdin is not None
    orphan.process.stdin.close()
    assert orphan.process.wait(EXIT_S) == 3
    orphan.close()


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_the_process_ends_with_a_killed_parent(model: Path, tmp_path: Path) -> None:
    """The stdin pipe is held open by this test, so only the kernel can end the grandchild."""
    script = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'tidegate.engines.embedded', '--exit-with-parent']\n"
        f"command += ['--model', {str(model)!r}]\n"
        "child = subprocess.Popen(command, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    read_end, write_end = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=read_end, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())  # of a child that is ready, and so watches its parent
        parent.kill()
    wait_until(lambda: not _runs(pid), "the grandchild's end")
    os.close(read_end)
    os.close(write_end)


def _runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "/nowhere"], "not a model folder"),
        (["--kv-host", "192.0.2.1"], "serves only loopback"),
        (["--kv-host", "0.0.0.0"], "names no address"),
        (["--secret-file", "/nowhere"], "cannot read the launch secret"),
    ],
)
def test_a_wrong_setup_ends_at_once_with_status_2(model: Path, flags: list[str], words: str) -> None:
    command = [sys.executable, "-m", "tidegate.engines.embedded", "--model", str(model), *flags]
    done = subprocess.run([*command, "--no-self-profile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_ready_line_can_go_to_a_descriptor() -> None:
    read_end, write_end = os.pipe()
    announce({"event": "ready"}, write_end)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read() == b'{"event":"ready"}\n'


def test_a_dead_compute_thread_ends_the_process() -> None:
    script = (
        "import threading\n"
        "from tidegate.engines.serving.process import exit_when_a_thread_dies\n"
        "exit_when_a_thread_dies('compute')\n"
        "for name in ('other', 'compute'):\n"
        "    threading.Thread(target=lambda: 1 / 0, name=name).start()\n"
        "threading.Event().wait(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 70
    assert "thread compute died" in done.stderr


def test_a_context_that_cannot_be_served_is_refused(model: Path) -> None:
    class Loaded:
        max_model_len = 512
        model = SimpleNamespace(max_model_len=2048)

    def check(asked: str) -> None:
        options = parse_options(["--model", str(model), "--max-model-len", asked])
        _check_length(options.engine, cast(Any, Loaded()))

    check("512")
    with pytest.raises(ConfigError, match="exceeds the model's context of 2048"):
        check("4096")
    with pytest.raises(ConfigError, match="holds 512 tokens"):
        check("2048")
