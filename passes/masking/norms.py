"""Norms: batch normalisations of a graph in training, one pass over memory with the addition and the ReLU that follow them."""

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.capture.leaves import has_hooks
from passes.kernels.compiler import native
from passes.kernels.norms import normalize
from passes.masking.zeros import is_plain

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_LEAST = 1 << 15  # numbers, from which on one pass less is worth more than some calls


def join_norms_(graph: fx.Graph, module: nn.Module) -> None:
    """Let a graph call batch normalisations together with what follows them, in place.

    Args:
        graph: of a model in training.
        module: whose graph it is.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    for norm in [node for node in graph.nodes if _is_norm(node, modules)]:
        end, other, relu = norm, None, None
        if (added := _only_user(norm)) and _adds(added) and len(norm.args[0].users) == 1:
            end, other = added, next(node for node in added.all_input_nodes if node is not norm)
        follows = _only_user(end)
        last = follows if follows and (relu := _relu_of(follows, modules)) else end
        with graph.inserting_before(end):
            called = graph.get_attr(str(norm.target))
            activation = graph.get_attr(relu) if isinstance(relu, str) else relu
            whole = graph.call_function(normalized, (called, norm.args[0], other, activation))
        last.replace_all_uses_with(whole)
        for node in dict.fromkeys((last, end, norm)):
            graph.erase_node(node)


def _is_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and type(modules.get(str(node.target))) is nn.BatchNorm2d and len(node.args) == 1


def _adds(node: fx.Node) -> bool:
    both = node.op == "call_function" and node.target in _ADDITIONS and len(node.args) == 2
    return both and len(node.all_input_nodes) == 2 and not node.kwargs


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _relu_of(node: fx.Node, modules: dict[str, nn.Module]) -> str | bool | None:
    """Return the path of the module that is a ReLU, True for a ReLU by function or method, None for anything else."""
    if node.op == "call_module":
        return str(node.target) if type(modules.get(str(node.target))) is nn.ReLU else None
    by_function = node.op == "call_function" and node.target in _RELUS
    return by_function or (node.op == "call_method" and node.target in ("relu", "relu_")) or None


def normalized(norm: nn.BatchNorm2d, x: Tensor, other: Tensor | None, relu: nn.ReLU | bool | None) -> Tensor:
    """Run a batch normalisation, an addition and a ReLU: natively where that computes the same, or one after the other.

    Args:
        norm: the normalisation.
        x: its input.
        other: what is added to its result, if anything.
        relu: the module that follows, True for a ReLU that is none, or None.
    """
    if _fits(norm, x, other, relu):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        y, mean, variance = normalize(x, norm.weight, norm.bias, other, norm.eps, relu is not None)
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean, norm.momentum)  # pyright: ignore
            norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)  # pyright: ignore
        return y
    y = norm(x)
    y = y if other is None else y + other
    if relu is None:
        return y
    return F.relu(y) if relu is True else relu(y)  # pyright: ignore


def _fits(norm: nn.BatchNorm2d, x: Tensor, other: Tensor | None, relu: nn.ReLU | bool | None) -> bool:
    whole = norm.training and norm.affine and norm.track_running_stats and norm.momentum is not None
    if not whole or has_hooks(norm) or (isinstance(relu, nn.Module) and has_hooks(relu)):
        return False
    if not are_images(x) or x.numel() < 2 * x.shape[1]:
        return False
    if other is not None and (other.shape != x.shape or not other.is_contiguous()):
        return False
    return may_run_natively([t for t in (x, other, norm.weight, norm.bias, norm.running_mean) if t is not None])


def are_images(x: Tensor) -> bool:
    """Whether a tensor is a batch of contiguous images that are so many that one pass over memory less is worth some calls."""
    return x.dim() == 4 and x.numel() >= _LEAST and x.is_contiguous()


def may_run_natively(tensors: Sequence[Tensor]) -> bool:
    """Whether native operators compute what torch's do with these tensors."""
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors) or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():
        return True
    plain = all(map(is_plain, tensors)) and torch.autograd.forward_ad._current_level < 0
    return plain and native() is not None
