import math
import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from stages.lib.report.figures import COLOURS, MOST_POINTS, STYLES, TEXT_COLOUR, Line, line_figure, line_sample, thinned

LINES = [Line("training", [1, 2, 3, 4], [0.5, 2.0, 1.0, 1.5]), Line("held-out", [2, 4], [1.25, 0.75], style=1)]


def figure(lines=LINES, title="train_rm loss", id_prefix="a"):
    return line_figure(lines, title=title, id_prefix=id_prefix)


def drawn_points(svg, colour):
    """Where the line of a colour goes, in points of the picture."""
    path = re.search(rf'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; [^"]*stroke: {colour.lower()}', svg)[1]
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[ML] (\S+ \S+)", path)]


def luminance(colour):
    """Relative luminance, https://www.w3.org/TR/WCAG21/#dfn-relative-luminance."""
    shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_the_picture_is_to_scale():
    # All points of both lines lie on one affine map from data to picture, x to the right and y upwards.
    data = [point for line in LINES for point in zip(line.steps, line.values, strict=True)]
    svg = figure()
    drawn = drawn_points(svg, COLOURS[0]) + drawn_points(svg, COLOURS[1])
    assert len(drawn) == len(data)
    for axis, direction in ((0, 1), (1, -1)):
        (low, at_low), *_, (high, at_high) = sorted((d[axis], p[axis]) for d, p in zip(data, drawn, strict=True))
        scale = (at_high - at_low) / (high - low)
        assert scale * direction > 0
        for place, point in zip(data, drawn, strict=True):
            assert point[axis] == pytest.approx(at_low + scale * (place[axis] - low), abs=0.02)


def test_the_same_figure_has_the_same_bytes_whatever_the_users_settings(monkeypatch):
    first = figure()
    monkeypatch.setitem(mpl.rcParams, "axes.linewidth", 9.0)
    monkeypatch.setitem(mpl.rcParams, "font.size", 20.0)
    monkeypatch.setitem(mpl.rcParams, "svg.hashsalt", "other")
    assert figure() == first
    assert mpl.rcParams["font.size"] == 20.0


def test_it_holds_no_version_no_date_no_address_and_no_style_for_the_page():
    svg = figure()
    for word in ("matplotlib", mpl.__version__, "http", "<metadata", "<!--", "<style", "<text", "xlink"):
        assert word not in svg.lower()


def test_it_is_one_well_formed_element_that_says_what_it_shows():
    element = ElementTree.fromstring(figure(title='<a> & "b"'))
    assert element.tag == "svg"
    assert element.get("aria-label") == (
        '<a> & "b": training from 0.5 at step 1 to 1.5 at step 4; held-out from 1.25 at step 2 to 0.75 at step 4'
    )


def test_ids_are_its_own_and_each_reference_has_one():
    first, second = figure(id_prefix="a"), figure(id_prefix="b")
    ids = re.findall(r' id="([^"]*)"', first + second)
    assert len(ids) == len(set(ids))
    for svg in (first, second):
        referred = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
        assert {a or b for a, b in referred} == set(re.findall(r' id="([^"]*)"', svg))


def test_it_is_legible_on_light_and_dark_pages():
    svg = figure()
    assert "currentColor" in svg
    assert TEXT_COLOUR not in svg
    assert "#ffffff" not in svg.lower()
    for colour in COLOURS:
        assert contrast(colour, "#ffffff") >= 3
        assert contrast(colour, "#1d2126") >= 3


def test_every_style_is_another():
    assert len({(colour, dash) for colour, dash, _ in STYLES}) == len(STYLES) == 8
    assert len({(colour, marker) for colour, _, marker in STYLES}) == 8
    assert [colour for colour, _, _ in STYLES] == [*COLOURS, *COLOURS]


def test_a_figure_draws_every_style_and_the_legend_shows_it():
    svg = figure([Line(f"line {style}", [1, 2], [style, style], style) for style in range(len(STYLES))])
    drawn = re.findall(r'clip-path="[^"]*" style="fill: none; ([^"]*)"', svg)
    lines = [look for look in drawn if any(colour.lower() in look for colour in COLOURS)]
    assert len(lines) == len(STYLES)
    for style, look in enumerate(lines):
        colour, dash, _ = STYLES[style]
        sample = ElementTree.fromstring(line_sample(style)).find("path")
        assert sample.get("stroke") == colour
        assert f"stroke: {colour.lower()}" in look
        dashes = re.search(r"stroke-dasharray: ([^;]*);", look)
        found = [float(length) / 1.5 for length in dashes[1].split(",")] if dashes else []
        assert found == pytest.approx(list(dash))
        assert [float(length) / 2 for length in (sample.get("stroke-dasharray") or "").split()] == list(dash)


@pytest.mark.parametrize("label", ["url(#x", 'a href="#b', ' d="M 1.23456 2"', "#010203", "</svg><script>", "a\n\n  b"])
def test_what_a_label_holds_changes_nothing_but_the_label(label):
    svg = figure([Line(label, [1, 2], [3, 4])], title=label)
    said = ElementTree.fromstring(svg).get("aria-label")
    assert " ".join(said.split()).startswith(" ".join(label.split()))
    assert svg.partition(">")[2] == figure([Line("x", [1, 2], [3, 4])]).partition(">")[2]


def test_contrast_of_black_and_white_is_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_what_is_no_finite_number_is_left_out():
    line = Line("training", [1, 2, 3, 4], [0.5, math.nan, math.inf, 1.5])
    assert figure([line]) == figure([Line("training", [1, 4], [0.5, 1.5])])
    assert "train_rm loss: no values" in figure([Line("training", [1], [math.nan])])


def test_thinning_by_hand():
    assert thinned([1, 2, 3, 4, 5], [10, 20, 30, 40, 60], 5) == ([1, 2, 3, 4, 5], [10, 20, 30, 40, 60])
    # At most 3 points: runs of two, (1, 2), (3, 4), (5).
    assert thinned([1, 2, 3, 4, 5], [10, 20, 30, 40, 60], 3) == ([1.5, 3.5, 5], [15, 35, 60])
    assert thinned([], [], 3) == ([], [])


def test_a_long_run_stays_a_small_picture():
    steps = range(100_000)
    svg = figure([Line("training", steps, [math.sin(step * step) for step in steps])])
    assert len(drawn_points(svg, COLOURS[0])) <= MOST_POINTS
    assert len(svg) < 40_000
