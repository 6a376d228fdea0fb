"""The same small training written with each of four libraries, saving and resuming as its documentation says.

A network with dropout, AdamW, a schedule, shuffled examples whose number the batch size does not divide. Every step
leaves a line: its loss and weights to the last bit, and the examples it read. ``benchmarks.kill_and_resume`` runs them.
"""

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from scaletrain import Config, Data, Recipe, Run, StepInfo, cosine, main, train
from scaletrain.checkpoint.commit import Commit

EXAMPLES, BATCH_SIZE, FEATURES, CLASSES, LR = 100, 16, 8, 3, 1e-2
SEED = 0


@dataclass(frozen=True)
class Job:
    """What a process is to do."""

    folder: Path
    name: str
    """Of the file of its record."""
    resume: bool = False
    steps: int = 30
    save_every: int = 5
    hidden: int = 32
    pause_seconds: float = 0.01
    """Time that each step takes besides, as a larger model's would."""
    kill_after: int = 0
    """Step after which it sends itself SIGKILL."""
    stop_after: int = 0
    """Step after which it saves and ends in an orderly way."""
    tell: Connection | None = None
    """Told ``(step, "begun")`` and ``(step, "done")`` of every save."""
    rank: int = 0
    world_size: int = 1

    @property
    def share(self) -> int:
        """Examples of a batch that one process reads."""
        return BATCH_SIZE // self.world_size

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name}-{self.rank}.jsonl"

    def saving(self, step: int, word: str) -> None:
        if self.tell is not None:
            self.tell.send((step, word))


class Net(nn.Module):
    """An MLP with dropout that returns its loss, and remembers what it read last."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.pause_seconds = job.pause_seconds
        wide = job.hidden
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, wide), nn.ReLU(), nn.Dropout(0.2), nn.Linear(wide, wide), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(wide, CLASSES),
        )  # fmt: skip
        self.seen: tuple[float, list[int]] = (0.0, [])

    def forward(self, x: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        loss = F.cross_entropy(logits, labels)
        if self.training:
            self.seen = (loss.item(), index.tolist())
            time.sleep(self.pause_seconds)
        return {"loss": loss, "logits": logits}


class Examples(Dataset[dict[str, Tensor]]):
    """Examples that know their number."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.columns = {
            "x": torch.randn(EXAMPLES, FEATURES, generator=generator),
            "labels": torch.randint(0, CLASSES, (EXAMPLES,), generator=generator),
            "index": torch.arange(EXAMPLES),
        }

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[i] for name, column in self.columns.items()}


class Record:
    """Writes a line for every step, at once: a SIGKILL must not lose it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.file = os.open(job.record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def loaded(self, step: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Note what a resumed process begins with."""
        self._write({"loaded": step, "state": digest(net, optimizer)})

    def step(self, step: int, net: Net, optimizer: torch.optim.Optimizer) -> None:
        """Note a step that is complete, and die if it is the one to die after."""
        loss, examples = net.seen
        line = {"step": step, "loss": loss.hex(), "examples": examples, "state": digest(net, optimizer)}
        self._write(line)
        if step == self.job.steps:
            torch.save(net.state_dict(), self.job.record.with_suffix(".pt"))
        if step == self.job.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self.file, json.dumps(line).encode() + b"\n")


def digest(net: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Hash the weights and the optimizer's state of each."""
    found = hashlib.sha256()
    for parameter in net.parameters():
        state = optimizer.state.get(parameter, {})
        for tensor in (parameter, *(state[key] for key in sorted(state))):
            found.update(torch.as_tensor(tensor).detach().numpy().tobytes())
    return found.hexdigest()[:16]


def newest(folder: Path, pattern: str, mark: str) -> tuple[Path | None, int]:
    """Return the path like ``pattern`` with the largest number after ``mark``, and that number."""
    found = [(int(path.stem.rpartition(mark)[2]), path) for path in folder.glob(pattern)]
    return max(found)[::-1] if found else (None, 0)


def schedule_factor(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def with_accelerate(job: Job, *, skip: bool, seedable: bool) -> None:
    """Accelerate's example ``checkpointing.py``: save_state in folders named by step, load_state the newest.

    ``skip`` goes on inside the epoch with skip_first_batches; without, the loader begins the epoch again.
    """
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, set_seed

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable))
    set_seed(SEED)
    net, record = Net(job), Record(job)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule_factor, steps=job.steps))
    loader = DataLoader(Examples(), batch_size=job.share, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(net, optimizer, loader, schedule)

    path, done = newest(job.folder, "step_*", "_") if job.resume else (None, 0)
    if path is not None:
        accelerator.load_state(str(path))
        record.loaded(done, net, optimizer.optimizer)
    epoch, batches = divmod(done, len(loader))
    active = accelerator.skip_first_batches(loader, batches) if skip and batches else loader
    while True:
        model.train()
        if seedable:
            active.set_epoch(epoch)
        for batch in active:
            optimizer.zero_grad()
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            schedule.step()
            done += 1
            if done % job.save_every == 0 or done == job.stop_after:
                job.saving(done, "begun")
                accelerator.save_state(str(job.folder / f"step_{done}"))
                job.saving(done, "done")
            record.step(done, net, optimizer.optimizer)
            if done in (job.steps, job.stop_after):
                return
        active, epoch = loader, epoch + 1


def with_lightning(job: Job) -> None:
    """Lightning's Trainer with a ModelCheckpoint every so many steps; ``fit(ckpt_path=...)`` goes on."""
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(job)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = torch.optim.AdamW(self.net.parameters(), lr=LR)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule_factor, steps=job.steps))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Recording(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
            if trainer.global_step:
                record.loaded(trainer.global_step, module.net, trainer.optimizers[0])

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            record.step(trainer.global_step, module.net, trainer.optimizers[0])
            if trainer.global_step == job.stop_after:
                trainer.save_checkpoint(job.folder / f"stop-step={job.stop_after}.ckpt")
                trainer.should_stop = True

    class Telling(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            job.saving(checkpoint["global_step"], "begun")
            super().save_checkpoint(checkpoint, *args, **kwargs)
            job.saving(checkpoint["global_step"], "done")

    pl.seed_everything(SEED, verbose=False)
    record = Record(job)
    trainer = pl.Trainer(
        max_steps=job.steps,
        accelerator="cpu",
        devices=job.world_size,
        strategy="ddp" if job.world_size > 1 else "auto",
        default_root_dir=job.folder,
        callbacks=[Recording(), pl.callbacks.ModelCheckpoint(dirpath=job.folder, every_n_train_steps=job.save_every)],
        plugins=[Telling()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    path = newest(job.folder, "*.ckpt", "=")[0] if job.resume else None
    trainer.fit(Module(), DataLoader(Examples(), batch_size=job.share, shuffle=True), ckpt_path=path)


def with_hf_trainer(job: Job) -> None:
    """HF's Trainer with save_steps; ``train(resume_from_checkpoint=True)`` goes on from the newest."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Recording(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **have: Any) -> None:
            if state.global_step:
                record.loaded(state.global_step, net, have["optimizer"].optimizer)

        def on_step_end(self, args: Any, state: Any, control: Any, **have: Any) -> None:
            record.step(state.global_step, net, have["optimizer"].optimizer)
            if state.global_step == job.stop_after:
                control.should_save = control.should_training_stop = True

    class Telling(Trainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            job.saving(self.state.global_step, "begun")
            super()._save_checkpoint(*args, **kwargs)
            job.saving(self.state.global_step, "done")

    arguments = TrainingArguments(
        output_dir=str(job.folder),
        max_steps=job.steps,
        save_strategy="steps",
        save_steps=job.save_every,
        per_device_train_batch_size=job.share,
        learning_rate=LR,
        lr_scheduler_type="cosine",
        seed=SEED,
        use_cpu=True,
        ddp_backend="gloo" if job.world_size > 1 else None,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    torch.manual_seed(SEED)
    net, record = Net(job), Record(job)
    trainer = Telling(model=net, args=arguments, train_dataset=Examples(), callbacks=[Recording()])
    trainer.train(resume_from_checkpoint=True if job.resume and any(job.folder.glob("checkpoint-*")) else None)


@dataclass(frozen=True, kw_only=True)
class SameConfig(Config):
    batch_size: int = BATCH_SIZE
    lr: float = LR
    threads: int | None = 1


def with_scaletrain(job: Job) -> None:
    """The same command again with the same ``--out``; SIGTERM is the orderly end."""
    record, columns = Record(job), Examples().columns

    def note(run: Run, info: StepInfo) -> None:
        record.step(info.step, run.module, run.optimizer)
        if info.step == job.stop_after and job.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def noting_what_it_begins_with(run: Run) -> None:
        if run.state.step:
            record.loaded(run.state.step, run.module, run.optimizer)
        train(run)

    commit = Commit.__call__

    def commit_and_tell(self: Commit, step: int, *args: Any) -> None:
        job.saving(step, "begun")
        commit(self, step, *args)
        job.saving(step, "done")

    Commit.__call__ = commit_and_tell
    recipe = Recipe(
        config=SameConfig,
        data=lambda cfg: Data(columns),
        model=lambda cfg, data: Net(job),
        loss=lambda model, batch, cfg: model(batch["x"], batch["labels"], batch["index"])["loss"],
        schedule=cosine,
        hooks=lambda cfg: [note],
    )
    options = ["--out", str(job.folder / "run"), "--max-steps", str(job.steps)]
    main(recipe, [*options, "--checkpoint-every", str(job.save_every)], loop=noting_what_it_begins_with)


SCALETRAIN = "scaletrain"
PROGRAMS: dict[str, Callable[[Job], None]] = {
    "Accelerate, load_state alone": partial(with_accelerate, skip=False, seedable=False),
    "Accelerate, skip_first_batches": partial(with_accelerate, skip=True, seedable=False),
    "Accelerate, skip_first_batches, seedable sampler": partial(with_accelerate, skip=True, seedable=True),
    "Lightning": with_lightning,
    "HF Trainer": with_hf_trainer,
    SCALETRAIN: with_scaletrain,
}
NEEDS = {"Lightning": "lightning", "HF Trainer": "transformers"}
"""Packages of the extra ``bench`` that a program cannot do without."""
