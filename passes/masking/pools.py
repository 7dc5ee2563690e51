"""Pools: max pooling of a graph in training, by native loops."""

import math
from collections.abc import Sequence

from torch import Tensor, fx, nn
from torch.nn.modules.utils import _pair

from passes.capture.leaves import has_hooks
from passes.kernels.pools import MOST, max_pool
from passes.masking.norms import are_images, may_run_natively


def call_pools_(graph: fx.Graph, module: nn.Module) -> None:
    """Let a graph call max pooling natively, in place.

    Args:
        graph: of a model in training.
        module: whose graph it is.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "call_module" and type(modules.get(str(node.target))) is nn.MaxPool2d and len(node.args) == 1:
            with graph.inserting_before(node):
                called = graph.get_attr(str(node.target))
                node.replace_all_uses_with(graph.call_function(pooled, (called, node.args[0])))
            graph.erase_node(node)


def pooled(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    """Run max pooling: natively where that computes the same.

    Args:
        pool: the module.
        x: its input.
    """
    usual = _pair(pool.dilation) == (1, 1) and not pool.ceil_mode and not pool.return_indices and not has_hooks(pool)
    kernel, stride, padding = map(_pair, (pool.kernel_size, pool.stride, pool.padding))
    if usual and are_images(x) and _fit(kernel, padding, x.shape[2:]) and may_run_natively([x]):
        return max_pool(x, kernel, stride, padding)
    return pool(x)


def _fit(kernel: Sequence[int], padding: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether windows fit the images; what does not is left to torch, which says so."""
    sides = zip(kernel, padding, sizes, strict=True)
    return math.prod(kernel) <= MOST and all(2 * around <= side <= size + 2 * around for side, around, size in sides)
