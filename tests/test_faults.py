"""Processes that are killed, at any moment: no file is half-written, and training goes on as if nothing had been."""

import os
import random
import time
from pathlib import Path

import pytest
import ranks
import torch
from forks import killed
from test_distributed import assert_same
from test_methods import TABLE
from torch import multiprocessing

from sparsify import load_checkpoint, load_sparse, read_sparse, save_sparse


def test_training_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """Checkpoints after every step: a kill loses the step it hits, and the end is bit for bit that of an unbroken run."""
    method, path, end = TABLE["rigl-sm"], tmp_path / "run.pt", tmp_path / "end.pt"
    began = time.monotonic()
    whole, _ = ranks.train_saving(method, tmp_path / "whole.pt", None)
    most, moments, kills, done = (time.monotonic() - began) / 4, random.Random(0), 0, 0
    while killed(ranks.train_saving, (method, path, end), path, moments.uniform(0, most)):
        kills += 1
        saved = torch.load(path, weights_only=True)["step"] if path.exists() else 0
        assert saved > done
        done = saved
    assert kills >= 3
    assert_same(torch.load(end, weights_only=True), whole)


def test_files_are_whole_whenever_their_writer_is_killed(tmp_path: Path) -> None:
    path, moments = tmp_path / "net.safetensors", random.Random(1)
    name = "blocks.1.conv.weight"
    for _ in range(10):
        assert killed(ranks.save_forever, (path,), path, moments.uniform(0, 0.3))
        weights, masks = read_sparse(path)
        assert int(masks[name].sum()) == torch.count_nonzero(weights[name])
        assert (weights["blocks.0.conv.bias"] == weights["blocks.0.conv.bias"][0]).all()  # of one moment
    load_sparse(ranks.Net(), path)


def test_a_rank_that_dies(tmp_path: Path) -> None:
    """Two ranks, one of which is killed: the run ends, goes on with two bit for bit, and with one or three as well."""
    method = TABLE["rigl"]
    whole = ranks.run(ranks.train_or_die, 2, method, tmp_path / "whole.pt", None)
    for count in (2, 1, 3):
        path = tmp_path / f"{count}.pt"
        started = time.monotonic()
        with pytest.raises(multiprocessing.ProcessExitedException) as caught:
            ranks.run(ranks.train_or_die, 2, method, path, 11)
        assert caught.value.signal_name == "SIGKILL"
        assert time.monotonic() - started < 60  # nobody waits for the dead
        ends = ranks.run(ranks.train_or_die, count, method, path, None)
        for end in ends:
            assert_same(end, ends[0])
        if count == 2:
            assert_same(ends[0], whole[0])


def test_leftovers_of_a_killed_writer_do_no_harm(tmp_path: Path) -> None:
    model, path = ranks.make(TABLE["static"]), tmp_path / "net.safetensors"
    (tmp_path / f".net.safetensors.{os.getpid()}.partial").write_bytes(b"half")
    save_sparse(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    assert load_checkpoint(tmp_path / "none.pt", model=model) is None
