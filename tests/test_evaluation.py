"""Validation counts every example once, on any number of processes: means, and metrics that are not means."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import noisy
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from launching import ROOT
from test_checkpoints import ends_with

from scaletrain import Data, build, load_weights, main, start, validate

pytestmark = pytest.mark.filterwarnings("ignore:No (positive|negative) samples")  # of two examples' AUROC
N = 101
CLASSES = ("ant", "bee", "cow")


def metrics(cfg, data):
    from torchmetrics.classification import (
        MulticlassAUROC,
        MulticlassConfusionMatrix,
        MulticlassF1Score,
        MulticlassPrecision,
    )

    return {
        "auroc": MulticlassAUROC(3),
        "f1": MulticlassF1Score(3, average="macro"),
        "precision": MulticlassPrecision(3, average=None),
        "confusion": MulticlassConfusionMatrix(3),
    }


def evaluate(model, batch, cfg):
    logits = model(batch["x"])
    return {**tiny.evaluate(model, batch, cfg), "outputs": (logits.float(), batch["y"])}


def data(cfg, n=N):
    return Data(train=tiny.table(), val=tiny.table(n, seed=1), test=tiny.table(7, seed=2), classes=CLASSES)


recipe = replace(tiny.recipe, data=data, evaluate=evaluate, metrics=metrics)


def by_sklearn(run, n):
    from sklearn.metrics import confusion_matrix, f1_score, precision_score, roc_auc_score

    table = tiny.table(n, seed=1)
    x, y = torch.from_numpy(table["x"]), table["y"]
    with torch.no_grad():
        logits = run.module(x.to(next(run.module.parameters()).dtype))
    probability, chosen = logits.softmax(1).double().numpy(), logits.argmax(1).numpy()
    figures = {
        "val_loss": F.cross_entropy(logits.double(), torch.from_numpy(y)).item(),
        "val_accuracy": float((chosen == y).mean()),
        "val_f1": f1_score(y, chosen, average="macro", zero_division=0),
        "val_examples": n,
    }
    if len(set(y)) == 3:
        figures["val_auroc"] = roc_auc_score(y, probability / probability.sum(1, keepdims=True), multi_class="ovr")
    for cls, value in zip(
        CLASSES, precision_score(y, chosen, average=None, zero_division=0, labels=[0, 1, 2]), strict=True
    ):
        figures[f"val_precision/{cls}"] = value
    for row, line in zip(CLASSES, confusion_matrix(y, chosen, labels=[0, 1, 2]), strict=True):
        figures |= {f"val_confusion/{row}/{column}": count for column, count in zip(CLASSES, line, strict=True)}
    return figures


def check(folder, recipe=recipe, **options):
    for n in (N, 2):  # with two examples a process of three or four has none of its own
        own, out = replace(recipe, data=partial(data, n=n)), str(folder / str(n))
        run = start(own, own.config(**options or {"double": True}, max_steps=1, micro_batch_size=4, out=out))
        for _ in range(2):  # the second time the objects begin anew
            found = validate(run)
        for name, wanted in by_sklearn(run, n).items():
            assert found[name] == pytest.approx(wanted, abs=1e-7), name


@pytest.mark.parametrize("processes", [1, *(pytest.param(n, marks=pytest.mark.world_size(n)) for n in (2, 3, 4))])
def test_the_figures_are_scikit_learns(processes, shared_path):
    check(shared_path)


@pytest.mark.world_size(3)
def test_the_figures_are_scikit_learns_of_a_model_that_fsdp2_shards(shared_path, monkeypatch):
    monkeypatch.setattr(build, "assemble", build.assemble)  # put back what the next line replaces
    noisy.shard_where_asked()
    check(shared_path, replace(recipe, config=noisy.NoisyConfig, model=noisy.model), plain=True, fsdp=True)


def test_they_are_monitored_recorded_and_hidden_from_the_console_where_they_are_many(tmp_path, capsys):
    result = main(recipe, ["--max-steps", "20", "--monitor", "max:val_f1", "--out", str(tmp_path / "run")])
    assert result.best == pytest.approx(result.metrics["val_f1"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line.get("val_f1") == result.best]
    assert sum(value for name, value in line.items() if "confusion" in name) == N == line["val_examples"]
    assert lines[-1]["test_examples"] == 7
    said = capsys.readouterr().out
    assert "f1 0." in said
    assert "confusion" not in said
    assert "examples 101" not in said


def test_metrics_without_outputs_and_objects_that_are_none_are_refused(tmp_path, capsys):
    said = ends_with(2, capsys, lambda: main(replace(recipe, evaluate=tiny.evaluate), ["--max-steps", "1"]))
    assert "evaluate returns no 'outputs', which the recipe's metrics are fed with" in said
    wrong = replace(recipe, metrics=lambda cfg, data: {"f1": 3})
    assert "metrics returned a int as 'f1'; return torchmetrics objects" in ends_with(
        2, capsys, lambda: main(wrong, ["--max-steps", "1"])
    )


def test_perplexity_is_the_exponential_of_the_mean_loss(tmp_path):
    def objects(cfg, data):
        from torchmetrics.text import Perplexity

        return {"perplexity": Perplexity()}

    def outputs(model, batch, cfg):
        logits = model(batch["x"])
        return {
            **tiny.evaluate(model, batch, cfg),
            "outputs": {"preds": logits[:, None], "target": batch["y"][:, None]},
        }

    run = start(replace(recipe, metrics=objects, evaluate=outputs), tiny.TinyConfig(max_steps=1, out=str(tmp_path)))
    found = validate(run)
    assert found["val_perplexity"] == pytest.approx(np.exp(found["val_loss"]), rel=1e-5)


def test_a_collate_that_packs_counts_its_examples_and_a_batch_of_no_weight_nothing(tmp_path):
    sequences = [torch.full((1 + i % 4,), float(i % 2)) for i in range(20)]

    def pack(rows):
        return {"x": torch.cat(rows)[None], "counts": torch.ones(1, sum(map(len, rows)))}  # (1, total)

    def weight(batch):
        return batch["counts"].sum() * (batch["x"].sum() > 0)

    def loss(model, batch, cfg):
        return model(batch["x"].flatten()[:, None]).mean() + torch.where(batch["x"].sum() > 0, 0.0, torch.nan)

    packed = replace(
        tiny.recipe, data=lambda cfg: Data(sequences, [sequences[0] * 0, *sequences]), collate=pack, weight=weight,
        loss=loss, evaluate=None, model=lambda cfg, data: torch.nn.Linear(1, 1),
    )  # fmt: skip
    cfg = tiny.TinyConfig(max_steps=1, batch_size=4, micro_batch_size=1, workers=0, out=str(tmp_path))
    found = validate(start(packed, cfg))
    assert found["val_examples"] == 21
    assert np.isfinite(found["val_loss"])


def test_a_value_for_each_class_can_be_monitored_and_their_name_alone_cannot(tmp_path, capsys):
    one = replace(recipe, metrics=lambda cfg, data: {"p": metrics(cfg, data)["precision"]})
    argv = ["--max-steps", "3", "--out", str(tmp_path)]
    assert main(one, [*argv, "--monitor", "max:val_p/bee"]).best >= 0
    said = ends_with(2, capsys, lambda: main(one, ["--max-steps", "3", "--monitor", "max:val_p"]))
    assert "val_p/ant, val_p/bee, val_p/cow" in said


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda of: [of.MulticlassAUROC(3)], "metrics returned a list; return torchmetrics objects by name"),
        (lambda of: {"a": of.MulticlassAUROC}, "metrics returned the class MulticlassAUROC as 'a'; return an object"),
        (lambda of: {"a": of.MulticlassAUROC(7)}, "the metric 'a' cannot take what evaluate returns as outputs: "),
        (lambda of: {"roc": of.MulticlassROC(3)}, "the metric 'roc' is a tuple; only numbers can be recorded"),
        (lambda of: {"loss": of.MulticlassF1Score(3)}, "evaluate returns 'loss', which is also the name of another"),
    ],
)
def test_metrics_that_cannot_work_are_one_line(made, says, capsys):
    from torchmetrics import classification

    wrong = replace(recipe, metrics=lambda cfg, data: made(classification))
    assert says in ends_with(2, capsys, lambda: main(wrong, ["--max-steps", "1"]))


def test_evaluate_cannot_take_the_name_of_the_count(capsys):
    wrong = replace(recipe, evaluate=lambda *given: {**evaluate(*given), "examples": torch.tensor(3.0)})
    said = ends_with(2, capsys, lambda: main(wrong, ["--max-steps", "1"]))
    assert "evaluate returns 'examples', which is also the name of another figure" in said


def test_a_metric_that_one_example_is_too_few_for_is_measured_on_all(tmp_path):
    from sklearn.metrics import r2_score

    def objects(cfg, data):
        from torchmetrics.regression import R2Score

        return {"r2": R2Score()}

    def outputs(model, batch, cfg):
        return {**tiny.evaluate(model, batch, cfg), "outputs": (model(batch["x"])[:, 0], batch["x"][:, 0])}

    run = start(
        replace(recipe, metrics=objects, evaluate=outputs),
        tiny.TinyConfig(double=True, max_steps=1, batch_size=1, out=str(tmp_path)),
    )
    x = torch.from_numpy(tiny.table(N, seed=1)["x"])
    with torch.no_grad():
        wanted = r2_score(x[:, 0], run.module(x)[:, 0])
    assert validate(run)["val_r2"] == pytest.approx(wanted, rel=1e-6)


def test_the_test_is_measured_on_the_best_weights(tmp_path):
    result = main(recipe, ["--max-steps", "40", "--lr", "3", "--validate-every", "1", "--out", str(tmp_path / "run")])
    assert result.best_step < result.step
    net = load_weights(tiny.model(tiny.TinyConfig(), None), tmp_path / "run")
    table = tiny.table(7, seed=2)
    with torch.no_grad():
        best = F.cross_entropy(net(torch.from_numpy(table["x"]).float()), torch.from_numpy(table["y"]))
    assert result.metrics["test_loss"] == pytest.approx(best.item(), rel=1e-5)


def test_torchmetrics_is_imported_by_recipes_that_use_it_alone():
    program = (
        "import sys, tempfile; sys.path.insert(0, 'tests'); import tiny; from scaletrain import main\n"
        "main(tiny.recipe, ['--max-steps', '2', '--out', tempfile.mkdtemp()])\n"
        "assert not {'torchmetrics', 'kornia', 'sklearn', 'wandb', 'tensorboard'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_evaluate_cannot_write_into_the_data(capsys):
    def writes(model, batch, cfg):
        batch["x"].mul_(2)
        return tiny.evaluate(model, batch, cfg)

    said = ends_with(
        2, capsys, lambda: main(replace(recipe, evaluate=writes, metrics=None), ["--max-steps", "1", "--double"])
    )
    assert "evaluate has written into its batch, which is the data; work on a clone() of it" in said
