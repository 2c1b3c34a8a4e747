"""How a load run talks to its endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo

Prompt = str | list[int] | list[dict[str, Any]]
"""Text, token ids, or chat messages."""


class PromptForm(StrEnum):
    """How prompts are sent: token ids, words, or token ids where the endpoint takes them."""

    AUTO = "auto"
    TOKENS = "tokens"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """``url`` is the endpoint's base, with or without ``/v1``. ``timeout_s`` bounds each request.

    ``ignore_eos`` asks the server for exactly the output length of the workload (a vLLM extension).
    Requests of a class in ``slo_classes`` have its targets, others have ``slo``; ``slo_headers`` sends them
    with each request (``x-slo-ttft-ms``, ``x-slo-tpot-ms``).
    With ``concurrency`` the load is a closed loop of so many users, each of whom sends a request when the
    one before it has ended; else it is an open loop, by the workload's times. With ``sessions`` a session's
    turn waits for the answer before it and then for its client's pause, and repeats that answer.
    Raises ConfigError for a URL that is not http(s), a timeout that is not positive, no user, and sessions
    with ``concurrency``.
    """

    url: str
    model: str = ""
    api_key: str = field(default="", repr=False)
    chat: bool = False
    prompt_form: PromptForm = PromptForm.AUTO
    ignore_eos: bool = True
    temperature: float = 0.0
    timeout_s: float = 600.0
    slo: Slo = field(default_factory=Slo)
    slo_classes: Mapping[str, Slo] = field(default_factory=dict)
    slo_headers: bool = False
    seed: int = 0
    concurrency: int | None = None
    sessions: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.url.startswith(("http://", "https://")):
            problems.append(f"the URL must start with http:// or https://, got {self.url!r}")
        if not self.timeout_s > 0:
            problems.append(f"the timeout must be positive, got {self.timeout_s} s")
        if self.concurrency is not None and self.concurrency < 1:
            problems.append(f"a closed loop has 1 user or more, got {self.concurrency}")
        if self.concurrency is not None and self.sessions:
            problems.append("--sessions and --concurrency both say what a request waits for; give one")
        if self.chat and self.prompt_form == PromptForm.TOKENS:
            problems.append("chat messages are text: --chat does not go with --prompt-form tokens")
        if problems:
            raise ConfigError(problems)

    @property
    def base(self) -> str:
        """Return the URL up to and without ``/v1``."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def completion_path(self) -> str:
        return f"/v1/{'chat/completions' if self.chat else 'completions'}"

    @property
    def completion_url(self) -> str:
        return self.base + self.completion_path

    def headers(self, slo_class: str = "") -> dict[str, str]:
        """Return the headers of a request of a class; compression is declined, for it would delay tokens."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        if self.slo_headers:
            slo = self.slo_classes.get(slo_class, self.slo)
            headers["x-slo-ttft-ms"] = f"{slo.ttft_s * 1000:g}"
            headers["x-slo-tpot-ms"] = f"{slo.tpot_s * 1000:g}"
        return headers

    def body(self, model: str, prompt: Prompt, max_tokens: int, *, stream: bool) -> dict[str, object]:
        """Return a request body; text becomes one user message in chat mode, and messages stay as they are.

        Sessions ask for the ids of the answer (a vLLM extension), which their next turn repeats.
        """
        body: dict[str, object] = {"model": model, "max_tokens": max_tokens, "temperature": self.temperature}
        if self.chat:
            body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        else:
            body["prompt"] = prompt
            if self.sessions and not isinstance(prompt, str):
                body["return_token_ids"] = True
        if self.ignore_eos:
            body["ignore_eos"] = True
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body
