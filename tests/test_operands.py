"""Parameters that graphs read in every way: as they are, transformed, as tables, by operations nobody knows, in Python code."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from passes import find_sites, trace
from sparsify import RigL, flop_report, fold, graphs, sparsify

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
V = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class StdConv(nn.Conv2d):
    """A weight-standardised convolution (arXiv 1903.10520): its transformed weight is not 0 where the weight is."""

    def standardised(self, weight: Tensor) -> Tensor:
        flat = weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardised(self.weight), self.bias, padding=1)


def test_a_standardised_weight_is_masked_before_and_after() -> None:
    conv = StdConv(4, 8, 3)
    sparse = sparsify(nn.Sequential(conv), density=0.5)
    weight, mask = sparse.get_parameter("0.weight"), sparse.updater.masks["0.weight"]
    expected = F.conv2d(X, mask * conv.standardised(mask * conv.weight), conv.bias, padding=1)
    for training in (True, False):
        torch.testing.assert_close(sparse.train(training)(X), expected)
    report = flop_report(sparse, X)
    assert report.coverage == {"0.weight": "masked"}
    assert report.dense_macs == 2 * 36 * 4 * 8 * 9
    assert report.inference_ratio == 0.5

    # The gradient that decides growth is that of every element the transformed weight has, kept or not.
    sparse.train()(X).square().sum().backward()
    assert not weight.grad[~mask].any()
    leaf = weight.detach().clone().requires_grad_()
    value = conv.standardised(leaf)
    used = (value.detach() * mask).requires_grad_()
    F.conv2d(X, used, conv.bias, padding=1).square().sum().backward()
    value.backward(used.grad)
    weight.grad = None
    sparse[0].weight_mask.dense_gradient = True
    sparse(X).square().sum().backward()
    torch.testing.assert_close(weight.grad, leaf.grad)


PLAIN_KEYS = {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (parametrizations.weight_norm, "original1"),
        (parametrizations.spectral_norm, "original"),
        (parametrizations.orthogonal, "original"),
    ],
)
def test_a_parametrized_weight_is_masked_before_and_after(wrap: Callable[[nn.Module], nn.Module], name: str) -> None:
    model = nn.Sequential(wrap(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2))
    name = f"0.parametrizations.weight.{name}"
    same = sparsify(model, density=1.0)
    model.eval()
    torch.testing.assert_close(same.eval()(V), model(V))
    sparse = sparsify(model, density=0.5, method=RigL(interval=4))
    assert sparse.updater.masks.keys() == {name, "2.weight"}
    assert not sparse.updater.rules
    assert set(flop_report(sparse, V).coverage.values()) == {"masked"}
    used = sparse.eval()[0].weight * sparse.updater.masks[name]
    torch.testing.assert_close(sparse(V), sparse[2](F.relu(V @ used.T + sparse[0].bias)))
    optimizer = torch.optim.SGD(sparse.train().parameters(), 0.1, momentum=0.9)
    sparse.updater.attach(optimizer, total_steps=20)
    for _ in range(12):
        optimizer.zero_grad()
        sparse(V).square().mean().backward()
        optimizer.step()
    assert not sparse.get_parameter(name)[~sparse.updater.masks[name]].any()
    plain = fold(sparse.eval())
    torch.testing.assert_close(plain(V), sparse(V), rtol=0, atol=0)
    baked = sparse[0].weight[~sparse.updater.masks[name]].any()  # what is not 0 where it is dropped
    assert plain.state_dict().keys() == (PLAIN_KEYS if baked else model.state_dict().keys())


class Branching(nn.Module):
    """Python code that cannot be traced, around a parametrized layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


def test_a_parametrized_layer_inside_python_code() -> None:
    sparse = sparsify(Branching(), density=0.5, inputs=V)
    assert list(graphs(sparse)) == ["layer"]
    assert sparse.updater.masks.keys() == {"layer.parametrizations.weight.original1"}
    assert torch.equal(copy.deepcopy(sparse).eval()(V), sparse.eval()(V))


class Reads(nn.Module):
    """One parameter, read by one function."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight, self.fc, self.read = nn.Parameter(torch.randn(*shape)), nn.Linear(8, 8), read

    def forward(self, x: Tensor) -> Any:
        return self.read(self.fc(x), self.weight)


class MatMul(nn.Module):
    """A product that someone made a module of."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y


READS: dict[str, tuple[Callable[..., Any], tuple[int, ...], str]] = {  # function, shape of the weight, what becomes of it
    "linear": (F.linear, (5, 8), "masked"),
    "addmm": (lambda x, w: torch.addmm(x.new_zeros(1), x, w), (8, 5), "masked"),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), (8, 5), "masked"),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), (5, 8, 8), "masked"),
    "matmul-left": (lambda x, w: torch.matmul(w, x.t()), (5, 8), "masked"),
    "mv": (lambda x, w: torch.mv(w, x[0]), (5, 8), "masked"),
    "inner": (lambda x, w: torch.inner(x, w), (5, 8), "masked"),
    "views": (lambda x, w: F.linear(x, w.view(4, 8, 4).permute(0, 2, 1).reshape(16, 8)), (4, 32), "masked"),
    "chunks": (lambda x, w: x @ torch.chunk(w, 2, 1)[0], (8, 10), "masked"),
    "cast": (lambda x, w: x @ w.to(x.dtype).type_as(x)[None, ...].squeeze(0), (8, 5), "masked"),
    "softmax": (lambda x, w: F.linear(x, w.softmax(-1)), (5, 8), "masked"),
    "module": (MatMul(), (8, 5), "masked"),
    "joined": (lambda x, w: F.linear(x, torch.cat([w, w[:2]])), (5, 8), "masked"),
    "stack": (lambda x, w: x @ torch.stack([w, w]).sum(0), (8, 5), "masked"),
    "rows": (lambda x, w: x @ w[:8], (12, 5), "masked"),
    "narrowed": (lambda x, w: x @ w.narrow(1, 0, 2) + x @ w.select(1, 0)[:, None], (8, 5), "masked"),
    "one of three": (lambda x, w: x @ w[1], (3, 8, 5), "masked"),
    "times a mask": (lambda x, w: F.linear(x, w * torch.ones(5, 8).tril()), (5, 8), "masked"),
    "indexed": (lambda x, w: x @ w[torch.arange(8)], (12, 5), "table: it is indexed (getitem"),
    "resized": (lambda x, w: x @ F.interpolate(w[None], 5)[0], (8, 10), "table: it is indexed (interpolate"),
    "added": (lambda x, w: x + w, (3, 8), ""),
    "beside activations": (lambda x, w: torch.cat([x, w]), (2, 8), ""),
    "gated": (lambda x, w: x * torch.sigmoid(w) - w.abs(), (1, 8), ""),
    "output": (lambda x, w: (x, w), (8, 8), "unsupported: it leaves its graph as an output"),
}


@pytest.mark.parametrize("name", READS)
def test_what_reads_a_parameter_decides(name: str) -> None:
    read, shape, expected = READS[name]
    model = Reads(read, *shape)
    sparse = sparsify(model, density=0.5)
    accounted = {**sparse.updater.rules, **dict.fromkeys(sparse.updater.masks, "masked")}
    assert accounted.pop("fc.weight") == "masked"
    assert accounted.get("weight", "").startswith(expected)
    assert bool(accounted) == bool(expected)
    same = sparsify(model, density=1.0)
    for training in (True, False):
        expect, got = model.train(training)(V), same.train(training)(V)
        torch.testing.assert_close(got, expect, rtol=0, atol=0)
    flop_report(sparse, V)


UNKNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cdist": lambda x, w: torch.cdist(x, w),
    "kron": lambda x, w: torch.kron(w, x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_operation_nobody_knows_is_an_error_with_two_ways_out(name: str) -> None:
    model = Reads(UNKNOWN[name], 5, 8)
    with pytest.raises(ValueError, match=rf"^weight may be .*: {name} consumes it at node '{name}'.*exclude=.*include="):
        sparsify(model, density=0.5)
    assert sparsify(model, density=0.5, exclude="weight").updater.rules == {"weight": "excluded by 'weight'"}
    sparse = sparsify(model, density={"*": 0.5}, include="weight")
    assert sparse.updater.nonzeros == {"weight": 20, "fc.weight": 32}
    used = sparse.weight.detach() * sparse.updater.masks["weight"]
    with torch.no_grad():
        sparse.weight.add_(1.0 * ~sparse.updater.masks["weight"])
    with pytest.warns(UserWarning, match="Dropped weights were written to"):
        torch.testing.assert_close(sparse.eval()(V), UNKNOWN[name](sparse.fc(V), used))


def conv_same(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution whose padding depends on the size of its input, which cannot be traced."""
    return F.conv2d(F.pad(x, [1, 1, 1, 1]) if x.shape[-1] > 4 else x, weight)


class ConvSame(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return conv_same(x, self.weight - self.weight.mean())


def test_a_function_that_cannot_be_traced_stays_a_call_in_the_graph() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), ConvSame(4, 8, 3))
    sparse = sparsify(model, density=0.5, inputs=X)
    assert list(graphs(sparse)) == [""]
    assert [n.target for n in sparse.graph.nodes if n.op == "call_function"][-1] is conv_same
    assert sparse.updater.masks.keys() == {"0.weight", "1.weight"}
    for x in (X, X[..., :4, :4]):
        torch.testing.assert_close(sparsify(model, density=1.0)(x), model(x))
        for copied in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
            assert torch.equal(copied.eval()(x), sparse.eval()(x))


class Experts(nn.Module):
    """Weights that Python code picks by data, as mixtures of experts do; an embedding that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.more = nn.Parameter(torch.randn(4, 8, 8)), nn.ParameterList([torch.randn(8, 8)])
        self.embedding, self.fc = nn.Embedding(5, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x + self.embedding(torch.zeros(1, dtype=torch.long))) @ self.weight[int(x.sum() > 0)]
        return x @ self.more[0] @ self.embedding.weight.t()


def test_weights_that_python_code_reads() -> None:
    """A stack that is selected from is found in the source; a run finds the rest, or it is named."""
    model = Experts()
    sparse = sparsify(model, density=0.5)
    assert sparse.updater.masks.keys() == {"weight", "fc.weight"}
    assert sparse.updater.rules.keys() == {"more.0"}
    assert "unsupported" in sparse.updater.rules["more.0"]
    assert "inputs=" in sparse.updater.rules["more.0"]
    every = {"weight", "more.0", "embedding.weight", "fc.weight"}
    named = {"include": ["more.0", "embedding.weight"]}
    for options, names in (
        ({"inputs": V}, every),
        (named, every),
        ({"inputs": V, "exclude": "emb*"}, every - {"embedding.weight"}),
    ):
        sparse = sparsify(model, density=0.5, **options)
        assert sparse.updater.masks.keys() == names
        sparse(V).sum().backward()
        for name, mask in sparse.updater.masks.items():
            gradient = sparse.get_parameter(name).grad
            assert not gradient[~mask].any()
            assert gradient[mask].any()


class Relative(nn.Module):
    """A bias of two dimensions, and a query that a weight makes an activation of."""

    def __init__(self) -> None:
        super().__init__()
        self.rel, self.query, self.linear = (
            nn.Parameter(torch.randn(3, 3)),
            nn.Parameter(torch.randn(3, 8)),
            nn.Linear(8, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.rel, self.linear(x), self.linear(self.query).t())
        return x if x.sum() > 1e9 else x @ x


@pytest.mark.parametrize("inputs", [None, V])
def test_biases_and_queries_are_no_weights(inputs: Tensor | None) -> None:
    sparse = sparsify(Relative(), density=0.5, inputs=inputs)
    assert sparse.updater.masks.keys() == {"linear.weight"}


def test_experts_are_allocated_by_their_matrices() -> None:
    """ERK gives a stack of experts of 8 x 8 what it gives a layer of 8 x 8: both have the raw score 16 / 64."""
    model = Experts()
    sites = {site.name: site for site in find_sites(model, trace(model))}
    assert sites["weight"].matrix_shape == (8, 8)
    assert sites["weight"].shape == (4, 8, 8)
    densities = sparsify(model, density=0.25).updater.densities
    assert densities["weight"] == densities["fc.weight"] == 0.25
    report = flop_report(sparsify(model, density=0.25, inputs=V, exclude=["embedding.weight", "more.0"]), V)
    rows = {layer.name: layer for layer in report.layers}
    assert report.measured
    assert rows["weight"].dense_macs == 3 * 64  # the one expert that runs
    assert rows["weight"].sparse_macs == 3 * 16


def test_norm_gains_and_embeddings_are_masked_if_named() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    sparse = sparsify(model, density=0.5, include=["0.weight", "1.weight"])
    assert sparse.updater.masks.keys() == {"0.weight", "1.weight", "2.weight"}
    tokens = torch.arange(10)
    sparse(tokens).square().sum().backward()
    for name, mask in sparse.updater.masks.items():
        assert not sparse.get_parameter(name).grad[~mask].any()
    with pytest.raises(ValueError, match="include: pattern 'no' matches no weight"):
        sparsify(model, density=0.5, include="no")


INPUTS: dict[str, tuple[Any, str]] = {
    "keyword": ({"pixels": X}, "unexpected keyword argument 'pixels'|missing a required argument"),
    "too many": ((X, X), "too many positional arguments"),
    "list": ([X, X], "invalid combination of arguments - got .list"),
    "channels": ((1, 3, 6, 6), "node 'masked_0', module '0': Invalid channel dimensions"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_the_wrong_structure(name: str) -> None:
    inputs, message = INPUTS[name]
    model = sparsify(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()), density=0.5)
    with pytest.raises(ValueError, match=f"do not fit the model, at .*({message})"):
        flop_report(model, inputs)


class TwoShapes(nn.Module):
    """Returns another shape in training, as networks with auxiliary heads do, and uses a weight in one mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.more = nn.Linear(8, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return torch.cat([x, self.more(x)], 1) if self.training else x


def test_a_graph_per_mode_may_change_shape() -> None:
    sparse = sparsify(TwoShapes(), density=0.5, inputs=V)
    assert sparse.train()(V).shape == (3, 10)
    assert sparse.eval()(V).shape == (3, 4)
    rows = {layer.name: layer.dense_macs for layer in flop_report(sparse, V).layers}
    assert rows == {"fc.weight": 3 * 32, "more.weight": 0}
