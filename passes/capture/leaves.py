"""Leaves: the modules that a graph calls whole, because they are torch.nn's, have hooks, or hold no parameters."""

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from passes.capture.copies import FORWARD_HOOKS

HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
CONV_FORWARDS = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)  # a subclass may have its own


def is_builtin(module: nn.Module) -> bool:
    """Whether a graph keeps `module` whole: all the code it runs on weights is torch.nn's, and it is not an nn.Sequential.

    Not an nn.TransformerEncoder of layers that the user wrote, nor a parametrized layer, whose graph shows how the weight is
    made, nor a container, which is never called.
    """
    forward = type(module).forward
    own = not is_container(module) and forward.__module__.startswith(("torch.nn", "torch.ao.nn"))
    if not own or isinstance(module, (nn.Sequential, ParametrizationList)) or is_parametrized(module):
        return False
    return all(map(_is_torchs, module.children()))


def _is_torchs(child: nn.Module) -> bool:
    inside = is_container(child) and all(map(_is_torchs, child.children()))
    return inside or is_builtin(child) or next(child.parameters(), None) is None


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others or parameters: it has no forward."""
    return type(module).forward is nn.Module.forward


def is_called_whole(module: nn.Module) -> bool:
    """Whether a graph calls `module` as it is: it has no parameters, or hooks that must go on running.

    A module without parameters gains nothing from being traced, and stays exact in what a graph would freeze:
    its own mode, randomness, Python state.
    """
    return has_hooks(module) or next(module.parameters(), None) is None


def has_hooks(module: nn.Module) -> bool:
    """Whether something else has a say in a call of this module: before or after it, forward or backward, or instead of it."""
    attributes = module.__dict__
    return "forward" in attributes or any(attributes[hooks] for hooks in HOOKS)
