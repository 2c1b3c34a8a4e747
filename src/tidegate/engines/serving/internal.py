"""Routes under ``/tidegate/``: what the members of a launch ask of each other."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from aiohttp import web
from pydantic import BaseModel, Field, StrictStr

from tidegate.engines.serving.generation import Generation, Parts
from tidegate.protocol.bodies import parse_body
from tidegate.protocol.http_front import json_answer, read_object

PREFIX = "/tidegate/"


class ReleaseBody(BaseModel):
    """Body of ``/tidegate/release``."""

    request_id: StrictStr


class AbortBody(BaseModel):
    """Body of ``/tidegate/abort``."""

    request_ids: Annotated[list[StrictStr], Field(max_length=100_000)]


class InternalRoutes:
    """Release and abort requests, read the engine's state."""

    def __init__(self, parts: Parts, generation: Generation, profile_samples: list[Any]) -> None:
        self._parts = parts
        self._generation = generation
        self._samples = profile_samples

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/tidegate/release", self.release),
            web.post("/tidegate/abort", self.abort),
            web.get("/tidegate/profile", self.profile),
            web.get("/tidegate/stats", self.stats),
        ]

    async def release(self, request: web.Request) -> web.Response:
        """Drop the pin of a finished request before its lease ends."""
        body = parse_body(await read_object(request), ReleaseBody)
        return json_answer({"released": self._parts.engine.release(body.request_id)})

    async def abort(self, request: web.Request) -> web.Response:
        """End requests; they answer with what they have and ``finish_reason`` abort."""
        body = parse_body(await read_object(request), AbortBody)
        return json_answer({"aborted": self._generation.abort(body.request_ids)})

    async def profile(self, request: web.Request) -> web.Response:
        """The samples of the self-profile at start-up."""
        facts = self._parts.facts
        return json_answer({"engine_id": facts.engine_id, "model": facts.model, "samples": self._samples})

    async def stats(self, request: web.Request) -> web.Response:
        """EngineStats; ``idle`` says that nothing is held, ``consistent`` that all blocks are free then."""
        now = self._parts.engine.stats()
        idle = not (now.running or now.waiting or now.loading or now.pinned)
        return json_answer(
            {
                **asdict(now),
                "active_requests": self._generation.active,
                "idle": idle,
                "consistent": not idle or now.free_blocks == now.total_blocks,
            }
        )
