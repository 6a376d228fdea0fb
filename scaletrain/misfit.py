"""What does not fit: a model's output and its loss, a layer and its input, told in one line from an exception.

Torch says what went wrong in the words of the kernel that met it. The tensors are still in the frames of the
traceback, so shapes and dtypes need not be guessed.
"""

import traceback
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

ELEMENTWISE = (
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits",
    "kl_div", "gaussian_nll_loss", "poisson_nll_loss",
)  # fmt: skip
ABOUT_TENSORS = (RuntimeError, ValueError, IndexError, TypeError, UserWarning)
LIBRARIES = tuple(str(Path(package).parent) for package in (torch.__file__, accelerate.__file__, __file__))


def explain(error: BaseException) -> str | None:
    """Return what does not fit, where in the recipe, and what to do; None where the exception is of another kind."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, ABOUT_TENSORS):
        return None
    if "mixed torch.Tensor and DTensor" in str(error):
        where = _where(list(traceback.walk_tb(error.__traceback__)))
        return (
            f"{where}a weight is used outside of the layer that holds it, "
            "where FSDP2 has not gathered it; call the layer, or let the launcher's configuration wrap the part that "
            "uses it (accelerate_configs/fsdp2.yaml)"
        )
    frames = list(traceback.walk_tb(error.__traceback__))
    for frame, _ in reversed(frames):
        name, found = frame.f_code.co_name, frame.f_locals
        if Path(frame.f_code.co_filename).match("torch/nn/functional.py"):
            line = _in_function(name, found)
        else:
            line = _in_layer(found, str(error))
        if line is not None:
            return f"{_where(frames)}{line}"
    return None


def _in_function(name: str, found: dict[str, Any]) -> str | None:
    """Judge a function of torch.nn.functional by its arguments."""
    given, target = found.get("input"), found.get("target")
    if name == "embedding" and isinstance(given, Tensor):
        return _embedding(given, found["weight"])
    if not isinstance(given, Tensor) or not isinstance(target, Tensor):
        return None
    if name in ("cross_entropy", "nll_loss"):
        line = _classes(given, target, found.get("ignore_index", -100))
    else:
        line = _elementwise(given, target) if name in ELEMENTWISE else None
    return None if line is None else f"{name}: {line}"


def _classes(output: Tensor, labels: Tensor, ignored: int) -> str | None:
    got = f"the model's output is {_words(output)} and the labels are {_words(labels)}"
    if not output.is_floating_point():
        return f"{got}; the output must be floating-point numbers, one for each class"
    if labels.is_floating_point():
        if labels.shape == output.shape:
            return None
        if labels.ndim == output.ndim > 1:
            return f"{got}; as shares of the classes the labels must have the output's shape"
        return f"{got}; class labels are whole numbers of type int64, (B,): use .long() on them"
    if output.ndim == 1 and labels.ndim > 0:
        return f"{got}; the output must be (B, C), a number for each of C classes"
    wanted = (*output.shape[:1], *output.shape[2:])
    if tuple(labels.shape) != wanted:
        advice = "use .squeeze(1) on the labels" if labels.shape == (*wanted[:1], 1, *wanted[1:]) else "see the data"
        return f"{got}; for such an output labels are {_shape(wanted)}: {advice}"
    if labels.dtype not in (torch.int64, torch.uint8):
        return f"{got}; class labels are int64: use .long() on them"
    meant = (
        labels[labels != ignored] if labels.device.type == "cpu" else labels[:0]
    )  # reading a GPU after a fault fails
    if meant.numel() and not 0 <= int(meant.min()) <= int(meant.max()) < output.shape[1]:
        low, high, n = int(meant.min()), int(meant.max()), output.shape[1]
        return f"labels go from {low} to {high}, but the model's output has {n} classes, 0 to {n - 1}; give it more"
    return None


def _elementwise(output: Tensor, target: Tensor) -> str | None:
    got = f"the model's output is {_words(output)} and the target is {_words(target)}"
    if output.shape != target.shape:
        if output.shape == (*target.shape, 1):
            advice = "use .squeeze(-1) on the output"
        elif target.shape == (*output.shape, 1):
            advice = "use .squeeze(-1) on the target"
        else:
            advice = "give the model as many outputs as there are targets"
        return f"{got}; they must have the same shape: {advice}"
    if not target.is_floating_point():
        return f"{got}; the target must be of the output's type: use .float() on it"
    if output.dtype != target.dtype:
        return f"{got}; both must be of one type"
    return None


def _embedding(indices: Tensor, weight: Tensor) -> str | None:
    if indices.is_floating_point():
        return f"embedding: the tokens are {_words(indices)}; they must be whole numbers, int64: use .long() on them"
    if indices.device.type != "cpu" or not indices.numel():
        return None
    low, high = int(indices.min()), int(indices.max())
    if 0 <= low <= high < len(weight):
        return None
    return f"embedding: tokens go from {low} to {high}, but the table has {len(weight)} rows; make it larger"


def _in_layer(found: dict[str, Any], said: str) -> str | None:
    """Judge a linear layer, convolution or norm of torch's by its input; ``said`` is torch's own message."""
    layer, given = found.get("self"), found.get("input")
    if not isinstance(layer, nn.Linear | _ConvNd | _NormBase | nn.GroupNorm) or not isinstance(given, Tensor):
        return None
    got = f"{layer!r:.100} got an input that is {_words(given)}"
    if isinstance(layer, nn.Linear):
        if given.ndim and given.shape[-1] != layer.in_features:
            return f"{got}; its last dimension must be {layer.in_features}"
    else:
        names = ("in_channels", "num_features", "num_channels")
        channels = next(getattr(layer, name) for name in names if hasattr(layer, name))
        if given.ndim > 1 and given.shape[1] != channels:
            return f"{got}; its second dimension must be {channels}"
    weight = layer.weight
    if "type" in said and isinstance(weight, Tensor) and weight.dtype != given.dtype:  # autocast allows for others
        return f"{got}, but its weights are {_dtype(weight)}; both must be of one type"
    return None


def _where(frames: list[Any]) -> str:
    """Say in which line of the recipe."""
    own = [(f, line) for f, line in frames if not f.f_code.co_filename.startswith(LIBRARIES)]
    if not own:
        return ""
    frame, line = own[-1]
    return f"{Path(frame.f_code.co_filename).name}, line {line}: "


def _words(tensor: Tensor) -> str:
    return f"{_dtype(tensor)} {_shape(tuple(tensor.shape))}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
