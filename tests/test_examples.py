"""The experiments: data sets from small files, interrupted runs, every command on little data, and the study's verdicts."""

import hashlib
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import data
import experiment
import numpy as np
import pytest
import study
import tasks
import torch
import train as training
from networks import CharGRU, WideResNet22, cifar_resnet50
from PIL import Image
from torchvision import datasets
from train import Run, train

from passes import find_sites, trace

COMMANDS = {
    "methods": (["--methods", "dense", "small-dense", "rigl", "nm", "lottery"], 10),
    "distributions": ([], 8),
    "redistribution": ([], 12),
    "longer": ([], 8),
    "masks": ([], 10),
    "search": ([], 2),
}


@pytest.mark.parametrize(("name", "more", "count"), [(k, *v) for k, v in COMMANDS.items()], ids=COMMANDS)
def test_every_experiment(name: str, more: list, count: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [name, "--quick", "--workers", "1", "--results", str(tmp_path), *more]
    experiment.main(command)
    folder = tmp_path / name / "digits-quick"
    results = {p: p.stat().st_mtime_ns for p in folder.glob("digits*.json")}
    assert len(results) == count
    assert (folder / "score-density.png").stat().st_size > 1000
    assert (folder / "score-flops.png").exists()
    rows = json.loads((folder / "summary.json").read_text())
    assert all(0 <= row["mean"] <= 100 and row["training_ratio"] > 0 for row in rows)
    assert "training FLOPs" in capsys.readouterr().out
    experiment.main(command)  # nothing is trained again
    assert results == {p: p.stat().st_mtime_ns for p in folder.glob("digits*.json")}


@pytest.mark.sweep
def test_runs_on_several_processes(tmp_path: Path) -> None:
    command = ["methods", "--quick", "--workers", "2", "--results", str(tmp_path), "--methods", "static", "set"]
    experiment.main(command)
    assert len(list(tmp_path.rglob("digits-method*.json"))) == 4


class Killed(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("method", ["rigl", "set", "snfs", "gmp-global"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    run = Run("digits", method, longer=0.2)
    expected = train(run, tmp_path / "whole", show=False)

    def breaking(root: Path | None, quick: bool, validation: bool) -> data.Data:
        whole = data.digits(root, quick, validation)

        def batches(seed: int, epoch: int) -> data.Batches:
            for i, batch in enumerate(whole.train(seed, epoch)):
                if (epoch, i) == (4, 7):
                    raise Killed
                yield batch

        return replace(whole, train=batches)

    with monkeypatch.context() as patch:
        patch.setitem(tasks.TASKS, "digits", replace(tasks.TASKS["digits"], data=breaking))
        with pytest.raises(Killed):
            train(run, tmp_path / "broken", show=False)
    assert not list((tmp_path / "broken").glob("*.json"))
    assert list((tmp_path / "broken").glob("*.pt"))
    result = train(run, tmp_path / "broken", show=False)
    assert {**result, "cpu_seconds": 0} == {**expected, "cpu_seconds": 0}
    whole, broken = (torch.load(tmp_path / part / f"{run.name}.masks.pt") for part in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, fine: bool) -> None:
    """Write files in the format of CIFAR, 20 images each, and tell torchvision their checksums."""
    dataset = datasets.CIFAR100 if fine else datasets.CIFAR10
    folder = root / dataset.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: dict) -> str:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    key = "fine_labels" if fine else "labels"
    for part in ("train_list", "test_list"):
        checksums = []
        for name, _ in getattr(dataset, part):
            images = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
            checksums.append([name, write(name, {"data": images, key: [int(n) for n in rng.integers(0, 10, 20)]})])
        monkeypatch.setattr(dataset, part, checksums)
    names = {"fine_label_names" if fine else "label_names": [str(i) for i in range(100 if fine else 10)]}
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": write(dataset.meta["filename"], names)})


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, fine=name == "cifar100")
    content = tasks.TASKS[name].data(tmp_path, True)
    count = {"cifar10": 90, "cifar100": 18}[name]  # a tenth is for validation
    assert content.steps == -(-count // 128)
    x, y = next(content.train(0, 0))
    assert (tuple(x.shape), len(y)) == ((count, 3, 32, 32), count)
    again, other = next(content.train(0, 0))[0], next(content.train(0, 1))[0]
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    if name == "cifar10":
        result = train(Run(name, "static", 0.2), tmp_path / "results", tmp_path, quick=True, show=False)
        assert result["inference_ratio"] == pytest.approx(0.3521, abs=1e-4)


def test_imagenet_folder(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in ("n01", "n02"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (80, 60), (40 * i, 90, 20)).save(folder / f"{i}.JPEG")
    content = data.imagenet(tmp_path, quick=True)
    x, y = next(content.train(0, 0))
    assert (tuple(x.shape), sorted(y.tolist())) == ((4, 3, 224, 224), [0, 0, 1, 1])
    assert next(content.test())[0].shape == (4, 3, 224, 224)
    (tmp_path / "val" / "n02").rename(tmp_path / "val" / "n03")
    with pytest.raises(SystemExit, match="different classes"):
        data.imagenet(tmp_path)


def test_data_that_is_missing_or_incomplete(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--data; FOLDER/cifar-10-batches-py/ must hold"):
        data.cifar10(None)
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(SystemExit, match=r"cifar-100-python/ must hold the extracted archive of its website, complete"):
        data.cifar100(tmp_path)
    with pytest.raises(SystemExit, match=r"train/ must hold"):
        data.imagenet(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(SystemExit, match=r"one folder per class"):
        data.imagenet(tmp_path)
    with pytest.raises(SystemExit, match="no text file"):
        data.characters(tmp_path / "book.txt")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit, match="has 9 characters"):
        data.characters(tmp_path / "short.txt")


def test_characters() -> None:
    content = data.characters(quick=True, batch=4, length=16)
    (x, y), (again, _) = next(content.train(1, 0)), next(content.train(1, 0))
    assert x.shape == y.shape == (4, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])  # the next character
    assert torch.equal(x, again)
    assert sum(len(batch) for batch, _ in content.test()) > 16


def test_validation_data_is_neither_trained_nor_tested_on() -> None:
    def rows(batches: data.Batches) -> set[bytes]:
        return {row.numpy().tobytes() for x, _ in batches for row in x}

    usual, held = data.digits(), data.digits(validation=True)
    assert rows(held.test()) <= rows(usual.train(0, 0))
    assert not rows(held.test()) & (rows(held.train(0, 0)) | rows(usual.test()))
    text = data.characters(quick=True, batch=4, length=16)
    validated = data.characters(quick=True, validation=True, batch=4, length=16)
    assert not rows(text.test()) & rows(validated.test())


def test_results_of_other_data_are_not_taken_over(tmp_path: Path) -> None:
    run = Run("digits", "static")
    train(run, tmp_path, quick=True, show=False)
    with pytest.raises(SystemExit, match=r"was made with quick=True, asked for is False. Name another folder"):
        train(run, tmp_path, quick=False, show=False)
    (tmp_path / "book.txt").write_text("abc " * 5000)
    run = Run("chars-small", "static")
    train(run, tmp_path, tmp_path / "book.txt", quick=True, show=False)
    with pytest.raises(SystemExit, match=r"data='.*book.txt', asked for is 'built in'"):
        train(run, tmp_path, quick=True, show=False)


def test_what_is_kept_counts_dense_layers() -> None:
    task, run = tasks.TASKS["digits"], Run("digits", "static", 0.05, "uniform")
    shares = []
    for distribution in ("uniform", "constant"):
        dense = task.model()
        model = training._build(replace(run, distribution=distribution), task, dense, Path(), None, True, 100)
        shares.append(training._costs(run, task, _attached(model), dense)["kept"])
    sizes = [288, 18_432, 73_728, 720]
    kept = [288, 922, 3687, 36]  # of 0.05, rounded up; the first layer dense
    assert shares == pytest.approx([sum(kept) / sum(sizes), (15 + sum(kept[1:])) / sum(sizes)])


def _attached(model: torch.nn.Module) -> torch.nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model.updater.attach(optimizer, total_steps=1)
    optimizer.step()
    return model


def test_the_language_model_learns(tmp_path: Path) -> None:
    task = replace(tasks.TASKS["chars-small"], data=lambda *_: data.characters(quick=True, batch=16, length=32))
    run = Run("chars-small", density=0.2, longer=5.0, interval=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "chars-small", task)
        assert train(run, tmp_path, show=False)["bits"] < 5.5  # 8 at random


def test_architectures_of_the_papers() -> None:
    net = WideResNet22()
    assert sum(s.size for s in find_sites(net, trace(net))) == 1_076_912
    gru = CharGRU()
    assert gru.gru.weight_hh_l0.shape == (1536, 512)
    assert gru.embedding.weight.shape == (256, 128)
    with torch.device("meta"):
        resnet = cifar_resnet50()
    assert resnet(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 100)
    assert [tasks.TASKS[name].epochs for name in ("cifar10", "cifar100")] == [250, 250]
    rate = tasks.TASKS["cifar10"].schedule
    assert [rate(step, 88_000) for step in (0, 29_999, 30_000, 60_000)] == pytest.approx([1, 1, 0.2, 0.04])


def test_the_studys_verdicts() -> None:
    """Two densities, three seeds: at 0.5 the first is better by 1, at 0.1 seeds disagree."""
    results = []
    for density, gaps in ((0.5, (1.0, 1.1, 0.9)), (0.1, (3.0, -3.0, 0.5))):
        for seed, gap in enumerate(gaps):
            for method, score in (("rigl", 90.0 + gap), ("static", 90.0)):
                results.append({"run": vars(Run("digits", method, density, seed=seed)), "accuracy": score})
    claim = study.Claim("RigL beats static masks", {}, {"method": "static"})
    assert study.judge(claim, results, "digits") == "| RigL beats static masks | in part | 0.5 | - | 0.5: +1.00, 0.1: +0.17 |"
    claim = study.Claim("Static is not worse", {"method": "static"}, {}, not_worse=True)
    assert study.judge(claim, results, "digits") == "| Static is not worse | in part | 0.1 | 0.5 | 0.5: -1.00, 0.1: -0.17 |"


@pytest.mark.sweep  # every method and every claim, if only for a moment
def test_the_study_writes_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SEEDS", {"digits": 1})
    study.main(["--quick", "--workers", "1", "--results", str(tmp_path / "results"), "--output", str(tmp_path)])
    text = (tmp_path / "STUDY.md").read_text()
    assert "| RigL beats static masks |" in text
    assert all(f"| {name} " in text for name in ("dense", "small-dense", "srigl", "lottery"))
    assert (tmp_path / "study" / "digits" / "densities.png").exists()


def test_the_first_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import digits

    monkeypatch.setattr(sys, "argv", ["digits.py", "--quick"])
    digits.main()
    assert "rigl" in capsys.readouterr().out
