"""Models with zeros folded and dead channels removed, in other engines: the same numbers, and less to compute."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from test_lowering import ablate, give_statistics
from torch import Tensor, nn

from sparsify import lower
from sparsify.cli import load_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter


def run_onnxruntime(path: Path, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def run_openvino(path: Path, x: Tensor) -> np.ndarray:
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([x.numpy()])[0]


def run_export(path: Path, x: Tensor) -> np.ndarray:
    return torch.export.load(path.with_suffix(".pt2")).module()(x).detach().numpy()


ENGINES: dict[str, Callable[[Path, Tensor], np.ndarray]] = {
    "onnxruntime": run_onnxruntime,
    "openvino": run_openvino,
    "torch.export": run_export,
}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_engines_agree(name: str, tmp_path: Path) -> None:
    model = ablate(give_statistics(load_model(name, device="cpu")), 0.3).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    lowered = lower(model, x, backend="torch")
    assert sum(p.numel() for p in lowered.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    path = tmp_path / "model.onnx"
    torch.onnx.export(lowered, (x,), path, dynamo=True, verbose=False)
    exported = torch.export.export(lowered, (x,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    path.with_suffix(".pt2").write_bytes(file.getvalue())
    with torch.no_grad():
        expected = model(x).numpy()
    for engine, run in ENGINES.items():
        assert np.abs(run(path, x) - expected).max() <= 1e-4 * np.abs(expected).max(), engine


def test_kernels_inside_an_exported_program() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(1, 3, 12, 12)
    exported = torch.export.export(lower(model, x, backend="native"), (x,))
    assert any(node.target is torch.ops.sparsify.run.default for node in exported.graph.nodes)
    with torch.no_grad():
        assert torch.allclose(exported.module()(x), model(x), atol=1e-5)
