"""The house: imports go one way, the public names are these, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

import scaletrain

LAYERS = (  # each may import those before it
    ("errors",),
    ("new", "plots", "pulse"),
    ("permutation", "schedules", "config", "state", "signals", "grace", "randomness", "mixing", "blocks", "misfit"),
    ("order", "agreement", "optimizers", "optimizer_state", "sharding", "meeting"),
    ("share", "metrics", "slurm"),
    ("devices",),
    ("checkpoint",),
    ("folder", "ema", "alike"),
    ("memory",),
    ("tracking",),
    ("batches",),
    ("data", "loss", "unreadable"),
    ("recipe", "content"),
    ("sources", "readers", "division"),
    ("workers",),
    ("loader",),
    ("streams",),
    ("feed",),
    ("run",),
    ("loop",),
    ("hooks", "plateau"),
    ("opening",),
    ("build",),
    ("predict", "rates", "watchdog"),
    ("entry",),
    ("cli",),
    ("__init__",),
)
FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}


def imports_of(path):
    """The modules a file imports, wherever in it, but for those under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            yield from [f"{node.module}.{a.name}" if node.module == "scaletrain" else node.module for a in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name for alias in node.names]


FILES = sorted((ROOT / "scaletrain").rglob("*.py"))


def room(path):
    """The file's name without .py, or the folder's for one that has become a folder."""
    return path.stem if path.parent.name == "scaletrain" else path.parent.name


def test_imports_go_one_way():
    level = {module: i for i, modules in enumerate(LAYERS) for module in modules}
    assert {room(path) for path in FILES} == set(level)
    for path in FILES:
        for name in imports_of(path):
            if name.startswith("scaletrain.") and name.split(".")[1] != room(path):
                assert level[name.split(".")[1]] < level[room(path)], f"{path} imports {name}"


def test_checkpoints_know_tensors_json_and_folders_but_no_run():
    names = {name for path in FILES if room(path) == "checkpoint" for name in imports_of(path)}
    ours = {name.split(".")[1] for name in names if name.startswith("scaletrain.")}
    assert ours <= {"checkpoint", "agreement", "errors"}


def test_the_library_does_not_know_its_recipes_tests_or_benchmarks():
    names = {name.split(".")[0] for path in FILES for name in imports_of(path)}
    assert names.isdisjoint({"recipes", "tests", "benchmarks"})


def test_recipes_import_the_library_field_libraries_and_each_other():
    field = {"torch", "numpy", "kornia", "torchmetrics", "transformers"}
    standard = {"collections", "dataclasses", "functools", "json", "math", "pathlib", "re", "sys", "typing", "zlib"}
    allowed = {"scaletrain", "recipes"} | field | standard
    for path in (ROOT / "recipes").glob("*.py"):
        names = list(imports_of(path))
        assert {name.split(".")[0] for name in names} <= allowed, path.name
        for name in names:
            assert not name.startswith("scaletrain.") or name.split(".")[1] in scaletrain.__all__, (
                f"{path.name}: {name}"
            )


def test_nothing_that_runs_code_from_a_file_is_imported_or_called():
    for path in FILES:
        assert FORBIDDEN.isdisjoint(name.split(".")[0] for name in imports_of(path)), path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "torch.save", "np.load"}, f"{path.name}: {called}"
                assert not called.endswith(("_object", "_object_list")), f"{path.name}: {called}"


def test_the_public_names_are_these():
    assert scaletrain.__all__ == [
        "CheckpointError", "Config", "Data", "Given", "InputError", "Plateau", "Recipe", "Result", "Run", "Sequential",
        "StepInfo", "Weighted", "adam", "adamw", "constant", "cosine", "cutmix", "forward_backward", "load",
        "load_weights", "main", "mixup", "muon", "one_cycle", "parameter_groups", "parse", "predict", "sgd", "start",
        "step_decay", "steps", "torch_schedule", "train", "train_step", "validate", "warmup_cosine",
        "warmup_stable_decay",
    ]  # fmt: skip
    for name in scaletrain.__all__:
        assert getattr(scaletrain, name).__doc__, f"{name} has no docstring"
    assert set(scaletrain.__all__) <= set(dir(scaletrain))


def test_the_names_for_type_checkers_are_the_same():
    tree = ast.parse(Path(scaletrain.__file__).read_text())
    (branch,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert sorted(alias.name for node in branch.body for alias in node.names) == scaletrain.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'scaletrain' has no attribute 'Trainer'"):
        scaletrain.Trainer  # noqa: B018


def modules_after(code):
    """Which heavy modules are loaded in a fresh interpreter after ``code``."""
    heavy = (
        "torch",
        "accelerate",
        "datasets",
        "wandb",
        "sklearn",
        "torchmetrics",
        "kornia",
        "tyro",
        "pandas",
        "matplotlib",
    )
    program = f"{code}\nimport sys\nprint(*[name for name in {heavy!r} if name in sys.modules])"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_the_command_says_what_it_can_without_torch():
    silent = "import contextlib, io\nwith contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):"
    assert modules_after(f"from scaletrain.cli import main\n{silent} main(['--help'])") == {"tyro"}


def test_importing_the_package_waits_for_nothing():
    assert modules_after("import scaletrain") == set()
    assert modules_after("from scaletrain import Config") == set()


def test_a_recipe_imports_only_what_it_needs():
    assert modules_after("import recipes.cnn; from scaletrain import start") == {"torch", "accelerate"}


def test_a_recipes_help_comes_before_any_accelerator():
    program = (
        "import sys, runpy; sys.argv = ['cnn.py', '--help']\n"
        "try: runpy.run_module('recipes.cnn', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "from accelerate.state import PartialState; assert PartialState._shared_state == {}"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--micro-batch-size" in ended.stdout
