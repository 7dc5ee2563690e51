"""Base: what the rest of the library knows of an updater, and what people, loggers and reports read of it."""

import warnings
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from passes.capture.host import Guest
from passes.masking.mask import masks_of
from passes.weights.reasons import Reason
from sparsify.methods.method import Goal, Method
from sparsify.training.state import History, Topology


class UpdaterBase(Guest):
    """An updater as others see it; abstract, `Updater` is the whole.

    Attributes:
        method: what to drop and grow, and when.
        goals: {parameter name: goal} of every masked weight.
        reasons: {parameter name: why it is dense} of every other weight that the model consumes.
        seed: of what the method draws at random.
        skipped: on the device, the updates that were prevented since the last load because something was not finite.
    """

    method: Method
    goals: dict[str, Goal]
    reasons: dict[str, Reason]
    seed: int
    skipped: Tensor
    _model: tuple[nn.Module]  # in a tuple, so that the model does not become its own grandchild
    _attached: list[Any]
    _steps: list[int]
    _total_steps: int
    _history: History
    _skipped_before: int  # by the state that was loaded
    _skipped_said: int  # a warning has told of these

    # What others call.

    def attach(self, *optimizers: Optimizer, total_steps: int, process_group: Any = None) -> None:
        """Let the optimizers' steps drive the topology."""
        raise NotImplementedError

    def detach(self, *, keep_step: bool = False) -> None:
        """Let go of the optimizers."""
        raise NotImplementedError

    def remove(self) -> None:
        """Detach, and take the updater off its model."""
        raise NotImplementedError

    def compare_once(self) -> None:
        """Compare ranks, if they have not been compared since `attach` or a load."""
        raise NotImplementedError

    def trains_with_others(self) -> bool:
        """Whether other processes train this model too."""
        raise NotImplementedError

    def mean_of_ranks(self, tensor: Tensor) -> Tensor:
        """Return the mean over the processes that train this model; each of them has to call it."""
        raise NotImplementedError

    def renew(self) -> None:
        """After a load, derive from the step what the next gradients have to be, and look at everything again."""
        raise NotImplementedError

    def momentum(self, name: str) -> Tensor | None:
        """Return the moving average of a weight's gradient, if the method keeps one."""
        return self._buffers.get(momentum_buffer(name))

    def record(self, step: int) -> None:
        """Enter the counts after an update into the history."""
        self._history.record(step, self.nonzeros)

    # What people read.

    @property
    def rules(self) -> dict[str, str]:
        """{parameter name: why it is dense}, for every weight that is dense by rule or cannot be masked."""
        return {name: str(reason) for name, reason in self.reasons.items()}

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
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, as told to `attach`; 0 before."""
        return self._total_steps

    @property
    def history(self) -> list[Topology]:
        """The counts at the start of training and after every update since, oldest first."""
        return self._history.topologies({name: mask.numel() for name, mask in self.masks.items()})

    @property
    def pruned(self) -> bool:
        """Whether the masks are sparse yet: a method that prunes while training starts dense."""
        return not self.method.prunes or any(density < 1 for density in self.densities.values())

    @property
    def pruned_all(self) -> bool:
        """Whether nothing is left to prune: the method does not, or its last pruning is over."""
        updates = self.method.updates
        if not self.method.prunes or updates is None:
            return True
        return self._total_steps > 0 and 0 < updates.last(self._total_steps) <= self.step

    @property
    def replaced(self) -> tuple[str, ...]:
        """The weights that were masked once and whose layer has been replaced since; the new layer is dense."""
        masks = masks_of(self._model[0])
        return tuple(name for name in self.goals if name not in masks)

    @property
    def step(self) -> int:
        """Optimizer steps taken since `attach`; with several optimizers, by the one that has taken most."""
        return max(self._clocks())

    @property
    def gradients_are_dense(self) -> bool:
        """Whether the next backward pass computes gradients of dropped weights too, as an update needs them.

        A CUDA graph that you capture yourself holds one of the two: capture both, and replay the one that fits.
        """
        return any(mask.dense_gradient for mask in masks_of(self._model[0]).values())

    @property
    def skipped_updates(self) -> int:
        """Updates of an optimizer that left its masks as they were because a gradient was not finite. Reads the device."""
        count = self._skipped_before + (0 if self.skipped.is_meta else int(self.skipped))
        if count > self._skipped_said:
            warnings.warn(
                f"{count - self._skipped_said} topology updates met a gradient that was NaN or infinite and left every "
                f"mask as it was. Lower the learning rate, clip gradients, or look for the source.",
                stacklevel=2,
            )
        self._skipped_said = count
        return count

    def scalars(self) -> dict[str, float]:
        """Return what is worth a curve, for TensorBoard or any other logger. Reads the device.

        Example:
            >>> from sparsify import sparsify
            >>> sorted(sparsify(nn.Sequential(nn.Linear(10, 10)), density=0.5).updater.scalars().items())[:2]
            [('sparsity/density', 0.5), ('sparsity/density/0.weight', 0.5)]
        """
        sizes = {name: mask.numel() for name, mask in self.masks.items()}
        overall = {
            "density": sum(self.nonzeros.values()) / sum(sizes.values()),
            "updates": float(max(0, len(self._history.entries) - 1)),
            "skipped_updates": float(self.skipped_updates),
        }
        return {f"sparsity/{k}": v for k, v in (overall | {f"density/{n}": d for n, d in self.densities.items()}).items()}

    def extra_repr(self) -> str:
        """Name the method and the step."""
        return f"method={self.method.name}, masks={len(self.goals)}, step={self.step}"

    def _clocks(self) -> list[int]:
        return [hooks.step for hooks in self._attached] or self._steps


def momentum_buffer(name: str) -> str:
    """Name the buffer that holds the moving average of a weight's gradient."""
    return f"momentum/{name.replace('.', '/')}"
