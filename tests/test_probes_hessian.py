"""Curvature against a dense float64 Hessian."""

import copy
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cram_bench as cb


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    return model, [(torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))) for _ in range(3)]


def dense(model, x, y, kind):
    """The whole matrix, entry by entry from second derivatives, or Jᵀ (diag p − p pᵀ) J sample by sample."""
    model = copy.deepcopy(model).eval()
    names = list(dict(model.named_parameters()))
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def outputs(vector, inputs):
        pieces = [v.view(s) for v, s in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)]
        return torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (inputs,))

    if kind == "hessian":
        return torch.autograd.functional.hessian(lambda v: F.cross_entropy(outputs(v, x), y), flat)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for row in x:
        jacobian = torch.autograd.functional.jacobian(lambda v, row=row: outputs(v, row[None])[0], flat)
        p = outputs(flat, row[None])[0].softmax(0)
        total += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total / len(x)


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_eigenvalues_and_trace_against_the_dense_matrix(kind, problem):
    model, data = problem
    table = cb.probes.curvature(model, data, top=3, kind=kind, vectors=400, parts=3)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    matrix = dense(model, x, y, kind).detach()
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:3]
    found = table[table["quantity"] == "eigenvalue"]
    np.testing.assert_allclose(found["value"], expected, rtol=2e-3)
    assert found["rank"].tolist() == [1, 2, 3]
    direction = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    parts = [(x[i::3], y[i::3]) for i in range(3)]
    of_parts = [direction @ dense(model, *part, kind).detach() @ direction for part in parts]
    assert found["error"].iloc[0] == pytest.approx(float(torch.stack(of_parts).std() / 3**0.5), rel=0.02)
    trace = table[table["quantity"] == "trace"].iloc[0]
    assert trace["value"] == pytest.approx(float(matrix.trace()), rel=0.05)
    of_parts = [dense(model, *part, kind).detach() for part in parts]
    traces = torch.stack([part.trace() for part in of_parts])
    # Of signs v the variance of vᵀHv is twice the squares off the diagonal (Hutchinson, 1990); here 400 are averaged.
    noise = max(float((2 * (part - part.diag().diag()).square().sum() / 400).sqrt()) for part in of_parts)
    assert trace["error"] == pytest.approx(float(traces.std() / 3**0.5), abs=2 * noise / 3**0.5)


def test_data_in_the_order_of_their_classes_are_spread_over_the_parts():
    from cram_bench.probes.hessian import _split

    labels = torch.arange(4).repeat_interleave(25)  # 100 examples in three uneven batches
    batches = [(labels[a:b].float(), labels[a:b]) for a, b in ((0, 7), (7, 60), (60, 100))]
    parts = [torch.cat([y for _, y in piece]) for piece in _split(batches, 4)]
    assert [len(part) for part in parts] == [25] * 4
    assert all(part.bincount().min() >= 6 for part in parts)
    parts = _split(batches, 3)  # one is left over
    assert [sum(len(y) for _, y in piece) for piece in parts] == [33] * 3


def test_each_part_has_sign_vectors_of_its_own(problem):
    """Of parts that are alike the error of the trace is that of the vectors, and not nothing."""
    model, data = problem
    x, y = data[0]
    alike = [(x.repeat_interleave(4, 0), y.repeat_interleave(4))]
    trace = cb.probes.curvature(model, alike, vectors=5).iloc[-1]
    matrix = dense(model, x, y, "hessian").detach()
    noise = float((2 * (matrix - matrix.diag().diag()).square().sum() / 5).sqrt()) / 4**0.5
    assert 0.2 * noise < trace["error"] < 3 * noise


def test_the_density_integrates_to_one_and_lies_where_the_eigenvalues_are(problem):
    model, data = problem
    settings = {"points": 256, "lanczos": 24, "repeats": 2, "parts": 2}
    table = cb.probes.spectral_density(model, data, **settings)
    step = table["eigenvalue"].diff().iloc[1]
    assert table["density"].sum() * step == pytest.approx(1, abs=0.05)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    eigenvalues = torch.linalg.eigvalsh(dense(model, x, y, "hessian").detach())
    mean = (table["eigenvalue"] * table["density"]).sum() * step
    assert mean == pytest.approx(float(eigenvalues.mean()), abs=0.1 * float(eigenvalues[-1]))
    assert table["eigenvalue"].iloc[0] < eigenvalues[0] < eigenvalues[-1] < table["eigenvalue"].iloc[-1]
    assert (table["error"] >= 0).all()
    assert 0 < table["error"].max() < table["density"].max()
    again = cb.probes.spectral_density(model, data, **settings)
    assert np.array_equal(table, again)


def test_a_density_of_parts_that_are_alike_has_no_error_but_that_of_its_vectors(problem):
    """Where every part is all the data, more starting vectors leave less of an error; parts that differ keep theirs."""
    model, data = problem
    x, y = data[0]
    alike = [(x.repeat_interleave(2, 0), y.repeat_interleave(2))]
    same = cb.probes.spectral_density(model, alike, points=64, lanczos=20, repeats=2, parts=2)
    apart = cb.probes.spectral_density(
        model, [(x, (y + (torch.arange(20) % 2)) % 3)], points=64, lanczos=20, repeats=2, parts=2
    )
    assert same["error"].sum() / same["density"].sum() < apart["error"].sum() / apart["density"].sum()


def test_the_model_is_left_as_it_was_and_the_same_seed_gives_the_same(problem):
    model, data = problem
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    tables = [cb.probes.curvature(model, data, seed=3) for _ in range(2)]
    cb.probes.spectral_density(model, data, points=16, lanczos=8, repeats=1)
    assert np.array_equal(tables[0].drop(columns="quantity"), tables[1].drop(columns="quantity"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "fisher"}, "not 'fisher'"),
        ({"parts": 1}, "parts must be at least 2"),
        ({"parts": 61}, "60 samples"),
        ({"top": 0}, "not 0"),
    ],
)
def test_bad_input(changes, message, problem):
    model, data = problem
    with pytest.raises(ValueError, match=message):
        cb.probes.curvature(model, data, **changes)
    with pytest.raises(ValueError, match="empty"):
        cb.probes.curvature(model, [])


def test_a_model_with_attention_has_a_curvature_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))
    data = [(torch.randn(4, 3, 8), torch.arange(4) % 3), (torch.randn(3, 3, 8), torch.arange(3))]
    table = cb.probes.curvature(model, data, vectors=1, parts=2)
    assert np.isfinite(table["value"]).all()
    assert table["value"].iloc[0] > 0


def test_probing_a_convolutional_network_warns_of_nothing():
    torch.manual_seed(0)
    model = cb.models.create("convnet", 10, in_channels=1)
    data = [(torch.randn(4, 1, 8, 8), torch.arange(4))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cb.probes.curvature(model, data, vectors=1, parts=2)


def hessian_of(model, data, loss=None):
    from cram_bench.probes.double_backward import DoubleBackwardHessian

    trained = [p for p in model.eval().parameters() if p.requires_grad]
    return DoubleBackwardHessian(model, loss or nn.CrossEntropyLoss(), trained, data, check_deterministic=False)


def same_products(model, data, ours=None):
    """Compare products with those of curvlinops' own operator; return ours."""
    from curvlinops import HessianLinearOperator

    ours = ours or hessian_of(model, data)
    trained = [p for p in model.parameters() if p.requires_grad]
    theirs = HessianLinearOperator(model, nn.CrossEntropyLoss(), trained, data, check_deterministic=False)
    vectors = torch.randn(ours.shape[1], 3, dtype=torch.float64)
    for _ in range(2):  # the second time with what was kept
        assert torch.allclose(ours @ vectors, theirs @ vectors, rtol=1e-10, atol=1e-14)
        assert torch.allclose(ours @ vectors[:, 0], theirs @ vectors[:, 0], rtol=1e-10, atol=1e-14)
    return ours


def test_hessian_vector_products_are_those_of_curvlinops(problem):
    model, data = problem
    same_products(model, data[:1])
    same_products(model, data)
    x, y = data[0]
    same_products(model, [(x, y), (x, (y + 1) % 3)])  # the same inputs, other labels
    next(model.parameters()).requires_grad_(False)
    same_products(model, data)


@pytest.mark.parametrize(("batches", "forwards"), [(1, 1), (2, 2), (3, 9)])
def test_the_graphs_of_few_batches_are_kept(batches, forwards, problem):
    model, data = problem
    operator, seen = hessian_of(model, data[:batches]), []
    model.register_forward_hook(lambda *_: seen.append(1))
    for columns in (1, 4, 1):
        operator @ torch.ones(operator.shape[1], columns, dtype=torch.float64)
    assert len(seen) == forwards


def test_a_kept_graph_is_not_that_of_other_weights(problem):
    model, data = problem
    operator = same_products(model, data[:2])
    for changed in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        with torch.no_grad():
            changed.add_(0.1)
        same_products(model, data[:2], operator)


def test_a_kept_graph_goes_with_its_operator(problem):
    model, data = problem
    gc.disable()
    try:
        operator = hessian_of(model, data[:2])
        operator @ torch.ones(operator.shape[1], dtype=torch.float64)
        gone = weakref.ref(operator)
        del operator
        assert gone() is None
    finally:
        gc.enable()


def test_the_hessian_has_zeros_for_weights_that_the_loss_is_linear_in_or_does_not_see():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

        def forward(self, x):
            return self.used(x)

    class Straight(nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            return logits.mean()

    torch.manual_seed(0)
    data = [(torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,)))]
    same_products(Odd(), data)
    assert cb.probes.curvature(Odd(), data, vectors=2, parts=2)["value"].notna().all()
    flat = hessian_of(nn.Linear(5, 3).double(), data, Straight())
    assert not (flat @ torch.ones(18, dtype=torch.float64)).any()


def test_a_spectrum_that_has_no_density_is_refused():
    class Sum(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.ones(3)), scale

        def forward(self, x):
            return x @ torch.diag(self.weight) * self.scale

    data = [(torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4))]
    with pytest.raises(ValueError, match="the hessian of the loss is zero or not finite"):
        cb.probes.spectral_density(Sum(1e4), data)  # the softmax is exactly one
    with pytest.raises(ValueError, match="the hessian of the loss is zero or not finite"):
        cb.probes.spectral_density(
            nn.Linear(3, 50), [(torch.full((8, 3), torch.nan), torch.zeros(8, dtype=torch.long))]
        )
    with pytest.raises(ValueError, match="at least 2 parameters to train, and Linear has 1"):
        cb.probes.spectral_density(nn.Linear(1, 1, bias=False), [(torch.ones(4, 1), torch.zeros(4, dtype=torch.long))])


@pytest.mark.parametrize("name", ["curvature", "spectral_density", "sam_sharpness"])
def test_a_model_with_nothing_to_train_has_no_curvature(name, problem):
    model, data = problem
    with pytest.raises(ValueError, match="no parameter of Sequential has requires_grad"):
        getattr(cb.probes, name)(model.requires_grad_(False), data)
    with pytest.raises(TypeError, match="a torch model"):
        getattr(cb.probes, name)(None, data)
