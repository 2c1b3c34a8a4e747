"""``tidegate state`` against something that answers like a gateway."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from tidegate.cli.main import main
from tidegate.cli.state import watch_state
from tidegate.cli.watching import watched
from tidegate.core.errors import TidegateError

STATE = {
    "system": "arrow-lending",
    "uptime_s": 12.5,
    "slo": {"ttft_s": 1.0, "tpot_s": 0.05},
    "instances": [
        {"id": "i1", "pool": "decode", "decode_tokens": 1234, "mean_gap_s": 0.012, "flipped_ago_s": None},
        {"id": "i0", "pool": "decode->prefill", "drift": {"prefill": 1.2, "step": 0.5}, "colour": "green"},
    ],
    "down": ["i2"],
    "requests": {"in_flight": 3},
    "flips": 1,
    "controllers": {"dopd": "holding 2 + 1 because [nothing] comes"},
    "surprise": [1, "[bold]"],
}


class Gateway(ThreadingHTTPServer):
    status = 200
    body: object = STATE
    key = ""


class Answer(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        wrong_key = self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}"
        self.send_response(401 if wrong_key else self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps(self.server.body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    server = Gateway(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def state(server: Gateway, *words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["state", "--url", f"http://127.0.0.1:{server.server_port}/v1/", *words])
    return int(caught.value.code or 0)


def test_the_table_shows_instances_in_order_and_keeps_to_80_columns(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert state(gateway) == 0
    shown = capsys.readouterr().out
    assert shown.index("i0") < shown.index("i1 ")
    assert "decode->prefill" in shown and "1,234" in shown and "12 ms" in shown
    assert "x0.50" in shown and "green" not in shown
    words = " ".join(shown.split())
    assert "in flight 3" in words and "down i2" in words and "[bold]" in words
    assert "dopd holding 2 + 1 because [nothing] comes" in words and "controllers" not in words
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_what_engines_tell_has_a_table_of_its_own(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    load = {"running": 12, "waiting": 1, "kv_share": 0.25, "nixl_expired": None}
    told = {"load": load, "foreign_requests": 3, "foreign_tokens": 45_678, "drifts": {"requests": 1, "kv": 1}}
    tokens = {"computed": 1_000_000, "pulled": 2_345_678}
    rows = [{"id": "i0", "pool": "mixed", **told, "prompt_tokens": tokens}, {"id": "i1", "load": None}]
    gateway.body = {"system": "arrow-lending", "instances": rows, "prompt_tokens": tokens}
    assert state(gateway) == 0
    shown = capsys.readouterr().out
    last = shown.splitlines()[-1].split()
    assert last == ["i0", "12", "1", "25%", "3", "45,678", "2", "1,000,000", "2,345,678"]
    assert "prompt tokens computed 1,000,000, pulled 2,345,678" in " ".join(shown.split())
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_json_is_what_the_gateway_sent(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert state(gateway, "--json") == 0
    assert json.loads(capsys.readouterr().out) == STATE


def test_no_instances_is_said(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.body = {"system": "arrow-lending", "instances": []}
    assert state(gateway) == 0
    assert "no instance is up" in capsys.readouterr().out


def test_the_key_is_sent_and_a_missing_one_explained(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.key = "sk-1"
    monkeypatch.delenv("TIDEGATE_API_KEY", raising=False)
    assert state(gateway) == 2
    assert "wants an API key" in capsys.readouterr().err
    monkeypatch.setenv("TIDEGATE_API_KEY", "sk-1")
    assert state(gateway) == 0


@pytest.mark.parametrize(("status", "body", "code"), [(404, {}, 2), (200, [], 2), (500, {}, 1)])
def test_what_is_no_gateway_is_called_so(gateway: Gateway, status: int, body: object, code: int) -> None:
    gateway.status, gateway.body = status, body
    assert state(gateway) == code


@pytest.mark.parametrize(("url", "code"), [("http://127.0.0.1:9", 1), ("nonsense", 2)])
def test_a_wrong_address_is_a_message(url: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["state", "--url", url])
    assert caught.value.code == code
    assert url in capsys.readouterr().err


def test_watching_fits_60_columns_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    why = "i1 from decode to prefill: no prefill instance meets 500 ms: the best waits 812 ms"
    row = {"kv_capacity_tokens": 407_714, "handoff_tokens": 0, "mean_gap_s": 0.0123, "prefill_wait_s": 1.25}
    work = {"prefill_requests": 1234, "decode_requests": 78, "decode_tokens": 239_165}
    answer = {
        **STATE,
        "instances": [
            {"id": "i10", "role": "decode", **row, **work},
            {"id": "i2", "role": "prefill", **row, **work},
        ],
        "recent": {
            "requests": 957,
            "failed": 2,
            "attained_share": 0.051,
            "ttft_p99_s": 4.38,
            "tpot_p99_s": 0.02,
        },
        "events": [{"ago_s": 12.0, "kind": "flip", "text": why}],
    }
    Console(width=60).print(watched(answer, 60))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    shown = " ".join(" ".join(lines).split())
    assert "dopd holding 2 + 1 because [nothing] comes" in shown
    assert why in shown and "59%" in shown and "4.4 s" in shown and "5.1%" in shown and "down: i2" in shown
    assert shown.index("i2 prefill") < shown.index("i10 decode"), "by role"
    Console(width=60).print(watched({"system": "static"}, 60, "no gateway answers"))
    assert "no gateway answers" in capsys.readouterr().out


def test_watching_goes_on_when_the_gateway_does_not_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[dict[str, object] | BaseException] = [
        STATE,
        TidegateError("gone"),
        STATE,
        KeyboardInterrupt(),
    ]

    def ask() -> dict[str, object]:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr("tidegate.cli.state.WATCH_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        watch_state(ask, Console(width=60, force_terminal=True))
    assert "gone" in capsys.readouterr().out and not answers
