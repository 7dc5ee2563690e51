"""Source: which of its own parameters a class multiplies by, read from its source, where no graph shows it.

Experts of a mixture are chosen by data in Python code, so that tracing ends there, and a run with example inputs meets only
those that the data choose.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

_PRODUCTS = ("linear", "matmul", "mm", "einsum", "conv1d", "conv2d", "conv3d", "baddbmm", "tensordot")  # ends of names
_VIEWS = frozenset(
    """t transpose permute view reshape contiguous to type float half bfloat16 clone chunk split unbind unsqueeze squeeze
    expand flatten index_select gather select narrow swapaxes movedim""".split()
)
_Names = frozenset[str]


@functools.cache
def multiplied_attributes(cls: type) -> dict[str, bool]:
    """Return the attributes of `self` that methods of a class use in a product, selected, transposed or as they are.

    Args:
        cls: whose source is at hand; of another, nothing is found.

    Returns:
        {name: whether it is a stack of matrices: indexed before use, or multiplied by as a stack}.

    Example:
        >>> multiplied_attributes(type("NoSource", (), {}))
        {}
    """
    found: dict[str, bool] = {}
    for function in [f for owner in cls.__mro__ if _is_users(owner) for f in _functions(owner)]:
        reader = _Reader()
        for statement in function.body:
            reader.visit(statement)
        found |= {name: found.get(name, False) or name in reader.selected for name in reader.multiplied}
    return found


def _is_users(cls: type) -> bool:
    return not cls.__module__.startswith(("torch.", "builtins"))


@functools.cache
def replaced_data(cls: type) -> _Names:
    """Return the parameters whose `.data` methods of a class assign, as paths from `self`: "weight", "layer.weight".

    What code reads of a masked weight is not the parameter, so that the assignment would be lost.
    """
    methods = [f for owner in cls.__mro__ if _is_users(owner) for f in _functions(owner)]
    functions = [function for function in methods if function.name != "__init__"]
    nodes = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Assign)]
    targets = [t.value for node in nodes for t in node.targets if isinstance(t, ast.Attribute) and t.attr == "data"]
    paths = [ast.unparse(target) for target in targets]
    return frozenset(path.removeprefix("self.") for path in paths if path.startswith("self."))


def _functions(cls: type) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


class _Reader(ast.NodeVisitor):
    """Follows attributes of `self` through the local variables of one function, in the order of its lines."""

    def __init__(self) -> None:
        self.variables: dict[str, _Names] = {}
        self.multiplied: set[str] = set()
        self.selected: set[str] = set()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self.variables[name.id] = self._names(node.value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.MatMult):
            self.multiplied |= self._names(node.left) | self._names(node.right)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _called(node).endswith(_PRODUCTS):
            method = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            for operand in (*method, *node.args, *(k.value for k in node.keywords)):
                self.multiplied |= (names := self._names(operand))
                self.selected |= names if _called(node).endswith("bmm") else set()
        self.generic_visit(node)

    def _names(self, node: ast.expr) -> _Names:
        """Return the attributes of `self` whose elements an expression holds."""
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return frozenset([name])
            case ast.Name(id=name):
                return self.variables.get(name, frozenset())
            case ast.Subscript(value=value):
                self.selected |= self._names(value)
                return self._names(value)
            case ast.Attribute(value=value, attr="T" | "mT" | "data"):
                return self._names(value)
            case ast.Call(func=ast.Attribute(value=value, attr=method), args=args) if method in _VIEWS:
                return self._names(value) or (self._names(args[0]) if args else frozenset())
            case ast.IfExp(body=body, orelse=other):
                return self._names(body) | self._names(other)
        return frozenset()


def _called(node: ast.Call) -> str:
    function = node.func
    return (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")).lower()
