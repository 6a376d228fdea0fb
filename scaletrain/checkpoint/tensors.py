"""Which rank writes which piece of which tensor, copies of them in host memory, and the files they go to."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.agreement import gather_texts
from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.format import NAME_OF, Listed, make_header
from scaletrain.errors import CheckpointError

Tensors = Mapping[str, Tensor]
Parts = Mapping[str, Tensors]
"""Tensors by name in groups that become files of their own: model, optimizer, ..."""
WRITE_BYTES = 1 << 20
"""Bytes hashed and written at a time; with 8 MiB the writing took twice the CPU (benchmarks/checkpoint_stall.py)."""


class Share(NamedTuple):
    """A piece of a tensor that this rank writes."""

    part: str
    name: str
    tensor: Tensor
    offsets: tuple[int, ...]


class Snapshot:
    """Host copies of this rank's share of all tensors; the memory is taken once and used again."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._planned = ""
        self._places: dict[tuple[str, str], tuple[int, ...]] = {}
        self._host: dict[tuple[str, str], Tensor] = {}
        self._copied: torch.cuda.Event | None = None
        self._sums: list[tuple[list[str], Tensor]] = []
        self.total_bytes = 0
        """Bytes of all ranks' shares together."""
        self.shares: list[Share] = []
        """The copies."""
        self.replicas: dict[str, int] = {}
        """A checksum of each tensor that all ranks hold, where there are several."""

    def take(self, parts: Parts) -> None:
        """Copy this rank's share; on CUDA the copying is ordered before later work of the device, not waited for.

        Every rank must reach this line.
        """
        self._plan(parts)
        self.shares = [
            Share(part, name, self._copy(part, name, local_part(parts[part][name])), at)
            for (part, name), at in self._places.items()
        ]
        self._sums = _checksums(parts) if self._group is not None else []
        device = next((t.device for tensors in parts.values() for t in tensors.values() if t.is_cuda), None)
        self._copied = None if device is None else torch.cuda.current_stream(device).record_event()

    def finish_copying(self) -> None:
        """Wait for the device; the saving thread does."""
        if self._copied is not None:
            self._copied.synchronize()
        self.replicas = {
            name: value for names, sums in self._sums for name, value in zip(names, sums.tolist(), strict=True)
        }

    def _copy(self, part: str, name: str, source: Tensor) -> Tensor:
        host = self._host[part, name] = _to_host(source, self._host.get((part, name)))
        return host

    def _plan(self, parts: Parts) -> None:
        """Divide the writing anew where names, shapes or dtypes have changed on some rank."""
        found = hashlib.sha256()
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                local = local_part(tensor)
                if local.dtype not in NAME_OF:
                    raise CheckpointError("dtype", f"{part} '{name}' is {local.dtype}, which safetensors cannot hold")
                found.update(f"{part} {name} {tuple(tensor.shape)} {tuple(local.shape)} {local.dtype};".encode())
        unchanged = found.hexdigest() == self._planned
        if all(gather_texts("unchanged" if unchanged else "", self._group)):
            return
        self._host.clear()
        if self._group is None and not any(is_sharded(t) for tensors in parts.values() for t in tensors.values()):
            self._places = {(part, n): (0,) * t.ndim for part, tensors in parts.items() for n, t in tensors.items()}
            self.total_bytes = sum(t.nbytes for tensors in parts.values() for t in tensors.values())
        else:
            self._places, self.total_bytes = _divide(parts, self._group)
        self._planned = found.hexdigest()


def write_shares(files: Files, folder: Path, rank: int, shares: list[Share]) -> dict[str, Listed]:
    """Write each part of ``shares`` to ``PART-RANK.safetensors`` in one pass, hash it on the way, and sync it."""
    written = {}
    for part in sorted({share.part for share in shares}):
        pieces = {share.name: share for share in shares if share.part == part}
        header = make_header({n: (s.tensor.dtype, tuple(s.tensor.shape), s.offsets) for n, s in pieces.items()})
        name = f"{part}-{rank:05d}.safetensors"
        data = [memoryview(header), *(bytes_of(share.tensor) for share in pieces.values())]
        written[name] = write_file(files, folder / name, data)
    return written


def write_file(files: Files, path: Path, data: list[memoryview]) -> Listed:
    """Write a new file, hashing on the way, and wait until it is on the disk."""
    digest, size = hashlib.sha256(), 0
    descriptor = files.create(path)
    try:
        for block in data:
            for start in range(0, len(block), WRITE_BYTES):
                rest = block[start : start + WRITE_BYTES]
                digest.update(rest)
                size += len(rest)
                while len(rest):
                    rest = rest[files.write(descriptor, rest) :]
        files.fsync(descriptor)
    except BaseException:
        os.close(descriptor)  # the first error counts
        raise
    files.close(descriptor)
    return Listed(size, digest.hexdigest())


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of ``tensor``."""
    return (tensor.to_local() if is_sharded(tensor) else tensor).detach()  # type: ignore[attr-defined]  # a DTensor


def _divide(parts: Parts, group: dist.ProcessGroup | None) -> tuple[dict[tuple[str, str], tuple[int, ...]], int]:
    """Let torch.distributed.checkpoint's planner divide the writing.

    Returns the tensors this rank writes (a part of), each with its place in the whole, and all ranks' bytes.
    The ranks exchange their plans as JSON and each computes the whole, so nothing is pickled on the way.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    rank = 0 if group is None else dist.get_rank(group)
    places: dict[tuple[str, str], tuple[int, ...]] = {}
    total = 0
    for part, tensors in parts.items():
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
        own = [
            (item.index.fqn, item.type.name, list(item.tensor_data.chunk.offsets), list(item.tensor_data.chunk.sizes))
            for item in planner.create_local_plan().items
            if item.tensor_data is not None
        ]
        plans = [
            SavePlan(
                [
                    WriteItem(
                        MetadataIndex(name, at),
                        WriteItemType[kind],
                        tensor_data=TensorWriteData(
                            ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)),
                            TensorProperties(tensors[name].dtype),
                            tensors[name].shape,
                        ),
                    )
                    for name, kind, at, sizes in json.loads(text)
                    if 0 not in sizes or 0 in tensors[name].shape  # ranks beyond the end of a short tensor hold nothing
                ]
            )
            for text in gather_texts(json.dumps(own), group)
        ]
        divided, _ = planner.create_global_plan(plans)
        items = [(item, item.tensor_data) for item in divided[rank].items]
        places |= {(part, item.index.fqn): tuple(data.chunk.offsets) for item, data in items if data is not None}
        total += sum(tensor.nbytes for tensor in tensors.values())
    return places, total


def _checksums(parts: Parts) -> list[tuple[list[str], Tensor]]:
    """Add up the bits of every tensor that all ranks should hold alike; a single flipped bit shows.

    Returns names and sums in host memory, by device; on CUDA they arrive when the device gets to it.
    """
    found: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            if not is_sharded(tensor) and tensor.numel():
                flat = tensor.detach().reshape(-1)
                bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize]
                names, sums = found.setdefault(flat.device, ([], []))
                names.append(f"{part} {name}")
                sums.append(flat.view(bits).sum(dtype=torch.int64))
    return [(names, _to_host(torch.stack(sums))) for names, sums in found.values()]


def _to_host(tensor: Tensor, host: Tensor | None = None) -> Tensor:
    if host is None:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=tensor.is_cuda)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in host memory, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
