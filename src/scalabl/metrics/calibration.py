"""Two numbers that make probabilities as sure as held-out rows say: the scale of a posterior and a temperature.

    p(y | x) = 1/N sum_n softmax(log p(y | x, s_mu + tau (s_n - s_mu)) / T),   tau and T minimise the NLL of the rows

tau = 0 is the posterior mean. Particles are draws by number, so that every tau is tried with the same ones. On few rows
the best of several tau is often luck: another one than 1 is taken only where it gains more, in NLL a row, than the
standard error of that gain over the rows, each tau with the T that suits it best (a paired comparison). The mean has to
beat the best width so too: it has no particles, whose disagreement says what the model never learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics.uncertainty import apply_temperature, average, fit_temperature

# A number that is fitted on n rows costs new ones 1 / (2 n) nats on average (Akaike 1974): at 20 rows 0.025 nats, about
# what a calibration gains.
ROWS_NEEDED = 20
# tried first beside 1; where one gains, then by factors of 2 while the last one is best, then of sqrt(2) around it
SCALES = (0.0, 0.5, 2.0)
LARGEST, SMALLEST = 8.0, 0.125
_NO_GAIN = 1e-4  # nats a row, below which nobody sees a difference


@dataclass(frozen=True)
class CalibrationFit:
    """What was fitted.

    Attributes:
        scale: tau.
        temperature: T at this tau.
        before: NLL of the rows in nats, at tau = T = 1.
        after: NLL at tau and T; never above `before`.
        tried: tau -> (T, NLL).
        accuracy: share of the rows answered rightly, at tau.
    """

    scale: float
    temperature: float
    before: float
    after: float
    tried: dict[float, tuple[float, float]]
    accuracy: float


def fit_calibration(
    predicted: Callable[[float], Tensor], labels: Tensor, *, has_scale: bool = True, per_row: int = 1
) -> CalibrationFit:
    """tau and T together, by the NLL of held-out rows.

    Args:
        predicted: tau -> log class probabilities (N, n, C) of the rows, with the same draws for every tau.
        labels: (n,) their right answers.
        has_scale: whether there is a posterior; else tau stays 1.
        per_row: so many of the n are questions of one row, whose losses are compared as one.

    Raises:
        UserError: fewer than `ROWS_NEEDED` rows, or probabilities that are not finite.
    """
    require_rows(len(labels) // per_row)
    losses: dict[float, Tensor] = {}
    temperatures: dict[float, float] = {}
    right: dict[float, float] = {}

    def attempt(scale: float, log_probs: Tensor) -> None:
        right[scale] = float((average(log_probs).argmax(dim=-1) == labels).double().mean())
        temperatures[scale], of_questions = tempered_losses(log_probs, labels)
        losses[scale] = of_questions.unflatten(0, (-1, per_row)).mean(dim=1)

    def widths() -> list[float]:
        return sorted(scale for scale in temperatures if scale > 0)

    def best() -> float:
        # under so sharp a temperature particles are votes, of which a few rows that are answered wrongly may want any
        sharp = min(1.0, temperatures[1.0]) / 2
        taken = [scale for scale in widths() if temperatures[scale] >= sharp]
        return min(taken, key=lambda scale: (float(losses[scale].mean()), _from_one(scale)))

    as_learnt = predicted(1.0)
    before = float(row_losses(as_learnt, labels, 1.0).mean())
    attempt(1.0, as_learnt)
    if has_scale:
        for scale in SCALES:
            attempt(scale, predicted(scale))
    # where none of them is told apart from 1, finer ones are not either
    if has_scale and any(told_apart(losses[scale], losses[1.0]) for scale in SCALES):
        while best() == widths()[-1] < LARGEST:
            attempt(2 * best(), predicted(2 * best()))
        while best() == widths()[0] > SMALLEST:
            attempt(best() / 2, predicted(best() / 2))
        centre = best()
        for scale in (centre / 2**0.5, centre * 2**0.5):
            attempt(scale, predicted(scale))
    chosen = best()
    if has_scale and told_apart(losses[0.0], losses[chosen]):
        chosen = 0.0
    if not told_apart(losses[chosen], losses[1.0]):
        chosen = 1.0
    return CalibrationFit(
        chosen,
        temperatures[chosen],
        before,
        float(losses[chosen].mean()),
        {scale: (temperatures[scale], float(losses[scale].mean())) for scale in temperatures},
        right[chosen],
    )


def told_apart(lower: Tensor, higher: Tensor) -> bool:
    """Whether losses (n,) are lower than others of the same rows by more than the standard error of the difference."""
    gain = higher - lower
    return float(gain.mean()) > max(float(gain.std()) / len(gain) ** 0.5, _NO_GAIN)


def _from_one(scale: float) -> float:
    """How far a tau is from 1, as a factor."""
    return max(scale, 1 / scale) if scale > 0 else float("inf")


def row_losses(log_probs: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """(n,) float64 -log p(label) in nats of the average over tempered particles; log_probs (N, n, C), labels (n,)."""
    tempered = log_probs.double() if temperature == 1 else apply_temperature(log_probs.double(), temperature)
    return -average(tempered).gather(1, labels[:, None]).squeeze(1).clamp_min(1e-300).log()


def bounded_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """`fit_temperature`, but at least 1 where every row is answered rightly: surer is then better without an end.

    Args:
        log_probs: (N, n, C) of held-out rows.
        labels: (n,) their right answers.
    """
    found = fit_temperature(log_probs, labels)
    if bool((average(log_probs).argmax(dim=1) == labels).all()):
        found = max(found, 1.0)
    at_one, at_found = (float(row_losses(log_probs, labels, each).mean()) for each in (1.0, found))
    return found if at_found < at_one else 1.0


def tempered_losses(log_probs: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The temperature that suits rows, and their losses (n,) in nats under it; log_probs (N, n, C), labels (n,)."""
    temperature = bounded_temperature(log_probs, labels)
    return temperature, row_losses(log_probs, labels, temperature)


def require_rows(number: int) -> None:
    """Refuse rows that are too few.

    Raises:
        UserError: fewer than `ROWS_NEEDED`.
    """
    if number < ROWS_NEEDED:
        raise UserError(
            f"{number} labelled rows are too few to calibrate on, it takes {ROWS_NEEDED}: a number that is fitted on n "
            "rows costs new ones 1 / (2 n) nats on average, with fewer rows more than a calibration gains; give more."
        )
