"""Every ordered pair of servers: can the second one go on with the first one's KV?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tidegate.check.context import CheckContext
from tidegate.check.server import ProbedServer
from tidegate.check.transfer import LEASE_TOKENS, TAKE_TOKENS, PullResult, pin_prefill, pull_kv
from tidegate.check.verdict import CheckVerdict, Finding, Json
from tidegate.core.errors import EngineError

PROBE_PULL, PROBE_READ, PROBE_FLIP = "KV pull", "bidirectional reads", "flip without restart"
BIDIRECTIONAL = (
    'add "kv_connector_extra_config": {"bidirectional_kv_xfer": true} to --kv-transfer-config: '
    "without it KV of earlier rounds cannot be read back, and a request that tries would hang"
)


@dataclass(frozen=True, slots=True)
class PairResult:
    """What one ordered pair showed. ``handle`` is the owner's; None when it pins nothing. ``read`` is
    None where reading back was not tried."""

    handle: Json | None = None
    pull: PullResult | None = None
    read: PullResult | None = None
    failed: str = ""
    """Why the owner could not even prefill."""
    skipped: str = ""
    first_failure: str = ""
    """What went wrong with the first of two pulls."""

    @property
    def works(self) -> bool:
        """Whether the KV moved and was right."""
        return (
            self.pull is not None and self.pull.judge(0)[0] is not CheckVerdict.RED and self.pull.pulled != 0
        )


def rounds(names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Yield matches in which every two names meet once, and nobody is in two matches of one round."""
    ring: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        matches = zip(ring[:half], reversed(ring[half:]), strict=True)
        yield [(a, b) for a, b in matches if a is not None and b is not None]
        ring = [ring[0], ring[-1], *ring[1:-1]]


async def probe_pairs(
    check: CheckContext, advance: Callable[[float], None]
) -> dict[tuple[str, str], PairResult]:
    """Probe all ordered pairs of active servers: both directions of a match in turn, matches of a round at
    once. A server that stops answering is excluded, and its further matches are left out."""
    seen: dict[tuple[str, str], PairResult] = {}

    async def match(a: str, b: str) -> None:
        for owner, taker in ((a, b), (b, a)):
            if {a, b} & check.excluded.keys() or not (check.produces_kv(owner) and check.consumes_kv(taker)):
                continue
            hopeless = _hopeless(seen, owner, taker)
            seen[owner, taker] = (
                PairResult(skipped=hopeless)
                if hopeless
                else await _probe_pair(check, check.servers[owner], check.servers[taker])
            )

    planned = list(rounds([each.id for each in check.active]))
    for n, matches in enumerate(planned):
        await asyncio.gather(*(match(a, b) for a, b in matches))
        advance((n + 1) / len(planned))
    return seen


def _hopeless(seen: dict[tuple[str, str], PairResult], owner: str, taker: str) -> str:
    """Say why nothing can be expected of a pair, after two others failed in the same way; else empty."""
    for name, side, what in ((owner, 0, "two others could not pull from"), (taker, 1, "two pulls failed on")):
        pulls = [each.pull for pair, each in seen.items() if pair[side] == name and each.pull]
        if sum(bool(pull.error) for pull in pulls) >= 2 and all(pull.error for pull in pulls):
            return f"not probed: {what} {name}"
    return ""


async def _probe_pair(check: CheckContext, owner: ProbedServer, taker: ProbedServer) -> PairResult:
    """Probe one pair; a pull that fails is tried once more, and the first failure told."""
    try:
        found = await _pulled(check, owner, taker, "pull")
        if found.pull is not None and not found.works and owner.id not in check.excluded:
            if found.pull.error:
                await _still_serves(check, taker)
            if taker.id in check.excluded:
                return found
            again = await _pulled(check, owner, taker, "again")
            if again.works:
                found = replace(again, first_failure=found.pull.judge(len(check.prompt))[1])
        # Only now: a server without bidirectional reads would never answer what follows, and leak its blocks.
        if found.works and found.pull is not None and found.pull.params is not None:
            found = replace(found, read=await _read(check, owner, taker))
        return found
    except EngineError as error:
        return PairResult(failed=f"{error.instance}: {error.message}")
    finally:
        await check.pins.release(check.servers, (owner.id, taker.id))


async def _pulled(check: CheckContext, owner: ProbedServer, taker: ProbedServer, trial: str) -> PairResult:
    salt = check.salt(owner.id, taker.id, trial)
    expected = check.expected(owner.id, taker.id)[:TAKE_TOKENS]
    made = await pin_prefill(check, owner, check.prompt, 1, salt)
    if made.handle is None:
        return PairResult(failed=f"{owner.id}: it gave no handle this time")
    pull = await pull_kv(check, taker, made.handle, check.prompt, expected, pin=False, salt=salt)
    return PairResult(made.handle.params, pull)


async def _read(check: CheckContext, owner: ProbedServer, taker: ProbedServer) -> PullResult | None:
    salt = check.salt(owner.id, taker.id, "read")
    made = await pin_prefill(check, owner, check.prompt, LEASE_TOKENS, salt)
    if made.handle is None:
        return None
    rest = check.expected(owner.id, taker.id)[LEASE_TOKENS : LEASE_TOKENS + TAKE_TOKENS]
    prompt = check.prompt + made.token_ids
    read = await pull_kv(check, taker, made.handle, prompt, rest, pin=True, salt=salt)
    if read.error:
        await _still_serves(check, taker)
    return read


async def _still_serves(check: CheckContext, server: ProbedServer) -> None:
    try:
        (await server.complete(check.fresh_prompt(8), 1)).new_tokens()
    except EngineError as error:
        check.exclude(server.id, "it stopped answering")
        observed = f"stopped answering after a pull failed: {error.message}"
        change = "restart it; its log has the reason"
        check.add([Finding("reachable", (server.id,), CheckVerdict.RED, observed, change)])


def judge_pairs(check: CheckContext, seen: dict[tuple[str, str], PairResult]) -> list[Finding]:
    """Return the findings of all pairs."""
    found: list[Finding] = []
    reads: list[Finding] = []
    wanted = len(check.prompt)
    for pair, each in seen.items():
        if each.pull is None:
            if each.skipped:
                found.append(Finding(PROBE_PULL, pair, CheckVerdict.SKIPPED, each.skipped))
            if each.failed:
                found.append(Finding(PROBE_PULL, pair, CheckVerdict.RED, each.failed, "see the server's log"))
            continue
        if each.first_failure:
            observed = f"the first of two pulls failed: {each.first_failure}"
            change = "check again; if it stays, the machines or their network are too busy for handshakes"
            found.append(Finding(PROBE_PULL, pair, CheckVerdict.YELLOW, observed, change))
        else:
            found.append(Finding(PROBE_PULL, pair, *each.pull.judge(wanted)))
        if each.read is not None:
            verdict, observed, change = each.read.judge(wanted + LEASE_TOKENS - 1)
            reads.append(Finding(PROBE_READ, pair, verdict, observed, change))
    return found + _flips(seen) + _readers(seen) + reads


def _flips(seen: dict[tuple[str, str], PairResult]) -> list[Finding]:
    found = []
    for (a, b), there in seen.items():
        back = seen.get((b, a))
        if a > b or back is None or there.pull is None or back.pull is None:
            continue
        if there.works and back.works:
            observed = "each gave KV to the other and took some, in one process"
            found.append(Finding(PROBE_FLIP, (a, b), CheckVerdict.GREEN, observed))
        elif there.works or back.works:
            good = f"{a} -> {b}" if there.works else f"{b} -> {a}"
            observed, change = f"KV moves one way only: {good}", "see the pull that failed"
            found.append(Finding(PROBE_FLIP, (a, b), CheckVerdict.RED, observed, change))
    return found


def _readers(seen: dict[tuple[str, str], PairResult]) -> list[Finding]:
    """Tell who pins what it has decoded, which a server does only with bidirectional reads."""
    found = []
    for name in sorted({taker for _, taker in seen}):
        pulls = [each.pull for (_, taker), each in seen.items() if taker == name and each.pull]
        answered = [pull for pull in pulls if not pull.error]
        if answered and not any(pull.params for pull in answered):
            observed = "bidirectional reads are missing: it keeps no KV of what it decoded"
            found.append(Finding(PROBE_READ, (name,), CheckVerdict.RED, observed, BIDIRECTIONAL))
        elif pulls and not answered:
            observed = "not probed: no pull worked"
            found.append(Finding(PROBE_READ, (name,), CheckVerdict.SKIPPED, observed))
    return found
