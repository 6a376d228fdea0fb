"""FSDP2 as the launcher asks for it: the same curve however the model is divided, and everything else works too."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import noisy
import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import ACCELERATE, RECIPES, ROOT, launch
from safetensors.torch import load_file
from test_same_curve import close
from torch import nn

from recipes import cnn, lm
from scaletrain import InputError, main, start, steps, train
from scaletrain.blocks import blocks
from scaletrain.checkpoint.tensors import is_sharded
from scaletrain.order import Shuffled
from scaletrain.sharding import asked_for, units

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # nobody writes to it
STEPS = 10
RECOMPUTED = {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
BY_BLOCK = noisy.SHARDED | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
BY_SIZE = noisy.SHARDED | {"FSDP_MIN_NUM_PARAMS": "1000"}
WHOLE = noisy.SHARDED | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
VARIANTS = {
    "by block": (BY_BLOCK, {}),
    "by size": (BY_SIZE, {"micro_batch_size": 2}),
    "as one": (WHOLE, {"micro_batch_size": 1}),
    "kept gathered": (BY_BLOCK | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}),
    "offloaded": (BY_BLOCK | {"FSDP_OFFLOAD_PARAMS": "true"}, {}),
    "recomputed by the launcher's word": (
        BY_BLOCK | RECOMPUTED,
        {"micro_batch_size": 2},
    ),
    "recomputed": (BY_BLOCK, {"activation_checkpointing": True}),
}


@pytest.fixture
def sharding(monkeypatch):
    """Set the launcher's variables; a test may set others."""

    def ask(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    ask(BY_BLOCK)
    return ask


def small_lm(out, **options):
    small = {"size": "tiny", "context": 32, "batch_size": 8, "lr": 3e-3, "threads": 1, "max_steps": STEPS}
    return lm.LMConfig(data=argparse.__file__, out=str(out), **(small | options))


def double(cfg, data):
    return lm.build_model(cfg, data).double()


def losses_by_hand(recipe, cfg):
    """The losses and the final weights of a plain loop over the whole batches, in this process alone."""
    data = recipe.data(cfg)
    torch.manual_seed(cfg.seed)
    model = recipe.model(cfg, data).train()
    optimizer = recipe.optimizer(model, cfg)
    rates, found = [group["lr"] for group in optimizer.param_groups], []
    for step in range(cfg.max_steps):
        rows = Shuffled(len(data.train), cfg.seed)(np.arange(cfg.batch_size * step, cfg.batch_size * (step + 1)))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * recipe.schedule(step, cfg.max_steps, cfg)
        optimizer.zero_grad()
        loss = recipe.loss(model, data.train.__getitems__(rows.tolist()), cfg)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        optimizer.step()
        found.append(loss.item())
    return found, model.state_dict()


def check_curves(folder, sharding, variants):
    wanted, weights = losses_by_hand(replace(lm.recipe, model=double), small_lm(folder))
    for variant in variants:
        variables, options = VARIANTS[variant]
        sharding(variables)
        run = start(replace(lm.recipe, model=double), small_lm(folder / variant, **options))
        assert all(map(is_sharded, run.module.parameters()))
        close([run.mean(info.loss) for info in steps(run)], wanted, 1e-9)
        for name, tensor in run.module.state_dict().items():
            assert torch.allclose(tensor.full_tensor(), weights[name], rtol=1e-6), name
        run = start(lm.recipe, small_lm(folder / f"{variant}, float32", **options))
        close([run.mean(info.loss) for info in steps(run)], losses_by_hand(lm.recipe, small_lm(folder))[0], 1e-6)


@pytest.mark.world_size(2)
def test_a_language_model_divided_over_two_processes_has_the_losses_of_one(shared_path, sharding):
    check_curves(shared_path, sharding, VARIANTS)


@pytest.mark.world_size(4)
def test_a_language_model_divided_over_four_processes_has_the_losses_of_one(shared_path, sharding):
    check_curves(shared_path, sharding, ("by block", "by size"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute")  # dynamo's own
@pytest.mark.world_size(2, timeout=200)
def test_it_trains_in_bfloat16_compiled_averaged_and_clipped_and_exports_plain_names(shared_path, sharding):
    names = lm.build_model(small_lm(shared_path), lm.load_data(small_lm(shared_path))).state_dict().keys()
    found = {}
    for name, options in {"bf16": {"precision": "bf16"}, "compiled": {"precision": "bf16", "compile": True}}.items():
        cfg = small_lm(shared_path / name, ema=0.9, max_grad_norm=0.5, validate_every=5, **options)
        run = start(lm.recipe, cfg)
        train(run)
        found[name] = run.finish().metrics["val_loss"]
        dist.barrier()
        assert {tensor.dtype for tensor in run.module.parameters()} == {torch.float32}
        exported = load_file(shared_path / name / "model.safetensors")
        assert exported.keys() <= names  # a tied weight once
        assert not any("_orig_mod" in path.read_text(errors="ignore") for path in (shared_path / name).rglob("*.*"))
    assert found["compiled"] == pytest.approx(found["bf16"], rel=1e-2)
    plain = start(lm.recipe, small_lm(shared_path / "plain", ema=0.9, max_grad_norm=0.5, validate_every=5))
    train(plain)
    assert found["bf16"] == pytest.approx(plain.finish().metrics["val_loss"], rel=1e-2)


@pytest.mark.world_size(2)
def test_what_is_gathered_is_a_block_a_large_part_or_a_class_by_name(tmp_path, sharding):
    cfg = small_lm(tmp_path)
    model = lm.build_model(cfg, lm.load_data(cfg))
    plugin = start(lm.recipe, cfg).devices.accelerator.state.fsdp_plugin
    assert set(units(model, plugin)) == set(blocks(model))
    plugin.transformer_cls_names_to_wrap = ["Attention"]
    assert {type(part).__name__ for part in units(model, plugin)} == {"Attention"}
    plugin.transformer_cls_names_to_wrap = ["Attention", "Nope"]
    with pytest.raises(InputError, match=r"names Nope, but the model has no such layer"):
        units(model, plugin)
    sharding(BY_SIZE | {"FSDP_MIN_NUM_PARAMS": "10000"})
    plugin = start(lm.recipe, small_lm(tmp_path / "by size")).devices.accelerator.state.fsdp_plugin
    found = units(model, plugin)
    assert nn.Linear in map(type, found)
    assert nn.Embedding not in map(type, found)  # its weight is the head's too
    assert all(sum(p.numel() for p in part.parameters()) >= 10_000 for part in found)
    assert units(nn.ModuleList([nn.Linear(200, 200)]), plugin) != []
    assert not any(isinstance(part, nn.ModuleList) for part in units(nn.Sequential(nn.ModuleList([nn.ReLU()])), plugin))


def test_another_engine_is_refused_and_fsdp2_named():
    for variables, said in (
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "DeepSpeed; shard the model with accelerate_configs/fsdp2.yaml",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM; shard"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP version 1; shard"),
    ):
        with pytest.raises(InputError, match=said):
            asked_for(variables)
    assert not asked_for({"ACCELERATE_USE_FSDP": "false"})
    assert asked_for(BY_BLOCK)


def test_deepspeed_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit) as ended:
        main(cnn.recipe, ["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "fsdp2.yaml" in capsys.readouterr().err


def test_one_process_is_not_divided(tmp_path, sharding):
    run = start(lm.recipe, small_lm(tmp_path, max_steps=1))
    assert not run.devices.sharded


def borrows(cfg, data):
    """A model that uses a layer's weight without calling the layer."""

    class Borrower(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return x @ self.layer.weight.T

    return Borrower()


@pytest.mark.world_size(2)
def test_a_weight_used_outside_its_layer_is_one_line(shared_path, sharding, monkeypatch, capfd):
    import tiny

    sharding(noisy.SHARDED)
    ended = []
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit):
        main(replace(tiny.recipe, model=borrows), ["--out", str(shared_path / "run")])
    assert 2 in ended
    if dist.get_rank() == 0:
        assert "a weight is used outside of the layer that holds it" in capfd.readouterr().err


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_divided_by_accelerate_launch_then_copied_then_alone_and_back_it_is_one_run(tmp_path):
    """Each part of the run goes on where the one before left off, launched as users launch it."""
    book = tmp_path / "book.txt"
    book.write_text(Path(argparse.__file__).read_text())
    options = ["--data", book, "--size", "tiny", "--context", "16", "--sample-bytes", "0", "--batch-size", "8"]
    options += ["--val-share", "0.2", "--epochs", "0.1", "--threads", "1", "--validate-every", "4"]

    def launched(config, processes, out, steps):
        configured = ["--config_file", ROOT / f"accelerate_configs/{config}.yaml", "--num_processes", processes]
        script = [RECIPES / "lm.py", *options, "--max-steps", steps, "--out", tmp_path / out]
        ended = launch(*ACCELERATE, *configured, *script)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    for steps_so_far in (4, 8, 12, 16):
        words = map(str, [*options, "--max-steps", steps_so_far, "--out", tmp_path / "whole"])
        main(lm.recipe, [*words])
    assert "the model divided over them (FSDP2)" in launched("fsdp2", 4, "parts", 4)
    assert "going on after step 4" in launched("cpu_2proc", 2, "parts", 8)
    assert "going on after step 8" in launched("cpu", 1, "parts", 12)
    assert "going on after step 12" in launched("fsdp2", 2, "parts", 16)
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8, 12, 16]
    whole, parts = result(tmp_path / "whole"), result(tmp_path / "parts")
    assert parts["step"] == whole["step"] == 16
    assert parts["metrics"]["val_loss"] == pytest.approx(whole["metrics"]["val_loss"], rel=1e-3)
