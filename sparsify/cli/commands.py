"""What the command line does."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial

from tabulate import tabulate
from torch import nn

from passes.capture.verify import VerificationError
from sparsify.api import sparsify
from sparsify.cli.models import default_shape, load_model
from sparsify.cli.options import VERIFIED, bench_parser, parser
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
    if given[:1] == ["bench"]:
        return _reported(_bench, bench_parser().parse_args(given[1:]))
    arguments = parser()
    options = arguments.parse_args(given)
    if options.density is None and options.flops is None and options.method != "nm":
        arguments.error("one of the arguments --density --flops is required")
    return _reported(_run, options)


def _reported(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    try:
        run(options)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"sparsify: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    model = load_model(options.model)
    shape = options.input or default_shape(model)
    names = options.distribution.split(",")
    for path in (options.json, options.plot, options.graph, options.html):
        if path:
            check_folder(path)
    if options.speed and not options.html:
        raise ValueError("--speed measures for the page that --html writes; `sparsify bench` prints a table.")
    if len(names) > 1 and (options.graph or options.plot or options.coverage or options.html):
        raise ValueError("--graph, --plot, --coverage and --html show one distribution; name one.")
    reports = {}
    for name in names:
        sparse = _make_verified(model, name, shape, options) if not reports else _make(model, name, shape, options, False)
        reports[name] = flop_report(sparse, shape)
        if len(names) == 1:
            _show(sparse, reports[name], shape, options)
    if len(names) > 1:
        print(compare(reports))
    if options.html:
        _write_page(names[0], shape, options)
    if options.json:
        content = {name: report.to_dict() for name, report in reports.items()}
        with replacing(options.json) as unfinished:
            unfinished.write_text(json.dumps(content if len(names) > 1 else content[names[0]], indent=1))


def _write_page(name: str, shape: tuple[int, ...], options: argparse.Namespace) -> None:
    """Write the page of a model with real masks, beside what other distributions would give."""
    model = load_model(options.model, device="cpu")
    sparse = _make(model, name, shape, options, verify=False)
    report = flop_report(sparse, shape)
    others = {name: report}
    if options.method != "nm":  # which has no density to spread
        dense = load_model(options.model)
        others |= {n: flop_report(_make(dense, n, shape, options, False), shape) for n in DISTRIBUTIONS if n != name}
    speed = None
    if options.speed:
        static = sparsify(model, masks=sparse, method="static").eval()
        speed = speed_report(static, shape, progress=_progress())
    report.to_html(options.html, others=others, speed=speed)


def _progress() -> Callable[[str], None]:
    """Return what says on the terminal how far something has come, in one line where that can be written over."""
    terminal = sys.stderr.isatty()
    say = partial(print, end="\r" if terminal else "\n", file=sys.stderr, flush=True)
    return lambda text: say(f"{text:<30}")


def _bench(options: argparse.Namespace) -> None:
    """Measure a lowered model, or a training step, against the dense one."""
    for path in (options.json, options.plot):
        if path:
            check_folder(path)
    model = load_model(options.model, device="cpu").eval()
    shape = options.input or default_shape(model)
    kernels = options.kernels if options.training else "masked"
    sparse = sparsify(model, options.density, options.distribution, method="static", kernels=kernels, seed=options.seed).eval()
    report = speed_report(
        sparse,
        shape,
        training=options.training,
        backend=options.backend,
        repeats=options.repeats,
        progress=_progress(),
    )
    print(report)
    if options.plot:
        report.plot(options.plot)
    if options.json:
        with replacing(options.json) as unfinished:
            unfinished.write_text(json.dumps(report.to_dict(), indent=1))


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
    if options.verify or (options.verify is None and flop_report(model, shape).dense_macs <= VERIFIED):
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
    """Return a table of several reports on one model, by column title: densities per layer, and the totals."""
    columns = list(reports.values())
    rows = [[x.name, *(f"{r.layers[i].density:.4f}" for r in columns)] for i, x in enumerate(columns[0].layers) if x.params]
    rows += [
        ["kept weights", *(f"{sum(x.nonzeros for x in r.layers):,}" for r in columns)],
        ["inference FLOPs / dense", *(f"{r.inference_ratio:.4f}" for r in columns)],
        ["training FLOPs / dense", *(f"{r.training_ratio:.4f}" for r in columns)],
        ["bytes / dense", *(f"{r.sparse_bytes / r.dense_bytes:.4f}" for r in columns)],
    ]
    return tabulate(rows, headers=["density of layer", *reports], disable_numparse=True)
