"""A stand-in for vLLM with NixlConnector that does to a careless router what vLLM does, and remembers it.

KV is the list of tokens it was computed from. Who pulls the wrong KV goes on from the wrong tokens, or dies,
as vLLM does without a word; every such request is noted in ``breaches``.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

Json = dict[str, Any]
MODEL, BLOCK, CONTEXT = "tiny", 32, 4096
PIECES = [*(bytes([letter]) for letter in b"abcde .,"), b"ti", b"de", "漢字".encode(), "é".encode()]
PIECES += [b"\xe6", b"\xbc", b"\xa2", b"\xf0\x9f", b"\x8c\x8a", b"\xc3"]
"""Text of the tokens by id: letters, words, and parts of characters."""
VOCAB = 512
"""Prompts may have more ids than answers are made of."""
HANDLE = frozenset(
    {"do_remote_prefill", "do_remote_decode", "remote_engine_id", "remote_request_id", "remote_block_ids"}
    | {"remote_num_tokens", "remote_host", "remote_port", "tp_size", "prompt_token_ids"}
)
DEAD_PEER_S = 0.02
KNOWN: dict[str, list[str]] = orjson.loads(Path(__file__).with_name("vllm_parameters.json").read_bytes())
"""The parameters that vLLM 0.32 documents, by endpoint."""


def token_after(known: list[int]) -> int:
    """Return the token that follows: it depends on every token before it and its place."""
    state = 0
    for token in known:
        state = (state * 31 + token + 7) % 1_000_003
    return state % len(PIECES)


@dataclass
class Pin:
    """KV kept for others."""

    ids: list[int]
    until_s: float


@dataclass
class Network:
    """The engines that reach each other, by engine id."""

    engines: dict[str, StrictVllm] = field(default_factory=dict)


def prompt_logprobs(ids: list[int]) -> list[Json | None]:
    """Return what is said of a prompt's tokens."""
    return [None, *({str(token): {"logprob": -float(place)}} for place, token in enumerate(ids[1:], 1))]


class Refused(Exception):
    """A request that ends with an error status."""


def unknown_ids(body: Json, ids: list[int]) -> str:
    """Say which ids of a body are out of the vocabulary; "" for none. vLLM looks at them in its engine."""
    given = {
        "prompt": ids,
        "stop_token_ids": body.get("stop_token_ids") or [],
        "allowed_token_ids": body.get("allowed_token_ids") or [],
        "logit_bias": [int(key) for key in body.get("logit_bias") or {}],
    }
    wrong = [(name, token) for name in given for token in given[name] if token >= VOCAB]
    return f"{wrong[0][0]}: token id {wrong[0][1]} is out of vocabulary" if wrong else ""


class StrictVllm:
    """One server. ``lease_s`` is how long it pins; ``on_pin`` is called after it answered a leg that pins.
    ``ends_with`` has streams end behind that many tokens with an error of that code."""

    def __init__(self, network: Network, *, lease_s: float = 30.0, bidirectional: bool = True) -> None:
        self.network = network
        self.lease_s = lease_s
        self.bidirectional = bidirectional
        self.engine_id = ""
        self.port = 0
        self.pins: dict[str, Pin] = {}
        self.breaches: list[str] = []
        self.bodies: list[Json] = []
        self.pulled_tokens = 0
        self.on_pin: Callable[[], None] | None = None
        self.ends_with: tuple[int, int] | None = None
        self._runner: web.AppRunner | None = None
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, on the port of the life before, as another engine."""
        self.engine_id = uuid.uuid4().hex
        self.pins.clear()
        self.network.engines[self.engine_id] = self
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions/render", self._render)
        app.router.add_post("/v1/chat/completions/render", self._render)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """End without a word to anybody."""
        self.network.engines.pop(self.engine_id, None)
        runner, self._runner = self._runner, None
        if runner is not None and runner.server is not None:
            for connection in list(runner.server.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            await runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL, "max_model_len": CONTEXT}]})

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = [
            f'vllm:cache_config_info{{block_size="{BLOCK}",num_gpu_blocks="1000"}} 1.0',
            f'vllm:nixl_bytes_transferred_sum{{engine="0"}} {self.pulled_tokens}',
            f"process_start_time_seconds {int(self.engine_id[:8], 16)}",
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def _render(self, request: web.Request) -> web.Response:
        body = await request.json()
        rendered = {"token_ids": prompt_of(body)}
        return web.json_response(rendered if "messages" in body else [rendered])

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        ids, kv = prompt_of(body), body.get("kv_transfer_params") or {}
        most = body.get("max_tokens") or CONTEXT - len(ids)
        try:
            if unknown := body.keys() - KNOWN["chat" if "messages" in body else "completions"]:
                raise self._breach(f"fields that vLLM ignores: {unknown}")
            if (
                not kv.keys() <= HANDLE
                or "kv_transfer_params" in body.get("vllm_xargs", {})
                or "priority" in body
            ):
                raise self._breach("a field that only engines know")
            if len(ids) + most > CONTEXT:
                self._decline(kv)
                return web.json_response({"error": {"message": "too long", "code": 400}}, status=400)
            known = await self._pull(kv, ids) if "remote_request_id" in kv else list(ids)
        except Refused as error:
            return web.json_response({"error": {"message": str(error), "code": 500}}, status=500)
        pieces = generate(known, most, body)
        wrong = "" if body.get("stream") else unknown_ids(body, ids)
        if body.get("stream") and "prompt_logprobs" in body:
            wrong = "`prompt_logprobs` are not available when `stream=True`."
        if wrong:
            return web.json_response({"error": error_of(wrong, 400)}, status=400)
        if body.get("stream"):
            return await self._stream(request, body, ids, pieces)
        return await self._whole(request, body, ids, kv, list(pieces))

    def _breach(self, what: str) -> Refused:
        self.breaches.append(what)
        return Refused(what)

    def _decline(self, kv: Json) -> None:
        owner = self.network.engines.get(kv.get("remote_engine_id", ""))
        if owner is not None and kv["do_remote_prefill"]:
            owner.pins.pop(kv["remote_request_id"], None)

    async def _pull(self, kv: Json, ids: list[int]) -> list[int]:
        """Return the tokens whose KV the leg begins with: its prompt's only if the router was right."""
        count, blocks = kv["remote_num_tokens"], len(kv["remote_block_ids"][0])
        extends = kv["do_remote_decode"]
        if kv["remote_engine_id"] == self.engine_id:
            raise self._breach("an engine's own handle")
        if extends and (kv["do_remote_prefill"] or not self.bidirectional):
            raise self._breach("a prefill that reads KV: it hangs")
        owner = self.network.engines.get(kv["remote_engine_id"])
        if owner is None:
            await asyncio.sleep(DEAD_PEER_S)
            raise Refused("the peer is gone")
        pin = owner.pins.pop(kv["remote_request_id"], None)
        if pin is None or asyncio.get_running_loop().time() > pin.until_s:
            self.breaches.append("KV behind its lease")
            pin = Pin([0] * len(ids), 0.0)
        if blocks != -(-count // BLOCK) or count > len(pin.ids):
            self.breaches.append("blocks that do not hold the tokens")
        if not extends and len(ids) != count:
            self.breaches.append("a stream over other tokens than its handle")
            if -(-len(ids) // BLOCK) > blocks:
                asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(self.stop()))
                raise Refused("an assertion")
        elif extends and len(ids) <= count:
            self.breaches.append("a longer handle than the prompt")
        self.pulled_tokens += count
        return [*pin.ids[:count], *ids[count:]]

    async def _whole(
        self, request: web.Request, body: Json, ids: list[int], kv: Json, pieces: list[Piece]
    ) -> web.Response:
        said = [token for piece in pieces for token in piece.ids]
        text = "".join(piece.text for piece in pieces)
        choice: Json = {"index": 0, "token_ids": said, "logprobs": None, **pieces[-1].end()}
        answer: Json = {"choices": [choice], "kv_transfer_params": None}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": text}
            answer["prompt_token_ids"] = ids
        else:
            choice |= {"text": text, "prompt_token_ids": ids}
        if "prompt_logprobs" in body:
            told = choice if "prompt" in body else answer
            told["prompt_logprobs"] = prompt_logprobs(ids)
        if kv.get("do_remote_decode"):
            answer["kv_transfer_params"] = self._pin([*ids, *said[:-1]])
        if kv.get("do_remote_decode") and self.on_pin is not None:
            asyncio.get_running_loop().call_soon(self.on_pin)
        answer["usage"] = {"prompt_tokens": len(ids), "completion_tokens": len(said)}
        return web.json_response(answer)

    def _pin(self, ids: list[int]) -> Json:
        name = f"cmpl-{next(self._numbers)}"
        self.pins[name] = Pin(ids, asyncio.get_running_loop().time() + self.lease_s)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_id,
            "remote_request_id": name,
            "remote_block_ids": [list(range(-(-len(ids) // BLOCK)))],
            "remote_num_tokens": len(ids),
            "remote_host": "127.0.0.1",
            "remote_port": 1,
            "tp_size": 1,
        }

    async def _stream(
        self, request: web.Request, body: Json, ids: list[int], pieces: Iterator[Piece]
    ) -> web.StreamResponse:
        """Stream as vLLM does: without a handle, and sometimes with two tokens in a piece."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if wrong := unknown_ids(body, ids):
            await _send(response, {"error": error_of(wrong, 400)})
            await response.write(b"data: [DONE]\n\n")
            return response
        chat = "messages" in body
        first: Json = {"index": 0, "delta": {"role": "assistant", "content": ""}}
        first |= {"logprobs": None, "finish_reason": None}
        if chat:
            await _send(response, {"choices": [first], "prompt_token_ids": ids})
        told, count = chat, 0
        while piece := next(pieces, None):
            if self.ends_with is not None and count >= self.ends_with[0]:
                await _send(response, {"error": error_of("it went wrong", self.ends_with[1])})
                return response
            if len(ids) % 3 == 0 and piece.reason is None and count % 4 == 3:
                piece = piece.with_next(next(pieces))
            count += len(piece.ids)
            choice: Json = {"index": 0, "token_ids": piece.ids, "logprobs": None, **piece.end()}
            choice |= {"delta": {"content": piece.text}} if chat else {"text": piece.text}
            if not told:
                choice["prompt_token_ids"], told = ids, True
            if not await _send(response, {"choices": [choice]}):
                return response
            await asyncio.sleep(0.001)
        usage = {"prompt_tokens": len(ids), "completion_tokens": count}
        await _send(response, {"choices": [], "usage": usage})
        return response


def error_of(message: str, code: int) -> Json:
    """Return an error as vLLM writes it, in an answer with a status and in an event alike."""
    kind = {400: "BadRequestError", 503: "ServiceUnavailableError"}.get(code, "InternalServerError")
    return {"message": message, "type": kind, "param": None, "code": code}


async def _send(response: web.StreamResponse, event: Json) -> bool:
    """Send an event; False when the client has left, which ends its request."""
    try:
        await response.write(b"data: " + orjson.dumps(event) + b"\n\n")
    except ConnectionResetError:
        return False
    return True


def prompt_of(body: Json) -> list[int]:
    """Return the prompt's ids; a chat may come with those of all its tokens so far."""
    kv = body.get("kv_transfer_params") or {}
    if "prompt_token_ids" in kv:
        given: list[int] = kv["prompt_token_ids"]
        return given
    prompt = body.get("prompt")
    if prompt is None:
        prompt = "".join(message["content"] for message in body["messages"])
    return prompt if isinstance(prompt, list) else [byte % len(PIECES) for byte in prompt.encode()]


@dataclass
class Piece:
    """Some tokens of an answer."""

    text: str
    ids: list[int]
    reason: str | None = None
    stop: str | None = None

    def end(self) -> Json:
        return {"finish_reason": self.reason, "stop_reason": self.stop}

    def with_next(self, more: Piece) -> Piece:
        return Piece(self.text + more.text, self.ids + more.ids, more.reason, more.stop)


def generate(known: list[int], most: int, body: Json) -> Iterator[Piece]:
    """Yield one token after the other, with vLLM's detokenizer and its stop strings.

    The text ends with the stop string: nothing is held back, so that it could be left out.
    """
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    known, raw, text = list(known), b"", ""
    for count in range(1, most + 1):
        token = token_after(known)
        known.append(token)
        raw += PIECES[token]
        decoded = raw.decode(errors="replace")
        before, text = text, text if decoded.endswith("\ufffd") else decoded
        found = [(text.find(s, max(0, len(before) + 1 - len(s))) + len(s), s) for s in stops]
        found = [(end, s) for end, s in found if end >= len(s) and text[end - len(s) : end] == s]
        if found and count > (body.get("min_tokens") or 0):
            end, stop = min(found)
            yield Piece(text[len(before) : end], [token], "stop", stop)
            return
        yield Piece(text[len(before) :], [token], "length" if count == most else None)
