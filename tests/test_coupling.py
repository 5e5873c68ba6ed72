"""The learning rate that belongs to a batch size: by hand, through every scheduler, and never to be seen elsewhere."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from sharpness_plugins.coupling import (
    RULES,
    AdaScale,
    LearningRateCoupling,
    Multipliers,
    SampleHorizon,
    adam_sde,
    counts_steps,
    default_rule,
    linear,
    momentum,
    none,
    sqrt,
)
from sharpness_plugins.schedules import Signal

SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 7, 0.5),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.95),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 40),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 40),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 40, 2.0),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(optimizer, 35)], [5]
    ),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 41),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 15),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, 40, cycle_momentum=False),
}
CHAINED = {
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
}


def one_weight(**settings):
    return nn.Parameter(torch.zeros(1, dtype=torch.float64), **settings)


def moves(optimizer, scheduler, num_steps=40, change=lambda step: None):
    """How far a step under gradient 1 moves the weight of each group, and the ``lr`` that the scheduler sees after it."""
    found, seen = [], []
    for step in range(num_steps):
        change(step)
        weights = [group["params"][0] for group in optimizer.param_groups]
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        found.append([float(old - new) for old, new in zip(before, [weight.detach() for weight in weights], strict=True)])
        if scheduler is not None:
            scheduler.step()
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
    return found, seen


def groups(learning_rates):
    return [{"params": [one_weight()], "lr": learning_rate} for learning_rate in learning_rates]


@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_twice_the_learning_rate_through_every_scheduler(name, tensors):
    """The bar of the batch-size facts: factor 2 from step 20 on, ratio 2.00 at steps 21, 30 and 37. In two groups."""

    def make():
        rates = [torch.tensor(lr, dtype=torch.float64) if tensors else lr for lr in (0.1, 0.03)]
        optimizer = torch.optim.SGD(groups(rates), foreach=False)
        return optimizer, SCHEDULERS[name](optimizer)

    expected, seen = moves(*make())
    optimizer, scheduler = make()
    coupling = LearningRateCoupling(optimizer)
    effective = []

    def change(step):
        if step == 20:
            coupling.set(2.0)
        effective.append(coupling.learning_rates())

    found, again = moves(optimizer, scheduler, change=change)
    assert again == seen  # the scheduler has seen nothing of it
    for step in range(40):
        factor = 2.0 if step >= 20 else 1.0
        assert found[step] == pytest.approx([factor * move for move in expected[step]], rel=1e-6, abs=1e-15)
        assert effective[step] == pytest.approx(found[step], rel=1e-12, abs=1e-15)
    assert all(expected[step][0] > 1e-4 for step in (21, 30, 37))


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, betas=(0.9, 0.99), eps=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True, eps=1e-3),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01, eps=1e-3),
    "radam": lambda parameters: torch.optim.RAdam(parameters, lr=0.01, eps=1e-3),
    "adamax": lambda parameters: torch.optim.Adamax(parameters, lr=0.01, eps=1e-3),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, eps=1e-3),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, eps=1e-3),
}


@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, "auto") for name in OPTIMIZERS]
    + [(name, "adam_sde") for name in ("adam", "adamw", "nadam", "radam", "adamax", "rmsprop")]
    + [("sgd", "momentum")],
)
def test_a_step_is_the_one_with_settings_written_by_hand(name, rule):
    """Bit for bit, with growing and shrinking batches."""
    torch.manual_seed(0)
    gradients = torch.randn(12, 5, dtype=torch.float64)
    weights = [nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)) for _ in range(2)]
    ours, by_hand = (OPTIMIZERS[name]([weight]) for weight in weights)
    own = dict(by_hand.param_groups[0])
    coupling = LearningRateCoupling(ours, rule)
    for step, gradient in enumerate(gradients):
        kappa = (1.0, 2.0, 8.0, 0.5)[step // 3]
        coupling.set(kappa)
        root, group = kappa**0.5, by_hand.param_groups[0]
        if rule == "momentum":
            group["momentum"] = max(1 - (1 - own["momentum"]) / kappa, 0.0)
        else:
            group["lr"] = own["lr"] * (kappa if name == "sgd" else root)
        if rule == "adam_sde":
            group["eps"] = own["eps"] / root
            if "betas" in own:
                group["betas"] = tuple(max(1 - kappa * (1 - beta), 0.0) for beta in own["betas"])
            else:
                group["alpha"] = max(1 - kappa * (1 - own["alpha"]), 0.0)
        for weight, optimizer in zip(weights, (ours, by_hand), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
        torch.testing.assert_close(*weights, rtol=1e-13, atol=1e-15)
        assert {key: value for key, value in ours.param_groups[0].items() if key != "params"} == {
            key: value for key, value in own.items() if key != "params"
        }
    assert len(ours.state) == 1 or name == "sgd"


def test_rules_are_their_formulas():
    assert none(3.0, {}) == Multipliers()
    assert linear(3.0, {}) == Multipliers(learning_rate=3.0)
    assert sqrt(9.0, {}) == Multipliers(learning_rate=3.0)
    assert adam_sde(4.0, {}) == Multipliers(2.0, one_minus_beta1=4.0, one_minus_beta2=4.0, epsilon=0.5)
    assert momentum(4.0, {}) == Multipliers(one_minus_momentum=0.25)
    for rule in RULES.values():
        assert rule(1.0, {}) == Multipliers()


def test_adam_forgets_at_once_where_the_batch_outgrows_its_memory():
    optimizer = torch.optim.Adam([one_weight()], lr=0.1)
    LearningRateCoupling(optimizer, "adam_sde").set(20.0)  # 1 - 20 * (1 - 0.9) < 0
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    state = next(iter(optimizer.state.values()))
    assert float(state["exp_avg"]) == 1.0


@pytest.mark.parametrize("kappa", [0.5, 1.0, 2.0, 16.0])
def test_adascale_runs_from_no_gain_to_the_linear_rule(kappa):
    def gain(noise):
        return AdaScale(32)(kappa, {"gradient_noise_scale": Signal(noise)}).learning_rate

    assert gain(0.0) == 1.0
    assert gain(1e12) == pytest.approx(kappa, rel=1e-9)
    variance, norm_squared = 3.0, 0.25  # tr Sigma and |G|^2: the gradient's mean square at B0 over that at kappa B0
    expected = (variance / 32 + norm_squared) / (variance / (32 * kappa) + norm_squared)
    assert gain(variance / norm_squared) == pytest.approx(expected, rel=1e-14)
    assert AdaScale(32, power=0.5)(kappa, {"gradient_noise_scale": Signal(12.0)}).learning_rate == pytest.approx(
        expected**0.5
    )


def test_an_unknown_noise_keeps_the_gain_and_a_new_batch_size_does_without():
    optimizer = torch.optim.SGD([one_weight()], lr=0.1)
    coupling = LearningRateCoupling(optimizer, "adascale", base_batch_size=32)
    known, unknown = {"gradient_noise_scale": Signal(96.0)}, {"gradient_noise_scale": Signal(None)}
    assert coupling.set(2.0, unknown) == Multipliers()
    assert coupling.set(2.0, known).learning_rate == (3 + 1) / (3 / 2 + 1)
    assert coupling.set(2.0, unknown).learning_rate == 1.6
    assert coupling.set(2.0).learning_rate == 1.6
    assert coupling.set(4.0, unknown) == Multipliers()
    assert coupling.set(1.0, unknown) == Multipliers()
    adaptive = LearningRateCoupling(torch.optim.Adam([one_weight()]), "adascale", base_batch_size=32)
    assert adaptive.set(2.0, known).learning_rate == 1.6**0.5


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (torch.optim.SGD, "linear"),
        (torch.optim.ASGD, "linear"),
        (torch.optim.LBFGS, "none"),
        *[
            (getattr(torch.optim, name), "sqrt")
            for name in (
                "Adam",
                "AdamW",
                "NAdam",
                "RAdam",
                "Adamax",
                "Adagrad",
                "RMSprop",
                "Adadelta",
                "Adafactor",
                "SparseAdam",
            )
        ],
    ],
)
def test_the_default_goes_by_the_optimizer(make, rule):
    assert default_rule(make([one_weight()], lr=0.1)) == rule


@pytest.mark.parametrize(("name", "rule"), [("Lars", "linear"), ("SGDP", "linear"), ("Lamb", "sqrt"), ("Lion", "sqrt")])
def test_the_default_knows_timms_kin(name, rule):
    timm = pytest.importorskip("timm.optim")
    assert default_rule(getattr(timm, name)([one_weight()], lr=0.1)) == rule


def test_every_moment_is_scaled_where_there_are_three():
    timm = pytest.importorskip("timm.optim")
    optimizer = timm.Adan([one_weight()], lr=0.1)
    LearningRateCoupling(optimizer, "adam_sde").set(4.0)
    used = []
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: used.extend(args[0].param_groups[0]["betas"]))
    optimizer.step()
    assert used == pytest.approx([1 - 4 * (1 - beta) for beta in optimizer.param_groups[0]["betas"]])


def test_a_step_that_raises_leaves_nothing_scaled():
    def make():
        optimizer = torch.optim.SGD([one_weight()], lr=0.1)
        return optimizer, lr_scheduler.ExponentialLR(optimizer, 0.9)

    optimizer, scheduler = make()
    coupling = LearningRateCoupling(optimizer)
    coupling.set(2.0)

    def fails():
        assert optimizer.param_groups[0]["lr"] == 0.1  # a closure sees what everybody sees
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.state_dict()["param_groups"] == make()[0].state_dict()["param_groups"]
    expected, seen = moves(*make(), 5)
    found, again = moves(optimizer, scheduler, 5)
    assert again == seen
    assert found == [[pytest.approx(2 * move, rel=1e-12)] for (move,) in expected]


@pytest.mark.parametrize("fused", [False, True])  # a fused step unscales gradients itself, by an attribute that it is given
def test_a_step_that_the_scaler_skips_changes_nothing(fused):
    optimizer = torch.optim.SGD([one_weight()], lr=0.1, fused=fused)
    LearningRateCoupling(optimizer).set(2.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = optimizer.param_groups[0]["params"][0]
    for factor, expected in ((float("inf"), 0.0), (1.0, -0.2)):
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert float(weight.detach()) == expected
        assert optimizer.param_groups[0]["lr"] == 0.1


class Counting(torch.optim.SGD):
    """An optimizer that keeps books in its groups and in itself."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr_seen"] = group["lr"]
        return super().step(closure)


def test_what_a_step_notes_down_is_kept():
    sgd()  # from now on SGD's step runs hooks as well as that of its subclass: twice per step
    optimizer = Counting([one_weight()], lr=0.1)
    coupling = LearningRateCoupling(optimizer)
    for step, kappa in enumerate((1.0, 2.0, 2.0, 1.0), 1):
        coupling.set(kappa)
        optimizer.step()
        assert optimizer.calls == optimizer.param_groups[0]["count"] == step
        assert optimizer.param_groups[0]["lr_seen"] == 0.1 * kappa
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.step(lambda: torch.tensor(7.0)) == 7.0


def test_nothing_happens_at_the_base_batch_and_after_detaching():
    plain, coupled = (torch.optim.Adam([one_weight()], lr=0.1) for _ in range(2))
    coupling = LearningRateCoupling(coupled)
    coupling.set(9.0)
    coupling.set(1.0)
    assert moves(coupled, None, 5) == moves(plain, None, 5)
    coupling.set(9.0)
    coupling.detach()
    assert moves(coupled, None, 5) == moves(plain, None, 5)
    again = LearningRateCoupling(coupled, linear)  # free for another one
    again.set(3.0)
    assert moves(coupled, None, 1)[0][0][0] == pytest.approx(3 * moves(plain, None, 1)[0][0][0], rel=1e-12)


def test_a_resumed_coupling_goes_on():
    def make():
        optimizer = torch.optim.Adam([one_weight()], lr=0.1)
        return optimizer, LearningRateCoupling(optimizer, "adam_sde")

    optimizer, coupling = make()
    coupling.set(3.0)
    moves(optimizer, None, 4)
    other, resumed = make()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(json.loads(json.dumps(coupling.state_dict())))
    with torch.no_grad():
        other.param_groups[0]["params"][0].copy_(optimizer.param_groups[0]["params"][0])
    assert moves(other, None, 4) == moves(optimizer, None, 4)


def test_a_compiled_step_is_scaled():
    optimizer = torch.optim.Adam([one_weight()], lr=torch.tensor(0.1, dtype=torch.float64), foreach=False)
    plain = torch.optim.Adam([one_weight()], lr=0.1)
    coupling = LearningRateCoupling(optimizer)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    found = []
    for step in range(6):
        coupling.set(9.0 if step < 3 else 4.0)
        weight = optimizer.param_groups[0]["params"][0]
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        compiled()
        found.append(float(before - weight.detach()))
    expected = [move for (move,) in moves(plain, None, 6)[0]]
    assert found == pytest.approx(
        [*[3 * move for move in expected[:3]], *[2 * move for move in expected[3:]]], rel=1e-4
    )  # float32 powers
    assert float(optimizer.param_groups[0]["lr"]) == 0.1


class Wrapper(torch.optim.Optimizer):
    """As timm's Lookahead, which leaves out the constructor on purpose."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.defaults = inner, inner.param_groups, inner.defaults

    def step(self, closure=None):
        return self.inner.step(closure)


def sgd():
    return torch.optim.SGD([one_weight()], lr=0.1)


def coupled_twice():
    optimizer = sgd()
    LearningRateCoupling(optimizer)
    LearningRateCoupling(optimizer)


@pytest.mark.parametrize(
    ("make", "error", "cause"),
    [
        (lambda: LearningRateCoupling(sgd(), "squrt"), ValueError, "Did you mean 'sqrt'"),
        (
            lambda: LearningRateCoupling(sgd(), "adam_sde"),
            ValueError,
            "one_minus_beta1, and parameter group 0 of SGD has none",
        ),
        (lambda: LearningRateCoupling(torch.optim.Adam([one_weight()]), "momentum"), ValueError, "one_minus_momentum"),
        (
            lambda: LearningRateCoupling(torch.optim.Adafactor([one_weight()]), "adam_sde"),
            ValueError,
            "of Adafactor has none",
        ),
        (lambda: LearningRateCoupling(sgd(), adam_sde).set(2.0), ValueError, "Use another rule"),
        (lambda: LearningRateCoupling(sgd(), "adascale"), ValueError, "pass base_batch_size"),
        (lambda: LearningRateCoupling(sgd()).set(0.0), ValueError, "kappa must be positive"),
        (
            lambda: LearningRateCoupling(sgd(), lambda kappa, signals: Multipliers(-kappa)).set(2.0),
            ValueError,
            "learning_rate",
        ),
        (lambda: LearningRateCoupling(Wrapper(sgd())), TypeError, "Wrapper runs no step hooks"),
        (coupled_twice, ValueError, "scaled twice"),
        (lambda: AdaScale(0), ValueError, "base_batch_size must be a whole number of at least 1, got 0"),
        (lambda: AdaScale(8, power=2.0), ValueError, "power"),
        (lambda: SampleHorizon(lr_scheduler.ReduceLROnPlateau(sgd()), 8), TypeError, "does not count steps"),
        (lambda: SampleHorizon(lr_scheduler.ExponentialLR(sgd(), 0.9), 8, steps_per_epoch=0), ValueError, "steps_per_epoch"),
    ],
)
def test_what_cannot_be_coupled_is_refused(make, error, cause):
    with pytest.raises(error, match=cause):
        make()


def rates(make, epochs, horizon=True, steps_per_epoch=None):
    """``lr`` after each optimizer step: ``epochs`` lists the samples of each step."""
    optimizer = torch.optim.SGD([one_weight()], lr=0.1)
    scheduler = make(optimizer)
    driver = SampleHorizon(scheduler, 16, steps_per_epoch=steps_per_epoch) if horizon else None
    found = []
    for steps in epochs:
        for position, num_samples in enumerate(steps, 1):
            optimizer.step()
            scheduler.step() if driver is None else driver.step(num_samples)
            if driver is not None and position == len(steps):
                driver.end_epoch()
            found.append(optimizer.param_groups[0]["lr"])
    return found


def decay(optimizer):
    return lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 64)


def test_a_linear_decay_ends_at_zero_though_the_batch_grew():
    """The facts' case: 4 epochs of 16 batches, four times the batch from the third on, so 40 steps in place of 64."""
    epochs = [[16] * 16, [16] * 16, [64] * 4, [64] * 4]
    assert rates(decay, epochs, horizon=False)[-1] == pytest.approx(0.1 * 0.375)
    found = rates(decay, epochs)
    assert found[-1] == pytest.approx(0.0, abs=1e-15)
    assert found[-2] == pytest.approx(0.1 * 4 / 64)


@pytest.mark.parametrize("steps_per_epoch", [None, 10])
@pytest.mark.parametrize("name", [*SCHEDULERS, *CHAINED])
def test_a_horizon_in_samples_agrees_wherever_the_samples_do(name, steps_per_epoch):
    """Of four epochs of 10 steps; at the base batch it is the scheduler itself, also for those that raise past their end."""
    make = (SCHEDULERS | CHAINED)[name]
    plain = rates(make, [[16] * 10] * 4, horizon=False)
    assert rates(make, [[16] * 10] * 4, steps_per_epoch=steps_per_epoch) == plain
    for epochs, at in (
        ([[16] * 10, [32] * 5, [80] * 2, [160]], [9, 14, 16, 17]),
        ([[24, 24, 24, 24, 24, 24, 16]] * 4, [6, 13, 20, 27]),
        ([[8] * 20, [16] * 10, [1] * 160, [40] * 4], [19, 29, 189, 193]),
    ):
        found = rates(make, epochs, steps_per_epoch=steps_per_epoch)
        assert [found[step] for step in at] == plain[9::10]


@pytest.mark.parametrize(
    ("base", "grown"),
    [([16] * 6 + [4], [40, 40, 20]), ([16] * 6, [64]), ([16] * 6, [20] * 5), ([16] * 6 + [4], [100])],
    ids=["ragged", "drop_last", "drop_last fits", "one"],
)
def test_an_epoch_is_an_epoch_whatever_is_dropped(base, grown):
    """100 samples: 7 steps of 16, or 6 with ``drop_last``."""

    def make(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, 0.1, 3 * len(base), cycle_momentum=False)

    plain = rates(make, [base] * 3, horizon=False)
    assert rates(make, [base] * 3, steps_per_epoch=len(base)) == plain
    found = rates(make, [base, grown, grown], steps_per_epoch=len(base))
    assert found[len(base) - 1 :: len(grown)] == plain[len(base) - 1 :: len(base)]


def test_a_horizon_resumes_between_its_steps():
    optimizers = [torch.optim.SGD([one_weight()], lr=0.1) for _ in range(2)]
    first, second = (SampleHorizon(decay(optimizer), 16, steps_per_epoch=40) for optimizer in optimizers)
    for optimizer in optimizers:
        optimizer.step()
    first.step(40)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for horizon in (first, second):
        horizon.step(8)  # 40 + 8 are three steps
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [pytest.approx(0.1 * 61 / 64)] * 2
    with pytest.raises(ValueError, match="negative"):
        first.step(-1)


def test_which_schedulers_count_steps():
    optimizer = sgd()
    assert all(counts_steps(make(optimizer)) for make in (SCHEDULERS | CHAINED).values())
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer)
    assert not counts_steps(plateau)

    class Prepared:
        def __init__(self, scheduler):
            self.scheduler = scheduler

    assert counts_steps(Prepared(decay(optimizer)))
    assert not counts_steps(Prepared(plateau))
    assert not counts_steps(object())


def test_an_optimizer_that_steps_another_is_refused():
    class Wrapper(torch.optim.SGD):
        def __init__(self, inner):
            super().__init__([nn.Parameter(torch.ones(1))], lr=0.1)
            self.inner = inner

    with pytest.raises(TypeError, match=r"Wrapper steps another optimizer \(inner\).*Couple that one"):
        LearningRateCoupling(Wrapper(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)), "linear")
