"""What a GPU alone can show, in bf16 and fp16, compiled: skipped where there is none. The last ones run anywhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes import cnn, lm
from scaletrain import Data, start, steps, train, validate
from scaletrain.batches import length
from scaletrain.loader import HeldOut
from scaletrain.metrics import Sums
from scaletrain.readers import ColumnReader

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
inductors_own = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
STEPS = 9


def tokens(cfg):
    ids = np.random.default_rng(0).integers(0, 64, (75, cfg.length + 1))
    return Data({"tokens": ids[:64]}, {"tokens": ids[64:]})


def images(cfg):
    rng = np.random.default_rng(0)
    image, label = rng.random((75, 3, 32, 32), np.float32), rng.integers(0, 10, 75)
    part = {"image": image[:64], "label": label[:64]}, {"image": image[64:], "label": label[64:]}
    return Data(*part, classes=[str(i) for i in range(10)])


LM = lm.LMConfig(data="random.bin", size="tiny", vocab_size=64, context=32)
CNN = cnn.CNNConfig(width=8, norm="batch", pool="avg", mixup=0.2, dropout=0.0)
SMALL = {"lm": (replace(lm.recipe, data=tokens), LM), "cnn": (replace(cnn.recipe, data=images), CNN)}
WAYS = {
    "bf16, compiled": {"precision": "bf16", "compile": True, "max_grad_norm": 1.0},
    "fp16, scaler, average": {"precision": "fp16", "ema": 0.9, "max_grad_norm": 0.1},
    "fp16, by value": {"precision": "fp16", "max_grad_norm": None, "max_grad_value": 0.01},
}


def config(cfg, folder, **options):
    common = {"batch_size": 8, "threads": 1, "max_steps": STEPS, "log_every": 3, "out": str(folder)}
    return replace(cfg, **common | options)


class KilledError(Exception):
    pass


def kill(run, info):
    if info.step == 5:
        raise KilledError


@pytest.fixture
def deterministic(monkeypatch):
    """Let torch add in one order: without it two runs of the same work on a GPU need not agree."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@gpu
@inductors_own
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SMALL)
def test_a_run_that_is_killed_goes_on_with_the_same_bits(name, way, tmp_path):
    recipe, cfg = SMALL[name]
    whole = start(recipe, config(cfg, tmp_path / "whole", **WAYS[way], checkpoint_every=4))
    train(whole)
    whole.finish()
    killed = start(
        replace(recipe, hooks=lambda cfg: [kill]), config(cfg, tmp_path / "again", **WAYS[way], checkpoint_every=4)
    )
    with pytest.raises(KilledError):
        train(killed)
    killed.saver.wait()
    again = start(recipe, config(cfg, tmp_path / "again", **WAYS[way], checkpoint_every=4))
    assert again.state.step == 4
    train(again)
    again.finish()
    for part, wanted in whole.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[part], wanted), part
        assert bool(wanted.isfinite().all()), part
    lines = [(tmp_path / folder / "metrics.jsonl").read_text() for folder in ("whole", "again")]
    assert lines[0] == lines[1]


@gpu
@pytest.mark.parametrize("name", SMALL)
def test_fp16_and_bf16_have_the_losses_and_gradients_of_fp32(name, tmp_path):
    recipe, cfg = SMALL[name]
    curves = {}
    for precision in ("fp32", "bf16", "fp16"):
        options = {"precision": precision, "ema": 0.9, "max_grad_norm": 0.5, "max_steps": 30, "lr": 1e-3}
        run = start(recipe, config(cfg, tmp_path / precision, **options))
        curves[precision] = [(float(i.loss), float(i.grad_norm), bool(i.finite)) for i in steps(run)]
    for precision in ("bf16", "fp16"):
        for (loss, norm, finite), (wanted_loss, wanted_norm, _) in zip(curves[precision], curves["fp32"], strict=True):
            assert loss == pytest.approx(wanted_loss, rel=0.1)
            assert not finite or norm == pytest.approx(wanted_norm, rel=0.3)  # of the gradient, not the scaled one
        assert sum(finite for *_, finite in curves[precision]) >= 20


@gpu
@inductors_own
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SMALL)
def test_nobody_waits_for_the_device_between_log_lines(name, way, tmp_path):
    recipe, cfg = SMALL[name]
    forbidden = []

    def forbid(run, info):
        if info.step in (6, 29):  # the last step is logged
            torch.cuda.set_sync_debug_mode("error" if info.step == 6 else "default")
            forbidden.append(info.step)

    options = WAYS[way] | {"log_every": 1000, "max_steps": 30}
    run = start(
        replace(recipe, hooks=lambda cfg: [forbid]),
        config(cfg, tmp_path / "run", **options, validate_every=1000, micro_batch_size=4),
    )
    try:
        train(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.finish()
    assert forbidden == [6, 29]


@gpu
@pytest.mark.parametrize("name", SMALL)
def test_validation_waits_once_and_counts_no_example_twice(name, tmp_path):
    recipe, cfg = SMALL[name]
    run = start(recipe, config(cfg, tmp_path / "run", precision="bf16"))
    wanted, device = validate(run), run.devices.device
    val = recipe.data(run.cfg).val
    reader = ColumnReader({n: torch.as_tensor(c).to(device) for n, c in val.items()})
    sums = Sums(run.devices.sums_in, device)
    parts = [HeldOut(reader, 3, rank, 3, workers=0, device=device) for rank in range(3)]
    assert any(counted == 0 for part in parts for _, counted in part) or reader.n % 3 == 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        with run.evaluating():
            for part in parts:
                for batch, counted in part:
                    sums.add(run.evaluate(batch), length(batch), run.weight(batch, counted), counted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = sums.means(lambda values: values, expected=reader.n)
    for figure, value in found.items():
        assert wanted[f"val_{figure}"] == pytest.approx(value, rel=0.02), figure


@gpu
@pytest.mark.parametrize("name", SMALL)
def test_a_checkpoint_holds_what_was_there_though_the_weights_change_at_once(name, tmp_path):
    recipe, cfg = SMALL[name]
    run = start(recipe, config(cfg, tmp_path / "run", precision="bf16"))
    train(run)
    run.finish()
    before = {part: value.clone() for part, value in run.module.state_dict().items()}
    run.state.step += 1  # a step that is not saved yet
    run.save()
    with torch.no_grad():
        for parameter in run.module.parameters():
            parameter.zero_()
    run.saver.wait()
    cfg = config(cfg, tmp_path / "other", precision="bf16", resume=str(tmp_path / "run"), max_steps=STEPS + 2)
    again = start(recipe, cfg)
    assert all(torch.equal(again.module.state_dict()[part], value) for part, value in before.items())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A compiled run with an average, and how many frames had been compiled after each validation."""
    recipe, cfg = SMALL["lm"]
    frames = {}

    def count(run, info):
        frames[info.step] = torch._dynamo.utils.counters["frames"]["ok"]

    folder = tmp_path_factory.mktemp("compiled") / "run"
    run = start(
        replace(recipe, hooks=lambda cfg: [count]),
        config(cfg, folder, compile=True, ema=0.9, validate_every=3, checkpoint_every=4),
    )
    train(run)
    run.finish()
    return run, frames


@inductors_own
def test_nothing_is_compiled_again_after_the_first_validation(compiled):
    _, frames = compiled
    assert list(frames) == list(range(1, STEPS + 1))
    assert frames[3] >= 2  # training and evaluating
    assert frames[STEPS] == frames[3]


@inductors_own
def test_no_file_of_a_compiled_run_knows_of_the_compiler(compiled):
    run, _ = compiled
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert {"model.safetensors", "manifest.json"} <= {path.name for path in files}
    assert [path.name for path in files if b"_orig_mod" in path.read_bytes()] == []
