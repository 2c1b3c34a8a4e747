"""What must not be served wrongly: cut handles, stale memory, unknown attention, tiny temperatures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.engine_harness import Driven, HandPuller, prompt_of, request, source_of
from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.attention import paged_attention
from tidegate.engines.embedded.instance import weights_id
from tidegate.engines.embedded.sampling import Draw, sample
from tidegate.engines.serving.types import SamplingParams


def test_an_attention_that_asks_for_more_is_refused_not_ignored() -> None:
    tensor = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ConfigError, match="s_aux"):
        paged_attention(
            torch.nn.Module(),
            tensor,
            tensor,
            tensor,
            None,
            paged=None,  # type: ignore[arg-type]  # refused before it is read
            s_aux=tensor,
        )


@pytest.mark.parametrize("covered", [20, 31, 32])
def test_a_cut_handle_vouches_for_no_more_than_it_covers(llama: Path, covered: int) -> None:
    driven = Driven(llama)
    original = prompt_of(40)
    other = original[:covered] + prompt_of(20, seed=9)
    driven.run(request("a", original, 1, pin_kv=True))
    whole = source_of(driven, "a")
    cut = replace(whole, num_tokens=covered, block_ids=whole.block_ids[: -(-covered // 16)])
    expected = [Driven(llama).run(request("x", p, 6))[0].token_ids for p in (other, original)]
    assert driven.run(request("b", other, 6, source=cut))[0].token_ids == expected[0]
    assert driven.run(request("c", original, 6))[0].token_ids == expected[1]
    driven.assert_clean()


def test_stale_memory_never_reaches_a_request_after_a_pull(llama: Path) -> None:
    there, here = Driven(llama, engine_id="there"), Driven(llama, engine_id="here")
    prompt = prompt_of(32)
    first = there.run(request("a", prompt, 1, pin_kv=True))[0].token_ids
    expected = Driven(llama).run(request("x", prompt + first, 6))[0].token_ids
    here.engine.store.buffer.fill_(float("nan"))
    puller = HandPuller(here.engine, {"there": there.engine})
    here.engine.scheduler.puller = puller
    here.submit(request("b", prompt + first, 6, source=source_of(there, "a")))
    assert here.step() == 0, "only a pull was admitted"
    here.step()
    assert puller.deliver() == 1
    here.drain()
    assert here.legs["b"].token_ids == expected


def test_a_temperature_next_to_zero_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    (choice,) = sample(logits, [Draw(SamplingParams(temperature=1e-308), 0, 1)])
    assert choice.token_id == 1


def test_models_that_differ_in_one_late_weight_have_other_ids(tmp_path: Path) -> None:
    ids = []
    for name, last in (("a", b"x"), ("b", b"y")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(5 << 20) + last)
        ids.append(weights_id(folder, "float32"))
    assert ids[0] != ids[1]
