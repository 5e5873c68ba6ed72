"""SAM on lists of tensors: reference against float64 and ``torch.optim.SGD``, Triton's interpreter against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

import kernel_harness as harness
from sharpness_plugins.kernels import dispatch, sam

RHO, ETA = 0.05, 0.01
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
PIECE = 2**15
SGD = [
    {},
    {"weight_decay": 1e-2},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-2},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    {"momentum": 0.5, "maximize": True, "weight_decay": 1e-2},
]


def tensors(dtype: torch.dtype, seed: int, sizes: tuple[int, ...] = (PIECE + 3,)) -> list[torch.Tensor]:
    """Contiguous, channels_last, transposed, with gaps, at an odd address, of no dimension, empty, and of ``sizes``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        normal(3, 5),
        normal(2, 3, 4, 4).to(memory_format=torch.channels_last),
        normal(7, 9).t(),
        normal(6, 10)[:, ::2],
        normal(1, 4).expand(3, 4) if seed % 2 else normal(3, 4),  # gradients may be expanded
        normal(50)[1:],
        normal(),
        normal(0, 3),
        *(normal(size) for size in sizes),
    ]


def poisoned(like: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.full_like(t, torch.nan, memory_format=torch.contiguous_format) for t in like]


def problem(dtype: torch.dtype, sizes: tuple[int, ...] = (PIECE + 3,)):
    weights, gradients = tensors(dtype, 0, sizes), tensors(dtype, 1, sizes)
    gradients[1] = gradients[1].contiguous()  # another order in memory than its weight
    return weights, gradients, poisoned(weights)


def flat(of: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.double().reshape(-1) for t in of])


@pytest.fixture(params=["as on this device", "multi-tensor", "piece by piece"])
def route(request, monkeypatch):
    """Each of the ways that plain torch goes, of which a CPU takes one and a GPU another."""
    if request.param != "as on this device":
        full = (torch.float32, torch.float64)

        def taken(weights, eta=None):
            return request.param == "multi-tensor" and (eta is None or weights[0].dtype in full)

        monkeypatch.setattr(sam, "_multi_tensor", taken)
        monkeypatch.setattr(sam, "_fused_step", taken)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eta", [None, ETA])
def test_ascent_is_what_the_formulas_say(dtype, eta, route):
    weights, gradients, backups = problem(dtype)
    w, g = flat(weights), flat(gradients)
    kept = [t.clone() for t in weights]
    addresses = [t.data_ptr() for t in weights]
    norm = sam.sam_ascent_(weights, gradients, backups, RHO, eta=eta)
    t = torch.ones_like(w) if eta is None else w.abs() + eta
    exact = (t * g).norm()
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(flat(weights), w + RHO * t**2 * g / exact, rtol=2 * eps, atol=2 * eps)
    assert all(torch.equal(a, b) for a, b in zip(backups, kept, strict=True))
    sam.restore_(weights, backups)
    assert all(torch.equal(a, b) for a, b in zip(weights, kept, strict=True))
    assert [t.data_ptr() for t in weights] == addresses


@pytest.mark.parametrize("eta", [None, ETA])
def test_its_two_halves_are_the_ascent(eta):
    whole, gradients, backups = problem(torch.float32)
    norm = sam.sam_ascent_(whole, gradients, backups, RHO, eta=eta)
    halves, _, others = problem(torch.float32)
    again = sam.global_norm(gradients, halves, eta=eta)
    assert torch.equal(again, norm)
    sam.perturb_(halves, gradients, others, again, RHO, eta=eta)
    assert all(torch.equal(a, b) for a, b in zip(whole + backups, halves + others, strict=True))


@pytest.mark.parametrize("gradient", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("eta", [None, ETA])
def test_without_a_finite_norm_the_weights_stay(gradient, eta, route):
    weights, gradients, backups = problem(torch.float32)
    kept = [t.clone() for t in weights]
    gradients = [torch.zeros_like(t) for t in gradients]
    gradients[0][1, 2] = gradient
    norm = sam.sam_ascent_(weights, gradients, backups, RHO, eta=eta)
    assert norm.item() == 0 if gradient == 0 else not norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(weights + backups, kept + kept, strict=True))


@pytest.mark.parametrize("eta", [None, ETA])
@pytest.mark.parametrize("pieces", [0, 1])
def test_an_interrupt_leaves_the_weights_as_they_were(eta, pieces, route, monkeypatch):
    """Also those of another dtype, which have moved already."""
    weights, gradients, backups = problem(torch.float32)
    for of, value in ((weights, 1.0), (gradients, 2.0), (backups, torch.nan)):
        of.insert(0, torch.full((5,), value, dtype=torch.float64))
    kept = [t.clone() for t in weights]
    norm = sam.global_norm(gradients, weights, eta=eta)
    left = pieces

    def interrupted(tensor):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return flat_of(tensor)

    def interrupted_step(*args, **settings):
        fused(*args, **settings)
        interrupted(torch.zeros(1))

    flat_of, fused = sam._flat, torch._fused_sgd_
    monkeypatch.setattr(sam, "_flat", interrupted)
    monkeypatch.setattr(torch, "_fused_sgd_", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        sam.perturb_(weights, gradients, backups, norm, RHO, eta=eta)
    assert all(torch.equal(a, b) for a, b in zip(weights, kept, strict=True))


def test_it_works_in_inference_mode():
    weights, gradients, backups = problem(torch.float32)
    expected = [t.clone() for t in weights]
    sam.sam_ascent_(expected, gradients, poisoned(weights), RHO)
    with torch.inference_mode():
        sam.sam_ascent_(weights, gradients, backups, RHO)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_dtypes_may_be_mixed():
    """One norm over all; every tensor moves as if all were float64."""
    weights = [torch.ones(5), torch.ones(4, dtype=torch.float64), torch.ones(3, dtype=torch.bfloat16)]
    gradients = [torch.full_like(w, 2.0) for w in weights]
    backups = poisoned(weights)
    norm = sam.sam_ascent_(weights, gradients, backups, RHO)
    assert norm.item() == pytest.approx(2 * 12**0.5, rel=1e-12)
    for weight in weights:
        expected = torch.full_like(weight, 1 + RHO * 2 / norm.item())
        torch.testing.assert_close(weight, expected, rtol=2 * torch.finfo(weight.dtype).eps, atol=0)
    sam.restore_(weights, backups)
    assert all((w == 1).all() for w in weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SGD, ids=str)
def test_restore_and_step_is_torchs_sgd_bit_for_bit(setting, dtype):
    """Against ``copy_`` and ``torch.optim.SGD`` without its fused form; three steps, the first fills the buffers."""
    eps = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0.0  # torch rounds there after every operation
    weights, gradients, backups = problem(dtype)
    norm = sam.sam_ascent_(weights, gradients, backups, RHO)
    assert norm.isfinite()
    expected = [torch.nn.Parameter(t.clone()) for t in backups]
    optimizer = torch.optim.SGD(expected, lr=0.1, foreach=False, fused=False, **setting)
    buffers = poisoned(weights) if "momentum" in setting else None
    for step in range(3):
        for parameter, gradient in zip(expected, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        sam.restore_sgd_(weights, backups, gradients, buffers, lr=0.1, first_step=step == 0, **setting)
        for found, parameter in zip(weights, expected, strict=True):
            torch.testing.assert_close(found, parameter.data, rtol=4 * eps, atol=4 * eps)
        backups = [parameter.detach().clone() for parameter in expected]
        gradients = [torch.cos(t) for t in gradients]
    if buffers is not None:
        stored = [optimizer.state[parameter]["momentum_buffer"] for parameter in expected]
        for found, buffer in zip(buffers, stored, strict=True):
            torch.testing.assert_close(found, buffer, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("setting", SGD, ids=str)
def test_restore_and_step_by_torchs_fused_sgd(setting, monkeypatch):
    """As on a GPU: what ``torch.optim.SGD(fused=True)`` gives, bit for bit."""
    monkeypatch.setattr(sam, "_multi_tensor", lambda weights, eta=None: True)
    weights, gradients, _ = problem(torch.float32)
    backups, expected = [t.clone() for t in weights], [torch.nn.Parameter(t.clone()) for t in weights]
    optimizer = torch.optim.SGD(expected, lr=0.1, fused=True, **setting)
    buffers = poisoned(weights) if "momentum" in setting else None
    for step in range(2):
        for parameter, gradient in zip(expected, gradients, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)  # of the same order, which the fused form needs
        optimizer.step()
        sam.restore_sgd_(weights, backups, gradients, buffers, lr=0.1, first_step=step == 0, **setting)
        for found, parameter in zip(weights, expected, strict=True):
            torch.testing.assert_close(found, parameter.data, rtol=0, atol=0)
        backups = [parameter.detach().clone() for parameter in expected]


def test_nothing_to_do():
    assert sam.sam_ascent_([], [], [], RHO).item() == 0
    assert sam.global_norm([torch.empty(0)]).item() == 0
    sam.restore_([], [])
    sam.restore_sgd_([torch.empty(0)], [torch.empty(0)], [torch.empty(0)], None, lr=0.1)


def test_parameters_that_require_gradients_are_moved_in_place():
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    weights, gradients = list(model.parameters()), [p.grad for p in model.parameters()]
    versions = [w._version for w in weights]
    sam.sam_ascent_(weights, gradients, [torch.empty_like(w) for w in weights], RHO)
    assert all(w.requires_grad and w.is_leaf for w in weights)
    assert all(w._version > v for w, v in zip(weights, versions, strict=True))  # so that autograd notices


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, g, b: sam.sam_ascent_(w, g[:1], b, RHO), "parallel"),
        (lambda w, g, b: sam.sam_ascent_(w, [x.double() for x in g], b, RHO), "alike"),
        (lambda w, g, b: sam.sam_ascent_(w, [x[:1] for x in g], b, RHO), "alike"),
        (lambda w, g, b: sam.restore_([x.to_sparse() for x in w], [x.to_sparse() for x in b]), "dense"),
        (lambda w, g, b: sam.restore_([x.long() for x in w], [x.long() for x in b]), "real"),
        (lambda w, g, b: sam.global_norm(g, eta=ETA), "weights"),
        (lambda w, g, b: sam.restore_sgd_(w, b, g, None, lr=0.1, momentum=0.9), "needs momentum_buffers"),
        (lambda w, g, b: sam.restore_sgd_(w, b, g, b, lr=0.1), "needs no momentum_buffers"),
        (lambda w, g, b: sam.restore_sgd_(w, b, g, None, lr=0.1, nesterov=True), "nesterov"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    w, g, b = ([torch.ones(2), torch.ones(3)] for _ in range(3))
    with pytest.raises(ValueError, match=message):
        call(w, g, b)


def dense(dtype: torch.dtype, sizes: tuple[int, ...]):
    """What the operators take: without gaps, of one order."""
    kept = [i for i in range(8) if i not in (3, 4, 7)] + list(range(8, 8 + len(sizes)))
    weights, gradients, _ = problem(dtype, sizes)
    gradients[1] = gradients[1].to(memory_format=torch.channels_last)
    weights, gradients = [weights[i] for i in kept], [gradients[i] for i in kept]
    return weights, gradients, [torch.full_like(w, torch.nan) for w in weights]


def arguments(name: str, dtype: torch.dtype, sizes: tuple[int, ...] = (2 * PIECE + 5,)):
    w, g, b = dense(dtype, sizes)
    m, empty = [torch.sin(t) for t in g], [torch.full_like(t, torch.nan) for t in g]
    norm, rho, eta, lr = (torch.tensor(x, dtype=torch.float64) for x in (7.0, RHO, ETA, 0.1))
    return {
        "sam_norm": (g, [], None),
        "sam_norm adaptive": (g, w, eta),
        "sam_perturb_": (w, g, b, norm, rho, None),
        "sam_perturb_ adaptive": (w, g, b, norm, rho, eta),
        "sam_ascent_": (w, g, b, rho, None),
        "sam_ascent_ adaptive": (w, g, b, rho, eta),
        "sam_restore_": (b, w),
        "sam_restore_sgd_": (b, w, g, m, lr, 0.9, 0.1, 0.01, False, True, False),
        "sam_restore_sgd_ nesterov": (b, w, g, m, lr, 0.9, 0.0, 0.01, True, False, False),
        "sam_restore_sgd_ first": (b, w, g, empty, lr, 0.9, 0.0, 0.0, False, False, True),
        "sam_restore_sgd_ plain": (b, w, g, [], lr, 0.0, 0.0, 0.0, False, False, False),
    }[name]


NAMES = ["sam_norm", "sam_norm adaptive", "sam_perturb_", "sam_perturb_ adaptive", "sam_ascent_", "sam_ascent_ adaptive"]
NAMES += [
    "sam_restore_",
    "sam_restore_sgd_",
    "sam_restore_sgd_ nesterov",
    "sam_restore_sgd_ first",
    "sam_restore_sgd_ plain",
]


def operation(name: str):
    return dispatch.operation(name.split()[0])


def lists_of(args) -> list[torch.Tensor]:
    return list(itertools.chain.from_iterable(arg for arg in args if isinstance(arg, list)))


@pytest.mark.parametrize("name", NAMES)
def test_operators_keep_torchs_rules(name):
    torch.library.opcheck(operation(name).overload, arguments(name, torch.float32, (5,)))


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_give_the_same_bits(name):
    first, second = arguments(name, torch.float32), arguments(name, torch.float32)
    results = [operation(name)(*args) for args in (first, second)]
    assert results[0] is None or torch.equal(*results)
    assert all(torch.equal(a, b) for a, b in zip(lists_of(first), lists_of(second), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [(), (1,), (3, 0)])
@pytest.mark.parametrize("name", NAMES)
def case_kernel_equals_reference(name, blocks, dtype):
    """Bit for bit where nothing depends on a sum or a fused multiply-add of torch's."""
    from sharpness_plugins.kernels import blocks as blocking

    sizes = tuple(n * blocking.size(torch.empty(0, dtype=dtype)) + 5 for n in blocks)
    first, second = arguments(name, dtype, sizes), arguments(name, dtype, sizes)
    expected, found = operation(name).reference(*first), operation(name)(*second)
    if expected is not None:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    exact = dtype in (torch.float32, torch.float64) and name in ("sam_perturb_ adaptive", "sam_restore_")
    rounding = (4 if dtype in (torch.float32, torch.float64) else 2) * torch.finfo(dtype).eps
    for a, b in zip(lists_of(first), lists_of(second), strict=True):
        torch.testing.assert_close(b, a, rtol=0 if exact else rounding, atol=0 if exact else rounding)
    assert not any(t.isnan().any() for t in lists_of(second))


@pytest.mark.parametrize("gradient", [0.0, torch.nan, torch.inf])
def case_without_a_finite_norm_the_weights_stay(gradient):
    weights, gradients, backups = problem(torch.float32, (5,))
    kept = [t.clone() for t in weights]
    gradients = [torch.zeros_like(t) for t in gradients]
    gradients[0][1, 2] = gradient
    sam.sam_ascent_(weights, gradients, backups, RHO)
    assert all(torch.equal(a, b) for a, b in zip(weights + backups, kept + kept, strict=True))


def case_lists_of_every_layout():
    """With gaps, expanded, of other order than the weight, empty: as the reference, and nothing else is written."""
    from sharpness_plugins.kernels import dispatch

    results = []
    for choice in ("torch", "triton"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(dispatch.VARIABLE, choice)
            weights, gradients, backups = problem(torch.float32, (4101,))
            gaps = weights[3]._base[:, 1::2].clone()
            sam.sam_ascent_(weights, gradients, backups, RHO, eta=ETA)
            assert torch.equal(weights[3]._base[:, 1::2], gaps)
            results.append(weights + backups)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@harness.needs_triton
def test_the_interpreter_agrees():
    assert harness.run_in_interpreter(__file__) >= 3 * 3 * len(NAMES)


KERNELS = {  # vectors read and written by a whole block
    "squares_kernel": (1, 0),
    "squares_kernel adaptive": (2, 0),
    "perturb_kernel": (2, 2),
    "perturb_kernel adaptive": (2, 2),
    "restore_kernel": (1, 1),
    "restore_sgd_kernel": (3, 2),
}


@harness.needs_triton
@pytest.mark.parametrize("architecture", harness.ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_spill_nothing_and_read_128_bits_at_once(name, dtype, architecture):
    from sharpness_plugins.kernels import blocks, sam_triton

    kernel = getattr(sam_triton, name.split()[0])
    types = dict.fromkeys(("table", "lengths", "places"), "*i64")
    types |= dict.fromkeys(("num_tensors", "num_blocks", "num_squares"), "i32")
    like = torch.empty(0, dtype=dtype)
    constants = {"BLOCK": blocks.size(like), "element": sam_triton.ELEMENTS[dtype], "dtype": blocks.dtype_of(like)}
    constants |= {"MAX_PARTIALS": blocks.MAX_PARTIALS}
    constants |= {"DECAY": True, "MOMENTUM": True, "NESTEROV": True, "MAXIMIZE": True, "FIRST": False}
    if "adaptive" not in name:
        constants |= {"eta_at": None, "squares": None}
    found = harness.compile_for(kernel, architecture, {a: types.get(a, "*fp64") for a in kernel.arg_names}, constants)
    found.assert_sound()
    read, written = KERNELS[name]
    wide = harness.wide_accesses(constants["BLOCK"], dtype)
    assert (found.ptx_loads[128], found.ptx_stores[128]) == (read * wide, written * wide)
    if (architecture, dtype) == (90, torch.float32):
        assert (found.loads[128], found.stores[128], found.spilled) == (read * wide, written * wide, 0)
