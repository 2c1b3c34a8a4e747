"""The ground the other tests here stand on: stock servers move KV between them, in both directions."""

from __future__ import annotations

import random

from tests.vllm.vllm_servers import VllmCluster, VllmServer

EXPORT = {"do_remote_decode": True, "do_remote_prefill": False}


def hand_over(source: VllmServer, target: VllmServer, seed: int) -> None:
    """Prefill on one server, go on at the other with the pinned KV."""
    prompt = [random.Random(seed).randrange(5, 512) for _ in range(500)]
    expected = target.reference(prompt, 40)
    first = source.complete(prompt, 1, kv_transfer_params=EXPORT)
    tokens = first["choices"][0]["token_ids"]
    before = target.counters()
    rest = target.complete(prompt + tokens, 39, kv_transfer_params={**first["kv_transfer_params"], **EXPORT})
    moved = target.counters() - before
    assert tokens + rest["choices"][0]["token_ids"] == expected
    assert (moved.pulled_tokens, moved.computed_tokens) == (500, 1)
    assert moved.nixl_bytes > 0


def test_kv_moves_both_ways_without_a_restart(cluster: VllmCluster) -> None:
    hand_over(cluster[0], cluster[1], seed=1)
    hand_over(cluster[1], cluster[0], seed=2)


def test_a_killed_server_comes_back_on_its_ports(cluster: VllmCluster) -> None:
    cluster[2].kill()
    assert not cluster[2].healthy()
    cluster.ensure_up()
    hand_over(cluster[2], cluster[0], seed=3)
