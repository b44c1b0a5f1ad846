"""The reference runs of experiments/golden.py compute what they computed when tests/golden.json was printed.

To the last digit only the same machine and torch agree, so there is a tolerance here. An intended change of
what is computed prints the file anew: `python experiments/golden.py > tests/golden.json`."""
import json
import os
import sys

import pytest
from conftest import ROOT, losses, started, updates, val_losses

import prepare_c4
import train
from nanolost.flags import parse
from nanolost.settings import Config, resolve

sys.path.insert(0, os.path.join(ROOT, "experiments"))
import golden  # noqa: E402

every_run = pytest.mark.parametrize("linear, optimizer", golden.RUNS)

@pytest.fixture(scope="module")
def expected():
    with open(os.path.join(ROOT, "tests/golden.json"), encoding="utf-8") as f:
        return json.load(f)

@pytest.fixture(scope="session")
def golden_data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("golden"))
    given = parse(prepare_c4.Config, golden.prepare(folder))
    prepare_c4.main(prepare_c4.Config(**given))
    return folder

def config_of(linear, optimizer, data_dir, out_dir):
    return resolve(parse(Config, golden.flags(linear, optimizer, data_dir, str(out_dir), golden.STEPS)))

@every_run
def test_the_first_updates_are_those_of_the_reference_run(linear, optimizer, golden_data, expected, tmp_path):
    with started(config_of(linear, optimizer, golden_data, tmp_path)) as run:
        found = [figures.loss for figures in updates(*run, count=3)]
    assert found == pytest.approx(expected[f"{linear} {optimizer}"][:3], rel=1e-4)
    # each update moves the loss by far more than the tolerance
    assert min(found[0] - found[1], found[1] - found[2]) > 0.005

@pytest.mark.slow
@every_run
def test_the_whole_reference_run(linear, optimizer, golden_data, expected, tmp_path):
    config = config_of(linear, optimizer, golden_data, tmp_path)
    train.main(config)
    found = [loss for _, loss in losses(config)] + val_losses(config)
    assert found == pytest.approx(expected[f"{linear} {optimizer}"], rel=1e-3)
