"""The model as it is measured: in eval mode, with rank 0's buffers and averaged weights, and back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from scaletrain.sharding import reshard

if TYPE_CHECKING:
    from scaletrain.run.run import Run


@contextmanager
def evaluating(run: Run) -> Iterator[None]:
    """Put the model into eval mode and without gradients, and back. Every rank must reach this line."""
    started = time.perf_counter()
    run.devices.broadcast_buffers(run.module)
    modes = [(module, module.training) for module in run.module.modules()]
    run.module.eval()
    try:
        # what FSDP2 gathers in inference mode it cannot train with
        with averaged(run), torch.no_grad() if run.gradients.sharded else torch.inference_mode():
            yield
        run.pulse.at("after the step")
    finally:
        for module, training in modes:
            module.training = training
        reshard(run.module)
        run.paused_seconds += time.perf_counter() - started


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """Give the model the moving average of its weights, where there is one, and back."""
    if run.ema is None or run.ema.in_use:
        yield
        return
    due = run.due_with == run.weights()
    run.ema.swap()
    run.due_with = run.weights() if due else []
    try:
        yield
    finally:
        if run.ema.in_use:
            run.ema.swap()
