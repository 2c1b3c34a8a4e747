"""Moving KV between instances: every pull ends, and what it reports as valid is valid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from tests.engine_server.engine_fakes import MemoryStore, Pins, PullResult, source_for, wait_until
from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.kv_channel import KvExporter, TransferLimits
from tidegate.engines.embedded.kv_pull import PeerLink, PeerPuller, PullOptions
from tidegate.engines.serving.secret import LaunchSecret

SECRET = LaunchSecret("launch-secret")
SHORT = TransferLimits(connect_s=0.5, read_s=0.3, pull_s=0.8, idle_s=30.0)


class Pair:
    """An exporter and a puller over their own stores."""

    def __init__(
        self,
        *,
        shared: bool = True,
        limits: TransferLimits | None = None,
        puller_secret: LaunchSecret = SECRET,
        target: MemoryStore | None = None,
        model: str = "m",
    ) -> None:
        self.source = MemoryStore(shared=shared).fill(1)
        self.target = target or MemoryStore().fill(2)
        self.pins = Pins()
        limits = limits or TransferLimits()
        self.exporter = KvExporter(
            self.pins, self.source, SECRET, engine_id="engine-a", model="m", limits=limits
        )
        self.exporter.start()
        self.options = PullOptions(puller_secret, model, limits)
        self.puller = PeerPuller(self.target, self.options)

    def pull(self, block_ids: list[int], pinned: tuple[int, ...] = (3, 1, 4), name: str = "r1") -> PullResult:
        result = PullResult()
        pin = self.pins.pin(name, pinned, 16 * len(pinned))
        self.puller.submit(source_for(self.exporter.port, pin), block_ids, result)
        return result

    def close(self) -> None:
        self.puller.close()
        self.exporter.close()


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    made: list[Pair] = []
    yield made
    for pair in made:
        pair.close()


@pytest.mark.parametrize("shared", [True, False], ids=["shared-memory", "tcp"])
def test_both_ways_move_the_same_bytes_and_release(pairs: list[Pair], shared: bool) -> None:
    pairs.append(pair := Pair(shared=shared))
    link = PeerLink(("127.0.0.1", pair.exporter.port), pair.options, pair.target)
    assert (link._mapped is not None) is shared
    link.close()
    untouched = pair.target.block(0)
    result = pair.pull([9, 2, 7]).wait()
    assert (result.error, result.moved) == (None, 3 * pair.source.block_bytes)
    assert [pair.target.block(b) for b in (9, 2, 7)] == [pair.source.block(b) for b in (3, 1, 4)]
    assert pair.target.block(0) == untouched
    assert len(pair.pins) == 0


@pytest.mark.parametrize("shared", [True, False], ids=["shared-memory", "tcp"])
def test_a_prefix_of_the_pinned_blocks_can_be_pulled(pairs: list[Pair], shared: bool) -> None:
    pairs.append(pair := Pair(shared=shared))
    assert pair.pull([5]).wait().error is None
    assert pair.target.block(5) == pair.source.block(3)


def test_streams_larger_than_one_chunk_arrive_whole() -> None:
    source = MemoryStore(total_blocks=40, block_bytes=100_000, shared=False).fill(3)
    target = MemoryStore(total_blocks=40, block_bytes=100_000)
    pins = Pins()
    exporter = KvExporter(pins, source, SECRET, engine_id="engine-a")
    exporter.start()
    puller = PeerPuller(target, PullOptions(SECRET))
    result = PullResult()
    pin = pins.pin("big", tuple(range(40)), 640)
    puller.submit(source_for(exporter.port, pin), list(reversed(range(40))), result)
    assert result.wait().error is None
    assert all(target.block(39 - b) == source.block(b) for b in range(40))
    puller.close()
    exporter.close()


def test_a_connection_serves_many_pulls_and_survives_a_refusal(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair())
    for turn in range(3):
        assert pair.pull([turn], name=f"r{turn}").wait().error is None
    refused = PullResult()
    pin = pair.pins.pin("gone", (1,), 16)
    pair.pins.release("gone")
    pair.puller.submit(source_for(pair.exporter.port, pin), [0], refused)
    assert "not pinned" in str(refused.wait().error)
    assert pair.pull([4], name="after").wait().error is None
    assert len(pair.exporter._wires) == 1


def test_without_the_secret_nothing_is_served(pairs: list[Pair]) -> None:
    for wrong in (LaunchSecret("other"), LaunchSecret("")):
        pairs.append(pair := Pair(puller_secret=wrong))
        before = bytes(pair.target.buffer.numpy())
        assert "refused" in str(pair.pull([0]).wait().error)
        assert bytes(pair.target.buffer.numpy()) == before
        assert len(pair.pins) == 1


def test_the_secret_never_crosses_the_wire_and_an_impostor_is_unmasked() -> None:
    """An exporter without the secret learns nothing from the handshake and is refused by the puller."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen = bytearray()

    def impostor() -> None:
        sock, _ = listener.accept()
        with sock:
            hello = orjson.dumps({"kv": 1, "nonce": "0" * 64})
            sock.sendall(len(hello).to_bytes(4, "big") + hello)
            seen.extend(sock.recv(65536))
            answer = orjson.dumps({"proof": "f" * 64, "facts": {}})
            sock.sendall(len(answer).to_bytes(4, "big") + answer)
            sock.recv(1)

    thread = threading.Thread(target=impostor)
    thread.start()
    target = MemoryStore()
    puller = PeerPuller(target, PullOptions(SECRET))
    result = PullResult()
    pin = Pins().pin("r", (0,), 16)
    puller.submit(source_for(listener.getsockname()[1], pin), [0], result)
    assert "does not know the launch secret" in str(result.wait().error)
    thread.join()
    assert b"launch-secret" not in seen
    puller.close()
    listener.close()


@pytest.mark.parametrize("shared", [True, False], ids=["shared-memory", "tcp"])
def test_a_pin_that_ends_during_the_copy_fails_the_pull(pairs: list[Pair], shared: bool) -> None:
    pairs.append(pair := Pair(shared=shared))
    pair.target.on_write = lambda block_id: pair.pins.release("r1")
    result = pair.pull([0, 1, 2]).wait()
    assert "pin ended" in str(result.error)
    assert result.moved == 0


def test_a_handle_of_another_engine_or_other_blocks_is_refused(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair())
    pin = pair.pins.pin("r", (1, 2), 32)
    stale, forged = PullResult(), PullResult()
    pair.puller.submit(source_for(pair.exporter.port, pin, engine_id="engine-old"), [0], stale)
    assert "names another" in str(stale.wait().error)
    other = Pins().pin("r", (1, 5), 32)
    pair.puller.submit(source_for(pair.exporter.port, other), [0, 1], forged)
    assert "not those pinned" in str(forged.wait().error)


@pytest.mark.parametrize(
    ("block_bytes", "block_tokens", "model", "words"),
    [
        (2048, 16, "m", "blocks are 4096 bytes"),
        (4096, 32, "m", "for 16 tokens"),
        (4096, 16, "n", "another model"),
    ],
)
def test_a_peer_with_another_layout_is_an_error_and_is_released(
    pairs: list[Pair], block_bytes: int, block_tokens: int, model: str, words: str
) -> None:
    target = MemoryStore(block_bytes=block_bytes, block_tokens=block_tokens)
    pairs.append(pair := Pair(target=target, model=model))
    assert words in str(pair.pull([0]).wait().error)
    assert len(pair.pins) == 0


def test_more_blocks_than_the_handle_has_is_an_error(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair())
    assert "3 blocks; 4 are needed" in str(pair.pull([0, 1, 2, 5]).wait().error)


def test_without_blocks_a_pull_only_releases(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair())
    result = pair.pull([]).wait()
    assert (result.error, result.moved) == (None, 0)
    assert len(pair.pins) == 0


def test_queued_pulls_end_with_a_release_although_nobody_waits_for_them(pairs: list[Pair]) -> None:
    """The puller knows no cancellation: closing it right after submit still frees the peer's memory."""
    pairs.append(pair := Pair())
    results = [pair.pull([n], name=f"r{n}") for n in range(8)]
    pair.puller.close()
    assert [r.wait().error for r in results] == [None] * 8
    assert len(pair.pins) == 0
    late = pair.pull([0], name="late").wait()
    assert "shutting down" in str(late.error)


def test_a_failed_local_write_releases_the_peer(pairs: list[Pair]) -> None:
    def broken(block_id: int) -> None:
        raise ValueError("no such block")

    pairs.append(pair := Pair())
    pair.target.on_write = broken
    result = pair.pull([0]).wait()
    assert "no such block" in str(result.error)
    assert len(pair.pins) == 0


def test_a_kept_connection_that_died_is_replaced(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair())
    assert pair.pull([0]).wait().error is None
    for wire in list(pair.exporter._wires):
        wire.close()
    wait_until(lambda: not pair.exporter._wires, "exporter noticing the closed connection")
    assert pair.pull([1], name="r2").wait().error is None


def test_a_silent_peer_is_an_error_in_time() -> None:
    """A peer that accepts and says nothing, and one nobody listens on, both end the pull."""
    listener = socket.create_server(("127.0.0.1", 0))
    closed = socket.create_server(("127.0.0.1", 0))
    dead_port = closed.getsockname()[1]
    closed.close()
    target = MemoryStore()
    puller = PeerPuller(target, PullOptions(SECRET, limits=SHORT))
    pin = Pins().pin("r", (0,), 16)
    silent, dead = PullResult(), PullResult()
    puller.submit(source_for(listener.getsockname()[1], pin), [0], silent)
    puller.submit(source_for(dead_port, pin), [0], dead)
    assert "cannot connect" in str(dead.wait().error)
    assert "did not answer in time" in str(silent.wait().error)
    assert silent.calls == dead.calls == 1
    puller.close()
    listener.close()


def test_a_peer_stuck_in_mid_stream_is_an_error_in_time(pairs: list[Pair]) -> None:
    stuck = threading.Event()
    pairs.append(pair := Pair(shared=False, limits=SHORT))
    pair.source.on_read = lambda block_id: stuck.wait(5.0)
    result = pair.pull([0, 1]).wait()
    stuck.set()
    assert "in time" in str(result.error)


def test_an_exporter_that_closes_in_mid_stream_is_an_error(pairs: list[Pair]) -> None:
    pairs.append(pair := Pair(shared=False))
    pair.source.on_read = lambda block_id: pair.exporter.close()
    assert pair.pull([0, 1]).wait().error is not None


def test_a_peer_killed_in_mid_pull_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, threading
            from tests.engine_server.engine_fakes import MemoryStore, Pins
            from tidegate.engines.serving.secret import LaunchSecret
            from tidegate.engines.embedded.kv_channel import KvExporter
            store, pins = MemoryStore(shared=False).fill(1), Pins()
            pins.pin("r1", (0, 1), 32)
            def reading(block_id):
                print("reading", flush=True)
                threading.Event().wait()
            store.on_read = reading
            exporter = KvExporter(pins, store, LaunchSecret("launch-secret"), engine_id="engine-a")
            exporter.start()
            print(exporter.port, flush=True)
            threading.Event().wait()
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as peer:
        assert peer.stdout is not None
        port = int(peer.stdout.readline())
        target = MemoryStore()
        puller = PeerPuller(target, PullOptions(SECRET))
        result = PullResult()
        puller.submit(source_for(port, Pins().pin("r1", (0, 1), 32)), [0, 1], result)
        assert peer.stdout.readline().strip() == "reading"
        peer.send_signal(signal.SIGKILL)
        assert result.wait().error is not None
        puller.close()


def test_without_a_secret_only_loopback_takes_part() -> None:
    store, pins = MemoryStore(), Pins()
    with pytest.raises(ConfigError, match="only loopback"):
        KvExporter(pins, store, LaunchSecret(), engine_id="a", host="0.0.0.0")
    puller = PeerPuller(store, PullOptions(LaunchSecret()))
    result = PullResult()
    pin = pins.pin("r", (0,), 16)
    puller.submit(source_for(9, pin, host="192.0.2.1"), [0], result)
    assert "loopback only" in str(result.wait().error)
    puller.close()


def test_the_secret_comes_from_the_environment_once(tmp_path: Path) -> None:
    environ = {"TIDEGATE_LAUNCH_SECRET": "s"}
    secret = LaunchSecret.from_environment(environ)
    assert environ == {}
    assert secret.admits("s", "192.0.2.1")
    assert not secret.admits("t", "127.0.0.1")
    assert not secret.admits(None, "127.0.0.1")
    assert repr(secret) == "LaunchSecret(set)"
    file = tmp_path / "secret"
    file.write_text("from-file\n")
    assert LaunchSecret.from_environment({}, file).admits("from-file", None)
    file.write_text("")
    with pytest.raises(ConfigError, match="empty"):
        LaunchSecret.from_environment({"TIDEGATE_LAUNCH_SECRET_FILE": str(file)})
    open_secret = LaunchSecret()
    assert open_secret.admits(None, "127.0.0.1")
    assert open_secret.admits(None, "::1")
    assert not open_secret.admits(None, "192.0.2.1")
