"""Torch ops: what torch's functions and methods do with a tensor that they get."""

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_Places = dict[str, tuple[int, int | None]]

# Functions that multiply by a weight: (op, {argument name: (position, dimension of a matrix there that indexes outputs)}).
_CONV: _Places = {"weight": (1, 0)}
_TRANSPOSED: _Places = {"weight": (1, 1)}
_MATMUL: _Places = {"input": (0, 0), "other": (1, 1), "mat2": (1, 1)}
_UNKNOWN: _Places = {"input": (0, None), "other": (1, None), "a": (0, None), "b": (1, None)}
CONSUMERS: dict[Any, tuple[str, _Places]] = {
    F.linear: ("linear", {"weight": (1, 0)}),
    F.bilinear: ("bilinear", {"weight": (2, 0)}),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), ("conv", _CONV)),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), ("conv_transpose", _TRANSPOSED)),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), ("conv_transpose", _TRANSPOSED)),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, operator.matmul, torch.mv), ("matmul", _MATMUL)),
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__", "mv"), ("matmul", _MATMUL)),
    **dict.fromkeys((torch.addmm, "addmm", "addmm_"), ("matmul", {"mat1": (1, 0), "mat2": (2, 1)})),
    **dict.fromkeys((torch.baddbmm, torch.addbmm, "baddbmm"), ("matmul", {"batch1": (1, 0), "batch2": (2, 1)})),
    **dict.fromkeys((torch.tensordot, torch.inner, "inner", "__rmatmul__"), ("matmul", _UNKNOWN)),
}

# Looks at the same elements in another shape or number format, in which 0 stays 0.
VIEWS = frozenset(
    """view reshape permute transpose swapaxes swapdims t flatten unflatten unsqueeze squeeze chunk split tensor_split unbind
    expand contiguous movedim moveaxis view_as reshape_as expand_as broadcast_to to type type_as float half bfloat16 double
    clone detach""".split()
)
SLICES = frozenset(["getitem", "select", "narrow"])  # views where what they are told is constant
JOINING = frozenset(["cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"])
INDEXING = frozenset(
    """getitem index_select select narrow gather take take_along_dim embedding embedding_bag interpolate upsample
    grid_sample""".split()
)
# Reads a parameter without multiplying activations by it along a dimension; elementwise functions need not be named.
READERS = INDEXING | frozenset(
    """cat concat concatenate stack hstack vstack dstack repeat repeat_interleave tile roll flip rot90 pad size dim numel
    getattr layer_norm group_norm batch_norm instance_norm rms_norm local_response_norm normalize softmax log_softmax mean sum
    prod amax amin max min norm vector_norm var std var_mean cumsum cumprod logsumexp dropout where masked_fill masked_select
    index_add index_copy index_put scatter scatter_add masked_scatter copy_ broadcast_tensors meshgrid prelu
    scaled_dot_product_attention setitem is_floating_point expect_default""".split()
)
METADATA = frozenset(["shape", "dtype", "device", "ndim", "is_cuda", "requires_grad"])
_ALIASES = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "and": "bitwise_and", "or": "bitwise_or"}


@functools.cache
def is_pointwise(name: str) -> bool:
    """Whether the function or method of this name works element by element."""
    packet = getattr(torch.ops.aten, _ALIASES.get(name, name), None)
    packet = packet or getattr(torch.ops.aten, name.removeprefix("i"), None)  # operator.iadd
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def is_metadata(node: fx.Node) -> bool:
    """Whether a node asks what is known of a tensor before its values are."""
    return node.target in ("size", "dim", "numel") or (node.target is getattr and node.args[1] in METADATA)


def is_view(node: fx.Node) -> bool:
    """Whether a node only looks at its first input in another shape or number format."""
    if node.op not in ("call_method", "call_function") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is getattr:
        return node.args[1] in ("T", "mT", "data")
    name = name_of(node)  # what constants select is part of the weight; a tensor that data index is a table
    return name in VIEWS or (name in SLICES and len(node.all_input_nodes) == 1)


def writes_in_place(node: fx.Node, module: Any) -> bool:
    """Whether a node writes to its first input; `module` is what it calls, None where it calls no module."""
    in_place = getattr(module, "inplace", False) or node.kwargs.get("inplace") is True
    name = name_of(node)
    return bool(in_place) or (module is None and (name in ("iadd", "imul") or (name.endswith("_") and not name.endswith("__"))))


def name_of(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls, or of the module or attribute that it names."""
    target = getattr(node.target, "overloadpacket", node.target)  # of torch.ops
    return str(target if isinstance(target, str) else getattr(target, "__name__", target))
