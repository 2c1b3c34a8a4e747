"""Who may ask the gateway for what: keys and their tenants, proxies, browsers."""

from __future__ import annotations

from contextvars import ContextVar
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

from aiohttp import web

from tidegate.core.errors import Forbidden
from tidegate.gateway.settings import GatewaySettings
from tidegate.protocol.http_front import KEYED, Handler, owner_of_key

OPEN = frozenset({"/health", "/ready"})
"""Paths that anybody may ask, whatever Host they name: probes do."""
OPERATOR = ""
"""The owner of the operator's key, who is no tenant."""
OPERATORS = ("/tidegate/", "/metrics")
"""Paths that a tenant's key does not open."""
LOOPBACK_NAMES = frozenset({"localhost"})
MOST_NEAR = 64
_owner: ContextVar[str] = ContextVar("owner", default=OPERATOR)
"""Whose key the request has; aiohttp handles each request in a task of its own."""


class Access:
    """The rules of one gateway."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._owners = {key.encode(): name for key, name in settings.tenants.items()}
        if settings.api_key:
            self._owners[settings.api_key.encode()] = OPERATOR
        self._proxies = [ip_network(each, strict=False) for each in settings.trusted_proxies]
        self._hosts = frozenset(name.lower() for name in settings.allowed_hosts)
        self._origins = frozenset(settings.cors_origins)
        self._browsers = not self._owners and _is_loopback(settings.host)
        """Whether only the address protects the gateway: any page that a browser shows could use it."""
        self._near: set[str] = set()  # urls found near, which parse slowly

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Pass the request on, or raise Unauthorized or Forbidden."""
        if self._browsers and request.path not in OPEN:
            self._check_browser(request)
        if self._owners and request.path.startswith((*KEYED, *OPERATORS)):
            owner = owner_of_key(request, self._owners)
            _owner.set(owner)
            if owner != OPERATOR and request.path.startswith(OPERATORS):
                raise Forbidden(f"{request.path}: the key of a tenant does not open it")
        return await handler(request)

    def tenant(self, request: web.Request, header: str) -> str:
        """Return whose request it is: the name of its key, or what a trusted proxy says in ``x-tenant-id``.
        Raises Forbidden for a tenant that the client may not name."""
        named = _owner.get()
        if not header or header == named:
            return named
        if named or not self._is_proxy(request.remote):
            raise Forbidden(
                "header x-tenant-id: only taken from trusted proxies (--trusted-proxies)", param="x-tenant-id"
            )
        return header

    def _is_proxy(self, remote: str | None) -> bool:
        try:
            address = ip_address((remote or "").partition("%")[0])
        except ValueError:
            return False
        return any(address in network for network in self._proxies)

    def _check_browser(self, request: web.Request) -> None:
        """Raise Forbidden for what a page from elsewhere has a browser send, under its own name or ours."""
        for header, url in (("Host", f"//{request.host}"), ("Origin", request.headers.get("Origin"))):
            if url is None or url in self._near:
                continue
            allowed = header == "Origin" and not self._origins.isdisjoint({url, "*"})
            if not allowed and not self._is_near(url):
                raise Forbidden(
                    f"header {header}: a gateway without a key serves this machine only (--allowed-hosts)",
                    param=header,
                )

    def _is_near(self, url: str) -> bool:
        try:
            name = (urlsplit(url).hostname or "").lower()
        except ValueError:
            return False
        near = _is_loopback(name) or name in self._hosts
        if near and len(self._near) < MOST_NEAR:
            self._near.add(url)
        return near


def _is_loopback(host: str) -> bool:
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
