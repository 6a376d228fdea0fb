"""Every code block and command of the README and the docs is run, here or by continuous integration."""

import os
import re
import sys
from pathlib import Path

import pytest
from launching import ROOT, launch

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CI = (ROOT / ".ci" / "run").read_text()
SHORT = ("--max-steps", "2")


def blocks(language):
    for page in PAGES:
        for code in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            yield pytest.param(code, id=f"{page.name}-{code.split(chr(10))[0][:40]}")


def commands():
    lines = [line for block in blocks("sh") for line in block.values[0].splitlines() if line.strip()]
    return [line for line in lines if not line.startswith("make ")]


@pytest.mark.parametrize("code", list(blocks("python")))
def test_a_python_block_runs_as_it_stands(code, tmp_path):
    (tmp_path / "block.py").write_text(code)
    ended = launch(sys.executable, tmp_path / "block.py", *SHORT)
    assert ended.returncode == 0, ended.stderr
    assert "done: 2 steps" in ended.stdout


@pytest.mark.parametrize("command", commands())
def test_a_command_runs_as_it_stands(command, tmp_path):
    words = command.replace("recipes/", f"{ROOT}/recipes/").replace(
        "accelerate_configs/", f"{ROOT}/accelerate_configs/"
    )
    more = () if "--help" in command else (*SHORT, "--out", tmp_path / "run")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = launch(*words.split(), *more, PATH=path, HOME=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ("done: 2 steps" if more else "--batch-size") in ended.stdout


def test_kill_it_ends_with_the_same_bits_and_the_commands_after_it_run(tmp_path):
    first, *rest = [block.values[0] for block in blocks("bash") if "README" in block.id]
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    ended = launch("bash", "-c", first, timeout=300, **environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "going on after step" in ended.stdout
    assert ended.stdout.endswith("the same, to the last bit\n")
    for script in rest:
        ended = launch("bash", "-ec", script, **environment)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "weights.safetensors").exists()


def test_the_make_commands_of_the_readme_are_run_by_continuous_integration():
    text = (ROOT / "README.md").read_text()
    for command in ("make train", "make test"):
        assert f"\n{command}\n" in text
        assert re.search(rf"^{command.split()[0]} .*\b{command.split()[1]}\b", CI, re.MULTILINE)


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"\bmake ([a-z-]+)", re.sub(r"[^`]*(`[^`]*`)", r"\1 ", page.read_text()))) <= targets


def test_every_test_that_the_table_of_promises_names_exists():
    text = (ROOT / "README.md").read_text()
    selections = re.findall(r'make test ARGS="?(tests/\w+\.py)(?: -k (\w+))?"?', text)
    assert len(selections) >= 7
    for file, name in selections:
        source = (ROOT / file).read_text()
        assert re.search(rf"def test_\w*{name}", source), (file, name)


def test_every_link_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
