"""P1: the same recipe gives the same curve, however the work is divided."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F

from recipes import cnn, mlp
from scaletrain import Data, Recipe, Run, start, steps, train, train_step, validate, warmup_cosine
from scaletrain.checkpoint.load import load_new
from scaletrain.checkpoint.verify import open_checkpoint
from scaletrain.order import Shuffled

MICRO_BATCHES = (None, 7, 5, 1)
BATCH_SIZES = (16, 13)


def curve(recipe, cfg, folder):
    """Train and return the run and the global loss of each step."""
    run = start(recipe, replace(cfg, out=str(folder)))
    return run, [run.mean(info.loss) for info in steps(run)]


def close(got, wanted, tolerance):
    assert np.max(np.abs(np.array(got) - wanted) / np.abs(wanted)) <= tolerance


def small_images(cfg):
    images = torch.rand(96, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Data({"image": images, "label": torch.arange(96) % 10}, classes=list("0123456789"))


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_one_process_ends_with_the_weights_of_a_plain_loop(network, optimizer, max_grad_norm, tmp_path):
    cfg = tiny.TinyConfig(max_steps=200, optimizer=optimizer, max_grad_norm=max_grad_norm, out=str(tmp_path))
    if network == "mlp":
        recipe = replace(tiny.recipe, model=lambda cfg, data: mlp.mlp(5, 3), schedule=warmup_cosine)
    else:
        recipe = Recipe(
            config=tiny.TinyConfig,
            data=small_images,
            model=lambda cfg, data: cnn.SmallCNN(10, width=2, dropout=0.0),
            loss=lambda model, batch, cfg: F.cross_entropy(model(batch["image"]), batch["label"]),
            optimizer=tiny.optimizer,
            schedule=warmup_cosine,
        )
    run = start(recipe, cfg)
    train(run)
    plain, _ = tiny.plain_loop(recipe, cfg, 200)
    trained = load_new(open_checkpoint(tmp_path / "checkpoints/step-000000200"), "model")  # the last, not the best
    assert all(torch.equal(trained[name], weight) for name, weight in plain.state_dict().items())


def check_curves_of_this_world(folder, *, recipe=tiny.recipe, batch_sizes=BATCH_SIZES):
    for batch_size in batch_sizes:
        double = tiny.TinyConfig(double=True, batch_size=batch_size, max_steps=200)
        plain, wanted = tiny.plain_loop(recipe, double, 200)
        val = recipe.data(double).val
        accuracy = (plain(val["x"]).argmax(1) == val["y"]).double().mean().item()
        val_loss = F.cross_entropy(plain(val["x"]), val["y"]).item()
        single = replace(double, double=False, max_steps=10)
        _, wanted_in_float32 = tiny.plain_loop(recipe, single, 10)
        for micro_batch_size in MICRO_BATCHES:
            name = f"{batch_size}-{micro_batch_size}"
            run, losses = curve(recipe, replace(double, micro_batch_size=micro_batch_size), folder / name)
            close(losses, wanted, 1e-9)
            metrics = validate(run)
            close([metrics["val_loss"], metrics["val_accuracy"]], [val_loss, accuracy], 1e-9)
            _, losses = curve(recipe, replace(single, micro_batch_size=micro_batch_size), folder / f"{name}-32")
            close(losses, wanted_in_float32, 1e-6)


def test_curves_agree_on_one_process(shared_path):
    check_curves_of_this_world(shared_path)


@pytest.mark.world_size(2)
def test_curves_agree_on_two_processes(shared_path):
    check_curves_of_this_world(shared_path)


@pytest.mark.world_size(4, timeout=200)
def test_curves_agree_on_four_processes(shared_path):
    check_curves_of_this_world(shared_path, batch_sizes=(13,))


def weighted_loss(model, batch, cfg):
    each = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    return (each * batch["w"]).sum() / batch["w"].sum().clamp(min=1)


@pytest.mark.world_size(2)
def test_a_weight_of_ones_own_gives_the_same_curve(shared_path):
    recipe = replace(tiny.recipe, loss=weighted_loss, weight=lambda batch: batch["w"].sum())
    cfg = tiny.TinyConfig(double=True, batch_size=13, max_steps=50)
    _, wanted = tiny.plain_loop(recipe, cfg, 50)
    for micro_batch_size in (None, 5, 3):
        _, losses = curve(recipe, replace(cfg, micro_batch_size=micro_batch_size), shared_path / str(micro_batch_size))
        close(losses, wanted, 1e-9)


def test_a_micro_batch_of_weight_zero_changes_nothing_even_if_its_loss_is_nan(tmp_path):
    def masked(model, batch, cfg):
        return F.cross_entropy(model(batch["x"]), batch["y"].masked_fill(batch["w"] == 0, -100))

    recipe = replace(tiny.recipe, loss=masked, weight=lambda batch: (batch["w"] > 0).sum())
    cfg = tiny.TinyConfig(double=True, batch_size=6, max_steps=50)
    _, wanted = tiny.plain_loop(recipe, cfg, 50)
    _, losses = curve(recipe, replace(cfg, micro_batch_size=1), tmp_path / "run")
    close(losses, wanted, 1e-9)


def check_that_a_wrong_weighting_is_seen(folder, monkeypatch, micro_batch_size):
    """Give every micro-batch the same share, as the mean of means does, though their sizes differ."""
    cfg = tiny.TinyConfig(double=True, batch_size=13, max_steps=20)
    _, wanted = tiny.plain_loop(tiny.recipe, cfg, 20)

    def mean_of_means(run, micro_batches):
        return [1 / (len(micro_batches) * run.devices.world_size)] * len(micro_batches)

    monkeypatch.setattr(Run, "shares", mean_of_means)
    _, losses = curve(tiny.recipe, replace(cfg, micro_batch_size=micro_batch_size), folder / "run")
    with pytest.raises(AssertionError):
        close(losses, wanted, 1e-6)


def test_a_mean_of_means_over_micro_batches_would_be_seen(shared_path, monkeypatch):
    check_that_a_wrong_weighting_is_seen(shared_path, monkeypatch, 5)  # 13 examples as 4 + 4 + 5


@pytest.mark.world_size(2)
def test_a_mean_of_means_over_processes_would_be_seen(shared_path, monkeypatch):
    check_that_a_wrong_weighting_is_seen(shared_path, monkeypatch, None)  # 13 examples as 6 + 7


@pytest.mark.world_size(2)
def test_the_cnns_curve_agrees_on_two_processes(shared_path):
    recipe = replace(
        tiny.recipe,
        data=small_images,
        model=lambda cfg, data: cnn.SmallCNN(10, width=2, dropout=0.0).to(torch.float64),
        loss=lambda model, batch, cfg: F.cross_entropy(model(batch["image"].double()), batch["label"]),
        evaluate=None,
        schedule=warmup_cosine,
    )
    cfg = tiny.TinyConfig(batch_size=13, max_steps=200, lr=1e-3)
    _, wanted = tiny.plain_loop(recipe, cfg, 200)
    for micro_batch_size in (None, 3):
        _, losses = curve(recipe, replace(cfg, micro_batch_size=micro_batch_size), shared_path / str(micro_batch_size))
        close(losses, wanted, 1e-9)


def rows_of_each_step(cfg, folder):
    """Train with a step that notes which rows of the table it was given; return them, gathered in order of rank."""
    seen = []

    def noting_step(run, micro_batches):
        rows = [batch["row"][:counted] for batch, counted in micro_batches]
        everyone = [None] * run.devices.world_size
        if run.devices.world_size > 1:
            dist.all_gather_object(everyone, torch.cat(rows).tolist())
        else:
            everyone = [torch.cat(rows).tolist()]
        counts = {len(micro_batches)} | {len(batch["row"]) for batch, _ in micro_batches}
        assert 0 not in counts
        seen.append([row for rows in everyone for row in rows])
        return train_step(run, micro_batches)

    train(start(tiny.recipe, replace(cfg, out=str(folder)), step=noting_step))
    return seen


def check_examples_of_each_step(folder, batch_sizes=(16, 13, 7)):
    for batch_size in batch_sizes:
        for micro_batch_size in MICRO_BATCHES:
            cfg = tiny.TinyConfig(batch_size=batch_size, micro_batch_size=micro_batch_size, max_steps=15)
            seen = rows_of_each_step(cfg, folder / f"{batch_size}-{micro_batch_size}")
            stream = Shuffled(101, 0)(np.arange(15 * batch_size)).reshape(15, batch_size)
            assert seen == stream.tolist()


def test_each_step_reads_its_examples_on_one_process(shared_path):
    check_examples_of_each_step(shared_path)


@pytest.mark.world_size(2)
def test_each_step_reads_its_examples_on_two_processes(shared_path):
    check_examples_of_each_step(shared_path)


@pytest.mark.world_size(4, timeout=200)
def test_each_step_reads_its_examples_on_four_processes(shared_path):
    check_examples_of_each_step(shared_path, batch_sizes=(13, 7))
