"""The loop: what it calls, when it validates, when it stops, and what it leaves untouched."""

import inspect
import json
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from torch import nn

import scaletrain
from scaletrain import Data, forward_backward, main, start, steps, train, train_step, validate
from scaletrain.loader import Loader
from scaletrain.share import Share
from scaletrain.state import State

N = 101  # rows of the training table


def started(tmp_path, recipe=tiny.recipe, **options):
    return start(recipe, tiny.TinyConfig(**{"out": str(tmp_path / "run"), "max_steps": 30} | options))


def logged(run):
    run.tracking.close()
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_the_page_is_one_page_and_speaks_of_the_loop_alone():
    from scaletrain import loop

    source = inspect.getsource(loop)
    assert source.count("\n") <= 90
    for word in ("checkpoint", "wandb", "early stop"):
        assert word not in source.lower()
    assert source.lower().count("rank") == 1  # why the micro-batch's share is there


def test_at_most_four_library_frames_lie_between_main_and_the_users_loss(tmp_path):
    seen, library = [], Path(scaletrain.__file__).parent

    def looking_loss(model, batch, cfg):
        seen.append([f.name for f in traceback.extract_stack() if Path(f.filename).parent == library])
        return tiny.loss(model, batch, cfg)

    main(replace(tiny.recipe, loss=looking_loss), ["--max-steps", "1"])
    assert seen == [["main", "train", "steps", "train_step", "forward_backward"]]


@pytest.mark.parametrize("batch_size", [16, 13, 101, 250])
def test_validation_runs_at_the_first_step_at_or_after_each_epochs_end(batch_size, tmp_path):
    run = started(tmp_path, batch_size=batch_size, max_steps=None, epochs=5)
    train(run)
    seen = np.arange(1, run.total_steps + 1) * batch_size
    wanted = [step + 1 for step in range(len(seen)) if seen[step] // N > (seen[step] - batch_size) // N]
    assert [line["step"] for line in logged(run) if "val_loss" in line] == sorted({*wanted, run.total_steps})
    assert run.total_steps == -(-5 * N // batch_size)


def test_validation_every_few_steps_and_at_the_end(tmp_path):
    run = started(tmp_path, validate_every=4, max_steps=10)
    train(run)
    assert [line["step"] for line in logged(run) if "val_loss" in line] == [4, 8, 10]


def test_losses_are_logged_at_the_first_step_every_few_and_the_last(tmp_path):
    run = started(tmp_path, log_every=4, max_steps=10)
    train(run)
    lines = [line for line in logged(run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 4, 8, 10]
    assert [line["samples_seen"] for line in lines] == [16, 64, 128, 160]
    assert lines[-1]["epoch"] == 160 / N


def test_the_train_figure_is_the_mean_loss_since_the_last_validation(tmp_path):
    run = started(tmp_path, validate_every=5, max_steps=15)
    losses = []
    run.hooks = [*run.hooks, lambda run, info: losses.append(info.loss.item())]
    train(run)
    figures = [line["train_loss"] for line in logged(run) if "train_loss" in line]
    assert np.allclose(figures, np.array(losses).reshape(3, 5).mean(1), rtol=1e-6)


def test_max_steps_replaces_epochs_and_epochs_may_be_a_fraction(tmp_path):
    assert started(tmp_path / "a", max_steps=7, epochs=3).total_steps == 7
    assert started(tmp_path / "b", max_steps=None, epochs=0.5).total_steps == -(-N // 2 // 16)


def test_step_info_tells_what_the_step_did(tmp_path):
    run = started(tmp_path, max_grad_norm=0.1)
    first, second = next(infos := steps(run)), next(infos)
    assert (first.step, second.step) == (1, 2)
    assert (first.samples_seen, second.epoch) == (16, 32 / N)
    assert first.lr == 1e-2
    assert first.loss.shape == first.finite.shape == first.grad_norm.shape == ()
    assert first.finite
    clipped = torch.nn.utils.get_total_norm([p.grad for p in run.gradients.parameters])
    assert first.grad_norm > 0.1
    assert clipped.item() == pytest.approx(0.1, rel=1e-5)


def test_without_clipping_no_norm_is_computed(tmp_path):
    assert next(steps(started(tmp_path))).grad_norm is None


def test_a_recipe_is_trained_with_its_own_step(tmp_path):
    calls = []

    def noting(run, micro_batches):
        calls.append(len(micro_batches))
        return train_step(run, micro_batches)

    main(tiny.recipe, ["--max-steps", "3", "--micro-batch-size", "5"], step=noting)
    assert calls == [4, 4, 4]


def test_hooks_are_called_after_each_step_in_order_and_fresh_for_each_run(tmp_path):
    calls = []

    def two_hooks(cfg):
        return [lambda run, info: calls.append(("a", info.step)), lambda run, info: calls.append(("b", run.state.step))]

    main(replace(tiny.recipe, hooks=two_hooks), ["--max-steps", "2"])
    assert calls == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_a_stop_is_granted_one_step_after_it_was_asked_for(tmp_path):
    def stop_at_5(run, info):
        if info.step == 5:
            run.stop("enough")

    result = main(
        replace(tiny.recipe, hooks=lambda cfg: [stop_at_5]), ["--max-steps", "30", "--out", str(tmp_path / "run")]
    )
    assert (result.step, result.stop_reason) == (6, "enough")
    assert json.loads((tmp_path / "run/exit.json").read_text()) == {"code": 0, "reason": "enough"}
    assert "val_loss" in result.metrics  # what is exported was validated


@pytest.mark.world_size(3)
def test_a_stop_that_one_rank_asks_for_ends_all_at_the_same_step(shared_path):
    def stop_at_5_on_rank_1(run, info):
        if info.step == 5 and run.devices.rank == 1:
            run.stop("rank 1 has had enough")

    run = start(
        replace(tiny.recipe, hooks=lambda cfg: [stop_at_5_on_rank_1]),
        tiny.TinyConfig(max_steps=30, out=str(shared_path / "run")),
    )
    train(run)
    result = run.finish()
    assert (result.step, result.stop_reason) == (6, "rank 1 has had enough")
    step = torch.tensor([result.step])
    dist.all_reduce(step, dist.ReduceOp.MAX)
    assert step.item() == 6


def test_training_stops_early_when_patience_runs_out(tmp_path):
    def hopeless(model, batch, cfg):
        return {"loss": tiny.evaluate(model, batch, cfg)["loss"] * 0 + 1.0}

    result = main(
        replace(tiny.recipe, evaluate=hopeless), ["--validate-every", "2", "--max-steps", "30", "--patience", "3"]
    )
    assert result.step == 9  # best at 2, none better at 4, 6 and 8, and one step more
    assert result.stop_reason == "val_loss was not better than 1.0000 in 3 validations"
    assert (result.best, result.best_step) == (1.0, 2)


@pytest.mark.parametrize(("monitor", "best"), [("val_loss", min), ("max:val_accuracy", max), ("min:val_loss", min)])
def test_the_best_value_of_the_monitored_metric_is_remembered(monitor, best, tmp_path):
    run = started(tmp_path, monitor=monitor, validate_every=1, max_steps=20, lr=0.3)
    train(run)
    values = [line[run.cfg.monitored_metric] for line in logged(run) if "val_loss" in line]
    assert run.state.best == best(values)
    assert run.state.best_step == values.index(best(values)) + 1


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(tmp_path):
    def nan_at_3(model, batch, cfg):
        calls.append(1)
        return tiny.loss(model, batch, cfg) * (float("inf") if len(calls) == 3 else 1)

    calls, run = [], started(tmp_path)
    run.recipe = replace(run.recipe, loss=nan_at_3)
    infos = steps(run)
    next(infos), next(infos)
    weights = [p.clone() for p in run.gradients.parameters]
    moments = [{k: v.clone() for k, v in state.items()} for state in run.optimizer.state.values()]
    info = next(infos)
    assert not info.finite
    assert all(torch.equal(a, b) for a, b in zip(run.gradients.parameters, weights, strict=True))
    after = list(run.optimizer.state.values())
    assert all(torch.equal(a[k], b[k]) for a, b in zip(after, moments, strict=True) for k in b)
    assert run.state.step == 3  # an attempted step counts: the schedule and the data went on
    assert run.newly_skipped() == run.state.skipped == 1
    assert next(infos).finite


@pytest.mark.world_size(2)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(shared_path):
    def nan_on_rank_1(model, batch, cfg):
        calls.append(1)
        return tiny.loss(model, batch, cfg) * (float("nan") if dist.get_rank() == 1 and len(calls) == 3 else 1)

    calls, run = (
        [],
        start(replace(tiny.recipe, loss=nan_on_rank_1), tiny.TinyConfig(max_steps=6, out=str(shared_path / "run"))),
    )
    assert [bool(info.finite) for info in steps(run)] == [True, True, False, True, True, True]
    assert all(p.isfinite().all() for p in run.gradients.parameters)


def test_a_scaler_skips_an_overflow_and_finds_a_scale_that_works(tmp_path):
    steep = replace(tiny.recipe, loss=lambda model, batch, cfg: 16 * tiny.loss(model, batch, cfg))
    run, plain = (started(tmp_path / name, steep, optimizer="sgd", lr=1e-3) for name in "ab")
    run.gradients.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    finite = [bool(info.finite) for info in steps(run)]
    skipped = finite.index(True)
    assert skipped >= 1
    assert all(finite[skipped:])
    plain.state.step = skipped
    plain.state.samples_seen = skipped * plain.cfg.batch_size
    list(steps(plain))
    for ours, wanted in zip(run.gradients.parameters, plain.gradients.parameters, strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-5)  # a power of two scales without rounding


def test_the_mode_is_train_in_training_and_eval_in_validation_and_frozen_parts_stay_frozen(tmp_path):
    modes = {"train": set(), "eval": set()}

    def model(cfg, data):
        net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        net[1].eval()  # frozen by the recipe
        return net

    def loss(model, batch, cfg):
        modes["train"].add(tuple(part.training for part in model))
        return tiny.loss(model, batch, cfg)

    def evaluate(model, batch, cfg):
        modes["eval"].add((*(part.training for part in model), torch.is_inference_mode_enabled()))
        return tiny.evaluate(model, batch, cfg)

    train(started(tmp_path, replace(tiny.recipe, model=model, loss=loss, evaluate=evaluate), validate_every=3))
    assert modes == {"train": {(True, False, True, True)}, "eval": {(False, False, False, False, True)}}


def test_a_model_that_comes_in_eval_mode_is_trained_in_train_mode(tmp_path):
    assert started(tmp_path, replace(tiny.recipe, model=lambda cfg, data: tiny.model(cfg, data).eval())).module.training


def test_without_evaluate_the_validation_loss_is_the_loss(tmp_path):
    run = started(tmp_path, replace(tiny.recipe, evaluate=None))
    val = tiny.data(None).val
    batch = {"x": val["x"].float(), "y": val["y"]}
    assert validate(run)["val_loss"] == pytest.approx(tiny.loss(run.module.eval(), batch, None).item(), rel=1e-6)


def figures(model, batch, cfg):
    logits = model(batch["x"])
    right = (logits.argmax(1) == batch["y"]).double()
    return {
        "each": right,
        "mean": right.mean(),
        "pair": (right.sum(), right.numel()),
        "zeros": (batch["y"] == 0).float(),
    }


def check_every_example_counts_once(folder):
    for n in (1, 2, 3, 7, 53):
        recipe = replace(tiny.recipe, evaluate=figures, data=lambda cfg, n=n: Data(tiny.table(), tiny.table(n, seed=1)))
        run = start(
            recipe, tiny.TinyConfig(batch_size=16, micro_batch_size=3, out=str(folder / str(n)), monitor="val_each")
        )
        val = recipe.data(None).val
        right = (run.module(val["x"].float()).argmax(1) == val["y"]).double().mean().item()
        metrics = validate(run)
        for name in ("val_each", "val_mean", "val_pair"):
            assert metrics[name] == pytest.approx(right, abs=1e-12)
        assert metrics["val_zeros"] == pytest.approx((val["y"] == 0).double().mean().item(), abs=1e-12)


def test_every_example_counts_once_on_one_process(shared_path):
    check_every_example_counts_once(shared_path)


@pytest.mark.world_size(4)
def test_every_example_counts_once_on_four_processes(shared_path):
    check_every_example_counts_once(shared_path)


def test_an_example_that_was_lost_is_noticed(tmp_path):
    run = started(tmp_path)
    run.held_out["val"].part = slice(0, 50)
    with pytest.raises(RuntimeError, match="50 examples were evaluated instead of 53"):
        validate(run)


def test_the_test_split_is_measured_once_at_the_end(tmp_path):
    recipe = replace(tiny.recipe, data=lambda cfg: Data(tiny.table(), tiny.table(53, seed=1), tiny.table(40, seed=2)))
    run = started(tmp_path, recipe)
    train(run)
    assert [line["step"] for line in logged(run) if "test_loss" in line] == [30]


def test_augmentation_is_in_training_only_and_a_function_of_seed_step_and_rank(tmp_path):
    def noisy(batch, cfg):
        noise.append(torch.rand(()).item())
        return batch | {"x": batch["x"] + 0.1 * torch.randn_like(batch["x"])}

    def seen_loss(model, batch, cfg):
        seen.append(batch["x"].clone())
        return tiny.loss(model, batch, cfg)

    noise, seen = [], []
    recipe = replace(tiny.recipe, augment=noisy, loss=seen_loss)
    run = started(tmp_path / "a", recipe, validate_every=2, max_steps=6)
    train(run)
    whole, noise, shown, seen = noise, [], seen, []
    assert len(set(whole)) == len(whole) == 6  # one call a step, none in validation
    again = started(tmp_path / "b", recipe, max_steps=6)
    again.state.step, again.state.samples_seen = 4, 64  # as if resumed
    list(steps(again))
    assert noise == whole[4:]
    assert all(torch.equal(a, b) for a, b in zip(seen, shown[4:], strict=True))


def test_what_kornia_draws_is_a_function_of_seed_and_step(tmp_path):
    import kornia.augmentation

    change = kornia.augmentation.AugmentationSequential(kornia.augmentation.RandomAffine(30), data_keys=["input"])

    def augment(batch, cfg):
        images.append(change(batch["x"].float().view(-1, 1, 5, 1).expand(-1, 3, 5, 5)))
        return batch

    images = []
    recipe = replace(tiny.recipe, augment=augment)
    train(started(tmp_path / "a", recipe, max_steps=6))
    whole, images = images, []
    again = started(tmp_path / "b", recipe, max_steps=6)
    again.state.step, again.state.samples_seen = 4, 64  # as if resumed
    torch.rand(17)
    list(steps(again))
    assert all(map(torch.equal, images, whole[4:]))
    assert len(images) == 2
    assert not any(torch.equal(image[0], image[1]) for image in whole)


def test_dropout_depends_on_the_seed_and_the_step_alone(tmp_path):
    def model(cfg, data):
        return nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3))

    recipe = replace(tiny.recipe, model=model)
    runs = [started(tmp_path / name, recipe, seed=seed, max_steps=5) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    losses = []
    for run in runs:
        torch.rand(17)  # what was drawn before must not matter
        losses.append([info.loss.item() for info in steps(run)])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.world_size(2)
def test_accumulation_exchanges_gradients_once_a_step(shared_path):
    sent = []

    def counting_hook(state, bucket):
        sent.append(1)
        return (
            dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True)
            .get_future()
            .then(lambda f: f.value()[0])
        )

    run = start(tiny.recipe, tiny.TinyConfig(micro_batch_size=1, max_steps=5, out=str(shared_path / "run")))
    run.model.register_comm_hook(None, counting_hook)
    for _ in steps(run):
        pass
    assert run.loader.micro_batches == 8
    assert len(sent) == 5


def test_patience_with_nothing_but_nan_ends_in_words(tmp_path):
    def nan(model, batch, cfg):
        return {"loss": tiny.evaluate(model, batch, cfg)["loss"] * float("nan")}

    argv = ["--validate-every", "1", "--max-steps", "30", "--patience", "2"]
    result = main(replace(tiny.recipe, evaluate=nan), argv)
    assert (result.step, result.best) == (3, None)
    assert result.stop_reason == "val_loss was not better than a finite number in 2 validations"


def test_the_validation_after_an_early_stop_may_be_the_best(tmp_path):
    def stop_at_3(run, info):
        if info.step == 3:
            run.stop("enough")

    recipe = replace(tiny.recipe, hooks=lambda cfg: [stop_at_3])
    result = main(recipe, ["--validate-every", "2", "--max-steps", "30", "--lr", "0.05"])
    assert (result.step, result.best_step) == (4, 4)
    assert result.best == result.metrics["val_loss"]


def test_a_nan_that_no_scale_can_mend_is_an_error_under_a_scaler(tmp_path):
    run = started(tmp_path, replace(tiny.recipe, loss=lambda m, b, c: tiny.loss(m, b, c) * float("nan")), max_steps=60)
    run.gradients.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with pytest.raises(FloatingPointError, match="in 10 of the steps up to 20"):
        train(run)


@pytest.mark.parametrize("kind", ["bfloat16", "sparse", "float64"])
def test_gradients_of_every_kind_are_checked(kind, tmp_path):
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(101, 3, sparse=kind == "sparse")

        def forward(self, row):
            return self.table(row)

    def loss(model, batch, cfg):
        bad = float("inf") if run.state.step == 2 else 1.0
        return nn.functional.cross_entropy(model(batch["row"]).float(), batch["y"]) * bad

    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(kind, torch.float32)
    recipe = replace(tiny.recipe, model=lambda cfg, data: Lookup().to(dtype), data=lambda cfg: Data(tiny.table()))
    sgd = replace(recipe, loss=loss, optimizer=lambda model, cfg: torch.optim.SGD(model.parameters(), lr=0.1))
    run = started(tmp_path, sgd, max_steps=5)
    assert [bool(info.finite) for info in steps(run)] == [True, True, False, True, True]
    assert all(p.isfinite().all() for p in run.gradients.parameters)


def test_an_augmentation_in_place_touches_each_example_once(tmp_path):
    def double_in_place(batch, cfg):
        batch["x"] *= 2
        return batch

    recipe = replace(tiny.recipe, augment=double_in_place)
    run = started(tmp_path, recipe, batch_size=4)
    run.loader = Loader(
        run.loader.reader, Share(run.loader.share.order, 4, 0, 3), 2, workers=0, device=torch.device("cpu")
    )
    plain = next(run.loader.steps(0))
    doubled = run.prepare_step(next(run.loader.steps(0)))
    assert [counted for _, counted in doubled] == [0, 1]
    for (batch, _), (twice, _) in zip(plain, doubled, strict=True):
        assert torch.equal(2 * batch["x"], twice["x"])


def test_log_takes_numbers_and_0d_tensors(tmp_path):
    run = started(tmp_path)
    run.log({"loss": torch.tensor(0.5), "a": np.float32(0.25), "b": True, "c": 3})
    line = logged(run)[-1]
    assert (line["loss"], line["a"], line["b"], line["c"]) == (0.5, 0.25, 1.0, 3.0)


def test_a_loss_may_be_a_partial_or_an_object(tmp_path):
    class Loss:
        def __call__(self, model, batch, cfg):
            return tiny.loss(model, batch, cfg)

    for number, loss in enumerate((partial(tiny.loss), Loss())):
        assert (
            main(replace(tiny.recipe, loss=loss), ["--max-steps", "2", "--out", str(tmp_path / str(number))]).step == 2
        )


def test_every_counter_is_part_of_the_state(tmp_path):
    run = started(tmp_path)
    train(run)
    assert set(run.state.to_dict()) == set(State.__dataclass_fields__)
    counted = {"step": 30, "samples_seen": 480, "skipped": 0, "validated_step": 30, "train_loss_from": 30}
    assert run.state.to_dict().items() >= counted.items()


def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_examples(tmp_path):
    run = started(tmp_path, micro_batch_size=3, double=True)
    batch = next(tiny.batches(tiny.recipe, run.cfg, torch.float64, 1))
    wanted = torch.autograd.grad(tiny.loss(run.module, batch, run.cfg), run.gradients.parameters)
    loss = forward_backward(run, run.prepare_step(next(run.loader.steps(0))))
    assert loss.item() == pytest.approx(tiny.loss(run.module, batch, run.cfg).item(), rel=1e-12)
    assert all(torch.allclose(p.grad, g, rtol=1e-12) for p, g in zip(run.gradients.parameters, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
def test_compiling_keeps_the_names_of_the_weights_and_the_curve(tmp_path):
    plain = started(tmp_path / "a", max_steps=5)
    compiled = started(tmp_path / "b", max_steps=5, compile=True)
    losses = [[info.loss.item() for info in steps(run)] for run in (plain, compiled)]
    assert np.allclose(*losses, rtol=1e-5)
    assert list(compiled.module.state_dict()) == list(plain.module.state_dict())


def test_bf16_computes_the_forward_pass_in_bf16_and_keeps_the_weights_in_fp32(tmp_path):
    seen = set()

    def looking_loss(model, batch, cfg):
        logits = model(batch["x"])
        seen.add(logits.dtype)
        return nn.functional.cross_entropy(logits, batch["y"])

    run = started(tmp_path, replace(tiny.recipe, loss=looking_loss), precision="bf16")
    train(run)
    assert seen == {torch.bfloat16}  # no copy of the outputs in fp32 either
    assert {p.dtype for p in run.gradients.parameters} == {torch.float32}
    assert run.metrics["val_loss"] < 1.0
