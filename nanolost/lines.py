"""JSON lines as a training set: {"prompt": …, "completion": …}, whose completion alone is learned, or
{"text": …}, all of it.

A line becomes a row of its own (rows.py, `Examples`): what the tokenizer puts before a text, prompt,
completion, end-of-text. Rows are not packed together: no line sees another."""
import hashlib

import numpy as np
import torch

from nanolost.data import TokenDataset, of_rows
from nanolost.documents import JsonLines, Pair
from nanolost.errors import UserError
from nanolost.rows import Examples
from nanolost.tokenizer import Tokenizer

# a row's length is a multiple of it, as kernels like
MULTIPLE = 8

class TrainingLines(JsonLines):
    """The documents of a file of lines to train on."""

    def __init__(self, path: str):
        super().__init__(path)
        self.wanted = 'a JSON object with "prompt" and "completion", or "text"'

    def _entry(self, entry: dict, path: str, number: int) -> str | Pair:
        # its answer would be learned, or the wrong ones
        if "choices" in entry:
            self._bad(path, number, "has choices, which are for an evaluation: give the file to --eval")
        if "text" not in entry and not all(name in entry for name in Pair._fields):
            self._bad(path, number, f"is not {self.wanted}")
        document = super()._entry(entry, path, number)
        # what nobody wrote cannot be learned
        if not any(document):
            self._bad(path, number, "is empty")
        return document

class LineDataset(TokenDataset):
    """The rows of a file of JSON lines, encoded once and kept in memory: two bytes a token (four where the
    vocabulary is above 65,536) and twelve a line, so that a million lines of 100 tokens take 212 MB. For a
    `tokenizer`, with rows of at most `longest` tokens; `seq_len` is what the longest line needs. UserError
    for a bad line, by its number.

    cut: prompts that lost their beginning; unfinished: completions and texts that lost their end."""

    def __init__(self, path: str, tokenizer: Tokenizer, longest: int):
        self.path = path
        # as TokenDataset says it
        self.row = True
        self.cut = 0
        self.unfinished = 0
        self._encode(Examples(tokenizer, longest))
        self.pad = tokenizer.pad
        self.seq_len = self._length(longest)
        self.tokenizer_sha256 = tokenizer.identity()
        self.fingerprint = self._fingerprint()

    def _encode(self, encode: Examples):
        tokens = bytearray()
        ends = []
        first = []
        for _, document in TrainingLines(self.path).read():
            example = encode(document)
            # a list of a million arrays would take more than what is in them
            tokens += example.tokens.tobytes()
            ends.append(len(tokens))
            first.append(example.first)
            self.cut += example.cut
            self.unfinished += example.unfinished
        self.tokens = np.frombuffer(tokens, encode.dtype)
        # one more: the last row ends where one behind it would begin
        self.starts = np.array([0, *ends], np.int64) // encode.dtype.itemsize
        # of each row its first target
        self.first = np.array(first, np.int32)

    def _length(self, longest: int) -> int:
        # a token and its target are the smallest row
        needed = max(2, int(np.diff(self.starts).max()))
        return min(longest, -(-needed // MULTIPLE) * MULTIPLE)

    def _fingerprint(self) -> str:
        """Of what is read: the same for a packed file, another where the tokenizer or a cut is."""
        digest = hashlib.sha256(f"{self.tokenizer_sha256} {self.seq_len}".encode())
        for part in (self.tokens, self.starts, self.first):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.first)

    def check_ids(self, vocab_size: int):
        """UserError for an id, padding too, outside a vocabulary of this size."""
        largest = max(self.pad, int(self.tokens.max()))
        if largest >= vocab_size:
            raise UserError(f"{self.path} needs token {largest}, the model's last is {vocab_size - 1}: the "
                            "tokenizer is not the one that the model was trained with")

    def targets(self, samples) -> np.ndarray:
        """How many targets each sample has: an array of the shape of `samples`."""
        samples = np.asarray(samples)
        lengths = self.starts[samples + 1] - self.starts[samples]
        return lengths - self.first[samples]

    def samples_for(self, targets: int) -> int:
        """How many of the first samples have no more than so many targets together."""
        counts = self.targets(np.arange(len(self)))
        return int(np.searchsorted(counts.cumsum(), targets, side="right"))

    def _rows(self, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = np.full((len(samples), self.seq_len), self.pad, np.int64)
        marks = np.zeros(tokens.shape, bool)
        for row, sample in enumerate(samples.tolist()):
            start, end = self.starts[sample:sample + 2]
            length = end - start
            first = self.first[sample]
            tokens[row, :length] = self.tokens[start:end]
            # the completion and its end
            marks[row, first:length] = True
        return of_rows(tokens, marks)
