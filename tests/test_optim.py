"""optim.py: who is updated by what, at which rate, with which gradient."""
import pytest
import torch
from conftest import continue_from, files_of, losses, metrics

import train
from model import Llama
from nanolost import optim
from nanolost.checkpoint import load_model
from nanolost.methods import build_model, settings_of
from nanolost.optim import build_optimizers, flat_gradients, lr_at, set_rates

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_parameter_is_in_one_group_and_only_matrices_decay(small, optimizer):
    model = build_model(small(vocab_size=257, learn_gamma=True), "cpu")
    optimizers = build_optimizers(model, small(optimizer=optimizer))
    groups = [group for o in optimizers for group in o.param_groups]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, model.parameters()))
    assert all((g["weight_decay"] > 0) == (p.dim() == 2) for g in groups for p in g["params"])
    named = dict(model.named_parameters())
    blocks = {name for name, p in named.items() if name.startswith("model.layers.") and p.dim() == 2}
    # Muon has the blocks' matrices, and only those
    own = groups[-1] if optimizer == "muon" else groups[0]
    assert {name for name, p in named.items() if any(p is q for q in own["params"])} == blocks

def test_a_parameter_that_is_in_no_group_is_a_mistake(small, monkeypatch):
    def without_vectors(groups, config):
        return [torch.optim.SGD(groups["blocks"] + groups["embeddings"], lr=config.lr)]
    monkeypatch.setitem(optim.OPTIMIZERS, "adamw", without_vectors)
    with pytest.raises(AssertionError, match="in no group"):
        build_optimizers(build_model(small(vocab_size=257), "cpu"), small())

def test_frozen_parameters_are_left_out(small):
    model = build_model(small(vocab_size=257), "cpu")
    model.model["embed_tokens"].weight.requires_grad_(False)
    optimizers = build_optimizers(model, small())
    stepped = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert not any(p is model.model["embed_tokens"].weight for p in stepped)
    assert flat_gradients(model).numel() == sum(p.numel() for p in stepped)

# --- rates ---

def test_the_learning_rate_warms_up_and_falls_as_a_cosine_to_its_floor(small):
    config = small(steps=100, warmup=10, lr=1.0, min_lr_ratio=0.1)
    rates = [lr_at(step, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[54] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert lr_at(200, config) == pytest.approx(0.1) and lr_at(10, config, peak=3.0) == 3.0

@pytest.mark.parametrize("warmup, steps", [(0, 1), (1, 1), (0, 8), (8, 8)])
def test_a_schedule_without_warm_up_or_of_warm_up_alone_has_a_rate_for_each_step(small, warmup, steps):
    config = small(steps=steps, warmup=warmup, lr=1.0)
    assert all(0 < lr_at(step, config) <= 1 for step in range(1, steps + 2))

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_embedding_head_vectors_and_gamma_have_a_rate_of_their_own(small, optimizer):
    def rates(**given):
        config = small(optimizer=optimizer, lr=1e-2, learn_gamma=True, vocab_size=257, **given)
        model = build_model(config, "cpu")
        optimizers = build_optimizers(model, config)
        # the end of the warm-up: the peak
        set_rates(optimizers, config.warmup, config)
        of = {id(p): group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
        return {name: of[id(p)] for name, p in model.named_parameters()}
    for name, rate in rates(aux_lr=1e-4).items():
        matrix = name.startswith("model.layers.") and not name.endswith((".gamma", "norm.weight"))
        assert rate == (1e-2 if matrix else 1e-4), name
    assert any(name.endswith(".gamma") for name in rates())
    assert set(rates().values()) == {1e-2}

def test_no_rate_of_its_own_means_the_same_losses_as_the_same_rate(small, tmp_path):
    unset = small(learn_gamma=True)
    equal = small(learn_gamma=True, aux_lr=1e-2, out_dir=str(tmp_path / "equal"))
    other = small(learn_gamma=True, aux_lr=1e-3, out_dir=str(tmp_path / "other"))
    for config in (unset, equal, other):
        train.main(config)
    assert losses(unset) == losses(equal) != losses(other)
    # the log tells the blocks' rate
    logged, same = ([record["lr"] for record in metrics(config, "train")] for config in (other, unset))
    assert logged == same

# --- gradients ---

def test_accumulated_gradients_equal_those_of_the_whole_batch(small):
    model = build_model(small(vocab_size=257), "cpu")
    x, y = torch.randint(257, (2, 4, 32))
    gradients = []
    for micro in (4, 2, 1):
        flat = flat_gradients(model)
        for a, b in zip(x.split(micro), y.split(micro), strict=True):
            (model(a, b)[1] * micro / 4).backward()
        gradients.append(flat.clone())
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()
    assert (gradients[0] - gradients[2]).norm() <= 1e-5 * gradients[0].norm()

def test_clipping_scales_a_long_gradient_and_leaves_a_short_one():
    gradient = torch.tensor([3.0, 4.0])
    for limit, expected in ((10.0, [3, 4]), (0.0, [3, 4]), (1.0, [0.6, 0.8])):
        found = gradient.clone()
        optim.clip([found], 5.0, limit)
        assert found.tolist() == pytest.approx(expected)

def test_clipping_comes_after_the_sum_over_micro_batches(small, tmp_path):
    whole = small(micro_batch=8, grad_clip=0.01)
    split = small(micro_batch=1, grad_clip=0.01, out_dir=str(tmp_path / "split"))
    train.main(whole)
    train.main(split)
    norms = [entry["grad_norm"] for entry in metrics(whole, "train")]
    assert [entry["grad_norm"] for entry in metrics(split, "train")] == pytest.approx(norms, rel=1e-4)
    # the norm before clipping
    assert min(norms) > 0.01

def test_the_optimizer_sees_the_clipped_gradient(small, monkeypatch):
    seen, real = [], torch.optim.AdamW.step
    def step(self, *args, **kwargs):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        seen.append(torch.cat(gradients).norm().item())
        return real(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train.main(small(grad_clip=0.01))
    assert seen == pytest.approx([0.01] * 8, rel=1e-4)

# --- a new one ---

def sgd(groups, config):
    """Plain momentum for every parameter, all of one rate."""
    parameters = groups["blocks"] + groups["embeddings"] + groups["vectors"]
    return [torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum)]

@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_an_optimizer_is_added_by_one_function_and_one_line(small, tmp_path, monkeypatch, momentum):
    monkeypatch.setitem(optim.OPTIMIZERS, "sgd", sgd)
    choices = dict(optimizer="sgd", lr=0.1, momentum=momentum)
    straight = small(**choices, steps=24, save_every=12)
    train.main(straight)
    assert losses(straight)[-1][1] < losses(straight)[0][1] - 0.3
    # without momentum there is no state, and that resumes too
    half = small(**choices, steps=24, save_every=12, out_dir=str(tmp_path / "half"))
    continue_from(straight, half, 12)
    assert losses(half) == losses(straight) and files_of(half, 24) == files_of(straight, 24)

def test_the_command_line_knows_an_optimizer_that_was_added(monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "sgd", sgd)
    assert train.parse(train.Config, ["--optimizer=sgd"]) == {"optimizer": "sgd"}

# --- γ ---

@pytest.mark.parametrize("towards", [1, 0])
def test_a_gamma_that_is_pushed_out_of_its_range_counts_as_its_end_and_loads(small, monkeypatch, towards):
    forward = Llama.forward
    def pushed(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        if torch.is_grad_enabled():
            gammas = [p for name, p in self.named_parameters() if name.endswith(".gamma")]
            loss = loss + (1 - 2 * towards) * sum(gammas)
        return logits, loss
    config = small(learn_gamma=True, gamma=0.9 if towards else 0.1, lr=3e-2, steps=60, eval_every=60,
                   save_every=60)
    with monkeypatch.context() as patch:
        patch.setattr(Llama, "forward", pushed)
        train.main(config)
    model, state = load_model(config.out_dir)
    assert state["step"] == 60
    layers = settings_of(model)
    assert len(layers) == 14 and {layer["gamma"] for layer in layers.values()} == {towards}
    inside = metrics(config, "eval")[-1]["layers"]
    assert {layer["gamma"] for layer in inside.values()} == {towards}
    # and the run goes on
    train.main(small(**{**vars(config), "steps": 62}))
    assert load_model(config.out_dir)[1]["step"] == 62
