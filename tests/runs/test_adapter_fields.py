"""A damaged configuration of an adapter is refused by the name of its field, wherever it is read."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from scalabl.core.errors import UserError
from scalabl.runs.adapter_fields import require_sound
from scalabl.runs.directory import adapter_config, reading_config
from scalabl.runs.settings import AdapterSettings
from scalabl.tuner.blob import BLoBConfig
from scalabl.tuner.config import ScalaBLConfig

DAMAGED: list[tuple[str, Any, str]] = [
    ("r", None, "r is None; it must be a whole number"),
    ("r", True, "r is True; it must be a whole number"),
    ("r", 2.5, "r is 2.5; it must be a whole number"),
    ("r", 0, "r is 0; it must be at least 1"),
    ("lora_alpha", "x", "lora_alpha is 'x'; it must be a number"),
    ("lora_alpha", float("nan"), "lora_alpha is nan; it must be a number, at most 1e+30 in size"),
    ("lora_alpha", 10**400, "it must be a number, at most 1e+30 in size"),
    ("lora_dropout", 1.5, "lora_dropout is 1.5; it must be between 0 and 1"),
    ("target_modules", 3, "target_modules is 3; it must be a pattern, or a list of names"),
    ("target_modules", ["q_proj", None], "target_modules is ['q_proj', None]; it must be a pattern"),
    ("layers_to_transform", ["x"], "layers_to_transform is ['x']; it must be a whole number, or a list of them"),
    ("rank_pattern", {"q_proj": -1}, "it must be a mapping of whole numbers, at least 1"),
    ("alpha_pattern", [], "alpha_pattern is []; it must be a mapping of numbers"),
    ("bias", "some", "bias is 'some'; it must be one of none, all, lora_only"),
    ("modules_to_save", "lm_head", "modules_to_save is 'lm_head'; it must be a list of names"),
    ("use_rslora", "yes", "use_rslora is 'yes'; it must be true or false"),
    ("base_model_name_or_path", ["x"], "base_model_name_or_path is ['x']; it must be a text"),
    ("task_type", {}, "task_type is {}; it must be a text"),
    ("covariance", [], "covariance is []; it must be one of diagonal, full"),
    ("prior_std", 0, "prior_std is 0; it must be a positive number"),
    ("prior_mean", float("inf"), "prior_mean is inf; it must be a number, at most"),
    ("init_sigma", -1, "init_sigma is -1; it must be a positive number"),
    ("stochastic_layers", "last:²", "stochastic_layers is 'last:²'; it must be last:K"),
    ("stochastic_layers", f"last:{'9' * 5000}", "it must be last:K"),
    ("stochastic_modules", [1], "stochastic_modules is [1]; it must be a pattern, or a list of names"),
]


def written(directory: Path, **changes: Any) -> dict[str, Any]:
    ScalaBLConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], stochastic_layers="last:1").save_pretrained(
        str(directory)
    )
    path = directory / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")
    return config


@pytest.mark.parametrize(("field", "value", "message"), DAMAGED)
def test_a_field_is_named_with_what_it_must_be(tmp_path: Path, field: str, value: Any, message: str) -> None:
    written(tmp_path, **{field: value})
    (tmp_path / "adapter_model.safetensors").touch()
    for read in (lambda: adapter_config(tmp_path, "somebody"), lambda: reading_config(tmp_path).__enter__()):
        with pytest.raises(UserError) as caught:
            read()
        sentence = str(caught.value)
        assert sentence.startswith(str(tmp_path / "adapter_config.json: ")) and message in sentence
        assert sentence.endswith("; restore the file.") and len(sentence) < 400


def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    config = written(tmp_path)
    del config["lora_alpha"]
    with pytest.raises(UserError, match="x has no lora_alpha; restore the file"):
        require_sound(config, "x")
    require_sound({"peft_type": "IA3", "feedforward_modules": None}, "x")  # which has none


def test_what_is_written_is_read(tmp_path: Path) -> None:
    configs = (
        LoraConfig(r=4, lora_alpha=8.5, target_modules=["q_proj"], layers_to_transform=[0, 2]),  # type: ignore[arg-type]
        LoraConfig(), LoraConfig(target_modules=r".*\.q_proj", init_lora_weights="pissa"),
        LoraConfig(rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 0.5}, modules_to_save=["score"]),
        ScalaBLConfig(stochastic_layers="last:0.25", prior_mean=0.577), BLoBConfig(),
    )  # fmt: skip
    for number, config in enumerate(configs):
        config.save_pretrained(str(tmp_path / str(number)))
        with reading_config(tmp_path / str(number)):
            pass


@pytest.mark.parametrize("layers", ["last:²", f"last:{'1' * 5000}", "last:-1", "last:", "first:2"])
def test_layers_that_are_no_number_are_refused(layers: str) -> None:
    with pytest.raises(UserError, match="it must be all or last:K, for example last:8"):
        AdapterSettings(layers=layers)
