"""A stand-in for SGLang servers split by role, over real HTTP, that holds callers to the documented contract.

Written from SGLang's documentation and public interfaces of ``/generate``, ``/pd_role_switch`` and their
neighbours. It computes nothing: a token follows from all tokens before it, as with greedy decoding.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

Json = dict[str, Any]

SAMPLING = frozenset(
    {"max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "sampling_seed", "stop"}
    | {"stop_token_ids", "ignore_eos", "frequency_penalty", "presence_penalty", "repetition_penalty", "regex"}
    | {
        "json_schema",
        "ebnf",
        "no_stop_trim",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "logit_bias",
    }
)
EOS = 7


def next_token(ids: list[int]) -> int:
    """Return the token behind ``ids``; never EOS unless they end in 99."""
    return EOS if ids[-1] == 99 else 100 + (31 * sum(ids) + 17 * len(ids)) % 800


def answer_to(prompt: list[int], count: int) -> list[int]:
    """Return the ``count`` tokens that follow ``prompt``."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


def spelled(ids: list[int]) -> str:
    """Return the text of ``ids``."""
    return "".join(f"<{token}>" for token in ids)


class Refused(Exception):
    """SGLang's answer to a request that it cannot serve."""


class Aborted(Exception):
    """The request was ended by ``/abort_request``."""


@dataclass
class Fabric:
    """What the servers share: where prefill servers listen for their peers."""

    listening: dict[tuple[str, int], StandIn] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    """What a caller did that real servers would answer with a hang or with nonsense."""


@dataclass
class Running:
    """A request on one server."""

    rid: str
    aborted: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self, what: asyncio.Future[Any]) -> Any:
        """Wait for ``what``. Raises Aborted when that comes first."""
        abort = asyncio.ensure_future(self.aborted.wait())
        try:
            await asyncio.wait((what, abort), return_when=asyncio.FIRST_COMPLETED)
            if self.aborted.is_set():
                raise Aborted
            return what.result()
        finally:
            abort.cancel()


class StandIn:
    """One server. Attributes may be changed between requests.

    ``step`` holds prefills and decoding while it is clear, ``answering`` a prefill's answer behind its KV.
    """

    def __init__(self, fabric: Fabric, role: str, *, bootstrap_port: int = 8998, **launch: Any) -> None:
        self.fabric = fabric
        self.role = role
        self.launch: Json = {
            "served_model_name": "m",
            "disaggregation_mode": role,
            "disaggregation_bootstrap_port": bootstrap_port,
            "enable_pd_role_switch": True,
            "page_size": 16,
            "max_total_num_tokens": 4096,
            "enable_return_hidden_states": False,
            "incremental_streaming_output": False,
        } | launch
        self.context = 256
        self.stream_interval = 1
        self.old_paths = False
        self.graphs: Json = {"decode_cuda_graph_bs": [1, 2], "decode_cuda_graph_memory_gb": 0.5}
        self.switch_fails = ""
        self.running: list[Running] = []
        self.bodies: list[Json] = []
        self.step = asyncio.Event()
        self.step.set()
        self.answering = asyncio.Event()
        self.answering.set()
        self.aborts: list[str] = []
        self.foreign = 0
        """Requests of others that keep it from being idle."""
        self.mail: dict[int, asyncio.Future[asyncio.Future[int]]] = {}
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def up(self) -> None:
        """Listen on a free port."""
        app = web.Application()
        routes = {
            "/generate": self._generate,
            "/abort_request": self._abort,
            "/pd_role_switch": self._switch,
            "/tokenize": self._tokenize,
        }
        app.add_routes([web.post(path, handler) for path, handler in routes.items()])
        for name, handler in (("server_info", self._info), ("model_info", self._model_info)):
            app.add_routes([web.get(f"/{'get_' * self.old_paths}{name}", handler)])
        app.add_routes([web.get("/v1/models", self._models)])
        load = ("/get_load", self._old_load) if self.old_paths else ("/v1/loads", self._load)
        app.add_routes([web.get(*load)])
        self._runner = web.AppRunner(app, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        if self.role == "prefill" or self.launch["enable_pd_role_switch"]:
            self.fabric.listening["127.0.0.1", self.launch["disaggregation_bootstrap_port"]] = self

    async def down(self) -> None:
        """Stop as a killed process does."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
            for running in self.running:
                running.aborted.set()

    # what it says of itself

    async def _info(self, _: web.Request) -> web.Response:
        state = {"disaggregation_mode": self.role} | (self.graphs if self.role == "decode" else {})
        return web.json_response(self.launch | {"internal_states": [state], "version": "0.5.21"})

    async def _model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"model_path": "/models/m", "is_generation": True})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "max_model_len": self.context}]})

    async def _load(self, _: web.Request) -> web.Response:
        count = len(self.running)
        rank = {"num_running_reqs": count, "num_waiting_reqs": 2, "num_total_reqs": count + 2}
        return web.json_response({"loads": [rank | {"num_used_tokens": 64, "token_usage": 0.1}]})

    async def _old_load(self, _: web.Request) -> web.Response:
        rank = {"dp_rank": 0, "num_reqs": len(self.running) + 2, "num_waiting_reqs": 2, "num_tokens": 64}
        return web.json_response([rank])

    async def _tokenize(self, request: web.Request) -> web.Response:
        text = (await request.json())["prompt"]
        return web.json_response({"tokens": list(text.encode()), "count": len(text)})

    # control

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        self.aborts.append(rid)
        for running in self.running:
            if running.rid.startswith(rid):
                running.aborted.set()
        return web.Response()

    async def _switch(self, request: web.Request) -> web.Response:
        body = await request.json()
        role, safe = body.get("new_role"), True
        message = ""
        if not self.launch["enable_pd_role_switch"]:
            message = "--enable-pd-role-switch is not set on this instance"
        elif role not in ("prefill", "decode"):
            message = f"invalid new_role={role!r}"
        elif self.running or self.foreign:
            self.foreign = max(0, self.foreign - 1)
            message = "instance is not idle; drain all requests before switching"
            if self.running:
                self.fabric.violations.append("asked to switch before its requests had ended")
        elif role == "decode" and "decode_cuda_graph_memory_gb" not in body:
            message = "decode_cuda_graph_memory_gb is required to capture decode CUDA graphs"
        elif self.switch_fails:
            message, safe = self.switch_fails, False
        answer = {"success": not message, "message": message or "ok", "old_role": self.role, "new_role": role}
        if message:
            return web.json_response(answer | {"safe_to_restore": safe}, status=400)
        self.role = role
        return web.json_response(answer)

    # requests

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        try:
            body = orjson.loads(await request.read())
            self._check_types(body)
        except (ValueError, TypeError) as error:
            invalid = {"object": "error", "message": str(error), "type": "Bad Request", "code": 400}
            return web.json_response(invalid, status=400)
        self.bodies.append(body)
        running = Running(body["rid"])
        self.running.append(running)
        try:
            return await (self._streamed if body.get("stream") else self._whole)(request, body, running)
        finally:
            self.running = [other for other in self.running if other is not running]

    def _check_types(self, body: Json) -> None:
        ids = body.get("input_ids")
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ValueError("input_ids: a list of integers is needed")
        for name, kind in (("bootstrap_host", str), ("bootstrap_port", int), ("bootstrap_room", int)):
            if name in body and not isinstance(body[name], kind):
                raise ValueError(f"{name}: a {kind.__name__} is needed")

    def _check_request(self, body: Json) -> None:
        sampling, ids = body["sampling_params"], body["input_ids"]
        unknown = sampling.keys() - SAMPLING
        if unknown:
            raise Refused(f"Unexpected keyword argument {unknown.pop()!r}")
        if "bootstrap_room" not in body:
            raise Refused("Invalid request: Disaggregated request received without bootstrap room id.")
        if sampling.get("top_k", 1) == 0:
            raise Refused("top_k must be -1 (disable) or at least 1, got 0.")
        if len(ids) + sampling["max_new_tokens"] >= self.context:
            raise Refused(
                f"Requested token count exceeds the model's maximum context length of {self.context}"
            )
        if body.get("return_hidden_states") and not self.launch["enable_return_hidden_states"]:
            raise Refused("The server is not configured to return the hidden states.")

    async def _whole(self, request: web.Request, body: Json, running: Running) -> web.Response:
        """Answer as a prefill server does: when the KV has left."""
        try:
            self._check_request(body)
            if self.role != "prefill":
                self.fabric.violations.append(
                    f"room {body['bootstrap_room']}: a prefill was sent to a decode server"
                )
            reserved = await running.wait(self._mail(body["bootstrap_room"]))
            await running.wait(asyncio.ensure_future(self.step.wait()))
            reserved.set_result(next_token(body["input_ids"]))
            await running.wait(asyncio.ensure_future(self.answering.wait()))
            reason: Json = {"type": "length", "length": 0}
        except Refused as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)
        except Aborted:
            reason = {"type": "abort", "message": "AbortReq from client"}
        meta: Json = {
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": 1,
            "finish_reason": reason,
        }
        if body.get("return_hidden_states"):
            meta["hidden_states"] = [[0.5] * len(body["input_ids"])]
        return web.json_response({"text": "", "output_ids": [], "meta_info": meta})

    def _mail(self, room: int) -> asyncio.Future[asyncio.Future[int]]:
        """Return what tells this prefill server that a decode server has reserved room for the KV."""
        return self.mail.setdefault(room, asyncio.get_running_loop().create_future())

    async def _streamed(self, request: web.Request, body: Json, running: Running) -> web.StreamResponse:
        """Answer as a decode server does: reserve, tell the prefill server, stream once the KV is here."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):
            async for event in self._events(body, running):
                await response.write(b"data: " + orjson.dumps(event) + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
        return response

    async def _events(self, body: Json, running: Running) -> AsyncIterator[Json]:
        out: list[int] = []
        try:
            self._check_request(body)
            room, address = body["bootstrap_room"], (body["bootstrap_host"], body["bootstrap_port"])
            peer = self.fabric.listening.get(address)
            if self.role != "decode" or peer is None or peer.role != "prefill" or peer is self:
                self.fabric.violations.append(f"room {room}: {self.role} server, prefill at {address} {peer}")
                return
            first: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            peer._mail(room).set_result(first)
            out.append(await running.wait(first))
            told = 0
            while (reason := self._finish(body, out)) is None:
                if len(out) - told == self.stream_interval:
                    yield self._event(body, out, told, None)
                    told = len(out)
                await running.wait(asyncio.ensure_future(self.step.wait()))
                await asyncio.sleep(0)
                out.append(next_token([*body["input_ids"], *out]))
            yield self._event(body, out, told, reason)
        except Refused as error:
            yield {"error": {"message": str(error)}}
        except Aborted:
            yield self._event(body, out, len(out), {"type": "abort", "message": "AbortReq from client"})

    def _finish(self, body: Json, out: list[int]) -> Json | None:
        sampling = body["sampling_params"]
        if len(out) >= sampling.get("min_new_tokens", 0):
            if out[-1] == EOS and not sampling.get("ignore_eos"):
                return {"type": "stop", "matched": EOS}
            if out[-1] in (sampling.get("stop_token_ids") or ()):
                return {"type": "stop", "matched": out[-1]}
            stops = sampling.get("stop") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                if stop in spelled(out):
                    return {"type": "stop", "matched": stop}
        return {"type": "length", "length": len(out)} if len(out) == sampling["max_new_tokens"] else None

    def _event(self, body: Json, out: list[int], told: int, reason: Json | None) -> Json:
        since = told if self.launch["incremental_streaming_output"] else 0
        meta: Json = {
            "id": body["rid"],
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(out),
            "finish_reason": reason,
        }
        if body.get("return_logprob"):
            rows = [[-float(token), token, f"<{token}>"] for token in out[since:]]
            meta["output_token_logprobs"] = rows
            meta["output_top_logprobs"] = [[row] * body["top_logprobs_num"] for row in rows]
        text, matched = spelled(out), (reason or {}).get("matched")
        if isinstance(matched, str) and not body["sampling_params"].get("no_stop_trim"):
            text = text[: text.index(matched)]
        return {"text": text[len(spelled(out[:since])) :], "output_ids": out[since:], "meta_info": meta}
