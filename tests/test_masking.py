"""The mask rule and the rewrite: what a masked graph computes, and that the model stays a model."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import Functional, SmallNet
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from passes.masking.mask import Mask
from passes.masking.zeros import zero_dropped_
from sparsify import fold, graphs, sparsify

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def sparse_net(density: float = 0.3, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return sparsify(SmallNet(), density, **options)


GOLDEN = """\
graph():
    %x : torch.Tensor [num_users=1] = placeholder[target=x]
    %masked_conv1 : [num_users=1] = call_module[target=conv1](args = (%x,), kwargs = {})
    %bn : [num_users=1] = call_module[target=bn](args = (%masked_conv1,), kwargs = {})
    %relu : [num_users=1] = call_method[target=relu](args = (%bn,), kwargs = {})
    %masked_conv2 : [num_users=1] = call_module[target=conv2](args = (%relu,), kwargs = {})
    %relu_1 : [num_users=1] = call_method[target=relu](args = (%masked_conv2,), kwargs = {})
    %mean : [num_users=1] = call_method[target=mean](args = (%relu_1, (2, 3)), kwargs = {})
    %masked_fc : [num_users=1] = call_module[target=fc](args = (%mean,), kwargs = {})
    return masked_fc"""

GOLDEN_FUNCTIONAL = """\
graph():
    %x : torch.Tensor [num_users=1] = placeholder[target=x]
    %kernel : [num_users=1] = get_attr[target=kernel]
    %masked_kernel : [num_users=1] = call_module[target=kernel_mask](args = (%kernel,), kwargs = {})
    %conv2d : [num_users=1] = call_function[target=torch.conv2d](args = (%x, %masked_kernel), kwargs = {})
    %table : [num_users=1] = get_attr[target=table]
    %add : [num_users=1] = call_function[target=operator.add](args = (%conv2d, %table), kwargs = {})
    %mean : [num_users=1] = call_method[target=mean](args = (%add, (2, 3)), kwargs = {})
    %matrix : [num_users=1] = get_attr[target=matrix]
    %masked_matrix : [num_users=2] = call_module[target=matrix_mask](args = (%matrix,), kwargs = {})
    %matmul : [num_users=1] = call_function[target=operator.matmul](args = (%mean, %masked_matrix), kwargs = {})
    %masked_shared : [num_users=1] = call_module[target=shared](args = (%matmul,), kwargs = {})
    %masked_shared_1 : [num_users=1] = call_module[target=shared](args = (%masked_shared,), kwargs = {})
    %t : [num_users=1] = call_method[target=t](args = (%masked_matrix,), kwargs = {})
    %matmul_1 : [num_users=1] = call_function[target=operator.matmul](args = (%masked_shared_1, %t), kwargs = {})
    return matmul_1"""


@pytest.mark.parametrize(("model", "golden"), [(SmallNet, GOLDEN), (Functional, GOLDEN_FUNCTIONAL)])
def test_golden_graphs(model: type[nn.Module], golden: str) -> None:
    assert str(sparsify(model(), 0.5).graph) == golden


@pytest.mark.parametrize("model", [SmallNet, Functional])
def test_matches_a_hand_masked_network(model: type[nn.Module]) -> None:
    """Weights and gradients multiplied by the same mask in plain PyTorch follow the same trajectory for 200 steps."""
    torch.manual_seed(0)
    sparse = sparsify(model(), 0.3, method="static").train()
    plain = fold(sparse).train()
    masks = sparse.updater.masks
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9, weight_decay=1e-3) for m in (sparse, plain)]
    sparse.updater.attach(optimizers[0], total_steps=200)
    target = torch.randn(4, sparse(X).shape[1])
    for _ in range(200):
        for net, optimizer in zip((sparse, plain), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(net(X), target).backward()
            if net is plain:
                for name, mask in masks.items():
                    plain.get_parameter(name).grad.mul_(mask)
            optimizer.step()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(sparse.get_parameter(name), p, rtol=1e-4, atol=1e-6)


def test_it_is_a_graph_module_and_the_users_class() -> None:
    sparse = sparse_net().eval()
    assert isinstance(sparse, fx.GraphModule)
    assert isinstance(sparse, SmallNet)
    assert isinstance(sparse.conv1, nn.Conv2d)
    assert torch.equal(fx.Interpreter(sparse).run(X), sparse(X))
    ShapeProp(sparse).propagate(X)
    assert "masked_conv1" in sparse.print_readable(print_output=False)
    assert "density=" in repr(sparse)
    assert "masked_conv1 = self.conv1(x)" in str(sparse)
    assert "masked_conv1 = self.conv1(x)" in sparse.code
    assert list(graphs(sparse)) == [""]


def test_a_sequential_keeps_its_items() -> None:
    sparse = sparsify(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 0.5)
    assert len(sparse) == 3
    assert sparse[-1] is sparse.get_submodule("2")
    assert [type(m).__name__ for m in sparse] == ["MaskedLinear", "ReLU", "MaskedLinear"]
    assert len(sparse[:2]) == 2


def test_kept_weights_keep_their_values_and_the_model_is_a_copy() -> None:
    torch.manual_seed(0)
    dense = SmallNet()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    sparse = sparsify(dense, 0.3)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    for name, mask in sparse.updater.masks.items():
        assert torch.equal(sparse.get_parameter(name), torch.where(mask, before[name], 0))
    inplace = sparsify(dense, 0.3, inplace=True)
    assert inplace is dense
    assert torch.equal(inplace(X), sparse(X))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "save"])
@pytest.mark.parametrize("model", [SmallNet, Functional])
def test_copies(copier: object, model: type[nn.Module]) -> None:
    sparse = sparsify(model(), 0.3)
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)
    sparse.updater.attach(optimizer, total_steps=1000)
    if copier == "save":
        file = io.BytesIO()
        torch.save(sparse, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copier(sparse)
    for mode in (True, False):
        assert torch.equal(sparse.train(mode)(X), twin.train(mode)(X))
        assert str(twin.graph) == str(sparse.graph)
    assert type(twin) is type(sparse)
    assert twin.updater.masks.keys() == sparse.updater.masks.keys()
    assert twin.get_parameter(next(iter(twin.updater.masks))) is not sparse.get_parameter(next(iter(twin.updater.masks)))
    twin.updater.attach(torch.optim.SGD(twin.parameters(), 0.1), total_steps=1000)  # a copy is not attached


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    sparse = sparse_net().to(dtype)
    assert all(mask.dtype == torch.bool for mask in sparse.updater.masks.values())
    out = sparse.train()(X.to(dtype))
    out.sum().backward()
    assert out.dtype == sparse.fc.weight.grad.dtype == dtype


def test_channels_last() -> None:
    sparse = sparse_net().to(memory_format=torch.channels_last)
    assert sparse.conv1.weight_mask.mask.stride() == sparse.conv1.weight.stride()
    sparse(X.to(memory_format=torch.channels_last)).sum().backward()
    for name, mask in sparse.updater.masks.items():
        assert not sparse.get_parameter(name).grad[~mask].any()


def test_hooks_run_on_layers() -> None:
    sparse, seen = sparse_net(), []
    sparse.conv1.register_forward_hook(lambda *_: seen.append("layer"))
    sparse.register_forward_hook(lambda *_: seen.append("model"))
    sparse(X)
    assert seen == ["layer", "model"]


def test_hooks_that_were_there_go_on_running() -> None:
    model, seen = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    sparse = sparsify(model, 0.5)
    sparse(torch.randn(1, 4))
    sparse(torch.randn(1, 4))
    assert seen == [1, 1]
    assert set(sparse.updater.masks) == {"0.0.weight", "1.weight"}


def test_averaged_and_tampered_weights_stay_sparse() -> None:
    sparse = sparse_net()
    average = torch.optim.swa_utils.AveragedModel(sparse)
    average.update_parameters(sparse)
    with torch.no_grad():
        sparse.fc.weight.fill_(torch.nan)
        sparse.fc.weight[sparse.fc.weight_mask.mask] = 1.0
    assert sparse.eval()(X).isfinite().all()
    assert average.eval()(X).isfinite().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp itself
def test_torch_func() -> None:
    sparse = sparse_net(method="static").train()
    sparse.bn.eval()  # torch.func allows no running statistics
    parameters = dict(sparse.named_parameters())
    buffers = {k: b.clone() for k, b in sparse.named_buffers()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(sparse, (parameters, buffers), (X,)).square().mean()

    tangents = {name: torch.randn_like(value) for name, value in parameters.items()}
    masked = {n: torch.where(sparse.updater.masks[n], t, 0) if n in sparse.updater.masks else t for n, t in tangents.items()}
    _, slope = torch.func.jvp(loss, (parameters,), (tangents,))
    assert torch.equal(slope, torch.func.jvp(loss, (parameters,), (masked,))[1])
    torch.testing.assert_close(slope, sum((g * tangents[n]).sum() for n, g in torch.func.grad(loss)(parameters).items()))
    gradients = torch.func.grad(loss)(parameters)
    sparse(X).square().mean().backward()
    for name, p in sparse.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


def test_compile_makes_three_graphs_and_no_more() -> None:
    torch._dynamo.reset()
    sparse = sparse_net(method="rigl")
    compiled, count = torch.compile(sparse, fullgraph=True, backend="aot_eager"), torch._dynamo.utils.counters
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1, momentum=0.9)
    sparse.updater.attach(optimizer, total_steps=1000)
    count.clear()

    def train(steps: int) -> None:
        compiled.train()
        for _ in range(steps):
            optimizer.zero_grad()
            compiled(X).square().mean().backward()
            optimizer.step()

    @torch.no_grad()
    def evaluate() -> None:
        compiled.eval()
        assert torch.equal(compiled(X), sparse(X))
        assert count["stats"]["unique_graphs"] == 3

    train(101)  # an update at step 100
    evaluate()
    train(98)
    assert sparse.updater.gradients_are_dense
    evaluate()
    train(2)
    evaluate()
    assert all(torch.equal(sparse.get_parameter(n), sparse.get_parameter(n) * m) for n, m in sparse.updater.masks.items())


def test_fold_exports() -> None:
    sparse = sparse_net().eval()
    plain = fold(sparse)
    assert type(plain) is SmallNet
    assert list(plain.state_dict()) == list(SmallNet().state_dict())
    assert torch.equal(torch.export.export(plain, (X,)).module()(X), sparse(X))
    assert not plain._load_state_dict_pre_hooks
    assert sum(int((plain.get_parameter(n) != 0).sum()) for n in sparse.updater.masks) == sum(sparse.updater.nonzeros.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_zero_dropped(dtype: torch.dtype, layout: str) -> None:
    tensor = torch.randn(6, 5, 4, 3).to(dtype)
    tensor[0, 0] = torch.nan
    tensor[1, 1] = torch.inf
    mask = torch.rand(6, 5, 4, 3) < 0.5
    expected = torch.where(mask, tensor, 0)
    if layout == "channels_last":
        tensor, mask = (t.to(memory_format=torch.channels_last) for t in (tensor, mask))
    elif layout == "strided":
        tensor = tensor.repeat(1, 2, 1, 1)[:, ::2]
        expected = torch.where(mask, tensor, 0)
    assert zero_dropped_(tensor, mask) is tensor
    torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)


def test_gradients_shared_with_others_are_not_written() -> None:
    """A gradient that is differentiated again, or seen twice, must not be masked in place."""
    mask = Mask(torch.tensor([True, False]), 1)
    weight = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad((mask(weight) ** 3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), weight)
    assert gradient.tolist() == [3.0, 0.0]
    assert second.tolist() == [6.0, 0.0]


def test_a_batch_of_gradients_at_once() -> None:
    """As `torch.autograd.functional.jacobian(vectorize=True)` asks for them."""
    model = sparsify(nn.Sequential(nn.Linear(4, 3)), density=0.5)
    model.updater.attach(torch.optim.SGD(model.parameters(), 0.1), total_steps=1000)
    x, directions = torch.randn(5, 4), torch.randn(2, 5, 3)
    weight = model[0].weight
    (batched,) = torch.autograd.grad(model(x), weight, directions, is_grads_batched=True)
    one_by_one = torch.stack([torch.autograd.grad(model(x), weight, v)[0] for v in directions])
    torch.testing.assert_close(batched, one_by_one)
    assert not batched[:, ~model.updater.masks["0.weight"]].any()
