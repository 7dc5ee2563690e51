"""Inference: a lowered sparse network against the engines that people use, side by side.

Every round runs every engine in an order that turns from round to round; what takes less than half a second runs for 20 ms
before the run that counts: on a virtual machine a thread that is woken may share a core with another until the clock ticks. A
row takes as many rounds as fit into its time, three at least. Everything is float32 on as many threads as torch has, but for
one column: OpenVINO in the number format that it chooses itself. DeepSparse runs in an environment of its own,
`.venv-deepsparse`, and answers over a pipe. ONNX files hold the folded model with its zeros.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
import torchvision
from environment import build, python_of, write_section
from tabulate import tabulate
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from sparsify import fold, lower, sparsify
from sparsify.costs.speed import processor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from networks import WideResNet22  # noqa: E402

VENV = HERE.parent / ".venv-deepsparse"
RESULTS = HERE / "RESULTS.md"
HEADING = "## Inference: lowered models against engines"  # a section for each kind of vectors
WARM = 0.02  # seconds
PAUSE = 0.03  # seconds, in which threads of the engine before stop spinning
LEAST = 3  # rounds
DENSITIES, BATCHES = [0.2, 0.1, 0.05, 0.02], [1, 16]
SLOW = 0.5  # seconds, beside which a first run matters little
_DEEPSPARSE = """
import sys, time, warnings
import numpy as np
import deepsparse
engine = deepsparse.compile_model(sys.argv[1], batch_size=int(sys.argv[2]), num_cores=int(sys.argv[3]))
inputs = [np.load(sys.argv[4])]
print("ready", flush=True)
for line in sys.stdin:
    begin = time.perf_counter()
    engine.run(inputs)
    print(time.perf_counter() - begin, flush=True)
"""


class Tokens(nn.Module):
    """BERT-base on token numbers, as one tensor in and one out."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel(BertConfig(attn_implementation="sdpa"))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the last hidden states: (batch, tokens, 768)."""
        return self.bert(tokens).last_hidden_state


def _image(side: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 3, side, side)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "resnet50": (torchvision.models.resnet50, _image(224)),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, _image(224)),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, _image(224)),
    "wrn_22_2": (WideResNet22, _image(32)),
    "vit_b_16": (torchvision.models.vit_b_16, _image(224)),
    "bert_base": (Tokens, lambda batch: torch.randint(0, 30000, (batch, 128))),
}


class Sparse(nn.Linear):
    """A linear layer by torch's own sparse matrices."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product."""
        flat = input.reshape(-1, self.in_features)
        return (self.csr @ flat.T).T.reshape(*input.shape[:-1], -1) + self.bias


def with_sparse_matrices(model: nn.Module) -> nn.Module:
    """Make every linear layer with a bias one of torch's sparse matrices, in place."""
    for module in [m for m in model.modules() if type(m) is nn.Linear and m.bias is not None]:
        module.__class__ = Sparse
        module.csr = module.weight.detach().to_sparse_csr()
    return model


@contextmanager
def engines(model: nn.Module, x: Tensor, peers: bool) -> Iterator[dict[str, Callable[[], float | None]]]:
    """Yield what runs a sparse model once: {engine: call}, which returns its own seconds, or None to be timed."""
    threads = torch.get_num_threads()
    dense, lowered = fold(model).eval(), lower(model, x)
    calls: dict[str, Callable[[], Any]] = {"ours": lambda: lowered(x), "eager": lambda: dense(x)}
    if x.dim() == 4:
        last, x_last = (t.to(memory_format=torch.channels_last) for t in (fold(model).eval(), x))
        calls["channels last"] = lambda: last(x_last)
    torch._inductor.config.compile_threads = 1  # workers would take cores from what is timed
    compiled = torch.compile(fold(model).eval(), options={"freezing": True})
    calls["compiled"] = lambda: compiled(x)
    if x.dim() == 2:
        matrices = with_sparse_matrices(fold(model).eval())
        calls["torch.sparse"] = lambda: matrices(x)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.backends.mha.set_fastpath_enabled(False)  # which has no counterpart in ONNX
        torch.onnx.export(fold(model).eval(), (x,), path, opset_version=17, dynamo=False, input_names=["x"])  # DeepSparse's
        torch.backends.mha.set_fastpath_enabled(True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        calls["onnxruntime"] = lambda: session.run(None, {"x": x.numpy()})
        for name, hint in (("openvino", {"INFERENCE_PRECISION_HINT": "f32"}), ("openvino, own format", {})):
            settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **hint}
            request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
            calls[name] = lambda request=request: request.infer([x.numpy()])
        worker = _deepsparse(folder, path, x, threads) if peers else None
        if worker:
            calls["deepsparse"] = lambda: _ask(worker)
        try:
            yield calls
        finally:
            if worker:
                worker.kill()


def _deepsparse(folder: str, path: str, x: Tensor, threads: int) -> "subprocess.Popen[str] | None":
    """Start DeepSparse on a file; None where it cannot be installed or does not take the file."""
    if problem := build(VENV, ["deepsparse==1.8.0"], ["deepsparse"]):
        print(f"Skipped DeepSparse: {problem}", file=sys.stderr)
        return None
    np.save(f"{folder}/x.npy", x.numpy())
    command = [python_of(VENV), "-c", _DEEPSPARSE, path, len(x), threads, f"{folder}/x.npy"]
    worker = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout
    for line in worker.stdout:
        if line.startswith("ready"):
            return worker
    print("Skipped DeepSparse: it does not take the file.", file=sys.stderr)
    return None


def _ask(worker: "subprocess.Popen[str]") -> float:
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


@torch.no_grad()
def measure(
    name: str, density: float, distribution: str, batch: int, budget: float, peers: bool
) -> dict[str, tuple[float, float]]:
    """Return for every engine the median milliseconds for one input, and the median of its time over ours of the same round.

    Rounds end after `budget` seconds.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    make, inputs = MODELS[name]
    x = inputs(batch)
    model = sparsify(make(), density, distribution, method="static", init="fan_in").eval()
    seconds: dict[str, list[float]] = {}
    with engines(model, x, peers) as calls:
        names, started, turn = list(calls), time.perf_counter(), 0
        while turn <= LEAST or time.perf_counter() - started < budget:  # the first one warms up
            for engine in names[turn % len(names) :] + names[: turn % len(names)]:
                time.sleep(PAUSE)
                begin = time.perf_counter()
                while seconds.get(engine, [0])[-1] < SLOW and time.perf_counter() - begin < WARM:
                    calls[engine]()
                begin = time.perf_counter()
                own = calls[engine]()
                taken = time.perf_counter() - begin
                seconds.setdefault(engine, []).append(own if isinstance(own, float) else taken)
            turn += 1
    ours = seconds["ours"][1:]
    return {
        engine: (1e3 * median(taken[1:]) / batch, median(t / o for t, o in zip(taken[1:], ours, strict=True)))
        for engine, taken in seconds.items()
    }


def cells(found: dict[str, tuple[float, float]]) -> dict[str, str]:
    """Return times over ours, and ours in milliseconds for one input; the fastest dense float32 engine stands beside."""
    dense = [name for name in found if name not in ("ours", "deepsparse", "torch.sparse", "openvino, own format")]
    fastest = min((found[name][1], name) for name in dense)
    ratios = {name: f"{ratio:.2f}" for name, (_, ratio) in found.items() if name != "ours"}
    return {"ours, ms": f"{found['ours'][0]:.1f}", "fastest dense": f"{fastest[0]:.2f} ({fastest[1]})", **ratios}


def table(rows: dict[str, dict[str, str]]) -> str:
    """Return the rows as a table, in the order of a whole run."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    every = [name for name, *_ in cases(list(MODELS), None, DENSITIES, BATCHES)]
    places = {name: place for place, name in enumerate(every)}
    names = sorted(rows, key=lambda name: places.get(name, len(places)))
    lines = [(name, *(rows[name].get(column, "-") for column in columns)) for name in names]
    return tabulate(lines, ["network", *columns], "github", disable_numparse=True)


def written(facts: str) -> dict[str, dict[str, str]]:
    """Return the rows that RESULTS.md has of runs on the same machine with the same versions."""
    _, found, rest = RESULTS.read_text().partition(facts)
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")] if found else []
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: dict(zip(split[0][1:], row, strict=True)) for name, *row in split[2:]}


def cases(
    models: list[str], distributions: list[str] | None, densities: list[float], batches: list[int]
) -> list[tuple[str, str, float, str, int]]:
    """Return the rows to measure: (row, model, density, distribution, batch)."""
    return [
        (f"{model}, {distribution} {density:g}, batch {batch}", model, density, distribution, batch)
        for model in models
        for distribution in distributions or ("uniform", *(("erk",) if model == "resnet50" else ()))
        for density in densities
        for batch in batches
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--distributions", nargs="+", help="uniform where not given, and erk of ResNet-50")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--seconds", type=float, default=10.0, help="for the rounds of a row")
    parser.add_argument("--no-peer", action="store_true", help="leave DeepSparse out")
    parser.add_argument("--write", action="store_true", help="put the rows into RESULTS.md, beside those of earlier runs here")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    facts = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
    facts += f"onnxruntime {onnxruntime.__version__}, OpenVINO {openvino.__version__.split('-')[0]}"
    heading = f"{HEADING}, {torch.backends.cpu.get_cpu_capability()}"
    rows = written(facts) if args.write else {}
    for row, model, density, distribution, batch in cases(args.models, args.distributions, args.densities, args.batches):
        print(row, file=sys.stderr, flush=True)
        rows[row] = cells(measure(model, density, distribution, batch, args.seconds, not args.no_peer))
        text = f"{heading}\n\nTimes of engines over ours; {facts}.\n\n{table(rows)}\n"
        print(text, flush=True)
        if args.write:
            write_section(RESULTS, heading, text)


if __name__ == "__main__":
    main()
