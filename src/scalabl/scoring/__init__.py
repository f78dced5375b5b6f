"""From a row to class log-probabilities: prompt -> tokens -> the model's logits -> one number a choice.

A scoring is either `letters` (next-token distribution over label words) or `continuation` (a softmax over the
log-likelihoods of the choice texts, summed or per token). Rows of text have no choices: `text` is the log-likelihood of
what they are trained on.
"""

from scalabl.scoring.base import Batch, Encoded, Scoring
from scalabl.scoring.continuation import Continuation
from scalabl.scoring.letters import Letters
from scalabl.scoring.scorer import Scorer
from scalabl.scoring.text import Text

__all__ = ["Batch", "Continuation", "Encoded", "Letters", "Scorer", "Scoring", "Text", "make_scoring"]


def make_scoring(settings: dict, tokenizer) -> Scoring:  # type: ignore[no-untyped-def]
    """The scoring that `Scoring.settings()` described."""
    kinds: dict[str, type[Scoring]] = {"letters": Letters, "continuation": Continuation, "text": Text}
    arguments = dict(settings)
    return kinds[arguments.pop("scoring")](tokenizer, **arguments)
