"""The resolved configuration as TOML that ``--config`` reads back."""

from __future__ import annotations

import json
from typing import Any

from tidegate.cli.config import SECRETS, SECTIONS, plain
from tidegate.cli.sources import DEFAULT, ELSEWHERE, Resolved


def as_toml(resolved: Resolved) -> str:
    """Return every setting with its origin as a comment.

    Secrets are masked and, like settings without a value or an effect, commented out: the text is valid
    configuration and holds no key.
    """
    lines: list[str] = []
    for section, kind in SECTIONS.items():
        lines.append(f"[{section}]")
        values = getattr(resolved.config, section)
        for name in kind.model_fields:
            fleet = resolved.config.fleet
            beside = [
                source for source, ended in ELSEWHERE.items() if getattr(fleet, source) and name in ended
            ]
            if beside:
                lines.append(f"# {name} has no effect beside {beside[0]}")
            else:
                lines.append(_line(name, plain(getattr(values, name)), resolved.origins[name]))
        lines.append("")
    return "\n".join(lines)


def _line(name: str, value: Any, origin: str) -> str:
    source = origin if origin == DEFAULT else f"from {origin}"
    if value is None:
        return f"# {name} is not set"
    if name in SECRETS:
        return f'# {name} = "********"  # {source}'
    return f"{name} = {_toml(value)}  # {source}"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)
