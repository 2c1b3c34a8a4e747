"""Typed access to JSONL recordings, with the place of every bad value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidegate.core.errors import ConfigError, TraceError
from tidegate.core.slo import Slo
from tidegate.workloads.jsonl_formats import parse_object
from tidegate.workloads.source import read_lines


class Fields:
    """One JSON object of a recording. Absent and null fields are alike; wrong types raise TraceError."""

    __slots__ = ("file", "line", "source", "value")

    def __init__(self, file: str, line: int, source: str, value: dict[str, Any]) -> None:
        self.file, self.line, self.source, self.value = file, line, source, value

    @property
    def kind(self) -> str:
        """Return the line's ``type``, empty when it has none."""
        kind = self.value.get("type")
        return kind if isinstance(kind, str) else ""

    def error(self, key: str, message: str) -> TraceError:
        """Return a TraceError at the key's value."""
        found = re.search(rf'"{re.escape(key)}"\s*:\s*', self.source)
        return TraceError(message, file=self.file, line=self.line, column=found.end() + 1 if found else 0)

    def number(self, key: str) -> float | None:
        """Return a finite number, or None where there is none."""
        value = self.value.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, f"{key} is {value!r}, expected a number")
        return float(value)

    def integer(self, key: str) -> int | None:
        value = self.value.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.error(key, f"{key} is {value!r}, expected an integer")
        return value

    def text(self, key: str) -> str:
        """Return a string, empty where there is none."""
        value = self.value.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(key, f"{key} is {value!r}, expected a string")
        return value

    def object(self, key: str) -> Fields:
        """Return a nested object, an empty one where there is none."""
        value = self.value.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, f"{key} is {value!r}, expected an object")
        return Fields(self.file, self.line, self.source, value)

    def objects(self, key: str) -> list[Fields]:
        """Return a nested list of objects, an empty one where there is none."""
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(key, f"{key} is {value!r}, expected a list of objects")
        return [Fields(self.file, self.line, self.source, item) for item in value]

    def slo(self, key: str = "slo") -> Slo | None:
        """Return an SLO given as ``{"ttft_s":..,"tpot_s":..}``, or None where there is none."""
        targets = self.object(key)
        ttft_s, tpot_s = targets.number("ttft_s"), targets.number("tpot_s")
        if ttft_s is None or tpot_s is None:
            return None
        try:
            return Slo(ttft_s, tpot_s)
        except ConfigError as error:
            raise self.error(key, str(error)) from None

    def require_number(self, key: str) -> float:
        value = self.number(key)
        if value is None:
            raise self.error(key, f"the {self.kind!r} line lacks {key}, a number")
        return value

    def require_integer(self, key: str) -> int:
        value = self.integer(key)
        if value is None:
            raise self.error(key, f"the {self.kind!r} line lacks {key}, an integer")
        return value


class TypedLines:
    """The objects of a recording, in file order; iterate once.

    Half a last line, as a killed writer leaves it, ends the iteration and sets ``truncated``; broken
    JSON anywhere else raises TraceError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.truncated = False

    def __iter__(self) -> Iterator[Fields]:
        broken: TraceError | None = None
        for number, text in read_lines(self.path):
            if broken is not None:
                raise broken
            if not text.strip():
                continue
            try:
                value = parse_object(self.path, number, text)
            except TraceError as error:
                broken = error
                continue
            yield Fields(self.path, number, text, value)
        if broken is not None:
            self.truncated = True
