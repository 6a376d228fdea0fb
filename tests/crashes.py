"""Every state that a crash may leave on a disk, under the weakest reading of POSIX.

Of what was written to a file since its last fsync, a crash may leave all, a part, zeros, garbage or nothing. Of the
names made and removed in a folder since its last fsync, each may have changed or not, whatever became of the others;
a rename is two such changes, so that either name may be left, both or none. What a file system really does is one of
these states. The idea is that of LevelDB's fault injection and of ALICE (Pillai et al., OSDI 2014).
"""

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

from scaletrain.checkpoint.files import Files

Tree = dict[str, bytes | None]
"""What a crash left: by path the content of each file, None for a folder."""
Found = tuple[int, dict[str, bytes]] | None
"""What a reader makes of it: the newest step that it takes for whole, and its content."""


class Operation(NamedTuple):
    """A change of the disk or a sync; or a promise: what must be found from here on."""

    kind: str
    """mkdir create write truncate rename unlink rmdir sync rot promise."""
    path: str = ""
    other: str = ""
    """Where a rename leads."""
    data: bytes = b""
    at: int = 0
    """First byte of a write, size after a truncate, the step that must be found or a newer one."""
    keeps: frozenset[int] = frozenset()
    """Steps that must be whole."""
    nanoseconds: int = 0
    """When it was done, by the clock that all processes share."""


class Watched(Files):
    """The real system calls, with ``before`` and ``after`` around each."""

    def before(self, kind, arguments): ...

    def after(self, kind, arguments, result): ...


def _watch(kind):
    def call(self, *arguments):
        self.before(kind, arguments)
        result = getattr(Files, kind)(self, *arguments)
        self.after(kind, arguments, result)
        return result

    return call


OPERATIONS = tuple(name for name in vars(Files) if not name.startswith("_"))
for _kind in OPERATIONS:
    setattr(Watched, _kind, _watch(_kind))


class Recorder(Watched):
    """Does the real thing below ``root`` and writes down what it did."""

    def __init__(self, root):
        self.root = root
        self.log: list[Operation] = []
        self._open: dict[int, tuple[Path, int]] = {}

    def after(self, kind, arguments, result):
        match kind, arguments:
            case "create", (path,):
                self._open[result] = (path, 0)
                self.note("create", path)
            case "write", (descriptor, data):
                path, at = self._open[descriptor]
                self._open[descriptor] = (path, at + result)
                self.note("write", path, data=bytes(data[:result]), at=at)
            case "fsync", (descriptor,):
                self.note("sync", self._open[descriptor][0])
            case (("fsync_folder" | "fsync_file"), (path,)):
                self.note("sync", path)
            case "rename", (source, target):
                self.note("rename", source, other=self._short(target))
            case (("mkdir" | "unlink" | "rmdir"), (path,)):
                self.note(kind, path)

    def note(self, kind, path, **what):
        if Path(path).resolve().is_relative_to(self.root):
            self.log.append(Operation(kind, self._short(path), **what, nanoseconds=time.monotonic_ns()))

    def promise(self, at, keeps=frozenset()):
        self.log.append(Operation("promise", at=at, keeps=frozenset(keeps), nanoseconds=time.monotonic_ns()))

    def append(self, path, data):
        """Write as the rest of a run does, which syncs nothing."""
        if not path.exists():
            self.close(self.create(path))
        size = path.stat().st_size
        with path.open("ab") as file:
            file.write(data)
        self.note("write", path, data=data, at=size)

    def damage(self, path):
        """Let a bit rot: what is on the disk itself changes."""
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        self.note("rot", path, data=bytes(content))

    def _short(self, path):
        return os.path.relpath(Path(path).resolve(), self.root)


@dataclass(eq=False)
class File:
    content: bytes = b""
    durable: bytes = b""
    untouched: int = 0
    """Leading bytes that have not changed since the last sync."""

    def write(self, at, data):
        self.untouched = min(self.untouched, at)
        before = self.content.ljust(at, b"\0")
        self.content = before[:at] + data + before[at + len(data) :]

    def truncate(self, size):
        self.untouched = min(self.untouched, size)
        self.content = self.content[:size].ljust(size, b"\0")

    def rot(self, data):
        self.content = self.durable = data

    def sync(self):
        self.durable, self.untouched = self.content, len(self.content)

    def may_hold(self):
        """What a crash may leave of it; first what is durable."""
        if self.content == self.durable:
            return [self.content]
        safe, rest = self.content[: self.untouched], self.content[self.untouched :]
        half, garbage = len(rest) // 2, bytes(byte ^ 0xA5 for byte in rest)
        torn = [b"", rest[:half], rest[:half] + bytes(len(rest) - half), bytes(len(rest)), garbage]
        return list(dict.fromkeys([self.durable, *(safe + part for part in torn), self.content]))


@dataclass(eq=False)
class Folder:
    names: dict[str, list["File | Folder | None"]] = field(default_factory=dict)
    """By name: what a crash may leave it to mean, None for absent; last what it means now."""

    def set(self, name, node):
        self.names.setdefault(name, [None]).append(node)

    def sync(self):
        self.names = {name: [may_be[-1]] for name, may_be in self.names.items() if may_be[-1] is not None}

    def may_hold(self):
        return {name: list(dict.fromkeys(may_be)) for name, may_be in self.names.items()}


class Disk:
    """A disk below one durable folder, to which operations are applied one by one."""

    def __init__(self):
        self.root = Folder()

    def apply(self, operation):
        kind, path = operation.kind, operation.path
        match kind:
            case "mkdir" | "create":
                self._set(path, Folder() if kind == "mkdir" else File())
            case "unlink" | "rmdir":
                self._set(path, None)
            case "rename":
                self._set(operation.other, self._node(path))
                self._set(path, None)
            case "write":
                self._node(path).write(operation.at, operation.data)
            case "truncate":
                self._node(path).truncate(operation.at)
            case "rot":
                self._node(path).rot(operation.data)
            case "sync":
                self._node(path).sync()

    def settle(self):
        """Let the system have written everything back."""
        self.root = _settled(self.root)

    def now(self) -> Tree:
        """What every process sees as long as the machine runs."""
        return dict(_as_it_is("", self.root))

    def states(self, choose=list) -> Iterator[Tree]:
        """Yield what a crash at this point may leave; ``choose`` narrows the options of each file and name."""
        return _expand([("", self.root)], {}, {}, choose)

    def some_states(self, limit, random) -> Iterable[Tree]:
        """All states, or where they are more than ``limit``: all, nothing and random choices of what was done."""
        found = list(islice(self.states(), limit and limit + 1))
        if limit is None or len(found) <= limit:
            return found
        choices = [lambda options: options[:1], *[lambda options: [random.choice(options)]] * (limit - 2)]
        return [self.now(), *(next(self.states(choose)) for choose in choices)]

    def _node(self, path):
        node = self.root
        for name in Path(path).parts:
            node = node.names[name][-1]
        return node

    def _set(self, path, node):
        self._node(Path(path).parent).set(Path(path).name, node)


def _as_it_is(path, node):
    yield path, node.content if isinstance(node, File) else None
    for name, may_be in node.names.items() if isinstance(node, Folder) else ():
        if may_be[-1] is not None:
            yield from _as_it_is(f"{path}/{name}".lstrip("/"), may_be[-1])


def _settled(node):
    node.sync()
    if isinstance(node, Folder):
        for (child,) in node.names.values():
            _settled(child)
    return node


def _expand(pending, chosen, tree, choose):
    """Yield the trees that the ``pending`` nodes may come to, with what was already ``chosen`` for some."""
    if not pending:
        yield tree
        return
    (path, node), *rest = pending
    if node in chosen:  # found under two names: what it holds is the same
        options = [chosen[node]]
    elif isinstance(node, File):
        options = choose(node.may_hold())
    else:
        may_hold = node.may_hold()
        options = (dict(zip(may_hold, found, strict=True)) for found in product(*map(choose, may_hold.values())))
    for option in options:
        if isinstance(node, File):
            yield from _expand(rest, {**chosen, node: option}, {**tree, path: option}, choose)
        else:
            below = [(f"{path}/{name}".lstrip("/"), child) for name, child in option.items() if child is not None]
            yield from _expand(rest + below, {**chosen, node: option}, {**tree, path: None}, choose)


def materialize(tree: Tree, folder: Path) -> None:
    """Make ``folder`` hold exactly ``tree``."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


@contextmanager
def in_memory():
    """A folder in memory where there is one: thousands of small files cost little there."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@dataclass
class Survey:
    """What readers made of crash states."""

    states: int = 0
    """Different trees that were looked at."""
    cases: int = 0
    """Trees at points of the log: the same tree may be fine early and a loss later."""
    problems: Counter[str] = field(default_factory=Counter)
    """In how many cases something was wrong, by kind: nothing, lost, torn, error, and what ``also`` says."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each kind, in words."""


def survey(
    log: list[Operation],
    look: Callable[[Path], Found],
    saved: dict[int, dict[str, bytes]],
    folder: Path,
    crash: Callable[[Disk], Iterable[Tree]],
    *,
    settle: bool = False,
    since: int = 0,
    until_first: bool = False,
    also: Callable[[Tree, Operation], str] = lambda tree, promise: "",
) -> Survey:
    """Crash before and after each operation of ``log``, and judge what ``look`` makes of what is left.

    ``saved`` is what each step must hold; ``crash`` says what may be left of a disk; with ``settle`` all that was
    done before a promise is. ``also`` judges a tree itself. Nobody looks before ``since`` operations are done, or
    after a problem with ``until_first``.
    """
    result, disk, looks, promise = Survey(), Disk(), {}, Operation("promise", at=-1)
    for done, operation in enumerate([promise, *log]):
        disk.apply(operation)
        if operation.kind == "promise":
            promise = operation
            if settle:
                disk.settle()
        for tree in crash(disk) if done >= since else ():
            key = frozenset(tree.items())
            if key not in looks:
                materialize(tree, folder)
                looks[key] = _attempt(look, folder)
            result.cases += 1
            if problem := _judge(looks[key], promise, saved) or also(tree, promise):
                result.problems[problem] += 1
                left = {path: len(content) for path, content in tree.items() if content is not None}
                example = f"after {done} operations, the last {operation[:3]}: {left} was taken for {looks[key]!r:.300}"
                result.examples.setdefault(problem, example)
        if until_first and result.problems:
            break
    result.states = len(looks)
    return result


def contents(log: list[Operation], look: Callable[[Path], Found], folder: Path) -> dict[int, dict[str, bytes]]:
    """Return by step what ``look`` finds where the step is promised first, nothing having crashed."""
    disk, saved = Disk(), {}
    for operation in log:
        disk.apply(operation)
        if operation.kind == "promise" and operation.at >= 0 and operation.at not in saved:
            materialize(disk.now(), folder)
            step, saved[operation.at] = look(folder)
            assert step == operation.at
    return saved


def read_tree(folder: Path) -> Tree:
    """Return what is below ``folder``."""
    there = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {"": None} | {name: path.read_bytes() if path.is_file() else None for name, path in there.items()}


def replay(log: Iterable[Operation]) -> Disk:
    """Return a disk after ``log``."""
    disk = Disk()
    for operation in log:
        disk.apply(operation)
    return disk


def _attempt(look, folder):
    try:
        return look(folder)
    except Exception as error:  # whatever a reader says of a damaged file
        return error


def _judge(found, promise, saved):
    """Say what is wrong with what was ``found``, if anything is."""
    if found is None or isinstance(found, Exception):
        return "nothing" if promise.at >= 0 else "error" if found is not None else ""
    step, content = found
    return "lost" if step < promise.at else "torn" if content != saved.get(step) else ""
