"""Command lines from dataclasses, and the exit codes that all commands share. A flag is a field made by
`flag(default, help)`: its type is the annotation, its default and help stand once."""
import argparse
import contextlib
import dataclasses
import decimal
import difflib
import os
import re
import sys
import traceback
import typing

def flag(default, help, choices=None):
    """A field of a dataclass of flags; choices: the allowed values."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})

def integer(text: str) -> int:
    """10000, 10_000, 1e4, 10K, 10M or 10B, of 64 bits."""
    number, unit = re.fullmatch(r"(-?[\d_.]+(?:[eE]\d\d?)?)([KMB]?)", text).groups()
    value = decimal.Decimal(number).scaleb({"": 0, "K": 3, "M": 6, "B": 9}[unit])
    if value != int(value) or not -2**63 <= value < 2**63:
        raise ValueError(f"{text} is no whole number of 64 bits")
    return int(value)

def number_or_by_module(kind):
    """Parser of one number, or of name=number,name=number,… into a dict."""
    def read(text):
        if "=" not in text:
            return kind(text)
        return {name.strip(): kind(value) for name, value in (entry.split("=") for entry in text.split(","))}
    return read

def numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))

def pair(text: str) -> tuple[float, float]:
    first, second = numbers(text)
    return first, second

KINDS = {                                      # annotation → (how it is shown, parser)
    int: ("INT", integer), int | dict: ("INT|NAME=INT,…", number_or_by_module(integer)), str: ("TEXT", str),
    float: ("NUMBER", float), float | dict: ("NUMBER|NAME=NUMBER,…", number_or_by_module(float)),
    list[str]: ("TEXT …", str), tuple[float, float]: ("X,Y", pair),
    tuple[float, ...]: ("NUMBER,…", numbers),
    bool: ("true|false", lambda text: {"true": True, "false": False}[text.lower()]),
}

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)

def parse(cls, argv: list[str], description: str = "") -> dict:
    """The flags given in argv, name → value; fields of `cls` that were not given are absent. Raises
    ValueError for an unknown or abbreviated flag and for a wrong value. `--help` prints all of them."""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [--FLAG VALUE …]")
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = next(k for k in KINDS if hints[f.name] in (k, k | None))    # None is only ever a default
        (shown, convert), choices = KINDS[kind], f.metadata["choices"]
        def checked(text, convert=convert, choices=choices, expected=f"--{f.name} {shown}"):
            try:
                return convert(text.lower() if choices else text)          # they are lower-case
            except (ValueError, KeyError, AttributeError, ArithmeticError):
                raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}") from None
        default = str(f.default).lower() if kind is bool else f.default
        text = f.metadata["help"] + ("" if f.default is None else f" (default {default})")
        extra = {bool: {"nargs": "?", "const": True}, list[str]: {"nargs": "+"}}.get(kind, {})
        parser.add_argument(f"--{f.name}", type=checked, choices=choices, help=text.replace("%", "%%"),
                            metavar="|".join(choices) if choices else shown, **extra)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, [f"--{f.name}" for f in dataclasses.fields(cls)], 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
        raise ValueError(f"{'unknown flag' if name.startswith('-') else 'unexpected'} {name}: {hint}")
    return vars(given)

def command(main):
    """Run main() as a program, to its end. A ValueError becomes one line `error: …` and exit code 2; an I/O
    error, too little memory, a diverged run or Ctrl-C one line and code 1; anything else has its
    traceback and code 1."""
    code = 0
    try:
        main()
    except (ValueError, OSError, MemoryError, FloatingPointError) as e:
        rank = os.environ.get("RANK", "0")                                 # set by torchrun
        print(f"{'' if rank == '0' else f'[rank {rank}] '}error: {' '.join(str(e).split())}", file=sys.stderr)
        code = 2 if isinstance(e, ValueError) else 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = 1
    except Exception:
        traceback.print_exc()
        code = 1
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        with contextlib.suppress(OSError):     # a closed pipe
            sys.stdout.flush()
        os._exit(code)                         # taking gloo's threads down may abort: 1 run in 50, under load
    if code:
        sys.exit(code)
