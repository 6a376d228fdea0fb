"""How a run gets back what a checkpoint holds. The content may be a stranger's: nothing is taken on trust."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor

from scaletrain.agreement import Wish
from scaletrain.checkpoint.export import named_tensors
from scaletrain.checkpoint.format import STATE
from scaletrain.checkpoint.load import load, load_new
from scaletrain.checkpoint.verify import Checkpoint
from scaletrain.errors import CheckpointError
from scaletrain.folder import short
from scaletrain.optimizer_state import restore_state
from scaletrain.run.capture import TENSOR, number, stateful_hooks
from scaletrain.run.info import StepInfo
from scaletrain.state import State
from scaletrain.streams import checked_state

if TYPE_CHECKING:
    from scaletrain.run.run import Run

PARTS = ("model", "ema", "optimizer", "hooks")
"""What the names of a checkpoint's files of tensors begin with."""
FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ANOTHER_MODEL = ("names", "shape", "dtype", "optimizer", "hooks")
"""Rules that a whole checkpoint violates when the recipe has changed."""


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Bring ``run`` to where the checkpoint was taken. Raises CheckpointError where it is another run's."""
    try:
        with _as_written(checkpoint):
            _restore(run, checkpoint, checkpoint.state)
    except CheckpointError as error:
        if error.rule not in ANOTHER_MODEL:
            raise
        raise CheckpointError(error.rule, f"{error}; {start_anew(checkpoint)}") from error.__cause__


def start_anew(checkpoint: Checkpoint) -> str:
    """Say how to use no more of a checkpoint than its weights."""
    path = short(checkpoint.path)
    return (
        f"for a new run from its weights: --resume never, another --out, and load_weights(model, '{path}') in the "
        "recipe's model"
    )


def state_of(checkpoint: Checkpoint) -> State:
    """Return the counters of a checkpoint. Raises CheckpointError unless they are there and possible."""
    with _as_written(checkpoint):
        return read_state(checkpoint.state["state"], checkpoint.step)


def asked_to_stop(checkpoint: Checkpoint) -> str:
    """Return why some process had asked for the end of training when the checkpoint was taken; "" if none had."""
    with _as_written(checkpoint):
        asked = [checkpoint.state["stopping"], *(rank["asked"] for rank in checkpoint.state["ranks"])]
        return next(filter(None, map(_text, asked)), "")


@contextmanager
def _as_written(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what goes wrong with a content that no run has written into a CheckpointError that names the file."""
    where = f"{checkpoint.path / STATE}"
    try:
        yield
    except CheckpointError as error:
        if str(error).startswith(f"{checkpoint.path}"):
            raise
        raise CheckpointError(error.rule, f"{where}: {str(error)[:400]}") from error.__cause__
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        why = f"{type(error).__name__}: {ascii(str(error))[:200]}"
        raise CheckpointError("state", f"{where}: state: not as scaletrain writes it: {why}") from None


def _restore(run: Run, checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
    unknown = {file.rpartition("-")[0] for file in checkpoint.pieces} - {*PARTS}
    if unknown:
        raise CheckpointError("names", f"names: it has files of {sorted(unknown)}, this run knows {[*PARTS]}")
    run.state = state_of(checkpoint)
    ranks = facts["ranks"]
    if len(ranks) != checkpoint.manifest.world_size:
        raise ValueError(f"{len(ranks)} ranks in state.json, {checkpoint.manifest.world_size} in the manifest")
    _check_optimizer(facts["optimizer"], run.built)
    restore_state(run.module, run.optimizer, facts["optimizer"], lambda tensors: load(checkpoint, "optimizer", tensors))
    load(checkpoint, "model", named_tensors(run.module))
    if run.ema is not None and checkpoint.part("ema"):
        load(checkpoint, "ema", run.ema.tensors)
    elif run.ema is not None:  # it was off
        run.ema.restart()
    if run.gradients.scaler is not None and facts["scaler"] is not None:  # after the optimizer (accelerate #4289)
        own = run.gradients.scaler.state_dict()
        if facts["scaler"].keys() != own.keys() or not all(_is_like(facts["scaler"][name], own[name]) for name in own):
            raise ValueError(f"the scaler is {facts['scaler']!a}")
        run.gradients.scaler.load_state_dict(facts["scaler"])
    _restore_hooks(stateful_hooks(run), facts["hooks"], load_new(checkpoint, "hooks"), run.devices.device)
    run.metrics = {name: figure(value) for name, value in facts["metrics"].items()}
    run.gradients.skipped.fill_(_count(facts["skipped"], "skipped", most=checkpoint.step))
    same = len(ranks) == run.devices.world_size
    mine: dict[str, Any]
    mine = ranks[run.devices.rank] if same else _merged(ranks) if run.devices.is_first else {"loss": 0.0, "asked": ""}
    run.losses.fill_(as_float(mine["loss"]))
    run.requests.stop = _text(facts["stopping"]) or _text(mine["asked"])
    if facts["stopping"]:
        run.requests.wishes.hold(Wish(stop=1))
    for rank in ranks:  # every process knows them all, so that how many there are does not matter
        run.loader.bad |= {int(example): _text(reason) for example, reason in rank.get("bad", {}).items()}
    if run.loader.state is not None:
        run.loader.state = checked_state(mine["stream"])
    if facts["unfinished"] is not None:
        run.handed_out = _unfinished(run, facts, ranks, mine if same else None)
    _text(facts["tracker"])  # the caller takes these two
    _, _ = (_count(lines, "lines") for lines in facts["lines"])


def _check_optimizer(saved: dict[str, Any], built: list[dict[str, Any]]) -> None:
    """Raise ValueError unless the values that are no tensors are like those of the optimizer as it was built."""
    for name, values in saved["state"].items():
        for key, value in values.items():
            if value != "tensor" and not (value is None or isinstance(value, bool | int | float)):
                raise ValueError(f"the optimizer's {name}.{key} is {value!a}")
    for adapted, own in zip(saved["adapted"], built, strict=True):
        for key, value in adapted.items():
            if key not in own or not _is_like(value, own[key]):
                raise ValueError(f"the optimizer's {key} is {value!a}")


def _restore_hooks(
    hooks: dict[str, Any], states: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> None:
    if hooks.keys() != states.keys():
        raise CheckpointError("hooks", f"hooks: it has the state of {sorted(states)}, this run has {sorted(hooks)}")
    complete = {name: _put_together(states[name], tensors, device) for name in hooks}
    if tensors:
        raise CheckpointError("names", f"names: no hook has the tensor {next(iter(tensors))!a}")
    for name, hook in hooks.items():
        _fill(hook, name, complete[name])


def _fill(hook: Any, name: str, state: Any) -> None:
    try:
        hook.load_state_dict(state)
    except Exception as error:  # whatever a hook raises where the state is not its own
        why = f"{type(error).__name__}: {ascii(str(error))[:200]}"
        raise CheckpointError("hooks", f"hooks: {name} does not take the state it has there: {why}") from error


def _unfinished(run: Run, facts: dict[str, Any], ranks: list[dict[str, Any]], mine: dict[str, Any] | None) -> StepInfo:
    device, state = run.devices.device, run.state
    loss = as_float(mine["step"][0]) if mine else sum(as_float(r["step"][0]) for r in ranks) / run.devices.world_size
    norm, finite = ranks[0]["step"][1:]
    dtypes = [FLOATS[name] for name in facts["unfinished"]["dtypes"]]
    return StepInfo(
        step=state.step,
        epoch=as_float(facts["unfinished"]["epoch"]),
        samples_seen=state.samples_seen,
        lr=as_float(facts["unfinished"]["lr"]),
        loss=torch.tensor(loss, dtype=dtypes[0], device=device),
        grad_norm=None if norm is None else torch.tensor(as_float(norm), dtype=dtypes[1], device=device),
        finite=torch.tensor(_flag(finite), device=device),
    )


def read_state(content: dict[str, Any], step: int) -> State:
    """Return the counters of ``content``; raise ValueError unless each is there, of its kind and possible."""
    hints = get_type_hints(State)
    if content.keys() != hints.keys():
        raise ValueError(f"counters {sorted(content.keys() ^ hints.keys())} are missing or unknown")
    values: dict[str, Any] = {}
    for name, kind in hints.items():
        value = content[name]
        if kind is int:
            values[name] = _count(value, name, least=-1)
        elif kind is str:
            values[name] = _text(value)
        elif kind == dict[str, float]:
            values[name] = {metric: figure(one) for metric, one in value.items()}
        else:
            values[name] = None if value is None else as_float(value)
    state = State(**values)
    if state.step != step:
        raise ValueError(f"step {state.step}, the manifest says step {step}")
    _count(state.samples_seen, "samples_seen", least=step)
    _count(state.skipped, "skipped", most=step)
    _count(state.train_loss_from, "train_loss_from", most=step)
    _count(state.validations_without_progress, "validations_without_progress")
    for reached in ("validated_step", "best_step", "tested_step"):
        _count(values[reached], reached, least=-1, most=step)
    if not 0 <= state.lr_factor <= 1:
        raise ValueError(f"lr_factor is {state.lr_factor!a}")
    if (state.best is None) != (state.best_step == -1) or not isfinite(state.best or 0):
        raise ValueError(f"best {state.best} at step {state.best_step}")
    return state


def _merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 takes over where the number of processes has changed."""
    asked = [rank["asked"] for rank in ranks if _text(rank["asked"])]
    return {"loss": number(sum(as_float(rank["loss"]) for rank in ranks)), "asked": asked[0] if asked else ""}


def _put_together(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """Undo ``taken_apart``; each tensor is taken out of ``tensors`` once, those not of the CPU go to ``device``."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR, "on"}:
            tensor = tensors.pop(value[TENSOR])
            return tensor.to(device) if _text(value["on"]) != "cpu" else tensor
        return {key: _put_together(item, tensors, device) for key, item in value.items()}
    return [_put_together(item, tensors, device) for item in value] if isinstance(value, list) else value


def figure(value: Any) -> float:
    """Return a metric, a count as the integer that it was."""
    return value if type(value) is int else as_float(value)


def as_float(value: Any) -> float:
    """Return what ``number`` wrote."""
    if isinstance(value, bool) or not (isinstance(value, int | float) or value in ("nan", "inf", "-inf")):
        raise ValueError(f"{value!a} is no number")
    return float(value)


def _count(value: Any, what: str, *, least: int = 0, most: int = 2**62) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{what} is {value!a}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!a} is no text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!a} is neither true nor false")
    return value


def _is_like(value: Any, own: Any) -> bool:
    """Whether ``value``, from JSON, is of the kind that ``own`` is; None may have become a number or text."""
    if own is None:
        return not isinstance(value, list | dict)
    if isinstance(own, list | tuple):
        return isinstance(value, list) and len(value) == len(own) and all(map(_is_like, value, own))
    if isinstance(own, bool) or not isinstance(own, int | float):
        return type(value) is type(own)
    return isinstance(value, int | float) and not isinstance(value, bool)
