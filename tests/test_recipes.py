"""The recipes learn what they say, on real data; variants of the loop and the step do what they say."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from launching import RECIPES, ROOT
from test_checkpoints import ends_with

from recipes import cnn, cnn_own_loop, cnn_sam, mlp, models
from scaletrain import main, start, steps
from scaletrain.recipe import unmet
from scaletrain.sources import load
from scaletrain.sources.split import hold_out


@pytest.mark.parametrize("seed", range(5))
def test_the_mlp_reaches_what_it_expects(seed):
    assert unmet(mlp.recipe.expect, main(mlp.recipe, ["--seed", str(seed), "--threads", "1"]).metrics) == []


@pytest.mark.parametrize(("recipe", "more"), [(cnn.recipe, {}), (cnn_sam.recipe, {"step": cnn_sam.sam_step})])
def test_the_cnn_learns_at_a_smaller_size_than_make_check_holds_it_to(recipe, more):
    result = main(recipe, ["--epochs", "8", "--width", "16", "--threads", "1"], **more)
    assert unmet({"val_accuracy": ">=0.93"}, result.metrics) == []


def test_a_small_width_is_a_smaller_model(capsys):
    main(cnn.recipe, ["--max-steps", "1", "--width", "8"])
    assert "133,882 parameters" in capsys.readouterr().out


def test_an_expectation_that_is_missed_is_said():
    assert unmet({"val_accuracy": ">=0.97", "val_loss": "<=0.1"}, {"val_accuracy": 0.9, "val_loss": 0.05}) == [
        "val_accuracy is 0.9, expected >=0.97"
    ]
    assert unmet({"val_accuracy": ">=0.97"}, {}) == ["val_accuracy is nan, expected >=0.97"]
    assert unmet(None, {}) == []


@pytest.mark.parametrize("name", ["cnn", "mlp", "cnn_sam"])
def test_every_recipe_says_its_command_its_expectation_and_has_a_width(name):
    module = sys.modules[f"recipes.{name}"]
    assert f"accelerate launch recipes/{name}.py" in module.__doc__
    for metric, wanted in module.recipe.expect.items():
        assert f"Expected: {metric} {wanted[2:]} or better" in module.__doc__
    assert module.recipe.config().width > 0


def test_the_loop_written_out_gives_the_same_numbers_as_train(tmp_path):
    options = ["--epochs", "2", "--width", "4", "--threads", "1"]
    main(cnn.recipe, [*options, "--out", str(tmp_path / "train")])
    main(cnn.recipe, [*options, "--out", str(tmp_path / "own")], loop=cnn_own_loop.own_loop)
    ours, own = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("train", "own"))
    assert own == ours
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("train", "own")]
    assert weights[0] == weights[1]


def plain_sam(recipe, cfg, steps):
    """Sharpness-aware minimization as the paper writes it, on the same examples."""
    torch.manual_seed(cfg.seed)
    net = recipe.model(cfg, None)
    opt = recipe.optimizer(net, cfg)
    for batch in tiny.batches(recipe, cfg, torch.float64, steps):
        weights = list(net.parameters())
        gradient = torch.autograd.grad(recipe.loss(net, batch, cfg), weights)
        norm = torch.cat([g.ravel() for g in gradient]).norm()
        uphill = [cfg.rho * g / norm for g in gradient]
        with torch.no_grad():
            for w, e in zip(weights, uphill, strict=True):
                w += e
        opt.zero_grad()
        recipe.loss(net, batch, cfg).backward()
        with torch.no_grad():
            for w, e in zip(weights, uphill, strict=True):
                w -= e
        opt.step()
    return net


class SAMTiny(tiny.TinyConfig):
    rho = 0.05


def check_sam(folder):
    cfg = SAMTiny(double=True, max_steps=50, batch_size=13, micro_batch_size=5, out=str(folder))
    run = start(tiny.recipe, cfg, step=cnn_sam.sam_step)
    for _ in steps(run):
        pass
    wanted = plain_sam(tiny.recipe, replace(cfg), 50)
    assert all(
        torch.allclose(a, b, rtol=1e-9) for a, b in zip(run.module.parameters(), wanted.parameters(), strict=True)
    )


def test_sam_is_the_papers(shared_path):
    check_sam(shared_path / "run")


@pytest.mark.world_size(2)
def test_sam_is_the_papers_on_two_processes(shared_path):
    check_sam(shared_path / "run")


@pytest.mark.parametrize("name", ["digits", "iris", "wine", "breast_cancer"])
def test_built_in_tables_are_real_and_split_evenly_within_each_class(name):
    data = load(name)
    train, val = data.train["label"], data.val["label"]
    assert data.train["features"].dtype == torch.float32
    share = [(val == cls).sum() / ((val == cls).sum() + (train == cls).sum()) for cls in range(len(data.classes))]
    assert all(abs(s - 0.2) < 0.02 for s in share)


def test_digits_as_images_have_three_channels_between_0_and_1():
    data = load("digits", image_size=32)
    assert data.train["image"].shape[1:] == (3, 32, 32)
    assert (data.train["image"].min(), data.train["image"].max()) == (0, 1)
    assert len(data.train["image"]) + len(data.val["image"]) == 1797


def test_the_split_depends_on_its_seed_and_not_on_the_number_of_examples_read_before():
    label = np.arange(300) % 3
    first, again, other = hold_out(label, 0.2, 0), hold_out(label, 0.2, 0), hold_out(label, 0.2, 1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.sum() == other.sum() == 60


def test_standardizing_uses_the_training_examples_alone():
    cfg = mlp.MLPConfig(data="wine")
    data = mlp.load_data(cfg)
    scale = mlp.build_model(cfg, data)[0]
    train, val = scale(data.train["features"]), scale(data.val["features"])
    assert torch.allclose(train.mean(0), torch.zeros(13), atol=1e-5)
    assert torch.allclose(train.std(0), torch.ones(13), atol=1e-5)
    assert val.mean(0).abs().max() > 0.01
    digits = mlp.load_data(mlp.MLPConfig())
    pixels = models.Standardize(digits.train["features"])(digits.val["features"])
    assert pixels.abs().max() < 100  # a pixel that is always empty in training is not blown up


@pytest.mark.parametrize("name", ["cnn", "mlp", "cnn_own_loop", "cnn_sam"])
def test_a_recipe_answers_help_with_every_options_meaning(name):
    ended = subprocess.run(
        [sys.executable, RECIPES / f"{name}.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--width INT" in ended.stdout
    assert "Examples per optimizer step over all devices" in " ".join(ended.stdout.split())
    assert ended.stderr == ""


def test_recipes_stay_short():
    for path in (ROOT / "recipes").glob("*.py"):
        assert path.read_text().count("\n") <= 150


def own_table(folder, label):
    rng = np.random.default_rng(0)
    kinds = np.array(["cat", "dog", "owl"])[np.arange(60) % 3]
    lines = [
        f"{a:.3f},{b:.3f},{kind}" for a, b, kind in zip(rng.normal(size=60), rng.normal(size=60), kinds, strict=True)
    ]
    (folder / "own.csv").write_text(f"height,width,{label}\n" + "\n".join(lines) + "\n")
    return str(folder / "own.csv")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 4.0 leaves a CSV open
def test_a_recipe_trains_on_a_users_own_file(tmp_path):
    result = main(mlp.recipe, ["--data", own_table(tmp_path, "label"), "--max-steps", "3"])
    assert result.metrics["val_examples"] == 12
    np.savez(tmp_path / "own.npz", features=np.random.default_rng(0).normal(size=(60, 2)), label=np.arange(60) % 3)
    assert main(mlp.recipe, ["--data", str(tmp_path / "own.npz"), "--max-steps", "3"]).metrics["val_examples"] == 12


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 4.0 leaves a CSV open
def test_a_recipe_says_what_its_data_lacks(tmp_path, capsys):
    said = ends_with(2, capsys, lambda: main(mlp.recipe, ["--data", own_table(tmp_path, "species")]))
    assert "the data has no class labels; call their column label, labels, class, target or y" in said
    np.savez(tmp_path / "own.npz", pixels=np.zeros((60, 2)), label=np.arange(60) % 3)
    said = ends_with(2, capsys, lambda: main(mlp.recipe, ["--data", str(tmp_path / "own.npz")]))
    assert "there is no column 'features'; the columns are 'pixels', 'label'" in said
