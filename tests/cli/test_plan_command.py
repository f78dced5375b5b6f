"""`scalabl plan`, and the plan that `scalabl train` begins with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from program import Program, train_arguments
from tiny_base import tiny_base

from scalabl.cli.train import _in_short
from scalabl.planning import refusal as training_run
from scalabl.runs.settings import Settings

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """A directory that holds a model's config.json alone."""
    directory = tmp_path / "configured"
    directory.mkdir()
    shutil.copy(tiny_base(layers=6) / "config.json", directory)
    return directory


def figures(program: Program, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    said = program("plan", *arguments, "--json", tmp_path / "plan.json")
    assert said.code == 0, said
    found: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
    return found | {"out": said.out}


def test_a_configuration_is_enough(program: Program, configured: Path, tmp_path: Path) -> None:
    found = figures(program, tmp_path, "--model", configured, "--rank", 4, "--seq", 40)
    assert (found["batch"], found["sequence"], found["samples"]) == (4, 40, 10)
    assert found["lora_parameters"] == 6 * (4 * 32 * 2 + 4 * (32 + 16)) and found["variational_parameters"] == 6 * 2 * 8
    sizes = found["bytes"]
    parts = ("weights", "adapter", "gradients", "optimizer", "stored_rows")
    for kind in ("", "_checkpointed"):
        own = sum(sizes[name] for name in (*parts, f"activations{kind}", f"temporary{kind}"))
        assert sizes[f"training_peak{kind}"] == own
    assert sizes["activations_checkpointed"] < sizes["activations"]
    assert sizes["prediction_peak"] > sizes["prediction_peak_mean"] > sizes["weights"]
    assert sizes["optimizer"] == 2 * sizes["gradients"] == 2 * sizes["adapter"]
    assert sizes["key_value_cache"] == 10 * 4 * 6 * 2 * 16 * 40 * 4  # particles, rows, layers, keys and values
    assert found["flops"]["training_step_checkpointed"] > found["flops"]["training_step"] > 0
    assert found["fits"] is True and set(found["largest_batch"]) == {"training", "training_checkpointed", "prediction"}
    for word in ("parameters", "activations", "optimiser", "peak", "TFLOP", "largest batch", "keys and values"):
        assert word in found["out"], word


def test_published_shapes(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from extra_parameters import SHAPES

    shape = SHAPES["qwen2.5-7b"]
    shape.config().save_pretrained(tmp_path / "qwen")
    arguments = ("--model", tmp_path / "qwen", "--targets", "q_proj,v_proj,lm_head", "--card", "24GB")
    found = figures(program, tmp_path, *arguments, "--bits", 4)
    assert found["base_parameters"] == shape.parameters
    assert (found["lora_parameters"], found["variational_parameters"]) == (3_768_320, 912)
    assert (found["device"], found["dtype"], found["card"]) == ("cuda", "bfloat16", 24 * 10**9)
    # the linear layers of the decoder hold half a byte a number and their scales, the rest two bytes a number
    linear = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert found["bytes"]["weights"] == pytest.approx(
        linear * (0.5 + 1 / 64) + 2 * (shape.parameters - linear), rel=1e-3
    )
    assert found["bytes"]["training_peak"] <= found["card"] and found["largest_batch"]["training"] >= 4
    assert not list((tmp_path / "qwen").glob("*.safetensors"))


def test_a_recipe_is_planned_and_options_win(program: Program, configured: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = ("method: mle", "batch_size: 7", "max_length: 33", f"model: {configured}", "bits: 8", "scoring: letters")
    recipe.write_text("\n".join(lines))
    found = figures(program, tmp_path, "--config", recipe, "--dtype", "bfloat16", "--card", "1GB")
    assert (found["batch"], found["sequence"], found["loss"]) == (7, 33, "letters")
    assert found["variational_parameters"] == 0 and found["recipe"]["bits"] == 8
    whole = figures(program, tmp_path, "--config", recipe, "--bits", 16, "--batch", 2, "--card", "1kB")
    assert whole["recipe"]["bits"] is None and whole["batch"] == 2
    assert whole["bytes"]["weights"] > found["bytes"]["weights"]
    tight = figures(program, tmp_path, "--config", recipe, "--card", "10kB")
    assert tight["fits"] is False and tight["largest_batch"]["training"] == 0
    assert "does not fit" in tight["out"]


def test_the_last_line_says_whether_it_fits_and_what_to_do(program: Program, configured: Path, tmp_path: Path) -> None:
    arguments = ("--model", configured, "--seq", 64, "--batch", 16, "--device", "cpu")
    found = figures(program, tmp_path, *arguments, "--card", "1GB")
    last = " ".join(found["out"].split("fits: ")[1].split())
    assert f"at 16 rows a step, and so do up to {found['largest_batch']['training']:,}" in last
    card = f"{found['bytes']['training_peak'] - 1000}B"
    tight = figures(program, tmp_path, *arguments, "--card", card)
    said = " ".join(tight["out"].split("does not fit: ")[1].split())
    option, value = said.split("do this: ")[1].split()[:2]
    change = (option,) if value.startswith("(") else (option, value)
    assert figures(program, tmp_path, *arguments, *change, "--card", card)["fits"] is True
    hopeless = figures(program, tmp_path, *arguments, "--card", "10kB")
    assert "no one setting is enough; combine several of --" in " ".join(hopeless["out"].split())


def test_plain_fine_tuning_reads_every_token(program: Program, configured: Path, tmp_path: Path) -> None:
    of = {}
    for loss in ("letters", "continuation", "tokens"):
        arguments = ("--model", configured, "--seq", 64, "--loss", loss, "--card", "1kB")
        of[loss] = figures(program, tmp_path, *arguments)["bytes"]["training_peak"]
    assert of["letters"] < of["continuation"] < of["tokens"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--card", "24XB"), "for example 24GB"),
        (("--samples", 0), "--samples is 0; it must be at least 1"),
        (("--scored", 0), "--scored is 0; it must be at least 1"),
        (("--labels", 3), "--labels is of a head, and the loss is continuation; leave it out"),
        (("--scored", 9, "--loss", "letters"), "--scored is of continuations, and the loss is letters; leave it out"),
        (("--loss", "words"), "it must be letters, continuation, head or tokens"),
        (("--device", "tpu"), "it must be cpu or cuda"),
        (("--device", "cuda"), "This machine has no cuda"),
        (("--bits", 3), "bits is 3; it must be 4, 8 or left out"),
        (("--batch", 0), "batch_size is 0; it must be at least 1"),
        (("--model", "./nowhere"), "There is no model directory ./nowhere"),
        (("--targets", "query"), "target_modules names query, but this model has"),
        (("--layers", "last:9"), "layers is last:9, but the model has 6; lower it"),
        (("--method", "monteclora"), "What monteclora takes depends on the numbers"),
        (("--json", "/nowhere/plan.json"), "give a file in a directory that exists"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(
    options: tuple[object, ...], sentence: str, program: Program, configured: Path
) -> None:
    assert sentence in program("plan", "--model", configured, *options).sentence()


def test_a_machine_with_a_card_plans_for_its_cpu_too(
    program: Program, configured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalabl.planning.memory.machine_device", lambda: "cuda")
    found = figures(program, tmp_path, "--model", configured, "--device", "cpu")
    assert found["device"] == "cpu" and found["card"] > 10**7


def test_a_training_says_what_it_takes(program: Program, task_directory: Path, tmp_path: Path) -> None:
    said = program(*train_arguments(task_directory, tmp_path / "run", "--scoring", "letters"))
    assert said.code == 0
    first, second = said.out.splitlines()[:2]
    assert first.startswith("training: scalabl on /") and f"rows of {task_directory}, " in first
    assert "the default" not in first
    assert second.startswith("memory: about ") and "weights" in second and "at 8 rows of" in second


def test_a_training_says_what_nobody_chose() -> None:
    said = _in_short(Settings.flat(steps=1_000, gradient_accumulation=2))
    assert said == (
        "training: scalabl on smollm2-135m-instruct (the default; --model names another), rows of arc-easy (the "
        "default; --data names another), 1,000 steps of 16 rows, learning rate 0.001"
    )


def test_a_training_that_cannot_fit_is_refused_before_its_weights_are_read(
    program: Program, configured: Path, task_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in tiny_base().glob("*token*"):
        shutil.copy(file, configured)
    monkeypatch.setattr(training_run, "machine_memory", lambda device: 200_000)
    output = tmp_path / "run"
    arguments = ("train", "--model", configured, "--data", task_directory, "--output", output, "--rank", 4)
    sentence = program(*arguments).sentence()
    assert sentence.startswith("This training needs about") and "200.0 kB are available" in sentence
    assert "--batch-size 4" in sentence and not output.exists()
    # there are no weights: now it gets as far as that
    assert "cannot be loaded" in program(*arguments, "--ignore-memory").err


def test_what_cannot_be_planned_is_trained_all_the_same(program: Program, task_directory: Path, tmp_path: Path) -> None:
    said = program(*train_arguments(task_directory, tmp_path / "run", "--scoring", "letters", "--method", "monteclora"))
    assert said.code == 0
    assert said.out.splitlines()[1].startswith("memory: not planned. What monteclora takes")
