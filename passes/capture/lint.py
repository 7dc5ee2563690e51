"""Lint: a check of graphs between the stages of the pipeline, so that an error names the stage and the node."""

from collections.abc import Mapping

from torch import nn

from passes.capture.captured import is_there
from passes.capture.regions import Region


def check_graphs(stage: str, model: nn.Module, regions: Mapping[str, Region]) -> None:
    """Raise unless the graphs of a model are well-formed and everything that they name is there.

    Args:
        stage: after which they are looked at, for the message.
        model: the module that the regions belong to.
        regions: {module path: region}.

    Raises:
        RuntimeError: naming the stage, the module and the node.
    """
    for path, region in regions.items():
        for graph in dict.fromkeys(region.graphs.values()):
            place = f"After {stage}, the graph of {path or type(model).__name__!r} is broken"
            try:
                graph.lint()
            except (RuntimeError, ValueError) as error:
                raise RuntimeError(f"{place}: {error}") from error
            for node in [n for n in graph.nodes if n.op in ("call_module", "get_attr") and n.target not in region.constants]:
                if not is_there(model.get_submodule(path), str(node.target)):
                    raise RuntimeError(f"{place} at node {node.name!r}: there is no {node.target}.")
