"""The numbers that a posterior adds at the shapes of published models."""

import json

import pytest
from extra_parameters import COVARIANCES, MODELS, SHAPES, count
from harness import RESULTS

# Qwen2.5-7B and 32B, Llama-2-7B: the paper's own counts; 14B: 2 r numbers for each of 2 x 48 + 1 layers
EXPECTED = {
    "qwen2.5-7b": (57, 3_768_320, 912),
    "qwen2.5-14b": (97, 7_548_928, 1_552),
    "qwen2.5-32b": (129, 9_646_080, 2_064),
    "llama-2-7b": (65, 4_483_072, 1_040),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_extra_parameters(name: str) -> None:
    layers, lora, diagonal = EXPECTED[name]
    of_base = SHAPES[name].parameters
    counted = {covariance: count(SHAPES[name], covariance) for covariance in COVARIANCES}
    assert counted["diagonal"] == {"base": of_base, "lora": lora, "variational": diagonal, "layers": layers}
    # a mean and a triangle: r (r + 3) / 2 = 44 a layer
    assert counted["full"] == {"base": of_base, "lora": lora, "variational": 44 * layers, "layers": layers}


def test_published_results_are_these() -> None:
    published = json.loads((RESULTS / "extra_parameters.json").read_text(encoding="utf-8"))
    assert set(published["models"]) == set(MODELS) == set(EXPECTED)
    for name, (layers, lora, diagonal) in EXPECTED.items():
        counted = published["models"][name]["diagonal"]
        assert (counted["layers"], counted["lora"], counted["variational"]) == (layers, lora, diagonal)
