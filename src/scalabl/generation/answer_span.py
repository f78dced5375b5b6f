"""The answer's own part of a generated text, so that its scores are not those of what a model goes on to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scalabl.generation.correctness import answer_text
from scalabl.generation.decoding import Decoded


def answer_span(decoded: Decoded, stops: Sequence[str] = ("\n",)) -> Decoded:
    """The tokens up to the first stop string behind leading white space, that of the stop string included.

    The token that ends an answer counts, as an end token does: how sure the model was that the answer was complete is
    part of its probability. A text without a stop string stays as it is.

    Args:
        decoded: one generated text.
        stops: strings that end an answer, as in `answer_text`.

    Returns:
        the same, cut: `text` is then the answer, stripped, and it is finished.
    """
    whole = "".join(decoded.tokens)
    begin = len(whole) - len(whole.lstrip())
    ends = [end + len(stop) for stop in stops if stop and (end := whole.find(stop, begin)) >= 0]
    if not ends:
        return decoded
    first, length, taken = min(ends), 0, 0
    while length < first:
        length += len(decoded.tokens[taken])
        taken += 1
    figures = {name: getattr(decoded, name)[:taken] for name in ("total", "aleatoric", "epistemic", "intersection")}
    return replace(
        decoded,
        text=answer_text(decoded.text, stops),
        token_ids=decoded.token_ids[:taken],
        tokens=decoded.tokens[:taken],
        log_probs=decoded.log_probs[:, :taken],
        finished=True,
        **figures,
    )
