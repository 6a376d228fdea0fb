"""Everything the loop touches, built once from a recipe and a config."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn, optim

from scaletrain.agreement import gather_texts, together
from scaletrain.batches import Batch
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.strict import dump
from scaletrain.checkpoint.tensors import local_part
from scaletrain.config import Config
from scaletrain.data import Data
from scaletrain.devices import Devices, seed_generators
from scaletrain.ema import EMA
from scaletrain.errors import InputError, Preempted
from scaletrain.grace import seconds_left
from scaletrain.loader import HeldOut, Loader, MicroBatch
from scaletrain.loss import shares, weighted
from scaletrain.metrics import Objects
from scaletrain.optimizer_state import hyperparameters
from scaletrain.optimizers import base_values, set_factors
from scaletrain.permutation import MASK, STRIDE, seed_for
from scaletrain.pulse import Pulse
from scaletrain.recipe import Hook, Metric, Recipe
from scaletrain.run.capture import captured
from scaletrain.run.ending import replaced, say_outcome, take_best, write_outcome
from scaletrain.run.evaluating import evaluating
from scaletrain.run.gradients import Gradients
from scaletrain.run.info import Result, StepInfo
from scaletrain.run.requests import Requests
from scaletrain.sharding import reshard
from scaletrain.signals import Signals
from scaletrain.state import State
from scaletrain.streams import StreamLoader
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
    loader: Loader | StreamLoader
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
    metric_objects: Objects = field(default_factory=lambda: Objects({}, None, torch.device("cpu"), None))
    """The recipe's metrics that are not means."""
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
        self.pulse = Pulse()
        """What this process is busy with."""
        self.logged: dict[str, float] = {}
        """The last value of each figure that was logged."""
        self.notes: list[str] = []
        """What is to be said as a warning once the run can speak."""
        self.gradients = Gradients(self.module, self.model, self.optimizer, self.devices, self.cfg, self.pulse)
        self.requests = Requests(self.devices, self.signals, self.cfg.checkpoint_minutes)
        self._seed = seed_for(self.cfg.seed, 3, self.devices.rank)
        self._base = base_values(self.optimizer)
        self.ema = None if self.cfg.ema is None else EMA(self.module, self.cfg.ema)
        self.losses = torch.zeros((), dtype=self.devices.sums_in, device=self.devices.device)
        """Sum of this process's shares of the loss since ``state.train_loss_from``."""
        self.built = hyperparameters(self.optimizer)
        self.handed_out: StepInfo | None = None
        """The step that the caller of ``steps`` is busy with."""
        self.lines = (0, 0)
        """Lines of metrics.jsonl and timing.jsonl when it was handed out."""
        self.result_step = -1
        """Step whose weights are the result of the run, once training is over."""
        self.due_with: list[tuple[int, int]] = []
        """The weights as they were when a validation was found due; empty outside of such a one."""

    def stopping(self) -> bool:
        """Whether a stop that some process asked for a step ago is due. Every rank must reach this line."""
        self.signals.training = True
        self.pulse.at("waiting for the others")
        granted = self.requests.exchange(failed=self.saver is not None and self.saver.failure is not None)
        if granted.failed and self.saver is not None:
            self.saver.wait()
        if granted.leave and self.saver is not None:
            self.leave(granted.leave)
        if granted.stop:
            self.state.stop_reason = gather_texts(self.requests.stop, self.devices.control)[granted.stop - 1]
        self.pulse.at("reading data")
        return bool(self.state.stop_reason)

    def leave(self, code: int) -> NoReturn:
        """Save this very step and raise Preempted, on all processes. Every rank must reach this line."""
        if self.ema is not None and self.ema.in_use:  # in a validation
            self.ema.swap()
        if self.saver is not None and (left := seconds_left()) < self.saver.seconds:
            took = f"saving took {self.saver.seconds:.1f} s"
            self.tracking.warn(f"{left:.0f} s are left and {took}: the run may go on from the checkpoint before")
        self.save(self.handed_out)
        if self.saver is not None:
            self.pulse.at("saving")
            self.saver.wait()
        raise Preempted(code)

    def prepare_step(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """Set this step's learning rate, seed the generators by (seed, step, rank), and augment."""
        step = self.state.step
        factors = self.recipe.schedule(step, self.total_steps, self.cfg)
        set_factors(self.optimizer, self._base, factors, self.state.lr_factor)
        seed_generators(self._seed + step * STRIDE & MASK, self.devices.device)
        if self.recipe.augment is None:
            return micro_batches
        return [MicroBatch(self.recipe.augment(batch, self.cfg), counted) for batch, counted in micro_batches]

    def shares(self, micro_batches: list[MicroBatch]) -> Sequence[float | Tensor]:
        """Return each micro-batch's share of the step's weight. Every rank must reach this line."""
        return shares(micro_batches, self.cfg.batch_size, self.recipe.weight, self.devices)

    def info(self, loss: Tensor, grad_norm: Tensor | None, finite: Tensor) -> StepInfo:
        """Describe the step just done: ``loss`` is this process's share of the mean."""
        samples_seen = self.state.samples_seen + self.cfg.batch_size
        lr = self.optimizer.param_groups[0]["lr"]
        return StepInfo(self.state.step + 1, samples_seen / self.examples, samples_seen, lr, loss, grad_norm, finite)

    def hand_out(self, info: StepInfo) -> Iterator[StepInfo]:
        """Move the counters on to after the step that ``info`` describes, and yield it once."""
        self.state.step, self.state.samples_seen = info.step, info.samples_seen
        self.pulse.at("after the step")
        self.losses = self.losses + info.loss
        if self.ema is not None:
            self.ema.update(info.step, info.finite)
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
        every, seen = self.cfg.validate_every, info.samples_seen
        epoch_done = seen // self.examples > (seen - self.cfg.batch_size) // self.examples
        due = epoch_done if every is None else info.step % every == 0
        return self._due("val", due or info.step == self.total_steps)

    def validation_missed(self) -> bool:
        """Whether training ended between two validations."""
        return self._due("val", self.state.validated_step < self.state.step)

    def test_due(self) -> bool:
        """Whether the test examples have not been measured with the final weights yet."""
        return self._due("test", self.state.tested_step < self.state.step)

    def _due(self, split: str, due: bool) -> bool:
        due = due and split in self.held_out
        self.due_with = self.weights() if due else []
        return due

    def weights(self) -> list[tuple[int, int]]:
        """Tell whether the weights are still the same tensors and nothing has been written to them."""
        return [(p.data_ptr(), p._version) for p in map(local_part, self.gradients.parameters)]

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
        new = int(self.gradients.skipped)
        self.gradients.skipped.zero_()
        self.state.skipped += new
        return new

    def evaluating(self) -> AbstractContextManager[None]:
        """Put the model into eval mode with rank 0's buffers, averaged weights and without gradients, and back.

        Every rank must reach this line.
        """
        return evaluating(self)

    def evaluate(self, batch: Batch) -> dict[str, Metric]:
        """Return the recipe's figures of a batch; without ``evaluate``, its mean loss.

        A long validation listens too: told to leave, it does not go on to its end, unless it is one of a hook's
        own or with other weights, which are not to be saved. Every rank must reach this line.
        """
        self.pulse.at("validation")
        code = self.requests.told_to_leave()
        if code and self.saver is not None and self.due_with == self.weights():
            self.leave(code)
        with self.devices.autocast():
            if self.recipe.evaluate is None:
                loss = self.recipe.loss(self.module, batch, self.cfg)
                return {"loss": loss if isinstance(loss, Tensor) else weighted(loss, 1.0)}
            return self.recipe.evaluate(self.module, batch, self.cfg)

    def weight(self, batch: Batch, examples: int) -> Tensor | float:
        """Return what a mean over ``batch`` runs over: the recipe's weight, else its number of ``examples``."""
        return examples if self.recipe.weight is None else self.recipe.weight(batch)

    def measured(self, split: str, figures: dict[str, float]) -> dict[str, float]:
        """Keep what a validation or test found; return it with the split's name in front: ``val_loss``."""
        self.due_with = []
        metrics = {f"{split}_{name}": value for name, value in figures.items()}
        self.metrics.update(metrics)
        if split == "test":
            self.state.tested_step = self.state.step
        elif split == "val":
            self.state.judge(metrics, metrics[self.cfg.monitored_metric], higher_is_better=self.cfg.higher_is_better)
        return metrics

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """Record figures of the current step: metrics.jsonl, console, tracker. Waits for the device of tensors."""
        try:
            numbers = {name: float(value) for name, value in values.items()}
        except (TypeError, ValueError):
            raise InputError(f"log takes numbers and 0-d tensors by name; got {dict(values)}") from None
        self.logged |= numbers
        step, samples_seen = self.state.step, self.state.samples_seen
        self.tracking.log(numbers, step=step, epoch=samples_seen / self.examples, samples_seen=samples_seen)

    def stop(self, reason: str) -> None:
        """Ask, on any process, that training end; all processes end together, one step later."""
        self.requests.stop = self.requests.stop or reason

    def save_due(self, info: StepInfo) -> bool:
        """Whether to save after this step: its number, the best score, the clock or a signal asks for it."""
        every = self.cfg.checkpoint_every
        asked = self.requests.save_granted or (every is not None and info.step % every == 0)
        return asked or self.state.best_step == info.step

    def save(self, unfinished: StepInfo | None = None) -> None:
        """Begin to save this step; training goes on when all is copied. Every rank must reach this line.

        ``unfinished`` is a step whose logging, validation and hooks are still to be done.
        """
        if self.saver is None or self.saver.saved_step == self.state.step:
            return
        self.pulse.at("saving")
        self.tracking.flush()
        reshard(self.module)  # in a validation it is gathered
        tensors, facts = captured(self, unfinished)
        beside = [self.folder / name for name in ("metrics.jsonl", "timing.jsonl")] if self.devices.is_first else []
        self.saver.save(self.state.step, tensors, dump(facts), beside=beside, best_step=self.state.best_step)
        self.requests.saved()
        self.pulse.at("after the step")

    def take_best(self) -> None:
        """Save the end of training, then put the best weights into the model. Every rank must reach this line."""
        self.pulse.at("waiting for the others")
        self.requests.wishes.drain()
        if self.result_step < 0:
            self.save()
            take_best(self)

    def finish(self) -> Result:
        """Export the best weights, write result.json, and say how the run ended. Every rank must reach this line."""
        self.take_best()
        bad = replaced(self)
        together(lambda: write_outcome(self, bad) if self.devices.is_first else None, self.devices.control)
        return say_outcome(self)


Step = Callable[[Run, list[MicroBatch]], StepInfo]
