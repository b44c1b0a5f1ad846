"""Command lines from dataclasses, and the exit codes that every command shares.

A command's flags are the fields of one dataclass, each made by `flag(default, help)`: the type is the
annotation, the help text and the default stand once. `command` turns a ValueError into one line `error: …`
and exit code 2."""
import argparse
import dataclasses
import difflib
import functools
import operator
import os
import re
import sys
import typing

def flag(default, help, choices=None):
    """A field of a dataclass of flags; choices: the allowed values."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})

def boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]

def integer(text: str) -> int:
    """10000, 10_000, 1e4, 10K, 10M or 10B."""
    number, unit = re.fullmatch(r"(-?[\d_.]+(?:[eE]\d+)?)([KMB]?)", text).groups()
    value = float(number) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[unit]
    if value != int(value):
        raise ValueError
    return int(value)

def pair(text: str) -> tuple[float, float]:
    first, second = text.split(",")
    return float(first), float(second)

def by_module(kind):
    """Parser of one number, or of name=number,name=number,…: a dict by module name."""
    def read(text: str):
        if "=" not in text:
            return kind(text)
        return {name.strip(): kind(value) for name, value in (entry.split("=") for entry in text.split(","))}
    return read

KINDS = {int: ("INT", integer), float: ("NUMBER", float), bool: ("true|false", boolean), str: ("TEXT", str),
         int | dict: ("INT|NAME=INT,…", by_module(integer)),
         float | dict: ("NUMBER|NAME=NUMBER,…", by_module(float)),
         tuple[float, float]: ("X,Y", pair), list[str]: ("TEXT …", str)}

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)

def parse(cls, argv: list[str], description: str = "") -> dict:
    """The flags given in argv, name → value, typed by the dataclass `cls`; the other fields are absent.

    Raises ValueError for an unknown or abbreviated flag (with the nearest known ones) and for a wrong value.
    `--help` prints every flag with meaning, type and default, and exits 0."""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [--FLAG VALUE …]")
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if type(None) in typing.get_args(kind):                    # None is only ever a default
            kind = functools.reduce(operator.or_, [k for k in typing.get_args(kind) if k is not type(None)])
        (metavar, convert), choices = KINDS[kind], f.metadata["choices"]
        shown = str(f.default).lower() if kind is bool else f.default
        default = "" if f.default is None else f" (default {shown})"
        extra = {"nargs": "?", "const": True} if kind is bool else {"nargs": "+"} if kind == list[str] else {}
        parser.add_argument(f"--{f.name}", type=_named(convert, f"--{f.name} {metavar}"), choices=choices,
                            metavar="|".join(choices) if choices else metavar, **extra,
                            help=(f.metadata["help"] + default).replace("%", "%%"))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, [f"--{f.name}" for f in dataclasses.fields(cls)], 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
        raise ValueError(f"{'unknown flag' if name.startswith('-') else 'unexpected'} {name}: {hint}")
    return vars(given)

def _named(convert, what: str):
    def checked(text):
        try:
            return convert(text)
        except (ValueError, KeyError, AttributeError):
            raise argparse.ArgumentTypeError(f"expected {what}, not {text!r}") from None
    return checked

def command(main):
    """Run main() as a program: ValueError → `error: …` on one line and exit 2; any other exception keeps its
    traceback and exit 1."""
    try:
        main()
    except ValueError as e:
        rank = os.environ.get("RANK", "0")                         # set by torchrun
        print(f"{'' if rank == '0' else f'[rank {rank}] '}error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
