"""From a recipe's data to what one process reads: training in steps, the held-out splits once each."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from scaletrain.agreement import first_then_others, gather_texts
from scaletrain.config import Config
from scaletrain.content import fingerprint
from scaletrain.data import Data, count, is_stream
from scaletrain.devices import Devices
from scaletrain.division import shared_out
from scaletrain.errors import InputError
from scaletrain.loader import HeldOut, Loader
from scaletrain.order import Sequential, Shuffled, checked
from scaletrain.randomness import seed_all
from scaletrain.readers import ColumnReader, make_reader
from scaletrain.recipe import Recipe
from scaletrain.share import Share, micro_batch_count
from scaletrain.sources.table import as_table, check_readable
from scaletrain.streams import Stream, StreamLoader
from scaletrain.workers import chosen_workers

UNTRAINED = 2
"""Times the examples of a training micro-batch that a held-out one has: nothing is kept for a backward pass."""
RESIDENT_BYTES = 1 << 30
"""Columns of up to so many bytes are kept on an accelerator, where gathering a batch costs the host nothing."""


def load_data(recipe: Recipe, cfg: Config, devices: Devices) -> Data:
    """Call the recipe's ``data``, on rank 0 first, and check that all ranks got the same.

    Torch's, NumPy's and Python's global generators are seeded by ``split_seed`` before, so that a random split
    is the same everywhere. Every rank must reach this line.
    """

    def load() -> Data:
        seed_everything(cfg.split_seed or 0)
        data = recipe.data(cfg)
        if not isinstance(data, Data):
            raise InputError(f"data returned a {type(data).__name__}; return Data(train=..., val=...)")
        for split in ("train", "val", "test") if recipe.collate is None else ():
            setattr(data, split, as_table(getattr(data, split), split))
        if not cfg.skip_bad:
            check_readable(data.train)
        return data

    data = first_then_others(load, devices.control)
    own = fingerprint(data)
    for rank, other in enumerate(gather_texts(own, devices.control)):
        if other != own:
            raise InputError(
                f"rank {rank} and rank {devices.rank} got different examples; data(cfg) must return the same on all"
            )
    return data


def seed_everything(seed: int) -> None:
    """Seed torch's, NumPy's and Python's global generators."""
    torch.manual_seed(seed)  # accelerators too
    seed_all(seed)


def build_loaders(
    recipe: Recipe, cfg: Config, data: Data, module: nn.Module, devices: Devices
) -> tuple[Loader | StreamLoader, dict[str, HeldOut]]:
    """Return this process's part of the training data and of the held-out splits."""
    check_micro_batches(cfg, module, devices)
    double = next(module.parameters()).dtype == torch.float64
    micro_batches = micro_batch_count(cfg.batch_size, devices.world_size, cfg.micro_batch_size)
    largest = -(-cfg.batch_size // devices.world_size // micro_batches) or 1
    held_out = {}
    for name, examples in (("val", data.val), ("test", data.test)):
        if examples is not None:
            reader = make_reader(examples, recipe.collate, cfg.seed, double=double)
            workers = chosen_workers(reader, cfg.workers, devices.local_world_size, UNTRAINED * largest)
            held_out[name] = HeldOut(
                reader, UNTRAINED * largest, devices.rank, devices.world_size, workers=workers, device=devices.device
            )
    if is_stream(data.train):
        return _from_stream(recipe, cfg, data, devices, micro_batches, double=double), held_out
    n = count(data.train)
    order = Shuffled(n, cfg.seed) if data.order is None else checked(data.order, n)
    instead = order if cfg.skip_bad else None
    reader = make_reader(data.train, recipe.collate, cfg.seed, double=double, instead=instead)
    small = isinstance(reader, ColumnReader) and reader.nbytes <= RESIDENT_BYTES
    if isinstance(reader, ColumnReader) and small and devices.device.type != "cpu":
        reader.move_to(devices.device)
    share = Share(order, cfg.batch_size, devices.rank, devices.world_size)
    workers = chosen_workers(reader, cfg.workers, devices.local_world_size, largest)
    loader = Loader(reader, share, micro_batches, workers=workers, device=devices.device, most_bad=cfg.skip_bad)
    return loader, held_out


def check_micro_batches(cfg: Config, module: nn.Module, devices: Devices) -> None:
    """Raise InputError where BatchNorm would get a micro-batch of one."""
    micro_batches = micro_batch_count(cfg.batch_size, devices.world_size, cfg.micro_batch_size)
    smallest = cfg.batch_size // devices.world_size // micro_batches
    if smallest <= 1 and any(isinstance(part, _BatchNorm) for part in module.modules()):
        raise InputError(
            f"BatchNorm needs more than 1 example in a micro-batch, but batch_size {cfg.batch_size} over "
            f"{devices.world_size} processes in {micro_batches} micro-batches leaves {smallest or 1}; "
            "raise micro_batch_size or batch_size, or use GroupNorm"
        )


def _from_stream(
    recipe: Recipe, cfg: Config, data: Data, devices: Devices, micro_batches: int, *, double: bool
) -> StreamLoader:
    if cfg.max_steps is None:
        raise InputError("the training data is a stream, which has no length; say --max-steps")
    if cfg.skip_bad:
        raise InputError("--skip-bad takes another example of the order, and a stream has none; leave it out")
    if data.order is not None:
        raise InputError("the training data is a stream, which has an order of its own; leave Data(order=...) out")
    part = shared_out(data.train, devices.rank, devices.world_size, devices.control, divided=data.divided)
    stream = Stream(part, data.shuffle_buffer, cfg.seed, devices.rank)
    share = Share(Sequential(1), cfg.batch_size, devices.rank, devices.world_size)
    workers = 1 if cfg.workers is None else cfg.workers
    return StreamLoader(
        stream, share, micro_batches, recipe.collate,
        steps=cfg.max_steps, workers=workers, device=devices.device, double=double,
    )  # fmt: skip
