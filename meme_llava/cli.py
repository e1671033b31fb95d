"""Command lines: a dataclass of settings becomes a parser whose mistakes are one clear sentence.

Which settings there are stands in the settings.py of the room that uses them.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from meme_llava.errors import UserError, is_utf8

Arguments = TypeVar("Arguments")


# What a setting may be `expected` to be; only max_grad_norm may be infinite.
EXPECTATIONS: dict[str, Callable[[Any], Any]] = {
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "1 to 1000000": lambda value: 1 <= value <= 1_000_000,
    "0 or more": lambda value: value >= 0,
    "greater than 0": lambda value: value > 0,
    "0 or more and below 1": lambda value: 0 <= value < 1,
    "0 to 18446744073709551615": lambda value: 0 <= value < 2**64,
    "a whole number and KB, MB, GB or TB, such as 5GB": re.compile("[1-9][0-9]*(KB|MB|GB|TB)").fullmatch,
}


def setting(
    text: str,
    default: Any = dataclasses.MISSING,
    *,
    expected: str | None = None,
    free: bool = False,
    **options,
) -> Any:
    """A field of a dataclass of settings.

    Args:
        text: for --help.
        expected: one of EXPECTATIONS, which `parse_arguments` holds a value against.
        free: the setting changes neither which records a step trains on nor its update, only how it is computed and
            shown; a run continues, and a finished one is the same, with another value.
        options: for argparse.
    """
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**given, metadata={"help": text, **options, "expected": expected, "free": free})


def check_settings(arguments) -> None:
    """Raise UserError for the first value that is not what its field expects; None stands for no value."""
    for one in dataclasses.fields(arguments):
        value, expected = getattr(arguments, one.name), one.metadata.get("expected")
        if expected is not None and value is not None:
            check_setting(arguments, one.name, EXPECTATIONS[expected](value), expected)


def list_free_settings(arguments_class: type) -> frozenset[str]:
    """The settings of a script that are `free`."""
    return frozenset(one.name for one in dataclasses.fields(arguments_class) if one.metadata.get("free", False))


class RepeatedKey(ValueError):
    """A key that stands twice in one object."""


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object for `object_pairs_hook`, which would keep the last of two equal keys. Raises RepeatedKey."""
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise RepeatedKey(f"the key {repeated!r} stands twice")
    return value


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest of the known ones in brackets, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class Parser(argparse.ArgumentParser):
    """argparse that stops with a `UserError` and suggests the nearest flag."""

    def parse_known_args(self, args=None, namespace=None):
        # argparse reports what is missing before what is misspelt, although the one explains the other.
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if not is_utf8(word):
                self.error(
                    f"{word!r} is not UTF-8; rename the file (convmv -f gbk -t utf-8), or set the terminal to UTF-8"
                )
        known = [option for action in self._actions for option in action.option_strings]
        for flag in (word.split("=")[0] for word in words if word.startswith("--") and word != "--"):
            if flag not in known:
                self.error(f"unknown setting {flag}{suggest(flag, known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        # Every flag has a twin with dashes; one spelling is enough to read.
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)
        raise UserError(f"{self.prog}: {message}. --help lists all settings.")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, and shows only defaults that are one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def parse_arguments(
    arguments_class: type[Arguments], argv: list[str] | None, description: str, prog: str | None = None
) -> Arguments:
    """Parse a script's command line into its dataclass.

    Args:
        prog: what the user typed in front of the flags, if it is not the script alone.

    Raises:
        UserError: an unknown, missing, malformed or contradictory setting.
    """
    arguments = arguments_class(**vars(make_parser(arguments_class, description, prog).parse_args(argv)))
    check_settings(arguments)
    return arguments


def make_parser(arguments_class: type, description: str, prog: str | None = None) -> Parser:
    """A flag `--a_name` (or `--a-name`) for every field of a dataclass; `--no_a_name` for those that are on."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
    types = get_type_hints(arguments_class)
    for setting in dataclasses.fields(arguments_class):
        _add_setting(parser, setting, types[setting.name])
    return parser


def _add_setting(parser: Parser, setting: dataclasses.Field, kind: Any) -> None:
    options = {name: value for name, value in setting.metadata.items() if name not in ("free", "expected")}
    if setting.default_factory is not dataclasses.MISSING:
        options["default"] = setting.default_factory()
    elif setting.default is not dataclasses.MISSING:
        options["default"] = setting.default
    else:
        options["required"] = True
    # Literal[…] | None is a Union, str | None a UnionType.
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
    elif get_origin(kind) is list:
        options = {"type": get_args(kind)[0], "nargs": "+"} | options
    elif kind is bool:
        options |= {"type": _read_bool, "nargs": "?", "const": True}
    else:
        options["type"] = kind
    parser.add_argument(*_spell_flag(setting.name), **options)
    if setting.default is True:
        help_text = f"turn --{setting.name} off"
        parser.add_argument(
            *_spell_flag(f"no_{setting.name}"), dest=setting.name, action="store_false", default=True, help=help_text
        )


def _spell_flag(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _read_bool(word: str) -> bool:
    if word.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise argparse.ArgumentTypeError(f"is {word!r}, expected true or false")
    return word.lower() in ("true", "yes", "1")


def check_setting(arguments, name: str, passed: bool, expected: str) -> None:
    """Raise UserError with flag, value and what is `expected`, unless it passed; only max_grad_norm may be infinite."""
    value = getattr(arguments, name)
    if not passed or (isinstance(value, float) and name != "max_grad_norm" and math.isinf(value)):
        shown = str(value) if isinstance(value, Path) else repr(value)
        raise UserError(f"--{name} is {shown}, expected {expected}")


def to_plain(arguments) -> dict:
    """Settings as JSON can hold them."""
    return json.loads(json.dumps(dataclasses.asdict(arguments), default=str))
