"""The features of a row are what the final layer of a head is given, whatever stands beside the row."""

import pytest
import torch
from tiny_base import tiny_base, tiny_encoder

from scalabl.data.example import Example
from scalabl.predictive.base import predict
from scalabl.runs.models import load_base
from scalabl.scoring.features import MeanPass, feature_size
from scalabl.scoring.head import Head
from scalabl.scoring.letters import Letters
from scalabl.scoring.scorer import Scorer

LABELS = ("red", "blue", "green")
TEXTS = ("red stone", "a blue stone that is wide open and green", "bee")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_features_are_the_input_of_the_final_layer(kind: str) -> None:
    base = tiny_encoder() if kind == "encoder" else tiny_base()
    model, tokenizer = load_base(str(base), labels=LABELS)
    scorer = Scorer(model, Head(tokenizer, labels=LABELS))
    rows = [scorer.scoring.encode(Example(str(i), text, LABELS, None)) for i, text in enumerate(TEXTS)]
    found = predict(scorer, rows, MeanPass(model), batch_size=3)[0]
    assert found.shape == (3, 1 + 32) and feature_size(model) == 32
    final = model.classifier if kind == "encoder" else model.score
    for row, of_row in zip(rows, found, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([row.input_ids])).logits[0]
            again = final(of_row[1:])
        torch.testing.assert_close(again, alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of_row[0], -alone.logsumexp(0), rtol=1e-4, atol=1e-4)


def test_a_language_model_has_an_energy_and_no_features() -> None:
    model, tokenizer = load_base(str(tiny_base()))
    scorer = Scorer(model, Letters(tokenizer, num_letters=3))
    rows = [scorer.scoring.encode(Example("0", "red?", ("a", "b", "c"), None))]
    found = predict(scorer, rows, MeanPass(model))[0]
    assert feature_size(model) is None
    logits = scorer.class_logits(scorer.scoring.collate(rows))
    torch.testing.assert_close(found[:, 0], -logits.logsumexp(1).detach())
