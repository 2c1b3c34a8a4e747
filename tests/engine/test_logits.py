"""The paged forward pass says what plain transformers says, and in float64 whatever the batching."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.engine_harness import Driven, MakeModel, prompt_of, request
from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.model import OnlyFloat64, load_model
from tidegate.engines.embedded.tiny_model import Arch

NEW = 12


def record_logits(driven: Driven) -> list[torch.Tensor]:
    """Collect the logits rows of every step from here on."""
    rows: list[torch.Tensor] = []
    run = driven.engine._runner.run

    def recording(batch: Any) -> torch.Tensor:
        logits = run(batch)
        rows.extend(logits.clone())
        return logits

    driven.engine._runner.run = recording  # type: ignore[method-assign]
    return rows


def reference(folder: Path, prompt: list[int], attention: str) -> tuple[list[int], torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    generated = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return generated.sequences[0, len(prompt) :].tolist(), torch.cat(generated.logits)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_agree_with_transformers_generate(tiny: MakeModel, arch: Arch, attention: str) -> None:
    prompt = prompt_of(150, seed=3)
    ids, logits = reference(tiny(arch), prompt, attention)
    driven = Driven(tiny(arch), dtype="float32", max_batch_tokens=47, max_num_seqs=8)
    rows = record_logits(driven)

    chunked, again = driven.run(request("chunked", prompt, NEW)) + driven.run(request("hit", prompt, NEW))

    assert chunked.token_ids == again.token_ids == ids
    assert again.last and again.last.times and again.last.times.cached_tokens == 144
    for run in (rows[:NEW], rows[NEW:]):
        assert (torch.stack(run) - logits).abs().max() < 1e-4


def test_a_sliding_window_is_honoured(tiny: MakeModel) -> None:
    folder = tiny("mistral", sliding_window=40)
    prompt = prompt_of(130, seed=4)
    ids, logits = reference(folder, prompt, "eager")
    driven = Driven(folder, dtype="float32", max_batch_tokens=33, max_num_seqs=8)
    rows = record_logits(driven)
    assert driven.run(request("a", prompt, NEW))[0].token_ids == ids
    assert (torch.stack(rows) - logits).abs().max() < 1e-4
    full_ids, _ = reference(tiny("mistral"), prompt, "eager")
    assert full_ids != ids, "the window makes no difference, so the test shows nothing"


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral"])
def test_float64_prefill_and_decode_agree_to_rounding(tiny: MakeModel, arch: Arch) -> None:
    driven = Driven(tiny(arch), max_batch_tokens=64, max_num_seqs=16)
    rows = record_logits(driven)
    prompt = prompt_of(90, seed=5)
    decoded = driven.run(request("decode", prompt, NEW))[0]
    by_decode = rows[NEW - 1]
    driven.engine.scheduler.pool.forget()
    driven.run(request("prefill", prompt + decoded.token_ids[:-1], 1))
    assert by_decode.dtype == torch.float64
    assert (rows[NEW] - by_decode).abs().max() < 1e-12


def test_float64_mode_notices_a_narrow_computation() -> None:
    with pytest.raises(ConfigError, match="float32"), OnlyFloat64():  # type: ignore[no-untyped-call]
        torch.ones(2, dtype=torch.float64).float()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    llama: Path, tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ConfigError, match=complaint):
        load_model(tmp_path / "model")


def test_a_wrong_folder_dtype_or_device_is_a_config_error(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match="unknown dtype"):
        load_model(llama, "int3")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            load_model(llama, device="cuda")
