"""Lightning, the Hugging Face Trainer, Accelerate, TensorBoard: the real packages, on the hooks that anybody has."""

import json
import logging
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forks import python
from models import SmallNet
from test_updates import X, Y, assert_sparse, attached, train
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from sparsify import RigL, fold, sparsify
from sparsify.integrations.loggers import log_sparsity
from sparsify.integrations.model_explorer import write_for_model_explorer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # lightning's own imports
    import lightning as L
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from sparsify.integrations import lightning, transformers

ROOT = Path(__file__).parents[1]
# Of the libraries, about what they were not asked for.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning", "ignore::FutureWarning")


class Lit(L.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = sparsify(SmallNet(), 0.3, method=RigL(3))

    def training_step(self, batch: tuple, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def trainer(folder: Path, epochs: int, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    both = [lightning.SparseTraining(), *callbacks]
    return L.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=both, **quiet, **options)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=2, num_workers=0)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}, {"precision": "bf16-mixed"}])
def test_lightning(options: dict, tmp_path: Path) -> None:
    model = Lit()
    first = {n: m.clone() for n, m in model.net.updater.masks.items()}
    fit = trainer(tmp_path, 4, log_every_n_steps=1, **options)
    fit.fit(model, loader())
    steps = 16 // options.get("accumulate_grad_batches", 1)
    assert model.net.updater.step == model.net.updater.total_steps == steps
    assert len(model.net.updater.history) == 1 + len(range(3, 3 * steps // 4, 3))
    assert any(not torch.equal(m, first[n]) for n, m in model.net.updater.masks.items())
    assert_sparse(model.net)
    assert fit.logged_metrics["net/sparsity/density"] == pytest.approx(0.3, abs=1e-3)


def test_lightning_averages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_buffers=False"):
        trainer(tmp_path, 1, EMAWeightAveraging(decay=0.5)).fit(Lit(), loader())
    model = Lit()
    trainer(tmp_path, 4, EMAWeightAveraging(decay=0.5, use_buffers=False)).fit(model, loader())
    masks = model.net.updater.masks
    assert {name: int(mask.sum()) for name, mask in masks.items()} == model.net.updater.nonzeros
    plain = fold(model.net).eval()
    assert torch.equal(plain(X), model.net.eval()(X))


class LateLit(Lit):
    """Makes its model sparse where Lightning wants modules to be made."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()

    def configure_model(self) -> None:
        if type(self.net) is SmallNet:
            self.net = sparsify(self.net, 0.3, method=RigL(3))


def test_lightning_configures_the_model(tmp_path: Path) -> None:
    model = LateLit()
    trainer(tmp_path, 2).fit(model, loader())
    assert model.net.updater.step == 8


def test_callbacks_refuse_dense_models(tmp_path: Path) -> None:
    model = Lit()
    model.net = SmallNet()
    with pytest.raises(ValueError, match=r"Lit has no sparse model inside: call sparsify\(\)"):
        trainer(tmp_path, 1).fit(model, loader())
    dense = fold(bert())
    training = Trainer(dense, arguments(tmp_path), train_dataset=data(), callbacks=[transformers.SparseTraining()])
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no sparse model inside"):
        training.train()


def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = Lit()
    trainer(tmp_path / "whole", 4).fit(whole, loader())
    part = Lit()
    stopped = trainer(tmp_path / "part", 4, limit_train_batches=1.0)
    stopped.fit_loop.max_epochs = 4

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    stopped.callbacks.append(Stop())
    stopped.fit(part, loader())
    assert part.net.updater.step == 8
    stopped.save_checkpoint(tmp_path / "part.ckpt")
    resumed = Lit(seed=1)
    trainer(tmp_path / "again", 4).fit(resumed, loader(), ckpt_path=tmp_path / "part.ckpt", weights_only=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def bert(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    return sparsify(BertForSequenceClassification(config), 0.3, method=RigL(3))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        max_steps=20,
        logging_steps=5,
        save_steps=10,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )


def data() -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 32, (40, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 3} for row in tokens]


def test_trainer_trains_logs_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    model = bert()
    trained = Trainer(model, arguments(tmp_path), train_dataset=data(), callbacks=[transformers.SparseTraining()])
    trained.train()
    updater = model.updater
    assert (updater.step, updater.total_steps) == (20, 20)
    assert [entry.step for entry in updater.history] == [0, 3, 6, 9, 12]
    assert_sparse(model)
    logs = [record for record in trained.state.log_history if "loss" in record]
    assert all(record["sparsity/density"] == pytest.approx(0.3, abs=1e-2) for record in logs)
    resumed = bert(seed=1)
    again = Trainer(resumed, arguments(tmp_path), train_dataset=data(), callbacks=[transformers.SparseTraining()])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    again.train()  # a second training begins anew
    assert (resumed.updater.step, len(resumed.updater.history)) == (20, 5)


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_trainer_options(options: dict, tmp_path: Path) -> None:
    model = bert()
    first = {n: m.clone() for n, m in model.updater.masks.items()}
    quiet = [transformers.SparseTraining(log=False)]
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=data(), callbacks=quiet)
    trainer.train()
    assert not any("sparsity/density" in record for record in trainer.state.log_history)
    assert model.updater.step == 20
    assert_sparse(model)
    assert any(not torch.equal(m, first[n]) for n, m in model.updater.masks.items())


def runs(example: str, *options: str, rank: int | None = None) -> str:
    """Code that runs an example, as torchrun starts it where it has a rank."""
    ranks = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} if rank is not None else {}
    place = str(ROOT / "examples" / example)
    lines = ["import os, runpy, sys", f"os.environ |= {ranks}", f"sys.argv = {[place, *options]}"]
    lines += ["sys.path.insert(0, os.path.dirname(sys.argv[0]))", "runpy.run_path(sys.argv[0], run_name='__main__')"]
    return "\n".join(lines)


def test_accelerate_example() -> None:
    ((printed, _),) = python([runs("accelerate_digits.py", "--epochs", "3")], os.environ)
    assert "density 0.100, step 60 of 60" in printed


def test_accelerate_wrappers_are_named() -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    model = sparsify(SmallNet(), 0.3)
    wrapped = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"not AcceleratedOptimizer around it.*\.optimizer"):
        model.updater.attach(wrapped, total_steps=1000)


def test_ddp_example(tmp_path: Path) -> None:
    """Two CPU processes out of the box; stopped and gone on with."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    codes = [runs("ddp.py", "--epochs", "2", "--checkpoint", str(tmp_path / "run.pt"), rank=rank) for rank in range(2)]
    ends = []
    for _ in range(2):  # the second time, nothing is left to train
        printed = [text for text, _ in python(codes, os.environ | group)]
        ends.append(sorted(line for text in printed for line in text.splitlines() if line.startswith("rank")))
    assert [line.split(":")[0] for line in ends[0]] == ["rank 0 of 2", "rank 1 of 2"]
    assert len({line.split(":")[1] for line in ends[0]}) == 1
    assert "step 38" in ends[0][0]
    assert ends[1] == ends[0]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, optimizer = attached(RigL(2))
    with SummaryWriter(tmp_path) as writer:
        for step in range(4):
            train(model, [optimizer], 1)
            for name, value in model.updater.scalars().items():
                writer.add_scalar(name, value, step)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("sparsity/updates")] == [0.0, 1.0, 1.0, 2.0]


def test_tensorboard_gets_scalars_histograms_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = torch.nn.ModuleDict({"net": sparsify(SmallNet(), 0.3), "other": torch.nn.Linear(2, 2)})
    with SummaryWriter(str(tmp_path)) as writer:
        log_sparsity(writer, model, 7)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    tags = found.Tags()
    names = list(model["net"].updater.masks)
    assert {f"net/sparsity/density/{name}" for name in names} < set(tags["scalars"])
    assert set(tags["histograms"]) == {f"net/sparsity/fan-in/{name}" for name in names}
    assert set(tags["images"]) == {f"net/sparsity/mask/{name}" for name in names}
    event = found.Histograms(f"net/sparsity/fan-in/{names[0]}")[0]
    kept = model["net"].updater.masks[names[0]].flatten(1).sum(1)
    assert (event.step, event.histogram_value.num, event.histogram_value.sum) == (7, len(kept), int(kept.sum()))


def test_weights_and_biases_gets_the_same_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    model = sparsify(SmallNet(), 0.3)
    with wandb.init(mode="offline", project="test", dir=str(tmp_path)) as run:
        log_sparsity(run, model, 3)
    name, deadline = list(model.updater.masks)[-1], time.monotonic() + 60
    while f"sparsity/fan-in/{name}".encode() not in (written := next(tmp_path.rglob("*.wandb")).read_bytes()):
        assert time.monotonic() < deadline  # a process of wandb's own writes
        time.sleep(0.1)
    for name in model.updater.masks:
        assert f"sparsity/density/{name}".encode() in written
        assert f"sparsity/fan-in/{name}".encode() in written
    assert len(list(tmp_path.rglob("*.png"))) == len(model.updater.masks)


def test_model_explorer_gets_a_density_for_every_operation_with_weights(tmp_path: Path) -> None:
    """The node data's keys are nodes of the program, which its adapter takes for identifiers of the graph named "graph"."""
    model = sparsify(torch.nn.Sequential(SmallNet(), torch.nn.Linear(10, 4), torch.nn.TransformerEncoderLayer(4, 2, 8)), 0.3)
    write_for_model_explorer(model, (1, 3, 8, 8), tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    results = json.loads((tmp_path / "net.json").read_text())["graph"]["results"]
    nodes = {node.name: node for node in program.graph.nodes}
    operations = [nodes[name] for name in results if nodes[name].op == "call_function"]
    densities = model.updater.densities
    assert len(operations) >= len(densities)
    for node in operations:
        weights = [program.graph_signature.inputs_to_parameters.get(given.name) for given in node.all_input_nodes]
        assert results[node.name]["value"] in [densities[name] for name in weights if name in densities]
    tied = torch.nn.Sequential(
        torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 6))
    )
    tied[1].weight = tied[0].weight
    write_for_model_explorer(sparsify(tied, 0.5), (2, 6), tmp_path / "tied.pt2")
    assert {"linear", "linear_1"} <= json.loads((tmp_path / "tied.json").read_text())["graph"]["results"].keys()
    with pytest.raises(ValueError, match="takes a sparse model"):
        write_for_model_explorer(SmallNet(), (1, 3, 8, 8), tmp_path / "net.pt2")
    with pytest.raises(ValueError, match=r"by the name \.pt2, and this is 'net'"):
        write_for_model_explorer(model, (1, 3, 8, 8), tmp_path / "net")


def test_loggers_that_are_none() -> None:
    with pytest.raises(TypeError, match="SummaryWriter or a run of wandb, not list"):
        log_sparsity([], sparsify(SmallNet(), 0.3), 0)
    with pytest.raises(ValueError, match="no sparse model inside"):
        log_sparsity([], SmallNet(), 0)
