"""shard.py: what several processes that hold one copy together compute, save and read."""
import pytest
from conftest import files_of, lines, losses, train_in_forks

import train

# of each a float32 run by one process is the reference: losses relative to it within
VARIANTS = {
    "adamw": (dict(), 1e-6),
    "dense tied": (dict(linear="dense", tie_embeddings=True), 1e-6),
    "learned gamma, accumulation": (dict(learn_gamma=True, micro_batch=1), 1e-6),
    "muon": (dict(optimizer="muon"), 1e-5),
    "bfloat16, recompute": (dict(dtype="bfloat16", recompute=True, lr=1e-3), 1e-4),
}

@pytest.mark.parametrize("processes, shards", [(2, 2)])
def test_a_split_model_has_the_losses_of_a_whole_one(small, tmp_path, processes, shards):
    one, split = [], []
    for number, (flags, _) in enumerate(VARIANTS.values()):
        one.append(small(**flags, out_dir=str(tmp_path / f"one{number}")))
        split.append(small(**flags, shard=shards, out_dir=str(tmp_path / f"split{number}")))
    train_in_forks(processes, *split, log=tmp_path / "log")
    for config, other, (_, within) in zip(one, split, VARIANTS.values(), strict=True):
        train.main(config)
        expected = [loss for _, loss in losses(config)]
        assert [loss for _, loss in losses(other)] == pytest.approx(expected, rel=within), other
