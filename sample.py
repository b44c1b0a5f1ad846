"""Continue a text with a trained model:

    python sample.py --ckpt out/ --prompt "The meaning of life is" --num_samples 3

Only the text goes to stdout. Nothing is fetched: the tokenizer is in the checkpoint."""
import nanolost  # noqa: F401, I001  before torch: OpenMP reads its settings once

import os
import sys
from dataclasses import dataclass

import torch

from nanolost.checkpoint import checkpoint_folder, load_with_tokenizer
from nanolost.decode import compile_step, generate
from nanolost.errors import UserError
from nanolost.flags import command, flag, parse
from nanolost.job import pick_device
from nanolost.sparse import pack
from nanolost.tokenizer import Tokenizer

@dataclass
class Config:
    ckpt: str = flag("out", "out_dir of train.py (its newest good checkpoint) or one checkpoint folder",
                     path=True)
    prompt: str = flag("", "text to continue, or FILE:path; by default a new document")
    max_new_tokens: int = flag(200, "tokens to add; a sample ends earlier where the model ends the document")
    temperature: float = flag(0.8, "divides the logits; 0 takes the likeliest token each time")
    top_k: int | None = flag(None, "draw from the k likeliest tokens only")
    top_p: float | None = flag(None, "draw from the fewest tokens whose probabilities reach p")
    num_samples: int = flag(1, "independent samples, an empty line between them")
    chat: bool = flag(False, "the prompt is what a user says: apply the model's chat template and print the "
                      "answer alone")
    seed: int = flag(0, "seed of the draws")
    device: str = flag("auto", "cuda, mps or cpu; auto is the best there is", ["auto", "cuda", "mps", "cpu"])
    dtype: str = flag("float32", "number format of weights and activations", ["float32", "bfloat16"])
    compile: bool = flag(False, "compile the decode step: a minute at the start, for long texts")

def check(config: Config):
    """Raises UserError for values out of range, before anything is loaded."""
    if config.max_new_tokens < 1 or config.num_samples < 1:
        raise UserError("--max_new_tokens and --num_samples must be positive")
    # NaN compares as false, so that it is refused here and below
    if not config.temperature >= 0:
        raise UserError("--temperature must be 0 or more")
    if config.top_k is not None and config.top_k < 1:
        raise UserError("--top_k must be positive")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise UserError("--top_p must lie in (0, 1]")

def read_prompt(prompt: str) -> str:
    """The text that --prompt gives or names. UserError where there is none."""
    if prompt.startswith("FILE:"):
        path = os.path.expanduser(prompt.removeprefix("FILE:"))
        try:
            # editors on Windows begin a file with a byte-order mark, which is no part of the text
            with open(path, encoding="utf-8-sig") as f:
                return f.read()
        # bytes that are no UTF-8 are a ValueError
        except (OSError, ValueError) as e:
            raise UserError(f"cannot read the prompt: {e}") from None
    try:
        prompt.encode()
    except UnicodeEncodeError:
        # bytes of the command line that no encoding explains: they could not be printed either
        raise UserError("--prompt is no text in this terminal's encoding: write it to a file in UTF-8 and "
                        "give FILE:path") from None
    return prompt

def continuations(model, tokenizer: Tokenizer, prompt: str, config: Config):
    """The samples' texts after the prompt."""
    device = next(model.parameters()).device
    if config.chat:
        start = tokenizer.chat([{"role": "user", "content": prompt}])
    else:
        # as every document in training begins
        start = tokenizer.document(prompt).tolist()
    # a vocabulary may have holes, and a model more rows than its tokenizer has ids (--vocab_size), or fewer
    known = torch.from_numpy(tokenizer.known()[:model.config.vocab_size])
    ends = sorted(tokenizer.ends)
    rows = generate(
        model,
        torch.tensor([start] * config.num_samples, device=device),
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        generator=torch.Generator(device).manual_seed(config.seed),
        eot=ends,
        step=compile_step(model) if config.compile else None,
        vocab_size=tokenizer.vocab_size,
        known=None if known.all() else known.to(device),
    )
    for row in rows.tolist():
        new = row[len(start):]
        # a sample that ended early is filled up with its end
        length = next((i for i, number in enumerate(new) if number in tokenizer.ends), len(new))
        yield tokenizer.continuation(start, new[:length])

def main(config: Config):
    # what is refused is refused before the weights are read
    check(config)
    prompt = read_prompt(config.prompt)
    device = pick_device(config.device)
    # one look for the newest checkpoint: training may add another meanwhile
    model, tokenizer, _ = load_with_tokenizer(checkpoint_folder(config.ckpt))
    model.to(device, getattr(torch, config.dtype))
    # a matrix with many zeros, where that is faster
    pack(model, config.num_samples)
    # all are drawn before the first is printed: they are one batch
    for i, text in enumerate(continuations(model, tokenizer, prompt, config)):
        if i:
            print()
        print(text if config.chat else prompt + text)

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
