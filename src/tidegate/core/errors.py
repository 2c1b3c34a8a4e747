"""Every error tidegate raises, as one tree below ``TidegateError``.

``STATUS`` is the only place that maps an error to an HTTP status, an OpenAI error type and a
metric label.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class TidegateError(Exception):
    """Root of the tree. ``param`` names the request field at fault, if one is."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class once more, with the finished message in the place of its arguments.
        return _again, (type(self), self.args), self.__dict__


def _again(kind: type[TidegateError], args: tuple[Any, ...]) -> TidegateError:
    return kind.__new__(kind, *args)


class ClientError(TidegateError):
    """The request is wrong; retrying it unchanged fails again."""


class BadRequest(ClientError):
    """A field of the request is malformed; ``param`` names it."""


class PromptTooLong(ClientError):
    """The prompt, or prompt plus max_tokens, does not fit the model's context."""


class UnknownModel(ClientError):
    """The named model is not served here."""


class UnknownRoute(ClientError):
    """The path does not exist."""


class WrongMethod(ClientError):
    """The path exists, but not with this method; ``allowed`` has the right ones."""

    def __init__(self, message: str, *, allowed: Iterable[str]) -> None:
        super().__init__(message)
        self.allowed = tuple(sorted(allowed))


class Unauthorized(ClientError):
    """The API key is missing or wrong."""


class Forbidden(ClientError):
    """The path or field is reserved to the processes of the same launch."""


class BodyTooLarge(ClientError):
    """The request body exceeds the upload limit."""


class UnsupportedEncoding(ClientError):
    """The body has a Content-Encoding that is not taken."""


class ClientGone(ClientError):
    """The client closed the connection before the answer was complete; nobody sees the status."""


class CapacityError(TidegateError):
    """The cluster cannot take the request now."""


class NoInstance(CapacityError):
    """No instance that could serve the request is up."""


class ShuttingDown(CapacityError):
    """The server is stopping: it takes no new request, and cuts off those that outlast the drain."""


class Overloaded(CapacityError):
    """The scheduling policy rejected the request, or the server has no room for it now."""


class FleetFull(CapacityError):
    """The fleet can start no further instance; the message says why."""


class NoDescriptors(CapacityError):
    """This process can open no further connection or file; no engine is at fault."""


class EngineError(TidegateError):
    """An engine failed; ``instance`` says which one and ``stage`` in which leg."""

    def __init__(
        self, message: str, *, instance: str = "", stage: str = "", param: str | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.instance = instance
        self.stage = stage


class EngineUnreachable(EngineError):
    """The connection to the engine failed or broke; ``refused`` says that none could be opened:
    the engine never had the request."""

    def __init__(self, message: str, *, instance: str = "", stage: str = "", refused: bool = False) -> None:
        super().__init__(message, instance=instance, stage=stage)
        self.refused = refused


class EngineTimeout(EngineError):
    """The engine did not answer within the leg's deadline."""


class EngineFault(EngineError):
    """The engine answered with an error of its own."""


class EngineBusy(EngineError):
    """The engine takes no more requests now; another may."""


class KvLost(EngineError):
    """The KV that a leg was to begin with could not be had, or not in time; the engine may be well."""


class NotRepeated(EngineError):
    """A leg that had to say again what was delivered said something else."""


class InternalError(TidegateError):
    """tidegate itself is at fault."""


class SetupError(TidegateError):
    """A command, configuration or input file is wrong; shown by the command line, never served."""


class ConfigError(SetupError):
    """One or more configuration problems; ``problems`` lists all of them."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class TraceError(SetupError):
    """A malformed trace. ``line`` and ``column`` count from 1; column 0 means the whole line."""

    def __init__(self, message: str, *, file: str, line: int = 0, column: int = 0) -> None:
        place = file + (f":{line}" if line else "") + (f":{column}" if column else "")
        super().__init__(f"{place}: {message}")
        self.file, self.line, self.column = file, line, column


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """How an error is shown: HTTP status, OpenAI ``error.type``, OpenAI ``error.code``, metric label."""

    http: int
    type: str
    code: str
    label: str


STATUS: dict[type[TidegateError], ErrorStatus] = {
    BadRequest: ErrorStatus(400, "invalid_request_error", "invalid_value", "bad_request"),
    PromptTooLong: ErrorStatus(400, "invalid_request_error", "context_length_exceeded", "prompt_too_long"),
    UnknownModel: ErrorStatus(404, "invalid_request_error", "model_not_found", "unknown_model"),
    UnknownRoute: ErrorStatus(404, "invalid_request_error", "unknown_url", "unknown_route"),
    WrongMethod: ErrorStatus(405, "invalid_request_error", "method_not_allowed", "wrong_method"),
    Unauthorized: ErrorStatus(401, "invalid_request_error", "invalid_api_key", "unauthorized"),
    Forbidden: ErrorStatus(403, "permission_error", "forbidden", "forbidden"),
    BodyTooLarge: ErrorStatus(413, "invalid_request_error", "body_too_large", "body_too_large"),
    UnsupportedEncoding: ErrorStatus(
        415, "invalid_request_error", "unsupported_encoding", "unsupported_encoding"
    ),
    ClientGone: ErrorStatus(499, "client_closed_request", "client_closed_request", "client_gone"),
    NoInstance: ErrorStatus(503, "service_unavailable", "no_instance", "no_instance"),
    ShuttingDown: ErrorStatus(503, "service_unavailable", "shutting_down", "shutting_down"),
    Overloaded: ErrorStatus(429, "rate_limit_error", "overloaded", "overloaded"),
    FleetFull: ErrorStatus(409, "invalid_request_error", "fleet_full", "fleet_full"),
    NoDescriptors: ErrorStatus(503, "service_unavailable", "no_descriptors", "no_descriptors"),
    EngineUnreachable: ErrorStatus(502, "engine_error", "engine_unreachable", "engine_unreachable"),
    EngineTimeout: ErrorStatus(504, "engine_error", "engine_timeout", "engine_timeout"),
    EngineFault: ErrorStatus(502, "engine_error", "engine_fault", "engine_fault"),
    EngineBusy: ErrorStatus(503, "service_unavailable", "engine_busy", "engine_busy"),
    KvLost: ErrorStatus(502, "engine_error", "kv_lost", "kv_lost"),
    NotRepeated: ErrorStatus(502, "engine_error", "not_repeated", "not_repeated"),
    InternalError: ErrorStatus(500, "internal_error", "internal_error", "internal"),
}


def status_of(error: TidegateError) -> ErrorStatus:
    """Return the row of ``STATUS`` for ``error``: its own class or the nearest ancestor, else internal."""
    for cls in type(error).__mro__:
        row = STATUS.get(cls)
        if row is not None:
            return row
    return STATUS[InternalError]
