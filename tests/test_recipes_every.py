"""What holds of every recipe: its help, its docstring, going on with the same bits, and what it was refused for."""

import ast
import importlib
import os
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from launching import RECIPES, ROOT, launch
from test_checkpoints import assert_same_end, ends_with, left_after

from benchmarks.expectations import RECIPES as CHECKED
from recipes import cnn, cnn_own_loop, cnn_sam, finetune, lm
from scaletrain import Config, main
from scaletrain.new import recipes

NAMES = sorted(recipes())
LINES = "reader, writer, row in rows\nfor line in lines: yield line\nimport csv\n\n"
SMALL = {
    "mlp": "--width 8 --dropout 0.1 --batch-norm",
    "regression": "--width 8",
    "binary": "--width 8",
    "multilabel": "--width 8",
    "cnn": "--width 2 --mixup 0.2",
    "cnn_sam": "--width 2",
    "cnn_own_loop": "--width 2",
    "vit": "--width 16 --depth 1 --image-size 16",
    "finetune": "--width 2 --examples 64 --weights base",
    "text": "--data texts.jsonl --width 8 --context 16 --vocab-size 50",
    "lm": "--data book.txt --size tiny --context 16 --sample-bytes 0 --val-share 0.2",
}
"""Options with which a step takes milliseconds."""
MORE = {
    "cnn_sam": {"step": cnn_sam.sam_step},
    "cnn_own_loop": {"loop": cnn_own_loop.own_loop},
    "lm": {"loop": lm.train_and_sample},
}


def trains(name, *argv):
    """Train a recipe as its file does, at a small size, in the working folder."""
    recipe = {"cnn_own_loop": cnn.recipe}.get(name) or importlib.import_module(f"recipes.{name}").recipe
    return main(recipe, [*SMALL[name].split(), "--threads", "1", *map(str, argv)], **MORE.get(name, {}))


def files():
    """What the small sizes read: a text, labelled texts, and a CNN to adapt."""
    Path("book.txt").write_text(LINES * 20)
    rows = [f'{{"text": "{line} {k}", "label": {k % 2}}}\n' for k, line in enumerate(LINES.split("\n")[:3] * 14)]
    Path("texts.jsonl").write_text("".join(rows))
    if not Path("base").exists():
        main(cnn.recipe, ["--width", "2", "--threads", "1", "--max-steps", "2", "--out", "base"])


def test_every_recipe_is_here_and_trained_by_make_check():
    assert sorted(SMALL) == NAMES
    assert set(CHECKED) == set(NAMES) - {"cnn_own_loop"}  # which is held to the bits of cnn
    listed = re.findall(r"^\| \[(\w+)\.py\]", (RECIPES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == NAMES


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 4.0 leaves a file open
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_with_the_same_bits(name):
    files()
    argv = ("--max-steps", 6, "--validate-every", 3, "--batch-size", 16)
    trains(name, *argv, "--out", "whole")
    trains(name, *argv, "--out", "again", "--checkpoint-every", 2, "--keep-last", 9)
    left_after(Path("again"), 4)
    trains(name, *argv, "--out", "again")
    assert_same_end(Path("whole"), Path("again"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.world_size(2, timeout=300)
def test_two_processes_that_were_killed_go_on_with_the_same_bits_too(shared_path):
    os.chdir(shared_path)
    main(cnn.recipe, ["--width", "2", "--threads", "1", "--max-steps", "2", "--out", "base"])
    rank = torch.distributed.get_rank()
    if rank == 0:
        files()
    torch.distributed.barrier()
    argv = ("--max-steps", 4, "--validate-every", 2, "--batch-size", 16)
    for name in NAMES:
        trains(name, *argv, "--out", f"{name}-whole")
        trains(name, *argv, "--out", f"{name}-again", "--checkpoint-every", 2, "--keep-last", 9)
        torch.distributed.barrier()
        if rank == 0:
            left_after(Path(f"{name}-again"), 2)
        torch.distributed.barrier()
        trains(name, *argv, "--out", f"{name}-again")
        torch.distributed.barrier()
        assert_same_end(Path(f"{name}-whole"), Path(f"{name}-again"))


def test_finetuning_learns_from_few_images_what_the_network_was_not_trained_for():
    main(cnn.recipe, ["--width", "8", "--threads", "1", "--epochs", "6", "--out", "base"])
    options = ["--width", "8", "--threads", "1", "--weights", "base", "--epochs", "10"]
    assert main(finetune.recipe, options).metrics["val_accuracy"] > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_help_text(name):
    for node in ast.parse((RECIPES / f"{name}.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            shared = {field.name for field in fields(Config)}
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and field.target.id not in shared:
                    text = after.value.value if isinstance(after, ast.Expr) else ""
                    assert len(text) > 10, f"{name}: {field.target.id}"


def test_the_recipes_answer_help():
    program = (
        "import contextlib, io, runpy, sys\n"
        f"for name in {NAMES!r}:\n"
        "    sys.argv, said = [name, '--help'], io.StringIO()\n"
        "    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):\n"
        f"        runpy.run_path(f'{RECIPES}/{{name}}.py', run_name='__main__')\n"
        "    text = ' '.join(said.getvalue().split())\n"
        "    assert '--batch-size' in text and 'Examples per optimizer step over all devices' in text, name\n"
        "    assert f'recipes/{name}.py' in text, name\n"
    )
    ended = launch(sys.executable, "-c", program, PYTHONPATH=str(ROOT))
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_a_docstring_says_how_to_run_it_what_to_expect_over_how_many_seeds_and_on_what(name):
    module = importlib.import_module(f"recipes.{name}")
    said = " ".join(module.__doc__.split())
    assert f"accelerate launch recipes/{name}.py" in said
    assert "over 5 seeds" in said or "at each of 5 seeds" in said
    assert re.search(r"CPU cores?", said)
    for metric, wanted in module.recipe.expect.items():
        word = "better" if wanted.startswith(">=") else "lower"
        assert f"Expected: {metric} {wanted[2:]} or {word}" in said


LAYERS = (
    "Linear", "Conv2d", "MaxPool2d", "AvgPool2d", "BatchNorm1d", "BatchNorm2d", "LayerNorm", "GroupNorm", "Dropout",
    "ReLU", "GELU", "Tanh", "Sigmoid", "Embedding",
)  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_of_the_tutorial_is_used_and_listed(layer):
    used = [path.name for path in RECIPES.glob("*.py") if re.search(rf"\bnn\.{layer}\b", path.read_text())]
    assert used
    assert re.search(rf"\b{layer}\b", (RECIPES / "README.md").read_text())


REFUSED = {
    "text --dropout 2": "--dropout is 2.0",
    "binary --pos-weight -1": "--pos-weight is -1.0; it must be a finite number above 0",
    "binary --pos-weight 0": "--pos-weight is 0.0",
    "cnn --crop 1000000": "--crop is 1000000; use a number from 0 to 32",
    "lm --val-share 1": "--val-share is 1.0; it must lie between 0 and 1",
    "lm --val-share -0.5": "--val-share is -0.5",
    "lm --max-grad-value 0.5": "--max-grad-norm and --max-grad-value both clip the gradient; say None for one of them",
    "lm --vocab-size 40": "embedding: tokens go from 10 to 121, but the table has 40 rows; make it larger",
}


@pytest.mark.parametrize(("command", "said"), REFUSED.items())
def test_what_cannot_work_is_one_line(command, said, capsys):
    name, *argv = command.split()
    files()
    assert said in ends_with(2, capsys, lambda: trains(name, "--max-steps", 2, *argv))
