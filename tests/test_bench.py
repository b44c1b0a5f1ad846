"""The benchmark runs and says what it promises; how fast anything is, no test decides."""
import json
import sys

import pytest

import bench

def run(capsys, what):
    bench.main(bench.Config(what=what, model="tiny", device="cpu", compile=False, tokens=512, rounds=1,
                            new_tokens=4, vocab_size=300))
    output = capsys.readouterr().out.splitlines()
    return json.loads(output[-1]), "\n".join(output[:-1])

def test_each_part_prints_a_table_and_last_one_line_of_json(capsys):
    results, tables = run(capsys, "init,layer,step,decode")
    assert [row["layer"] for row in results["layer"]] == ["128→128", "128→344", "344→128"]
    assert {row["decode"] for row in results["decode"]} == {"dense", "lost", "transformers"}
    assert results["init"][0]["decompositions"] == 28 and "of limit" in tables
    steps = {row["step"]: row for row in results["step"]}
    assert set(steps) == {"dense", "lost", "lost, reading data", "lost, recompute", "transformers"}
    assert steps["lost"]["limit"] == steps["dense"]["multiplications"] / steps["lost"]["multiplications"]
    for row in steps.values():                 # what --dry_run counts is what is held, but for step counters
        assert row["held bytes"] == pytest.approx(row["bytes"], rel=0.001)
        assert row["tokens/s"] == pytest.approx(512 / (row["ms"] / 1000))

def test_a_vocabulary_beyond_16_bits_has_a_shard_too(tmp_path):
    data = bench.random_shard(str(tmp_path), bench.Config(vocab_size=70_000), 10_000)
    data.check_ids(70_000)
    assert len(data) == 39

def test_contestants_take_turns_each_after_a_run_that_warms_memory_up():
    order = []
    names = {name: lambda name=name: order.append(name) for name in "abc"}
    assert set(bench.race(names, 3, bench.torch.device("cpu"))) == set("abc")
    assert order == list("abc") * 2 + list("aabbcc") * 3

@pytest.mark.parametrize("name", ["tokens", "seq_len", "new_tokens", "rounds", "vocab_size"])
def test_a_number_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"--{name} 0: must be positive"):
        bench.main(bench.Config(**{name: 0}))

def test_without_transformers_the_repair_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install"):
        bench.as_transformers(None)

def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="--what speed: use init, layer, step, decode, data"):
        bench.main(bench.Config(what="data,speed"))
