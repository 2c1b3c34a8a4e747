"""vLLM servers as members: their arguments and ports, how their KV moves, and what they say they are."""

from __future__ import annotations

import json
import math
import random
import re
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidegate.core.errors import ConfigError, EngineError, EngineFault, SetupError
from tidegate.core.instance import Instance, Role
from tidegate.costs.profile import Profile
from tidegate.engines.vllm.client import VllmClient
from tidegate.fleet.member import LEASE_S, MOONCAKE_LEASE_S, Capabilities, Member

FIRST_PORT, LAST_PORT = 20000, 32000
"""Below Linux's range for outgoing connections, which could take a port between its choice and its use."""
PORTS_PER_SERVER = 16
"""HTTP, bootstrap, and a side channel for each data-parallel engine of a server."""
ATTEMPTS = 200
CONNECTORS = {"NixlConnector": "nixl", "NixlPullConnector": "nixl", "MooncakeConnector": "mooncake"}
"""Names that ``Member.connector`` has for vLLM's."""
DEFAULT_FLAGS = (
    *("--scheduling-policy", "priority", "--enable-prompt-tokens-details"),
    # The gateway asks for these every second or two, and a log of that hides the rest.
    *("--disable-access-log-for-endpoints", "/health,/metrics"),
)
OWN_FLAGS = ("--host", "--port", "--uds", "--api-key")
PARALLEL_SIZES = (
    ("--tensor-parallel-size", "-tp"),
    ("--pipeline-parallel-size", "-pp"),
    ("--data-parallel-size", "-dp"),
)
LONGEST_LEASE_S = 1e6
STEP_FLAG = "--max-num-batched-tokens"
READABLE = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}
"""What vLLM takes a letter behind a number for, in sizes of steps."""
STREAM_PIN_S = 1
"""How long vLLM keeps the KV of a stream that pulled some (its default is 480 s): nobody learns the handle,
and what a migration or a later round wants is pinned on demand."""


@dataclass(frozen=True, slots=True)
class KvSetup:
    """How servers were started to hand KV on: ``nixl``, ``mooncake``, ``none``, or ``auto`` to look at their
    metrics, which show NIXL only. They pin KV for ``lease_s``, None for vLLM's default.

    ``bidirectional``: they have NixlConnector's ``bidirectional_kv_xfer``, which nothing shows, and without
    which a prefill that reads KV hangs. ``bootstraps`` are the URLs of MooncakeConnector's bootstrap servers
    in the servers' order; by default they are at the servers' hosts, on vLLM's port for them.
    """

    connector: str = "auto"
    lease_s: float | None = None
    bidirectional: bool = False
    bootstraps: Sequence[str] = ()


async def describe_member(
    server: VllmClient,
    kv: KvSetup,
    *,
    bootstrap: VllmClient,
    api_key: str,
    profile: Profile | None,
    engine_id: str = "",
    fixed_role: Role | None = None,
    pid: int | None = None,
    step_tokens: int = 0,
) -> Member:
    """Ask a server, and with Mooncake its ``bootstrap`` server, what it is. It does not say its
    ``step_tokens``.

    Without an ``engine_id`` the member gets one that changes with the server's start. Raises EngineError when
    asking again later may succeed, SetupError when it never will.
    """
    facts = await server.facts()
    connector = kv.connector
    if connector == "auto":
        connector = "nixl" if facts.metrics.shows_nixl else "none"
    on_mooncake = connector == "mooncake"
    known_as = ""
    if on_mooncake and fixed_role is not Role.DECODE:
        known_as = await _mooncake_engine_id(bootstrap)
    return Member(
        instance=Instance(
            server.instance,
            facts.kv_capacity_tokens,
            facts.max_model_len,
            facts.block_tokens,
            flippable=fixed_role is None,
            extends_kv=connector == "nixl" and kv.bidirectional and fixed_role is not Role.PREFILL,
            step_tokens=step_tokens,
        ),
        url=server.url,
        model=facts.model,
        engine_id=engine_id or f"{server.instance}-{facts.metrics.started_s or secrets.token_hex(4)}",
        profile=profile,
        api_key=api_key,
        kind="vllm",
        pid=pid,
        capabilities=Capabilities(
            kv_transfer=connector != "none",
            continues=False,
            orders=False,
            tells_load=True,
        ),
        connector="" if connector == "none" else connector,
        lease_s=kv.lease_s or (MOONCAKE_LEASE_S if on_mooncake else LEASE_S),
        bootstrap_url=bootstrap.url if on_mooncake else "",
        kv_engine_id=known_as,
        fixed_role=fixed_role,
    )


def profiles_by_id(ids: Sequence[str], profiles: Sequence[Profile]) -> dict[str, Profile]:
    """Return each server's profile: ``profiles`` holds none at all, one for all, or one for each. Raises
    ConfigError for another number."""
    if len(profiles) not in (0, 1, len(ids)):
        raise ConfigError(f"{len(profiles)} profiles for {len(ids)} servers: give one for all or for each")
    each = list(profiles) * len(ids) if len(profiles) == 1 else profiles
    return dict(zip(ids, each, strict=False))


async def _mooncake_engine_id(bootstrap: VllmClient) -> str:
    """Return the engine id under which peers pull from a server. Raises EngineError when its bootstrap server
    does not answer properly yet, SetupError when it names several engines."""
    where = f"its Mooncake bootstrap server {bootstrap.url}"
    try:
        reply = await bootstrap.ask("/query")
    except EngineError as error:
        raise EngineFault(f"{where} does not answer: {error.message}") from None
    if reply.status != 200:
        raise EngineFault(f"{where} answers /query with {reply.status}")
    try:
        engines = {str(entry["engine_id"]) for entry in reply.body.values()}
    except (LookupError, TypeError):
        raise EngineFault(f"{bootstrap.url} is no Mooncake bootstrap server") from None
    if len(engines) > 1:
        raise SetupError(
            f"{bootstrap.url} names {len(engines)} data-parallel engines, and MooncakeConnector does not say "
            "which of them holds a request's KV: start each as a server of its own "
            "(--data-parallel-external-lb)"
        )
    if not engines:
        raise EngineFault(f"{where} knows no engine yet")
    return engines.pop()


def nixl_config(lease_s: int = 30) -> dict[str, Any]:
    """Return vLLM's ``--kv-transfer-config`` for NixlConnector as the gateway wants it.

    ``fail``: a pull that cannot be made fails its request at once, which the gateway repeats; ``recompute``
    can hang. ``bidirectional_kv_xfer``: a prefill begins with KV that another server's decode made, and an
    answer brings its handle. ``lease_s``: how long KV stays pinned for a pull; behind a stream it stays for
    ``STREAM_PIN_S``. A recompute threshold of 0 leaves it to the gateway which KV is worth a pull.
    """
    return {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {
            "bidirectional_kv_xfer": True,
            "kv_recompute_threshold": 0,
            "kv_lease_duration": lease_s,
            "decoder_kv_blocks_ttl": STREAM_PIN_S,
        },
    }


class ServeArguments:
    """What a user adds to ``vllm serve``, and what tidegate adds. Raises ConfigError for words that are
    tidegate's to choose, and for a configuration of KV transfer that it cannot read or work with."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words, given = _without(words, "--kv-transfer-config")
        self._config = nixl_config() if given is None else _checked_config(given)
        for flag in OWN_FLAGS:
            if _without(words, flag)[1] is not None:
                raise ConfigError(f"{flag} is tidegate's to choose; leave it out of the vLLM arguments")
        self.gpus = math.prod(_size(words, long, short) for long, short in PARALLEL_SIZES)
        """GPUs of one server."""
        extra = self._config.get("kv_connector_extra_config") or {}
        self.kv_transfer = KvSetup(
            CONNECTORS.get(self._config["kv_connector"], "none"),
            extra.get("kv_lease_duration", LEASE_S),
            bool(extra.get("bidirectional_kv_xfer", False)),
        )
        """How KV moves between servers started like this."""
        self.step_tokens = _tokens(_without(words, STEP_FLAG)[1])
        """The budget of a step that the user gives, 0 without any."""
        self.most_sequences = _tokens(_without(words, "--max-num-seqs")[1])
        """How many requests a step may have, as the user gives it, 0 without; no budget may be smaller."""
        self.configured = _without(words, "--config")[1] is not None
        """Whether a file has arguments, too, which those of the command line would replace."""
        self.chunked = not any(_named(word) == "--no-enable-chunked-prefill" for word in words)
        """Whether steps may take parts of prompts."""

    def command_line(self, engine_id: str, step_tokens: int = 0) -> list[str]:
        """Return the words for one server; the user's come last, and win. Without ``step_tokens`` vLLM has
        its own default."""
        config = json.dumps({**self._config, "engine_id": engine_id})
        steps = [STEP_FLAG, str(step_tokens)] if step_tokens else []
        return [*DEFAULT_FLAGS, *steps, "--kv-transfer-config", config, *self._words]


def _checked_config(given: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(given)
        connector, policy = config["kv_connector"], config.get("kv_load_failure_policy", "fail")
        extra = config.get("kv_connector_extra_config") or {}
        lease_s = extra.get("kv_lease_duration", LEASE_S)
        is_named = isinstance(connector, str)
    except (ValueError, LookupError, TypeError, AttributeError):
        is_named = False
    if not is_named:
        raise ConfigError(
            "--kv-transfer-config: expected JSON with a kv_connector, as vLLM's documentation shows it"
        )
    if isinstance(lease_s, bool) or not isinstance(lease_s, int | float) or not 0 < lease_s < LONGEST_LEASE_S:
        raise ConfigError(f"--kv-transfer-config: kv_lease_duration {lease_s!r} is no number of seconds")
    if connector in CONNECTORS and policy != "fail":
        raise ConfigError(
            f"--kv-transfer-config: kv_load_failure_policy {policy!r} can hang a request whose KV is lost; "
            "tidegate needs 'fail', and repeats such a request itself"
        )
    return config


def _size(words: Sequence[str], long: str, short: str) -> int:
    value = _without(words, long)[1] or _without(words, short)[1] or "1"
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{long} {value}: expected a whole number from 1 on")
    return int(value)


def _tokens(value: str | None) -> int:
    """Return a number of tokens as vLLM reads it, 0 for none and for what only vLLM can read."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", value or "")
    return int(float(found[1]) * READABLE[found[2]]) if found else 0


def _named(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _without(words: Sequence[str], flag: str) -> tuple[list[str], str | None]:
    """Return ``words`` without ``flag`` and its value, and the value, None without any. vLLM takes
    ``--flag value``, ``--flag=value`` and underscores for hyphens; the last one counts."""
    rest: list[str] = []
    value = None
    each = iter(words)
    for word in each:
        _, equals, inline = word.partition("=")
        if _named(word) == flag:
            value = inline if equals else next(each, "")
        else:
            rest.append(word)
    return rest, value


def free_ports(taken: Sequence[int] = ()) -> int:
    """Return the first of ``PORTS_PER_SERVER`` ports in a row that are free on this machine, away from
    ``taken``, which are first ports of other servers. Raises SetupError when there are none."""
    starts = range(FIRST_PORT, LAST_PORT, PORTS_PER_SERVER)
    for first in random.sample(starts, ATTEMPTS):
        row = range(first, first + PORTS_PER_SERVER)
        if first not in taken and all(_is_free(port) for port in row):
            return first
    raise SetupError(f"no {PORTS_PER_SERVER} free ports in a row between {FIRST_PORT} and {LAST_PORT}")


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
