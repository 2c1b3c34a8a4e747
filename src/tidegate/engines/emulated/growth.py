"""Routes by which the fleet of a process adds and removes emulated instances while it runs."""

from __future__ import annotations

import socket
from collections.abc import Callable

from aiohttp import web
from pydantic import StrictStr

from tidegate.core.errors import Forbidden
from tidegate.dataplane.replica import Replica
from tidegate.engines.emulated.instances import EmulatedInstances
from tidegate.engines.serving.secret import SECRET_HEADER, LaunchSecret
from tidegate.protocol.bodies import RequestBody, parse_body
from tidegate.protocol.http_front import FrontRunner, Handler, answering_errors, json_answer, read_object

MOST_BODY_BYTES = 4096


class RemoveBody(RequestBody):
    """Body of ``/tidegate/instances/remove``."""

    engine_id: StrictStr


class GrowthServer:
    """The port of the process itself, for members of the launch only, but for ``/health``.

    ``one_more`` makes the replica of an added instance, ``bind`` a socket for it.
    """

    def __init__(
        self,
        instances: EmulatedInstances,
        secret: LaunchSecret,
        one_more: Callable[[], Replica],
        bind: Callable[[], socket.socket],
    ) -> None:
        self._instances = instances
        self._secret = secret
        self._one_more = one_more
        self._bind = bind
        app = web.Application(
            middlewares=[answering_errors(MOST_BODY_BYTES), self._check_secret],
            client_max_size=MOST_BODY_BYTES,
        )
        app.router.add_get("/health", self.health)
        app.router.add_post("/tidegate/instances", self.add)
        app.router.add_post("/tidegate/instances/remove", self.remove)
        self._runner = FrontRunner(app, shutdown_timeout_s=0.5)

    async def start(self) -> int:
        """Serve; return the port."""
        listener = self._bind()
        await self._runner.setup()
        await web.SockSite(self._runner, listener).start()
        port: int = listener.getsockname()[1]
        return port

    async def stop(self) -> None:
        """Close the port."""
        await self._runner.cleanup()

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: the process answers."""
        return web.Response()

    async def add(self, request: web.Request) -> web.Response:
        """Serve one more instance; the answer is what the ready line says of each."""
        return json_answer(await self._instances.add(self._one_more(), self._bind()))

    async def remove(self, request: web.Request) -> web.Response:
        """Drop an instance with all that is on it."""
        body = parse_body(await read_object(request), RemoveBody)
        return json_answer({"removed": await self._instances.remove(body.engine_id)})

    @web.middleware
    async def _check_secret(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        admitted = self._secret.admits(request.headers.get(SECRET_HEADER), request.remote)
        if request.path != "/health" and not admitted:
            raise Forbidden(f"{request.path}: reserved to members of the launch ({SECRET_HEADER} header)")
        return await handler(request)
