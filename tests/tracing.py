"""What programs do to the files below a folder, as the kernel sees it: through strace."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from crashes import Operation

CALLS = (
    "open,openat,creat,write,pwrite64,writev,lseek,truncate,ftruncate,fsync,fdatasync,mkdir,mkdirat,"
    "rename,renameat,renameat2,unlink,unlinkat,rmdir"
)
WHOLE = re.compile(r"(\w+)\((.*)\) += (-?\d+)")
TEXT = re.compile(r'"([^"]*)"')
DESCRIPTOR = re.compile(r"(AT_FDCWD|\d+)<([^>]*)>")
PROMISES = "promises"
"""A file to which a program writes the step that must be found from there on."""


class Call(NamedTuple):
    """An operation on the disk, under way between the lines ``begun`` and ``ended`` of the trace."""

    operation: Operation
    begun: int
    ended: int


def why_not():
    """Say why nothing can be traced here; empty where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed; on Debian: apt-get install strace"
    tried = subprocess.run(["strace", "-f", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return f"strace may not trace here: {tried.stderr.strip()}" if tried.returncode else ""


def start(trace, *command, **env):
    """Start a command whose system calls go to the file ``trace``."""
    strace = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-y",
        "-xx",
        "-s",
        "1000000",
        "-e",
        "signal=none",
        "-e",
        f"trace={CALLS}",
    ]
    words = [*strace, "-o", str(trace), *map(str, command)]
    return subprocess.Popen(words, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def calls(trace, root):
    """Return what was done below ``root``, in order, and the promises where they were made."""
    reader = _Reader(str(root))
    return [
        Call(operation, begun, ended)
        for begun, ended, line in _whole_lines(trace.read_text().splitlines())
        if (match := WHOLE.match(line)) and int(match[3]) >= 0
        for operation in reader.operations(match[1], match[2], int(match[3]))
    ]


def _whole_lines(lines) -> Iterator[tuple[int, int, str]]:
    """Join the calls that were interrupted by another process's."""
    pending = {}
    for number, line in enumerate(lines):
        process, said = line.split(maxsplit=1)
        if said.endswith("<unfinished ...>"):
            pending[process] = (number, said.removesuffix("<unfinished ...>").rstrip())
        elif said.startswith("<... "):
            begun, first = pending.pop(process)
            yield begun, number, first + said.partition(" resumed>")[2]
        else:
            yield number, number, said


class _Reader:
    """Turns system calls into operations; knows which files there are and where each descriptor writes next.

    Of the latter it knows only as long as one process writes.
    """

    def __init__(self, root):
        self.root = root
        self.files = set()
        self.at = {}

    def operations(self, name, words, result) -> Iterator[Operation]:
        texts = [_bytes(text) for text in TEXT.findall(words)]
        opened = [(descriptor, os.fsdecode(_bytes(path))) for descriptor, path in DESCRIPTOR.findall(words)]
        if name in ("write", "writev", "pwrite64", "lseek", "ftruncate", "fsync", "fdatasync"):
            if opened:
                yield from self._on_file(name, *opened[0], b"".join(texts), words, result)
            return
        folders = [folder for _, folder in opened] or ["/"] * len(texts)
        paths = [os.path.join(folder, os.fsdecode(text)) for folder, text in zip(folders, texts, strict=False)]  # noqa: PTH118
        short = [os.path.relpath(path, self.root) for path in paths]
        if not short or short[0] in (".", PROMISES) or short[0].startswith(".."):
            return
        if name in ("open", "openat", "creat"):
            self.at[str(result)] = 0
            if short[0] not in self.files and ("O_CREAT" in words or name == "creat"):
                self.files.add(short[0])
                yield Operation("create", short[0])
            elif "O_TRUNC" in words or name == "creat":
                yield Operation("truncate", short[0])
        elif name.startswith("rename"):
            if short[0] in self.files:
                self.files.add(short[1])
            self.files.discard(short[0])
            yield Operation("rename", short[0], short[1])
        elif name.startswith("mkdir"):
            yield Operation("mkdir", short[0])
        else:
            self.files.discard(short[0])
            yield Operation("rmdir" if name == "rmdir" or "AT_REMOVEDIR" in words else "unlink", short[0])

    def _on_file(self, name, descriptor, path, data, words, result) -> Iterator[Operation]:
        short = os.path.relpath(path, self.root)
        if short.startswith(".."):
            return
        if short == PROMISES:
            if name == "write":
                yield Operation("promise", at=int(data))
        elif name.endswith("sync"):
            yield Operation("sync", short)
        elif name == "ftruncate":
            yield Operation("truncate", short, at=int(words.rpartition(", ")[2]))
        elif name == "lseek":
            self.at[descriptor] = result
        elif name == "pwrite64":
            yield Operation("write", short, data=data[:result], at=int(words.rpartition(", ")[2]))
        else:
            at = self.at.get(descriptor, 0)
            self.at[descriptor] = at + result
            yield Operation("write", short, data=data[:result], at=at)


def _bytes(escaped):
    """Undo strace's hexadecimal."""
    return b"".join(
        bytes.fromhex(part.replace("\\x", "")) if part.startswith("\\x") else part.encode()
        for part in re.findall(r"(?:\\x[0-9a-f]{2})+|[^\\]+", escaped)
    )
