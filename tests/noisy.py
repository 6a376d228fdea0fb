"""A small recipe in which everything that could be lost in a kill matters, and a record of every step's bits.

Dropout, BatchNorm, augmentation, momentum, a schedule, a hook with a state of its own. ``Record`` appends a digest of
weights, buffers, optimizer and examples after each step, so that two runs can be compared step by step.
"""

import ctypes
import hashlib
import json
import os
import resource
import signal
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from torch import nn

from scaletrain import Config, Recipe, build, constant, cosine, one_cycle, opening, step_decay, warmup_cosine
from scaletrain.agreement import Wishes
from scaletrain.checkpoint.export import named_tensors
from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.tensors import is_sharded, local_part
from scaletrain.optimizer_state import saved_state

SCHEDULES = {f.__name__: f for f in (constant, cosine, one_cycle, step_decay, warmup_cosine)}
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "1",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""What ``accelerate launch`` exports for FSDP2, each layer gathered on its own."""
OPTIMIZERS = {
    "sgd": lambda p, cfg: torch.optim.SGD(p, lr=cfg.lr, momentum=0.9),
    "adamw": lambda p, cfg: torch.optim.AdamW(p, lr=cfg.lr, fused=True),
    "amsgrad": lambda p, cfg: torch.optim.Adam(p, lr=cfg.lr, amsgrad=True),
}


@dataclass(frozen=True, kw_only=True)
class NoisyConfig(Config):
    batch_size: int = 24
    lr: float = 1e-2
    threads: int | None = 1
    optimizer: str = "adamw"
    schedule: str = "warmup_cosine"
    record: str = ""
    """Folder for the digests; none are made without."""
    plain: bool = False
    """Nothing random and no BatchNorm: the curve depends on the order of summation alone. In float64."""
    fsdp: bool = False
    """Divide the model over the processes with FSDP2."""
    leave_at: int = 0
    """Step after which the process gets a SIGTERM."""
    moment: str = ""
    """Where in the run rank 1 gets a SIGTERM; a key of MOMENTS."""
    hungry: str = ""
    """Phase in which rank 1 needs more memory than it may have, from its sixth step on."""
    stuck: str = ""
    """What befalls rank 1 in its third step; a key of MISHAPS."""
    slow_disk: float = 0.0
    """Seconds that each write of a checkpoint takes longer."""


def model(cfg, data):
    at("before step 0", cfg)
    if cfg.plain:
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))


def augment(batch, cfg):
    return batch if cfg.plain else batch | {"x": batch["x"] + 0.1 * torch.randn_like(batch["x"])}


def shard_where_asked():
    """Let ``start`` divide the model with FSDP2 where the config says so, as the launcher's variables do."""
    assemble = build.assemble

    def assemble_as_asked(recipe, cfg, **options):
        os.environ.update(SHARDED | {"ACCELERATE_USE_FSDP": str(cfg.fsdp).lower()})
        return assemble(recipe, cfg, **options)

    build.assemble = assemble_as_asked


HUNGRY = ("forward", "backward", "optimizer", "validation", "saving")
MEBIBYTE = 1 << 20


def eat(phase, cfg):
    """Ask for 2 GiB where only half a GiB more may be had; on rank 1, if this is the phase, and not before its time."""
    if cfg.hungry == phase and os.environ.get("RANK", "1") == "1" and _passed.get("steps", 0) >= 6:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 512 * MEBIBYTE
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        torch.empty(2048 * MEBIBYTE, dtype=torch.uint8)


class HungryBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, cfg):
        ctx.cfg = cfg
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        eat("backward", ctx.cfg)
        return gradient, None


def _raise():
    raise ValueError("something is wrong on this rank")


def _hold_the_interpreter():
    """Sleep in C without letting any other thread of the process run Python."""
    ctypes.PyDLL(None).sleep(600)


MISHAPS = {
    "raise": _raise,
    "async exception": lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(threading.main_thread().ident), ctypes.py_object(ZeroDivisionError)
    ),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(0),
    "interpreter held": _hold_the_interpreter,
    "sleep": lambda: time.sleep(600),
}
"""What may befall a rank in the midst of its forward pass."""


def befall(cfg):
    if cfg.stuck and os.environ.get("RANK", "1") == "1" and _passed.get("steps", 0) == 3 and cfg.stuck not in _told:
        _told.add(cfg.stuck)
        MISHAPS[cfg.stuck]()


MOMENTS = ("loading data", "before step 0", "accumulating", "collective", "validating", "saving", "after the last step")
_told = set()
_passed = {}


def forget_moments(after=0):
    """Let this process get its signal once more, ``after`` so many times that the moment comes."""
    _told.clear()
    _passed["left"] = after


def at(moment, cfg):
    """Send this process a SIGTERM, once, if this is the moment and it is rank 1."""
    if cfg.moment == moment and os.environ.get("RANK", "1") == "1" and moment not in _told:
        if _passed.get("left", 0):
            _passed["left"] -= 1
            return
        _told.add(moment)
        os.kill(os.getpid(), signal.SIGTERM)


def data(cfg):
    at("loading data", cfg)
    return tiny.data(cfg)


def loss(model, batch, cfg):
    _passed["steps"] = _passed.get("steps", 0) + 1
    at("accumulating", cfg)
    eat("forward", cfg)
    befall(cfg)
    found = tiny.loss(model, batch, cfg)
    return HungryBackward.apply(found, cfg) if cfg.hungry == "backward" else found


def evaluate(model, batch, cfg):
    at("validating", cfg)
    eat("validation", cfg)
    return tiny.evaluate(model, batch, cfg)


class Moments:
    """Gets the signal sent in the midst of what no recipe's function sees."""

    def __init__(self, cfg):
        self.cfg = cfg
        write, send = Files.write, Wishes.send

        def slow_write(files, descriptor, content):
            at("saving", cfg)
            time.sleep(cfg.slow_disk)
            return write(files, descriptor, content)

        def late_send(wishes, mine):
            if cfg.moment == "collective":
                threading.Timer(0.002, at, ("collective", cfg)).start()
            send(wishes, mine)

        Files.write, Wishes.send = slow_write, late_send

    def state_dict(self):
        eat("saving", self.cfg)
        return {}

    def load_state_dict(self, state):
        pass

    def __call__(self, run, info):
        if info.step == 1:
            run.optimizer.register_step_pre_hook(lambda *_: eat("optimizer", self.cfg))
        if info.step == run.total_steps:
            at("after the last step", self.cfg)


def leave_at(step):
    def leave(run, info):
        if info.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return leave


class Average:
    """A hook with a state: a running average of the first layer's weights, and a count."""

    def __init__(self):
        self.average, self.count, self.notes = None, 0, []

    def __call__(self, run, info):
        weight = run.module.state_dict()["0.weight"].detach()
        weight = (weight.full_tensor() if is_sharded(weight) else weight).float()
        self.average = weight.clone() if self.average is None else self.average.lerp(weight, 0.1)
        self.count += 1
        self.notes = [*self.notes, info.step][-3:]

    def state_dict(self):
        return {"average": self.average, "count": self.count, "notes": {"last": self.notes}}

    def load_state_dict(self, state):
        self.average, self.count, self.notes = state["average"], state["count"], state["notes"]["last"]


class Record:
    """Append {step, digest} after each step, at once: a SIGKILL must not lose what was done."""

    def __init__(self, folder):
        name = f"rank{os.environ.get('RANK', 0)}.jsonl"
        self.file = os.open(Path(folder) / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, run, info):
        line = {"step": info.step, "digest": digest(run), "loss": float(info.loss).hex()}
        os.write(self.file, json.dumps(line).encode() + b"\n")


def digest(run):
    """A hash of all that makes up the run on this rank."""
    found = hashlib.sha256()
    for tensor in run.module.state_dict().values():
        found.update(local_part(tensor).contiguous().numpy().tobytes())
    for state in run.optimizer.state.values():
        for value in state.values():
            value = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            found.update(local_part(value).contiguous().numpy().tobytes())
    for tensor in run.ema.tensors.values() if run.ema else ():
        found.update(local_part(tensor).contiguous().numpy().tobytes())
    for hook in run.hooks:
        if isinstance(hook, Average):
            found.update(hook.average.numpy().tobytes() + str((hook.count, hook.notes)).encode())
    return found.hexdigest()[:16]


def of_tensors(model, optimizer):
    """A hash of whole tensors by name, however they are divided. Every rank must reach this line."""
    found = hashlib.sha256()
    for part in (model, optimizer):
        for name in sorted(part):
            whole = (part[name].full_tensor() if is_sharded(part[name]) else part[name]).detach()
            found.update(f"{name} {tuple(whole.shape)} {whole.dtype}".encode() + whole.contiguous().numpy().tobytes())
    return found.hexdigest()


def tell_what_was_loaded():
    """Let every rank write, as soon as a checkpoint is restored, what it then has: ``loaded-STEP`` in the record."""
    restore = opening.restore

    def restore_and_tell(run, checkpoint):
        restore(run, checkpoint)
        if run.cfg.record:
            optimizer, _ = saved_state(run.module, run.optimizer, run.built)
            with (Path(run.cfg.record) / f"loaded-{run.state.step}").open("a") as file:
                file.write(f"{run.devices.world_size} {of_tensors(named_tensors(run.module), optimizer)}\n")

    opening.restore = restore_and_tell


def hooks(cfg):
    return [
        Average(),
        Moments(cfg),
        *([Record(cfg.record)] if cfg.record else []),
        *([leave_at(cfg.leave_at)] if cfg.leave_at else []),
    ]


def recorded(folder):
    """What the ranks recorded: (rank, step) -> set of digests; more than one means that bits differed."""
    found = defaultdict(set)
    for path in Path(folder).glob("rank*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found[path.stem, record["step"]].add((record["digest"], record["loss"]))
    return found


def losses(folder):
    """The loss of each step over all ranks; a rank records its share of it."""
    found = defaultdict(float)
    for (_, step), bits in recorded(folder).items():
        ((_, loss),) = bits
        found[step] += float.fromhex(loss)
    return dict(found)


recipe = Recipe(
    config=NoisyConfig,
    data=data,
    model=model,
    loss=loss,
    evaluate=evaluate,
    optimizer=lambda model, cfg: OPTIMIZERS[cfg.optimizer](model.parameters(), cfg),
    schedule=lambda step, total, cfg: SCHEDULES[cfg.schedule](step, total, cfg),
    augment=augment,
    hooks=hooks,
)
