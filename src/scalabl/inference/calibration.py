"""A run's calibration: the numbers in its record, and what they mean for the settings of a prediction. Imports no
torch.

tau belongs to the posterior, and is one number. T belongs to a kind of predictive (one pass, N particles, linearised):
each that was fitted has its own. It holds for any N, seed and kind of draws, but not for s drawn in other layers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from scalabl.core.errors import UserError
from scalabl.inference.settings import PredictionSettings
from scalabl.runs.record import RECORD, RunRecord


@dataclass(frozen=True)
class Calibration:
    """What was fitted on held-out rows.

    Attributes:
        scale: tau, by which the posterior's standard deviations are multiplied; 1 where there is none.
        temperatures: T by the kind of predictive, "mean", "mc" or "linearized".
        predictive: the kind that tau was fitted with.
        samples: N of its particles.
        seed: of them.
        rows: how many rows.
        rows_sha256: of their ids, texts and labels.
        nll: of the rows in nats, "before" and "after".
        accuracy: share of the rows (of their labels, where a row has several) answered rightly; None in older records.
    """

    scale: float
    temperatures: dict[str, float]
    predictive: str
    samples: int
    seed: int
    rows: int
    rows_sha256: str
    nll: dict[str, float]
    accuracy: float | None = None

    @classmethod
    def of(cls, record: RunRecord) -> Calibration | None:
        """A run's; None where it is uncalibrated.

        Raises:
            UserError: the record has something else in its place.
        """
        if record.calibration is None:
            return None
        try:
            made = cls(**record.calibration)
            PredictionSettings(scale=made.scale)
            for temperature in (made.temperatures[made.predictive], *made.temperatures.values()):
                PredictionSettings(temperature=temperature)
        except (TypeError, KeyError, AttributeError, UserError) as error:
            raise UserError(f"{RECORD} has a calibration that is none; run scalabl calibrate again.") from error
        return made

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as the record has them."""
        return asdict(self)

    @property
    def temperature(self) -> float:
        """T of the predictive that tau was fitted with."""
        return self.temperatures[self.predictive]

    def applied(self, settings: PredictionSettings, kind: str, *, by_auto: bool = False) -> PredictionSettings:
        """Settings with tau and T of a kind of predictive; those of a kind that was not fitted say so.

        Args:
            settings: without numbers of their own.
            kind: "mean", "mc" or "linearized".
            by_auto: auto chose it. A linearised one that it chose is as near as N particles are to all of them, so that
                it takes their temperature where it has none of its own.
        """
        if settings.stochastic_layers is not None and not by_auto:
            return self._left_out(settings, f"not for s in {settings.stochastic_layers} alone", "")
        if kind not in self.temperatures and by_auto and kind == "linearized" and self.suits_auto:
            kind = "mc"
        if kind not in self.temperatures:
            return self._left_out(settings, f"not for {kind}", f" --predictive {kind}")
        return replace(settings, scale=self.scale, temperature=self.temperatures[kind])

    @property
    def suits_auto(self) -> bool:
        """Whether particles have a temperature, which auto takes where nothing is cheaper."""
        return "mc" in self.temperatures

    @property
    def why_not_auto(self) -> str:
        """What is taken in auto's place where it does not suit, in a sentence."""
        return f"predicted by the {self.predictive} predictive, which the run was calibrated for."

    def _left_out(self, settings: PredictionSettings, why: str, option: str) -> PredictionSettings:
        mend = f"scalabl calibrate DIR --data ROWS{option} fits it" if option else "leave the layers out"
        sentence = f"uncalibrated: the run was calibrated for {self.predictive} and {why}; {mend}."
        return replace(settings, why=sentence if settings.why is None else f"{settings.why} {sentence}")

    def in_words(self) -> str:
        """ "posterior's scale 1.4, temperature 0.91, fitted on 300 rows (mc, N = 10): NLL 0.82 -> 0.74, 82 % right"."""
        kind = f"mc, N = {self.samples}" if self.predictive == "mc" else self.predictive
        scale = "" if self.scale == 1 else f"posterior's scale {self.scale:.3g}, "
        right = "" if self.accuracy is None else f", {100 * self.accuracy:.3g} % right"
        return (
            f"{scale}temperature {self.temperature:.3g}, fitted on {self.rows:,} rows ({kind}): NLL "
            f"{self.nll['before']:.4f} -> {self.nll['after']:.4f}{right}"
        )


def calibration_for(record: RunRecord | None, settings: PredictionSettings) -> Calibration | None:
    """The run's calibration, where settings leave tau and T to it."""
    if record is None or settings.raw or settings.method is not None:
        return None
    if settings.scale is not None or settings.temperature is not None:
        return None
    return Calibration.of(record)


def calibration_in_words(record: RunRecord) -> str:
    """A run's calibration; of an uncalibrated one why it is, and what to do."""
    made = Calibration.of(record)
    if made is not None:
        return made.in_words()
    held_out = record.rows["validation"]
    why = f"{held_out} validation row{'' if held_out == 1 else 's'}" if held_out else "no validation rows"
    return f"none, with {why}; scalabl calibrate DIR --data ROWS fits it on labelled rows"
