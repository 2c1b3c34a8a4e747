"""A fleet of servers that something else starts and stops: a list of URLs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp

from tidegate.core.errors import ConfigError, EngineError, FleetFull, NoDescriptors, SetupError
from tidegate.core.instance import Role
from tidegate.costs.profile import Profile
from tidegate.engines.vllm.client import VllmClient
from tidegate.fleet.health import HealthPace, end_watch, health_trouble, until_unhealthy
from tidegate.fleet.member import FleetListener, Member
from tidegate.fleet.vllm import KvSetup, describe_member, profiles_by_id

log = logging.getLogger(__name__)

ANSWER_S = 10.0
BOOTSTRAP_PORT = 8998
"""That of MooncakeConnector's bootstrap server unless VLLM_MOONCAKE_BOOTSTRAP_PORT says otherwise."""


@dataclass(frozen=True, slots=True)
class StaticPace:
    """``start_s`` bounds the wait for servers that are not up yet; a down one is asked every ``retry_s``."""

    health: HealthPace = field(default_factory=HealthPace)
    start_s: float = 60.0
    retry_s: float = 1.0


class _ListedServer:
    """One server of the list, and how it is."""

    def __init__(self, client: VllmClient, role: Role | None, bootstrap: VllmClient) -> None:
        self.id = client.instance
        self.client = client
        self.role = role
        self.bootstrap = bootstrap
        self.suspicion = asyncio.Event()
        self.settled = asyncio.Event()
        """Set once the server was up, or can never be."""
        self.was_up = False
        self.other_model = False
        """Whether it served another model than the fleet when last asked."""
        self.trouble = "no answer yet"

    def __str__(self) -> str:
        return f"{self.id} {self.client.url}: {self.trouble}"


class StaticFleet:
    """Watches vLLM servers at ``urls``, named i0, i1, ... in that order; ``prefill=URL`` and ``decode=URL``
    are servers that do only that.

    A refused connection means down at once, otherwise three missed checks do. A server that comes back has a
    new ``engine_id``; a restart between two checks goes unseen unless the gateway ``suspect``s the server.
    ``profiles`` holds none, one for all members, or one for each. ``kv`` says how their KV moves.

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
        self._given = [server_of(word) for word in urls]
        bases = [url for url, _ in self._given]
        if not bases:
            raise ConfigError("a static fleet needs at least one URL")
        twice = sorted({url for url in bases if bases.count(url) > 1})
        if twice:
            raise ConfigError(f"given more than once: {', '.join(twice)}")
        self._kv = kv or KvSetup()
        self._bootstraps = self._kv.bootstraps or [_bootstrap_beside(url) for url in bases]
        if len(self._bootstraps) != len(bases):
            raise ConfigError(
                f"{len(self._bootstraps)} bootstrap URLs for {len(bases)} servers: give one for each"
            )
        self._profiles = profiles_by_id(self.ids, profiles)
        self._api_key = api_key
        self._model = ""
        self._pace = pace or StaticPace()
        self._servers: dict[str, _ListedServer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"i{n}" for n in range(len(self._given)))

    async def start(self, listener: FleetListener) -> None:
        self._session = session = aiohttp.ClientSession()
        deadline_s = self._pace.health.deadline_s
        for name, (url, role), bootstrap in zip(self.ids, self._given, self._bootstraps, strict=True):
            self._servers[name] = _ListedServer(
                VllmClient(session, url, instance=name, api_key=self._api_key, deadline_s=deadline_s),
                role,
                VllmClient(session, bootstrap, deadline_s=deadline_s),
            )
        self._tasks = {
            asyncio.create_task(self._follow(server, listener), name=f"fleet {server.id}")
            for server in self._servers.values()
        }
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pace.start_s):
                    for server in self._servers.values():
                        await server.settled.wait()
            self._report_start()
        except BaseException:
            await self.stop()
            raise

    async def hands_on_kv(self) -> bool:
        """Tell whether servers may pull KV of each other: False when all that answer within ANSWER_S show no
        connector, or ``kv`` says so. Roles that are given are taken for knowledge of one."""
        if self._kv.connector != "auto" or any(role is not None for _, role in self._given):
            return self._kv.connector != "none"
        async with aiohttp.ClientSession() as session:
            clients = [VllmClient(session, url, api_key=self._api_key) for url, _ in self._given]
            shown = await asyncio.gather(*map(self._shows_nixl, clients))
        return True in shown or False not in shown

    async def _shows_nixl(self, client: VllmClient) -> bool | None:
        with suppress(TimeoutError, SetupError):
            async with asyncio.timeout(ANSWER_S):
                while True:
                    with suppress(EngineError):
                        return (await client.facts()).metrics.shows_nixl
                    await asyncio.sleep(self._pace.retry_s)
        return None

    def add(self) -> str:
        """See ``FleetControl.add``: a list of URLs cannot grow."""
        raise FleetFull(
            "the servers are a list of URLs, which something else starts: this fleet cannot grow from here"
        )

    def remove(self, instance_id: str, reason: str) -> bool:
        """See ``FleetControl.remove``: servers that something else started are not stopped from here."""
        return False

    def starting(self) -> dict[str, str]:
        """See ``Fleet.starting``."""
        return {
            server.id: f"waiting: {server.trouble}" for server in self._servers.values() if not server.was_up
        }

    def suspect(self, instance_id: str) -> None:
        server = self._servers.get(instance_id)
        if server is not None:
            server.suspicion.set()

    async def stop(self) -> None:
        await end_watch(self._tasks, self._session)

    def _report_start(self) -> None:
        absent = [server for server in self._servers.values() if not server.was_up]
        for server in absent:
            log.warning("%s (%s) is not up: %s", server.id, server.client.url, server.trouble)
        refused = [server for server in absent if server.other_model]
        if refused or len(absent) == len(self._servers):
            reason = "the servers do not serve one model" if refused else "no server answers"
            raise SetupError("\n".join([reason, *(f"  {server}" for server in refused or absent)]))

    async def _follow(self, server: _ListedServer, listener: FleetListener) -> None:
        try:
            while True:
                try:
                    await self._one_life(server, listener)
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

    async def _one_life(self, server: _ListedServer, listener: FleetListener) -> None:
        """Wait until the server is up, report it, watch it, and report it down. Raises SetupError when it can
        never be a member."""
        logged = ""
        while (member := await self._member(server)) is None:
            if server.trouble != logged:
                logged = server.trouble
                say = log.error if server.other_model else log.info
                say("waiting for %s (%s): %s", server.id, server.client.url, logged)
            await asyncio.sleep(self._pace.retry_s)
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

    async def _member(self, server: _ListedServer) -> Member | None:
        """Ask the server once; None while it cannot be a member, which its ``trouble`` explains."""
        trouble = await health_trouble(server.client)
        if trouble:
            server.trouble = trouble
            return None
        try:
            member = await describe_member(
                server.client,
                self._kv,
                bootstrap=server.bootstrap,
                api_key=self._api_key,
                profile=self._profiles.get(server.id),
                fixed_role=server.role,
            )
        except (EngineError, NoDescriptors) as error:
            server.trouble = error.message
            return None
        self._model = self._model or member.model
        server.other_model = member.model != self._model
        if server.other_model:
            server.trouble = f"it serves {member.model!r}, the fleet {self._model!r}"
            server.settled.set()
            return None
        return member


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
    """Return ``url`` as a base without trailing slash or ``/v1``. Raises ConfigError when it is no server's
    URL, or one for https, which the relay does not speak."""
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
