"""Accuracy on questions: {"prompt": …, "choices": [" a", " b", …], "answer": 0}, a JSON object a line, of
which a model answers with the choice that is likeliest behind the prompt.

The measures are lm-eval's (EleutherAI, lm_eval/api/task.py, multiple_choice). `acc`: the largest sum of
log-probabilities of a choice's tokens. `acc_norm`: the largest sum divided by the choice's length; here in
UTF-8 bytes, there in characters. A choice stands behind the prompt as it is, so that it brings its own space;
lm-eval puts that there itself, and neither counts it.

Tokens are those that a model is fine-tuned on (rows.py). A space at the end of a prompt stays there: lm-eval
moves it to the choices, which are then other tokens."""
from typing import NamedTuple

import numpy as np
import torch

from model import Llama
from nanolost.documents import JsonLines, Pair, fault_of
from nanolost.errors import UserError
from nanolost.loss import head_loss
from nanolost.rows import ids_of
from nanolost.tokenizer import Tokenizer

# --- questions ---

class Question(NamedTuple):
    """answer: the index of the right choice. line: its number in the file."""

    prompt: str
    choices: list[str]
    answer: int
    line: int

class QuestionLines(JsonLines):
    """The questions of a file."""

    def __init__(self, path: str):
        super().__init__(path)
        self.wanted = 'a JSON object with "prompt", "choices" and "answer"'

    def _entry(self, entry: dict, path: str, number: int) -> Question:
        for name in ("prompt", "choices", "answer"):
            if name not in entry:
                self._bad(path, number, f'has no "{name}" key: a question has prompt, choices and answer')
        prompt = entry["prompt"]
        choices = entry["choices"]
        answer = entry["answer"]
        if not isinstance(choices, list) or len(choices) < 2:
            self._bad(path, number, 'has "choices" that are no list of two or more')
        faults = [fault_of(prompt, "prompt")]
        for choice in choices:
            # what is empty is likeliest of all
            faults.append(fault_of(choice, "choice") if choice != "" else "has a choice that is empty")
        for fault in filter(None, faults):
            self._bad(path, number, fault)
        # True is an int to Python
        if type(answer) is not int or not 0 <= answer < len(choices):
            self._bad(path, number, f'has an "answer" that is no number from 0 to {len(choices) - 1}')
        return Question(prompt, choices, answer, number)

def length_of(choice: str) -> int:
    """UTF-8 bytes of a choice, without the space that joins it to the prompt."""
    # a choice of a space alone has a length, too
    return max(1, len(choice.removeprefix(" ").encode()))

# --- what a model reads ---

class Choice(NamedTuple):
    """Where a choice stands in what is read: number: among all choices; first: the place of its first token;
    ids: its tokens."""

    number: int
    first: int
    ids: list[int]

class Reading(NamedTuple):
    """ids: what goes into the model; choices: those whose probabilities come out."""

    ids: list[int]
    choices: list[Choice]

def merged(readings: list[Reading]) -> list[Reading]:
    """The readings of one question without those that begin another one: choices of a token each are read
    off a single pass over their prompt."""
    kept = []
    # the longest first, as it can hold others
    for reading in sorted(readings, key=lambda reading: -len(reading.ids)):
        for other in kept:
            if other.ids[:len(reading.ids)] == reading.ids:
                other.choices.extend(reading.choices)
                break
        else:
            kept.append(reading)
    return kept

class Encoder:
    """Makes the readings of a question, of at most `longest` tokens. cut: questions of which a prompt lost
    its beginning."""

    def __init__(self, path: str, tokenizer: Tokenizer, longest: int):
        self.path = path
        self.tokenizer = tokenizer
        self.longest = longest
        self.cut = 0

    def __call__(self, question: Question, number: int) -> list[Reading]:
        """number: of the question's first choice among all."""
        found = []
        cut = False
        for choice in question.choices:
            ids, known = ids_of(Pair(question.prompt, choice), self.tokenizer)
            words = ids[known:]
            # something must predict the first token
            begin = self.tokenizer.before if known else self.tokenizer.start
            # the last token is predicted, but not read
            room = self.longest + 1 - len(begin) - len(words)
            # a token of the prompt, where nothing else stands before the choice
            self._check(question.line, len(words), room if begin else room - 1)
            kept = min(known, room)
            cut |= kept < known
            # the end of the prompt is what a choice follows
            context = [*begin, *ids[known - kept:known]]
            own = Choice(number, len(context), words)
            found.append(Reading([*context, *words[:-1]], [own]))
            number += 1
        self.cut += cut
        return merged(found)

    def _check(self, line: int, tokens: int, room: int):
        # it would be the likeliest of all
        if tokens == 0:
            raise UserError(f"{self.path}:{line}: has a choice that adds no token: mend or remove it")
        # a choice that lost some would be another, and likelier
        if room < 0:
            raise UserError(f"{self.path}:{line}: has a choice of {tokens} tokens, too long for the "
                            f"{self.longest} that are read at most: mend or remove it, or use a larger "
                            "--seq_len as far as the model goes")

class Questions:
    """The questions of a file, encoded. readings: the longest first, so that those of a batch have similar
    lengths. counts: choices of each question; lengths: bytes of each choice; answers: the right choice of
    each question. cut: questions of which a prompt lost its beginning."""

    def __init__(self, questions: list[Question], encode: Encoder):
        self.counts = [len(question.choices) for question in questions]
        self.answers = [question.answer for question in questions]
        lengths = []
        self.readings = []
        for question in questions:
            # so many choices stand before its own
            self.readings += encode(question, len(lengths))
            lengths += map(length_of, question.choices)
        self.lengths = np.array(lengths)
        self.readings.sort(key=lambda reading: -len(reading.ids))
        self.cut = encode.cut

    @classmethod
    def read(cls, path: str, tokenizer: Tokenizer, longest: int) -> "Questions":
        """Those of a file of JSON lines, for a model that reads at most `longest` tokens. UserError for a bad
        line, by its number."""
        questions = [question for _, question in QuestionLines(path).read()]
        return cls(questions, Encoder(path, tokenizer, longest))

    def __len__(self) -> int:
        return len(self.answers)

# --- accuracy ---

def log_likelihoods(model: Llama, readings: list[Reading], context, device) -> tuple[list[int], np.ndarray]:
    """The numbers of the choices of some readings, the longest first, and the sums of the log-probabilities
    of their tokens, float64."""
    longest = len(readings[0].ids)
    x = torch.zeros(len(readings), longest, dtype=torch.int64)
    rows = []
    places = []
    words = []
    for row, reading in enumerate(readings):
        # nothing looks ahead: padding behind a text changes nothing in it
        x[row, :len(reading.ids)] = torch.tensor(reading.ids)
        for choice in reading.choices:
            count = len(choice.ids)
            # a token is predicted at the place before its own
            first = choice.first - 1
            places += range(first, first + count)
            rows += [row] * count
            words += choice.ids
    targets = torch.tensor(words, device=device)
    nats = torch.zeros(len(words), device=device)
    with context:
        hidden = model.hidden(x.to(device))                                                # (B, T, C)
        # the logits of these places alone: those of all would be the largest tensor by far
        head_loss(model.lm_head, hidden[rows, places], targets, nats)
    choices = [choice for reading in readings for choice in reading.choices]
    ends = np.cumsum([len(choice.ids) for choice in choices])
    parts = nats.cpu().double().numpy()
    # the first begins at 0
    sums = -np.add.reduceat(parts, [0, *ends[:-1]])
    return [choice.number for choice in choices], sums

def share_right(scores: np.ndarray, questions: Questions) -> float:
    """The share of questions whose right choice has the largest score, of equal ones the first. scores: of
    all choices, (choices,)."""
    right = 0
    ends = np.cumsum(questions.counts)
    for own, answer in zip(np.split(scores, ends[:-1]), questions.answers, strict=True):
        # a model whose weights are no numbers knows no answer, not the first
        right += bool(np.isfinite(own).all()) and int(own.argmax()) == answer
    return right / len(questions)

@torch.no_grad()
def accuracy(model: Llama, questions: Questions, micro: int, context, job) -> dict | None:
    """{"accuracy", "accuracy_norm", "stderr", "questions"}: lm-eval's acc, acc_norm, and the standard error
    of the first; None for a single question. micro: texts of a forward pass. context: the autocast of the
    run. None if a process was asked to stop meanwhile."""
    scores = torch.zeros(len(questions.lengths) + 1, dtype=torch.float64)
    readings = questions.readings
    # each process takes every world-th batch
    mine = range(job.rank * micro, len(readings), job.world * micro)
    for first in mine:
        if job.asked:
            break
        batch = readings[first:first + micro]
        numbers, sums = log_likelihoods(model, batch, context, job.device)
        scores[numbers] = torch.from_numpy(sums)
    scores[-1] = len(job.asked)
    # choices of one question may have been read by several
    *scores, stops = job.sum(scores).tolist()
    if stops:
        return None
    scores = np.array(scores)
    n = len(questions)
    share = share_right(scores, questions)
    return {
        "accuracy": share,
        "accuracy_norm": share_right(scores / questions.lengths, questions),
        # of a mean of zeros and ones; nothing varies in a single one
        "stderr": (share * (1 - share) / (n - 1)) ** 0.5 if n > 1 else None,
        "questions": n,
    }
