"""The default optimizer: AdamW without decay where decay hurts, fused where the device has it."""

from math import inf
from typing import Any

from torch import nn, optim

from scaletrain.config import Config
from scaletrain.errors import InputError

FUSED_ON = ("cpu", "cuda")
"""Devices whose fused optimizers are known to be right: on MPS they ignored ``found_inf`` (pytorch #186360)."""


def adamw(model: nn.Module, cfg: Config) -> optim.Optimizer:
    """Return AdamW over ``parameter_groups`` with the config's lr and weight decay."""
    device_type = next(model.parameters()).device.type
    groups = parameter_groups(model, cfg.weight_decay)
    return optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device_type in FUSED_ON)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: matrices and larger decay, vectors (biases, norms) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    kept = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def set_factors(optimizer: optim.Optimizer, base: list[dict[str, float]], factors: float | dict[str, float]) -> None:
    """Multiply each group's own rate and momentum (``base_values``) by ``factors``.

    Raises InputError for a factor that is not a finite number >= 0, or of something else.
    """
    lr = factors if not isinstance(factors, dict) else factors.get("lr", 1.0)
    if not 0 <= lr < inf or (isinstance(factors, dict) and not factors.keys() <= {"lr", "momentum"}):
        raise InputError(f"schedule returned {factors}; return a finite factor >= 0, or a dict of lr and momentum")
    for group, own in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = own["lr"] * lr
    if isinstance(factors, dict) and "momentum" in factors:
        for group, own in zip(optimizer.param_groups, base, strict=True):
            if "betas" in group:
                group["betas"] = (own["momentum"] * factors["momentum"], *group["betas"][1:])
            elif "momentum" in group:
                group["momentum"] = own["momentum"] * factors["momentum"]


def base_values(optimizer: optim.Optimizer) -> list[dict[str, float]]:
    """Return each group's own learning rate and momentum (Adam's first beta)."""
    values = []
    for group in optimizer.param_groups:
        own = {"lr": float(group["lr"])}
        if "betas" in group:
            own["momentum"] = float(group["betas"][0])
        elif "momentum" in group:
            own["momentum"] = float(group["momentum"])
        values.append(own)
    return values
