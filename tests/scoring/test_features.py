"""The features of a row are its last hidden states' mean, whatever stands beside the row."""

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
from scalabl.tuner.layers import decoder_layers

LABELS = ("red", "blue", "green")
TEXTS = ("red stone", "a blue stone that is wide open and green", "bee")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_features_are_the_mean_of_the_last_layer(kind: str) -> None:
    base = tiny_encoder() if kind == "encoder" else tiny_base()
    model, tokenizer = load_base(str(base), labels=LABELS)
    scorer = Scorer(model, Head(tokenizer, labels=LABELS))
    rows = [scorer.scoring.encode(Example(str(i), text, LABELS, None)) for i, text in enumerate(TEXTS)]
    found = predict(scorer, rows, MeanPass(model), batch_size=3)[0]
    assert found.shape == (3, 1 + 32) and feature_size(model) == 32
    behind: list[torch.Tensor] = []
    last = decoder_layers(model)[-1]
    handle = last.register_forward_hook(lambda _m, _a, out: behind.append(out[0] if isinstance(out, tuple) else out))
    for row, of_row in zip(rows, found, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([row.input_ids])).logits[0]
        torch.testing.assert_close(of_row[1:], behind[-1][0].mean(dim=0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of_row[0], -alone.logsumexp(0), rtol=1e-4, atol=1e-4)
    handle.remove()


def test_a_language_model_has_an_energy_and_no_features() -> None:
    model, tokenizer = load_base(str(tiny_base()))
    scorer = Scorer(model, Letters(tokenizer, num_letters=3))
    rows = [scorer.scoring.encode(Example("0", "red?", ("a", "b", "c"), None))]
    found = predict(scorer, rows, MeanPass(model))[0]
    assert feature_size(model) == 0
    logits = scorer.class_logits(scorer.scoring.collate(rows))
    torch.testing.assert_close(found[:, 0], -logits.logsumexp(1).detach())
