"""Lightning: a callback that attaches the updaters of a LightningModule."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from sparsify.training.lookup import sparse_models
from sparsify.training.ranks import ignore_in_ddp


class SparseTraining(Callback):
    """Attach every sparsified model inside a LightningModule to the trainer's optimizers, and log its densities.

    Checkpoints of the trainer hold masks, step and schedule, as they hold every buffer; training goes on from them exactly.

    Args:
        log: whether to log `updater.scalars()` at the end of every epoch.

    Example:
        >>> import torch
        >>> from sparsify import RigL, sparsify
        >>> class Net(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = sparsify(torch.nn.Sequential(torch.nn.Linear(8, 2)), density=0.5, method=RigL(interval=2))
        ...     def training_step(self, batch, index):
        ...         return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> trainer = L.Trainer(max_epochs=3, callbacks=[SparseTraining()])  # doctest: +SKIP
    """

    def __init__(self, log: bool = True) -> None:
        self.log = log

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep masks out of what DDP, which will wrap the LightningModule, broadcasts, and out of averages."""
        if any(getattr(callback, "_use_buffers", False) for callback in trainer.callbacks):  # pyright: ignore
            raise ValueError("Masks cannot be averaged: give the weight averaging callback use_buffers=False.")
        ignore_in_ddp(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attach."""
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("Sparse training needs an end: give the Trainer max_epochs or max_steps.")
        for updater in sparse_models(pl_module).values():
            updater.detach(keep_step=trainer.global_step > 0)
            updater.attach(*trainer.optimizers, total_steps=int(total))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log."""
        if self.log:
            for path, updater in sparse_models(pl_module).items():
                pl_module.log_dict({f"{path}/{name}".lstrip("/"): v for name, v in updater.scalars().items()})
