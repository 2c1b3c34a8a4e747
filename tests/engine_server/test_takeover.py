"""Two engines with threads and a KV channel between them: one takes a running decode of the other over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.engine_harness import prompt_of, request
from tests.engine_server.engine_fakes import wait_until
from tidegate.core.migration import MOST_STAGES
from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.embedded.kv_channel import KvExporter
from tidegate.engines.embedded.kv_pull import PeerPuller, PullOptions
from tidegate.engines.embedded.options import EngineConfig
from tidegate.engines.embedded.sequence import TokenSequence
from tidegate.engines.embedded.tiny_model import make_tiny_model
from tidegate.engines.seam import RunningLeg
from tidegate.engines.serving.secret import LaunchSecret
from tidegate.engines.serving.types import Output

SECRET = LaunchSecret("launch-secret")
PROMPT = prompt_of(600)
KNOWN = 20
"""How many output tokens the one who asks for the move has seen."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), hidden=128, heads=4, kv_heads=2)


class Node:
    """A running engine, and what its requests said."""

    def __init__(self, model: Path, name: str, *, shared: bool = True, total_blocks: int = 128) -> None:
        config = EngineConfig(model, engine_id=name, dtype="float64", total_blocks=total_blocks)
        self.engine = engine = EmbeddedEngine(config)
        self.exporter = KvExporter(engine.pins, engine.store, SECRET, engine_id=name, decodes=engine)
        self.puller = PeerPuller(engine.store, PullOptions(SECRET, shared_memory=shared))
        engine.scheduler.puller = self.puller
        self.outputs: dict[str, list[Output]] = {}
        self.heard = threading.Condition()
        self.exporter.start()
        engine.start(self.hear)

    def hear(self, outputs: list[Output]) -> None:
        with self.heard:
            for output in outputs:
                self.outputs.setdefault(output.request_id, []).append(output)
            self.heard.notify_all()

    def ids(self, request_id: str) -> list[int]:
        return [i for output in self.outputs.get(request_id, []) for i in output.token_ids]

    def text(self, request_id: str) -> str:
        return "".join(output.text for output in self.outputs.get(request_id, []))

    def ended(self, request_id: str) -> str | None:
        outputs = self.outputs.get(request_id)
        return outputs[-1].finish_reason if outputs else None

    def after(self, request_id: str, count: int) -> list[int]:
        with self.heard:
            assert self.heard.wait_for(lambda: len(self.ids(request_id)) >= count, 30)
        return self.ids(request_id)[:count]

    def until_ended(self, request_id: str) -> str | None:
        with self.heard:
            assert self.heard.wait_for(lambda: self.ended(request_id), 30)
        return self.ended(request_id)

    def until_clean(self) -> None:
        """Nothing is held, reserved or pinned."""
        pool, stats = self.engine.scheduler.pool, self.engine.stats
        wait_until(lambda: pool.free_blocks == pool.total_blocks, "every block is free")
        wait_until(lambda: not (stats().loading or stats().pinned or stats().running), "nothing is left")

    def close(self) -> None:
        self.engine.stop()
        self.puller.close()
        self.exporter.close()


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    made: list[Node] = []
    yield made
    for node in made:
        node.close()


def follow(src: Node, dst: Node, known: list[int], tokens: int, **sampling: Any) -> None:
    """Have ``dst`` take ``r`` over from ``src``; ``known`` are the output tokens that are known of."""
    leg = request("r", [*PROMPT, *known], tokens - len(known), generated=len(known), **sampling)
    where = RunningLeg(src.engine.config.engine_id, "r", "127.0.0.1", src.exporter.port)
    dst.engine.submit(replace(leg, follows=where))


@pytest.mark.parametrize("shared", [True, False], ids=["shared-memory", "tcp"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 7}], ids=["greedy", "seeded"])
def test_both_say_together_what_one_would(
    model: Path, nodes: list[Node], shared: bool, sampling: dict[str, Any]
) -> None:
    nodes += [src := Node(model, "a"), dst := Node(model, "b", shared=shared)]
    src.engine.submit(request("alone", PROMPT, 200, **sampling))
    src.until_ended("alone")
    src.engine.submit(request("r", PROMPT, 200, **sampling))
    known = src.after("r", KNOWN)
    follow(src, dst, known, 200, **sampling)
    assert (dst.until_ended("r"), src.until_ended("r")) == ("length", "migrated")
    first = dst.outputs["r"][0].moved
    assert first is not None and first.generated == len(src.ids("r")) >= KNOWN
    assert 2 <= first.stages <= MOST_STAGES + 1, "one beside the decode at least"
    assert first.moved_bytes >= len(PROMPT) * src.engine.model.kv.bytes_per_token
    assert src.ids("r") + dst.ids("r") == src.ids("alone")
    assert src.text("r") + dst.text("r") == src.text("alone")
    for node in nodes:
        node.until_clean()


class Exact:
    """Predicts at every 50th token what is left of 200, and keeps what the newest prediction said before."""

    every = 1

    def __init__(self) -> None:
        self.before: list[tuple[int, float]] = []

    def read(self, sequences: list[TokenSequence], hidden: torch.Tensor) -> None:
        for sequence in sequences:
            position = sequence.output_position
            self.before.append((position, sequence.remaining_now))
            if position % 50 == 0:
                sequence.predicted_at, sequence.remaining = position + 1, 199.0 - position


def test_a_predicted_length_moves_with_its_decode(model: Path, nodes: list[Node]) -> None:
    nodes += [src := Node(model, "a"), dst := Node(model, "b")]
    src.engine.hidden_reader, dst.engine.hidden_reader = Exact(), (there := Exact())
    src.engine.submit(request("r", PROMPT, 200))
    follow(src, dst, src.after("r", KNOWN), 200)
    assert (dst.until_ended("r"), src.until_ended("r")) == ("length", "migrated")
    assert there.before == [(position, 200.0 - position) for position, _ in there.before]
    outputs = [output for node in nodes for output in node.outputs["r"]]
    said = [(o.at_token, o.remaining_tokens) for o in outputs if o.remaining_tokens is not None]
    assert said == [(1, 199.0), (51, 149.0), (101, 99.0), (151, 49.0)], "once each, counted over both legs"


def test_a_destination_without_room_and_a_source_without_the_decode_change_nothing(
    model: Path, nodes: list[Node]
) -> None:
    nodes += [src := Node(model, "a"), small := Node(model, "b", total_blocks=20), dst := Node(model, "c")]
    src.engine.submit(request("r", PROMPT, 60))
    follow(src, small, src.after("r", KNOWN), 60)
    assert small.until_ended("r") == "error"
    assert src.until_ended("r") == "length" and len(src.ids("r")) == 60
    follow(src, dst, src.ids("r")[:KNOWN], 60)
    assert dst.until_ended("r") == "error"
    assert "does not decode" in str(dst.outputs["r"][-1].error)
    for node in nodes:
        node.until_clean()
