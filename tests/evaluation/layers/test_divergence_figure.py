"""The table and the figure say what the report says."""

import io
import math

import pytest
from rich.console import Console

from lskip.evaluation.layers.divergence import DivergenceReport
from lskip.evaluation.layers.divergence_figure import divergence_figure, print_divergence, summary

REPORT = DivergenceReport(
    positions=200,
    perplexity=[math.inf, 512.25, 12.5],
    agreement=[0.25, 0.5, 1.0],
    accuracy=[0.125, 0.25, 0.375],
    entropy=[0.5, 1.5, 2.25],
    settled_at=[0.2, 0.2, 0.6],
    first_agreeing_at=[0.3, 0.3, 0.4],
    first_right_at=[0.1, 0.2, 0.1],
)


def test_the_table_has_a_line_for_each_layer_and_says_what_could_be_saved():
    printed = io.StringIO()
    print_divergence(REPORT, Console(file=printed, width=100), "a title")
    text = printed.getvalue()
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["2", "512.2", "0.50", "0.25", "1.50", "20.0%", "20.0%"] in rows
    assert ["1", "inf", "0.25", "0.12", "0.50", "20.0%", "10.0%"] in rows
    assert "a title" in text
    # 0.2 + 0.4 + 1.8 = 2.4 of 3; right at 0.4 of the positions, there at (0.1 + 0.4 + 0.3) / 0.4 = 2
    assert "layers_needed 2.4 of 3" in text and "would save 20% of the layers" in text
    assert "at 40% of the positions, there first at depth 2.0; an exit there would save 33%" in text


def test_nothing_is_said_about_the_depth_of_what_is_never_right():
    never = DivergenceReport(**{**vars(REPORT), "first_right_at": [0.0, 0.0, 0.0]})
    assert summary(never)[1] == "no layer is ever right about the next token"


def test_the_figure_draws_the_numbers_with_names_and_units():
    figure = divergence_figure(REPORT, "a title")
    perplexity, agreement, entropy, depths = figure.axes
    assert all(axes.get_xlabel() == "layer" and axes.get_ylabel() for axes in figure.axes)
    assert perplexity.get_yscale() == "log" and "nats" in entropy.get_ylabel()
    for axes, series in ((perplexity, [REPORT.perplexity]), (agreement, [REPORT.agreement, REPORT.accuracy])):
        assert [line.get_ydata().tolist() for line in axes.lines] == series
        assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert entropy.lines[0].get_ydata().tolist() == REPORT.entropy
    assert [bar.get_height() for bar in depths.patches] == REPORT.settled_at
    assert [bar.get_x() + bar.get_width() / 2 for bar in depths.patches] == pytest.approx([1, 2, 3])
    assert depths.lines[0].get_ydata().tolist() == REPORT.first_right_at
    assert depths.lines[1].get_xdata() == pytest.approx([2.4, 2.4])
    figure.savefig(io.BytesIO())  # infinity can be drawn: the line has a gap
