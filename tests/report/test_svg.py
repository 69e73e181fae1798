"""Plots show what the numbers say."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora.report.svg import (
    Axis,
    Line,
    Point,
    category_axis,
    nice_categories,
    number_axis,
    plot,
    sparkline,
    thin,
)

FINITE = st.floats(min_value=-1e12, max_value=1e12, allow_nan=False)


@settings(deadline=None)
@given(st.lists(st.one_of(FINITE, st.just(math.nan), st.just(math.inf)), max_size=20))
def test_an_axis_holds_its_finite_values_and_has_round_ticks_within(values):
    axis = number_axis(values)
    assert axis.low < axis.high
    for value in values:
        if math.isfinite(value):
            assert 0 <= axis.place(value) <= 1
    ticks = [value for value, _ in axis.ticks()]
    slack = 1e-6 * (axis.high - axis.low) + 1e-9 * abs(axis.high)
    assert all(axis.low - slack <= value <= axis.high + slack for value in ticks)
    assert ticks == sorted(ticks)
    assert len(ticks) < 20


def test_log_axis_where_values_span_decades():
    assert number_axis([1e-5, 1e-3]).log
    assert not number_axis([1.0, 2.0]).log
    assert not number_axis([0.0, 100.0]).log
    axis = number_axis([1e-5, 1e-3])
    assert axis.place(1e-4) == pytest.approx(0.5)
    assert [text for _, text in axis.ticks()] == ["1e-5", "1e-4", "1e-3"]
    assert len(number_axis([1.0, 9.0]).ticks()) >= 3


def circles(svg):
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)"', svg)]


def test_points_lie_where_their_values_say():
    svg = plot(Axis(0, 10), Axis(0, 1), points=[Point(0, 0), Point(10, 1), Point(5, 0.5)], width=472, height=256)
    low, high, middle = circles(svg)
    assert low[0] < middle[0] < high[0]
    assert low[1] > middle[1] > high[1]
    assert middle == ((low[0] + high[0]) / 2, (low[1] + high[1]) / 2)


def test_error_bars_have_the_length_of_the_error():
    svg = plot(Axis(0, 1), Axis(0, 10), points=[Point(0.5, 5, error=1), Point(0.5, 5, error=math.nan)], height=256)
    ((_, _, top, bottom),) = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="([\d.]+)"/>', svg)
    assert abs(float(top) - float(bottom)) == pytest.approx((256 - 12 - 44) * 2 / 10, abs=0.2)


def test_a_curve_is_broken_where_it_is_not_finite():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 2.0), (4, 1.0), (5, math.inf), (6, 1.5)]
    svg = plot(Axis(0, 6), Axis(0, 3), [Line(points)])
    assert [len(piece.split()) for piece in re.findall(r'<polyline points="([^"]*)"', svg)] == [2, 2]
    assert len(circles(svg)) == 1  # a single point would be invisible as a line
    assert "nan" not in svg
    assert "inf" not in svg


def test_nothing_finite_draws_nothing():
    svg = sparkline(Axis(0, 1), number_axis([math.nan]), [Line([(0, math.nan)])])
    assert "polyline" not in svg
    assert "circle" not in svg


def test_text_is_escaped_and_the_result_is_xml():
    hostile = '<script>"&'
    svg = plot(
        category_axis([hostile], hostile),
        number_axis([1.0], hostile),
        [Line([(0, 1), (0.2, 1)], title=hostile)],
        [Point(0, 1, title=hostile)],
    )
    assert "<script" not in svg
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert texts.count(hostile) == 5


def test_thin_takes_means_and_leaves_out_what_is_not_finite():
    points = [(i, float(i)) for i in range(1000)] + [(1000, math.nan)]
    few = thin(points, 100)
    assert len(few) == 100
    assert few[0] == (4.5, 4.5)
    assert thin([(1, 2.0)], 100) == [(1, 2.0)]
    assert thin([], 5) == []


def test_categories_put_numbers_in_order():
    assert nice_categories([16, "x", 4, 16, None, 8.5]) == [4, 8.5, 16, "x", None]
