"""Proxies: what stands for a value while a graph is traced, and answers questions as that value would, or refuses.

fx's own proxy is not a Tensor, has every attribute and is never None, so code that asks takes a branch it would not take
with data. Here a proxy answers by the kind of its value (`passes.capture.kinds`). Where that is not known, the code stays
Python. What builtins such as isinstance() ask is answered in `passes.capture.asking`: a proxy whose `__class__` is Tensor
would crash torch.
"""

from typing import Any

from torch import Tensor, fx
from torch.fx.proxy import Attribute as FxAttribute

_OWN = frozenset(["node", "tracer", "root", "attr", "_node"])  # attributes of fx's proxies


class CannotTraceError(Exception):
    """Code asks or does what a graph cannot hold."""


class Value(fx.Proxy):
    """Stands for the value of a node; its tracer is a `passes.capture.tracer.Tracer`."""

    tracer: Any

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name) and (name.startswith("__") or not self._may_have(name)):
            raise AttributeError(f"{self!r} has no attribute {name!r}")
        return Attribute(self, name)  # pyright: ignore[reportArgumentType]

    def _may_have(self, name: str) -> bool:
        kind = self.tracer.known_kind_of(self)
        return kind is None or hasattr(kind, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN:
            self.tracer.refuse(f"sets the attribute {name!r} of a tensor")
        super().__setattr__(name, value)

    def __index__(self) -> int:
        return self.tracer.refuse("makes a Python number of a tensor")

    __int__ = __float__ = __complex__ = __index__

    def __len__(self) -> int:
        return self.tracer.refuse("asks for the length of a tensor")

    def __contains__(self, item: Any) -> bool:
        return self.tracer.refuse("looks for something inside a tensor")

    def __deepcopy__(self, memo: Any) -> Any:
        return self.tracer.refuse("copies a tensor with Python's copy")

    __copy__ = lambda self: self.__deepcopy__(None)  # noqa: E731

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = (), kwargs: Any = None) -> fx.Proxy:
        return fx.Proxy.__torch_function__.__func__(Value, orig_method, types, args, kwargs)  # whichever kind is asked


class Attribute(Value, FxAttribute):
    """Stands for an attribute of a value, or for its method until that is called."""

    __init__ = FxAttribute.__init__
    __call__ = FxAttribute.__call__
    node = FxAttribute.node  # pyright: ignore[reportIncompatibleMethodOverride]
