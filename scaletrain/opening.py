"""Open the run's folder: at its beginning or where its checkpoint left off; and introduce the run."""

import contextlib
from dataclasses import asdict
from typing import TypeGuard

from scaletrain.agreement import Wishes, gather_texts, together
from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.format import FOLDER
from scaletrain.checkpoint.retain import Keep, clear_leftovers
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.verify import Checkpoint
from scaletrain.errors import (
    CHECKPOINT,
    DONE,
    INPUT,
    PREEMPTED,
    CheckpointError,
    Finished,
    InputError,
    Preempted,
)
from scaletrain.folder import (
    ENVIRONMENT,
    describe_environment,
    exit_code,
    keep_source,
    left_before_restart,
    record_exit,
    short,
    write_json,
)
from scaletrain.optimizers import describe
from scaletrain.readers import ColumnReader
from scaletrain.run import Run
from scaletrain.run.restore import asked_to_stop, restore, state_of
from scaletrain.run.resume import changes, check_same, find, other_rounding
from scaletrain.state import State
from scaletrain.tracking import Tracking

MODEL_LINES = 20
"""A model that prints in at most so many lines is shown whole at the start."""


def open_folder(run: Run, name: str, source: str | None) -> None:
    """Begin or go on in the run's folder, record what runs, and introduce it. Every rank must reach this line."""
    devices = run.devices
    if all(gather_texts("left" if left_before_restart(run.folder) else "", devices.control)):
        raise Preempted(PREEMPTED)  # a later job goes on
    before = (run.folder / ENVIRONMENT).exists()
    try:
        checkpoint, skipped = _go_on(run)
        together(lambda: write_beginning(run, source, checkpoint) if devices.is_first else None, devices.control)
    except (InputError, CheckpointError) as error:  # what the last job said is no longer how things stand
        with contextlib.suppress(OSError):
            if devices.is_first:
                record_exit(run.folder, INPUT if isinstance(error, InputError) else CHECKPOINT, str(error))
        raise
    if devices.is_first:
        for why in skipped:
            run.tracking.warn(f"skipped a checkpoint: {why}")
        if before and checkpoint is None:
            run.tracking.warn(f"{short(run.folder)} held a run that was never saved; it starts over")
        _introduce(run, name, checkpoint)


def is_own(checkpoint: Checkpoint | None, run: Run) -> TypeGuard[Checkpoint]:
    """Whether the checkpoint that the run goes on from is one of its own folder."""
    return checkpoint is not None and checkpoint.path.is_relative_to(run.folder)


def _go_on(run: Run) -> tuple[Checkpoint | None, list[str]]:
    """Bring the run to where a checkpoint left off, if there is one; return it, and what was skipped to find it."""
    devices, cfg = run.devices, run.cfg
    done = gather_texts("done" if exit_code(run.folder) == DONE else "", devices.control)[0]
    checkpoint, skipped = find(run.folder, cfg.resume, devices.control, devices.is_first)
    if checkpoint is not None:
        check_same(checkpoint, run.identity)
        state = state_of(checkpoint)
        state.stop_reason = state.stop_reason or asked_to_stop(checkpoint)
        if done and is_own(checkpoint, run) and (state.stop_reason or state.step >= run.total_steps):
            raise Finished(run.folder, how_to_go_on(run, state))
        restore(run, checkpoint)
        if not is_own(checkpoint, run):
            branch_off(run)
    elif done:
        raise InputError(f"{short(run.folder)} holds a run that is done, without checkpoints; choose another --out")
    keep = Keep(cfg.keep_last, cfg.keep_every)
    run.saver = Saver(run.folder / FOLDER, copying=devices.control, writing=devices.checkpoint, keep=keep)
    if is_own(checkpoint, run):
        run.saver.resumed(checkpoint)
    return checkpoint, skipped


def _introduce(run: Run, name: str, checkpoint: Checkpoint | None) -> None:
    """Say what runs and what it goes on from, and connect the tracker; rank 0 does."""
    for line in introduction(run, name):
        run.tracking.say(line)
    for warning in [*doubts(run), *run.notes]:
        run.tracking.warn(warning)
    if checkpoint is not None:
        for line in continuation(run, checkpoint):
            run.tracking.say(line)
    known = str(checkpoint.state["tracker"]) if is_own(checkpoint, run) else ""
    run.tracking.start_tracker(run.cfg.track, name, asdict(run.cfg), known)


def branch_off(run: Run) -> None:
    """Let a run that goes on from another's checkpoint find a best of its own, and stop for reasons of its own."""
    state = run.state
    state.best, state.best_step, state.best_metrics = None, -1, {}
    state.validations_without_progress, state.stop_reason, run.requests.stop = 0, "", ""
    run.requests.wishes = Wishes(run.devices.control)


def how_to_go_on(run: Run, state: State) -> str:
    """Say that nothing is left to do, and what would give the run more."""
    if state.stop_reason:
        return (
            f"{short(run.folder)} is done: {state.stop_reason}; for a new run from there: "
            f"--resume {short(run.folder)} --out ANOTHER"
        )
    return (
        f"{short(run.folder)} is done: {state.step} steps of {run.total_steps}; to go on, give more --epochs or a "
        "higher --max-steps; for a new run, another --out"
    )


def continuation(run: Run, checkpoint: Checkpoint) -> list[str]:
    """Say where the run goes on, and with what other options than before."""
    epochs = run.state.samples_seen / run.examples
    where = f"going on after step {run.state.step} (epoch {epochs:.4g}) from {short(checkpoint.path)}"
    lines = [where]
    if different := changes(run, checkpoint):
        lines.append(f"changed since: {', '.join(different)}")
    if rounding := other_rounding(run, checkpoint):
        lines.append(f"the same examples and curve, but not the same last bits: {', '.join(rounding)}")
    return lines


def write_beginning(run: Run, source: str | None, checkpoint: Checkpoint | None) -> None:
    """Record what runs, and open the files of the run folder, cut back to the checkpoint it goes on from."""
    (run.folder / "exit.json").unlink(missing_ok=True)
    (run.folder / "result.json").unlink(missing_ok=True)
    # first the file by which a folder is known as a run's
    write_json(run.folder / ENVIRONMENT, describe_environment(run.devices))
    write_json(run.folder / "config.json", asdict(run.cfg))
    keep_source(run.folder, source)
    if (run.folder / FOLDER).is_dir():
        clear_leftovers(Files(), run.folder / FOLDER)
    keep = tuple(int(n) for n in checkpoint.state["lines"]) if is_own(checkpoint, run) else (0, 0)
    run.tracking = Tracking(
        run.folder, total_steps=run.total_steps, by_epoch=run.cfg.validate_every is None, keep=(keep[0], keep[1])
    )


def doubts(run: Run) -> list[str]:
    """Name the settings that have no effect here, or hardly the wanted one."""
    cfg = run.cfg
    found = []
    if cfg.batch_size > run.examples:
        found.append(f"batch_size {cfg.batch_size} exceeds the {run.examples} training examples: steps repeat some")
    if cfg.workers and isinstance(getattr(run.loader, "reader", None), ColumnReader):
        found.append(f"workers {cfg.workers} has no effect: columns in memory are read in the training process")
    if "val" not in run.held_out and cfg.validate_every is not None:
        found.append(f"validate_every {cfg.validate_every} has no effect: the recipe's data has no val")
    return found


def introduction(run: Run, name: str) -> list[str]:
    """Say what is trained, on what, and for how long."""
    cfg, devices, module = run.cfg, run.devices, run.module
    parameters = sum(p.numel() for p in module.parameters())
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    model = str(module)
    shown = (model if model.count("\n") < MODEL_LINES else type(module).__name__).removeprefix("FSDP")
    share = -(-cfg.batch_size // devices.world_size)
    count = run.loader.micro_batches
    processes = "1 process" if devices.world_size == 1 else f"{devices.world_size} processes"
    hosts = {text.partition(" ")[2] for text in devices.processes}
    processes += f" of {len(hosts)} machines" if len(hosts) > 1 else ""
    processes += ", the model divided over them (FSDP2)," if devices.sharded else ""
    threads = f"{devices.threads} thread{'s' * (devices.threads > 1)} each"
    exact = "" if cfg.batch_size % (devices.world_size * count) == 0 else "at most "
    held_out = "".join(f", {split} {part.reader.n:,}" for split, part in run.held_out.items())
    return [
        f"{name}: {shown}",
        f"{parameters:,} parameters" + (f", {frozen:,} of them frozen" if frozen else ""),
        describe(run.optimizer),
        f"{processes} on {devices.device.type}, {devices.precision}, {threads}, global batch {cfg.batch_size} = "
        f"{devices.world_size} x {exact}{-(-share // count)} x {count} (processes x micro-batch x count)",
        f"train {run.examples:,} examples{held_out}; {run.total_steps:,} steps",
        f"run folder {short(run.folder)}",
    ]
