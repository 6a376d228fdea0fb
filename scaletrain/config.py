"""What a run can be told, and how the command line tells it."""

import contextlib
import difflib
import io
import math
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Literal, TypeVar

from scaletrain.errors import InputError

NOT_LEARNED_FROM = (
    "out", "resume", "checkpoint_every", "checkpoint_minutes", "keep_last", "keep_every",
    "threads", "workers", "track", "log_every", "stuck_minutes", "compile", "compile_blocks",
    "activation_checkpointing",
)  # fmt: skip
"""Options that say where and how a run works, not what is learned."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options every recipe has. A recipe inherits it to add its own and to change defaults."""

    lr: float = 1e-3
    """Learning rate of the optimizer; the schedule multiplies it."""
    weight_decay: float = 1e-4
    """Weight decay of the optimizer: of AdamW and Muon decoupled; never on biases, norms and embeddings."""
    epochs: float = 20
    """Passes over the training examples; may be a fraction."""
    max_steps: int | None = None
    """Optimizer steps in all; replaces epochs."""
    batch_size: int = 64
    """Examples per optimizer step over all devices together."""
    micro_batch_size: int | None = None
    """Most examples per forward pass on a device, in validation twice that; for memory only. Default: the share."""
    max_grad_norm: float | None = None
    """Scale the gradient down to this global L2 norm when it is longer."""
    max_grad_value: float | None = None
    """Cut each element of the gradient off at plus and minus this."""
    ema: float | None = None
    """Decay per step of a moving average of the weights, as 0.999; it is validated and exported in their place."""
    warmup: float = 0.05
    """Share of all steps over which a warmup schedule raises the rate from near 0."""
    seed: int = 0
    """Of the weights, the order of the examples, dropout and augmentation."""
    split_seed: int | None = 0
    """Of the split into training and validation examples. None holds nothing out."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the forward pass. auto: bf16 or fp16 on CUDA GPUs, fp32 elsewhere."""
    compile: bool = False
    """Compile the model with torch.compile. Where it is sharded: its blocks."""
    compile_blocks: bool = False
    """Compile each block of the model (its nn.ModuleList) alone, which takes a fraction of the time."""
    activation_checkpointing: bool = False
    """Compute the blocks of the model (its nn.ModuleList) again in the backward pass instead of keeping them."""
    threads: int | None = None
    """CPU threads per process. Default: the cores shared among the processes of this machine."""
    workers: int | None = None
    """Processes that read examples, per training process. Default: by the time a batch takes; 0 for data in memory."""
    skip_bad: int = 0
    """Different training examples in all that others may replace because they cannot be read; what other processes
    met counts from the next checkpoint on. 0: the first ends the run."""
    out: str | None = None
    """Folder of the run. Default: SCALETRAIN_OUT, else runs/NAME/TIME."""
    resume: str = "auto"
    """auto: go on where the folder's newest checkpoint stands. never, or another run's folder or checkpoint."""
    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints. Default: checkpoint_minutes alone decides."""
    checkpoint_minutes: float = 10
    """Minutes between checkpoints, by rank 0's clock."""
    keep_last: int = 2
    """Newest checkpoints to keep; the best one stays besides."""
    keep_every: int | None = None
    """Keep the checkpoints of steps divisible by this for ever."""
    log_every: int = 10
    """Optimizer steps between log lines."""
    validate_every: int | None = None
    """Optimizer steps between validations. Default: at the end of each epoch."""
    monitor: str = "val_loss"
    """Validation metric that decides what is best; lower is better, or say max:val_accuracy."""
    patience: int | None = None
    """Stop after this many validations in a row without a better monitored metric."""
    stuck_minutes: float | None = 10
    """End the run when no process has got any further for so long; None never does. The first step may take longer."""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """Also send metrics to a tracker; wandb works offline without a key."""

    def check(self) -> None:
        """Raise InputError for a value that cannot work. A recipe's own config may extend it."""
        for name in ("lr", "epochs", "max_grad_norm", "max_grad_value", "checkpoint_minutes", "stuck_minutes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"--{_dashed(name)} is {value}; it must be a finite number above 0")
        for name in (
            "max_steps",
            "batch_size",
            "micro_batch_size",
            "threads",
            "checkpoint_every",
            "keep_last",
            "keep_every",
            "log_every",
            "validate_every",
            "patience",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{_dashed(name)} is {value}; it must be at least 1")
        for name in ("weight_decay", "workers", "skip_bad", "seed", "split_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**63:
                raise InputError(f"--{_dashed(name)} is {value}; it must be at least 0 and below 2**63")
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal and getattr(self, name) not in typing.get_args(hint):
                raise InputError(f"--{_dashed(name)} {getattr(self, name)}: expected {_allowed(type(self), name)}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"--ema is {self.ema}; it is a decay between 0 and 1, as 0.999")
        if self.max_grad_norm is not None and self.max_grad_value is not None:
            raise InputError("--max-grad-norm and --max-grad-value both clip the gradient; say None for one of them")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"--warmup is {self.warmup}; it is a share of all steps, from 0 to 1")
        if not self.monitored_metric:
            raise InputError(f"--monitor is '{self.monitor}'; name a metric, as in val_loss or max:val_accuracy")

    @property
    def monitored_metric(self) -> str:
        """The name in ``monitor``, without its direction."""
        return self.monitor.removeprefix("max:").removeprefix("min:")

    @property
    def higher_is_better(self) -> bool:
        """Whether ``monitor`` asks for the highest value rather than the lowest."""
        return self.monitor.startswith("max:")


C = TypeVar("C", bound=Config)


def parse(config: type[C], argv: Sequence[str] | None = None, *, description: str = "") -> C:
    """Build ``config`` from the command line (``sys.argv`` without ``argv``).

    The only place that knows tyro. ``--help`` prints and exits; a mistake raises InputError with one line
    that says what was given and what is allowed.
    """
    import tyro

    args = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(args):
        tyro.cli(config, args=["--help"], description=description, console_outputs=is_first_process())
    cfg = _try(config, args)
    if cfg is None:
        raise InputError(_mistake(config, args))
    cfg.check()
    return cfg


def is_first_process() -> bool:
    """Whether this process is rank 0, read from the launcher's variables before any process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def _try(config: type[C], args: list[str]) -> C | None:
    """Parse ``args``; None where tyro refuses them, without its own words."""
    import tyro

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # console_outputs=False does not silence wrong values
            return tyro.cli(config, args=args, console_outputs=False)
    except SystemExit:
        return None


def _mistake(config: type[Config], args: list[str]) -> str:
    """Say in one line which argument of ``args`` is wrong, by parsing them option by option."""
    options = {f.name for f in fields(config)}
    groups = _by_option(args)
    required = {f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING}
    for name in sorted(required - {_name(group[0]) for group in groups}):
        return f"--{_dashed(name)} is missing; it has no default"
    needed = [arg for group in groups if _name(group[0]) in required for arg in group]
    for group in groups:
        flag, name = group[0].split("=")[0], _name(group[0])
        if not flag.startswith("--"):
            return f"'{group[0]}' is not an option; options look like --batch-size 128 (all of them: --help)"
        if name.removeprefix("no_") not in options and name not in options:
            near = sorted(option for option in options if option.startswith(name))
            near = near or difflib.get_close_matches(name, options, n=1, cutoff=0.5)
            hint = f"did you mean --{_dashed(near[0])}?" if near else "see --help for all options"
            return f"unknown option {flag}; {hint}"
        if _try(config, [*needed, *group]) is None:
            given = " ".join([*group[0].split("=", maxsplit=1)[1:], *group[1:]])
            return f"{flag} {given or '(nothing)'}: expected {_allowed(config, name.removeprefix('no_'))}"
    return f"cannot understand '{' '.join(args)}'; see --help"


def _name(arg: str) -> str:
    """The field that an argument such as ``--batch-size=3`` names."""
    return arg.split("=")[0].removeprefix("--").replace("-", "_")


def _by_option(args: list[str]) -> list[list[str]]:
    """Group arguments: each option with the values that follow it."""
    groups: list[list[str]] = []
    for arg in args:
        if arg.startswith("--") or not groups:
            groups.append([arg])
        else:
            groups[-1].append(arg)
    return groups


def _allowed(config: type[Config], name: str) -> str:
    """Describe in words the values that option ``name`` takes."""
    hint = typing.get_type_hints(config)[name]
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, kinds))
    if hint is bool:
        return f"no value; say --{_dashed(name)} or --no-{_dashed(name)}"
    words = {float: "a number", int: "a whole number", str: "one text"}
    named = [words.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds]
    return " or ".join(named if type(None) not in typing.get_args(hint) else [*named, "None"])


def _dashed(name: str) -> str:
    return name.replace("_", "-")
