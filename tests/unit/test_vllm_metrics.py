"""Reading vLLM's /metrics: a page of a real server, older names, and what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.engines.vllm.metrics import CACHED, COMPUTED, PULLED, VllmMetrics, read_metrics

PAGE = Path(__file__).with_name("vllm_two_engines.prom").read_text(encoding="utf-8")
"""Recorded from vLLM 0.32.0 with ``--data-parallel-size 2``, after one of them pulled a prompt from the
other, with two streams on one and one on the other. Of its histograms only a few buckets are kept."""


def test_a_recorded_page_is_summed_over_its_engines() -> None:
    assert read_metrics(PAGE) == VllmMetrics(
        running=3,
        waiting=0,
        waiting_by_reason={"capacity": 0, "deferred": 0},
        kv_usage=(0.02935420743639927 + 0.03718199608610573) / 2,
        kv_blocks=2048,
        block_tokens=32,
        prefix_caching=True,
        preemptions=0,
        prompt_tokens=1800,
        prompt_tokens_by_source={COMPUTED: 532, CACHED: 768, PULLED: 500},
        nixl_bytes=1048576,
        nixl_failed_transfers=0,
        nixl_failed_notifications=0,
        nixl_expired=0,
        shows_nixl=True,
    )
    assert read_metrics(PAGE).kv_capacity_tokens == 65536


def test_what_counts_reads_of_others_kv_is_told() -> None:
    page = PAGE + (
        'vllm:nixl_xfer_time_seconds_count{engine="0"} 2.0\n'
        'vllm:nixl_xfer_time_seconds_count{engine="1"} 1.0\n'
        'vllm:nixl_xfer_time_seconds_sum{engine="0"} 0.25\n'
        'vllm:num_requests_kv_fetch_by_stage{engine="0",stage="in_progress"} 0.0\n'
        "process_start_time_seconds 1.76400000025e+09\n"
    )
    told = read_metrics(page)
    assert (told.nixl_reads, told.nixl_read_s, told.counts_kv_fetches) == (3, 0.25, True)
    assert told.started_s == 1764000000.25


def test_a_cache_of_unknown_size_has_no_capacity() -> None:
    unsized = PAGE.replace('num_gpu_blocks="1024"', 'num_gpu_blocks="None"', 1)
    told = read_metrics(unsized)
    assert (told.block_tokens, told.kv_blocks, told.kv_capacity_tokens) == (32, None, None)
    assert told.kv_blocks_in_use is None
    assert read_metrics(PAGE.replace('caching="True"', 'caching="False"', 1)).prefix_caching is None


def test_older_names_are_read_and_newer_ones_come_first() -> None:
    older = PAGE.replace("vllm:kv_cache_usage", "vllm:gpu_cache_usage")
    assert older != PAGE and read_metrics(older) == read_metrics(PAGE)
    assert read_metrics(f'{PAGE}vllm:gpu_cache_usage_perc{{engine="0"}} 1.0\n') == read_metrics(PAGE)


def test_what_a_page_does_not_say_is_unknown() -> None:
    assert read_metrics("") == read_metrics("<html>not metrics at all</html>") == VllmMetrics()
    without_waiting = "\n".join(line for line in PAGE.splitlines() if "requests_waiting" not in line)
    assert (read_metrics(without_waiting).running, read_metrics(without_waiting).requests) == (3, None)
    half_told = PAGE.replace('running{engine="1",model_name="tiny"} 1.0', 'running{engine="1"} NaN')
    assert read_metrics(half_told).running is None, "one engine alone is not the sum"


def test_a_page_cut_off_within_a_number_is_refused() -> None:
    end = PAGE.index("vllm:num_requests_running{") + len('vllm:num_requests_running{engine="0"')
    with pytest.raises(ValueError):
        read_metrics(PAGE[:end])
