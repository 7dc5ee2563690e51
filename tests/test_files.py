"""Files: sparse ones are exact, small, and refused when damaged or hostile; checkpoints name what does not fit."""

import collections
import copy
import hashlib
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from models import SmallNet
from safetensors.torch import load_file, save_file
from test_methods import TABLE, make, start
from test_updates import OPTIMIZERS, X, assert_sparse, attached, train
from torch import Tensor, nn
from torchvision.models import resnet18

from sparsify import (
    GMP,
    NM,
    Method,
    RigL,
    SRigL,
    flop_report,
    fold,
    load_checkpoint,
    load_sparse,
    read_sparse,
    save_checkpoint,
    save_sparse,
    sparsify,
)
from sparsify.saving.files import replacing
from sparsify.saving.sparse_files import _digest


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.embedding(tokens)).relu()) * self.scale


def recurrent() -> nn.Module:
    return nn.GRU(8, 16, batch_first=True)


MODELS = {
    "convolutions": (SmallNet, torch.float32),
    "bfloat16": (SmallNet, torch.bfloat16),
    "float16": (SmallNet, torch.float16),
    "float64": (SmallNet, torch.float64),
    "tied": (Tied, torch.float32),
    "recurrent": (recurrent, torch.float32),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.float32),
}


@pytest.mark.parametrize(("build", "dtype"), MODELS.values(), ids=MODELS)
def test_files_are_exact(build: object, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    model = sparsify(build().to(dtype), 0.3)
    with torch.no_grad():  # kept weights that look like dropped ones, and what arithmetic would lose
        for name, mask in model.updater.masks.items():
            kept = mask.flatten().nonzero().flatten()[:4]
            model.get_parameter(name).view(-1)[kept] = torch.tensor([0.0, -0.0, torch.nan, torch.inf]).to(dtype)
    save_sparse(model, path)
    plain = load_sparse(build().to(dtype), path).state_dict()
    masked = load_sparse(sparsify(build().to(dtype), 0.5, seed=3), path)
    for key, value in fold(model).state_dict().items():
        for copied in (plain[key], masked.state_dict()[key], read_sparse(path)[0][key]):
            assert copied.dtype == value.dtype
            assert copied.contiguous().flatten().view(torch.uint8).tolist() == value.flatten().view(torch.uint8).tolist(), key
    for name, mask in model.updater.masks.items():
        assert torch.equal(masked.updater.masks[name], mask)
    assert masked.updater.nonzeros == model.updater.nonzeros
    assert {name: goal.target for name, goal in masked.updater.goals.items()} == model.updater.nonzeros


def test_a_file_is_as_small_as_the_report_says(tmp_path: Path) -> None:
    model, path = sparsify(resnet18(), 0.1), tmp_path / "net.safetensors"
    save_sparse(model, path)
    expected = flop_report(model, (1, 3, 64, 64)).sparse_bytes
    assert expected < path.stat().st_size < 1.005 * expected
    assert set(load_file(path)) >= {"conv1.weight", "layer1.0.conv1.weight#mask"}  # any safetensors reader opens it


def test_training_goes_on_from_a_sparse_file_and_from_zeros(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    model, optimizer = attached(GMP(2), total=12)
    train(model, [optimizer], 12)
    save_sparse(model, path)
    loaded = load_sparse(sparsify(SmallNet(), 0.5, method=RigL(3)), path)
    from_zeros = sparsify(fold(model), masks=fold(model), method=RigL(3))
    for twin in (loaded, from_zeros):
        assert twin.updater.nonzeros == model.updater.nonzeros
        assert torch.equal(twin.eval()(X), model.eval()(X))
        optimizer = OPTIMIZERS["sgd"](twin.parameters())
        twin.updater.attach(optimizer, total_steps=100)
        train(twin.train(), [optimizer], 7, lambda step, twin=twin: assert_sparse(twin))
        assert twin.updater.nonzeros == model.updater.nonzeros


def test_zeros_outside_weights_are_no_masks() -> None:
    model = Tied()
    with torch.no_grad():
        model.hidden.weight[:, :8] = 0
        model.hidden.bias.zero_()
    sparse = sparsify(model, masks=model, method="rigl", exclude=["embedding.weight"])
    assert sparse.updater.nonzeros == {"hidden.weight": 128}


# What a file must not be


def saved(tmp_path: Path, name: str = "net.safetensors") -> Path:
    save_sparse(sparsify(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4)), 0.3, exclude=["1.*"]), tmp_path / name)
    return tmp_path / name


def test_ten_thousand_mutations(tmp_path: Path) -> None:
    """Flipped, cut, grown and spliced files are refused; one that is read holds what was written, to the bit."""
    path, random_ = saved(tmp_path), random.Random(0)
    original, (weights, masks) = path.read_bytes(), read_sparse(path)
    header = 8 + struct.unpack("<Q", original[:8])[0]
    other, read = saved(tmp_path, "other").read_bytes(), 0
    victim = tmp_path / "victim.safetensors"
    for i in range(10_000):
        data = bytearray(original)
        end = header if i % 2 else len(data)  # half of them in the header
        match i % 5:
            case 0 | 1:
                for _ in range(random_.choice([1, 1, 2, 8])):
                    data[random_.randrange(end)] ^= 1 << random_.randrange(8)
            case 2:
                del data[random_.randrange(len(data)) :]
            case 3:
                at = random_.randrange(end)
                data[at:at] = random_.randbytes(random_.choice([1, 2, 8, 64]))
            case _:
                a, b = sorted(random_.randrange(end) for _ in range(2))
                at = random_.randrange(len(other))
                data[a:b] = other[at : at + b - a]
        if bytes(data) == original:
            continue
        victim.write_bytes(data)
        try:
            found = read_sparse(victim)
        except ValueError:
            continue
        read += 1
        for expected, got in zip((weights, masks), found, strict=True):
            assert expected.keys() == got.keys()
            assert all(torch.equal(value, got[key]) for key, value in expected.items())
    assert read < 200  # such as a space more in the header


def forged(path: Path, **changes: object) -> None:
    """Rewrite a file with changed content and a digest that fits: damage that no digest shows."""
    with safetensors.safe_open(path, "pt") as file:
        facts, content = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, value in changes.items():
        if isinstance(value, Tensor):
            content[key] = value
        elif value is None:
            content.pop(key, None)
        else:
            facts[key] = value if isinstance(value, str) else json.dumps(value)
    save_file(content, path, facts | {"digest": _digest(content, facts)})


HOSTILE = {
    "a shape as large as memory": ({"shapes": {"0.weight": [2**40, 2**20]}}, "bytes for"),
    "a negative shape": ({"shapes": {"0.weight": [-12, -10]}}, "not a shape"),
    "a shape of text": ({"shapes": {"0.weight": "12x10"}}, "not a shape"),
    "shapes of nothing": ({"shapes": {}}, "not of the same weights"),
    "shapes of what is not there": ({"shapes": {"9.weight": [12, 10]}}, "not of the same weights"),
    "shapes that are a list": ({"shapes": [1]}, "not mappings"),
    "deep metadata": ({"shapes": "[" * 100_000}, "damaged"),
    "a mask of too few weights": ({"0.weight#mask": torch.zeros(15, dtype=torch.uint8)}, "its mask keeps 0 weights"),
    "a mask of too many weights": ({"0.weight#mask": torch.full((15,), 255, dtype=torch.uint8)}, "its mask keeps 120"),
    "a mask that is too short": ({"0.weight#mask": torch.zeros(3, dtype=torch.uint8)}, "3 bytes for 120"),
    "a mask of floats": ({"0.weight#mask": torch.zeros(15)}, "bytes for"),
    "no mask": ({"0.weight#mask": None}, "not of the same weights"),
    "shared with nothing": ({"shared": {"1.weight2": "2.weight"}}, "does not hold"),
    "shared over something": ({"shared": {"0.bias": "1.bias"}}, "does not hold"),
    "another format": ({"format": "pt"}, "not of save_sparse"),
    "another version": ({"version": "2"}, "is of version '2' of the format"),
}


@pytest.mark.parametrize(("changes", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(changes: dict, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    forged(path, **changes)
    with pytest.raises(ValueError, match=message):
        read_sparse(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    for name, content in {
        "empty": b"",
        "text": b"hello" * 100,
        "pickle": b"\x80\x04cos\nsystem\n(S'exit'\ntR.",
        "a huge header": struct.pack("<Q", 2**62) + b"{}",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a sparse file, or is damaged"):
            read_sparse(tmp_path / name)
    save_file({"0.weight": torch.zeros(3)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="it is a file of None, not of save_sparse"):
        read_sparse(tmp_path / "plain")
    with pytest.raises(FileNotFoundError):
        read_sparse(tmp_path / "none")


BAD_LOADS = {
    "another architecture": (lambda: nn.Sequential(nn.Linear(12, 10)), r"1\.\w+ is in the file only"),
    "larger": (
        lambda: nn.Sequential(*(nn.Linear(a, b) for a, b in ((12, 10), (10, 4), (4, 4)))),
        "2.weight is in the model",
    ),
    "another shape": (
        lambda: nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 5)),
        r"\(4, 10\) torch.float32 and \(5, 10\)",
    ),
    "another dtype": (
        lambda: nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4)).half(),
        "torch.float32 and .* torch.float16",
    ),
    "another layout": (
        lambda: sparsify(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4)), 0.5, method=SRigL(), exclude=["1.*"]),
        "does not follow the layout fan-in",
    ),
    "dense by rule": (
        lambda: sparsify(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4)), 0.5, exclude=["0.*"]),
        "masks 0.weight, which the model keeps dense",
    ),
}


@pytest.mark.parametrize(("build", "message"), BAD_LOADS.values(), ids=BAD_LOADS)
def test_files_that_do_not_fit_change_nothing(build: object, message: str, tmp_path: Path) -> None:
    model, path = build(), saved(tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_sparse(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", [SRigL(interval=2), NM(2, 4, interval=2), RigL(2, layout="kernels")], ids=lambda m: m.name)
def test_layouts_go_through_files(method: Method, tmp_path: Path) -> None:
    """Masks are looked at themselves: those of one layout load wherever it is kept, and no others do."""
    model, optimizer = start(method)
    train(model, [optimizer], 5)
    save_sparse(model, tmp_path / "net")
    twin, other = start(method, seed=1)
    load_sparse(twin, tmp_path / "net")
    assert all(torch.equal(mask, model.updater.masks[name]) for name, mask in twin.updater.masks.items())
    twin.updater.attach(other, total_steps=40)
    train(twin, [other], 5)
    loose = make(RigL())
    loose.updater.masks["conv2.weight"].copy_(loose.updater.masks["conv2.weight"].flatten().roll(1).view(32, 16, 3, 3))
    state = {k: v for k, v in loose.state_dict().items() if "updater" not in k}
    twin = make(method)
    with pytest.raises(ValueError, match=r"does not follow the layout|masks other weights"):
        twin.load_state_dict(state, strict=False)


def test_a_load_that_fails_leaves_the_model_attached(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = sparsify(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4)), 0.5, method=SRigL(interval=2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.updater.attach(optimizer, total_steps=100)
    with pytest.raises(ValueError, match="does not follow the layout"):
        load_sparse(model, path)
    model(torch.randn(2, 12)).sum().backward()
    optimizer.step()
    assert model.updater.step == 1


def test_models_that_a_file_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no masks"):
        save_sparse(SmallNet(), tmp_path / "net")
    for outer in (nn.Sequential(sparsify(SmallNet(), 0.5)), torch.compile(sparsify(SmallNet(), 0.5))):
        with pytest.raises(ValueError, match=r"it is inside this .*, at '(0|_orig_mod)'"):
            save_sparse(outer, tmp_path / "net")
    with pytest.raises(ValueError, match="on the meta device"):
        save_sparse(sparsify(SmallNet().to("meta"), 0.5), tmp_path / "net")

    class Odd(SmallNet):
        def get_extra_state(self) -> dict:
            return {"notes": 1}

        def set_extra_state(self, state: dict) -> None: ...

    with pytest.raises(ValueError, match="_extra_state is of type dict"):
        save_sparse(sparsify(Odd(), 0.5), tmp_path / "net")
    assert not list(tmp_path.iterdir())


# Checkpoints


def test_checkpoints_name_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    model, optimizer = attached(RigL(3))
    save_checkpoint(path, model=model, optimizer=optimizer, epoch=2)
    assert load_checkpoint(path, model=model, optimizer=optimizer) == {"epoch": 2}
    with pytest.raises(ValueError, match="asked for was model"):
        load_checkpoint(path, model=model)
    with pytest.raises(ValueError, match=r"holds the parts model, optimizer; asked for was model, optimizer, scheduler"):
        load_checkpoint(path, model=model, optimizer=optimizer, scheduler=optimizer)
    with pytest.raises(ValueError, match="another name"):
        save_checkpoint(path, rng=3)
    for other, message in (
        (make(TABLE["set"]), "trained by method 'rigl', the model's is 'set'"),
        (
            sparsify(SmallNet(), 0.2, method=RigL(3)),
            "another density or distribution; the first difference is conv1.weight",
        ),
        (
            sparsify(SmallNet(), 0.3, exclude=["fc.*"]),
            "masks other weights than the model does; the first is fc.weight",
        ),
        (sparsify(SmallNet(), 0.3, "uniform", method=RigL(3)), "the first is conv1.weight"),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(torch.load(path, weights_only=True)["model"])
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_a_folder_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        save_checkpoint(tmp_path / "none" / "run.pt", epoch=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"config": {"rate": [np.float64(0.1)]}}, r"config\['rate'\]\[0\] is a float64"),
        ({"place": Path("x")}, "place is a PosixPath"),
        ({"call": lambda: None}, "call is a function"),
        ({"loaded": 3}, "'loaded' is a name that a checkpoint needs"),
        ({"counts": collections.defaultdict(list)}, "counts is a defaultdict"),
        ({"counts": {np.int64(1): 2}}, "the key .* of counts is a int64"),
        ({}, "nothing to save"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(parts: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "run.pt", **parts)
    assert not list(tmp_path.iterdir())
    plain = {"config": {"rate": 0.1, "steps": (1, 2)}, "best": torch.ones(2), "note": None}
    plain |= {"sizes": torch.Size([1]), "seen": collections.Counter("aab"), "order": collections.OrderedDict(a={1, 2})}
    save_checkpoint(tmp_path / "run.pt", **plain)
    loaded = load_checkpoint(tmp_path / "run.pt")
    assert (loaded["config"], loaded["note"]) == (plain["config"], None)


def test_parts_that_were_not_saved_are_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run.pt", epoch=1)
    with pytest.raises(ValueError, match="asked for was model"):
        load_checkpoint(tmp_path / "run.pt", model=make(RigL()))


def test_a_failed_write_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, epoch=1)
    digest = hashlib.sha256(path.read_bytes()).digest()

    def write() -> None:
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write()
    assert hashlib.sha256(path.read_bytes()).digest() == digest
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_checkpoints_that_are_none_change_nothing(tmp_path: Path) -> None:
    model, optimizer = attached(RigL(3))
    train(model, [optimizer], 2)
    save_checkpoint(tmp_path / "run.pt", model=model, optimizer=optimizer)
    whole = (tmp_path / "run.pt").read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is not a checkpoint, or is damaged"):
            load_checkpoint(tmp_path / name, model=model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match="was not written by save_checkpoint"):
        load_checkpoint(tmp_path / "state.pt", model=model)
    other = make(RigL(3))
    adam = torch.optim.AdamW(other.parameters())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="does not fit the AdamW 'optimizer', and nothing was changed"):
        load_checkpoint(tmp_path / "run.pt", model=other, optimizer=adam)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
