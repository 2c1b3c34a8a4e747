"""A fleet of servers that something else starts and stops: a list of URLs."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp

from tidegate.core.errors import ConfigError, EngineError, SetupError
from tidegate.core.instance import Role
from tidegate.costs.profile import Profile
from tidegate.engines.vllm.client import ServerFacts, VllmClient
from tidegate.fleet.health import Health, HealthPace, check_health, end_watch, until_unhealthy
from tidegate.fleet.member import LEASE_S, MOONCAKE_LEASE_S, FleetListener, Member
from tidegate.fleet.vllm_member import KvTransfer, mooncake_engine_id, profiles_by_id, vllm_member

log = logging.getLogger(__name__)

AUTO = "auto"
"""Find out which KV connector a server has."""
BOOTSTRAP_PORT = 8998
"""That of MooncakeConnector's bootstrap server unless VLLM_MOONCAKE_BOOTSTRAP_PORT says otherwise."""


@dataclass(frozen=True, slots=True)
class KvSetup:
    """How servers were started to hand KV on: ``nixl``, ``mooncake``, ``none``, or ``auto`` to look at their
    metrics, which show NIXL only.

    They pin KV for ``lease_s``, None for what vLLM does by itself. ``bidirectional`` says that they have
    NixlConnector's ``bidirectional_kv_xfer``, which nothing shows: a prefill that reads KV hangs without it.
    ``bootstraps`` are the URLs of MooncakeConnector's bootstrap servers, one for each server in their order;
    without any they are on vLLM's port for them, where the servers are.
    """

    connector: str = AUTO
    lease_s: float | None = None
    bidirectional: bool = False
    bootstraps: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class StaticPace:
    """``start_s`` bounds the wait for servers that are not up yet; a down one is asked every ``retry_s``."""

    health: HealthPace = field(default_factory=HealthPace)
    start_s: float = 60.0
    retry_s: float = 1.0


class _Followed:
    """One server and what is known about it."""

    def __init__(self, instance_id: str, client: VllmClient) -> None:
        self.id = instance_id
        self.url = client.url
        self.client = client
        self.suspicion = asyncio.Event()
        self.settled = asyncio.Event()
        """Set once the server was up, or can never be."""
        self.was_up = False
        self.other_model = False
        """Whether it was refused for its model when last asked."""
        self.trouble = "no answer yet"


class StaticFleet:
    """Watches vLLM servers at ``urls``, named i0, i1, ... in that order; ``prefill=URL`` and ``decode=URL``
    are servers that do only that.

    A refused connection means down at once, otherwise three missed checks do. A server that comes
    back has a new ``engine_id``; a restart quicker than one check interval goes unseen unless a
    failing call makes the gateway ``suspect`` it. ``profiles`` holds one for all members or one for
    each; without any, members have no profile. ``kv`` says how their KV moves.

    All serve one model, that of the first one up. A server with another model fails ``start``; later it
    is refused with an error in the log, and asked again in case it comes back with the right one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str = "",
        profiles: Sequence[Profile] = (),
        pace: StaticPace | None = None,
        kv: KvSetup | None = None,
    ) -> None:
        self._urls, self._roles = [], []
        for word in urls:
            url, role = server_of(word)
            self._urls.append(url)
            self._roles.append(role)
        if not self._urls:
            raise ConfigError("a static fleet needs at least one URL")
        twice = sorted({url for url in self._urls if self._urls.count(url) > 1})
        if twice:
            raise ConfigError(f"given more than once: {', '.join(twice)}")
        count = len(self._urls)
        self._profiles = profiles_by_id(self.ids, profiles)
        self._api_key = api_key
        self._model = ""
        self._pace = pace or StaticPace()
        self._kv = kv or KvSetup()
        bootstraps = self._kv.bootstraps or [_bootstrap_beside(url) for url in self._urls]
        if len(bootstraps) != count:
            raise ConfigError(f"{len(bootstraps)} bootstrap URLs for {count} servers: give one for each")
        self._bootstraps = dict(zip(self.ids, bootstraps, strict=True))
        self._servers: dict[str, _Followed] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"i{n}" for n in range(len(self._urls)))

    async def start(self, listener: FleetListener) -> None:
        self._session = session = aiohttp.ClientSession()
        deadline_s = self._pace.health.deadline_s
        self._servers = {
            name: _Followed(
                name, VllmClient(session, url, instance=name, api_key=self._api_key, deadline_s=deadline_s)
            )
            for name, url in zip(self.ids, self._urls, strict=True)
        }
        self._tasks = [
            asyncio.create_task(self._follow(server, listener, session), name=f"fleet {server.id}")
            for server in self._servers.values()
        ]
        try:
            settled = [asyncio.create_task(server.settled.wait()) for server in self._servers.values()]
            await asyncio.wait(settled, timeout=self._pace.start_s)
            for task in settled:
                task.cancel()
            self._report_start()
        except BaseException:
            await self.stop()
            raise

    def add(self) -> bool:
        """See ``FleetControl.add``: a list of URLs cannot grow."""
        return False

    def remove(self, instance_id: str, reason: str) -> bool:
        """See ``FleetControl.remove``: servers that something else started are not stopped from here."""
        return False

    def suspect(self, instance_id: str) -> None:
        server = self._servers.get(instance_id)
        if server is not None:
            server.suspicion.set()

    async def stop(self) -> None:
        await end_watch(self._tasks, self._session)

    def _report_start(self) -> None:
        absent = [server for server in self._servers.values() if not server.was_up]
        for server in absent:
            log.warning("%s (%s) is not up: %s", server.id, server.url, server.trouble)
        refused = [f"  {server.id} {server.url}: {server.trouble}" for server in absent if server.other_model]
        if refused:
            raise SetupError("\n".join(["the servers do not serve one model", *refused]))
        if len(absent) == len(self._servers):
            lines = [f"  {server.id} {server.url}: {server.trouble}" for server in absent]
            raise SetupError("\n".join(["no server answers", *lines]))

    async def _follow(
        self, server: _Followed, listener: FleetListener, session: aiohttp.ClientSession
    ) -> None:
        try:
            while True:
                try:
                    await self._one_life(server, listener, session)
                except SetupError as error:
                    server.trouble = error.message
                    log.error("%s is given up: %s", server.id, error.message)
                    return
                except Exception as error:
                    server.trouble = f"following it failed: {error!r}"
                    log.exception("following %s failed; it goes on", server.id)
                    await asyncio.sleep(self._pace.retry_s)
        finally:
            server.settled.set()

    async def _one_life(
        self, server: _Followed, listener: FleetListener, session: aiohttp.ClientSession
    ) -> None:
        """Wait until the server is up, report it, watch it, and report it down."""
        member = await self._until_up(server, session)
        server.suspicion.clear()
        listener.member_up(member)
        server.was_up = True
        server.settled.set()
        try:
            reason = await until_unhealthy(
                server.client, server.suspicion, self._pace.health, refused_is_gone=True
            )
        except Exception:
            log.exception("checking %s failed", server.id)
            reason = "could not be checked"
        log.warning("%s is down: it %s", server.id, reason)
        listener.member_down(server.id, reason)

    async def _until_up(self, server: _Followed, session: aiohttp.ClientSession) -> Member:
        """Ask until the server is healthy and describes itself. Raises SetupError when it never can."""
        told = ""
        while True:
            answer = await check_health(server.client)
            server.trouble = answer.value
            if answer is Health.HEALTHY:
                try:
                    facts = await server.client.facts()
                    connector = self._kv.connector
                    if connector == AUTO:
                        connector = "nixl" if facts.metrics.shows_nixl else "none"
                    found = ""
                    if connector == "mooncake" and self._role(server) is not Role.DECODE:
                        url = self._bootstraps[server.id]
                        deadline_s = self._pace.health.deadline_s
                        found = await mooncake_engine_id(VllmClient(session, url, deadline_s=deadline_s))
                except EngineError as error:
                    server.trouble = error.message
                else:
                    self._model = self._model or facts.model
                    server.other_model = facts.model != self._model
                    if not server.other_model:
                        break
                    server.trouble = f"it serves {facts.model!r}, the fleet {self._model!r}"
                    server.settled.set()
            if server.trouble != told:
                told = server.trouble
                say = log.error if server.other_model else log.info
                say("waiting for %s (%s): %s", server.id, server.url, told)
            await asyncio.sleep(self._pace.retry_s)
        return self._member(server, facts, "" if connector == "none" else connector, found)

    def _role(self, server: _Followed) -> Role | None:
        return self._roles[self.ids.index(server.id)]

    def _member(self, server: _Followed, facts: ServerFacts, connector: str, kv_engine_id: str) -> Member:
        default_s = MOONCAKE_LEASE_S if connector == "mooncake" else LEASE_S
        return vllm_member(
            server.id,
            server.url,
            facts,
            KvTransfer(connector, self._kv.lease_s or default_s, self._kv.bidirectional),
            engine_id=f"{server.id}-{facts.metrics.started_s or secrets.token_hex(4)}",
            api_key=self._api_key,
            profile=self._profiles.get(server.id),
            bootstrap_url=self._bootstraps[server.id],
            kv_engine_id=kv_engine_id,
            fixed_role=self._role(server),
        )


def server_of(word: str) -> tuple[str, Role | None]:
    """Return the URL of a word as in ``StaticFleet``, and the only role of its server. Raises ConfigError."""
    name, equals, url = word.partition("=")
    roles = {Role.PREFILL.label: Role.PREFILL, Role.DECODE.label: Role.DECODE}
    if equals and name in roles:
        return checked_url(url), roles[name]
    return checked_url(word), None


def _bootstrap_beside(url: str) -> str:
    host = urlsplit(url).hostname or ""
    return f"http://{f'[{host}]' if ':' in host else host}:{BOOTSTRAP_PORT}"


def checked_url(url: str) -> str:
    """Return ``url`` as a base without trailing slash or ``/v1``.

    Raises ConfigError when it is no server's URL, or one for https, which the relay does not speak.
    """
    parts = urlsplit(url)
    try:
        parts.port  # noqa: B018 - reading it is what checks it
    except ValueError:
        raise ConfigError(f"{url!r}: the port is not a number between 0 and 65535") from None
    if parts.scheme == "https":
        raise ConfigError(
            f"{url!r}: engines are spoken to over plain http only; give the server's http:// address, "
            "or that of a proxy that speaks TLS to it"
        )
    if parts.scheme != "http" or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is not a server's URL; expected something like http://10.0.0.5:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
