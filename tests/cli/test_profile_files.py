"""A profile's file brings back what was measured, and a wrong one says what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tidegate.cli.main import main
from tidegate.core.errors import ConfigError
from tidegate.costs.library import packaged_profile
from tidegate.costs.named_profile import OLD_DAYS, load_profile, profile_warnings
from tidegate.costs.profile import Profile
from tidegate.costs.saved_profile import (
    HeldOut,
    LinkSample,
    MeasuredLink,
    SavedProfile,
    read_profile,
    save_profile,
)

SAVED = SavedProfile(
    profile=replace(packaged_profile("h100_sxm/llama-3.1-8b").profile, front_s=0.004),
    created="2026-01-02T03:04:05+00:00",
    tidegate="0.1",
    url="http://h:1",
    model="m",
    engine="vllm 0.19",
    hardware="H100",
    max_model_len=4096,
    block_tokens=16,
    kv_capacity_tokens=65536,
    kv_bytes_per_token=1024,
    max_batch_tokens=2048,
    held_out=(HeldOut("step", 0.01, 0.02, 5),),
    notes=("a note",),
    samples={"step": [{"batch": 1, "context_tokens": 8, "seconds": 0.01}]},
    links=(
        MeasuredLink(
            "http://h:1", "http://h:2", "by hand", 0.001, 1e9, 0.02, None, None, (LinkSample(65, 96, 0.002),)
        ),
    ),
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
        (json.dumps(SAVED.to_json() | {"version": 3}), "version 3"),
        (json.dumps(SAVED.to_json() | {"created": "yesterday"}), "yesterday"),
        (json.dumps({k: v for k, v in SAVED.to_json().items() if k != "engine"}), "engine"),
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


def test_a_file_of_the_first_format_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    old = {k: v for k, v in SAVED.to_json().items() if k not in ("links", "hardware", "tidegate")}
    path.write_text(json.dumps(old | {"version": 1}))
    assert read_profile(path) == replace(SAVED, links=(), hardware="", tidegate="")


def test_an_old_profile_and_one_of_another_model_are_warned_of() -> None:
    created = datetime.fromisoformat(SAVED.created)
    assert profile_warnings(SAVED, "m", created + timedelta(days=OLD_DAYS)) == []
    (old,) = profile_warnings(SAVED, "m", created + timedelta(days=OLD_DAYS + 1))
    assert f"{OLD_DAYS + 1:.0f} days ago" in old
    (other,) = profile_warnings(SAVED, "n", created)
    assert "'m'" in other and "'n'" in other


def test_the_list_shows_measured_profiles_with_their_age(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_profile(tmp_path / "mine.json", SAVED)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["profile", "--list", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "h100_sxm/llama-3.1-8b " in shown and "other.json" not in shown
    (line,) = [line for line in shown.splitlines() if "mine.json" in line]
    assert "m on vllm 0.19, H100, 1 links" in line and "days ago (old: measure it again)" in line
    with pytest.raises(SystemExit):
        main(["profile", "--list", "--json", str(tmp_path / "mine.json")])
    (row,) = [row for row in json.loads(capsys.readouterr().out) if "file" in row]
    assert row["age_days"] > 0 and row["links"][0]["bytes_per_s"] == 1e9
    with pytest.raises(SystemExit) as caught:
        main(["profile", "--list", str(tmp_path / "other.json")])
    assert caught.value.code == 2
