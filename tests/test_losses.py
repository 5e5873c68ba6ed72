"""Every rule against a closed form, and the same mean for any batching of the same samples."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sharpness_plugins.errors import LossRuleError
from sharpness_plugins.losses import call_model, logits_of, resolve_loss, unwrap
from sharpness_plugins.objective import Objective

BOTH_FIXES = r"Pass loss_fn=lambda model, batch: .* or criterion=torch\.nn\.CrossEntropyLoss\(\)"


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape, of, seed=0):
    return torch.randint(0, of, shape, generator=torch.Generator().manual_seed(seed))


class Given(nn.Module):
    """A model whose output is its input, so that a test writes down the logits."""

    def forward(self, x):
        return x


def split(batch, sizes):
    """The same samples in batches of these sizes."""
    if isinstance(batch, dict):
        parts = {key: torch.split(value, sizes) for key, value in batch.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(len(sizes))]
    return list(zip(*(torch.split(entry, sizes) for entry in batch), strict=True))


def mean_loss(model, batches, **given):
    rule = resolve_loss(model, batches[0], **given)
    with torch.no_grad():
        pairs = [rule.loss_fn(model, batch) for batch in batches]
    weights = [float(weight) for _, weight in pairs]
    return sum(w * loss.item() for w, (loss, _) in zip(weights, pairs, strict=True)) / sum(weights)


SIZES = [[12], [5, 7], [1] * 12, [8, 3, 1]]


# ---------------------------------------------------------------- rule 1: loss_fn


def test_loss_fn_is_weighted_by_samples():
    batch = (seeded(12, 3), seeded(12, 3, seed=1))

    def loss_fn(model, batch):
        return (model(batch[0]) - batch[1]).square().sum(1).mean()

    rule = resolve_loss(Given(), batch, loss_fn=loss_fn)
    assert rule.class_axis is None
    assert "loss_fn" in rule.description
    expected = (batch[0] - batch[1]).square().sum(1).mean().item()
    for sizes in SIZES:
        assert mean_loss(Given(), split(batch, sizes), loss_fn=loss_fn) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_loss_fn_may_tell_its_own_weight(as_tensor):
    x = seeded(12).exp()

    def weighted_mean(model, batch):
        weight = batch[0].sum()
        return (batch[0] * batch[0]).sum() / weight, weight if as_tensor else weight.item()

    expected = (x * x).sum().item() / x.sum().item()
    for sizes in SIZES:
        assert mean_loss(Given(), split((x,), sizes), loss_fn=weighted_mean) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (1.5, "returned a float, but the mean loss"),
        (None, "returned a NoneType"),
        (torch.ones(3), r"shape \(3,\).*reduction='mean'"),
        (torch.tensor(3), "int64 tensor"),
        (torch.tensor(1j), "complex64 tensor"),
        ((torch.tensor(1.0), torch.ones(2, 3)), r"reads as \(mean loss, weight\).*float32 tensor of shape \(2, 3\)"),
        ((torch.tensor(1.0), {"accuracy": 1}), "reads as .*'accuracy'"),
        ((torch.tensor(1.0), -1), "second entry is -1"),
        ((torch.tensor(1.0), math.nan), "second entry is nan"),
        ((torch.tensor(1.0), 1, 2), "a tuple of 3"),
        ([torch.tensor(1.0), 1], "a list of 2"),
    ],
    ids=str,
)
def test_wrong_answers_of_a_loss_fn_are_refused(answer, says):
    rule = resolve_loss(Given(), torch.ones(2), loss_fn=lambda model, batch: answer)
    with pytest.raises(LossRuleError, match=says):
        rule.loss_fn(Given(), torch.ones(2))


def test_a_loss_of_one_number_in_any_shape_is_a_scalar():
    rule = resolve_loss(Given(), torch.ones(2), loss_fn=lambda model, batch: batch[:1])
    loss, weight = rule.loss_fn(Given(), torch.ones(2))
    assert loss.shape == ()
    assert weight == 2


# ---------------------------------------------------------------- rule 2: criterion

CRITERIA = {
    "plain": {},
    "class weights": {"weight": torch.tensor([0.1, 2.0, 0.7, 5.0])},
    "ignored": {"ignore_index": 2},
    "smoothed": {"label_smoothing": 0.3},
    "all of it": {"weight": torch.tensor([0.1, 2.0, 0.7, 5.0]), "ignore_index": 2, "label_smoothing": 0.3},
}


@pytest.mark.parametrize("settings", CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize("spatial", [(), (3,), (2, 3)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_is_the_same_in_any_batching(settings, spatial, sizes, reduction):
    batch = (seeded(12, 4, *spatial), classes(12, *spatial, of=4))
    exact = {**settings, "weight": settings["weight"].double()} if "weight" in settings else settings
    expected = F.cross_entropy(*batch, **exact).item()
    criterion = nn.CrossEntropyLoss(**settings, reduction=reduction)
    assert mean_loss(Given(), split(batch, sizes), criterion=criterion) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("settings", [CRITERIA["plain"], CRITERIA["class weights"], CRITERIA["smoothed"]])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cross_entropy_on_probabilities_is_the_same_in_any_batching(settings, sizes):
    batch = (seeded(12, 4, 3), seeded(12, 4, 3, seed=1).softmax(1))
    exact = {name: value.double() if name == "weight" else value for name, value in settings.items()}
    expected = F.cross_entropy(*batch, **exact).item()
    assert mean_loss(Given(), split(batch, sizes), criterion=nn.CrossEntropyLoss(**settings)) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_other_criteria_are_the_same_in_any_batching(sizes):
    batch = (seeded(12, 3), seeded(12, 3, seed=1))
    mse = F.mse_loss(*batch).item()
    assert mean_loss(Given(), split(batch, sizes), criterion=nn.MSELoss()) == pytest.approx(mse, rel=1e-12)
    assert mean_loss(Given(), split(batch, sizes), criterion=F.mse_loss) == pytest.approx(mse, rel=1e-12)
    # a sum becomes the mean over samples
    assert mean_loss(Given(), split(batch, sizes), criterion=nn.MSELoss(reduction="sum")) == pytest.approx(
        3 * mse, rel=1e-12
    )
    binary = (batch[0], (batch[1] > 0).double())
    assert mean_loss(Given(), split(binary, sizes), criterion=nn.BCEWithLogitsLoss()) == pytest.approx(
        F.binary_cross_entropy_with_logits(*binary).item(), rel=1e-12
    )
    nll = nn.NLLLoss(weight=torch.tensor([0.1, 2.0, 0.7], dtype=torch.float64), ignore_index=1)
    log_probabilities = (batch[0].log_softmax(1), classes(12, of=3))
    assert (log_probabilities[1] == 1).any()
    assert mean_loss(Given(), split(log_probabilities, sizes), criterion=nll) == pytest.approx(
        nll(*log_probabilities).item(), rel=1e-12
    )


def test_elementwise_losses_of_sequences_of_different_lengths_are_weighted_by_elements():
    short, long = (seeded(2, 3), seeded(2, 3, seed=1)), (seeded(2, 7), seeded(2, 7, seed=1))
    squares = torch.cat([(x - y).square().reshape(-1) for x, y in (short, long)])
    assert mean_loss(Given(), [short, long], criterion=nn.MSELoss()) == pytest.approx(squares.mean().item(), rel=1e-12)


def test_cross_entropies_are_computed_in_float64():
    logits, targets = (100 * seeded(50, 4)).float(), classes(50, of=4)
    expected = F.cross_entropy(logits.double(), targets).item()
    for given in ({}, {"criterion": nn.CrossEntropyLoss()}, {"criterion": F.cross_entropy}):
        rule = resolve_loss(Given(), (logits, targets), **given)
        loss, _ = rule.loss_fn(Given(), (logits, targets))
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(expected, rel=1e-14)
        assert rule.class_axis == 1


def test_a_batch_without_any_valid_target_weighs_nothing():
    ignored = torch.full((3,), -100)
    loss, weight = resolve_loss(Given(), (seeded(3, 4), ignored)).loss_fn(Given(), (seeded(3, 4), ignored))
    assert loss.item() == 0.0
    assert float(weight) == 0.0


def test_criterion_names_itself_and_a_sum_says_so():
    pair = (seeded(2, 3), seeded(2, 3))
    assert resolve_loss(Given(), pair, criterion=nn.MSELoss()).description == "criterion MSELoss"
    assert "divided by its count" in resolve_loss(Given(), pair, criterion=nn.MSELoss(reduction="sum")).description


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ((seeded(2), seeded(2), seeded(2)), "a tuple of 3"),
        ({"x": seeded(2), "y": seeded(2)}, "a mapping with keys 'x', 'y'"),
        (seeded(2), r"float64 tensor of shape \(2,\)"),
    ],
)
def test_criterion_needs_pairs(batch, says):
    with pytest.raises(LossRuleError, match=f"pairs .inputs, targets.*{says}.*loss_fn=lambda"):
        resolve_loss(Given(), batch, criterion=nn.MSELoss())


def test_losses_that_are_none_are_refused():
    pair = (seeded(2, 3), classes(2, of=3))
    with pytest.raises(ValueError, match="both loss_fn and criterion"):
        resolve_loss(Given(), pair, loss_fn=lambda m, b: None, criterion=nn.MSELoss())
    with pytest.raises(TypeError, match="criterion must be callable, got 'mse'"):
        resolve_loss(Given(), pair, criterion="mse")
    with pytest.raises(TypeError, match=r"pass an instance: criterion=CrossEntropyLoss\(\)"):
        resolve_loss(Given(), pair, criterion=nn.CrossEntropyLoss)
    rule = resolve_loss(Given(), pair, criterion=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(LossRuleError, match=r"shape \(2,\).*reduction='mean'"):
        rule.loss_fn(Given(), pair)


# ---------------------------------------------------------------- rule 3: plugins


def test_a_plugin_is_asked_after_the_user_and_before_the_guesses():
    pair, asked = (seeded(2, 3), classes(2, of=3)), []

    def plugin_rule(model, batch, criterion):
        asked.append(criterion)
        return lambda model, batch: (torch.tensor(7.0), 3)

    rule = resolve_loss(Given(), pair, plugin_rule=plugin_rule)
    assert rule.description.startswith("plugin rule")
    assert [float(part) for part in rule.loss_fn(Given(), pair)] == [7.0, 3.0]
    resolve_loss(Given(), pair, criterion=nn.CrossEntropyLoss(), plugin_rule=plugin_rule)
    assert asked == [None]
    fallen_through = resolve_loss(Given(), pair, plugin_rule=lambda model, batch, criterion: None)
    assert "integer targets" in fallen_through.description


# ---------------------------------------------------------------- rule 5: integer targets


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_integer_targets_mean_cross_entropy(dtype, sizes):
    batch = (seeded(12, 4), classes(12, of=4).to(dtype))
    expected = -batch[0].log_softmax(1)[torch.arange(12), batch[1].long()].mean().item()
    assert mean_loss(Given(), split(batch, sizes)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("spatial", [(5,), (2, 5)])
def test_classes_may_be_on_axis_1_or_on_the_last(spatial):
    targets = classes(12, *spatial, of=4)
    logits = seeded(12, *spatial, 4)
    expected = F.cross_entropy(logits.reshape(-1, 4), targets.reshape(-1)).item()
    for given, axis in ((logits, logits.ndim - 1), (logits.movedim(-1, 1), 1)):
        rule = resolve_loss(Given(), (given, targets))
        assert rule.class_axis == axis
        for sizes in SIZES:
            assert mean_loss(Given(), split((given, targets), sizes)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("output", "targets", "says"),
    [
        (seeded(6, 4, 4), classes(6, 4, of=4), "leave it open which axis holds the classes"),
        (seeded(6, 4), classes(6, 4, of=2), "does not hold one score per class"),
        (seeded(6), classes(6, of=2), "does not hold one score per class"),
        (seeded(6, 4), classes(5, of=2), "does not hold one score per class"),
    ],
)
def test_shapes_that_fit_no_classes_are_refused_with_both_fixes(output, targets, says):
    with pytest.raises(LossRuleError, match=f"{says}.*{BOTH_FIXES}"):
        resolve_loss(Given(), (output, targets))


def test_targets_that_are_no_classes_are_refused():
    with pytest.raises(LossRuleError, match=r"one score per sample.*BCEWithLogitsLoss"):
        resolve_loss(Given(), (seeded(6, 1), classes(6, of=2)))
    with pytest.raises(LossRuleError, match=r"targets from 0 to 255 .* 4 classes.*ignore_index"):
        resolve_loss(Given(), (seeded(2, 4), torch.tensor([0, 255])))
    with pytest.raises(LossRuleError, match=r"samples and not batches.*DataLoader"):
        resolve_loss(Given(), (seeded(4), torch.tensor(1)))


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ((seeded(6, 4), seeded(6, 4)), r"a tuple of 2: \(float64 tensor of shape \(6, 4\); float64"),
        ((seeded(6, 4), torch.ones(6, dtype=torch.bool)), r"a tuple of 2: .*; bool tensor"),
        (seeded(6, 4), "float64 tensor"),
        ((seeded(6), classes(6, of=2), seeded(6)), "a tuple of 3"),
        ({"x": seeded(6)}, "a mapping with keys 'x'"),
        ("text", "a str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_rule_fits_is_refused_with_both_fixes(batch, says):
    with pytest.raises(LossRuleError, match=f"cannot tell the loss from batches of {says}.*{BOTH_FIXES}"):
        resolve_loss(Given(), batch)


# ---------------------------------------------------------------- rule 4: mappings with labels


def bert(**settings):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **settings
    )
    return BertForSequenceClassification(config).eval()


def gpt2(**settings):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **settings
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("kind", ["dict", "BatchEncoding"])
@pytest.mark.parametrize("key", ["labels", "label", "label_ids"])
def test_bert_classification(kind, key):
    from transformers import BatchEncoding

    model = bert(num_labels=3)
    batch = {
        "input_ids": classes(12, 5, of=20),
        "attention_mask": torch.ones(12, 5, dtype=torch.int64),
        key: classes(12, of=3),
    }
    expected = F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]).logits.double(), batch[key]).item()
    wrap = BatchEncoding if kind == "BatchEncoding" else dict
    for sizes in SIZES:
        batches = [wrap(part) for part in split(batch, sizes)]
        assert mean_loss(model, batches) == pytest.approx(expected, rel=1e-6)  # the model itself is float32
    rule = resolve_loss(model, batch)
    assert rule.description == "model(**batch).loss, a cross-entropy"
    assert rule.class_axis == 1


@pytest.mark.parametrize("spread", [1.0, 1e-3])  # the second is nearly uniform, as at the start of training
def test_gpt2_mean_is_over_the_tokens_of_all_batches(spread):
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(spread)
    tokens = classes(12, 6, of=20)
    labels = tokens.clone()
    for row, length in enumerate([2, 6, 3, 4, 5, 6, 2, 2, 3, 6, 6, 4]):
        labels[row, length:] = -100
    logits = model(tokens).logits.double()
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 20), labels[:, 1:].reshape(-1)).item()
    mean_of_means = F.cross_entropy(logits[:1, :-1].reshape(-1, 20), labels[:1, 1:].reshape(-1)).item()
    if spread == 1.0:
        assert abs(mean_of_means - expected) > 1e-3  # so the weighting is tested
    for sizes in SIZES:
        batches = split({"input_ids": tokens, "labels": labels}, sizes)
        assert "of the next token" in resolve_loss(model, batches[0]).description
        assert mean_loss(model, batches) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_answers_in_tuples_is_understood():
    model = bert(num_labels=3, return_dict=False)
    batch = {"input_ids": classes(12, 5, of=20), "labels": classes(12, of=3)}
    expected = model(**batch)[0].item()
    assert mean_loss(model, split(batch, [5, 7])) == pytest.approx(expected, rel=1e-6)


def test_a_loss_of_its_own_is_weighted_by_samples():
    model = bert(num_labels=1)  # regression: mean squared error
    batch = {"input_ids": classes(12, 5, of=20), "labels": seeded(12).float()}
    expected = F.mse_loss(model(batch["input_ids"]).logits[:, 0], batch["labels"]).item()
    assert resolve_loss(model, batch).description == "model(**batch).loss, weighted by samples"
    for sizes in SIZES:
        assert mean_loss(model, split(batch, sizes)) == pytest.approx(expected, rel=1e-6)


class OwnLoss(nn.Module):
    """Logits and a loss that is not their cross-entropy."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x, labels):
        return {"logits": x, "loss": self.loss(x, labels)}


@pytest.mark.parametrize(
    ("x", "labels", "loss"),
    [
        (seeded(6, 3), classes(6, of=3), lambda x, y: 2 * F.cross_entropy(x, y)),
        (seeded(6, 3), classes(6, of=3), lambda x, y: F.cross_entropy(x, y) * (1 + 3e-4)),
        (seeded(6, 1), classes(6, of=2), lambda x, y: F.binary_cross_entropy_with_logits(x[:, 0], y.double())),
        (seeded(6, 4, 2, 5), classes(6, 2, 5, of=4), lambda x, y: F.cross_entropy(x, y)),
        (seeded(6, 4, 2), classes(6, 8, of=4), lambda x, y: x.square().mean()),
    ],
    ids=["scaled", "with a small extra term", "binary", "classes on axis 1", "other shapes"],
)
def test_only_a_loss_that_is_the_cross_entropy_is_replaced_by_it(x, labels, loss):
    batch = {"x": x, "labels": labels}
    rule = resolve_loss(OwnLoss(loss), batch)
    assert rule.description == "model(**batch).loss, weighted by samples"
    mean, weight = rule.loss_fn(OwnLoss(loss), batch)
    assert mean.item() == pytest.approx(loss(x, labels).item(), rel=1e-12)
    assert weight == 6


class NoLoss(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("axis", [1, -1])
def test_a_model_without_a_loss_gets_the_cross_entropy_of_its_output(axis):
    logits, labels = seeded(12, 2, 5, 4), classes(12, 2, 5, of=4)
    expected = F.cross_entropy(logits.reshape(-1, 4), labels.reshape(-1)).item()
    batch = {"x": logits.movedim(-1, axis), "labels": labels}
    assert resolve_loss(NoLoss(), batch).class_axis == (1 if axis == 1 else 3)
    for sizes in SIZES:
        assert mean_loss(NoLoss(), split(batch, sizes)) == pytest.approx(expected, rel=1e-12)


def test_a_model_may_name_the_labels_as_the_batch_does():
    class Named(nn.Module):
        def forward(self, x, label):
            return {"loss": (x - label).square().mean()}

    x, label = seeded(12), seeded(12, seed=1)
    assert mean_loss(Named(), split({"x": x, "label": label}, [5, 7])) == pytest.approx(
        F.mse_loss(x, label).item(), rel=1e-12
    )


def test_mappings_that_the_model_does_not_take_are_refused():
    with pytest.raises(LossRuleError, match=rf"forward.*does not take a mapping with keys 'image', 'label'.*{BOTH_FIXES}"):
        resolve_loss(NoLoss(), {"image": seeded(2, 3), "label": classes(2, of=3)})
    with pytest.raises(LossRuleError, match=f"gives no loss.*{BOTH_FIXES}"):
        resolve_loss(NoLoss(), {"x": seeded(2, 3), "labels": seeded(2, 3)})


# ---------------------------------------------------------------- calling and unwrapping


class TwoInputs(nn.Module):
    def forward(self, a, b):
        return a + b


class OneInput(nn.Module):
    def forward(self, inputs):
        return inputs["a"] if isinstance(inputs, dict) else inputs[0]


def test_inputs_are_taken_apart_where_forward_takes_them_apart():
    a, b = seeded(3), seeded(3, seed=1)
    for inputs in ((a, b), [a, b], {"a": a, "b": b}):
        assert torch.equal(call_model(TwoInputs(), inputs), a + b)
        assert torch.equal(call_model(OneInput(), inputs), a)
    assert torch.equal(call_model(Given(), (a,)), a)
    assert torch.equal(call_model(Given(), a), a)


def test_nested_inputs_reach_the_model():
    batch = ({"a": seeded(12, 3), "b": seeded(12, 3, seed=1)}, classes(12, of=3))
    expected = F.cross_entropy(batch[0]["a"] + batch[0]["b"], batch[1]).item()
    rule = resolve_loss(TwoInputs(), batch)
    assert rule.loss_fn(TwoInputs(), batch)[0].item() == pytest.approx(expected, rel=1e-12)


def test_logits_are_found_in_what_models_return():
    logits = seeded(2, 3)

    class Output:
        pass

    output = Output()
    output.logits = logits
    for found in (logits, output, {"logits": logits}, (logits, "hidden"), [logits]):
        assert logits_of(found, "a rule") is logits
    for nothing in ({"scores": logits}, (), "text", None):
        with pytest.raises(LossRuleError, match="a rule needs logits"):
            logits_of(nothing, "a rule")


def test_wrappers_are_taken_off_in_any_order():
    model = nn.Linear(2, 2)
    assert unwrap(model) == (model, [])
    assert unwrap(nn.DataParallel(model)) == (model, ["DataParallel"])
    assert unwrap(torch.compile(model)) == (model, ["OptimizedModule"])
    assert unwrap(torch.compile(nn.DataParallel(model))) == (model, ["OptimizedModule", "DataParallel"])
    assert unwrap(nn.DataParallel(torch.compile(model))) == (model, ["DataParallel", "OptimizedModule"])


def test_a_model_that_has_a_part_called_module_is_no_wrapper():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert unwrap(model) == (model, [])


def test_messages_are_one_paragraph():
    with pytest.raises(LossRuleError) as caught:
        resolve_loss(Given(), (seeded(2, 3), [["deeply", {"nested": seeded(2)}]] * 9))
    assert not re.search(r"\n", str(caught.value))
    assert len(str(caught.value)) < 500


class _Answer:
    def __init__(self, loss, logits):
        self.loss, self.logits = loss, logits


class _OwnLoss(torch.nn.Module):
    """A model that computes a loss of its own, as Transformers' models do."""

    def __init__(self, loss):
        super().__init__()
        self.linear, self.own = torch.nn.Linear(4, 3), loss

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return _Answer(self.own(logits, labels), logits)


@pytest.mark.parametrize("case", ["weighted by class, seen in the second batch only", "ten times, at a tiny loss"])
def test_a_loss_that_only_looks_like_a_cross_entropy_is_not_taken_for_one(case):
    torch.manual_seed(0)
    cross_entropy = torch.nn.functional.cross_entropy
    x, y = torch.randn(12, 4), torch.arange(12) // 6
    if case.startswith("weighted"):
        weight = torch.tensor([1.0, 5.0, 1.0])

        def loss(logits, labels):
            return (cross_entropy(logits, labels, reduction="none") * weight[labels]).mean()

        model = _OwnLoss(loss)
    else:
        model = _OwnLoss(lambda logits, labels: 10 * cross_entropy(logits, labels))
        with torch.no_grad():
            model.linear.weight.zero_()
            model.linear.weight[:2, 0] = torch.tensor([20.0, -20.0])
            x[:, 0] = torch.where(y == 0, 1.0, -1.0)
    batches = [{"x": x[:6], "labels": y[:6]}, {"x": x[6:], "labels": y[6:]}]
    objective = Objective(model, batches)
    assert objective.loss_rule == "model(**batch).loss, weighted by samples"
    e = 0.5 * torch.ones(objective.dim)
    by_hand = _OwnLoss(model.own)
    with torch.no_grad():
        for mine, theirs in zip(by_hand.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs + 0.5)
    assert objective.value(e) == pytest.approx(by_hand(x, y).loss.item(), rel=1e-5)


def test_shapes_that_would_be_broadcast_are_refused():
    x = torch.randn(6, 4)
    with pytest.raises(LossRuleError, match=r"would be broadcast against each other.*y\[:, None\]"):
        Objective(torch.nn.Linear(4, 1), [(x, torch.randn(6))], criterion=torch.nn.MSELoss())
