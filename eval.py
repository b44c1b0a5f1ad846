"""Loss, perplexity and bits per byte of a model on a text, with their standard errors:

    python eval.py --ckpt out/ --data_dir data/c4                     # shards, as train.py evaluates
    python eval.py --ckpt MODEL --text wiki.test.raw --seq_len 2048   # the field's WikiText-2 protocol

The folder is one of ours or of Hugging Face. Prints one line, and last one JSON object on one line."""
import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass

from nanolost.checkpoint import checkpoint_folder, load_with_tokenizer
from nanolost.data import TokenDataset, read_shard
from nanolost.errors import UserError
from nanolost.files import open_regular
from nanolost.flags import command, flag, parse
from nanolost.job import Job
from nanolost.loop import Validation, evaluate, require_finite
from nanolost.settings import DEVICES, autocast
from nanolost.threads import use_threads
from nanolost.tokenizer import Tokenizer
from nanolost.windows import RULES, Windows, standard_error

# of a model from elsewhere, whose training window no file says
FOREIGN_WINDOW = 1024
# what evaluators of LOST's line of papers read at the most (GaLore, torchrun_main.py)
PAPER_TOKENS = 10_000_000

@dataclass
class Config:
    ckpt: str = flag("out", "out_dir of train.py (its newest good checkpoint) or one checkpoint folder",
                     section="what", path=True)
    data_dir: str | None = flag(None, "folder of token shards: their validation split, cut as in training",
                                path=True)
    text: list[str] | None = flag(None, "files of text, each read as one text; the first token of a window "
                                        "is no target", path=True)
    seq_len: int | None = flag(None, "tokens of a window (what the model was trained at; of others at most "
                                     f"{FOREIGN_WINDOW})", section="how")
    stride: int | None = flag(None, "tokens from window to window; each token counts once (--seq_len)")
    tokens: int | None = flag(None, "predict about so many tokens, from the first on (all)")
    paper_batch: int | None = flag(None, "say also the perplexity that the papers' evaluator would print, "
                                         f"with batches of so many rows, of at most {PAPER_TOKENS:,} tokens")
    device: str = flag("auto", "cuda, mps or cpu; auto is the best there is", ["auto", *DEVICES])
    dtype: str = flag("auto", "autocast; auto is what the model was trained with there, else as in train.py",
                      ["auto", "float32", "bfloat16"])

    # what Job asks for: seconds for the other processes, and whether sums must be reproducible
    timeout = 600
    deterministic = False

# --- what is asked ---

def check(config: Config):
    """UserError for flags that do not go together, before anything is loaded."""
    if (config.data_dir is None) == (config.text is None):
        raise UserError("give a text: either --data_dir DIR or --text FILE …")
    for name in ("stride", "tokens", "paper_batch"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be positive")
    if config.seq_len is not None and config.seq_len < 2:
        raise UserError(f"--seq_len {config.seq_len}: a window needs 2 tokens, one to predict the other")

def settle(config: Config, model, saved: dict, device: str) -> int:
    """Fill in what was not typed, from `saved`, the settings that the model was trained with ({}: unknown).
    Returns the windows of one forward pass."""
    limit = model.config.max_seq_len
    trained = saved.get("seq_len")
    if config.seq_len is None:
        config.seq_len = trained if type(trained) is int else min(FOREIGN_WINDOW, limit)
    if config.stride is None:
        config.stride = config.seq_len
    if config.stride > config.seq_len:
        raise UserError(f"--stride {config.stride} is above --seq_len {config.seq_len}: the tokens between "
                        "two windows would be left out")
    # rotary positions have no end, so that it can be computed; what it is worth is another thing
    if config.seq_len > limit:
        print(f"WARNING: --seq_len {config.seq_len} is above the {limit} tokens that the model was made for",
              file=sys.stderr)
    config.device = device
    # a run that was trained on a GPU in bfloat16 says nothing of what suits a CPU
    alike = saved.get("device") == device
    if config.dtype == "auto":
        known = saved.get("dtype") if alike else None
        config.dtype = known if known in ("float32", "bfloat16") else DEVICES[device]["dtype"]
    # equal to the last bit only in equal pieces
    micro = saved.get("micro_batch")
    if alike and trained == config.seq_len and type(micro) is int and micro > 0:
        return micro
    return max(1, DEVICES[device]["micro_tokens"] // config.seq_len)

# --- texts ---

def read_text(path: str) -> bytes:
    # a pipe has no end that comes by itself
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None

def of_files(config: Config, tokenizer: Tokenizer) -> tuple[Windows, list[dict]]:
    """Windows of --text, and what names it."""
    texts = []
    names = []
    for path in config.text:
        data = read_text(path)
        # line ends as they are: they are tokens, too
        try:
            text = data.decode()
        except UnicodeDecodeError as e:
            raise UserError(f"cannot read {path}: byte {e.start} is not UTF-8") from None
        # what the post-processor puts around a text, as AutoTokenizer does in the papers' scripts
        texts.append(tokenizer.row(text))
        names.append({"name": os.path.basename(path), "sha256": hashlib.sha256(data).hexdigest()})
    return Windows(texts, config.seq_len, config.stride, "alone"), names

def of_shards(config: Config, tokenizer: Tokenizer, rows: int) -> tuple[TokenDataset | Windows, list[dict]]:
    """Windows of the validation split of --data_dir, and what names it."""
    data = TokenDataset(config.data_dir, "val", config.seq_len)
    data.check_tokenizer(tokenizer, config.data_dir, config.ckpt)
    data.check_ids(min(tokenizer.vocab_size, rows))
    # of the split: names, lengths and digests of its shards
    names = [{"name": f"val split of {os.path.basename(os.path.abspath(config.data_dir))}",
              "sha256": data.fingerprint}]
    # the very object that training reads its validation text with
    if config.stride == config.seq_len:
        return data, names
    if data.row:
        raise UserError(f"--stride {config.stride}: the rows of {config.data_dir} stand for themselves, none "
                        "goes on in the next; leave --stride out")
    shards = [read_shard(path) for path in data.paths]
    return Windows(shards, config.seq_len, config.stride, "shared"), names

# --- what comes out ---

def numbers(found: dict, windows: list[tuple]) -> dict:
    """The means of an evaluation with their standard errors over windows."""
    nats, targets, sizes = (list(column) for column in zip(*windows, strict=True))
    # windows that a stride or a mask leaves few targets in weigh as much less
    error = standard_error(nats, targets)
    bits_error = standard_error([value / math.log(2) for value in nats], sizes)
    # the derivative of e to the x is e to the x
    ppl_error = None if error is None else found["val_ppl"] * error
    # special tokens alone stand for no text
    no_bytes = sum(sizes) == 0
    return {
        "loss": found["val_loss"],
        "loss_stderr": error,
        "perplexity": found["val_ppl"],
        "perplexity_stderr": ppl_error,
        "bits_per_byte": None if no_bytes else found["val_bpb"],
        "bits_per_byte_stderr": bits_error,
        "tokens": found["val_tokens"],
        "bytes": sum(sizes),
        "windows": len(windows),
    }

def with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "n/a"
    if error is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"

def line(result: dict) -> str:
    loss = with_error(result["loss"], result["loss_stderr"], 4)
    perplexity = with_error(result["perplexity"], result["perplexity_stderr"], 2)
    bits = with_error(result["bits_per_byte"], result["bits_per_byte_stderr"], 4)
    names = ", ".join(text["name"] for text in result["text"])
    if "paper_ppl" in result:
        perplexity += f" (the papers' evaluator: {result['paper_ppl']:.2f})"
    return (f"loss {loss} | perplexity {perplexity} | {bits} bits per byte | {result['tokens']:,} tokens in "
            f"{result['windows']} windows of {result['window']}, stride {result['stride']}, of {names}")

def first_token_rule(config: Config, tokenizer: Tokenizer, rows: bool) -> str:
    """Which tokens nothing predicts, and what stands before a text."""
    if config.data_dir:
        rule = RULES["row" if rows else "shared"]
        return f"{rule}; what begins a document is as in the shards"
    begin = [text for text, number in tokenizer.special.items() if number in tokenizer.before]
    return f"{RULES['alone']}; {' '.join(begin) or 'nothing'} stands before the text"

def main(config: Config) -> dict:
    """Evaluate as `config` says; returns the JSON object. Under torchrun each process reads its share."""
    check(config)
    with Job.start(config) as job:
        use_threads()
        # one look for the newest checkpoint: training may add another meanwhile
        folder = job.first(lambda: checkpoint_folder(config.ckpt))
        model, tokenizer, state = load_with_tokenizer(folder)
        micro = settle(config, model, state.get("config", {}), job.device.type)
        rows = model.config.vocab_size
        if config.text:
            data, names = of_files(config, tokenizer)
        else:
            data, names = of_shards(config, tokenizer, rows)
        # as train.py's --eval_tokens
        samples = None if config.tokens is None else data.samples_for(config.tokens)
        text = Validation.of(data, samples, micro, tokenizer, rows)
        if config.paper_batch:
            text.paper = (config.paper_batch, PAPER_TOKENS)
        windows = []
        found = evaluate(model.to(job.device), text, autocast(config), job, windows)
        if found is None:
            # half of a text would be another number
            raise KeyboardInterrupt
        require_finite(found, folder, config.dtype)
        windows = sum(job.gather(windows), [])
    paper = {name: found[name] for name in ("paper_ppl",) if name in found}
    result = {
        **numbers(found, windows),
        **paper,
        "window": config.seq_len,
        "stride": config.stride,
        "text": names,
        "first_token": first_token_rule(config, tokenizer, getattr(data, "row", False)),
        "ckpt": folder,
        "device": config.device,
        "dtype": config.dtype,
    }
    job.say(line(result))
    job.say(json.dumps(result, ensure_ascii=False))
    return result

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
