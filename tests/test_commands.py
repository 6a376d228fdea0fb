"""scaletrain new, schedule and lr-find: what one does with a recipe before it is trained."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from launching import RECIPES, TORCHRUN, launch
from PIL import Image
from test_checkpoints import ends_with

from scaletrain import Config, Data, Recipe, one_cycle, warmup_cosine
from scaletrain.cli import main as command
from scaletrain.new import recipes
from scaletrain.rates import range_test, rates_of

CNN = str(RECIPES / "cnn.py")


def says(capsys, *args):
    """What a command prints when it ends well."""
    with pytest.raises(SystemExit) as ended:
        command([str(arg) for arg in args])
    assert ended.value.code == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refuses(capsys, *args):
    return ends_with(2, capsys, lambda: command([str(arg) for arg in args]))


# new


@pytest.mark.parametrize("like", sorted(recipes()))
def test_a_new_recipe_differs_from_what_it_copies_in_its_docstring_alone(like, capsys):
    said = says(capsys, "new", "my_recipe", "--like", like)
    assert said == f"my_recipe.py: a copy of {like}; to train it: accelerate launch my_recipe.py\n"
    own, copied = Path("my_recipe.py").read_text(), (RECIPES / f"{like}.py").read_text()
    assert own.startswith(
        '"""my_recipe: say here what it learns, and from what.\n\n    accelerate launch my_recipe.py\n'
    )
    assert own.split('"""', 2)[2] == copied.split('"""', 2)[2]


def test_a_new_recipe_trains_at_once_and_runs_under_its_own_name(capsys):
    says(capsys, "new", "my_recipe", "--like", "cnn")
    ended = launch(sys.executable, "my_recipe.py", "--max-steps", "2", "--width", "4")
    assert ended.returncode == 0, ended.stderr
    assert "my_recipe: SmallCNN(" in ended.stdout
    assert "run folder runs/my_recipe/" in ended.stdout


def test_a_new_recipe_may_lie_in_a_folder(capsys):
    Path("mine").mkdir()
    assert says(capsys, "new", "mine/first.py").startswith("mine/first.py: a copy of mlp;")
    assert Path("mine/first.py").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("mine", "--like", "bert"), "--like bert: there is no such recipe; there are binary, cnn, "),
        (("my-recipe",), "'my-recipe' is no name for a recipe; use letters, digits and _"),
        (("torch",), "torch.py would hide the module torch that is installed; choose another name"),
        (("there",), "there.py is there already; choose another name"),
        (("nowhere/mine",), "nowhere is no folder; make it first"),
        (("class",), "'class' is no name for a recipe"),
        (("mine/torch",), "mine/torch.py would hide the module torch"),
        (("__main__",), "__main__.py would hide the module"),
        (("mine", "--lik", "cnn"), "unknown option --lik; see --help"),
    ],
)
def test_a_new_recipe_that_cannot_be_is_refused_and_nothing_written(args, said, capsys):
    Path("there.py").write_text("mine")
    assert said in refuses(capsys, "new", *args)
    assert Path("there.py").read_text() == "mine"
    assert [path.name for path in Path().rglob("*.py")] == ["there.py"]


# schedule


def test_the_schedule_is_drawn_with_the_recipes_own_options(capsys):
    said = says(capsys, "schedule", CNN, "--epochs", "5", "--lr", "0.1", "--to", "rate.png")
    assert said.startswith(
        "57 steps, 5 epochs of 1,438 examples at batch size 128\nlr 0.0333 in step 1, highest 0.1 in"
    )
    assert "⠉" in said
    assert said.endswith("drawn in rate.png\n")
    with Image.open("rate.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (600, 1050, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10  # something is drawn


@pytest.mark.parametrize("schedule", [warmup_cosine, one_cycle])
def test_the_schedule_is_the_runs(schedule, tmp_path):
    from scaletrain import start, steps

    recipe, cfg = replace(tiny.recipe, schedule=schedule), tiny.TinyConfig(epochs=3, warmup=0.2, out=str(tmp_path))
    assert rates_of(recipe, cfg).curves["lr"] == [info.lr for info in steps(start(recipe, cfg))]


def test_the_schedule_of_a_number_of_steps_reads_no_data():
    def data(cfg):
        raise AssertionError

    found = rates_of(replace(tiny.recipe, data=data, schedule=one_cycle), tiny.TinyConfig(max_steps=30))
    assert found.words[0] == "30 steps"
    assert found.words[2] == "momentum times 0.895 to 1"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((CNN, "--epoch", "5"), "unknown option --epoch; did you mean --epochs?"),
        ((CNN, "--epochs", "-5"), "--epochs is -5.0; it must be a finite number above 0"),
        (("nowhere.py",), "nowhere.py: no such recipe; give the path of its file"),
        ((str(RECIPES / "README.md"),), "README.md: no such recipe; give the path of its file"),
        ((CNN, "--max-steps", "5", "--to", "rate.xyz"), "rate.xyz: Format 'xyz' is not supported"),
        ((CNN, "--max-steps", "5", "--to", "nowhere/rate.png"), "nowhere/rate.png: No such file or directory"),
    ],
)
def test_a_schedule_that_cannot_be_drawn_is_one_line(args, said, capsys):
    assert said in refuses(capsys, "schedule", *args)


# lr-find


def bowl(curvature):
    """Least squares whose gradient descent diverges at rates above 2 / curvature."""

    def loss(model, batch, cfg):
        return 0.5 * curvature * (model(torch.ones_like(batch["x"])) - 5 - batch["x"]).square().mean()

    return Recipe(
        config=Config,
        data=lambda cfg: Data({"x": torch.randn(256, 1, generator=torch.Generator().manual_seed(0))}),
        model=lambda cfg, data: torch.nn.Linear(1, 1, bias=False),
        loss=loss,
        optimizer=lambda model, cfg: torch.optim.SGD(model.parameters(), lr=cfg.lr),
    )


@pytest.mark.parametrize("curvature", [0.1, 1.0, 30.0])
def test_the_suggested_rate_is_below_the_one_that_theory_says_diverges(curvature):
    found = range_test(bowl(curvature), Config(), high=1e3, steps=200)
    assert 0.01 / curvature < found.suggestion < 2 / curvature
    assert found.rates[-1] > 1 / curvature
    assert f"diverges at {found.rates[-1] * (1e9 ** (1 / 199)):.1e}" in found.words


def test_the_rates_rise_evenly_on_a_logarithmic_scale_and_nothing_is_written():
    found = range_test(tiny.recipe, tiny.TinyConfig(), low=1e-5, high=1e-1, steps=41)
    assert np.diff(np.log10(found.rates)) == pytest.approx(np.full(40, 0.1))
    assert 1e-3 < found.suggestion < 1e-1
    assert [*Path().iterdir()] == []


def test_no_rate_is_suggested_where_the_loss_does_not_fall():
    found = range_test(tiny.recipe, tiny.TinyConfig(), low=1e-9, high=1e-8, steps=20)
    assert found.suggestion is None
    assert found.words.startswith("the loss did not fall at any of these rates")


def check_range(micro_batch_size):
    cfg = tiny.TinyConfig(double=True, max_steps=20, lr=1.0, batch_size=13)
    rising = replace(tiny.recipe, schedule=lambda step, total, cfg: 1e-4 * 1e3 ** (step / 19))
    _, wanted = tiny.plain_loop(rising, cfg, 20)
    found = range_test(tiny.recipe, replace(cfg, micro_batch_size=micro_batch_size), low=1e-4, high=1e-1, steps=20)
    assert found.losses == pytest.approx(wanted, rel=1e-9)


def test_the_losses_are_those_of_a_plain_loop_at_rising_rates():
    check_range(None)


@pytest.mark.world_size(2)
def test_two_processes_find_what_a_plain_loop_finds():
    check_range(5)


def test_lr_find_draws_and_suggests_once_for_all_processes(tmp_path):
    words = ["lr-find", str(RECIPES / "mlp.py"), "--steps", "60", "--to", tmp_path / "lr.png"]
    ended = launch(*TORCHRUN, "-m", "scaletrain.cli", *words)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("learning rate") == 1
    assert ended.stdout.count("suggestion: --lr") == 1
    assert (tmp_path / "lr.png").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--low", "1", "--high", "0.1"), "--low 1.0 and --high 0.1: two rates above 0 are wanted, the second higher"),
        (("--steps", "3"), "--steps 3: too few to see where the loss falls; at least 10"),
        (("--widht", "3"), "unknown option --widht; did you mean --width?"),
    ],
)
def test_a_range_that_cannot_be_is_one_line(args, said, capsys):
    assert said in refuses(capsys, "lr-find", CNN, *args)


def test_a_recipe_that_does_not_fit_its_loss_is_one_line_here_too(capsys, tmp_path):
    (tmp_path / "wrong.py").write_text(
        "from dataclasses import replace\nfrom recipes import mlp\n"
        "recipe = replace(mlp.recipe, model=lambda cfg, data: mlp.mlp(64, 5), evaluate=None)\n"
    )
    said = refuses(capsys, "lr-find", "wrong.py", "--split-seed", "None")
    assert "cross_entropy: labels go from 0 to 9, but the model's output has 5 classes" in said


def test_curves_without_their_libraries_are_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotext", None)
    assert "pip install 'scaletrain[plot]'" in refuses(capsys, "schedule", CNN, "--max-steps", "5")


def test_a_loss_below_zero_is_followed_too():
    recipe = bowl(1.0)
    below = replace(recipe, loss=lambda model, batch, cfg: recipe.loss(model, batch, cfg) - 100)
    found, wanted = (range_test(one, Config(), high=1e3, steps=200) for one in (below, recipe))
    assert found.suggestion == pytest.approx(wanted.suggestion)


def test_a_loss_that_compares_each_output_with_every_target_is_refused_here_too(capsys):
    Path("wrong.py").write_text(
        "from dataclasses import replace\nimport torch.nn.functional as F\nfrom recipes import regression\n"
        "def loss(model, batch, cfg): return F.mse_loss(model.predict(batch['features'])[:, None], batch['target'])\n"
        "recipe = replace(regression.recipe, loss=loss)\n"
    )
    said = refuses(capsys, "lr-find", "wrong.py")
    assert "use .squeeze(-1) on the output" in said


def test_a_folder_for_what_is_not_kept_is_told_of(capsys):
    said = says(capsys, "lr-find", RECIPES / "mlp.py", "--steps", "60", "--out", "here")
    assert said.startswith("warning: --out here has no effect")
    assert not Path("here").exists()
