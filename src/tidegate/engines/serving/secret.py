"""The launch secret: what distinguishes the members of one launch from everybody else."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import MutableMapping
from pathlib import Path

from aiohttp import web

from tidegate.core.errors import ConfigError, Forbidden
from tidegate.protocol.http_front import header_bytes

SECRET_ENV = "TIDEGATE_LAUNCH_SECRET"
SECRET_FILE_ENV = "TIDEGATE_LAUNCH_SECRET_FILE"
SECRET_HEADER = "x-tidegate-secret"
API_KEY_ENV = "TIDEGATE_ENGINE_API_KEY"
"""Where an engine finds the key that it requires of ``/v1`` requests."""


class LaunchSecret:
    """A shared secret, or its absence. Without one, only loopback peers count as members. All comparisons
    take constant time. ``repr`` never shows the value."""

    def __init__(self, value: str = "") -> None:
        self._key = value.encode()

    def __bool__(self) -> bool:
        return bool(self._key)

    def __repr__(self) -> str:
        return f"LaunchSecret({'set' if self else 'empty'})"

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str], file: Path | None = None) -> LaunchSecret:
        """Take the secret from ``file``, the environment, or the file it names, in this order. The variables
        are removed from ``environ`` so that child processes do not inherit them. Raises ConfigError when a
        named file is unreadable or empty."""
        value = environ.pop(SECRET_ENV, "")
        named = environ.pop(SECRET_FILE_ENV, "")
        path = file or (Path(named) if named and not value else None)
        if path is None:
            return cls(value)
        try:
            value = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the launch secret file: {error}") from None
        if not value:
            raise ConfigError("the launch secret file is empty")
        return cls(value)

    def admits(self, header: str | None, remote: str | None) -> bool:
        """Whether a request with this secret header, from this address, comes from a member."""
        if self._key:
            return hmac.compare_digest(header_bytes(header), self._key)
        return remote is not None and is_loopback(remote)

    def require(self, request: web.Request, what: str, param: str | None = None) -> None:
        """Raise Forbidden unless the request comes from a member; ``what`` is reserved to them."""
        if not self.admits(request.headers.get(SECRET_HEADER), request.remote):
            message = f"{what}: reserved to members of the launch ({SECRET_HEADER} header)"
            raise Forbidden(message, param=param)

    def proof(self, role: str, *nonces: bytes) -> str:
        """Return the MAC by which the ``role`` side of a handshake proves that it knows the secret."""
        message = b"\0".join((b"tidegate-kv-1", role.encode(), *nonces))
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()

    def check_proof(self, given: object, role: str, *nonces: bytes) -> bool:
        """Whether ``given`` is what ``proof`` returns for the same arguments."""
        return isinstance(given, str) and hmac.compare_digest(
            given.encode(), self.proof(role, *nonces).encode()
        )


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback address, or the name ``localhost``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
