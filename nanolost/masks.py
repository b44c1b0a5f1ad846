"""Zeros for a model that is about to be tuned: those of compress.py --form sparse, put into its weights."""
import contextlib
from dataclasses import dataclass

import torch

from model import Llama
from nanolost.calibration import WINDOW, calibration_windows, key_of, statistics_of, temporary_folder
from nanolost.compression import Task
from nanolost.covariance import Batch, spool_bytes
from nanolost.data import TokenDataset, load_manifest
from nanolost.errors import UserError
from nanolost.sparse_layers import to_sparse
from nanolost.splitting import split_bytes

@dataclass
class Zeros:
    """What `to_sparse` reads of compress.py's settings."""

    method: str
    budget: float
    pattern: str
    uniform: bool | None = None
    closed_loop: bool = False
    factors: bool = False

@contextlib.contextmanager
def untrained(model: torch.nn.Module):
    """Without gradients of the parameters, which are trained again afterwards as they were before."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(name in trained)

def calibration_text(config, train: TokenDataset, limit: int) -> TokenDataset:
    """The text that is looked at: --calibration_dir's, else that of the training, in windows of their own."""
    # lines are rows by themselves, which are not cut
    if config.calibration_dir is None and train.row:
        return train
    place = config.calibration_dir or config.data
    manifest = load_manifest(place) or {}
    row = manifest.get("row")
    if row and row > limit:
        raise UserError(f"{place} has rows of {row} tokens, and the model was made for {limit}: prepare them "
                        f"again with --rows {limit} or less, or name another --calibration_dir")
    return TokenDataset(place, "train", row or min(WINDOW, limit))

def spooled(windows: list[Batch], model: Llama) -> int:
    """Bytes that choosing zeros takes on the disk meanwhile, as compress.py counts them."""
    # a text may have fewer than were asked for
    tokens = sum(batch.ids.numel() for batch in windows)
    return spool_bytes(model, tokens) + split_bytes(model)

def put_zeros(model: Llama, config, folder: str, text: TokenDataset, device, context) -> dict[str, dict]:
    """Put config.zeros of zeros into the blocks' matrices by config.masks, with the values that go with them;
    what each became, as in allocation.json. folder: where the model's weights come from."""
    asked = Zeros(config.masks, 1 - config.zeros, config.pattern)
    windows = calibration_windows(text, config.seed, config.calibration_tokens, config.gradient_tokens,
                                  device)
    with untrained(model), temporary_folder(spooled(windows, model)) as spool:
        key = key_of(config, folder, text)
        statistics = statistics_of(model, windows, config.statistics, key, spool, context)
        task = Task(model, asked, statistics, [], spool, device, context)
        return to_sparse(task)
