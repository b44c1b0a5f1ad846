"""Command lines from dataclasses, and the output and exit codes that all commands share. A flag is a field
made by `flag(default, help)`: its type is the annotation, its default and help stand once."""
import argparse
import dataclasses
import decimal
import difflib
import io
import json
import os
import re
import select
import sys
import time
import traceback
import typing

from nanolost.errors import UserError
from nanolost.files import expanded

# our flags and what nanoGPT, nanochat, litgpt and Hugging Face call them
OTHER_NAMES = {
    "lr": "learning_rate max_lr peak_lr",
    "min_lr_ratio": "min_lr final_lr_frac",
    "steps": "max_iters max_steps num_steps num_iterations train_steps epochs num_epochs num_train_epochs",
    "warmup": "warmup_iters warmup_steps num_warmup_steps warmup_ratio",
    "batch_tokens": "batch_size total_batch_size global_batch_size gradient_accumulation_steps",
    "micro_batch": "batch_size device_batch_size micro_batch_size per_device_train_batch_size",
    "seq_len": "block_size context_length max_seq_len max_seq_length sequence_length",
    "n_layer": "n_layers num_layers num_hidden_layers layers depth",
    "n_head": "n_heads num_heads num_attention_heads",
    "n_kv_head": "n_kv_heads num_kv_heads num_key_value_heads n_query_groups",
    "n_embd": "n_embed hidden_size d_model dim width embedding_size",
    "n_ffn": "intermediate_size ffn_dim d_ff",
    "betas": "beta1 beta2 adam_beta1 adam_beta2",
    "weight_decay": "wd",
    "grad_clip": "max_grad_norm max_norm clip",
    "rank": "r lora_r lora_rank",
    "sparsity": "density rho",
    "dtype": "precision bf16 fp16 amp",
    "eval_every": "eval_interval eval_steps val_every",
    "eval_tokens": "eval_iters val_tokens eval_batches",
    "save_every": "save_interval save_steps checkpoint_every",
    "log_every": "log_interval logging_steps",
    "out_dir": "output_dir save_dir out output",
    "data_dir": "dataset data data_path",
    "resume": "init_from resume_from resume_from_checkpoint load",
    "workers": "num_workers num_proc",
    "max_new_tokens": "num_tokens n_tokens max_tokens max_length length",
    "num_samples": "num_return_sequences samples",
    "ckpt": "checkpoint ckpt_path checkpoint_dir model_path",
}
# seconds that a process of torchrun leaves to rank 0, for an error line that all would print
RANK_0_SPEAKS = 5

# --- values ---

def flag(default, help, choices=None, section=None, path=False):
    """A field of a dataclass of flags. choices: the allowed values. section: heading in --help of this flag
    and of those after it. path: a name of files, in which ~ is replaced: bash does it behind "--flag " and
    not behind "--flag="."""
    metadata = {"help": help, "choices": choices, "section": section, "path": path}
    return dataclasses.field(default=default, metadata=metadata)

def integer(text: str) -> int:
    """10000, 10_000, 1e4, 10K, 10M or 10B, of 64 bits."""
    number, unit = re.fullmatch(r"(-?[\d_.]+(?:[eE]\d\d?)?)([KMB]?)", text).groups()
    zeros = {"": 0, "K": 3, "M": 6, "B": 9}[unit]
    # a float would round numbers above 2**53
    value = decimal.Decimal(number).scaleb(zeros)
    if value != int(value) or not -2**63 <= value < 2**63:
        raise ValueError(f"{text} is no whole number of 64 bits")
    return int(value)

def number_or_by_module(kind):
    """Parser of one number, or of name=number,name=number,… into a dict."""
    def read(text):
        if "=" not in text:
            return kind(text)
        values = {}
        # a second "=" in an entry fails here, too
        for entry in text.split(","):
            name, value = entry.split("=")
            name = name.strip()
            # the last one would win in silence
            if not name or name in values:
                raise ValueError(f"{text} has a name twice, or none")
            values[name] = kind(value)
        return values
    return read

def numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))

def pair(text: str) -> tuple[float, float]:
    first, second = numbers(text)
    return first, second

def boolean(text: str) -> bool:
    # no yes, no 1: a flag that takes everything hides a value meant for the next one
    return {"true": True, "false": False}[text.lower()]

KINDS = {                                      # annotation → (how it is shown, parser)
    int: ("INT", integer),
    float: ("NUMBER", float),
    str: ("TEXT", str),
    bool: ("true|false", boolean),
    list[str]: ("TEXT …", str),
    # a file that becomes what it holds
    str | dict: ("FILE", str),
    int | dict: ("INT|NAME=INT,…", number_or_by_module(integer)),
    float | dict: ("NUMBER|NAME=NUMBER,…", number_or_by_module(float)),
    tuple[float, float]: ("X,Y", pair),
    tuple[float, ...]: ("NUMBER,…", numbers),
}

# --- the command line ---

class Parser(argparse.ArgumentParser):
    def error(self, message):
        # argparse would print its usage and exit here
        raise UserError(message)

def parse(cls, argv: list[str], description: str = "") -> dict:
    """The flags given in argv, name → value; fields of `cls` that were not given are absent. Raises
    UserError for an unknown or abbreviated flag and for a wrong value. `--help` prints all of them."""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [--FLAG VALUE …]")
    # annotations may be strings
    hints = typing.get_type_hints(cls)
    group = parser
    for field in dataclasses.fields(cls):
        if field.metadata["section"]:
            group = parser.add_argument_group(field.metadata["section"])
        _add_flag(group, field, hints[field.name])
    # argparse's own message for unknown flags has no suggestion
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(_explain_unknown(unknown[0], [f.name for f in dataclasses.fields(cls)]))
    return vars(given)

def spelled(value) -> str:
    """A default as one would type it: true, 131_072, 0.9,0.95."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}" if value >= 10_000 else str(value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)

def _add_flag(group, field: dataclasses.Field, hint):
    # None is only ever a default, no value that can be typed
    kind = next(k for k in KINDS if hint in (k, k | None))
    shown, convert = KINDS[kind]
    if field.metadata["path"]:
        convert = expanded
    choices = field.metadata["choices"]
    # argparse fills in %(default)s and the like
    text = field.metadata["help"].replace("%", "%%")
    # an empty prompt is not worth a word
    if field.default not in (None, ""):
        text += f" (default {spelled(field.default)})".replace("%", "%%")
    extra = {}
    if kind is bool:
        # --dry_run alone is --dry_run true
        extra = {"nargs": "?", "const": True}
    elif kind == list[str]:
        # argparse shows TEXT [TEXT ...]
        extra = {"nargs": "+"}
        shown = "TEXT"
    group.add_argument(f"--{field.name}", help=text, choices=choices,
                       type=_checked(convert, choices, f"--{field.name} {shown}"),
                       metavar="|".join(choices) if choices else shown, **extra)

def _checked(convert, choices, expected: str):
    def read(text):
        try:
            # choices are lower-case
            return convert(text.lower() if choices else text)
        except (ValueError, KeyError, AttributeError, ArithmeticError):
            raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}") from None
    return read

def _explain_unknown(argument: str, names: list[str]) -> str:
    typed = argument.split("=")[0]
    word = typed.lstrip("-").replace("-", "_").lower()
    near = [name for name in names if word in OTHER_NAMES.get(name, "").split()]
    # else a slip: half of the letters in order are enough to be worth a guess
    if not near:
        near = difflib.get_close_matches(typed, [f"--{name}" for name in names], 3, 0.5)
        near = [name.removeprefix("--") for name in near]
    hint = "see --help"
    if near:
        hint = "did you mean " + " or ".join(f"--{name}" for name in near) + "?"
    what = "unknown flag" if typed.startswith("-") else "unexpected"
    return f"{what} {typed}: {hint}"

# --- output ---

def say(text: str):
    """Print a line at once. A reader that is gone, a full disk behind it or an encoding that lacks a
    character must not end a training."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        # in a program that did not start by `command`, as a notebook
        print(ascii(text), flush=True)
    except OSError:
        _silence(sys.stdout)

def _silence(stream):
    """Let what is still buffered, and what comes, go nowhere: Python would fail on it again at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)

def _escape_what_the_encoding_lacks():
    """latin-1, cp1252 and ASCII terminals and pipes have no ρ and no →: show \\u2192, and lose no text."""
    for stream in (sys.stdout, sys.stderr):
        # a test or a notebook may have put something else there, a shell nothing (>&-)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

# --- the end ---

def command(main):
    """Run main() as a program, to its end. A UserError becomes one line `error: …` and exit code 2; an I/O
    error, too little memory, a diverged run or Ctrl-C one line and code 1; anything else has its traceback
    and code 1."""
    _escape_what_the_encoding_lacks()
    code = _run(main)
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as e:
        _silence(sys.stdout)
        # `| head` has seen enough; a full disk has lost something
        if not isinstance(e, BrokenPipeError):
            code = code or _fail(e, 1)
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        # gloo's threads outlive a failed exchange: at the interpreter's end 2 of 14 jobs of three processes
        # aborted with SIGABRT, under load. After a good end, which takes them down in order: 0 of 60.
        os._exit(code if isinstance(code, int) else 1)
    if code:
        sys.exit(code)

def _run(main) -> int | str | None:
    """What main() ends with, as an exit code."""
    try:
        main()
    except SystemExit as e:
        # --help
        return e.code
    except UserError as e:
        return _fail(e, 2)
    except BrokenPipeError as e:
        return 1 if _reader_is_gone() else _fail(e, 1)
    except (OSError, MemoryError, FloatingPointError) as e:
        return _fail(e, 1)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted"), 1)
    except Exception as e:
        traceback.print_exc()
        _tell_torchrun(f"{type(e).__name__}: {e}")
        return 1
    return 0

def _reader_is_gone() -> bool:
    """Whether it was standard output that broke, and not a pipe to a process of ours."""
    try:
        poll = select.poll()
        # asked for nothing, it still says what is wrong
        poll.register(sys.stdout, 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    # what a notebook or a test puts in its place has no file
    except (OSError, ValueError, AttributeError):
        return False

def _fail(error: BaseException, code: int) -> int:
    line = " ".join(str(error).split()) or type(error).__name__
    rank = os.environ.get("RANK", "0")
    _tell_torchrun(line)
    if code == 2 and rank != "0" and "TORCHELASTIC_RUN_ID" in os.environ:
        # mostly all processes make the same mistake: rank 0 says so, and torchrun ends this one meanwhile
        time.sleep(RANK_0_SPEAKS)
    prefix = "" if rank == "0" else f"[rank {rank}] "
    print(f"{prefix}error: {line}", file=sys.stderr, flush=True)
    return code

def _tell_torchrun(line: str):
    """Name the cause in the summary that torchrun prints, which otherwise is `To enable traceback see …`; the
    format is torch.distributed.elastic's, whose @record would put a traceback there."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        try:
            with open(path, "w", encoding="utf-8") as file:
                json.dump({"message": {"message": line, "extraInfo": extra}}, file)
        except OSError:
            # the summary is then what it would have been
            pass
