"""Watch: dropped weights stay 0, whatever writes to weights, gradients and optimizer state besides the optimizer's steps."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from passes.mask import trace_of
from passes.shards import local, own_part
from passes.zeros import zero_dropped_
from sparsify import optimizers as opt
from sparsify.update import Bound

_EVERY = 100  # steps between looks at gradients, where looking does not wait for the device


class Watch:
    """What has to be set back to 0 around the steps of one optimizer.

    Args:
        optimizer: whose steps it watches.
        bound: the masked weights that it trains.
    """

    def __init__(self, optimizer: Optimizer, bound: list[Bound]) -> None:
        self.optimizer, self.bound = optimizer, bound
        self.fresh = True  # no step was taken under this watch, so weights, masks and state may come from anywhere
        self._moved = [] if opt.keeps_zeros(optimizer) else list(bound)  # which an ordinary step may move off 0
        self._traces: list[tuple[int, int]] = []  # of the weights after the last step
        self._looked = False

    @torch.no_grad()
    def before_step(self) -> None:
        """Mask the weights that something wrote to since the last step, and all state at first.

        State is masked no earlier: it may have been loaded before the masks it belongs to.
        """
        self.mask_weights()
        if self.fresh and not opt.stands_still(self.optimizer):
            for b in self.bound:
                for _, tensor in opt.state_tensors(self.optimizer, b.weight):
                    zero_dropped_(tensor, b.mask.mask)

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Mask the weights that something wrote to since the last step.

        Writes through `weight.data` leave no trace; the next look at the gradients masks those.
        """
        traces = [trace_of(b.weight) for b in self.bound]
        for b, trace, last in zip(self.bound, traces, self._traces or [None] * len(traces), strict=True):
            if trace != last:
                zero_dropped_(b.weight, b.mask.mask)

    @torch.no_grad()
    def look(self, step: int, updated: bool, with_others: bool) -> None:
        """Look for gradients of dropped weights, which have none in an ordinary step unless something writes them.

        Penalties, hooks and compression do; their weights are set back to 0 after every step from then on. Ranks whose masks
        differ do it too, since what one of them drops and another keeps gets the mean of their gradients: fewer dropped weights
        than kept ones have a gradient then.

        Args:
            step: that is about to be taken, counted from 1.
            updated: whether the step before changed masks.
            with_others: whether other ranks train the model too.

        Raises:
            RuntimeError: the masks of the ranks have drifted apart since the first look.
        """
        waits = any(b.weight.device.type != "cpu" for b in self.bound)
        if self._looked and (waits or not (updated or step % _EVERY == 0)):
            return
        gradients = [(b, opt.dense_gradient(self.optimizer, b.weight)) for b in self.bound if b not in self._moved]
        seen = [(b, g) for b, g in gradients if g is not None and not g.is_meta and b.mask.density < 1]
        if not seen:
            return
        counts = torch.stack(
            [_counts(b, gradient).to(seen[0][1].device) for b, gradient in seen]
        ).tolist()  # waits once
        strays = [(b, row) for (b, _), row in zip(seen, counts, strict=True) if row[0]]
        for b, (dropped, of_dropped, kept, of_kept) in strays:
            if with_others and self._looked and 2 * dropped * of_kept < kept * of_dropped:
                raise RuntimeError(
                    f"{b.name} has gradients where it is dropped. The masks of the ranks differ: updater.compare_ranks() names "
                    f"the first difference, and updater.synchronize(), on every rank, mends it. Or something writes to a few "
                    f"gradients since the last look: call updater.detach(keep_step=True), and attach() again."
                )
        self._moved += [b for b, _ in strays]
        self._looked = True
        _mask([b for b, _ in seen])

    def mask_moved(self) -> None:
        """Mask what an ordinary step may have moved."""
        _mask(self._moved)

    def after_step(self) -> None:
        """Remember the weights as the step, and an update after it, left them."""
        self._traces = [trace_of(b.weight) for b in self.bound]
        self.fresh = False


def _counts(b: Bound, gradient: Tensor) -> Tensor:
    """Count the gradients that are not 0: among the dropped weights, of how many, among the kept ones, of how many."""
    mask = own_part(b.mask.mask, gradient)
    there = local(gradient).nan_to_num(0.0, 0.0, 0.0).ne(0)  # a gradient that is not finite says nothing
    kept = (there & mask).sum()
    return torch.stack([there.sum() - kept, mask.logical_not().sum(), kept, mask.sum()])


@torch.no_grad()
def _mask(bound: list[Bound]) -> None:
    for b in bound:
        zero_dropped_(b.weight, b.mask.mask)
