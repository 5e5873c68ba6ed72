"""The gradient noise scale from squared norms of gradients: what batch size makes noise and signal equal.

With ``G`` the mean gradient and ``Σ`` the covariance of the gradients of single samples, a batch of ``B`` samples has
the gradient ``G`` plus noise of covariance ``Σ/B``. The noise scale is ``S / |G|²`` with ``S = tr Σ``, in samples: the
batch size whose noise is as long as its signal. Source: McCandlish et al. (2018), arXiv 1812.06162.

Groups ``j = 1..k`` of ``n_j`` samples (micro-batches, the shares of ranks, single samples) with mean gradients ``g_j``,
whose mean over all ``N = Σ n_j`` samples is ``g = Σ n_j g_j / N``, tell both without bias, whatever their sizes::

    S    = (Σ n_j |g_j|² − N |g|²) / (k − 1)
    |G|² = |g|² − S / N

since ``E |g_j|² = |G|² + S/n_j`` and ``E |g|² = |G|² + S/N``, so that ``E (Σ n_j |g_j|² − N |g|²) = k S − S``. With equal
sizes ``b`` these are the usual ``(N|g|² − b mean|g_j|²)/(N − b)`` and ``(mean|g_j|² − |g|²)/(1/b − 1/N)``. ``S`` is the sum
of squares within a linear model, hence for normal gradients the best of all such estimates, and independent of ``|g|²``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor, nn

from . import distributed, reductions
from .schedules.core import Signal

__all__ = [
    "SIGNALS",
    "NoiseMoments",
    "NoiseScaleAverage",
    "NoiseScaleEstimate",
    "NoiseScaleMeter",
    "moments_from_norms",
]

SIGNALS = ("gradient_noise_scale", "gradient_variance", "gradient_norm_squared", "inner_product_noise")

_FEW_STEPS = 10  # below, a standard error is itself uncertain by a quarter and more
_CLEARLY = 2.0  # standard errors that |G|² must lie above 0; the interval of the ratio is bounded just there
_SAME_WEIGHT = 1e-5
_SCHEMA = 1


@dataclass(frozen=True)
class NoiseMoments:
    """What the groups of one optimizer step tell, each number without bias.

    Attributes:
        gradient_norm_squared: ``|G|²``, in squared loss per weight; negative where noise hides it.
        gradient_variance: ``S = tr Σ``, of single samples.
        num_samples, num_groups: ``N`` and ``k``.
        projected_variance: ``GᵀΣG``; None where the groups do not tell.
        covariance_norm_squared: ``tr Σ²``; likewise.
    """

    gradient_norm_squared: float
    gradient_variance: float
    num_samples: float
    num_groups: int
    projected_variance: float | None = None
    covariance_norm_squared: float | None = None

    def errors(self) -> tuple[float, float, float] | None:
        """Variances of ``|G|²`` and ``S`` and their covariance if the groups' gradients are normal; None where unknown.

        ``Var S = 2 tr Σ²/(k − 1)``, ``Var |G|² = 4 GᵀΣG/N + 2 tr Σ² k/((k − 1) N²)``, ``Cov = −Var S / N``.
        """
        v, t, k, n = self.projected_variance, self.covariance_norm_squared, self.num_groups, self.num_samples
        if v is None or t is None:
            return None
        of_norm, of_variance = 4 * v / n + 2 * t * k / ((k - 1) * n**2), 2 * t / (k - 1)
        return (of_norm, of_variance, -of_variance / n) if of_norm > 0 and of_variance > 0 else None


def moments_from_norms(
    num_samples: Sequence[float],
    squared_norms: Sequence[float],
    mean_squared_norm: float,
    prefix_products: Sequence[float] | None = None,
) -> NoiseMoments:
    """The moments from groups of any sizes; see the module for the formulas.

    A rounding error ``ε`` of the norms becomes one of ``ε (1 + N |G|²/S)`` in ``S``: 1e-5 for float32 norms of groups whose
    batch is a hundred times the noise scale.

    Args:
        num_samples: ``n_j``, positive.
        squared_norms: ``|g_j|²`` of the groups' mean gradients.
        mean_squared_norm: ``|g|²`` of their sample-weighted mean.
        prefix_products: ``g_j · Σ_{i<j} n_i g_i``, 0 for the first; four groups or more then also tell ``GᵀΣG`` and
            ``tr Σ²``.
    Raises:
        ValueError: fewer than two groups; sizes that are not positive; norms that are negative or not finite.
    """
    n, squares = np.asarray(num_samples, dtype=float), np.asarray(squared_norms, dtype=float)
    if len(n) < 2:
        raise ValueError(
            f"the noise scale needs at least 2 groups of samples, got {len(n)}: one gradient does not tell its noise. Split "
            "the batch into micro-batches, or use single samples."
        )
    if n.shape != squares.shape:
        raise ValueError(f"got {len(n)} group sizes and {len(squares)} squared norms")
    if not (np.isfinite(n).all() and (n > 0).all()):
        raise ValueError(f"groups must hold a positive number of samples, got {n.tolist()}")
    if not (np.isfinite([*squares, mean_squared_norm]).all() and min(squares.min(), mean_squared_norm) >= 0):
        raise ValueError(f"squared norms must be finite and not negative, got {squares.tolist()} and {mean_squared_norm}")
    more = (None, None) if prefix_products is None else _along_and_across(n, np.asarray(prefix_products, dtype=float))
    return _moments(float(n @ squares), float(n.sum()), len(n), mean_squared_norm, *more)


def _moments(
    weighted: float, total: float, k: int, mean_square: float, along: float | None, across: float | None
) -> NoiseMoments:
    variance = (weighted - total * mean_square) / (k - 1)
    return NoiseMoments(mean_square - variance / total, variance, total, k, along, across)


def _along_and_across(n: np.ndarray, products: np.ndarray) -> tuple[float | None, float | None]:
    """``GᵀΣG`` and ``tr Σ²`` from ``c_j = g_j · Σ_{i<j} n_i g_i``, unbiased for gradients of any distribution.

    With ``A_j = Σ_{i<j} n_i``, ``E c_j = A_j |G|²``, and for ``a < b``::

        E c_a c_b = A_a A_b |G|⁴ + 2 A_a GᵀΣG
        E c_a²    = A_a² |G|⁴ + (A_a + A_a²/n_a) GᵀΣG + (A_a/n_a) tr Σ²

    In units of ``√(A_j/n_j)`` the last part is the identity: of pure noise the ``c_j`` are uncorrelated. The direction of
    ``A`` is projected out, and with it the signal; the two unknowns are what least squares finds in the products of the
    rest. Fewer than four groups leave one equation for them. Cost: a few matrices of ``k²`` numbers.
    """
    if len(n) < 4:
        return None, None
    before, size = np.cumsum(n)[:-1], n[1:]  # A_j and n_j of the groups from the second on
    unit = np.sqrt(before / size)
    curve = 2 * np.minimum.outer(before, before) / np.outer(unit, unit)
    np.fill_diagonal(curve, size + before)
    signal = before / unit
    rest = np.eye(len(unit)) - np.outer(signal, signal) / (signal @ signal)
    z, curve = rest @ (products[1:] / unit), rest @ curve @ rest
    system = np.array([[(curve**2).sum(), curve.trace()], [curve.trace(), len(n) - 2]])
    along, across = np.linalg.solve(system, [z @ curve @ z, z @ z])
    return float(along), float(across)


@dataclass(frozen=True)
class NoiseScaleEstimate:
    """The noise scale, and how sure it is.

    Attributes:
        gradient_norm_squared, gradient_variance: ``|G|²`` and ``S``; never clamped, so ``|G|²`` may be negative.
        gradient_norm_squared_error, gradient_variance_error: their standard errors; None where one step tells none.
        covariance: of the two.
        num_steps: averaged over. Of one measurement on a data set, 1.
        effective_steps: as many steps of equal weight are as sure.
        degrees: of freedom of the standard errors; few of them widen what counts as clear, as Student's distribution does.
        inner_product_noise: ``GᵀΣG / |G|⁴``, in samples: the batch size at which the noise along the gradient is as long as
            the gradient; None where it is unknown.
        inner_product_error: its standard error.
        note: what a reader of the numbers must know.
    """

    gradient_norm_squared: float
    gradient_variance: float
    gradient_norm_squared_error: float | None
    gradient_variance_error: float | None
    covariance: float | None
    num_steps: int
    effective_steps: float
    degrees: float
    inner_product_noise: float | None = None
    inner_product_error: float | None = None
    note: str = ""

    @property
    def is_clear(self) -> bool:
        """Whether ``|G|²`` lies two standard errors above 0 (Student's, for few steps); else the noise scale is unknown."""
        error = self.gradient_norm_squared_error
        return error is not None and self.gradient_norm_squared > _reach(_CLEARLY, self.degrees) * error

    @property
    def noise_scale(self) -> float | None:
        """``S / |G|²`` in samples: a ratio of averages; None where ``|G|²`` is not clearly positive."""
        return self.gradient_variance / self.gradient_norm_squared if self.is_clear else None

    @property
    def standard_error(self) -> float | None:
        """Of the noise scale, to first order."""
        scale = self.noise_scale
        if scale is None:
            return None
        vg, vs, c = self._variances()
        return math.sqrt(max(vs - 2 * scale * c + scale**2 * vg, 0.0)) / self.gradient_norm_squared

    def interval(self, num_standard_errors: float = 2.0) -> tuple[float, float] | None:
        """Fieller's interval of the noise scale, lopsided as it is; None where it has no end.

        All ``r`` for which ``S − r |G|²`` lies within so many (Student's) standard errors of 0.
        """
        if self.gradient_norm_squared_error is None:
            return None
        (vg, vs, c), z2 = self._variances(), _reach(num_standard_errors, self.degrees) ** 2
        g, s = self.gradient_norm_squared, self.gradient_variance
        denominator, half = g * g - z2 * vg, s * g - z2 * c
        if denominator <= 0 or g <= 0:
            return None
        root = math.sqrt(max(half**2 - denominator * (s * s - z2 * vs), 0.0))
        return (half - root) / denominator, (half + root) / denominator

    def at_least(self, num_standard_errors: float = 2.0) -> float | None:
        """What ``S / |G|²`` does not lie below, also where it is unknown; None where the errors are.

        A negative estimate of ``|G|²`` counts as 0 here, which makes the bound lower.
        """
        if self.gradient_norm_squared_error is None:
            return None
        most = max(self.gradient_norm_squared, 0.0)
        most += _reach(num_standard_errors, self.degrees) * self.gradient_norm_squared_error
        return self.gradient_variance / most if most > 0 else None

    def signal(self, name: str, step: int, samples: int) -> Signal:
        """One of ``SIGNALS``, for a batch-size schedule; its value is None, and its note says why, where it is unknown.

        Raises:
            ValueError: no such signal.
        """
        if name not in SIGNALS:
            raise ValueError(f"no signal {name!r} comes from the noise scale, only {', '.join(SIGNALS)}")
        value, error, note = {
            "gradient_noise_scale": (self.noise_scale, self.standard_error, ""),
            "gradient_variance": (self.gradient_variance, self.gradient_variance_error, ""),
            "gradient_norm_squared": (self.gradient_norm_squared, self.gradient_norm_squared_error, ""),
            "inner_product_noise": (
                self.inner_product_noise,
                self.inner_product_error,
                "" if not self.is_clear else "too few steps with 4 or more groups, which tell the noise along the gradient",
            ),
        }[name]
        if value is not None:
            return Signal(value, error, step, samples, self.note)
        return Signal(None, None, step, samples, self.why_unknown() or note)

    def why_unknown(self) -> str:
        """The sentence; empty where the noise scale is known."""
        if self.is_clear:
            return ""
        if self.gradient_norm_squared_error is None:
            few = self.note or "one step does not tell how sure it is"
            return f"{few}: |G|² = {self.gradient_norm_squared:.3g}"
        least = self.at_least()
        return (
            f"|G|² = {self.gradient_norm_squared:.3g} ± {self.gradient_norm_squared_error:.2g} is not clearly positive"
            + (f", the noise scale at least {least:.3g}" if least is not None else "")
            + (f"; {self.note}" if self.note else "")
        )

    def _variances(self) -> tuple[float, float, float]:
        vg, vs = (self.gradient_norm_squared_error or 0.0) ** 2, (self.gradient_variance_error or 0.0) ** 2
        return vg, vs, self.covariance or 0.0


def _reach(num_standard_errors: float, degrees: float) -> float:
    """Student's counterpart of so many standard errors: 2 of a normal one are 14 at one degree of freedom, 2.3 at ten."""
    if math.isinf(degrees):
        return num_standard_errors
    return float(stdtrit(degrees, ndtr(num_standard_errors)))


class _Window:
    """Weighted mean of pairs, and the covariance of that mean from their spread, steps of unequal precision included.

    The newest step has weight 1, the one before it ``decay``, and so on; dividing by the sum of the weights removes the bias
    of the start exactly. With weights ``w_t`` the mean has the covariance ``Σ w_t² Cov(x_t) / (Σ w_t)²``, here with
    ``(x_t − mean)(x_t − mean)ᵀ`` for ``Cov(x_t)`` and the exact correction for equal covariances.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.powers = np.zeros(3)  # Σ w, Σ w², Σ w³
        self.mean, self.mean_of_squares, self.spread = np.zeros(2), np.zeros(2), np.zeros((2, 2))

    def add(self, first: float, second: float) -> None:
        x = np.array([first, second])
        self.count += 1
        self.powers = self.powers * self.decay ** np.arange(1, 4) + 1
        self.mean = self.mean + (x - self.mean) / self.powers[0]
        before = x - self.mean_of_squares  # the mean with weights w², around which the sums lose no digits
        self.mean_of_squares = self.mean_of_squares + before / self.powers[1]
        self.spread = self.spread * self.decay**2 + np.outer(before, x - self.mean_of_squares)

    @property
    def effective(self) -> float:
        return float(self.powers[0] ** 2 / self.powers[1]) if self.count else 0.0

    def covariance(self) -> np.ndarray | None:
        if self.count < 2:
            return None
        w, w2, w3 = self.powers
        shift = self.mean_of_squares - self.mean
        around_mean = self.spread + w2 * np.outer(shift, shift)
        found: np.ndarray = around_mean / w**2 / (1 - 2 * w3 / (w * w2) + w2 / w**2)
        return found

    def state(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name).tolist() for name in ("powers", "mean", "mean_of_squares", "spread")}
        return {"count": self.count, **arrays}

    def load(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])
        for name in ("powers", "mean", "mean_of_squares", "spread"):
            setattr(self, name, np.array(state[name], dtype=float).reshape(getattr(self, name).shape))


class NoiseScaleAverage:
    """Averages ``S`` and ``|G|²`` over steps, each by itself: a mean of ratios is wrong (measured .02 to .93 of the truth).

    Standard errors come from the spread between steps, so they hold for gradients of any distribution; while training moves
    ``|G|²`` they also contain that movement, and are too large rather than too small. Of a single step they come from
    ``NoiseMoments.errors``.

    Args:
        decay: weight of a step against the next; .99 looks back over about 200 steps of equal weight. 1 for a plain mean.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {decay!r}; 1 is a plain mean over all steps")
        self.decay = decay
        self._all, self._along = _Window(decay), _Window(decay)
        self._only: NoiseMoments | None = None

    @property
    def num_steps(self) -> int:
        return self._all.count

    def add(self, moments: NoiseMoments) -> None:
        self._only = moments if self._all.count == 0 else None
        self._all.add(moments.gradient_norm_squared, moments.gradient_variance)
        if moments.projected_variance is not None:
            self._along.add(moments.gradient_norm_squared, moments.projected_variance)

    def estimate(self) -> NoiseScaleEstimate:
        """
        Raises:
            ValueError: no step yet.
        """
        if not self._all.count:
            raise ValueError("no step has been measured yet")
        norm, variance = (float(x) for x in self._all.mean)
        effective = self._all.effective
        covariance, degrees, note = self._all.covariance(), effective - 1, ""
        if self._only is not None:
            errors = self._only.errors()
            if errors is not None:
                covariance = np.array([[errors[0], errors[2]], [errors[2], errors[1]]])
                degrees, note = self._only.num_groups - 1, "errors of one step, as of normal gradients"
        elif effective < _FEW_STEPS:
            note = f"errors from the spread of {effective:.3g} effective steps only"
        of_norm = of_variance = between = None
        if covariance is not None:
            of_norm, of_variance = (math.sqrt(max(float(covariance[i, i]), 0.0)) for i in range(2))
            between = float(covariance[0, 1])
        along, its_error = self._inner_product()
        return NoiseScaleEstimate(
            norm, variance, of_norm, of_variance, between, self._all.count, effective, degrees, along, its_error, note
        )

    def _inner_product(self) -> tuple[float | None, float | None]:
        """``GᵀΣG / |G|⁴`` and its first-order error; None where its ``|G|²`` is not clearly positive."""
        covariance = self._along.covariance()
        if covariance is None:
            return None, None
        norm, along = (float(x) for x in self._along.mean)
        if not norm > _reach(_CLEARLY, self._along.effective - 1) * math.sqrt(max(float(covariance[0, 0]), 0.0)):
            return None, None
        slope = np.array([-2 * along / norm, 1.0]) / norm**2
        return along / norm**2, math.sqrt(max(float(slope @ covariance @ slope), 0.0))

    def signal(self, name: str, step: int, samples: int) -> Signal:
        """See ``NoiseScaleEstimate.signal``; unknown before the first step."""
        if not self._all.count:
            if name not in SIGNALS:
                raise ValueError(f"no signal {name!r} comes from the noise scale, only {', '.join(SIGNALS)}")
            return Signal(None, None, step, samples, "no step has been measured yet")
        return self.estimate().signal(name, step, samples)

    def state_dict(self) -> dict[str, Any]:
        """JSON, below 1 kB."""
        return {
            "schema": _SCHEMA,
            "decay": self.decay,
            "all": self._all.state(),
            "along": self._along.state(),
            "only": None if self._only is None else asdict(self._only),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: of another version.
        """
        if state.get("schema") != _SCHEMA:
            raise ValueError(
                f"this state of a noise scale has schema {state.get('schema')!r}, and this version reads {_SCHEMA}"
            )
        self.decay = float(state["decay"])
        self._all, self._along = _Window(self.decay), _Window(self.decay)
        self._all.load(state["all"])
        self._along.load(state["along"])
        self._only = None if state["only"] is None else NoiseMoments(**state["only"])


class NoiseScaleMeter:
    """The noise scale of a training run, from the gradients that it computes anyway::

        meter = NoiseScaleMeter(model.parameters())
        for inputs, targets in micro_batches:
            with meter.micro_batch(len(inputs)):
                (criterion(model(inputs), targets) * len(inputs) / batch_size).backward()
        meter.step()
        optimizer.step()

    While a micro-batch is open, hooks see every gradient just before it is added to ``.grad``, whose content then is that
    of the micro-batches before. That gives ``|g_j|²`` and ``g_j · Σ_{i<j} n_i g_i``, hence also ``|g|²`` and the noise along
    the gradient, and takes no vector at all (half-precision gradients: a float32 copy of one parameter's at a time): two
    reads of the gradient and one of ``.grad``, and one transfer to the host a step.

    ``.grad`` must be zero or None at the first micro-batch of a step, and the losses of micro-batches weighted by samples:
    ``.grad`` adds up ``f n_j ∇loss_j`` with one factor ``f``. Gradients of other purposes (the first of SAM's two, say)
    belong outside of the block. Not for sharded parameters (FSDP), whose ``.grad`` is a part.

    Args:
        parameters: those that are trained.
        average: of the steps; None for an exponential one with decay .99.
        sum_over_ranks: a tensor summed over all ranks, of data-parallel training; every rank calls ``step``. The groups are
            the micro-batches of all ranks then, seen before they are reduced, and ``step`` reads ``.grad`` afterwards. Where
            ranks have unequal shares, the weights are ``world_size n_j / n``, so that the mean over ranks is over samples.
    Attributes:
        num_skipped: steps left out because a gradient was not finite, as a ``GradScaler`` leaves them out.
        num_single: steps left out because they had one group only.
    Raises:
        ValueError: no parameter that is trained, or one of which every rank holds a part.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        average: NoiseScaleAverage | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._parameters = list({id(p): p for p in parameters if p.requires_grad}.values())
        if not self._parameters:
            raise ValueError("there is no parameter that requires a gradient, so there is no gradient noise to measure")
        if any(distributed.is_spread(parameter) for parameter in self._parameters):
            raise ValueError(
                "the gradients of single micro-batches tell their noise, and of parameters that are sharded over the ranks "
                "(FSDP) there is only a part of the mean. Leave it out, or train with DistributedDataParallel"
            )
        self.average = NoiseScaleAverage() if average is None else average
        self._sum_over_ranks = sum_over_ranks
        self.num_skipped = self.num_single = 0
        self._groups: list[tuple[float, float | None, Tensor]] = []

    @contextlib.contextmanager
    def micro_batch(self, num_samples: float, *, weight: float | None = None) -> Iterator[None]:
        """The backward pass of one micro-batch belongs inside, and nothing else; several (of one loss in parts) may.

        Args:
            num_samples: ``n_j``.
            weight: by what the mean loss over them was multiplied before ``backward``, a ``GradScaler``'s scale included;
                None for ``n_j`` divided by the samples of the step on this rank.
        Raises:
            ValueError: not a positive number.
        """
        for what, number in (("num_samples", num_samples), ("weight", 1.0 if weight is None else weight)):
            if not 0 < number < math.inf:
                raise ValueError(f"{what} of a micro-batch must be a positive number, got {number!r}")
        squares: list[Tensor] = []
        products: list[Tensor] = []
        hooks = [p.register_hook(_hook(p, squares, products)) for p in self._parameters]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        zero = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        sums = [torch.stack([zero, *(part.to(zero.device) for part in parts)]).sum() for parts in (squares, products)]
        self._groups.append((float(num_samples), weight, torch.stack(sums)))

    def step(self, *, grad_scale: float = 1.0) -> NoiseMoments | None:
        """Close the step: after its last ``backward``, before clipping, ``optimizer.step()`` and ``zero_grad()``.

        Args:
            grad_scale: by what ``.grad`` is now larger than the sample-weighted mean gradient: a ``GradScaler``'s scale,
                before ``unscale_``. Asked only of several ranks.
        Returns:
            What the step told, which is in ``average`` now; None where it was left out.
        Raises:
            ValueError: no micro-batch in this step; weights that are not proportional to the samples.
        """
        groups, self._groups = self._groups, []
        if not groups:
            raise ValueError("step() closes the micro-batches of one optimizer step, and there was none since the last")
        n = np.array([size for size, _, _ in groups])
        weights = np.array([size / n.sum() if weight is None else weight for size, weight, _ in groups])
        factors = weights / n
        if float(np.ptp(factors)) > _SAME_WEIGHT * float(factors[0]):
            raise ValueError(
                "the weights of the micro-batches of a step must be proportional to their samples, or the sum of their "
                f"gradients is not the mean over samples; got {weights.tolist()} for {n.tolist()} samples"
            )
        sums = torch.stack([sums for _, _, sums in groups]).cpu().numpy()
        squares, products = sums[:, 0], sums[:, 1]
        with np.errstate(all="ignore"):  # what is not finite is asked below
            along, across = _along_and_across(n, products / (weights * factors[0]))
            mean_square = (squares + 2 * products).sum() / (factors[0] * n.sum()) ** 2
            told = np.array([(n * squares / weights**2).sum(), n.sum(), len(n)])
            own = (0.0, 0.0, 0.0) if along is None or across is None else (1.0, along, across)
            if self._sum_over_ranks is not None:
                told, own, mean_square = self._over_ranks(told, own, grad_scale)
        weighted, total, k = (float(x) for x in told)
        if not math.isfinite(weighted + mean_square):
            self.num_skipped += 1
            return None
        if k < 2:
            self.num_single += 1
            return None
        known = own[0] > 0 and math.isfinite(own[1] + own[2])
        more = (own[1] / own[0], own[2] / own[0]) if known else (None, None)
        moments = _moments(weighted, total, int(k), float(mean_square), *more)
        self.average.add(moments)
        return moments

    def _over_ranks(
        self, told: np.ndarray, own: tuple[float, float, float], grad_scale: float
    ) -> tuple[np.ndarray, tuple[float, float, float], float]:
        assert self._sum_over_ranks is not None  # asked before
        device = self._parameters[0].device
        summed = self._sum_over_ranks(torch.tensor([*told, *own], dtype=torch.float64, device=device)).cpu().numpy()
        parts = [_square(p.grad).to(device) for p in self._parameters if p.grad is not None]
        mean_square = float(torch.stack(parts).sum()) / grad_scale**2 if parts else 0.0
        return summed[:3], (float(summed[3]), float(summed[4]), float(summed[5])), mean_square

    def discard(self) -> None:
        """Forget the micro-batches since the last ``step``, of a step that was given up."""
        self._groups = []

    def estimate(self) -> NoiseScaleEstimate:
        """See ``NoiseScaleAverage.estimate``."""
        return self.average.estimate()

    def signal(self, name: str, step: int, samples: int) -> Signal:
        """One of ``SIGNALS``; see ``NoiseScaleEstimate.signal``."""
        found = self.average.signal(name, step, samples)
        if self.average.num_steps or not self.num_single:
            return found
        return Signal(None, None, step, samples, "every step had one micro-batch only, and two or more tell the noise")

    def state_dict(self) -> dict[str, Any]:
        """JSON; between steps."""
        return {"average": self.average.state_dict(), "num_skipped": self.num_skipped, "num_single": self.num_single}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average.load_state_dict(state["average"])
        self.num_skipped, self.num_single = int(state["num_skipped"]), int(state["num_single"])
        self._groups = []


def _hook(parameter: nn.Parameter, squares: list[Tensor], products: list[Tensor]) -> Callable[[Tensor], None]:
    def see(gradient: Tensor) -> None:
        with torch.no_grad():
            vector = _flat(gradient)
            squares.append(_dot(vector, vector))
            if parameter.grad is not None:
                products.append(_dot(vector, _flat(parameter.grad)))

    return see


def _square(gradient: Tensor) -> Tensor:
    vector = _flat(gradient)
    return _dot(vector, vector)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """By short products, which unlike ``reductions.dot`` write nothing: 2.8 against 6.8 ms for 5e6 numbers."""
    return reductions.matvec(x[None], y)[0]


def _flat(gradient: Tensor) -> Tensor:
    """A vector in which squares neither overflow nor lose their digits."""
    dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    return dense.reshape(-1).to(torch.float64 if dense.dtype == torch.float64 else torch.float32)
