"""Lowered models of Python code, as one graph by torch.export where it holds; attention on the kernels."""

import copy
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_native_kernels import thin
from torch import Tensor, nn

from passes.kernels.compiler import native
from passes.lowering.attention import attend, bias_of
from passes.lowering.program import Program
from passes.lowering.segment import Segment
from passes.lowering.whole import Whole
from sparsify import lower

pytestmark = pytest.mark.skipif(native() is None, reason="there is no C++ compiler here")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def kinds(lowered: nn.Module) -> list[list[str]]:
    """What the segments of a model compute that run, operation by operation."""
    inside = lowered._whole if isinstance(lowered, Whole) else lowered
    segments = [m for m in inside.modules() if isinstance(m, Segment)]
    return [[op.kind for op in Program.from_json(segment.program).ops] for segment in segments]


def assert_same(first: nn.Module, second: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        expected, found = first(*args, **kwargs), second(*args, **kwargs)
    assert type(expected) is type(found)
    pairs = [(expected, found)] if isinstance(expected, Tensor) else zip(expected.to_tuple(), found.to_tuple(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(b, a, atol=1e-5 * float(a.abs().max()), rtol=0)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return thin(transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=50)))


@functools.cache
def lowered_bert() -> nn.Module:
    """What tests share that do not change it."""
    return lower(bert(), TOKENS, backend="native")


def runs_of_whole(lowered: nn.Module) -> list[int]:
    """A list that grows with every run of the whole graph."""
    runs: list[int] = []
    lowered._whole.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_a_transformer_is_one_plan() -> None:
    model = bert()
    lowered = lower(model, TOKENS, backend="native")
    layer = ["linear", "linear", "linear", "attention", "linear", "layer_norm", "linear", "linear", "layer_norm"]
    assert kinds(lowered)[0] == ["layer_norm", *layer, *layer]  # activations and residuals are in the layers
    runs = runs_of_whole(lowered)
    for given in (TOKENS, torch.randint(0, 50, (3, 7)), torch.randint(0, 50, (5, 40))):
        assert_same(model, lowered, given)
    assert len(runs) == 3


CALLS: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "a mask": lambda: ((TOKENS, (torch.rand(2, 12) < 0.7).long()), {}),
    "by name": lambda: ((), {"input_ids": TOKENS}),
    "one sample": lambda: ((TOKENS[:1],), {}),
    "32-bit numbers": lambda: ((TOKENS.int(),), {}),
    "as a tuple": lambda: ((TOKENS,), {"output_hidden_states": True}),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_of_another_kind_run_the_code(case: str) -> None:
    model, lowered, (args, kwargs) = bert(), lowered_bert(), CALLS[case]()
    runs = runs_of_whole(lowered)
    with torch.no_grad():
        expected, found = model(*args, **kwargs), lowered(*args, **kwargs)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)
    assert expected.keys() == found.keys()
    assert not runs


def test_a_graph_for_masked_calls() -> None:
    model, mask = bert(), torch.arange(12)[None] < torch.tensor([[12], [5]])
    lowered = lower(model, {"input_ids": TOKENS, "attention_mask": mask.long()}, backend="native")
    runs = runs_of_whole(lowered)
    assert "attention" in kinds(lowered)[0]
    for other in (mask, torch.rand(2, 12) < 0.5):
        assert_same(model, lowered, attention_mask=other.long(), input_ids=TOKENS)
    assert len(runs) == 2


def test_copies_and_files_run_the_graph() -> None:
    lowered, file = lower(bert(), TOKENS, backend="native"), io.BytesIO()
    torch.save(lowered, file)
    file.seek(0)
    for again in (copy.deepcopy(lowered), torch.load(file, weights_only=False)):
        runs = runs_of_whole(again)
        assert_same(lowered, again, TOKENS)
        assert len(runs) == 1
        assert isinstance(again, transformers.BertModel)


def test_hooks_are_called() -> None:
    model, seen = bert(), list[int]()
    lowered = lower(model, TOKENS, backend="native")
    handle = lowered.encoder.layer[1].register_forward_hook(lambda *_: seen.append(1))
    assert_same(model, lowered, TOKENS)
    assert seen == [1]
    handle.remove()
    assert_same(model, lowered, TOKENS)
    assert seen == [1]
    model.encoder.layer[0].register_forward_hook(lambda *_: seen.append(2))
    lower(model, TOKENS, backend="native")(TOKENS)
    assert seen[-1] == 2


class Asks(nn.Module):
    """Python code that no graph of fx shows."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.does, self.calls, self.layers = does, 0, nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if self.does == "counts":
            self.calls += 1
        if self.does == "draws":
            x = x + 1e-3 * torch.rand_like(x)  # so little that lowering does not mind
        if self.does == "looks" and x.sum() > 0:
            x = -x
        if x.dtype is not self.layers[0].weight.dtype:
            raise TypeError("another number format")
        return self.layers(x * scale if x.shape[0] > 1 else x)


class Outer(nn.Module):
    def __init__(self, does: str) -> None:
        super().__init__()
        self.inner = Asks(does)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, scale=2.0)


@pytest.mark.parametrize(("does", "whole"), [("", True), ("counts", False), ("draws", False), ("looks", False)])
def test_what_a_graph_would_freeze_stays_code(does: str, whole: bool) -> None:
    torch.manual_seed(0)
    model = thin(Outer(does), 0.6)
    x = torch.randn(4, 8)
    lowered = lower(model, x, backend="native")
    assert isinstance(lowered, Whole) is whole
    for given in (x, -x, torch.randn(1, 8), torch.randn(9, 8)):
        torch.manual_seed(1)
        expected = model(given)
        torch.manual_seed(1)
        torch.testing.assert_close(lowered(given), expected, atol=1e-5, rtol=1e-5)


# Attention


class Timm(nn.Module):
    """Queries, keys and values of one layer, as timm cuts them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 96), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=0.0).transpose(1, 2).reshape(b, n, 32))


class Apart(nn.Module):
    """Queries, keys and values of layers of their own, and a mask."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers, self.proj, self.options = nn.ModuleList(nn.Linear(24, 32) for _ in range(3)), nn.Linear(32, 24), options

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 4, -1).transpose(1, 2) for layer in self.layers)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return self.proj(y.transpose(1, 2).contiguous().view(b, n, -1))


def _nothing_for_some() -> Tensor:
    mask = torch.rand(3, 1, 37, 37) < 0.5
    mask[1, 0, 5] = False
    return mask


MASKS = {
    "for each sample": lambda: torch.rand(3, 1, 37, 37) < 0.5,
    "for all": lambda: torch.rand(1, 1, 37, 37) < 0.5,
    "of keys": lambda: torch.rand(3, 1, 1, 37) < 0.5,
    "of keys, for all": lambda: torch.rand(1, 1, 1, 37) < 0.5,
    "for each head": lambda: torch.randn(3, 4, 37, 37),
    "numbers": lambda: torch.randn(1, 1, 37, 37),
    "nothing for some": _nothing_for_some,
    "nothing": lambda: torch.zeros(1, 1, 1, 37, dtype=torch.bool),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(case: str) -> None:
    torch.manual_seed(0)
    model, x, mask = thin(Apart(scale=0.3), 0.6), 3 * torch.randn(3, 37, 24), MASKS[case]()
    lowered = lower(model, (x, mask), backend="native")
    assert kinds(lowered) == [["linear"] * 3 + ["attention", "linear"]]
    assert_same(model, lowered, x, mask)
    if mask.shape[2] == 1:
        assert_same(model, lowered, x[:, :20], mask[..., :20])


@pytest.mark.parametrize("tokens", [1, 2, 8, 33, 197])
def test_heads_of_one_layer(tokens: int) -> None:
    torch.manual_seed(0)
    model, x = thin(Timm(), 0.6), torch.randn(2, 50, 24)
    lowered = lower(model, x, backend="native")
    assert kinds(lowered) == [["linear", "attention", "linear"]]
    assert_same(model, lowered, 5 * torch.randn(3, tokens, 24))


@pytest.mark.parametrize("first", [True, False])
def test_torchs_own_attention(first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.layer = nn.MultiheadAttention(24, 3, batch_first=first), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model = thin(Model(), 0.6)
    lowered = lower(model, torch.randn(2, 9, 24), backend="native")
    assert "attention" in [kind for segment in kinds(lowered) for kind in segment]
    assert_same(model, lowered, torch.randn(5, 21, 24))


STAY = {  # what the kernels do not know
    "causal": lambda: (Apart(is_causal=True), None),
    "as many samples as tokens": lambda: (Apart(), torch.rand(1, 1, 3, 3) < 0.9),
    "a mask of three dimensions": lambda: (Apart(), torch.rand(1, 37, 37) < 0.9),
}


@pytest.mark.parametrize("case", STAY)
def test_other_attention_stays_in_torch(case: str) -> None:
    torch.manual_seed(0)
    model, mask = STAY[case]()
    x = torch.randn(3, 3 if "samples" in case else 37, 24)
    if mask is None:
        mask, model = torch.zeros(1), thin(Causal(), 0.6)
    lowered = lower(thin(model, 0.6), (x, mask), backend="native")
    assert "attention" not in [kind for segment in kinds(lowered) for kind in segment]
    assert_same(model, lowered, x, mask)


class Causal(Apart):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 4, -1).transpose(1, 2) for layer in self.layers)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, -1)) + mask


def test_gradients_flow_through_attention() -> None:
    torch.manual_seed(0)
    model, x = thin(Timm(), 0.6), torch.randn(2, 9, 24)
    lowered = lower(model, x, backend="native")
    grads = []
    for run in (model, lowered):
        own = x.clone().requires_grad_()
        run(own).square().sum().backward()
        grads.append(own.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-5)


def test_attention_is_torchs() -> None:
    torch.manual_seed(0)
    parts, mask = torch.randn(3, 2, 7, 12).unbind(0), torch.rand(2, 1, 7, 7) < 0.7
    heads = [x.view(2, 7, 3, 4).transpose(1, 2) for x in parts]
    expected = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).reshape(2, 7, 12)
    torch.testing.assert_close(attend(parts, bias_of(mask), 3, None), expected)
    torch.testing.assert_close(attend([torch.cat(parts, -1)], bias_of(mask), 3, None), expected)


def test_functions_inside_modules_are_seen() -> None:
    class Gelu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x)

    class Halved(nn.Module):  # asks for more than a graph of functions
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x) / 2

    torch.manual_seed(0)
    model = thin(nn.Sequential(nn.Linear(8, 8), Gelu(), nn.Linear(8, 8), Halved(), nn.Linear(8, 8)), 0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered = lower(model, torch.randn(2, 8), backend="native")
    assert [kind for segment in kinds(lowered) for kind in segment] == ["linear"] * 3
    assert_same(model, lowered, torch.randn(4, 8))


# Where channels are


class Joined(nn.Module):
    """Tokens joined to others, in front of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Parameter(torch.randn(1, 1, 12)), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1))


class Added(nn.Module):
    """What comes from outside added to a convolution, whose second dimension is channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x.roll(1, -1) + self.layer(x.flip(-1))).flip(-1)


@pytest.mark.parametrize("model", [Joined, Added])
@pytest.mark.parametrize("tokens", [11, 12])
def test_channels_of_three_dimensions(model: type[nn.Module], tokens: int) -> None:
    torch.manual_seed(0)
    dense, x = thin(model(), 0.6), torch.randn(2, 12, tokens) if model is Added else torch.randn(2, tokens, 12)
    lowered = lower(dense, x, backend="native")
    assert kinds(lowered) == [["conv" if model is Added else "linear"]]
    assert_same(dense, lowered, x)


class Several(nn.Module):
    """A part that is called with a mask and without."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        return self.part(self.part(x, None), x) if again else x


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor, added: Tensor | None) -> Tensor:
        return self.layer(x) if added is None else self.layer(x) + added


def test_parts_that_are_called_in_several_ways() -> None:
    torch.manual_seed(0)
    model, x = thin(Several(), 0.6), torch.randn(2, 12)
    lowered = lower(model, x, backend="native")
    assert_same(model, lowered, x)
    assert_same(model, lowered, x[:1])
