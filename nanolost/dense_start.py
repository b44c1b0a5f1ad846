"""A LOST run that begins dense, so that the decomposition sees weights which know the data: --dense_start.

The SVD of a random weight knows nothing of the text. Here W trains for a share of the updates, is decomposed
where it stands, and A, B and W_s go on under the same schedule, samples and momenta. A checkpoint says itself
which layers it has, so that a run continues on either side."""
import torch
import torch.nn as nn

from nanolost import loop
from nanolost.counts import count_flops
from nanolost.job import Job
from nanolost.methods import METHODS, special_layers

def due(state: loop.State, config) -> bool:
    # below --steps for any share below 1
    return state.step >= int(config.dense_start * config.steps) and not special_layers(state.model)

def momenta(state: loop.State) -> dict[torch.nn.Parameter, dict]:
    """Parameter → its optimizer's state."""
    found = {}
    for optimizer in state.optimizers:
        found |= optimizer.state
    return found

def factor_momenta(layer, G: torch.Tensor) -> dict[torch.nn.Parameter, torch.Tensor]:
    """What the momentum G (out, in) of W is for the parts of the layer that W became: the chain rule through
    γ B A + (1 − γ) W_s, without the slope of a SiLU."""
    gamma = float(layer.bounded_gamma())
    found = {}
    found[layer.A] = gamma * layer.B.T @ G                                                     # (r, in)
    found[layer.B] = gamma * G @ layer.A.T                                                     # (out, r)
    if layer.k:
        found[layer.W_s] = (1 - gamma) * G[:, layer.index]                                     # (out, k)
    return found

@torch.no_grad()
def decompose(state: loop.State, config, job: Job):
    """Make a dense state one of --linear's layers. The moments of AdamW in the blocks begin anew: a square
    has no chain rule."""
    # before the layers that hold them are gone
    weights = {}
    for name, module in state.model.named_modules():
        if isinstance(module, nn.Linear):
            weights[name] = module.weight
    before = momenta(state)
    METHODS[config.linear].convert(state.model, config, (0, 1))
    for tensor in state.model.state_dict().values():
        # two kinds of GPU may round a decomposition differently
        job.broadcast(tensor, 0)
    began = state.began
    state.restart(config)
    # the schedule goes on
    state.began = began
    for name, layer in special_layers(state.model).items():
        # none under AdamW
        G = before[weights[name]].get("momentum_buffer")
        if G is not None:
            for p, own in factor_momenta(layer, G).items():
                before[p] = {"momentum_buffer": own}
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            # those of embedding, head and norms are as they were
            for p in group["params"]:
                if p in before:
                    optimizer.state[p] = before[p]

def updating(config, report: loop.Report):
    """The update of a run: `loop.update`, and before the one that is due the decomposition; None where no run
    is cut so."""
    if not config.dense_start:
        return None
    def update(state, data, samples, config, job):
        if due(state, config):
            decompose(state, config, job)
            # the model is a cheaper one from here on
            report.flops = count_flops(state.model, config.seq_len)
        return loop.update(state, data, samples, config, job)
    return update
