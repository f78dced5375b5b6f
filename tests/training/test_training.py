"""A training run from a recipe to a directory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from short_run import settings_of, weights
from tiny_base import as_json, questions, tiny_base, write_jsonl

from scalabl.core.errors import UserError
from scalabl.data import load_task
from scalabl.runs.loading import load_run
from scalabl.runs.record import RunRecord
from scalabl.training.run import select_rows, train
from scalabl.training.trainer import LengthGroupedOrder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, task_directory: Path) -> Path:
    """A finished run of 30 steps, scoring chosen by itself."""
    output = tmp_path_factory.mktemp("runs") / "run"
    train(settings_of(tiny_base(), task_directory, scoring="auto", normalization="auto"), output)
    return output


def test_the_directory_holds_record_adapter_mean_and_log(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"scalabl.json", "adapter_config.json", "adapter_model.safetensors", "mean", "training_log.json"} <= names
    assert not names & {"checkpoints", ".unfinished"}
    record = RunRecord.read(finished)
    assert record.status == "finished" and record.rows == {"train": 24, "validation": 4}
    # q and v (one kv head of 16 in two) of 2 layers: r (d_in + d_out) each; 2 r numbers each
    assert record.parameters["variational"] == 2 * 2 * 2 * 4
    assert record.parameters["lora"] == 2 * 4 * ((32 + 32) + (32 + 16))
    assert set(record.scoring_nll) == {"letters", "continuation (sums)", "continuation (per token)"}
    assert record.scoring_name == min(record.scoring_nll, key=record.scoring_nll.__getitem__)


def test_the_loss_falls_and_kl_nll_and_sigma_are_logged(finished: Path) -> None:
    log = [entry for entry in json.loads((finished / "training_log.json").read_text()) if "loss" in entry]
    assert [entry["step"] for entry in log] == list(range(3, 31, 3))
    added = {"elbo/kl", "elbo/nll", "elbo/sigma_mean", "elbo/s_mean", "elbo/kl_weight"}
    assert all(added <= entry.keys() for entry in log)
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["elbo/kl"] < log[0]["elbo/kl"]
    assert all(entry["elbo/kl_weight"] == pytest.approx(1 / 24) for entry in log)


def test_a_prior_centred_where_s_begins_costs_nothing_there(task_directory: Path, tmp_path: Path) -> None:
    """The first KL is that of the noise alone: sum_j log(std / sigma_j) + sigma_j^2 / (2 std^2) - 1/2."""
    first = {}
    for prior_mean in (0.0, 0.577):
        settings = settings_of(
            tiny_base(), task_directory, steps=3, prior_mean=prior_mean, prior_std=0.3, init_sigma=0.3
        )
        train(settings, tmp_path / str(prior_mean))
        found = json.loads((tmp_path / str(prior_mean) / "adapter_config.json").read_text())
        assert found["prior_mean"] == prior_mean
        log = json.loads((tmp_path / str(prior_mean) / "training_log.json").read_text())
        first[prior_mean] = next(entry["elbo/kl"] for entry in log if "elbo/kl" in entry)
    numbers = 2 * 2 * 4
    assert first[0.577] < 0.5 * numbers < numbers < first[0.0]


def test_a_finished_run_is_not_trained_again(finished: Path, task_directory: Path) -> None:
    settings = settings_of(tiny_base(), task_directory, scoring="auto", normalization="auto")
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert train(settings, finished) == RunRecord.read(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def test_another_recipe_or_foreign_files_in_the_directory_are_refused(
    finished: Path, task_directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds another run \(seed was 0, now 1\); choose another --output"):
        train(settings_of(tiny_base(), task_directory, seed=1, scoring="auto", normalization="auto"), finished)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and holds no run"):
        train(settings_of(tiny_base(), task_directory), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_loaded_run_predicts_with_its_own_scoring(finished: Path) -> None:
    run = load_run(finished)
    assert run.is_bayesian and run.scoring.settings() == RunRecord.read(finished).scoring
    assert run.scorer.trunk is not None and run.scorer.trunk.depth == 1


def test_seeds_decide_the_weights_and_the_cache_does_not(task_directory: Path, tmp_path: Path, own_cache: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(settings_of(tiny_base(), task_directory, steps=4, seed=seed), tmp_path / name)
        torch.manual_seed(99)  # whatever was drawn before
        if name == "a":
            assert list((own_cache / "trunks").iterdir())
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_every_method_meets_the_same_rows_in_the_same_order(
    task_directory: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalabl.training import trainer

    seen: list[list[list[int]]] = []
    loss = trainer.ChoiceTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.append(inputs["input_ids"].tolist())
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.ChoiceTrainer, "compute_loss", compute_loss)
    batches = {}
    for method, seed in (("scalabl", 0), ("mle", 0), ("mle", 1)):
        seen.clear()
        train(settings_of(tiny_base(), task_directory, steps=8, method=method, seed=seed), tmp_path / f"{method}{seed}")
        batches[method, seed] = list(seen)
    assert batches["scalabl", 0] == batches["mle", 0] != batches["mle", 1]
    # 24 rows in batches of 4: six steps an epoch, and the second epoch has an order of its own
    assert batches["mle", 0][:2] != batches["mle", 0][6:8]


def test_plain_lora_has_no_posterior_and_no_mean_directory(task_directory: Path, tmp_path: Path) -> None:
    record = train(settings_of(tiny_base(), task_directory, steps=2, method="mle"), tmp_path / "mle")
    assert record.parameters["variational"] == 0
    assert not load_run(tmp_path / "mle").is_bayesian and not (tmp_path / "mle" / "mean").exists()


def test_gradient_checkpointing_and_the_trunk_change_no_gradient(task_directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = []
    for name, checkpointing in (("with", True), ("without", False)):
        settings = settings_of(tiny_base(), task_directory, steps=3, gradient_checkpointing=checkpointing)
        train(settings, tmp_path / name)
        found.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    # Adam divides by the gradient's size, which blows up rounding where it is almost zero: the first steps alone
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=2e-3, rtol=1e-2, msg=name)


def test_a_nan_in_the_loss_stops_with_step_and_layer_and_keeps_the_last_checkpoint(
    task_directory: Path, tmp_path: Path, own_cache: Path
) -> None:
    # a rate that is harmless while the schedule warms up and then overflows
    settings = settings_of(tiny_base(), task_directory, learning_rate=1e30, warmup=0.5, save_steps=1, max_grad_norm=0)
    with pytest.raises(UserError, match=r"Training stopped at step \d+: the \w+ of [\w.]+layers\.\d[\w.]+ .*NaN") as e:
        train(settings, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints"
    kept = sorted(int(path.name.rpartition("-")[2]) for path in last.iterdir())
    assert "lower --learning-rate" in str(e.value) and f"checkpoint-{kept[-1]} is the last good checkpoint" in str(
        e.value
    )
    from safetensors.torch import load_file

    tensors = load_file(last / f"checkpoint-{kept[-1]}" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert RunRecord.read(tmp_path / "run").status == "running"


def test_a_nan_before_the_first_checkpoint_leaves_nothing(
    task_directory: Path, tmp_path: Path, own_cache: Path
) -> None:
    settings = settings_of(tiny_base(), task_directory, learning_rate=1e30, warmup=0, save_steps=30, max_grad_norm=0)
    with pytest.raises(UserError, match=r"Training stopped at step \d+: .*; lower --learning-rate\.$"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_of_text_and_label_train_by_letters(tmp_path: Path, own_cache: Path) -> None:
    rows = [{"text": f"word {i}", "label": "yes" if i % 3 else "no"} for i in range(20)]
    data = write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    settings = settings_of(tiny_base(), data, scoring="letters", steps=2)
    record = train(settings, tmp_path / "run")
    assert record.scoring["labels"] == ["no", "yes"] == list(record.task["labels"])
    assert record.rows == {"train": 18, "validation": 2}  # a tenth is held out


def test_row_limits_take_the_same_rows_for_every_seed(task_directory: Path) -> None:
    task = load_task(str(task_directory))
    chosen = [
        select_rows(task, settings_of(tiny_base(), task_directory, train_rows=7, validation_rows=3, seed=seed).rows)
        for seed in (0, 1)
    ]
    assert chosen[0] == chosen[1]
    assert len(chosen[0].train) == 7 and len(set(chosen[0].train)) == 7 and len(chosen[0].validation) == 3
    assert set(chosen[0].train) <= set(task.splits["train"])


def test_validation_rows_are_held_out_where_the_data_has_none(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(40)))
    rows = select_rows(load_task(str(data)), settings_of(tiny_base(), data, validation_rows=300).rows)
    assert len(rows.validation) == 4 and not set(rows.train) & set(rows.validation)
    assert len(rows.train) == 36


def test_held_out_rows_that_are_trained_on_too_are_counted(tmp_path: Path, own_cache: Path) -> None:
    train_rows, held_out = questions(12, seed=0), questions(6, seed=1)
    again = [replace(row, id=f"v{i}", answer=0) for i, row in enumerate(train_rows[:2])]  # other names and answers
    for name, more in (("clean", []), ("repeated", again)):
        write_jsonl(tmp_path / name / "train.jsonl", map(as_json, train_rows))
        write_jsonl(tmp_path / name / "validation.jsonl", map(as_json, [*held_out, *more]))
    said = {}
    for name in ("clean", "repeated"):
        settings = settings_of(tiny_base(), tmp_path / name, method="mle", steps=1, validation_rows=100)
        said[name] = train(settings, tmp_path / f"run-{name}").warnings
    assert not said["clean"]
    (sentence,) = said["repeated"]
    assert sentence.startswith("2 of the 8 held-out rows stand among the training rows too (v0 the first of them)")


def test_an_epoch_is_every_row_once_in_batches_of_like_length() -> None:
    lengths = torch.randint(5, 200, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    order = LengthGroupedOrder(lengths, 8, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert all(sorted(epoch) == list(range(203)) for epoch in epochs)
    assert epochs[0] == epochs[2] != epochs[1]
    assert list(LengthGroupedOrder(lengths, 8, seed=4)) != epochs[0]
    # a loader drops the last three: not the longest ones, and others in every epoch
    dropped = [set(epoch[200:]) for epoch in epochs]
    assert dropped[0] != dropped[1] and not dropped[0] & set(sorted(range(203), key=lambda i: lengths[i])[-3:])
    padding = [sum(max(lengths[i] for i in g) - lengths[j] for j in g) for g in zip(*[iter(epochs[0])] * 8)]  # noqa: B905
    # a plain shuffle pads about 90 tokens a row
    assert sum(padding) / 203 < 10
    # batches come in no order of length
    first = [lengths[epochs[0][i]] for i in range(0, 200, 8)]
    assert first != sorted(first) and first != sorted(first, reverse=True)
