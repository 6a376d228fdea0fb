"""What the files of a checkpoint look like: names, the manifest, the header of a safetensors file.

Everything that is read here may come from a stranger: sizes are capped before anything is read or allocated,
and what is not exactly as specified in docs/checkpoints.md raises CheckpointError.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

from scaletrain.checkpoint.reading import read_exactly
from scaletrain.checkpoint.strict import JSON_BYTES, dump, parse_json, readable
from scaletrain.errors import CheckpointError

FORMAT, VERSION = "scaletrain-checkpoint", 1
MANIFEST, STATE = "manifest.json", "state.json"
FOLDER = "checkpoints"
"""The folder of a run that holds its checkpoints."""
TENSOR_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]{0,99}-[0-9]{5,10}\.safetensors")
"""Names of files of tensors: the part, and the rank that wrote it."""
STEP_FOLDER = re.compile(r"step-([0-9]{9}|[1-9][0-9]{9,17})")
SHA256 = re.compile(r"[0-9a-f]{64}")
SHARDING = "DCP_SHARDING_INFO"
"""Where torch.distributed.checkpoint keeps the offsets of a piece in a safetensors header."""
OFFSETS = "saved_offsets"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


class Listed(NamedTuple):
    """What the manifest says of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The last file written: what a checkpoint consists of."""

    step: int
    world_size: int
    files: Mapping[str, Listed]

    def to_json(self) -> bytes:
        """Return the manifest as it is written."""
        files = {name: {"size": size, "sha256": sha256} for name, (size, sha256) in sorted(self.files.items())}
        content = {"format": FORMAT, "version": VERSION, "step": self.step, "world_size": self.world_size}
        return dump({**content, "files": files})


class Piece(NamedTuple):
    """A tensor, or one rank's part of it, as the header of a file describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    """Where the piece begins in the whole tensor."""
    start: int
    """First byte, counted from the start of the file."""
    end: int


def step_folder(step: int) -> str:
    """Return the name of the checkpoint of ``step``."""
    return f"step-{step:09d}"


def parse_manifest(data: bytes, what: str) -> Manifest:
    """Read a manifest; raise CheckpointError unless it is one of this format and version."""

    def need(condition: bool, why: str) -> None:
        if not condition:
            raise CheckpointError("manifest", f"{what}: manifest: {why}")

    content = parse_json(data, what)
    need(isinstance(content, dict) and content.get("format") == FORMAT, f"not a manifest of {FORMAT}")
    need(_is(content.get("version"), int), "version is missing")
    if content["version"] != VERSION:
        raise CheckpointError(
            "version", f"{what}: version: {content['version']} is unknown; this scaletrain reads {VERSION}"
        )
    known = {"format", "version", "step", "world_size", "files"}
    need(content.keys() == known, f"unexpected or missing keys {sorted(content.keys() ^ known)!a:.200}")
    need(_is(content["step"], int) and 0 <= content["step"] < 10**18, "step is no count")
    need(_is(content["world_size"], int) and 1 <= content["world_size"] < 2**31, "world_size is no count")
    need(isinstance(content["files"], dict), "files is no object")
    files = {}
    for name, entry in content["files"].items():
        shown = ascii(name)[:140]
        if name != STATE and not TENSOR_FILE.fullmatch(name):
            raise CheckpointError("name", f"{what}: name: {shown} is neither {STATE} nor as model-00000.safetensors")
        need(isinstance(entry, dict) and entry.keys() == {"size", "sha256"}, f"{shown} needs size and sha256 alone")
        need(_is(entry["size"], int) and 0 <= entry["size"] < 2**63, f"the size of {shown} is no count")
        need(_is(entry["sha256"], str) and bool(SHA256.fullmatch(entry["sha256"])), f"the sha256 of {shown} is none")
        files[name] = Listed(entry["size"], entry["sha256"])
    need(len({name.casefold() for name in files}) == len(files), "two names differ in case alone")
    need(STATE in files, f"{STATE} is missing")
    return Manifest(content["step"], content["world_size"], files)


def read_header(descriptor: int, size: int, what: str) -> dict[str, Piece]:
    """Read and check the header of a safetensors file of ``size`` bytes; return its pieces by name.

    Stricter than safetensors itself, which accepts repeated names, a leading space, unknown fields and holes
    in what the names mean.
    """

    def need(condition: bool, why: str) -> None:
        if not condition:
            raise CheckpointError("header", f"{what}: header: {why}")

    content, metadata, length = _header(descriptor, size, what)
    offsets = parse_json(metadata[SHARDING].encode(), what) if SHARDING in metadata else None
    need(offsets is None or (isinstance(offsets, dict) and offsets.keys() == content.keys()), "offsets and tensors")
    pieces, expected = {}, 8 + length
    for name, entry in content.items():
        shown = ascii(name)[:140]
        need(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, f"fields of {shown}")
        need(isinstance(entry["dtype"], str) and entry["dtype"] in DTYPES, f"the dtype of {shown}")
        dtype, shape, span = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        need(_counts(shape) and len(shape) <= 64, f"the shape of {shown}")
        need(_counts(span) and len(span) == 2, f"the bytes of {shown}")
        start, end = span[0] + 8 + length, span[1] + 8 + length
        need(start == expected, f"{shown} leaves a hole or overlaps")
        need(prod(max(n, 1) for n in shape) < 2**48, f"the shape of {shown}")
        need(end - start == prod(shape) * dtype.itemsize, f"the bytes of {shown} do not fit its shape")
        at = [0] * len(shape)
        if offsets is not None:
            place = offsets[name]
            need(isinstance(place, dict) and place.keys() == {OFFSETS}, f"the place of {shown}")
            at = place[OFFSETS]
            need(_counts(at) and len(at) == len(shape), f"the place of {shown}")
        pieces[name] = Piece(dtype, tuple(shape), tuple(at), start, end)
        expected = end
    need(expected == size, "bytes are missing or left over")
    return pieces


def read_metadata(descriptor: int, size: int, what: str) -> dict[str, str]:
    """Return the texts in the header of a safetensors file of ``size`` bytes."""
    return _header(descriptor, size, what)[1]


def _header(descriptor: int, size: int, what: str) -> tuple[dict[str, Any], dict[str, str], int]:
    """Read the JSON of a header; return its entries by name, its metadata, and its length."""

    def need(condition: bool, why: str) -> None:
        if not condition:
            raise CheckpointError("header", f"{what}: header: {why}")

    need(size >= 8, "shorter than 8 bytes")
    length = int.from_bytes(read_exactly(descriptor, 8, what), "little")
    need(2 <= length <= min(size - 8, JSON_BYTES), f"a header of {length:,} bytes in a file of {size:,}")
    data = read_exactly(descriptor, length, what)
    need(data[:1] == b"{", "does not begin with {")
    content = parse_json(data, what)
    metadata = content.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    need(texts, "metadata is no text")
    return content, metadata, length


def make_header(
    pieces: Mapping[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...] | None]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Return the header for pieces (dtype, shape, offsets) that follow one another in this order.

    Offsets are None where each piece is a whole tensor of a file that stands alone; ``metadata`` are further texts.
    """
    offsets = {name: {OFFSETS: list(at)} for name, (_, _, at) in pieces.items() if at is not None}
    sharding = {SHARDING: json.dumps(offsets)} if offsets else {}
    content: dict[str, Any] = {"__metadata__": {"format": "pt", **sharding, **(metadata or {})}}
    end = 0
    for name, (dtype, shape, _) in pieces.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAME_OF[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text = readable(text, "the header of a file of tensors") + b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(_is(v, int) and v >= 0 for v in value)
