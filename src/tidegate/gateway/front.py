"""The HTTP front: OpenAI routes in, requests out."""

from __future__ import annotations

import time
from functools import partial
from typing import Literal

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, StrictBool, StrictStr

from tidegate import __version__
from tidegate.core.decision import AddInstance, Drain, Undrain
from tidegate.core.errors import (
    BadRequest,
    EngineError,
    NoInstance,
    ShuttingDown,
    TidegateError,
    UnknownModel,
    UnknownRoute,
    status_of,
)
from tidegate.core.instance import Role
from tidegate.gateway.access import Access
from tidegate.gateway.answering import SERVED, Answering
from tidegate.gateway.call import read_calls
from tidegate.gateway.cors import Cors
from tidegate.gateway.dispatcher import RETRY_AFTER_S, Dispatcher
from tidegate.gateway.page import page
from tidegate.gateway.settings import GatewaySettings
from tidegate.policies.arrow.pools_v1 import Pools
from tidegate.protocol.bodies import Body, RequestBody, parse_body
from tidegate.protocol.http_front import (
    JSON,
    answering_errors,
    header_texts,
    json_answer,
    name_answer,
    read_object,
)
from tidegate.protocol.models import model_card, model_list
from tidegate.protocol.parameters import check_guarded

ASK_S = 30.0
"""How long an engine may take to tokenise a text that a client wants tokenised (ours)."""
CALL_HEADERS = ("x-tenant-id", "x-session-id", "x-slo-ttft-ms", "x-slo-tpot-ms")
OPERATOR = "operator"
"""The reason that the journal gives for what an operator asks."""


class AddBody(BaseModel):
    """Body of ``POST /tidegate/instances``; without a role it is the one that the fleet lacks most."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["prefill", "decode", "mixed"] | None = None


class AskBody(RequestBody):
    """What the gateway itself reads of a question to an engine."""

    model: StrictStr | None = None


class DrainBody(BaseModel):
    """Body of ``POST /tidegate/instances/{id}/drain``."""

    model_config = ConfigDict(extra="forbid")

    remove: StrictBool = False


class Front:
    """Handles every route of the gateway."""

    def __init__(self, settings: GatewaySettings, dispatcher: Dispatcher) -> None:
        self._settings = settings
        self._dispatcher = dispatcher
        self._started_s = dispatcher.clock.now()
        self._access = Access(settings)
        self._answering = Answering(dispatcher)
        self._created = int(time.time())
        self.draining = False

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        limit = self._settings.max_body_bytes
        middlewares = [answering_errors(self._count)]
        cors = Cors(self._settings.cors_origins) if self._settings.cors_origins else None
        if cors is not None:
            middlewares.append(cors.answer_preflights)
        middlewares.append(self._access.check)
        app = web.Application(client_max_size=limit, middlewares=middlewares)
        app.on_response_prepare.append(name_answer)
        if cors is not None:
            app.on_response_prepare.append(cors.name_origin)
        app.router.add_post("/v1/completions", partial(self.completions, chat=False))
        app.router.add_post("/v1/chat/completions", partial(self.completions, chat=True))
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/", page)
        app.router.add_get("/v1/models/{model:.+}", self.model)
        app.router.add_post("/tokenize", self.ask_engine)
        app.router.add_post("/detokenize", self.ask_engine)
        app.router.add_get("/version", self.version)
        app.router.add_get("/ping", self.health)
        app.router.add_post("/ping", self.health)
        app.router.add_get("/health", self.health)
        app.router.add_get("/ready", self.ready)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/tidegate/state", self.state)
        app.router.add_post("/tidegate/instances", self.add_instance)
        app.router.add_post("/tidegate/instances/{id}/drain", self.drain_instance)
        app.router.add_post("/tidegate/instances/{id}/undrain", self.undrain_instance)
        return app

    async def cut_off(self) -> None:
        """End the requests that still run, each with an error that tells why."""
        self.draining = True
        await self._answering.cut_off()

    def _count(self, request: web.Request, error: TidegateError) -> None:
        """Count a request that was refused before it was served, which counts its own outcome."""
        if request.method == "POST" and request.path.startswith("/v1/") and SERVED not in request:
            self._dispatcher.metrics.requests.labels(status_of(error).label).inc()

    async def completions(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        """POST /v1/completions and, with ``chat``, /v1/chat/completions."""
        arrival_s = self._dispatcher.clock.now()
        headers = header_texts(request, *CALL_HEADERS)
        headers["x-tenant-id"] = self._access.tenant(request, headers.get("x-tenant-id", ""))
        body = await read_object(request)
        settings = self._settings
        calls = read_calls(body, headers, chat=chat, slo=settings.slo, allowed=settings.allow_fields)
        model = self._model(calls[0].model)
        if self.draining:
            raise ShuttingDown("the gateway is shutting down", retry_after_s=RETRY_AFTER_S)
        return await self._answering.answer(request, calls, model, arrival_s)

    def _model(self, asked: str | None) -> str:
        """Return the name of the model that answers. Raises UnknownModel for one that is not served.

        With no instance up any name passes: the request finds that out, and records it.
        """
        models = self._dispatcher.models
        if not models or asked in models:
            return asked or ""
        if asked is None:
            return min(models)
        raise UnknownModel(
            f"model {asked!r} is not served here; served: {', '.join(sorted(models))}", param="model"
        )

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models."""
        return json_answer(model_list(self._models(), self._created))

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}; ids of models may have slashes."""
        return json_answer(model_card(self._models(), self._created, request.match_info["model"]))

    def _models(self) -> dict[str, int]:
        """Return the models that are served, with the longest context of each."""
        served: dict[str, int] = {}
        for upstream in self._dispatcher.upstreams.values():
            member = upstream.member
            served[member.model] = max(served.get(member.model, 0), member.instance.max_model_len)
        return served

    async def version(self, request: web.Request) -> web.Response:
        """GET /version."""
        return json_answer({"version": __version__})

    async def ask_engine(self, request: web.Request) -> web.Response:
        """POST /tokenize and /detokenize: passed on to an instance that serves the model."""
        body = await read_object(request)
        model = self._model(parse_body(body, AskBody).model)
        check_guarded(body, self._settings.allow_fields)
        failure: TidegateError = NoInstance("no instance is up", retry_after_s=RETRY_AFTER_S)
        for upstream in list(self._dispatcher.upstreams.values()):
            if upstream.member.model == model:
                try:
                    answer = await upstream.engine.ask(request.path, orjson.dumps(body), deadline_s=ASK_S)
                    return web.Response(body=answer, content_type=JSON)
                except EngineError as error:
                    failure = error
        raise failure

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: the gateway process answers."""
        return json_answer({"status": "draining" if self.draining else "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """GET /ready: at least one instance is up and requests are taken."""
        if self.draining or not self._dispatcher.upstreams:
            raise NoInstance("not ready", retry_after_s=RETRY_AFTER_S)
        return json_answer({"status": "ready", "instances": len(self._dispatcher.upstreams)})

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: Prometheus text."""
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self._dispatcher.metrics.render(), headers=headers)

    async def state(self, request: web.Request) -> web.Response:
        """GET /tidegate/state: the cluster as the control plane sees it."""
        dispatcher = self._dispatcher
        snapshot = dispatcher.plane.snapshot(dispatcher.clock.now())
        pools = Pools.of(snapshot)
        instances = []
        for i, name in enumerate(snapshot.ids):
            member = dispatcher.upstreams[name].member
            role = Role(int(snapshot.role[i]))
            flipped_at_s = float(snapshot.flipped_at_s[i])
            instances.append(
                {
                    "id": name,
                    "role": role.label,
                    "pool": pools.name_of(i),
                    "url": member.url,
                    "kind": member.kind,
                    "pid": member.pid,
                    "engine_id": member.engine_id,
                    "prefill_requests": int(snapshot.prefill_requests[i]),
                    "prefill_wait_s": round(float(snapshot.prefill_wait_s[i]), 6),
                    "decode_requests": int(snapshot.decode_requests[i]),
                    "decode_tokens": int(snapshot.decode_tokens[i]),
                    "handoff_tokens": int(snapshot.handoff_tokens[i]),
                    "kv_capacity_tokens": int(snapshot.kv_capacity_tokens[i]),
                    "mean_gap_s": round(float(snapshot.mean_gap_s[i]), 6),
                    "draining": name in dispatcher.plane.membership.draining,
                    "drift": dispatcher.drift.ratios(name),
                    "flipped_ago_s": None if flipped_at_s < 0 else round(snapshot.at_s - flipped_at_s, 3),
                    **({"step_tokens": step} if (step := member.instance.step_tokens) else {}),
                    **dispatcher.loads.state(name, snapshot.at_s),
                }
            )
        answer = {
            "system": dispatcher.system.name,
            "uptime_s": round(snapshot.at_s - self._started_s, 3),
            "slo": {"ttft_s": dispatcher.settings.slo.ttft_s, "tpot_s": dispatcher.settings.slo.tpot_s},
            "instances": instances,
            "down": [name for name in dispatcher.plane.membership.labels if name not in dispatcher.upstreams],
            "starting": dispatcher.starting(),
            "starts": {f"{role.label}_s": round(s, 3) for role, s in snapshot.start_s.items()},
            "requests": {"in_flight": len(dispatcher.plane.requests), "held": dispatcher.plane.held_count},
            "flips": dispatcher.flips,
            "migrations": dispatcher.plane.migrations.get("begun", 0),
            "controllers": {name: why for name, why in dispatcher.plane.said.items() if why},
            **dispatcher.recent.state(snapshot.at_s),
            **({"prompt_tokens": tokens} if (tokens := dispatcher.loads.prompt_tokens()) else {}),
        }
        return json_answer(answer)

    async def add_instance(self, request: web.Request) -> web.Response:
        """POST /tidegate/instances: have the fleet start one more instance."""
        dispatcher = self._dispatcher
        wanted = (await _read_optional(request, AddBody)).role
        membership = dispatcher.plane.membership
        role = membership.lacking(dispatcher.clock.now()) if wanted is None else Role[wanted.upper()]
        dispatcher.act([AddInstance(role, OPERATOR)])
        return json_answer({"status": "starting", "role": role.label})

    async def drain_instance(self, request: web.Request) -> web.Response:
        """POST /tidegate/instances/{id}/drain: give an instance nothing new and have its decodes move away,
        and with ``remove`` stop it once it is empty."""
        name, remove = request.match_info["id"], (await _read_optional(request, DrainBody)).remove
        if name not in self._dispatcher.upstreams:
            raise UnknownRoute(f"no instance {name!r} is up")
        self._dispatcher.act([Drain(name, remove, OPERATOR)])
        return json_answer({"status": "draining", "id": name, "remove": remove})

    async def undrain_instance(self, request: web.Request) -> web.Response:
        """POST /tidegate/instances/{id}/undrain: have a drained instance get work again."""
        name, draining = request.match_info["id"], self._dispatcher.plane.membership.draining
        if name not in draining:
            raise UnknownRoute(f"no instance {name!r} is drained")
        self._dispatcher.act([Undrain(name, OPERATOR)])
        if name in draining:
            raise BadRequest(f"instance {name!r} is empty and being stopped already")
        return json_answer({"status": "undrained", "id": name})


async def _read_optional(request: web.Request, kind: type[Body]) -> Body:
    return parse_body(await read_object(request) if request.can_read_body else {}, kind)
