"""Every code block and command of the README and the docs is run, here or by continuous integration."""

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import fields, replace
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from launching import ROOT, launch

from scaletrain import main, start, steps
from scaletrain.checkpoint.load import load_new
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.verify import open_checkpoint, open_whole
from scaletrain.devices import set_up
from scaletrain.state import State

PAGES = [
    ROOT / "README.md",
    ROOT / "recipes/README.md",
    ROOT / "launch/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FORMAT = ROOT / "docs" / "checkpoints.md"
CI = (ROOT / ".ci" / "run").read_text()
SHORT = ("--max-steps", "2")


def blocks(language):
    for page in PAGES:
        for code in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            yield pytest.param(code, id=f"{page.name}-{code.split(chr(10))[0][:40]}")


ELSEWHERE = ("checkpoints.md", "data.md", "write-a-recipe.md")
"""Pages whose blocks have tests of their own."""


def commands():
    own = [block for block in blocks("sh") if not block.id.startswith(ELSEWHERE)]
    lines = [line for block in own for line in block.values[0].splitlines() if line.strip()]
    return [line for line in lines if not line.startswith("make ")]


@pytest.mark.parametrize("code", [block for block in blocks("python") if not block.id.startswith(ELSEWHERE)])
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
    begin, kill, *rest = [block.values[0] for block in blocks("bash") if block.id.startswith("README")]
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    ended = launch("bash", "-c", kill, timeout=300, **environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "going on after step" in ended.stdout
    assert "the same, to the last bit\n" in ended.stdout
    for script in (begin, *rest):
        ended = launch("bash", "-ec", script, **environment)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "weights.safetensors").exists()
    assert (tmp_path / "runs/my_recipe").exists()


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


# docs/data.md


def files_of_the_page():
    """Make small files of the names that the page uses, in the working folder."""
    from PIL import Image
    from test_sources import folder_of_images, write

    write(Path("animals.csv"))
    write(Path("animals.jsonl"))
    folder_of_images(Path("photos"))
    Image.new("RGB", (5, 5)).save("photos/cat/extra.png")
    np.save("x.npy", np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32))
    Path("book.txt").write_text("a few words, again and again; " * 60)
    np.arange(2000).astype(np.uint16).tofile("tokens.bin")


def trains(data):
    """Whether two steps can be trained on ``data``."""

    def loss(model, batch, cfg):
        leaf = next(value for name, value in batch.items() if name not in ("label", "target"))
        return model(leaf.float().flatten(1)[:, :1]).square().mean()

    recipe = replace(tiny.recipe, data=lambda cfg: data, model=lambda cfg, data: torch.nn.Linear(1, 1), loss=loss)
    run = start(replace(recipe, evaluate=None), tiny.TinyConfig(max_steps=2, workers=0))
    return len(list(steps(run))) == 2


def test_the_blocks_of_the_data_page_run_and_train(tmp_path, monkeypatch):
    files_of_the_page()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    known = {"__name__": "page"}
    trained = 0
    for block in blocks("python"):
        if not block.id.startswith("data.md"):
            continue
        for statement in ast.parse(block.values[0]).body:
            exec(compile(ast.Module([statement], []), "data.md", "exec"), known)
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "data":
                assert trains(known["data"]), ast.unparse(statement)
                trained += 1
    assert trained >= 14
    image = torch.rand(4, 3, 8, 8)
    assert not torch.equal(known["augment"]({"image": image}, None)["image"], image)
    assert len(known["labels"]) == 12
    assert "val_auroc" in Path("animals/metrics.jsonl").read_text()


# docs/checkpoints.md: its reader, its tables and its commands


class Average:
    """A hook with a state of all kinds."""

    def __init__(self):
        self.mean, self.notes = (
            torch.zeros(3, dtype=torch.float64),
            ["\u00fc", None, {"big": torch.tensor([True, False])}],
        )

    def __call__(self, run, info):
        self.mean += run.module[2].bias.detach()

    def state_dict(self):
        return {"mean": self.mean, "notes": self.notes}

    def load_state_dict(self, state): ...


def read_by_the_page(folder, tmp_path):
    (code,) = [block.values[0] for block in blocks("python") if FORMAT.name in block.id]
    (tmp_path / "reader.py").write_text(code)
    return runpy.run_path(str(tmp_path / "reader.py"))["read"](folder)


def read_by_scaletrain(folder):
    checkpoint = open_checkpoint(folder)
    parts = {name.rpartition("-")[0] for name in checkpoint.pieces}
    return checkpoint.state, {part: load_new(checkpoint, part) for part in parts}


def same(one, other):
    """Whether two readings hold the same JSON and the same tensors, of the same dtypes."""
    (state, parts), (other_state, others) = one, other
    names = {(part, name) for part in parts for name in parts[part]}
    assert names == {(part, name) for part in others for name in others[part]}
    tensors = [(parts[part][name], others[part][name]) for part, name in names]
    return state == other_state and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)


def test_the_pages_reader_reads_what_scaletrain_reads(tmp_path):
    recipe = replace(tiny.recipe, hooks=lambda cfg: [Average()])
    main(recipe, ["--max-steps", "3", "--out", str(tmp_path / "run")])
    found = read_by_the_page(open_whole(tmp_path / "run")[0].path, tmp_path)
    assert {part: len(tensors) for part, tensors in found[1].items()} == {"model": 4, "optimizer": 12, "hooks": 2}
    assert found[1]["hooks"]["Average.mean"].any()
    assert same(found, read_by_scaletrain(open_whole(tmp_path / "run")[0].path))


@pytest.mark.world_size(2)
def test_the_pages_reader_puts_together_what_two_processes_wrote_and_refuses_what_is_damaged(shared_path, tmp_path):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    devices, mesh = set_up(), init_device_mesh("cpu", (2,))
    whole = {"rows": torch.arange(15.0).reshape(5, 3), "columns": torch.arange(14).reshape(2, 7)}
    alike = {"half": torch.ones(4).bfloat16(), "number": torch.tensor(3.0), "none": torch.zeros(0, 2)}
    model = {name: distribute_tensor(t, mesh, [Shard(dim)]) for dim, (name, t) in enumerate(whole.items())} | alike
    saver = Saver(shared_path / "checkpoints", copying=devices.control, writing=devices.checkpoint)
    saver.save(5, {"model": model}, json.dumps({"unfinished": None}).encode())
    saver.wait()
    if not devices.is_first:
        return
    folder = open_whole(shared_path)[0].path
    found = read_by_the_page(folder, tmp_path)
    assert same(found, ({"unfinished": None}, {"model": whole | alike}))
    assert same(found, read_by_scaletrain(folder))
    for name in ("state.json", "model-00000.safetensors", "model-00001.safetensors"):
        data = (folder / name).read_bytes()
        for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1]):
            (folder / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name} is not what was written"):
                read_by_the_page(folder, tmp_path)
        (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest["files"]
    one, other = files["model-00000.safetensors"], files["model-00001.safetensors"]
    shutil.copy(folder / "model-00001.safetensors", folder / "model-00002.safetensors")
    for changed, why in (
        ({"files": {"model-00001.safetensors": other}}, "a piece of .* is missing"),
        ({"files": files | {"model-00002.safetensors": other}}, "pieces of .* overlap"),
        ({"files": {"../model-00000.safetensors": one}}, "is no file of a checkpoint"),
        ({"version": 2}, "another format or version"),
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | changed))
        with pytest.raises(ValueError, match=why):
            read_by_the_page(folder, tmp_path)


def section(title):
    return re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", FORMAT.read_text(), re.DOTALL | re.MULTILINE)[1]


def rows(title):
    """The first column of the table in a section of the page."""
    return re.findall(r"^\| `(\w+)` \|", section(title), re.MULTILINE)


def test_the_page_lists_every_field_there_is_and_no_other(tmp_path):
    main(tiny.recipe, ["--max-steps", "1", "--out", str(tmp_path / "run")])
    folder = open_whole(tmp_path / "run")[0].path
    assert rows("manifest.json") == list(json.loads((folder / "manifest.json").read_text()))
    assert rows("state.json") == list(json.loads((folder / "state.json").read_text()))
    (counters,) = re.findall(r"^\| `state` \|(.*)", section("state.json"), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", counters)) == sorted(field.name for field in fields(State))


def test_the_page_lists_every_rule_by_which_something_is_refused():
    used, texts = set(), set()
    for path in (ROOT / "scaletrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CheckpointError":
                used |= {rule.value for rule in node.args[:1] if isinstance(rule, ast.Constant)}
    listed = rows("The rules of reading")
    assert len(listed) == len(set(listed))
    assert used <= set(listed) <= texts


def test_the_pages_commands_print_what_it_shows(tmp_path, capsys):
    (command_line,) = entry_points(group="console_scripts", name="scaletrain")

    def run(command, *words):
        if command == "python":
            return launch(sys.executable, *(word.replace("recipes/", f"{ROOT}/recipes/") for word in words)).stdout
        with pytest.raises(SystemExit) as ended:
            command_line.load()(words)
        assert ended.value.code == int("diff" in words)
        return capsys.readouterr().out

    def masked(line):
        return re.sub(r"[\d,.]*\d", "0", line)

    shown = [block.values[0] for block in blocks("console") if FORMAT.name in block.id]
    steps = re.findall(r"^\$ (.*)\n((?:[^$].*\n)+)", "".join(shown), re.MULTILINE)
    assert len(steps) == 6
    for command, lines in steps:
        said = [masked(line) for line in run(*shlex.split(command)).splitlines()]
        assert {masked(line) for line in lines.splitlines()} <= set(said), (command, said)
