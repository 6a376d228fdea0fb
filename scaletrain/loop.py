"""The training loop: the one you would have written, with every example counted once.

Read it from top to bottom. ``train`` is the tutorial's skeleton, ``steps`` and ``train_step`` are its body;
each may be used on its own, and ``main(recipe, step=...)`` takes another ``train_step``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from scaletrain.batches import length
from scaletrain.loader import MicroBatch
from scaletrain.loss import weighted
from scaletrain.metrics import Sums
from scaletrain.run import Run, StepInfo


def train(run: Run) -> None:
    """Train to the last step, or until some process asks to stop. Every process calls it."""
    for info in steps(run):
        if run.log_due(info):
            run.log({"loss": run.mean(info.loss), "lr": info.lr})  # waits for the device
        if run.validation_due(info):
            run.log(validate(run) | {"train_loss": run.mean_train_loss()})
        for hook in run.hooks:
            hook(run, info)
    if run.validation_missed():
        run.log(validate(run) | {"train_loss": run.mean_train_loss()})
    run.take_best()
    if run.test_due():
        run.log(validate(run, "test"))


def steps(run: Run) -> Iterator[StepInfo]:
    """Do optimizer steps and yield what each did; logging, validating and the rest are the caller's."""
    yield from run.unfinished()
    batches = run.loader.steps(run.state.samples_seen)
    while run.state.step < run.total_steps and not run.stopping():
        micro_batches = run.prepare_step(next(batches))
        yield from run.hand_out(run.step(run, micro_batches))


def train_step(run: Run, micro_batches: list[MicroBatch]) -> StepInfo:
    """Do one optimizer step on the mean loss of the whole global batch."""
    loss = forward_backward(run, micro_batches)
    grad_norm = run.gradients.clip()
    finite = run.gradients.update()
    return run.info(loss, grad_norm, finite)


def forward_backward(run: Run, micro_batches: list[MicroBatch]) -> Tensor:
    """Compute the gradient of the step's mean loss; return this process's share of that loss, 0-d.

    A micro-batch's own mean counts by its share of the step's examples, so that the parts add up to the mean
    over the global batch however it was divided, into micro-batches or over ranks.
    """
    run.gradients.zero()
    parts = []
    shares = run.shares(micro_batches)
    for i, ((batch, counted), share) in enumerate(zip(micro_batches, shares, strict=True)):
        with run.gradients.exchanging(last=i == len(micro_batches) - 1):
            with run.devices.autocast():
                loss = run.recipe.loss(run.model, batch, run.cfg)
            part = weighted(loss, share if counted else 0.0)
            run.gradients.backward(part)
        parts.append(part.detach())
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def validate(run: Run, split: str = "val") -> dict[str, float]:
    """Measure a held-out split, every example exactly once on any number of processes.

    Returns the recipe's figures with the split's name in front: ``val_loss``, ``val_accuracy``. Every process
    calls it.
    """
    sums = Sums(run.devices.sums_in, run.devices.device, run.metric_objects)
    with run.evaluating():
        for batch, counted in run.held_out[split]:
            sums.add(run.evaluate(batch), length(batch), run.weight(batch, counted), counted)
    metrics = sums.means(run.devices.sum, expected=run.held_out[split].reader.n)
    return run.measured(split, metrics)
