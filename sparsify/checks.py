"""Checks: what `sparsify` is asked for, before any work begins."""

import difflib
import fnmatch
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from passes.masking.mask import masks_of

T = TypeVar("T")


_WRAPPERS = {  # by the name of the class, so that nothing of torch.distributed has to be there
    "DistributedDataParallel": ("DistributedDataParallel", "ddp = DistributedDataParallel(model)"),
    "FullyShardedDataParallel": ("FullyShardedDataParallel", "fully_shard(model)"),
    "FSDPModule": ("fully_shard", "fully_shard(model)"),
    "DataParallel": ("DataParallel", "wrapped = DataParallel(model)"),
    "OptimizedModule": ("torch.compile", "compiled = torch.compile(model)"),
    "AveragedModel": ("AveragedModel", "average = AveragedModel(model)"),
}


def check_model(model: Any) -> None:
    """Raise unless `model` is a dense module that can be made sparse."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparsify() takes a torch.nn.Module, not {type(model).__name__}.")
    for path, module in model.named_modules():
        for kind in {cls.__name__ for cls in type(module).__mro__} & _WRAPPERS.keys():
            wrapper, how = _WRAPPERS[kind]
            raise ValueError(
                f"{repr(path) if path else 'The model'} is wrapped by {wrapper} already. Sparsify the plain model first, then "
                f"wrap it: model = sparsify(model, ...); {how}; then make the optimizer and call updater.attach()."
            )
    if masks_of(model):
        raise ValueError("The model is sparse already. Sparsify the dense model again, or fold() this one first.")
    if hasattr(model, "updater"):
        raise ValueError("The model has an attribute 'updater', where sparsify() puts its own. Rename it.")


def check_names(model: nn.Module, weights: Iterable[str]) -> None:
    """Raise unless every weight has room for its mask beside it, in all modules that own it."""
    shared = {model.get_parameter(name): name for name in weights}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter in shared and hasattr(module, f"{attribute}_mask"):
                name = shared[parameter]
                raise ValueError(
                    f"{path or 'The model'} has an attribute {attribute + '_mask'!r}, where sparsify() puts the mask of "
                    f"{name}. Rename it, or keep the weight dense with exclude=[{name!r}]."
                )


def check_budget(density: Any, flops: Any, inputs: Any, fixed: str = "") -> None:
    """Raise unless exactly one of density and flops is given, in range, or none where something else fixes the counts."""
    if fixed and (density is not None or flops is not None):
        raise ValueError(f"{fixed} says how many weights are kept, so give neither density nor flops.")
    if not fixed and (density is None) == (flops is None):
        raise ValueError(
            "Give exactly one of density and flops, such as density=0.1 (or masks=, or a method that fixes the counts)."
        )
    if isinstance(density, Mapping):
        given = [(f"density of pattern {pattern!r}", value) for pattern, value in density.items()]
    else:
        given = [(name, value) for name, value in (("density", density), ("flops", flops)) if value is not None]
    for what, value in given:
        if not is_number(value) or not math.isfinite(value) or not 0 < value <= 1:
            hint = ", as Python has them (density.item())" if isinstance(value, Tensor) else ""
            raise ValueError(f"{what} is {value!r}; it must be a number in (0, 1]{hint}.")
    if flops is not None and inputs is None:
        raise ValueError("flops needs inputs, such as inputs=(1, 3, 224, 224), to count the dense network by.")


def check_verification(verify: Any, inputs: Any) -> None:
    """Raise unless there is something to verify a captured model on, where that is asked for."""
    if verify and inputs is None:
        raise ValueError("verify=True needs inputs, such as inputs=(2, 3, 224, 224), to run the model on.")


def is_number(value: Any, kind: Any = numbers.Real) -> bool:
    """Whether a value is a number, numpy's included; True and False are not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise unless an option is a whole number of at least so much."""
    if not is_number(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number (an int) of at least {least}.")


def as_seed(seed: Any) -> int:
    """Return a seed as Python's int, or raise unless it is a whole number."""
    if not is_number(seed, numbers.Integral):
        raise ValueError(f"seed is {seed!r}; it must be a whole number (an int).")
    return int(seed)


def check_between(name: str, value: Any, open_above: bool = False, closed_below: bool = False) -> None:
    """Raise unless an option lies in (0, 1], or with 0, or without 1."""
    if not is_number(value) or not 0 <= value <= 1 or (open_above and value == 1) or (not closed_below and value == 0):
        raise ValueError(f"{name}={value!r} must lie in {'[' if closed_below else '('}0, 1{')' if open_above else ']'}.")


def resolve(choice: Any, known: Mapping[str, T], what: str, accepts: Callable[[Any], bool] | None = None) -> T:
    """Turn a name into what it stands for; what `accepts` accepts stands for itself."""
    if accepts and accepts(choice):
        return choice
    if not isinstance(choice, str) or choice not in known:
        near = difflib.get_close_matches(str(choice).lower(), known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if callable(choice):  # RigL for RigL()
            hint = f" Call it: {choice.__name__}()."
        raise ValueError(f"Unknown {what} {choice!r}; known are {', '.join(known)}.{hint}")
    return known[choice]


def as_patterns(patterns: Any, what: str) -> tuple[str, ...]:
    """Turn one pattern or several into a tuple."""
    patterns = (patterns,) if isinstance(patterns, str) or not isinstance(patterns, Iterable) else tuple(patterns)
    if strange := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise ValueError(f"{what} takes fnmatch patterns of names, not {strange[0]!r}.")
    return patterns


def matching_paths(patterns: Iterable[str], model: nn.Module) -> list[str]:
    """List the paths of modules that any of the patterns matches, part by part; each pattern must match one that is called."""
    found, paths = [], [path for path, _ in model.named_modules() if path]
    for pattern in patterns:
        parts = pattern.split(".")
        split = {path: path.split(".") for path in paths}
        matches = [p for p, own in split.items() if len(own) == len(parts) and all(map(fnmatch.fnmatchcase, own, parts))]
        if not matches:
            near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.3)
            hint = f"the nearest is {near[0]!r}" if near else f"modules are {', '.join(paths[:5])}, ..."
            raise ValueError(f"blocks: pattern {pattern!r} matches no module; {hint}.")
        for path in matches:
            if isinstance(module := model.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
                raise ValueError(f"blocks: {path!r} is a {type(module).__name__}, which is never called; name {path + '.*'!r}.")
        found += matches
    return found


def matching(patterns: Iterable[str], names: Sequence[str], what: str) -> list[str]:
    """List the names that any of the patterns matches; each pattern must match one."""
    matching = []
    for pattern in patterns:
        matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
            hint = f"the nearest weight is {near[0]!r}" if near else f"weights are {', '.join(names[:5])}, ..."
            raise ValueError(f"{what}: pattern {pattern!r} matches no weight; {hint}.")
        matching += matches
    return matching
