"""Command-line options made from the settings that they set.

A command takes whole objects of settings. A ``Flag`` says how a setting is written; its type and its default
are those of the class. ``expanded`` turns the command into what typer takes, with an option for each flag.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cached_property, partial, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer

from tidegate.core.errors import ConfigError

NOTHING: tuple[Any, ...] = (None, "", [], ())
"""Values of options that are not given."""


class Rule(NamedTuple):
    """What a value has to be: a test, and the words for it."""

    holds: Callable[[Any], bool]
    words: str


def at_least(least: int) -> Rule:
    """Return the rule of a count."""
    return Rule(lambda value: value >= least, f"at least {least}")


SHARE = Rule(lambda value: 0 < value <= 1, "a share between 0 and 1")
MILLISECONDS = Rule(lambda value: 0 <= value < float("inf"), "a time of 0 ms or more")


@dataclass(frozen=True, slots=True)
class Flag:
    """How a setting is written on the command line.

    ``name`` is by default the setting's, with dashes. ``shown`` is the default that the help shows: True for
    the setting's own, False for none. ``given`` is the type on the command line, where it is not the
    setting's. ``rule`` is checked before ``read`` turns what was given into the setting's value; that may
    raise ValueError or ConfigError. The setting has no effect without one of ``needs``. ``more`` are further
    arguments of ``typer.Option``.
    """

    help: str
    metavar: str | None = None
    name: str = ""
    panel: str | None = None
    shown: bool | str = True
    given: Any = None
    rule: Rule | None = None
    read: Callable[[Any], object] | None = None
    needs: tuple[str, ...] = ()
    more: Mapping[str, Any] | None = None

    def spelling(self, setting: str) -> str:
        """Return the flag as messages name it."""
        return (self.name or f"--{setting.replace('_', '-')}").partition("/")[0]

    def key(self, setting: str) -> str:
        """Return the name of the command's parameter: that of the flag, which no other option has."""
        return self.spelling(setting).strip("-").replace("-", "_")

    def value(self, setting: str, given: Any) -> Any:
        """Return the setting's value. Raises ConfigError, which names the flag."""
        if self.rule and given is not None and not self.rule.holds(given):
            raise ConfigError(f"{self.spelling(setting)} is {self.rule.words}, got {given}")
        if self.read is None:
            return given
        try:
            return None if given in NOTHING else self.read(given)
        except ValueError as error:
            raise ConfigError(f"{self.spelling(setting)} {given}: {error}") from None

    def placed(self, panel: str | None, default: object = None) -> Flag:
        """Return the flag in a panel of the help, with a default that is shown, unless it has its own."""
        shown = self.shown if default is None or self.shown is not True else str(default)
        return replace(self, panel=self.panel or panel, shown=shown)

    def parameter(self, name: str, kind: Any, default: Any) -> inspect.Parameter:
        """Return the typer parameter for a setting of type ``kind``."""
        option = typer.Option(
            self.name or self.spelling(name),
            help=self.help,
            metavar=self.metavar,
            rich_help_panel=self.panel,
            show_default=self.shown,
            **(self.more or {}),
        )
        return inspect.Parameter(
            self.key(name),
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, option],
        )


class OptionGroup:
    """The options that make one object of a dataclass. ``flags`` are by field; by default they are those that
    the fields are annotated with. ``panel``, by default the class's, is for flags without one."""

    def __init__(self, kind: Any, flags: Mapping[str, Flag] | None = None, panel: str | None = None) -> None:
        self.kind = kind
        self._flags = flags
        self._panel = panel or getattr(kind, "panel", None)

    @cached_property
    def flags(self) -> dict[str, Flag]:
        """The flags by setting, in the order of the help."""
        flags = self._flags or {
            name: flag
            for name, hint in get_type_hints(self.kind, include_extras=True).items()
            for flag in getattr(hint, "__metadata__", ())
            if isinstance(flag, Flag)
        }
        return {name: flag.placed(self._panel) for name, flag in flags.items()}

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield a typer parameter for each flag."""
        hints = get_type_hints(self.kind)
        known = {field.name: field for field in fields(self.kind)}
        for name, flag in self.flags.items():
            default, kind = known[name].default, flag.given or given_type(hints[name])
            if default is MISSING and known[name].default_factory is MISSING:
                default = inspect.Parameter.empty
            elif default is None or default is MISSING or flag.read or flag.given:
                default, kind = None, kind | None
            yield flag.parameter(name, kind, default)

    def make(self, given: dict[str, Any], part: bool) -> Any:
        """Take the options out of ``given`` and return the object, or with ``part`` a call that makes it.

        Raises ConfigError with all problems.
        """
        values = collected(
            {name: partial(flag.value, name, given.pop(flag.key(name))) for name, flag in self.flags.items()}
        )
        values = {name: value for name, value in values.items() if value not in NOTHING}
        return partial(self.kind, **values) if part else self.kind(**values)


def collected(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Return the calls' results by name. Raises ConfigError with the problems of all of them."""
    results: dict[str, Any] = {}
    problems: list[str] = []
    for name, call in calls.items():
        try:
            results[name] = call()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return results


def epilog(examples: str) -> str:
    """Return what the help shows below the options."""
    return "\n[bold]Examples[/bold]\n\n" + examples.removeprefix("\n")


def given(context: typer.Context) -> set[str]:
    """Return the names of the options that were given, in one way or another."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name != "DEFAULT"}


def given_type(hint: Any) -> Any:
    """Return the type of what is written for a setting of type ``hint``: text where typer has no other."""
    if get_origin(hint) is Annotated:
        return given_type(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return given_type(next(each for each in get_args(hint) if each is not NoneType))
    if get_origin(hint) is list:
        return hint
    plain = isinstance(hint, type) and issubclass(hint, bool | int | float | Path | Enum)
    return hint if plain else str


def expanded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command for typer, which gives ``command`` objects of settings in place of options.

    A parameter is an object if it is annotated with an ``OptionGroup``, or if its type is a dataclass;
    ``partial[KIND]`` in place of ``KIND`` gives a call that makes it. One with a ``Flag`` is an option, and
    others are typer's. The command raises ConfigError with the problems of all options at once.
    """
    hints = get_type_hints(command, include_extras=True)
    makers: dict[str, Callable[[dict[str, Any]], Any]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        kind, *notes = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        options = next((note for note in notes if isinstance(note, OptionGroup)), None)
        if options is None and is_dataclass(kind):
            options = OptionGroup(kind)
        flag = next((note for note in notes if isinstance(note, Flag)), None)
        if options is not None:
            makers[name] = partial(options.make, part=get_origin(kind) is partial)
            parameters += options.parameters()
        elif flag is not None:
            makers[name] = partial(_take, name, flag)
            written = flag.given or given_type(kind)
            written = written | None if parameter.default is None else written
            parameters.append(flag.parameter(name, written, parameter.default))
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name]))

    @wraps(command)
    def run(**given: Any) -> Any:
        made = collected({name: partial(make, given) for name, make in makers.items()})
        return command(**made, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _take(name: str, flag: Flag, given: dict[str, Any]) -> Any:
    return flag.value(name, given.pop(flag.key(name)))
