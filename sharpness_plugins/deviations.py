"""The gradient noise scale of a data set, from how the gradients of its groups deviate from their known mean."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from . import reductions
from .distributed import Ranks
from .noise_scale import NoiseScaleEstimate

__all__ = ["DeviationSums"]

_TINY = 1e-300
_COLUMNS = 2**16  # squared at a time


class DeviationSums:
    """Signal and noise of ``k`` groups of samples (single ones, as a rule), fed deviation by deviation.

    Unlike norms, deviations ``d_j = g_j − g`` lose no digits, and their products give the errors. With weights ``w_j`` in
    the mean (``Σ w_j g_j = W g``; samples, or tokens, say), ``w = W/N`` and ``y_j = (w_j / w) d_j / √n_j``::

        S     = Σ |y_j|² / (k − 1)          Var S    = spread of |y_j|²
        |G|²  = |g|² − S/N                  Var |G|² = 4 GᵀΣG/N + 2 tr Σ² k/((k − 1) N²)

    which is ``noise_scale.moments_from_norms`` where ``w_j = n_j``, and to first order in samples with any weights.
    ``tr Σ²`` is the mean of ``(y_i · y_j)²`` over pairs that are given together and over neighbours; ``GᵀΣG`` the spread of
    ``g_j · g_(−j)``, the product with the mean of all others, less the noise of that mean.

    The samples are taken for independent draws from a population, whose ``Σ`` and ``G`` these are. ``S`` is without bias
    also for the covariance of the samples themselves with divisor ``N − 1``, if the groups are a random partition.

    Args:
        mean: ``g``, shape ``(dim,)``.
        num_samples, weight: ``N`` and ``W``, of all ranks.
        ranks: those that share the groups out.
    Memory: four vectors, and as many as are given at once.
    """

    def __init__(self, mean: Tensor, num_samples: float, weight: float, ranks: Ranks | None = None) -> None:
        self._mean, self._num_samples, self._weight = mean, num_samples, weight
        self._ranks = ranks or Ranks()
        self._norm = float(reductions.dot(mean, mean))
        self._sizes: list[Tensor] = []  # n_j
        self._lengths: list[Tensor] = []  # |y_j|²
        self._along: list[Tensor] = []  # y_j · g
        self._left_out: list[Tensor] = []  # √n_j (g_j · g_(−j) − |g|²)
        self._squared: list[Tensor] = []  # (y_i · y_j)²
        self._num_pairs = 0
        self._last: Tensor | None = None
        self._rows: Tensor | None = None  # y_j of all groups, while they were given together
        self._drift, self._curved = torch.zeros_like(mean), torch.zeros_like(mean)
        self._across: list[Tensor] = []  # √n_j y_j · Σ̂g

    @property
    def num_groups(self) -> int:
        return sum(len(lengths) for lengths in self._lengths)

    @property
    def residual(self) -> float:
        """``|Σ w_j d_j| / W``, in root mean squares of ``d_j`` or in ``|g|``: 0 up to rounding, if ``g`` is their mean."""
        size = max(self._norm, float(torch.cat(self._lengths).sum()) / self._num_samples, _TINY)
        return float(reductions.norm(self._drift)) / self._weight / math.sqrt(size)

    def add(self, gradients: Tensor, num_samples: Tensor, weights: Tensor) -> None:
        """Groups' mean gradients ``(m, dim)``, which are overwritten; ``n_j`` and ``w_j``, shape ``(m,)``, in float64."""
        rows = gradients.sub_(self._mean)
        self._drift += weights.to(rows) @ rows
        scale = self._scaled(rows, num_samples, weights)
        lengths = _squares(rows)
        along = reductions.matvec(rows, self._mean)
        share = weights / (self._weight - weights).clamp_min(_TINY)  # g_(−j) = g − w_j d_j / (W − w_j)
        self._sizes.append(num_samples)
        self._lengths.append(lengths)
        self._along.append(along)
        self._left_out.append(along - share * (along + lengths / scale.clamp_min(_TINY)))
        self._curved += along.to(rows) @ rows
        self._pair(rows)
        self._rows = rows if self._last is None and not self._ranks.is_alone else None
        if self._last is not None:
            self._squared.append(reductions.dot(self._last, rows[0]).square())
            self._num_pairs += 1
        self._last = rows[-1].clone()

    def add_up(self, most_rows: int) -> None:
        """All were added, on every rank; from now on these are the sums over the ranks. Collective.

        Groups that are at most ``most_rows`` over all ranks are all paired. Of more, pairs are of groups on one rank, and
        the errors depend on the shares as they do on the batches; ``GradientNoiseScale`` says by how much.
        """
        ranks = self._ranks
        if ranks.is_alone:
            return
        columns = (self._sizes, self._lengths, self._along, self._left_out)
        squared = float(torch.stack(self._squared).sum()) if self._squared else 0.0
        own = ([torch.cat(column).cpu() for column in columns if column], squared, self._num_pairs)
        parts = ranks.gather(own)
        counts = [len(columns_of_rank[0]) if columns_of_rank else 0 for columns_of_rank, _, _ in parts]
        parts = [part for part in parts if part[0]]
        for column, found in zip(columns, zip(*(part[0] for part in parts), strict=True), strict=True):
            column[:] = [of_rank.to(self._mean.device) for of_rank in found]
        self._squared = [torch.tensor(sum(part[1] for part in parts), dtype=torch.float64, device=self._mean.device)]
        self._num_pairs = sum(part[2] for part in parts)
        self._drift = _summed(self._drift, ranks)
        self._curved = _summed(self._curved, ranks)
        if sum(counts) <= most_rows:
            rows = self._mean.new_zeros(sum(counts), len(self._mean))
            if self._rows is not None:
                rows[sum(counts[: ranks.rank]) :][: counts[ranks.rank]] = self._rows
            self._squared, self._num_pairs = [], 0
            self._pair(_summed(rows, ranks))
        self._rows = None

    def add_up_again(self) -> None:
        """As ``add_up``, after the groups were added again."""
        own = [part.cpu() for part in self._across]
        self._across = [part.to(self._mean.device) for of_rank in self._ranks.gather(own) for part in of_rank]

    def add_again(self, gradients: Tensor, num_samples: Tensor, weights: Tensor) -> None:
        """The same groups in the same order, after all were added: for the error of the noise along the gradient."""
        rows = gradients.sub_(self._mean)
        self._scaled(rows, num_samples, weights)
        self._across.append(num_samples.sqrt() * reductions.matvec(rows, self._curved) / (self.num_groups - 1))

    def _pair(self, rows: Tensor) -> None:
        gram = (rows @ rows.T).double().square()
        self._squared.append((gram.sum() - gram.diagonal().sum()) / 2)
        self._num_pairs += len(rows) * (len(rows) - 1) // 2

    def _scaled(self, rows: Tensor, num_samples: Tensor, weights: Tensor) -> Tensor:
        """Deviations become ``y_j``, in place."""
        scale = weights * self._num_samples / self._weight / num_samples.sqrt()
        rows *= scale.to(rows)[:, None]
        return scale

    def estimate(self) -> NoiseScaleEstimate:
        """Errors are unknown of fewer than four groups; the noise along the gradient, before ``add_again``.

        Raises:
            ValueError: fewer than two groups.
        """
        k, n = self.num_groups, self._num_samples
        if k < 2:
            raise ValueError(
                f"the noise scale needs at least 2 groups of samples, got {k}: one gradient does not tell its noise. Use a "
                "smaller micro_batch_size, or more samples."
            )
        lengths, left_out = torch.cat(self._lengths), torch.cat(self._left_out)
        variance = float(lengths.sum()) / (k - 1)
        norm = self._norm - variance / n
        if k < 4:
            return NoiseScaleEstimate(norm, variance, None, None, None, 1, 1.0, k - 1, note=f"{k} groups tell no error")
        # Cauchy and Schwarz tell the least; a few groups in many dimensions may tell less
        squared = max(self._squared_covariance(variance), variance**2 / len(self._mean))
        spread = torch.cov(torch.stack([lengths, left_out])).tolist()
        # k groups' deviations from their own mean against independent ones: exact for normal gradients and equal sizes
        projected = spread[1][1] * ((k - 1) / (k - 2)) ** 2 - squared * k / (n * (k - 2))
        of_variance = spread[0][0] * k / ((k - 1) * (k - 2))
        # an estimate of GᵀΣG may be negative, which must not make the error small
        of_norm = 4 * max(projected, 0.0) / n + 2 * squared * k / ((k - 1) * n**2)
        covariance = 2 * spread[0][1] / math.sqrt(n * k) + 2 * squared / (k * n)
        found = NoiseScaleEstimate(norm, variance, math.sqrt(of_norm), math.sqrt(of_variance), covariance, 1, 1.0, k - 1)
        return self._with_inner_product(found, projected, squared) if self._across and found.is_clear else found

    def _squared_covariance(self, variance: float) -> float:
        """``tr Σ²``: the mean square of products of deviations, less what their common mean puts into it."""
        k = self.num_groups
        mean = float(torch.stack(self._squared).sum()) / self._num_pairs
        return (mean - (variance / k) ** 2) / ((1 - 1 / k) ** 2 + 1 / k**2 - 2 / ((k - 1) * k**2))

    def _with_inner_product(self, found: NoiseScaleEstimate, projected: float, squared: float) -> NoiseScaleEstimate:
        """``GᵀΣG / |G|⁴`` with its error to first order in each sample, in the two places where ``g`` enters, too.

        Unknown where most of what was found along ``g`` is the noise of ``g`` itself.
        """
        k, n, norm = self.num_groups, self._num_samples, found.gradient_norm_squared
        if projected < squared / n:
            return replace(found, note="the noise along the gradient is hidden by that of the mean gradient")
        sizes, along, across = (torch.cat(parts) for parts in (self._sizes, self._along, self._across))
        slope = 2 * projected / norm**3
        influence = (along.square() / k + 2 * across / n) / norm**2 - slope * 2 * sizes.sqrt() * along / n
        square = k * float(influence.var()) + slope**2 * 2 * squared * k / ((k - 1) * n**2)
        return replace(found, inner_product_noise=projected / norm**2, inner_product_error=math.sqrt(square))


def _summed(tensor: Tensor, ranks: Ranks) -> Tensor:
    with ranks.sharing("sums of deviations") as shared:
        shared.vector = tensor
    assert shared.vector is not None
    return shared.vector


def _squares(rows: Tensor) -> Tensor:
    """``|row|²`` of each, in float64."""
    parts = torch.split(rows, _COLUMNS, dim=1)
    return torch.stack([part.square().sum(dim=1, dtype=torch.float64) for part in parts]).sum(dim=0)
