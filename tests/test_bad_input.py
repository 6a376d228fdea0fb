"""Bad input: one clear line that says what, got and what to do; exit code 2; on rank 0 only; and nothing lost."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from launching import RECIPES, TORCHRUN, launch, script
from torch import nn

from scaletrain import Data, InputError, load, main

QUICK = ["--max-steps", "3"]


def ends_with_one_line(capsys, recipe, argv, code=2):
    """Run ``main`` and return the one line it ended with."""
    with pytest.raises(SystemExit) as ended:
        main(recipe, argv)
    assert ended.value.code == code
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    return said


def with_data(**changes):
    return replace(
        tiny.recipe, data=lambda cfg: Data(**{"train": tiny.table(), "val": tiny.table(53, seed=1)} | changes)
    )


def table_without(column):
    return {name: values for name, values in tiny.table().items() if name != column}


def frozen(cfg, data):
    return tiny.model(cfg, data).requires_grad_(False)


def with_batchnorm(cfg, data):
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def constant_loss(model, batch, cfg):
    return torch.tensor(1.0)


def loss_per_example(model, batch, cfg):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def loss_as_float(model, batch, cfg):
    return tiny.loss(model, batch, cfg).item()


def evaluate_with_matrix(model, batch, cfg):
    return {"loss": model(batch["x"])}


empty = {name: values[:0] for name, values in tiny.table().items()}
high_label = tiny.table() | {"label": np.full(101, 7)}
text = tiny.table() | {"x": np.array(["a"] * 101)}
uneven = tiny.table() | {"w": np.zeros(100)}

CASES = {
    "empty training data": (with_data(train=empty), [], "train is empty; it needs at least one example"),
    "empty validation data": (with_data(val=empty), [], "val is empty; it needs at least one example"),
    "an empty dataset": (with_data(train=[]), [], "train is empty; it needs at least one example"),
    "no columns": (with_data(train={}), [], "train is empty"),
    "columns of different lengths": (with_data(train=uneven), [], "the columns of train have different lengths: {"),
    "text where numbers belong": (with_data(train=text), [], "train column 'x' holds <U1; a column is numbers"),
    "data of no known kind": (with_data(train=3), [], "train is a int; give a dict of columns or a map-style dataset"),
    "labels outside the classes": (
        with_data(train=high_label, classes=["a", "b", "c"]),
        [],
        "train has labels from 7 to 7, but there are 3 classes: labels must lie in 0..2",
    ),
    "a column the loss wants": (
        with_data(train=table_without("x")),
        [],
        "there is no column 'x'; the columns are 'y'",
    ),
    "a column evaluate wants": (
        with_data(val=table_without("y")),
        [],
        "there is no column 'y'; the columns are 'x'",
    ),
    "unknown data": (
        replace(tiny.recipe, data=lambda cfg: load("digts")),
        [],
        "'digts' is neither built in (digits, iris, wine, breast_cancer, diabetes, stdlib) nor a file here, and the "
        "Hub cannot be reached; did you mean 'digits'?",
    ),
    "a table asked for images": (
        replace(tiny.recipe, data=lambda cfg: load("wine", image_size=32)),
        [],
        "'wine' has no images; the built-in images are digits",
    ),
    "a file that is missing": (replace(tiny.recipe, data=lambda cfg: open("no.csv")), [], "[Errno 2] No such file"),  # noqa: SIM115, PTH123
    "fp16 on a CPU": (tiny.recipe, ["--precision", "fp16"], "--precision fp16 does not train on cpu; use bf16 or fp32"),
    "a folder that cannot be written": (tiny.recipe, ["--out", "/proc/run"], "cannot write the run folder /proc/run: "),
    "a file where the folder should be": (
        tiny.recipe,
        ["--out", __file__],
        f"cannot write the run folder {__file__}: ",
    ),
    "a metric evaluate does not return": (
        tiny.recipe,
        ["--monitor", "max:val_f1"],
        "--monitor max:val_f1: evaluate does not return val_f1; it returns val_accuracy, val_loss",
    ),
    "patience without validation": (with_data(val=None), ["--patience", "3"], "--patience needs validation examples"),
    "an unknown tracker": (tiny.recipe, ["--track", "mlflow"], "--track mlflow: expected one of none, wandb"),
    "a misspelt option": (tiny.recipe, ["--batchsize", "3"], "unknown option --batchsize; did you mean --batch-size?"),
    "a model without parameters": (replace(tiny.recipe, model=frozen), [], "Sequential has no trainable parameters"),
    "BatchNorm on single examples": (
        replace(tiny.recipe, model=with_batchnorm),
        ["--micro-batch-size", "1"],
        "BatchNorm needs more than 1 example in a micro-batch, but batch_size 16 over 1 processes in 16 micro-batches",
    ),
    "a loss per example": (
        replace(tiny.recipe, loss=loss_per_example),
        [],
        "loss returned a tensor of shape (16,); return a scalar tensor, the mean over the batch",
    ),
    "a loss that is a float": (replace(tiny.recipe, loss=loss_as_float), [], "loss returned a float; return a scalar"),
    "a loss without a gradient": (
        replace(tiny.recipe, loss=constant_loss),
        [],
        "loss returned a scalar that depends on no trainable parameter; return a scalar tensor",
    ),
    "a weight per example": (
        replace(tiny.recipe, weight=lambda batch: batch["w"]),
        [],
        "weight returned a tensor of shape (16,); return one number for the batch",
    ),
    "a pair as training data": (
        with_data(train=(np.zeros((9, 5)), np.zeros(9))),
        [],
        "train is a tuple; give a dict of columns or a map-style dataset",
    ),
    "data that is not Data": (
        replace(tiny.recipe, data=lambda cfg: tiny.table()),
        [],
        "data returned a dict; return Data(train=..., val=...)",
    ),
    "figures that are no dict": (
        replace(tiny.recipe, evaluate=lambda model, batch, cfg: torch.zeros(3)),
        [],
        "evaluate returned a Tensor; return a dict of named figures",
    ),
    "a schedule that gives NaN": (
        replace(tiny.recipe, schedule=lambda step, total, cfg: float("nan")),
        [],
        "schedule returned nan; return a finite factor >= 0",
    ),
    "a schedule with an unknown key": (
        replace(tiny.recipe, schedule=lambda step, total, cfg: {"learning_rate": 0.5}),
        [],
        "schedule returned {'learning_rate': 0.5}; return a finite factor >= 0",
    ),
    "LBFGS": (
        replace(tiny.recipe, optimizer=lambda model, cfg: torch.optim.LBFGS(model.parameters())),
        [],
        "LBFGS evaluates the loss several times a step",
    ),
    "a figure of the wrong shape": (
        replace(tiny.recipe, evaluate=evaluate_with_matrix),
        [],
        "evaluate returned shape (32, 3) for 'loss' on a batch of 32; return one value per example (32,)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_with_one_clear_line(case, capsys):
    recipe, argv, wanted = CASES[case]
    assert ends_with_one_line(capsys, recipe, [*QUICK, *argv]).startswith(f"error: {wanted}")


def nan_loss(model, batch, cfg):
    return tiny.loss(model, batch, cfg) * float("nan")


def test_a_nan_on_the_first_step_is_reported_before_any_weight_changed(capsys, tmp_path):
    before = {}

    def keeping_model(cfg, data):
        before["model"] = model = tiny.model(cfg, data)
        before["weights"] = {name: value.clone() for name, value in model.state_dict().items()}
        return model

    recipe = replace(tiny.recipe, loss=nan_loss, model=keeping_model)
    said = ends_with_one_line(capsys, recipe, [*QUICK, "--out", str(tmp_path / "run")], code=1)
    assert "the gradient was NaN or infinite at step 1 and no weight was changed by it" in said
    assert "the loss of step 1 is nan, a finite number is expected; look for log(0)" in said
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {"code": 1, "reason": said}
    weights = before["model"].state_dict()
    assert all(torch.equal(weights[name], value) for name, value in before["weights"].items())


def test_a_nan_later_is_reported_at_the_next_log_line(capsys):
    calls = []

    def later_nan(model, batch, cfg):
        calls.append(1)
        return tiny.loss(model, batch, cfg) * (float("nan") if len(calls) == 13 else 1)

    said = ends_with_one_line(capsys, replace(tiny.recipe, loss=later_nan), ["--max-steps", "50"], code=1)
    assert "in 1 of the steps up to 20" in said
    assert "try a lower lr or max_grad_norm" in said


def test_a_folder_with_files_of_somebody_else_is_left_alone(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text("precious")
    said = ends_with_one_line(capsys, tiny.recipe, [*QUICK, "--out", str(tmp_path / "mine")])
    assert "is no run folder and its metrics.jsonl would be overwritten; choose another --out" in said
    assert (tmp_path / "mine" / "metrics.jsonl").read_text() == "precious"


def test_a_run_that_did_not_end_starts_over_and_says_so(capsys, tmp_path):
    ends_with_one_line(capsys, replace(tiny.recipe, loss=nan_loss), [*QUICK, "--out", str(tmp_path / "run")], code=1)
    main(tiny.recipe, [*QUICK, "--out", str(tmp_path / "run")])
    assert "warning: run held a run that was never saved; it starts over" in capsys.readouterr().out


def test_bad_input_leaves_no_run_folder(capsys, tmp_path):
    ends_with_one_line(capsys, with_data(train=empty), QUICK)
    ends_with_one_line(capsys, tiny.recipe, ["--monitor", "val_f1"])
    assert not (tmp_path / "runs").exists()


def test_a_script_exits_with_2_and_one_line():
    ended = launch(sys.executable, RECIPES / "cnn.py", "--learningrate", "1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: unknown option --learningrate; see --help for all options\n"


def test_accelerate_launch_shows_the_same_line_without_a_traceback():
    ended = launch(
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q", RECIPES / "cnn.py", "--lr", "0"
    )
    assert ended.returncode != 0
    assert "error: --lr is 0.0; it must be a finite number above 0\n" in ended.stderr
    assert "Traceback" not in ended.stderr


def lines_of_ours(ended):
    return [line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith("error: ")]


def test_two_processes_say_it_once(tmp_path):
    ended = launch(*TORCHRUN, RECIPES / "cnn.py", "--batch-size", "1")
    assert lines_of_ours(ended) == ["error: batch_size 1 is smaller than the 2 processes; use at least 2"]
    assert "exitcode  : 2" in ended.stderr


def test_data_that_only_rank_0_cannot_read_stops_all_ranks(tmp_path):
    body = """
def data(cfg):
    import os
    if os.environ["RANK"] == "0":
        raise FileNotFoundError("the disk of rank 0 has no train.csv")
    return tiny.data(cfg)

main(replace(tiny.recipe, data=data))
"""
    ended = launch(*TORCHRUN, script(tmp_path, body))
    assert lines_of_ours(ended) == ["error: the disk of rank 0 has no train.csv"]
    assert "exitcode  : 2" in ended.stderr


def test_data_that_differs_between_ranks_is_refused(tmp_path):
    body = """
def data(cfg):
    torch.seed()  # a split of its own on each rank
    table = tiny.table()
    rows = torch.randperm(101).numpy()
    return Data({name: column[rows[:80]] for name, column in table.items()})

main(replace(tiny.recipe, data=data))
"""
    (line,) = lines_of_ours(launch(*TORCHRUN, script(tmp_path, body)))
    assert "rank 1 and rank 0 got different examples; data(cfg) must return the same on all" in line


def test_a_random_split_is_the_same_on_all_ranks(tmp_path):
    body = """
def data(cfg):
    table = tiny.table()
    rows = torch.randperm(101).numpy()
    train, val = ({name: column[part] for name, column in table.items()} for part in (rows[:80], rows[80:]))
    return Data(train, val)

main(replace(tiny.recipe, data=data), ["--max-steps", "3"])
"""
    ended = launch(*TORCHRUN, script(tmp_path, body))
    assert ended.returncode == 0, ended.stderr


def test_a_mistake_that_shows_on_rank_1_alone_is_said(tmp_path):
    body = """
def loss(model, batch, cfg):
    found = tiny.loss(model, batch, cfg)
    return found.detach() if torch.distributed.get_rank() == 1 else found

main(replace(tiny.recipe, loss=loss), ["--max-steps", "3", "--out", "run"])
"""
    (line,) = lines_of_ours(launch(*TORCHRUN, script(tmp_path, body)))
    assert line.startswith("error: loss returned a scalar that depends on no trainable parameter")
    assert line.endswith("(on rank 1)")
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2


def test_a_folder_that_the_ranks_do_not_share_is_refused(tmp_path):
    body = """
import os
from pathlib import Path
own = Path(f"disk-of-rank-{os.environ['RANK']}")
own.mkdir()
os.chdir(own)
main(tiny.recipe, ["--max-steps", "3", "--out", "/proc/self/cwd/run"])  # the same name, another disk on each rank
"""
    ended = launch(*TORCHRUN, script(tmp_path, body))
    (line,) = lines_of_ours(ended)
    assert (
        "rank 1 does not see the run folder /proc/self/cwd/run that rank 0 made; choose an --out on a shared disk"
        in line
    )


def test_processes_that_would_train_alone_are_refused(tmp_path):
    ended = launch(sys.executable, RECIPES / "mlp.py", "--max-steps", "3", SLURM_STEP_NUM_TASKS="4")
    assert ended.returncode == 2
    assert "the launcher started 4 processes, but this one sees 1: each would train alone" in ended.stderr


@pytest.mark.parametrize("has_val", [True, False])
def test_a_loss_without_return_is_told_as_such(has_val, capsys):
    recipe = replace(tiny.recipe, loss=lambda model, batch, cfg: None, evaluate=None)
    recipe = recipe if has_val else replace(recipe, data=lambda cfg: Data(tiny.table()))
    said = ends_with_one_line(capsys, recipe, QUICK)
    assert "loss returned None (is its return missing?); return a scalar tensor" in said


def test_a_model_without_return_is_told_as_such(capsys):
    said = ends_with_one_line(capsys, replace(tiny.recipe, model=lambda cfg, data: None), QUICK)
    assert "model returned a NoneType; return an nn.Module" in said


def test_a_nan_loss_with_a_finite_gradient_ends_the_run(capsys):
    def loss(model, batch, cfg):
        return tiny.loss(model, batch, cfg) + torch.tensor(-1.0).log()

    said = ends_with_one_line(capsys, replace(tiny.recipe, loss=loss), QUICK, code=1)
    assert "the loss of step 1 is nan, though its gradient is finite" in said


def test_classes_of_torch_in_place_of_functions_are_refused():
    with pytest.raises(InputError, match=r"optimizer is the class SGD; give a function: optimizer=lambda model, cfg"):
        replace(tiny.recipe, optimizer=torch.optim.SGD)
    with pytest.raises(InputError, match=r"schedule is the class StepLR; give a function: schedule=torch_schedule"):
        replace(tiny.recipe, schedule=torch.optim.lr_scheduler.StepLR)


def rows(header, *lines):
    return "\n".join([header, *lines]) + "\n"


def test_one_slip_does_not_turn_a_column_of_numbers_into_text_that_nobody_reads(tmp_path):
    lines = [f"{k}.5,{k / 7},{k % 2}" for k in range(30)]
    lines[7] = "7.5,1.2x,1"
    path = tmp_path / "table.csv"
    path.write_text(rows("a,b,label", *lines))
    with pytest.raises(InputError, match=r"column 'b' is taken for text because of '1.2x' in row 7"):
        load(str(path))


def test_columns_of_numbers_are_the_same_features_in_whatever_order_a_file_has_them(tmp_path):
    (tmp_path / "one.csv").write_text(rows("b,a,label", *[f"{k},{-k},{k % 2}" for k in range(30)]))
    (tmp_path / "two.csv").write_text(rows("a,label,b", *[f"{-k},{k % 2},{k}" for k in range(30)]))
    one, two = (load(str(tmp_path / name), split_seed=None).train["features"] for name in ("one.csv", "two.csv"))
    assert torch.equal(one, two)
    assert one[3].tolist() == [-3, 3]


def test_a_number_to_predict_is_not_told_to_be_a_label(tmp_path):
    path = tmp_path / "y.csv"
    path.write_text(rows("a,y", *[f"{k},{k * 1.1}" for k in range(200)]))
    with pytest.raises(InputError, match=r"numbers to predict \('target'\), not class labels; recipes/regression.py"):
        load(str(path)).n_classes  # noqa: B018
