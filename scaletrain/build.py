"""Build a run: from a recipe and a config to everything the loop touches."""

import inspect
import warnings
from dataclasses import replace
from math import ceil
from pathlib import Path

import torch
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel

from scaletrain.agreement import gather_texts, together
from scaletrain.alike import check_alike, of_config, of_model
from scaletrain.batches import length
from scaletrain.blocks import compile_blocks, recompute_blocks
from scaletrain.config import Config
from scaletrain.content import fingerprint
from scaletrain.data import Data
from scaletrain.devices import Devices, set_up
from scaletrain.errors import InputError
from scaletrain.feed import build_loaders, load_data, seed_everything
from scaletrain.folder import agree_on_folder, short
from scaletrain.hooks import all_hooks
from scaletrain.loop import forward_backward, train_step
from scaletrain.memory import FILE as MEMORY
from scaletrain.memory import halved, has_limit, largest, remembered, short_of_memory
from scaletrain.metrics import Objects, Sums
from scaletrain.opening import open_folder
from scaletrain.optimizer_state import parameter_names
from scaletrain.recipe import Recipe
from scaletrain.run import Run, Step
from scaletrain.run.resume import identity
from scaletrain.sharding import recomputes, shard
from scaletrain.signals import Signals


def start(
    recipe: Recipe,
    cfg: Config,
    *,
    source: str | None = None,
    step: Step | None = None,
    signals: Signals | None = None,
) -> Run:
    """Build a run and its folder, ready for ``train(run)``: at its beginning, or where its checkpoint left off.

    ``source`` is the file to record and to name the run after (default: the one that defines the loss);
    ``step`` replaces ``train_step``; ``signals`` are those that ask it to leave. Raises InputError for what cannot
    work, before the folder is made; CheckpointError where no checkpoint can be read; Finished where all is done.
    Every process calls it.
    """
    source = source or source_of(recipe)
    run = assemble(recipe, cfg, step=step, signals=signals, source=source)
    run.folder = agree_on_folder(cfg.out, Path(source).stem, run.devices.control)
    fit_memory(run)
    warm_up(run)
    open_folder(run, Path(source).stem, source)
    return run


def assemble(
    recipe: Recipe,
    cfg: Config,
    *,
    step: Step | None = None,
    signals: Signals | None = None,
    source: str | None = None,
) -> Run:
    """Build a run without a folder: it writes and says nothing. Raises InputError. Every process calls it."""
    cfg.check()
    devices = set_up(cfg.precision, cfg.threads)
    check_alike("configuration", of_config(cfg, source), devices.control)
    check_batch_size(cfg, devices)
    data = load_data(recipe, cfg, devices)
    module, model = build_model(recipe, cfg, data, devices)
    optimizer = build_optimizer(recipe, cfg, module)
    loader, held_out = build_loaders(recipe, cfg, data, module, devices)
    examples = loader.examples
    run = Run(
        recipe=recipe,
        cfg=cfg,
        data=data,
        devices=devices,
        module=module,
        model=model,
        optimizer=optimizer,
        loader=loader,
        held_out=held_out,
        examples=examples,
        total_steps=total_steps(cfg, examples),
        step=step or train_step,
        identity=identity(cfg, fingerprint(data), loader.order_hash()),
        signals=signals or Signals(),
    )
    objects = recipe.metrics(cfg, data) if recipe.metrics else {}
    run.metric_objects = Objects(objects, data.classes, devices.device, devices.control)
    run.hooks = all_hooks(recipe.hooks(cfg) if recipe.hooks else ())
    names = together(lambda: check_monitor(run), devices.control)
    if len(set(gather_texts(names, devices.control))) > 1:
        raise InputError("evaluate does not return the same figures on all ranks; it must not depend on the examples")
    return run


def total_steps(cfg: Config, examples: int) -> int:
    """Return the number of optimizer steps of a run on ``examples`` training examples."""
    return cfg.max_steps or ceil(cfg.epochs * examples / cfg.batch_size - 1e-9)


def check_batch_size(cfg: Config, devices: Devices) -> None:
    """Raise InputError unless every process has an example to read."""
    if cfg.batch_size < devices.world_size:
        raise InputError(
            f"batch_size {cfg.batch_size} is smaller than the {devices.world_size} processes; "
            f"use at least {devices.world_size}"
        )


def build_optimizer(recipe: Recipe, cfg: Config, module: nn.Module) -> optim.Optimizer:
    """Build the recipe's optimizer; raise InputError for one that the step cannot call."""
    optimizer = recipe.optimizer(module, cfg)
    if isinstance(optimizer, optim.LBFGS):
        raise InputError("LBFGS evaluates the loss several times a step; give main a step of your own that does so")
    parameter_names(module, optimizer)  # what is not the model's could not be saved
    return optimizer


def build_model(recipe: Recipe, cfg: Config, data: Data, devices: Devices) -> tuple[nn.Module, nn.Module]:
    """Build the recipe's model under the seed, move it to the device, and wrap it for several processes.

    Returns it as it is and wrapped. A model in eval mode is put into train mode; modules that the recipe
    alone froze in eval mode stay so.
    """
    seed_everything(cfg.seed)
    module = recipe.model(cfg, data)
    if not isinstance(module, nn.Module):
        raise InputError(f"model returned a {type(module).__name__}; return an nn.Module (is the return missing?)")
    if not any(p.requires_grad for p in module.parameters()):
        raise InputError(f"{type(module).__name__} has no trainable parameters; there is nothing to learn")
    for name, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"the model's state '{name}' is a {type(value).__name__}; only tensors can be saved")
    check_alike("model", of_model(module), devices.control)
    if not module.training:
        module.train()
    accelerator = devices.accelerator
    if cfg.activation_checkpointing or (devices.sharded and recomputes(accelerator)):
        recompute_blocks(module)
    if cfg.compile_blocks or (cfg.compile and devices.sharded):
        compile_blocks(module)
    elif cfg.compile:
        module.compile()
    if devices.sharded:
        shard(module, accelerator)
        return module, module
    model = accelerator.prepare_model(module)
    module = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # the loop has its own autocast
    return module, model


def check_monitor(run: Run) -> str:
    """Evaluate one batch: raise InputError unless ``evaluate`` returns what ``monitor`` names; return all names."""
    cfg = run.cfg
    if "val" not in run.held_out:
        if cfg.patience is not None:
            raise InputError("--patience needs validation examples, but the recipe's data has no val")
        return ""
    sums = Sums(run.devices.sums_in, run.devices.device, run.metric_objects)
    with run.evaluating():
        batch, counted = run.held_out["val"].first()
        sums.add(run.evaluate(batch), length(batch), run.weight(batch, counted), counted)
    names = [f"val_{name}" for name in (*sums.names, *named_by(run.metric_objects))]
    if cfg.monitored_metric not in names:
        raise InputError(
            f"--monitor {cfg.monitor}: evaluate does not return {cfg.monitored_metric}; it returns {', '.join(names)}"
        )
    return ", ".join(names)


def named_by(objects: Objects) -> list[str]:
    """Return what the figures of metric objects are called, as far as one batch can tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a batch may lack a class
        try:
            return list(objects.values())
        except (ValueError, RuntimeError):  # one example is too few for some
            objects.reset()
            return list(objects.metrics)


def fit_memory(run: Run) -> None:
    """Halve the micro-batch on all processes until a forward and backward pass fit into the memory of each.

    The passes exchange nothing, so that nobody waits for one that fails. A model that is sharded cannot compute
    alone: where its memory runs out, the run ends and the next start tries half (``memory.remember``). On CPUs nothing
    is tried out without a limit on memory, as ``ulimit -v`` sets: nothing else fails there. Every rank must reach
    this line.
    """
    devices = run.devices
    if smaller := remembered(run.folder, largest(run), devices.control):
        run.notes.append(
            f"micro-batch {smaller}: {largest(run)} did not fit into memory before; to try it again, remove "
            f"{short(run.folder / MEMORY)}"
        )
        divide(run, smaller)
    limited = gather_texts("yes" if devices.device.type != "cpu" or has_limit() else "", devices.control)
    if devices.sharded or not any(limited):
        return
    while ranks := short_of_memory(lambda: try_out(run), devices.control):
        smaller = halved(run, ranks)
        who = f"rank {', '.join(map(str, ranks))}"
        run.notes.append(f"micro-batch {smaller}: {largest(run)} do not fit into the memory of {who}")
        divide(run, smaller)


def divide(run: Run, micro_batch_size: int) -> None:
    """Divide the batch into micro-batches of at most so many examples."""
    run.cfg = replace(run.cfg, micro_batch_size=micro_batch_size)
    run.loader, run.held_out = build_loaders(run.recipe, run.cfg, run.data, run.module, run.devices)


def try_out(run: Run) -> None:
    """Compute the gradient of the first micro-batch twice, without any other process, and leave no trace of it.

    Beside the first gradient, the second pass needs what every later one will; what the optimizer is going to
    remember is stood in for by twice the parameters, as Adam's is.
    """
    buffers = [(buffer, buffer.clone()) for buffer in run.module.buffers()]
    parameters = [p for p in run.gradients.parameters if not run.optimizer.state.get(p)]
    if isinstance(run.model, DistributedDataParallel):
        run.model.require_forward_param_sync = False  # its first pass would broadcast buffers; the next one does
    stand_in = [torch.empty_like(p) for p in parameters for _ in range(2)]
    try:
        batch, _ = run.prepare_step(run.loader.first())[0]
        for _ in range(2):
            with run.gradients.exchanging(last=False):
                with run.devices.autocast():
                    loss = run.recipe.loss(run.model, batch, run.cfg)
                run.gradients.backward(loss)
    finally:
        stand_in.clear()
        run.gradients.zero()
        for buffer, before in buffers:
            buffer.copy_(before)


def warm_up(run: Run) -> None:
    """Compute two gradients and forget them, so that the first one that counts is summed like all later ones.

    DistributedDataParallel regroups the gradients after its first pass; with three processes or more another
    grouping is another order of summation, and a run that goes on would not have the bits of one never stopped.
    """
    if run.devices.world_size < 3 or not isinstance(run.model, DistributedDataParallel):
        return
    buffers = [(buffer, buffer.clone()) for buffer in run.module.buffers()]
    micro_batches = run.prepare_step(run.loader.first())
    for _ in range(2):
        forward_backward(run, micro_batches)
    run.gradients.zero()
    for buffer, before in buffers:
        buffer.copy_(before)


def source_of(recipe: Recipe) -> str:
    """Return the file that defines the recipe's loss."""
    code = getattr(inspect.unwrap(recipe.loss), "__code__", None)  # a partial or a callable object has none
    return code.co_filename if code else "recipe.py"
