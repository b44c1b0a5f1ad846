"""The benchmark runs and says what it promises; how fast anything is, no test decides."""
import json
import sys

import pytest

import bench
from nanolost import loop, sparse
from nanolost.errors import UserError

def run(capsys, what):
    bench.main(bench.Config(what=what, model="tiny", device="cpu", compile=False, tokens=512, rounds=1,
                            new_tokens=4, vocab_size=300))
    output = capsys.readouterr().out.splitlines()
    return json.loads(output[-1]), "\n".join(output[:-1])

def test_each_part_prints_a_table_and_last_one_line_of_json(capsys):
    results, tables = run(capsys, "init,layer,step,decode")
    assert [row["layer"] for row in results["layer"]] == ["128→128", "128→344", "344→128"]
    names = {"dense", "lost", "transformers", "50% zeros", "70% zeros", "90% zeros"}
    assert {row["decode"] for row in results["decode"]} == names
    assert results["init"][0]["decompositions"] == 28 and "of limit" in tables
    steps = {row["step"]: row for row in results["step"]}
    assert set(steps) == {"dense", "lost", "lost, reading data", "lost, recompute", "transformers"}
    assert steps["lost"]["limit"] == steps["dense"]["multiplications"] / steps["lost"]["multiplications"]
    for row in steps.values():                 # what --dry_run counts is what is held, but for step counters
        assert row["held bytes"] == pytest.approx(row["bytes"], rel=0.001)
        assert row["tokens/s"] == pytest.approx(512 / (row["ms"] / 1000))

def small(**given):
    return bench.Config(**{**dict(model="tiny", device="cpu", dtype="float32", compile=False, tokens=512,
                                  seq_len=64, vocab_size=300), **given})

def trainee(name, config):
    return bench.Trainee(name, config, bench.torch.device("cpu"), bench.ReadyBatch(config, "cpu"))

def test_what_is_timed_is_the_update_of_the_trainer(monkeypatch):
    seen = []
    def update(state, data, samples, config, job):
        seen.append((samples.shape, config.batch_tokens, data))
        return loop.update(state, data, samples, config, job)
    monkeypatch.setattr(bench, "update", update)
    one = trainee("lost", small())
    one.step()
    assert seen == [((1, 1, 8), 512, one.ready)]
    assert (one.state.step, one.state.samples, one.state.tokens) == (1, 8, 512)

def test_transformers_trains_on_the_same_loss_as_our_dense_model():
    torch, config = bench.torch, small()
    ours, theirs = trainee("dense", config), trainee("transformers", config)
    x = torch.randint(300, (2, 64))
    y = torch.randint(300, (2, 64))
    loss = theirs.state.model(x, y, loss_only=True)[1]
    torch.testing.assert_close(loss, ours.state.model(x, y, loss_only=True)[1])
    logits = bench.as_transformers(ours.state.model)(x).logits
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()))
    theirs.ready = ours.ready
    for one in (ours, theirs):
        one.step()
    assert ours.state.norms == pytest.approx(theirs.state.norms, rel=1e-3)

def test_reading_data_reads_new_samples_in_the_order_of_training(tmp_path, monkeypatch):
    config = small()
    data = bench.random_shard(str(tmp_path), config, 10_000)
    order = bench.SampleOrder(len(data), 0)
    read = []
    monkeypatch.setattr(data, "batch", lambda samples, device: read.extend(samples) or bench.ReadyBatch(
        config, device).batch(samples, device))
    one = trainee("lost", config)
    one.step(data, order)
    one.step(data, order)
    assert read == [order[i] for i in range(16)]

def test_the_literal_equation_computes_what_the_layer_does():
    torch = bench.torch
    lost = bench.LOSTLinear.from_linear(torch.nn.Linear(24, 40, bias=False), 5, 0.1)
    x = torch.randn(3, 24)
    torch.testing.assert_close(bench.Literal(lost)(x), lost(x))

def test_a_vocabulary_beyond_16_bits_has_a_shard_too(tmp_path):
    data = bench.random_shard(str(tmp_path), bench.Config(vocab_size=70_000), 10_000)
    data.check_ids(70_000)
    assert len(data) == 39

def test_contestants_take_turns_each_after_a_run_that_warms_memory_up():
    order = []
    names = {name: lambda name=name: order.append(name) for name in "abc"}
    assert set(bench.race(names, 3, bench.torch.device("cpu"))) == set("abc")
    assert order == list("abc") * 2 + list("aabbcc") * 3

def test_shares_of_zeros_are_packed_for_a_cpu_and_held_in_less_memory(kernel):
    sizes = {}
    for name, model in bench.decoders(small(zeros=(0.5, 0.9)), bench.torch.device("cpu")):
        sizes[name] = bench.held_bytes(model)
        kept = [module.weight.count_nonzero() / module.weight.numel() for module in model.modules()
                if isinstance(module, sparse.PackedLinear)]
        assert kept == pytest.approx([1 - float(name[:2]) / 100] * 28 if "zeros" in name else [], abs=0.03)
    assert sizes["90% zeros"] < sizes["50% zeros"] < sizes["dense"]

def test_on_a_gpu_two_of_every_four_are_zeros():
    model = bench.with_zeros(bench.build_model(bench.train_config(small(), "dense"), "cpu"), "2:4")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, bench.nn.Linear)}
    assert linears.pop("lm_head").weight.all()
    for linear in linears.values():
        assert ((linear.weight.view(-1, 4) != 0).sum(1) == 2).all()

def test_products_are_measured_on_more_weights_than_a_cache_holds(kernel, monkeypatch):
    monkeypatch.setattr(bench, "BEYOND_CACHE", 3 << 16)
    monkeypatch.setattr(bench, "TURN", 1)
    made = []
    begin = sparse.PackedLinear.__init__
    monkeypatch.setattr(sparse.PackedLinear, "__init__", lambda *args: made.append(args) or begin(*args))
    rows = bench.bench_sparse(small(zeros=(0.5,), rounds=1), bench.torch.device("cpu"))
    assert [row["sparse"] for row in rows[::5]] == ["128→128, 50%", "128→344, 50%", "344→128, 50%"]
    assert [row["columns"] for row in rows[:5]] == [1, 2, 4, 8, 16] and len(made) == 3 + 2 + 2
    assert {row["used"] for row in rows} == {"packed"}
    assert [row["bytes"] for row in rows] == pytest.approx([0.5 + 1 / 32] * 15, abs=0.03)

@pytest.mark.parametrize("device, kernels", [("cpu", ()), ("meta", ("float32",))])
def test_products_are_refused_where_there_is_no_kernel(monkeypatch, device, kernels):
    monkeypatch.setattr(bench, "load_kernel", lambda: [getattr(bench.torch, name) for name in kernels])
    with pytest.raises(UserError, match="a kernel for CPUs"):
        bench.bench_sparse(small(), bench.torch.device(device))

@pytest.mark.parametrize("given, message", [
    (dict(n_layer=0), "--n_layer 0: must be positive"),
    (dict(zeros=(0.5, 1.0)), "--zeros 1.0: must lie between 0 and 1"),
    (dict(zeros=(float("nan"),)), "--zeros nan: must lie"),
])
def test_shares_and_blocks_that_cannot_be_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        bench.main(bench.Config(**given))

@pytest.mark.parametrize("name", ["tokens", "seq_len", "new_tokens", "texts", "rounds", "vocab_size"])
def test_a_number_below_one_is_refused(name):
    with pytest.raises(UserError, match=f"--{name} 0: must be positive"):
        bench.main(bench.Config(**{name: 0}))

def test_without_transformers_the_repair_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install"):
        bench.as_transformers(None)

def test_an_unknown_part_is_refused():
    with pytest.raises(UserError, match="--what speed: use init, layer, step, decode, sparse, data"):
        bench.main(bench.Config(what="data,speed"))

def test_windows_that_do_not_fill_a_batch_are_refused_with_a_number_that_does():
    with pytest.raises(UserError, match="--tokens 300 is no multiple of --seq_len 256: use 512"):
        bench.main(bench.Config(tokens=300))

def test_several_processes_are_refused(monkeypatch):
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="measures one process"):
        bench.main(bench.Config())
