"""What of a run a checkpoint holds, and how a run gets it back."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor

from scaletrain.agreement import Wish, gather_texts
from scaletrain.checkpoint.export import named_tensors
from scaletrain.checkpoint.load import load, whole_shapes
from scaletrain.checkpoint.verify import Checkpoint
from scaletrain.errors import CheckpointError
from scaletrain.folder import describe_environment, strict
from scaletrain.optimizers import restore_state, saved_state
from scaletrain.run.info import StepInfo
from scaletrain.state import State

if TYPE_CHECKING:
    from scaletrain.run.run import Run

TENSOR = "__tensor__"
"""Marks in a hook's JSON where a tensor was taken out."""


def captured(run: Run, unfinished: StepInfo | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors by part and the content of state.json. Every rank must reach this line.

    ``unfinished`` is a step whose rest (logging, validation, hooks) is still to be done: the run that goes on
    from here begins with that.
    """
    granted = run.wishes.drain().stop
    own: dict[str, Any] = {"loss": number(run.losses), "asked": run.asked}
    if unfinished is not None:
        norm = unfinished.grad_norm
        own["step"] = [number(unfinished.loss), None if norm is None else number(norm), bool(unfinished.finite)]
    ranks = [json.loads(text) for text in gather_texts(json.dumps(own), run.devices.control)]
    run.devices.broadcast_buffers(run.module)
    optimizer, kept = saved_state(run.module, run.optimizer, run.built)
    hooks: dict[str, Tensor] = {}
    facts = {
        "state": numbers(run.state.to_dict()),
        "metrics": numbers(run.metrics),
        "ranks": ranks,
        "skipped": int(run.skipped),
        "stopping": ranks[granted - 1]["asked"] if granted else "",
        "unfinished": None if unfinished is None else {"epoch": unfinished.epoch, "lr": unfinished.lr},
        "lines": list(run.tracking.lines if unfinished is None else run.lines),
        "tracker": run.tracking.tracker_run,
        "optimizer": kept,
        "scaler": None if run.scaler is None else run.scaler.state_dict(),
        "hooks": {name: _taken_apart(hook.state_dict(), name, hooks) for name, hook in stateful_hooks(run).items()},
        "identity": run.identity,
        "config": strict(asdict(run.cfg)),
        "total_steps": run.total_steps,
        "environment": describe_environment(run.devices.world_size, str(run.devices.device)),
    }
    return {"model": named_tensors(run.module), "optimizer": optimizer, "hooks": hooks}, facts


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Bring ``run`` to where the checkpoint was taken. Raises CheckpointError where it is another run's."""
    facts = checkpoint.state
    try:
        _restore(run, checkpoint, facts)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        why = f"{type(error).__name__}: {ascii(str(error))[:200]}"
        raise CheckpointError(
            "state", f"{checkpoint.path}/state.json: state: not as scaletrain writes it: {why}"
        ) from None


def _restore(run: Run, checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
    run.state = read_state(facts["state"], checkpoint.step)
    ranks = facts["ranks"]
    if len(ranks) != checkpoint.manifest.world_size:
        raise ValueError(f"{len(ranks)} ranks in state.json, {checkpoint.manifest.world_size} in the manifest")
    restore_state(run.module, run.optimizer, facts["optimizer"], lambda tensors: load(checkpoint, "optimizer", tensors))
    load(checkpoint, "model", named_tensors(run.module))
    if run.scaler is not None and facts["scaler"] is not None:  # after the optimizer (accelerate #4289)
        run.scaler.load_state_dict(facts["scaler"])
    hooks = stateful_hooks(run)
    if hooks.keys() != facts["hooks"].keys():
        raise CheckpointError(
            "hooks", f"hooks: it has the state of {sorted(facts['hooks'])}, this run has {sorted(hooks)}"
        )
    tensors = {
        name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in whole_shapes(checkpoint, "hooks").items()
    }
    load(checkpoint, "hooks", tensors)
    for name, hook in hooks.items():
        hook.load_state_dict(_put_together(facts["hooks"][name], tensors))
    run.metrics = {str(name): as_float(value) for name, value in facts["metrics"].items()}
    run.skipped.fill_(int(facts["skipped"]))
    same = len(ranks) == run.devices.world_size
    mine = ranks[run.devices.rank] if same else _merged(ranks) if run.devices.is_first else {"loss": 0.0, "asked": ""}
    run.losses.fill_(as_float(mine["loss"]))
    run.asked = facts["stopping"] or str(mine["asked"])
    if facts["stopping"]:
        run.wishes.hold(Wish(stop=1))
    if facts["unfinished"] is not None:
        run.handed_out = _unfinished(run, facts, ranks, mine if same else None)


def _unfinished(run: Run, facts: dict[str, Any], ranks: list[dict[str, Any]], mine: dict[str, Any] | None) -> StepInfo:
    device, state = run.devices.device, run.state
    loss = as_float(mine["step"][0]) if mine else sum(as_float(r["step"][0]) for r in ranks) / run.devices.world_size
    norm, finite = ranks[0]["step"][1:]
    return StepInfo(
        step=state.step,
        epoch=as_float(facts["unfinished"]["epoch"]),
        samples_seen=state.samples_seen,
        lr=as_float(facts["unfinished"]["lr"]),
        loss=torch.tensor(loss, device=device),
        grad_norm=None if norm is None else torch.tensor(as_float(norm), device=device),
        finite=torch.tensor(bool(finite), device=device),
    )


def read_state(content: dict[str, Any], step: int) -> State:
    """Return the counters of ``content``; raise unless each is there and of its kind."""
    hints = get_type_hints(State)
    if content.keys() != hints.keys():
        raise ValueError(f"counters {sorted(content.keys() ^ hints.keys())} are missing or unknown")
    values: dict[str, Any] = {}
    for field in fields(State):
        value = content[field.name]
        if hints[field.name] is int:
            if not isinstance(value, int) or isinstance(value, bool) or value < -1:
                raise ValueError(f"{field.name} is {value!a}")
            values[field.name] = value
        elif hints[field.name] is str:
            values[field.name] = str(value)
        elif isinstance(value, dict):
            values[field.name] = {str(name): as_float(one) for name, one in value.items()}
        else:
            values[field.name] = None if value is None else as_float(value)
    if values["step"] != step or values["samples_seen"] < 0 or values["skipped"] < 0:
        raise ValueError(f"step {values['step']}, samples_seen {values['samples_seen']}, the manifest says step {step}")
    return State(**values)


def stateful_hooks(run: Run) -> dict[str, Any]:
    """Return the hooks that have a state, by the name of their class; a second of the same name gets a number."""
    found: dict[str, Any] = {}
    for hook in run.hooks:
        if hasattr(hook, "state_dict") and hasattr(hook, "load_state_dict"):
            name = type(hook).__name__
            found[name if name not in found else f"{name}#{len(found)}"] = hook
    return found


def number(value: Tensor | float) -> float | str:
    """Return a float as JSON can say it: NaN and infinities as text. Waits for the device of a tensor."""
    value = float(value)
    return value if value - value == 0 else str(value)


def as_float(value: Any) -> float:
    """Return what ``number`` wrote."""
    if isinstance(value, bool) or not (isinstance(value, int | float) or value in ("nan", "inf", "-inf")):
        raise ValueError(f"{value!a} is no number")
    return float(value)


def numbers(values: Any) -> Any:
    """Replace every float in ``values`` by what JSON can say."""
    if isinstance(values, dict):
        return {key: numbers(value) for key, value in values.items()}
    return number(values) if isinstance(values, float) else values


def _merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 takes over where the number of processes has changed."""
    asked = [rank["asked"] for rank in ranks if rank["asked"]]
    return {"loss": number(sum(as_float(rank["loss"]) for rank in ranks)), "asked": asked[0] if asked else ""}


def _taken_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON, its tensors moved to ``tensors``. Raises CheckpointError naming what is neither."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if isinstance(value, dict) and TENSOR not in value and all(isinstance(key, str) for key in value):
        return {key: _taken_apart(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_taken_apart(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    small = not isinstance(value, int) or -(2**63) <= value < 2**63
    finite = not isinstance(value, float) or value - value == 0
    if (value is None or type(value) in (bool, int, float, str)) and small and finite:
        return value
    shown = value if isinstance(value, int | float) else f"a {type(value).__name__}"
    raise CheckpointError(
        "state", f"the state of hook {path} is {shown}; only tensors, finite numbers, texts, lists and dicts are saved"
    )


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _put_together(item, tensors) for key, item in value.items()}
    return [_put_together(item, tensors) for item in value] if isinstance(value, list) else value
