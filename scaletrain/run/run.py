"""Everything the loop touches, built once from a recipe and a config."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from signal import SIGINT
from typing import Any, NoReturn

import torch
from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_

from scaletrain.agreement import NO_WISH, Wish, Wishes, gather_texts, together
from scaletrain.checkpoint.format import dump
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.tensors import is_sharded, local_part
from scaletrain.config import Config
from scaletrain.devices import NOTHING, Devices, seed_generators
from scaletrain.errors import INTERRUPTED, PREEMPTED, InputError, Preempted
from scaletrain.loader import HeldOut, Loader, MicroBatch, length
from scaletrain.optimizers import base_values, hyperparameters, set_factors
from scaletrain.order import MASK, STRIDE, seed_for
from scaletrain.recipe import Batch, Data, Hook, Metric, Recipe
from scaletrain.run.capture import captured
from scaletrain.run.ending import say_outcome, take_best, write_outcome
from scaletrain.run.info import Result, StepInfo
from scaletrain.signals import Signals
from scaletrain.state import State
from scaletrain.tracking import Tracking


@dataclass
class Run:
    """One training run on this process. Every process holds one, equal but for its share of the data.

    Its methods are what a loop is written with, in the order in which a step needs them.
    """

    recipe: Recipe
    cfg: Config
    data: Data
    devices: Devices
    module: nn.Module
    """The recipe's model as it is."""
    model: nn.Module
    """The model to train: wrapped where several processes share the work."""
    optimizer: optim.Optimizer
    loader: Loader
    held_out: dict[str, HeldOut]
    """The splits ``val`` and ``test``, where the data has them."""
    examples: int
    """Number of training examples: an epoch."""
    total_steps: int
    step: "Step"
    """The optimizer step: ``train_step`` unless ``main(recipe, step=...)`` replaced it."""
    folder: Path = field(default_factory=Path)
    """Where the run writes."""
    tracking: Tracking = field(default_factory=Tracking)
    """What the run tells; silent until it has a folder."""
    state: State = field(default_factory=State)
    hooks: Sequence[Hook] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of each validation and test metric."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What must be the same when the run goes on later."""
    saver: Saver | None = None
    """Writes the checkpoints; None until the run has a folder."""
    signals: Signals = field(default_factory=Signals)
    paused_seconds: float = 0.0
    """Time spent in validation so far, which throughput leaves out."""

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._sharded = any(map(is_sharded, self.parameters))
        sparse = any(getattr(module, "sparse", False) for module in self.module.modules())
        self._plain = not sparse and all(p.dtype == torch.float32 for p in self.parameters)
        self.scaler = self.devices.accelerator.scaler
        self._seed = seed_for(self.cfg.seed, 3, self.devices.rank)
        self._base = base_values(self.optimizer)
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        self._skips_on_device = fused and self.devices.device.type == "cuda"
        self._one = torch.ones((), device=self.devices.device)
        self._true = torch.ones((), dtype=torch.bool, device=self.devices.device)
        self._found = torch.zeros((), device=self.devices.device)
        self.losses = torch.zeros((), dtype=self.devices.sums_in, device=self.devices.device)
        """Sum of this process's shares of the loss since ``state.train_loss_from``."""
        self.skipped = torch.zeros((), device=self.devices.device)
        """Steps skipped that ``state.skipped`` does not count yet."""
        self.built = hyperparameters(self.optimizer)
        self.wishes = Wishes(self.devices.control)
        self.asked = ""
        """Why this process asks for the end of training, if it does."""
        self.handed_out: StepInfo | None = None
        """The step that the caller of ``steps`` is busy with."""
        self.lines = (0, 0)
        """Lines of metrics.jsonl and timing.jsonl when it was handed out."""
        self._save_granted = False
        self._save_at = time.monotonic() + 60 * self.cfg.checkpoint_minutes
        self.result_step = -1
        """Step whose weights are the result of the run, once training is over."""

    def stopping(self) -> bool:
        """Whether a stop that some process asked for a step ago is due. Every rank must reach this line."""
        self.signals.training = True
        granted = self._listen()
        if granted.stop:
            self.state.stop_reason = gather_texts(self.asked, self.devices.control)[granted.stop - 1]
        return bool(self.state.stop_reason)

    def _listen(self) -> Wish:
        """Tell the others what this process was asked for, and do what all have agreed on."""
        return self._heed(self.wishes.exchange(self._wish()))

    def _heed(self, granted: Wish) -> Wish:
        if granted is NO_WISH:
            return granted
        if granted.failed and self.saver is not None:
            self.saver.wait()
        if granted.leave:
            self.leave(granted.leave)
        if granted.save:
            self._save_granted, self.signals.save = True, False
        return granted

    def _wish(self) -> Wish:
        signals, saver = self.signals, self.saver
        due = self.devices.is_first and time.monotonic() > self._save_at
        failed = saver is not None and saver.failure is not None
        if not (due or self.asked or signals.leave or signals.save or failed):
            return NO_WISH
        leave = 0 if saver is None or not signals.leave else INTERRUPTED if signals.leave == SIGINT else PREEMPTED
        stop = 1 + self.devices.rank if self.asked else 0
        return Wish(stop, int(due or signals.save), leave, int(failed))

    def leave(self, code: int) -> NoReturn:
        """Save this very step and raise Preempted, on all processes. Every rank must reach this line."""
        self.save(self.handed_out)
        if self.saver is not None:
            self.saver.wait()
        raise Preempted(code)

    def prepare_step(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """Set this step's learning rate, seed the generators by (seed, step, rank), and augment."""
        step = self.state.step
        set_factors(self.optimizer, self._base, self.recipe.schedule(step, self.total_steps, self.cfg))
        seed_generators(self._seed + step * STRIDE & MASK, self.devices.device)
        if self.recipe.augment is None:
            return micro_batches
        return [MicroBatch(self.recipe.augment(batch, self.cfg), counted) for batch, counted in micro_batches]

    def shares(self, micro_batches: list[MicroBatch]) -> Sequence[float | Tensor]:
        """Return each micro-batch's share of the step's weight over all processes; 0 for a repeated one.

        Counts of examples are known everywhere. A recipe's own ``weight`` costs one small reduction: every
        rank must reach this line.
        """
        weight = self.recipe.weight
        if weight is None:
            return [counted / self.cfg.batch_size for _, counted in micro_batches]
        dtype, device = self.devices.sums_in, self.devices.device
        own = [torch.as_tensor(weight(b) if counted else 0, dtype=dtype, device=device) for b, counted in micro_batches]
        if own[-1].ndim:
            raise InputError(
                f"weight returned a tensor of shape {tuple(own[-1].shape)}; return one number for the batch"
            )
        weights = torch.stack(own)
        total = self.devices.sum(weights.sum())
        return list(weights / total.clamp(min=torch.finfo(dtype).tiny))

    def zero_grad(self) -> None:
        """Forget the gradients, without the 8 us that ``optimizer.zero_grad()`` takes on a small model."""
        for parameter in self.parameters:
            parameter.grad = None

    def exchanging_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Average gradients over processes in the last micro-batch only; forward and backward go inside."""
        if last or self.devices.world_size == 1:
            return NOTHING
        return self.devices.accelerator.no_sync(self.model)  # type: ignore[no-any-return]  # accelerate has no types

    def backward(self, part: Tensor) -> None:
        """Add the gradient of this process's part of the mean loss; the exchange averages, so it is scaled up."""
        if self.devices.world_size > 1:
            part = part * self.devices.world_size
        (part if self.scaler is None else self.scaler.scale(part)).backward()

    def clip_gradients(self) -> Tensor | None:
        """Scale the gradient down to ``max_grad_norm``; return its norm before, 0-d."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.cfg.max_grad_norm is None:
            return None
        return clip_grad_norm_(self.parameters, self.cfg.max_grad_norm)

    def update(self) -> Tensor:
        """Update the weights unless a gradient is NaN or infinite; return whether it was finite, 0-d bool.

        The gradient is averaged by now, or the flag is shared, so every process decides alike. Optimizers that
        take ``found_inf`` skip on the device; for others on an accelerator this waits for the device.
        """
        found = self._found.zero_()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self._sharded:
            gradients = [local_part(gradient) for gradient in gradients]
        if self._plain:  # 3 us on a small model, where a norm takes 25
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, self._one)
        else:
            found.copy_(any_not_finite(gradients))
        if self._sharded:  # each rank has seen its own part alone
            self.devices.sum(found)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self._skips_on_device:
            self.optimizer.found_inf = found  # type: ignore[attr-defined]  # what torch's GradScaler does
            self.optimizer.step()
        elif not found.item():
            self.optimizer.step()
            return self._true
        self.skipped += found
        return found == 0

    def info(self, loss: Tensor, grad_norm: Tensor | None, finite: Tensor) -> StepInfo:
        """Describe the step just done: ``loss`` is this process's share of the mean."""
        samples_seen = self.state.samples_seen + self.cfg.batch_size
        lr = self.optimizer.param_groups[0]["lr"]
        return StepInfo(self.state.step + 1, samples_seen / self.examples, samples_seen, lr, loss, grad_norm, finite)

    def hand_out(self, info: StepInfo) -> Iterator[StepInfo]:
        """Move the counters on to after the step that ``info`` describes, and yield it once."""
        self.state.step, self.state.samples_seen = info.step, info.samples_seen
        self.losses = self.losses + info.loss
        yield from self.unfinished(info)

    def unfinished(self, info: StepInfo | None = None) -> Iterator[StepInfo]:
        """Yield ``info``, or the step that the caller had not done with when the run was told to leave."""
        self.handed_out = info or self.handed_out
        if self.handed_out is not None:
            self.lines = self.tracking.lines
            yield self.handed_out
            self.handed_out = None

    def log_due(self, info: StepInfo) -> bool:
        """Whether to log this step's loss: the first, every ``log_every``-th and the last."""
        step = info.step
        return step % self.cfg.log_every == 0 or step == 1 or step == self.total_steps

    def validation_due(self, info: StepInfo) -> bool:
        """Whether to validate: as soon as an epoch is complete, or every ``validate_every`` steps; and at the end."""
        if "val" not in self.held_out or info.step == self.total_steps:
            return "val" in self.held_out
        if self.cfg.validate_every is not None:
            return info.step % self.cfg.validate_every == 0
        return info.samples_seen // self.examples > (info.samples_seen - self.cfg.batch_size) // self.examples

    def mean(self, share: Tensor) -> float:
        """Add up the processes' shares of a mean. Waits for the device; every rank must reach this line."""
        return float(self.devices.sum(share.detach().clone()))

    def mean_train_loss(self) -> float:
        """Return the mean loss of the steps since the last call. Every rank must reach this line."""
        mean = self.mean(self.losses) / max(1, self.state.step - self.state.train_loss_from)
        self.losses, self.state.train_loss_from = torch.zeros_like(self.losses), self.state.step
        return mean

    def newly_skipped(self) -> int:
        """Count the steps skipped since the last call. Waits for the device."""
        new = int(self.skipped)
        self.skipped.zero_()
        self.state.skipped += new
        return new

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model into eval mode with rank 0's buffers and without gradients, and back.

        Every rank must reach this line.
        """
        started = time.perf_counter()
        self.devices.broadcast_buffers(self.module)
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            # what FSDP2 gathers in inference mode it cannot train with
            with torch.no_grad() if self._sharded else torch.inference_mode():
                yield
        finally:
            for module, training in modes:
                module.training = training
            self.paused_seconds += time.perf_counter() - started

    def evaluate(self, batch: Batch) -> dict[str, Metric]:
        """Return the recipe's figures of a batch; without ``evaluate``, its mean loss.

        A long validation listens too: told to leave, it does not go on to its end. Every rank must reach this line.
        """
        told = Wish(leave=self._wish().leave)  # a stop asked for meanwhile is not granted sooner for it
        self.wishes.hold(self._heed(self.wishes.exchange(told)))
        with self.devices.autocast():
            if self.recipe.evaluate is None:
                return {"loss": self.recipe.loss(self.module, batch, self.cfg)}
            return self.recipe.evaluate(self.module, batch, self.cfg)

    def weight(self, batch: Batch) -> Tensor | float:
        """Return what a mean over ``batch`` runs over: the recipe's weight, else its number of examples."""
        return length(batch) if self.recipe.weight is None else self.recipe.weight(batch)

    def measured(self, split: str, figures: dict[str, float]) -> dict[str, float]:
        """Keep what a validation or test found; return it with the split's name in front: ``val_loss``."""
        metrics = {f"{split}_{name}": value for name, value in figures.items()}
        self.metrics.update(metrics)
        if split == "test":
            self.state.tested_step = self.state.step
        if split != "val":
            return metrics
        state, value = self.state, metrics[self.cfg.monitored_metric]
        state.validated_step = state.step
        better = state.best is None or (value > state.best if self.cfg.higher_is_better else value < state.best)
        if better and isfinite(value):
            state.best, state.best_step, state.validations_without_progress = value, state.step, 0
            state.best_metrics = metrics
        else:
            state.validations_without_progress += 1
        return metrics

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Record figures of the current step: metrics.jsonl, console, tracker. Waits for the device of tensors."""
        try:
            numbers = {name: float(value) for name, value in values.items()}
        except (TypeError, ValueError):
            raise InputError(f"log takes numbers and 0-d tensors by name; got {dict(values)}") from None
        step, samples_seen = self.state.step, self.state.samples_seen
        self.tracking.log(numbers, step=step, epoch=samples_seen / self.examples, samples_seen=samples_seen)

    def stop(self, reason: str) -> None:
        """Ask, on any process, that training end; all processes end together, one step later."""
        self.asked = self.asked or reason

    def save_due(self, info: StepInfo) -> bool:
        """Whether to save after this step: its number, the best score, the clock or a signal asks for it."""
        every = self.cfg.checkpoint_every
        return self._save_granted or self.state.best_step == info.step or (every is not None and info.step % every == 0)

    def save(self, unfinished: StepInfo | None = None) -> None:
        """Begin to save this step; training goes on when all is copied. Every rank must reach this line.

        ``unfinished`` is a step whose logging, validation and hooks are still to be done.
        """
        if self.saver is None or self.saver.saved_step == self.state.step:
            return
        self.tracking.flush()
        tensors, facts = captured(self, unfinished)
        beside = [self.folder / name for name in ("metrics.jsonl", "timing.jsonl")] if self.devices.is_first else []
        self.saver.save(self.state.step, tensors, dump(facts), beside=beside, best_step=self.state.best_step)
        self._save_granted, self._save_at = False, time.monotonic() + 60 * self.cfg.checkpoint_minutes

    def take_best(self) -> None:
        """Save the end of training, then put the best weights into the model. Every rank must reach this line."""
        self.wishes.drain()
        if self.result_step < 0:
            self.save()
            take_best(self)

    def finish(self) -> Result:
        """Export the best weights, write result.json, and say how the run ended. Every rank must reach this line."""
        self.take_best()
        together(lambda: write_outcome(self) if self.devices.is_first else None, self.devices.control)
        return say_outcome(self)


def any_not_finite(gradients: list[Tensor]) -> Tensor:
    """Whether a gradient of any dtype, sparse ones too, holds NaN or infinity, 0-d bool."""
    values = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    largest = [v.abs().amax().float() for v in values if v.numel()]
    return ~torch.stack(largest).isfinite().all() if largest else torch.tensor(False)


Step = Callable[[Run, list[MicroBatch]], StepInfo]
