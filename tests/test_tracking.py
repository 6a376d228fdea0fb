"""What a run says and writes: the console, the files of its folder, wandb, and what happens when a tracker fails."""

import io
import json
import re
import struct
import sys
from dataclasses import replace

import pytest
import tiny
from launching import RECIPES, TORCHRUN, launch
from rich.console import Console
from safetensors.torch import load_file, load_model

from recipes import mlp
from scaletrain import Data, main, start, train
from scaletrain.tracking import StepLine, Tracking


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_start_says_model_parameters_topology_and_length(capsys):
    recipe = replace(tiny.recipe, model=lambda cfg, data: mlp.mlp(20, 3), loss=None)
    start(replace(recipe, loss=tiny.loss, data=lambda cfg: wide()), tiny.TinyConfig(max_steps=7, micro_batch_size=3))
    said = capsys.readouterr().out
    assert "(0): Linear(in_features=20, out_features=64, bias=True)" in said
    assert "5,699 parameters" in said
    assert (
        "1 process on cpu, fp32, 1 thread each, global batch 16 = 1 x at most 3 x 6 (processes x micro-batch x count)"
        in said
    )
    assert "train 30 examples, val 5; 7 steps" in said
    assert re.search(r"run folder runs/tiny/\d{8}-\d{6}", said)


def wide():
    import torch

    columns = {"x": torch.zeros(30, 20), "y": torch.zeros(30, dtype=torch.long)}
    return Data(columns, val={name: column[:5] for name, column in columns.items()})


def test_a_validation_prints_the_tutorials_line(capsys):
    main(tiny.recipe, ["--epochs", "2"])
    said = capsys.readouterr().out
    assert re.search(r"^epoch 01  train \d\.\d{4}  val \d\.\d{4}  accuracy \d\.\d{4}$", said, re.MULTILINE)
    assert re.search(r"^best val_loss \d\.\d{4} at step \d+$", said, re.MULTILINE)
    assert "weights of step 13: runs/" in said
    assert "\x1b" not in said  # plain where there is no terminal


def test_with_validate_every_the_line_names_the_step(capsys):
    main(tiny.recipe, ["--max-steps", "4", "--validate-every", "2"])
    assert re.search(r"^step 2  train", capsys.readouterr().out, re.MULTILINE)


def test_the_run_folder_holds_what_ran_and_what_came_out(tmp_path):
    result = main(tiny.recipe, ["--max-steps", "25", "--out", str(tmp_path / "run"), "--lr", "0.02"])
    run = tmp_path / "run"
    files = ("config", "environment", "result", "exit")
    wanted = {f"{name}.json" for name in files} | {"recipe.py", "metrics.jsonl", "timing.jsonl"}
    wanted |= {"checkpoints", "model.safetensors"}
    assert {path.name for path in run.iterdir()} == wanted
    config = json.loads((run / "config.json").read_text())
    assert (config["lr"], config["max_steps"], config["batch_size"]) == (0.02, 25, 16)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["processes"] == 1
    assert {"torch", "accelerate", "safetensors"} <= set(environment["versions"])
    assert (run / "recipe.py").read_text() == (RECIPES.parent / "tests" / "tiny.py").read_text()
    outcome = json.loads((run / "result.json").read_text())
    assert outcome["metrics"] == result.metrics
    assert (outcome["step"], outcome["best"]) == (25, result.best)
    assert json.loads((run / "exit.json").read_text()) == {"code": 0, "reason": "done"}
    timing = {"step", "seconds", "examples_per_second", "waiting_for_data"}
    assert all(set(line) == timing for line in lines_of(run / "timing.jsonl"))
    for line in lines_of(run / "metrics.jsonl"):
        assert not {"seconds", "examples_per_second", "time"} & set(line)


def test_metrics_are_a_function_of_the_run_alone(tmp_path):
    for name in "ab":
        main(tiny.recipe, ["--max-steps", "25", "--out", str(tmp_path / name)])
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    assert len(lines_of(tmp_path / "a/metrics.jsonl")) == 4 + 4  # losses at 1, 10, 20, 25; validations at 7, 13, 19, 25


def test_the_exported_weights_are_the_last_steps_under_plain_names(tmp_path):
    run = start(tiny.recipe, tiny.TinyConfig(max_steps=3, out=str(tmp_path / "run")))
    train(run)
    run.finish()
    weights = load_file(tmp_path / "run/model.safetensors")
    assert sorted(weights) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert all(weights[name].equal(value) for name, value in run.module.state_dict().items())
    assert (tmp_path / "run/model.safetensors").stat().st_mode & 0o777 == (
        tmp_path / "run/result.json"
    ).stat().st_mode & 0o777


def test_tied_weights_are_exported_once_and_load_again(tmp_path):
    from torch import nn

    def tied(cfg, data):
        net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3))
        net[1].weight = net[0].weight
        return net

    run = start(replace(tiny.recipe, model=tied), tiny.TinyConfig(max_steps=3, out=str(tmp_path / "run")))
    train(run)
    run.finish()
    again = tied(None, None)
    load_model(again, str(tmp_path / "run/model.safetensors"))
    assert all(a.equal(b) for a, b in zip(again.parameters(), run.module.parameters(), strict=True))


def test_two_runs_in_the_same_second_get_folders_of_their_own():
    folders = {start(tiny.recipe, tiny.TinyConfig(max_steps=1)).folder for _ in range(3)}
    assert len(folders) == 3


@pytest.mark.parametrize(
    ("env", "folder"),
    [({"SCALETRAIN_OUT": "elsewhere"}, "elsewhere"), ({"SLURM_JOB_ID": "42"}, "runs/tiny/slurm-42")],
)
def test_the_environment_may_name_the_folder(env, folder, monkeypatch, tmp_path):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert start(tiny.recipe, tiny.TinyConfig(max_steps=1)).folder == tmp_path / folder
    given = start(tiny.recipe, tiny.TinyConfig(max_steps=1, out="given")).folder
    assert given == tmp_path / "given"


def test_a_launcher_that_restarts_needs_a_stable_folder(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(SystemExit):
        main(tiny.recipe, ["--max-steps", "1"])
    assert "needs the same folder each time: give --out or set SCALETRAIN_OUT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"batch_size": 500}, "batch_size 500 exceeds the 101 training examples: steps repeat some"),
        ({"workers": 2}, "workers 2 has no effect: columns in memory are read in the training process"),
        ({"validate_every": 3}, "validate_every 3 has no effect: the recipe's data has no val"),
    ],
)
def test_a_setting_that_has_no_effect_earns_a_warning(options, warning, capsys):
    recipe = replace(tiny.recipe, data=lambda cfg: Data(tiny.table()))
    start(recipe, tiny.TinyConfig(max_steps=1, **options))
    assert f"warning: {warning}\n" in capsys.readouterr().out


def test_rank_0_alone_speaks_and_writes(tmp_path):
    ended = launch(*TORCHRUN, RECIPES / "mlp.py", "--epochs", "2", "--out", tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("2 processes on cpu, fp32, 1 thread each, global batch 64 = 2 x 32 x 1") == 1
    assert ended.stdout.count("epoch 01  train") == 1
    assert [line["step"] for line in lines_of(tmp_path / "run/metrics.jsonl") if "val_loss" in line] == [23, 45]


def test_wandb_works_offline_without_a_key_and_holds_what_metrics_jsonl_holds(tmp_path):
    ended = launch(
        sys.executable,
        RECIPES / "mlp.py",
        "--epochs",
        "3",
        "--track",
        "wandb",
        "--out",
        tmp_path / "run",
        HOME=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert "tracking with wandb, offline" in ended.stdout
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    history, config = read_wandb(file)
    for line in lines_of(tmp_path / "run/metrics.jsonl"):
        values = {name: value for name, value in line.items() if name not in ("step", "epoch", "samples_seen")}
        assert values.items() <= history[line["step"]].items()
    assert config["batch_size"] == 64
    assert config["lr"] == 3e-3


def read_wandb(file):
    """Read an offline run back: {step: values} and the config, from wandb's records."""
    from wandb.proto import wandb_internal_pb2

    def named(items):
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    history, config = {}, {}
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = named(record.history.item)
            history.setdefault(values["_step"], {}).update(values)
        config |= named([*record.run.config.update, *record.config.update])
    return history, config


def leveldb_records(raw, block=32768, head=7):
    """Yield the records of a LevelDB log: blocks of pieces, each with checksum, length and type (last is 1 or 4)."""
    at, parts = head, b""
    while at + head <= len(raw):
        if block - at % block < head:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        parts += raw[at + head : at + head + length]
        at += head + length
        if kind in (1, 4):
            yield parts
            parts = b""


class FailingTracker:
    calls = 0
    tracker = None

    def __init__(self, *args, **kwargs):
        pass

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step):
        FailingTracker.calls += 1
        if FailingTracker.calls == 3:
            raise ConnectionError("the server is gone\nand more")

    def finish(self):
        raise AssertionError("it was dropped")


def test_a_tracker_that_fails_is_warned_of_once_and_never_stops_training(monkeypatch, capsys):
    FailingTracker.calls = 0
    monkeypatch.setattr("scaletrain.tracking.WandBTracker", FailingTracker)
    result = main(tiny.recipe, ["--max-steps", "50", "--track", "wandb"])
    said = capsys.readouterr().out
    assert result.step == 50
    assert FailingTracker.calls == 3
    failure = "the tracker failed and is off from here on (ConnectionError: the server is gone)"
    warning = f"warning: {failure}; metrics.jsonl has everything"
    assert said.count(warning) == said.count("warning") == 1


def test_a_tracker_that_cannot_start_never_stops_training(monkeypatch, capsys):
    monkeypatch.setattr(FailingTracker, "start", lambda self: 1 / 0)
    monkeypatch.setattr("scaletrain.tracking.WandBTracker", FailingTracker)
    assert main(tiny.recipe, ["--max-steps", "5", "--track", "wandb"]).step == 5
    assert "the tracker failed and is off from here on (ZeroDivisionError" in capsys.readouterr().out


def test_nan_is_null_in_metrics_jsonl(tmp_path):
    tracking = Tracking(tmp_path)
    tracking.log({"val_loss": float("nan"), "val_x": float("inf"), "val_y": 1.5}, step=1, epoch=0.1, samples_seen=3)
    tracking.close()
    (line,) = lines_of(tmp_path / "metrics.jsonl")
    assert (line["val_loss"], line["val_x"], line["val_y"]) == (None, None, 1.5)


def test_a_terminal_shows_a_bar_with_epoch_step_loss_rate_speed_and_time_left(monkeypatch):
    monkeypatch.setattr("scaletrain.tracking.REDRAW_SECONDS", 0)
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    line = StepLine(console, total_steps=100)
    line.examples_per_second = 1234.5
    line.show(40, 2.5, {"loss": 0.5, "lr": 1e-3})
    line.show(50, 3.0, {"loss": 0.4321, "lr": 1e-3})
    line.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert re.search(r"epoch 3\.0  step 50/100 .* loss 0\.4321  lr 1\.0e-03  1,234 examples/s +-?\d?[:\d-]+", shown)


def test_without_a_terminal_a_line_now_and_then(monkeypatch):
    console = Console(file=io.StringIO())
    line = StepLine(console, total_steps=100)
    line.show(1, 0.1, {"loss": 0.5, "lr": 1e-3})
    assert console.file.getvalue() == ""  # nothing in the first seconds
    monkeypatch.setattr(line, "_seconds", 0)
    line.show(2, 0.1, {"loss": 0.5, "lr": 1e-3})
    assert console.file.getvalue() == "step 2/100  epoch 0.1  loss 0.5000  lr 1.0e-03  \n"


def test_tensorboard_holds_what_metrics_jsonl_holds_through_a_kill(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def end(run, info):
        if info.step == 13 and not (tmp_path / "ended").exists():
            (tmp_path / "ended").touch()
            raise RuntimeError("ended")

    recipe = replace(tiny.recipe, hooks=lambda cfg: [end])
    argv = ["--max-steps", "20", "--checkpoint-every", "5", "--log-every", "1", "--track", "tensorboard"]
    with pytest.raises(RuntimeError, match="ended"):
        main(recipe, [*argv, "--out", str(tmp_path / "run")])
    main(recipe, [*argv, "--out", str(tmp_path / "run")])
    assert "tracking with tensorboard --logdir run" in capsys.readouterr().out
    found = EventAccumulator(str(tmp_path / "run/tensorboard"))
    found.Reload()
    told = [(event.step, event.value) for event in found.Scalars("loss")]
    lines = [line for line in lines_of(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert [step for step, _ in told] == [line["step"] for line in lines] == list(range(1, 21))
    assert [value for _, value in told] == pytest.approx([line["loss"] for line in lines])
