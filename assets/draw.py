"""Draw assets/sweep.png from the sweeps in docs/experiments.md, between the marks `tiny`:

    python assets/draw.py

The picture is made from the page, so that the two cannot differ. Needs matplotlib (the extra "plot")."""
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# this file is started by its path, so that Python looks for modules beside it only
sys.path.insert(0, str(HERE.parent))
from nanolost.errors import UserError  # noqa: E402
from nanolost.flags import command  # noqa: E402

PAGE = HERE.parent / "docs" / "experiments.md"
BEGIN = "<!-- begin tiny -->"
END = "<!-- end tiny -->"
# one colour a kind of layer, one line an optimizer
COLOURS = {"dense": "#7a7a7a", "LOST": "#c2410c"}
LINES = {"AdamW": "--", "Muon": "-"}
# points up or down, where the names of two lines would touch
NUDGES = {"dense, Muon": 6, "LOST, Muon": -7}
TICKS = [0.001, 0.003, 0.006, 0.012, 0.024]

Sweep = list[tuple[float, float]]

# --- reading ---

def cells(line: str) -> list[str]:
    # stars make the best of a row bold
    return [cell.strip(" *") for cell in line.strip().strip("|").split("|")]

def numbers(words: list[str]) -> list[float | None]:
    found = []
    for word in words:
        # an empty cell or "diverged" has no point in the picture
        is_number = re.fullmatch(r"\d+\.?\d*(e-?\d+)?", word)
        found.append(float(word) if is_number else None)
    return found

def sweeps(page: str) -> dict[str, Sweep]:
    """Row of a sweep, as "LOST, Muon" → its (learning rate, loss). The table without a sweep is left out."""
    table = page.split(BEGIN)[1].split(END)[0]
    found = {}
    rates = []
    for line in table.splitlines():
        first, *rest = cells(line)
        # the head of a sweep has rates and nothing before them
        if rest and not first:
            rates = numbers(rest)
        kind, _, optimizer = first.partition(", ")
        if kind in COLOURS and optimizer in LINES:
            points = zip(rates, numbers(rest), strict=True)
            found[first] = [point for point in points if None not in point]
    return found

# --- drawing ---

def draw_row(axes, row: str, sweep: Sweep):
    kind, optimizer = row.split(", ")
    rates, losses = zip(*sweep, strict=True)
    style = {"color": COLOURS[kind], "linestyle": LINES[optimizer], "linewidth": 2}
    axes.plot(rates, losses, marker="o", markersize=4, **style)
    # names beside their lines read faster than a legend
    axes.annotate(
        row,
        xy=sweep[-1],
        xytext=(7, NUDGES.get(row, 0)),
        textcoords="offset points",
        color=COLOURS[kind],
        va="center",
    )

def draw(found: dict[str, Sweep], path: Path):
    if not any(found.values()):
        raise UserError(f"{PAGE} has no sweep between the marks tiny: restore the page, or fill it by "
                        "experiments/tiny.py table --fill")
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed: pip install matplotlib, or .[plot]") from None
    # a server has no screen
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.4))
    for row, sweep in found.items():
        draw_row(axes, row, sweep)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(TICKS, map(str, TICKS))
    # room for the names
    axes.set_xlim(TICKS[0] * 0.9, TICKS[-1] * 1.9)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss, nats a token")
    axes.set_title("Loss at the end of a run: LOST and dense, AdamW and Muon", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")

if __name__ == "__main__":
    command(lambda: draw(sweeps(PAGE.read_text(encoding="utf-8")), HERE / "sweep.png"))
