"""Profiles of what nobody measured: near measured ones where there are any, and honest about themselves."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tidegate.core.errors import ConfigError
from tidegate.costs import hardware
from tidegate.costs.library import packaged_profile
from tidegate.costs.named_profile import load_profile
from tidegate.costs.roofline import Shape, roofline_profile

ROOT = Path(__file__).parents[2]
CONFIG = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
"""Llama-3.1-8B's."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_rooflines_are_as_near_to_measured_profiles_as_stated() -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "roofline_error.py"))
    off = np.abs(np.log(np.array(list(benchmark["factors"]().values()))))
    assert np.exp(np.median(off)) < 1.09
    assert np.exp(np.percentile(off, 95)) < 1.5


def test_a_name_with_a_models_folder_or_config_is_a_roofline(folder: Path) -> None:
    found = load_profile(f"roofline:h100_sxm/{folder}")
    measured = packaged_profile("h100_sxm/llama-3.1-8b")
    assert found.kv_bytes_per_token == measured.kv_bytes_per_token
    assert found.kv_capacity_tokens == pytest.approx(measured.kv_capacity_tokens, rel=0.2)
    assert "not measured" in found.profile.source and "not measured" in found.note
    two = load_profile(f"roofline:h100_sxm/{folder}/config.json/tp2")
    assert two.profile.prefill_s(8192) < found.profile.prefill_s(8192)


def test_a_mixture_of_experts_reads_them_as_they_are_touched() -> None:
    shape = Shape.from_config(
        CONFIG | {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1792}
    )
    step = roofline_profile("x", "h100_sxm", shape, model="moe").profile.step
    assert (step.experts, step.active_experts) == (8.0, 2.0)
    assert 0 < step.e_s * 8 < step.seconds(64, 64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"kv_lora_rank": 512}, "MLA"),
        ({"num_hidden_layers": 3200}, "too much for 1 x l4"),
    ],
)
def test_what_a_roofline_cannot_tell(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        roofline_profile("x", "l4", Shape.from_config(CONFIG | change), model="m")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("roofline:h100_sxm", "GPU/MODEL"),
        ("roofline:tpu/{folder}", "no nominal figures"),
        ("roofline:h100_sxm/{folder}/absent.json", "cannot read"),
    ],
)
def test_wrong_names_say_what_is_wrong(folder: Path, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_profile(name.format(folder=folder))


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "PACKAGE", "no_such_package_here")
    with pytest.raises(ConfigError, match="pip install 'aiconfigurator-core"):
        load_profile("hardware:h100_sxm/meta-llama/Meta-Llama-3.1-8B")


def test_the_extra_reproduces_a_packaged_profile() -> None:
    pytest.importorskip("aiconfigurator_core")
    found = load_profile("hardware:h100_sxm/meta-llama/Meta-Llama-3.1-8B")
    packaged = packaged_profile("h100_sxm/llama-3.1-8b")
    for new in (512, 2048, 8192):
        assert found.profile.prefill_s(new) == pytest.approx(packaged.profile.prefill_s(new), rel=0.1)
    for batch in (1, 32, 128):
        mine, theirs = (p.profile.step.seconds(batch, 2048 * batch) for p in (found, packaged))
        assert mine == pytest.approx(theirs, rel=0.1)
    with pytest.raises(ConfigError, match="has no GPU"):
        load_profile("hardware:tpu/meta-llama/Meta-Llama-3.1-8B")
