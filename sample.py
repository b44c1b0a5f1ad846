"""Continue a text with a trained model:

    python sample.py --ckpt out/ --prompt "The meaning of life is" --num_samples 3

Only the text goes to stdout. Nothing is fetched: the tokenizer is in the checkpoint."""
import os
import sys
from dataclasses import dataclass

import torch

from nanolost.checkpoint import checkpoint_folder, load_folder
from nanolost.decode import compile_step, generate
from nanolost.flags import command, flag, parse
from nanolost.job import pick_device
from nanolost.tokenizer import Tokenizer

@dataclass
class Config:
    ckpt: str = flag("out", "out_dir of train.py (its newest good checkpoint) or one checkpoint folder")
    prompt: str = flag("", "text to continue, or FILE:path; by default a new document")
    max_new_tokens: int = flag(200, "tokens to add; a sample ends earlier where the model ends the document")
    temperature: float = flag(0.8, "divides the logits; 0 takes the likeliest token each time")
    top_k: int | None = flag(None, "draw from the k likeliest tokens only")
    top_p: float | None = flag(None, "draw from the fewest tokens whose probabilities reach p")
    num_samples: int = flag(1, "independent samples, an empty line between them")
    seed: int = flag(0, "of the draws")
    device: str = flag("auto", "cuda, mps or cpu; auto is the best there is", ["auto", "cuda", "mps", "cpu"])
    dtype: str = flag("float32", "of weights and activations", ["float32", "bfloat16"])
    compile: bool = flag(False, "compile the step of a token: a minute at the start, for long texts")

def main(config: Config):
    if config.max_new_tokens < 1 or config.num_samples < 1 or not config.temperature >= 0:
        raise ValueError("--max_new_tokens and --num_samples must be positive, --temperature not negative")
    top_k, top_p = config.top_k, config.top_p
    if top_k is not None and top_k < 1 or top_p is not None and not 0 < top_p <= 1:
        raise ValueError("--top_k must be positive, --top_p in (0, 1]")
    prompt = config.prompt
    if prompt.startswith("FILE:"):
        try:
            with open(prompt[5:], encoding="utf-8") as f:
                prompt = f.read()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"cannot read the prompt: {e}") from None
    device = pick_device(config.device)

    folder = checkpoint_folder(config.ckpt)
    tokenizer = Tokenizer.load(os.path.join(folder, "tokenizer.json"))
    model, _ = load_folder(folder)
    head = model.lm_head.weight.detach()[:tokenizer.vocab_size]         # rows of --vocab_size beyond are none
    model.lm_head.weight = torch.nn.Parameter(head)
    model.to(device, getattr(torch, config.dtype))
    start = [tokenizer.eot, *tokenizer.encode(prompt)]                  # as every document in training
    idx = torch.tensor([start] * config.num_samples, device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    rows = generate(model, idx, config.max_new_tokens, config.temperature, top_k, top_p, generator,
                          tokenizer.eot, step=compile_step(model) if config.compile else None).tolist()
    for i, row in enumerate(rows):
        new = row[len(start):]
        end = new.index(tokenizer.eot) if tokenizer.eot in new else len(new)
        print(("\n" if i else "") + prompt + tokenizer.decode(new[:end]))

if __name__ == "__main__":
    command(lambda: main(Config(**parse(Config, sys.argv[1:], __doc__))))
