"""Libraries for sparse training behind one interface, each used the way that it documents.

A library is imported when it is asked for: the others' environment lacks sparsify, and this one lacks them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from workload import DENSITY, FOREVER

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass
class Training:
    """A model that a library trains sparsely.

    `masks` says what is kept now, by parameter name where there is one; `around_step` is what a loop does where it would
    step; the own state is what a checkpoint needs besides the state_dicts of model and optimizer.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    masks: Callable[[], dict[str, Tensor]]
    around_step: Callable[[Callable[[], object]], object] = lambda step: step()
    own_state: Callable[[], Any] = lambda: None
    set_own_state: Callable[[Any], object] = lambda state: None

    def take_step(self) -> None:
        """Do what follows the backward pass."""
        self.around_step(self.optimizer.step)


class UnsupportedError(Exception):
    """What a library does not do."""


def sparsify(model: nn.Module, make: MakeOptimizer, interval: int | None, inputs: Tensor) -> Training:
    """This library: RigL, or static masks without an interval."""
    from sparsify import RigL, Static
    from sparsify import sparsify as make_sparse

    sparse = make_sparse(model, DENSITY, method=RigL(interval) if interval else Static())
    optimizer = make(sparse)
    sparse.updater.attach(optimizer, total_steps=FOREVER)
    return Training(sparse, optimizer, lambda: sparse.updater.masks)


def rigl_torch(model: nn.Module, make: MakeOptimizer, interval: int | None, inputs: Tensor) -> Training:
    """rigl-torch: RigL; its README says `if pruner(): optimizer.step()`."""
    from rigl_torch.RigL import RigLScheduler

    optimizer = make(model)
    options = {"delta": interval or FOREVER, "static_topo": interval is None, "ignore_linear_layers": False}
    pruner = RigLScheduler(model, optimizer, dense_allocation=DENSITY, T_end=FOREVER, **options)

    def around_step(step: Callable[[], object]) -> None:
        if pruner():
            step()

    names = {weight: name for name, weight in model.named_parameters()}

    def masks() -> dict[str, Tensor]:
        pairs = zip(pruner.W, pruner.backward_masks, strict=True)
        return {names[weight]: mask for weight, mask in pairs if mask is not None}

    return Training(model, optimizer, masks, around_step, pruner.state_dict, pruner.load_state_dict)


def sparselab(
    model: nn.Module, make: MakeOptimizer, interval: int | None, inputs: Tensor, density: float = DENSITY
) -> Training:
    """sparselab: RigL on its SparseLinear layers, which take the place of nn.Linear."""
    import sparselab as library

    linear = [(path, module) for path, module in model.named_modules() if type(module) is nn.Linear]
    for path, module in linear:
        parent, _, name = path.rpartition(".")
        bias = module.bias is not None
        layer = library.SparseLinear(module.in_features, module.out_features, bias=bias, sparsity=1 - density)
        setattr(model.get_submodule(parent), name, layer)
    options = {"sparsity": 1 - density}
    algorithm = library.RigL(**options, update_freq=interval) if interval else library.Static(**options)
    model.apply(algorithm)
    optimizer = make(model)

    def around_step(step: Callable[[], object]) -> None:
        step()
        algorithm.step()

    def masks() -> dict[str, Tensor]:
        paths = {module: path for path, module in model.named_modules()}
        return {f"{paths[layer]}.weight": layer._csr.to_dense() != 0 for layer in algorithm.layers}

    return Training(model, optimizer, masks, around_step)


def nncf(model: nn.Module, make: MakeOptimizer, interval: int | None, inputs: Tensor) -> Training:
    """NNCF: magnitude pruning, whose masks stay as they are between the epochs of its scheduler."""
    import nncf as library

    if interval:
        raise UnsupportedError("prunes only: nothing grows back")
    mode = library.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    pruned = library.prune(model, mode=mode, ratio=1 - DENSITY, examples_inputs=inputs)
    optimizer = make(pruned)

    def masks() -> dict[str, Tensor]:
        # __nncf_hooks.post_hooks.layer1:0:conv1:weight__0.0.binary_mask
        found = {name: buffer for name, buffer in pruned.named_buffers() if name.endswith("binary_mask")}
        return {name.split(".")[2].removesuffix("__0").replace(":", "."): mask for name, mask in found.items()}

    return Training(pruned, optimizer, masks)


Library = Callable[[nn.Module, MakeOptimizer, int | None, Tensor], Training]
LIBRARIES: dict[str, Library] = {f.__name__.replace("_", "-"): f for f in (sparsify, rigl_torch, sparselab, nncf)}
