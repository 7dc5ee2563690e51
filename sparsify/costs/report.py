"""The static FLOP report: what a model costs, from shapes and mask densities, without a forward pass.

One multiply-accumulate is 1 MAC; FLOPs = 2 * MACs. Counted are convolutions, linear layers and attention products; norms,
pooling and resizing stand apart, as fvcore counts them, outside every ratio.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any

from tabulate import tabulate
from torch import nn

from passes.masking.mask import masks_of
from sparsify.costs.plots import plot_layers
from sparsify.costs.speed import SpeedReport
from sparsify.saving.files import replacing
from sparsify.training.lookup import updater_of


@dataclass(frozen=True)
class Layer:
    """One row: a weight, or a product of activations (`weight_shape` None).

    MACs are those of one forward pass in evaluation, summed over every use of the weight.
    """

    name: str  # of the parameter; of the module or node for products
    op: str
    weight_shape: tuple[int, ...] | None
    params: int
    nonzeros: int
    dense_macs: int
    sparse_macs: int
    status: str  # "masked", "dense", "unsupported"; "product" without a weight
    reason: str = ""  # why it is dense or unsupported
    dead_outputs: int = 0  # output channels that keep no input

    @property
    def density(self) -> float:
        """Kept fraction; 1 for products."""
        return self.nonzeros / self.params if self.params else 1.0


@dataclass(frozen=True)
class Source:
    """What a report is of.

    Attributes:
        model: the module itself.
        counts: {parameter name: kept weights} at that time.
        page: makes the page of reports on it.
    """

    model: nn.Module
    counts: dict[str, int]
    page: Callable[..., str]

    def check(self) -> None:
        """Raise if the masks keep other numbers of weights than they did, or the run has gone on."""
        if self.counts != counts_of(self.model):
            raise ValueError("The model has been trained or changed since this report: call flop_report(model, inputs) again.")


def counts_of(model: nn.Module) -> dict[str, int]:
    """Return how many weights the masks of a model keep, and the step of its updater."""
    updater = updater_of(model)
    counts = {name: mask.nonzeros for name, mask in masks_of(model).items()}
    return counts | {"": updater.step} if updater else counts


@dataclass(frozen=True)
class FlopReport:
    """What `flop_report` returns.

    `dense_macs` and `sparse_macs` are of one inference on the given inputs; `other_flops` are the norms', poolings' and
    resizings' by fvcore; `uncounted` are the operations without a counter, with how often each ran.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    method: str
    layers: tuple[Layer, ...]
    dense_bytes: int
    sparse_bytes: int
    final_ratio: float  # inference_ratio at the end of training: of a method that still prunes, as the distribution has it
    training_ratio: float  # training FLOPs relative to dense, by the published closed form
    exact_training_ratio: float  # by the schedule of a run of `total_steps` steps
    total_steps: int
    other_flops: int = 0
    uncounted: dict[str, int] = field(default_factory=dict)
    measured: bool = False  # on the given data, because shapes depend on it
    source: Source | None = field(default=None, repr=False, compare=False)  # what it is of, for pictures of it

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense model."""
        return sum(layer.dense_macs for layer in self.layers)

    @property
    def sparse_macs(self) -> int:
        """Multiply-accumulates that the masks leave."""
        return sum(layer.sparse_macs for layer in self.layers)

    @property
    def inference_ratio(self) -> float:
        """sparse_macs / dense_macs: f_S relative to f_D."""
        return self.sparse_macs / self.dense_macs if self.dense_macs else 1.0

    @property
    def density(self) -> float:
        """Kept fraction over all masked weights; 1 where nothing is masked."""
        masked = [layer for layer in self.layers if layer.status == "masked"]
        return sum(m.nonzeros for m in masked) / sum(m.params for m in masked) if masked else 1.0

    @property
    def coverage(self) -> dict[str, str]:
        """{parameter name: "masked", or why it is not}, for every weight that is consumed."""
        return {x.name: x.status + (f": {x.reason}" if x.reason else "") for x in self.layers if x.weight_shape}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain Python values, ready for JSON."""
        names = ("dense_macs", "sparse_macs", "inference_ratio", "density")
        layers = [{**asdict(layer), "density": layer.density} for layer in self.layers]
        return {**asdict(replace(self, source=None)), **{name: getattr(self, name) for name in names}, "layers": layers}

    def to_html(self, path: str, *, others: "Mapping[str, FlopReport] | None" = None, speed: SpeedReport | None = None) -> None:
        """Write the report as one HTML file that opens offline: totals, layers, the rewritten graph, masks, the run so far.

        Args:
            path: of the file to write.
            others: {name: report} of the same model otherwise, such as with other distributions, for a switch; the name of
                this one is that of its method, or the entry that is this very report.
            speed: what `speed_report` measured of the model.

        Raises:
            ValueError: the model has changed since the report, or the report has lost it (by pickling); another report is of
                other layers.

        Example:
            >>> import tempfile
            >>> from torch import nn
            >>> from sparsify import flop_report, sparsify
            >>> model = sparsify(nn.Sequential(nn.Linear(8, 8)), density=0.5)
            >>> flop_report(model, (1, 8)).to_html(tempfile.mktemp(suffix=".html"))
        """
        if self.source is None:
            raise ValueError(
                "The report has lost its model, as copies through files do: call flop_report(model, inputs) again."
            )
        self.source.check()
        others = others or {}
        own = next((name for name, r in others.items() if r is self), self.method)
        reports = {own: self} | dict(others)
        if strange := [name for name, r in reports.items() if [x.name for x in r.layers] != [x.name for x in self.layers]]:
            raise ValueError(f"The report {strange[0]!r} is of other layers; a page compares reports on one model.")
        text = self.source.page(self.source.model, reports, speed, "\n".join(self._summary()))
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        heads, rows, summary = self.table()
        return f"{rendered(heads, rows, 'html')}<pre>{escape(chr(10).join(summary))}</pre>"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "source": None}

    def plot(self, path: str) -> None:
        """Draw density and MACs per layer, dense beside sparse, into a file (needs the extra `plots`).

        Args:
            path: of the file to write; its ending chooses the format (.png, .svg, .pdf).
        """
        bars = [(layer.name, layer.density, layer.dense_macs, layer.sparse_macs) for layer in self.layers]
        plot_layers(bars, f"{self.model}: {self.inference_ratio:.4f} of dense MACs", path)

    def table(self) -> tuple[tuple[str, ...], list[tuple[Any, ...]], list[str]]:
        """Return the heads of the table's columns, its rows, the last of which is the total, and the lines below it."""
        params = sum(layer.params for layer in self.layers)
        nonzeros = sum(layer.nonzeros for layer in self.layers)
        kept = f"{nonzeros / max(params, 1):.4f}"
        total = ("total", "", "", nonzeros, params, kept, self.dense_macs, self.sparse_macs)
        return _HEAD, [*(_cells(layer) for layer in self.layers), total], self._summary()

    def __str__(self) -> str:
        """Return the table that people read."""
        heads, rows, summary = self.table()
        return "\n".join([rendered(heads, rows), "", *summary])

    def _summary(self) -> list[str]:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.inputs)
        lines = [
            f"{self.model} on {shapes}, method {self.method} (1 MAC = 1 multiply-accumulate; FLOPs = 2 * MACs)",
            f"inference: {self.inference_ratio:.4f} of dense ({_short(self.sparse_macs)} of {_short(self.dense_macs)} MACs)",
            f"training:  {self.training_ratio:.4f} of dense by the published formula, {self.exact_training_ratio:.4f} by the"
            f" schedule of {self.total_steps:,} steps",
            f"file:      {self.sparse_bytes / max(self.dense_bytes, 1):.4f} of dense ({_short(self.sparse_bytes)}B of "
            f"{_short(self.dense_bytes)}B; masks at 1 bit per weight included)",
            f"apart:     {_short(self.other_flops)} FLOPs in norms, pooling and resizing, as fvcore counts them",
        ]
        if self.final_ratio != self.inference_ratio:
            lines.insert(2, f"at the end: {self.final_ratio:.4f} of dense, when {self.method} has pruned")
        if self.measured:
            lines.append("measured:  shapes depend on data in this model, so the MACs are those of these inputs")
        if dead := sum(layer.dead_outputs for layer in self.layers):
            lines.append(f"dead:      {dead:,} output channels keep no input")
        if self.uncounted:
            lines.append("uncounted: " + ", ".join(f"{name} x{n}" for name, n in self.uncounted.items()))
        reasons = Counter((x.status, x.reason) for x in self.layers if x.weight_shape)
        lines += ["coverage:  " + ", ".join(f"{n} {status}{f' ({why})' * bool(why)}" for (status, why), n in reasons.items())]
        return lines


def rendered(heads: Sequence[str], rows: Sequence[Sequence[Any]], style: str = "simple") -> str:
    """Return the table of a report, or some of its columns, in a style of tabulate."""
    texts = [i for i, head in enumerate(heads) if head in ("layer", "op", "weight", "density")]
    return tabulate(rows, headers=heads, tablefmt=style, intfmt=",", disable_numparse=texts)


_HEAD = ("layer", "op", "weight", "kept", "of", "density", "dense MACs", "sparse MACs")


def _cells(layer: Layer) -> tuple[Any, ...]:
    shape = "x".join(map(str, layer.weight_shape)) if layer.weight_shape else ""
    note = {"masked": "", "product": ""}.get(layer.status, f" ({layer.status})")
    kept = (layer.nonzeros, layer.params) if layer.params else ("", "")
    return layer.name, layer.op, shape, *kept, f"{layer.density:.4f}{note}", layer.dense_macs, layer.sparse_macs


def _short(number: float) -> str:
    """Return a number with three digits after the point and a decimal prefix: 4089184256 is "4.089 G"."""
    thousands = min((len(str(int(number))) - 1) // 3, len(_PREFIXES) - 1)
    return f"{number / 1000**thousands:.3f} {_PREFIXES[thousands]}"


_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y", "R", "Q")
