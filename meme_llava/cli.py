"""Knows which settings exist and what command line, recipe file and defaults resolve to.

Every setting has one home. Those without a default are the user's: run.sh or the command line gives them. What makes a
train type stands in configs/train/<train_type>.yaml. The rest has its default here. Command line > recipe > default;
an unknown or contradictory setting is an error. Settings of what looks at finished models stand in
`evaluation_arguments`.
"""

import argparse
import dataclasses
import difflib
import math
import re
import sys
from pathlib import Path
from typing import TypeVar

from transformers.hf_argparser import HfArgumentParser

from meme_llava.errors import UserError

Arguments = TypeVar("Arguments")


def describe(text: str, **metadata) -> dict:
    """Field metadata for a help text."""
    return {"help": text, **metadata}


class Parser(HfArgumentParser):
    """argparse that stops with a `UserError` and suggests the nearest flag."""

    def parse_known_args(self, args=None, namespace=None):
        # argparse reports what is missing before what is misspelt, although the one explains the other.
        words = sys.argv[1:] if args is None else list(args)
        known = [option for action in self._actions for option in action.option_strings]
        for flag in (word.split("=")[0] for word in words if word.startswith("--") and word != "--"):
            if flag not in known:
                near = difflib.get_close_matches(flag, known, n=1)
                self.error(f"unknown setting {flag}" + (f" (did you mean {near[0]}?)" if near else ""))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        # Every flag has a twin with dashes; one spelling is enough to read.
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)
        raise UserError(f"{self.prog}: {message}. --help lists all settings.")


def parse_arguments(
    arguments_class: type[Arguments], argv: list[str] | None, description: str, prog: str | None = None
) -> Arguments:
    """Parse a script's command line into its dataclass.

    Args:
        prog: what the user typed in front of the flags, if it is not the script alone.

    Raises:
        UserError: an unknown, missing, malformed or contradictory setting.
    """
    return arguments_class(**vars(make_parser(arguments_class, description, prog).parse_args(argv)))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, and shows only defaults that are one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def make_parser(arguments_class: type, description: str, prog: str | None = None) -> Parser:
    parser = Parser(
        arguments_class, description=description, prog=prog, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    for action in parser._actions:
        if action.option_strings and action.option_strings[0].startswith("--no_"):
            # Its twin's help would say the opposite of what it does.
            action.help = f"do not: {action.help}"
    return parser


def check_setting(arguments, name: str, passed: bool, expected: str) -> None:
    """Raise UserError with flag, value and what is `expected`, unless it passed; only max_grad_norm may be infinite."""
    value = getattr(arguments, name)
    if not passed or (isinstance(value, float) and name != "max_grad_norm" and math.isinf(value)):
        shown = str(value) if isinstance(value, Path) else repr(value)
        raise UserError(f"--{name} is {shown}, expected {expected}")


def to_plain(arguments) -> dict:
    """Settings as JSON can hold them."""

    def convert(value):
        if isinstance(value, list):
            return [convert(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: convert(value) for name, value in dataclasses.asdict(arguments).items()}
