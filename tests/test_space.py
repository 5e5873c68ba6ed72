"""Which parameters are in the vector, and the way to views and back."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from sharpness_plugins.space import ParameterSpace


class Tied(nn.Module):
    """An embedding and an output layer with one weight, as in language models."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, tokens):
        return self.gain * self.head(self.norm(self.embed(tokens)))


def flat(*parameters):
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def snapshot(model):
    return {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}


def test_tied_weights_appear_once_and_scalars_count():
    model = Tied()
    space = ParameterSpace(model)
    assert space.names == ["gain", "embed.weight", "norm.weight", "norm.bias", "head.bias"]
    assert space.dim == 1 + 15 + 3 + 3 + 5 == space.num_parameters
    assert torch.equal(space.origin, flat(model.gain, model.embed.weight, *model.norm.parameters(), model.head.bias))


@pytest.mark.parametrize("select", ["embed.weight", "head.weight", "head.w*", lambda name, _: name == "head.weight"])
def test_tied_weights_are_selected_by_any_of_their_names(select):
    space = ParameterSpace(Tied(), select)
    assert space.names == ["embed.weight"]
    assert space.dim == 15


def test_both_uses_of_a_tied_weight_move():
    model = Tied().eval()
    space = ParameterSpace(model, "head.weight")
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.embed.weight += 1
    tokens = torch.tensor([0, 3])
    state = space.state(space.origin + 1)
    torch.testing.assert_close(functional_call(model, state, (tokens,)), moved(tokens))


def test_frozen_parameters_are_left_out():
    model = Tied()
    model.embed.weight.requires_grad_(False)
    space = ParameterSpace(model)
    assert space.names == ["gain", "norm.weight", "norm.bias", "head.bias"]
    assert (space.num_parameters, space.num_frozen) == (27, 15)
    assert space.ordinals == [0, 2, 3, 4]  # positions among all parameters, so that freezing shifts none


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("norm.*", ["norm.weight", "norm.bias"]),
        (("gain", "*.bias"), ["gain", "norm.bias", "head.bias"]),
        (["no such thing", "gain"], ["gain"]),
        (lambda name, p: p.ndim == 2, ["embed.weight"]),
        ("*", ["gain", "embed.weight", "norm.weight", "norm.bias", "head.bias"]),
    ],
)
def test_select_chooses_in_model_order(select, names):
    assert ParameterSpace(Tied(), select).names == names


@pytest.mark.parametrize(
    ("select", "says"),
    [
        ("haed.bias", "select='haed.bias' matches no trainable parameter.* Did you mean 'head.bias'"),
        ("norm", "Did you mean 'norm.*'"),
        ([], "select=\\[\\] matches no"),
        (lambda name, p: False, "Trainable: gain, embed.weight"),
    ],
)
def test_nothing_selected_is_an_error_that_helps(select, says):
    with pytest.raises(ValueError, match=says):
        ParameterSpace(Tied(), select)


@pytest.mark.parametrize("select", [5, [nn.Linear(1, 1).weight]])
def test_select_of_another_type_is_refused(select):
    with pytest.raises(TypeError, match="select must be None, a predicate"):
        ParameterSpace(Tied(), select)


def test_models_without_anything_to_perturb_are_refused():
    with pytest.raises(ValueError, match="no parameters"):
        ParameterSpace(nn.ReLU())
    with pytest.raises(ValueError, match="all 2 parameters of the model are frozen"):
        ParameterSpace(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="hold no numbers"):
        ParameterSpace(nn.ParameterList([torch.empty(0)]))


def test_parameters_without_values_are_refused():
    with pytest.raises(ValueError, match=r"parameter '0.weight' is not initialized yet"):
        ParameterSpace(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"buffer '1.running_mean' is not initialized yet"):
        ParameterSpace(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)))
    with pytest.raises(ValueError, match="parameter 'weight' is on the meta device"):
        ParameterSpace(nn.Linear(2, 2, device="meta"))
    # the parameters that are not perturbed are needed, too
    with pytest.raises(ValueError, match=r"parameter '1.weight' is not initialized"):
        ParameterSpace(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), "0.*")


def test_complex_parameters_are_refused_where_they_would_be_perturbed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"parameter '1.weight' is torch.complex64"):
        ParameterSpace(model)
    space = ParameterSpace(model, "0.*")
    assert space.state(space.origin)["1.weight"].dtype == torch.complex64


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_represented_in_float32(half):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(half)
    space = ParameterSpace(model)
    assert space.has_half
    assert space.origin.dtype == torch.float32
    state = space.state(space.origin + 1e-6)
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    assert not torch.equal(state["0.weight"], model[0].weight.float())  # a step that half precision would lose
    assert model[0].weight.dtype == half


def test_mixed_dtypes_keep_theirs_and_the_vector_holds_all():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).double())
    space = ParameterSpace(model)
    assert space.dtype == torch.float64
    assert not space.has_half
    pieces = space.split(space.origin)
    assert pieces["0.weight"].dtype == torch.float32
    assert pieces["1.weight"].dtype == torch.float64
    for name, parameter in model.named_parameters():
        assert torch.equal(pieces[name], parameter)


def test_split_undoes_the_concatenation_and_its_gradient_is_the_concatenation():
    model = Tied()
    space = ParameterSpace(model)
    vector = torch.randn(space.dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pieces = space.split(vector)
    assert [tuple(piece.shape) for piece in pieces.values()] == [tuple(shape) for shape in space.shapes]
    assert torch.equal(flat(*pieces.values()), vector)
    factors = [float(i + 1) for i in range(len(pieces))]
    sum(f * (piece**2).sum() for f, piece in zip(factors, pieces.values(), strict=True)).backward()
    per_element = torch.cat([torch.full((n,), f) for n, f in zip(space.numels, factors, strict=True)])
    torch.testing.assert_close(vector.grad, 2 * per_element * vector.detach())


def test_evaluating_on_a_state_leaves_the_model_untouched():
    model = Tied().train()  # BatchNorm writes to its statistics
    before = snapshot(model)
    space = ParameterSpace(model)
    state = space.state(space.origin.clone().requires_grad_())
    functional_call(model, state, (torch.tensor([0, 1, 2]),)).sum().backward()
    space.origin.zero_()
    for name, (tensor, version) in snapshot(model).items():
        assert torch.equal(tensor, before[name][0])
        assert version == before[name][1]
    assert all(parameter.grad is None for parameter in model.parameters())
    again = space.state(space.origin)
    assert torch.equal(again["norm.running_mean"], model.norm.running_mean)
    assert torch.equal(again["norm.num_batches_tracked"], torch.tensor(0))


def test_constants_carry_no_gradient():
    model = Tied()
    state = ParameterSpace(model, "gain").state(torch.zeros(1))
    assert set(state) >= {"embed.weight", "head.bias", "norm.running_var"}
    assert not state["embed.weight"].requires_grad


def test_weights_made_in_inference_mode_can_be_measured():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    space = ParameterSpace(model, "0.weight")
    leaf = space.origin.clone().requires_grad_()
    functional_call(model.eval(), space.state(leaf), (torch.ones(1, 2),)).sum().backward()
    assert leaf.grad is not None


def test_vectors_are_checked_and_converted():
    space = ParameterSpace(nn.Linear(2, 1).double())
    assert space.check(torch.ones(3), "vector").dtype == torch.float64
    with pytest.raises(ValueError, match=r"perturbation must have shape \(3,\).*got \(1, 3\)"):
        space.check(torch.ones(1, 3), "perturbation")
