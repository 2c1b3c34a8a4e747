"""A profile's file brings back what was measured, and a wrong one says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tidegate.bench.saved_profile import HeldOut, SavedProfile, read_profile, save_profile
from tidegate.cli.profiles import load_profile
from tidegate.core.errors import ConfigError
from tidegate.costs.library import packaged_profile
from tidegate.costs.profile import Profile

SAVED = SavedProfile(
    profile=packaged_profile("h100_sxm/llama-3.1-8b").profile,
    created="2026-01-02T03:04:05+00:00",
    url="http://h:1",
    model="m",
    engine="vllm 0.19",
    max_model_len=4096,
    block_tokens=16,
    kv_capacity_tokens=65536,
    kv_bytes_per_token=1024,
    max_batch_tokens=2048,
    front_s=0.004,
    held_out=(HeldOut("step", 0.01, 0.02, 5),),
    notes=("a note",),
    samples={"step": [{"batch": 1, "context_tokens": 8, "seconds": 0.01}]},
)


def test_a_file_is_a_profile_and_names_one(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_profile(path, SAVED)
    assert read_profile(path) == SAVED
    assert Profile.from_json(json.loads(path.read_text())) == SAVED.profile
    named = load_profile(str(path))
    assert (named.profile, named.kv_capacity_tokens) == (SAVED.profile, 65536)
    assert load_profile("h100_sxm/llama-3.1-8b") == packaged_profile("h100_sxm/llama-3.1-8b")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense", "not JSON"),
        ("[]", "no JSON object"),
        ('{"name": "x"}', "no format mark"),
        (json.dumps(SAVED.to_json() | {"version": 2}), "version 2"),
        (json.dumps({k: v for k, v in SAVED.to_json().items() if k != "front_s"}), "front_s"),
        (json.dumps({k: v for k, v in SAVED.to_json().items() if k != "step"}), "step"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_profile(str(path))
    with pytest.raises(ConfigError, match="cannot read"):
        load_profile(str(tmp_path / "absent.json"))
