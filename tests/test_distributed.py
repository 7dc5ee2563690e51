"""Several ranks: the same masks bit for bit, for every method, under DDP and FSDP2, stopped and resumed, on gloo."""

from pathlib import Path

import pytest
import ranks
import torch
from test_methods import TABLE
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sparsify import SET, RigL, load_sparse, sparsify

METHODS = list(TABLE.values())


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def assert_equal(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b)


def test_ddp_ranks_hold_the_same_masks() -> None:
    first, second = ranks.run(ranks.ddp_methods, 2, METHODS, 24)
    for method in TABLE:
        assert_same(first[method], second[method])


def test_ddp_ranks_hold_the_same_masks_after_hundreds_of_updates() -> None:
    methods = [RigL(1, end_fraction=1.0), SET(1, end_fraction=1.0)]
    first, second = ranks.run(ranks.ddp_methods, 2, methods, 200, "sparse")  # with kept weights only
    for method in methods:
        assert_same(first[method.name], second[method.name])


def test_ddp_trains_compressed_parameters_as_whole_ones() -> None:
    methods = [RigL(2), SET(2)]
    (ours, other), (theirs, _) = (
        ranks.run(ranks.ddp_methods, 2, methods, 20, kernels) for kernels in ("compressed sparse", "sparse")
    )
    for name in ("rigl", "set"):
        assert_same(ours[name], other[name])
        for key, value in theirs[name].items():
            compare = torch.testing.assert_close if value.is_floating_point() else assert_equal
            compare(ours[name][key], value)


@pytest.mark.parametrize("nested", [False, True])
def test_ddp_broadcasts_no_masks(nested: bool) -> None:
    prefix = "1." * nested
    for broadcast, ignored in ranks.run(ranks.ddp_buffers, 2, nested):
        assert broadcast == [f"{prefix}statistics"]
        assert f"{prefix}head.weight_mask.mask" in ignored


def test_ddp_resumes_bit_for_bit(tmp_path: Path) -> None:
    for different in ranks.run(ranks.ddp_resume, 2, METHODS, str(tmp_path)):
        assert different == []


needs_shards = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 cannot shard on the CPU")

SHARDED = ["rigl", "snfs", "gmp-global", "srigl", "nm"]  # what differs most in what its updates look at


@needs_shards
@pytest.mark.parametrize("names", [SHARDED, pytest.param([n for n in TABLE if n not in SHARDED], marks=pytest.mark.sweep)])
def test_fsdp_is_training_on_one_process(names: list[str], tmp_path: Path) -> None:
    results = ranks.run(ranks.fsdp_methods, 2, [TABLE[name] for name in names], str(tmp_path))
    for name in names:
        method = TABLE[name]
        assert_same(results[0][name], results[1][name])
        assert results[0][f"{name} resumed otherwise"] == []
        model = ranks.make(method)
        optimizer = ranks.sgd(model)
        model.updater.attach(optimizer, total_steps=24)
        ranks.train(model, optimizer, 7)
        ranks.train(model, optimizer, 9)
        for key, value in ranks.state(model).items():
            if value.is_floating_point():
                torch.testing.assert_close(value, results[0][name][key], rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(value, results[0][name][key]), (name, key)
    if "rigl" not in names:
        return
    before = {}
    for count in (1, 3):  # ranks, after a save by two
        ends = ranks.run(ranks.fsdp_resume, count, TABLE["rigl"], str(tmp_path / "rigl"))
        for start, end in ends:
            assert_same(start, ends[0][0])
            assert_same(end, ends[0][1])
        before[count] = ends[0][0]
        masks = [key for key in ends[0][1] if key.endswith("_mask.mask")]
        assert all(torch.equal(ends[0][1][key], results[0]["rigl"][key]) for key in masks)
    assert_same(before[1], before[3])


@needs_shards
def test_shards_become_one_sparse_file(tmp_path: Path) -> None:
    first, _ = ranks.run(ranks.export, 2, str(tmp_path / "net"))
    loaded = load_sparse(ranks.Net(), tmp_path / "net")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, first[name]), name


DISAGREEING = {
    "seed": "the seed",
    "schedule": "total_steps",
    "load": "the mask of blocks.0.conv.weight",
    "later": "the mask of head",
    "interval": "the schedule",
    "past ddp": "the mask of blocks",
}


def test_masks_that_disagree_are_found_before_a_step() -> None:
    for messages in ranks.run(ranks.disagree, 2, list(DISAGREEING)):
        for how, first in DISAGREEING.items():
            assert f"the first difference is {first}" in messages[how]
            assert "synchronize()" in messages[how]


def test_ranks_that_disagree_can_take_over_from_one() -> None:
    first, second = ranks.run(ranks.mend, 2)
    assert_same(first, second)


@needs_shards
def test_a_warm_up_of_shards_counts_on_every_rank() -> None:
    (step, first), (other, second) = ranks.run(ranks.warm_up, 2)
    assert (step, other) == (7, 7)
    assert_same(first, second)


def test_ranks_that_train_models_of_their_own() -> None:
    assert ranks.run(ranks.alone, 2) == ["trained 7", "trained 8"]


def test_uneven_inputs() -> None:
    first, second = ranks.run(ranks.uneven, 2)
    assert_same({k: v for k, v in first.items() if "mask" in k}, {k: v for k, v in second.items() if "mask" in k})
    assert_same({"state": first["updater._extra_state"]}, {"state": second["updater._extra_state"]})


def wrong_order(rank: int) -> list[str]:
    messages = []
    model = ranks.Net()
    wrapped = [DistributedDataParallel(model), nn.DataParallel(model), torch.compile(model), AveragedModel(model)]
    wrapped.append(ranks.fully_shard(ranks.Net(), mesh=ranks.init_device_mesh("cpu", (1,))))
    for model in wrapped:
        with pytest.raises(ValueError, match="Sparsify the plain model first, then wrap it") as caught:
            sparsify(model, 0.5)
        messages.append(str(caught.value))
    return messages


def test_wrapping_before_sparsify_says_the_right_order() -> None:
    messages = ranks.run(wrong_order, 1)[0]
    expected = (
        "DistributedDataParallel(model)",
        "DataParallel(model)",
        "torch.compile(model)",
        "AveragedModel(model)",
        "fully_shard(model)",
    )
    for message, text in zip(messages, expected, strict=True):
        assert text in message


def test_synchronize_needs_ranks() -> None:
    with pytest.raises(RuntimeError, match="for several ranks"):
        ranks.make(RigL()).updater.synchronize()
