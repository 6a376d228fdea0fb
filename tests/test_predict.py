"""Predictions: a row for each example, in the order of the data set, on any number of processes."""

import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import torch.distributed as dist
from launching import RECIPES, TORCHRUN, launch
from PIL import Image
from test_checkpoints import checkpoint

from scaletrain import Data, InputError, load_weights, main, predict
from scaletrain.checkpoint.export import saved_classes
from scaletrain.cli import main as command


def logits(model, batch, cfg):
    found = model(batch["x"])
    return {"logits": found, "label": found.argmax(1)}


def data(cfg):
    return Data(train=tiny.table(), val=tiny.table(53, seed=1), classes=("ant", "bee", "cow"))


recipe = replace(tiny.recipe, predict=logits, data=data)


def trained(folder):
    main(recipe, ["--max-steps", "5", "--checkpoint-every", "3", "--micro-batch-size", "5", "--out", str(folder)])
    return folder


def wanted(folder, table):
    net = load_weights(tiny.model(tiny.TinyConfig(), None), folder)
    with torch.inference_mode():
        return net(torch.from_numpy(table["x"]).float()).numpy()


@pytest.mark.parametrize("name", ["out.parquet", "out.npz"])
def test_a_file_holds_a_row_for_each_example_in_order(name, tmp_path):
    run = trained(tmp_path / "run")
    assert predict(recipe, run, split="val", to=tmp_path / name) == {}
    if name.endswith("npz"):
        found = np.load(tmp_path / name)
    else:
        table = pq.read_table(tmp_path / name)
        found = {"logits": np.array(table["logits"].to_pylist(), dtype=np.float32), "label": table["label"].to_numpy()}
    right = wanted(run, tiny.table(53, seed=1))
    assert np.allclose(found["logits"], right, rtol=1e-6)
    assert np.array_equal(found["label"], right.argmax(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", name])


@pytest.mark.world_size(3)
def test_three_processes_return_and_write_the_same(shared_path):
    run = trained(shared_path / "run")
    found = predict(recipe, run, split="train")
    right = wanted(run, tiny.table())
    assert np.allclose(found["logits"], right, rtol=1e-5)
    predict(recipe, run, split="train", to=shared_path / "out.parquet")
    dist.barrier()
    table = pq.read_table(shared_path / "out.parquet")
    assert np.allclose(np.array(table["logits"].to_pylist()), right, rtol=1e-5)


def test_without_predict_it_is_what_evaluate_says_of_each_example(tmp_path):
    run = trained(tmp_path / "run")
    found = predict(replace(recipe, predict=None), run)
    assert found.keys() == {"loss", "accuracy"}
    assert len(found["loss"]) == 53


def test_the_options_and_classes_of_the_run_come_along(tmp_path):
    run = trained(tmp_path / "run")
    seen = []

    def model(cfg, data):
        seen.append((cfg.max_steps, cfg.micro_batch_size, list(data.classes)))
        return tiny.model(cfg, data)

    other = replace(recipe, model=model, data=lambda cfg: Data(train=tiny.table()))
    for weights in (run, run / "model.safetensors", checkpoint(run, 3)):
        predict(other, weights)
        assert saved_classes(weights) == ["ant", "bee", "cow"]
    assert seen == [(5, 5, ["ant", "bee", "cow"])] * 3


def test_what_cannot_be_predicted_is_refused(tmp_path):
    run = trained(tmp_path / "run")
    (tmp_path / "there.npz").touch()
    for options, why in (
        ({"to": tmp_path / "there.npz"}, "is there already"),
        ({"to": tmp_path / "out.csv"}, "write to a .parquet or .npz file"),
        ({"data": "iris"}, "TinyConfig has no option data"),
        ({"split": "test"}, "the data has no split 'test'"),
    ):
        with pytest.raises(InputError, match=why):
            predict(recipe, run, **options)
    wrong = replace(recipe, predict=lambda model, batch, cfg: {"mean": model(batch["x"]).mean()})
    with pytest.raises(InputError, match=r"predict returned \(\) for 'mean' on \d+ examples; return one row each"):
        predict(wrong, run)


def test_the_command_predicts_pictures_without_labels_on_one_and_two_processes(tmp_path):
    options = ["--epochs", "2", "--width", "4", "--out", tmp_path / "run"]
    assert launch(sys.executable, RECIPES / "cnn.py", *options).returncode == 0
    (tmp_path / "pictures").mkdir()
    for i in range(7):
        Image.new("RGB", (32, 32), (30 * i, 0, 0)).save(tmp_path / f"pictures/{i}.png")
    words = ["predict", RECIPES / "cnn.py", "--weights", tmp_path / "run", "--data", tmp_path / "pictures", "--to"]
    one = launch(sys.executable, "-m", "scaletrain.cli", *words, tmp_path / "one.npz")
    assert one.returncode == 0, one.stderr
    assert one.stdout == f"predictions: {tmp_path / 'one.npz'}\n"
    two = launch(*TORCHRUN, "-m", "scaletrain.cli", *words, tmp_path / "two.npz")
    assert two.returncode == 0, two.stderr
    found = [np.load(tmp_path / f"{name}.npz") for name in ("one", "two")]
    assert len(found[0]["label"]) == 7
    assert np.array_equal(found[0]["label"], found[1]["label"])
    assert np.allclose(found[0]["probability"], found[1]["probability"], rtol=1e-5)


def test_the_command_names_a_recipe_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command(["predict", "nowhere.py", "--weights", str(tmp_path), "--to", "x.npz"])
    assert ended.value.code == 2
    assert "nowhere.py: no such recipe" in capsys.readouterr().err


def test_what_cannot_be_predicted_is_one_line(tmp_path):
    run = trained(tmp_path / "run")
    with pytest.raises(InputError, match=r"the data has no split 'foo'; it has train, val"):
        predict(recipe, run, split="foo")
    wrong = replace(recipe, predict=lambda model, batch, cfg: model(batch["x"]))
    with pytest.raises(InputError, match=r"predict returned a Tensor; return a dict of columns"):
        predict(wrong, run)


def test_a_column_may_have_any_name(tmp_path):
    run = trained(tmp_path / "run")
    odd = replace(recipe, predict=lambda model, batch, cfg: {"file": model(batch["x"])})
    predict(odd, run, to=tmp_path / "out.npz")
    assert np.load(tmp_path / "out.npz")["file"].shape == (53, 3)
