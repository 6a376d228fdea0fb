"""Sharding a model over the processes with FSDP2, as Accelerate's plugin says (accelerate_configs/fsdp2.yaml)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scaletrain.blocks import blocks
from scaletrain.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INSTEAD = "shard the model with accelerate_configs/fsdp2.yaml instead"


def asked_for(env: Mapping[str, str]) -> bool:
    """Whether the launcher asks for FSDP2. Raises InputError where it asks for another engine."""

    def on(name: str) -> bool:
        return env.get(name, "").lower() in ("true", "1", "yes")

    for name in ("DeepSpeed", "Megatron_LM"):
        if on(f"ACCELERATE_USE_{name.upper()}"):
            raise InputError(f"the launcher's configuration asks for {name.replace('_', '-')}; {INSTEAD}")
    if not on("ACCELERATE_USE_FSDP"):
        return False
    version = env.get("FSDP_VERSION", "1")
    if version != "2":
        raise InputError(f"the launcher's configuration asks for FSDP version {version}; {INSTEAD}")
    return True


def shard_on_cpu() -> None:
    """Let Accelerate shard over CPU processes too, which it never chooses: to try on a laptop what a cluster does."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()


def recomputes(accelerator: Accelerator) -> bool:
    """Whether the plugin asks for activation checkpointing; it is done by ``recompute_blocks``, which keeps names."""
    plugin = accelerator.state.fsdp_plugin
    return bool(plugin.activation_checkpointing)


def shard(module: nn.Module, accelerator: Accelerator) -> None:
    """Divide each parameter over the processes, in place; each of ``units`` is gathered when it computes.

    In bf16 and fp16 the weights are gathered in that format, the gradients summed in float32.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    plugin = accelerator.state.fsdp_plugin
    half = HALVES.get(accelerator.mixed_precision)
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32),
        "offload_policy": plugin.cpu_offload,
    }
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy) and accelerator.device.type == "cpu":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)  # there is nothing to pin it for
    for unit in units(module, plugin):
        fully_shard(unit, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(module, **options)  # what is in no unit; gathered until the backward pass, which begins with it


def units(module: nn.Module, plugin: FullyShardedDataParallelPlugin) -> list[nn.Module]:
    """Return the parts that are gathered one at a time, inner ones first.

    The plugin names them by class or by the least number of parameters; where it names no class, they are the
    model's blocks, the elements of its ``nn.ModuleList``. Raises InputError for a class that the model has not.
    """
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    policy = plugin.auto_wrap_policy
    if policy is size_based_auto_wrap_policy:
        return _large(module, max(1, plugin.min_num_params or 1))
    if policy is not transformer_auto_wrap_policy:
        return []
    names = plugin.transformer_cls_names_to_wrap
    if not names:
        return [*dict.fromkeys(blocks(module))]
    found = [part for part in module.modules() if type(part).__name__ in names]
    if missing := set(names) - {type(part).__name__ for part in found}:
        raise InputError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(sorted(missing))}, but the model has no such layer; "
            "leave it out, and the elements of the model's nn.ModuleList are taken"
        )
    return found[::-1]


def _large(module: nn.Module, least: int) -> list[nn.Module]:
    """Return the parts with at least ``least`` parameters besides those of the parts within, inner ones first.

    Tied weights are in no part: one that is gathered for the first use would not be there for the second.
    """
    every = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    tied = {p for p in every if every.count(p) > 1}
    taken: set[int] = set()
    found = []
    for part in [*module.modules()][:0:-1]:
        parameters = {id(p): p.numel() for p in part.parameters()}
        own = sum(size for p, size in parameters.items() if p not in taken)
        if own >= least and not tied & parameters.keys() and not isinstance(part, nn.ModuleList | nn.ModuleDict):
            taken.update(parameters)
            found.append(part)
    return found


def reshard(module: nn.Module) -> None:
    """Let go of what a forward pass without a backward one has left gathered, so that parameters are sharded again."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()  # type: ignore[operator]  # what FSDP2 adds to a module
