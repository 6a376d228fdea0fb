"""Our schedules, put on a real optimizer, give the rates that torch's schedulers give."""

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from scaletrain import Config, constant, cosine, one_cycle, step_decay, warmup_cosine, warmup_stable_decay
from scaletrain.optimizers import base_values, set_factors
from scaletrain.schedules import warmup_steps

TOTALS = (7, 100, 1000)
RATES = (0.1, 0.003)
SCHEDULES = {
    "constant": constant,
    "step_decay": step_decay,
    "step_decay_often": partial(step_decay, every=0.1, gamma=0.5),
    "cosine": cosine,
    "cosine_to_a_tenth": partial(cosine, final=0.1),
    "warmup_cosine": warmup_cosine,
    "warmup_stable_decay": warmup_stable_decay,
    "warmup_stable_decay_all_the_way": partial(warmup_stable_decay, decay=1.0, final=0.1),
    "one_cycle": one_cycle,
    "one_cycle_rising_late": partial(one_cycle, rise=0.9),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_total = pytest.mark.parametrize("total", TOTALS)
every_optimizer = pytest.mark.parametrize("make", ["sgd", "adamw"])


def optimizer(make="sgd", rates=RATES):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    if make == "sgd":
        return torch.optim.SGD(groups, momentum=0.95)
    return torch.optim.AdamW(groups, betas=(0.95, 0.999))


def values(opt):
    """Each group's rate and momentum, or for Adam its rate and both betas."""
    return [
        value
        for group in opt.param_groups
        for value in (group["lr"], *(group["betas"] if "betas" in group else [group["momentum"]]))
    ]


def ours(schedule, total, opt, **options):
    cfg, base, rows = Config(**options), base_values(opt), []
    for step in range(total):
        set_factors(opt, base, schedule(step, total, cfg))
        rows.append(values(opt))
        opt.step()
    return np.array(rows)


def torchs(schedule, total, opt):
    scheduler, rows = schedule(opt), []
    for step in range(total):
        if step:
            scheduler.step()
        rows.append(values(opt))
        opt.step()
    return np.array(rows)


def same(rows):
    return pytest.approx(rows, rel=1e-9, abs=0)


def rate(factors):
    return factors["lr"] if isinstance(factors, dict) else factors


def rates(schedule, total, **options):
    return [rate(schedule(step, total, Config(**options))) for step in range(total)]


def rise(opt, rising):
    """The warm-up in torch's words: 1 / rising, 2 / rising, ..., 1."""
    return lr_scheduler.LinearLR(opt, start_factor=1 / rising, total_iters=rising - 1)


@every_optimizer
@every_total
def test_constant_keeps_the_optimizers_own_values(make, total):
    assert (ours(constant, total, optimizer(make)) == values(optimizer(make))).all()


@every_optimizer
@every_total
@pytest.mark.parametrize(("every", "gamma"), [(1 / 3, 0.1), (0.1, 0.5), (0.5, 0.9)])
def test_step_decay_is_torchs_step_lr(make, total, every, gamma):
    size = max(1, math.ceil(every * total - 1e-9))  # rounded up: a third of the steps each gives three levels
    wanted = torchs(lambda opt: lr_scheduler.StepLR(opt, size, gamma), total, optimizer(make))
    assert ours(partial(step_decay, every=every, gamma=gamma), total, optimizer(make)) == same(wanted)


def test_step_decay_falls_to_a_tenth_after_each_third():
    assert rates(step_decay, 9) == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])


@every_optimizer
@every_total
def test_cosine_is_torchs_cosine_annealing(make, total):
    wanted = torchs(lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=total), total, optimizer(make))
    assert ours(cosine, total, optimizer(make)) == same(wanted)


@every_total
def test_cosine_ends_at_final_as_torchs_at_eta_min(total):
    wanted = torchs(lambda opt: lr_scheduler.CosineAnnealingLR(opt, total, eta_min=0.02), total, optimizer(rates=[0.2]))
    assert ours(partial(cosine, final=0.1), total, optimizer(rates=[0.2])) == same(wanted)


@every_optimizer
@pytest.mark.parametrize("total", [1, 2, 3, 10, *TOTALS])
def test_one_cycle_is_torchs_one_cycle_in_rate_and_momentum(make, total):
    wanted = torchs(lambda opt: lr_scheduler.OneCycleLR(opt, list(RATES), total), total, optimizer(make))
    assert ours(one_cycle, total, optimizer(make)) == same(wanted)


@every_total
@pytest.mark.parametrize("share", [0.0, 0.1, 0.75, 1.0])
def test_one_cycle_rises_as_long_as_torchs(share, total):
    wanted = torchs(lambda opt: lr_scheduler.OneCycleLR(opt, list(RATES), total, pct_start=share), total, optimizer())
    assert ours(partial(one_cycle, rise=share), total, optimizer()) == same(wanted)


def test_one_cycle_starts_low_and_ends_lower_with_momentum_the_other_way():
    rows = ours(one_cycle, 100, optimizer(rates=[0.1]))
    assert rows[0] == pytest.approx([0.1 / 25, 0.95])
    assert rows[29] == pytest.approx([0.1, 0.85])
    assert rows[99] == pytest.approx([0.1 / 25 / 1e4, 0.95])


def test_one_cycle_changes_only_the_rate_of_an_optimizer_without_momentum():
    weight = torch.nn.Parameter(torch.zeros(1))
    for opt in (torch.optim.Adagrad([weight], lr=0.1), torch.optim.SGD([weight], lr=0.1)):
        before = {**opt.param_groups[0]}
        set_factors(opt, base_values(opt), one_cycle(0, 100, Config()))
        assert opt.param_groups[0] == {**before, "lr": pytest.approx(0.1 / 25)}


@every_optimizer
@every_total
@pytest.mark.parametrize("warmup", [0.05, 0.15, 0.5])
def test_warmup_cosine_is_torchs_linear_rise_and_then_its_cosine(make, total, warmup):
    def both(opt):
        rising = round(warmup * total)
        fall = lr_scheduler.CosineAnnealingLR(opt, T_max=total - rising)
        return lr_scheduler.SequentialLR(opt, [rise(opt, rising), fall], milestones=[rising]) if rising else fall

    assert ours(warmup_cosine, total, optimizer(make), warmup=warmup) == same(torchs(both, total, optimizer(make)))


@every_optimizer
@every_total
@pytest.mark.parametrize(("warmup", "decay"), [(0.15, 0.2), (0.3, 0.5), (0.5, 0.3)])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_warmup_stable_decay_is_torchs_rise_then_constant_then_linear_fall(make, total, warmup, decay, final):
    def three(opt):
        rising, falling = round(warmup * total), round(decay * total)
        stay = lr_scheduler.ConstantLR(opt, factor=1.0, total_iters=0)
        fall = lr_scheduler.LinearLR(opt, start_factor=1.0, end_factor=final, total_iters=falling)
        return lr_scheduler.SequentialLR(opt, [rise(opt, rising), stay, fall], milestones=[rising, total - falling])

    got = ours(partial(warmup_stable_decay, decay=decay, final=final), total, optimizer(make), warmup=warmup)
    assert got == same(torchs(three, total, optimizer(make)))


@every_schedule
def test_a_schedule_gives_the_same_values_in_any_order(schedule):
    cfg = Config(warmup=0.1)
    wanted = [schedule(step, 100, cfg) for step in range(100)]
    order = random.Random(0).sample(range(100), 100)
    got = {step: [schedule(step, 100, cfg), schedule(step, 50, cfg), schedule(step, 100, cfg)] for step in order}
    assert all(got[step][0] == got[step][2] == wanted[step] for step in order)


@every_schedule
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
def test_factors_stay_above_0_and_at_most_1(schedule, warmup):
    cfg = Config(warmup=warmup)
    for total in [*range(1, 60), 1000]:
        for step in range(total):
            factors = schedule(step, total, cfg)
            assert all(0 < f <= 1 for f in (factors.values() if isinstance(factors, dict) else [factors]))


@pytest.mark.parametrize("schedule", [warmup_cosine, partial(warmup_cosine, final=0.3), warmup_stable_decay])
@pytest.mark.parametrize("total", [10, 70, 333, 1000])
@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.7])
def test_warm_up_rises_in_equal_steps_and_ends_exactly_at_1(schedule, total, warmup):
    rising = warmup_steps(total, Config(warmup=warmup))
    got = rates(schedule, total, warmup=warmup)
    assert got[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])
    assert got[rising - 1] == 1.0
    assert got[rising] == 1.0
    assert max(got) == 1.0


@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_stable_decay])
def test_without_warm_up_the_first_step_has_the_full_rate(schedule):
    assert rates(schedule, 100, warmup=0.0)[0] == 1.0


def test_warm_up_and_decay_that_overlap_multiply():
    both = rates(partial(warmup_stable_decay, decay=0.75), 4, warmup=0.5)
    assert both == pytest.approx([0.5, 1.0, 2 / 3, 1 / 3])
    whole = rates(partial(warmup_stable_decay, decay=1.0), 4, warmup=1.0)
    assert whole == pytest.approx([1 / 4 * 4 / 4, 2 / 4 * 3 / 4, 3 / 4 * 2 / 4, 4 / 4 * 1 / 4])


def test_partial_gives_a_schedule_other_constants():
    assert rates(partial(step_decay, every=0.5, gamma=0.5), 4) == [1.0, 1.0, 0.5, 0.5]
    assert rates(partial(cosine, final=0.5), 2) == pytest.approx([1.0, 0.75])
    assert rates(partial(warmup_stable_decay, decay=0.5, final=0.5), 4, warmup=0.0) == [1.0, 1.0, 1.0, 0.75]
    factors = partial(one_cycle, start=0.5, final=0.25, low_momentum=0.5)
    assert factors(0, 100, Config()) == pytest.approx({"lr": 0.5, "momentum": 1.0})
    assert factors(29, 100, Config()) == pytest.approx({"lr": 1.0, "momentum": 0.5})
    assert factors(99, 100, Config()) == pytest.approx({"lr": 0.25, "momentum": 1.0})


@every_schedule
@every_optimizer
@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
def test_runs_of_1_to_3_steps_have_finite_rates(schedule, make, total, warmup):
    rows = ours(schedule, total, optimizer(make), warmup=warmup)
    assert len(rows) == total
    assert all(math.isfinite(value) for value in rows.flat)


@every_schedule
@every_optimizer
def test_parameter_groups_keep_the_ratio_of_their_rates(schedule, make):
    opt = optimizer(make, rates=(0.1, 0.003))
    each = ours(schedule, 100, opt, warmup=0.1).reshape(100, 2, -1)[:, :, 0]
    assert each[:, 0] / each[:, 1] == pytest.approx(0.1 / 0.003)
    assert each[:, 0] == pytest.approx(0.1 * np.array(rates(schedule, 100, warmup=0.1)))
