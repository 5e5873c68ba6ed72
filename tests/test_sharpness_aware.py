"""The optimizer around an optimizer: T1 to T9, T11, T12 and T14 of the list of faults, and what else can go wrong."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from sharpness_plugins.optimizers import (
    ASAM,
    FSAM,
    GSAM,
    SAM,
    WSAM,
    BatchClosure,
    Descent,
    KStepSAM,
    LookSAM,
    MomentumSAM,
    ProportionalToLearningRate,
    RandomSAM,
    Rule,
    SharpnessAware,
    perturbed,
)

RULES = [SAM(), ASAM(), GSAM(), WSAM(), FSAM(), LookSAM(k=3), MomentumSAM(), RandomSAM(), KStepSAM()]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)


def network(seed=0, dtype=torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def batch(number=0, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + number)
    return torch.randn(size, 4, generator=generator).to(dtype), torch.randint(3, (size,), generator=generator)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


class Evaluation:
    """A closure that counts."""

    def __init__(self, model, data=None, loss_fn=functional.cross_entropy):
        self.model, self.data, self.loss_fn, self.calls = model, data or batch(), loss_fn, 0

    def __call__(self):
        self.calls += 1
        loss = self.loss_fn(self.model(self.data[0]), self.data[1])
        loss.backward()
        return loss


def trained(optimizer, model, steps=range(5)):
    for number in steps:
        optimizer.step(Evaluation(model, batch(number)))
    return flat(model.parameters())


def sgd(model, **settings):
    return SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def aware(network, rule, **settings):
    """With the model, as looking for it takes as long as all else in a test."""
    options = {name: settings.pop(name) for name in ("lr", "momentum", "weight_decay") if name in settings}
    return SharpnessAware(sgd(network, **options), rule, **{"model": network, **settings})


# --- T1 to T9, T11, T12, T14


class Branches(nn.Module):
    """Each pass uses the branches that it is told to."""

    def __init__(self):
        super().__init__()
        self.both, self.first, self.second = (nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0, 3.0))
        self.used = ()

    def forward(self):
        return sum((getattr(self, name) ** 3).sum() for name in self.used)


@rules
@pytest.mark.parametrize("lr", [0.0, 0.001])
def test_t1_t2_a_parameter_used_in_one_pass_only_comes_back(rule, lr):
    model = Branches()
    optimizer = aware(model, rule, rho=0.3, lr=lr)
    passes = iter([("both", "first"), ("both", "second"), ("both", "second")] * 10)

    def closure():
        model.used = next(passes)
        loss = model()
        loss.backward()
        return loss

    before = flat(model.parameters())
    for _ in range(6):
        optimizer.step(closure)
    if lr == 0:
        assert torch.equal(flat(model.parameters()), before)
    else:
        assert torch.isfinite(flat(model.parameters())).all()
        assert not torch.equal(model.both.detach(), torch.ones(3))


def test_t1_pass_1_only_is_left_to_the_base_optimizer_without_a_gradient():
    model = Branches()
    optimizer = SharpnessAware(SGD(model.parameters(), lr=0.1, weight_decay=0.1), SAM(), rho=0.3)
    model.used = ("both", "first")
    model().backward()
    with optimizer.perturbed():
        assert not torch.equal(model.first.detach(), torch.full((3,), 2.0))
        model.used = ("both", "second")
        model().backward()
    assert torch.equal(model.first.detach(), torch.full((3,), 2.0))
    assert model.first.grad is None
    optimizer.step()
    assert torch.equal(model.first.detach(), torch.full((3,), 2.0))
    torch.testing.assert_close(model.second.detach(), torch.full((3,), 3.0 - 0.1 * (27 + 0.3)))


def normed(*, spectral=True) -> nn.Module:
    torch.manual_seed(0)
    conv, linear = nn.Conv1d(4, 6, 1), nn.Linear(24, 5)
    return nn.Sequential(
        nn.utils.spectral_norm(conv) if spectral else conv,
        nn.InstanceNorm1d(6, track_running_stats=True),
        nn.BatchNorm1d(6, affine=False),
        nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(linear) if spectral else linear,
        nn.BatchNorm1d(5),
        nn.Linear(5, 3),
    ).double()


@rules
@pytest.mark.parametrize("given", [True, False], ids=["model", "found"])
def test_t3_buffers_are_those_of_one_forward_pass(rule, given):
    model, twin = normed(), normed()
    twin.load_state_dict(model.state_dict())
    rho = 0.5 if rule.needs_gradient else 0.0  # a rule without a first pass has its one forward uphill
    optimizer = aware(model, rule, rho=rho, lr=0.0, model=model if given else None)
    x, y = torch.randn(8, 4, 4, dtype=torch.float64), batch()[1]
    for _ in range(3):
        optimizer.step(Evaluation(model, (x, y)))
        twin(x)
    assert all(torch.equal(buffer, twin.get_buffer(name)) for name, buffer in model.named_buffers())


@rules
@pytest.mark.parametrize("base", [sgd, lambda model: AdamW(model.parameters(), lr=0.01)], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("interval", [1, 2])
def test_t4_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(rule, base, interval):
    def build(model):
        return SharpnessAware(base(model), rule, rho=lambda step: 0.1 / (1 + step), interval=interval, model=model)

    model = network()
    optimizer = build(model)
    trained(optimizer, model, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = trained(optimizer, model, range(5, 12))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network(seed=1)
    resumed = build(again)
    trained(resumed, again, range(2))  # a state that must go
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert torch.equal(trained(resumed, again, range(5, 12)), expected)
    assert resumed.num_steps == optimizer.num_steps == 12


@rules
def test_t5_addresses_stay(rule):
    model = network()
    optimizer = aware(model, rule)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    trained(optimizer, model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


@pytest.mark.parametrize(
    ("rule", "interval", "expected"),
    [
        (SAM(), 1, 40),
        (SAM(), 10, 22),
        (SAM(), 20, 21),
        (LookSAM(k=10), 1, 22),
        (LookSAM(k=3), 1, 27),
        (LookSAM(k=5), 2, 22),  # asked in 10 of 20 steps, ascends in 2 of those
        (MomentumSAM(), 1, 20),
        (RandomSAM(), 1, 20),
        (KStepSAM(k=3), 1, 80),
        (KStepSAM(k=3), 4, 35),
    ],
)
@pytest.mark.parametrize("form", ["closure", "by hand"])
def test_t6_gradients_are_those_that_the_rule_claims(rule, interval, expected, form):
    model = network()
    optimizer = aware(model, rule, interval=interval)
    closure = Evaluation(model)
    for _ in range(20):
        planned = optimizer.next_ascents
        before = closure.calls
        if form == "closure":
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            if rule.needs_gradient or not planned:
                closure()
            for ascent in optimizer.ascents():
                with ascent:
                    closure()
            optimizer.step()
        assert closure.calls - before == planned + (rule.needs_gradient or not planned)
    assert closure.calls == expected
    if 20 % (rule.every * interval) == 0:
        assert closure.calls == pytest.approx(20 * optimizer.gradients_per_step, rel=1e-12)


@rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_t7_without_a_learning_rate_weights_stay_bit_for_bit(rule, dtype):
    model = network(dtype=dtype)
    before = flat(model.parameters())
    optimizer = aware(model, rule, rho=2.0, lr=0.0)
    for number in range(20):
        optimizer.step(Evaluation(model, batch(number, dtype=dtype)))
    assert torch.equal(flat(model.parameters()), before)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("form", ["closure", "by hand"])
@rules
def test_t9_a_gradient_that_is_not_finite_leaves_the_step_out(rule, form, where, bad):
    if where >= rule.gradients_per_step - 1 and isinstance(rule, (MomentumSAM, RandomSAM)):
        where = 0
    model = network()
    optimizer = aware(model, rule)
    trained(optimizer, model, range(3))  # LookSAM is about to ascend
    state, before = copy.deepcopy(optimizer.state_dict()), flat(model.parameters())
    closure = Evaluation(model)
    calls = []

    def overflowing():
        loss = closure()
        if len(calls) == where:
            model[0].weight.grad[0, 0] = bad
        calls.append(loss)
        return loss

    if form == "by hand":
        optimizer.zero_grad()
        if rule.needs_gradient:
            overflowing()
        for ascent in optimizer.ascents():
            with ascent:
                overflowing()
    with pytest.warns(RuntimeWarning, match="step 3 was left out"):
        optimizer.step(overflowing if form == "closure" else None)
    assert torch.equal(flat(model.parameters()), before)
    assert (optimizer.num_steps, optimizer.num_skipped) == (3, 1)
    optimizer.num_skipped = 0
    assert_same(optimizer.state_dict(), state)


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Recording(nn.Dropout):
    def __init__(self):
        super().__init__(0.5)
        self.masks = []

    def forward(self, x):
        self.masks.append(super().forward(torch.ones_like(x)))
        return x * self.masks[-1]


@pytest.mark.parametrize("form", ["closure", "by hand"])
def test_t11_the_same_dropout_masks_in_all_passes_on_request(form):
    model = nn.Sequential(nn.Linear(4, 50), Recording(), nn.Linear(50, 3)).double()
    optimizer = aware(model, KStepSAM(k=2), replay_rng=True)
    closure = Evaluation(model)
    torch.manual_seed(0)
    for _ in range(2):
        if form == "closure":
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            optimizer.remember_rng()
            closure()
            for ascent in optimizer.ascents():
                with ascent:
                    closure()
            optimizer.step()
    first, second, third, again = *model[1].masks[:3], model[1].masks[3]
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(first, again)
    torch.manual_seed(0)
    one = nn.Dropout(0.5)(torch.ones(8, 50, dtype=torch.float64))
    two = nn.Dropout(0.5)(torch.ones(8, 50, dtype=torch.float64))
    assert torch.equal(one, first)
    assert torch.equal(two, again)  # random states go on as after one pass


def test_t11_by_hand_it_must_be_said_where_the_first_pass_begins():
    model = network()
    optimizer = aware(model, SAM(), replay_rng=True)
    Evaluation(model)()
    with pytest.raises(ValueError, match="remember_rng"), optimizer.perturbed():
        pass


@rules
@pytest.mark.parametrize("shape", [[8, 8], [3, 7, 6], [1] * 16], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=str)
def test_t12_accumulated_micro_batches_are_the_large_batch(rule, shape, dtype, tolerance):
    x, y = batch(size=16, dtype=dtype)

    def losses(model, weights):
        return lambda part: functional.cross_entropy(model(part[0]), part[1]) * weights

    model, twin = network(dtype=dtype), network(dtype=dtype)
    optimizer, whole = (aware(one, rule, rho=0.2) for one in (model, twin))
    for _ in range(4):
        parts = list(zip(x.split(shape), y.split(shape), strict=True))
        loss = optimizer.step([BatchClosure(losses(model, len(part[1]) / 16), part) for part in parts])
        expected = whole.step(Evaluation(twin, (x, y)))
        torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=0)
        torch.testing.assert_close(optimizer.surrogate_gap, whole.surrogate_gap, rtol=1e-3, atol=1e-6)
    a, b = flat(model.parameters()), flat(twin.parameters())
    assert (a - b).norm() <= tolerance * b.norm()


@rules
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [0, 1])
def test_t14_an_exception_in_the_closure_restores_weights_and_gradients(rule, error, call):
    model = normed()
    optimizer = aware(model, rule, rho=0.5)
    x, y = torch.randn(8, 4, 4, dtype=torch.float64), batch()[1]
    optimizer.step(Evaluation(model, (x, y)))
    if isinstance(rule, LookSAM):
        optimizer.num_steps = 0
    closure = Evaluation(model, (x, y))
    closure()
    buffers = []
    before, gradients = flat(model.parameters()), [parameter.grad for parameter in model.parameters()]
    values = flat(gradients)
    calls = []

    def failing():
        if len(calls) == call:
            model(x)
            raise error
        calls.append(closure())
        buffers[:] = [buffer.clone() for buffer in model.buffers()]

    if call >= 1 and not rule.needs_gradient:
        return
    with pytest.raises(error):
        optimizer.step(failing)
    assert torch.equal(flat(model.parameters()), before)
    assert all(a.grad is b for a, b in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(flat(gradients), values)
    if call:
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    with pytest.raises(RuntimeError, match="nothing was evaluated uphill"):
        optimizer.step()
    trained_on = optimizer.step(Evaluation(model, (x, y)))
    assert torch.isfinite(trained_on)


@pytest.mark.parametrize("rule", [SAM(), KStepSAM(k=3, step=0.9)], ids=lambda rule: type(rule).__name__)
def test_t14_a_failure_on_the_way_up_or_down(rule, monkeypatch):
    """Where neither with nor the closure could help: a random state that cannot be put back, memory that runs out."""
    model = network()
    before = flat(model.parameters())
    for target in ("torch.set_rng_state", "sharpness_plugins.optimizers.making.climb"):
        optimizer = aware(model, rule, replay_rng=True)
        with monkeypatch.context() as patch:
            patch.setattr(target, lambda *args: (_ for _ in ()).throw(MemoryError("out")))
            with pytest.raises(MemoryError):
                optimizer.step(Evaluation(model))
        assert torch.equal(flat(model.parameters()), before)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_t14_by_hand_the_first_gradient_is_back():
    model = network()
    optimizer = aware(model, GSAM())
    Evaluation(model)()
    before, gradients = flat(model.parameters()), flat(p.grad for p in model.parameters())

    def interrupted():
        with optimizer.perturbed():
            Evaluation(model, batch(1))()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(flat(model.parameters()), before)
    assert torch.equal(flat(p.grad for p in model.parameters()), gradients)
    with pytest.raises(RuntimeError, match="nothing was evaluated uphill"):
        optimizer.step()


# --- both forms, refusals


@rules
def test_the_forms_give_the_same_training_bit_for_bit(rule):
    model, twin = network(), network()
    optimizer, other = aware(model, rule), aware(twin, rule)
    for number in range(7):
        optimizer.step(Evaluation(model, batch(number)))
        other.zero_grad()
        if rule.needs_gradient:
            Evaluation(twin, batch(number))()
        if (rule.ascents, rule.every) == (1, 1):
            with other.perturbed():
                Evaluation(twin, batch(number))()
        else:
            for ascent in other.ascents():
                with ascent:
                    Evaluation(twin, batch(number))()
        other.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


@rules
def test_an_adapter_that_leaves_the_step_to_the_trainer_gives_the_same(rule):
    model, twin = network(), network()
    base = sgd(twin)
    optimizer, sharp = aware(model, rule), SharpnessAware(base, rule, model=twin)

    def before_step(stepping, args, kwargs):
        for ascent in sharp.ascents():
            with ascent:
                closure()

    base.register_step_pre_hook(before_step)
    for number in range(7):
        optimizer.step(Evaluation(model, batch(number)))
        closure = Evaluation(twin, batch(number))
        base.zero_grad()
        closure()
        base.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    assert sharp.num_steps == optimizer.num_steps == 7


def test_a_step_that_cannot_be_right_is_refused_with_the_forms():
    model = network()
    optimizer = aware(model, SAM())
    Evaluation(model)()
    before = flat(model.parameters())
    with pytest.raises(RuntimeError, match=r"nothing was evaluated uphill") as caught:
        optimizer.step()
    assert "optimizer.step(closure)" in str(caught.value)
    assert "for ascent in optimizer.ascents():" in str(caught.value)
    assert torch.equal(flat(model.parameters()), before)
    with optimizer.perturbed():
        Evaluation(model)()
    optimizer.zero_grad()  # gives the step up
    Evaluation(model)()
    with pytest.raises(RuntimeError):
        optimizer.step()


@pytest.mark.parametrize(
    ("rule", "settings"), [(LookSAM(), {}), (SAM(), {"interval": 2}), (KStepSAM(k=2), {})], ids=["look", "interval", "k"]
)
def test_a_block_that_would_have_to_be_left_out_or_repeated_is_refused(rule, settings):
    model = network()
    optimizer = aware(model, rule, **settings)
    Evaluation(model)()
    with pytest.raises(ValueError, match="does not make one ascent in each step"), optimizer.perturbed():
        pass


def test_an_ascent_that_was_not_entered_is_told():
    model = network()
    optimizer = aware(model, SAM())
    Evaluation(model)()
    with pytest.raises(RuntimeError, match="was not entered"):
        list(optimizer.ascents())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: SharpnessAware(p, SAM()), TypeError, "base is an optimizer"),
        (lambda p: SharpnessAware(SGD(p, lr=0.1), SAM), TypeError, r"an instance such as SAM\(\)"),
        (lambda p: SharpnessAware(SharpnessAware(SGD(p, lr=0.1), SAM()), SAM()), TypeError, "first-order"),
        (lambda p: SharpnessAware(torch.optim.LBFGS(p), SAM()), TypeError, "LBFGS"),
        (lambda p: SharpnessAware(SGD(p, lr=0.1, maximize=True), SAM()), ValueError, "minimize the negative"),
        (lambda p: SharpnessAware(SGD(p, lr=0.1), SAM(), rho=-0.1), ValueError, "not negative, got -0.1"),
        (lambda p: SharpnessAware(SGD(p, lr=0.1), SAM(), rho=math.nan), ValueError, "got nan"),
        (lambda p: SharpnessAware(SGD(p, lr=0.1), SAM(), m=0), ValueError, "at least 1, got 0"),
        (lambda p: SharpnessAware(SGD(p, lr=0.1), SAM(), interval=0), ValueError, "at least 1, got 0"),
        (lambda p: SharpnessAware(SGD(p, lr=0.1), SAM(), perturb="each"), ValueError, "got 'each'"),
        (lambda p: ASAM(eta=-1), ValueError, "eta must be at least 0, got -1"),
        (lambda p: GSAM(alpha=-1), ValueError, "alpha"),
        (lambda p: WSAM(gamma=1.0), ValueError, "gamma"),
        (lambda p: FSAM(decay=1.0), ValueError, "decay"),
        (lambda p: LookSAM(k=0), ValueError, "k must be at least 1, got 0"),
        (lambda p: KStepSAM(step=2.0), ValueError, "step"),
        (lambda p: ProportionalToLearningRate(0.1, 0.0), ValueError, "lr_low < lr_high"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make([nn.Parameter(torch.ones(2))])


def test_momentum_sam_needs_a_momentum():
    model = network()
    optimizer = aware(model, MomentumSAM(), momentum=0.0)
    optimizer.step(Evaluation(model))
    with pytest.raises(ValueError, match="keeps none"):
        optimizer.step(Evaluation(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_refused_with_the_measured_cosine(dtype):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(10_000).to(dtype))
    optimizer = SharpnessAware(SGD([weight], lr=0.1), SAM(), rho=0.05)
    before = weight.detach().clone()
    weight.grad = torch.randn(10_000).to(dtype)
    move = 0.05 * weight.grad.double() / weight.grad.double().norm()
    made = (before.double() + move).to(dtype).double() - before.double()
    cosine = (made @ move / made.norm() / move.norm()).item()
    assert cosine < 0.999
    with pytest.raises(ValueError, match=f"cosine of {cosine:.3f}"), optimizer.perturbed():
        pass
    assert torch.equal(weight.detach(), before)


def test_sparse_gradients_are_refused():
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = SharpnessAware(SGD(layer.parameters(), lr=0.1), SAM())
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step(lambda: layer(torch.tensor([1, 2])).sum().backward())
    assert torch.equal(layer.weight.detach(), before)


# --- hostile cases


def test_frozen_parameters_stay():
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    for rule in RULES:
        trained(aware(model, rule, weight_decay=0.1), model, range(2))
    assert torch.equal(model[0].weight.detach(), before)


def test_complex_parameters_are_pairs_of_real_ones():
    start = torch.randn(4, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    weight, real = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start).clone())
    loss = lambda w: ((w - 1).abs() ** 4).sum() if w.is_complex() else ((w[..., 0] - 1) ** 2 + w[..., 1] ** 2).square().sum()  # noqa: E731
    models = [nn.ParameterList([one]) for one in (weight, real)]
    for rule in RULES:
        a, b = (aware(model, rule, rho=0.1, lr=0.01) for model in models)
        for _ in range(3):
            a.step(lambda: loss(weight).backward())
            b.step(lambda: loss(real).backward())
    torch.testing.assert_close(torch.view_as_real(weight.detach()), real.detach(), rtol=1e-10, atol=1e-12)


def test_a_parameter_shared_by_groups_is_refused_by_torch_and_tied_ones_are_one():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    model[1].weight = model[0].weight
    optimizer = aware(model, SAM())
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model[0].weight]})
    assert torch.isfinite(trained(optimizer, model, [])).all()
    optimizer.step(Evaluation(model, (batch()[0], batch()[1])))


def test_empty_parameters_and_no_gradients_at_all():
    empty, weight = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(3))
    both = nn.ParameterList([empty, weight])
    for rule in RULES:
        optimizer = aware(both, rule)
        optimizer.step(lambda: (weight.square().sum() + empty.sum()).backward())
        before = weight.detach().clone()
        none = aware(both, rule)
        none.step(lambda: torch.zeros(()))
        assert torch.equal(weight.detach(), before)


@rules
def test_a_zero_gradient_moves_nothing(rule):
    weight = nn.Parameter(torch.zeros(3))
    optimizer = SharpnessAware(SGD([weight], lr=0.1, momentum=0.9), rule)

    def closure():
        loss = (weight * 0).sum()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert torch.equal(weight.detach(), torch.zeros(3))
    assert optimizer.num_skipped == 0


@pytest.mark.parametrize("returned", [None, 1.5])
def test_closures_may_return_nothing_or_a_number(returned):
    model = network()
    optimizer = aware(model, SAM())

    def closure():
        optimizer.zero_grad()  # as torch's own closures do
        functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
        return returned

    assert optimizer.step(closure) == returned
    assert optimizer.surrogate_gap == (None if returned is None else 0.0)
    twin = network()
    aware(twin, SAM()).step(Evaluation(twin))
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_closures_that_clear_gradients_of_others_are_told():
    model, twin = network(), network()
    optimizer, other = aware(model, SAM()), aware(twin, SAM())

    def clearing(one, clears, number):
        def closure():
            clears()
            return Evaluation(one, batch(number))()

        return closure

    optimizer.step([clearing(model, optimizer.zero_grad, number) for number in range(3)])  # which does nothing there
    other.step([Evaluation(twin, batch(number)) for number in range(3)])
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    with pytest.raises(RuntimeError, match="cleared the gradients of those before it"):
        optimizer.step([clearing(model, model.zero_grad, number) for number in range(2)])
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_closures_with_a_penalty_on_the_gradient_add_up():
    model = network()
    optimizer = aware(model, SAM())

    def closure():
        loss = functional.cross_entropy(model(batch()[0]), batch()[1])
        loss.backward(create_graph=True)
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the cycle that this makes
        optimizer.step([closure, closure])
    twin = network()
    aware(twin, SAM()).step([Evaluation(twin), Evaluation(twin)])
    torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()), rtol=1e-12, atol=0)


def test_gradients_left_from_before_do_not_count():
    model, twin = network(), network()
    Evaluation(model, batch(5))()
    for one in (model, twin):
        aware(one, SAM()).step(Evaluation(one))
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_a_closure_runs_with_gradients_under_no_grad():
    model = network()
    before = flat(model.parameters())
    with torch.no_grad():
        aware(model, SAM()).step(Evaluation(model))
    assert not torch.equal(flat(model.parameters()), before)


def test_a_compiled_model():
    model, twin = network(), network()
    compiled = torch.compile(model, backend="eager")
    optimizer, plain = (aware(one, SAM()) for one in (model, twin))
    for number in range(3):
        optimizer.step(Evaluation(compiled, batch(number)))
        plain.step(Evaluation(twin, batch(number)))
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


# --- an optimizer like any other


def test_groups_and_state_are_those_of_the_base():
    model = network()
    base = sgd(model)
    optimizer = SharpnessAware(base, SAM())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "rho": 0.7})
    assert base.param_groups[1]["lr"] == 0.5
    assert [group["rho"] for group in base.param_groups] == [0.05, 0.7]
    optimizer.step(Evaluation(model))
    assert set(base.state) == set(model.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "SAM()" in repr(optimizer)


@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 2),
        lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=10),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    ],
    ids=["step", "one_cycle", "plateau", "cosine"],
)
def test_learning_rate_schedulers(make, on):
    model, twin = network(), network()
    optimizer, plain = aware(model, SAM(), rho=0.0), sgd(twin)
    scheduler, other = make(optimizer if on == "wrapper" else optimizer.base), make(plain)
    for number in range(6):
        optimizer.step(Evaluation(model, batch(number)))
        plain.zero_grad()
        loss = Evaluation(twin, batch(number))().detach()
        plain.step()
        for one in (scheduler, other):
            one.step(loss) if isinstance(one, lr_scheduler.ReduceLROnPlateau) else one.step()
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["momentum"] == plain.param_groups[0]["momentum"]
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_hooks_run_once_for_each_step():
    from torch.optim import optimizer as of_torch

    model = network()
    base = sgd(model)
    optimizer = SharpnessAware(base, KStepSAM(k=2))
    told = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: told.append("pre")),
        optimizer.register_step_post_hook(lambda *_: told.append("post")),
        base.register_step_pre_hook(lambda *_: told.append("base pre")),
        base.register_step_post_hook(lambda *_: told.append("base post")),
        of_torch.register_optimizer_step_pre_hook(lambda *_: told.append("global pre")),
        of_torch.register_optimizer_step_post_hook(lambda *_: told.append("global post")),
    ]
    optimizer.step(Evaluation(model))
    for handle in handles:
        handle.remove()
    assert sorted(told) == ["base post", "base pre", "global post", "global pre", "post", "pre"]
    assert (told[0], told[-1]) == ("pre", "post")


def test_a_hook_may_give_another_closure():
    model, twin = network(), network()
    optimizer = aware(model, SAM())
    optimizer.register_step_pre_hook(lambda me, args, kwargs: ((me, Evaluation(model, batch(3))), kwargs))
    optimizer.step(Evaluation(model))
    aware(twin, SAM()).step(Evaluation(twin, batch(3)))
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize("rule", [SAM(), WSAM(), FSAM(), LookSAM(k=3)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_a_copy_goes_on_alike_and_by_itself(rule, duplicate):
    model = normed(spectral=False)  # which torch does not pickle
    optimizer = aware(model, rule)
    lr_scheduler.StepLR(optimizer, 3)
    data = torch.randn(8, 4, 4, dtype=torch.float64), batch()[1]
    for _ in range(4):
        optimizer.step(Evaluation(model, data))
    twin, other = duplicate((model, optimizer))
    before = flat(twin.parameters())
    for _ in range(3):
        optimizer.step(Evaluation(model, data))
    assert torch.equal(flat(twin.parameters()), before)
    for _ in range(3):
        other.step(Evaluation(twin, data))
    assert torch.equal(flat(twin.parameters()), flat(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert other.num_steps == 7


def test_a_radius_of_a_groups_own_outlives_a_state_without():
    model = network()
    groups = [{"params": [model[0].weight], "rho": 0.7}, {"params": [model[0].bias]}]
    optimizer = SharpnessAware(SGD(groups, lr=0.1), SAM(), rho=lambda step: 0.2 + step, model=model)
    plain = SGD([{"params": [nn.Parameter(torch.ones(6, 4))]}, {"params": [nn.Parameter(torch.ones(6))]}], lr=0.3)
    optimizer.load_state_dict(plain.state_dict())
    assert [(group["lr"], group["rho"], group["rho_is_own"]) for group in optimizer.param_groups] == [
        (0.3, 0.7, True),
        (0.3, 0.2, False),
    ]


def test_a_step_that_is_given_up_is_not_counted():
    model = network()
    optimizer = aware(model, FSAM())
    trained(optimizer, model, range(2))
    memory = copy.deepcopy(optimizer.state_dict()["sharpness_aware"])
    Evaluation(model)()
    for ascent in optimizer.ascents():
        with ascent:
            Evaluation(model)()
            model[0].weight.grad[0, 0] = torch.inf
    assert not optimizer.is_finite()
    optimizer.give_up()
    model[0].weight.grad.zero_()
    optimizer.base.step()
    assert_same(optimizer.state_dict()["sharpness_aware"], memory)


def test_states_of_the_base_and_of_others():
    model = network()
    optimizer = aware(model, FSAM())
    trained(optimizer, model)
    plain = sgd(network())
    plain.load_state_dict(optimizer.state_dict())  # the base reads it
    assert len(plain.state) == 4
    fresh = SharpnessAware(sgd(network()), FSAM(), rho=0.3)
    fresh.load_state_dict(sgd(network()).state_dict())
    assert (fresh.num_steps, fresh.param_groups[0]["rho"]) == (0, 0.3)
    with pytest.raises(ValueError, match=r"the state is of FSAM.*this optimizer has GSAM"):
        SharpnessAware(sgd(network()), GSAM()).load_state_dict(optimizer.state_dict())
    later = optimizer.state_dict()
    later["sharpness_aware"]["version"] = 99
    with pytest.raises(ValueError, match="version 99"):
        fresh.load_state_dict(later)


def test_hooks_of_the_state():
    model = network()
    optimizer = aware(model, SAM())
    told = []
    optimizer.register_state_dict_pre_hook(lambda _: told.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "extra"})
    optimizer.register_load_state_dict_post_hook(lambda _: told.append("post"))
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert told == ["pre", "post"]


def test_the_base_does_not_keep_the_wrapper_alive_and_no_model_is_kept():
    import gc
    import weakref

    model = network()
    base = sgd(model)
    optimizer = SharpnessAware(base, SAM(), model=model)
    optimizer.step(Evaluation(model))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    Evaluation(model)()
    base.step()  # alone again


# --- ρ


def test_rho_per_group_as_a_plan_and_by_hand():
    a, b = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64))
    base = SGD([{"params": [a], "rho": 0.7}, {"params": [b]}], lr=0.1)
    optimizer = SharpnessAware(base, SAM(), rho=lambda step: 0.1 * (step + 1))
    for number in range(3):
        optimizer.zero_grad()
        (a.square().sum() + b.square().sum()).backward()
        before, gradients = [a.detach().clone(), b.detach().clone()], [a.grad, b.grad]
        norm = flat(gradients).norm()
        with optimizer.perturbed():
            for weight, start, gradient, rho in zip((a, b), before, gradients, (0.7, 0.1 * (number + 1)), strict=True):
                torch.testing.assert_close(weight.detach(), start + rho * gradient / norm, rtol=1e-13, atol=0)
            (a.square().sum() + b.square().sum()).backward()
        optimizer.step()
    assert optimizer.param_groups[1]["rho"] == pytest.approx(0.3)
    optimizer.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match=r"not negative, got -1\.0 in step 3"):
        optimizer.step(lambda: (a.sum() + b.sum()).backward())


def test_rho_follows_the_learning_rate():
    model = network()
    optimizer = aware(model, GSAM(), rho=ProportionalToLearningRate(high=0.4, lr_high=0.1, low=0.1, lr_low=0.02))
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for lr, rho in ((0.1, 0.4), (0.05, 0.2125), (0.025, 0.11875)):
        optimizer.step(Evaluation(model))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        assert optimizer.param_groups[0]["rho"] == pytest.approx(rho)
        scheduler.step()


# --- parts of a batch


@pytest.mark.parametrize("m", [1, 3, 5, 8, 100])
def test_m_sam_is_the_mean_over_parts_of_their_own_ascents(m):
    model, twin = network(), network()
    x, y = batch()
    optimizer = aware(model, SAM(), rho=0.4, m=m, momentum=0.0)
    loss = optimizer.step(BatchClosure(lambda part: functional.cross_entropy(model(part[0]), part[1]), (x, y)))
    torch.testing.assert_close(loss, functional.cross_entropy(twin(x), y).detach(), rtol=1e-12, atol=0)

    total = torch.zeros_like(flat(twin.parameters()))
    start = flat(twin.parameters())
    for rows in torch.arange(8).split(m):
        twin.zero_grad()
        functional.cross_entropy(twin(x[rows]), y[rows]).backward()
        g = flat(p.grad for p in twin.parameters())
        nn.utils.vector_to_parameters(start + 0.4 * g / g.norm(), twin.parameters())
        twin.zero_grad()
        functional.cross_entropy(twin(x[rows]), y[rows]).backward()
        nn.utils.vector_to_parameters(start, twin.parameters())
        total += flat(p.grad for p in twin.parameters()) * len(rows) / 8
    torch.testing.assert_close(flat(model.parameters()), start - 0.1 * total, rtol=1e-12, atol=1e-14)


def test_m_sam_of_several_ascents_per_part():
    model, twin = network(), network()
    x, y = batch()
    optimizer = aware(model, KStepSAM(k=3), rho=0.4, m=3, momentum=0.0)
    optimizer.step(BatchClosure(lambda part: functional.cross_entropy(model(part[0]), part[1]), (x, y)))
    start, total = flat(twin.parameters()), torch.zeros_like(flat(twin.parameters()))
    for rows in torch.arange(8).split(3):
        point = start
        for ascent in range(4):
            nn.utils.vector_to_parameters(point, twin.parameters())
            twin.zero_grad()
            functional.cross_entropy(twin(x[rows]), y[rows]).backward()
            g = flat(p.grad for p in twin.parameters())
            point = point + 0.4 / 3 * g / g.norm()
            total += g * len(rows) / 8 * (ascent == 3)
    torch.testing.assert_close(flat(model.parameters()), start - 0.1 * total, rtol=1e-12, atol=1e-14)


@rules
def test_m_does_not_depend_on_how_the_batch_came(rule):
    x, y = batch(size=12)
    results = []
    for sizes in ([12], [6, 6], [3, 9]):
        model = network()
        optimizer = aware(model, rule, m=3)

        def loss_fn(part, model=model):
            return functional.cross_entropy(model(part[0]), part[1])

        for _ in range(4):
            parts = zip(x.split(sizes), y.split(sizes), strict=True)
            optimizer.step([BatchClosure(loss_fn, part, weight=len(part[1]) / 12) for part in parts])
        results.append(flat(model.parameters()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-11, atol=1e-13)


def test_m_counts_gradients_of_parts():
    model = network()
    for rule, expected in ((SAM(), 8), (LookSAM(k=2), 12), (MomentumSAM(), 4)):
        calls = []

        def loss_fn(part, calls=calls):
            calls.append(len(part[1]))
            return functional.cross_entropy(model(part[0]), part[1])

        optimizer = aware(model, rule, m=2)
        optimizer.step(BatchClosure(loss_fn, batch()))
        if isinstance(rule, LookSAM):
            optimizer.step(BatchClosure(loss_fn, batch()))
        assert len(calls) == expected


def test_m_needs_a_batch_that_can_be_cut():
    model = network()
    optimizer = aware(model, SAM(), m=2)
    with pytest.raises(ValueError, match="m=2 cannot cut"):
        optimizer.step(Evaluation(model))
    with pytest.raises(ValueError, match="cannot be told how many samples"):
        optimizer.step(BatchClosure(lambda _: torch.zeros((), requires_grad=True), "text"))
    with pytest.raises(ValueError, match="m=2 takes a first gradient for each part"), optimizer.perturbed():
        pass
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step([])
    optimizer.step([Evaluation(model, batch(0)), Evaluation(model, batch(1))])
    assert optimizer.num_steps == 1


def test_gradient_and_step_are_one_step_with_something_between():
    model, twin = network(), network()
    optimizer, other = aware(model, GSAM()), aware(twin, GSAM())
    for number in range(3):
        optimizer.gradient(Evaluation(model, batch(number)))
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        optimizer.step()
        other.zero_grad()
        Evaluation(twin, batch(number))()
        with other.perturbed():
            Evaluation(twin, batch(number))()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        other.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


# --- what it tells


@pytest.mark.parametrize("rule", [SAM(), ASAM(), KStepSAM(k=2)], ids=lambda rule: type(rule).__name__)
def test_the_surrogate_gap_is_the_rise_of_the_loss_at_no_further_gradient(rule):
    model = network()
    optimizer = aware(model, rule, rho=0.3)
    assert optimizer.surrogate_gap is None
    assert optimizer.gradient_norm is None
    seen = []

    def closure():
        loss = Evaluation(model)()
        seen.append(loss.item())
        return loss

    loss = optimizer.step(closure)
    assert len(seen) == rule.gradients_per_step
    assert loss.item() == seen[0]
    assert optimizer.surrogate_gap == pytest.approx(seen[-1] - seen[0], rel=1e-12)
    assert optimizer.surrogate_gap > 0
    assert optimizer.gradient_norm > 0


def test_the_surrogate_gap_is_a_signal_of_a_monitor():
    from sharpness_plugins import SharpnessMonitor
    from sharpness_plugins.schedules import Progress

    model = network()
    optimizer = aware(model, SAM())
    monitor = SharpnessMonitor(model, [batch()], [], signals={"surrogate_gap": lambda: optimizer.surrogate_gap})
    optimizer.step(Evaluation(model))
    assert monitor.measure(Progress(1, 8, 0.0, 0, 0)).values["surrogate_gap"] == optimizer.surrogate_gap


# --- other bases, other rules


@pytest.mark.parametrize("rule", [SAM(), MomentumSAM(), WSAM(), FSAM()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: Adam(p, lr=0.01),
        lambda p: AdamW(p, lr=0.01, amsgrad=True),
        lambda p: Adam(p, lr=0.01, fused=True),
        lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
        lambda p: torch.optim.NAdam(p, lr=0.01),
        lambda p: AdamW(p, lr=torch.tensor(0.01)),
    ],
    ids=["adam", "amsgrad", "fused_adam", "fused_sgd", "nesterov", "nadam", "tensor_lr"],
)
def test_at_rho_zero_training_is_that_of_the_base(make, rule):
    if isinstance(rule, WSAM):
        rule = WSAM(gamma=0.5)
    model, twin = network(), network()
    optimizer = SharpnessAware(make(model.parameters()), rule, rho=0.0, model=model)
    plain = make(twin.parameters())
    for number in range(4):
        optimizer.step(Evaluation(model, batch(number)))
        plain.zero_grad()
        Evaluation(twin, batch(number))()
        plain.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_momentum_sam_around_adam_goes_along_its_mean():
    model = network()
    optimizer = SharpnessAware(Adam(model.parameters(), lr=0.01), MomentumSAM(), rho=0.5)
    optimizer.step(Evaluation(model))
    mean = flat(optimizer.state[parameter]["exp_avg"] for parameter in model.parameters())
    before = flat(model.parameters())
    optimizer.zero_grad()
    with optimizer.perturbed():
        torch.testing.assert_close(flat(model.parameters()), before - 0.5 * mean / mean.norm(), rtol=1e-12, atol=1e-14)
        Evaluation(model)()
    optimizer.step()


def test_a_rule_of_ones_own_with_all_three_hooks():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Own(Rule):
        state = ("last",)

        def metric(self, step):
            return [1 + weight.square() for weight in step.weights]

        def direction(self, step):
            return [gradient.sign() for gradient in step.gradients]

        def combine(self, step):
            last = step.state.get("last", [torch.zeros_like(g) for g in step.second])
            step.state["last"] = step.second
            made = [b + 0.5 * c - 0.1 * a for a, b, c in zip(step.gradients, step.second, last, strict=True)]
            return Descent(made, [0.01 * w for w in step.weights])

    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = SharpnessAware(SGD([weight], lr=0.1), Own(), rho=0.2)
    w, last = weight.detach().clone(), torch.zeros(3, dtype=torch.float64)
    for _ in range(3):
        optimizer.step(lambda: (weight**4).sum().backward())
        g = 4 * w**3
        t = 1 + w**2
        up = 4 * (w + 0.2 * t**2 * g.sign() / (t * g.sign()).norm()) ** 3
        w, last = w - 0.1 * (up + 0.5 * last - 0.1 * g) - 0.1 * 0.01 * w, up
        torch.testing.assert_close(weight.detach(), w, rtol=1e-12, atol=0)


def test_state_that_a_rule_did_not_declare_is_refused():
    class Forgetful(SAM):
        def combine(self, step):
            step.state["more"] = step.second
            return step.second

    model = network()
    with pytest.raises(ValueError, match="'more', which is not in its state"):
        aware(model, Forgetful()).step(Evaluation(model))


def test_perturbed_alone_and_the_optimizer_agree():
    model, twin = network(), network()
    optimizer, plain = aware(model, ASAM(eta=0.05), rho=0.3), sgd(twin)
    for number in range(3):
        optimizer.step(Evaluation(model, batch(number)))
        plain.zero_grad()
        Evaluation(twin, batch(number))()
        with perturbed(twin.parameters(), 0.3, adaptive=True, eta=0.05):
            Evaluation(twin, batch(number))()
        plain.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
