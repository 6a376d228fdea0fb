"""When a run saves, what stays, what it goes on from, and what it refuses to."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import numpy as np
import psutil
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from killing import wait_for
from launching import TORCHRUN, launch, script
from safetensors.torch import load_file
from test_tracking import read_wandb
from torch import nn
from worlds import WORLD, belongs_to

from scaletrain import CheckpointError, Data, load_weights, main, start, train
from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.load import load_new
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.strict import dump
from scaletrain.checkpoint.verify import open_checkpoint, verify
from scaletrain.cli import main as command
from scaletrain.order import Sequential
from scaletrain.run.capture import captured
from scaletrain.run.restore import restore
from scaletrain.state import State


def run_tiny(out, *argv, recipe=tiny.recipe):
    return main(recipe, ["--max-steps", "20", "--validate-every", "5", "--out", str(out), *map(str, argv)])


def steps_in(out):
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())


def checkpoint(out, step):
    return out / f"checkpoints/step-{step:09d}"


def ends_with(code, capsys, work):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def left_after(out, step):
    """Make a finished run look as if its process had been killed after ``step``."""
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (out / "exit.json").unlink()


# when it saves, and what stays


def measured_by(values):
    """A recipe whose validation loss is ``values[step]``, else 1."""

    def evaluate(model, batch, cfg):
        return {"loss": torch.full((len(batch["y"]),), values.get(evaluate.step, 1.0))}

    def follow(run, info):
        evaluate.step = info.step + 1

    evaluate.step = 1
    return replace(tiny.recipe, evaluate=evaluate, hooks=lambda cfg: [follow])


def test_the_last_the_best_and_every_nth_stay_by_rules_of_their_own(tmp_path):
    run_tiny(tmp_path, "--checkpoint-every", 2, "--keep-every", 8, "--keep-last", 3, recipe=measured_by({5: 0.5}))
    assert steps_in(tmp_path) == [5, 8, 16, 18, 20]  # 16, 18, 20 the last; 8 and 16 for ever; 5 the best


def test_without_a_number_of_steps_the_best_and_the_end_are_saved(tmp_path):
    run_tiny(tmp_path, recipe=measured_by({10: 0.5}))
    assert steps_in(tmp_path) == [10, 20]


def test_a_damaged_checkpoint_never_counts_among_the_last(tmp_path):
    def damage(run, info):
        if info.step == 12:
            run.saver.wait()
            run.saver.keep.verified.clear()
            next(checkpoint(tmp_path, 10).glob("model*")).write_bytes(b"rot")

    recipe = replace(tiny.recipe, hooks=lambda cfg: [damage], evaluate=None, data=lambda cfg: Data(tiny.table()))
    main(recipe, ["--max-steps", "12", "--checkpoint-every", "2", "--out", str(tmp_path)])
    assert steps_in(tmp_path) == [8, 10, 12]


def test_the_export_holds_the_best_weights_and_the_result_their_metrics(tmp_path):
    result = run_tiny(tmp_path, "--lr", 0.5, "--keep-every", 5, recipe=measured_by({10: 0.25}))
    exported = load_file(tmp_path / "model.safetensors")
    best = load_new(open_checkpoint(checkpoint(tmp_path, 10)), "model")
    assert exported.keys() == best.keys()
    assert all(torch.equal(exported[name], best[name]) for name in best)
    assert result.metrics["val_loss"] == result.best == 0.25
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == result.metrics


def test_the_test_split_is_measured_with_the_best_weights(tmp_path):
    seen = []

    def evaluate(model, batch, cfg):
        if len(batch["y"]) == 7:
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return tiny.evaluate(model, batch, cfg)

    recipe = replace(tiny.recipe, data=lambda cfg: Data(tiny.table(), tiny.table(53, seed=1), tiny.table(7, seed=2)))
    run_tiny(tmp_path, "--lr", 3, "--batch-size", 64, recipe=replace(recipe, evaluate=evaluate))
    exported = load_file(tmp_path / "model.safetensors")
    assert len(seen) == 1
    assert all(torch.equal(seen[0][name], exported[name]) for name in exported)


def test_a_best_checkpoint_that_is_lost_is_missed_loudly_and_the_last_weights_are_exported(tmp_path, capsys):
    def lose(run, info):
        if info.step == 15:
            run.saver.wait()
            next(checkpoint(tmp_path, 10).glob("model*")).write_bytes(b"rot")

    recipe = measured_by({10: 0.5})
    follow = recipe.hooks(None)
    run_tiny(tmp_path, recipe=replace(recipe, hooks=lambda cfg: [*follow, lose]))
    assert "the best weights, of step 10, cannot be had" in capsys.readouterr().out
    last = load_new(open_checkpoint(checkpoint(tmp_path, 20)), "model")
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(exported[name], last[name]) for name in last)


# what is in it


def test_every_counter_is_saved_and_comes_back(tmp_path):
    run = start(tiny.recipe, tiny.TinyConfig(out=str(tmp_path), max_steps=9))
    train(run)
    values = {"step": 9, "samples_seen": 333, "best": 0.125, "best_step": 3, "best_metrics": {"val_x": float("nan")}}
    values["lr_factor"] = 0.25
    for i, field in enumerate(fields(State)):
        value = values.get(field.name, "why" if field.type == "str" or field.type is str else i % 9)
        setattr(run.state, field.name, value)
    parts, facts = captured(run)
    assert facts["state"].keys() == {field.name for field in fields(State)}
    saver = Saver(tmp_path / "other")
    saver.save(9, parts, dump(facts))
    saver.wait()
    again = start(tiny.recipe, tiny.TinyConfig(out=str(tmp_path / "again"), max_steps=9))
    restore(again, open_checkpoint(tmp_path / "other/step-000000009"))
    for field in fields(State):
        assert repr(getattr(again.state, field.name)) == repr(getattr(run.state, field.name)), field.name


def test_the_fp16_scaler_goes_on_where_it_was(tmp_path):
    run = start(tiny.recipe, tiny.TinyConfig(out=str(tmp_path), max_steps=3, checkpoint_every=1))
    run.gradients.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    train(run)
    scale, tracker = run.gradients.scaler.get_scale(), run.gradients.scaler._get_growth_tracker()
    assert tracker == 3
    left_after_three = start(tiny.recipe, tiny.TinyConfig(out=str(tmp_path / "b"), max_steps=3))
    left_after_three.gradients.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=7)
    restore(left_after_three, open_checkpoint(checkpoint(tmp_path, 3)))
    assert (left_after_three.gradients.scaler.get_scale(), left_after_three.gradients.scaler._get_growth_tracker()) == (
        scale,
        tracker,
    )


class Stubborn:
    """A hook whose state is given."""

    def __init__(self, state):
        self.state = state

    def __call__(self, run, info):
        pass

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": {"b": [1, {2, 3}]}}, "the state of hook Stubborn.a.b.1 is a set"),
        ({"a": (1, 2)}, "Stubborn.a is a tuple"),
        ({"rate": float("nan")}, "Stubborn.rate is nan"),
        ({"big": 2**63}, "Stubborn.big is 9223372036854775808"),
        ({1: "one"}, "Stubborn is a dict"),
        ({"f": print}, "Stubborn.f is a builtin_function_or_method"),
        ({"z": torch.zeros(2, dtype=torch.complex64)}, "hooks 'Stubborn.z' is torch.complex64"),
    ],
)
def test_a_hooks_state_that_cannot_be_saved_is_refused_when_saving_with_its_path(state, said, tmp_path, capsys):
    recipe = replace(tiny.recipe, hooks=lambda cfg: [Stubborn(state)])
    assert said in ends_with(3, capsys, lambda: run_tiny(tmp_path / "run", recipe=recipe))


def test_a_hooks_state_comes_back_as_it_was(tmp_path):
    state = {"t": torch.arange(3.0), "deep": [{"x": [1, 2.5, "three", None, True], "e": torch.zeros(0)}], "i": -1}
    first = replace(tiny.recipe, hooks=lambda cfg: [Stubborn(state)])
    run_tiny(tmp_path, "--checkpoint-every", 10, "--keep-last", 99, recipe=first)
    left_after(tmp_path, 10)
    again = Stubborn({})
    run_tiny(tmp_path, recipe=replace(tiny.recipe, hooks=lambda cfg: [again]))
    assert torch.equal(again.state["t"], state["t"])
    assert again.state["deep"][0]["x"] == state["deep"][0]["x"]
    assert again.state["deep"][0]["e"].shape == (0,)
    assert again.state["i"] == -1


class TiedNet(nn.Module):
    """Shared weights, channels_last, bf16, float64, a buffer of whole numbers, an embedding with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(101, 8, sparse=True)
        self.one = nn.Linear(5, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.three = nn.Parameter(torch.eye(8))
        self.conv = nn.Conv2d(2, 8, 2).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        self.out = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, batch):
        self.seen += self.training
        hidden = self.one(batch["x"]) + self.embed(batch["row"]) @ self.three * self.scale.float()
        return self.out(self.two(hidden) + self.conv(hidden.view(-1, 2, 2, 2)).flatten(1))


def odd_optimizer(model, cfg):
    return Both(model)


class Both(torch.optim.Optimizer):
    """SparseAdam for the embedding and AdamW for the rest, as one."""

    def __init__(self, model):
        rest = [p for name, p in model.named_parameters() if name != "embed.weight"]
        self.parts = [torch.optim.SparseAdam([model.embed.weight]), torch.optim.AdamW(rest, fused=True)]
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups
        self.state = JoinedState(part.state for part in self.parts)

    def step(self, closure=None):
        for part in self.parts:
            part.step()


class JoinedState(dict):
    """The states of several optimizers, by parameter."""

    def __init__(self, states):
        self.states = list(states)

    def get(self, parameter, default=None):
        return next((state[parameter] for state in self.states if parameter in state), default)

    def __contains__(self, parameter):
        return any(parameter in state for state in self.states)


def test_shared_weights_odd_dtypes_layouts_and_sparse_gradients_come_back_to_the_bit(tmp_path):
    def loss(model, batch, cfg):
        return F.cross_entropy(model(batch), batch["y"])

    recipe = replace(tiny.recipe, model=lambda cfg, data: TiedNet(), loss=loss, evaluate=None, optimizer=odd_optimizer)
    recipe = replace(recipe, data=lambda cfg: Data(tiny.table()))
    main(recipe, ["--max-steps", "8", "--checkpoint-every", "4", "--out", str(tmp_path)])
    whole = load_new(open_checkpoint(checkpoint(tmp_path, 8)), "model")
    state = load_new(open_checkpoint(checkpoint(tmp_path, 8)), "optimizer")
    assert "three" not in whole or "two.weight" not in whole  # once
    left_after(tmp_path, 4)
    main(recipe, ["--max-steps", "8", "--out", str(tmp_path)])
    again = open_checkpoint(checkpoint(tmp_path, 8))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_new(again, "model").items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_new(again, "optimizer").items())
    net = load_weights(TiedNet(), tmp_path)
    assert torch.equal(net.two.weight, net.three)
    assert torch.equal(net.three, whole.get("three", whole.get("two.weight")))


OPTIMIZERS = [
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_of_torchs_optimizers_goes_on_with_the_same_bits(name, tmp_path):
    recipe = replace(tiny.recipe, optimizer=lambda model, cfg: getattr(torch.optim, name)(model.parameters(), lr=0.01))
    run_tiny(tmp_path / "whole", recipe=recipe)
    run_tiny(tmp_path / "again", "--checkpoint-every", 7, "--keep-last", 9, recipe=recipe)
    left_after(tmp_path / "again", 7)
    run_tiny(tmp_path / "again", recipe=recipe)
    assert_same_end(tmp_path / "whole", tmp_path / "again")


def assert_same_end(one, other):
    for name in ("model.safetensors", "metrics.jsonl", "result.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    last = [sorted((out / "checkpoints").iterdir())[-1] for out in (one, other)]
    for part in ("model", "optimizer"):
        a, b = (load_new(open_checkpoint(path), part) for path in last)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), part


# going on


def test_an_early_stop_that_was_asked_for_before_the_kill_comes_at_the_same_step(tmp_path):
    recipe, argv = measured_by({5: 0.5}), ["--patience", 2, "--max-steps", 90]
    whole = run_tiny(tmp_path / "whole", *argv, recipe=recipe)
    assert (whole.step, whole.stop_reason) == (16, "val_loss was not better than 0.5000 in 2 validations")
    for step in range(12, 17):
        out = tmp_path / str(step)
        run_tiny(out, *argv, "--checkpoint-every", 1, "--keep-last", 99, recipe=measured_by({5: 0.5}))
        left_after(out, step)
        follow = measured_by({5: 0.5})
        follow.evaluate.step = step + 1
        again = run_tiny(out, *argv, recipe=follow)
        assert (again.step, again.stop_reason) == (whole.step, whole.stop_reason)
        assert (out / "metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


def leave_during_validation(step):
    """A recipe that gets a SIGTERM in the first batch of the validation after ``step``, once."""

    def evaluate(model, batch, cfg):
        evaluate.calls.append(len(batch["y"]))
        if evaluate.at == step and not evaluate.left:
            evaluate.left = True
            os.kill(os.getpid(), signal.SIGTERM)
        return tiny.evaluate(model, batch, cfg)

    evaluate.calls, evaluate.at, evaluate.left = [], 0, False

    def follow(run, info):
        evaluate.at = info.step + 1

    return replace(tiny.recipe, evaluate=evaluate, hooks=lambda cfg: [follow])


def test_told_to_leave_during_a_validation_it_saves_at_once_and_validates_first_when_it_goes_on(tmp_path, capsys):
    small = ("--micro-batch-size", 4)  # a validation of several batches
    run_tiny(tmp_path / "whole", *small)
    recipe = leave_during_validation(10)
    said = ends_with(75, capsys, lambda: run_tiny(tmp_path / "run", *small, recipe=recipe))
    assert "told to leave: saved after step 10" in said
    saved = open_checkpoint(checkpoint(tmp_path / "run", 10)).state
    assert saved["unfinished"] is not None
    assert saved["state"]["validated_step"] == 5
    run_tiny(tmp_path / "run", *small, recipe=recipe)
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_a_finished_run_says_so_and_how_to_go_further(tmp_path, capsys):
    first = run_tiny(tmp_path / "run")
    weights = (tmp_path / "run/model.safetensors").stat()
    capsys.readouterr()
    assert run_tiny(tmp_path / "run") == replace(first, folder=(tmp_path / "run").absolute())
    assert (
        "run is done: 20 steps of 20; to go on, give more --epochs or a higher --max-steps" in capsys.readouterr().out
    )
    assert (tmp_path / "run/model.safetensors").stat() == weights
    assert run_tiny(tmp_path / "run", "--max-steps", 30).step == 30
    said = capsys.readouterr().out
    assert "going on after step 20" in said
    assert "changed since: max_steps 20 -> 30, total steps 20 -> 30" in said


def test_a_run_that_stopped_early_is_done_too(tmp_path, capsys):
    run_tiny(tmp_path / "run", "--patience", 1, recipe=measured_by({5: 0.5}))
    capsys.readouterr()
    assert run_tiny(tmp_path / "run", "--patience", 1, recipe=measured_by({})).step == 11
    assert "is done: val_loss was not better than 0.5000 in 1 validations" in capsys.readouterr().out


def test_a_branch_from_a_run_that_stopped_early_trains_on(tmp_path):
    run_tiny(tmp_path / "run", "--patience", 1, recipe=measured_by({5: 0.5}))
    branch = run_tiny(tmp_path / "branch", "--resume", tmp_path / "run", recipe=tiny.recipe)
    assert (branch.step, branch.stop_reason) == (20, "")
    assert branch.best_step > 11


def test_an_optimizer_that_adapts_its_own_hyperparameters_goes_on_with_them(tmp_path):
    class Adapting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["weight_decay"] += 1e-3

    recipe = replace(tiny.recipe, optimizer=lambda model, cfg: Adapting(model.parameters(), lr=0.1, weight_decay=0))
    run_tiny(tmp_path / "whole", recipe=recipe)
    run_tiny(tmp_path / "again", "--checkpoint-every", 7, "--keep-last", 9, recipe=recipe)
    left_after(tmp_path / "again", 7)
    run_tiny(tmp_path / "again", recipe=recipe)
    assert_same_end(tmp_path / "whole", tmp_path / "again")


def test_a_damaged_checkpoint_is_skipped_loudly(tmp_path, capsys):
    run_tiny(tmp_path / "whole")
    run_tiny(tmp_path / "run", "--checkpoint-every", 6, "--keep-last", 99)
    left_after(tmp_path / "run", 18)
    path = next(checkpoint(tmp_path / "run", 18).glob("optimizer*"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    run_tiny(tmp_path / "run")
    said = capsys.readouterr().out
    assert f"warning: skipped a checkpoint: {path}: sha256" in said
    assert "going on after step 15" in said or "going on after step 12" in said
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_checkpoints_of_which_none_is_whole_are_an_error_and_never_a_fresh_start(tmp_path, capsys):
    run_tiny(tmp_path / "run")
    left_after(tmp_path / "run", 20)
    for path in (tmp_path / "run/checkpoints").glob("*/manifest.json"):
        path.unlink()
    said = ends_with(3, capsys, lambda: run_tiny(tmp_path / "run"))
    assert "it has checkpoints but none is whole" in said
    assert "manifest.json: missing" in said


def test_never_refuses_a_folder_with_checkpoints(tmp_path, capsys):
    run_tiny(tmp_path / "run")
    left_after(tmp_path / "run", 20)
    said = ends_with(2, capsys, lambda: run_tiny(tmp_path / "run", "--resume", "never"))
    assert "--resume never, but run holds checkpoints; choose another --out" in said


def test_a_path_branches_off_into_another_folder_and_that_goes_on_by_itself(tmp_path, capsys):
    run_tiny(tmp_path / "run", "--checkpoint-every", 6, "--keep-last", 99)
    branch = ["--resume", checkpoint(tmp_path / "run", 12), "--lr", 0.5, "--checkpoint-every", 5]
    run_tiny(tmp_path / "branch", *branch)
    assert steps_in(tmp_path / "branch")[-1] == 20
    said = capsys.readouterr().out
    assert "changed since: lr 0.01 -> 0.5" in said
    left_after(tmp_path / "branch", 15)
    run_tiny(tmp_path / "branch", *branch)
    assert "going on after step 15" in capsys.readouterr().out
    earlier = ["--resume", checkpoint(tmp_path / "run", 6)]
    left_after(tmp_path / "run", 18)
    assert "to branch off from an earlier step, choose another --out" in ends_with(
        2, capsys, lambda: run_tiny(tmp_path / "run", *earlier)
    )


def test_a_path_with_no_checkpoint_is_named(tmp_path, capsys):
    said = ends_with(3, capsys, lambda: run_tiny(tmp_path / "run", "--resume", tmp_path / "nowhere"))
    assert "nowhere: missing" in said


def reversed_table(cfg):
    table = tiny.table()
    return Data({name: np.flip(column, 0) for name, column in table.items()}, tiny.table(53, seed=1))


@pytest.mark.parametrize(
    ("argv", "recipe", "why"),
    [
        (["--seed", 1], tiny.recipe, "was made with seed 0, this run has 1"),
        (["--split-seed", 1], tiny.recipe, "was made with split_seed 0, this run has 1"),
        ([], replace(tiny.recipe, data=reversed_table), "was made with other training or validation data"),
        (
            [],
            replace(tiny.recipe, data=lambda cfg: replace(tiny.data(cfg), order=Sequential(101))),
            "was made with another order of the examples",
        ),
    ],
)
def test_another_seed_split_order_or_data_is_refused_with_a_way_out(argv, recipe, why, tmp_path, capsys):
    run_tiny(tmp_path / "run", "--checkpoint-every", 10, "--keep-last", 99)
    left_after(tmp_path / "run", 10)
    said = ends_with(2, capsys, lambda: run_tiny(tmp_path / "run", *argv, recipe=recipe))
    assert why in said
    assert "for a new run from its weights: --resume never, another --out, and load_weights(model, 'run/" in said


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"model": lambda cfg, data: nn.Sequential(nn.Linear(5, 17), nn.Tanh(), nn.Linear(17, 3))}, "shape: optimizer"),
        ({"model": lambda cfg, data: nn.Sequential(nn.Linear(5, 3))}, "optimizer: it trained other parameters"),
        ({"model": lambda cfg, data: tiny.model(cfg, data).double()}, "dtype: optimizer"),
        ({"optimizer": lambda model, cfg: torch.optim.Adam(model.parameters(), amsgrad=True)}, "optimizer: it kept"),
        ({"hooks": lambda cfg: [Stubborn({})]}, "hooks: it has the state of []"),
    ],
)  # fmt: skip
def test_another_model_optimizer_or_hooks_are_refused_with_a_way_out(change, rule, tmp_path, capsys):
    run_tiny(tmp_path / "run", "--checkpoint-every", 10, "--keep-last", 99)
    left_after(tmp_path / "run", 10)
    said = ends_with(3, capsys, lambda: run_tiny(tmp_path / "run", recipe=replace(tiny.recipe, **change)))
    assert rule in said
    assert "load_weights(model, 'run/checkpoints/step-000000010')" in said


def test_a_restart_by_the_launcher_after_leaving_leaves_again_at_once(tmp_path, monkeypatch, capsys):
    recipe = leave_during_validation(10)
    ends_with(75, capsys, lambda: run_tiny(tmp_path / "run", recipe=recipe))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    ends_with(75, capsys, lambda: run_tiny(tmp_path / "run", recipe=recipe))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert run_tiny(tmp_path / "run", recipe=recipe).step == 20


@pytest.mark.parametrize("value", ["0", "-1"])
def test_numbers_of_checkpoints_that_cannot_work_are_refused(value, tmp_path, capsys):
    for option in ("--checkpoint-every", "--checkpoint-minutes", "--keep-last", "--keep-every"):
        assert f"{option} is" in ends_with(2, capsys, lambda option=option: run_tiny(tmp_path / "run", option, value))


class Rows:
    """A map-style dataset whose examples are read with noise, in the training process or in workers."""

    def __init__(self, table):
        self.table = {name: torch.as_tensor(column) for name, column in table.items()}

    def __len__(self):
        return 101

    def __getitem__(self, i):
        row = {name: column[i] for name, column in self.table.items()}
        return row | {"x": row["x"] + 0.1 * torch.randn(5, dtype=torch.float64)}


def test_another_number_of_workers_goes_on_with_the_same_bits(tmp_path):
    recipe = replace(tiny.recipe, data=lambda cfg: Data(Rows(tiny.table()), tiny.table(53, seed=1)))
    run_tiny(tmp_path / "whole", "--workers", 2, recipe=recipe)
    run_tiny(tmp_path / "again", "--workers", 1, "--checkpoint-every", 7, "--keep-last", 9, recipe=recipe)
    left_after(tmp_path / "again", 7)
    run_tiny(tmp_path / "again", "--workers", 0, recipe=recipe)
    assert_same_end(tmp_path / "whole", tmp_path / "again")


def test_a_disk_that_fails_ends_the_run_with_3_and_it_goes_on_when_mended(tmp_path, capsys, monkeypatch):
    run_tiny(tmp_path / "whole")
    fsync, calls = Files.fsync, []

    def failing(files, descriptor):
        calls.append(descriptor)
        if len(calls) == 9:  # in the third checkpoint
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(files, descriptor)

    monkeypatch.setattr(Files, "fsync", failing)
    said = ends_with(3, capsys, lambda: run_tiny(tmp_path / "run", "--checkpoint-every", 2))
    assert "disk: Input/output error (on rank 0); the checkpoints there are untouched" in said
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 3
    run_tiny(tmp_path / "run", "--checkpoint-every", 2)
    assert "going on after step 4" in capsys.readouterr().out
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_a_bug_in_the_recipe_does_not_cost_the_save_that_is_under_way(tmp_path, monkeypatch):
    write = Files.write
    monkeypatch.setattr(Files, "write", lambda files, *args: time.sleep(0.1) or write(files, *args))

    def fail(run, info):
        if info.step == 5:
            raise ZeroDivisionError

    recipe = replace(tiny.recipe, hooks=lambda cfg: [fail])
    with pytest.raises(ZeroDivisionError):
        main(recipe, ["--max-steps", "9", "--checkpoint-every", "4", "--out", str(tmp_path)])
    verify(open_checkpoint(checkpoint(tmp_path, 4)))


# several processes


@pytest.mark.world_size(2)
def test_replicas_that_differ_are_never_saved_and_the_tensor_is_named_on_all_ranks(shared_path):
    def corrupt(run, info):
        if info.step == 3 and run.devices.rank == 1:
            with torch.no_grad():
                run.module[0].bias[1] = -run.module[0].bias[1]  # one bit

    recipe = replace(tiny.recipe, hooks=lambda cfg: [corrupt])
    run = start(recipe, tiny.TinyConfig(max_steps=9, checkpoint_every=1, out=str(shared_path / "run")))
    with pytest.raises(CheckpointError, match=r"replicas: model 0\.bias on rank 1 differs from rank 0's"):
        train(run)
    dist.barrier()
    assert steps_in(shared_path / "run")[-1] == 2


def test_torchrun_is_told_to_leave_and_the_same_command_goes_on(tmp_path):
    path = script(
        tmp_path,
        "import os, signal\n"
        "def leave(run, info):\n"
        "    if info.step == 7 and not os.path.exists('told') and run.devices.rank == 0:\n"
        "        open('told', 'w').close()\n"
        "        os.kill(os.getppid(), signal.SIGTERM)\n"
        "main(replace(tiny.recipe, hooks=lambda cfg: [leave]))",
    )
    command_line = (*TORCHRUN, path, "--max-steps", 2000, "--validate-every", 1000, "--out", tmp_path / "run")
    first = launch(*command_line)
    assert first.returncode != 0
    assert "told to leave: saved after step" in first.stderr
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 75
    (saved,) = steps_in(tmp_path / "run")
    second = launch(*command_line)
    assert second.returncode == 0, second.stderr
    assert f"going on after step {saved}" in second.stdout


# weights alone


def test_weights_are_had_from_a_file_a_run_and_a_checkpoint(tmp_path):
    run_tiny(tmp_path, "--checkpoint-every", 10, "--keep-last", 9, recipe=measured_by({10: 0.5}))
    best = load_new(open_checkpoint(checkpoint(tmp_path, 10)), "model")
    last = load_new(open_checkpoint(checkpoint(tmp_path, 20)), "model")
    wanted = {"model.safetensors": best, "": best, "checkpoints/step-000000020": last, "checkpoints": last}
    for path, weights in wanted.items():
        net = load_weights(tiny.model(tiny.TinyConfig(), None), tmp_path / path)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items()), path


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    run_tiny(tmp_path)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))
    with pytest.raises(CheckpointError, match=r"names: '2\.\w+' is torch\.float32 \[3.*\] there, torch\.float32 \[4"):
        load_weights(net, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="shape: model '2"):
        load_weights(net, checkpoint(tmp_path, 20))


# the command


def said_by(capsys, *argv, code=0):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command([str(arg) for arg in argv])
    said = capsys.readouterr()
    assert ended.value.code == code, said
    return said.out + said.err


@pytest.fixture
def trained(tmp_path):
    run_tiny(tmp_path / "run", "--checkpoint-every", 10, recipe=measured_by({10: 0.5}))
    return tmp_path / "run"


def test_the_command_lists_and_verifies(trained, capsys):
    lines = said_by(capsys, "ckpt", "list", trained).splitlines()
    assert [line.split()[0] for line in lines] == ["step-000000020", "step-000000010"]
    assert [line.endswith("best") for line in lines] == [False, True]
    assert said_by(capsys, "ckpt", "verify", trained) == "step-000000020  ok\nstep-000000010  ok\n"
    assert said_by(capsys, "ckpt", "verify", checkpoint(trained, 10)) == "step-000000010  ok\n"
    path = checkpoint(trained, 20) / "model-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    said = said_by(capsys, "ckpt", "verify", trained, code=3)
    assert f"step-000000020  not whole: {path}: sha256" in said
    assert "step-000000010  ok" in said
    (checkpoint(trained, 20) / "manifest.json").write_text("{")
    assert "not whole" in said_by(capsys, "ckpt", "list", trained, code=3)


def test_the_command_shows(trained, capsys):
    said = said_by(capsys, "ckpt", "show", trained)
    assert '"step": 20' in said
    assert "model  0.weight  float32 [16, 5]" in said
    assert "optimizer  0.weight|exp_avg  float32 [16, 5]" in said
    assert '"step": 10' in said_by(capsys, "ckpt", "show", checkpoint(trained, 10))


def test_the_command_exports_in_another_number_format_and_overwrites_nothing(trained, capsys, tmp_path):
    said_by(capsys, "ckpt", "export", checkpoint(trained, 10), tmp_path / "w.safetensors", "--dtype", "bf16")
    exported = load_file(tmp_path / "w.safetensors")
    best = load_new(open_checkpoint(checkpoint(trained, 10)), "model")
    assert {name: t.dtype for name, t in exported.items()} == dict.fromkeys(best, torch.bfloat16)
    assert all(torch.equal(exported[name], best[name].bfloat16()) for name in best)
    said = said_by(capsys, "ckpt", "export", trained, tmp_path / "w.safetensors", code=2)
    assert "is there already; name another file" in said


def test_the_command_tells_what_differs(trained, capsys):
    said = said_by(capsys, "ckpt", "diff", checkpoint(trained, 10), trained, code=1)
    assert "state.step: 10 and 20" in said
    assert "model 0.bias: differs in 16 of 16 elements" in said
    assert said_by(capsys, "ckpt", "diff", trained, trained) == "the same, to the last bit\n"


@pytest.mark.parametrize("action", ["list", "verify", "show"])
def test_the_command_names_what_is_not_there(action, capsys, tmp_path):
    said = said_by(capsys, "ckpt", action, tmp_path / "nowhere", code=2 if action != "show" else 3)
    assert "nowhere" in said
    assert said.count("\n") == 1


# the same tracker run


@pytest.mark.parametrize(("how", "code"), [("SIGKILL", -9), ("SIGTERM", 75)])
def test_the_same_wandb_run_goes_on_without_double_steps(how, code, tmp_path):
    path = script(
        tmp_path,
        "import os, signal\n"
        "def end(run, info):\n"
        "    if info.step == 13 and not os.path.exists('ended'):\n"
        "        run.saver.wait()\n"
        "        open('ended', 'w').close()\n"
        f"        os.kill(os.getpid(), signal.{how})\n"
        "main(replace(tiny.recipe, hooks=lambda cfg: [end]))",
    )
    options = ["--max-steps", "20", "--checkpoint-every", "5", "--log-every", "1", "--out", "run", "--track", "wandb"]
    for wanted in (code, 0):
        world = {WORLD: f"wandb{tmp_path}", "WANDB_MODE": "offline", "PYTHONWARNINGS": "ignore"}
        ended = subprocess.run([sys.executable, path, *options], env=os.environ | world, timeout=120, check=False)
        assert ended.returncode == wanted
        wait_for(lambda world=world[WORLD]: not any(belongs_to(process, world) for process in psutil.process_iter()))
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    told_there = {file: list(read_wandb(file)[0]) for file in files}
    assert len({file.stem for file in files if told_there[file]}) == 1  # the run's id
    steps = [step for there in told_there.values() for step in there]
    told = {json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()}
    assert len(steps) == len(set(steps))
    assert told == set(range(1, 21))
    assert set(steps) == told if how == "SIGTERM" else set(range(14, 21)) <= set(steps)  # a kill takes wandb's buffers
