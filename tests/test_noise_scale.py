"""The gradient noise scale: unbiased from any groups, sure of its error, and unknown where it is."""

from __future__ import annotations

import copy
import itertools
import json
import math
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.special import ndtr, stdtrit
from torch import Tensor, nn

import oracles
from sharpness_plugins import PluginWarning, measure_sharpness, sampling
from sharpness_plugins.deviations import DeviationSums
from sharpness_plugins.metrics import GradientNoiseScale
from sharpness_plugins.noise_scale import (
    SIGNALS,
    NoiseMoments,
    NoiseScaleAverage,
    NoiseScaleEstimate,
    NoiseScaleMeter,
    moments_from_norms,
)
from sharpness_plugins.objective import Objective
from sharpness_plugins.report import Kind

F64 = torch.float64
RAGGED = (1, 5, 2, 7, 3)


def rng(seed: int = 0) -> torch.Generator:
    return sampling.generator_for(seed, "test")


def norms_of(gradients: Tensor, sizes: Any) -> tuple[list[float], list[float], float, list[float]]:
    """What groups' mean gradients ``(k, dim)`` tell ``moments_from_norms``."""
    n = torch.as_tensor(sizes, dtype=gradients.dtype)
    products = gradients @ gradients.T * n
    mean_square = (n @ products.sum(1)).item() / n.sum().item() ** 2
    return n.tolist(), gradients.square().sum(1).tolist(), mean_square, products.tril(-1).sum(1).tolist()


class Noisy:
    """``f_i = ½|x|² + ξ_i · x`` with ``ξ ~ N(0, Σ)`` at ``|x| = 1``: ``|G|² = 1``, and ``S`` is the noise scale."""

    def __init__(self, noise_scale: float, dim: int = 50, seed: int = 0) -> None:
        spectrum = torch.arange(1, dim + 1, dtype=F64) ** -0.5
        self.spectrum = noise_scale * spectrum / spectrum.sum()
        self.point = torch.full((dim,), dim**-0.5, dtype=F64)
        self.noise_scale, self.squared = noise_scale, self.spectrum.square().sum().item()
        self.projected = (self.point.square() * self.spectrum).sum().item()
        self.effective_dim = noise_scale**2 / self.squared
        self._generator = torch.Generator().manual_seed(seed)

    def gradients(self, *shape: int) -> Tensor:
        noise = torch.randn(*shape, len(self.point), dtype=F64, generator=self._generator)
        return self.point + self.spectrum.sqrt() * noise

    def steps(self, count: int, sizes: Any, *, along: bool = False) -> list[NoiseMoments]:
        n = torch.as_tensor(sizes, dtype=F64)
        noise = (self.gradients(count, len(n)) - self.point) / n.sqrt()[:, None]
        gradients = self.point + noise
        squares = gradients.square().sum(2).tolist()
        mean_squares = (torch.einsum("k,tkd->td", n, gradients) / n.sum()).square().sum(1).tolist()
        products = torch.einsum("tid,tjd->tij", gradients, gradients) * n
        before = products.tril(-1).sum(2).tolist() if along else [None] * count
        return [moments_from_norms(sizes, *one) for one in zip(squares, mean_squares, before, strict=True)]


def average_of(moments: list[NoiseMoments], decay: float = 1.0) -> NoiseScaleAverage:
    average = NoiseScaleAverage(decay)
    for one in moments:
        average.add(one)
    return average


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 1, 1), (2, 1), (1, 3, 1)])
def test_the_mean_over_every_outcome_is_the_truth(sizes):
    """Three points with unequal chances as gradients: all outcomes, so no tolerance for luck, and nothing is normal."""
    points = torch.tensor([[1.0, 0.5], [-2.0, 1.0], [0.3, -3.0]], dtype=F64)
    chances = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    mean = chances @ points
    covariance = (points - mean).T @ torch.diag(chances) @ (points - mean)
    found = torch.zeros(4, dtype=F64)
    for outcome in itertools.product(range(3), repeat=sum(sizes)):
        drawn = list(outcome)
        groups = torch.stack([part.mean(0) for part in points[drawn].split(list(sizes))])
        moments = moments_from_norms(*norms_of(groups, sizes))
        numbers = (moments.gradient_norm_squared, moments.gradient_variance)
        more = (moments.projected_variance or 0.0, moments.covariance_norm_squared or 0.0)
        found += chances[drawn].prod() * torch.tensor([*numbers, *more], dtype=F64)
        assert (moments.projected_variance is not None) == (len(sizes) >= 4)
    assert found[:2].tolist() == pytest.approx([(mean @ mean).item(), covariance.trace().item()], rel=1e-12)
    if len(sizes) >= 4:
        truth = [(mean @ covariance @ mean).item(), (covariance @ covariance).trace().item()]
        assert found[2:].tolist() == pytest.approx(truth, rel=1e-11)


def test_equal_sizes_give_the_usual_formulas():
    b, k = 8, 5
    gradients = Noisy(30.0).gradients(k)
    n, squares, square, _ = norms_of(gradients, [b] * k)
    moments = moments_from_norms(n, squares, square)
    total, mean = b * k, sum(squares) / k
    assert moments.gradient_norm_squared == pytest.approx((total * square - b * mean) / (total - b), rel=1e-12)
    assert moments.gradient_variance == pytest.approx((mean - square) / (1 / b - 1 / total), rel=1e-12)
    assert (moments.num_samples, moments.num_groups) == (total, k)


def test_the_error_of_one_step_is_that_of_normal_gradients():
    problem, b, k = Noisy(256.0), 8, 6
    total = b * k
    exact = NoiseMoments(1.0, 256.0, total, k, problem.projected, problem.squared)
    of_norm, of_variance, covariance = exact.errors()
    assert math.sqrt(of_variance) / 256 == pytest.approx(math.sqrt(2 / ((k - 1) * problem.effective_dim)), rel=1e-12)
    noise = (256 / b) ** 2 * 2 / (k * (k - 1) * problem.effective_dim)
    assert of_norm == pytest.approx(noise + 4 * problem.projected / total, rel=1e-12)
    steps = problem.steps(3000, [b] * k)
    spread = np.cov([[s.gradient_norm_squared for s in steps], [s.gradient_variance for s in steps]])
    assert spread == pytest.approx(np.array([[of_norm, covariance], [covariance, of_variance]]), rel=0.12)
    assert NoiseMoments(1.0, 1.0, 8, 2).errors() is None
    assert NoiseMoments(1.0, 1.0, 8, 4, -5.0, -1.0).errors() is None  # what luck may give is no variance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([8], [1.0], 1.0), "at least 2 groups of samples, got 1"),
        (([], [], 1.0), "at least 2 groups"),
        (([8, 0], [1.0, 1.0], 1.0), "positive number of samples"),
        (([8, math.inf], [1.0, 1.0], 1.0), "positive number of samples"),
        (([8, 8], [1.0], 1.0), "2 group sizes and 1 squared norms"),
        (([8, 8], [1.0, math.nan], 1.0), "finite and not negative"),
        (([8, 8], [1.0, 1.0], -1.0), "finite and not negative"),
    ],
)
def test_what_tells_no_noise_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        moments_from_norms(*arguments)


# ---------------------------------------------------------------- many steps


@pytest.mark.parametrize(
    ("noise_scale", "sizes", "num_steps", "decay"),
    [(16.0, (8,) * 8, 20, 1.0), (256.0, (64,) * 8, 20, 1.0), (16.0, (8, 8, 8, 3), 40, 1.0), (16.0, (8,) * 4, 60, 0.95)],
)
def test_estimates_lie_within_errors_that_are_the_spread(noise_scale, sizes, num_steps, decay):
    problem = Noisy(noise_scale)
    found, errors = [], []
    for _ in range(200):
        estimate = average_of(problem.steps(num_steps, sizes), decay).estimate()
        assert abs(estimate.noise_scale - noise_scale) < 4.5 * estimate.standard_error  # 800 in all
        found.append((estimate.gradient_norm_squared, estimate.gradient_variance, estimate.noise_scale))
        errors.append((estimate.gradient_norm_squared_error, estimate.gradient_variance_error, estimate.standard_error))
    spread = np.std(found, axis=0, ddof=1)
    assert np.mean(errors, axis=0) == pytest.approx(spread, rel=0.25)
    truth = np.array([1.0, noise_scale])
    assert (np.abs(np.mean(found, axis=0)[:2] - truth) < 4 * spread[:2] / math.sqrt(200)).all()


def test_noise_along_the_gradient_lies_within_its_error():
    problem = Noisy(16.0)
    found, errors = [], []
    for _ in range(60):
        estimate = average_of(problem.steps(30, (8,) * 8, along=True)).estimate()
        assert abs(estimate.inner_product_noise - problem.projected) < 4.5 * estimate.inner_product_error
        found.append(estimate.inner_product_noise)
        errors.append(estimate.inner_product_error)
    assert np.mean(errors) == pytest.approx(np.std(found, ddof=1), rel=0.25)
    assert abs(np.mean(found) - problem.projected) < 4 * np.std(found) / 7


def test_isotropic_noise_along_the_gradient_is_a_dim_th_of_the_noise_scale():
    """``GᵀΣG/|G|⁴ = s²/|G|²`` against ``S/|G|² = d s²/|G|²``, without a single random number: the true moments."""
    dim, variance, norm = 7, 3.0, 0.5
    moments = NoiseMoments(norm, dim * variance, 64, 8, variance * norm, dim * variance**2)
    estimate = average_of([moments] * 20).estimate()
    assert estimate.noise_scale == pytest.approx(dim * variance / norm)
    assert estimate.inner_product_noise == pytest.approx(estimate.noise_scale / dim)
    assert estimate.standard_error == pytest.approx(0, abs=1e-6)


def test_hidden_signal_is_unknown_and_never_clamped():
    problem, unknown, negative = Noisy(512.0), 0, 0
    for _ in range(50):
        estimate = average_of(problem.steps(20, (8, 8))).estimate()  # measured: |G|² to 122 %
        signal = estimate.signal("gradient_noise_scale", 3, 48)
        assert (estimate.noise_scale is None) == (estimate.interval() is None) == (signal.value is None)
        assert estimate.at_least(4.0) < 512
        assert estimate.signal("gradient_variance", 3, 48).value == pytest.approx(512, rel=0.3)
        if signal.value is None:
            unknown += 1
            assert "not clearly positive" in signal.note
            assert signal.standard_error is None
        negative += estimate.gradient_norm_squared < 0
        assert estimate.signal("gradient_norm_squared", 3, 48).value == estimate.gradient_norm_squared
    assert unknown >= 40
    assert negative >= 1


@pytest.mark.parametrize("decay", [1.0, 0.99, 0.5])
def test_the_window_is_the_weighted_mean_with_its_sandwich_error(decay):
    """Against the sums written out; the steps get noisier, so that a plain spread would be wrong."""
    draws = torch.randn(30, 2, dtype=F64, generator=torch.Generator().manual_seed(1)).numpy()
    x = 1e6 + draws * np.linspace(1, 5, 30)[:, None]  # far from 0: sums of squares would lose nine digits
    average = average_of([NoiseMoments(a, b, 8, 2) for a, b in x], decay)
    w = decay ** np.arange(29, -1, -1.0)
    mean = w @ x / w.sum()
    deviations = w[:, None] * (x - mean)
    shrunk = 1 - 2 * (w**3).sum() / (w.sum() * (w**2).sum()) + (w**2).sum() / w.sum() ** 2
    covariance = deviations.T @ deviations / w.sum() ** 2 / shrunk
    estimate = average.estimate()
    assert (estimate.gradient_norm_squared, estimate.gradient_variance) == pytest.approx(tuple(mean), rel=1e-13)
    assert estimate.gradient_norm_squared_error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-6)
    assert estimate.gradient_variance_error == pytest.approx(math.sqrt(covariance[1, 1]), rel=1e-6)
    assert estimate.covariance == pytest.approx(covariance[0, 1], rel=1e-5)
    assert (estimate.num_steps, estimate.effective_steps) == (30, pytest.approx(w.sum() ** 2 / (w**2).sum()))
    assert ("effective steps only" in estimate.note) == (decay == 0.5)


def test_few_steps_are_judged_by_students_distribution():
    steps = [NoiseMoments(1.0 + e, 16.0, 64, 8) for e in (-0.2, 0.2)]
    assert average_of(steps).estimate().noise_scale is None  # 1 ± 0.2 with one degree of freedom is not clear
    assert average_of(steps * 10).estimate().noise_scale == pytest.approx(16)


def test_one_step_has_the_error_of_normal_gradients_or_none():
    problem = Noisy(16.0)
    exact = NoiseMoments(1.0, 16.0, 512, 64, problem.projected, problem.squared)
    estimate = average_of([exact]).estimate()
    assert estimate.noise_scale == pytest.approx(16)
    assert estimate.gradient_variance_error == pytest.approx(math.sqrt(exact.errors()[1]))
    assert "one step" in estimate.signal("gradient_noise_scale", 0, 0).note
    alone = average_of([NoiseMoments(1.0, 16.0, 64, 8)]).estimate()
    assert (alone.noise_scale, alone.standard_error, alone.interval(), alone.at_least()) == (None, None, None, None)
    assert "does not tell how sure" in alone.signal("gradient_noise_scale", 0, 0).note
    assert alone.signal("inner_product_noise", 0, 0).value is None


def test_fiellers_interval_ends_where_the_difference_is_as_long_as_its_error():
    estimate = NoiseScaleEstimate(1.0, 20.0, 0.2, 1.5, -0.1, 100, 100.0, math.inf)
    for r in estimate.interval(2.0):
        variance = 1.5**2 - 2 * r * -0.1 + r**2 * 0.2**2
        assert (20.0 - r) ** 2 == pytest.approx(4 * variance)
    low, high = estimate.interval(2.0)
    assert high - 20 > 20 - low > 0  # lopsided
    narrow = NoiseScaleEstimate(1.0, 20.0, 0.002, 0.015, -1e-5, 100, 100.0, math.inf)
    low, high = narrow.interval(2.0)
    assert (low, high) == pytest.approx((20 - 2 * narrow.standard_error, 20 + 2 * narrow.standard_error), rel=1e-3)
    assert estimate.interval(5.1) is None


def test_state_is_json_and_comes_back_exactly():
    steps = Noisy(16.0).steps(12, (8,) * 4, along=True)
    for at in (0, 1, 2, 7):
        half = average_of(steps[:at], 0.9)
        text = json.dumps(half.state_dict(), allow_nan=False)
        assert len(text) < 2000
        again = NoiseScaleAverage(0.5)
        again.load_state_dict(json.loads(text))
        assert again.signal("gradient_variance", 0, 0) == half.signal("gradient_variance", 0, 0)
        for one in steps[at:]:
            again.add(one)
        assert again.estimate() == average_of(steps, 0.9).estimate()
    with pytest.raises(ValueError, match="schema 9"):
        again.load_state_dict({"schema": 9})


def test_signals_have_names_and_nothing_is_unknown_without_a_reason():
    average = NoiseScaleAverage()
    assert all(average.signal(name, 0, 0).note == "no step has been measured yet" for name in SIGNALS)
    average = average_of(Noisy(16.0).steps(60, (8,) * 8, along=True))
    for name in SIGNALS:
        signal = average.signal(name, 30, 1920)
        assert signal.value is not None
        assert signal.standard_error > 0
        assert (signal.step, signal.samples) == (30, 1920)
    pairs = average_of(Noisy(16.0).steps(200, (32, 32)))
    assert "4 or more" in pairs.signal("inner_product_noise", 0, 0).note
    for wrong in (average, NoiseScaleAverage()):
        with pytest.raises(ValueError, match="no signal 'noise'"):
            wrong.signal("noise", 0, 0)
    with pytest.raises(ValueError, match="no step has been measured"):
        NoiseScaleAverage().estimate()
    with pytest.raises(ValueError, match="decay must lie in"):
        NoiseScaleAverage(1.5)


# ---------------------------------------------------------------- during training


def regression(seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A linear model with squared error: sample ``i`` has the gradient ``(xᵢ·w + b − yᵢ) (xᵢ, 1)``."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(sum(RAGGED), 4, dtype=F64, generator=generator)
    targets = torch.randn(sum(RAGGED), 1, dtype=F64, generator=generator)
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, dtype=F64, generator=generator))
        each = (model(inputs) - targets) * torch.cat([inputs, torch.ones_like(targets)], 1)
    return model, inputs, targets, each


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().mean()


def assert_same(found: NoiseMoments, expected: NoiseMoments, rel: float = 1e-6) -> None:
    assert (found.num_samples, found.num_groups) == (expected.num_samples, expected.num_groups)
    for name in ("gradient_norm_squared", "gradient_variance", "projected_variance", "covariance_norm_squared"):
        truth = getattr(expected, name)
        assert getattr(found, name) == (None if truth is None else pytest.approx(truth, rel=rel)), name


def groups_of(each: Tensor, sizes: Any) -> Tensor:
    return torch.stack([part.mean(0) for part in each.split(list(sizes))])


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("sizes", [RAGGED, (1,) * sum(RAGGED)], ids=["ragged", "samples"])
def test_the_meter_sees_what_the_gradients_are(sizes, scale):
    model, inputs, targets, each = regression()
    expected = moments_from_norms(*norms_of(groups_of(each, sizes), sizes))
    meter = NoiseScaleMeter(model.parameters())
    for x, y in zip(inputs.split(list(sizes)), targets.split(list(sizes)), strict=True):
        weight = len(x) / len(inputs) * scale
        with meter.micro_batch(len(x), weight=weight if scale != 1 else None):
            (half_squared_error(model(x), y) * weight).backward()
    assert_same(meter.step(), expected, rel=1e-9)
    flat = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(flat, scale * each.mean(0))  # untouched
    assert not any(p._backward_hooks for p in model.parameters())


def test_the_meter_changes_no_gradient_and_sees_none_of_other_purposes():
    """With a layer used twice, a sparse embedding, a frozen layer, one without gradient, and other passes between."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 6, sparse=True)
            self.twice, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
            self.frozen, self.unused = nn.Linear(6, 6).requires_grad_(False), nn.Linear(2, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.twice(torch.tanh(self.frozen(self.twice(self.table(tokens))))))

    torch.manual_seed(0)
    model = Net()
    tokens, targets = torch.randint(0, 10, (12,)), torch.randint(0, 3, (12,))
    meter, singles = NoiseScaleMeter(model.parameters()), []
    plain: list[Tensor] = []
    for metered in (False, True):
        model.zero_grad()
        for rows in torch.arange(12).split(2):
            loss = nn.functional.cross_entropy(model(tokens[rows]), targets[rows]) / 6
            if metered:
                with torch.no_grad():
                    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
                loss.backward(retain_graph=True)  # the first of two passes, of another purpose
                for p, kept in zip(model.parameters(), before, strict=True):
                    p.grad = kept
                with meter.micro_batch(2):
                    loss.backward()
            else:
                loss.backward()
                now = torch.cat([g.to_dense().reshape(-1) for g in (p.grad for p in model.parameters()) if g is not None])
                singles.append(6 * (now - plain[-1] if plain else now))
                plain.append(now)
    now = torch.cat([p.grad.to_dense().reshape(-1) for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(now, plain[-1])
    expected = moments_from_norms(*norms_of(torch.stack(singles).double(), [2] * 6))
    assert_same(meter.step(), expected, rel=1e-4)


def test_scaled_half_precision_gradients_and_skipped_steps():
    """With a GradScaler: 2¹⁶ times half-precision gradients overflow when squared; a step that overflows is left out."""
    model, inputs, targets, each = regression()
    small = nn.Linear(4, 1).half()
    small.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    meter = NoiseScaleMeter(small.parameters())
    expected = moments_from_norms(*norms_of(groups_of(each, RAGGED), RAGGED))
    for overflows in (False, True, False):
        small.zero_grad()
        for x, y in zip(inputs.split(list(RAGGED)), targets.split(list(RAGGED)), strict=True):
            share = len(x) / len(inputs)
            loss = half_squared_error(small(x.half()).float(), y.float()) * share * (1e6 if overflows else 1.0)
            with meter.micro_batch(len(x), weight=share * scaler.get_scale()):
                scaler.scale(loss).backward()
        moments = meter.step()
        if overflows:
            assert moments is None
        else:
            assert moments.gradient_variance == pytest.approx(expected.gradient_variance, rel=0.02)
            assert moments.gradient_norm_squared == pytest.approx(expected.gradient_norm_squared, rel=0.05)
    assert (meter.num_skipped, meter.average.num_steps) == (1, 2)
    again = NoiseScaleMeter(small.parameters())
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert (again.num_skipped, again.estimate()) == (1, meter.estimate())


def test_bfloat16_and_not_contiguous_gradients_are_squared_in_float32():
    weight = nn.Parameter(torch.ones(100, 70, dtype=torch.bfloat16).T)
    meter = NoiseScaleMeter([weight])
    for factor in (1.0, 3.0):
        with meter.micro_batch(4):
            (weight.float().sum() * 2 * factor * 0.5).backward()
    moments = meter.step()
    assert moments.gradient_variance == pytest.approx(4 * (4 + 4) * 7000.0, rel=1e-6)  # gradients 2 and 6, whose mean is 4
    assert moments.gradient_norm_squared == pytest.approx(16 * 7000.0 - moments.gradient_variance / 8, rel=1e-6)


def test_steps_that_tell_nothing_are_counted_and_wrong_use_is_said():
    model, inputs, targets, _ = regression()
    meter = NoiseScaleMeter(model.parameters())
    with meter.micro_batch(18):
        half_squared_error(model(inputs), targets).backward()
    assert meter.step() is None
    assert meter.num_single == 1
    assert "one micro-batch only" in meter.signal("gradient_noise_scale", 1, 18).note
    with pytest.raises(ValueError, match="there was none since the last"):
        meter.step()
    for number, weight in ((5, 0.5), (13, 0.5)):  # a mean of means
        with meter.micro_batch(number, weight=weight):
            half_squared_error(model(inputs[:number]), targets[:number]).backward()
    with pytest.raises(ValueError, match="proportional to their samples"):
        meter.step()
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be a positive number"), meter.micro_batch(wrong):
            pass
    with pytest.raises(KeyboardInterrupt), meter.micro_batch(4):
        raise KeyboardInterrupt
    assert not any(p._backward_hooks for p in model.parameters())
    with pytest.raises(ValueError, match="none since the last"):
        meter.step()
    with meter.micro_batch(4):
        half_squared_error(model(inputs), targets).backward()
    meter.discard()
    with pytest.raises(ValueError, match="none since the last"):
        meter.step()
    with pytest.raises(ValueError, match="no parameter that requires"):
        NoiseScaleMeter(nn.Linear(2, 2).requires_grad_(False).parameters())


def test_a_training_run_finds_the_noise_scale_of_a_quadratic():
    """``f_i = ½|x|² + ξ_i · x`` through autograd, the weights at rest; 5 % needs 25 steps by the facts' formula."""
    problem = Noisy(16.0)
    model = oracles.Point(problem.point)
    meter = NoiseScaleMeter(model.parameters(), average=NoiseScaleAverage(1.0))
    for _ in range(25):
        model.zero_grad()
        for xi in (problem.gradients(8, 8) - problem.point).mean(1):
            with meter.micro_batch(8):
                ((0.5 * model().square().sum() + xi @ model()) / 8).backward()
        meter.step()
    estimate = meter.estimate()
    assert abs(estimate.noise_scale - 16) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.08 * 16
    assert abs(estimate.inner_product_noise - problem.projected) < 4 * estimate.inner_product_error


def _rank(rank: int, store: str, sizes: tuple[int, ...], scale: float, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model, inputs, targets, _ = regression()
    parallel = nn.parallel.DistributedDataParallel(model)

    def total(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    meter = NoiseScaleMeter(parallel.parameters(), sum_over_ranks=total)
    parts = list(zip(inputs.split(list(sizes)), targets.split(list(sizes)), strict=True))
    own = parts[:-1] if rank == 0 else parts[-1:]  # unequal shares
    for overflows in (False, True):
        parallel.zero_grad()
        for i, (x, y) in enumerate(own):
            parallel.require_backward_grad_sync = i == len(own) - 1
            weight = 2 * len(x) / len(inputs) * scale
            with meter.micro_batch(len(x), weight=weight):
                (half_squared_error(parallel(x), y) * weight * (math.inf if overflows and rank == 1 else 1)).backward()
        moments = meter.step(grad_scale=scale)
        if not overflows:
            answers.put((rank, vars(moments)))
    assert meter.num_skipped == 1  # on both ranks
    dist.destroy_process_group()


def test_ranks_micro_batches_and_samples_agree(tmp_path):
    """The same gradients from two ranks of 5 and 13 samples, from micro-batches, and from the metric."""
    model, inputs, targets, each = regression()
    sizes = (2, 3, 13)
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    arguments = (str(tmp_path / "store"), sizes, 8.0, answers)
    other = context.Process(target=_rank, args=(1, *arguments))
    other.start()
    _rank(0, *arguments)
    other.join(60)
    assert other.exitcode == 0
    told = [answers.get()[1] for _ in range(2)]
    assert told[0] == told[1]
    expected = moments_from_norms(*norms_of(groups_of(each, sizes), sizes)[:3])
    assert_same(NoiseMoments(**told[0]), expected, rel=1e-9)
    meter = NoiseScaleMeter(model.parameters())
    for x, y in zip(inputs, targets, strict=True):
        with meter.micro_batch(1):
            (half_squared_error(model(x), y) / len(inputs)).backward()
    by_meter = meter.step()
    objective = Objective(model, [(inputs, targets)], criterion=half_squared_error)
    details = GradientNoiseScale()(objective, rng()).details
    assert details["gradients_of"] == "single samples"
    assert by_meter.gradient_variance == pytest.approx(details["gradient_variance"], rel=1e-9)
    assert by_meter.gradient_norm_squared == pytest.approx(details["gradient_norm_squared"], rel=1e-9)


# ---------------------------------------------------------------- the metric


@pytest.mark.parametrize(
    ("noise_scale", "sizes", "rows"),
    [(16.0, (1,) * 256, 128), (16.0, (5,) * 30 + (3,), 7), (32.0, (4,) * 64, 64)],
)
def test_errors_of_deviations_are_the_spread(noise_scale, sizes, rows):
    problem = Noisy(noise_scale)
    n = torch.tensor(sizes, dtype=F64)
    found, errors = [], []
    for _ in range(200):
        gradients = problem.point + (problem.gradients(len(n)) - problem.point) / n.sqrt()[:, None]
        sums = DeviationSums(n @ gradients / n.sum(), n.sum().item(), n.sum().item())
        for part, count in zip(gradients.split(rows), n.split(rows), strict=True):
            sums.add(part.clone(), count, count)
        assert sums.residual < 1e-12
        estimate = sums.estimate()
        reach = stdtrit(estimate.degrees, ndtr(4.5))
        assert abs(estimate.gradient_norm_squared - 1) < reach * estimate.gradient_norm_squared_error
        found.append((estimate.gradient_norm_squared, estimate.gradient_variance, estimate.noise_scale))
        errors.append((estimate.gradient_norm_squared_error, estimate.gradient_variance_error, estimate.standard_error))
    spread = np.std(found, axis=0, ddof=1)
    assert np.mean(errors, axis=0) == pytest.approx(spread, rel=0.25)
    assert (np.abs(np.mean(found, axis=0)[:2] - [1, noise_scale]) < 4 * spread[:2] / math.sqrt(200)).all()
    reference = moments_from_norms(*norms_of(gradients, sizes))
    assert found[-1][:2] == pytest.approx((reference.gradient_norm_squared, reference.gradient_variance), rel=1e-9)


def point_objective(problem: Noisy, num_samples: int, *batches: int) -> Objective:
    noise = problem.gradients(num_samples) - problem.point
    return Objective(
        oracles.Point(problem.point),
        list(noise.split(list(batches) or [num_samples])),
        loss_fn=lambda model, xi: 0.5 * model().square().sum() + (xi @ model()).mean(),
    )


@pytest.mark.parametrize("micro_batch_size", [None, 1, 8])
def test_the_metric_finds_the_noise_scale_of_a_quadratic(micro_batch_size):
    problem = Noisy(16.0)
    objective = point_objective(problem, 1000, 300, 700)  # 37 micro-batches of 8 and one of 4, 87 and one of 4
    result = GradientNoiseScale(micro_batch_size, inner_product=True)(objective, rng())
    assert result.status.kind is Kind.ESTIMATE
    assert abs(result.value - 16) < 4 * result.standard_error
    assert result.standard_error < 0.1 * 16
    details = result.details
    assert abs(details["gradient_variance"] - 16) < 4 * details["gradient_variance_error"]
    assert abs(details["gradient_norm_squared"] - 1) < 4 * details["gradient_norm_squared_error"]
    assert abs(details["inner_product_noise"] - problem.projected) < 4 * details["inner_product_error"]
    assert details["inner_product_error"] < 0.3 * problem.projected
    assert details["num_groups"] == (126 if micro_batch_size == 8 else 1000)
    low, high = details["interval"]
    assert low < result.value < high
    json.dumps(dict(details), allow_nan=False)


def test_errors_of_the_noise_along_the_gradient_are_the_spread():
    problem, found, errors = Noisy(16.0, dim=20), [], []
    ones = torch.ones(300, dtype=F64)
    for _ in range(200):
        gradients = problem.gradients(300)
        sums = DeviationSums(gradients.mean(0), 300, 300)
        sums.add(gradients.clone(), ones, ones)
        assert sums.estimate().inner_product_noise is None
        sums.add_again(gradients.clone(), ones, ones)
        estimate = sums.estimate()
        found.append(estimate.inner_product_noise)
        errors.append(estimate.inner_product_error)
    assert np.mean(errors) == pytest.approx(np.std(found, ddof=1), rel=0.25)
    assert abs(np.mean(found) - problem.projected) < 4 * np.std(found) / math.sqrt(200) + 0.02 * problem.projected


def test_of_these_samples_it_is_exact():
    """Against the covariance with divisor N, from which training on the samples draws; never more than N samples."""
    problem = oracles.small_classifier(num_samples=40)
    each = torch.func.vmap(torch.func.grad(single_loss(problem)), in_dims=(None, 0, 0))(
        problem.flat_weights(), problem.inputs, problem.targets
    )
    mean = each.mean(0)
    expected = ((each - mean).square().sum() / 40 / mean.square().sum()).item()
    for sizes in ((40,), (13, 27)):
        objective = Objective(problem.model, problem.loader(*sizes))
        result = GradientNoiseScale(population="samples")(objective, rng())
        assert result.value == pytest.approx(expected, rel=1e-9)
        assert (result.status.kind, result.standard_error) == (Kind.EXACT, None)
        assert result.details["samples_gradient_variance"] / result.details["samples_gradient_norm_squared"] == result.value
    partition = GradientNoiseScale(2, "samples")(Objective(problem.model, problem.loader()), rng())
    assert abs(partition.value - expected) < 4 * partition.standard_error
    assert partition.status.kind is Kind.ESTIMATE


def single_loss(problem: oracles.Classification) -> Any:
    names = [name for name, _ in problem.model.named_parameters()]
    shapes = [p.shape for p in problem.model.parameters()]

    def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        weights = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(problem.model, weights, (x[None],)), y[None])

    return loss


def test_samples_of_a_partition_give_the_covariance_of_the_samples_without_bias():
    """All partitions of six samples into three pairs: their mean is the covariance with divisor N − 1, exactly."""
    gradients = Noisy(16.0, dim=5).gradients(6)
    mean, sizes = gradients.mean(0), torch.full((3,), 2.0, dtype=F64)
    found = []
    for order in ((0, a, *rest) for a in range(1, 6) for rest in _pairings([b for b in range(1, 6) if b != a])):
        sums = DeviationSums(mean, 6, 6)
        sums.add(gradients[list(order)].view(3, 2, -1).mean(1), sizes, sizes)
        found.append(sums.estimate().gradient_variance)
    assert np.mean(found) == pytest.approx(((gradients - mean).square().sum() / 5).item(), rel=1e-12)


def _pairings(four: list[int]) -> list[list[int]]:
    return [[four[0], four[i], *(x for j, x in enumerate(four) if j not in (0, i))] for i in (1, 2, 3)]


class Branching(nn.Module):
    """Looks at its numbers, which cannot be vectorized."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum().item() < 1e9 else self.inner(-x)


class Tokens(nn.Module):
    """Next-token scores with the embedding as head: tied weights, dict batches, ignored targets, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.attention(self.table(input_ids)))
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    )


@pytest.mark.parametrize("kind", ["conv", "half", "branching"])
def test_any_model_vectorized_or_not(kind):
    torch.manual_seed(0)
    inner = conv_net()
    inner(torch.randn(50, 1, 4, 4))  # running statistics
    model = {"conv": inner, "half": copy.deepcopy(inner).bfloat16(), "branching": Branching(inner)}[kind]
    x, y = torch.randn(60, 1, 4, 4), torch.randint(0, 3, (60,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = measure_sharpness(model, [(x[:25], y[:25]), (x[25:], y[25:])], GradientNoiseScale())
    details = report["gradient_noise_scale"].details
    assert ("not vectorized" in details["gradients_of"]) == (kind == "branching")
    twin = model.float().eval()
    each = []
    for i in range(60):
        loss = nn.functional.cross_entropy(twin(x[i : i + 1]), y[i : i + 1])
        each.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(twin.parameters()))]))
    expected = moments_from_norms(*norms_of(torch.stack(each).double(), [1] * 60)[:3])
    assert details["gradient_variance"] == pytest.approx(expected.gradient_variance, rel=1e-4)
    assert details["gradient_norm_squared"] == pytest.approx(expected.gradient_norm_squared, rel=1e-2)
    assert all(torch.equal(before[name].to(tensor), tensor) for name, tensor in model.state_dict().items())
    assert report["gradient_noise_scale"].cost.gradients == 2


def test_tied_weights_attention_dict_batches_and_ignored_targets():
    """A mean over tokens: samples weigh by their tokens, and ``S`` is that of the linear part of the mean, in samples."""
    torch.manual_seed(0)
    model = Tokens()
    ids = torch.randint(0, 11, (24, 6))
    labels = ids.clone()
    for i in range(24):
        labels[i, : i % 6] = -100
    labels[5] = -100  # a sample without any target
    loader = [{"input_ids": ids[rows], "labels": labels[rows]} for rows in torch.arange(24).split(10)]
    details = {}
    for size in (None, 2):
        report = measure_sharpness(model, loader, GradientNoiseScale(size))
        details[size] = next(iter(report.values())).details
    assert details[None]["gradients_of"] == "single samples"
    model.eval()
    parameters = list(model.parameters())
    sums, counts = [], []
    for i in range(24):
        logits = model(ids[i : i + 1], labels[i : i + 1])["logits"]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[i], reduction="sum")
        sums.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]).double())
        counts.append(int((labels[i] >= 0).sum()))
    total, tokens = torch.stack(sums), torch.tensor(counts, dtype=F64)
    mean = total.sum(0) / tokens.sum()
    part = (total - tokens[:, None] * mean) / tokens.mean()
    assert details[None]["gradient_variance"] == pytest.approx((part.square().sum() / 23).item(), rel=1e-4)
    pairs = part.view(12, 2, -1).mean(1) * math.sqrt(2)
    assert details[2]["gradient_variance"] == pytest.approx((pairs.square().sum() / 11).item(), rel=1e-4)


def test_few_samples_give_a_lower_bound_and_no_warning():
    problem = Noisy(1000.0)
    result = GradientNoiseScale()(point_objective(problem, 20), rng())
    assert result.status.kind is Kind.NOT_CONVERGED
    assert result.standard_error is None
    assert "not clearly positive" in result.status.message
    assert result.value == result.details["at_least"] < 1000
    model, inputs, targets, _ = regression()
    report = measure_sharpness(model, [(inputs[:6], targets[:6])], GradientNoiseScale(), criterion=half_squared_error)
    assert report["gradient_noise_scale"].status.kind in (Kind.NOT_CONVERGED, Kind.ESTIMATE)


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        ({}, 1, "at least 2 groups"),
        ({"micro_batch_size": 6}, 6, "at least 2 groups"),
        ({"micro_batch_size": 2}, 6, "3 groups tell no error"),
    ],
)
def test_too_few_groups_fail_with_the_reason(settings, count, message):
    model, inputs, targets, _ = regression()
    with pytest.warns(PluginWarning, match=message):
        report = measure_sharpness(
            model, [(inputs[:count], targets[:count])], GradientNoiseScale(**settings), criterion=half_squared_error
        )
    assert next(iter(report.values())).status.kind is Kind.FAILED


def test_a_loss_that_is_no_mean_over_samples_is_said():
    model, inputs, targets, _ = regression()

    def contrast(net: nn.Module, batch: Any) -> Tensor:
        return (net(batch[0]) - batch[1]).square().mean().sqrt()  # the root of the mean is not the mean of the roots

    with pytest.warns(PluginWarning, match="is not the gradient of the mean loss"):
        measure_sharpness(model, [(inputs, targets)], GradientNoiseScale(), loss_fn=contrast)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.warns(PluginWarning, match="BatchNorm uses the statistics of the batch"):
        measure_sharpness(network, [(inputs.float(), torch.arange(18) % 3)], GradientNoiseScale(), batch_norm="batch")


def test_no_gradient_and_no_noise():
    """Zero gradients have no noise scale; equal ones have the noise scale 0, exactly."""
    still = Objective(oracles.Point(torch.zeros(3, dtype=F64)), [torch.zeros(8, 3, dtype=F64)], loss_fn=_pull)
    for population in ("distribution", "samples"):
        assert GradientNoiseScale(population=population)(still, rng()).status.kind is Kind.FAILED
    equal = Objective(oracles.Point(torch.ones(3, dtype=F64)), [torch.zeros(8, 3, dtype=F64)], loss_fn=_pull)
    result = GradientNoiseScale()(equal, rng())
    assert (result.value, result.standard_error) == (0.0, 0.0)


def _pull(model: nn.Module, batch: Tensor) -> Tensor:
    return 0.5 * (model() - batch).square().sum(1).mean()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1"):
        GradientNoiseScale(0)
    with pytest.raises(ValueError, match="population must be one of"):
        GradientNoiseScale(population="all")
