"""What an optimizer remembers, by the names of the parameters: saved, and put back."""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn, optim

from scaletrain.errors import CheckpointError, InputError

SAVED = "only tensors and finite numbers are saved"


def parameter_names(module: nn.Module, optimizer: optim.Optimizer) -> dict[nn.Parameter, str]:
    """Return the name of each of the optimizer's parameters in ``module``.

    Raises InputError for one that is not the module's: it could not be saved.
    """
    known = {parameter: name for name, parameter in module.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [tuple(p.shape) for p in parameters if p not in known]
    if strangers:
        raise InputError(
            f"the optimizer has {len(strangers)} parameters that are not the model's, as one of shape {strangers[0]}; "
            "make them part of the model"
        )
    return {parameter: known[parameter] for parameter in parameters}


def hyperparameters(optimizer: optim.Optimizer) -> list[dict[str, Any]]:
    """Return each group's values but those that are set anew in each step."""
    set_anew = {"params", "lr", "initial_lr", "betas", "momentum"}
    return [{k: v for k, v in group.items() if k not in set_anew} for group in optimizer.param_groups]


def saved_state(
    module: nn.Module, optimizer: optim.Optimizer, built: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's state as tensors named ``parameter|key``, and what of it is no tensor.

    ``built`` are the hyperparameters it began with: an optimizer that adapts them keeps the adapted ones.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, name in parameter_names(module, optimizer).items():
        state = optimizer.state.get(parameter, {})
        values[name] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value
                values[name][key] = "tensor"
            elif _is_plain(value):
                values[name][key] = value
            else:
                raise CheckpointError("state", f"the optimizer's {name}.{key} is {value!a:.80}; {SAVED}")
    adapted = [
        {k: v for k, v in now.items() if v is not was.get(k) and v != was.get(k)}
        for now, was in zip(hyperparameters(optimizer), built, strict=True)
    ]
    for key, value in [item for group in adapted for item in group.items()]:
        if not all(map(_is_plain, value if isinstance(value, list | tuple) else [value])):
            raise CheckpointError("state", f"the optimizer's {key} has become {value!a:.80}; {SAVED}")
    return tensors, {"state": values, "adapted": adapted}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int) or (isinstance(value, float) and isfinite(value))


def restore_state(
    module: nn.Module, optimizer: optim.Optimizer, saved: Mapping[str, Any], read: Callable[[dict[str, Tensor]], None]
) -> None:
    """Put back what ``saved_state`` returned; ``read`` fills tensors by name.

    What is expected comes from the optimizer itself: a step with gradients of zero at rate zero shows what it
    keeps. The weights may lose the sign of a zero in it, so they are restored after.
    """
    names = parameter_names(module, optimizer)
    values = saved["state"]
    if values.keys() != set(names.values()):
        raise CheckpointError("optimizer", "optimizer: it trained other parameters than this run's")
    if any(values.values()) and not all(p in optimizer.state for p in names):
        make_state(module, optimizer)
    for parameter, name in names.items():
        own = optimizer.state.get(parameter, {})
        kinds = {key: isinstance(value, Tensor) for key, value in own.items()}
        before = {k: v == "tensor" or (v is None and k == "momentum_buffer") for k, v in values[name].items()}
        if not values[name]:
            optimizer.state.pop(parameter, None)
        elif before != kinds:
            raise CheckpointError(
                "optimizer", f"optimizer: it kept {sorted(values[name])} of '{name}', this run's keeps {sorted(kinds)}"
            )
        else:
            own.update({key: value for key, value in values[name].items() if value != "tensor"})
    read(saved_tensors(names, optimizer))
    for group, adapted in zip(optimizer.param_groups, saved["adapted"], strict=True):
        group.update({key: value for key, value in adapted.items() if key in group})


def saved_tensors(names: Mapping[nn.Parameter, str], optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """Return the state's tensors by ``parameter|key``."""
    return {
        f"{name}|{key}": value
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def make_state(module: nn.Module, optimizer: optim.Optimizer) -> None:
    """Let the optimizer make its state without moving the weights: gradients of zero, rate zero."""
    sparse = {part.weight for part in module.modules() if getattr(part, "sparse", False)}
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in group["params"]:
            zero = torch.zeros_like(parameter)
            parameter.grad = zero.to_sparse(1) if parameter in sparse else zero
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        for parameter in group["params"]:
            parameter.grad = None
