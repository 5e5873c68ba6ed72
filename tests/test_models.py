"""Models as people have them, each measured with all three metrics, and against the paper's solver."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch import Tensor, nn

from sharpness_plugins import Kind, measure_sharpness
from sharpness_plugins.metrics import EpsilonBox, HessianTopK, RandomSubspace
from sharpness_plugins.objective import Objective

os.environ.setdefault("HF_HUB_OFFLINE", "1")

NUM_SAMPLES, NUM_CLASSES = 48, 4


def images(size: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Classes that differ in the mean of a colour and a corner, with noise."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(NUM_SAMPLES) % NUM_CLASSES
    x = torch.randn(NUM_SAMPLES, channels, size, size, generator=generator)
    x[:, 0] += y.view(-1, 1, 1) * 0.5
    x[:, -1, : size // 2, : size // 2] -= (y % 2).view(-1, 1, 1).float()
    return x, y


def tokens(length: int, vocabulary: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(NUM_SAMPLES) % NUM_CLASSES
    x = torch.randint(0, vocabulary, (NUM_SAMPLES, length), generator=generator)
    x[:, :2] = y[:, None]
    return x, y


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.rnn = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = images(6, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, NUM_CLASSES))
    return model, x, y


def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 3 * 3, NUM_CLASSES)), *images(12)


def batch_norm() -> tuple[nn.Module, Tensor, Tensor]:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(72, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, NUM_CLASSES)), *images(10)


def timm_vit() -> tuple[nn.Module, Tensor, Tensor]:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=NUM_CLASSES
    )
    return model, *images(16)


def timm_resnet() -> tuple[nn.Module, Tensor, Tensor]:
    import timm

    return timm.create_model("resnet10t", num_classes=NUM_CLASSES, channels=(8, 8, 16, 16), stem_width=8), *images(32)


def lstm() -> tuple[nn.Module, Tensor, Tensor]:
    return LSTM(), *tokens(6)


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    return Transformer(), *tokens(6)


ZOO = [mlp, cnn, batch_norm, timm_vit, timm_resnet, lstm, transformer]
_TRAINED: dict[object, tuple[nn.Module, list[tuple[Tensor, Tensor]]]] = {}


def trained(make, steps: int = 60) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The network after a few steps of Adam, in float32, and ragged batches of its training data."""
    if make not in _TRAINED:
        torch.manual_seed(0)
        model, x, y = make()
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        _TRAINED[make] = model, list(zip(x.split(20), y.split(20), strict=True))
    return _TRAINED[make]


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4])
@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
def test_the_default_solver_reaches_what_scipys_ten_iterations_reach(make, epsilon):
    model, loader = trained(make)
    metrics = {
        "ours": EpsilonBox(epsilon),
        "published": EpsilonBox(epsilon, "lbfgsb_published"),
        "scaled": EpsilonBox(epsilon, "lbfgsb"),
    }
    report = measure_sharpness(model, loader, metrics)
    assert report["ours"].status.kind is Kind.LOWER_BOUND
    assert report["ours"].value >= report["published"].value * (1 - 1e-4)
    assert report["ours"].value >= report["scaled"].value * (1 - 1e-4)


@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
def test_all_three_metrics_work_in_float32_without_a_warning(make):
    model, loader = trained(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = measure_sharpness(model, loader, ["epsilon_box", RandomSubspace(dim=20, draws=2), HessianTopK(k=2)])
    assert report["hessian_topk"].status.kind is Kind.CONVERGED
    assert report["hessian_topk"].details["eigenvalues"][0] > 0
    assert report["random_subspace"].value > 0
    assert not report.notes


@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
def test_hessian_vector_products_are_symmetric_and_differences_of_gradients(make):
    model, loader = trained(make)
    objective = Objective(model, loader)
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(objective.dim, generator=generator) for _ in range(2))
    hu, hv = objective.hvp(torch.stack([u, v]))
    assert (v @ hu).item() == pytest.approx((u @ hv).item(), rel=1e-3, abs=1e-3 * hu.norm().item())
    with objective.hvp_by("forward over reverse"):
        torch.testing.assert_close(objective.hvp(u), hu, rtol=1e-3, atol=1e-5 * hu.abs().max().item())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(36, 8)), nn.Tanh())
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.body, x.flatten(1), use_reentrant=False))


def checkpointed() -> tuple[nn.Module, Tensor, Tensor]:
    return Checkpointed(), *images(6, 1)


def weight_norm() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = images(6, 1)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(36, 8))
    return nn.Sequential(nn.Flatten(), normed, nn.Tanh(), nn.Linear(8, NUM_CLASSES)), x, y


@pytest.mark.parametrize("make", [*ZOO, checkpointed, weight_norm], ids=lambda make: make.__name__)
def test_every_architecture_keeps_its_graphs_and_another_way_confirms_the_products(make):
    model, loader = trained(make, steps=5)
    objective = Objective(model, loader)
    rows = torch.randn(2, objective.dim, generator=torch.Generator().manual_seed(2))
    fresh = objective.hvp(rows)
    with objective.session():
        for _ in range(2):
            torch.testing.assert_close(objective.hvp(rows), fresh, rtol=1e-5, atol=1e-6 * fresh.abs().max().item())
        assert objective.hvp_mode == "retained double backward"
        assert objective._products.num_kept == len(loader)
    confirmed = "differences of gradients in float64" if make is checkpointed else "forward over reverse"
    assert f"{confirmed} agree" in objective.hvp_check


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
@pytest.mark.parametrize("batch_norm_policy", ["eval", "batch"])
def test_batch_norm_in_both_modes_also_compiled_keeps_its_graphs_and_its_buffers(wrap, batch_norm_policy):
    model, loader = trained(batch_norm)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    plain, wrapped = (Objective(m, loader, batch_norm=batch_norm_policy) for m in (model, wrap(model)))
    v = torch.randn(plain.dim, generator=torch.Generator().manual_seed(2))
    expected = plain.hvp(v)
    with wrapped.session():
        for _ in range(2):
            torch.testing.assert_close(wrapped.hvp(v), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
        assert wrapped.hvp_mode == "retained double backward"
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrapped_models_are_unwrapped(wrap):
    model, loader = trained(mlp)
    plain = measure_sharpness(model, loader)
    wrapped = measure_sharpness(wrap(model), loader)
    assert {k: r.value for k, r in wrapped.items()} == {k: r.value for k, r in plain.items()}
    assert any("wrapped Sequential" in note for note in wrapped.notes)


def test_sparse_embeddings_are_measured_densely_and_left_sparse():
    torch.manual_seed(0)
    sparse = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2))
    dense = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    dense.load_state_dict(sparse.state_dict())
    loader = [(torch.randint(0, 10, (6, 3)), torch.arange(6) % 2)]
    metrics = ["epsilon_box", HessianTopK(k=1)]
    found, expected = (measure_sharpness(model, loader, metrics) for model in (sparse, dense))
    assert {k: r.value for k, r in found.items()} == {k: r.value for k, r in expected.items()}
    assert sparse[0].sparse


def test_checkpointed_and_spectrally_normalized_models():
    model, loader = trained(checkpointed, steps=5)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = measure_sharpness(model, loader, ["epsilon_box", HessianTopK(k=1)])
    assert report["hessian_topk"].details["hvp_mode"] == "retained double backward"
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_a_hugging_face_model_with_labels_and_tied_weights():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    x, y = torch.randint(0, 30, (8, 5)), torch.arange(8) % 3
    batches = [{"input_ids": x[i : i + 3], "labels": y[i : i + 3]} for i in (0, 3, 6)]
    report = measure_sharpness(model, batches, ["epsilon_box", HessianTopK(k=1)])
    model.eval()
    assert report.loss == pytest.approx(model(input_ids=x, labels=y).loss.item(), rel=1e-5)
    assert "model(**batch).loss" in report.provenance["loss_rule"]
    assert report["hessian_topk"].status.kind is Kind.CONVERGED
    assert "forward over reverse agrees" in report["hessian_topk"].details["hvp_check"]
    assert report["epsilon_box"].details["start_names"][1].startswith("class ")


def test_a_causal_language_model_is_weighted_by_tokens():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    x = torch.randint(0, 30, (5, 6))
    labels = x.clone()
    labels[1, 3:] = labels[4, 2:] = -100
    batches = [{"input_ids": x[i : i + 2], "labels": labels[i : i + 2]} for i in (0, 2, 4)]
    report = measure_sharpness(model, batches, ["epsilon_box", HessianTopK(k=1)])
    assert report.loss == pytest.approx(model(input_ids=x, labels=labels).loss.item(), rel=1e-5)
    assert "next token" in report.provenance["loss_rule"]
    names = [name for name, _ in model.named_parameters()]
    assert report.provenance["dim"] == sum(p.numel() for p in model.parameters())
    assert "lm_head.weight" not in names  # tied
    assert report["hessian_topk"].details["hvp_mode"] == "retained double backward"
    assert "forward over reverse agrees" in report["hessian_topk"].details["hvp_check"]


def test_nested_inputs_and_mapping_inputs():
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.a(left) + self.b(right)

    torch.manual_seed(0)
    model, left, right, y = TwoTowers(), torch.randn(6, 3), torch.randn(6, 4), torch.arange(6) % 2
    expected = nn.functional.cross_entropy(model(left, right), y).item()
    for inputs in ((left, right), [left, right], {"left": left, "right": right}):
        report = measure_sharpness(model, [(inputs, y)], "epsilon_box")
        assert report.loss == pytest.approx(expected, rel=1e-6)


def test_a_loss_function_that_uses_parts_of_the_model():
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(5, 2), "decoder": nn.Linear(2, 5)})
    x = torch.randn(7, 5)

    def reconstruction(model: nn.Module, batch: Tensor) -> Tensor:
        return (model["decoder"](torch.tanh(model["encoder"](batch))) - batch).square().mean()

    report = measure_sharpness(model, [x[:4], x[4:]], ["epsilon_box", HessianTopK(k=1)], loss_fn=reconstruction)
    assert report.loss == pytest.approx(reconstruction(model, x).item(), rel=1e-6)
    assert report["epsilon_box"].value > 0
