"""experiments/product_muon.py: the product of two factors moves as far as a dense weight would, whatever the
factors' own sizes."""
import copy

import pytest
import torch
from conftest import continue_from, files_of, losses

import train
from experiments import layers, product_muon
from lost import LOSTLinear
from nanolost.methods import build_model
from nanolost.optim import build_optimizers, factor_pairs, parameter_groups

def exact_msign(M):
    U, _, Vt = torch.linalg.svd(M, full_matrices=False)
    return U @ Vt

def one_step(A, B, G, monkeypatch, lr=0.01, weight_decay=0.0):
    """ΔA, ΔB of a first step without momentum, where the gradient of the product is G."""
    monkeypatch.setattr(product_muon, "msign", exact_msign)
    monkeypatch.setattr(product_muon, "FLOOR", 0.0)
    factors = [torch.nn.Parameter(p.clone()) for p in (A, B)]
    factors[0].grad, factors[1].grad = B.T @ G, G @ A.T
    usual = {"lr": lr, "weight_decay": weight_decay, "momentum": 0.0}
    product_muon.ProductMuon([tuple(factors)], usual).step()
    return factors[0].detach() - A, factors[1].detach() - B

def drawn():
    torch.manual_seed(0)
    kind = {"dtype": torch.float64}
    return torch.randn(4, 10, **kind), torch.randn(14, 4, **kind), torch.randn(14, 10, **kind)

def test_an_inverse_root_is_one():
    torch.manual_seed(0)
    X = torch.randn(5, 9)
    root = product_muon.inverse_root(X @ X.T)
    torch.testing.assert_close(root @ X @ X.T @ root, torch.eye(5), atol=0.02, rtol=0)
    assert product_muon.inverse_root(torch.zeros(3, 3)).isfinite().all()

def test_the_product_moves_by_at_most_muon_s_step_of_a_dense_weight(monkeypatch):
    A, B, G = drawn()
    dA, dB = one_step(A, B, G, monkeypatch)
    eta = 0.2 * 0.01 * 14 ** 0.5
    move = B @ dA + dB @ A
    # either term reaches half of it
    for term in (B @ dA, dB @ A):
        assert torch.linalg.matrix_norm(term, 2) == pytest.approx(eta / 2)
    assert eta / 2 < torch.linalg.matrix_norm(move, 2) <= eta * (1 + 1e-9)
    assert (move * G).sum() < 0

def test_the_move_does_not_depend_on_which_factor_is_large(monkeypatch):
    A, B, G = drawn()
    dA, dB = one_step(A, B, G, monkeypatch)
    gauge = torch.diag(torch.tensor([9.0, 3.0, 1.0, 0.2], dtype=torch.float64))
    A2, B2 = gauge @ A, B @ gauge.inverse()
    dA2, dB2 = one_step(A2, B2, G, monkeypatch)
    torch.testing.assert_close(B2 @ dA2, B @ dA)
    torch.testing.assert_close(dB2 @ A2, dB @ A)

def test_the_product_decays_as_a_dense_weight(monkeypatch):
    A, B, G = drawn()
    with monkeypatch.context() as patch:
        dA, dB = one_step(A, B, G, patch, lr=0.5, weight_decay=0.1)
        moved_A, moved_B = one_step(A, B, G, patch, lr=0.5)
    kept = (1 - 0.5 * 0.1) ** 0.5
    torch.testing.assert_close(A + dA - moved_A, kept * A)
    torch.testing.assert_close(B + dB - moved_B, kept * B)

def test_factors_are_its_own_and_other_matrices_are_muon_s(small):
    config = small(optimizer="product", vocab_size=257)
    model = build_model(config, "cpu")
    adam, muon, product = build_optimizers(model, config)
    layers_of = [m for m in model.modules() if isinstance(m, LOSTLinear)]
    assert list(map(id, product.param_groups[0]["params"])) == [
        id(p) for m in layers_of for p in (m.A, m.B)]
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(m.W_s) for m in layers_of}
    assert factor_pairs(build_model(small(linear="dense", vocab_size=257), "cpu")) == []
    # a layer that trains one factor only is left to Muon
    layers_of[0].A.requires_grad_(False)
    assert len(parameter_groups(model)["factors"]) == len(layers_of) - 1

def test_it_trains_saves_and_goes_on_bit_for_bit(small, tmp_path):
    straight = small(optimizer="product")
    train.main(straight)
    assert losses(straight)[-1][1] < losses(straight)[0][1] - 0.3
    half = small(optimizer="product", out_dir=str(tmp_path / "half"))
    continue_from(straight, half, 4)
    assert losses(half) == losses(straight) and files_of(half, 8) == files_of(straight, 8)

def test_a_dense_model_has_none_and_trains_as_with_muon(small, tmp_path):
    own = small(linear="dense", optimizer="product")
    muon = small(linear="dense", optimizer="muon", out_dir=str(tmp_path / "muon"))
    for config in (own, muon):
        train.main(copy.copy(config))
    assert losses(own) == losses(muon)
    assert [layers.script_of(vars(one)) for one in (own, muon)] == ["experiments/layers.py", "train.py"]
