"""Hidden states and the lengths that are read from them, inside the engine's step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.engine_harness import Driven, HandClock, MakeModel, prompt_of, request
from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.length_head import (
    HEADS,
    HeadFacts,
    LengthHead,
    load_head,
    model_hash,
    save_head,
)
from tidegate.engines.embedded.sequence import TokenSequence
from tidegate.engines.serving.types import Output

HIDDEN = 128


class Reading:
    """Keeps what it is shown."""

    every = 3

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], torch.Tensor] = {}

    def read(self, sequences: list[TokenSequence], hidden: torch.Tensor) -> None:
        for sequence, row in zip(sequences, hidden, strict=True):
            self.rows[sequence.request.id, sequence.output_position] = row.clone()


def write_head(path: Path, model: Path, bias: float = 0.0, every: int = 4, horizon: int = 80) -> Path:
    """Write a head that says of every state that half of the tokens up to the horizon will follow."""
    head = LengthHead((HIDDEN, 8, 1), horizon)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        last: Any = head.layers[-1]
        last.bias.fill_(bias)
    save_head(path, head, HeadFacts(model_hash(model), every, horizon, (HIDDEN, 8, 1), "none"))
    return path


def blend(most: float, newest: float, before: float) -> float:
    """Return what log odds say that are three parts in ten those of the newest share."""
    odds: float = (newest / (most - newest)) ** 0.3 * (before / (most - before)) ** 0.7
    return most * odds / (1 + odds)


def predictions(driven: Driven) -> list[Output]:
    """Step until nothing runs, and return the outputs that have a prediction."""
    found = []
    while True:
        step = driven.engine.step()
        found += [output for output in step.outputs if output.remaining_tokens is not None]
        if not step.tokens:
            return found


def test_states_are_those_of_transformers_whatever_the_batching(llama: Path) -> None:
    driven = Driven(llama, max_batch_tokens=20, max_num_seqs=8)
    driven.engine.hidden_reader = reading = Reading()
    prompts = {"long": prompt_of(90, seed=1), "short": prompt_of(7, seed=2)}
    driven.run(*(request(name, prompt, 8) for name, prompt in prompts.items()))

    assert set(reading.rows) == {(name, position) for name in prompts for position in (0, 3, 6)}
    plain: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for (name, position), row in reading.rows.items():
        ids = prompts[name] + driven.legs[name].token_ids[:position]
        states = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        assert (states[0, -1] - row).abs().max() < 1e-4


def test_predictions_come_with_their_tokens_and_go_on_in_the_next_leg(llama: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head.safetensors", llama)
    driven = Driven(llama, predictor=str(head))
    driven.engine.submit(request("first", prompt_of(9), 6, pin_kv=True))
    driven.engine.submit(request("next", prompt_of(20, seed=3), 7, generated=6))
    told = {(output.request_id, output.at_token): output.remaining_tokens for output in predictions(driven)}

    # At 0, 4, 8 and 12 output tokens; each with the token that was then sampled, and is no longer left.
    # The head says 38 at 4 where 36 were left of the last prediction, and 34 at 12 where 32 were.
    assert told == {
        ("first", 1): 39,
        ("first", 5): pytest.approx(blend(76, 38, 36) - 1),
        ("next", 9): 35,
        ("next", 13): pytest.approx(blend(68, 34, 32) - 1),
    }
    stats = driven.engine.stats()
    assert (stats.remaining_tokens, stats.predictions, stats.absurd_predictions) == (0, 4, 0)


def test_the_load_counts_predictions_down(llama: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head.safetensors", llama, every=100)
    driven = Driven(llama, predictor=str(head))
    driven.engine.submit(request("a", prompt_of(9), 90))
    left = []
    for _ in range(4):
        driven.engine.step()
        left.append(driven.engine.stats().remaining_tokens)
    assert left == [39, 38, 37, 36]


def test_nothing_is_said_beyond_what_the_head_has_seen(llama: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head.safetensors", llama, horizon=8)
    driven = Driven(llama, predictor=str(head))
    driven.engine.submit(request("a", prompt_of(9), 30))
    assert [output.at_token for output in predictions(driven)] == [1, 5]
    assert driven.engine.stats().absurd_predictions == 0


def test_what_is_no_number_never_leaves_the_engine(llama: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head.safetensors", llama, float("nan"))
    driven = Driven(llama, predictor=str(head))
    driven.engine.submit(request("a", prompt_of(9), 9))
    assert predictions(driven) == []
    stats = driven.engine.stats()
    assert (stats.remaining_tokens, stats.predictions, stats.absurd_predictions) == (0, 0, 3)


def test_a_prediction_stays_within_the_context(llama: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head.safetensors", llama, horizon=10_000)
    driven = Driven(llama, predictor=str(head), max_model_len=64)
    driven.engine.submit(request("a", prompt_of(9), 2))
    assert [output.remaining_tokens for output in predictions(driven)] == [64 - 9 - 1]


def test_a_head_of_another_model_is_refused_with_both_hashes(
    llama: Path, tiny: MakeModel, tmp_path: Path
) -> None:
    other = tiny("qwen3")
    head = write_head(tmp_path / "head.safetensors", other)
    with pytest.raises(ConfigError) as refused:
        Driven(llama, HandClock(), predictor=str(head))
    assert model_hash(other) in refused.value.message and model_hash(llama) in refused.value.message


def test_packaged_heads_are_whole_and_have_cards() -> None:
    paths = sorted(HEADS.glob("*.safetensors"))
    assert paths
    for path in paths:
        _, facts = load_head(path)
        assert facts.model_hash in (HEADS / facts.card).read_text()


@pytest.mark.parametrize("content", [b"", b"no head", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_what_is_no_head_is_refused(llama: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "head.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no length head"):
        Driven(llama, predictor=str(path))
    with pytest.raises(ConfigError, match="is no length head"):
        Driven(llama, predictor=str(tmp_path / "missing"))
