"""`scalabl bayesianize` of adapters with a classification head, of stock PEFT and of a finished run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from head_bases import LABELS, body_of, own_probs, stock_head
from plain_lora import class_logits_at
from program import Program
from safetensors.torch import load_file
from tiny_base import tiny_encoder, write_jsonl, write_texts

import scalabl
from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER
from scalabl.predictive import LinearizedPredictive, MeanPredictive, MonteCarloPredictive, linearized, predict
from scalabl.runs.loading import load_run
from scalabl.runs.record import RunRecord
from scalabl.training.posthoc.laplace import gauss_newton
from scalabl.training.posthoc.run import bayesianize
from scalabl.training.posthoc.settings import read_source, rows_for, settings_for
from scalabl.tuner import stochastic_layers

TEXTS = ["red", "a green answer that is long enough to be padded by others", "blue or not?", "yes and no"]
ARCHITECTURES = ["bert", "roberta", "distilbert", "deberta-v2", "llama"]
# adapted, but plain LoRA: what goes through them is no row of tokens
PLAIN = {"bert": ["pooler.dense"], "deberta-v2": ["query_proj", "key_proj"]}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter of stock PEFT, and what its model itself says of the texts."""
    directory = tmp_path_factory.mktemp(request.param)
    model = stock_head(directory / "adapter", body_of(request.param, directory / "body"))
    return directory / "adapter", own_probs(model, TEXTS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose labels first appear in another order than the head has them."""
    labelled = [{"text": f"{text} {i}", "label": LABELS[-1 - i % 3]} for i, text in enumerate(TEXTS * 3)]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", labelled)


def make(source: Path, rows: Path, output: Path, method: str = "laplace", **given: Any) -> RunRecord:
    found = read_source(source, labels=None if (source / "scalabl.json").is_file() else LABELS)
    task, train_rows, held_out = rows_for(found, str(rows))
    return bayesianize(found, task, train_rows, held_out, output, settings_for(found, str(rows), method, **given))


def test_a_stock_head_gets_a_posterior_around_its_own_answers(
    stock: tuple[Path, torch.Tensor], rows: Path, tmp_path: Path
) -> None:
    source, expected = stock
    record = make(source, rows, tmp_path / "run")
    assert record.labels == LABELS and record.scoring["labels"] == list(LABELS) and record.predictive == "linearized"
    for name in (ADAPTER, "adapter_config.json"):
        assert (tmp_path / "run" / "mean" / name).read_bytes() == (source / name).read_bytes()
    run = load_run(tmp_path / "run")
    _, train_rows, _ = rows_for(read_source(source, labels=LABELS), str(rows))
    # a row's label is its place among the head's outputs
    assert [row.choices[row.answer or 0] for row in train_rows[:3]] == ["green", "blue", "red"]
    assert [row.answer for row in train_rows[:3]] == [2, 1, 0]
    encoded = run.encode([*train_rows[:4]])
    texts = [row.question for row in train_rows[:4]]
    mean = predict(run.scorer, encoded, MeanPredictive())[0]
    plain = own_probs(run.scorer.model, texts)
    torch.testing.assert_close(mean.exp(), plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(own_probs(run.scorer.model, TEXTS), expected, atol=1e-4, rtol=0)
    names = [name.split("layer.")[-1] for name in stochastic_layers(run.scorer.model)]
    architecture = run.scorer.model.config.model_type
    assert not [name for name in names for end in PLAIN.get(architecture, []) if name.endswith(end)]
    for strategy in (MonteCarloPredictive(4), LinearizedPredictive(32)):
        together = predict(run.scorer, encoded, strategy, batch_size=4)
        torch.testing.assert_close(together, predict(run.scorer, encoded, strategy, batch_size=1), atol=2e-3, rtol=0)
        assert together.std(dim=0).max() > 1e-3


def test_the_curvature_is_the_gauss_newton_matrix_of_the_heads_logits(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "adapter"
    stock_head(
        source, body_of("bert", tmp_path / "body"), target_modules=["query", "dense"], layers_to_transform=[1, 2]
    )
    make(source, rows, tmp_path / "run")
    run = load_run(tmp_path / "run")
    some = run.encode(list(rows_for(read_source(source, labels=LABELS), str(rows))[1][:4]))
    found = gauss_newton(run.scorer, some, batch_size=3).matrix
    batch = run.scorer.scoring.collate(some)
    mean = torch.cat([leaf.posterior.mean.detach() for leaf in stochastic_layers(run.scorer.model).values()])
    jacobian = torch.autograd.functional.jacobian(lambda s: class_logits_at(run.scorer, batch, s), mean).double()
    p = class_logits_at(run.scorer, batch, mean).detach().double().softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("bcd,bce,bef->df", jacobian, curvature, jacobian)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    # of more classes than have a backward pass each, those that a row finds less probable are one
    monkeypatch.setattr(linearized, "TOP_CLASSES", 1)
    top = p.argmax(dim=-1)

    def log_odds(s: torch.Tensor) -> torch.Tensor:
        return class_logits_at(run.scorer, batch, s).softmax(-1).gather(1, top[:, None])[:, 0].logit()

    gradient = torch.autograd.functional.jacobian(log_odds, mean).double()
    highest = p.amax(dim=-1)
    expected = torch.einsum("bd,b,be->de", gradient, highest * (1 - highest), gradient)
    found = gauss_newton(run.scorer, some, batch_size=3).matrix
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_finished_run_with_a_head_and_variational_inference(rows: Path, program: Program, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    options = ("--steps", 12, "--rank", 4, "--learning-rate", 0.02, "--layers", "last:2", "--batch-size", 8)
    made = program("train", "--model", tiny_encoder(), "--data", texts, "--output", tmp_path / "mle", *options,
                   "--method", "mle", "--class-weights", "balanced")  # fmt: skip
    assert made.code == 0, made.err
    before = load_file(tmp_path / "mle" / ADAPTER)
    vi = program("bayesianize", tmp_path / "mle", "--data", texts, "--output", tmp_path / "vi", "--method", "vi",
                 "--steps", 8, "--batch-size", 8)  # fmt: skip
    assert vi.code == 0, vi.err
    after = load_file(tmp_path / "vi" / ADAPTER)
    heads = [name for name in before if "lora_" not in name]
    assert heads and all(torch.equal(before[name], after[name]) for name in heads)
    moved = [name for name in after if name.endswith("posterior.log_mean")]
    assert moved and all(after[name].abs().min() > 0 for name in moved)
    for command in (("evaluate", "--data", texts), ("evaluate",), ("inspect",)):  # its run's held-out rows are known
        ended = program(command[0], tmp_path / "vi", *command[1:])
        assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "vi" / "scalabl.json").read_text())
    of_source = json.loads((tmp_path / "mle" / "scalabl.json").read_text())
    assert record["scoring"] == of_source["scoring"] and "class_weights" in of_source["scoring"]
    assert record["class_counts"] == of_source["class_counts"]
    named = scalabl.Classifier.from_pretrained(tmp_path / "vi", labels=record["task"]["labels"])
    assert named.predictor.settings.raw is False  # its own labels: its own calibration holds
    with pytest.raises(UserError, match="labels is the run's own"):
        scalabl.Classifier.from_pretrained(tmp_path / "vi", labels=["a", "b", "c"])
    assert record["scoring_name"] == "head" and record["scoring"]["labels"] == record["task"]["labels"]


def test_from_the_command_line_to_answers(program: Program, rows: Path, tmp_path: Path) -> None:
    source, run = tmp_path / "adapter", tmp_path / "run"
    stock_head(source, body_of("bert", tmp_path / "body"), target_modules=["query", "value"])
    said = program("bayesianize", source, "--data", rows, "--output", run).sentence()
    assert "does not say what its labels are; pass labels=[...], or --labels" in said
    said = program("bayesianize", source, "--data", rows, "--output", run, "--labels", "red,blue,pink").sentence()
    assert "but the run was trained on 'red', 'blue', 'pink'" in said
    said = program("bayesianize", source, "--data", rows, "--output", run, "--labels", ",".join(LABELS),
                   "--scoring", "letters").sentence()  # fmt: skip
    assert "has a classification head, which has no letters" in said and not run.exists()
    made = program("bayesianize", source, "--data", rows, "--output", run, "--labels", ",".join(LABELS))
    assert made.code == 0, made.err
    assert "Laplace over 24 numbers together" in " ".join(made.out.split())
    judged = program("evaluate", run, "--data", rows, "--json", tmp_path / "judged.json")
    assert judged.code == 0 and "ScalaBL, linearized" in judged.out, judged.err
    answers = tmp_path / "answers.jsonl"
    assert program("predict", run, "--input", rows, "--output", answers).code == 0
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [list(answer["probs"]) for answer in found] == [list(LABELS)] * 12
    assert max(answer["epistemic"] for answer in found) > 1e-4
    assert program("inspect", run).code == 0


def test_labels_of_an_adapter_without_a_head_are_refused(tmp_path: Path) -> None:
    from plain_lora import plain_adapter

    with pytest.raises(UserError, match="labels are of a classification head"):
        read_source(plain_adapter(tmp_path / "plain"), labels=LABELS)
