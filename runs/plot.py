"""Validation loss against tokens, one line a run: python runs/plot.py out/a out/b … [--out curve.png]

Prints the table of the last evaluations too. A folder's line is named by its linear layers, learning rate and
seed; of each kind of layer the best learning rate is drawn in full, the others faintly. Needs matplotlib (the
extra "plot")."""
import json
import os
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

def read(folder: str) -> dict:
    """config, and the columns of metrics.jsonl that are drawn."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    evals = [r for r in rows if r["kind"] == "eval"]
    trains = [r for r in rows if r["kind"] == "train"]
    kind = config["linear"] + (", Muon" if config["optimizer"] == "muon" else "")
    return {"linear": kind, "lr": config["lr"], "seed": config["seed"],
            "tokens": [r["step"] * config["batch_tokens"] for r in evals], "evals": evals, "trains": trains,
            "train_tokens": [r["tokens"] for r in trains]}

def main(argv: list[str]):
    out = "curve.png"
    if "--out" in argv:
        out = argv.pop(argv.index("--out") + 1)
        argv.remove("--out")
    runs = sorted((read(folder) for folder in argv), key=lambda r: (r["linear"], r["lr"], r["seed"]))
    runs = [r for r in runs if r["evals"]]     # one that diverged before may have none
    print(f"{'linear':12} {'lr':>8} {'seed':>4} {'loss':>8} {'perplexity':>10} {'bits/byte':>9} {'tok/s':>8}")
    for r in runs:
        last, speed = r["evals"][-1], statistics.median(t["tokens_per_second"] for t in r["trains"])
        print(f"{r['linear']:12} {r['lr']:8.1e} {r['seed']:4} {last['val_loss']:8.4f} "
              f"{last['val_ppl']:10.2f} {last['val_bpb']:9.4f} {speed:8,.0f}")
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for linear, color in zip(dict.fromkeys(r["linear"] for r in runs), plt.cm.tab10.colors, strict=False):
        own = [r for r in runs if r["linear"] == linear]
        best = min([r for r in own if r["seed"] == 0] or own, key=lambda r: r["evals"][-1]["val_loss"])
        axes.plot(best["train_tokens"], [t["loss"] for t in best["trains"]], color=color, alpha=0.25, lw=0.8)
        for r in own:
            drawn = {"label": f"{linear}, lr {r['lr']:g}", "lw": 2} if r is best else {"alpha": 0.35, "lw": 1}
            axes.plot(r["tokens"], [e["val_loss"] for e in r["evals"]], "o-", ms=3, color=color, **drawn)
    axes.set(xlabel="training tokens", ylabel="loss (nats a token)",
             title="Validation loss; faint: training loss, other learning rates and seeds")
    axes.set_ylim(top=6.5)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150, bbox_inches="tight")
    print(f"drawn in {out}")

if __name__ == "__main__":
    main(sys.argv[1:])
