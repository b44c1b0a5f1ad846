"""experiments/speed.py: model folders against the first of them."""
import pytest
from small_models import small

from experiments import speed
from nanolost.checkpoint import write_model
from nanolost.errors import UserError
from nanolost.tokenizer import Tokenizer

@pytest.mark.parametrize("tied", [True, False])
def test_a_decode_step_reads_every_weight_once_and_no_embedding_that_is_no_head(tied):
    model = small(tie_embeddings=tied)
    counted = 4 * sum(p.numel() for name, p in model.named_parameters() if tied or "embed" not in name)
    assert speed.read_bytes(model) == counted

def test_one_folder_alone_is_refused():
    with pytest.raises(UserError, match="two folders or more"):
        speed.run(speed.Config(models=""))

def test_the_table_has_a_line_for_each_folder(tmp_path, capsys, monkeypatch):
    # compiling is tested where the step is made
    monkeypatch.setattr(speed, "compile_step", lambda model: None)
    monkeypatch.setattr(speed, "PROMPT", 8)
    # each does its work; the second takes half as long
    def race(works, rounds, device):
        for work in works.values():
            work()
        return {name: 1 / 2 ** i for i, name in enumerate(works)}
    monkeypatch.setattr(speed, "race", race)
    for name in ("dense", "other"):
        write_model(str(tmp_path / name), small(max_seq_len=64), Tokenizer.named("byte"), {})
    folders = f"{tmp_path}/dense,{tmp_path}/other"
    speed.run(speed.Config(models=folders, batches="1,2", new_tokens=2, rounds=1))
    said = capsys.readouterr().out
    assert "| prefill | decode, batch 1 | decode, batch 2 |" in said
    first, second = [line for line in said.splitlines() if line.startswith(("| dense ", "| other "))]
    assert first.endswith("| 8.0 (1.00) | 2.0 (1.00) | 4.0 (1.00) |")
    assert second.endswith("| 16.0 (2.00) | 4.0 (2.00) | 8.0 (2.00) |")
