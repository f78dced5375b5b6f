"""Mean and Monte Carlo: one pass, and N passes under the same particles whatever the batch."""

from pathlib import Path

import own_process
import pytest
import torch
from peft import PeftModel
from tiny_base import adapted, loaded, questions
from torch import Tensor

import scalabl
from scalabl.core.errors import UserError
from scalabl.predictive import MeanPredictive, MonteCarloPredictive, predict
from scalabl.predictive.auto import make_predictive
from scalabl.predictive.monte_carlo import bytes_per_particle, particles_at_once
from scalabl.scoring import Continuation, Encoded, Letters, Scorer, Scoring
from scalabl.scoring.trunk import Trunk
from scalabl.tuner import stochastic_layers


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted(last=2)


@pytest.fixture(scope="module")
def scorer(model: PeftModel) -> Scorer:
    _, tokenizer = loaded()
    return Scorer(model, Continuation(tokenizer), Trunk(model))


@pytest.fixture(scope="module")
def encoded(scorer: Scorer) -> list[Encoded]:
    return [scorer.scoring.encode(row) for row in questions(7)]


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5)


def alone(model: PeftModel, scoring: Scoring, row: Encoded) -> Tensor:
    """(C,) log-probabilities of one row in a plain pass without a trunk."""
    with torch.no_grad():
        return Scorer(model, scoring).class_log_probs(scoring.collate([row]))[0, : row.num_choices]


def test_the_mean_is_a_plain_pass(scorer: Scorer, encoded: list[Encoded]) -> None:
    found = predict(scorer, encoded, MeanPredictive(), batch_size=3)
    assert found.shape == (1, 7, 5)
    for row, log_probs in zip(encoded, found[0], strict=True):
        close(log_probs[: row.num_choices], alone(scorer.model, scorer.scoring, row))
        assert (log_probs[row.num_choices :] == -torch.inf).all()


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_monte_carlo_equals_a_loop_over_particles(covariance: str) -> None:
    model = adapted(covariance=covariance)
    _, tokenizer = loaded()
    for scoring in (Continuation(tokenizer), Letters(tokenizer)):
        rows = [scoring.encode(row) for row in questions(4)]
        found = predict(Scorer(model, scoring), rows, MonteCarloPredictive(4, seed=3))
        assert found.shape == (4, 4, 5)
        for k in range(4):
            with scalabl.particles(model, 1, seed=3, first=k):
                for row, log_probs in zip(rows, found[k], strict=True):
                    close(log_probs[: row.num_choices], alone(model, scoring, row))
        assert (found[0] - found[1]).exp().sub(1).abs().nan_to_num().max() > 1e-3


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, None])
def test_the_chunk_changes_nothing(scorer: Scorer, encoded: list[Encoded], chunk: int | None) -> None:
    whole = predict(scorer, encoded, MonteCarloPredictive(5, chunk=5))
    close(predict(scorer, encoded, MonteCarloPredictive(5, chunk=chunk)), whole)


def test_batch_size_and_order_change_nothing(scorer: Scorer, encoded: list[Encoded]) -> None:
    predictive = MonteCarloPredictive(3)
    expected = predict(scorer, encoded, predictive, batch_size=8)
    for size in (1, 2, 5):
        close(predict(scorer, encoded, predictive, batch_size=size), expected)
    reverse = predict(scorer, encoded[::-1], predictive, batch_size=4)
    close(reverse[:, range(6, -1, -1)], expected)


def test_fewer_particles_are_the_first_ones_of_more(scorer: Scorer, encoded: list[Encoded]) -> None:
    more, one = (predict(scorer, encoded, MonteCarloPredictive(n, seed=1)) for n in (4, 1))
    assert one.shape[0] == 1
    close(one, more[:1])


def test_other_seeds_are_other_particles(scorer: Scorer, encoded: list[Encoded]) -> None:
    one, other = (predict(scorer, encoded, MonteCarloPredictive(2, seed=seed)).exp() for seed in (0, 1))
    assert (one - other).abs().max() > 1e-3


def predict_again(path: Path) -> None:
    model, (_, tokenizer) = adapted(last=2), loaded()
    scoring = Continuation(tokenizer)
    torch.manual_seed(12345)  # no answer depends on the global generator
    rows = [scoring.encode(row) for row in questions(7)]
    torch.save(predict(Scorer(model, scoring, Trunk(model)), rows, MonteCarloPredictive(3, seed=5)), path)


def test_a_new_process_gives_the_same_answer(scorer: Scorer, encoded: list[Encoded], tmp_path: Path) -> None:
    assert own_process.run(predict_again, tmp_path / "again.pt").returncode == 0
    here = predict(scorer, encoded, MonteCarloPredictive(3, seed=5))
    assert torch.equal(torch.load(tmp_path / "again.pt"), here)


def test_without_sigma_every_particle_is_the_mean(encoded: list[Encoded]) -> None:
    model = adapted(last=2)
    _, tokenizer = loaded()
    scorer = Scorer(model, Continuation(tokenizer))
    mean = predict(scorer, encoded, MeanPredictive())
    spread = []
    for log_std in (-1.0, -4.0, -20.0):
        with torch.no_grad():
            for leaf in stochastic_layers(model).values():
                leaf.posterior.log_std.fill_(log_std)
        draws = predict(scorer, encoded, MonteCarloPredictive(3)).exp()
        spread.append((draws - mean.exp()).abs().max().item())
    assert spread[0] > spread[1] > spread[2] and spread[2] < 1e-6


def test_the_mean_adapter_as_plain_lora_gives_the_mean_predictive(tmp_path: Path, encoded: list[Encoded]) -> None:
    model = adapted(last=2)
    base, tokenizer = loaded()
    scoring = Continuation(tokenizer)
    mean = predict(Scorer(model, scoring), encoded, MeanPredictive()).exp()
    model.save_pretrained(str(tmp_path))
    plain = PeftModel.from_pretrained(base, str(tmp_path / "mean")).eval()
    close(predict(Scorer(plain, scoring), encoded, MeanPredictive()).exp(), mean, 1e-5)
    untrained = predict(Scorer(loaded()[0], scoring), encoded, MeanPredictive()).exp()
    assert (untrained - mean).abs().max() > 1e-3


def test_predicting_leaves_the_model_in_its_mode_even_after_an_error(scorer: Scorer, encoded: list[Encoded]) -> None:
    scorer.model.train()

    def fail(_done: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        predict(scorer, encoded, MonteCarloPredictive(2), advance=fail)
    assert scorer.model.training
    assert all(leaf.state == "auto" for leaf in stochastic_layers(scorer.model).values())
    # in training mode a stochastic layer would draw: predicting takes the mean all the same
    close(predict(scorer, encoded, MeanPredictive())[0, 0, :3], alone(scorer.model.eval(), scorer.scoring, encoded[0]))


def test_progress_counts_every_row_once(scorer: Scorer, encoded: list[Encoded]) -> None:
    done: list[int] = []
    predict(scorer, encoded, MeanPredictive(), batch_size=3, advance=done.append)
    assert done == [3, 3, 1]


def test_more_memory_or_smaller_batches_are_more_particles_at_once(
    scorer: Scorer, encoded: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (scorer.scoring.collate(encoded[:n]) for n in (1, 7))
    assert 0 < bytes_per_particle(scorer.model, small) < bytes_per_particle(scorer.model, large)
    assert bytes_per_particle(scorer.model, large.repeat(2)) == 2 * bytes_per_particle(scorer.model, large)
    fits = []
    for free in (0, 10**6, 10**7, 10**9):
        monkeypatch.setattr("scalabl.predictive.monte_carlo.free_bytes", lambda _device, free=free: free)
        fits.append([particles_at_once(scorer.model, batch, 1000) for batch in (large, small)])
    assert fits[0] == [1, 1]
    assert all(a[i] <= b[i] for a, b in zip(fits, fits[1:], strict=False) for i in (0, 1)) and fits[-1][0] > 1
    assert all(of_large <= of_small for of_large, of_small in fits)
    assert particles_at_once(scorer.model, small, 3) == 3


def test_out_of_memory_halves_the_chunk_and_keeps_the_particles(
    scorer: Scorer, encoded: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predict(scorer, encoded, MonteCarloPredictive(5, chunk=5))
    run = MonteCarloPredictive._chunk
    sizes: list[int] = []

    def scarce(self: MonteCarloPredictive, scorer: Scorer, batch: object, first: int, number: int) -> Tensor:
        sizes.append(number)
        if number > 2:
            raise torch.OutOfMemoryError
        return run(self, scorer, batch, first, number)  # type: ignore[arg-type]

    monkeypatch.setattr(MonteCarloPredictive, "_chunk", scarce)
    close(predict(scorer, encoded, MonteCarloPredictive(5, chunk=5), batch_size=7), expected)
    assert sizes == [5, 2, 2, 1]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        MonteCarloPredictive(0)
    with pytest.raises(UserError, match="choose one of mean, mc"):
        make_predictive("map")
    assert make_predictive("mc", samples=3, seed=2).name == "mc"
