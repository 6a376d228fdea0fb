"""docs/write-a-recipe.md: its loop and its recipe train, its commands run, its variants are what they say."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from launching import ROOT, launch
from test_docs import blocks

from scaletrain import Recipe, main

PAGE = ROOT / "docs/write-a-recipe.md"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def of_page(language):
    return [block.values[0] for block in blocks(language) if block.id.startswith(PAGE.name)]


@pytest.fixture
def digits():
    """The file that the page puts together."""
    _, *parts = of_page("python")
    end = next(i for i, part in enumerate(parts) if "main(recipe)" in part)
    Path("digits.py").write_text("\n\n".join(parts[: end + 1]))
    return Path("digits.py")


def test_the_tutorials_loop_learns(capsys):
    Path("loop.py").write_text(of_page("python")[0])
    runpy.run_path("loop.py")
    assert float(capsys.readouterr().out.split()[-1]) > 0.85
    assert Path("model.pt").exists()


def test_the_recipe_is_the_loops_equal(digits):
    recipe = runpy.run_path(str(digits))["recipe"]
    result = main(recipe, ["--threads", "1"])
    assert result.step == 450  # 20 epochs of 1,438 examples in batches of 64
    assert result.metrics["val_accuracy"] > 0.93


def test_its_commands_run(digits):
    for line in "".join(of_page("sh")).splitlines():
        more = () if "--help" in line else ("--max-steps", "2", "--out", f"run{len(line)}")
        ended = launch(*line.split(), *more, PATH=PATH, HOME=str(Path.cwd()))
        assert ended.returncode == 0, ended.stderr
        assert ("Share of the hidden layer's activations" if not more else "done: 2 steps") in ended.stdout


def test_a_recipe_is_begun_as_the_page_says():
    (script,) = of_page("bash")
    ended = launch("bash", "-ec", script, PATH=PATH, HOME=str(Path.cwd()))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "suggestion: --lr" in ended.stdout
    assert Path("schedule.png").exists()
    assert Path("lr.png").exists()


def test_its_variants_train(digits):
    namespace = runpy.run_path(str(digits))
    before = {name for name, value in namespace.items() if isinstance(value, Recipe)}
    exec(of_page("python")[-1], namespace)
    variants = {name: value for name, value in namespace.items() if isinstance(value, Recipe)}.keys() - before
    assert variants == {"with_muon", "with_nesterov", "slower_head", "on_a_plateau"}
    for name in variants:
        assert main(namespace[name], ["--max-steps", "2", "--threads", "1"]).step == 2


def test_every_option_and_name_of_its_table_exists(digits):
    import scaletrain

    text = PAGE.read_text()
    table = text[text.index("## Techniques") : text.index("They work together")]
    named = set(
        re.findall(r"\b(sgd|adam|muon|partial|mixup|cutmix|Plateau|torch_schedule|\w+_decay|\w*cosine)\b", table)
    )
    assert named - {"partial", "weight_decay"} <= set(scaletrain.__all__)
    fields = runpy.run_path(str(digits))["recipe"].config().__dict__
    for option in re.findall(r"--([a-z][a-z-]+)", table):
        assert option.replace("-", "_") in fields


def test_what_it_says_of_a_mistake_is_said(digits):
    wrong = digits.read_text().replace('batch["label"])\n\n\ndef evaluate', 'batch["label"].float())\n\n\ndef evaluate')
    Path("wrong.py").write_text(wrong.replace("loss=loss, evaluate=evaluate", "loss=loss"))
    (shown,) = of_page("console")
    command, said = shown.splitlines()
    ended = launch(*command.removeprefix("$ ").split(), PATH=PATH)
    assert ended.returncode == 2
    assert re.sub(r"\d+", "0", ended.stderr) == re.sub(r"\d+", "0", said) + "\n"
