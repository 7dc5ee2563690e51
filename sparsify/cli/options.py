"""Options of the command line."""

import argparse
from typing import Any

from passes.lowering.lower import BACKENDS
from passes.masking.kernels import KERNELS
from sparsify.cli.models import model_names
from sparsify.density.distributions import DISTRIBUTIONS
from sparsify.methods.published import METHODS

VERIFIED = 250_000_000  # MACs, up to which a model is compared with its graphs unless told otherwise: seconds
SHELLS = ("bash", "zsh", "tcsh")
_EXAMPLES = """examples:
  sparsify resnet50 --density 0.1                          the report at 10% density, ERK
  sparsify resnet50 --flops 0.25                           the density that costs a quarter of the dense FLOPs
  sparsify resnet50 --density 0.1 --html report.html       everything to look at, in one file that opens offline
  sparsify vit_b_16 --density 0.2 --graph                  the rewritten graph as a table
  sparsify swin_t --density 0.2 --coverage                 what became of every weight
  sparsify resnet18 --density 0.1 --graph graph.svg --plot layers.png --json report.json
  sparsify my_package.models:make_net --input 1x3x32x32 --density 0.05 --exclude 'head.*'
  sparsify timm:convnext_tiny --density 0.1                a model of timm
  sparsify hf:path/to/config.json --density 0.1            a model of transformers, from its configuration

commands:
  sparsify compare resnet50 --density 0.2,0.1,0.05         densities and distributions side by side
  sparsify bench resnet50 --density 0.1                    a lowered model against the dense one, on this machine
  sparsify bench resnet18 --density 0.1 --training --input 16x3x128x128
                                                           a training step against a dense one
  sparsify completion bash                                 a script that completes all this; sparsify COMMAND --help

exit status: 0 done, 1 the model or a request does not work out (the message says why), 2 the command line is wrong"""
_MODEL = (
    "a torchvision model (resnet50), timm:NAME, hf:PATH of a configuration, or your own (package.module:factory, called "
    "without arguments)"
)
_INPUT = "input shape (default: one image, 1x3x224x224; one video, 1x3x16x224x224; a text of 128 tokens, 1x128)"


def parser() -> argparse.ArgumentParser:
    """Return the parser of a report, the command without a name."""
    result = argparse.ArgumentParser(
        prog="sparsify",
        description="Make a PyTorch model sparse and say what it costs: parameters, FLOPs and bytes, layer by layer. "
        "Nothing is trained and nothing downloaded; counting needs no forward pass.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, budget = result.add_argument, result.add_mutually_exclusive_group()
    add("model", help=_MODEL)
    budget.add_argument("--density", type=float, metavar="D", help="fraction of the weights to keep, in (0, 1]")
    budget.add_argument("--flops", type=float, metavar="F", help="fraction of the dense FLOPs to keep, in (0, 1]")
    add("--distribution", default="erk", help=f"how density is spread over layers: {', '.join(DISTRIBUTIONS)} (default: erk)")
    _add_sparsity(result)
    verify = f"run the model and its graphs on random inputs and compare (default: up to {VERIFIED // 10**6} million MACs)"
    add("--verify", action=argparse.BooleanOptionalAction, help=verify)
    graph = "show the rewritten graph: a table, or a drawing in FILE (.svg .png .dot)"
    add("--graph", nargs="?", const="-", metavar="FILE", help=graph)
    coverage = "list every weight that the model consumes: masked, dense by which rule, or unsupported and why"
    add("--coverage", action="store_true", help=coverage)
    add("--json", metavar="FILE", help="write the report as JSON")
    html = "write the report as one HTML file: layers, graph, masks, and the built-in distributions side by side"
    add("--html", metavar="FILE", help=html)
    add("--speed", action="store_true", help="with --html: measure the lowered model against the dense one, on this machine")
    add("--plot", metavar="FILE", help="draw density and MACs per layer into FILE (.png .svg .pdf)")
    return result


def _add_sparsity(result: argparse.ArgumentParser) -> None:
    add = result.add_argument
    add("--method", default="rigl", help=f"training method, for the training cost: {', '.join(METHODS)} (default: rigl)")
    patterns: Any = {"nargs": "+", "default": [], "metavar": "PATTERN"}
    add("--exclude", **patterns, help="parameters that stay dense: fnmatch patterns such as 'fc.*'")
    add("--include", **patterns, help="parameters that are masked in any case: fnmatch patterns such as 'embedding.weight'")
    _add_input(result)


def _add_input(result: argparse.ArgumentParser) -> None:
    result.add_argument("--input", type=_shape, metavar="1x3x224x224", help=_INPUT)
    result.add_argument("--seed", type=int, default=0, help="of the random masks (default: 0)")


def _compare_parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="sparsify compare",
        description="Print what densities and distributions come to, side by side: weights, FLOPs and bytes, and the density "
        "of every layer.",
    )
    result.add_argument("model", help=_MODEL)
    densities = "fractions of the weights to keep, in (0, 1]"
    result.add_argument("--density", type=_numbers, required=True, metavar="D[,D...]", help=densities)
    names: Any = {"type": lambda text: text.split(","), "default": list(DISTRIBUTIONS), "metavar": "NAME[,NAME...]"}
    result.add_argument("--distribution", **names, help=f"of {', '.join(DISTRIBUTIONS)} (default: all)")
    _add_sparsity(result)
    result.add_argument("--json", metavar="FILE", help="write the reports as JSON")
    result.set_defaults(flops=None)
    return result


def _bench_parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="sparsify bench",
        description="Lower a sparse model for this machine, or train it for a step, and measure it against the dense one, "
        "whole and layer by layer. The weights are random: speed depends on where zeros are, not on values.",
    )
    add = result.add_argument
    add("model", help=_MODEL)
    add("--density", type=float, required=True, metavar="D", help="fraction of the weights to keep, in (0, 1]")
    add("--distribution", default="erk", help=f"how density is spread over layers: {', '.join(DISTRIBUTIONS)} (default: erk)")
    _add_input(result)
    add("--training", action="store_true", help="measure a forward and backward pass in training instead of the lowered model")
    add("--kernels", default="auto", choices=KERNELS, help="what layers run in training (default: auto)")
    add("--backend", default="auto", choices=BACKENDS, help="how kernels are chosen (default: auto, by a model of the machine)")
    add("--repeats", type=int, default=15, metavar="N", help="how often each model is run (default: 15)")
    add("--json", metavar="FILE", help="write the report as JSON")
    add("--plot", metavar="FILE", help="draw predicted and measured speed per layer into FILE (.png .svg .pdf)")
    return result


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 1x3x224x224")
    return shape


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.2,0.1") from None


def _completion_parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="sparsify completion",
        description="Print a script that completes commands, options and names of models. For bash: "
        "sparsify completion bash > ~/.local/share/bash-completion/completions/sparsify",
    )
    result.add_argument("shell", choices=SHELLS)
    return result


PARSERS = {"bench": _bench_parser, "compare": _compare_parser, "completion": _completion_parser}


def completion(shell: str) -> str:
    """Return a script that completes the command line.

    Args:
        shell: one of SHELLS.

    Raises:
        ImportError: shtab, the extra `completion`, is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError("Completion needs shtab: pip install 'sparsify-fx[completion]'") from error
    whole = parser()
    for action in whole._actions:
        if action.dest == "model":
            action.choices = [*PARSERS, *model_names()]
        elif action.dest in ("distribution", "method"):
            action.choices = list(DISTRIBUTIONS if action.dest == "distribution" else METHODS)
        elif action.metavar == "FILE":
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return shtab.complete(whole, shell=shell)
