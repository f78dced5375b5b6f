"""BLoB as a PEFT tuner: a mean-field Gaussian on every number of A, kept, saved and merged as our own tuner is.

`scalabl.tuner` registers it with PEFT.
"""

import scalabl.tuner  # noqa: F401  (first: it registers this tuner, whichever of the two is imported first)
from scalabl.tuner_blob.config import SCALABL_BLOB, BLoBConfig
from scalabl.tuner_blob.model import BLoBModel, blob_layers
from scalabl.tuner_blob.projection import BLoBProjection

__all__ = ["SCALABL_BLOB", "BLoBConfig", "BLoBModel", "BLoBProjection", "blob_layers"]
