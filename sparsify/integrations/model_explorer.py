"""Model Explorer: an exported graph, and densities as its node data, for `ai-edge-model-explorer`."""

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes.counting.inputs import forward_values
from sparsify.saving.files import check_folder, replacing
from sparsify.saving.plain import fold
from sparsify.training.lookup import updater_of

_COLOURS = [{"stop": 0, "bgColor": "#1565c0"}, {"stop": 1, "bgColor": "#e3f2fd"}]  # of the lowest and the highest density


def write_for_model_explorer(model: nn.Module, inputs: Any, path: str | os.PathLike[str]) -> None:
    """Write the folded model as `torch.export` sees it, and beside it what of every operation's weights is kept.

    `model-explorer net.pt2 --node_data_paths net.json` shows them: operations are coloured by density.

    Args:
        model: a sparse model that `torch.export` takes; left as it is.
        inputs: what `flop_report` takes, to export it with.
        path: of the exported program, `.pt2`; the node data go to the same name with `.json`.

    Raises:
        ValueError: the model is not sparse, or the path ends otherwise.

    Example:
        >>> from sparsify import sparsify
        >>> write_for_model_explorer(sparsify(nn.Sequential(nn.Linear(16, 8)), 0.5), (1, 16), "net.pt2")  # doctest: +SKIP
    """
    place, updater = Path(path), updater_of(model)
    if updater is None:
        raise ValueError("write_for_model_explorer() takes a sparse model, as sparsify() returns it.")
    if place.suffix != ".pt2":
        raise ValueError(f"Model Explorer knows exported programs by the name .pt2, and this is {place.name!r}.")
    check_folder(place)
    args, kwargs = forward_values(model, inputs)
    plain = fold(model).eval()
    exported = io.BytesIO()
    torch.export.save(torch.export.export(plain, args, kwargs), exported)
    program = torch.export.load(io.BytesIO(exported.getvalue()))  # operations are named anew in a file
    own = dict(plain.named_parameters(remove_duplicate=False))
    kept = {own[name]: count for name, count in updater.nonzeros.items() if name in own}  # what is transformed may be baked in
    weights = {node: own[name] for node, name in program.graph_signature.inputs_to_parameters.items() if name in own}
    results = {}
    for node in program.graph.nodes:
        read = {weights[given.name] for given in (node, *node.all_input_nodes) if given.name in weights} & kept.keys()
        if read:
            results[node.name] = {"value": sum(kept[w] for w in read) / sum(w.numel() for w in read)}
    data = {"graph": {"name": "density", "results": results, "gradient": _COLOURS}}
    for file, content in ((place, exported.getvalue()), (place.with_suffix(".json"), json.dumps(data, indent=1).encode())):
        with replacing(file) as partial:
            partial.write_bytes(content)
