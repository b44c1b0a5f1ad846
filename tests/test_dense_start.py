"""dense_start.py: a run that begins dense is that dense run up to its decomposition, and one run on."""
import pytest
import torch
from conftest import continue_from, files_of, lines, losses, metrics, started, updates

import train
from nanolost import dense_start
from nanolost.checkpoint import load_model
from nanolost.errors import UserError
from nanolost.methods import special_layers
from nanolost.settings import resolve

MUON = dict(optimizer="muon", save_every=2)

def test_up_to_the_decomposition_the_run_is_the_dense_one(small, tmp_path):
    dense = small(**MUON, linear="dense", out_dir=str(tmp_path / "dense"))
    begun = small(**MUON, dense_start=0.5)
    for config in (dense, begun):
        train.main(config)
    # the loss of an update is that before it
    assert losses(begun)[:4] == losses(dense)[:4] and losses(begun)[4] != losses(dense)[4]
    # one schedule
    rates, expected = ([line["lr"] for line in metrics(config, "train")] for config in (begun, dense))
    assert rates == expected
    kinds = {step: len(special_layers(load_model(f"{begun.out_dir}/checkpoints/step_{step:08d}")[0]))
             for step in (4, 6, 8)}
    assert kinds == {4: 0, 6: 14, 8: 14}

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_it_goes_on_bit_for_bit_from_before_at_and_after_the_decomposition(small, tmp_path, optimizer):
    given = dict(optimizer=optimizer, save_every=1, keep=9, eval_every=8, steps=4, dense_start=0.5)
    straight = small(**given)
    train.main(straight)
    for step in (1, 2, 3):
        half = small(**given, out_dir=str(tmp_path / f"half-{step}"))
        continue_from(straight, half, step)
        assert lines(half) == lines(straight) and files_of(half, 4) == files_of(straight, 4), step

def test_momenta_go_over_by_the_chain_rule_and_others_stay(small):
    config = small(**MUON, dense_start=0.25, sparsity=0.1)
    with started(config) as (config, state, texts, job):
        updates(config, state, texts, job, 2)
        name = "model.layers.1.mlp.up_proj"
        weight = state.model.get_submodule(name).weight
        G = dense_start.momenta(state)[weight]["momentum_buffer"].clone()
        head = state.model.lm_head.weight
        before = {key: value.clone() for key, value in dense_start.momenta(state)[head].items()}
        assert dense_start.due(state, config)
        dense_start.decompose(state, config, job)
        after = dense_start.momenta(state)
        layer = state.model.get_submodule(name)
        W = (0.7 * layer.B.detach() @ layer.A.detach())
        assert layer.k == 3 and torch.linalg.matrix_rank(W) == 8
        A, B, W_s = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.W_s))
        W = (0.7 * B @ A).index_add(1, layer.index, 0.3 * W_s)
        expected = torch.autograd.grad((W * G).sum(), (A, B, W_s))
        for p, gradient in zip((layer.A, layer.B, layer.W_s), expected, strict=True):
            # momenta are small: the usual absolute tolerance would pass anything
            torch.testing.assert_close(after[p]["momentum_buffer"], gradient, rtol=1e-4, atol=1e-9)
        assert all(torch.equal(after[head][key], before[key]) for key in before)
        # the factors are those of the trained weight
        U, sigma, _ = torch.linalg.svd(weight.detach())
        torch.testing.assert_close((layer.B @ layer.A).norm(), sigma[:8].norm())
        assert not dense_start.due(state, config) and state.began == 0
        assert sum(figures.loss for figures in updates(config, state, texts, job, 1)) > 0

def test_without_it_the_update_is_that_of_every_run(small):
    assert dense_start.updating(small(), None) is None

@pytest.mark.parametrize("given, match", [
    ({"linear": "dense"}, "means nothing with --linear dense"),
    ({"linear": "cola"}, "means nothing with --linear cola"),
    ({"freeze": ["*norm*"]}, "--freeze means nothing with --dense_start"),
    ({"dense_start": 1.0}, r"must lie in \[0, 1\)"),
    ({"init_from": "x", "steps": 3}, "means nothing beside --init_from"),
])
def test_what_it_can_not_be_with_is_refused(given, match):
    with pytest.raises(UserError, match=match):
        resolve({"dense_start": 0.5, **given})
