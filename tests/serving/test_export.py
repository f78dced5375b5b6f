"""`scalabl export`: plain LoRAs that answer as the run's particles do, on stock PEFT, and what is refused."""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from joint_adapter import add_joint
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_base import adapted, loaded, questions, tiny_base
from torch import Tensor, nn

import scalabl
from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, JOINT, sha256
from scalabl.inference.calibration import Calibration
from scalabl.posterior.draws import noise
from scalabl.predictive.sampling import DRAWS
from scalabl.runs.loading import load_adapter
from scalabl.runs.record import RECORD, RunRecord
from scalabl.scoring import Letters
from scalabl.serving.export import export
from scalabl.serving.manifest import ParticleManifest, read_manifest
from scalabl.training.posthoc.run import bayesianize
from scalabl.training.posthoc.settings import read_source, rows_for, settings_for
from scalabl.tuner import stochastic_layers
from scalabl.tuner.state import noise_particles

CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"architecture": "qwen2"},
    "rank and alpha patterns": {
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
        "use_rslora": True,
    },
    "full covariance": {"covariance": "full"},
    "empirical prior": {"empirical_prior": True},
    "free rows": {"unit_rows": False},
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "top layers": {"stochastic_layers": "last:1"},
    "some modules": {"stochastic_modules": ["v_proj"]},
    "trained biases": {"architecture": "qwen2", "bias": "all"},
    "whole modules": {"modules_to_save": ["embed_tokens"]},
}
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


def saved(directory: Path, **settings: Any) -> Path:
    """An adapter with a posterior as if trained, written by `save_pretrained`."""
    model = adapted(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:  # biases and whole modules
                parameter.add_(0.1)
    model.save_pretrained(str(directory))
    return directory


def batch() -> Tensor:
    _, tokenizer = loaded()
    scoring = Letters(tokenizer)
    return scoring.collate([scoring.encode(row) for row in questions(3)]).input_ids


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids).logits
    return found


def stock(directory: Path, architecture: str = "llama") -> PeftModel:
    """A particle as anyone loads it; PEFT's remarks on missing weights are errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(loaded(architecture)[0], str(directory)).eval()


def of_particles(directory: Path, number: int, seed: int, architecture: str = "llama") -> Tensor:
    """(N, B, T, V) logits of `scalabl.particles` on the loaded adapter."""
    model, ids = load_adapter(loaded(architecture)[0], directory), batch()
    with scalabl.particles(model, number, seed=seed):
        return logits(model, ids.repeat(number, 1)).unflatten(0, (number, len(ids)))


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_stock_peft_model_gives_our_particles_logits(settings: dict[str, Any], tmp_path: Path) -> None:
    architecture = settings.get("architecture", "llama")
    run = saved(tmp_path / "run", **settings)
    export(run, 3, tmp_path / "out", seed=4)
    ours = of_particles(run, 3, 4, architecture)
    assert (ours[0] - ours[1]).abs().max() > 1e-2, "the particles are alike, so nothing is compared"
    for k in range(3):
        config = PeftConfig.from_pretrained(str(tmp_path / "out" / "particles" / str(k)))
        assert config.peft_type == "LORA"
        theirs = logits(stock(tmp_path / "out" / "particles" / str(k), architecture), batch())
        assert (theirs - ours[k]).abs().max() <= 1e-5 * ours.abs().max()


def test_the_covariance_between_layers_is_in_the_particles(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", covariance="full", rank_pattern={"v_proj": 2})
    without = of_particles(run, 2, 0)
    add_joint(run)
    ours = of_particles(run, 2, 0)
    assert (ours - without).abs().max() > 1e-2
    manifest = export(run, 2)
    assert manifest.identity.joint_sha256 == sha256(run / JOINT)
    for k in range(2):
        theirs = logits(stock(run / "particles" / str(k)), batch())
        assert (theirs - ours[k]).abs().max() <= 1e-5 * ours.abs().max()


def test_particles_of_a_laplace_posterior_over_all_layers(
    plain_run: Path, task_directory: Path, tmp_path: Path, own_cache: Path
) -> None:
    """`scalabl bayesianize`: the run predicts linearised, so that its particles are said to be another predictive."""
    source, run = read_source(plain_run), tmp_path / "run"
    task, rows, held_out = rows_for(source, str(task_directory))
    bayesianize(source, task, rows, held_out, run, settings_for(source, str(task_directory), "laplace"))
    manifest = export(run, 3, seed=1)
    assert manifest.identity.joint_sha256 == json.loads((run / RECORD).read_text())["joint_sha256"]
    assert "predicts linearised" in manifest.warnings[0]
    ours = of_particles(run, 3, 1)
    assert (ours[0] - ours[1]).abs().max() > 1e-2
    for k in range(3):
        theirs = logits(stock(run / "particles" / str(k)), batch())
        assert (theirs - ours[k]).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("draws", DRAWS)
def test_every_kind_of_draws_is_that_of_the_monte_carlo_predictive(draws: str, tmp_path: Path) -> None:
    """Eleven layers: by name the eleventh stands before the third, and Sobol draws go by the model's order."""
    model = adapted(layers=11)
    model.save_pretrained(str(tmp_path / "run"))
    export(tmp_path / "run", 4, seed=2, draws=draws)
    leaves = stochastic_layers(model)
    drawn = noise(draws, 4, {name: leaf.out_features for name, leaf in leaves.items()}, 2)
    with noise_particles(model, drawn):
        s = {name: leaf.draw(4, torch.device("cpu")) for name, leaf in leaves.items()}
    for k in range(4):
        found = load_file(tmp_path / "run" / "particles" / str(k) / ADAPTER)
        for name, leaf in leaves.items():
            expected = s[name][k][:, None] * leaf.rows()
            assert torch.allclose(found[f"base_model.model.{name}.lora_A.weight"], expected, atol=1e-6)


def test_particle_k_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    few, many = (export(run, n, tmp_path / str(n), seed=7) for n in (2, 5))
    assert few.sha256 == many.sha256[:2]
    other = export(run, 2, tmp_path / "other", seed=8)
    assert not set(other.sha256) & set(many.sha256)


def test_the_base_model_is_not_needed_nor_copied(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", target_modules=["q_proj", "lm_head"])
    content = json.loads((run / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = "/nowhere/base"
    (run / "adapter_config.json").write_text(json.dumps(content))
    manifest = export(run, 1)
    assert manifest.base_model == "/nowhere/base"
    with safe_open(run / "particles" / "0" / ADAPTER, framework="pt") as file:
        assert all(".lora_A." in key or ".lora_B." in key for key in file.keys())  # noqa: SIM118
    with pytest.raises(UserError, match="configuration of the base model /nowhere/base cannot be read"):
        export(run, 2, tmp_path / "out", draws="sobol")
    assert not (tmp_path / "out").exists()


def test_the_manifest_of_a_run(scored_run: Path, tmp_path: Path) -> None:
    record = json.loads((scored_run / RECORD).read_text())
    manifest = export(scored_run, 2, tmp_path, seed=3, draws="antithetic", name="mine")
    assert read_manifest(tmp_path) == read_manifest(tmp_path / "particles") == manifest
    assert manifest.identity.adapter_sha256 == record["adapter_sha256"]
    assert manifest.scoring == record["scoring"]
    assert manifest.recipe is not None and manifest.recipe["data"] == record["recipe"]["data"]
    assert (manifest.base_model, manifest.base_fingerprint) == (str(tiny_base()), record["base_fingerprint"])
    assert (manifest.identity.number, manifest.identity.seed, manifest.identity.draws) == (2, 3, "antithetic")
    assert (manifest.adapters, manifest.dtype, manifest.rank) == (("mine-0", "mine-1"), "float32", 4)
    assert manifest.temperature is None
    assert manifest.sha256 == tuple(sha256(tmp_path / "particles" / k / ADAPTER) for k in "01")


def test_a_fitted_temperature_is_told_and_a_strangers_is_not(copied_run: Path, tmp_path: Path) -> None:
    facts = copied_run / "posthoc" / "temperature" / "temperature.json"
    facts.parent.mkdir(parents=True)
    facts.write_text(json.dumps({"temperature": 1.75, "adapter_sha256": sha256(copied_run / ADAPTER)}))
    assert export(copied_run, 1, tmp_path / "a").temperature == 1.75
    facts.write_text(json.dumps({"temperature": 1.75, "adapter_sha256": "another"}))
    assert export(copied_run, 1, tmp_path / "b").temperature is None


def test_a_run_with_particles_in_it_is_still_the_run(copied_run: Path) -> None:
    from scalabl.runs.loading import load_run

    export(copied_run, 2)
    assert (copied_run / "particles" / "1" / ADAPTER).is_file()
    assert load_run(copied_run).is_bayesian
    model = PeftModel.from_pretrained(loaded()[0], str(copied_run))
    assert list(model.peft_config) == ["default"] and stochastic_layers(model)


def test_the_same_call_again_writes_nothing_and_another_one_is_refused(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    first = export(run, 2, seed=1)
    files = {path: path.stat().st_mtime_ns for path in (run / "particles").rglob("*")}
    assert export(run, 2, seed=1) == first
    for settings, said in (
        ({"number": 3}, "its number is 2, now 3"),
        ({"seed": 2}, "its seed is 1, now 2"),
        ({"draws": "sobol"}, "its draws is independent, now sobol"),
        ({"name": "other"}, "its name is particle, now other"),
    ):
        with pytest.raises(UserError, match=said):
            export(run, **{"number": 2, "seed": 1, **settings})  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in (run / "particles").rglob("*")} == files
    weights = run / "particles" / "1" / ADAPTER
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="truncated or altered since it was exported"):
        export(run, 2, seed=1)
    changed = load_file(run / ADAPTER)
    save_file({name: tensor + 1 for name, tensor in changed.items()}, run / ADAPTER)
    with pytest.raises(UserError, match="of another adapter"):
        export(run, 2, seed=1)


def test_another_calibration_is_another_export(copied_run: Path, tmp_path: Path) -> None:
    """With tau = 1 it is the same particles, but a client tempers them otherwise."""
    record = RunRecord.read(copied_run)

    def calibrated(kind: str, temperature: float) -> None:
        nll = {"before": 1.0, "after": 0.9}
        made = Calibration(1.0, {kind: temperature}, kind, 10, 0, 4, "ab" * 32, nll)
        replace(record, calibration=made.as_dict()).write(copied_run)

    calibrated("mc", 1.25)
    manifest = export(copied_run, 2)
    assert (manifest.calibrated, manifest.temperature, manifest.warnings) == (True, 1.25, ())
    assert export(copied_run, 2) == manifest
    with pytest.raises(UserError, match=r"another export \(it is calibrated, now it is not\)"):
        export(copied_run, 2, raw=True)
    raw = export(copied_run, 2, tmp_path / "raw", raw=True)
    assert raw.warnings == ("the particles are uncalibrated: the run's calibration is left out",)
    with pytest.raises(UserError, match=r"another export \(it is not calibrated, now it is\)"):
        export(copied_run, 2, tmp_path / "raw")
    calibrated("mc", 1.5)
    with pytest.raises(UserError, match="its temperature is 1.25, now 1.5"):
        export(copied_run, 2)
    calibrated("mean", 1.5)
    [said] = export(copied_run, 2, tmp_path / "mean").warnings
    assert said == (
        "the particles are uncalibrated: the run's calibration was not fitted for particles; scalabl calibrate "
        "--predictive mc fits a temperature of theirs"
    )


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    (run / "particles").mkdir()
    (run / "particles" / "notes").touch()
    with pytest.raises(UserError, match=r"holds no manifest\.json; choose another --output"):
        export(run, 2)
    assert [path.name for path in (run / "particles").iterdir()] == ["notes"]


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(tmp_path / "run")
    whole = os.replace

    def full(source: Any, target: Any) -> None:
        if "1" in Path(target).parts:  # while the second of three particles is written
            raise OSError(28, "No space left on device")
        whole(source, target)

    monkeypatch.setattr(os, "replace", full)
    before = sorted(path.name for path in run.iterdir())
    for output in (None, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            export(run, 3, output)
    assert sorted(path.name for path in run.iterdir()) == before
    assert not (tmp_path / "new").exists()


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    (run / ADAPTER).write_bytes((run / ADAPTER).read_bytes()[:-40])
    with pytest.raises(UserError, match="truncated or altered"):
        export(run, 1)
    assert not (run / "particles").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"number": 0}, "The number of particles is 0; it must be at least 1"),
        ({"seed": -1}, "The seed is -1"),
        ({"draws": "halton"}, "no 'halton' draws"),
        ({"draws": "moments", "number": 1}, "moments needs at least 2 particles"),
        ({"name": "a/b"}, "The name is 'a/b'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    with pytest.raises(UserError, match=said):
        export(run, **{"number": 2, **settings})
    assert not (run / "particles").exists()


def test_plain_runs_are_refused(plain_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a plain LoRA without a posterior"):
        export(plain_run, 2, tmp_path / "out")
    with pytest.raises(UserError, match="is a plain LoRA without a posterior"):
        export(saved(tmp_path / "run") / "mean", 2)
    with pytest.raises(UserError, match="There is no directory"):
        export(tmp_path / "nowhere", 2)


def test_what_a_server_does_otherwise_is_said(copied_run: Path, tmp_path: Path) -> None:
    def said(**settings: Any) -> str:
        return " | ".join(export(saved(tmp_path / str(len(settings)) / "run", **settings), 1).warnings)

    assert said() == "the precision of the training is not recorded; vLLM takes half precision unless given a --dtype"
    assert "vLLM issue 51594" in said(target_modules=["q_proj", "lm_head"])
    patterns = said(rank_pattern={"v_proj": 2}, modules_to_save=["embed_tokens"])
    assert "older versions of vLLM ignore" in patterns and "modules_to_save" in patterns
    assert export(copied_run, 1, tmp_path / "as it is").warnings == ()
    record = json.loads((copied_run / RECORD).read_text())
    record |= {"predictive": "linearized", "recipe": record["recipe"] | {"bits": 4}}
    (copied_run / RECORD).write_text(json.dumps(record))
    manifest: ParticleManifest = export(copied_run, 1)
    assert "quantised to 4 bits" in manifest.warnings[0] and "Monte Carlo predictive" in manifest.warnings[1]
