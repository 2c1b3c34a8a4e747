"""Stop strings in text that comes in pieces."""

from __future__ import annotations


class StopStrings:
    """Keeps ``stops`` out of a text that comes in pieces, or ends it with one if they are to be ``included``.
    Text that may be the start of one is held back. ``found`` is the stop string that ended the text."""

    __slots__ = ("_held", "_hold", "_include", "_stops", "found")

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._hold = max(map(len, stops), default=1) - 1
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str, *, search: bool, ended_with: str | None = None) -> str:
        """Take a piece and return what may be delivered; nothing may follow once there is a stop string. With
        ``search`` a stop string counts that ends inside this piece: the first to end, and of several the
        first in ``stops`` (as vLLM does). Without it only one that the engine ``ended_with`` counts."""
        if not self._stops:
            return text
        old = len(self._held)
        text = self._held + text
        end = self._end(text, old, search, ended_with)
        if self.found is not None:
            self._held = ""
            return text[:end] if self._include else text[: end - len(self.found)]
        cut = max(0, len(text) - self._hold)
        while not any(stop.startswith(text[cut:]) for stop in self._stops):
            cut += 1
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return what is held back: the text ends without a stop string."""
        text, self._held = self._held, ""
        return text

    @property
    def pending(self) -> bool:
        """Whether the text so far ends with the start of a stop string."""
        return bool(self._held)

    def _end(self, text: str, old: int, search: bool, ended_with: str | None) -> int:
        """Note the stop string that ends the text, and return where it ends; the first ``old`` characters
        were looked at before."""
        if ended_with is not None and text.endswith(ended_with):
            self.found = ended_with
            return len(text)
        best = len(text) + 1
        if search or ended_with is not None:
            for stop in self._stops:
                end = text.find(stop, max(0, old + 1 - len(stop))) + len(stop)
                if len(stop) <= end < best:
                    best, self.found = end, stop
        return best
