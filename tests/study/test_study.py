"""A recipe says what it says, and what cannot work is refused in a sentence before any work."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_study import content, write

from scalabl.core.errors import UserError
from scalabl.study.grids import grids
from scalabl.study.plan import make_plan
from scalabl.study.study import Study, make_study, read_study

ROOT = Path(__file__).parents[2]
TRAINING = "arc-easy"  # of `scalabl train`
RECIPES = sorted(
    path for path in (ROOT / "recipes").rglob("*.yaml") if path.stem != TRAINING and path.parent.name != "accelerate"
)
ABLATIONS = sorted((ROOT / "recipes" / "ablations").glob("*.yaml"))
ON_TWO_TASKS = ("beta", "prior_mean", "schedule")
ON_ONE_TASK = [path for path in ABLATIONS if path.stem not in ON_TWO_TASKS]
BASE, TASK = Path("/base"), Path("/task")


def study(**changes: Any) -> Study:
    return make_study(content(BASE, TASK, **changes), "tiny")


def test_there_are_recipes() -> None:
    names = {"rank", "covariance", "sensitivity", "prior_std", "kl", "draws", "unit_rows", "modules", "learning_rate"}
    names |= set(ON_TWO_TASKS)
    assert {path.stem for path in ABLATIONS} == names and {path.stem for path in RECIPES} == names | {
        "cpu",
        "paper",
        "study",
        "study_smollm2",
        "study_ensembles",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_hold_up(path: Path) -> None:
    read = read_study(path)
    assert read.name == path.stem and len(read.about) > 40
    profile = path.parent.name == "recipes"
    assert read.results == Path("docs/results", *([] if profile else ["ablations"]), path.stem)
    for variant in read.variants:
        for task in read.tasks:
            read.training_settings(variant, task, read.seeds[-1])


@pytest.mark.parametrize("name", ON_TWO_TASKS)
def test_ablations_on_two_tasks_take_the_budget_of_the_profile(name: str) -> None:
    profile, read = (
        read_study(ROOT / "recipes" / "cpu.yaml"),
        read_study(ROOT / "recipes" / "ablations" / f"{name}.yaml"),
    )
    assert set(read.tasks) < set(profile.tasks) and len(read.tasks) == 2
    for setting in ("model", "samples", "test_rows", "validation_rows", "settings", "seeds"):
        assert getattr(read, setting) == getattr(profile, setting)
    (plain,) = [variant for variant in read.variants if variant.name == "mle"]
    # the cells of plain LoRA are the profile's own
    assert read.training_settings(plain, "openbookqa", 0) == profile.training_settings(
        profile.variants[0], "openbookqa", 0
    )


@pytest.mark.parametrize("path", ON_ONE_TASK, ids=lambda path: path.stem)
def test_the_ablations_plan_and_share_one_budget(path: Path) -> None:
    read = read_study(path)
    made = make_plan(read)  # the rows of their task are in the package
    assert len(made.entries) == len(read.variants) * len(read.seeds)
    assert sum(cell.kind == "training" for cell in made.cells.values()) == len(made.entries)
    first = read_study(ON_ONE_TASK[0])
    for name in ("model", "tasks", "samples", "test_rows", "validation_rows", "settings"):
        assert getattr(read, name) == getattr(first, name)
    found = grids(read)
    assert found and all(grid.default is not None and len(grid.axes) <= 3 for grid in found)


def test_where_only_some_modules_are_stochastic_all_are_adapted() -> None:
    read = read_study(ROOT / "recipes" / "ablations" / "modules.yaml")
    settings = {variant.name: read.training_settings(variant, "arc-easy", 0) for variant in read.variants}
    assert settings["scalabl stochastic_modules=q_proj,v_proj"].posterior.stochastic == ["q_proj", "v_proj"]
    assert settings["scalabl stochastic_modules=all"].posterior.stochastic is None
    targets = {name: each.adapter.targets for name, each in settings.items() if "lm_head" not in name}
    assert len(targets) == 6 and all(len(names) == 7 for names in targets.values())
    assert (
        settings["scalabl lm_head alone"].adapter.targets
        == settings["mle with lm_head"].adapter.targets
        == [*targets["mle"], "lm_head"]
    )


def test_a_grid_knows_its_default_and_the_order_of_its_values() -> None:
    grid = {"prior_std": ["2e-1", 1, 2.0], "schedule": ["warmup", "elbo"]}
    common = content(BASE, TASK)["settings"] | {"schedule": "warmup"}
    made = study(methods=["mle", {"method": "scalabl", "name": "s", "grid": grid}], settings=common)
    (found,) = grids(made)
    assert [axis.values for axis in found.axes] == [(0.2, 1.0, 2.0), ("warmup", "elbo")]
    assert found.family == "s" and len(found.variants) == 6
    # the library's default of one, the study's of the other
    assert found.default is not None and found.default.name == "s prior_std=2e-1, schedule=warmup"
    assert found.variants[0, 1].name == "s prior_std=2e-1, schedule=elbo"
    elsewhere = study(methods=[{"method": "scalabl", "grid": grid}], settings=common | {"prior_std": 0.7})
    assert grids(elsewhere)[0].axes[0].default is None and grids(elsewhere)[0].default is None


def test_the_opening_comment_is_the_question(tmp_path: Path) -> None:
    path = write(tmp_path / "study.yaml", content(BASE, TASK, results="there"))
    assert read_study(path).about == ""
    path.write_text("# Is it\n# so?\n" + path.read_text() + "# not this\n")
    read = read_study(path)
    assert read.about == "Is it so?" and read.results == Path("there")


def test_what_is_more_particular_wins() -> None:
    of_method = {"map": {"weight_decay": 0.5}, "blob": {"init_sigma": 0.3}}
    common = content(BASE, TASK)["settings"] | {"weight_decay": 0.2, "prior_std": 2.0, "lora_dropout": 0.0}
    methods = ["mle", "map", {"name": "stiff", "method": "map", "weight_decay": 0.9}, "blob", "scalabl", "mc_dropout"]
    made = study(methods=methods, settings=common, method_settings=of_method)
    settings = {variant.name: made.training_settings(variant, "t", 3) for variant in made.variants}
    assert [settings[name].optimisation.weight_decay for name in ("mle", "map", "stiff")] == [0.2, 0.5, 0.9]
    # the paper's own settings of a method stand over those that all share
    assert (settings["blob"].posterior.prior_std, settings["blob"].posterior.init_sigma) == (0.2, 0.3)
    assert settings["scalabl"].posterior.prior_std == 2.0
    assert settings["mc_dropout"].adapter.lora_dropout == 0.1
    assert all(
        r.seed == 3 and r.data == "t" and r.model == "/base" and r.rows.validation_rows == 9 for r in settings.values()
    )


def test_settings_that_a_plain_lora_does_not_read_do_not_make_it_another_run() -> None:
    methods = [{"method": "mle", "grid": {"prior_std": [0.1, 1.0], "r": [4, 8]}}]
    made = study(methods=methods)
    settings = {made.training_settings(variant, "t", 0) for variant in made.variants}
    assert [v.name for v in made.variants] == [f"mle prior_std={p}, r={r}" for p in (0.1, 1.0) for r in (4, 8)]
    assert sorted(each.adapter.r for each in settings) == [4, 8]


def test_a_post_hoc_method_is_fitted_on_mle_and_temperature_is_a_row_of_mle() -> None:
    made = study(methods=["temperature", "laplace", "tfb", "mle", "ensemble"])
    assert [variant.name for variant in made.variants] == ["mle", "laplace", "tfb", "ensemble"]
    assert len({made.training_settings(variant, "t", 0) for variant in made.variants}) == 1
    assert made.training_settings(made.variants[1], "t", 0).method == "mle"


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
        ({"methods": [{"method": "scalabl", "predictive": "probit"}]}, "must be one of mc, linearized, auto"),
        ({"methods": [{"method": "blob", "predictive": "auto"}]}, "blob has its own, leave it out"),
        ({"methods": [{"method": "scalabl", "samples": 0, "predictive": "auto"}]}, "leave out one of the two"),
        ({"methods": ["mle", "ensemble"], "seeds": [0]}, "there is one seed"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": ["a"]}, "a seed is 'a'"),
        ({"shift": {"arc-easy": ["boolq"]}}, "shift names arc-easy, which is not trained on"),
        ({"test_rows": 0}, "test_rows is 0"),
        ({"name": "a/b"}, "is called 'a/b', but its directory is named after it"),
        ({"name": ".."}, "choose a plain name"),
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
        (["study.yaml", "--output", "study.yaml/x"], "choose another --output"),
        (["study.yaml", "--results", "study.yaml/x"], "choose another --results"),
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
