"""Recipes: from YAML and options, checked before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest

from scalabl.errors import UserError
from scalabl.training.recipe import Recipe, layer_fraction, make_recipe


def test_options_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text("steps: 7\nlearning_rate: 1e-4\nlora_alpha: 32\ntarget_modules: [q_proj, lm_head]\nbits: null\n")
    recipe = make_recipe({"steps": 9, "model": None, "seed": None}, config)
    assert recipe.steps == 9 and recipe.seed == 0 and recipe.model == Recipe().model and recipe.bits is None
    # YAML 1.1 reads 1e-4 as text and 32 as a whole number
    assert recipe.learning_rate == 1e-4 and isinstance(recipe.lora_alpha, float)
    assert recipe.targets == ["q_proj", "lm_head"]


def test_a_recipe_is_its_own_file(tmp_path: Path) -> None:
    import yaml

    config = tmp_path / "recipe.yaml"
    recipe = Recipe(steps=3, chat=True, train_rows=5, layers="last:2")
    config.write_text(yaml.safe_dump(recipe.as_dict()))
    assert make_recipe({}, config) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes: 3", r"names 'stpes', which is no setting; did you mean steps\?"),
        ("qqq: 3", r"names 'qqq', which is no setting\.$"),
        ("steps: many", "steps is 'many'; it must be a whole number"),
        ("steps: 2.5", "steps is 2.5; it must be a whole number"),
        ("steps: true", "steps is True; it must be a whole number"),
        ("steps:", "steps is None; it must be a whole number"),
        ("steps: [1, 2]", "it must be a whole number"),
        ("chat: 1", "chat is 1; it must be true or false"),
        ("data:", "data is None; it must be a text"),
        ("learning_rate: fast", "it must be a number"),
        ("- steps", "must hold settings as name: value lines"),
        ("steps: [", "is not YAML"),
        ("", "must hold settings"),
    ],
)
def test_bad_files_are_refused_with_the_setting_named(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(text)
    with pytest.raises(UserError, match=message):
        make_recipe({}, config)
    with pytest.raises(UserError, match="There is no recipe"):
        make_recipe({}, tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"method": "laplce"}, "must be one of scalabl, mle"),
        ({"scoring": "letter"}, "must be one of auto, letters, continuation"),
        ({"steps": 0}, "at least 1"),
        ({"batch_size": -1}, "at least 1"),
        ({"r": 0}, "at least 1"),
        ({"prior_std": 0.0}, "prior_std is 0.0; it must be a positive number"),
        ({"prior_std": -1.0}, "prior_std is -1.0; it must be a positive number"),
        ({"prior_std": float("nan")}, "positive number"),
        ({"learning_rate": float("inf")}, "positive number"),
        ({"init_sigma": 0.0}, "positive number"),
        ({"beta": -0.1}, "zero or more"),
        ({"warmup": 1.0}, "between 0 and 1"),
        ({"lora_dropout": 1.0}, "between 0 and 1"),
        ({"train_rows": 0}, "at least 1"),
        ({"bits": 5}, "4, 8 or left out"),
        ({"seed": -1}, "between 0 and"),
        ({"layers": "last:0"}, "all or last:K"),
        ({"layers": "first:2"}, "all or last:K"),
        ({"target_modules": " , "}, "target_modules is empty"),
    ],
)
def test_values_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**setting)


def test_layers() -> None:
    assert layer_fraction("all") is None and layer_fraction("last:8") == 8
