"""What torch itself sees of a model's products: which parameters are multiplied, and how many multiplications there are."""

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# {operation: the positions of the arguments that it multiplies}
OPERANDS = {
    "aten.mm": (0, 1),
    "aten.bmm": (0, 1),
    "aten.mv": (0, 1),
    "aten.dot": (0, 1),
    "aten.vdot": (0, 1),
    "aten.linear": (0, 1),
    "aten.addmm": (1, 2),
    "aten.addmv": (1, 2),
    "aten.addbmm": (1, 2),
    "aten.baddbmm": (1, 2),
    "aten._addmm_activation": (1, 2),
    "aten._trilinear": (0, 1, 2),
    "aten._grouped_mm": (0, 1),
    "aten.convolution": (0, 1),
    "aten._convolution": (0, 1),
    "aten.mkldnn_rnn_layer": (0, 1, 2),
}


class Products(TorchDispatchMode):
    """Records the parameters that products multiply, directly or after being transformed by operations on parameters alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.multiplied: set[str] = set()
        self._known: dict[int, tuple[Tensor, frozenset[str]]] = {}  # the tensor is kept, so that its storage stays its own
        self._sizes = {name: weight.numel() for name, weight in model.named_parameters()}
        for tensor in model.buffers():
            self._known[_storage(tensor)] = (tensor, frozenset())
        for name, weight in model.named_parameters():
            self._known[_storage(weight)] = (weight, self._names(weight) | {name} if weight.dim() >= 2 else frozenset())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operands = [self._names(args[position]) for position in OPERANDS.get(str(func._overloadpacket), ())]
        self.multiplied |= next((names for names in reversed(operands) if names), frozenset())  # a query meets a weight
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if read and all(_storage(t) in self._known for t in read):
            names = frozenset().union(*(self._names(t) for t in read))
            several = sum(map(bool, operands)) > 1  # what a parameter times a weight is, is an activation
            self._follow(frozenset() if several else names, pytree.tree_leaves(output))
        return output

    def _follow(self, names: frozenset[str], outputs: list[Any]) -> None:
        """Remember what was computed from parameters alone; one of that size is transformed, and others only scale it."""
        for tensor in outputs:
            if isinstance(tensor, Tensor) and _storage(tensor) not in self._known:
                whole = frozenset(name for name in names if self._sizes[name] == tensor.numel())
                self._known[_storage(tensor)] = (tensor, whole or names)

    def _names(self, tensor: Tensor) -> frozenset[str]:
        return self._known.get(_storage(tensor), (tensor, frozenset()))[1]


class Uncounted(TorchDispatchMode):
    """Counts the multiplications of products that torch's own counter leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in ("mv", "dot", "vdot"):
            self.macs[name] += args[0].numel()
        elif name == "addmv":
            self.macs[name] += args[1].numel()
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            query, key, value = args[:3]
            self.macs[name] += query.shape[:-1].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])
        elif name == "_grouped_mm":
            self.macs[name] += args[0].numel() * args[1].shape[-1]
        elif name == "_trilinear":
            self.macs[name] += _broadcast(args)
        return output


def torch_macs(model: nn.Module, inputs: Any, call: Callable[[nn.Module, Any], Any]) -> tuple[int, Counter[str]]:
    """Return half of what torch's counter finds in one inference, and the MACs of products that it does not count.

    Recurrent layers run as plain products, for the counter does not look into the kernels that CPUs have for them.
    """
    uncounted = Uncounted()
    model.requires_grad_(False)  # the counter fails at modules that are given parameters which want gradients
    with (
        torch.no_grad(),
        torch.backends.mkldnn.flags(enabled=False),
        uncounted,
        FlopCounterMode(display=False) as counter,
    ):
        call(model, inputs)
    return counter.get_total_flops() // 2, uncounted.macs


def _broadcast(args: tuple[Any, ...]) -> int:
    """Return the elements of a trilinear product, before its sums."""
    expanded = [t.shape for t in _unsqueezed(args)]
    return prod(max(sizes) for sizes in zip(*expanded, strict=True))


def _unsqueezed(args: tuple[Any, ...]) -> list[Tensor]:
    tensors = []
    for tensor, dims in zip(args[:3], args[3:6], strict=True):
        for dim in dims:
            tensor = tensor.unsqueeze(dim)
        tensors.append(tensor)
    return tensors


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
