"""Strict JSON: what is read may come from a stranger, so its size, depth and numbers are bounded before it is used."""

import json
from math import isfinite
from typing import Any, NoReturn

from scaletrain.errors import CheckpointError

JSON_BYTES = 16 << 20
"""Most bytes of the manifest, of state.json and of the header of a safetensors file."""
JSON_VALUES = 500_000
"""Most commas and opening brackets in one of them: each may cost a reader 250 bytes and 4 us."""
JSON_DEPTH = 32


def dump(content: Any) -> bytes:
    """Write JSON that ``parse_json`` accepts: raises ValueError for NaN, CheckpointError for what is too much."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    data = text.encode("utf-8", "replace") + b"\n"  # the bytes of an odd path are no text
    return readable(data, "what is saved beside the tensors")


def parse_json(data: bytes, what: str) -> Any:
    """Read JSON strictly: UTF-8, no repeated keys, finite numbers, no integer beyond 64 bits, no deep nesting."""

    def refuse(why: str) -> NoReturn:
        raise CheckpointError("json", f"{what}: json: {why}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            refuse("a key occurs twice")
        return content

    def integer(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
            refuse(f"the integer {digits[:24]} has more than 64 bits")
        return int(digits)

    def number(text: str) -> float:
        if not isfinite(float(text)):
            refuse(f"the number {text[:24]} is not finite")
        return float(text)

    if sum(map(data.count, (b",", b"[", b"{"))) > JSON_VALUES:
        refuse(f"more than {JSON_VALUES:,} values")
    try:
        content = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=number,
            parse_constant=lambda name: refuse(f"{name} is no number"),
        )
        _look_inside(content)
    except RecursionError:
        refuse(f"nested deeper than {JSON_DEPTH}")
    except ValueError as error:
        refuse(ascii(str(error))[1:-1])
    return content


def readable(data: bytes, what: str) -> bytes:
    """Return ``data``; raise CheckpointError where nobody could read it later."""
    if len(data) > JSON_BYTES:
        raise CheckpointError("size", f"{what}: size: {len(data):,} bytes of JSON, at most {JSON_BYTES:,} can be read")
    parse_json(data, what)
    return data


def _look_inside(content: Any) -> None:
    """Raise RecursionError for what is nested too deep, ValueError for a lone surrogate, which is no text."""
    depth, level = 0, [content]
    while level:
        for value in level:
            if isinstance(value, str) and not value.isascii():
                value.encode()
        boxes = [value for value in level if isinstance(value, dict | list)]
        depth += bool(boxes)
        if depth > JSON_DEPTH:
            raise RecursionError
        level = [inner for box in boxes for inner in ((*box, *box.values()) if isinstance(box, dict) else box)]
