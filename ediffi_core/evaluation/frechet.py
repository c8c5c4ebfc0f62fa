"""The Frechet distance between two sets of pictures: FID, where the features are Inception's (Heusel et al. 2017).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

The last trace is the sum of the singular values of A^T B, where C_a = A A^T and C_b = B B^T: so no root of a matrix that is
not symmetric is taken, and fewer pictures than features are no special case. Letters: N pictures, D features.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import ndarray


class Gaussian(NamedTuple):
    """The mean and the covariance of features; all float64."""

    mean: ndarray  # (D,)
    factor: ndarray  # (D, min(N, D)); the covariance is factor @ factor.T

    @classmethod
    def of(cls, features: ndarray) -> "Gaussian":
        """features: (N, D). Raises ValueError for fewer than 2 pictures or values that are not finite."""
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"A covariance needs the features of at least 2 pictures, (N, D), got {features.shape}. Draw more pictures."
            )
        if not np.isfinite(features).all():
            raise ValueError("Features of pictures are not finite (NaN or infinity). Check the weights that make them.")
        mean = features.mean(0)
        centred = (features - mean) / np.sqrt(len(features) - 1)
        return cls(mean, np.linalg.qr(centred, mode="r").T if len(centred) > centred.shape[1] else centred.T)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """0 or more. Raises ValueError for features of different widths."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"One set of pictures has {len(a.mean)} features, the other {len(b.mean)}. Use the same network."
        )
    between = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    spread = np.square(a.factor).sum() + np.square(b.factor).sum() - 2 * between
    return float(np.square(a.mean - b.mean).sum() + max(spread, 0.0))


def jackknife_interval(statistic: Callable[[ndarray], float], count: int, groups: int = 25) -> tuple[float, float]:
    """The 95 % interval of a statistic of `count` pictures, by leaving out one group of them after the other.

    statistic: maps which pictures count, (count,) bool, to a number; picture i lies in group i modulo `groups`. It says how
    far another set of as many pictures would lie, not how far endlessly many would. The bootstrap is no way here: pictures
    that are drawn twice make a covariance of fewer pictures, and its intervals were measured to be 1.7 to 3.6 times too
    wide. These are up to 1.8 times too wide for pictures that are as good as the reference, about right for others.
    Raises ValueError for fewer than 3 pictures.
    """
    if count < 3:
        raise ValueError(f"An interval needs at least 3 pictures, got {count}. Draw more pictures.")
    groups = min(groups, count)
    group = np.arange(count) % groups
    without = np.array([statistic(group != one) for one in range(groups)])
    half = 1.96 * np.sqrt((groups - 1) * without.var())
    whole = statistic(np.ones(count, dtype=bool))
    return float(whole - half), float(whole + half)
