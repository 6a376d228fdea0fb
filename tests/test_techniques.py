"""Each technique does what its reference does, by itself."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_checkpoints import ends_with
from test_same_curve import close, curve
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from recipes.models import Transformer
from scaletrain import (
    Config,
    InputError,
    Plateau,
    adam,
    adamw,
    cutmix,
    load_weights,
    main,
    mixup,
    muon,
    parameter_groups,
    sgd,
    start,
    steps,
    torch_schedule,
    train,
    validate,
)
from scaletrain.blocks import blocks
from scaletrain.checkpoint.export import export
from scaletrain.checkpoint.load import load_new
from scaletrain.checkpoint.verify import open_checkpoint
from scaletrain.optimizers import describe
from scaletrain.state import State

OPTIMIZERS = {
    "sgd": sgd,
    "sgd with Nesterov": partial(sgd, nesterov=True),
    "adam": adam,
    "adamw": adamw,
    "muon": muon,
}


class Deep(nn.Module):
    """Blocks with dropout over the five columns of ``tiny``, and an embedding that takes part."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.kind = nn.Embedding(4, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.LayerNorm(5), nn.Dropout(dropout)) for _ in range(2)
        )
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = x + self.kind.weight[x.shape[1] % 4]
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def deep(cfg, data):
    return Deep().double() if getattr(cfg, "double", False) else Deep()


# Optimizers


def names_of(optimizer, model):
    """Of each group: its parameters' names, rate and weight decay."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [([known[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


def test_biases_norms_and_embeddings_do_not_decay():
    model = Transformer(8, 1, 2, context=4)
    model.wide_norm = nn.LayerNorm((4, 8))  # two dimensions, and still a norm
    decayed, kept = parameter_groups(model, 0.1)
    known = {id(p): name for name, p in model.named_parameters()}
    assert {known[id(p)] for p in decayed["params"]} == {
        f"blocks.0.{part}.weight" for part in ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(known)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_a_tied_embedding_does_not_decay_under_its_other_name():
    model = nn.Sequential(nn.Linear(4, 6), nn.Embedding(6, 4))
    model[0].weight = model[1].weight
    (kept,) = parameter_groups(model, 0.1)
    assert kept["weight_decay"] == 0.0


@pytest.mark.parametrize("make", [adamw, adam, sgd, muon])
def test_rates_per_layer_multiply_the_configs(make):
    model, cfg = Deep(), Config(lr=0.5, weight_decay=0.1)
    optimizer = make(model, cfg, lr_factors={"blocks": 0.1, "blocks.1": 0.2})
    rates = {name: lr for names, lr, _ in names_of(optimizer, model) for name in names}
    assert rates["head.weight"] == rates["head.bias"] == rates["kind.weight"] == 0.5
    assert rates["blocks.0.0.weight"] == rates["blocks.0.2.bias"] == pytest.approx(0.05)
    assert rates["blocks.1.0.weight"] == pytest.approx(0.1)
    assert optimizer.param_groups[0]["lr"] == (0.05 if make is muon else 0.5)  # what a log line shows


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({"bloks": 0.1}, "no parameter's name begins with 'bloks'; the model's parts are kind, blocks, head"),
        ({"head": 0.0}, "has 0.0 for 'head'"),
        ({"head": math.inf}, "has inf for 'head'"),
    ],
)
def test_a_rate_for_no_layer_and_a_factor_that_is_none_are_refused(factors, said):
    with pytest.raises(InputError, match=said):
        adamw(Deep(), Config(), lr_factors=factors)


def test_the_start_says_what_decays_and_how_fast_it_learns(capsys, tmp_path):
    recipe = replace(tiny.recipe, model=deep, optimizer=partial(adamw, lr_factors={"head": 10}))
    main(recipe, ["--max-steps", "1", "--out", str(tmp_path), "--lr", "0.01", "--weight-decay", "0.1"])
    assert (
        "AdamW: lr 0.01, weight decay 0.1 on 50 and 0 on 50 parameters; lr 0.1, weight decay 0.1 on 15 and 0 on 3 "
        "parameters\n"
    ) in capsys.readouterr().out


def test_the_start_says_how_much_is_frozen(capsys, tmp_path):
    def half(cfg, data):
        model = tiny.model(cfg, data)
        model[0].requires_grad_(False)
        return model

    main(replace(tiny.recipe, model=half), ["--max-steps", "1", "--out", str(tmp_path)])
    assert "147 parameters, 96 of them frozen\n" in capsys.readouterr().out


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model, cfg = Deep(), Config(lr=0.02, weight_decay=0.1)
    optimizer = muon(model, cfg)
    hidden, *rest = names_of(optimizer, model)
    assert hidden == (["blocks.0.0.weight", "blocks.1.0.weight"], 0.02, 0.1)
    assert sum(len(names) for names, *_ in rest) == len(list(model.parameters())) - 2
    assert describe(optimizer) == "Muon and AdamW: lr 0.02, weight decay 0.1 on 65 and 0 on 53 parameters"
    with pytest.raises(InputError, match="muon: Linear has no matrix that is trained but"):
        muon(nn.Linear(3, 2), cfg)


def test_muons_steps_are_those_of_torchs_two_optimizers():
    torch.manual_seed(0)
    ours, theirs = Deep(dropout=0.0), Deep(dropout=0.0)
    theirs.load_state_dict(ours.state_dict())
    cfg = Config(lr=0.02, weight_decay=0.1)
    both = muon(ours, cfg)
    hidden = [block[0].weight for block in theirs.blocks]
    groups = [
        {"params": [theirs.head.weight], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if all(p is not h for h in [*hidden, theirs.head.weight])],
         "weight_decay": 0.0},
    ]  # fmt: skip
    apart = [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=0.02, fused=True),
    ]
    x = torch.randn(32, 5)
    for _ in range(5):
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().mean().backward()
        both.step()
        for optimizer in apart:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        (sgd, lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)),
        (partial(sgd, nesterov=True), lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)),
        (partial(sgd, momentum=0.0), lambda groups: torch.optim.SGD(groups, lr=0.1)),
        (adam, lambda groups: torch.optim.Adam(groups, lr=0.1)),
        (adamw, lambda groups: torch.optim.AdamW(groups, lr=0.1)),
    ],
)
def test_the_fused_optimizers_step_as_torchs_plain_ones(make, theirs):
    torch.manual_seed(0)
    one, other = Deep(dropout=0.0).double(), Deep(dropout=0.0).double()
    other.load_state_dict(one.state_dict())
    pairs = [(one, make(one, Config(lr=0.1, weight_decay=0.1))), (other, theirs(parameter_groups(other, 0.1)))]
    x = torch.randn(32, 5, dtype=torch.double)
    for _ in range(5):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# Schedules


TORCHS = {
    "PolynomialLR": lambda opt, total, cfg: lr_scheduler.PolynomialLR(opt, total, power=2.0),
    "MultiStepLR": lambda opt, total, cfg: lr_scheduler.MultiStepLR(opt, [total // 2, total - 2], gamma=0.3),
    "ExponentialLR": lambda opt, total, cfg: lr_scheduler.ExponentialLR(opt, 0.9),
    "CyclicLR": lambda opt, total, cfg: lr_scheduler.CyclicLR(opt, cfg.lr / 10, cfg.lr, step_size_up=5),
    "OneCycleLR": lambda opt, total, cfg: lr_scheduler.OneCycleLR(opt, cfg.lr, total),
    "CosineAnnealingWarmRestarts": lambda opt, total, cfg: lr_scheduler.CosineAnnealingWarmRestarts(opt, 7),
    "LambdaLR": lambda opt, total, cfg: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda opt, total, cfg: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(opt, total - 4)], [4]
    ),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("make", TORCHS.values(), ids=TORCHS)
def test_any_of_torchs_schedulers_becomes_a_function_of_the_step(make):
    cfg, total = Config(lr=0.05), 20
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.lr, momentum=0.9)
    scheduler, wanted = make(optimizer, total, cfg), []
    for _ in range(total):
        wanted.append((optimizer.param_groups[0]["lr"] / cfg.lr, optimizer.param_groups[0]["momentum"] / 0.9))
        optimizer.step()
        scheduler.step()
    schedule = torch_schedule(make)
    found = {step: schedule(step, total, cfg) for step in reversed(range(total))}  # in any order
    rows = np.array([(found[step]["lr"], found[step]["momentum"]) for step in range(total)])
    assert rows == pytest.approx(np.array(wanted))


def test_a_run_with_one_of_torchs_schedulers_takes_its_rates(tmp_path):
    schedule = torch_schedule(lambda opt, total, cfg: lr_scheduler.PolynomialLR(opt, total, power=2.0))
    run = start(replace(tiny.recipe, schedule=schedule), tiny.TinyConfig(max_steps=10, lr=0.1, out=str(tmp_path)))
    assert [info.lr for info in steps(run)] == pytest.approx([0.1 * (1 - k / 10) ** 2 for k in range(10)])


def test_a_plateau_is_no_function_of_the_step(capsys, tmp_path):
    schedule = torch_schedule(lambda opt, total, cfg: lr_scheduler.ReduceLROnPlateau(opt))
    recipe = replace(tiny.recipe, schedule=schedule)
    said = ends_with(2, capsys, lambda: main(recipe, ["--max-steps", "3", "--out", str(tmp_path)]))
    assert "torch_schedule got a ReduceLROnPlateau" in said
    assert "hooks=lambda cfg: [Plateau()]" in said


class Judged:
    """As much of a run as Plateau looks at."""

    def __init__(self, monitor):
        self.cfg, self.metrics = Config(monitor=monitor), {}
        self.state, self.held_out = State(step=1, validated_step=1), {"val": None}
        self.tracking = type("", (), {"say": staticmethod(lambda text: None)})


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("seed", range(4))
def test_plateau_lowers_the_rate_when_torchs_does(mode, seed):
    rng = np.random.default_rng(seed)
    values = np.abs(np.cumsum(rng.normal(scale=0.3, size=60)) + 5)
    values[[20, 41]] = np.nan
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, mode, factor=0.5, patience=3, min_lr=0.1, eps=0)
    ours, run = Plateau(factor=0.5, patience=3, smallest=0.1), Judged(f"{mode}:val_loss")
    for value in values:
        run.metrics["val_loss"] = float(value)
        again = Plateau(factor=0.5, patience=3, smallest=0.1)
        again.load_state_dict(ours.state_dict())  # at every validation
        ours = again
        ours(run, type("", (), {"step": 1}))
        ours(run, type("", (), {"step": 2}))  # no validation there
        theirs.step(value)
        assert run.state.lr_factor == optimizer.param_groups[0]["lr"]
    assert run.state.lr_factor < 1


def worse(model, batch, cfg):
    return {"loss": torch.ones(len(batch["y"]))}


def test_the_lower_rate_stays_when_a_run_goes_on(tmp_path, capsys):
    recipe = replace(tiny.recipe, evaluate=worse, hooks=lambda cfg: [Plateau(patience=1)])
    options = ["--out", str(tmp_path), "--validate-every", "2", "--lr", "0.5"]
    main(recipe, [*options, "--max-steps", "6"])
    assert "val_loss is on a plateau: learning rate times 0.1" in capsys.readouterr().out
    run = start(recipe, tiny.TinyConfig(out=str(tmp_path), validate_every=2, lr=0.5, max_steps=9))
    assert next(steps(run)).lr == pytest.approx(0.05)


# Moving average of the weights


def averages_by_torch(cfg, last):
    """The plain loop, with torch's AveragedModel following it."""

    def update(averaged, weights, number):
        share = 1 - min(cfg.ema, (2 + int(number)) / (11 + int(number)))
        for average, weight in zip(averaged, weights, strict=True):
            average.lerp_(weight, share)

    torch.manual_seed(cfg.seed)
    net = tiny.model(cfg, None)
    average = AveragedModel(net, multi_avg_fn=update)
    average.n_averaged += 1  # it begins with the weights of the start, and does not copy the first step's
    opt = tiny.optimizer(net, cfg)
    for number, batch in enumerate(tiny.batches(tiny.recipe, cfg, torch.float64, last)):
        opt.zero_grad()
        tiny.loss(net, batch, cfg).backward()
        opt.step()
        average.n_averaged.fill_(number)
        if number == 0:
            update([a.data for a in average.module.parameters()], [p.data for p in net.parameters()], 0)
            average.n_averaged.fill_(1)
        else:
            average.update_parameters(net)
    return net, average.module


def check_average(folder, **options):
    cfg = tiny.TinyConfig(double=True, ema=0.9, max_steps=40, batch_size=13, out=str(folder), **options)
    run = start(tiny.recipe, cfg)
    for _ in steps(run):
        pass
    plain, averaged = averages_by_torch(cfg, 40)
    for (name, weight), p, a in zip(
        run.module.named_parameters(), plain.parameters(), averaged.parameters(), strict=True
    ):
        assert torch.allclose(weight, p, rtol=1e-9)
        assert torch.allclose(run.ema.tensors[name], a, rtol=1e-9)
        assert not torch.allclose(weight, a, rtol=1e-3)
    val = tiny.data(cfg).val
    wanted = F.cross_entropy(averaged(val["x"]), val["y"]).item()
    before = {name: p.clone() for name, p in run.module.named_parameters()}
    close([validate(run)["val_loss"]], [wanted], 1e-9)
    assert all(torch.equal(p, before[name]) for name, p in run.module.named_parameters())


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_the_average_is_torchs_and_is_what_validation_measures(shared_path, micro_batch_size):
    check_average(shared_path / "run", micro_batch_size=micro_batch_size)


@pytest.mark.world_size(2)
def test_the_average_is_torchs_on_two_processes(shared_path):
    check_average(shared_path / "run", micro_batch_size=5)


def test_the_average_is_exported_and_loaded(tmp_path):
    cfg = tiny.TinyConfig(ema=0.9, max_steps=14, validate_every=14, out=str(tmp_path))
    run = start(tiny.recipe, cfg)
    train(run)
    metrics = run.finish().metrics
    saved = open_checkpoint(tmp_path / "checkpoints/step-000000014")
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in load_new(saved, "ema").items())
    assert any(not torch.equal(exported[name], tensor) for name, tensor in load_new(saved, "model").items())
    export(saved, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    for path in (saved.path, tmp_path / "model.safetensors"):
        net = load_weights(tiny.model(cfg, None), path)
        val = tiny.data(cfg).val
        loss = F.cross_entropy(net(val["x"].float()), val["y"]).item()
        assert loss == pytest.approx(metrics["val_loss"], rel=1e-6)


def test_the_best_average_is_exported_when_it_is_not_the_last(tmp_path):
    seen = iter([0.5, 0.3, 0.4, 0.6])

    def evaluate(model, batch, cfg):
        return {"loss": torch.full((len(batch["y"]),), next(seen))}

    cfg = tiny.TinyConfig(
        ema=0.5, max_steps=9, validate_every=3, batch_size=60, checkpoint_every=3, keep_last=9, out=str(tmp_path)
    )
    run = start(replace(tiny.recipe, evaluate=evaluate), cfg)  # which evaluates once
    train(run)
    run.finish()
    best = load_new(open_checkpoint(tmp_path / "checkpoints/step-000000003"), "ema")
    exported = load_file(tmp_path / "model.safetensors")
    assert run.state.best_step == 3
    assert all(torch.equal(exported[name], tensor) for name, tensor in best.items())


def test_a_step_that_was_skipped_leaves_the_average_as_it_is(tmp_path):
    def sometimes_nan(model, batch, cfg):
        loss = tiny.loss(model, batch, cfg)
        return loss * math.nan if (batch["row"] == 0).any() else loss

    run = start(
        replace(tiny.recipe, loss=sometimes_nan), tiny.TinyConfig(ema=0.9, max_steps=7, out=str(tmp_path / "run"))
    )
    before, skipped = {}, 0
    for info in steps(run):
        if not info.finite and before:
            skipped += 1
            assert all(torch.equal(tensor, before[name]) for name, tensor in run.ema.tensors.items())
        before = {name: tensor.clone() for name, tensor in run.ema.tensors.items()}
    assert skipped == 1


def test_the_average_can_be_begun_and_left_in_a_run_that_goes_on(tmp_path):
    options = ["--out", str(tmp_path), "--validate-every", "4"]
    main(tiny.recipe, [*options, "--max-steps", "4"])
    main(tiny.recipe, [*options, "--max-steps", "8", "--ema", "0.9"])
    newest = open_checkpoint(tmp_path / "checkpoints/step-000000008")
    start_at = load_new(open_checkpoint(tmp_path / "checkpoints/step-000000004"), "model")
    average = load_new(newest, "ema")
    weights = load_new(newest, "model")
    for name in average:  # it lies between the weights that it began with and the last
        assert not torch.equal(average[name], weights[name])
        assert torch.linalg.vector_norm(average[name] - weights[name]) < torch.linalg.vector_norm(
            start_at[name] - weights[name]
        )
    main(tiny.recipe, [*options, "--max-steps", "12"])
    assert not open_checkpoint(tmp_path / "checkpoints/step-000000012").part("ema")


# Clipping by value


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_clipping_by_value_is_torchs(tmp_path, micro_batch_size):
    cfg = tiny.TinyConfig(
        double=True, max_steps=30, optimizer="sgd", max_grad_value=0.01, micro_batch_size=micro_batch_size
    )
    torch.manual_seed(0)
    net = tiny.model(cfg, None)
    opt = tiny.optimizer(net, cfg)
    wanted = []
    for batch in tiny.batches(tiny.recipe, cfg, torch.float64, 30):
        opt.zero_grad()
        loss = tiny.loss(net, batch, cfg)
        loss.backward()
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
        opt.step()
        wanted.append(loss.item())
    close(curve(tiny.recipe, cfg, tmp_path / "run")[1], wanted, 1e-9)
    with pytest.raises(AssertionError):
        close(curve(tiny.recipe, replace(cfg, max_grad_value=None), tmp_path / "other")[1], wanted, 1e-3)


@pytest.mark.parametrize("clipping", [{}, {"max_grad_norm": 0.5}, {"max_grad_value": 0.5}])
def test_an_infinite_gradient_is_found_before_it_is_cut_off(clipping, tmp_path):
    def endless(model, batch, cfg):
        return tiny.loss(model, batch, cfg) + (model[0].weight[0, 0] - model[0].weight[0, 0].detach()).sqrt()

    run = start(
        replace(tiny.recipe, loss=endless), tiny.TinyConfig(max_steps=2, ema=0.5, out=str(tmp_path), **clipping)
    )
    before = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    assert [bool(info.finite) for info in steps(run)] == [False, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.module.state_dict().items())
    assert run.gradients.skipped == 2


# MixUp and CutMix


def images(n=6, classes=4):
    torch.manual_seed(0)
    return torch.rand(n, 3, 8, 10), torch.arange(n) % classes


def test_mixup_is_a_mixture_of_two_images_and_the_same_of_their_labels():
    x, y = images()
    torch.manual_seed(7)
    mixed, soft = mixup(x, y, 4, alpha=0.4)
    torch.manual_seed(7)
    kept = float(torch.distributions.Beta(0.4, 0.4).sample())
    other = torch.randperm(6)
    assert torch.allclose(mixed, kept * x + (1 - kept) * x[other], atol=1e-6)
    assert torch.allclose(soft, kept * F.one_hot(y, 4) + (1 - kept) * F.one_hot(y[other], 4), atol=1e-6)
    assert torch.allclose(soft.sum(1), torch.ones(6))


def test_cutmix_shares_the_labels_by_the_area_of_the_rectangle():
    x, y = images(n=32)
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, soft = cutmix(x, y, 4)
        torch.manual_seed(seed)
        float(torch.distributions.Beta(1.0, 1.0).sample()), torch.randint(8, ()), torch.randint(10, ())
        other = torch.randperm(32)
        replaced = (mixed != x).any(1) & (other != torch.arange(32))[:, None, None]  # (B, H, W)
        area = next((r.float().mean().item() for r in replaced if r.any()), 0.0)
        rows = [r for r in replaced if r.any()]
        assert all(torch.equal(r, rows[0]) for r in rows)  # one rectangle for all
        assert torch.allclose(mixed[:, :, rows[0]], x[other][:, :, rows[0]]) if rows else area == 0
        wanted = (1 - area) * F.one_hot(y, 4) + area * F.one_hot(y[other], 4)
        assert torch.allclose(soft, wanted, atol=1e-6)
        shares.append(area)
    assert 0.15 < np.mean(shares) < 0.5
    assert max(shares) > 0.6


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixing_takes_shares_as_labels_and_refuses_an_alpha_of_zero(mix):
    x, y = images()
    torch.manual_seed(3)
    once, soft = mix(x, y, 4)
    torch.manual_seed(3)
    again, of_shares = mix(x, F.one_hot(y, 4).float(), 4)
    assert torch.equal(once, again)
    assert torch.equal(soft, of_shares)
    with pytest.raises(InputError, match=r"alpha is 0\.0; it must be a finite number above 0"):
        mix(x, y, 4, alpha=0.0)


# Activation checkpointing


def gradients(cfg_more, model, folder):
    recipe = replace(tiny.recipe, model=model)
    run = start(recipe, tiny.TinyConfig(max_steps=1, out=str(folder), **cfg_more))
    found = {}

    def keep(run, info):
        found.update({name: p.grad.clone() for name, p in run.module.named_parameters()})

    run.hooks = [keep]
    train(run)
    return run, found


def test_computing_blocks_twice_gives_the_same_gradients_and_names_with_dropout(tmp_path):
    kept, wanted = gradients({}, deep, tmp_path / "kept")
    again, found = gradients({"activation_checkpointing": True}, deep, tmp_path / "again")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert again.module.state_dict().keys() == kept.module.state_dict().keys()


def saved_bytes(model, x):
    """Bytes that autograd keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    return sum(kept.values())


def test_blocks_that_are_computed_twice_keep_their_inputs_alone():
    from scaletrain.blocks import recompute_blocks

    plain, again = (Transformer(32, 4, 2, context=64) for _ in range(2))
    recompute_blocks(again)
    x = torch.randn(8, 64, 32, requires_grad=True)
    assert saved_bytes(again, x) < saved_bytes(plain, x) / 3


def test_blocks_are_the_elements_of_the_outermost_lists():
    model = nn.ModuleDict({"body": Transformer(8, 3, 2, context=4), "tail": nn.ModuleList([nn.Linear(2, 2)])})
    assert blocks(model) == [*model["body"].blocks, model["tail"][0]]
    assert blocks(nn.ModuleList([nn.Sequential(nn.ModuleList([nn.ReLU()]))]))[0].__class__ is nn.Sequential


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (tiny.model, "Sequential has no nn.ModuleList; put the layers that repeat into one, or leave it out"),
        (lambda cfg, data: nn.Sequential(nn.ModuleList([nn.BatchNorm1d(5)]), nn.Linear(5, 3)), "use LayerNorm or"),
    ],
)
def test_a_model_without_blocks_and_blocks_with_batch_norm_are_refused(model, said, capsys, tmp_path):
    options = ["--max-steps", "1", "--activation-checkpointing", "--out", str(tmp_path)]
    assert said in ends_with(2, capsys, lambda: main(replace(tiny.recipe, model=model), options))
