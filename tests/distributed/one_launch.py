"""What each of two processes does for test_two_processes.py, one thing after the other in one launch: starting takes
longer than all of it.

one_launch.py WORK: WORK holds base, task, encoder, texts and the unfinished run "grown" of one process. Ends by a
failure of rank 1.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from two_processes import head_settings_of, killed_after, settings_of

from scalabl.core import processes
from scalabl.core.errors import UserError
from scalabl.data.load import rows_of
from scalabl.inference.batch_prediction import predict_file
from scalabl.inference.calibrate import calibration_at_the_end
from scalabl.inference.predictor import Predictor, log_probabilities
from scalabl.inference.settings import PredictionSettings
from scalabl.predictive import LinearizedPredictive, MeanPredictive, MonteCarloPredictive, Predictive
from scalabl.predictive.adaptive import AdaptivePredictive
from scalabl.predictive.sampling import Sampling
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.scoring import trunk_store
from scalabl.training import run as run_module
from scalabl.training.monitors import StopOnInterrupt
from scalabl.training.run import Interrupted, train
from scalabl.tuner.projection import StochasticProjection

SAMPLING = {"plain": Sampling(), "adaptive": Sampling(confidence=0.9)}


def predictives() -> dict[str, Predictive]:
    return {
        "mc": MonteCarloPredictive(5),  # 2 and 3
        "fewer particles than processes": MonteCarloPredictive(1),
        "sobol": MonteCarloPredictive(5, draws="sobol"),
        "top layer": MonteCarloPredictive(4, stochastic_layers="last:1"),
        "mean": MeanPredictive(),
        "linearized": LinearizedPredictive(),
        "adaptive": AdaptivePredictive(MonteCarloPredictive(12), 0.9),
    }


def predictions(run: Run, test: str) -> dict[str, torch.Tensor]:
    """(N, n, C) of every predictive, on an odd number of rows and on one row."""
    rows = rows_of(test, limit=11)
    found = {name: log_probabilities(run, rows, one, batch_size=3) for name, one in predictives().items()}
    found["one row"] = log_probabilities(run, rows[:1], LinearizedPredictive())
    auto = Predictor(run, PredictionSettings("auto", 6))
    auto.resolve(rows)
    return {**found, f"auto: {auto.strategy.name}": log_probabilities(run, rows, auto.strategy)}


def answer(run: Path, test: str, output: Path, sampling: Sampling) -> float | None:
    rows = rows_of(test, limit=11)
    return predict_file(run, rows, output, PredictionSettings("mc", 7, sampling=sampling), batch_size=2).particles


def evaluate(work: Path, output: Path) -> None:
    """The command line, in this process."""
    from scalabl.cli import evaluate as _evaluate  # noqa: F401  (adds its command)
    from scalabl.cli.app import app

    options = ["--predictive", "mc", "--samples", "3", "--calibrate", str(work / "held_out"), "--json", str(output)]
    app(["evaluate", str(work / "two"), "--data", str(work / "task"), *options], standalone_mode=False)


def computed_trunks(scorer: Any, *args: Any) -> torch.Tensor:
    """In the place of `trunk_store._compute`: counts its calls."""
    COMPUTED.append(1)
    return COMPUTE(scorer, *args)


COMPUTE, COMPUTED = trunk_store._compute, []


def first_draws(self: StochasticProjection, rows: int, device: torch.device) -> torch.Tensor:
    """In the place of `draw`: keeps the draws for a batch of 4."""
    drawn = DRAW(self, rows, device)
    if self.training and rows == 4:
        SEEN.append(drawn.detach())
    return drawn


DRAW, SEEN = StochasticProjection.draw, []


def interrupted_at(step: int) -> Any:
    """`on_step_end` of rank 1 alone meets Ctrl-C."""
    original = StopOnInterrupt.on_step_end

    def on_step_end(self: StopOnInterrupt, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step and processes.rank() == 1:
            signal.raise_signal(signal.SIGINT)
        original(self, args, state, control, **kwargs)

    return on_step_end


def main(work: Path) -> None:
    said: dict[str, Any] = {}
    trunk_store._compute = computed_trunks
    half = settings_of(work, batch_size=4)
    said["record"] = train(half, work / "two").as_dict()
    said["again"] = train(half, work / "two").adapter_sha256
    with killed_after(7):
        train(half, work / "resumed")
    train(half, work / "resumed")
    with killed_after(7):
        train(half, work / "left")
    train(half, work / "grown")
    train(head_settings_of(work, batch_size=4), work / "head", calibrate=calibration_at_the_end)

    StochasticProjection.draw = first_draws  # type: ignore[method-assign]
    train(settings_of(work, batch_size=4, lora_dropout=0.1, steps=2), work / "dropout")
    StochasticProjection.draw = DRAW  # type: ignore[method-assign]
    said["first draw"] = SEEN[0].tolist()

    try:
        train(settings_of(work, batch_size=4, seed=1), work / "two")
    except UserError as error:
        said["another run"] = str(error)

    run = load_run(work / "two")
    test = str(work / "task" / "test.jsonl")
    save_file(predictions(run, test), work / f"predictions{processes.rank()}.safetensors")
    said["particles"] = {
        name: answer(work / "two", test, work / f"{name}.jsonl", sampling) for name, sampling in SAMPLING.items()
    }

    evaluate(work, work / "evaluated.json")
    said["computed trunks"] = len(COMPUTED)

    step_end = StopOnInterrupt.on_step_end
    StopOnInterrupt.on_step_end = interrupted_at(3)  # type: ignore[method-assign]
    try:
        train(half, work / "interrupted")
    except Interrupted as stopped:
        said["interrupted"] = str(stopped)
    StopOnInterrupt.on_step_end = step_end  # type: ignore[method-assign]

    (work / f"said{processes.rank()}.json").write_text(json.dumps(said))
    fail_on_rank_1(work)


def fail_on_rank_1(work: Path) -> None:
    """The command line, where one process cannot load its base and the other waits for it."""
    from scalabl.cli import main as program

    if processes.rank() == 1:

        def broken(*_: Any, **__: Any) -> Any:
            raise UserError("The base of rank 1 is broken; mend it.")

        run_module.load_base = broken
    settings = ["--model", str(work / "base"), "--data", str(work / "task"), "--steps", "5", "--batch-size", "4"]
    sys.argv = ["scalabl", "train", *settings, "--output", str(work / "failed")]
    program()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
