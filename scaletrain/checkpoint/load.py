"""From the files of a checkpoint back into tensors, however many ranks wrote them and read them."""

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from scaletrain.checkpoint.format import Piece
from scaletrain.checkpoint.reading import folder_descriptor, regular_file
from scaletrain.checkpoint.tensors import is_sharded
from scaletrain.checkpoint.verify import Checkpoint
from scaletrain.errors import CheckpointError

BOOL_BYTES = 1 << 20
"""Bytes looked at together."""


def load(checkpoint: Checkpoint, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Read ``part`` into ``tensors``, in place; sharded ones (DTensor) get their share.

    What is expected comes from ``tensors``: raises CheckpointError unless names, shapes and dtypes are theirs.
    """
    check_tensors(checkpoint, part, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    whole = all(
        piece.shape == tuple(tensors[n].shape) for ps in checkpoint.part(part).values() for n, piece in ps.items()
    )
    check_bools(checkpoint.path, checkpoint.part(part))
    with torch.no_grad():
        if whole and not any(map(is_sharded, tensors.values())):
            _copy(checkpoint, part, tensors)
        else:
            _reshard(checkpoint, part, tensors)


def load_new(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    """Read ``part`` into new tensors, of the shapes that its pieces make up. Raises CheckpointError."""
    shapes = whole_shapes(checkpoint, part)
    check_tensors(checkpoint, part, shapes)  # before any memory is taken
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    load(checkpoint, part, tensors)
    return tensors


def _copy(checkpoint: Checkpoint, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors that were written whole and are wanted whole."""
    for file, pieces in checkpoint.part(part).items():
        with safe_open(checkpoint.path / file, framework="pt") as content:
            for name in pieces:
                tensors[name].detach().copy_(content.get_tensor(name))


def _reshard(checkpoint: Checkpoint, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Let torch.distributed.checkpoint put together what each rank needs from the pieces that others wrote."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystem
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    class Only(FileSystem):
        """Shows the reader the verified files of this part alone."""

        def ls(self, path: str | os.PathLike[str]) -> list[str]:
            return [str(Path(path) / name) for name in checkpoint.part(part)]

    reader = HuggingFaceStorageReader(str(checkpoint.path))
    reader.fs = Only()
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=False)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    reader.read_data(plan, planner).wait()


def whole_shapes(checkpoint: Checkpoint, part: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each tensor of ``part``, as its pieces have it."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for pieces in checkpoint.part(part).values():
        for name, piece in pieces.items():
            end = tuple(at + n for at, n in zip(piece.offsets, piece.shape, strict=True))
            before = shapes.get(name, (end, piece.dtype))[0]
            shapes[name] = (tuple(map(max, before, end)), piece.dtype)
    return shapes


def check_tensors(
    checkpoint: Checkpoint, part: str, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Raise CheckpointError unless the pieces of ``part`` make up exactly the ``expected`` tensors."""
    found: dict[str, list[Piece]] = {}
    for pieces in checkpoint.part(part).values():
        for name, piece in pieces.items():
            found.setdefault(name, []).append(piece)
    where = f"{checkpoint.path}: "
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        words = [f"{len(missing)} missing, as {missing[0]!a}"] if missing else []
        words += [f"{len(unknown)} unknown, as {ascii(unknown[0])[:140]}"] if unknown else []
        raise CheckpointError("names", f"{where}names: the {part} tensors are not this run's: {', '.join(words)}")
    for name, (shape, dtype) in expected.items():
        for piece in found[name]:
            if piece.dtype != dtype:
                raise CheckpointError(
                    "dtype", f"{where}dtype: {part} '{name}' is {piece.dtype} there and {dtype} in this run"
                )
            if len(piece.shape) != len(shape):
                raise CheckpointError(
                    "shape", f"{where}shape: {part} '{name}' is {piece.shape} there and {shape} in this run"
                )
        if not _covers(found[name], shape):
            there = whole_shapes(checkpoint, part)[name][0]
            raise CheckpointError("shape", f"{where}shape: {part} '{name}' is {there} there and {shape} in this run")


def check_bools(path: Path, files: Mapping[str, Mapping[str, Piece]]) -> None:
    """Raise CheckpointError where a bool in ``files``, in the folder ``path``, is stored as neither 0 nor 1."""
    for file, pieces in files.items():
        bools = {name: piece for name, piece in pieces.items() if piece.dtype == torch.bool}
        if not bools:
            continue
        with folder_descriptor(path) as folder, regular_file(folder, file, f"{path / file}") as (descriptor, _):
            for name, piece in bools.items():
                for start in range(piece.start, piece.end, BOOL_BYTES):
                    if os.pread(descriptor, min(BOOL_BYTES, piece.end - start), start).strip(b"\0\1"):
                        raise CheckpointError("bool", f"{path / file}: bool: {ascii(name)[:140]} has more than 0 and 1")


def _covers(pieces: list[Piece], shape: tuple[int, ...]) -> bool:
    """Whether the pieces fill ``shape`` exactly, each element once."""
    boxes = [[(at, at + n) for at, n in zip(p.offsets, p.shape, strict=True)] for p in pieces]
    inside = all(end <= n for box in boxes for (_, end), n in zip(box, shape, strict=True))
    return inside and sum(prod(p.shape) for p in pieces) == prod(shape) and _apart(boxes)


def _apart(boxes: list[list[tuple[int, int]]]) -> bool:
    """Whether no two of the boxes overlap.

    They are gone through along the dimension that divides them most, and each is compared with those that reach
    into it: a thousand ranks' pieces of each of a thousand tensors would be too many pairs.
    """
    most = max(range(len(boxes[0])), key=lambda d: len({box[d] for box in boxes}), default=0)
    reaching: list[list[tuple[int, int]]] = []
    for box in sorted(boxes, key=lambda box: box[most : most + 1]):
        reaching = [other for other in reaching if other[most][1] > box[most][0]]
        if any(all(a[0] < b[1] and b[0] < a[1] for a, b in zip(box, other, strict=True)) for other in reaching):
            return False
        reaching.append(box)
    return True
