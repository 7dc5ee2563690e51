"""Inputs of transformers' models, made by the names of forward's arguments."""

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from foreign_configs import SIZE
from torch import Tensor, nn

BATCH, LENGTH = 2, 12


def candidates(model: nn.Module) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield ways to make inputs, the fullest first: all that are known, what is needed with masks, what is needed."""
    taken, main = list(inspect.signature(model.forward).parameters), model.main_input_name
    needed = {*_required(model), *([main] if isinstance(main, str) else main)}
    for wanted in ({*KNOWN} - OPTIONAL, {"attention_mask", "decoder_input_ids"}, set()):
        for layout in LAYOUTS:
            extra = {"image_grid_thw"} if layout == "patches" and wanted else set()
            names = [name for name in taken if name in needed | wanted | extra and name in KNOWN]
            yield partial(_made, names, model.config, layout)


def _required(model: nn.Module) -> set[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def _made(names: list[str], config: Any, layout: str) -> dict[str, Any]:
    facts = Facts(config, layout)
    return {name: KNOWN[name](facts) for name in names}


def with_image_tokens(inputs: dict[str, Any], config: Any, error: Exception) -> dict[str, Any]:
    """Return inputs with as many image tokens before the text as an error asks for; raise it if it asks for none."""
    asked = re.search(r"tokens: 0, features:? (\d+)", str(error))
    token = Facts(config, "")("image_token_id image_token_index", 0)
    if not asked or not token:
        raise error
    count = int(asked[1]) // BATCH
    count = count // Facts(config, "")("hidden_size", 64) if count > 256 else count  # some count elements
    images = torch.full((BATCH, count), token)
    ids = torch.cat([images, inputs["input_ids"]], dim=1)
    masks = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in inputs else {}
    return inputs | {"input_ids": ids} | masks


class Facts:
    """What inputs have to fit: numbers of a configuration, found by their usual names."""

    def __init__(self, config: Any, layout: str) -> None:
        self.values, self.layout, self.generator = config.to_dict(), layout, torch.Generator().manual_seed(0)

    def __call__(self, names: str, default: int) -> int:
        """Return the first of some numbers that the configuration or a part of it has."""
        found = (_find(self.values, name) for name in names.split())
        return next((value for value in found if value), default)

    def tokens(self, length: int = LENGTH) -> Tensor:
        return torch.randint(3, min(60, self("vocab_size", 60)), (BATCH, length), generator=self.generator)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=self.generator)

    def image(self) -> Tensor:
        if self.layout == "patches":
            return self.patches()
        size = self("image_size img_size input_size", SIZE)
        shape = (self("num_channels in_channels in_chans", 3), size, size)
        frames = (self("num_frames frames_per_clip", 4),) if self.layout == "video" else ()
        return self.random(*frames, *shape)

    def patches(self) -> Tensor:
        side = self("patch_size", 14)
        length = self("in_channels in_chans num_channels", 3) * self("temporal_patch_size", 1) * side**2
        return torch.randn(BATCH * 16, length, generator=self.generator)

    def series(self) -> Tensor:
        return self.random(self("context_length", 64), self("num_input_channels", 1))

    def spectrogram(self) -> Tensor:
        frames = 2 * self("max_source_positions", 32)
        bins = self("num_mel_bins feature_size input_feat_per_channel input_dim n_mels input_size", 80)
        return self.random(bins, frames) if self.layout == "bins first" else self.random(frames, bins)

    def wave(self) -> Tensor:
        if (length := self("max_length", 0)) and self("num_mel_bins", 0):
            return self.random(length, self("num_mel_bins", 0))
        return self.random(4000) if self.layout == "video" else self.random(1, 4000)


LAYOUTS = ("bins first", "video", "patches")
# What is made for an argument of forward, by its name.
KNOWN: dict[str, Callable[[Facts], Any]] = {
    "input_ids": Facts.tokens,
    "attention_mask": lambda facts: torch.ones(BATCH, LENGTH, dtype=torch.long),
    "decoder_input_ids": lambda facts: facts.tokens(6),
    "pixel_values": Facts.image,
    "input_features": Facts.spectrogram,
    "input_values": Facts.wave,
    "grid_thw": lambda facts: torch.tensor([[1, 4, 4]] * BATCH),
    "image_grid_thw": lambda facts: torch.tensor([[1, 4, 4]] * BATCH),
    "hidden_states": Facts.patches,
    "query_embeds": lambda facts: facts.random(4, facts("hidden_size", 64)),
    "pixel_values_videos": Facts.image,
    "past_values": Facts.series,
    "bbox": lambda facts: torch.tensor([1, 2, 8, 9]).expand(BATCH, LENGTH, 4),
}
OPTIONAL = {"hidden_states", "query_embeds", "pixel_values_videos", "grid_thw", "image_grid_thw"}


def _find(values: dict[str, Any], name: str) -> int:
    """Return a number of a configuration, or of the first part of it that has it; 0 where none does."""
    value = values.get(name)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return next((n for v in values.values() if isinstance(v, dict) and (n := _find(v, name))), 0)
