"""What of a run a checkpoint holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from scaletrain.agreement import gather_texts, together
from scaletrain.checkpoint.export import named_tensors
from scaletrain.checkpoint.strict import dump
from scaletrain.errors import CheckpointError
from scaletrain.folder import describe_environment, strict
from scaletrain.optimizer_state import saved_state
from scaletrain.run.info import StepInfo

if TYPE_CHECKING:
    from scaletrain.run.run import Run

TENSOR = "__tensor__"
"""Marks in a hook's JSON where a tensor was taken out."""


def captured(run: Run, unfinished: StepInfo | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors by part and the content of state.json.

    ``unfinished`` is a step whose rest (logging, validation, hooks) is still to be done: the run that goes on
    from here begins with that. Raises CheckpointError, on all ranks, for a state that cannot be saved. Every rank
    must reach this line.
    """
    granted = run.requests.wishes.drain().stop
    own: dict[str, Any] = {"loss": number(run.losses), "asked": run.requests.stop}
    if run.loader.bad:
        own["bad"] = {str(example): reason for example, reason in run.loader.bad.items()}
    if run.loader.state is not None:
        own["stream"] = run.loader.state
    if unfinished is not None:
        norm = unfinished.grad_norm
        own["step"] = [number(unfinished.loss), None if norm is None else number(norm), bool(unfinished.finite)]
        dtypes = [str(value.dtype).removeprefix("torch.") for value in (unfinished.loss, norm) if value is not None]
    hooks: dict[str, Tensor] = {}

    def states() -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        try:
            dump(own)
        except (TypeError, ValueError) as error:
            raise CheckpointError("state", f"the state of the stream of examples is not JSON: {error}") from error
        own_hooks = {n: taken_apart(hook.state_dict(), n, hooks) for n, hook in stateful_hooks(run).items()}
        return *saved_state(run.module, run.optimizer, run.built), own_hooks

    optimizer, kept, of_hooks = together(states, run.devices.control)
    shapes = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in hooks.items()}
    said = [json.loads(text) for text in gather_texts(json.dumps([own, shapes]), run.devices.control)]
    _check_alike([shapes for _, shapes in said])
    ranks = [own for own, _ in said]
    for rank in ranks:
        run.loader.bad |= {int(example): reason for example, reason in rank.pop("bad", {}).items()}
    if run.loader.bad:
        ranks[0]["bad"] = {str(example): reason for example, reason in run.loader.bad.items()}
    run.devices.broadcast_buffers(run.module)
    facts = {
        "state": numbers(run.state.to_dict()),
        "metrics": numbers(run.metrics),
        "ranks": ranks,
        "skipped": int(run.gradients.skipped),
        "stopping": ranks[granted - 1]["asked"] if granted else "",
        "unfinished": None
        if unfinished is None
        else {"epoch": unfinished.epoch, "lr": unfinished.lr, "dtypes": dtypes},
        "lines": list(run.tracking.lines if unfinished is None else run.lines),
        "tracker": run.tracking.tracker_run,
        "optimizer": kept,
        "scaler": None if run.gradients.scaler is None else run.gradients.scaler.state_dict(),
        "hooks": of_hooks,
        "identity": run.identity,
        "classes": None if run.data.classes is None else list(map(str, run.data.classes)),
        "config": strict(asdict(run.cfg)),
        "total_steps": run.total_steps,
        "environment": describe_environment(run.devices),
    }
    averaged = {} if run.ema is None else {"ema": run.ema.tensors}
    return {"model": named_tensors(run.module), **averaged, "optimizer": optimizer, "hooks": hooks}, facts


def _check_alike(shapes: list[dict[str, str]]) -> None:
    """Raise CheckpointError where the ranks' hooks keep other tensors: what is saved is the same for all."""
    for rank, other in enumerate(shapes):
        for name in sorted(shapes[0].keys() | other.keys()):
            if shapes[0].get(name) != other.get(name):
                there = [found.get(name, "missing") for found in (shapes[0], other)]
                raise CheckpointError(
                    "state",
                    f"the state of hook {name} is {there[0]} on rank 0 and {there[1]} on rank {rank}; every process "
                    "must keep tensors of the same names, shapes and dtypes",
                )


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


def numbers(values: Any) -> Any:
    """Replace every float in ``values`` by what JSON can say."""
    if isinstance(values, dict):
        return {key: numbers(value) for key, value in values.items()}
    return number(values) if isinstance(values, float) else values


def taken_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON, its tensors moved to ``tensors``. Raises CheckpointError naming what is neither."""
    if isinstance(value, Tensor):
        while path in tensors:  # of {"a.b": ...} and {"a": {"b": ...}}
            path += "'"
        tensors[path] = value
        return {TENSOR: path, "on": value.device.type}
    if isinstance(value, dict) and TENSOR not in value and all(isinstance(key, str) for key in value):
        return {key: taken_apart(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [taken_apart(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    small = not isinstance(value, int) or -(2**63) <= value < 2**63
    finite = not isinstance(value, float) or value - value == 0
    if (value is None or type(value) in (bool, int, float, str)) and small and finite:
        return value
    shown = value if isinstance(value, int | float) else f"a {type(value).__name__}"
    raise CheckpointError(
        "state", f"the state of hook {path} is {shown}; only tensors, finite numbers, texts, lists and dicts are saved"
    )
