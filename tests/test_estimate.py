"""estimate.py: counts of what a compression multiplies."""
import itertools

import pytest
import torch
from small_models import small

from compress import Config
from nanolost import estimate
from nanolost.covariance import linears
from nanolost.estimate import Rates, counts_of, duration, rates, seconds_of

MODEL = dict(n_embd=48, n_ffn=64, n_head=4, n_kv_head=2, n_layer=3)

def test_counts_are_sums_over_the_layers_and_over_the_inputs_that_they_share():
    model = small(**MODEL)
    counts = counts_of(model)
    assert counts.values == sum(linear.weight.numel() for linear in linears(model).values())
    # of qkv, o and gate_up 48, of down 64
    assert counts.inputs_squared == 3 * (3 * 48 ** 2 + 64 ** 2)
    assert counts.inputs_cubed == 3 * (3 * 48 ** 3 + 64 ** 3)
    # q, k, v, o, gate, up, down
    sides = [48, 24, 24, 48, 64, 64, 48]
    assert counts.outputs_squared == 3 * sum(m ** 2 for m in sides)
    assert counts.outputs_cubed == 3 * sum(m ** 3 for m in sides)
    inputs = [48] * 6 + [64]
    assert counts.sides == 3 * sum(m * n * (m + n) for m, n in zip(sides, inputs, strict=True))
    assert counts.short_cubed == 3 * (5 * 48 ** 3 + 2 * 24 ** 3)

def settled(**flags):
    given = dict(calibration_tokens=1000, gradient_tokens=500, loop_tokens=10_000, closed_loop=False)
    return Config(**{**given, **flags})

def test_more_text_and_a_closed_loop_take_longer_and_a_faster_machine_less():
    model = small(**MODEL)
    slow = Rates(1e9, 1e9)
    once = seconds_of(settled(), model, slow)
    assert seconds_of(settled(calibration_tokens=2000), model, slow)["statistics"] > once["statistics"]
    looped = seconds_of(settled(closed_loop=True), model, slow)
    assert "closed loop" not in once and set(looped) == {*once, "closed loop"}
    # more text for the gradients too, and more of the loop's own
    assert seconds_of(settled(gradient_tokens=1000), model, slow)["statistics"] > once["statistics"]
    longer = seconds_of(settled(closed_loop=True, loop_tokens=20_000), model, slow)
    assert longer["closed loop"] > looped["closed loop"]
    # products of the text are in float32, factorisations in float64
    double = seconds_of(settled(), model, Rates(1e9, 2e9))
    assert double["statistics"] == once["statistics"]
    assert double["compression"] == pytest.approx(once["compression"] / 2)
    faster = seconds_of(settled(), model, Rates(2e9, 2e9))
    assert faster == {name: pytest.approx(value / 2) for name, value in once.items()}
    walk = seconds_of(settled(form="sparse", method="walk"), model, slow)["compression"]
    assert walk < seconds_of(settled(form="sparse"), model, slow)["compression"]
    # in the loop zeros are split again, at the least
    split = seconds_of(settled(form="sparse"), model, slow)["compression"]
    zeros = seconds_of(settled(form="sparse", closed_loop=True), model, slow)["closed loop"]
    assert zeros - looped["closed loop"] == pytest.approx(split - walk)
    # nothing is said of what was never timed
    assert seconds_of(settled(method="plain"), model, slow) == {}

def test_a_rate_is_what_a_product_takes(monkeypatch):
    monkeypatch.setattr(estimate, "SIDE", 128)
    # a product of 128 × 128 matrices four times, in a second by this clock
    clock = itertools.count()
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))
    assert rates(torch.device("cpu")) == (8 * 128 ** 3, 8 * 128 ** 3)

def test_durations_are_read_as_people_say_them():
    assert [duration(value) for value in (7.2, 90, 5400)] == ["7 s", "1.5 min", "1.5 h"]
