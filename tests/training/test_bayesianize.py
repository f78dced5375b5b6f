"""`scalabl bayesianize`: from a stock adapter to predictions, and what it leaves when it fails."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from plain_lora import plain_adapter
from safetensors.torch import load_file
from tiny_base import CHAT_TEMPLATE, loaded, questions, tiny_base, tiny_tokenizer, write_task

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, JOINT
from scalabl.data.assemble import select_rows
from scalabl.data.example import Example
from scalabl.inference.calibrate import calibration_at_the_end
from scalabl.inference.classifier import Classifier
from scalabl.inference.promise import held_out_rows
from scalabl.predictive import LinearizedPredictive, MeanPredictive, predict
from scalabl.runs.directory import describe_adapter
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.record import RunRecord
from scalabl.runs.settings import Settings
from scalabl.scoring import Scorer
from scalabl.serving.manifest import calibrated_particles
from scalabl.training.posthoc.run import bayesianize
from scalabl.training.posthoc.settings import read_source, rows_for, settings_for
from scalabl.training.run import train
from scalabl.tuner import stochastic_layers
from scalabl.tuner.diagnostics import DROWNED
from scalabl.tuner.joint import joint_of

Program = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("own_cache")


def make(source: Path, rows: Path, output: Path, method: str = "laplace", **given: Any) -> dict[str, Any]:
    found = read_source(source)
    task, train_rows, held_out = rows_for(found, str(rows))
    return bayesianize(found, task, train_rows, held_out, output, settings_for(found, str(rows), method, **given))


def test_a_stock_adapter_from_the_command_line_to_predictions(
    program: Program, stock: Path, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, out, err = program("bayesianize", stock, "--data", rows, "--output", run, "--json", tmp_path / "record.json")
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert "Laplace over 21 numbers together (joint)" in said
    assert ("chosen by the held-out rows" in said) != ("by the evidence, which may be far off" in said)
    assert ("chosen by the held-out rows" in said) == (
        json.loads((run / "scalabl.json").read_text())["rows"]["validation"] > 0
    )
    record = json.loads((run / "scalabl.json").read_text())
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert record["scoring_nll"].keys() == {"letters", "continuation (sums)", "continuation (per token)"}
    assert record["scoring_nll"][record["scoring_name"]] == min(record["scoring_nll"].values())
    for name in (ADAPTER, "adapter_config.json"):
        assert (run / "mean" / name).read_bytes() == (stock / name).read_bytes()

    code, out, err = program("evaluate", run, "--data", rows, "--json", tmp_path / "figures.json")
    assert (code, err) == (0, "") and "ScalaBL, linearized" in out
    for predictive in ("mean", "mc", "linearized"):
        answers = tmp_path / f"{predictive}.jsonl"
        assert program("predict", run, "--input", rows, "--output", answers, "--predictive", predictive)[0] == 0
        epistemic = [json.loads(line)["epistemic"] for line in answers.read_text().splitlines()]
        assert len(epistemic) == 20 and (max(epistemic) > 1e-4) == (predictive != "mean")
    code, out, err = program("inspect", run)
    assert (code, err) == (0, "") and "full" in out
    answer = Classifier.from_pretrained(run, samples=6)(questions(3))
    assert answer.epistemic.max() > 1e-4


def test_the_mean_prediction_is_the_adapters_and_the_joint_is_in_use(stock: Path, rows: Path, tmp_path: Path) -> None:
    record = make(stock, rows, tmp_path / "run", scoring="continuation", normalization="token")
    run = load_run(tmp_path / "run")
    plain = PeftModel.from_pretrained(loaded()[0], str(stock)).eval()
    encoded = run.encode(questions(6))
    expected = predict(Scorer(plain, run.scoring), encoded, MeanPredictive())
    torch.testing.assert_close(predict(run.scorer, encoded, MeanPredictive()), expected, atol=1e-5, rtol=0)
    joint = joint_of(run.scorer.model)
    assert joint is not None and joint.size == record.bayesianized["numbers"] == 21
    # what is stored is what was fitted: H + precision I of these rows
    from scalabl.training.posthoc.laplace import fit_laplace

    again, facts = fit_laplace(run.scorer, run.encode(list(rows_for(read_source(stock), str(rows))[1])))
    assert facts["prior_precision"] == pytest.approx(record.bayesianized["prior_precision"], rel=1e-4)
    largest = joint.covariance().abs().max().item()
    torch.testing.assert_close(again.covariance(), joint.covariance(), rtol=0, atol=1e-3 * largest)
    prior = torch.distributions.MultivariateNormal(
        torch.zeros(21).double(), torch.eye(21).double() / record.bayesianized["prior_precision"]
    )
    whole = torch.distributions.MultivariateNormal(torch.ones(21).double(), joint.covariance())
    told = describe_adapter(tmp_path / "run")["kl"]
    assert told == pytest.approx(torch.distributions.kl_divergence(whole, prior).item(), rel=1e-3)
    # few rows leave most numbers open, which moves no logit of the linearisation's mean
    assert max(layer["noise"] for layer in describe_adapter(tmp_path / "run")["layers"]) > DROWNED
    assert not [sentence for sentence in record.warnings if "noise" in sentence]
    # PEFT alone knows each layer's own covariance
    alone = PeftModel.from_pretrained(loaded()[0], str(tmp_path / "run"))
    for name, factor in joint.marginals.items():
        block = stochastic_layers(alone)[name].posterior.covariance().detach()
        torch.testing.assert_close(block, (factor @ factor.T).float(), rtol=1e-4, atol=1e-6)
    linearized = predict(run.scorer, encoded, LinearizedPredictive(32))
    torch.testing.assert_close(
        predict(load_run(tmp_path / "run").scorer, encoded, LinearizedPredictive(32), batch_size=2), linearized,
        atol=1e-4, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize("structure", ["layer", "diagonal"])
def test_structure_can_be_dropped_before_it_is_stored(structure: str, stock: Path, rows: Path, tmp_path: Path) -> None:
    make(stock, rows, tmp_path / "joint", scoring="letters")
    make(stock, rows, tmp_path / "less", scoring="letters", structure=structure)
    whole, less = (joint_of(load_run(tmp_path / name).scorer.model) for name in ("joint", "less"))
    assert whole is not None and less is not None
    expected = whole.restricted(structure).factor  # type: ignore[arg-type]
    torch.testing.assert_close(less.factor, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


def test_a_finished_run_keeps_its_scoring_and_settings(task_directory: Path, tmp_path: Path) -> None:
    settings = {"model": str(tiny_base()), "data": str(task_directory), "method": "mle", "steps": 3, "batch_size": 4}
    settings |= {"r": 4, "layers": "last:2", "scoring": "continuation", "normalization": "sum", "learning_rate": 0.05}
    train(Settings.flat(**settings), tmp_path / "mle")  # type: ignore[arg-type]
    before = {path: path.read_bytes() for path in (tmp_path / "mle").rglob("*") if path.is_file()}
    record = make(tmp_path / "mle", task_directory, tmp_path / "run")
    assert record.scoring == json.loads((tmp_path / "mle" / "scalabl.json").read_text())["scoring"]
    assert record.rows == {"train": 24, "validation": 9} and record.recipe["layers"] == "last:2"
    run = load_run(tmp_path / "run")
    assert run.is_bayesian and run.scorer.trunk is not None and run.scorer.trunk.depth == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "mle").rglob("*") if path.is_file()}


def test_what_a_run_held_out_of_its_training_is_held_out_again(tmp_path: Path) -> None:
    """Of a data set without validation rows; another trainer's adapter may have seen all of them."""
    task = write_task(tmp_path / "task")
    (task / "validation.jsonl").unlink()
    settings = {"model": str(tiny_base()), "data": str(task), "method": "mle", "steps": 3, "batch_size": 4}
    settings |= {"r": 4, "layers": "last:2", "scoring": "letters", "train_rows": 15}
    of_run = train(Settings.flat(**settings), tmp_path / "mle")  # type: ignore[arg-type]
    found = read_source(tmp_path / "mle")
    loaded, rows, held_out = rows_for(found, str(task))
    expected = select_rows(loaded, Settings.flat(**settings).rows)  # type: ignore[arg-type]
    assert (rows, held_out) == (expected.train, expected.validation) and len(held_out) == of_run.rows["validation"] > 0
    record = make(tmp_path / "mle", task, tmp_path / "run")
    assert record.rows == of_run.rows and record.recipe["train_rows"] == 15
    assert held_out_rows(record) == held_out and held_out_rows(RunRecord.read(tmp_path / "run")) == held_out
    moved = shutil.copytree(task, tmp_path / "moved")  # the same rows elsewhere are the run's own too
    assert rows_for(found, str(moved))[1:] == (expected.train, expected.validation)
    assert held_out_rows(make(tmp_path / "mle", moved, tmp_path / "of moved")) == held_out
    grown = write_task(tmp_path / "grown", train=60)  # others: perhaps trained on, all of them
    (grown / "validation.jsonl").unlink()
    _, every, none = rows_for(found, str(grown))
    assert len(every) == 60 and not none
    loaded, few, held_out = rows_for(found, str(task), 5)
    assert len(few) == 5 and set(few) <= set(expected.train)
    of_few = bayesianize(found, loaded, few, held_out, tmp_path / "few", settings_for(found, str(task)))
    write_task(tmp_path / "other", train=20)
    for unknown in (of_few, make(tmp_path / "mle", tmp_path / "other", tmp_path / "elsewhere")):
        with pytest.raises(UserError, match="made by scalabl bayesianize, and which rows its LoRA was not trained on"):
            held_out_rows(unknown)
    (tmp_path / "mle" / "scalabl.json").unlink()
    _, every, none = rows_for(read_source(tmp_path / "mle"), str(task))
    assert not none and every == loaded.split("train")


def test_rows_that_are_fitted_on_are_never_held_out(stock: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", validation=310)
    _, rows, held_out = rows_for(read_source(stock), str(task))
    assert len(rows) == 24 and len(held_out) == 300  # as many as a run holds out
    (task / "train.jsonl").unlink()
    loaded, rows, held_out = rows_for(read_source(stock), str(task))
    assert rows == loaded.split("validation") and not held_out


def test_a_laplace_runs_particles_are_calibrated_too(stock: Path, tmp_path: Path) -> None:
    """Which `export` writes; and no pass has more rows than the fit had."""
    task = write_task(tmp_path / "task", validation=24)
    found, sizes = read_source(stock), list[int]()

    def calibrate(run: Run, rows: Sequence[Example]) -> dict[str, Any] | None:
        with pytest.MonkeyPatch.context() as patch:
            jacobian = LinearizedPredictive.jacobian
            patch.setattr(
                LinearizedPredictive,
                "jacobian",
                lambda self, scorer, batch: sizes.append(len(batch)) or jacobian(self, scorer, batch),
            )
            return calibration_at_the_end(run, rows)

    record = bayesianize(
        found, *rows_for(found, str(task)), tmp_path / "run",
        settings_for(found, str(task), scoring="letters", batch_size=3), calibrate,
    )  # fmt: skip
    assert record.calibration is not None and set(record.calibration["temperatures"]) == {"mean", "mc", "linearized"}
    scale, temperature = calibrated_particles(record)
    assert scale == record.calibration["scale"] and temperature == record.calibration["temperatures"]["mc"]
    assert set(sizes) == {3}


def test_variational_inference_moves_the_posterior_alone(stock: Path, rows: Path, tmp_path: Path) -> None:
    record = make(stock, rows, tmp_path / "vi", "vi", scoring="letters", steps=12, batch_size=4)
    assert record.bayesianized["method"] == "vi" and not (tmp_path / "vi" / JOINT).exists()
    found, original = load_file(tmp_path / "vi" / ADAPTER), load_file(stock / ADAPTER)
    for name, b in original.items():
        if name.endswith("lora_B.weight"):
            layer = name.removesuffix(".lora_B.weight")
            product = found[name] @ found[f"{layer}.lora_A.direction"]
            torch.testing.assert_close(product, b @ original[f"{layer}.lora_A.weight"], atol=1e-5, rtol=1e-5)
            assert found[f"{layer}.lora_A.posterior.log_mean"].abs().min() > 1e-4
            assert (found[f"{layer}.lora_A.posterior.log_std"].exp() - 0.05).abs().min() > 1e-5
    assert not (tmp_path / "vi" / "checkpoints").exists()
    answer = Classifier.from_pretrained(tmp_path / "vi", samples=8)(questions(3))
    assert answer.epistemic.max() > 1e-5


def test_what_fails_half_way_leaves_nothing(
    stock: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scalabl.training.posthoc.run.save_joint", stop)
    with pytest.raises(KeyboardInterrupt):
        make(stock, rows, tmp_path / "out" / "run", scoring="letters")
    assert list((tmp_path / "out").iterdir()) == []


def test_altered_results_are_refused(stock: Path, rows: Path, tmp_path: Path) -> None:
    make(stock, rows, tmp_path / "run", scoring="letters")
    whole = (tmp_path / "run" / JOINT).read_bytes()
    (tmp_path / "run" / JOINT).write_bytes(whole[:-4] + b"0000")
    with pytest.raises(UserError, match=f"{JOINT} was lost or altered"):
        load_run(tmp_path / "run")
    (tmp_path / "run" / JOINT).unlink()
    with pytest.raises(UserError, match=f"{JOINT} was lost or altered"):
        load_run(tmp_path / "run")


def altered(stock: Path, directory: Path, **changes: Any) -> Path:
    shutil.copytree(stock, directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"peft_type": "SCALABL"}, "has a posterior already"),
        ({"task_type": "TOKEN_CLS"}, "trained for TOKEN_CLS"),
        ({"task_type": "SEQ_CLS"}, "does not say what its labels are"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
        ({"base_model_name_or_path": None}, "give it with --model"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "was in /nowhere/at/all, which is not there"),
        ({"lora_bias": True}, "option lora_bias"),
        ({"some_later_option": {"a": 1}}, "option some_later_option"),
    ],
)
def test_adapters_that_cannot_be_carried_are_refused_in_a_sentence(
    program: Program, stock: Path, rows: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    source = altered(stock, tmp_path / "altered", **changes)
    code, out, err = program("bayesianize", source, "--data", rows, "--output", tmp_path / "run")
    assert (code, out) == (2, "") and sentence in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--method", "mcmc"), "method is 'mcmc'"),
        (("--structure", "block"), "structure is 'block'"),
        (("--prior-precision", "-1"), "prior_precision is -1"),
        (("--method", "vi", "--prior-precision", "1"), "belong to laplace"),
        (("--steps", "9"), "steps belongs to vi"),
        (("--train-rows", "0"), "train_rows is 0"),
        (("--scoring", "words"), "scoring is 'words'"),
        (("--data", "no-such-benchmark"), "no-such-benchmark"),
        (("--output", "/proc/x"), "cannot be written"),
    ],
)
def test_bad_arguments_are_refused_before_torch_is_imported(
    stock: Path, rows: Path, tmp_path: Path, more: tuple[str, ...], sentence: str
) -> None:
    code = "import sys\nfrom scalabl.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    arguments = ["bayesianize", str(stock), "--data", str(rows), "--output", str(tmp_path / "run"), *more]
    said = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (2, "False\n") and sentence in said.stderr


def test_an_output_in_use_and_a_pickled_adapter_are_refused(stock: Path, tmp_path: Path, rows: Path) -> None:
    from scalabl.training.posthoc.settings import require_free

    (tmp_path / "used").mkdir()
    require_free(tmp_path / "used")
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        require_free(tmp_path / "used")
    (tmp_path / "free").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "free")
    for place, sentence in (("link", "link is a link; remove it"), ("", "the directory that the command is called in")):
        with pytest.raises(UserError, match=sentence):
            require_free(tmp_path / place if place else Path())
    pickled = altered(stock, tmp_path / "pickled")
    (pickled / ADAPTER).rename(pickled / "adapter_model.bin")
    with pytest.raises(UserError, match=f"holds no {ADAPTER}"):
        read_source(pickled)


def test_a_base_model_without_some_of_the_adapted_layers_is_refused(rows: Path, tmp_path: Path) -> None:
    source = plain_adapter(tmp_path / "plain")
    found = read_source(source, str(tiny_base(layers=2)))
    with pytest.raises(UserError, match="6 layers, but the base model has 4 of them"):
        task, train_rows, held_out = rows_for(found, str(rows))
        bayesianize(found, task, train_rows, held_out, tmp_path / "run", settings_for(found, str(rows)))
    assert not (tmp_path / "run").exists()


def test_the_tokenizer_beside_the_adapter_goes_with_it(stock: Path, rows: Path, tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    shutil.copytree(stock, source)
    tiny_tokenizer(chat=True).save_pretrained(str(source))  # the base's own has no chat template
    make(source, rows, tmp_path / "run", scoring="continuation", normalization="token")
    assert load_run(tmp_path / "run").tokenizer.chat_template == CHAT_TEMPLATE
