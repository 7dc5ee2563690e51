"""The command line: sparsify a model, print its report, and look at its graph."""

import argparse
import difflib
import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import nn

from passes.verify import VerificationError
from sparsify.api import sparsify
from sparsify.distributions import DISTRIBUTIONS
from sparsify.files import check_folder, replacing
from sparsify.flops import flop_report
from sparsify.methods import METHODS
from sparsify.report import FlopReport
from sparsify.views import draw_graph, graph_table

_VERIFIED = 250_000_000  # MACs, up to which a model is compared with its graphs unless told otherwise: seconds
_EXAMPLES = """examples:
  sparsify resnet50 --density 0.1                          the report at 10% density, ERK
  sparsify resnet50 --flops 0.25                           the density that costs a quarter of the dense FLOPs
  sparsify resnet50 --density 0.1 --distribution uniform,er,erk
                                                           the distributions side by side
  sparsify vit_b_16 --density 0.2 --graph                  the rewritten graph as a table
  sparsify swin_t --density 0.2 --coverage                 what became of every weight
  sparsify resnet18 --density 0.1 --graph graph.svg --plot layers.png --json report.json
  sparsify my_package.models:make_net --input 1x3x32x32 --density 0.05 --exclude 'head.*'

exit status: 0 done, 1 the model or a request does not work out (the message says why), 2 the command line is wrong"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, without the program's name; those of the process where None.

    Returns:
        The exit status: 0 done, 1 failed with a message on stderr. Usage errors exit with 2.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.density is None and options.flops is None and options.method != "nm":
        parser.error("one of the arguments --density --flops is required")
    try:
        _run(options)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"sparsify: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsify",
        description="Make a PyTorch model sparse and say what it costs: parameters, FLOPs and bytes, layer by layer. "
        "Nothing is trained and nothing downloaded; counting needs no forward pass.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", help="a torchvision model (resnet50) or your own (package.module:factory, called without arguments)"
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--density", type=float, metavar="D", help="fraction of the weights to keep, in (0, 1]")
    budget.add_argument("--flops", type=float, metavar="F", help="fraction of the dense FLOPs to keep, in (0, 1]")
    parser.add_argument(
        "--distribution",
        default="erk",
        metavar="NAME[,NAME...]",
        help=f"how density is spread over layers: {', '.join(DISTRIBUTIONS)}; several print a comparison (default: erk)",
    )
    parser.add_argument(
        "--method", default="rigl", help=f"training method, for the training cost: {', '.join(METHODS)} (default: rigl)"
    )
    parser.add_argument(
        "--input",
        type=_shape,
        default=None,
        metavar="1x3x224x224",
        help="input shape (default: 1x3x224x224; video 1x3x16x224x224)",
    )
    _add_choices(parser)
    _add_outputs(parser)
    return parser


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="parameters that stay dense: fnmatch patterns such as 'fc.*'",
    )
    parser.add_argument(
        "--include",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="parameters that are masked whatever reads them: fnmatch patterns such as 'embedding.weight'",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random masks (default: 0)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help=f"run the model and its graphs on random inputs and compare (default: up to {_VERIFIED // 10**6} million "
        f"MACs)",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--graph",
        nargs="?",
        const="-",
        metavar="FILE",
        help="show the rewritten graph: a table, or a drawing in FILE (.svg .png .dot)",
    )
    parser.add_argument(
        "--coverage",
        action="store_true",
        help="list every weight that the model consumes: masked, dense by which rule, or unsupported and why",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw density and MACs per layer into FILE (.png .svg .pdf)")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 1x3x224x224")
    return shape


def _run(options: argparse.Namespace) -> None:
    model = load_model(options.model)
    shape = options.input or _default_shape(model)
    names = options.distribution.split(",")
    for path in (options.json, options.plot, options.graph):
        if path:
            check_folder(path)
    if len(names) > 1 and (options.graph or options.plot or options.coverage):
        raise ValueError("--graph, --plot and --coverage show one distribution; name one.")
    reports = {}
    for name in names:
        sparse = (
            _make_verified(model, name, shape, options) if not reports else _make(model, name, shape, options, False)
        )
        reports[name] = flop_report(sparse, shape)
        if len(names) == 1:
            _show(sparse, reports[name], shape, options)
    if len(names) > 1:
        print(compare(reports))
    if options.json:
        content = {name: report.to_dict() for name, report in reports.items()}
        with replacing(options.json) as partial:
            partial.write_text(json.dumps(content if len(names) > 1 else content[names[0]], indent=1))


def _make(model: nn.Module, name: str, shape: tuple[int, ...], options: argparse.Namespace, verify: bool) -> nn.Module:
    return sparsify(
        model,
        options.density,
        name,
        method=options.method,
        flops=options.flops,
        inputs=shape,  # so that a run proves the coverage
        exclude=options.exclude,
        include=options.include,
        seed=options.seed,
        verify=verify,
    )


def _make_verified(model: nn.Module, name: str, shape: tuple[int, ...], options: argparse.Namespace) -> nn.Module:
    """Sparsify a model with values, and compare what its graphs compute with what it computes, if that works out."""
    if options.verify or (options.verify is None and flop_report(model, shape).dense_macs <= _VERIFIED):
        try:
            return _make(load_model(options.model, device="cpu"), name, shape, options, verify=True)
        except VerificationError as error:
            if options.verify:
                raise
            print(f"sparsify: not verified. {error}", file=sys.stderr)
    return _make(model, name, shape, options, verify=False)


def _show(model: nn.Module, report: FlopReport, shape: tuple[int, ...], options: argparse.Namespace) -> None:
    if options.graph == "-":
        print(graph_table(model.eval(), shape))
    elif options.graph:
        draw_graph(model.eval(), options.graph, shape)
    if options.plot:
        report.plot(options.plot)
    if options.coverage:
        print(tabulate(report.coverage.items(), headers=("weight", "coverage")))
    elif options.graph != "-":
        print(report)


def compare(reports: dict[str, FlopReport]) -> str:
    """Return a table of several reports on one model: densities per layer, and the totals.

    Args:
        reports: {column title: report}.

    Returns:
        The text of the table.
    """
    columns = list(reports.values())
    rows = [
        [x.name, *(f"{r.layers[i].density:.4f}" for r in columns)] for i, x in enumerate(columns[0].layers) if x.params
    ]
    rows += [
        ["kept weights", *(f"{sum(x.nonzeros for x in r.layers):,}" for r in columns)],
        ["inference FLOPs / dense", *(f"{r.inference_ratio:.4f}" for r in columns)],
        ["training FLOPs / dense", *(f"{r.training_ratio:.4f}" for r in columns)],
        ["bytes / dense", *(f"{r.sparse_bytes / r.dense_bytes:.4f}" for r in columns)],
    ]
    return tabulate(rows, headers=["density of layer", *reports], disable_numparse=True)


def load_model(name: str, device: str = "meta") -> nn.Module:
    """Build a torchvision model by its name, or call a user's factory.

    Args:
        name: "resnet50", or "package.module:factory".
        device: of a torchvision model; on "meta" it needs no memory.

    Returns:
        The model, without pretrained weights.

    Raises:
        ValueError: there is no such model, or the factory does not return a module.
    """
    if ":" in name:
        return _from_factory(*name.split(":", 1))
    from torchvision import models

    known = models.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else "Name your own as package.module:factory."
        raise ValueError(f"torchvision has no model {name!r}. {hint}")
    builder = models.get_model_builder(name)
    options = {"weights": None, "weights_backbone": None}
    options = {k: v for k, v in options.items() if k in inspect.signature(builder).parameters}
    with warnings.catch_warnings():  # GoogLeNet and Inception warn of their own initialization
        warnings.simplefilter("ignore", FutureWarning)
        try:
            with torch.device(device):
                return builder(**options)
        except (RuntimeError, NotImplementedError):  # regnets compute widths with tensors, which meta cannot hold
            return builder(**options).to(device)


def _from_factory(module: str, factory: str) -> nn.Module:
    sys.path.insert(0, "")  # as `python -m` does, so that a module in the current folder is found
    try:
        model = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, TypeError) as error:
        hint = f" Write {module.removesuffix('.py')}:{factory}." if module.endswith(".py") else ""
        raise ValueError(
            f"Cannot load {module}:{factory}, which is called without arguments: {error}.{hint}"
        ) from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module}:{factory} returned {type(model).__name__}, not a torch.nn.Module.")
    return model


def _default_shape(model: nn.Module) -> tuple[int, ...]:
    video = any(isinstance(module, nn.Conv3d) for module in model.modules())
    return (1, 3, 16, 224, 224) if video else (1, 3, 224, 224)
