"""Batch norms: folded into the convolution or linear layer before them, as their statistics are fixed in evaluation."""

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights


def fold_batch_norms_(module: nn.Module, graph: fx.Graph) -> list[str]:
    """Fold every batch norm that alone reads a layer's output into that layer, in place.

    Args:
        module: the root of the graph; its layers are changed.
        graph: of evaluation; nodes of folded norms are erased.

    Returns:
        The paths of the folded norms.
    """
    folded = []
    calls = [str(n.target) for n in graph.nodes if n.op == "call_module"]
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        norm, source = module.get_submodule(str(node.target)), node.all_input_nodes[0]
        if not isinstance(norm, _BatchNorm) or source.op != "call_module" or len(source.users) > 1:
            continue
        layer = module.get_submodule(str(source.target))
        plain = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) and norm.track_running_stats
        if plain and calls.count(str(node.target)) == calls.count(str(source.target)) == 1:
            fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
            facts = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            layer.weight, layer.bias = fuse(layer.weight, layer.bias, *facts)  # pyright: ignore
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            folded.append(str(node.target))
    return folded
