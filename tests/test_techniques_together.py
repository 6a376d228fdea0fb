"""The techniques together, in bfloat16, on several processes, sharded and compiled; and runs that go on."""

import math
from dataclasses import replace
from functools import partial

import noisy
import pytest
import tiny
import torch
from test_checkpoints import ends_with
from test_faults_resume import STEPS, as_left_after, check_every_step, config, run_to_the_end
from test_same_curve import close, curve
from test_techniques import OPTIMIZERS, TORCHS, Deep
from torch import nn

from recipes import cnn
from scaletrain import (
    Config,
    Data,
    InputError,
    Plateau,
    adamw,
    build,
    main,
    mixup,
    muon,
    sgd,
    start,
    steps,
    torch_schedule,
    train,
    validate,
)
from scaletrain.devices import Devices
from scaletrain.optimizers import base_values, set_factors
from scaletrain.run.gradients import Gradients

# Each with everything else


def noisy_blocks(cfg, data):
    net = nn.Sequential(nn.Linear(5, 5), Deep(dropout=0.0 if cfg.plain else 0.1))  # noisy looks at the first layer
    return net.double() if cfg.plain else net


def mixed(batch, cfg):
    x, y = mixup(batch["x"], batch["y"], 3, alpha=0.4)
    return batch | {"x": x, "y": y}


def noisy_with(optimizer):
    return replace(noisy.recipe, optimizer=optimizer, model=noisy_blocks)


TECHNIQUES = {
    "ema": (noisy.recipe, {"ema": 0.9}),
    "clipping by value": (noisy.recipe, {"max_grad_value": 0.02}),
    "clipping by norm": (noisy.recipe, {"max_grad_norm": 0.1}),
    "plateau": (replace(noisy.recipe, hooks=lambda cfg: [*noisy.hooks(cfg), Plateau(patience=0)]), {"lr": 0.3}),
    "bfloat16 and ema": (noisy.recipe, {"ema": 0.9, "precision": "bf16"}),
    "activation checkpointing": (noisy_with(adamw), {"activation_checkpointing": True}),
    "rates per layer": (noisy_with(partial(adamw, lr_factors={"1.blocks": 0.1})), {}),
    **{name: (noisy_with(make), {}) for name, make in OPTIMIZERS.items()},
    "early stopping and ema": (noisy.recipe, {"patience": 1, "lr": 0.3, "validate_every": 2, "ema": 0.5}),
    "torch's schedule": (
        replace(noisy.recipe, schedule=torch_schedule(TORCHS["OneCycleLR"])), {},
    ),
}  # fmt: skip


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr("scaletrain.tracking.Tracking.say", lambda self, text: None)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_run_with_it_goes_on_with_the_same_bits(technique, tmp_path):
    recipe, options = TECHNIQUES[technique]
    check_every_step(recipe, tmp_path, (3,), steps=(1, 4, 6), **options)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_in_bfloat16_it_learns_and_goes_on_with_the_same_bits(technique, tmp_path):
    recipe, options = TECHNIQUES[technique]
    options = {"precision": "bf16", "max_steps": STEPS, "validate_every": 3} | options
    whole = config(tmp_path / "whole", **options, checkpoint_every=4, keep_last=99)
    wanted, run = run_to_the_end(recipe, whole)
    assert math.isfinite(run.state.best)
    as_left_after(4, tmp_path / "whole", tmp_path / "again")
    found, _ = run_to_the_end(recipe, config(tmp_path / "again", **options))
    assert found == {step: bits for step, bits in wanted.items() if step > 4}


@pytest.fixture
def half(monkeypatch):
    """float16 and its scaler on the CPU, where a run refuses them; the first scale is too large."""

    def with_scaler(self, *args):
        built(self, *args)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=3)

    built = Gradients.__init__
    monkeypatch.setattr(Gradients, "__init__", with_scaler)
    monkeypatch.setattr(Devices, "autocast", lambda self: torch.autocast("cpu", torch.float16))


def averaged_weights(run):
    return [tensor.clone() for tensor in run.ema.tensors.values()]


@pytest.mark.usefixtures("silent", "half")
@pytest.mark.parametrize("technique", [name for name in TECHNIQUES if "bfloat16" not in name])
def test_in_float16_with_a_scaler_it_goes_on_with_the_same_bits(technique, tmp_path):
    recipe, options = TECHNIQUES[technique]
    check_every_step(recipe, tmp_path, (3,), steps=(4,), **options)


@pytest.mark.usefixtures("silent", "half")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_the_scaler_skips_leaves_weights_and_average_alone(optimizer, tmp_path):
    run = start(noisy_with(OPTIMIZERS[optimizer]), config(tmp_path, ema=0.9, max_grad_value=0.02, max_steps=30))
    kept, finite = [[*map(torch.clone, run.gradients.parameters), *averaged_weights(run)]], []
    for info in steps(run):
        kept.append([*map(torch.clone, run.gradients.parameters), *averaged_weights(run)])
        finite.append(bool(info.finite))
    assert not finite[0]
    assert sum(finite) > 10, (finite, run.gradients.scaler.get_scale())
    for before, after, moved in zip(kept[:-1], kept[1:], finite, strict=True):
        assert all(map(torch.equal, before, after)) == (not moved)


def test_a_run_told_to_leave_in_a_validation_of_the_average_goes_on_with_the_same_bits(tmp_path, capsys):
    options = ["--max-steps", "8", "--validate-every", "3", "--ema", "0.9"]
    main(noisy.recipe, [*options, "--out", str(tmp_path / "whole")])
    left = [*options, "--out", str(tmp_path / "left"), "--moment", "validating"]
    noisy.forget_moments(after=1)  # the one before the first step does not count
    with pytest.raises(SystemExit) as ended:
        main(noisy.recipe, left)
    assert ended.value.code == 75
    main(noisy.recipe, left)
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "left" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"factor": 1.0}, "factor is 1"), ({"smallest": 2.0}, "smallest is 2"), ({"patience": -1}, "patience is -1")],
)
def test_a_plateau_that_cannot_be_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        Plateau(**options)


def test_a_plateau_without_validation_is_one_line(capsys, tmp_path):
    recipe = replace(tiny.recipe, data=lambda cfg: Data(tiny.table()), hooks=lambda cfg: [Plateau()])
    said = ends_with(2, capsys, lambda: main(recipe, ["--max-steps", "2", "--out", str(tmp_path)]))
    assert "Plateau needs validation examples" in said


@pytest.mark.parametrize("momentum", [1.2, -1.0, math.nan])
def test_a_momentum_that_none_can_be_is_refused(momentum):
    opt = sgd(Deep(), Config())
    with pytest.raises(InputError, match=r"momentum is a factor too, and 0\.9 times it"):
        set_factors(opt, base_values(opt), {"lr": 1.0, "momentum": momentum})


def test_the_state_of_muon_and_adamw_can_be_loaded_as_any_optimizers():
    ours, again = (muon(Deep(dropout=0.0), Config(lr=0.02)) for _ in range(2))
    for parameter in ours.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    ours.step()
    again.load_state_dict(ours.state_dict())
    assert all(part.state is again.state for part in again.parts)
    again.param_groups[0]["lr"] = 7.0
    assert again.parts[0].param_groups[0]["lr"] == 7.0


TOGETHER = (
    (
        noisy_with(partial(sgd, nesterov=True, lr_factors={"1.blocks": 0.1})),
        {"ema": 0.9, "max_grad_value": 0.02},
    ),
    (
        replace(noisy_with(adamw), augment=mixed, schedule=torch_schedule(TORCHS["OneCycleLR"])),
        {"activation_checkpointing": True, "precision": "bf16", "patience": 2, "ema": 0.5},
    ),
    (replace(TECHNIQUES["plateau"][0], optimizer=muon, model=noisy_blocks), {"lr": 0.3, "max_grad_norm": 0.1}),
)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("combined", range(len(TOGETHER)))
@pytest.mark.world_size(2)
def test_several_together_on_two_processes_go_on_with_the_same_bits(combined, shared_path):
    recipe, options = TOGETHER[combined]
    check_every_step(recipe, shared_path, (2,), **options)


def check_curves(folder):
    """Every technique that is the same however a batch is divided, beside the plain loop with torch's own."""
    for name in ("clipping by value", "activation checkpointing", "adam", "sgd", "sgd with Nesterov"):
        recipe, options = TECHNIQUES[name]
        cfg = noisy.NoisyConfig(plain=True, max_steps=60, **options)
        _, wanted = tiny.plain_loop(recipe, cfg, 60)
        for micro_batch_size in (None, 5):
            part = replace(cfg, micro_batch_size=micro_batch_size)
            close(curve(replace(recipe, hooks=None), part, folder / f"{name} {micro_batch_size}")[1], wanted, 1e-9)


def test_curves_agree_on_one_process(shared_path):
    check_curves(shared_path)


@pytest.mark.world_size(2)
def test_curves_agree_on_two_processes(shared_path):
    check_curves(shared_path)


def test_the_cnn_mixes_and_smooths_with_everything(tmp_path):
    options = ["--max-steps", "4", "--width", "4", "--threads", "1", "--ema", "0.9", "--micro-batch-size", "50"]
    result = main(cnn.recipe, [*options, "--mixup", "0.2", "--label-smoothing", "0.1", "--out", str(tmp_path)])
    assert math.isfinite(result.metrics["val_loss"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
def test_a_compiled_model_has_the_same_losses_with_its_blocks_computed_twice_and_averaged(tmp_path):
    def losses(name, **options):
        cfg = tiny.TinyConfig(max_steps=4, ema=0.9, out=str(tmp_path / name), **options)
        run = start(replace(tiny.recipe, model=lambda cfg, data: Deep(dropout=0.0)), cfg)
        return [*(float(info.loss) for info in steps(run)), validate(run)["val_loss"]]

    close(losses("compiled", compile=True, activation_checkpointing=True), losses("plain"), 1e-5)


@pytest.fixture
def sharding(monkeypatch):
    monkeypatch.setattr(build, "assemble", build.assemble)  # put back what the next line replaces
    noisy.shard_where_asked()


@pytest.mark.usefixtures("silent", "sharding")
@pytest.mark.world_size(2)
def test_a_sharded_model_goes_on_with_the_same_bits_and_measures_what_one_process_does(shared_path):
    options = {"plain": True, "max_grad_value": 0.02, "ema": 0.9}
    check_every_step(noisy.recipe, shared_path, (2,), fsdp=True, **options)
    found = []
    for fsdp in (False, True):
        cfg = noisy.NoisyConfig(max_steps=12, fsdp=fsdp, out=str(shared_path / str(fsdp)), **options)
        run = start(replace(noisy.recipe, hooks=None), cfg)
        train(run)
        found.append(run.finish().metrics)
    assert found[0] == pytest.approx(found[1], rel=1e-9)
