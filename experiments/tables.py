"""Numbers as a reader sees them: mean ± deviation, Markdown tables, and a table's place in a document."""
import os
import statistics

from nanolost.errors import UserError
from nanolost.files import read_bounded, write_atomic
from nanolost.flags import say

# bytes of a document that holds a table
DOCUMENT_LIMIT = 1 << 24

def spread(values: list[float], form: str) -> str:
    """mean ± standard deviation (of a sample), of one value itself. form: as of `format`, like "+.3f"."""
    middle = format(statistics.mean(values), form)
    if len(values) == 1:
        return middle
    # a deviation has no sign
    deviation = format(statistics.stdev(values), form.lstrip("+"))
    return f"{middle} ± {deviation}"

def markdown(head: list | tuple, rows: list[list]) -> str:
    """A table, its lines and an empty one."""
    lines = [head, ["---"] * len(head), *rows]
    text = ""
    for cells in lines:
        assert len(cells) == len(head), (cells, head)
        text += "| " + " | ".join(map(str, cells)) + " |\n"
    return text + "\n"

# --- in a document ---

def markers(name: str) -> tuple[str, str]:
    """The two comments between which the table `name` stands; no reader of the document sees them."""
    return f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"

def fill(path: str, name: str, text: str):
    """Put `text` between the markers of a document, in the place of what stood there. UserError where they
    are not there, in this order and once."""
    begin, end = markers(name)
    document = read_bounded(path, DOCUMENT_LIMIT).decode()
    before, found, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    # a second pair would stay as it is, with numbers of another day
    if not found or not found_end or begin in after or end in before:
        raise UserError(f"{path} must have the lines {begin.strip()} and {end.strip()} once, in this order: "
                        "the table goes between them")
    # a number and its deviation stay on one line of a narrow column
    text = text.strip().replace(" ± ", "\u00a0±\u00a0")
    # an empty line on both sides, without which Markdown takes a table for text
    write_atomic(path, f"{before}{begin}\n{text}\n\n{end}{after}".encode())

def show(path: str | None, name: str, text: str):
    """Print `text`, or put it between the markers `name` of the document `path`."""
    if path:
        fill(path, name, text)
    else:
        say(text)

# --- figures ---

def pyplot():
    """matplotlib's pyplot, set up to draw into files."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed: pip install matplotlib, or .[plot]") from None
    # a server has no screen
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # ten colours, then again with another line: an experiment has more rows than a palette
    lines = plt.cycler(linestyle=["-", "--", ":"]) * plt.cycler(color=plt.cm.tab10.colors)
    plt.rcParams["axes.prop_cycle"] = lines
    return plt

def save_figure(figure, folder: str, name: str):
    path = os.path.join(folder, name)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    say(f"drawn in {path}")
    return figure
