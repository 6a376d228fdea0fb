"""From trained weights and examples to one row of outputs for each example, in the order of the data set."""

import importlib.util
import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scaletrain.agreement import gather_tensors, together
from scaletrain.batches import Batch, length
from scaletrain.checkpoint.export import load_weights, saved_classes
from scaletrain.checkpoint.files import put_in_place
from scaletrain.config import NOT_LEARNED_FROM, Config
from scaletrain.data import Part
from scaletrain.devices import Devices, set_up
from scaletrain.errors import InputError
from scaletrain.feed import load_data, seed_everything
from scaletrain.loader import HeldOut
from scaletrain.metrics import OUTPUTS
from scaletrain.readers import make_reader
from scaletrain.recipe import Recipe
from scaletrain.workers import chosen_workers

KINDS = (".parquet", ".npz")
ROW_GROUP = 65_536
"""Rows of a Parquet file that are written together."""
Rows = dict[str, Tensor]


def predict(
    recipe: Recipe,
    weights: str | Path,
    *,
    cfg: Config | None = None,
    data: str | None = None,
    split: str | None = None,
    to: str | Path | None = None,
) -> dict[str, NDArray[Any]]:
    """Compute what the recipe's ``predict`` says of each example, in the order of the data set, on all processes.

    ``weights`` is a run's folder, a checkpoint or a ``model.safetensors``. ``cfg`` is by default the one of the run
    that the weights lie in; ``data`` replaces its option ``data``, and then nothing is held out. ``split`` is
    ``train``, ``val`` or ``test``; by default ``train`` with ``data``, else the first there is of ``test``, ``val``
    and ``train``. ``to`` is a .parquet or .npz file. Returns the columns as arrays (N, ...), or nothing with ``to``.
    Every process calls it. Raises InputError and CheckpointError.
    """
    target = None if to is None else Path(to)
    if target is not None and (target.suffix not in KINDS or target.exists()):
        raise InputError(
            f"{target} is there already" if target.exists() else f"{target}: write to a .parquet or .npz file"
        )
    cfg = cfg or config_of(recipe, Path(weights))
    if data is not None:
        if "data" not in {field.name for field in fields(cfg)}:
            raise InputError(f"{type(cfg).__name__} has no option data that could be replaced")
        options: dict[str, Any] = {"data": data, "split_seed": None}
        cfg = replace(cfg, **options)
    devices = set_up(cfg.precision, cfg.threads)
    loaded = load_data(recipe, cfg, devices)
    known = saved_classes(weights)
    if recipe.predict is None and known and loaded.classes and list(map(str, loaded.classes)) != known:
        raise InputError(
            f"the data has the classes {', '.join(map(str, loaded.classes))}, the weights were trained on "
            f"{', '.join(known)}: what evaluate says of labels would be wrong; give the recipe a predict"
        )
    loaded.classes = known or loaded.classes
    splits = {"train": loaded.train, "val": loaded.val, "test": loaded.test}
    examples = splits.get(split or "train") if split or data else loaded.test or loaded.val or loaded.train
    if examples is None:
        there = ", ".join(name for name, examples in splits.items() if examples is not None)
        raise InputError(f"the data has no split '{split}'; it has {there}")
    seed_everything(cfg.seed)
    module = together(lambda: load_weights(recipe.model(cfg, loaded), weights), devices.control)
    module.to(devices.device).eval()
    double = next(module.parameters()).dtype == torch.float64
    reader = make_reader(examples, recipe.collate, cfg.seed, double=double)
    size = cfg.micro_batch_size or -(-cfg.batch_size // devices.world_size)
    share = HeldOut(
        reader,
        size,
        devices.rank,
        devices.world_size,
        workers=chosen_workers(reader, cfg.workers, devices.local_world_size, size),
        device=devices.device,
    )
    batches = _predicted(recipe, cfg, module, share, devices)
    if isinstance(examples, Part):
        batches = _with_rows(batches, examples, share)
    return _together(batches, devices) if target is None else _written(batches, target, devices)


def config_of(recipe: Recipe, weights: Path) -> Config:
    """Return the recipe's config with the options of the run that ``weights`` lie in, where there is one."""
    folder = next(
        (path for path in (weights, *weights.resolve().parents[:2]) if (path / "config.json").is_file()), None
    )
    if folder is None:
        return recipe.config()
    known = {field.name for field in fields(recipe.config)} - {*NOT_LEARNED_FROM}
    try:
        saved = json.loads((folder / "config.json").read_text())
        cfg = recipe.config(**{name: value for name, value in saved.items() if name in known})
        cfg.check()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} is no config of this recipe: {error}") from None
    return cfg


def recipe_at(path: str) -> Recipe:
    """Import the recipe in the file ``path``: its name ``recipe``. Raises InputError where there is none."""
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise InputError(f"{path}: no such recipe; give the path of its file, as recipes/cnn.py")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    sys.path.insert(0, str(file.resolve().parent.parent))  # as its own imports of recipes.models expect
    spec.loader.exec_module(module)
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise InputError(f"{path} has no Recipe called recipe")
    return recipe


def _predicted(recipe: Recipe, cfg: Config, module: nn.Module, share: HeldOut, devices: Devices) -> Iterator[Rows]:
    """Yield the columns of each batch, on the CPU; the ones repeated to keep step with others are left out."""
    for batch, counted in share:
        with torch.inference_mode(), devices.autocast():
            found = _columns(recipe, cfg, module, batch)
        for name, column in found.items():
            if not isinstance(column, Tensor) or column.ndim == 0 or len(column) != (counted or 1):
                got = tuple(column.shape) if isinstance(column, Tensor) else type(column).__name__
                raise InputError(f"predict returned {got} for '{name}' on {counted or 1} examples; return one row each")
        yield {name: _plain(column[:counted]) for name, column in found.items()}


def _with_rows(batches: Iterator[Rows], part: Part, share: HeldOut) -> Iterator[Rows]:
    """Add which row of the whole data set each is: a held-out part has an order of its own."""
    at = share.part.start
    for batch in batches:
        n = len(next(iter(batch.values())))
        yield {"row": torch.from_numpy(part.rows(np.arange(at, at + n))), **batch}
        at += n


def _columns(recipe: Recipe, cfg: Config, module: nn.Module, batch: Batch) -> Rows:
    if recipe.predict is not None:
        predicted = recipe.predict(module, batch, cfg)
        if not isinstance(predicted, dict):
            raise InputError(f"predict returned a {type(predicted).__name__}; return a dict of columns (B, ...)")
        return predicted
    if recipe.evaluate is None:
        raise InputError("the recipe has neither predict nor evaluate: predict(model, batch, cfg) returns columns")
    found = dict(recipe.evaluate(module, batch, cfg))
    found.pop(OUTPUTS, None)
    rows = {
        name: value
        for name, value in found.items()
        if isinstance(value, Tensor) and value.shape[:1] == (length(batch),)
    }
    if not rows:
        raise InputError("evaluate returns nothing per example; give the recipe predict(model, batch, cfg)")
    return rows


def _plain(column: Tensor) -> Tensor:
    column = column.detach().cpu()
    return column.float() if column.dtype in (torch.bfloat16, torch.float16) else column.contiguous()


def _together(batches: Iterator[Rows], devices: Devices) -> dict[str, NDArray[Any]]:
    parts = together(lambda: list(batches), devices.control)
    own = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: torch.cat(gather_tensors(column, devices.control)).numpy() for name, column in own.items()}


def _written(batches: Iterator[Rows], target: Path, devices: Devices) -> dict[str, NDArray[Any]]:
    """Let each process write its part, and rank 0 put them together in order: memory holds a batch at a time."""
    parts = [target.with_name(f".{target.name}.{rank:05d}.part") for rank in range(devices.world_size)]
    try:
        together(lambda: _write_part(batches, parts[devices.rank]), devices.control)
        together(lambda: _join(parts, target) if devices.is_first else None, devices.control)
    finally:
        parts[devices.rank].unlink(missing_ok=True)
    return {}


def _write_part(batches: Iterator[Rows], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    waiting: list[Any] = []
    for batch in batches:
        waiting.append(pa.table({name: _arrow(column.numpy()) for name, column in batch.items()}))
        writer = writer or pq.ParquetWriter(path, waiting[0].schema)
        if sum(map(len, waiting)) >= ROW_GROUP:
            writer.write_table(pa.concat_tables(waiting))
            waiting.clear()
    if writer is not None:
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
        writer.close()


def _arrow(array: NDArray[Any]) -> Any:
    import pyarrow as pa

    column = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def _join(parts: list[Path], target: Path) -> None:
    import pyarrow.parquet as pq

    from scaletrain.sources.table import to_numpy

    draft = target.with_name(f".{target.name}.draft{target.suffix}")
    if target.suffix == ".npz":
        tables = [pq.read_table(part) for part in parts]
        columns = {
            n: np.concatenate([to_numpy(table[n]) for table in tables if len(table)]) for n in tables[0].column_names
        }
        with zipfile.ZipFile(draft, "w") as archive:  # np.savez knows no column called file
            for name, column in columns.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, column, allow_pickle=False)
    else:
        with pq.ParquetWriter(draft, pq.read_schema(parts[0])) as writer:
            for part in parts:
                for batch in pq.ParquetFile(part).iter_batches():
                    writer.write_batch(batch)
    put_in_place(draft, target)
