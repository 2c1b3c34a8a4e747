"""The self-profile measures both kinds and leaves no trace; the tiny model is complete."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.engine.engine_harness import Driven, MakeModel, prompt_of, request
from tidegate.core.errors import ConfigError, SetupError
from tidegate.engines.embedded.self_profile import self_profile
from tidegate.engines.embedded.tiny_model import Arch, make_tiny_model


def test_the_profile_has_both_kinds_and_leaves_the_engine_as_it_was(llama: Path) -> None:
    driven = Driven(llama, dtype="float32", total_blocks=512)
    before = driven.engine.stats()
    samples = self_profile(driven.engine, budget_s=0.2)
    assert driven.engine.stats() == before
    driven.assert_clean()
    prefills = [sample for sample in samples if sample["kind"] == "prefill"]
    steps = [sample for sample in samples if sample["kind"] == "step"]
    assert {"kind", "new_tokens", "cached_tokens", "seconds"} == prefills[0].keys()
    assert {"kind", "batch", "context_tokens", "seconds"} == steps[0].keys()
    assert all(sample["seconds"] > 0 for sample in samples)
    alone = driven.run(request("a", prompt_of(30), 4))[0]
    assert alone.token_ids == Driven(llama, dtype="float32").run(request("a", prompt_of(30), 4))[0].token_ids


def test_a_small_pool_is_measured_within_its_bounds(llama: Path) -> None:
    driven = Driven(llama, dtype="float32", total_blocks=16)
    samples = self_profile(driven.engine, budget_s=0.2)
    assert {sample["kind"] for sample in samples} == {"prefill", "step"}
    driven.assert_clean()


@pytest.mark.parametrize(
    ("slower", "prefills", "steps", "at_most_s"), [(1, 3, 3, 15.0), (8, 1, 1, 15.0), (100, 1, 0, 40.0)]
)
def test_a_slow_machine_measures_less_and_ends_in_time(
    llama: Path, monkeypatch: pytest.MonkeyPatch, slower: float, prefills: int, steps: int, at_most_s: float
) -> None:
    driven = Driven(llama, dtype="float32", total_blocks=512)
    runner, now_s = driven.engine._runner, 0.0
    run = runner.run

    def slow(batch: Any) -> Any:
        nonlocal now_s
        now_s += slower * (0.15 + 0.01 * batch.tokens)
        return run(batch)

    monkeypatch.setattr(runner, "run", slow)
    monkeypatch.setattr("tidegate.engines.embedded.self_profile.time.perf_counter", lambda: now_s)
    told: list[str] = []
    kinds = [sample["kind"] for sample in self_profile(driven.engine, tell=told.append)]
    assert kinds.count("prefill") >= prefills and kinds.count("step") >= steps
    assert now_s <= at_most_s
    assert len(told) > 0
    driven.assert_clean()


def test_samples_hold_what_all_requests_of_a_step_hold(llama: Path) -> None:
    driven = Driven(llama, dtype="float32", total_blocks=512)
    steps = [sample for sample in self_profile(driven.engine) if sample["kind"] == "step"]
    assert {(s["batch"], s["context_tokens"]) for s in steps[:3]} == {(1, 66), (32, 32 * 66), (4, 4 * 514)}


@pytest.mark.parametrize("failing", [0, 1, 2, 5])
def test_a_failing_step_fails_the_profile(llama: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    driven = Driven(llama, dtype="float32", total_blocks=512)
    runner = driven.engine._runner
    run, steps = runner.run, count()

    def broken(batch: Any) -> Any:
        if next(steps) == failing:
            raise RuntimeError("no kernel")
        return run(batch)

    monkeypatch.setattr(runner, "run", broken)
    with pytest.raises(SetupError, match="cannot compute its model: RuntimeError: no kernel"):
        self_profile(driven.engine, budget_s=0.0)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_tiny_model_is_complete(tiny: MakeModel, arch: Arch) -> None:
    folder = tiny(arch)
    driven = Driven(folder)
    info = driven.engine.model
    assert (info.vocab_size, info.max_model_len) == (512, 8192)
    assert info.eos_ids == {1, 4}
    assert info.kv.bytes_per_token == 2 * 2 * 2 * 32 * 8
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 512
    text = "Grüße, 世界 🌊\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    leg = driven.run(request("a", tokenizer.encode("The tide"), 60))[0]
    shown = [str(tokenizer.decode([token], skip_special_tokens=True)) for token in leg.token_ids]
    assert all(text == "\n" or text.isprintable() for text in shown if text)
    assert len(set(leg.token_ids)) > 10, "greedy output is stuck"


def test_the_same_seed_makes_the_same_weights(tmp_path: Path) -> None:
    small = {"hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 32}
    weights = [
        (make_tiny_model(tmp_path / str(n), seed=seed, **small) / "model.safetensors").read_bytes()  # type: ignore[arg-type]
        for n, seed in enumerate((1, 1, 2))
    ]
    assert weights[0] == weights[1] != weights[2]


def test_an_unknown_arch_or_a_vocab_too_small_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known: llama"):
        make_tiny_model(tmp_path / "x", "gpt9")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="too small"):
        make_tiny_model(tmp_path / "y", vocab=100)
