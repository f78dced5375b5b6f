"""Settings: from YAML and options, checked before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from scalabl.core.errors import UserError
from scalabl.runs.record import RunRecord
from scalabl.runs.settings import Settings, layer_fraction, make_settings


def test_options_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text("steps: 7\nlearning_rate: 1e-4\nlora_alpha: 32\ntarget_modules: [q_proj, lm_head]\nbits: null\n")
    settings = make_settings({"steps": 9, "model": None, "seed": None}, config)
    assert settings.optimisation.steps == 9 and settings.machine.bits is None
    assert settings.seed == 0 and settings.model == Settings().model
    # YAML 1.1 reads 1e-4 as text and 32 as a whole number
    assert settings.optimisation.learning_rate == 1e-4 and isinstance(settings.adapter.lora_alpha, float)
    assert settings.adapter.targets == ["q_proj", "lm_head"]


def test_lists_of_modules_may_be_lists_or_texts(tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    for text in ("stochastic_modules: [q_proj, self_attn.v_proj]", "stochastic_modules: q_proj, self_attn.v_proj"):
        config.write_text(text)
        assert make_settings({}, config).posterior.stochastic == ["q_proj", "self_attn.v_proj"]
    assert make_settings({"stochastic_modules": "v_proj"}, config).posterior.stochastic == ["v_proj"]
    assert Settings().posterior.stochastic is None


def test_the_settings_of_a_posterior_reach_the_adapter_and_its_callback() -> None:
    from tiny_base import loaded

    from scalabl.runs.method import load_method
    from scalabl.training.callback import ELBOCallback

    made = Settings.flat(empirical_prior=True, draws="batch", stochastic_modules="v_proj", layers="last:1")
    config: Any = load_method("scalabl").adapter_config(made, loaded()[0])
    assert config.prior.empirical and config.draws == "batch" and config.stochastic_modules == ["v_proj"]
    (callback,) = load_method("scalabl").callbacks(Settings.flat(kl="forward"), 8)
    assert isinstance(callback, ELBOCallback) and callback.kl == "forward"


def test_a_recipe_is_its_own_file(tmp_path: Path) -> None:
    import yaml

    config = tmp_path / "recipe.yaml"
    settings = Settings.flat(steps=3, chat=True, train_rows=5, layers="last:2", empirical_prior=True, draws="batch")
    config.write_text(yaml.safe_dump(settings.as_dict()))
    assert make_settings({}, config) == settings


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
        make_settings({}, config)
    with pytest.raises(UserError, match="There is no recipe"):
        make_settings({}, tmp_path / "other.yaml")


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
        ({"draws": "row"}, "draws is 'row'; it must be one of sequence, batch"),
        ({"kl": "backward"}, "kl is 'backward'; it must be one of reverse, forward"),
        ({"kl": "forward", "covariance": "full"}, "for a diagonal covariance and a fixed prior"),
        ({"kl": "forward", "empirical_prior": True}, "for a diagonal covariance and a fixed prior"),
        ({"stochastic_modules": " , "}, "stochastic_modules names no module"),
        (
            {"stochastic_modules": "q_proj,o_proj"},
            r"names o_proj, which target_modules \(q_proj,v_proj\) does not adapt",
        ),
    ],
)
def test_values_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings.flat(**setting)


def test_layers() -> None:
    assert layer_fraction("all") is None and layer_fraction("last:8") == 8


def test_a_recipe_may_be_by_panel(tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text("data: x.jsonl\noptimisation: {steps: 7}\nadapter:\n  r: 2\nrows: {max_length: 9}\nbeta: 0.5\n")
    made = make_settings({"r": 3}, config)
    assert made == Settings.flat(data="x.jsonl", steps=7, r=3, max_length=9, beta=0.5)
    config.write_text("adapter: {rank: 2}")
    with pytest.raises(UserError, match="names 'rank', which is no setting"):
        make_settings({}, config)


def test_settings_are_flat_on_disk_and_keep_their_order() -> None:
    flat = Settings.flat(r=3, prior_mean=0.5).as_dict()
    assert Settings.flat(**flat).as_dict() == flat and flat["r"] == 3
    assert list(flat)[:4] == ["model", "data", "method", "steps"]
    assert list(flat)[-2:] == ["rows_per_class", "template"]
    assert Settings().changed(beta=2.0).posterior.beta == 2.0


def test_a_record_is_read_as_it_was_written_and_newer_ones_are_refused(tmp_path: Path) -> None:
    record = RunRecord(Settings().as_dict(), status="finished", warnings=["w"], predictive="linearized")
    record.write(tmp_path)
    assert RunRecord.read(tmp_path) == record and record.settings == Settings()
    content = json.loads((tmp_path / "scalabl.json").read_text())
    assert content["version"] == 1 and "tokens" not in content
    old = {"recipe": {"steps": 0, "method": "mle"}, "status": "finished", "unknown": 1}
    (tmp_path / "scalabl.json").write_text(json.dumps(old))
    read = RunRecord.read(tmp_path)
    assert read.is_finished and read.recipe["steps"] == 0 and read.method == "mle" and read.processes == 1
    assert read.labels is None and read.base_options == {"dtype": "auto", "bits": None, "quantization": "bitsandbytes"}
    for other, sentence in (
        (old | {"version": 2, "scalabl": "9.0"}, "was written by scalabl 9.0; read it with that version"),
        (old | {"recipe": "steps"}, "must hold a run's record"),
    ):
        (tmp_path / "scalabl.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=sentence):
            RunRecord.read(tmp_path)


def test_a_recipe_that_names_a_setting_twice_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, said in (
        ("r: 8\nsteps: 3\nr: 4\n", r"recipe.yaml is not YAML \(line 3: the key 'r' is there twice\); write settings"),
        ("adapter: {r: 8}\nr: 4\n", "recipe.yaml names r twice, once in its panel; keep one of them"),
        ("r: 4\nadapter: {r: 8}\n", "recipe.yaml names r twice, once in its panel; keep one of them"),
    ):
        recipe.write_text(text)
        with pytest.raises(UserError, match=said):
            make_settings({}, recipe)
    recipe.write_text("r: 4\n")
    assert make_settings({"r": 8}, recipe).adapter.r == 8  # an option wins, as it says


def test_a_damaged_record_is_refused_by_the_name_of_its_field(tmp_path: Path) -> None:
    path = tmp_path / "scalabl.json"
    whole = RunRecord(
        Settings().as_dict(), status="finished", scoring={"scoring": "letters"}, scoring_name="letters",
        scoring_nll={"letters": 1.0}, parameters={"lora": 2}, versions={"torch": "2"}, tokens={"all": 1},
        class_counts={"a": 1}, predictive="mc", bayesianized={}, calibration={}, adapter_sha256="a", joint_sha256="j",
        features_sha256="f", config_sha256="c", held_out_sha256="h", trained_sha256="t", warnings=["w"],
    ).as_dict()  # fmt: skip
    path.write_text(json.dumps(whole))
    assert RunRecord.read(tmp_path).as_dict() == whole
    for name, value in whole.items():
        for wrong in ([[value]], True, 1.5 if isinstance(value, str) else "x"):
            path.write_text(json.dumps(whole | {name: wrong}))
            with pytest.raises(UserError, match="; train the run again or restore the file|was written by scalabl"):
                RunRecord.read(tmp_path)
    for changes, sentence in (
        ({"recipe": whole["recipe"] | {"r": "four"}}, "r is 'four'; it must be a whole number; train the run again"),
        ({"recipe": whole["recipe"] | {"steps": float("inf")}}, "steps is inf; it must be a whole number"),
        ({"recipe": whole["recipe"] | {"method": float("nan")}}, "method is nan; it must be one of scalabl, mle, "),
        ({"recipe": whole["recipe"] | {"method": "sgd"}}, "method is 'sgd'; it must be one of scalabl, mle, "),
        ({"rows": {"train": 1}}, "rows is .*, which no record has; train the run again or restore the file"),
        ({"task": {"labels": "ab"}}, "task is .*, which no record has"),
        ({"status": "done"}, "status is 'done'; it must be running or finished"),
        ({"scoring": {"scoring": "x"}}, "scoring is 'x'; it must be one of letters, continuation, text, head"),
    ):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(UserError, match=sentence):
            RunRecord.read(tmp_path)
