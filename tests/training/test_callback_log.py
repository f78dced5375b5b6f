"""KL, NLL, sigma and s in the Trainer's log, in front of everybody who reads it."""

from pathlib import Path
from typing import Any

import pytest
from tiny_run import arguments, rows, tiny_model, trainer
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from scalabl.training.callback import ELBOCallback
from scalabl.tuner import kl_divergence, stochastic_layers

KEYS = {"elbo/kl", "elbo/nll", "elbo/kl_weight", "elbo/sigma_mean", "elbo/s_mean"}


class Reporter(TrainerCallback):
    """Stands where transformers puts TensorBoard and W&B: before the user's callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append({**logs, "step": state.global_step})


def test_values_reach_the_history_and_the_reporters_alike(tmp_path: Path) -> None:
    model, reporter = tiny_model(), Reporter()
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=2, eval_strategy="steps", eval_steps=2)
    run = trainer(model, args, [ELBOCallback(8, beta=0.5)], eval_dataset=rows(4))
    run.callback_handler.callbacks.insert(0, reporter)
    run.train()
    training = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in training] == [2, 4]
    for entry in training:
        assert entry.keys() >= KEYS
        assert all(type(entry[key]) is float for key in KEYS)
        assert entry["elbo/nll"] == entry["loss"]
        assert entry["elbo/kl_weight"] == 0.5 / 8
    assert [entry for entry in reporter.seen if "loss" in entry] == training
    others = [entry for entry in reporter.seen if "loss" not in entry]
    assert len(others) == 3  # two evaluations and the summary
    assert all(not KEYS & entry.keys() for entry in others)

    posteriors = [leaf.posterior for leaf in stochastic_layers(model).values()]
    last = training[-1]
    assert last["elbo/kl"] == pytest.approx(kl_divergence(model).item(), rel=1e-6)
    sigma = sum(p.marginal_std().mean().item() for p in posteriors) / 4
    assert last["elbo/sigma_mean"] == pytest.approx(sigma, rel=1e-6)
    assert last["elbo/s_mean"] == pytest.approx(sum(p.mean.mean().item() for p in posteriors) / 4, rel=1e-6)


def test_values_are_in_tensorboards_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=1, report_to=["tensorboard"])
    run = trainer(tiny_model(), args, [ELBOCallback(8)])
    run.train()
    events = reader.EventAccumulator(str(tmp_path / "events")).Reload()
    for key in KEYS:
        written = [scalar.value for scalar in events.Scalars(f"train/{key}")]
        assert written == pytest.approx([entry[key] for entry in run.state.log_history[:4]], rel=1e-6)


def test_a_trainer_without_the_callback_logs_as_before(tmp_path: Path) -> None:
    run = trainer(tiny_model(), arguments(tmp_path, logging_strategy="steps", logging_steps=1), [])
    run.train()
    assert not KEYS & run.state.log_history[0].keys()
    assert CallbackHandler.on_log.__module__ == "transformers.trainer_callback"  # nobody else's Trainer is touched
    assert not hasattr(CallbackHandler.on_log, "__wrapped__")


def test_going_first_leaves_the_others_in_order_and_called_once(tmp_path: Path) -> None:
    class Counts(Reporter):
        epochs = 0

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.epochs += 1

    class After(Counts):
        pass

    before, elbo, after = Counts(), ELBOCallback(8), After()
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=1, max_steps=2)
    run = trainer(tiny_model(), args, [before, elbo, after])
    others = [callback for callback in run.callback_handler.callbacks if callback is not elbo]
    run.train()
    assert run.callback_handler.callbacks == [elbo, *others]
    assert before.epochs == after.epochs == 1
    assert before.seen == after.seen == run.state.log_history
