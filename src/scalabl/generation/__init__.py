"""Open-ended answers: text from the average over particles, and a confidence that predicts whether it is wrong."""

from scalabl.generation.decoding import Decoded, decode
from scalabl.generation.fan_out import averaged
from scalabl.generation.token_figures import TokenFigures, token_figures

__all__ = ["Decoded", "TokenFigures", "averaged", "decode", "token_figures"]
