"""The Frechet distance against a root of matrices, against its closed form and against another library."""

import numpy as np
import pytest
import torch

from ediffi_core.evaluation.frechet import Gaussian, frechet_distance, jackknife_interval


def distance(a, b):
    return frechet_distance(Gaussian.of(a), Gaussian.of(b))


def features(count, width, seed, mixed=True):
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(count, width))
    return (made @ rng.normal(size=(width, width)) if mixed else made) + rng.normal(size=width)


def with_moments(mean, deviations, seed, count=200):
    """Features whose sample mean and covariance are exactly these, the covariance diagonal."""
    made = features(count, len(mean), seed)
    made = made - made.mean(0)
    made = made @ np.linalg.inv(np.linalg.cholesky(np.cov(made.T))).T
    return made * deviations + mean


@pytest.mark.parametrize(("count", "others"), [(200, 300), (9, 300), (9, 7), (13, 12)], ids=["more", "one fewer", "fewer", "edge"])  # fmt: skip
def test_equals_the_formula_with_a_root_of_a_matrix(count, others):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = features(count, 12, 0), features(others, 12, 1)
    ca, cb = np.cov(a.T), np.cov(b.T)
    # a little on the diagonal: the root of a singular matrix is not well defined in floating point
    small = 0 if min(count, others) > 12 else 1e-10
    root = linalg.sqrtm(ca @ cb + small * np.eye(12)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * root)
    assert distance(a, b) == pytest.approx(expected, rel=1e-4 if small else 1e-9)


def test_of_diagonal_covariances_it_is_the_distance_of_means_and_of_deviations():
    mean_a, mean_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    dev_a, dev_b = np.array([0.1, 2.0, 3.0]), np.array([1.0, 2.0, 0.5])
    expected = ((mean_a - mean_b) ** 2).sum() + ((dev_a - dev_b) ** 2).sum()
    assert distance(with_moments(mean_a, dev_a, 2), with_moments(mean_b, dev_b, 3)) == pytest.approx(expected, rel=1e-9)


def test_is_a_distance_that_does_not_depend_on_the_axes():
    a, b = features(60, 5, 4), features(40, 5, 5)
    turn = np.linalg.qr(features(5, 5, 6))[0]
    assert distance(a, a[::-1]) == pytest.approx(0, abs=1e-9)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)
    assert distance(a @ turn + 3, b @ turn + 3) == pytest.approx(distance(a, b), rel=1e-9)
    assert distance(a, a + 2) == pytest.approx(5 * 4, rel=1e-9)


def test_equals_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1)

    metric = fid.FrechetInceptionDistance(Flat(), normalize=True).set_dtype(torch.float64)
    a, b = (torch.from_numpy(features(100, 12, seed, mixed=False)).view(-1, 3, 2, 2) for seed in (7, 8))
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert distance(a.flatten(1).numpy(), b.flatten(1).numpy()) == pytest.approx(metric.compute().item(), rel=1e-6)


def test_few_pictures_raise_it_as_the_docs_say():
    width, count, rng = 16, 400, np.random.default_rng(9)
    truth = Gaussian(np.zeros(width), np.eye(width))
    drawn = [frechet_distance(Gaussian.of(rng.normal(size=(count, width))), truth) for _ in range(40)]
    assert np.mean(drawn) == pytest.approx(width / count * (1 + width / 4), rel=0.1)


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(10).normal(size=30)
    low, high = jackknife_interval(lambda which: values[which].mean(), 30, groups=30)
    assert (low + high) / 2 == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std(ddof=1) / np.sqrt(30))


def test_the_interval_holds_the_distance_of_another_set_of_as_many_pictures():
    rng, truth, found, intervals = np.random.default_rng(11), Gaussian(np.zeros(6), np.eye(6)), [], []
    for _ in range(150):
        made = 1.5 * rng.normal(size=(50, 6)) + 0.5
        found.append(frechet_distance(Gaussian.of(made), truth))
        intervals.append(jackknife_interval(lambda which, made=made: frechet_distance(Gaussian.of(made[which]), truth), 50))  # fmt: skip
    low, high = np.array(intervals).T
    held = ((low < np.mean(found)) & (np.mean(found) < high)).mean()
    assert 0.88 <= held <= 0.99


def test_what_cannot_be_measured_is_said():
    with pytest.raises(ValueError, match=r"at least 2 pictures, \(N, D\), got \(1, 4\)"):
        Gaussian.of(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="not finite"):
        Gaussian.of(np.full((3, 4), np.nan))
    with pytest.raises(ValueError, match="One set of pictures has 4 features, the other 5"):
        distance(np.eye(4), np.eye(5))
    with pytest.raises(ValueError, match="at least 3 pictures, got 2"):
        jackknife_interval(np.mean, 2)
