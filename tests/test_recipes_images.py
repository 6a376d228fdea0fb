"""The recipes that read images: each option does what it says, and all of them go on with the same bits."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_checkpoints import assert_same_end, ends_with, left_after
from torch import nn

from recipes import cnn, cnn_own_loop, finetune, vit
from scaletrain import Data, InputError, main, start, steps, train
from scaletrain.devices import seed_generators

SMALL = ["--width", "4", "--batch-size", "32", "--threads", "1"]


def images(n=64, size=32, n_classes=10):
    made = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Data({"image": made, "label": torch.arange(n) % n_classes}, classes=list(map(str, range(n_classes))))


def batch_of(n=64):
    return images(n).train


def kinds(model):
    return [type(layer) for layer in model.modules()]


# cnn


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ({"norm": "batch"}, nn.BatchNorm2d),
        ({"norm": "group"}, nn.GroupNorm),
        ({"pool": "avg"}, nn.AvgPool2d),
        ({"pool": "max"}, nn.MaxPool2d),
    ],
)
def test_an_option_builds_the_layer_it_names_after_both_convolutions(options, layer):
    with_option = kinds(cnn.build_model(cnn.CNNConfig(**options), images()))
    others = {nn.BatchNorm2d, nn.GroupNorm, nn.AvgPool2d, nn.MaxPool2d} - {layer, nn.MaxPool2d}
    assert with_option.count(layer) == 2
    assert not others & set(with_option)


def test_the_cnn_by_default_is_the_one_it_was():
    names = [
        f"{layer}.{kind}" for layer in ("features.0", "features.3", "head.1", "head.4") for kind in ("weight", "bias")
    ]
    assert list(cnn.SmallCNN(10).state_dict()) == names
    torch.manual_seed(0)
    plain = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Linear(512, 128), nn.Linear(128, 10)]
    torch.manual_seed(0)
    ours = [layer for layer in cnn.SmallCNN(10, width=4, norm="none").modules() if hasattr(layer, "weight")]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(ours, plain, strict=True))


def test_group_norm_finds_groups_for_any_width():
    for width in (1, 4, 6, 32):
        model = cnn.SmallCNN(10, width=width, norm="group")
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def augmented(recipe, cfg, step=0, rank=0):
    seed_generators(1000 * rank + step, torch.device("cpu"))
    return recipe.augment(dict(batch_of()), cfg)


CHANGES = [{"flip": True}, {"crop": 4}, {"jitter": 0.3}, {"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}]


@pytest.mark.parametrize("options", CHANGES, ids=str)
def test_the_cnns_augmentation_is_a_function_of_the_generators_alone(options):
    cfg = cnn.CNNConfig(**options)
    first = augmented(cnn.recipe, cfg)
    np.random.seed(1)
    again, later, elsewhere = (augmented(cnn.recipe, cfg, step, rank) for step, rank in ((0, 0), (1, 0), (0, 1)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["image"], later["image"])
    assert not torch.equal(first["image"], elsewhere["image"])
    assert not torch.equal(first["image"], batch_of()["image"])


def test_a_flip_mirrors_and_a_crop_is_a_window_of_the_image_in_its_border():
    image = batch_of()["image"]
    flipped = augmented(cnn.recipe, cnn.CNNConfig(flip=True))["image"]
    as_it_was = [torch.equal(a, b) for a, b in zip(flipped, image, strict=True)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, image, strict=True)]
    assert all(a != b for a, b in zip(as_it_was, mirrored, strict=True))
    assert 10 < sum(mirrored) < 54
    padded = F.pad(image, (2, 2, 2, 2))
    for cut, whole in zip(augmented(cnn.recipe, cnn.CNNConfig(crop=2))["image"], padded, strict=True):
        windows = [whole[:, i : i + 32, j : j + 32] for i in range(5) for j in range(5)]
        assert any(torch.allclose(cut, window, atol=1e-6) for window in windows)


def test_images_keep_their_shape_and_stay_between_0_and_1():
    cfg = cnn.CNNConfig(flip=True, crop=4, jitter=0.3, mixup=0.4, cutmix=1.0)
    for step in range(4):
        image = augmented(cnn.recipe, cfg, step)["image"]
        assert (image.shape, image.dtype) == ((64, 3, 32, 32), torch.float32)
        assert image.min() >= 0
        assert image.max() <= 1


def test_augmentation_is_off_by_default():
    batch = batch_of()
    state = torch.get_rng_state()
    assert torch.equal(cnn.recipe.augment(batch, cnn.CNNConfig())["image"], batch["image"])
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_is_for_training_alone(tmp_path):
    seen = {}

    def noting(split, function):
        def note(model, batch, cfg):
            seen.setdefault(split, []).append(batch["image"].clone())
            return function(model, batch, cfg)

        return note

    data = replace(images(), val=batch_of(16))
    recipe = replace(
        cnn.recipe,
        data=lambda cfg: data,
        loss=noting("train", cnn.loss),
        evaluate=noting("val", cnn.evaluate),
    )
    main(recipe, [*SMALL, "--crop", "4", "--max-steps", "2", "--out", str(tmp_path / "run")])
    assert torch.equal(seen["val"][-1], batch_of(16)["image"])
    assert not any(torch.equal(image, other) for image in seen["train"][0] for other in batch_of()["image"])


class Says(nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, image):
        return self.logits


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_the_loss_of_mixed_images_is_the_cross_entropies_mixed_by_the_same_shares(options):
    cfg = cnn.CNNConfig(**options, label_smoothing=0.0)
    batch = augmented(cnn.recipe, cfg)
    shares = batch["shares"]  # (B, B)
    assert torch.allclose(shares.sum(1), torch.ones(64))
    assert ((shares > 0).sum(1) <= 2).all()
    if "mixup" in options:
        blended = torch.einsum("ij,jchw->ichw", shares, batch_of()["image"])
        assert torch.allclose(batch["image"], blended, atol=1e-5)
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    own = torch.stack([F.cross_entropy(logits, batch["label"][j].repeat(64), reduction="none") for j in range(64)], 1)
    assert torch.allclose(cnn.loss(Says(logits), batch, cfg), (shares * own).sum(1).mean(), rtol=1e-5)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}])
def test_label_smoothing_mixes_the_target_with_all_classes_evenly(mixing):
    batch = augmented(cnn.recipe, cnn.CNNConfig(**mixing))
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    hard, smooth = (cnn.loss(Says(logits), batch, cnn.CNNConfig(label_smoothing=share)) for share in (0.0, 0.1))
    assert torch.allclose(smooth, 0.9 * hard - 0.1 * logits.log_softmax(1).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        "--optimizer sgd --schedule one_cycle --mixup 0.4 --flip --crop 2",
        "--optimizer muon --cutmix 1 --label-smoothing 0.1 --norm group",
        "--mixup 0.2 --cutmix 1 --jitter 0.2 --norm batch --pool avg --ema 0.9",
    ],
)
def test_the_cnn_goes_on_with_the_same_bits_whatever_is_on(options, tmp_path):
    recipe = replace(cnn.recipe, data=lambda cfg: replace(images(), val=batch_of(16)))
    argv = [*SMALL, *options.split(), "--max-steps", "4", "--validate-every", "2"]
    main(recipe, [*argv, "--out", str(tmp_path / "whole")])
    main(recipe, [*argv, "--out", str(tmp_path / "again"), "--checkpoint-every", "2", "--keep-last", "9"])
    left_after(tmp_path / "again", 2)
    main(recipe, [*argv, "--out", str(tmp_path / "again")])
    assert_same_end(tmp_path / "whole", tmp_path / "again")
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_the_optimizers_and_schedules_are_those_named():
    model = cnn.SmallCNN(10, width=4)
    by_name = {name: cnn.recipe.optimizer(model, cnn.CNNConfig(optimizer=name)) for name in cnn.OPTIMIZERS}
    assert isinstance(by_name["adamw"], torch.optim.AdamW)
    assert isinstance(by_name["sgd"], torch.optim.SGD)
    assert (by_name["sgd"].defaults["momentum"], by_name["sgd"].defaults["nesterov"]) == (0.9, True)
    assert any("ns_steps" in group for group in by_name["muon"].param_groups)
    assert cnn.recipe.schedule(0, 100, cnn.CNNConfig(schedule="one_cycle"))["lr"] == pytest.approx(1 / 25)
    assert cnn.recipe.schedule(0, 100, cnn.CNNConfig()) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    "argv",
    ["--width 0", "--dropout 1.5", "--label-smoothing -0.1", "--mixup -1", "--cutmix nan", "--crop -1", "--jitter -1"],
)
def test_a_value_that_cannot_work_is_one_line(argv, capsys):
    said = ends_with(2, capsys, lambda: main(cnn.recipe, argv.split()))
    assert f"{argv.split()[0]} is {argv.split()[1]}" in said
    assert "; use a number from " in said


# vit


VIT = ["--image-size", "16", "--width", "32", "--depth", "2", "--threads", "1"]


def test_the_vit_learns_in_seconds(tmp_path):
    options = [
        "--epochs",
        "6",
        "--lr",
        "4e-3",
        "--shift",
        "0",
        "--turn",
        "0",
        "--patch",
        "4",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(vit.recipe, [*VIT, *options]).metrics["val_accuracy"] > 0.6  # chance is 0.1


def test_a_patch_is_a_vector_of_the_sequence_in_its_place():
    torch.manual_seed(0)
    model = vit.ViT(10, image_size=16, patch=4, width=32, depth=1, heads=4).eval()
    seen = []
    model.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.rand(1, 3, 16, 16)
    changed = image.clone()
    changed[..., 4:8, 8:12] += 0.5  # the second row of patches, the third in it
    assert model(image).shape == (1, 10)
    model(changed)
    moved = (seen[0] != seen[1]).any(-1)[0]  # (patches,)
    assert moved.nonzero().flatten().tolist() == [4 + 2]


def test_a_patch_that_does_not_divide_the_image_is_one_line(capsys):
    said = ends_with(2, capsys, lambda: main(vit.recipe, ["--patch", "5"]))
    assert "--patch 5 does not divide --image-size 32" in said
    said = ends_with(2, capsys, lambda: main(vit.recipe, ["--heads", "5"]))
    assert "width 64 is not divisible by 5 heads" in said


def test_the_vits_augmentation_is_a_function_of_the_generators_alone():
    cfg = vit.ViTConfig(flip=True)
    first, again, later = (augmented(vit.recipe, cfg, step)["image"] for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    off = vit.ViTConfig(shift=0.0, turn=0.0)
    assert torch.equal(augmented(vit.recipe, off)["image"], batch_of()["image"])


def test_the_vit_goes_on_with_the_same_bits(tmp_path):
    recipe = replace(vit.recipe, data=lambda cfg: replace(images(size=16), val=images(16, size=16).train))
    argv = [*VIT, "--batch-size", "16", "--dropout", "0.1", "--max-steps", "4", "--validate-every", "2"]
    main(recipe, [*argv, "--out", str(tmp_path / "whole")])
    main(recipe, [*argv, "--out", str(tmp_path / "again"), "--checkpoint-every", "2", "--keep-last", "9"])
    left_after(tmp_path / "again", 2)
    main(recipe, [*argv, "--out", str(tmp_path / "again")])
    assert_same_end(tmp_path / "whole", tmp_path / "again")


def losses(recipe, cfg):
    run = start(recipe, cfg)
    return [run.mean(info.loss) for info in steps(run)]


def plain_losses(recipe, cfg):
    """Train on the whole batches of the same order in this process alone."""
    from tiny import batches

    torch.manual_seed(cfg.seed)
    model = recipe.model(cfg, recipe.data(cfg))
    optimizer = recipe.optimizer(model, cfg)
    base, found = [group["lr"] for group in optimizer.param_groups], []
    for step, batch in enumerate(batches(recipe, cfg, torch.float32, cfg.max_steps)):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * recipe.schedule(step, cfg.max_steps, cfg)
        optimizer.zero_grad()
        loss = recipe.loss(model, batch, cfg)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.world_size(2)
def test_the_vit_and_the_cnn_with_group_norm_have_the_same_losses_on_two_processes(shared_path):
    small = {"max_steps": 10, "batch_size": 13, "threads": 1, "dropout": 0.0, "ema": None}
    of_vit = vit.ViTConfig(image_size=16, width=32, depth=2, shift=0.0, turn=0.0, **small)
    of_cnn = cnn.CNNConfig(width=4, norm="group", pool="avg", optimizer="sgd", **small)
    for recipe, cfg, size in ((vit.recipe, of_vit, 16), (cnn.recipe, of_cnn, 32)):
        recipe = replace(recipe, data=lambda cfg, size=size: images(size=size))
        wanted = plain_losses(recipe, cfg)
        for micro in (None, 3):
            out = str(shared_path / f"{size}-{micro}")
            assert losses(recipe, replace(cfg, micro_batch_size=micro, out=out)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.world_size(2)
def test_the_loop_written_out_and_finetuning_have_the_same_losses_on_two_processes(shared_path, tmp_path):
    small = {"width": 4, "max_steps": 10, "batch_size": 13, "threads": 1, "dropout": 0.0, "log_every": 1}
    weights = tmp_path / "base.safetensors"  # the rank's own, and the same
    torch.manual_seed(1)
    save_file(cnn.SmallCNN(10, width=4).state_dict(), weights)
    for name, recipe, cfg, loop in (
        ("own_loop", cnn.recipe, cnn.CNNConfig(**small), cnn_own_loop.own_loop),
        ("finetune", finetune.recipe, finetune.FinetuneConfig(weights=str(weights), **small), train),
    ):
        recipe = replace(recipe, data=lambda cfg: images())
        wanted = plain_losses(recipe, cfg)
        for micro in (None, 3):
            out = shared_path / f"{name}-{micro}"
            run = start(recipe, replace(cfg, micro_batch_size=micro, out=str(out)))
            loop(run)
            run.finish()
            dist.barrier()
            lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(wanted, rel=1e-6)


# finetune


OF_TRAINED = ["--width", "4", "--norm", "batch", "--pool", "avg"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a small CNN with BatchNorm."""
    out = tmp_path_factory.mktemp("runs") / "cnn"
    main(cnn.recipe, [*SMALL, *OF_TRAINED, "--max-steps", "30", "--out", str(out)])
    return out


def finetuned(trained, out, *argv):
    options = ["--weights", str(trained), *OF_TRAINED, "--threads", "1", "--max-steps", "6", "--out", str(out)]
    return main(finetune.recipe, [*options, *argv])


def test_it_begins_with_the_trained_weights_but_for_a_new_last_layer(trained):
    cfg = finetune.FinetuneConfig(width=4, norm="batch", pool="avg", weights=str(trained))
    model = finetune.build_model(cfg, finetune.load_data(cfg))
    before = load_file(trained / "model.safetensors")
    assert nn.BatchNorm2d in kinds(model)
    assert nn.AvgPool2d in kinds(model)
    assert model.head[4].weight.shape == (2, 128)
    others = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.4.")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in others.items())
    assert len(others) == len(before) - 2


def test_the_task_is_even_or_odd_from_few_images_and_held_out_are_those_of_the_first_run():
    cfg = finetune.FinetuneConfig(examples=50)
    ours, first = finetune.load_data(cfg), cnn.load_data(cnn.CNNConfig())
    assert len(ours.train["label"]) == 50
    assert torch.equal(ours.val["image"], first.val["image"])
    assert torch.equal(ours.val["label"], first.val["label"] % 2)
    assert len(finetune.load_data(replace(cfg, examples=0)).train["label"]) == 1438
    assert len(finetune.load_data(replace(cfg, split_seed=None)).train["label"]) == 1797


def test_what_is_frozen_does_not_move_by_a_bit_and_the_head_does(trained, tmp_path):
    finetuned(trained, tmp_path / "run", "--freeze")
    before, after = (load_file(out / "model.safetensors") for out in (trained, tmp_path / "run"))
    features = [name for name in before if name.startswith("features.")]
    assert {"features.1.running_mean", "features.1.num_batches_tracked"} <= set(features)
    assert all(torch.equal(before[name], after[name]) for name in features)
    assert not torch.equal(before["head.1.weight"], after["head.1.weight"])


def test_without_freezing_everything_moves(trained, tmp_path):
    finetuned(trained, tmp_path / "run")
    before, after = (load_file(out / "model.safetensors") for out in (trained, tmp_path / "run"))
    assert not any(torch.equal(before[name], after[name]) for name in before if before[name].shape == after[name].shape)


@pytest.mark.parametrize("freeze", [True, False])
def test_all_but_the_last_layer_learns_at_a_tenth_of_the_rate(freeze, trained):
    cfg = finetune.FinetuneConfig(width=4, norm="batch", pool="avg", weights=str(trained), lr=1e-2, freeze=freeze)
    model = finetune.build_model(cfg, finetune.load_data(cfg))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = finetune.recipe.optimizer(model, cfg).param_groups
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    below = {name: 1e-2 if name.startswith("head.4.") else 1e-3 for name in names.values()}
    wanted = {name: rate for name, rate in below.items() if not (freeze and name.startswith("features."))}
    assert rates == pytest.approx(wanted)


def test_it_goes_on_with_the_same_bits(trained, tmp_path):
    finetuned(trained, tmp_path / "whole", "--freeze")
    finetuned(trained, tmp_path / "again", "--freeze", "--checkpoint-every", "3", "--keep-last", "9")
    left_after(tmp_path / "again", 3)
    finetuned(trained, tmp_path / "again", "--freeze")
    assert_same_end(tmp_path / "whole", tmp_path / "again")


def test_missing_weights_are_one_line_that_says_how_to_make_them(capsys):
    said = ends_with(2, capsys, lambda: main(finetune.recipe, []))
    assert "--weights runs/cnn_digits: no such folder or file" in said
    assert "`python recipes/cnn.py --out runs/cnn_digits`" in said


def test_weights_of_another_network_are_one_line_that_names_what_differs(trained, tmp_path, capsys):
    said = ends_with(3, capsys, lambda: finetuned(trained, tmp_path / "run", "--width", "5"))
    assert "features.0" in said
    assert "in the model" in said


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    """A small ViT of the transformers library for 7 classes, saved in a folder."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("hub") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=7, **sizes)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    return folder


@pytest.mark.parametrize("freeze", [True, False])
def test_a_transformers_model_gets_a_new_head_and_smaller_steps_below_it(freeze, tiny_vit, tmp_path):
    argv = ["--transformers", str(tiny_vit), "--threads", "1", "--max-steps", "3", "--out", str(tmp_path / "run")]
    main(finetune.recipe, [*argv, *(["--freeze"] if freeze else [])])
    cfg = finetune.FinetuneConfig(transformers=str(tiny_vit), lr=1e-2)
    model = finetune.build_model(cfg, finetune.load_data(cfg))
    rates = {group["lr"] for group in finetune.recipe.optimizer(model, cfg).param_groups}
    assert sorted(rates) == pytest.approx([1e-3, 1e-2])
    before, after = model.state_dict(), load_file(tmp_path / "run/model.safetensors")
    assert after["net.classifier.weight"].shape == (2, 16)
    body = [name for name in before if name.startswith("net.vit.")]
    assert len(body) > 10
    assert all(torch.equal(before[name], after[name]) == freeze for name in body)


def test_a_transformers_model_sees_images_of_its_size_scaled_as_it_expects(tiny_vit):
    cfg = finetune.FinetuneConfig(transformers=str(tiny_vit))
    data = finetune.load_data(cfg)
    image = data.train["image"][:2]
    assert image.shape == (2, 3, 16, 16)
    model = finetune.build_model(cfg, data)
    assert model.net.training
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    scaled = (image - mean[:, None, None]) / std[:, None, None]
    model.eval()
    assert torch.allclose(model(image), model.net(pixel_values=scaled).logits)


def test_a_transformers_model_that_is_not_there_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    said = ends_with(2, capsys, lambda: main(finetune.recipe, ["--transformers", str(tmp_path / "empty")]))
    assert f"--transformers {tmp_path / 'empty'}: " in said


def test_code_that_comes_with_a_transformers_model_is_never_run(tiny_vit, tmp_path, capsys):
    folder = tmp_path / "strange"
    shutil.copytree(tiny_vit, folder)
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "strange", "auto_map": {
        "AutoConfig": "strange.Config", "AutoModelForImageClassification": "strange.Net",
    }}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Net: pass\n")
    said = ends_with(2, capsys, lambda: main(finetune.recipe, ["--transformers", str(folder), "--max-steps", "1"]))
    assert said.startswith(f"error: --transformers {folder}: ")
    assert not (tmp_path / "ran").exists()


def test_transformers_is_imported_only_for_its_models(trained):
    cfg = finetune.FinetuneConfig(width=4, norm="batch", pool="avg", weights=str(trained))
    hidden = dict.fromkeys(("transformers", "transformers.utils"))
    with pytest.MonkeyPatch.context() as patch:
        for name in hidden:
            patch.setitem(sys.modules, name, None)  # importing it now is an error
        finetune.build_model(cfg, finetune.load_data(cfg))


def test_bad_options_of_finetune_are_named():
    for options, word in (
        ({"examples": -1}, "--examples"),
        ({"body_lr": 0.0}, "--body-lr"),
        ({"dropout": 2.0}, "--dropout"),
    ):
        with pytest.raises(InputError, match=word):
            finetune.FinetuneConfig(**options).check()
