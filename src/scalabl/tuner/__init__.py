"""The PEFT tuner: where a posterior sits in a LoRA layer. Importing it registers the tuner, and BLoB's, with PEFT."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from scalabl.tuner.blob import SCALABL_BLOB, BLoBConfig, BLoBModel
from scalabl.tuner.config import SCALABL, ScalaBLConfig
from scalabl.tuner.layers import kl_divergence, prior_of, stochastic_layers
from scalabl.tuner.model import ScalaBLModel
from scalabl.tuner.projection import StochasticProjection
from scalabl.tuner.state import mean, particles, sample, values

PEFT_TYPE_TO_CONFIG_MAPPING[SCALABL] = ScalaBLConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[SCALABL] = ScalaBLModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[SCALABL] = ScalaBLModel.prefix  # type: ignore[index]
PEFT_TYPE_TO_CONFIG_MAPPING[SCALABL_BLOB] = BLoBConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[SCALABL_BLOB] = BLoBModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[SCALABL_BLOB] = BLoBModel.prefix  # type: ignore[index]

__all__ = [
    "SCALABL",
    "ScalaBLConfig",
    "ScalaBLModel",
    "StochasticProjection",
    "kl_divergence",
    "mean",
    "particles",
    "prior_of",
    "sample",
    "stochastic_layers",
    "values",
]
