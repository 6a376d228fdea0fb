"""Attacks on a checkpoint: what one who forges it, or a failing disk, may do to a copy of a good one.

Most are rows of tables: the rule that must refuse, and a function of the checkpoint's folder. What is hashed is
hashed anew, so that this rule is reached and not the hash.
"""

import hashlib
import json
import math
import os
import pickle
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file

from scaletrain.checkpoint.format import make_header

STEP = "step-000000005"
MANIFEST, STATE = "manifest.json", "state.json"
MODEL, OPTIMIZER, HOOKS = (f"{part}-00000.safetensors" for part in ("model", "optimizer", "hooks"))
PLACES = "DCP_SHARDING_INFO"
FULL = 16 << 20
"""Bytes of JSON that are still read."""

DAMAGES = {
    "a bit flipped": lambda d, other, a, b, c: d[:a] + bytes([d[a] ^ 1 << c % 8]) + d[a + 1 :],
    "the end cut off": lambda d, other, a, b, c: d[:a],
    "a longer end": lambda d, other, a, b, c: d + d[a:b],
    "a range of zeros": lambda d, other, a, b, c: d[:a] + bytes(b - a) + d[b:],
    "two ranges swapped": lambda d, other, a, b, c: d[:a] + d[b:c] + d[a:b] + d[c:],
    "a chunk copied over another": lambda d, other, a, b, c: (d[:c] + d[a:b] + d[c + b - a :])[: len(d)],
    "two files swapped": lambda d, other, a, b, c: other,
}
"""By name: what becomes of a file's bytes, given another file's, and three places in it, a < b <= c."""


def relist(folder, **changes):
    """Let the manifest list the files that are there, as one who forges a checkpoint would."""
    others = [path for path in folder.iterdir() if path.name != MANIFEST]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in others}
    files = {path.name: {"size": path.stat().st_size, "sha256": hashes[path.name]} for path in others}
    (folder / MANIFEST).write_text(json.dumps(json.loads((folder / MANIFEST).read_text()) | {"files": files} | changes))


def raw(name, change):
    """Return an attack that replaces the bytes of a file by ``change(bytes)``."""

    def attack(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        if name != MANIFEST:
            relist(folder)

    return attack


def header(change, name=MODEL):
    """Return an attack on the text of the header of a file of tensors."""

    def changed(data):
        length = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + length].rstrip())
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return raw(name, changed)


def put(name, keys, value):
    """Return an attack that puts another value into a file of JSON or a header; an Ellipsis takes it out."""

    def change(text):
        inner = whole = json.loads(text)
        for key in keys[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        return json.dumps(whole).encode()

    return raw(name, change) if name in (MANIFEST, STATE) else header(change, name)


def claims(length):
    """Return an attack by which the model's file says that its header is so long."""
    return raw(MODEL, lambda data: length.to_bytes(8, "little") + data[8:])


def each(rows):
    """Make a case of each value in a table of rule, file, where in it, values."""
    for rule, name, keys, values in rows:
        for value in values:
            how = "missing" if value is ... else f"{value!r:.40}"
            yield pytest.param(rule, put(name, keys, value), id=f"{name}: {'/'.join(keys)[:60]} {how}")


def named(table):
    return [pytest.param(rule, attack, id=name) for name, (rule, attack) in table.items()]


ENTRY = {"size": 0, "sha256": "0" * 64}
NOT_JSON = [2**63, -(2**63) - 1, 10**99, math.nan, -math.inf, "\ud800", json.loads("[" * 32 + "]" * 32)]
_STRUCTURE = [
    ("json", MANIFEST, ("step",), NOT_JSON),
    ("manifest", MANIFEST, ("format",), [..., "zip", None]),
    ("manifest", MANIFEST, ("version",), [..., True, 1.0, "1"]),
    ("version", MANIFEST, ("version",), [2, 0, -1]),
    ("manifest", MANIFEST, ("step",), [..., -1, 5.0, True, "5", 2**62]),
    ("step", MANIFEST, ("step",), [4]),
    ("manifest", MANIFEST, ("world_size",), [..., 0, -1, 2**31]),
    ("manifest", MANIFEST, ("class",), ["os.system"]),
    ("manifest", MANIFEST, ("files",), [..., [MODEL, STATE], {}]),
    ("manifest", MANIFEST, ("files", MODEL), ["0" * 64, {}, ENTRY | {"url": "http://localhost"}]),
    ("manifest", MANIFEST, ("files", MODEL, "size"), [..., -1, True, 1e3, "1076"]),
    ("manifest", MANIFEST, ("files", MODEL, "sha256"), [..., "A" * 64, "0" * 63, None]),
    ("size", MANIFEST, ("files", MODEL, "size"), [0, 1, 2**62]),
    ("sha256", MANIFEST, ("files", MODEL, "sha256"), ["0" * 64]),
    ("missing", MANIFEST, ("files", "model-00001.safetensors"), [ENTRY]),
    ("json", STATE, ("state",), NOT_JSON),
    ("json", MODEL, ("0.weight", "shape"), NOT_JSON),
    ("header", MODEL, ("0.weight",), [[], {}]),
    ("header", MODEL, ("0.weight", "requires_grad"), [True]),
    ("header", MODEL, ("0.weight", "dtype"), [..., "F4", "f32", 32, ["F32"]]),
    ("header", MODEL, ("0.weight", "shape"), [..., [-16, -5], [16.0, 5.0], [80, True], "80", [80] + [1] * 64, [17, 5]]),
    ("header", MODEL, ("0.weight", "data_offsets"), [[0, 320, 320], [320, 0], [-320, 0], ["0", "320"], [64, 384]]),
    ("header", MODEL, ("0.bias",), [...]),
    ("header", MODEL, ("__metadata__",), ["pt", [], {"format": 1}, {PLACES: "[]"}, {PLACES: "{}"}]),
    ("json", MODEL, ("__metadata__",), [{PLACES: "here"}, {PLACES: '{"a": 1, "a": 2}'}]),
]
_BYTES = {
    "manifest empty": ("json", raw(MANIFEST, lambda data: b"")),
    "manifest cut": ("json", raw(MANIFEST, lambda data: data[:-9])),
    "manifest null": ("manifest", raw(MANIFEST, lambda data: b"null")),
    "manifest a list": ("manifest", raw(MANIFEST, lambda data: b"[" + data + b"]")),
    "manifest twice": ("json", raw(MANIFEST, lambda data: data + data)),
    "manifest in latin-1": ("json", raw(MANIFEST, lambda data: data.replace(b"train", b"tr\xe4in"))),
    "manifest in UTF-16": ("json", raw(MANIFEST, lambda data: data.decode().encode("utf-16"))),
    "manifest with a byte order mark": ("json", raw(MANIFEST, lambda data: b"\xef\xbb\xbf" + data)),
    "manifest with a comment": ("json", raw(MANIFEST, lambda data: b"// hello\n" + data)),
    "manifest with a comma too many": ("json", raw(MANIFEST, lambda data: data.replace(b"1,", b"1,,", 1))),
    "manifest with single quotes": ("json", raw(MANIFEST, lambda data: data.replace(b'"', b"'"))),
    "manifest with a newline in a text": ("json", raw(MANIFEST, lambda data: data.replace(b"train", b"\n"))),
    "manifest with 1e999": ("json", raw(MANIFEST, lambda data: data.replace(b": 5", b": 1e999", 1))),
    "manifest with a key twice": ("json", raw(MANIFEST, lambda data: data.replace(b'"step"', b'"step": 5, "step"'))),
    "manifest 100,000 deep": ("json", raw(MANIFEST, lambda data: b"[" * 100_000 + b"]" * 100_000)),
    "state a list": ("state", raw(STATE, lambda data: b"[" + data + b"]")),
    "state a pickle": ("json", raw(STATE, lambda data: pickle.dumps(data))),
    "state with a key twice": ("json", raw(STATE, lambda data: data.replace(b'"state"', b'"state": {}, "state"', 1))),
    "a file of tensors empty": ("header", raw(MODEL, lambda data: b"")),
    "a file of tensors of 7 bytes": ("header", raw(MODEL, lambda data: data[:7])),
    "a file of tensors with bytes left over": ("header", raw(MODEL, lambda data: data + bytes(8))),
    "a file of tensors with bytes missing": ("header", raw(MODEL, lambda data: data[:-4])),
    "a header of 0 bytes": ("header", claims(0)),
    "a header of 1 byte": ("header", claims(1)),
    "a header beyond the end": ("header", claims(1 << 20)),
    "a header of 2^64-1 bytes": ("header", claims(2**64 - 1)),
    "a header that ends early": ("json", claims(64)),
    "a header after a space": ("header", header(lambda text: b" " + text)),
    "a header that is a list": ("header", header(lambda text: b"[" + text + b"]")),
    "a header with something behind": ("json", header(lambda text: text + b"{}")),
    "a header with a tensor twice": ("json", header(lambda text: text[:-1] + b',"0.bias":{}}')),
    "a header with metadata twice": ("json", header(lambda text: text[:-1] + b',"__metadata__":{}}')),
    "a shape of 2^62 by 0": ("header", raw(MODEL, lambda data: make_header({"a": (torch.int8, (2**62, 0), (0, 0))}))),
    "a piece in a negative place": ("header", header(lambda text: text.replace(b"[0, 0]", b"[-1,0]", 1))),
    "a piece in a place of one dimension": ("header", header(lambda text: text.replace(b"[0, 0]", b"[0]", 1))),
    "a piece without a place": ("header", header(lambda text: text.replace(b"saved_offsets", b"offsets", 1))),
    "a place without a piece": ("header", header(lambda text: text.replace(b'\\"0.bias', b'\\"1.bias', 1))),
}
HEADERS_AND_JSON = [*each(_STRUCTURE), *named(_BYTES)]


def read_tensors(path):
    """Read a file's tensors; copies, for the file is overwritten and safetensors maps it into memory."""
    return {name: t.clone() for name, t in load_file(path).items()}


def write_pieces(path, pieces):
    """Write a file of pieces: name -> (tensor, offsets)."""
    described = {name: (t.dtype, tuple(t.shape), at) for name, (t, at) in pieces.items()}
    path.write_bytes(make_header(described) + b"".join(t.contiguous().numpy().tobytes() for t, _ in pieces.values()))


def tensors(name, change):
    """Return an attack that writes a file of other tensors: ``change(tensors by name)``."""

    def attack(folder):
        changed = change(read_tensors(folder / name))
        write_pieces(folder / name, {tensor: (t, (0,) * t.ndim) for tensor, t in changed.items()})
        relist(folder)

    return attack


def one(tensor, change):
    return lambda found: found | {tensor: change(found[tensor])}


def more(name, tensor=torch.zeros(3)):  # noqa: B008
    return lambda found: found | {name: tensor}


def less(name):
    return lambda found: {other: t for other, t in found.items() if other != name}


def divided(*rows, beyond=0):
    """Return an attack that leaves the rows of a matrix in several files, all but the first ``beyond`` their place."""

    def attack(folder):
        found = read_tensors(folder / MODEL)
        matrix = found.pop("0.weight")
        for rank, (first, last) in enumerate(rows):
            others = {name: (t, (0,) * t.ndim) for name, t in found.items() if rank == 0}
            piece = {"0.weight": (matrix[first:last], (first + beyond * (rank > 0), 0))}
            write_pieces(folder / f"model-{rank:05d}.safetensors", piece | others)
        relist(folder)

    return attack


def files(change, **changes):
    """Return an attack on the files of a checkpoint as a whole."""

    def attack(folder):
        change(folder)
        relist(folder, **changes)

    return attack


_VALUES = [
    ("state", STATE, ("state",), [..., None, [], {}]),
    ("state", STATE, ("state", "steps"), [5]),
    ("state", STATE, ("state", "step"), [..., 4, -5, 2**63 - 1, 5.0, "5"]),
    ("state", STATE, ("state", "samples_seen"), [-80, 4, 2**63 - 1, True, 1e9]),
    ("state", STATE, ("state", "skipped"), [-1, 6]),
    ("state", STATE, ("state", "train_loss_from"), [-1, 6]),
    ("state", STATE, ("state", "validated_step"), [-2, 6, True]),
    ("state", STATE, ("state", "best_step"), [-1, 6]),
    ("state", STATE, ("state", "best"), [None, "nan", "inf", {}, "best", True]),
    ("state", STATE, ("state", "best_metrics"), [1.0, {"val_loss": "low"}]),
    ("state", STATE, ("state", "validations_without_progress"), [-1]),
    ("state", STATE, ("state", "stop_reason"), [None, ["now"]]),
    ("state", STATE, ("stopping",), [..., 1, ["now"]]),
    ("state", STATE, ("metrics",), [[], {"val_loss": True}]),
    ("state", STATE, ("skipped",), [..., -1, 6, "0", 0.5]),
    ("state", STATE, ("lines",), [..., "31", [3, -1], [3, 1, 0]]),
    ("state", STATE, ("tracker",), [..., None]),
    ("state", STATE, ("unfinished",), [..., {"epoch": 0.5}, {"epoch": 0.5, "lr": 0.1, "dtypes": ["float32"]}]),
    ("state", STATE, ("ranks",), [[], [{"loss": 0.0, "asked": ""}] * 2, {"0": {"loss": 0.0, "asked": ""}}]),
    ("state", STATE, ("ranks",), [[{"loss": "0", "asked": ""}], [{"loss": 0.0, "asked": 1}], [None]]),
    ("state", STATE, ("optimizer",), [..., {}]),
    ("optimizer", STATE, ("optimizer", "state", "0.bias"), [..., {"sum": "tensor"}]),
    ("state", STATE, ("optimizer", "state", "0.bias", "step"), ["os.system", [], {}]),
    (
        "state",
        STATE,
        ("optimizer", "adapted"),
        [[], [{}, {}], [{"params": []}], [{"lr": 1.0}], [{"weight_decay": "0"}]],
    ),
    ("state", STATE, ("optimizer", "adapted"), [[{"amsgrad": 3}], [{"eps": True}], [{"foreach": []}]]),
    ("hooks", STATE, ("hooks",), [{}, {"Other": {}}, {f"{i:0200}": {} for i in range(100)}]),
    ("hooks", STATE, ("hooks", "Mean", "notes"), [...]),
    ("names", STATE, ("hooks", "Mean"), [{}, []]),
    ("names", STATE, ("hooks", "Mean", "total"), [1]),
    ("state", STATE, ("hooks", "Mean", "total", "__tensor__"), ["Mean.x", "Mean.big", [], None]),
    ("state", STATE, ("hooks", "Mean", "total", "on"), [0, None]),
]
_TENSORS = {
    "a tensor missing": ("names", tensors(MODEL, less("2.bias"))),
    "a tensor more": ("names", tensors(MODEL, more("4.bias"))),
    "a name that is a path": ("names", tensors(MODEL, more("../../etc/passwd"))),
    "a name that is empty": ("names", tensors(MODEL, more(""))),
    "a name with NUL": ("names", tensors(MODEL, more("2.bias\0"))),
    "a name of 100,000 letters": ("names", tensors(MODEL, more("a" * 100_000))),
    "another model": ("names", tensors(MODEL, lambda found: {"conv.weight": torch.zeros(8, 3, 3, 3)})),
    "a wider model": ("shape", tensors(MODEL, one("0.weight", lambda t: torch.zeros(32, 5)))),
    "a tensor transposed": ("shape", tensors(MODEL, one("0.weight", lambda t: t.T))),
    "a tensor flattened": ("shape", tensors(MODEL, one("0.weight", torch.flatten))),
    "a tensor of a dimension more": ("shape", tensors(MODEL, one("0.weight", lambda t: t[None]))),
    "a tensor of no element": ("shape", tensors(MODEL, one("0.weight", lambda t: t[:0]))),
    "a tensor in float64": ("dtype", tensors(MODEL, one("0.weight", torch.Tensor.double))),
    "a tensor as integers": ("dtype", tensors(MODEL, one("0.weight", lambda t: t.view(torch.int32)))),
    "a matrix of which a row is missing": ("shape", divided((0, 5), (6, 16))),
    "a matrix of which a row is there twice": ("shape", divided((0, 6), (5, 16))),
    "a matrix with a hole as large as its overlap": ("shape", divided((0, 6), (5, 9), (10, 16))),
    "a matrix that reaches beyond its end": ("shape", divided((0, 5), (5, 16), beyond=1)),
    "a piece at 2^62": ("shape", divided((0, 5), (5, 16), beyond=2**62)),
    "no model": ("names", files(lambda folder: (folder / MODEL).unlink())),
    "the model twice": ("shape", files(lambda folder: shutil.copy(folder / MODEL, folder / "model-00001.safetensors"))),
    "a part nobody knows": ("names", files(lambda folder: shutil.copy(folder / MODEL, folder / f"x{MODEL}"))),
    "a world of two": ("state", files(lambda folder: None, world_size=2)),
    "no optimizer": ("names", files(lambda folder: (folder / OPTIMIZER).unlink())),
    "an optimizer's tensor missing": ("names", tensors(OPTIMIZER, less("0.bias|exp_avg"))),
    "an optimizer's tensor more": ("names", tensors(OPTIMIZER, more("0.bias|max_exp_avg_sq"))),
    "an optimizer's step that is a vector": ("shape", tensors(OPTIMIZER, one("0.bias|step", lambda t: t[None]))),
    "an optimizer's moment in half": ("dtype", tensors(OPTIMIZER, one("0.bias|exp_avg", torch.Tensor.half))),
    "no hooks' tensors": ("state", files(lambda folder: (folder / HOOKS).unlink())),
    "a hook's tensor more": ("names", tensors(HOOKS, more("Mean.x"))),
    "a hook's tensor of another shape": ("hooks", tensors(HOOKS, one("Mean.total", lambda t: torch.zeros(4)))),
    "a hook's tensor at 2^62": ("shape", header(lambda text: text.replace(b"[0]", b"[4611686018427387904]", 1), HOOKS)),
    "a bool that is 2": ("bool", tensors(HOOKS, more("Mean.big", torch.tensor([0, 2, 1]).byte().view(torch.bool)))),
}
MEANING = [*each(_VALUES), *named(_TENSORS)]

NAMES = ("../outside/{}", "/tmp/{}", "a/{}", "a\\{}", "", ".", "..", ".{}", "-{}", "{}\0", "{}\n", "{}.pt", "{}" * 200)
NAMES += (MANIFEST, "model-\u0660\u0661\u0662\u0663\u0664.safetensors", "model.safetensors")
"""Of files in a manifest; {} is a good one."""
_INSTEAD = {
    "a link": ("file", lambda path, outside: path.symlink_to(outside / path.name)),
    "a link to nothing": ("file", lambda path, outside: path.symlink_to("nothing")),
    "a FIFO": ("file", lambda path, outside: os.mkfifo(path)),
    "a socket": ("file", lambda path, outside: os.mknod(path, stat.S_IFSOCK | 0o666)),
    "a device": ("file", lambda path, outside: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))),
    "a folder": ("file", lambda path, outside: path.mkdir()),
    "nothing": ("missing", lambda path, outside: None),
}
INSTEAD = named(_INSTEAD)
"""What may be in the place of a file; ``outside`` is a folder with a good one of that name."""


def many(count, entry, around=b"{%b}"):
    """JSON with many entries."""
    return around % b",".join(entry % i for i in range(count))


def as_header(text):
    return len(text).to_bytes(8, "little") + text


def bomb(name, data):
    return raw(name, lambda _: data())


def sparse(folder):
    os.truncate(folder / MODEL, 1 << 40)
    put(MANIFEST, ("files", MODEL, "size"), 1 << 40)(folder)


NO_TENSOR = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
NO_FILE = b'"model-%05d.safetensors":{"size":0,"sha256":"' + b"0" * 64 + b'"}'
NO_FILES = (
    b'{"format":"scaletrain-checkpoint","version":1,"step":5,"world_size":1,"files":{"state.json":{"size":0,"sha256":"'
)
NO_FILES += b"0" * 64 + b'"},%b}}'
BOMBS = {
    "a header of 100 MB": ("header", bomb(MODEL, lambda: as_header(b"{" + b" " * 10**8 + b"}"))),
    "a header longer than its file": ("header", claims(10**8)),
    "a million tensors": ("header", bomb(MODEL, lambda: as_header(many(10**6, NO_TENSOR)))),
    "as many tensors as fit": ("json", bomb(MODEL, lambda: as_header(many(250_000, NO_TENSOR)))),
    "brackets alone": ("json", bomb(STATE, lambda: b"[" * FULL)),
    "empty lists": ("json", bomb(STATE, lambda: b"[" + b"[]," * (FULL // 3 - 1) + b"0]")),
    "many numbers": ("state", bomb(STATE, lambda: many(490_000, b'"%x":12345', b"[{%b}]"))),
    "a long text": ("state", bomb(STATE, lambda: b'["' + b"a" * (FULL - 4) + b'"]')),
    "a long text of wide letters": ("state", bomb(STATE, lambda: '["\U0001f600'.encode() + b"a" * (FULL - 8) + b'"]')),
    "a text without end": ("json", bomb(STATE, lambda: b'["' + b'\\"' * (FULL // 2 - 1))),
    "an integer of 16 million digits": ("json", bomb(STATE, lambda: b"1" * FULL)),
    "a fraction of 16 million digits": ("state", bomb(STATE, lambda: b"[0." + b"1" * (FULL - 4) + b"]")),
    "a manifest of 17 MB": ("size", bomb(MANIFEST, lambda: b" " * (FULL + 1))),
    "a manifest of 90,000 files": ("size", bomb(MANIFEST, lambda: many(90_000, NO_FILE, NO_FILES))),
    "a sparse file of 1 TiB": ("sparse", sparse),
}
