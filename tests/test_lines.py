"""lines.py: JSON lines become rows that end, of which the completions alone are learned."""
import gzip
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from small_models import all_logits, small
from test_rows import ALONE, FULL, put_pairs, some_pairs

from nanolost import run
from nanolost.covariance import batches, is_text
from nanolost.documents import Pair
from nanolost.errors import UserError
from nanolost.lines import LineDataset
from nanolost.loop import Validation, accumulate, evaluate, shares
from nanolost.rows import Examples
from nanolost.settings import FIXED
from nanolost.tokenizer import Tokenizer

BYTES = Tokenizer.named("byte")
EOT = BYTES.eot
texts = st.text(alphabet="abcé", max_size=30)

def put_lines(path, lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)

def dataset(path, pairs, longest=128, tokenizer=BYTES) -> LineDataset:
    return LineDataset(put_pairs(path / "a.jsonl", pairs), tokenizer, longest)

def named(before, after) -> Tokenizer:
    """Bytes with other tokens around a text."""
    tokenizer = Tokenizer.named("byte")
    tokenizer.before = before
    tokenizer.after = after
    tokenizer.start = before or [EOT]
    return tokenizer

# --- one line ---

@given(prompt=texts, completion=texts)
def test_a_line_that_fits_is_whole_and_ends(prompt, completion):
    found = Examples(BYTES, 200)(Pair(prompt, completion))
    assert found.tokens.tolist() == [EOT, *prompt.encode(), *completion.encode(), EOT]
    assert found.first == 1 + len(prompt.encode()) and not found.cut and not found.unfinished
    text = Examples(BYTES, 200)(prompt)
    assert text.tokens.tolist() == [EOT, *prompt.encode(), EOT] and text.first == 1

@given(prompt=texts, completion=texts, longest=st.integers(4, 60))
def test_what_is_too_long_loses_the_beginning_of_its_prompt_first(prompt, completion, longest):
    found = Examples(BYTES, longest)(Pair(prompt, completion))
    prompt, completion = prompt.encode(), completion.encode()
    tokens = found.tokens.tolist()
    known, learned = tokens[1:found.first], tokens[found.first:]
    assert tokens[0] == EOT and len(tokens) <= longest and len(learned) >= 1
    assert known == [*prompt[len(prompt) - len(known):]] and found.cut == (len(known) < len(prompt))
    assert learned == [*completion, EOT][:len(learned)]
    assert found.unfinished == (len(learned) <= len(completion))
    # nothing is lost that there is room for
    if found.cut or found.unfinished:
        assert len(tokens) == longest
    # a prompt gives all that it can spare before a completion loses its end
    if found.unfinished:
        assert len(known) == min(len(prompt), (longest - 2) // 2)

def test_a_prompt_is_what_a_sample_begins_with_and_the_border_is_none_inside_a_token():
    tokenizer = Tokenizer.of([*(bytes([byte]) for byte in range(256)), b"ab"], name="test")
    found = Examples(tokenizer, 9)(Pair("a", "b"))
    assert found.tokens.tolist() == [257, 97, 98, 257] and found.first == 2

def test_the_post_processor_has_its_say_and_end_of_text_comes_once():
    for after, end in (([], [EOT]), ([EOT], [EOT]), ([7], [7, EOT])):
        found = Examples(named([], after), 9)(Pair("ab", "c"))
        assert found.tokens.tolist() == [*b"abc", *end] and found.first == 2
    # nothing predicts the first token
    assert Examples(named([], []), 9)(Pair("", "c")).first == 1

def test_a_row_without_room_for_a_pair_is_refused():
    assert len(Examples(BYTES, 4)(Pair("abc", "def")).tokens) == 4
    with pytest.raises(UserError, match="--seq_len 3: 2 tokens stand around a text; use 4 or more"):
        Examples(BYTES, 3)

# --- a file ---

def literally(pairs, seq_len):
    """Inputs and targets, a token at a time."""
    x, y = [], []
    for prompt, completion in pairs:
        ids = [EOT, *prompt.encode(), *completion.encode(), EOT]
        known = 1 + len(prompt.encode())
        x.append([ids[i] if i < len(ids) else EOT for i in range(seq_len)])
        y.append([ids[i + 1] if known <= i + 1 < len(ids) else -1 for i in range(seq_len)])
    return torch.tensor(x), torch.tensor(y)

def test_batches_are_the_lines_in_any_order(tmp_path):
    pairs = [Pair(p[:9], c) for p, c in some_pairs(40)]
    data = dataset(tmp_path, pairs)
    longest = max(len(p) + len(c) + 2 for p, c in pairs)
    assert len(data) == 40 and data.seq_len == math.ceil(longest / 8) * 8 and data.row
    chosen = np.array([7, 0, 39, 7])
    x, y = data.batch(chosen)
    wanted = literally([pairs[i] for i in chosen], data.seq_len)
    assert torch.equal(x, wanted[0]) and torch.equal(y, wanted[1])
    counts = [len(c) + 1 for _, c in pairs]
    assert data.targets(chosen.reshape(2, 2)).tolist() == [[counts[7], counts[0]], [counts[39], counts[7]]]
    for targets in (0, counts[0] - 1, counts[0], sum(counts[:20]), sum(counts), 10**6):
        assert data.samples_for(targets) == sum(sum(counts[:n + 1]) <= targets for n in range(40))
    assert data.cut == data.unfinished == 0

def test_texts_and_pairs_may_stand_in_one_file_and_what_is_cut_is_counted(tmp_path):
    lines = [{"text": "abc"}, {"prompt": "p" * 30, "completion": "c", "id": 1}, {"text": "t" * 30},
             {"prompt": "p", "completion": "", "text": "wins"}, {"prompt": "p", "completion": ""},
             {"prompt": "p" * 30, "completion": "c"}]
    data = LineDataset(put_lines(tmp_path / "a.jsonl", lines), BYTES, 13)
    # a multiple of 8 only where there is room
    assert len(data) == 6 and data.seq_len == 13 and (data.cut, data.unfinished) == (2, 1)
    assert data.targets(range(6)).tolist() == [4, 2, 12, 5, 1, 2]

def test_a_line_takes_two_bytes_a_token_and_twelve(tmp_path):
    data = dataset(tmp_path, some_pairs(200))
    tokens = sum(len(p) + len(c) + 2 for p, c in some_pairs(200))
    # the end of the last row is one number more
    assert data.tokens.nbytes + data.starts.nbytes + data.first.nbytes == 2 * tokens + 12 * 200 + 8

def test_packed_lines_are_the_same_set(tmp_path):
    path = put_pairs(tmp_path / "a.jsonl", some_pairs(9))
    raw = b"\xef\xbb\xbf" + open(path, "rb").read().replace(b"\n", b"\n\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(raw))
    wanted = LineDataset(path, BYTES, 128)
    for name in ("b.jsonl.gz", "b.jsonl.zst"):
        data = LineDataset(str(tmp_path / name), BYTES, 128)
        assert data.fingerprint == wanted.fingerprint
        assert torch.equal(data.batch([3])[0], wanted.batch([3])[0])

def test_a_resumed_run_refuses_another_set_tokenizer_or_cut(tmp_path):
    pairs = some_pairs(9)
    # neither merges anything in these lines
    ours, other = (Tokenizer.of([*(bytes([byte]) for byte in range(256)), token], name="test")
                   for token in (b"yy", b"zz"))
    first = dataset(tmp_path, pairs, tokenizer=ours)
    # more room than any line needs changes nothing
    assert dataset(tmp_path, pairs, 500, ours).fingerprint == first.fingerprint
    moved = [Pair(p + c[:1], c[1:]) for p, c in pairs]
    another = [Pair(p, "z" + c[1:]) for p, c in pairs]
    assert torch.equal(dataset(tmp_path, pairs, 128, other).batch([0])[0], first.batch([0])[0])
    for lines, longest, tokenizer in ((another, 128, ours), (moved, 128, ours), (pairs, 30, ours),
                                      (pairs, 128, other), (pairs[:8], 128, ours)):
        changed = dataset(tmp_path, lines, longest, tokenizer)
        before, now = {"data": [first.fingerprint]}, {"data": [changed.fingerprint]}
        with pytest.raises(UserError, match="^data was .*use another --out_dir"):
            run.check_same_run(before, now, FIXED, print)
    first.check_tokenizer(ours, "a.jsonl", "out")
    with pytest.raises(UserError, match="another tokenizer"):
        first.check_tokenizer(other, "a.jsonl", "out")

def test_an_id_outside_the_model_is_refused(tmp_path):
    data = dataset(tmp_path, some_pairs(3))
    data.check_ids(EOT + 1)
    with pytest.raises(UserError, match="a.jsonl needs token 256, the model's last is 255"):
        data.check_ids(EOT)
    data.pad = 300
    with pytest.raises(UserError, match="needs token 300"):
        data.check_ids(EOT + 1)

# --- bad lines ---

GOOD = b'{"prompt": "a", "completion": "b"}'
NO_PAIR = 'is not a JSON object with "prompt" and "completion", or "text"'

@pytest.mark.parametrize("line, fault", [
    (b'{"prompt": "a"}', NO_PAIR), (b'{"instruction": "a", "output": "b"}', NO_PAIR),
    (b'["a", "b"]', NO_PAIR), (b'{"prompt": "a", "compl', NO_PAIR),
    (b'{"prompt": "a", "completion": 1}', 'has a "completion" that is no string'),
    (b'{"prompt": ["a"], "completion": "b"}', 'has a "prompt" that is no string'),
    (b'{"text": null}', 'has a "text" that is no string'),
    (b'{"prompt": "\\ud800", "completion": "b"}', "is not UTF-8"),
    (b'{"text": "\xff"}', "is not UTF-8"),
    (b'{"text": ""}', "is empty"), (b'{"prompt": "", "completion": ""}', "is empty"),
    (b'{"prompt": "a", "choices": ["b", "c"], "answer": 0}', "has choices, which are for an evaluation: give "
                                                             "the file to --eval"),
])
def test_a_bad_line_is_refused_by_file_and_number(tmp_path, line, fault):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    with pytest.raises(UserError) as error:
        LineDataset(str(path), BYTES, 99)
    said = str(error.value)
    assert said.startswith(f"{path}:3: {fault}") and said.endswith("; mend or remove it")

def test_a_file_without_lines_is_refused_by_its_name(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n\n")
    (tmp_path / "a.txt").write_bytes(b"a text")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD * 99)[:-9])
    for name, fault in [("empty.jsonl", "holds no document"), ("blank.jsonl", "holds no document"),
                        ("a.txt", "holds no JSON lines"), ("none.jsonl", "No such file"),
                        ("folder.jsonl", "it is a folder"), ("cut.jsonl.gz", ":1: cannot be read"),
                        ("a.csv", "the kinds of input are")]:
        with pytest.raises(UserError, match=fault) as error:
            LineDataset(str(tmp_path / name), BYTES, 128)
        assert name in str(error.value) and "\n" not in str(error.value)

# --- what the loop makes of it ---

def mean_loss(model, pairs) -> tuple[torch.Tensor, int]:
    """Over all targets, a line at a time."""
    total, count = 0.0, 0
    for prompt, completion in pairs:
        ids = torch.tensor([[EOT, *prompt.encode(), *completion.encode(), EOT]])
        known = 1 + len(prompt.encode())
        logits = all_logits(model, ids)[0, known - 1:-1]
        total = total + F.cross_entropy(logits, ids[0, known:], reduction="sum")
        count += ids.shape[1] - known
    return total / count, count

@pytest.mark.parametrize("micro, processes", [(1, 1), (4, 1), (12, 1), (2, 2), (3, 4)])
def test_an_update_is_the_mean_over_all_targets_for_any_split(tmp_path, micro, processes):
    pairs = some_pairs(12)
    data = dataset(tmp_path, pairs)
    model = small(max_seq_len=128)
    loss, _ = mean_loss(model, pairs)
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    samples = np.arange(12).reshape(-1, processes, micro)
    divisors = shares(data.targets(samples))
    state = type("State", (), {"model": model, "autocast": FULL})
    # the gradients of all processes add up in one model
    found = sum(accumulate(state, data, samples[:, rank], divisors[:, rank], "cpu")
                for rank in range(processes))
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradients - wanted).norm() < 1e-5 * wanted.norm()

@pytest.mark.parametrize("micro", [1, 5, 16])
def test_an_evaluation_is_the_mean_over_all_targets(tmp_path, micro):
    pairs = some_pairs(12)
    data = dataset(tmp_path, pairs)
    model = small(max_seq_len=128)
    loss, count = mean_loss(model, pairs)
    found = evaluate(model, Validation.of(data, None, micro, BYTES, 257), FULL, ALONE)
    assert found["val_tokens"] == count and found["val_loss"] == pytest.approx(loss.item(), rel=1e-5)

def test_statistics_are_taken_of_prompts_too_and_of_no_padding(tmp_path):
    pairs = some_pairs(6)
    data = dataset(tmp_path, pairs)
    found = batches(data, np.arange(6), 4, 6, "cpu")
    # nothing is predicted from the last token
    assert sum(int(batch.real.sum()) for batch in found) == sum(len(p) + len(c) + 1 for p, c in pairs)
    assert is_text(data.batch([0])[1])[0].tolist() == [i <= sum(map(len, pairs[0]))
                                                       for i in range(data.seq_len)]
