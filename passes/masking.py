"""Masking: the one place that knows what a masked weight does, and the rewrite that masks a captured model.

`Mask` owns one mask and its rule. A weight is reached in two ways: a module whose own code reads its weights becomes
`Masked<class>`, which runs the original forward with its weights replaced; a weight that a graph reads itself goes
through a `call_module weight_mask` node on its way to the consumer, and once more where it is transformed before use.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.capture import Capture, called_modules, is_builtin
from passes.operands import reads

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # elements: the widened mask of one chunk takes 4 MB, and few chunks mean few waits for the threads


def zero_dropped_(tensor: Tensor, mask: Tensor) -> Tensor:
    """Set `tensor` to exactly 0 where `mask` is False, in place; NaN and inf there become 0 too.

    On the CPU the bits are multiplied as integers, chunk by chunk: near memory speed and without a copy of the tensor
    (`masked_fill_` takes several times as long there, and float * bool lets NaN through).

    Args:
        tensor: floating point, any shape.
        mask: bool, the same shape.

    Returns:
        The same tensor.

    Example:
        >>> zero_dropped_(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    if not _can_mask_bits(tensor, mask):
        return tensor.masked_fill_(~mask, 0)
    bits, keep = (
        t.as_strided((t.numel(),), (1,)) for t in (tensor.view(_INTEGERS[tensor.element_size()]), mask.view(torch.int8))
    )
    for chunk, kept in zip(bits.split(_CHUNK), keep.split(_CHUNK), strict=True):
        chunk.mul_(kept)  # of integers, so that NaN * 0 is 0
    return tensor


def _can_mask_bits(tensor: Tensor, mask: Tensor) -> bool:
    dense = tensor.device.type == "cpu" and tensor.is_floating_point() and tensor.element_size() in _INTEGERS
    return dense and _same_layout(tensor, mask)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() and torch.ops.aten.is_non_overlapping_and_dense(a)


class MaskGradient(torch.autograd.Function):
    """Identity whose backward keeps the gradient of kept weights only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,), (grad,) = ctx.saved_tensors, grads
        # In place where nothing else can see it: a weight's gradient comes fresh out of its convolution or product.
        # A gradient that is itself differentiated, or one that broadcasts, is not ours to write.
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _can_mask_bits(grad, mask):
            return zero_dropped_(grad, mask), None
        return torch.where(mask, grad, 0), None


# torch binds the arguments of every `apply` to this signature; without it, it would work the signature out each time.
MaskGradient.forward.__signature__ = inspect.signature(MaskGradient.forward)  # pyright: ignore[reportFunctionMemberAccess]


class Mask(nn.Module):
    """One mask and its rule: how a weight is used in training, in evaluation, and when its gradient decides growth.

    The parameter is kept masked by whoever changes it, so training reads it as it is and masks its gradient. Evaluation
    applies the mask, so that averaged or tampered weights stay sparse. While `dense_gradient` is set, training returns
    the parameter itself and its `.grad` is dense.

    Args:
        mask: bool, the shape and strides of its weight.
        nonzeros: the number of True elements, which the host keeps so that nobody has to ask the device.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, nonzeros: int) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.nonzeros = nonzeros
        self.dense_gradient = False

    @property
    def density(self) -> float:
        """The kept fraction, in (0, 1]."""
        return self.nonzeros / self.mask.numel()

    def forward(self, weight: Tensor, transformed: bool = False) -> Tensor:
        """Return the weight as its consumer must see it in the current mode.

        Args:
            weight: the parameter, or what was computed from it.
            transformed: whether it was computed from it (standardised, normalised): nobody keeps such a value masked.
        """
        if transformed and self.training and self.dense_gradient:
            return weight - torch.where(self.mask, 0, weight).detach()  # masked; its gradient is not
        if transformed or not self.training:
            return torch.where(self.mask, weight, 0)
        return weight if self.dense_gradient else MaskGradient.apply(weight, self.mask)

    def extra_repr(self) -> str:
        """Name the density and the count."""
        return f"density={self.density:.4g}, {self.nonzeros} of {self.mask.numel()}"

    def __getstate__(self) -> dict[str, Any]:
        # The flag belongs to the optimizer that is attached; a copy has none.
        return {**vars(self), "dense_gradient": False}


class MaskedLeaf(nn.Module):
    """Mixin: runs the original forward of a torch.nn module with its masked weights in place of the parameters."""

    _masked: tuple[str, ...]  # the weights, by their names inside this module ("weight", "out_proj.weight")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module's own class."""
        parameters = []
        try:
            for name in self._masked:
                path, _, attribute = name.rpartition(".")
                owner = self.get_submodule(path) if path else self
                weight = owner._parameters[attribute]
                parameters.append((owner, attribute, weight))
                _replace(owner, attribute, getattr(owner, f"{attribute}_mask")(weight))
            return super().forward(*args, **kwargs)
        finally:
            for owner, attribute, weight in parameters:
                _replace(owner, attribute, weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_masked, (leaf_class(self),), self.__getstate__()


def _replace(owner: nn.Module, attribute: str, weight: Any) -> None:
    owner._parameters[attribute] = weight
    if isinstance(owner, nn.RNNBase):  # which reads its weights from a list beside its parameters
        owner._flat_weights[owner._flat_weights_names.index(attribute)] = weight


def leaf_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a masked torch.nn module had before."""
    return type(module).__bases__[1]


@functools.cache
def _masked_class(base: type[nn.Module]) -> type[MaskedLeaf]:
    @functools.wraps(base.forward)  # signature and module of the original, by which `is_builtin` goes
    def forward(self: MaskedLeaf, *args: Any, **kwargs: Any) -> Any:
        return MaskedLeaf.forward(self, *args, **kwargs)

    namespace = {"forward": forward, "__doc__": base.__doc__, "__module__": base.__module__}
    return type(f"Masked{base.__name__}", (MaskedLeaf, base), namespace)


def _new_masked(base: type[nn.Module]) -> MaskedLeaf:
    return nn.Module.__new__(_masked_class(base))


def masks_of(model: nn.Module) -> dict[str, Mask]:
    """Return the masks of a model by the name of the parameter each masks."""
    found: dict[nn.Parameter, tuple[str, Mask]] = {}
    for path, module in model.named_modules():  # in the order of named_parameters(), whose first name counts
        for attribute, weight in module._parameters.items():
            mask = module._modules.get(f"{attribute}_mask")
            if weight is not None and isinstance(mask, Mask):
                found.setdefault(weight, (f"{path}.{attribute}" if path else attribute, mask))
    return dict(found.values())


def mask_weights(model: nn.Module, capture: Capture, masks: Mapping[str, Mask]) -> nn.Module:
    """Rewrite a model and its captured graphs, in place, so that every weight in `masks` is used through its mask.

    Kept weights keep their values and dropped ones become 0. A mask is stored as the child `<weight>_mask` of every
    module that owns the weight, tied weights sharing one. Rewritten nodes are renamed `masked_...`.

    Args:
        model: the module that `capture` was traced from.
        capture: its graphs, not installed yet.
        masks: {parameter name: mask}.

    Returns:
        The same object.
    """
    by_weight = {model.get_parameter(name): mask for name, mask in masks.items()}
    for module in list(model.modules()):
        for attribute, weight in module._parameters.items():
            if weight is not None and weight in by_weight:
                module.add_module(f"{attribute}_mask", by_weight[weight])
    for weight, mask in by_weight.items():
        if not weight.is_meta:
            with torch.no_grad():
                zero_dropped_(weight, mask.mask)
        mask.train(model.training)
    for path in capture.leaves:
        _mask_leaf(model.get_submodule(path), by_weight)
    for path in capture.opaque:
        _mask_own(model.get_submodule(path), by_weight)
    for path, region in capture.regions.items():
        module = model.get_submodule(path)
        hidden = {target for target, leaf in called_modules(module, region.graphs) if _mask_leaf(leaf, by_weight)}
        for graph in dict.fromkeys(region.graphs.values()):
            _mask_transformed(module, graph, by_weight)
            _mask_reads(module, graph, by_weight)
            for node in [n for n in graph.nodes if n.op == "call_module" and n.target in hidden]:
                _rename_masked(node, node.name)
    return model


def _mask_leaf(leaf: nn.Module, masks: Mapping[nn.Parameter, Mask]) -> bool:
    """Make a torch.nn module run with its weights masked, and tell whether it has any."""
    return is_builtin(leaf) and _set_masked(leaf, tuple(name for name, p in leaf.named_parameters() if p in masks))


def _mask_own(module: nn.Module, masks: Mapping[nn.Parameter, Mask]) -> None:
    """Make a module whose Python code reads its own parameters run with them masked."""
    _set_masked(module, tuple(name for name, p in module.named_parameters(recurse=False) if p in masks))


def _set_masked(module: nn.Module, names: tuple[str, ...]) -> bool:
    if names and not isinstance(module, MaskedLeaf):
        module.__class__ = _masked_class(type(module))
        vars(module)["_masked"] = names
    return bool(names)


def _mask_transformed(module: nn.Module, graph: fx.Graph, masks: Mapping[nn.Parameter, Mask]) -> None:
    paths = {p: name for name, p in module.named_parameters(remove_duplicate=False)}
    values = {read.value: read.weight for read in reads(module, graph) if read.value and read.weight in masks}
    for value, weight in values.items():
        users = list(value.users)
        with graph.inserting_after(value):
            masked = graph.call_module(f"{paths[weight]}_mask", (value,), {"transformed": True})
        _rename_masked(masked, value.name)
        for user in users:
            user.replace_input_with(value, masked)


def _mask_reads(module: nn.Module, graph: fx.Graph, masks: Mapping[nn.Parameter, Mask]) -> None:
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        path, _, attribute = str(node.target).rpartition(".")
        weight = module.get_submodule(path)._parameters.get(attribute)
        if weight is None or weight not in masks:
            continue
        users = list(node.users)
        with graph.inserting_after(node):
            masked = graph.call_module(f"{node.target}_mask", (node,))
        _rename_masked(masked, node.name)
        for user in users:
            user.replace_input_with(node, masked)


def _rename_masked(node: fx.Node, name: str) -> None:
    node._rename(f"masked_{name.lstrip('_')}")
