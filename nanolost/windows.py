"""Windows of a text for an evaluation, with any stride. Each token is a target once, in the first window that
reads it.

Two rules for a window's first token. "shared": a window of N reads N + 1 tokens, of which neighbours share
one, so that only a text's first token is no target; so are the shards of a training cut (data.py). "alone": a
window of N reads N tokens and predicts N - 1 of them; so is WikiText-2 cut in the papers of this field (GPTQ,
Frantar et al. 2022, arXiv 2210.17323), and with a smaller stride in Hugging Face's guide to perplexity."""
import numpy as np
import torch

from nanolost.errors import UserError

RULES = {
    "shared": "a text's first token is no target; neighbouring windows share a token",
    "alone": "the first token of a window is no target",
    # of prepare_c4.py --rows (data.py)
    "row": "a row's first token, its prompt and its padding are no targets",
}

class Windows:
    """Windows of `seq_len` tokens, one every `stride`, of texts (n,) of ids, each by itself; the samples of a
    loop.Validation. What is left behind the last whole window is left out, but a text that is shorter than a
    window is one. UserError where no text has two tokens."""

    def __init__(self, texts: list[np.ndarray], seq_len: int, stride: int, rule: str):
        assert rule in ("shared", "alone") and 1 <= stride <= seq_len, (rule, seq_len, stride)
        self.texts = texts
        self.seq_len = seq_len
        # tokens that a window reads, and those of it that the one before has predicted
        self.reach = seq_len
        if rule == "shared":
            self.reach += 1
        self.seen = self.reach - stride
        # (text, first token) of each window
        self.places = []
        for number, ids in enumerate(texts):
            last = max(0, len(ids) - self.reach)
            # a token and its target are the smallest window
            if len(ids) > 1:
                self.places += [(number, start) for start in range(0, last + 1, stride)]
        if not self.places:
            raise UserError("the text has less than two tokens: nothing can be predicted in it")

    def __len__(self) -> int:
        return len(self.places)

    def samples_for(self, targets: int) -> int:
        """How many of the first windows have no more than so many targets together."""
        counts = []
        for number, start in self.places:
            # a text that is shorter than a window has a first one alone
            new = self.reach - self._first(start)
            counts.append(min(new, len(self.texts[number]) - 1))
        return int(np.searchsorted(np.cumsum(counts), targets, side="right"))

    def _first(self, start: int) -> int:
        """The place in a window, which begins at `start`, of its first target."""
        # nothing predicts a window's first token
        return max(1, self.seen) if start else 1

    def batch(self, samples, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Windows `samples` as inputs and targets, two int64 tensors (len(samples), reach - 1); -1 is no
        target."""
        shape = len(samples), self.reach
        inputs = np.zeros(shape, np.int64)
        targets = np.full(shape, -1, np.int64)
        for row, sample in enumerate(samples):
            number, start = self.places[sample]
            # a text may be shorter than a window: the rest of the row stays padding
            ids = self.texts[number][start:start + self.reach]
            inputs[row, :len(ids)] = ids
            first = self._first(start)
            targets[row, first:len(ids)] = ids[first:]
        x = torch.from_numpy(inputs[:, :-1])
        y = torch.from_numpy(targets[:, 1:])
        return x.to(device), y.to(device)

def standard_error(sums: list[float], sizes: list[float]) -> float | None:
    """Standard error of Σ sums / Σ sizes over windows, by linearization (Cochran, Sampling Techniques, 1977,
    section 6.4); for windows of one size that of the mean of their means. None for a single window: nothing
    varies."""
    n = len(sums)
    total = sum(sizes)
    if n < 2:
        return None
    # ready-made shards without text behind their ids
    if total == 0:
        return None
    ratio = sum(sums) / total
    squares = 0.0
    for value, size in zip(sums, sizes, strict=True):
        squares += (value - ratio * size) ** 2
    # windows of one text are neighbours: where their losses go together, the true error is larger
    return (n / (n - 1) * squares) ** 0.5 / total
