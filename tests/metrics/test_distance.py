"""The relative Mahalanobis distance against its own definition, and OAS against scikit-learn's."""

import pytest
import torch
from sklearn.covariance import OAS

from scalabl.core.errors import UserError
from scalabl.metrics.distance import FeatureDistance, shrunk_covariance


def rows(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three classes, the last one seldom, with a covariance that is no multiple of the identity."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.5, 0.4, 0.1]), number, replacement=True, generator=generator)
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))
    means = 3 * torch.randn(3, 6, generator=torch.Generator().manual_seed(8))
    return means[labels] + torch.randn(number, 6, generator=generator) @ mixing, labels


@pytest.mark.parametrize("number", [5, 40, 4000])
def test_shrinkage_is_scikit_learn_s(number: int) -> None:
    found, _ = rows(number)
    centred = (found - found.mean(dim=0)).double()
    expected = torch.from_numpy(OAS(assume_centered=True).fit(centred.numpy()).covariance_)
    torch.testing.assert_close(shrunk_covariance(centred), expected)


def test_the_distance_is_its_definition() -> None:
    features, labels = rows(400)
    distance = FeatureDistance.fit(features, labels)
    new, _ = rows(50, seed=1)
    x, z = features.double(), new.double()
    means = torch.stack([x[labels == c].mean(dim=0) for c in range(3)])
    shares = labels.bincount().double() / 400
    within, centre = shrunk_covariance(x - means[labels]), x.mean(dim=0)
    whole = within + ((means - centre).T * shares) @ (means - centre)

    def squared(mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
        return ((z - mean) @ torch.linalg.inv(covariance) * (z - mean)).sum(dim=1)

    expected = torch.stack([squared(mean, within) for mean in means]).min(dim=0).values - squared(centre, whole)
    torch.testing.assert_close(distance(new), expected, rtol=1e-4, atol=1e-3)


def test_what_is_kept_gives_the_same_numbers() -> None:
    features, labels = rows(60)
    distance = FeatureDistance.fit(features, labels)
    again = FeatureDistance.of({name: tensor.clone() for name, tensor in distance.tensors().items()})
    assert torch.equal(again(features), distance(features))
    assert all(tensor.dtype == torch.float32 for tensor in distance.tensors().values())


def test_rows_between_the_classes_are_further_than_those_of_a_class() -> None:
    features, labels = rows(600)
    distance = FeatureDistance.fit(features, labels)
    means = torch.stack([features[labels == c].mean(dim=0) for c in range(3)])
    assert distance(means.mean(dim=0)[None]).item() > distance(features).quantile(0.95)


def test_fewer_rows_than_features_and_a_class_without_rows() -> None:
    features, _ = rows(5)
    found = FeatureDistance.fit(features, torch.tensor([0, 0, 3, 3, 3]))
    assert found.means.shape == (2, 6) and found(features).isfinite().all()
    assert FeatureDistance.fit(torch.ones(4, 6), torch.tensor([0, 0, 1, 1]))(features).isfinite().all()


def test_features_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="are NaN or infinite"):
        FeatureDistance.fit(torch.full((4, 6), torch.nan), torch.tensor([0, 0, 1, 1]))


def test_tensors_that_are_no_distance_are_refused() -> None:
    known = FeatureDistance.fit(*rows(40)).tensors()
    for changes, words in (
        ({"means": known["means"][:, :-1]}, "are not means"),
        ({"shares": known["shares"][:-1]}, "are not means"),
        ({"factor": known["factor"][0]}, "are not means"),
        ({"factor": known["factor"] * torch.nan}, "NaN or infinite"),
        ({"shares": known["shares"].long()}, "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=words):
            FeatureDistance.of(known | changes)
    with pytest.raises(UserError, match="are not means"):
        FeatureDistance.of({name: known[name] for name in ("means", "shares")})
    with pytest.raises(UserError, match="Features of 5 numbers are not of the model of these 6"):
        FeatureDistance.of(known)(torch.zeros(2, 5))
