"""What the command line does."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate
from torch import nn

from passes.capture.verify import VerificationError
from sparsify.api import sparsify
from sparsify.cli.models import inputs_of, load_model
from sparsify.cli.options import PARSERS, VERIFIED, completion, parser
from sparsify.cli.show import progress, report_text, stages
from sparsify.costs.flops import flop_report
from sparsify.costs.report import FlopReport
from sparsify.costs.speed import speed_report
from sparsify.costs.views import draw_graph, graph_table
from sparsify.density.distributions import DISTRIBUTIONS
from sparsify.saving.files import check_folder, replacing


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, without the program's name; those of the process where None.

    Returns:
        The exit status: 0 done, 1 failed with a message on stderr. Usage errors exit with 2.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in _COMMANDS:
        return _reported(_COMMANDS[given[0]], PARSERS[given[0]]().parse_args(given[1:]))
    arguments = parser()
    options = arguments.parse_args(given)
    if options.density is None and options.flops is None and options.method != "nm":
        arguments.error("one of the arguments --density --flops is required")
    return _reported(_report, options)


def _reported(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    try:
        for path in (getattr(options, name, None) for name in ("json", "plot", "graph", "html")):
            if path and path != "-":
                check_folder(path)
        run(options)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"sparsify: {error}", file=sys.stderr)
        return 1
    return 0


def _report(options: argparse.Namespace) -> None:
    """Print the report of a model, and write what is asked for."""
    if options.speed and not options.html:
        raise ValueError("--speed measures for the page that --html writes; `sparsify bench` prints a table.")
    say = stages(lines=False)
    say("building the model")
    model = load_model(options.model)
    inputs = inputs_of(model, options.input)
    say("masking and checking it")
    sparse = _make_verified(model, inputs, options)
    say("counting")
    report = flop_report(sparse, inputs)
    say("")
    if options.graph == "-":
        print(graph_table(sparse.eval(), inputs))
    elif options.graph:
        draw_graph(sparse.eval(), options.graph, inputs)
    if options.plot:
        report.plot(options.plot)
    if options.coverage:
        print(tabulate(report.coverage.items(), headers=("weight", "coverage")))
    elif options.graph != "-":
        print(report_text(report))
    if options.html:
        _write_page(inputs, options)
    _write_json(report.to_dict(), options.json)


def _compare(options: argparse.Namespace) -> None:
    """Print what densities and distributions come to."""
    model = load_model(options.model)
    inputs = inputs_of(model, options.input)
    asked = [(density, name) for density in options.density for name in options.distribution]
    reports = {}
    for density, name in progress(asked, "comparing"):
        own = argparse.Namespace(**{**vars(options), "density": density})
        reports[density, name] = flop_report(_make(model, name, inputs, own, verify=False), inputs)
    print(compare(reports))
    _write_json([{**r.to_dict(), "distribution": n, "target": d} for (d, n), r in reports.items()], options.json)


def _write_json(content: Any, path: str | None) -> None:
    if path:
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1))


def _write_page(inputs: Any, options: argparse.Namespace) -> None:
    """Write the page of a model with real masks, beside what other distributions would give."""
    say = stages(lines=True)
    say("building the model")
    model, name = load_model(options.model, device="cpu"), options.distribution
    sparse = _make(model, name, inputs, options, verify=False)
    report = flop_report(sparse, inputs)
    others = {name: report}
    if options.method != "nm":  # which has no density to spread
        dense = load_model(options.model)
        others |= {n: flop_report(_make(dense, n, inputs, options, False), inputs) for n in DISTRIBUTIONS if n != name}
    speed = None
    if options.speed:
        static = sparsify(model, masks=sparse, method="static").eval()
        speed = speed_report(static, inputs, progress=say)
    say("writing the page")
    report.to_html(options.html, others=others, speed=speed)
    say("")


def _bench(options: argparse.Namespace) -> None:
    """Measure a lowered model, or a training step, against the dense one."""
    model = load_model(options.model, device="cpu").eval()
    inputs = inputs_of(model, options.input)
    say = stages(lines=True)
    kernels = options.kernels if options.training else "masked"
    sparse = sparsify(model, options.density, options.distribution, method="static", kernels=kernels, seed=options.seed).eval()
    report = speed_report(
        sparse,
        inputs,
        training=options.training,
        backend=options.backend,
        repeats=options.repeats,
        progress=say,
    )
    say("")
    print(report)
    if options.plot:
        report.plot(options.plot)
    _write_json(report.to_dict(), options.json)


def _complete(options: argparse.Namespace) -> None:
    """Print a script that completes the command line in a shell."""
    print(completion(options.shell))


_COMMANDS = {"bench": _bench, "compare": _compare, "completion": _complete}


def _make(model: nn.Module, name: str, inputs: Any, options: argparse.Namespace, verify: bool) -> nn.Module:
    return sparsify(
        model,
        options.density,
        name,
        method=options.method,
        flops=options.flops,
        inputs=inputs,  # so that a run proves the coverage
        exclude=options.exclude,
        include=options.include,
        seed=options.seed,
        verify=verify,
    )


def _make_verified(model: nn.Module, inputs: Any, options: argparse.Namespace) -> nn.Module:
    """Sparsify a model with values, and compare what its graphs compute with what it computes, if that works out."""
    name = options.distribution
    if options.verify or (options.verify is None and flop_report(model, inputs).dense_macs <= VERIFIED):
        try:
            return _make(load_model(options.model, device="cpu"), name, inputs, options, verify=True)
        except VerificationError as error:
            if options.verify:
                raise
            print(f"sparsify: not verified. {error}", file=sys.stderr)
    return _make(model, name, inputs, options, verify=False)


def compare(reports: dict[tuple[float, str], FlopReport]) -> str:
    """Return tables of reports on one model, by density and distribution: the totals, and how many weights layers keep."""
    rows = [
        (
            f"{density:g}",
            name,
            f"{sum(x.nonzeros for x in r.layers):,}",
            *(f"{n:.4f}" for n in (r.inference_ratio, r.training_ratio, r.sparse_bytes / r.dense_bytes)),
        )
        for (density, name), r in reports.items()
    ]
    heads = ("density", "distribution", "kept weights", "inference FLOPs", "training FLOPs", "bytes")
    parts = [tabulate(rows, heads, disable_numparse=True, colalign=("left", "left", *["right"] * 4))]
    for density in dict.fromkeys(density for density, _ in reports):
        columns = {name: r for (d, name), r in reports.items() if d == density}
        first = next(iter(columns.values()))
        lines = [
            (x.name, *(f"{r.layers[i].density:.4f}" for r in columns.values())) for i, x in enumerate(first.layers) if x.params
        ]
        parts.append(tabulate(lines, (f"at density {density:g}", *columns), disable_numparse=True))
    return "\n\n".join(parts)
