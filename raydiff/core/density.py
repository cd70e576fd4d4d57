"""Two-sided densities on small vectors: how unusual a vector of per-step statistics is, in either direction.

An anomaly can be easier for the denoiser than a normal image (EVALUATION: errors reverse direction between data sets),
so a high error alone is no safe score. Fitting is scikit-learn's; what is kept is tensors, and evaluating them is a
few lines of float64 that treat every row alike, whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raydiff.errors import ConfigError

__all__ = ["DensityKind", "differentiable_negative_log_density", "fit_density", "negative_log_density"]

DensityKind = Literal["mahalanobis", "gaussian_mixture", "kde"]

_AT_ONCE = 2**21
"""Numbers in each of the arrays that a density needs for its rows: 16 MiB."""


def fit_density(kind: DensityKind, vectors: np.ndarray, *, num_components: int = 3) -> dict[str, Tensor]:
    """Fit a density to z-scored vectors.

    ``mahalanobis``: one Gaussian, covariance shrunk after Ledoit and Wolf 2004. ``gaussian_mixture``: full
    covariances, at most one component per ten vectors and per 2 d. ``kde``: Gaussian kernels, Scott's bandwidth.

    Args:
        kind: which.
        vectors: (n, d), n at least 2.
        num_components: of the mixture.

    Returns:
        Float64 tensors for :func:`negative_log_density`.

    Raises:
        ConfigError: the vectors are all the same, so there is no density.
    """
    if not np.ptp(vectors, axis=0).any():
        raise ConfigError(
            f"scoring.density is {kind} and all {len(vectors)} calibration images have the same statistics; set it to"
            " none, or calibrate with images that differ"
        )
    center, scale = vectors.mean(0), np.maximum(vectors.std(0), 1e-9)
    z = (vectors - center) / scale
    state = {"center": center, "scale": scale}
    if kind == "kde":
        bandwidth = len(z) ** (-1 / (z.shape[1] + 4))  # Scott 1992
        state |= {"means": z, "weights": np.full(len(z), 1 / len(z))}
        state["precision_roots"] = np.eye(z.shape[1])[None] / bandwidth
    elif kind == "mahalanobis":
        from sklearn.covariance import LedoitWolf

        fitted = LedoitWolf().fit(z)
        state |= {"means": fitted.location_[None], "weights": np.ones(1)}
        state["precision_roots"] = np.linalg.cholesky(fitted.precision_)[None]
    else:
        from sklearn.mixture import GaussianMixture

        components = max(1, min(num_components, len(z) // max(10, 2 * z.shape[1])))
        mixture = GaussianMixture(components, reg_covar=1e-2, random_state=0, n_init=3).fit(z)
        state |= {"means": mixture.means_, "weights": mixture.weights_}
        state["precision_roots"] = mixture.precisions_cholesky_
    return {name: torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64)) for name, value in state.items()}


def negative_log_density(state: Mapping[str, Tensor], vectors: np.ndarray) -> np.ndarray:
    """-log p per row up to a constant, float64 (B,); row i depends on ``vectors[i]`` alone.

    Every kind is a mixture of Gaussians with precision L L^T: a KDE has one component per training vector. So many rows
    are evaluated at once that the numbers in between, B M d of them, stay few.
    """
    rows = max(1, _AT_ONCE // state["means"].numel())
    parts = [_of_few(state, vectors[i : i + rows]) for i in range(0, max(1, len(vectors)), rows)]
    return np.concatenate(parts)


def _of_few(state: Mapping[str, Tensor], vectors: np.ndarray) -> np.ndarray:
    center, scale, means, weights, roots = (
        state[name].numpy() for name in ("center", "scale", "means", "weights", "precision_roots")
    )
    difference = ((vectors - center) / scale)[:, None] - means  # (B, M, d)
    # einsum without BLAS: a matrix product would take another kernel for another number of rows.
    whitened = np.einsum("bmi,mij->bmj", difference, np.broadcast_to(roots, (len(means), *roots.shape[1:])))
    log_volume = np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(1)  # (M,) or (1,)
    log_terms = np.log(weights) + log_volume - 0.5 * np.square(whitened).sum(2)  # (B, M)
    peak = log_terms.max(1)
    result: np.ndarray = -(peak + np.log(np.exp(log_terms - peak[:, None]).sum(1)))
    return result


def differentiable_negative_log_density(state: Mapping[str, Tensor], vectors: Tensor) -> Tensor:
    """:func:`negative_log_density` in torch, float64 (B,), with gradients back to ``vectors`` (B, d).

    For attacks; its last bits may depend on the batch.
    """
    center, scale, means, weights, roots = (
        state[name].to(vectors.device) for name in ("center", "scale", "means", "weights", "precision_roots")
    )
    difference = ((vectors.double() - center) / scale)[:, None] - means  # (B, M, d)
    whitened = torch.einsum("bmi,mij->bmj", difference, roots.expand(len(means), -1, -1))
    log_volume = roots.diagonal(dim1=1, dim2=2).log().sum(1)  # (M,) or (1,)
    return -(weights.log() + log_volume - 0.5 * whitened.square().sum(2)).logsumexp(1)
