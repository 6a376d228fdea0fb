"""The recipes on tables: what they reach, build, measure, keep and refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_checkpoints import ends_with, left_after
from test_same_curve import close, curve
from torch import nn, optim

from recipes import binary, mlp, multilabel, regression
from recipes.models import Standardize
from scaletrain import load_weights, main, predict, start, train
from scaletrain.recipe import unmet

RECIPES = {"regression": regression.recipe, "binary": binary.recipe, "multilabel": multilabel.recipe}
SMALL = ["--threads", "1", "--max-steps", "20", "--validate-every", "5"]
"""Enough for what does not depend on how good the weights are."""


def trained(recipe, *argv, out="run"):
    return main(recipe, [*SMALL, "--out", str(out), *map(str, argv)])


def weights_of(recipe, cfg, out="run"):
    return load_weights(recipe.model(cfg, recipe.data(cfg)), out).eval()


# what they reach


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_reaches_what_it_expects(name, seed):
    result = main(RECIPES[name], ["--seed", str(seed), "--threads", "1"])
    assert unmet(RECIPES[name].expect, result.metrics) == []


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_says_its_command_and_its_expectations(name):
    says = {"regression": regression, "binary": binary, "multilabel": multilabel}[name].__doc__
    assert f"accelerate launch recipes/{name}.py" in says
    for metric, wanted in RECIPES[name].expect.items():
        assert f"Expected: {metric} {wanted[2:]} or better" in says


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        ([], optim.AdamW),
        (["--optimizer", "adam"], optim.Adam),
        (["--optimizer", "sgd", "--lr", "0.1"], optim.SGD),
        (["--optimizer", "muon"], optim.Muon),
        (["--activation", "gelu", "--batch-norm", "--dropout", "0.2"], optim.AdamW),
        (["--activation", "tanh"], optim.AdamW),
        (["--activation", "sigmoid", "--lr", "1e-2"], optim.AdamW),
    ],
)
def test_the_mlp_learns_with_every_optimizer_activation_and_regularizer(argv, kind):
    used = []
    recipe = replace(mlp.recipe, hooks=lambda cfg: [lambda run, info: used.append(run.optimizer)])
    result = main(recipe, [*argv, "--epochs", "15", "--threads", "1"])
    assert isinstance(getattr(used[0], "parts", used)[0], kind)
    assert result.metrics["val_accuracy"] >= 0.94


@pytest.mark.parametrize("loss", ["l1", "smooth_l1"])
def test_regression_learns_with_every_loss(loss):
    result = main(regression.recipe, ["--loss", loss, "--threads", "1"])
    assert result.metrics["val_r2"] > 0.48


# what they build


def layers(*argv):
    cfg = replace(mlp.MLPConfig(data="iris"), **dict(argv))
    return [type(layer).__name__ for layer in mlp.build_model(cfg, mlp.load_data(cfg))]


def test_the_options_of_the_mlp_build_the_layers_that_they_name():
    assert layers() == ["Standardize", "Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert layers(("batch_norm", True), ("dropout", 0.1), ("activation", "gelu")) == [
        "Standardize", *["Linear", "BatchNorm1d", "GELU", "Dropout"] * 2, "Linear"
    ]  # fmt: skip
    for name, layer in {"relu": "ReLU", "tanh": "Tanh", "sigmoid": "Sigmoid"}.items():
        assert layers(("activation", name))[2::2] == [layer] * 2


def test_the_mlp_by_itself_is_the_tutorials():
    net = mlp.mlp(20, 3)
    plain = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )  # fmt: skip
    assert {name: p.shape for name, p in net.state_dict().items()} == {
        name: p.shape for name, p in plain.state_dict().items()
    }
    assert sum(p.numel() for p in net.parameters()) == 5699


# what they learn from


def test_the_target_is_scaled_by_the_training_split_alone_and_predicted_in_its_own_unit():
    cfg = regression.RegressionConfig()
    data = regression.load_data(cfg)
    model = regression.build_model(cfg, data)
    target = data.train["target"]
    assert torch.equal(model.target_scale.mean, target.mean())
    assert torch.equal(model.target_scale.std, target.std())
    assert model.target_scale.mean != torch.cat([target, data.val["target"]]).mean()
    with torch.no_grad():
        scaled, answer = model(data.val["features"], data.val["target"])
        predicted = model.predict(data.val["features"])
    assert torch.allclose(answer, (data.val["target"] - target.mean()) / target.std())
    assert torch.allclose(predicted, scaled * target.std() + target.mean())


@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1"])
def test_the_loss_of_a_regression_is_torchs_on_the_scaled_target(loss):
    cfg = regression.RegressionConfig(loss=loss)
    data = regression.load_data(cfg)
    model = regression.build_model(cfg, data)
    own = {"mse": nn.MSELoss(), "l1": nn.L1Loss(), "smooth_l1": nn.SmoothL1Loss()}[loss]
    assert torch.equal(regression.loss(model, data.val, cfg), own(*model(data.val["features"], data.val["target"])))


@pytest.mark.parametrize("given", [None, 3.0])
def test_a_yes_weighs_as_much_as_it_is_rarer_in_training_or_as_it_is_told(given):
    cfg = binary.BinaryConfig(pos_weight=given)
    data = binary.load_data(cfg)
    label = data.train["label"]
    model = binary.build_model(cfg, data)
    weight = torch.tensor(given) if given else (label == 0).sum() / (label == 1).sum()
    assert torch.equal(model.pos_weight, weight)
    logit = model(data.train["features"])[0]
    wanted = nn.BCEWithLogitsLoss(pos_weight=weight)(logit, label.float())
    assert torch.allclose(binary.loss(model, data.train, cfg), wanted, rtol=1e-6)


def test_binary_holds_out_a_fifth_to_choose_the_threshold_and_another_to_test_it():
    data = binary.load_data(binary.BinaryConfig())
    parts = [data.train["features"], data.val["features"], data.test["features"]]
    assert [len(part) for part in parts] == [342, 113, 114]
    assert len(torch.unique(torch.cat(parts), dim=0)) == 569  # no example is in two of them


def test_the_labels_of_a_digit_are_what_is_true_of_it():
    data, digits = multilabel.load_data(multilabel.MultilabelConfig()), mlp.load_data(mlp.MLPConfig())
    assert torch.equal(data.val["features"], digits.val["features"])
    digit, labels = digits.val["label"], dict(zip(data.classes, data.val["labels"].bool().T, strict=True))
    assert torch.equal(labels["even"], digit % 2 == 0)
    assert torch.equal(labels["above_four"], digit > 4)
    assert torch.equal(labels["prime"], sum(digit == p for p in (2, 3, 5, 7)).bool())
    assert torch.equal(labels["closed_loop"], sum(digit == p for p in (0, 6, 8, 9)).bool())


# what they measure


def test_r2_is_scikit_learns_even_of_a_target_far_from_zero():
    from sklearn.metrics import r2_score

    x = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
    np.savez("far.npz", features=x, target=(10_000 + x @ [1, 2, 3, 4]).astype(np.float32))
    argv = ["--data", "far.npz", "--ema", "None", "--micro-batch-size", "7"]
    found = trained(regression.recipe, *argv).metrics
    cfg = regression.RegressionConfig(data="far.npz", ema=None)
    val = regression.load_data(cfg).val
    with torch.inference_mode():
        scaled, target = weights_of(regression.recipe, cfg)(val["features"], val["target"])
        away = weights_of(regression.recipe, cfg).predict(val["features"]) - val["target"]
    assert 0.1 < found["val_r2"] < 1
    assert found["val_r2"] == pytest.approx(r2_score(target.double(), scaled.double()), abs=1e-5)
    assert found["val_mae"] == pytest.approx(away.abs().mean().item(), rel=1e-2)  # float32 ends at 0.001 up there


def test_f1_of_each_label_macro_and_micro_are_scikit_learns():
    from sklearn.metrics import f1_score

    found = trained(multilabel.recipe, "--micro-batch-size", 25).metrics
    cfg = multilabel.MultilabelConfig()
    data = multilabel.load_data(cfg)
    labels = data.val["labels"].numpy()
    with torch.inference_mode():
        predicted = (weights_of(multilabel.recipe, cfg)(data.val["features"]) > 0).numpy()
    each = dict(zip(data.classes, f1_score(labels, predicted, average=None), strict=True))
    assert min(each.values()) > 0.3
    wanted = {f"val_f1/{name}": value for name, value in each.items()}
    wanted |= {f"val_{how}_f1": f1_score(labels, predicted, average=how) for how in ("macro", "micro")}
    wanted |= {"val_all_right": (labels == predicted).all(1).mean()}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)


def test_the_threshold_is_chosen_on_validation_kept_with_the_weights_and_used_by_test_and_predict():
    from sklearn.metrics import roc_auc_score, roc_curve

    found = trained(binary.recipe, "--lr", 0.02).metrics
    cfg = binary.BinaryConfig()
    data, model = binary.load_data(cfg), weights_of(binary.recipe, cfg)
    with torch.inference_mode():
        val, test = (model(split["features"])[0].sigmoid().numpy() for split in (data.val, data.test))
    among_no, among_yes, threshold = roc_curve(data.val["label"], val, drop_intermediate=False)
    good = threshold[among_yes - among_no >= (among_yes - among_no).max() - binary.NEARLY]
    kept = model.threshold.item()
    assert kept == found["val_best_threshold"] == pytest.approx((good.min() + good.max()) / 2, abs=1e-6)
    assert abs(kept - 0.5) > 1e-3
    label = data.test["label"].numpy()
    assert found["test_accuracy"] == pytest.approx(((test >= kept) == label).mean())
    assert found["test_auroc"] == pytest.approx(roc_auc_score(label, test), abs=1e-6)
    rows = predict(binary.recipe, "run")
    assert np.array_equal(rows["label"], test >= kept)
    assert np.allclose(rows["probability"], test, atol=1e-6)


def test_a_threshold_that_many_examples_would_choose_is_the_middle_of_those_nearly_as_good():
    metric = binary.metrics(binary.BinaryConfig(), None)["best_threshold"]
    metric.update(torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([0, 0, 1, 1]))
    assert metric.compute() == pytest.approx(0.8)  # the only one without a mistake
    metric.reset()
    probability = torch.linspace(0, 1, 101)
    metric.update(probability, (probability > 0.395).int())
    assert metric.compute() == pytest.approx((0.37 + 0.42) / 2 + 0.005, abs=0.011)  # up to 3 mistakes on either side


# the same on any number of processes, and in a run that goes on


def check_same_curve(recipe, folder):
    cfg = recipe.config(max_steps=10, threads=1)
    _, wanted = tiny.plain_loop(recipe, cfg, 10)
    for micro_batch_size in (None, 7):
        run, losses = curve(recipe, replace(cfg, micro_batch_size=micro_batch_size), folder / str(micro_batch_size))
        close(losses, wanted, 1e-6)
    return run


@pytest.mark.parametrize("name", [*RECIPES, "mlp"])
def test_the_losses_are_a_plain_loops(name, shared_path):
    check_same_curve({**RECIPES, "mlp": mlp.recipe}[name], shared_path)


@pytest.mark.world_size(2)
def test_the_losses_of_two_processes_are_a_plain_loops_and_both_have_the_same_threshold(shared_path):
    for name, recipe in {**RECIPES, "mlp": mlp.recipe}.items():
        check_same_curve(recipe, shared_path / name)
    run = start(binary.recipe, binary.BinaryConfig(max_steps=11, validate_every=5, out=str(shared_path / "run")))
    train(run)
    thresholds = [torch.zeros(()) for _ in range(2)]
    dist.all_gather(thresholds, run.module.threshold)
    assert thresholds[0] == thresholds[1] != 0.5
    assert thresholds[0] == torch.tensor(run.metrics["val_best_threshold"])


@pytest.mark.parametrize(
    ("recipe", "argv"),
    [
        (binary.recipe, ["--ema", "None", "--warmup", "0.5", "--lr", "1e-3", "--pos-weight", "9"]),
        (mlp.recipe, ["--batch-norm", "--dropout", "0.2", "--optimizer", "muon", "--ema", "0.9"]),
    ],
    ids=["threshold", "batch norm"],
)
@pytest.mark.parametrize("step", [5, 7])
def test_a_run_that_goes_on_ends_with_the_same_bits(recipe, argv, step, tmp_path):
    argv = [*argv, "--checkpoint-every", 1, "--keep-last", 99]
    trained(recipe, *argv, out=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    left_after(tmp_path / "again", step)
    trained(recipe, *argv, out=tmp_path / "again")
    whole, again = (tmp_path / name for name in ("whole", "again"))
    assert (again / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a | b)
    assert json.loads((again / "result.json").read_text()) == json.loads((whole / "result.json").read_text())


# data of one's own


X = np.random.default_rng(0).normal(size=(80, 3))
SIGN = (X[:, 0] > 0).astype(np.int64)


def own(columns):
    """Write columns as a CSV file, or with an array of several numbers a row as .npz; return its name."""
    if any(np.ndim(column) > 1 for column in columns.values()):
        np.savez("own.npz", **columns)
        return "own.npz"
    with Path("own.csv").open("w") as file:
        rows = zip(*columns.values(), strict=True)
        file.write("\n".join(",".join(map(str, row)) for row in [columns, *rows]) + "\n")
    return "own.csv"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 4.0 leaves a CSV open
@pytest.mark.parametrize(
    ("name", "answers", "column", "values"),
    [
        ("regression", {"target": X[:, 0]}, "target", None),
        ("binary", {"label": np.array(["no", "yes"])[SIGN]}, "label", {0, 1}),
        ("multilabel", {"labels": (X > 0).astype(int)}, "labels", {0, 1}),
    ],
)
def test_a_recipe_trains_on_a_users_own_file_and_predicts_for_one_without_answers(name, answers, column, values):
    arrays = name == "multilabel"
    features = {"features": X} if arrays else {"height": X[:, 0], "width": X[:, 1]}
    trained(RECIPES[name], "--data", own({**features, **answers}))
    found = predict(RECIPES[name], "run", data=own(features))[column]
    assert found.shape == ((80, 3) if arrays else (80,))
    assert values is None or set(np.unique(found)) == values
    right = X[:, 0] if name == "regression" else X > 0 if arrays else SIGN
    assert np.corrcoef(found.ravel(), right.ravel())[0, 1] > 0.5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 4.0 leaves a CSV open
@pytest.mark.parametrize(
    ("name", "columns", "says"),
    [
        ("regression", {"a": X[:, 0], "b": X[:, 1]}, "own.csv has no number to predict: a column called target or y"),
        ("regression", {"a": X[:, 0], "target": SIGN}, "own.csv has no number to predict"),
        ("regression", {"features": X, "target": np.stack([SIGN, SIGN], 1)}, "they must have the same shape"),
        ("binary", {"a": X[:, 0], "b": X[:, 1]}, "the data has no class labels"),
        ("binary", {"a": X[:, 0], "label": ["x"] * 80}, "column 'label' has 1 different values"),
        ("binary", {"a": ["p", "q"] * 40, "label": SIGN}, "there is no column 'features'"),
        (
            "binary",
            {"features": X, "label": 2 * SIGN - 1},
            "the training examples have the labels -1, 1; for yes or no",
        ),
        ("binary", {"features": X, "label": np.arange(80) % 3}, "the training examples have the labels 0, 1, 2;"),
        ("binary", {"features": X, "label": np.ones(80, int)}, "the training examples have the labels 1;"),
        ("binary", {"features": X, "label": (np.arange(80) < 2) * 1}, "the validation examples have the labels 0;"),
        ("multilabel", {"features": X, "label": SIGN}, "there is no column 'labels'"),
        ("multilabel", {"features": X, "labels": SIGN}, "own.npz: labels is (64,) with the values [0, 1]; it must be"),
        ("multilabel", {"features": X, "labels": (X > 0) * 2}, "labels is (64, 3) with the values [0, 2]; it must be"),
        ("multilabel", {"features": X, "labels": X[:, :0]}, "labels is (64, 0) with the values []; it must be (N, L)"),
    ],
)
def test_data_that_does_not_fit_is_refused_in_one_line(name, columns, says, capsys):
    said = ends_with(2, capsys, lambda: main(RECIPES[name], ["--data", own(columns), "--max-steps", "1"]))
    assert says in said


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--dropout", "1"], "--dropout is 1.0; it is a share of the activations, from 0 to below 1"),
        (["--width", "0"], "--width is 0; a layer needs at least 1 unit"),
        (["--activation", "swish"], "relu"),
    ],
)
def test_an_option_that_cannot_work_is_refused_in_one_line(argv, says, capsys):
    assert says in ends_with(2, capsys, lambda: main(mlp.recipe, argv))


def test_scaling_undoes_nothing_that_it_cannot():
    constant = Standardize(torch.full((5,), 3.0))  # a target that never changes
    assert torch.equal(constant(torch.tensor([3.0, 4.0])), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_is_compared_with_is_measured_on_the_same_split_and_not_better(name):
    from benchmarks.references.tables import REFERENCES

    _, measure = REFERENCES[name][0]
    reference = measure(0)
    result = main(RECIPES[name], ["--threads", "1"])
    assert unmet({metric: f">={reference[metric]}" for metric in RECIPES[name].expect}, result.metrics) == []
