"""Reading vLLM's /metrics: a page of a real server, older names, and what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.engines.vllm.load import Load, parse_load

PAGE = Path(__file__).with_name("vllm_two_engines.prom").read_text(encoding="utf-8")
"""Recorded from vLLM 0.32.0 with ``--data-parallel-size 2``, after one of them pulled a prompt from the
other, with two streams on one and one on the other. Of its histograms only a few buckets are kept."""


def test_a_recorded_page_is_summed_over_its_engines() -> None:
    assert parse_load(PAGE) == Load(
        running=3,
        waiting=0,
        waiting_by_reason={"capacity": 0, "deferred": 0},
        kv_usage=pytest.approx((0.02935420743639927 + 0.03718199608610573) / 2),
        preemptions=0,
        prefix_queries=1800,
        prefix_hits=768,
        external_queries=1032,
        external_hits=500,
        prompt_tokens=1800,
        prompt_by_source={"local_compute": 532, "local_cache_hit": 768, "external_kv_transfer": 500},
        generation_tokens=218,
        nixl_bytes=1048576,
        nixl_failed_transfers=0,
        nixl_failed_notifications=0,
        nixl_expired=0,
    )


def test_older_names_are_read_and_newer_ones_come_first() -> None:
    older = PAGE.replace("vllm:kv_cache_usage", "vllm:gpu_cache_usage")
    older = older.replace("vllm:prefix_cache", "vllm:gpu_prefix_cache")
    assert parse_load(older) == parse_load(PAGE)
    assert parse_load(f'{PAGE}vllm:gpu_cache_usage_perc{{engine="0"}} 1.0\n') == parse_load(PAGE)


def test_what_a_page_does_not_say_is_unknown() -> None:
    assert parse_load("") == parse_load("<html>not metrics at all</html>") == Load()
    without_waiting = "\n".join(line for line in PAGE.splitlines() if "requests_waiting" not in line)
    assert (parse_load(without_waiting).running, parse_load(without_waiting).requests) == (3, None)
    half_told = PAGE.replace('running{engine="1",model_name="tiny"} 1.0', 'running{engine="1"} NaN')
    assert parse_load(half_told).running is None, "one engine alone is not the sum"


def test_a_page_cut_off_within_a_number_is_refused() -> None:
    end = PAGE.index("vllm:num_requests_running{") + len('vllm:num_requests_running{engine="0"')
    with pytest.raises(ValueError):
        parse_load(PAGE[:end])
