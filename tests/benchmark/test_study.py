"""A recipe says what it says, and what cannot work is refused in a sentence before any work."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_study import content, write

from scalabl.benchmark.study import Study, make_study, read_study
from scalabl.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*/*.yaml"))
BASE, TASK = Path("/base"), Path("/task")


def study(**changes: Any) -> Study:
    return make_study(content(BASE, TASK, **changes), "tiny")


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"cpu", "paper", "rank", "covariance", "sensitivity", "prior_std"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_hold_up(path: Path) -> None:
    read = read_study(path)
    assert read.name == path.stem
    for variant in read.variants:
        for task in read.tasks:
            read.recipe(variant, task, read.seeds[-1])


def test_what_is_more_particular_wins() -> None:
    of_method = {"map": {"weight_decay": 0.5}, "blob": {"init_sigma": 0.3}}
    common = content(BASE, TASK)["settings"] | {"weight_decay": 0.2, "prior_std": 2.0, "lora_dropout": 0.0}
    methods = ["mle", "map", {"name": "stiff", "method": "map", "weight_decay": 0.9}, "blob", "scalabl", "mc_dropout"]
    made = study(methods=methods, settings=common, method_settings=of_method)
    recipes = {variant.name: made.recipe(variant, "t", 3) for variant in made.variants}
    assert [recipes[name].weight_decay for name in ("mle", "map", "stiff")] == [0.2, 0.5, 0.9]
    # the paper's own settings of a method stand over those that all share
    assert (recipes["blob"].prior_std, recipes["blob"].init_sigma) == (0.2, 0.3)
    assert recipes["scalabl"].prior_std == 2.0
    assert recipes["mc_dropout"].lora_dropout == 0.1
    assert all(
        r.seed == 3 and r.data == "t" and r.model == "/base" and r.validation_rows == 9 for r in recipes.values()
    )


def test_settings_that_a_plain_lora_does_not_read_do_not_make_it_another_run() -> None:
    methods = [{"method": "mle", "grid": {"prior_std": [0.1, 1.0], "r": [4, 8]}}]
    made = study(methods=methods)
    recipes = {made.recipe(variant, "t", 0) for variant in made.variants}
    assert [v.name for v in made.variants] == [f"mle prior_std={p}, r={r}" for p in (0.1, 1.0) for r in (4, 8)]
    assert sorted(recipe.r for recipe in recipes) == [4, 8]


def test_a_post_hoc_method_is_fitted_on_mle_and_temperature_is_a_row_of_mle() -> None:
    made = study(methods=["temperature", "laplace", "tfb", "mle", "ensemble"])
    assert [variant.name for variant in made.variants] == ["mle", "laplace", "tfb", "ensemble"]
    assert len({made.recipe(variant, "t", 0) for variant in made.variants}) == 1
    assert made.recipe(made.variants[1], "t", 0).method == "mle"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ["scalable"]}, "no method 'scalable'; did you mean scalabl"),
        ({"methods": []}, "lacks methods"),
        ({"tasks": None}, "lacks tasks"),
        ({"sedes": [1]}, "'sedes'.*did you mean seeds"),
        ({"steps": 5}, "'steps'.*put it under settings"),
        ({"settings": {"stepz": 5}}, "mle: .*'stepz'.*did you mean steps"),
        ({"settings": {"steps": 0}}, "mle: steps is 0"),
        ({"settings": {"seed": 1}}, "settings sets seed, which the study itself decides"),
        ({"settings": [1]}, "settings must be a mapping"),
        ({"method_settings": {"sgld": {}}}, "method_settings names 'sgld'"),
        ({"method_settings": {"map": {"weight_decay": 0.1, "data": "x"}}}, "method_settings of map sets data"),
        ({"methods": ["mle", {"method": "mle", "r": 8}]}, "Two methods are called 'mle'"),
        ({"methods": [{"name": "x+temperature", "method": "mle"}]}, "marks tempered rows"),
        ({"methods": [{"method": "scalabl", "grid": {"r": 4}}]}, "grid of scalabl must name settings with lists"),
        ({"methods": [{"method": "scalabl", "samples": -1}]}, "samples is -1"),
        ({"methods": ["mle", "ensemble"], "seeds": [0]}, "there is one seed"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": ["a"]}, "a seed is 'a'"),
        ({"shift": {"arc-easy": ["boolq"]}}, "shift names arc-easy, which is not trained on"),
        ({"test_rows": 0}, "test_rows is 0"),
        ({"validation_rows": 0}, "validation_rows is 0"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        study(**changes)


@pytest.mark.parametrize(
    ("text", "sentence"), [("a: [", "is not YAML"), ("- a", "must hold a study"), (None, "There is no recipe")]
)
def test_files_that_are_no_recipes_are_refused(text: str | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_study(path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["no.yaml"], "There is no recipe no.yaml"),
        (["study.yaml", "--workers", "0"], "--workers is 0; it must be at least 1."),
        (["study.yaml", "--output", "study.yaml/x"], "cannot be written"),
    ],
)
def test_the_command_line_refuses_in_a_sentence(
    options: list[str], sentence: str, tmp_path: Path, task_directory: Path
) -> None:
    write(tmp_path / "study.yaml", content(BASE, task_directory))
    code = "import sys; from scalabl.cli import main; sys.argv = ['scalabl', 'benchmark', *sys.argv[1:]]; main()"
    said = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, cwd=tmp_path)
    assert said.returncode == 2 and said.stderr.startswith("scalabl: ") and sentence in said.stderr
    assert said.stderr.count("\n") == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["study.yaml"]


def test_reading_and_planning_do_not_wait_for_torch(tmp_path: Path, task_directory: Path) -> None:
    path = write(tmp_path / "study.yaml", content(BASE, task_directory))
    code = (
        "import sys; sys.argv = ['scalabl', 'benchmark', sys.argv[1], '--dry-run']\n"
        "from scalabl.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "0 of 16 cells are finished." in said.stdout
