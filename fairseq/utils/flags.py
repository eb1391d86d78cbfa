"""Dataclass fields as command-line flags: one declaration gives the flag, its type, its default and its help."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

C = TypeVar("C")
LONGEST_LITERAL = 1000  # characters of a tuple on the command line
LARGEST_INT = 2**53  # of a flag without a limit of its own: sums and products of sizes stay within 64 bits


def flag(
    default: Any,
    help: str,
    *aliases: str,
    choices: Sequence[str] | Callable[[], Sequence[str]] | None = None,
    metavar: str | None = None,
    positional: bool = False,
    const: Any = None,
    repeat: bool = False,
    switch: bool = False,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag: field ``max_tokens`` becomes ``--max-tokens``.

    aliases: other spellings, such as ``-s`` or an older ``--max-sentences``; they also name the field in old
    checkpoints. choices: allowed values, or a function that lists them when the parser is built. const: the value of
    the flag when it stands alone. repeat: the flag may be given several times, an item of a list each. switch:
    ``--no-NAME`` turns it off again. least, most, below: bounds of a number, or of each number in a list.
    """
    metadata = {
        "help": help,
        "aliases": aliases,
        "choices": choices,
        "metavar": metavar,
        "positional": positional,
        "const": const,
        "repeat": repeat,
        "switch": switch,
        "bounds": (least, most, below),
    }
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def others(names: Callable[[], Iterable[str]]) -> Any:
    """A dataclass field for the flags that are another dataclass's: ``from_namespace`` fills it with those it is given.

    names: lists them. The field is a dict, of what was given alone.
    """
    return dataclasses.field(default_factory=dict, metadata={"others": names})


def same_flag(config: type, name: str) -> Any:
    """The flag that field ``name`` of dataclass ``config`` declares, as a field of another dataclass."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    return dataclasses.field(default=field.default, metadata=field.metadata)


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")


def _literal(text: str) -> Any:
    if len(text) > LONGEST_LITERAL:  # deep nesting can exhaust the parser's memory and stack
        raise ValueError
    return ast.literal_eval(text)


def _parse_tuple(text: str) -> tuple[Any, ...]:
    try:
        value = _literal(text)
        if not isinstance(value, (tuple, list)):
            raise ValueError
        return tuple(float(item) if item is not None else None for item in value)
    except (ValueError, SyntaxError, TypeError, ArithmeticError, MemoryError, RecursionError):
        raise argparse.ArgumentTypeError(f"'{text[:60]}' is not a tuple of numbers such as '(0.9, 0.98)'") from None


def _parse_list(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            return [item(part) for part in text.strip("[]").split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a list of {item.__name__}s such as 1,2") from None

    return parse


def _parse_dict(text: str) -> dict[str, Any]:
    """JSON, or a Python literal such as ``{'beam': 4}``, which fairseq takes for some flags."""
    value = None
    for read in (json.loads, _literal):
        try:
            value = read(text)
            break
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a JSON object such as '{{\"beam\": 4}}'")
    return value


def _parser_of(annotation: Any) -> Callable[[str], Any]:
    """The function that turns a flag's text into a value of the annotated type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _parser_of(next(a for a in arguments if a is not type(None)))
    if origin is list:
        return _parse_list(arguments[0])
    if origin is tuple:
        return _parse_tuple
    if origin is dict or annotation is dict:
        return _parse_dict
    if annotation is bool:
        return _parse_bool
    return annotation


def flag_fields(config: type) -> list[dataclasses.Field[Any]]:
    """The fields of dataclass ``config`` that are flags."""
    return [field for field in dataclasses.fields(config) if "help" in field.metadata]


def flag_names(config: type | None) -> list[str]:
    """The names of the fields of dataclass ``config`` that are flags; of None, none."""
    return [] if config is None else [field.name for field in flag_fields(config)]


def _choices(field: dataclasses.Field[Any]) -> Sequence[str] | None:
    choices = field.metadata["choices"]
    return choices() if callable(choices) else choices


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default value of a flag."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def add_flags(
    parser: argparse.ArgumentParser,
    config: type,
    title: str,
    *,
    suppress_defaults: bool = False,
    skip: Iterable[str] = (),
) -> set[str]:
    """Add every flag of dataclass ``config`` to ``parser`` as a group called ``title``.

    suppress_defaults: leave out of the namespace what the user did not give (an architecture fills it in).
    skip: field names that the parser already has. Returns the names added.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(config)
    added = set()
    for field in flag_fields(config):
        if field.name in skip:
            continue
        added.add(field.name)
        meta, default, choices = field.metadata, default_of(field), _choices(field)
        settings: dict[str, Any] = {
            "help": meta["help"],
            "default": argparse.SUPPRESS if suppress_defaults else default,
        }
        if not suppress_defaults and default not in (None, False, "", [], {}) and not meta["positional"]:
            shown = ",".join(map(str, default)) if isinstance(default, list) else default
            settings["help"] += f" (default: {shown})".replace("%", "%%")
        if meta["switch"]:
            settings["action"] = argparse.BooleanOptionalAction
        elif hints[field.name] is bool and default is False:
            settings["action"] = "store_true"
        elif meta["repeat"]:
            settings |= {"action": "append", "metavar": meta["metavar"]}
        else:
            settings["type"] = _bounded(_parser_of(hints[field.name]), *meta["bounds"])
            settings["choices"] = choices
            if choices is None:
                settings["metavar"] = meta["metavar"] or _metavar(hints[field.name])
            const = True if hints[field.name] is bool else meta["const"]
            if const is not None:
                settings |= {"nargs": "?", "const": const}
        if meta["positional"]:
            group.add_argument(field.name, **settings | {"metavar": meta["metavar"] or field.name.upper()})
        else:
            group.add_argument(_spelling(field.name), *meta["aliases"], dest=field.name, **settings)
    return added


def flags_of(config: type) -> list[str]:
    """The flags of dataclass ``config`` as they are typed, without aliases."""
    return [_spelling(field.name) for field in flag_fields(config)]


def spellings_of(config: type) -> list[str]:
    """All that may be typed for the flags of dataclass ``config``, aliases and ``--no-NAME`` too."""
    flags = flag_fields(config)
    off = [f"--no-{_spelling(field.name)[2:]}" for field in flags if field.metadata["switch"]]
    return [*flags_of(config), *off, *(alias for field in flags for alias in field.metadata["aliases"])]


def _spelling(name: str) -> str:
    return "--" + name.replace("_", "-")


def _bounded(parse: Callable[[str], Any], least: float | None, most: float | None, below: float | None) -> Any:
    """``parse``, refusing numbers that are not finite or not within the bounds."""
    wanted = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
    wanted += [f"below {below}"] * (below is not None)

    @functools.wraps(parse, updated=())  # argparse names it in errors
    def checked(text: str) -> Any:
        value = parse(text)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
            if (
                (least is not None and number < least)
                or (isinstance(number, int) and most is below is None and abs(number) > LARGEST_INT)
                or (most is not None and number > most)
                or (below is not None and number >= below)
            ):
                raise argparse.ArgumentTypeError(
                    f"{text}: must be {' and '.join(wanted or [f'at most {LARGEST_INT}'])}"
                )
        return value

    return checked


def parse_value(config: type, name: str, value: Any) -> Any:
    """A JSON value as field ``name`` of dataclass ``config``. Raises ValueError where the flag would refuse it."""
    hint = typing.get_type_hints(config)[name]
    if value is None and type(None) in typing.get_args(hint):
        return None
    [field] = (field for field in dataclasses.fields(config) if field.name == name)
    choices = _choices(field)
    try:
        parsed = _bounded(_parser_of(hint), *field.metadata["bounds"])(str(value))
        if choices and parsed not in choices:
            raise ValueError
        return parsed
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(f"'{str(value)[:60]}' is no {name}") from None


def _metavar(annotation: Any) -> str:
    names = {int: "N", float: "X", str: "STR", bool: "BOOL"}
    return next((short for kind, short in names.items() if annotation in (kind, kind | None)), "VALUE")


def from_namespace(config: type[C], namespace: argparse.Namespace | dict[str, Any], **fixed: Any) -> C:
    """An instance of dataclass ``config`` with what ``namespace`` has of its fields (or of their aliases).

    fixed: values that win over the namespace's.
    """
    given = namespace if isinstance(namespace, dict) else vars(namespace)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if "others" in field.metadata:
            values[field.name] = {name: given[name] for name in field.metadata["others"]() if name in given}
            continue
        names = [field.name, *(a.lstrip("-").replace("-", "_") for a in field.metadata.get("aliases", ()))]
        for name in names:
            if name in given and len(name) > 1:
                values[field.name] = given[name]
                break
    return config(**(values | fixed))
