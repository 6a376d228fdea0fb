"""The same recipe as a script, through accelerate launch, torchrun and make; and how each way of ending is told."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from launching import ACCELERATE, RECIPES, ROOT, TORCHRUN, launch, script

from recipes.mlp import mlp

QUICK = ("--epochs", "2", "--threads", "1")
CONFIGS = ROOT / "accelerate_configs"


def validations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["val_loss"], line["val_accuracy"]) for line in lines if "val_loss" in line]


def outcome(folder):
    return json.loads((folder / "exit.json").read_text())


@pytest.fixture(scope="module")
def script_run(tmp_path_factory):
    """Validations of the recipe run as a plain script."""
    folder = tmp_path_factory.mktemp("script") / "run"
    ended = launch(sys.executable, RECIPES / "mlp.py", *QUICK, "--out", folder)
    assert ended.returncode == 0, ended.stderr
    return validations(folder)


WAYS = {
    "accelerate launch": (ACCELERATE, 1),
    "accelerate launch, cpu": ((*ACCELERATE, "--config_file", CONFIGS / "cpu.yaml"), 1),
    "accelerate launch, cpu_2proc": ((*ACCELERATE, "--config_file", CONFIGS / "cpu_2proc.yaml"), 2),
    "torchrun": (TORCHRUN, 2),
    "launch/local.sh": ((ROOT / "launch" / "local.sh",), 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_recipe_runs_unchanged_and_gives_the_same_curve(way, script_run, tmp_path):
    command, processes = WAYS[way]
    recipe = "mlp" if "local.sh" in way else RECIPES / "mlp.py"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = launch(*command, recipe, *QUICK, "--out", tmp_path / "run", PATH=path)
    assert ended.returncode == 0, ended.stderr
    assert f"{processes} process" in ended.stdout
    assert outcome(tmp_path / "run") == {"code": 0, "reason": "done"}
    for got, wanted in zip(validations(tmp_path / "run"), script_run, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_config_holds_only_keys_that_accelerate_knows(config):
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.utils import DistributedType

    content = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    known = set(ClusterConfig.__dataclass_fields__)
    assert set(content) <= known
    assert content["distributed_type"] in DistributedType.__members__
    processes = {"cpu": 1, "cpu_2proc": 2, "mps": 1, "single_gpu": 1, "ddp": 8, "fsdp2": 8, "multi_node": 16}
    assert content["num_processes"] == processes[config]


def test_the_configs_are_these():
    there = {"cpu", "cpu_2proc", "mps", "single_gpu", "ddp", "fsdp2", "multi_node"}
    assert {path.stem for path in CONFIGS.iterdir()} == there


def test_an_unknown_recipe_is_named():
    ended = launch(ROOT / "launch" / "local.sh", "cn")
    assert ended.returncode == 2
    there = "binary cnn cnn_own_loop cnn_sam finetune lm mlp multilabel regression text vit"
    assert ended.stderr == f"error: no recipe 'cn'; there are: {there}\n"


def test_make_alone_prints_the_targets():
    ended = launch("make", "-C", ROOT, "--no-print-directory")
    targets = re.findall(r"^  make ([a-z-]+) +\S", ended.stdout, re.MULTILINE)
    assert targets == [
        "help",
        "setup",
        "train",
        "test",
        "test-faults",
        "test-slurm",
        "test-min",
        "lint",
        "check",
        "bench",
        "bench-gpu",
        "clean",
    ]


def test_make_train_hands_on_recipe_and_options_and_installs_nothing_twice():
    done = (".venv/.installed", "-n", "train", "RECIPE=mlp", "ARGS=--lr 3e-3")
    said = launch("make", "-C", ROOT, "--no-print-directory", "-o", *done).stdout
    assert said == "launch/local.sh mlp --lr 3e-3\n"


def test_make_train_hands_over_to_the_script_of_the_cluster():
    done = (".venv/.installed", "-n", "train", "CLUSTER=torchrun", "RECIPE=mlp", "ARGS=--lr 3e-3")
    said = launch("make", "-C", ROOT, "--no-print-directory", "-o", *done).stdout
    assert said == "launch/torchrun.sh mlp --lr 3e-3\n"


TORCHRUN_SH = ROOT / "launch" / "torchrun.sh"


def test_torchrun_sh_runs_a_recipe_by_its_name_and_gives_the_same_curve(script_run, tmp_path):
    ended = launch(TORCHRUN_SH, "mlp", *QUICK, "--out", tmp_path / "run", GPUS="0", PROCESSES="2")
    assert ended.returncode == 0, ended.stderr
    assert "2 processes on cpu" in ended.stdout
    for got, wanted in zip(validations(tmp_path / "run"), script_run, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        ((), {}, "usage: launch/torchrun.sh RECIPE [options]; recipes: binary cnn"),
        (("cn",), {}, "no recipe 'cn'; there are: binary cnn"),
        (("mlp",), {}, "what is started again needs the same folder each time: give --out or set SCALETRAIN_OUT"),
        (("mlp", "--out=x"), {"NODES": "4:2", "HEAD": "a:1"}, "NODES=4:2: expected a number of machines, or MIN:MAX"),
        (("mlp", "--out=x"), {"NODES": "2"}, "HEAD=: expected HOST:PORT, the same on all 2 machines, as node1:29400"),
        (("mlp", "--out=x"), {"RESTARTS": "-1"}, "RESTARTS=-1: expected a whole number, 0 or more"),
        (("mlp", "--out=x"), {"GPUS": "99"}, "GPUS=99: this machine has "),
        (("mlp", "--out=x"), {"CONFIG": "none", "GPUS": "0"}, "CONFIG=none: there is no "),
    ],
)
def test_torchrun_sh_says_in_one_line_what_it_was_given(words, env, said):
    ended = launch(TORCHRUN_SH, *words, **env)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {said}")
    assert ended.stderr.count("\n") == 1


def test_torchrun_sh_ends_with_the_code_of_the_run(tmp_path):
    ended = launch(TORCHRUN_SH, "mlp", "--lr", "nonsense", "--out", tmp_path / "run", GPUS="0", RESTARTS="0")
    assert ended.returncode == 1  # before there is a folder, torchrun's own
    ended = launch(TORCHRUN_SH, "mlp", *QUICK, "--out", tmp_path / "run", GPUS="0", RESTARTS="0")
    assert ended.returncode == 0
    again = ("mlp", *QUICK, "--seed", "1", "--out", tmp_path / "run")
    ended = launch(TORCHRUN_SH, *again, GPUS="0", RESTARTS="0")
    assert ended.returncode == 2
    assert outcome(tmp_path / "run")["code"] == 2


def test_torchrun_sh_divides_the_model_where_the_config_says_so(tmp_path):
    options = ("mlp", *QUICK, "--out", tmp_path / "run")
    ended = launch(TORCHRUN_SH, *options, GPUS="0", PROCESSES="2", CONFIG="fsdp2")
    assert ended.returncode == 0, ended.stderr
    assert "2 processes, the model divided over them (FSDP2), on cpu" in ended.stdout


def test_a_config_of_accelerate_reaches_the_processes_as_accelerate_launch_passes_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    torchrun = importlib.import_module("torchrun")
    (tmp_path / "accelerate_configs").mkdir()
    (tmp_path / "accelerate_configs/sharded.yaml").write_text("""
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
num_machines: 1
num_processes: 8
machine_rank: 0
mixed_precision: bf16
use_cpu: false
""")
    monkeypatch.setattr(torchrun, "HOME", tmp_path)
    found = torchrun.exports("sharded", RECIPES / "mlp.py")
    wanted = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }
    assert found.items() >= wanted.items()
    assert not any(name.startswith(("RANK", "WORLD", "MASTER")) for name in found)


def test_a_rank_that_ends_early_is_told_and_never_looks_like_success(tmp_path):
    body = """
def loss(model, batch, cfg):
    if torch.distributed.get_rank() == 1:
        sys.exit(0)
    return tiny.loss(model, batch, cfg)

main(replace(tiny.recipe, loss=loss), ["--max-steps", "30", "--out", "run"])
"""
    ended = launch(*TORCHRUN, script(tmp_path, body))
    assert ended.returncode != 0
    assert re.search(r"rank +: 1 .*\n +exitcode +: 70", ended.stderr)
    assert outcome(tmp_path / "run") == {"code": 70, "reason": "rank 1 called exit before the end of training"}


def test_a_bug_keeps_its_traceback_and_is_recorded(tmp_path):
    body = """
def loss(model, batch, cfg):
    return undefined_name

main(replace(tiny.recipe, loss=loss), ["--max-steps", "30", "--out", "run"])
"""
    ended = launch(sys.executable, script(tmp_path, body))
    assert ended.returncode == 1
    assert "NameError: name 'undefined_name' is not defined" in ended.stderr
    assert outcome(tmp_path / "run") == {"code": 1, "reason": "NameError: name 'undefined_name' is not defined"}


def test_a_bug_on_one_rank_ends_all_with_its_traceback(tmp_path):
    body = """
def loss(model, batch, cfg):
    if torch.distributed.get_rank() == 1:
        raise KeyError("only here")
    return tiny.loss(model, batch, cfg)

main(replace(tiny.recipe, loss=loss), ["--max-steps", "30", "--out", "run"])
"""
    ended = launch(*TORCHRUN, script(tmp_path, body), timeout=60)
    assert ended.returncode != 0
    assert "KeyError: 'only here'" in ended.stderr
    assert outcome(tmp_path / "run")["reason"] == "KeyError: 'only here'"


@contextmanager
def under_way(folder):
    """A run of many epochs that has validated once; killed at the end."""
    command = [sys.executable, str(RECIPES / "mlp.py"), "--epochs", "100000", "--out", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=listen_to_ctrl_c) as process:
        try:
            while not process.stdout.readline().startswith("epoch"):
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def listen_to_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell inherit that it is ignored


def test_ctrl_c_ends_with_130_and_says_so(tmp_path):
    with under_way(tmp_path / "run") as process:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.fullmatch(r"interrupted: saved after step \d+; to go on: the same command with --out \S+\n", said)
    assert outcome(tmp_path / "run") == {"code": 130, "reason": said.strip()}


def test_an_old_outcome_is_gone_while_a_run_is_under_way(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"code": 1, "reason": "an earlier failure"}')
    with under_way(tmp_path / "run"):
        assert not (tmp_path / "run" / "exit.json").exists()


def test_the_tutorials_mlp_is_what_the_recipe_builds():
    assert sum(p.numel() for p in mlp(20, 3).parameters()) == 5699
