"""Zero-shot accuracy of model folders by lm-eval, on local tasks: those of experiments/finetuning.py's
models. A task is a file of the harness, DIR/tasks/local_NAME.yaml, and its data lie beside it."""
import glob
import os

from experiments.runs import add_line, read_lines
from experiments.tables import markdown
from nanolost.errors import UserError
from nanolost.flags import say
from nanolost.job import pick_device

# questions of a forward pass
BATCH = 8

def names_of(folder: str) -> list[str]:
    """Of the tasks in a folder. UserError for one without any."""
    paths = glob.glob(os.path.join(glob.escape(folder), "local_*.yaml"))
    if not paths:
        raise UserError(f"--tasks_dir {folder}: there is no task in it, local_NAME.yaml")
    return sorted(os.path.basename(path).removesuffix(".yaml") for path in paths)

def ask(model: str, tasks: str, limit: int | None) -> dict[str, list[float]]:
    """Task → accuracy of the model in a folder and its standard error. limit: questions of a task."""
    # the tasks are here: nothing is asked of the hub
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("lm-eval is not installed: pip install .[eval]") from None
    names = names_of(tasks)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "trust_remote_code": True, "dtype": "float32"},
        tasks=names,
        task_manager=TaskManager(include_path=tasks),
        limit=limit,
        batch_size=BATCH,
        # from Python, unlike from the shell, it takes CUDA where there is none
        device=pick_device("auto"),
    )
    # a task may have no such measure, as a perplexity
    results = found["results"]
    return {
        name.removeprefix("local_"): [results[name]["acc,none"], results[name]["acc_stderr,none"]]
        for name in names if "acc,none" in results[name]
    }

def path_of(config) -> str:
    return os.path.join(config.out_dir, "zero-shot.jsonl")

def results(config) -> list[dict]:
    path = path_of(config)
    lines = read_lines(path) if os.path.exists(path) else []
    return [line for line in lines if line["limit"] == config.limit]

def run(config, models: dict[str, str]):
    """Ask the models, name → folder, that have no line yet."""
    os.makedirs(config.out_dir, exist_ok=True)
    asked = {(line["model"], line["folder"]) for line in results(config)}
    for name, folder in models.items():
        if (name, folder) in asked:
            continue
        found = ask(folder, config.tasks_dir, config.limit)
        add_line(path_of(config), {"model": name, "folder": folder, "limit": config.limit, "tasks": found})
        say(f"{name}: mean accuracy {mean(found):.3f}")

def mean(tasks: dict[str, list[float]]) -> float:
    return sum(value for value, _ in tasks.values()) / len(tasks)

def table(config) -> str:
    """A task a line, a model a column; "" without any."""
    # of a model that was asked again, the last
    models = {line["model"]: line["tasks"] for line in results(config)}
    if not models:
        return ""
    first = next(iter(models.values()))
    lines = []
    for task in first:
        cells = [f"{100 * value:.1f} ± {100 * error:.1f}"
                 for value, error in (tasks[task] for tasks in models.values())]
        lines.append([task, *cells])
    lines.append(["mean", *[f"{100 * mean(tasks):.1f}" for tasks in models.values()]])
    return markdown(["accuracy, %", *models], lines)
