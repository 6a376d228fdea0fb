"""From a checkpoint to one file of weights with plain names, and from such a file into a network."""

import contextlib
import json
import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaletrain.checkpoint.files import Files, put_in_place
from scaletrain.checkpoint.format import make_header, read_header, read_metadata
from scaletrain.checkpoint.load import check_bools, load, load_new, whole_shapes
from scaletrain.checkpoint.reading import folder_descriptor, regular_file
from scaletrain.checkpoint.strict import parse_json
from scaletrain.checkpoint.tensors import bytes_of, write_file
from scaletrain.checkpoint.verify import Checkpoint, open_whole
from scaletrain.errors import CheckpointError, InputError

WEIGHTS = "model.safetensors"


def load_weights(model: nn.Module, path: str | Path, *, skip: Sequence[str] = ()) -> nn.Module:
    """Fill ``model`` with trained weights, and return it.

    ``path`` is a ``model.safetensors``, a run's folder (its exported weights, else its newest checkpoint) or a
    checkpoint. What lies below a module named in ``skip``, as a new ``"head"``, stays as it is, whatever the file
    has there. Raises InputError where ``skip`` names nothing of the model, CheckpointError unless all other names,
    shapes and dtypes are the model's, and for a checkpoint that is not whole; nothing from the file is executed.
    """
    path = Path(path)
    own = named_tensors(model)
    for name in skip:
        if not any(_is_below(known, [name]) for known in own):
            raise InputError(f"skip: the model has nothing called '{name}'; it has {', '.join(own)}")
    tensors = {name: tensor for name, tensor in own.items() if not _is_below(name, skip)}
    if os.path.lexists(path / WEIGHTS):  # a link in a folder is not followed, unlike one that the caller names
        path = path / WEIGHTS
    elif path.is_dir():
        checkpoint, skipped = open_whole(path)
        for why in skipped:
            warnings.warn(f"skipped a newer checkpoint: {why}", stacklevel=2)
        kept = {
            file: {name: piece for name, piece in pieces.items() if not _is_below(name, skip)}
            for file, pieces in checkpoint.pieces.items()
        }
        load_trained(replace(checkpoint, pieces=kept), tensors)
        return model
    else:
        path = Path(os.path.realpath(path))
    from safetensors import safe_open

    with folder_descriptor(path.parent.resolve()) as folder, regular_file(folder, path.name, str(path)) as (file, size):
        pieces = read_header(file, size, str(path))
    check_bools(path.parent.resolve(), {path.name: pieces})
    found = {name: (piece.shape, piece.dtype) for name, piece in pieces.items() if not _is_below(name, skip)}
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                "names",
                f"{path}: names: {ascii(name)[:140]} is {_words(found.get(name))} there, "
                f"{_words(wanted.get(name))} in the model",
            )
    with safe_open(path, framework="pt") as file_, torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(file_.get_tensor(name))
    return model


def load_trained(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``tensors`` with the weights that were evaluated: the moving average, where there is one."""
    load(checkpoint, "model", tensors)
    averaged = whole_shapes(checkpoint, "ema")
    load(checkpoint, "ema", {name: tensors[name] for name in averaged if name in tensors})


def _is_below(name: str, parts: Sequence[str]) -> bool:
    """Whether a tensor is that of a module in ``parts``, or of one inside it."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def export(checkpoint: Checkpoint, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write the model of a checkpoint as one safetensors file with plain names; floats as ``dtype``, if given."""
    tensors = load_new(checkpoint, "model") | load_new(checkpoint, "ema")
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_tensors(path, tensors, _classes(checkpoint.state.get("classes")))


def saved_classes(path: str | Path) -> list[str] | None:
    """Return the names of the classes that the weights at ``path`` were trained on, as for ``load_weights``."""
    path = Path(os.path.realpath(path))
    if path.is_dir() and not (path / WEIGHTS).exists():
        return _classes(open_whole(path)[0].state.get("classes"))
    path = path / WEIGHTS if path.is_dir() else path
    with folder_descriptor(path.parent) as folder, regular_file(folder, path.name, str(path)) as (file, size):
        metadata = read_metadata(file, size, str(path))
    return _classes(parse_json(metadata["classes"].encode(), str(path))) if "classes" in metadata else None


def _classes(found: Any) -> list[str] | None:
    """Return ``found`` if it is a list of texts."""
    return found if isinstance(found, list) and found and all(isinstance(name, str) for name in found) else None


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], classes: Sequence[str] | None = None, files: Files | None = None
) -> None:
    """Write a safetensors file that is whole or not there, with the names of the classes. Raises OSError."""
    files = files or Files()
    known = {"classes": json.dumps(classes)} if classes else None
    header = make_header({name: (t.dtype, tuple(t.shape), None) for name, t in tensors.items()}, known)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
    try:
        write_file(files, draft, [memoryview(header), *(bytes_of(tensor) for tensor in tensors.values())])
        put_in_place(draft, path, files)
    except OSError:
        with contextlib.suppress(OSError):
            files.unlink(draft)
        raise


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's parameters and buffers by name; what is shared under two names once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def _words(found: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if found is None else f"{found[1]} {list(found[0])}"
