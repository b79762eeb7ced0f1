from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from nsm.export.report.svg import HEIGHT, Line, LogAxis, heat_map, histogram, log_chart
from nsm.trace import Array
from tests.export.report.pictures import points, svgs


def test_an_axis_is_logarithmic_and_keeps_what_is_outside_on_its_edge() -> None:
    axis = LogAxis(1e-6, 1e-2, 100.0, 0.0)
    assert [axis.at(value) for value in (1e-6, 1e-4, 1e-2)] == pytest.approx([100.0, 50.0, 0.0])
    assert (axis.at(1e-9), axis.at(1.0)) == (100.0, 0.0)
    assert axis.ticks() == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    assert len(LogAxis(1e-20, 1.0, 0.0, 1.0).ticks()) <= 9


def test_a_power_law_is_a_straight_line() -> None:
    steps = np.array([1, 10, 100])
    (picture,) = svgs(log_chart([Line("p50", steps, 1e-6 * steps, "one")], "step", "error"))
    (x0, y0), (x1, y1), (x2, y2) = points(picture, "one")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert 0 < y2 < y1 < y0 < HEIGHT


def test_points_that_have_no_place_on_the_axes_are_left_out() -> None:
    values = np.array([1e-6, np.nan, 0.0, np.inf, 1e-5])
    (picture,) = svgs(log_chart([Line("p50", np.arange(1, 6), values, "one")], "step", "error"))
    assert len(points(picture, "one")) == 2
    assert log_chart([Line("p50", np.arange(1, 3), np.zeros(2), "one")], "step", "error") == ""
    assert log_chart([], "step", "error") == ""


def test_names_and_marks_are_text_and_not_markup() -> None:
    line = Line("<b>&", np.array([1, 2]), np.array([1.0, 2.0]), "one")
    text = log_chart([line], "a<b", "c&d", (2.0, 2.0, "<script>"))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;&amp;" in text
    (picture,) = svgs(text)
    assert len(list(picture.iter("circle"))) == 1
    (picture,) = svgs(log_chart([line], "a", "b", (2.0, 0.0, "no place on the axis")))
    assert list(picture.iter("circle")) == []


def test_a_single_point_makes_a_chart() -> None:
    (picture,) = svgs(log_chart([Line("p50", np.array([1]), np.array([1e-6]), "one")], "step", "error"))
    assert len(points(picture, "one")) == 1


def test_cells_are_the_stronger_the_nearer_to_the_limit_and_marked_beyond() -> None:
    rows: dict[str, Array] = {"0.bank": np.array([0.0, 1e-7, 1e-5, 1e-4]), "1.<b>": np.array([np.nan, 1e-3, np.inf, 0])}
    (picture,) = svgs(heat_map(rows, ["0", "1", "2", "3"], 1e-4, "step"))
    cells = list(picture.iter("rect"))
    assert len(cells) == 7
    strengths = [float(cell.attrib["fill-opacity"]) for cell in cells[:4]]
    assert strengths == sorted(strengths)
    assert strengths[0] < 0.05
    assert [cell.attrib["class"] for cell in cells] == ["cell"] * 4 + ["cell over"] * 2 + ["cell"]
    assert sum(item.attrib.get("class") == "cross" for item in picture.iter("text")) == 2
    assert cells[1].findtext("title") == "0.bank, 1: 1.00e-07"


def test_many_columns_do_not_have_a_name_each() -> None:
    names = [str(step) for step in range(100)]
    (picture,) = svgs(heat_map({"0.bank": np.ones(100)}, names, 1.0, "step"))
    shown = [item.text for item in picture.iter("text") if item.text in names]
    assert 5 < len(shown) <= 16


def test_the_histogram_counts_everything_and_what_is_marked() -> None:
    values = np.concatenate([np.full(90, 1.0), np.full(10, 0.01), [np.inf]])
    marked = np.arange(101) >= 95
    (picture,) = svgs(histogram(values, marked, 0.02, "margin", "tokens"))
    bars = [(item.attrib["class"], str(item.findtext("title"))) for item in picture.iter("rect")]
    assert [(style, int(title.split()[0])) for style, title in bars] == [("bar", 10), ("bar", 90), ("bar bad", 5)]
    assert "excused up to here" in ElementTree.tostring(picture, "unicode")
    (picture,) = svgs(histogram(values, marked, 1e-30, "margin", "tokens"))
    assert "excused" not in ElementTree.tostring(picture, "unicode")


@pytest.mark.parametrize("values", [np.zeros(3), np.full(3, np.inf), np.zeros(0)], ids=["zero", "infinite", "none"])
def test_nothing_to_count_is_no_histogram(values: Array) -> None:
    assert histogram(values, np.zeros(len(values), bool), 0.1, "margin", "tokens") == ""
