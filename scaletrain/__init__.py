"""Distributed training for PyTorch: the loop you would have written, from a laptop to a cluster.

The names below are the public ones. They are imported when first used, so that ``import scaletrain`` does not
wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaletrain.build import start as start
    from scaletrain.checkpoint.export import load_weights as load_weights
    from scaletrain.config import Config as Config
    from scaletrain.config import parse as parse
    from scaletrain.data import Data as Data
    from scaletrain.entry import main as main
    from scaletrain.errors import CheckpointError as CheckpointError
    from scaletrain.errors import InputError as InputError
    from scaletrain.loop import forward_backward as forward_backward
    from scaletrain.loop import steps as steps
    from scaletrain.loop import train as train
    from scaletrain.loop import train_step as train_step
    from scaletrain.loop import validate as validate
    from scaletrain.mixing import cutmix as cutmix
    from scaletrain.mixing import mixup as mixup
    from scaletrain.optimizers import adam as adam
    from scaletrain.optimizers import adamw as adamw
    from scaletrain.optimizers import muon as muon
    from scaletrain.optimizers import parameter_groups as parameter_groups
    from scaletrain.optimizers import sgd as sgd
    from scaletrain.order import Given as Given
    from scaletrain.order import Sequential as Sequential
    from scaletrain.order import Weighted as Weighted
    from scaletrain.plateau import Plateau as Plateau
    from scaletrain.predict import predict as predict
    from scaletrain.recipe import Recipe as Recipe
    from scaletrain.run import Result as Result
    from scaletrain.run import Run as Run
    from scaletrain.run import StepInfo as StepInfo
    from scaletrain.schedules import constant as constant
    from scaletrain.schedules import cosine as cosine
    from scaletrain.schedules import one_cycle as one_cycle
    from scaletrain.schedules import step_decay as step_decay
    from scaletrain.schedules import torch_schedule as torch_schedule
    from scaletrain.schedules import warmup_cosine as warmup_cosine
    from scaletrain.schedules import warmup_stable_decay as warmup_stable_decay
    from scaletrain.sources import load as load

_HOME = {
    "checkpoint.export": ("load_weights",),
    "config": ("Config", "parse"),
    "data": ("Data",),
    "errors": ("CheckpointError", "InputError"),
    "loop": ("forward_backward", "steps", "train", "train_step", "validate"),
    "entry": ("main",),
    "mixing": ("cutmix", "mixup"),
    "optimizers": ("adam", "adamw", "muon", "parameter_groups", "sgd"),
    "order": ("Given", "Sequential", "Weighted"),
    "plateau": ("Plateau",),
    "predict": ("predict",),
    "recipe": ("Recipe",),
    "run": ("Result", "Run", "StepInfo"),
    "schedules": (
        "constant",
        "cosine",
        "one_cycle",
        "step_decay",
        "torch_schedule",
        "warmup_cosine",
        "warmup_stable_decay",
    ),
    "sources": ("load",),
    "build": ("start",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_MODULE_OF)  # a list of names, computed


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'scaletrain' has no attribute '{name}'")
    value = getattr(import_module(f"scaletrain.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
