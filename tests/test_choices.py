"""choices.py: the likeliest choice, against a loop that asks for each by itself."""
import json
import math
import types

import numpy as np
import pytest
import torch
from small_models import all_logits, small
from test_lines import put_lines
from test_rows import ALONE, FULL

from nanolost import choices as room
from nanolost.choices import Questions, accuracy
from nanolost.errors import UserError
from nanolost.tokenizer import Tokenizer

BYTES = Tokenizer.named("byte")
EOT = BYTES.eot

def some_questions(count: int, seed: int = 0) -> list[dict]:
    """Of two to five choices of one character or more, some of which begin another."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        sizes = rng.integers(1, 6, rng.integers(2, 6)).tolist()
        words = [" " + "".join(rng.choice(list("abé"), size)) for size in sizes]
        if number % 3 == 0:
            words[1] = words[0] + "b"
        prompt = "".join(rng.choice(list("abc "), rng.integers(1, 30)))
        found.append({"prompt": prompt, "choices": words, "answer": int(rng.integers(len(words)))})
    return found

def read(path, lines, longest=64, tokenizer=BYTES) -> Questions:
    return Questions.read(put_lines(path / "q.jsonl", lines), tokenizer, longest)

def job(**changed):
    """Of one process, with other entries."""
    return types.SimpleNamespace(**{**vars(ALONE), **changed})

def merging(*tokens: bytes) -> Tokenizer:
    """Bytes, and `tokens` from id 256 on; end-of-text is the last."""
    return Tokenizer.of([*(bytes([byte]) for byte in range(256)), *tokens], name="test")

def log_likelihood(model, context: list[int], ids: list[int]) -> float:
    """Of the tokens `ids` behind those of `context`, one after the other."""
    logits = all_logits(model, torch.tensor([[*context, *ids]]))[0].double()
    return sum(logits[len(context) + i - 1].log_softmax(-1)[word].item() for i, word in enumerate(ids))

@torch.no_grad()
def literally(model, lines, context_of=lambda prompt: [EOT, *prompt.encode()]):
    """Scores of all choices, and what `accuracy` says, of bytes."""
    scores, right, right_norm = [], [], []
    for line in lines:
        own = [log_likelihood(model, context_of(line["prompt"]), [*c.encode()]) for c in line["choices"]]
        norm = [score / (len(c.encode()) - 1) for score, c in zip(own, line["choices"], strict=True)]
        scores += own
        right.append(own.index(max(own)) == line["answer"])
        right_norm.append(norm.index(max(norm)) == line["answer"])
    error = np.std(right, ddof=1) / math.sqrt(len(lines))
    return scores, {"accuracy": np.mean(right), "accuracy_norm": np.mean(right_norm), "stderr": error,
                    "questions": len(lines)}

@pytest.fixture
def scores(monkeypatch):
    """The scores that were compared, of all choices, raw ones and then by length."""
    found = []
    compare = room.share_right
    def watched(values, questions):
        found.append(values.tolist())
        return compare(values, questions)
    monkeypatch.setattr(room, "share_right", watched)
    return found

@pytest.fixture(scope="module")
def model():
    return small(max_seq_len=64)

# --- what is computed ---

@pytest.mark.parametrize("micro", [1, 2, 7, 500])
def test_scores_are_those_of_each_choice_by_itself_for_any_micro_batch(tmp_path, model, scores, micro):
    lines = some_questions(23)
    found = accuracy(model, read(tmp_path, lines), micro, FULL, ALONE)
    wanted_scores, wanted = literally(model, lines)
    assert found == pytest.approx(wanted, rel=1e-12) and scores[0] == pytest.approx(wanted_scores, rel=1e-5)
    assert 0 < found["accuracy"] < 1 and found["accuracy"] != found["accuracy_norm"]

@pytest.mark.parametrize("world", [2, 3, 40])
def test_the_shares_of_all_processes_are_the_whole(tmp_path, model, world):
    questions = read(tmp_path, some_questions(11))
    whole = accuracy(model, questions, 4, FULL, ALONE)
    parts = []
    def keep(tensor):
        parts.append(tensor.clone())
        return tensor
    for rank in range(world):
        accuracy(model, questions, 4, FULL, job(rank=rank, world=world, sum=keep))
    # no choice twice
    assert sum((part != 0).sum().item() for part in parts) == len(questions.lengths)
    # one that reads nothing itself
    idle = job(rank=10**6, sum=lambda tensor: sum(parts))
    assert accuracy(model, questions, 4, FULL, idle) == whole

def test_an_accuracy_that_is_asked_to_stop_is_none(tmp_path, model):
    questions = read(tmp_path, some_questions(5))
    # the model is not even run
    assert accuracy(None, questions, 2, FULL, job(asked=["SIGTERM"])) is None
    def others(tensor):
        tensor[-1] += 1
        return tensor
    assert accuracy(model, questions, 2, FULL, job(sum=others)) is None

def test_choices_of_a_token_are_read_off_one_pass_over_their_prompt(tmp_path, monkeypatch):
    lines = [{"prompt": "a", "choices": ["b", "bc"], "answer": 0},
             {"prompt": "abc", "choices": [" x", "d", "e"], "answer": 1}]
    questions = read(tmp_path, lines, tokenizer=merging(b" x"))
    assert [reading.ids for reading in questions.readings] == [[257, *b"abc"], [257, *b"ab"]]
    rows = []
    head_loss = room.head_loss
    def watched(head, hidden, targets, nats):
        rows.append(hidden.shape)
        return head_loss(head, hidden, targets, nats)
    monkeypatch.setattr(room, "head_loss", watched)
    accuracy(small(vocab_size=258), questions, 8, FULL, ALONE)
    # the head sees what predicts a choice's token, and nothing else
    assert rows == [(6, 32)]

def test_a_token_across_the_border_is_none(tmp_path, scores):
    line = {"prompt": "xa", "choices": ["bc", "c"], "answer": 0}
    model = small(vocab_size=259)
    accuracy(model, read(tmp_path, [line], tokenizer=merging(b"ab", b"bc")), 8, FULL, ALONE)
    context = [258, *b"xa"]
    wanted = [log_likelihood(model, context, [257]), log_likelihood(model, context, [*b"c"])]
    assert scores[0] == pytest.approx(wanted, rel=1e-5)

def uniform():
    """A model to which all tokens are equally likely."""
    model = small(max_seq_len=64)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model

def said(path, lines, model):
    return accuracy(model, read(path, lines), 4, FULL, ALONE)

def test_a_length_is_in_bytes_without_the_space_in_front(tmp_path, scores):
    lines = [{"prompt": "p", "choices": [" a", " aaa", "é", " "], "answer": 1}] * 4
    found = said(tmp_path, lines, uniform())
    token = -math.log(257)
    raw = [2 * token, 4 * token, 2 * token, token]
    assert scores[0][:4] == pytest.approx(raw, rel=1e-6)
    by_length = [2 * token, 4 / 3 * token, token, token]
    assert scores[1][:4] == pytest.approx(by_length, rel=1e-6)
    assert found["accuracy"] == found["accuracy_norm"] == found["stderr"] == 0

@pytest.mark.parametrize("answer", [0, 1])
def test_of_equal_choices_the_first_is_taken(tmp_path, answer):
    found = said(tmp_path, [{"prompt": "p", "choices": [" a", " b", " a"], "answer": answer}], uniform())
    assert found == {"accuracy": 1 - answer, "accuracy_norm": 1 - answer, "stderr": None, "questions": 1}

def test_a_model_of_no_numbers_knows_no_answer(tmp_path):
    model = uniform()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    found = said(tmp_path, [{"prompt": "p", "choices": [" a", " b"], "answer": 0}] * 3, model)
    assert found["accuracy"] == found["accuracy_norm"] == 0

# --- what is read ---

def test_a_prompt_that_is_too_long_loses_its_beginning(tmp_path, model, scores):
    lines = some_questions(12)
    longest = 12
    questions = read(tmp_path, lines, longest)
    accuracy(model, questions, 4, FULL, ALONE)
    wanted = []
    cut = 0
    for line in lines:
        prompt = line["prompt"].encode()
        # all tokens but the last of a choice are read, and what begins a text
        rooms = [longest - 1 - (len(choice.encode()) - 1) for choice in line["choices"]]
        cut += min(rooms) < len(prompt)
        for choice, size in zip(line["choices"], rooms, strict=True):
            known = [*prompt[max(0, len(prompt) - size):]]
            wanted.append(log_likelihood(model, [EOT, *known], [*choice.encode()]))
    assert scores[0] == pytest.approx(wanted, rel=1e-5)
    assert questions.cut == cut and 0 < cut < 12
    assert max(len(reading.ids) for reading in questions.readings) == longest

def test_something_predicts_the_first_token(tmp_path, model, scores):
    tokenizer = Tokenizer.named("byte")
    tokenizer.before = []
    lines = [{"prompt": prompt, "choices": [" a", "bcd"], "answer": 0} for prompt in ("", "p", "pqrs")]
    questions = read(tmp_path, lines, 3, tokenizer)
    accuracy(model, questions, 4, FULL, ALONE)
    contexts = [[[EOT], [EOT]], [[*b"p"], [*b"p"]], [[*b"rs"], [*b"s"]]]
    wanted = [log_likelihood(model, context, [*choice]) for own in contexts
              for context, choice in zip(own, (b" a", b"bcd"), strict=True)]
    assert scores[0] == pytest.approx(wanted, rel=1e-5) and questions.cut == 1

@pytest.mark.parametrize("before, room_for", [([], 3), ([EOT], 3), ([EOT, EOT], 2)])
def test_a_choice_is_never_cut(tmp_path, before, room_for):
    tokenizer = Tokenizer.named("byte")
    tokenizer.before = before
    def line(size):
        return {"prompt": "pq", "choices": ["a", "a" * size], "answer": 0}
    read(tmp_path, [line(room_for)], 3, tokenizer)
    with pytest.raises(UserError, match=f"q.jsonl:2: has a choice of {room_for + 1} tokens, too long"):
        read(tmp_path, [line(1), line(room_for + 1)], 3, tokenizer)

GOOD = {"prompt": "p", "choices": ["a", "b"], "answer": 1}

@pytest.mark.parametrize("changed, fault", [
    ({"choices": None}, 'has "choices" that are no list of two or more'),
    ({"choices": "ab"}, 'has "choices" that are no list of two or more'),
    ({"choices": ["a"]}, 'has "choices" that are no list of two or more'),
    ({"choices": ["a", 1]}, 'has a "choice" that is no string'),
    ({"choices": ["a", ""]}, "has a choice that is empty"),
    ({"choices": ["a", "\ud800"]}, "is not UTF-8"),
    ({"prompt": 3}, 'has a "prompt" that is no string'),
    ({"answer": 2}, 'has an "answer" that is no number from 0 to 1'),
    ({"answer": -1}, 'has an "answer" that is no number from 0 to 1'),
    ({"answer": "1"}, 'has an "answer" that is no number from 0 to 1'),
    ({"answer": True}, 'has an "answer" that is no number from 0 to 1'),
    ({"answer": 1.0}, 'has an "answer" that is no number from 0 to 1'),
])
def test_a_bad_question_is_refused_by_file_and_number(tmp_path, changed, fault):
    with pytest.raises(UserError) as error:
        read(tmp_path, [GOOD, {**GOOD, **changed}, GOOD])
    assert str(error.value).endswith(f"q.jsonl:2: {fault}; mend or remove it")

@pytest.mark.parametrize("line, fault", [
    ('{"prompt": "a", "completion": "b"}', 'has no "choices" key: a question has prompt, choices and answer'),
    ('{"choices": ["a", "b"], "answer": 0}', 'has no "prompt" key'),
    ('{"prompt": "a", "choices": ["a", "b"]}', 'has no "answer" key'),
    ("[]", 'is not a JSON object with "prompt", "choices" and "answer"')])
def test_a_line_that_is_no_question_is_refused(tmp_path, line, fault):
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(UserError) as error:
        Questions.read(str(path), BYTES, 64)
    assert f"q.jsonl:3: {fault}" in str(error.value)

def test_a_choice_without_a_token_is_refused(tmp_path, monkeypatch):
    # a normalizer may leave nothing of a space
    tokenizer = Tokenizer.named("byte")
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encode(text.rstrip()))
    with pytest.raises(UserError, match="q.jsonl:1: has a choice that adds no token"):
        read(tmp_path, [{**GOOD, "choices": ["a", " "]}], tokenizer=tokenizer)
