"""What lm-polygraph is given of our answers, and its formulas on it: the numbers that are ours too.

The formulas are written from lm-polygraph 0.7.0's estimators, which read nothing but these statistics.
"""

import json

import numpy as np
import polygraph_scores
import pytest
import torch
from tiny_base import adapted, tiny_tokenizer

from scalabl.generation.decoding import decode
from scalabl.generation.equivalence import equivalence, semantic_sets
from scalabl.generation.scores import sampled_scores, sequence_scores
from scalabl.predictive.monte_carlo import MonteCarloPredictive


@pytest.fixture(scope="module")
def generated():
    """Two answers and five samples of each, of a tiny model with three particles."""
    model, tokenizer, draws = adapted(), tiny_tokenizer(), MonteCarloPredictive(3, seed=0)
    prompts = ["red blue green", "stone"]
    answers = [row[0] for row in decode(model, tokenizer, prompts, draws, max_new_tokens=4, do_sample=False)]
    torch.manual_seed(0)
    samples = decode(
        model, tokenizer, prompts, draws, max_new_tokens=2, do_sample=True, top_k=2, num_return_sequences=5
    )
    return answers, samples


@pytest.fixture(scope="module")
def sets(generated):
    return [semantic_sets([s.text for s in row], equivalence("normalised")) for row in generated[1]]


def written(stats):
    """The estimators' formulas, one answer at a time."""
    found = {name: [] for name in polygraph_scores.SAME}
    classes = stats["semantic_classes_entail"]
    for i, texts in enumerate(stats["sample_texts"]):
        k, lp = len(texts), np.array(stats["sample_log_probs"][i])
        lengths = [len(tokens) for tokens in stats["sample_tokens"][i]]
        masses = [np.logaddexp.reduce(lp[members]) for members in classes["class_to_sample"][i]]
        shares = [np.log(len(members) / k) for members in classes["class_to_sample"][i]]
        words = [set(text.lower().split()) for text in texts]
        w = np.array([[1.0 if a == b else len(words[a] & words[b]) / len(words[a] | words[b]) for b in range(k)]
                      for a in range(k)])  # fmt: skip
        scale = np.linalg.inv(np.sqrt(np.diag(w.sum(axis=1))))
        eigenvalues = np.linalg.eigvalsh(np.eye(k) - scale @ w @ scale)
        values = {
            "MaximumSequenceProbability": -np.sum(stats["greedy_log_likelihoods"][i]),
            "Perplexity": -np.mean(stats["greedy_log_likelihoods"][i]),
            "MeanTokenEntropy": np.mean(stats["entropy"][i]),
            "MonteCarloSequenceEntropy": -np.mean(lp),
            "MonteCarloNormalizedSequenceEntropy": -np.mean(lp / lengths),
            "SemanticEntropy": -np.mean([masses[c] for c in classes["sample_to_class"][i]]),
            "SemanticEntropyEmpirical": -np.mean([shares[c] for c in classes["sample_to_class"][i]]),
            "DegMat_Jaccard_score": np.trace(k - np.diag(w.sum(axis=1))) / k**2,
            "EigValLaplacian_Jaccard_score": sum(max(0, 1 - value) for value in eigenvalues),
        }
        for name, value in values.items():
            found[name].append(float(value))
    return found


def test_the_same_definitions_give_the_same_numbers(generated, sets):
    answers, samples = generated
    stats = json.loads(json.dumps(polygraph_scores.statistics(answers, samples, sets)))
    theirs = written(stats)
    for i, (answer, row) in enumerate(zip(answers, samples, strict=True)):
        ours = sequence_scores(answer) | sampled_scores(answer, row, equivalence("normalised"))
        for name, (own, factor) in polygraph_scores.SAME.items():
            assert factor * ours[own] == pytest.approx(theirs[name][i], rel=1e-5, abs=1e-5), name
    # samples that differ and samples that agree, or the numbers above would say little
    assert any(1 < len(set(row)) < len(row) for row in sets)


def test_classes_hold_every_sample_once(generated, sets):
    stats = polygraph_scores.statistics(*generated, [[*row, 7] for row in sets])
    for row, members in zip(sets, stats["semantic_classes_entail"]["class_to_sample"], strict=True):
        assert sorted(sum(members, [])) == list(range(5))
        assert [next(c for c, m in enumerate(members) if i in m) for i in range(5)] == row


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(polygraph_scores.sys.modules, "lm_polygraph", raising=False)
    with pytest.raises(SystemExit, match="pip install --no-deps lm-polygraph"):
        polygraph_scores.polygraph_scores({})
