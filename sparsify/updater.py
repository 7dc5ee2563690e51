"""The updater: the module that changes a model's masks while an optimizer trains it.

A thin shell: it holds the schedule's position and calls the pure functions of the method. It lives on the model as
`model.updater`, so that one `state_dict` holds masks, step and schedule.
"""

import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from passes.mask import masks_of
from sparsify import optimizers as opt
from sparsify.attachment import Attachment, Bound, all_finite, change, check_attach, each_layer, zero_all_dropped
from sparsify.loading import check_before_load, settle_after_load
from sparsify.methods import Method, Updates


class Updater(nn.Module):
    """Changes the masks of one model by one method; made by `sparsify`, found at `model.updater`.

    Args:
        model: the masked model that owns this module.
        method: what to drop and grow, and when.
        rules: {parameter name: reason} for every weight that is dense by rule or cannot be masked.
        opaque: paths of the modules whose own code is not part of a graph.
    """

    skipped: Tensor

    def __init__(self, model: nn.Module, method: Method, rules: Mapping[str, str], opaque: Iterable[str] = ()) -> None:
        super().__init__()
        self.method = method
        self.rules = dict(rules)
        self._opaque = tuple(opaque)
        self._model = (model,)  # in a tuple, so that the model does not become its own grandchild
        self._sites = tuple(masks_of(model))
        self._attached: list[Attachment] = []
        self._steps = [0]
        self._total_steps = 0
        # Updates that a non-finite gradient prevented: counted on the device, read when the host asks.
        device = next(iter(self.masks.values())).device
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self._skipped_before = 0
        self._load_hooks = (
            model.register_load_state_dict_pre_hook(check_before_load),
            model.register_load_state_dict_post_hook(_after_load),
        )

    # What people read.

    @property
    def masks(self) -> dict[str, Tensor]:
        """{parameter name: bool mask}, of the weights that are masked now."""
        return {name: mask.mask for name, mask in masks_of(self._model[0]).items()}

    @property
    def nonzeros(self) -> dict[str, int]:
        """{parameter name: number of kept weights}, from the host's own counts."""
        return {name: mask.nonzeros for name, mask in masks_of(self._model[0]).items()}

    @property
    def densities(self) -> dict[str, float]:
        """{parameter name: kept fraction, in (0, 1]}."""
        return {name: mask.density for name, mask in masks_of(self._model[0]).items()}

    @property
    def replaced(self) -> tuple[str, ...]:
        """The weights that were masked once and whose layer has been replaced since; the new layer is dense."""
        return tuple(name for name in self._sites if name not in masks_of(self._model[0]))

    @property
    def step(self) -> int:
        """Optimizer steps taken since `attach`; with several optimizers, by the one that has taken most."""
        return max(self._clocks())

    @property
    def skipped_updates(self) -> int:
        """Updates of an optimizer that left its masks as they were because a gradient was not finite. Reads the device."""
        count = self._skipped_before + (0 if self.skipped.is_meta else int(self.skipped))
        if count > self._skipped_before:
            warnings.warn(
                f"{count - self._skipped_before} topology updates met a gradient that was NaN or infinite and left every "
                f"mask as it was. Lower the learning rate, clip gradients, or look for the source.",
                stacklevel=2,
            )
            self._skipped_before = count
            self.skipped.zero_()
        return count

    def extra_repr(self) -> str:
        """Name the method and the step."""
        return f"method={self.method.name}, masks={len(self._sites)}, step={self.step}"

    # What a training loop calls.

    def attach(self, *optimizers: Optimizer, total_steps: int) -> None:
        """Let the optimizers' steps drive the topology: the one line a training loop gains.

        After a `load_state_dict` training goes on at the saved step; otherwise steps are counted from 1.

        Args:
            *optimizers: every optimizer that trains masked weights, made from this model's parameters.
            total_steps: optimizer steps of the whole run, from 1; the method's schedule is laid out over them.

        Raises:
            RuntimeError: already attached.
            ValueError: `total_steps` is not a whole number or too low for any update, or the optimizers together lack a
                masked weight that requires grad. Nothing was changed.

        Example:
            >>> from sparsify import sparsify
            >>> model = sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), density=0.5)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> model.updater.attach(optimizer, total_steps=1000)
        """
        if self._attached:
            raise RuntimeError("The updater is attached already; call updater.detach() before attaching again.")
        check_attach(self._model[0], self.method.updates, optimizers, total_steps)
        if self._total_steps not in (0, total_steps):
            warnings.warn(
                f"total_steps was {self._total_steps} before step {self.step} and is {total_steps} from here on.",
                stacklevel=2,
            )
        masks, steps = masks_of(self._model[0]), self._clocks()
        self._total_steps = total_steps
        for i, optimizer in enumerate(optimizers):
            own = set(opt.parameters(optimizer))
            weights = ((name, self._model[0].get_parameter(name)) for name in masks)
            bound = [Bound(name, weight, masks[name]) for name, weight in weights if weight in own]
            corrected = [b for b in bound if not opt.keeps_zeros(optimizer) or self._is_exposed(b.name)]
            attachment = Attachment(optimizer, bound, corrected, steps[i] if i < len(steps) else max(steps), [])
            attachment.handles += [
                optimizer.register_step_pre_hook(functools.partial(self._before_step, attachment)),
                optimizer.register_step_post_hook(functools.partial(self._after_step, attachment)),
            ]
            self._attached.append(attachment)
            zero_all_dropped(bound)  # whoever initialized the weights anew after sparsify() did not know of masks
        self._settle_gradients()
        for name in self.replaced:
            warnings.warn(
                f"{name} was masked, but its layer has been replaced since sparsify(): it trains dense now.",
                stacklevel=2,
            )

    def detach(self) -> None:
        """Let go of the optimizers: masks stay as they are, and a later `attach` counts its steps from 1 again."""
        for attachment in self._attached:
            attachment.set_dense_gradients(False)
            for handle in attachment.handles:
                handle.remove()
        self._attached, self._steps, self._total_steps = [], [0], 0

    def remove(self) -> None:
        """Detach, and take this module off its model; the masks stay."""
        self.detach()
        for handle in self._load_hooks:
            handle.remove()
        del self._model[0].updater

    def _is_exposed(self, name: str) -> bool:
        return any(not path or name.startswith(f"{path}.") for path in self._opaque)

    # What the optimizers' hooks call.

    def _end_step(self, updates: Updates) -> float:
        return updates.end_fraction * self._total_steps

    def _updates_at(self, step: int) -> bool:
        updates = self.method.updates
        return updates is not None and updates.at(step, self._end_step(updates))

    def _before_step(self, attachment: Attachment, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not self._updates_at(attachment.step + 1):
            return None
        return opt.before_step(optimizer, args, kwargs, functools.partial(self._update, attachment))

    def _after_step(self, attachment: Attachment, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        attachment.step += 1
        if self._updates_at(attachment.step):
            opt.forget_history(optimizer)
        else:
            zero_all_dropped(attachment.corrected)
        dense = self._updates_at(attachment.step + 1)
        if dense or self._updates_at(attachment.step):
            attachment.set_dense_gradients(dense)

    @torch.no_grad()
    def _update(self, attachment: Attachment) -> None:
        """Change the topology instead of taking this step (RigL, Algorithm 1)."""
        updates = self.method.updates
        assert updates is not None
        self._check_bound(attachment)
        fraction = updates.drop_fraction(attachment.step + 1, self._end_step(updates))
        gradients = [(b, opt.dense_gradient(attachment.optimizer, b.weight)) for b in attachment.bound]
        present = [(b, g) for b, g in gradients if g is not None]
        if present:
            finite = all_finite([g for _, g in present], self.skipped.device)
            self.skipped += ~finite
            each_layer(
                functools.partial(change, b, gradient, k, finite, updates, attachment.optimizer)
                for b, gradient in present
                if (k := int(fraction * b.mask.nonzeros)) and b.mask.density < 1
            )
        opt.skip_step(attachment.optimizer)

    def _check_bound(self, attachment: Attachment) -> None:
        masks = masks_of(self._model[0])
        for b in attachment.bound:
            if masks.get(b.name) is not b.mask or self._model[0].get_parameter(b.name) is not b.weight:
                raise RuntimeError(
                    f"{b.name} was replaced while the updater is attached. Call updater.detach(), make an optimizer for the "
                    f"model as it is now, and attach that."
                )

    # What state_dict, copies and loading need.

    def _clocks(self) -> list[int]:
        return [a.step for a in self._attached] or self._steps

    def _settle_gradients(self) -> None:
        """Derive from the step whether the next gradients have to be dense."""
        for attachment in self._attached:
            attachment.set_dense_gradients(self._updates_at(attachment.step + 1))

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not attached: the hooks belong to the optimizers of the original.
        return {**vars(self), "_attached": [], "_steps": self._clocks()}

    def get_extra_state(self) -> Tensor:
        """Return schedule, steps and counts as one CPU tensor, so that every tool that reads a `state_dict` can.

        Layout: total_steps, skipped updates, the number of clocks, the clocks, the nonzeros in the order of `masks`.
        """
        clocks = self._clocks()
        numbers = [self._total_steps, self.skipped_updates, len(clocks), *clocks, *self.nonzeros.values()]
        return torch.tensor(numbers, dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the step and the schedule of a `state_dict`."""
        total_steps, skipped, clocks, *rest = state.tolist()
        self._steps = rest[:clocks]
        for attachment, step in zip(self._attached, self._steps, strict=False):
            attachment.step = step
        self._total_steps = total_steps or self._total_steps
        self._skipped_before = skipped
        self.skipped.zero_()


def _after_load(model: nn.Module, incompatible_keys: Any) -> None:
    settle_after_load(model)
    if isinstance(updater := model._modules.get("updater"), Updater):
        updater._settle_gradients()
