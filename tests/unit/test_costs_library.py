"""The packaged profiles: they predict what was published, and they are what the build script makes."""

from __future__ import annotations

import json
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tidegate.core.errors import ConfigError
from tidegate.costs import library
from tidegate.costs.library import MIXED_CONTEXT_RATIO, packaged_profile, profile_names
from tidegate.costs.profile import Profile

ROOT = Path(__file__).parents[2]
NAMES = profile_names()
ENTRIES = json.loads((ROOT / "src/tidegate/costs/profiles/packaged.json").read_text())

PUBLISHED_MS = {
    "a100_sxm/llama-3.1-70b/tp4": (105.35, 1371.53, 27.19, 70.11),
    "a100_sxm/llama-3.1-70b/tp8": (77.3, 831.75, 17.18, 39.28),
    "a100_sxm/llama-3.1-8b": (35.99, 556.95, 11.86, 56.42),
    "a100_sxm/qwen3-32b/tp4": (50.1, 711.23, 14.29, 46.02),
    "b200_sxm/llama-3.1-70b/tp2": (35.59, 492.64, 14.44, 30.64),
    "b200_sxm/llama-3.1-8b": (6.8, 97.55, 3.48, 13.15),
    "h100_sxm/llama-3.1-70b-fp8/tp4": (30.11, 394.49, 10.53, 22.45),
    "h100_sxm/llama-3.1-70b/tp4": (37.31, 576.76, 14.86, 32.9),
    "h100_sxm/llama-3.1-70b/tp8": (26.54, 344.26, 10.12, 19.7),
    "h100_sxm/llama-3.1-8b": (12.02, 199.72, 6.18, 28.82),
    "h100_sxm/llama-3.1-8b@sglang": (12.59, 205.73, 6.61, 29.01),
    "h100_sxm/llama-3.1-8b@trtllm": (12.71, 202.42, 6.58, 29.81),
    "h100_sxm/qwen3-30b-a3b/tp2": (18.86, 101.09, 3.63, 22.39),
    "h100_sxm/qwen3-32b/tp2": (30.09, 475.97, 13.42, 38.27),
    "h200_sxm/llama-3.1-8b": (11.48, 198.87, 4.86, 20.98),
    "h200_sxm/qwen3-235b-a22b/tp8": (38.21, 232.96, 7.5, 31.93),
    "h200_sxm/qwen3-32b/tp2": (29.39, 473.8, 10.65, 28.52),
    "l40s/llama-3.1-8b": (38.27, 699.83, 21.98, 122.05),
}
"""Milliseconds of a prefill of 512 and of 8,192 tokens, and of a decode step of 1 x 1,024 and 128 x 4,096."""
LAYER_PROFILES = {"rtx_4090/llama-3.1-8b", "rtx_pro_6000/llama-3.1-8b", "rtx_pro_6000/qwen3-32b/tp2"}
"""The sets whose steps nobody published, only the fits' errors."""
ROUNDING = 0.001
"""The published errors and times are rounded."""

EXCERPT: list[dict[str, Any]] = [
    {
        "gpu": "h100_sxm", "model": "meta-llama/Meta-Llama-3.1-8B", "tp": 1, "engine": "sglang",
        "prefill_hinge": {
            "a": 7.810178403233717, "b": 0.021438498560089732, "c": 8.408129936980945e-07, "N0": 320,
            "err": {"r2": 0.9995, "p50": 0.0159, "p95": 0.0799, "max": 0.1426},
        },
        "decode_linear": {
            "a": 6.448167703572322, "b": 0.008229983112173545, "c": 4.209619578712323e-05,
            "err": {"r2": 0.9997, "p50": 0.0087, "p95": 0.0257, "max": 0.0302},
        },
        "kv_bytes_per_token": 131072, "weight_gb": 16.1, "approx_kv_capacity_tokens": 407714,
    },
    {
        "gpu": "h200_sxm", "model": "Qwen/Qwen3-235B-A22B", "tp": 8, "engine": "vllm",
        "prefill_hinge": {
            "a": 25.924247805884733, "b": 0.022914544936584687, "c": 5.806728285319138e-07, "N0": 0,
            "err": {"r2": 0.9994, "p50": 0.0124, "p95": 0.0541, "max": 0.1118},
        },
        "decode_linear": {
            "a": 9.658099532963778, "b": 0.10845937045532937, "c": 1.8112907116408453e-05,
            "err": {"r2": 0.7893, "p50": 0.1184, "p95": 0.3196, "max": 0.3378},
        },
        "decode_moe": {
            "E": 128, "k": 8, "a": 7.2572555147619475, "e": 0.08688712949822201,
            "b": 0.0491839085578234, "c": 1.2160931071820575e-05,
            "err": {"r2": 0.9882, "p50": 0.0345, "p95": 0.0874, "max": 0.1283},
        },
        "kv_bytes_per_token": 192512, "weight_gb": 470.0, "approx_kv_capacity_tokens": 2728141,
    },
    {
        "gpu": "rtx_4090", "model": "meta-llama/Llama-3.1-8B", "tp": 1, "engine": "vllm-0.19 layer profile",
        "note": "measured layers summed; KV capacity is the measured run's; host time per step about 0",
        "prefill_hinge": {
            "a": 19.17316, "b": 0.08704053, "c": 5.296398e-06, "N0": 192, "err": {"p50": 0.022, "p95": 0.116},
        },
        "decode_linear": {
            "a": 16.963, "b": 0.0416509, "c": 0.0001405672, "err": {"p50": 0.01, "p95": 0.029},
        },
        "mixed_hinge": {
            "a": 19.63312, "b": 0.08561552, "c": 4.941034e-06, "d": 0.0003391642, "N0": 128,
            "err": {"p50": 0.051, "p95": 0.162},
        },
        "kv_bytes_per_token": 131072, "approx_kv_capacity_tokens": 41408,
    },
]  # fmt: skip
"""Three sets of the build script's input: one of each kind."""


def builder() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "build_profiles.py"))


def test_every_profile_is_checked_here() -> None:
    assert {*PUBLISHED_MS, *LAYER_PROFILES} == set(NAMES)


@pytest.mark.parametrize("name", PUBLISHED_MS)
def test_it_predicts_the_published_steps_within_the_stated_error(name: str) -> None:
    worst = ENTRIES[name]["max_errors"]
    profile = packaged_profile(name).profile
    short, long, alone, crowded = (ms / 1e3 for ms in PUBLISHED_MS[name])
    assert profile.prefill_s(512) == pytest.approx(short, rel=worst["prefill"] + ROUNDING)
    assert profile.prefill_s(8192) == pytest.approx(long, rel=worst["prefill"] + ROUNDING)
    assert profile.step.seconds(1, 1024) == pytest.approx(alone, rel=worst["step"] + ROUNDING)
    assert profile.step.seconds(128, 128 * 4096) == pytest.approx(crowded, rel=worst["step"] + ROUNDING)


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip_and_the_profile_is_complete(name: str) -> None:
    packaged = packaged_profile(name)
    profile = packaged.profile
    assert packaged.name == profile.name == name
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    assert {form for form, _, _ in profile.errors} >= {"prefill", "step"}
    assert all(0 < p50 < p95 < 0.2 for _, p50, p95 in profile.errors)
    assert packaged.kv_bytes_per_token > 0
    assert packaged.kv_capacity_tokens > 0
    assert profile.transfer.seconds(1e9) < packaged.inter_node.seconds(1e9)


@pytest.mark.parametrize("name", NAMES)
def test_times_grow_with_tokens(name: str) -> None:
    profile = packaged_profile(name).profile
    sizes = [1, 64, 320, 512, 2048, 8192, 32768]
    for fewer, more in pairwise(sizes):
        assert profile.prefill_s(fewer) < profile.prefill_s(more)
        assert profile.prefill_s(512, fewer) < profile.prefill_s(512, more)
        assert profile.step.seconds(32, 32 * fewer) < profile.step.seconds(32, 32 * more)
        assert profile.mixed.seconds(512, 0.0, 32 * fewer) < profile.mixed.seconds(512, 0.0, 32 * more)
    for fewer, more in pairwise([1, 2, 8, 32, 128, 256]):
        assert profile.step.seconds(fewer, 4096) < profile.step.seconds(more, 4096)
        assert profile.mixed.seconds(512 + fewer, 0.0, 4096) < profile.mixed.seconds(512 + more, 0.0, 4096)


def test_experts_make_a_crowded_step_dearer_than_its_requests_alone() -> None:
    step = packaged_profile("h100_sxm/qwen3-30b-a3b/tp2").profile.step
    assert (step.experts, step.active_experts) == (128.0, 8.0)
    assert step.seconds(32, 32 * 1024) > 2.5 * step.seconds(1, 1024)


def test_a_derived_mixed_form_is_the_prefill_form_with_a_dearer_context() -> None:
    packaged = packaged_profile("h100_sxm/llama-3.1-8b")
    prefill, step, mixed = packaged.profile.prefill, packaged.profile.step, packaged.profile.mixed
    assert not packaged.mixed_measured
    assert (mixed.a_s, mixed.b_s, mixed.c_s, mixed.n0) == (
        prefill.a_s,
        prefill.b_s,
        prefill.c_s,
        prefill.n0,
    )
    assert mixed.d_s == step.c_s * MIXED_CONTEXT_RATIO
    assert "mixed" not in {form for form, _, _ in packaged.profile.errors}
    assert "context ratio 2;" in packaged.profile.source


def test_a_measured_mixed_form_is_kept_unless_a_ratio_is_given() -> None:
    name = "rtx_4090/llama-3.1-8b"
    kept, given = packaged_profile(name), packaged_profile(name, mixed_context_ratio=1.5)
    assert kept.mixed_measured and not given.mixed_measured
    assert kept.profile.mixed.d_s == pytest.approx(3.391642e-7)
    assert given.profile.mixed.d_s == pytest.approx(1.5 * 1.405672e-7)
    assert given.profile.mixed.a_s == kept.profile.mixed.a_s
    assert "mixed" in {form for form, _, _ in kept.profile.errors}
    assert "mixed" not in {form for form, _, _ in given.profile.errors}


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_that_is_not_positive_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="mixed_context_ratio"):
        packaged_profile("rtx_4090/llama-3.1-8b", mixed_context_ratio=ratio)


def test_more_gpus_move_kv_through_more_ports() -> None:
    four, eight = (packaged_profile(f"h100_sxm/llama-3.1-70b/tp{n}") for n in (4, 8))
    assert eight.inter_node.bytes_per_s == 2 * four.inter_node.bytes_per_s
    pcie = packaged_profile("rtx_4090/llama-3.1-8b")
    assert pcie.inter_node.bytes_per_s <= pcie.profile.transfer.bytes_per_s


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("h100_sxm/llama-3.1-70b", "h100_sxm/llama-3.1-70b/tp4"),
        ("h100/llama-3.1-8b", "h100_sxm/llama-3.1-8b"),
        ("H100_SXM/Llama-3.1-8B", "h100_sxm/llama-3.1-8b"),
        ("h100_sxm/llama-3.1-8b@vlm", "h100_sxm/llama-3.1-8b"),
    ],
)
def test_an_unknown_name_lists_near_ones_and_how_to_list_all(asked: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        packaged_profile(asked)
    assert f"{near}," in caught.value.message or f"{near} (" in caught.value.message
    assert "`tidegate profile --list` shows all 21" in caught.value.message


@pytest.mark.parametrize("asked", ["", "something else entirely"])
def test_a_name_near_nothing_lists_all(asked: str) -> None:
    with pytest.raises(ConfigError) as caught:
        packaged_profile(asked)
    assert all(name in caught.value.message for name in NAMES)


def test_the_data_file_is_what_the_build_script_makes() -> None:
    built = builder()["build"](EXCERPT)
    file = Path(library.__file__).parent / "profiles" / "packaged.json"
    shipped = json.loads(file.read_text(encoding="utf-8"))
    assert list(built) == [
        "h100_sxm/llama-3.1-8b@sglang",
        "h200_sxm/qwen3-235b-a22b/tp8",
        "rtx_4090/llama-3.1-8b",
    ]
    assert built == {name: shipped[name] for name in built}
    assert file.read_text(encoding="utf-8") == builder()["dump"](shipped)


def test_two_sets_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two sets are called rtx_4090"):
        builder()["build"]([EXCERPT[2], EXCERPT[2]])
