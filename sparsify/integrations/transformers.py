"""Hugging Face transformers: a callback that attaches a model's updater to the optimizer of its `Trainer`."""

from typing import Any

from transformers.trainer_callback import TrainerCallback

from sparsify.training.lookup import sparse_models


class SparseTraining(TrainerCallback):
    """Attach a sparsified model's updater when training begins, and add its densities to the Trainer's log.

    The Trainer's own checkpoints hold masks, step and schedule; `resume_from_checkpoint` goes on exactly.

    Args:
        log: whether to add `updater.scalars()` to the log.

    Example:
        >>> from transformers import Trainer
        >>> Trainer(model=sparse_model, args=args, callbacks=[SparseTraining()])  # doctest: +SKIP
    """

    def __init__(self, log: bool = True) -> None:
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach."""
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper holds it
        for updater in sparse_models(kwargs["model"]).values():
            updater.detach(keep_step=state.global_step > 0)
            updater.attach(optimizer, total_steps=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add to the Trainer's history, and to what callbacks after this one see."""
        for updater in sparse_models(kwargs["model"]).values() if self.log else ():
            scalars = updater.scalars()
            for record in (state.log_history[-1], logs or {}):
                record.update(scalars)
