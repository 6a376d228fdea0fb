"""launch/README.md: each of its commands reaches the script it should, as it stands, and what it names exists."""

import os
import re
import shlex

import pytest
from launching import ROOT, launch

PAGE = (ROOT / "launch/README.md").read_text()
ROWS = re.findall(r"^\| [^|]+ \| `(make train[^`]*)` \| ([^|]*) \|$", PAGE, re.MULTILINE)
SCRIPTS = {"": "local", "torchrun": "torchrun", "slurm": "slurm", "kubernetes": "kubernetes"}


def settings(command):
    return dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)


def test_the_page_has_a_command_for_every_place():
    assert {settings(command).get("CLUSTER", "") for command, _ in ROWS} == set(SCRIPTS)
    assert len(ROWS) == PAGE.count("`make train ")


@pytest.mark.parametrize("command", [command for command, _ in ROWS])
def test_a_command_hands_recipe_and_options_to_its_script(command):
    wanted = settings(command)
    script = f"launch/{SCRIPTS[wanted.get('CLUSTER', '')]}.sh"
    _, *words = shlex.split(command)
    said = launch("make", "-C", ROOT, "--no-print-directory", "-o", ".venv/.installed", "-n", *words)
    assert said.stdout.strip() == f"{script} {wanted['RECIPE']} {wanted.get('ARGS', '')}".strip()
    assert (ROOT / "recipes" / f"{wanted['RECIPE']}.py").exists()
    assert os.access(ROOT / script, os.X_OK)


def test_a_variable_of_the_command_line_reaches_the_script():
    (command,) = [command for command, _ in ROWS if "kubernetes" in command]
    _, *words = shlex.split(command)
    rendered = launch("make", "-C", ROOT, "-o", ".venv/.installed", *words, DRY_RUN="1")
    assert rendered.returncode == 0, rendered.stderr
    assert "completions: 64\n" in rendered.stdout
    assert "limits: {nvidia.com/gpu: 8}\n" in rendered.stdout
    assert "image: registry/scaletrain:1\n" in rendered.stdout


def test_what_the_page_says_was_tried_is_there():
    for _, tried in ROWS:
        for path in re.findall(r"`([^`]+/[^`]+)`", tried):
            assert (ROOT / path).exists(), path


def test_the_variables_that_torchrun_sh_lists_are_those_that_are_read():
    listed = re.findall(r"^# ([A-Z]+) {2,}", (ROOT / "launch/torchrun.sh").read_text(), re.MULTILINE)
    reader = (ROOT / "launch/torchrun.py").read_text()
    assert len(listed) == 10
    for name in listed:
        assert re.search(rf"""['"]{name}['"]""", reader), name
