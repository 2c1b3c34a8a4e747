"""Engines whose pins wait for each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.engine.engine_harness import Driven, HandClock, HandPuller, prompt_of, request, source_of


def test_pins_in_each_others_way_end_long_before_their_leases(llama: Path) -> None:
    clock = HandClock()
    pair = {name: Driven(llama, clock, engine_id=name, total_blocks=12) for name in ("a", "b")}
    pullers = []
    for name, one in pair.items():
        puller = HandPuller(one.engine, {other: pair[other].engine for other in pair})
        one.engine.scheduler.puller = puller
        pullers.append(puller)
        for n in range(2):  # 8 of 12 blocks are pinned; a decode that comes wants 5
            one.run(request(f"{name}{n}", prompt_of(64, seed=ord(name) + 2 * n), 1, pin_kv=True))
    for name, other in (("a", "b"), ("b", "a")):
        for n in range(2):
            first = pair[other].legs[f"{other}{n}"].token_ids
            prompt = prompt_of(64, seed=ord(other) + 2 * n)
            decode = request(f"d{other}{n}", [*prompt, *first], 7, generated=1)
            pair[name].submit(replace(decode, source=source_of(pair[other], f"{other}{n}")))
    began_s = clock.at_s
    while any(leg.reason is None for one in pair.values() for leg in one.legs.values()):
        for one in pair.values():
            one.drain()
        if not sum(puller.deliver() for puller in pullers):
            clock.at_s += 0.5
    assert clock.at_s - began_s < 5.0
    for name, other in (("a", "b"), ("b", "a")):
        alone = Driven(llama).run(request("alone", prompt_of(64, seed=ord(other)), 8))[0]
        assert pair[name].legs[f"d{other}0"].token_ids == alone.token_ids[1:]
        for puller in pullers:
            puller.deliver()
        pair[name].drain()
        pair[name].assert_clean()
