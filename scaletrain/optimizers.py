"""The optimizers of the tutorial: torch's own, without decay where decay hurts, fused where the device has it."""

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.modules.batchnorm import _NormBase

from scaletrain.config import Config
from scaletrain.errors import InputError

FUSED_ON = ("cpu", "cuda")
"""Devices whose fused optimizers are known to be right: on MPS they ignored ``found_inf`` (pytorch #186360)."""
UNDECAYED = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
"""Layers none of whose parameters decay."""
Groups = list[dict[str, Any]]
LrFactors = Mapping[str, float] | None


def adamw(
    model: nn.Module, cfg: Config, *, betas: tuple[float, float] = (0.9, 0.999), lr_factors: LrFactors = None
) -> optim.Optimizer:
    """Return AdamW over ``parameter_groups`` with the config's lr and weight decay."""
    groups = parameter_groups(model, cfg.weight_decay, lr=cfg.lr, lr_factors=lr_factors)
    return optim.AdamW(groups, lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay, fused=_has_fused(groups))


def adam(
    model: nn.Module, cfg: Config, *, betas: tuple[float, float] = (0.9, 0.999), lr_factors: LrFactors = None
) -> optim.Optimizer:
    """Return Adam over ``parameter_groups``; its weight decay is part of the gradient, as an L2 penalty's."""
    groups = parameter_groups(model, cfg.weight_decay, lr=cfg.lr, lr_factors=lr_factors)
    return optim.Adam(groups, lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay, fused=_has_fused(groups))


def sgd(
    model: nn.Module, cfg: Config, *, momentum: float = 0.9, nesterov: bool = False, lr_factors: LrFactors = None
) -> optim.Optimizer:
    """Return SGD over ``parameter_groups`` with the config's lr and weight decay."""
    groups = parameter_groups(model, cfg.weight_decay, lr=cfg.lr, lr_factors=lr_factors)
    sharded = any(hasattr(p, "to_local") for group in groups for p in group["params"])  # no fused kernel for those
    return optim.SGD(
        groups,
        lr=cfg.lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=cfg.weight_decay,
        fused=_has_fused(groups) and not sharded,
    )


def muon(model: nn.Module, cfg: Config, *, momentum: float = 0.95, lr_factors: LrFactors = None) -> optim.Optimizer:
    """Return Muon for the matrices of hidden layers and AdamW for everything else.

    The rest are embeddings, biases, norms, convolutions (torch's Muon takes matrices alone) and the Linear layer that
    is defined last, as a head is. Muon's update is scaled to the size of AdamW's ("Muon is Scalable for LLM Training",
    2025), so both take the config's lr and weight decay. It is computed in bfloat16: how a batch is divided shows in
    the third digit of an update. Raises InputError for a model without such matrices.
    """
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    embedded = [module.weight for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    kept = {id(weight) for weight in (*embedded, *linear[-1:])}
    groups = parameter_groups(model, cfg.weight_decay, lr=cfg.lr, lr_factors=lr_factors)
    parts: tuple[Groups, Groups] = ([], [])
    for group in groups:
        for part, is_hidden in zip(parts, (True, False), strict=True):
            parameters = [p for p in group["params"] if (p.ndim == 2 and id(p) not in kept) == is_hidden]
            part.extend([{**group, "params": parameters}] if parameters else [])
    hidden, rest = parts
    if not hidden:
        raise InputError(
            f"muon: {type(model).__name__} has no matrix that is trained but embeddings and its last Linear layer; "
            "use adamw"
        )
    options: dict[str, Any] = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    first = optim.Muon(hidden, momentum=momentum, adjust_lr_fn="match_rms_adamw", **options)
    return _Both(first, optim.AdamW(rest, fused=_has_fused(rest), **options)) if rest else first


class _Both(optim.Optimizer):
    """Two optimizers as one: their groups and their state, in one place."""

    def __init__(self, first: optim.Optimizer, second: optim.Optimizer) -> None:
        self.parts = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})  # the very dicts: what is set here counts
        first.state = second.state = self.state

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        first, second = self.parts
        first.param_groups = self.param_groups[: len(first.param_groups)]
        second.param_groups = self.param_groups[len(first.param_groups) :]
        first.state = second.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is called, no loss returned
        for part in self.parts:
            part.step()


def parameter_groups(
    model: nn.Module, weight_decay: float, *, lr: float | None = None, lr_factors: LrFactors = None
) -> Groups:
    """Split the trainable parameters: weights decay; biases, norms and embeddings do not.

    ``lr_factors`` multiplies ``lr`` for the parameters below a module, as in ``{"features": 0.1}``; the longest
    name that fits counts. Raises InputError for one that fits none.
    """
    factors = dict(lr_factors or {})
    if lr_factors and lr is None:
        raise InputError("parameter_groups: lr_factors multiplies lr; give lr too")
    undecayed = {
        id(p) for module in model.modules() if isinstance(module, UNDECAYED) for p in module.parameters(recurse=False)
    }
    kinds = [(name, decays) for name in ("", *factors) for decays in (True, False)]
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {kind: [] for kind in kinds}
    used = set()
    for name, parameter in model.named_parameters():
        fits = [known for known in factors if f"{name}.".startswith(f"{known}.")]
        used.update(fits)
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in undecayed
            groups[max(fits, key=len, default=""), decays].append(parameter)
    for name, factor in factors.items():
        if not (isfinite(factor) and factor > 0):
            raise InputError(f"lr_factors has {factor} for '{name}'; it must be a finite number above 0")
        if name not in used:
            there = ", ".join(child for child, _ in model.named_children())
            raise InputError(f"lr_factors: no parameter's name begins with '{name}'; the model's parts are {there}")
    found = []
    for (name, decays), parameters in groups.items():
        group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        if lr_factors and lr is not None:
            group["lr"] = lr * factors.get(name, 1.0)
        found.extend([group] if parameters else [])
    return found


def begin_momentum(optimizer: optim.Optimizer) -> None:
    """Let fused SGD begin with a momentum of zero, which changes nothing but a first step that is skipped.

    Without it such a step leaves uninitialized memory for the momentum (torch 2.13), and fp16 begins with skips.
    """
    for group in optimizer.param_groups if isinstance(optimizer, optim.SGD) else ():
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def describe(optimizer: optim.Optimizer) -> str:
    """Say which parameters learn at which rate with which weight decay."""
    rates: dict[float, dict[float, int]] = {}
    for group in optimizer.param_groups:
        decays = rates.setdefault(float(group["lr"]), {})
        decay = float(group.get("weight_decay", 0.0))
        decays[decay] = decays.get(decay, 0) + sum(p.numel() for p in group["params"])
    names = [type(part).__name__ for part in getattr(optimizer, "parts", (optimizer,))]
    lines = [
        f"lr {rate:g}, weight decay {' and '.join(f'{decay:g} on {n:,}' for decay, n in decays.items())} parameters"
        for rate, decays in rates.items()
    ]
    return f"{' and '.join(names)}: {'; '.join(lines)}"


def set_factors(
    optimizer: optim.Optimizer, base: list[dict[str, float]], factors: float | dict[str, float], scale: float = 1.0
) -> None:
    """Multiply each group's own rate and momentum (``base_values``) by ``factors``, and the rate by ``scale``.

    Raises InputError for a factor that is not a finite number >= 0, or of something else.
    """
    lr = factors if not isinstance(factors, dict) else factors.get("lr", 1.0)
    if not 0 <= lr < inf or (isinstance(factors, dict) and not factors.keys() <= {"lr", "momentum"}):
        raise InputError(f"schedule returned {factors}; return a finite factor >= 0, or a dict of lr and momentum")
    for group, own in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = own["lr"] * lr * scale
    if isinstance(factors, dict) and "momentum" in factors:
        for own in base:
            if not 0 <= own.get("momentum", 0.0) * factors["momentum"] < 1:
                raise InputError(
                    f"schedule returned {factors}: momentum is a factor too, and {own['momentum']} times it must lie "
                    "between 0 and 1"
                )
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


def _has_fused(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the device of the parameters has fused optimizers."""
    parameters: list[Tensor] = [p for group in groups for p in group["params"]]
    return parameters[0].device.type in FUSED_ON
