"""Scores by lm-polygraph's own code, of answers that were generated and sampled here.

    pip install --no-deps lm-polygraph==0.7.0

lm-polygraph generates, clusters and scores; here it only scores, so that every score is of the same model, the same
texts and the same semantic sets. `statistics` writes what its estimators read; each is a function of that alone. Its
package imports some thirty others when it is imported, which the estimators do not need: they are imported by
themselves, and the package is not touched. LexicalSimilarity needs rouge-score and nltk, and is left out without.

Higher is less sure in all of them. Where definitions are the same the numbers are ours (`SAME`): sums and means of
log-probabilities, the mean token entropy, both Monte Carlo entropies, both semantic entropies, Jaccard's degrees and
eigenvalues. LexicalSimilarity stems English words; ours does not.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalabl.generation.decoding import Decoded

SAME = {
    "MaximumSequenceProbability": ("log_probability", -1.0),
    "Perplexity": ("mean_log_probability", -1.0),
    "MeanTokenEntropy": ("mean_entropy", 1.0),
    "MonteCarloSequenceEntropy": ("predictive_entropy", 1.0),
    "MonteCarloNormalizedSequenceEntropy": ("mean_predictive_entropy", 1.0),
    "SemanticEntropy": ("semantic_entropy_monte_carlo", 1.0),
    "SemanticEntropyEmpirical": ("discrete_semantic_entropy", 1.0),
    "DegMat_Jaccard_score": ("degree_uncertainty", 1.0),
    "EigValLaplacian_Jaccard_score": ("laplacian_eigenvalues", 1.0),
}
"""lm-polygraph's name -> our name, and what ours is multiplied by; Jaccard's index of two empty answers is 0 there."""

SAMPLED = ("MonteCarlo", "Semantic", "DegMat", "EigVal", "Eccentricity", "LexicalSimilarity")
"""Beginnings of the names of those that need samples."""


def statistics(
    answers: Sequence[Decoded], samples: Sequence[Sequence[Decoded]], sets: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """What lm-polygraph's estimators read, as plain values.

    Args:
        answers: n answers.
        samples: for each the k texts that were sampled.
        sets: for each the semantic set of every sample, numbered from 0 as they come (`semantic_sets`).
    """
    numbers = [[int(number) for number in row][: len(texts)] for row, texts in zip(sets, samples, strict=True)]
    members = [[[i for i, n in enumerate(row) if n == number] for number in sorted(set(row))] for row in numbers]
    return {
        "greedy_texts": [answer.text for answer in answers],
        "greedy_log_likelihoods": [answer.average_log_probs.double().tolist() for answer in answers],
        "entropy": [answer.total.double().tolist() for answer in answers],
        "sample_texts": [[one.text for one in row] for row in samples],
        "sample_tokens": [[one.token_ids for one in row] for row in samples],
        "sample_log_probs": [[float(one.average_log_probs.double().sum()) for one in row] for row in samples],
        "semantic_classes_entail": {"sample_to_class": numbers, "class_to_sample": members},
    }


def polygraph_scores(stats: dict[str, Any]) -> dict[str, list[float]]:
    """Name -> (n,) of every estimator that these statistics suffice for."""
    found = {}
    for estimator in _estimators():
        found[str(estimator)] = [float(value) for value in estimator(stats)]
    return found


def installed() -> bool:
    """Whether lm-polygraph is there."""
    return next(iter(importlib.metadata.distributions(name="lm-polygraph")), None) is not None


def version() -> str:
    """lm-polygraph's version."""
    return importlib.metadata.version("lm-polygraph")


def _estimators() -> list[Any]:
    made = [
        _module("max_probability").MaximumSequenceProbability(),
        _module("perplexity").Perplexity(),
        _module("token_entropy").MeanTokenEntropy(),
        _module("monte_carlo_sequence_entropy").MonteCarloSequenceEntropy(),
        _module("monte_carlo_normalized_sequence_entropy").MonteCarloNormalizedSequenceEntropy(),
        _module("semantic_entropy").SemanticEntropy(),
        _module("semantic_entropy").SemanticEntropy(class_probability_estimation="frequency"),
        _module("deg_mat").DegMat(similarity_score="Jaccard_score"),
        _module("eig_val_laplacian").EigValLaplacian(similarity_score="Jaccard_score"),
        _module("eccentricity").Eccentricity(similarity_score="Jaccard_score"),
    ]
    if all(importlib.util.find_spec(name) for name in ("rouge_score", "nltk", "absl")):
        made.append(_module("lexical_similarity").LexicalSimilarity())
    return made


def _module(name: str) -> Any:
    """One of lm-polygraph's estimator modules, without the imports of its package."""
    if "lm_polygraph" not in sys.modules:
        spec = importlib.util.find_spec("lm_polygraph")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("lm-polygraph is not installed: pip install --no-deps lm-polygraph==0.7.0")
        for folder in ("", "estimators", "utils"):
            package = f"lm_polygraph.{folder}".rstrip(".")
            bare = types.ModuleType(package)
            bare.__path__ = [str(Path(place) / folder) for place in spec.submodule_search_locations]
            sys.modules[package] = bare
    return importlib.import_module(f"lm_polygraph.estimators.{name}")
