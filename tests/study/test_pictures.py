"""What a picture draws is what the table says."""

import random
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from test_tables import variant
from tiny_study import Done, content

from scalabl.metrics import METRICS
from scalabl.study.grids import Grid, grids
from scalabl.study.look import METRICS_DRAWN, svg
from scalabl.study.pictures import RAW, TEMPERED_NAME, comparison, grid_pictures, heat_map, pictures, points
from scalabl.study.study import Study, make_study
from scalabl.study.summary import OTHERS, Figure, Line, Table, figure, summarize

BASE, TASK = Path("/base"), Path("/task")


def test_every_set_has_its_picture_beside_the_tables(done: Done) -> None:
    names = [Path(done.task).name, f"{Path(done.task).name}-to-{Path(done.other).name}"]
    text = (done.output / "README.md").read_text(encoding="utf-8")
    for name in names:
        root = ElementTree.fromstring((done.output / f"methods-{name}.svg").read_bytes())
        assert root.tag.endswith("svg") and f"](methods-{name}.svg)" in text
    assert len(list(done.output.glob("*.svg"))) == len(names)


def test_dots_and_intervals_are_the_tables(done: Done) -> None:
    tables = summarize(done.study, done.plan, done.output, done.rows)
    for table, picture in zip(tables, pictures(done.study, tables), strict=True):
        assert picture.table is table
        for axes, metric in zip(picture.drawing.axes, METRICS_DRAWN, strict=True):
            drawn = {line.get_label(): line for line in axes.lines}
            for label, tempered in ((RAW, False), (TEMPERED_NAME, True)):
                lines = [line for line in table.lines if line.tempered == tempered]
                np.testing.assert_array_equal(drawn[label].get_xdata(), [line.figures[metric].mean for line in lines])
                for place, line in enumerate(lines):
                    ends = [line.figures[metric].low, line.figures[metric].high]
                    height = drawn[label].get_ydata()[place]  # type: ignore[index]
                    there = [list(other.get_xdata()) for other in axes.lines if set(other.get_ydata()) == {height}]
                    assert list(line.figures[metric].values) in there
                    assert (ends in there) == (ends[0] is not None)
            low, high = axes.get_xlim()
            assert all(low < value < high for line in table.lines for value in line.figures[metric].values)
        written = [label.get_text() for label in picture.drawing.axes[0].get_yticklabels()]
        for label, raw, tempered in zip(written, table.lines[:5], table.lines[5:], strict=True):
            assert label.startswith(raw.method)
            assert label.endswith("† at chance") == bool(raw.collapsed or tempered.collapsed)


def lines_of(study: Study, *, seeds: int = 2) -> list[Line]:
    """Lines with figures of no meaning, each its own."""
    drawn = random.Random(0)
    made = []
    for tempered in (False, True):
        for one in study.variants:
            columns = [*METRICS, *OTHERS]
            values = {column: figure([drawn.uniform(0.2, 0.8) for _ in range(seeds)], column) for column in columns}
            if tempered:
                values["validation_nll"] = Figure(None)
            made.append(Line(one, tempered, seeds, 0, values))
    return made


def study_of(*methods: object) -> Study:
    return make_study(content(BASE, TASK, methods=list(methods)), "tiny")


@pytest.fixture
def heat() -> tuple[Grid, Table]:
    grid = {"variational_learning_rate": [2e-3, 2e-2], "schedule": ["elbo", "warmup", "minibatch"],
            "init_sigma": [0.1, 0.2]}  # fmt: skip
    made = study_of("mle", {"method": "scalabl", "grid": grid})
    return grids(made)[0], Table("t", "t", 100, lines_of(made))


def test_a_heat_map_has_every_cell_of_the_table(heat: tuple[Grid, Table]) -> None:
    grid, table = heat
    picture = heat_map(grid, table, "t")
    assert picture is not None
    panels = [axes for axes in picture.drawing.axes if axes.texts]
    assert len(panels) == 4
    raw = {line.variant.name: line for line in table.lines if not line.tempered}
    for i, axes in enumerate(panels):
        column, third = ("validation_nll", "nll")[i // 2], i % 2
        means = np.array(axes.images[0].get_array())
        for (down, across), mean in np.ndenumerate(means):
            expected = raw[grid.variants[down, across, third].name].figures[column].mean
            assert mean == expected and axes.texts[3 * down + across].get_text() == f"{expected:.3f}"
        if i < 2:
            assert axes.get_title() == f"initial sigma {(0.1, 0.2)[third]}"
    again = heat_map(grid, table, "t")
    assert again is not None and again is not picture and svg(again) == svg(picture)


def test_a_heat_map_marks_the_best_of_the_validation_rows_and_the_default(heat: tuple[Grid, Table]) -> None:
    grid, table = heat
    place = (1, 2, 1)
    chosen = next(line for line in table.lines if line.variant == grid.variants[place])
    chosen.figures["validation_nll"] = Figure(0.01)
    lower = next(line for line in table.lines if line.variant == grid.variants[0, 0, 0])
    lower.figures["validation_nll"], lower.collapsed = Figure(0.001), 1  # at chance, so never the best
    picture = heat_map(grid, table, "t")
    assert picture is not None
    panels = [axes for axes in picture.drawing.axes if axes.texts]
    marks = {
        (i, patch.get_gid()): (round(patch.get_y() + 0.5), round(patch.get_x() + 0.5))  # type: ignore[attr-defined]
        for i, axes in enumerate(panels)
        for patch in axes.patches
        if patch.get_gid() in ("best", "default")
    }
    # best: the second panel of both rows; default: learning rate 2e-2, elbo, sigma 0.1
    assert marks == {(1, "best"): (1, 2), (3, "best"): (1, 2), (0, "default"): (1, 0), (2, "default"): (1, 0)}
    assert "†" in {text.get_text() for text in panels[0].texts}
    test_nll = chosen.figures["nll"].mean
    best = "scalabl (lr of s 0.02, minibatch, initial sigma 0.2) has the lowest NLL on validation rows"
    assert picture.words.startswith(
        f"{best} (0.010 there, {test_nll:.3f} on test rows); the default, scalabl (lr of s 0.02,"
    )


def test_two_settings_make_one_panel_a_row_and_what_is_missing_is_a_gap() -> None:
    made = study_of({"method": "scalabl", "grid": {"init_sigma": [0.05, 0.2], "schedule": ["elbo", "warmup"]}})
    (grid,) = grids(made)
    lines = [line for line in lines_of(made) if line.variant != grid.variants[1, 0]]
    picture = heat_map(grid, Table("t", "t", 100, lines), "t")
    assert picture is not None
    panels = [axes for axes in picture.drawing.axes if axes.texts]
    assert len(panels) == 2 and all(np.ma.getmaskarray(axes.images[0].get_array())[1, 0] for axes in panels)  # type: ignore[index]
    assert heat_map(grid, Table("t", "t", 100, []), "t") is None


def test_points_along_a_setting_are_the_tables() -> None:
    made = study_of(
        {"method": "mle", "grid": {"r": [4, 8, 16]}}, {"method": "scalabl", "grid": {"r": [4, 8, 16]}}, "map"
    )
    table = Table("t", "t", 100, lines_of(made))
    picture = points(grids(made), table, "t")
    assert picture is not None and picture.name == "along-r-t"
    known = {(line.variant.name, line.tempered): line for line in table.lines}
    for axes, metric in zip(picture.drawing.axes, METRICS_DRAWN, strict=True):
        drawn = {line.get_label(): line for line in axes.lines}
        for tempered, end in ((False, ""), (True, " + T")):
            for family in ("mle", "scalabl"):
                lines = [known[f"{family} r={r}", tempered] for r in (4, 8, 16)]
                track = drawn[family + end]
                np.testing.assert_array_equal(track.get_ydata(), [line.figures[metric].mean for line in lines])
                for place, line in zip(track.get_xdata(), lines, strict=True):
                    seeds = [list(other.get_ydata()) for other in axes.lines if set(other.get_xdata()) == {place}]
                    assert list(line.figures[metric].values) in seeds
            assert set(drawn["map" + end].get_ydata()) == {known["map", tempered].figures[metric].mean}
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "8", "16"]
        assert drawn["mle"].get_linestyle() == "-"


def test_names_have_no_order_so_that_no_line_joins_them() -> None:
    made = study_of({"method": "scalabl", "grid": {"stochastic_modules": ["q_proj", "q_proj,v_proj", None]}})
    picture = points(grids(made), Table("t", "t", 100, lines_of(made)), "t")
    assert picture is not None
    axes = picture.drawing.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["q", "q, v", "all"]
    assert {line.get_label(): line for line in axes.lines}["scalabl"].get_linestyle() == "None"


def test_a_study_with_grids_is_drawn_by_its_grids() -> None:
    made = study_of("mle", {"method": "scalabl", "grid": {"covariance": ["diagonal", "full"]}})
    tables = [Table("t", "t", 100, lines_of(made)), Table("t", "u", 100, lines_of(made))]
    assert [picture.name for picture in pictures(made, tables)] == ["along-covariance-t"]
    assert not grid_pictures([], tables[0], "t")


def test_a_method_without_seeds_to_spread_has_no_interval() -> None:
    one = [Line(variant("mle", "mle"), tempered, 1, 0, {m: figure([0.5], m) for m in (*METRICS, *OTHERS)})
           for tempered in (False, True)]  # fmt: skip
    picture = comparison(Table("t", "t", 9, one), {"t": "t"})
    assert all(len(line.get_xdata()) == 1 for line in picture.drawing.axes[0].lines if line.get_linestyle() != ":")
