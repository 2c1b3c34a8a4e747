"""Where settings come from, and which one wins: flag, then environment, then file, then default.

What came of it can be written as TOML, which reads back as the same settings.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tidegate.cli.config import FLAGS, SECRETS, SECTIONS, SETTINGS, SYSTEM_WITH_VLLM, Config, plain
from tidegate.core.errors import ConfigError

PREFIX = "TIDEGATE_"
OTHER_VARIABLES = frozenset(
    {"TIDEGATE_DEBUG", "TIDEGATE_LAUNCH_SECRET", "TIDEGATE_LAUNCH_SECRET_FILE", "TIDEGATE_CONFIG"}
)
RIVALS = (
    ("api_key", "api_key_file"),
    ("model", "vllm"),
    ("model", "emulate"),
    ("emulate", "vllm"),
    ("launch", "vllm"),
    ("launch", "emulate"),
)
"""Settings that exclude each other: one source may give one of them, and a higher source replaces both."""
ENGINE_SETTINGS = tuple(SECTIONS["engine"].model_fields)
ELSEWHERE = {
    "vllm": (*ENGINE_SETTINGS, "instances"),
    "emulate": (*ENGINE_SETTINGS, "instances"),
    "launch": ENGINE_SETTINGS,
}
"""Settings that replace the embedded engines, with those that then have no effect."""
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Given:
    """A value as one source gave it; ``origin`` is how that source spells the setting."""

    value: Any
    origin: str


@dataclass(slots=True)
class Resolved:
    """The settings in force and the origin of each (``DEFAULT`` where no source gave it)."""

    config: Config
    origins: dict[str, str]


def resolve(
    file: Path | None,
    environment: Mapping[str, str],
    flags: Mapping[str, Any],
    *,
    warn: Callable[[str], None],
) -> Resolved:
    """Merge the sources and validate the result. ``flags`` maps setting names; None means not given.

    Raises ConfigError with every problem of every source; what is only suspicious goes to ``warn``.
    """
    problems: list[str] = []
    levels = [
        _from_file(file, problems) if file else {},
        _from_environment(environment, warn),
        {name: Given(value, _flag(name)) for name, value in flags.items() if value is not None},
    ]
    merged = _merge(levels, problems)
    if "api_key_file" in merged:
        _read_key_file(merged, problems)
    for source in ELSEWHERE:
        if source in merged:
            _drop_ineffective(source, merged, levels, problems)
    for name, flag in FLAGS.items():
        if name in levels[-1] and flag.needs and not any(source in merged for source in flag.needs):
            needed = " or ".join(map(_flag, flag.needs))
            problems.append(f"{merged[name].origin}: has no effect without {needed}")
    if ("vllm" in merged or "launch" in merged) and "profile" not in merged:
        merged.setdefault("system", Given(SYSTEM_WITH_VLLM, DEFAULT))
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, given in merged.items():
        sections[SETTINGS[name]][name] = given.value
    try:
        config = Config.model_validate(sections, context=sections["gateway"].get("journal"))
    except ValidationError as error:
        problems += [_explain(fault, merged) for fault in error.errors()]
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    origins = {name: merged[name].origin if name in merged else DEFAULT for name in SETTINGS}
    return Resolved(config, origins)


def _from_file(path: Path, problems: list[str]) -> dict[str, Given]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not valid TOML: {error}")
        return {}
    found: dict[str, Given] = {}
    for section, table in tables.items():
        if section not in SECTIONS:
            problems.append(f"{path}: {_unknown_top(section, table)}")
        elif not isinstance(table, dict):
            problems.append(f"{path}: {section} is a section; write [{section}] on a line of its own")
        else:
            for name, value in table.items():
                if SETTINGS.get(name) == section:
                    found[name] = Given(value, f"{path}: {section}.{name}")
                else:
                    problems.append(f"{path}: {_unknown_setting(section, name)}")
    return found


def _unknown_top(name: str, value: object) -> str:
    if name in SETTINGS and not isinstance(value, dict):
        return f"{name}: belongs in the section [{SETTINGS[name]}]"
    near = get_close_matches(name, SECTIONS, 1)
    hint = f"did you mean [{near[0]}]? " if near else ""
    return f"[{name}]: unknown section; {hint}sections: {', '.join(SECTIONS)}"


def _unknown_setting(section: str, name: str) -> str:
    if name in SETTINGS:
        return f"{section}.{name}: belongs in the section [{SETTINGS[name]}]"
    here = list(SECTIONS[section].model_fields)
    near = get_close_matches(name, here, 1) or get_close_matches(name, SETTINGS, 1, 0.75)
    hint = f"did you mean {SETTINGS[near[0]]}.{near[0]}? " if near else ""
    return f"{section}.{name}: unknown setting; {hint}[{section}] knows {', '.join(here)}"


def _from_environment(environment: Mapping[str, str], warn: Callable[[str], None]) -> dict[str, Given]:
    """Read TIDEGATE_*; an empty value counts as not given.

    Unknown names only warn: a cluster's service links put variables of this prefix into the environment.
    """
    found: dict[str, Given] = {}
    for variable, value in sorted(environment.items()):
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES or not value:
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name in SETTINGS:
            found[name] = Given(value, variable)
            continue
        near = get_close_matches(name, SETTINGS, 1)
        hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
        warn(f"{variable} is set but names no setting{hint}")
    return found


def _merge(levels: list[dict[str, Given]], problems: list[str]) -> dict[str, Given]:
    merged: dict[str, Given] = {}
    for level in levels:
        for one, other in RIVALS:
            if one in level and other in level:
                problems.append(f"{level[one].origin} and {level[other].origin} exclude each other; give one")
            for given, replaced in ((one, other), (other, one)):
                if given in level and replaced not in level:
                    merged.pop(replaced, None)
        merged |= level
    return merged


def _drop_ineffective(
    source: str, merged: dict[str, Given], levels: list[dict[str, Given]], problems: list[str]
) -> None:
    """Refuse what has no effect beside ``source``, unless a weaker source gave it for other runs."""
    chosen = max(rank for rank, level in enumerate(levels) if source in level)
    for name in ELSEWHERE[source]:
        given = merged.pop(name, None)
        if given is not None and any(name in level for level in levels[chosen:]):
            problems.append(f"{given.origin}: has no effect together with {merged[source].origin}")


def _read_key_file(merged: dict[str, Given], problems: list[str]) -> None:
    given = merged["api_key_file"]
    try:
        lines = Path(str(given.value)).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{given.origin} {given.value}: cannot be read: {getattr(error, 'strerror', error)}")
        return
    origin = f"{given.origin} {given.value}"
    entries = [words for line in lines if (words := line.split()) and not words[0].startswith("#")]
    named = {words[1]: words[0] for words in entries if len(words) == 2}
    alone = [words[0] for words in entries if len(words) == 1]
    if len(named) + len(alone) < len(entries) or len(alone) > 1 or not entries:
        problems.append(f"{origin}: expected one KEY alone, lines NAME KEY with different keys, or both")
        return
    if alone:
        merged["api_key"] = Given(alone[0], origin)
    if named:
        merged["tenants"] = Given(named, origin)


def _explain(fault: ErrorDetails, merged: Mapping[str, Given]) -> str:
    """Turn one fault into a line that names its source, the value, and what is allowed."""
    text = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    names = [part for part in fault["loc"] if isinstance(part, str) and part in SETTINGS]
    if not names:
        return text
    given = merged.get(names[0])
    if given is None:
        return f"{names[0]}: {text}"
    if given.origin.startswith(PREFIX) and str(given.value).startswith("tcp://"):
        text += "; a cluster's service link sets this name: turn service links off for the pod"
    if names[0] in SECRETS:
        return f"{given.origin}: {text}"
    separator = " =" if ": " in given.origin else ""
    values = given.value if isinstance(given.value, list | tuple) else [given.value]
    shown = ",".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
    return f"{given.origin}{separator} {shown}: {text}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_toml(resolved: Resolved) -> str:
    """Return every setting with its origin as a comment.

    Secrets are masked and, like settings without a value or an effect, commented out: the text is valid
    configuration and holds no key.
    """
    lines: list[str] = []
    fleet = resolved.config.fleet
    replaced = [(source, names) for source, names in ELSEWHERE.items() if getattr(fleet, source)]
    for section, values in resolved.config:
        lines.append(f"[{section}]")
        for name, value in values:
            beside = next((source for source, names in replaced if name in names), None)
            origin = resolved.origins[name]
            source = origin if origin == DEFAULT else f"from {origin}"
            if beside:
                lines.append(f"# {name} has no effect beside {beside}")
            elif value is None:
                lines.append(f"# {name} is not set")
            elif name in SECRETS:
                lines.append(f'# {name} = "********"  # {source}')
            else:
                lines.append(f"{name} = {_toml(plain(value))}  # {source}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()
