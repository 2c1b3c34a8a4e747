"""A stand-in for vLLM's command: answers what a fleet asks a server, and starts a process of its own like it.

FAKE_VLLM selects what it does: ``serve`` (the default), ``crash`` (a traceback, status 1), ``slow`` (never
healthy), ``stubborn`` (ignores SIGTERM). ``GET /seen`` returns its arguments, its environment and the process
id of its child, which is in a session of its own and ignores SIGTERM, as an engine core under load may.
"""

# ruff: noqa: T201 - what it prints is its interface

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
METRICS = 'vllm:cache_config_info{block_size="32",num_gpu_blocks="100"} 1.0\n'


class Server(BaseHTTPRequestHandler):
    child = 0
    healthy = True

    def do_GET(self) -> None:
        model = sys.argv[sys.argv.index("--served-model-name") + 1]
        guarded = self.path.startswith("/v1")
        if guarded and self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self._answer(401, "")
        elif self.path == "/health":
            self._answer(200 if self.healthy else 503, "")
        elif self.path == "/v1/models":
            self._answer(200, json.dumps({"data": [{"id": model, "max_model_len": 2048}]}))
        elif self.path == "/metrics":
            self._answer(200, METRICS)
        else:
            seen = {"argv": sys.argv[1:], "environment": dict(os.environ), "child": self.child}
            self._answer(200, json.dumps(seen))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    mode = os.environ.get("FAKE_VLLM", "serve")
    print("INFO loading the weights", flush=True)
    if mode == "crash":
        print("INFO about to fail\n" + "  a frame\n" * 40, flush=True)
        print("ValueError: no room for the KV cache", flush=True)
        print("  another frame\n" * 20 + "RuntimeError: engine core failed", flush=True)
        sys.exit(1)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Server.healthy = mode != "slow"
    Server.child = subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True).pid
    port = int(sys.argv[sys.argv.index("--port") + 1])
    HTTPServer(("127.0.0.1", port), Server).serve_forever()
    time.sleep(600)


if __name__ == "__main__":
    main()
