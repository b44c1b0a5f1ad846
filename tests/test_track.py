"""runs/track.py: every record once, live and afterwards, over resumes and restarts; no run changes."""
import importlib.util
import json
import os
import sys
import threading
import types

import pytest
from conftest import ROOT, continue_from, metrics, within

import train
from nanolost.errors import UserError

spec = importlib.util.spec_from_file_location("track", os.path.join(ROOT, "runs", "track.py"))
track = importlib.util.module_from_spec(spec)
spec.loader.exec_module(track)

class Recorder:
    """A tracker that keeps what it gets; `runs` by name, over all starts."""

    runs = {}
    finished = 0

    def __init__(self, folder, name, config):
        self.points = Recorder.runs.setdefault(name, [])
        self.hint = "nowhere"
        self.config = config

    def log(self, values, step, moment):
        self.points.append((step, moment, values))

    def flush(self):
        pass

    def finish(self):
        Recorder.finished += 1

@pytest.fixture
def tracker(monkeypatch):
    monkeypatch.setattr(Recorder, "runs", {})
    monkeypatch.setattr(Recorder, "finished", 0)
    monkeypatch.setattr(track, "PAUSE", 0.01)
    monkeypatch.setitem(track.TRACKERS, "fake", Recorder)
    monkeypatch.setitem(sys.modules, "fake", types.ModuleType("fake"))
    return Recorder

def points(tracker, field: str) -> list[tuple]:
    """(step, value) of one series, over all runs."""
    found = [point for run in tracker.runs.values() for point in run]
    return [(step, values[field]) for step, _, values in found if field in values]

def write(out, records, state="finished", end=""):
    """A run's folder; by replacing the file, as a resume does."""
    os.makedirs(out, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records) + end
    for name, content in [("metrics.jsonl", text), ("config.json", "{}"),
                          ("status.json", json.dumps({"state": state, "step": 0}))]:
        with open(os.path.join(out, name + ".tmp"), "w", encoding="utf-8") as f:
            f.write(content)
        os.replace(os.path.join(out, name + ".tmp"), os.path.join(out, name))

def steps(*numbers, began=1000.0, kind="train"):
    return [{"kind": kind, "step": n, "time": began + n, "loss": n / 8} for n in numbers]

# --- afterwards ---

def test_every_number_of_a_run_is_shown_under_its_name_with_its_step_and_time(small, tracker):
    config = small()
    train.main(config)
    track.main([config.out_dir, "fake"])
    assert points(tracker, "train/loss") == [(r["step"], r["loss"]) for r in metrics(config, "train")]
    assert points(tracker, "eval/val_ppl") == [(r["step"], r["val_ppl"]) for r in metrics(config, "eval")]
    layers = metrics(config, "eval")[-1]["layers"]
    name, numbers = next(iter(layers.items()))
    number = next(iter(numbers))
    assert points(tracker, f"eval/layers/{name}/{number}")[-1] == (8, numbers[number])
    # mfu is null on a CPU, and a step is no series
    assert not points(tracker, "train/mfu") and not points(tracker, "train/step")
    (run,) = tracker.runs.values()
    assert [moment for _, moment, _ in run] == [r["time"] for r in metrics(config)]
    assert tracker.finished == 1

def test_a_second_look_shows_nothing_twice(tracker, tmp_path):
    out = str(tmp_path / "run")
    write(out, steps(1, 2) + steps(2, kind="eval"))
    track.main([out, "fake"])
    track.main([out, "fake"])
    assert points(tracker, "train/loss") == [(1, 1 / 8), (2, 2 / 8)]
    assert points(tracker, "eval/loss") == [(2, 2 / 8)]
    write(out, steps(1, 2, 3))
    track.main([out, "fake"])
    assert points(tracker, "train/loss")[2:] == [(3, 3 / 8)] and len(tracker.runs) == 1

def test_a_resumed_run_goes_on_in_the_same_place(small, tracker):
    config = small()
    train.main(config)
    track.main([config.out_dir, "fake"])
    before = points(tracker, "train/loss")
    longer = small(steps=12)
    continue_from(config, longer, 4)
    track.main([config.out_dir, "fake"])
    shown = points(tracker, "train/loss")
    assert len(tracker.runs) == 1 and shown[:8] == before
    assert [step for step, _ in shown] == list(range(1, 13))

def test_a_new_run_in_the_same_folder_is_another_one(tracker, tmp_path):
    out = str(tmp_path / "run")
    write(out, steps(1, 2))
    track.main([out, "fake"])
    write(out, steps(1, began=5000.0))
    track.main([out, "fake"])
    assert list(tracker.runs) == ["run-1001", "run-5001"]
    assert [len(run) for run in tracker.runs.values()] == [2, 1]

def test_damaged_lines_notes_and_unknown_kinds_do_not_stop_it(tracker, tmp_path):
    out = str(tmp_path / "run")
    bench = {"kind": "bench", "step": 2, "time": 9.0, "score": 0.5, "skipped": True}
    own = [{"kind": "note"}, bench, {"loss": 1}]
    write(out, [*steps(1), *own], end='[]\nnull\n{"kind": 3, "step": 1, "time": 2}\n{"kind": "tra')
    track.main([out, "fake"])
    (run,) = tracker.runs.values()
    found = [values for *_, values in run]
    assert found == [{"train/loss": 1 / 8}, {"bench/score": 0.5, "bench/skipped": 1.0}]

# --- live ---

def test_it_follows_lines_as_they_come_replacements_too_until_the_run_ends(tracker, tmp_path):
    out = str(tmp_path / "run")
    write(out, steps(1), state="running", end='{"kind": "train", "step": 2, "ti')
    errors = []
    def work():
        try:
            track.main([out, "fake"])
        except BaseException as e:
            errors.append(e)
    thread = threading.Thread(target=work)
    thread.start()
    def shown():
        return [step for step, _ in points(tracker, "train/loss")]
    assert within(60, lambda: shown() == [1])
    with open(os.path.join(out, "metrics.jsonl"), "a", encoding="utf-8") as f:
        f.write('me": 1002.0, "loss": 0.25}\n')
    assert within(60, lambda: shown() == [1, 2])
    # a resume: fewer lines in another file, which then grows
    write(out, steps(1), state="running")
    with open(os.path.join(out, "metrics.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps(steps(2)[0]) + "\n" + json.dumps(steps(3)[0]) + "\n")
    assert within(60, lambda: shown() == [1, 2, 3])
    assert thread.is_alive()
    write(out, steps(1, 2, 3, 4))
    thread.join(60)
    assert not thread.is_alive() and errors == []
    assert shown() == [1, 2, 3, 4] and tracker.finished == 1

def test_ctrl_c_leaves_the_run_and_the_next_start_goes_on(tracker, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "run")
    write(out, steps(1, 2), state="running")
    def interrupt(seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr(track.time, "sleep", interrupt)
    track.main([out, "fake"])
    assert tracker.finished == 1 and "the same command goes on" in capsys.readouterr().out
    write(out, steps(1, 2, 3))
    track.main([out, "fake"])
    assert [step for step, _ in points(tracker, "train/loss")] == [1, 2, 3]

def test_nothing_of_the_run_is_changed(small, tracker):
    config = small(steps=2)
    train.main(config)
    def files():
        found = {}
        for home, _, names in os.walk(config.out_dir):
            for name in names:
                path = os.path.join(home, name)
                if os.path.join(config.out_dir, "track") not in path:
                    with open(path, "rb") as f:
                        found[path] = f.read()
        return found
    before = files()
    track.main([config.out_dir, "fake"])
    assert files() == before
    # and what it keeps is not in the way of the next start
    train.main(small(steps=3))
    assert metrics(config, "train")[-1]["step"] == 3

# --- trackers ---

@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_wandb_and_trackio_get_one_run_that_can_be_resumed_offline(kind, tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType(kind)
    def init(**given):
        calls.append(("init", given, os.environ["WANDB_MODE"]))
    fake.init = init
    fake.log = lambda values, step: calls.append(("log", values, step))
    fake.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, kind, fake)
    # set and unset again, so that what the command sets is undone as well
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.delenv("WANDB_MODE")
    out = str(tmp_path / "run")
    write(out, steps(1))
    track.main([out, kind])
    write(out, steps(1, 2))
    track.main([out, kind])
    (_, first, mode), log, end, (_, again, _), later, _ = calls
    assert first == again and first["resume"] == "allow" and mode == "offline"
    assert (first["project"], first["name"]) == ("nanolost", "run-1001")
    assert log == ("log", {"train/loss": 1 / 8}, 1) and end == ("finish",)
    assert later == ("log", {"train/loss": 2 / 8}, 2)
    if kind == "wandb":
        assert first["id"] == "run-1001" and os.path.isdir(first["dir"])

def test_tensorboard_has_the_values_that_were_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    out = str(tmp_path / "run")
    write(out, steps(1, 2))
    track.main([out])
    write(out, steps(1, 2, 3))
    track.main([out, "tensorboard"])
    events = EventAccumulator(os.path.join(out, "track", "tensorboard", "run-1001"))
    events.Reload()
    found = [(event.step, event.value, event.wall_time) for event in events.Scalars("train/loss")]
    assert found == [(n, n / 8, 1000.0 + n) for n in (1, 2, 3)]

@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_one_line_with_its_command(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    out = str(tmp_path / "run")
    write(out, steps(1))
    with pytest.raises(UserError, match=f"^{kind} is not installed: pip install {kind}$"):
        track.main([out, kind])
    assert not os.path.exists(os.path.join(out, "track"))

@pytest.mark.parametrize("words, message", [
    ([], "give an out_dir"), (["a", "b", "c"], "give an out_dir"), (["--out"], "give an out_dir"),
    (["a", "mlflow"], "unknown tracker mlflow"), (["nowhere", "fake"], "no metrics.jsonl in nowhere"),
])
def test_a_wrong_command_says_how_it_is_used(tracker, words, message):
    with pytest.raises(UserError, match=message):
        track.main(words)
