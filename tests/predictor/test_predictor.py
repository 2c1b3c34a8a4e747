"""Prompts, collection, training and the table of errors of length heads."""

from __future__ import annotations

from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.json import encode

from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.length_head import load_head
from tidegate.engines.embedded.tiny_model import make_tiny_model
from tidegate.predictor.baselines import histogram, mean_length, median_left, prompt_only
from tidegate.predictor.collect import Collector, settings_for
from tidegate.predictor.compare import compare, hidden_estimate, newest_estimate, train
from tidegate.predictor.dataset import (
    CollectionSettings,
    Samples,
    join_samples,
    load_samples,
    open_folder,
    split_requests,
    write_shard,
)
from tidegate.predictor.evaluate import Estimate, Evaluation
from tidegate.predictor.prompts import KINDS, prompts
from tidegate.predictor.settings import TrainingSettings
from tidegate.signals.lengths.errors import read_errors

SETTINGS = CollectionSettings("abc", 0, 20, 200, 0.7, 1.0, "float32")
WIDTH = 24


def answers(count: int, seed: int = 0) -> Samples:
    """Answers of up to 200 tokens. Their states tell, with noise, where in between they will end; those at
    the prompt's end do not."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 200, count)
    generated = [np.arange(0, length, 20) for length in lengths]
    request = np.repeat(np.arange(count), [len(each) for each in generated])
    at = np.concatenate(generated)
    hidden = rng.normal(size=(len(at), WIDTH))
    hidden[:, 3] = np.where(at > 0, (lengths[request] - at) / (200 - at) * 6 - 3, 0.0)
    return Samples(
        index=np.arange(count, dtype=np.int32),
        kind=np.zeros(count, np.int32),
        prompt_tokens=np.full(count, 5, np.int32),
        output_tokens=lengths.astype(np.int32),
        cut=np.zeros(count, bool),
        tokens=np.arange(int((lengths + 5).sum()), dtype=np.int32),
        request=request,
        generated=at.astype(np.int32),
        hidden=hidden.astype(np.float16),
    )


def test_prompts_differ_and_come_again_with_their_seed() -> None:
    first = list(islice(prompts(0), 3000))
    assert len({str(prompt.messages) for prompt in first}) == len(first)
    assert {prompt.kind for prompt in first} == set(KINDS)
    assert all(message["content"] for prompt in first for message in prompt.messages)
    assert not any("{" in message["content"] for prompt in first for message in prompt.messages)
    assert first[:50] == list(islice(prompts(0), 50)) != list(islice(prompts(1), 50))


def test_a_collection_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", hidden=64, heads=2, kv_heads=1, vocab=600)
    settings = settings_for(model, every=4, max_tokens=12, dtype="float64")

    def collect(folder: str, requests: int, batch: int) -> Samples:
        told: list[str] = []
        collector = Collector(model, tmp_path / folder, requests=requests, batch=batch, settings=settings)
        assert collector.run(told.append) == requests
        return load_samples(tmp_path / folder)

    whole = collect("whole", 7, 3)
    assert len(collect("parts", 3, 2).index) == 3
    parts = collect("parts", 7, 4)
    for column in fields(Samples):
        assert (getattr(whole, column.name) == getattr(parts, column.name)).all(), column.name
    assert (whole.remaining >= 1).all() and whole.hidden.shape == (len(whole.generated), 64)
    for row in range(7):
        mine = whole.request == row
        assert whole.generated[mine].tolist() == list(range(0, int(whole.output_tokens[row]), 4))
    with pytest.raises(ConfigError, match="other settings"):
        Collector(
            model,
            tmp_path / "parts",
            requests=9,
            batch=1,
            settings=settings_for(model, every=5, max_tokens=12, dtype="float64"),
        )


def test_shards_join_in_the_order_of_requests(tmp_path: Path) -> None:
    whole = answers(6)
    parts = []
    for rows in ([4, 1], [5], [0, 3, 2]):
        texts = np.split(whole.tokens, whole.first_token[1:])
        chosen = [np.flatnonzero(whole.request == row) for row in rows]
        per_request = {
            name: getattr(whole, name)[rows]
            for name in ("index", "kind", "prompt_tokens", "output_tokens", "cut")
        }
        parts.append(
            Samples(
                **per_request,
                tokens=np.concatenate([texts[row] for row in rows]),
                request=np.repeat(np.arange(len(rows)), [len(each) for each in chosen]),
                generated=whole.generated[np.concatenate(chosen)],
                hidden=whole.hidden[np.concatenate(chosen)],
            )
        )
    assert open_folder(tmp_path, SETTINGS) == set()
    for part in parts:
        write_shard(tmp_path, part)
    assert open_folder(tmp_path, SETTINGS) == set(range(6))
    for joined in (join_samples(parts), load_samples(tmp_path)):
        for column in fields(Samples):
            assert (getattr(joined, column.name) == getattr(whole, column.name)).all(), column.name


def test_the_split_is_by_request_and_stays_as_a_collection_grows() -> None:
    some, more = split_requests(np.arange(400)), split_requests(np.arange(1000))
    for name in ("train", "validation", "test"):
        before, after = getattr(some, name), getattr(more, name)
        assert before.tolist() == after[after < 400].tolist()
    assert sorted(np.concatenate([more.train, more.validation, more.test])) == list(range(1000))
    assert 650 < len(more.train) < 750 and 100 < len(more.test) < 200


def test_errors_are_those_of_a_plain_count_and_reductions_are_paired() -> None:
    samples = answers(60)
    rows = np.arange(0, 60, 2)
    evaluation = Evaluation(samples, rows)
    chosen = samples.of_requests(rows)
    true, at = samples.remaining[chosen], samples.generated[chosen]
    off = Estimate("off", 10, true + np.where(at < 100, 8.0, -2.0))
    twice = Estimate("twice", 40, true + np.where(at < 100, 16.0, -4.0))

    row = evaluation.row(off)
    assert row["samples"] == len(true)
    assert row["mae"]["value"] == pytest.approx(np.abs(off.remaining - true).mean())
    assert row["mae"]["low"] < row["mae"]["value"] < row["mae"]["high"]
    assert [each["value"] for each in row["by_progress"][:3]] == pytest.approx([8, 8, 2])
    assert [each["from_tokens"] for each in row["by_progress"]] == [0, 1, 100], "no answer has 200 tokens"
    reduction = evaluation.reduction(off, twice)
    assert reduction["mae"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert reduction["parameters"] == 0.75
    assert evaluation.errors(off)[0] == {
        "request": 0,
        "at_token": 0,
        "predicted": true[0] + 8.0,
        "true": true[0],
    }


def test_a_trained_head_reads_what_states_tell_and_is_saved_as_it_was(tmp_path: Path) -> None:
    open_folder(tmp_path / "data", SETTINGS)
    samples = answers(300)
    write_shard(tmp_path / "data", samples)
    training = TrainingSettings(widths=(32, 8), epochs=40, learning_rate=3e-3, dropout=0.0, input_dropout=0.0)
    row = train(tmp_path / "data", tmp_path / "head.safetensors", "a model", training)

    split = split_requests(samples.index)
    evaluation = Evaluation(samples, split.test)
    later = [each["value"] for each in row["by_progress"][1:3]]
    rivals = (mean_length(samples, split), median_left(samples, split, 200), histogram(samples, split, 200))
    for rival in rivals:
        others = [each["value"] for each in evaluation.row(rival)["by_progress"][1:3]]
        assert all(mine < 0.5 * other for mine, other in zip(later, others, strict=True)), rival.name
    counted = prompt_only(samples, split, 200, training)
    at_end = samples.generated[samples.of_requests(split.test)] == 0
    assert np.ptp(counted.remaining[at_end]) < 200 and (counted.remaining >= 1).all()

    head, facts = load_head(tmp_path / "head.safetensors")
    assert (facts.model_hash, facts.every, facts.horizon) == ("abc", 20, 200)
    assert facts.widths == (WIDTH, 32, 8, 1)
    assert evaluation.row(hidden_estimate(head, samples, split))["mae"] == row["mae"]
    alone, blended = (each(head, samples, split).remaining for each in (newest_estimate, hidden_estimate))
    assert (alone[at_end] == blended[at_end]).all()
    third = int(np.flatnonzero(samples.generated[samples.of_requests(split.test)] == 40)[0])
    shares = [alone[third] / 160, max(1.0, blended[third - 1] - 20) / 160]
    odds = [np.log(share / (1 - share)) for share in shares]
    assert blended[third] == pytest.approx(160 / (1 + np.exp(-(0.3 * odds[0] + 0.7 * odds[1]))), rel=1e-3)
    errs = compare(tmp_path / "data", head, facts, training, None, print).error_model
    assert errs.horizon == 200 and errs.measured is not None and errs.measured.head == "head"
    assert errs.measured.figures.by_progress[0].mae == pytest.approx(row["by_progress"][0]["value"], abs=0.06)
    assert errs.measured.answers == tuple(samples.output_tokens[split.test].tolist())
    assert read_errors(encode(errs)) == errs
    nothing = head.remaining(torch.full((1, WIDTH), float("nan")), torch.tensor([3]))
    assert nothing.isnan().all()
    text = (tmp_path / facts.card).read_text()
    assert "abc" in text and f"{row['mae']['value']:.1f}" in text
