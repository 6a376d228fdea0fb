"""The same training in the loop of each library: a recipe's model, loss and optimizer on the same examples.

Every loop gathers whole micro-batches from columns that lie on the device, in the order that scaletrain reads them,
and tells ``Job.note`` of each optimizer step it has done, so that all are timed alike. The raw loop is the limit:
nothing in it waits for the device. The others are written as their documentation says, with all switched off that
they can do without.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from scaletrain import Config, Recipe, start, train
from scaletrain.blocks import blocks
from scaletrain.order import Shuffled
from scaletrain.share import Share, micro_batch_count, split

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """What a loop is to do. ``cfg`` says ``max_steps`` and ``precision`` (fp32 or bf16); dropout and schedule are off.

    ``note(step)`` is called after each step, ``built(model)`` once, with the model as it is wrapped.
    """

    recipe: Recipe
    cfg: Config
    note: Callable[[int], None]
    built: Callable[[nn.Module], None]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    compile_blocks: bool = False

    @cached_property
    def data(self) -> Any:
        return self.recipe.data(self.cfg)

    @cached_property
    def columns(self) -> Batch:
        return {name: column.to(self.device) for name, column in self.data.train.items()}

    @cached_property
    def indices(self) -> list[list[Tensor]]:
        """Of every step and micro-batch the rows that this process reads."""
        order = Shuffled(len(next(iter(self.columns.values()))), self.cfg.seed)
        share = Share(order, self.cfg.batch_size, self.rank, self.world_size)
        _, rows = share.block(0, self.cfg.max_steps)
        on_device = torch.from_numpy(rows).to(self.device)
        parts = split(share.size, self.accumulation)
        return [[of_step[part] for part in parts] for of_step in on_device]

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return micro_batch_count(self.cfg.batch_size, self.world_size, self.cfg.micro_batch_size)

    @property
    def bf16(self) -> bool:
        return self.cfg.precision == "bf16"

    def read(self, rows: Tensor) -> Batch:
        return {name: column[rows] for name, column in self.columns.items()}

    def steps(self) -> Iterator[list[Batch]]:
        """Yield each step's micro-batches."""
        for of_step in self.indices:
            yield [self.read(rows) for rows in of_step]

    def module(self) -> nn.Module:
        """Build the recipe's model under the seed."""
        torch.manual_seed(self.cfg.seed)
        module = self.recipe.model(self.cfg, self.data).to(self.device).train()
        if self.compile_blocks:
            for block in blocks(module):
                block.compile()
        elif self.cfg.compile:
            module.compile()
        return module

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.recipe.loss(model, batch, self.cfg)


class Rows(Dataset[Batch]):
    """A job's micro-batches one after another, each gathered at once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rows = [rows for of_step in job.indices for rows in of_step]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Batch:
        return self.job.read(self.rows[i])

    def loader(self) -> DataLoader[Batch]:
        return DataLoader(self, batch_size=None)


class WithLoss(nn.Module):
    """A model that returns its loss, so that what wraps it does not convert its outputs."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.inner, self.job = job.module(), job

    def forward(self, batch: Batch) -> Tensor:
        return self.job.loss(self.inner, batch)


def raw(job: Job, *, item: bool = False) -> None:
    """The loop written by hand, with DistributedDataParallel where there are several processes.

    ``item`` reads the loss of each step, which waits for the device, as most loops written by hand do.
    """
    module = job.module()
    model = DistributedDataParallel(module) if job.world_size > 1 else module
    job.built(model)
    optimizer = job.recipe.optimizer(module, job.cfg)
    trained = [p for group in optimizer.param_groups for p in group["params"]]  # a norm's last bit is its order's
    last, most = job.accumulation - 1, job.cfg.max_grad_norm
    for step, micro_batches in enumerate(job.steps(), start=1):
        optimizer.zero_grad()
        for i, batch in enumerate(micro_batches):
            with model.no_sync() if i < last and model is not module else nullcontext():
                with torch.autocast(job.device.type, torch.bfloat16) if job.bf16 else nullcontext():
                    loss = job.loss(model, batch)
                (loss / len(micro_batches) if last else loss).backward()
        if most is not None:
            nn.utils.clip_grad_norm_(trained, most)
        optimizer.step()
        if item:
            loss.item()
        job.note(step)


def with_accelerate(job: Job, *, loss_inside: bool = False) -> None:
    """Accelerate's own loop; ``loss_inside`` gives it a model that returns its loss instead of its logits."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    module = WithLoss(job) if loss_inside else job.module()
    accelerator = Accelerator(
        cpu=job.device.type == "cpu",
        mixed_precision="bf16" if job.bf16 else "no",
        gradient_accumulation_steps=job.accumulation,
    )
    model, optimizer = accelerator.prepare(module, job.recipe.optimizer(module, job.cfg))
    job.built(model)
    for step, micro_batches in enumerate(job.steps(), start=1):
        for batch in micro_batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch) if loss_inside else job.loss(model, batch))
                if job.cfg.max_grad_norm is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), job.cfg.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        job.note(step)


def with_lightning(job: Job) -> None:
    """Lightning's Trainer, barebones."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = job.module()

        def on_fit_start(self) -> None:
            job.built(self.trainer.strategy.model)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return job.loss(self.net, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.recipe.optimizer(self.net, job.cfg)

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:  # its own refuses a fused optimizer in bf16
            if job.cfg.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.net.parameters(), job.cfg.max_grad_norm)

        def on_train_batch_end(self, *_: Any) -> None:
            if (done := self.trainer.global_step) != self.done:
                self.done = done
                job.note(done)

        done = 0

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=job.cfg.max_steps,
            accelerator="cpu" if job.device.type == "cpu" else "gpu",
            devices=job.world_size,
            strategy="ddp" if job.world_size > 1 else "auto",
            precision="bf16-mixed" if job.bf16 else "32-true",
            accumulate_grad_batches=job.accumulation,
            use_distributed_sampler=False,
            barebones=True,
        )
        trainer.fit(Module(), Rows(job).loader())


def with_hf_trainer(job: Job) -> None:
    """HF's Trainer without logging, saving, progress bar and filter of NaN."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Noting(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            job.built(trainer.model_wrapped)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            job.note(state.global_step)

    class Given(Trainer):
        def get_train_dataloader(self) -> DataLoader[Batch]:
            return self.train_dataset.loader()

        def compute_loss(self, model: nn.Module, inputs: Batch, **_: Any) -> Tensor:
            return job.loss(model, inputs)

    module = job.module()
    optimizer = job.recipe.optimizer(module, job.cfg)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=job.cfg.max_steps,
            per_device_train_batch_size=-(-job.cfg.batch_size // job.world_size // job.accumulation),
            gradient_accumulation_steps=job.accumulation,
            max_grad_norm=job.cfg.max_grad_norm or 0,
            bf16=job.bf16,
            use_cpu=job.device.type == "cpu",
            ddp_backend="gloo" if job.world_size > 1 else None,
            ddp_find_unused_parameters=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = Given(module, arguments, None, Rows(job), optimizers=(optimizer, constant), callbacks=[Noting()])
        trainer.train()


def with_scaletrain(job: Job) -> None:
    """``train(run)``, the loop of scaletrain itself, which also logs, guards against NaN, and saves at the end."""
    recipe = replace(job.recipe, hooks=lambda cfg: [lambda run, info: job.note(info.step)])
    with tempfile.TemporaryDirectory() as folder:
        run = start(recipe, replace(job.cfg, out=job.cfg.out or folder))
        job.built(run.model)
        train(run)
        run.finish()


RAW, AGAIN, OURS = "raw loop", "raw loop again", "scaletrain"
ACCELERATE, LIGHTNING, HF = "Accelerate", "Lightning (barebones)", "HF Trainer (stripped)"
LOOPS: dict[str, Callable[[Job], None]] = {
    RAW: raw,
    AGAIN: raw,
    OURS: with_scaletrain,
    ACCELERATE: with_accelerate,
    LIGHTNING: with_lightning,
    HF: with_hf_trainer,
}
NEEDS = {LIGHTNING: "lightning", HF: "transformers"}


def loops_here() -> dict[str, Callable[[Job], None]]:
    """Return the loops whose library is installed."""
    return {name: loop for name, loop in LOOPS.items() if name not in NEEDS or find_spec(NEEDS[name])}
