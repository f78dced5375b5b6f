"""An adapter read from its files alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_base import adapted, loaded

from scalabl.core.errors import UserError
from scalabl.runs.directory import describe_adapter, require_adapter
from scalabl.runs.loading import load_adapter
from scalabl.tuner import kl_divergence, prior_of
from scalabl.tuner.diagnostics import summarize, weights_of


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"prior_mean": 0.1, "prior_std": 0.4}, "N(0.1, 0.4^2)"),
        (
            {"prior_mean": 0.1, "empirical_prior": True},
            "N(0.1, std^2), each layer's std from its posterior (empirical Bayes)",
        ),
    ],
)
def test_the_prior_is_the_adapters_own(tmp_path: Path, covariance: str, config: dict[str, Any], words: str) -> None:
    model = adapted(covariance=covariance, **config)
    model.save_pretrained(str(tmp_path))
    found = describe_adapter(tmp_path)
    assert found["prior"] == words
    assert found["kl"] == pytest.approx(kl_divergence(model).item(), rel=1e-5)
    stds = {round(layer["prior_std"], 5) for layer in found["layers"]}
    assert len(stds) == 6 if config.get("empirical_prior") else stds == {0.4}


def test_an_adapter_from_before_the_empirical_prior_has_a_fixed_one(tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for name in ("empirical_prior", "draws", "stochastic_modules"):
        del config[name]
    path.write_text(json.dumps(config))
    assert describe_adapter(tmp_path)["prior"] == "N(0.577, 0.2^2)"


def test_modules_without_a_posterior_are_counted_as_lora(tmp_path: Path) -> None:
    adapted(stochastic_modules=["v_proj"]).save_pretrained(str(tmp_path))
    found = describe_adapter(tmp_path)
    assert (found["target_modules"], found["stochastic_modules"]) == ("q_proj, v_proj", "v_proj")
    assert [layer["name"].rpartition(".")[2] for layer in found["layers"]] == ["v_proj"] * 3
    assert found["variational_parameters"] == 3 * 2 * 4
    assert found["lora_parameters"] == 3 * 4 * ((32 + 32) + (32 + 16))


def test_alpha_patterns_mean_what_they_mean_to_peft(tmp_path: Path) -> None:
    patterns = {r"layers\.0\.self_attn\.q_proj": 1, "v_proj": 32, "v": 64, "self_attn": 128, r"^model\.layers\.1": 256}
    model = adapted(alpha_pattern=patterns, lora_alpha=8, init_lora_weights=False)
    model.save_pretrained(str(tmp_path))
    shown = {layer["name"]: layer["effect"] for layer in describe_adapter(tmp_path)["layers"]}
    wanted = {layer.name: layer.effect for layer in summarize(weights_of(model), prior_of(model))}
    assert shown == pytest.approx(wanted, rel=1e-5) and min(wanted.values()) > 0


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no adapter_config.json; give a directory made by"):
        require_adapter(tmp_path)
    config = tmp_path / "adapter_config.json"
    for text, sentence in (
        ("{", "is not readable JSON .*; restore the file"), ("[]", "must hold an adapter's configuration; restore"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}', "holds no adapter_model.safetensors; give a directory"),
    ):  # fmt: skip
        config.write_text(text)
        with pytest.raises(UserError, match=sentence):
            require_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert require_adapter(tmp_path) == {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"r": "four"}, ": r is 'four'; it must be a whole number; restore the file"),
        ({"rank_pattern": "x"}, ": rank_pattern is 'x'; it must be a mapping of whole numbers, at least 1; restore"),
        ({"lora_alpha": []}, r": lora_alpha is \[\]; it must be a number; restore"),
        ({"prior_std": None}, ": prior_std is None; it must be a number; restore"),
        ({"target_modules": [3]}, r": target_modules is \[3\]; it must be a pattern, or a list of names; restore"),
        ("[" * 100_000, " has a value that no adapter has .*recursion"),
        ("{", " has a value that no adapter has .*Expecting property name"),
    ],
)
def test_a_configuration_with_a_value_that_no_adapter_has_is_refused(
    changed: dict[str, Any] | str, said: str, tmp_path: Path
) -> None:
    """Where the model is loaded, which PEFT reads the configuration for by itself."""
    adapted().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(changed if isinstance(changed, str) else json.dumps(content | changed), encoding="utf-8")
    with pytest.raises(UserError, match=f"adapter_config.json{said}"):
        load_adapter(loaded()[0], tmp_path)
