"""Line figures as inline SVG: the same bytes on every run, legible on a light and on a dark page.

Every text is drawn as paths, so no font of the reader's machine matters. Text takes the colour of the page around it,
axes are a mid grey, and the line colours have a contrast of at least 3 with white and with near-black.
"""

import html
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito's colour-blind-safe colours (https://jfly.uni-koeln.de/color/) those that are legible on a white page
# and on a dark one: blue, vermillion, bluish green, reddish purple. Lines are told apart by dash as well, and two of
# one colour by the markers of their points. A dash is lengths on and off in widths of the line; none is a solid line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ((), (6, 1.5), (1.5, 1.5), (8, 1.5, 1.5, 1.5))
MARKERS = {"o": "M17 4a3 3 0 1 1 6 0a3 3 0 1 1-6 0z", "s": "M17 1h6v6h-6z"}  # matplotlib's name: as drawn in a legend
STYLES = tuple(
    (colour, DASHES[(place + turn) % len(DASHES)], marker)
    for turn, marker in enumerate(MARKERS)
    for place, colour in enumerate(COLOURS)
)
AXES_COLOUR = "#808080"
TEXT_COLOUR = "#010203"  # stands for the page's own text colour, which matplotlib cannot name
WIDTH, HEIGHT = 4.2, 2.2  # inches
MOST_POINTS = 200  # more than a figure some 300 pixels wide can show
MOST_MARKED_POINTS = 30


class Line(NamedTuple):
    """One line: `values` over `steps` (both (n,)); `style` is its index in STYLES."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: int = 0


def line_figure(lines: Sequence[Line], *, title: str, id_prefix: str, over: str = "step") -> str:
    """One figure of lines over optimizer steps, or what `over` names, as an `<svg>` element to put into an HTML page.

    Values that are no finite number are left out. A line of more than MOST_POINTS points is drawn as the means of
    equal runs of them. The title is not drawn: with first and last values, it is what a screen reader says.

    Args:
        id_prefix: begins every id in the figure; unique on a page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lines = [line._replace(steps=steps, values=values) for line in lines for steps, values in [finite_points(line)]]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(drawing_settings())
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for line in lines:
            draw(axes, line)
        axes.set_xlabel(over)
        drawn = io.StringIO()
        unmarked = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", metadata=unmarked)
    return inline_svg(drawn.getvalue(), description(title, lines, over), id_prefix)


def drawing_settings() -> dict[str, object]:
    return {
        "svg.hashsalt": "stagewise",
        "svg.fonttype": "path",
        "text.parse_math": False,
        "font.size": 9,
        "text.color": TEXT_COLOUR,
        "axes.labelcolor": TEXT_COLOUR,
        "xtick.labelcolor": TEXT_COLOUR,
        "ytick.labelcolor": TEXT_COLOUR,
        "xtick.color": AXES_COLOUR,
        "ytick.color": AXES_COLOUR,
        "axes.edgecolor": AXES_COLOUR,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": AXES_COLOUR,
        "grid.alpha": 0.25,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-3, 5),
    }


def draw(axes: "Axes", line: Line) -> None:
    steps, values = thinned(line.steps, line.values, MOST_POINTS)
    sparse = len(steps) <= MOST_MARKED_POINTS
    colour, dash, marker = STYLES[line.style]
    look: dict[str, Any] = {"linewidth": 1.5, "marker": marker, "markersize": 3} if sparse else {"linewidth": 1.0}
    axes.plot(steps, values, color=colour, linestyle=(0, dash) if dash else "-", **look)


def finite_points(line: Line) -> tuple[list[float], list[float]]:
    points = [(step, value) for step, value in zip(line.steps, line.values, strict=True) if math.isfinite(value)]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def left_out_note(lines: Sequence[Line]) -> str:
    """What to say of values that a figure of lines cannot show; empty if there are none."""
    count = sum(not math.isfinite(value) for line in lines for value in line.values)
    return f"{count} infinite value{'s' * (count > 1)} not drawn" if count else ""


def thinned(steps: Sequence[float], values: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most `most` points: the means of runs of neighbours, all runs but the last of one length."""
    length = max(1, math.ceil(len(steps) / most))
    starts = range(0, len(steps), length)
    return mean_of_runs(steps, starts, length), mean_of_runs(values, starts, length)


def mean_of_runs(numbers: Sequence[float], starts: Sequence[int], length: int) -> list[float]:
    runs = [numbers[start : start + length] for start in starts]
    return [math.fsum(run) / len(run) for run in runs]


def description(title: str, lines: Sequence[Line], over: str = "step") -> str:
    """What the figure shows, in words."""
    parts = [
        f"{line.label} from {line.values[0]:.4g} at {over} {line.steps[0]:g} to {line.values[-1]:.4g} at {over} "
        f"{line.steps[-1]:g}"
        for line in lines
        if line.values
    ]
    return f"{title}: {'; '.join(parts) or 'no values'}"


def line_sample(style: int) -> str:
    """A short piece of a line with its marker, as an `<svg>` element for a legend."""
    colour, dash, marker = STYLES[style]
    dashes = f' stroke-dasharray="{" ".join(f"{2 * length:g}" for length in dash)}"' if dash else ""
    path = (
        f'<path d="M0 4H40" stroke="{colour}" stroke-width="2"{dashes}/><path d="{MARKERS[marker]}" fill="{colour}"/>'
    )
    return f'<svg class="line" viewBox="0 0 40 8" aria-hidden="true">{path}</svg>'


def inline_svg(drawn: str, label: str, id_prefix: str) -> str:
    """The `<svg>` element of a drawn file: what only a file needs is gone, its ids are its own."""
    element = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</defs>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    view = next(re.finditer(r'viewBox="[^"]*"', element))[0]
    element = element[element.index(">") + 1 :].replace("xlink:href=", "href=").replace(TEXT_COLOUR, "currentColor")
    element = re.sub(r' d="[^"]*"', lambda path: shorter(path[0]), element)
    element = with_own_ids(re.sub(r"\n\s*", "\n", element).strip(), id_prefix)
    # The label holds what a file says, and is put in when nothing is searched for any more.
    return f'<svg role="img" aria-label="{html.escape(label)}" {view} stroke-linejoin="round">\n{element}'


def shorter(path: str) -> str:
    """A path on one line, to a hundredth of a point."""
    rounded = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), path)
    return re.sub(r"\s*\n", " ", rounded).replace(' "', '"')


def with_own_ids(element: str, prefix: str) -> str:
    """Rename every id that something in the element refers to, and drop the others: two figures share no id."""
    referred = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', element)
    names = {name: f"{prefix}-{number}" for number, name in enumerate(dict.fromkeys(a or b for a, b in referred))}
    element = re.sub(r' id="([^"]*)"', lambda found: f' id="{names[found[1]]}"' if found[1] in names else "", element)
    return re.sub(r'(href="#|url\(#)([^")]+)', lambda found: found[1] + names[found[2]], element)
