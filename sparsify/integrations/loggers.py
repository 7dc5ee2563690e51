"""Loggers: densities, fan-ins and pictures of masks for TensorBoard and Weights & Biases, by one call."""

from typing import Any

from torch import Tensor, nn

from passes.masking.pictures import picture
from sparsify.training.lookup import sparse_models

_SIDE = 256  # pixels


def log_sparsity(logger: Any, model: nn.Module, step: int, *, pictures: bool = True) -> None:
    """Log what there is to see of the sparse models inside a module: scalars, histograms and pictures. Reads the device.

    Scalars are those of `updater.scalars()`. A histogram is of how many inputs each output of a layer keeps; a picture is the
    mask, outputs from top to bottom and inputs from left to right.

    Args:
        logger: a `SummaryWriter` of TensorBoard, or what `wandb.init()` returns, offline too.
        model: with one sparse model or several inside.
        step: that the logger shows it at.
        pictures: whether to log histograms and pictures too, which take longer.

    Raises:
        TypeError: the logger is neither.
        ValueError: there is no sparse model.

    Example:
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> log_sparsity(SummaryWriter(), model, step)  # doctest: +SKIP
    """
    scalars, fan_ins, images = {}, {}, {}
    for path, updater in sparse_models(model).items():
        within = f"{path}/" if path else ""
        scalars |= {f"{within}{name}": value for name, value in updater.scalars().items()}
        for name, mask in updater.masks.items() if pictures else ():
            out_dim = updater.goals[name].out_dim or 0
            fan_ins[f"{within}sparsity/fan-in/{name}"] = _fan_ins(mask, out_dim)
            images[f"{within}sparsity/mask/{name}"] = picture(mask, out_dim, _SIDE)[0].cpu()
    if hasattr(logger, "add_scalar"):
        _to_tensorboard(logger, step, scalars, fan_ins, images)
    elif hasattr(logger, "log") and type(logger).__module__.startswith("wandb"):
        _to_wandb(logger, step, scalars, fan_ins, images)
    else:
        raise TypeError(f"log_sparsity() takes TensorBoard's SummaryWriter or a run of wandb, not {type(logger).__name__}.")


def _fan_ins(mask: Tensor, out_dim: int) -> Tensor:
    return mask.movedim(out_dim, 0).flatten(1).sum(1).cpu() if mask.dim() > 1 else mask.sum()[None].cpu()


def _to_tensorboard(logger: Any, step: int, scalars: Any, fan_ins: Any, images: Any) -> None:
    for name, value in scalars.items():
        logger.add_scalar(name, value, step)
    for name, values in fan_ins.items():
        logger.add_histogram(name, values, step)
    for name, image in images.items():
        logger.add_image(name, image, step, dataformats="HW")


def _to_wandb(logger: Any, step: int, scalars: Any, fan_ins: Any, images: Any) -> None:
    import wandb

    histograms = {name: wandb.Histogram(values.tolist()) for name, values in fan_ins.items()}
    logger.log(scalars | histograms | {name: wandb.Image(image.numpy()) for name, image in images.items()}, step=step)
