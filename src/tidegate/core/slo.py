"""Latency targets of a request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tidegate.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Slo:
    """A request attains its SLO when TTFT <= ``ttft_s`` and TPOT <= ``tpot_s``.

    Defaults are xllm-service's ``target_ttft`` 1000 ms and ``target_tpot`` 50 ms.
    """

    ttft_s: float = 1.0
    tpot_s: float = 0.05

    def __post_init__(self) -> None:
        if not (0 < self.ttft_s < float("inf") and 0 < self.tpot_s < float("inf")):
            raise ConfigError(
                f"an SLO needs positive finite targets, got ttft {self.ttft_s} s, tpot {self.tpot_s} s"
            )

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read ``ttft:500,tpot:50`` (milliseconds; comma or space between; order free).

        Raises ConfigError when a target is missing, repeated, unknown or not a positive number.
        """
        targets: dict[str, float] = {}
        for part in text.replace(",", " ").split():
            name, sep, value = part.partition(":")
            if not sep or name not in ("ttft", "tpot") or name in targets:
                raise ConfigError(f"SLO {text!r}: expected 'ttft:MS,tpot:MS', found {part!r}")
            try:
                targets[name] = float(value) / 1000.0
            except ValueError:
                raise ConfigError(f"SLO {text!r}: {value!r} is not a number of milliseconds") from None
        if len(targets) != 2:
            raise ConfigError(f"SLO {text!r}: give both targets, as in 'ttft:500,tpot:50'")
        return cls(ttft_s=targets["ttft"], tpot_s=targets["tpot"])

    def __str__(self) -> str:
        return f"ttft:{self.ttft_s * 1000:g},tpot:{self.tpot_s * 1000:g}"

    def attained(self, ttft_s: float, tpot_s: float | None) -> bool:
        """Tell whether observed latencies meet both targets; a one-token answer has no TPOT (``None``)."""
        return ttft_s <= self.ttft_s and (tpot_s is None or tpot_s <= self.tpot_s)


def parse_slo_classes(texts: Iterable[str]) -> dict[str, Slo]:
    """Read ``chat=ttft:300,tpot:40``, a text per class.

    Raises ConfigError for a text without a class, targets that ``Slo.parse`` refuses, or a class given twice.
    """
    found: dict[str, Slo] = {}
    for text in texts:
        name, _, targets = text.partition("=")
        if not name or not targets:
            raise ConfigError(f"SLO class {text!r}: expected CLASS=ttft:MS,tpot:MS")
        if name in found:
            raise ConfigError(f"SLO class {name!r} is given more than once")
        found[name] = Slo.parse(targets)
    return found
