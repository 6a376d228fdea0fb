"""The repeated blocks of a network: computing them twice to save memory, compiling each alone."""

from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from scaletrain.errors import InputError


def blocks(module: nn.Module) -> list[nn.Module]:
    """Return the elements of the outermost ``nn.ModuleList``s of ``module``: a Transformer's blocks."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in blocks(child)]


def recompute_blocks(module: nn.Module) -> None:
    """Let each block keep its inputs alone and be computed again in the backward pass (activation checkpointing).

    The gradients are the same, dropout included; a third more computing, memory for one block's activations instead
    of all blocks'. Names of parameters stay. Raises InputError for a module without blocks, and for BatchNorm in
    them, which would count each batch twice.
    """
    found = _blocks_for("--activation-checkpointing", module)
    if any(isinstance(part, _BatchNorm) for block in found for part in block.modules()):
        raise InputError(
            "--activation-checkpointing computes blocks twice, and BatchNorm would count each batch twice; use "
            "LayerNorm or GroupNorm in the blocks"
        )
    for block in found:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(module: nn.Module) -> None:
    """Compile what each block computes; blocks of one kind are compiled once. Names of parameters stay.

    Raises InputError for a module without blocks.
    """
    for block in _blocks_for("--compile-blocks", module):
        block.forward = torch.compile(block.forward)


def _blocks_for(option: str, module: nn.Module) -> list[nn.Module]:
    found = blocks(module)
    if not found:
        raise InputError(
            f"{option}: {type(module).__name__} has no nn.ModuleList; put the layers that repeat into one, "
            "or leave it out"
        )
    return found
