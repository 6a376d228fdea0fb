"""What does not fit is said in one line: where, what was given, what is wanted, what to do."""

from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from launching import TORCHRUN, launch, script
from test_checkpoints import ends_with
from torch import nn

from scaletrain import Data, main
from scaletrain.misfit import explain

N, C = 8, 3
FLOATS, WHOLE = torch.randn(N, C), torch.arange(N) % C
MISFITS = {
    "more labels than classes": (
        lambda: F.cross_entropy(FLOATS, WHOLE + 2),
        "cross_entropy: labels go from 2 to 4, but the model's output has 3 classes, 0 to 2; give it more",
    ),
    "a negative label": (lambda: F.cross_entropy(FLOATS, WHOLE - 1), "labels go from -1 to 1"),
    "float labels": (lambda: F.cross_entropy(FLOATS, WHOLE.float()), "float32 (8,); class labels are whole numbers"),
    "short whole labels": (lambda: F.cross_entropy(FLOATS, WHOLE.int()), "int32 (8,); class labels are int64: use"),
    "labels in a column": (
        lambda: F.cross_entropy(FLOATS, WHOLE[:, None]),
        "float32 (8, 3) and the labels are int64 (8, 1); for such an output labels are (8,): use .squeeze(1)",
    ),
    "labels of another batch": (lambda: F.cross_entropy(FLOATS, WHOLE[:5]), "for such an output labels are (8,): see"),
    "an output without classes": (lambda: F.cross_entropy(FLOATS[:, 0], WHOLE), "the output must be (B, C)"),
    "an output of whole numbers": (lambda: F.cross_entropy(FLOATS.long(), WHOLE), "must be floating-point numbers"),
    "classes last": (
        lambda: F.cross_entropy(torch.randn(N, 5, C), torch.zeros(N, 5, dtype=torch.long)),
        "for such an output labels are (8, 3)",
    ),
    "log probabilities": (lambda: F.nll_loss(FLOATS, WHOLE.float()), "nll_loss: the model's output is float32 (8, 3)"),
    "a column of outputs": (
        lambda: F.mse_loss(FLOATS[:, :1], FLOATS[:, 0]),
        "mse_loss: the model's output is float32 (8, 1) and the target is float32 (8,); they must have the same shape: "
        "use .squeeze(-1) on the output",
    ),
    "a column of targets": (lambda: F.l1_loss(FLOATS[:, 0], FLOATS[:, :1]), "use .squeeze(-1) on the target"),
    "other widths": (lambda: F.smooth_l1_loss(FLOATS, FLOATS[:, :2]), "as many outputs as there are targets"),
    "whole targets": (
        lambda: F.binary_cross_entropy_with_logits(FLOATS, FLOATS.long()),
        "the target is int64 (8, 3); the target must be of the output's type: use .float() on it",
    ),
    "two kinds of floats": (lambda: F.mse_loss(FLOATS, FLOATS[:5].double()), "mse_loss: the model's output is float32"),
    "a token beyond the table": (
        lambda: nn.Embedding(10, 4)(torch.tensor([3, 10])),
        "embedding: tokens go from 3 to 10, but the table has 10 rows; make it larger",
    ),
    "float tokens": (lambda: nn.Embedding(10, 4)(FLOATS), "embedding: the tokens are float32 (8, 3); they must be"),
    "a narrow layer": (
        lambda: nn.Linear(5, 2)(FLOATS),
        "out_features=2, bias=True) got an input that is float32 (8, 3); its last dimension must be 5",
    ),
    "another type of weights": (lambda: nn.Linear(3, 2).double()(FLOATS), "its weights are float64; both must be"),
    "channels": (lambda: nn.Conv2d(3, 4, 3)(torch.randn(2, 1, 8, 8)), "its second dimension must be 3"),
    "features of a norm": (lambda: nn.BatchNorm1d(4)(FLOATS), "its second dimension must be 4"),
}

WHOLE_FROM_MINUS_1 = torch.arange(N) % C - 1


def in_bfloat16(work):
    """Run as most GPUs do: weights stay float32 there, and inputs of another type are no fault."""
    with torch.autocast("cpu", torch.bfloat16):
        return work()


MISFITS |= {
    "shares of other classes": (
        lambda: F.cross_entropy(FLOATS, torch.rand(N, 5)),
        "as shares of the classes the labels must have the output's shape",
    ),
    "a narrow layer in autocast": (
        lambda: in_bfloat16(lambda: nn.Linear(5, 2)(FLOATS.bfloat16())),
        "is bfloat16 (8, 3); its last dimension must be 5",
    ),
    "more labels than classes in autocast": (
        lambda: in_bfloat16(lambda: F.cross_entropy(nn.Linear(3, 2)(FLOATS), WHOLE)),
        "labels go from 0 to 2, but the model's output has 2 classes",
    ),
    "too few classes though some labels are ignored": (
        lambda: F.cross_entropy(FLOATS[:, :1], WHOLE_FROM_MINUS_1, ignore_index=-1),
        "labels go from 0 to 1, but the model's output has 1 classes",
    ),
}
OTHERS = {
    "a kernel larger than the image": lambda: in_bfloat16(lambda: nn.Conv2d(3, 4, 9)(torch.randn(2, 3, 5, 5))),
    "one value per channel": lambda: nn.BatchNorm1d(3)(FLOATS[:1]),
    "weights of classes": lambda: F.cross_entropy(FLOATS, WHOLE_FROM_MINUS_1, torch.ones(2), ignore_index=-1),
    "an index out of a bag": lambda: nn.EmbeddingBag(4, 3)(torch.tensor([[9]])),
    "out of memory": lambda: with_oom(nn.Linear(3, 2)),
}


def with_oom(layer):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory; dtype float32")

    layer.register_forward_pre_hook(full)
    return layer(FLOATS.double())


@pytest.mark.parametrize("wrong", OTHERS.values(), ids=OTHERS)
def test_what_is_not_known_for_sure_keeps_its_traceback(wrong):
    with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
        wrong()
    assert explain(caught.value) is None


@pytest.mark.parametrize(("misfit", "wanted"), MISFITS.values(), ids=MISFITS)
def test_a_misfit_is_told_from_the_tensors_themselves(misfit, wanted):
    with pytest.raises((RuntimeError, ValueError, IndexError, UserWarning)) as caught:
        misfit()
    line = explain(caught.value)
    assert wanted in line
    assert "\n" not in line
    assert line.startswith("test_misfit.py, line ")


def test_an_exception_of_another_kind_stays_what_it_is():
    def bug():
        return {}["label"]

    for wrong in (bug, lambda: FLOATS @ FLOATS, lambda: F.cross_entropy(FLOATS, WHOLE, reduction="none").item()):
        with pytest.raises((KeyError, RuntimeError)) as caught:
            wrong()
        assert explain(caught.value) is None


def broadcasting(model, batch, cfg):
    return F.mse_loss(model(batch["x"])[:, :1], batch["w"].float())


@pytest.mark.parametrize("val", [None, tiny.table(9)])
def test_a_run_ends_with_that_line_whether_it_evaluates_or_trains_first(val, capsys, tmp_path):
    recipe = replace(tiny.recipe, data=lambda cfg: Data(tiny.table(), val), loss=broadcasting, evaluate=None)
    said = ends_with(2, capsys, lambda: main(recipe, ["--out", str(tmp_path / "run")]))
    assert said.startswith("error: test_misfit.py, line ")
    assert said.count("\n") == 1
    assert "mse_loss: the model's output is float32 (" in said


def test_the_losses_own_warning_is_left_alone_outside_of_a_run():
    with pytest.warns(UserWarning, match="Using a target size"):
        F.mse_loss(FLOATS[:, :1], FLOATS[:, 0])


def test_two_processes_say_it_once(tmp_path):
    few = "F.cross_entropy(model(batch['x'])[:, :2], batch['y'])"
    body = (
        "import torch.nn.functional as F\n"
        f"recipe = replace(tiny.recipe, loss=lambda model, batch, cfg: {few}, evaluate=None)\n"
        "main(recipe)"
    )
    ended = launch(*TORCHRUN, script(tmp_path, body), "--out", tmp_path / "run")
    assert ended.returncode != 0
    assert ended.stderr.count("cross_entropy: labels go from 0 to 2, but the model's output has 2 classes") == 1
