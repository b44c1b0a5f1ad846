"""What is kept of a document: its tokens in a stream, or a row of a fixed length with its targets, or an
example that ends.

A row follows the tokenizer's post-processor to the letter and is cut or padded to its length, as in the
papers of this line (GaLore, torchrun_main.py: one document a row of 256). Its first token, a prompt and
padding are no targets."""
from typing import NamedTuple

import numpy as np

from nanolost.data import token_dtype
from nanolost.documents import Pair
from nanolost.errors import UserError
from nanolost.tokenizer import Tokenizer

class Encoded(NamedTuple):
    """tokens, targets: (n,); targets None where every token is one. text_bytes: UTF-8 bytes behind the
    tokens; text_tokens: those that are no padding."""

    tokens: np.ndarray
    targets: np.ndarray | None
    text_bytes: int
    text_tokens: int

class Stream:
    """Encodes documents that follow one another without an end."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # two bytes a token instead of tiktoken's four, before they wait for their turn
        self.dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, text: str) -> Encoded:
        # a vocabulary of our own begins a document with end-of-text, a foreign one with what it prescribes
        tokens = self.tokenizer.document(text).astype(self.dtype)
        return Encoded(tokens, None, len(text.encode()), len(tokens))

def ids_of(document: str | Pair, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The ids of a document, and how many of them are its prompt's."""
    encode = tokenizer.encode
    if isinstance(document, str):
        return encode(document), 0
    prompt = encode(document.prompt)
    # at once: LLaMA-2's kind would put a space in front of a completion that is encoded by itself
    whole = encode(document.prompt + document.completion)
    # a token across the border: the model will see the prompt alone before it has to go on
    if whole[:len(prompt)] != prompt:
        whole = prompt + encode(document.completion)
    return whole, len(prompt)

class Rows:
    """Encodes documents as rows of `length` tokens. UserError where no text has room in one."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.tokenizer = tokenizer
        self.length = length
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.bytes = tokenizer.token_bytes()
        edges = len(tokenizer.before) + len(tokenizer.after)
        # a token and its target, and one of the text
        least = max(2, edges + 1)
        if length < least:
            raise UserError(f"--rows {length}: this tokenizer puts {edges} tokens around a text; use {least} "
                            "or more")

    def __call__(self, document: str | Pair) -> Encoded:
        ids, known = ids_of(document, self.tokenizer)
        before = self.tokenizer.before
        after = self.tokenizer.after
        # the text is cut, never what stands around it; so does transformers' truncation=True
        ids = ids[:self.length - len(before) - len(after)]
        text = [*before, *ids, *after]
        tokens = np.full(self.length, self.tokenizer.pad, self.dtype)
        tokens[:len(text)] = text
        targets = np.zeros(self.length, bool)
        # nothing predicts the first token
        first = max(1, len(before) + known)
        targets[first:len(text)] = True
        # special tokens, as padding is, stand for no text
        text_bytes = int(self.bytes[text].sum())
        return Encoded(tokens, targets, text_bytes, len(text))

class Example(NamedTuple):
    """tokens: (n,), without padding; all from place `first` on are targets. cut: whether the prompt lost its
    beginning; unfinished: whether the completion, or the text, lost its end."""

    tokens: np.ndarray
    first: int
    cut: bool
    unfinished: bool

class Examples:
    """Encodes documents as rows of their own lengths, at most `length`, whose last target is end-of-text: a
    model that is fine-tuned on them learns where to stop. UserError where no pair has room in one."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.tokenizer = tokenizer
        self.length = length
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.end = [*tokenizer.after]
        # T5's post-processor puts it there itself
        if tokenizer.eot not in self.end:
            self.end.append(tokenizer.eot)
        edges = len(tokenizer.before) + len(self.end)
        # a token of the prompt, and one of the completion
        if length < edges + 2:
            raise UserError(f"--seq_len {length}: {edges} tokens stand around a text; use {edges + 2} or "
                            "more")

    def __call__(self, document: str | Pair) -> Example:
        ids, known = ids_of(document, self.tokenizer)
        before = self.tokenizer.before
        room = self.length - len(before) - len(self.end)
        completion = len(ids) - known
        # The completion comes first: a prompt loses its beginning, as its end is what the completion follows.
        # But it keeps half of the room, so that no completion stands alone.
        kept = min(known, max(room // 2, room - completion))
        whole = [*before, *ids[known - kept:], *self.end]
        # nothing predicts the first token
        first = max(1, len(before) + kept)
        # what lost its end has not ended: end-of-text goes with it
        tokens = np.array(whole[:self.length], self.dtype)
        return Example(tokens, first, kept < known, len(whole) > self.length)
