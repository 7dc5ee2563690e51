"""Lint: a check of graphs between the stages of the pipeline, so that an error names the stage and the node."""

from collections.abc import Mapping

from torch import nn

from passes.capture.regions import Region


def check_graphs(stage: str, model: nn.Module, regions: Mapping[str, Region]) -> None:
    """Raise unless the graphs of a model are well-formed and, once they are installed, everything that they name is there.

    Args:
        stage: after which they are looked at, for the message.
        model: the module that the regions belong to.
        regions: {module path: region}.

    Raises:
        RuntimeError: naming the stage, the module and the node.
    """
    for path, region in regions.items():
        for graph in dict.fromkeys(region.graphs.values()):
            try:
                graph.lint()
            except (RuntimeError, ValueError) as error:
                where = path or type(model).__name__
                raise RuntimeError(f"After {stage}, the graph of {where!r} is broken: {error}") from error
