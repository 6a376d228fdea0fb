"""Odd files and folders: nothing is lost, nothing is misread, and what cannot be meant is refused in one line."""

import gzip
import json
import os
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from scaletrain import Config, Data, InputError, Recipe, load, main
from scaletrain.sources.table import as_table


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def refused(match, *args, **kwargs):
    with pytest.raises(InputError, match=match) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)


def pictures(folder, *groups, n=5):
    """Write n images into each group, a folder or the beginning of a file's name; returns the folder."""
    for group in groups:
        for i in range(n):
            path = folder / f"{group}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    return folder


def kept(data):
    """How many examples each split has."""
    splits = {name: getattr(data, name) for name in ("train", "val", "test")}
    return {name: len(next(iter(part.values()))) for name, part in splits.items() if part is not None}


def table(path, n=20, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or {"x": list(range(n)), "label": [i % 2 for i in range(n)]}
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict(columns).to_parquet(path)
    else:
        rows = zip(*columns.values(), strict=True)
        path.write_text("\n".join(",".join(map(str, row)) for row in [columns, *rows]))
    return path


# every file of a folder counts


@pytest.mark.parametrize(
    ("groups", "classes"),
    [
        (["cat/", "dog/", "cat/test_"], ["cat", "dog"]),
        (["cat/", "boat/", "train/"], ["boat", "cat", "train"]),
        (["cat/", "dog/", "test/"], ["cat", "dog", "test"]),
        (["train/cat/", "train/dog/", "extra/cat/", "extra/dog/"], ["cat", "dog"]),
        (["animals/cat/", "animals/dog/"], ["cat", "dog"]),
    ],
)
def test_every_image_of_a_folder_counts_whatever_it_is_called(groups, classes, tmp_path):
    data = load(pictures(tmp_path / "pets", *groups), image_size=4)
    assert sum(kept(data).values()) == 5 * len(groups)
    assert data.classes == classes


def test_folders_that_are_all_named_for_a_split_are_splits(tmp_path):
    groups = [f"{split}/{cls}/" for split in ("Training", "dev", "testing") for cls in ("cat", "dog")]
    data = load(pictures(tmp_path / "pets", *groups))
    assert kept(data) == {"train": 10, "val": 10, "test": 10}
    shutil.rmtree(tmp_path / "pets/dev/dog")
    shutil.move(tmp_path / "pets", tmp_path / "outer/pets")
    data = load(tmp_path / "outer")
    assert kept(data) == {"train": 10, "val": 5, "test": 10}
    assert data.val["label"].tolist() == [0] * 5


def test_a_test_folder_without_classes_has_no_labels(tmp_path):
    assert kept(load(pictures(tmp_path / "pets", "train/cat/", "train/dog/", "test/"))) == {"train": 8, "val": 2}
    refused("column 'label' has no label in row 0", pictures(tmp_path / "pets", "val/"))


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    pictures(tmp_path / "far", "fish/")
    folder = pictures(tmp_path / "pets", "cat/")
    (folder / "fish").symlink_to(tmp_path / "far/fish")
    (folder / "cat/again").symlink_to(folder)
    data = load(folder)
    assert data.classes == ["cat", "fish"]
    assert sum(kept(data).values()) == 10


def test_images_beside_the_folders_of_classes_and_half_named_splits_are_refused(tmp_path):
    refused("different depths, as 0.png and cat/0.png; put each", pictures(tmp_path / "a", "cat/", "dog/", ""))
    folder = pictures(tmp_path / "b", "train/cat/", "test/cat/", "more/cat/")
    refused("named for a split, as t.*/cat/0.png, and some is not, as more/cat/0.png", folder)


def test_an_empty_tree_of_classes_is_an_empty_folder(tmp_path):
    (tmp_path / "pets/cat").mkdir(parents=True)
    refused("pets is an empty folder", tmp_path / "pets")


def test_what_is_left_out_of_a_folder_is_told(tmp_path):
    folder = pictures(tmp_path / "pets", "cat/", "dog/")
    (folder / "readme.txt").touch()
    load(folder)
    (folder / "cat/5.heic").touch()
    with pytest.warns(UserWarning, match=r"1 files are of another kind and left out, as cat/5\.heic"):
        assert sum(kept(load(folder)).values()) == 10


def test_images_with_metadata_keep_their_columns(tmp_path):
    folder = pictures(tmp_path / "pets", "test_", "dog_")
    lines = [{"file_name": path.name, "weight": i} for i, path in enumerate(sorted(folder.iterdir()))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load(folder, split_seed=None)
    assert kept(data) == {"train": 10}
    assert sorted(data.train["features"][:, 0].tolist()) == list(range(10))


def test_every_table_of_a_folder_counts_and_splits_are_those_of_the_hub(tmp_path):
    for name in ("part-0", "part-1", "latest-train"):
        table(tmp_path / f"mix/{name}.parquet")
    assert sum(kept(load(tmp_path / "mix")).values()) == 60
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        table(tmp_path / f"hub/data/{name}.parquet")
    assert kept(load(tmp_path / "hub")) == {"train": 32, "val": 8, "test": 20}
    for name in ("iris_train", "iris_test"):
        table(tmp_path / f"iris/{name}.csv")
    assert kept(load(tmp_path / "iris")) == {"train": 16, "val": 4, "test": 20}
    for name in ("train/a", "test/a", "test/b"):
        table(tmp_path / f"parts/{name}.csv")
    assert kept(load(tmp_path / "parts")) == {"train": 16, "val": 4, "test": 40}
    table(tmp_path / "parts/notes.parquet")
    refused("tables of several kinds, as .*parquet and .*csv; leave one", tmp_path / "parts")


def test_a_test_table_may_lack_the_label_and_other_splits_have_the_same_columns(tmp_path):
    table(tmp_path / "one/train.csv")
    table(tmp_path / "one/test.csv", x=list(range(5)))
    assert kept(load(tmp_path / "one")) == {"train": 16, "val": 4}
    table(tmp_path / "one/val.csv", x=list(range(5)))
    refused("one: val has no column 'label'", tmp_path / "one")
    table(tmp_path / "one/val.csv", x=list(range(5)), label=["a"] * 5)
    refused("one: val: column 'label' holds .*string, in training int64", tmp_path / "one")


def test_a_folder_with_several_configs_is_asked_for_one(tmp_path):
    for name in ("a", "b"):
        table(tmp_path / f"sets/{name}/train.parquet", 20 if name == "a" else 10)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("a", "b"))
    (tmp_path / "sets/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    refused(r"has the configs \['a', 'b'\]; name one, as '.*sets:NAME'", tmp_path / "sets")
    assert sum(kept(load(f"{tmp_path}/sets:b")).values()) == 10


# names and contents of files


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_what_separates_the_columns_of_a_csv_is_seen(separator, tmp_path):
    path = table(tmp_path / "x.csv")
    path.write_text(path.read_text().replace(",", separator))
    assert load(path).train["features"].shape == (16, 1)


def test_upper_case_home_and_gzip_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = table(tmp_path / "X.CSV")
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    np.save(tmp_path / "x.npy", np.arange(20))
    (tmp_path / "x.npy").rename(tmp_path / "X.NPY")
    for name in (path, "~/X.CSV", "x.csv.gz", "~/X.NPY"):
        assert kept(load(name)) == {"train": 16, "val": 4}


def test_a_name_with_signs_of_a_pattern_is_a_name(tmp_path):
    table(tmp_path / "x[1]*.csv", 10)
    table(tmp_path / "x1.csv", 20)
    assert sum(kept(load(tmp_path / "x[1]*.csv")).values()) == 10


def test_a_file_that_was_replaced_is_read_anew_though_its_time_is_the_same(tmp_path):
    for value in (1, 2):
        table(tmp_path / "x.csv", x=[value] * 20, label=[0, 1] * 10)
        os.utime(tmp_path / "x.csv", ns=(10**18, 10**18))
        assert load(tmp_path / "x.csv").train["features"].unique().tolist() == [value]


def test_a_bin_needs_a_length(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(10))
    refused("'.bin' is not a known kind of file; .*give length", tmp_path / "x.bin")


# datasets as they are


def test_a_dataset_is_loaded_like_a_file_and_other_objects_are_refused():
    import pandas

    rows = {"x": list(range(20)), "label": [0, 1] * 10}
    own = datasets.Dataset.from_dict(rows)
    assert kept(load(own)) == {"train": 16, "val": 4}
    assert kept(load(datasets.DatasetDict(train=own, validation=own.select(range(6))))) == {"train": 20, "val": 6}
    refused("has a transform, which load would leave out", own.with_transform(lambda batch: batch))
    refused(r"load was given a DataFrame; .*Dataset.from_pandas\(frame\)", pandas.DataFrame(rows))
    for other in (None, np.zeros(3)):
        refused(f"load was given a {type(other).__name__}; give a name", other)


def test_a_dataset_given_as_it_is_has_whole_labels_and_text():
    rows = {"x": [[1.0, 2.0]] * 4, "label": [0, 1, 2, 0], "name": list("abcd")}
    own = datasets.Dataset.from_dict(rows)
    for dtype in ("int32", "uint8", "float32"):
        batch = as_table(own.cast_column("label", datasets.Value(dtype)), "train").__getitems__([2, 1])
        assert batch["label"].dtype == torch.int64
        assert batch["label"].tolist() == [2, 1]
        assert batch["x"].shape == (2, 2)
        assert batch["name"] == ["c", "b"]
    scores = datasets.Dataset.from_dict(rows | {"label": [0.5, 1.0, 2.0, 0.0]})
    assert as_table(scores, "train").__getitems__([0])["label"].tolist() == [0.5]


def test_tables_that_look_like_columns_are_refused_by_data():
    import pandas

    with pytest.raises(InputError, match=r"train is a DataFrame; give datasets.Dataset.from_pandas\(frame\)"):
        Data(train=pandas.DataFrame({"x": [1]}))
    with pytest.raises(InputError, match="val is a DatasetDict; give one of its splits"):
        Data(train={"x": [1]}, val=datasets.DatasetDict())


# images


def image(path, content, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (content if isinstance(content, Image.Image) else Image.fromarray(content)).save(path, **options)


def test_images_of_every_depth_and_mode_are_scaled_to_0_1(tmp_path):
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = (255, 0, 0, 255)
    turned = Image.new("RGB", (4, 2), "black")
    turned.paste("white", (0, 0, 2, 2))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255] * 256)
    orientation = Image.Exif()
    orientation[0x112] = 6  # stored lying on its side: the left is the top
    shown = {
        "16.png": (np.full((4, 4), 13107, np.uint16), {}, [0.2] * 6),
        "32.tif": (np.full((4, 4), 13107, np.int32), {}, [0.2] * 6),
        "float.tif": (np.full((4, 4), 0.25, np.float32), {}, [0.25] * 6),
        "grey.png": (np.full((4, 4), 51, np.uint8), {}, [0.2] * 6),
        "clear.png": (clear, {}, [1, 0, 0, 1, 1, 1]),
        "palette.png": (palette, {"transparency": 0}, [1] * 6),
        "turned.png": (turned, {"exif": orientation}, [1, 1, 1, 0, 0, 0]),
    }
    for name, (content, options, _) in shown.items():
        image(tmp_path / "pets" / name, content, **options)
    found = load(tmp_path / "pets", split_seed=None, image_size=4).train["image"]
    for picture, name in zip(found, sorted(shown), strict=True):
        ends = [*picture[:, 0, 0].tolist(), *picture[:, 3, 3].tolist()]
        assert ends == pytest.approx(shown[name][2], abs=1e-6), name
    assert load(tmp_path / "pets", split_seed=None, image_size=3).train["image"].shape == (7, 3, 3, 3)


@pytest.mark.parametrize("worst", [255.0, -0.5, float("nan")])
def test_an_image_of_numbers_beyond_0_1_is_refused(worst, tmp_path):
    content = np.zeros((4, 4), np.float32)
    content[1, 1] = worst
    image(tmp_path / "pets/train/0.tif", content)
    image(tmp_path / "pets/val/0.tif", content)
    refused(r"0\.tif \(row 0\): mode F with values .* to .*; convert it", tmp_path / "pets")


def test_an_image_that_is_missing_from_a_table_is_named(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.new("RGB", (4, 4))] * 9 + [None], "label": [0, 1] * 5}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    found = load(tmp_path / "x.parquet", split_seed=None).train
    with pytest.raises(InputError, match=r"x\.parquet: the image is missing in row 9"):
        found.__getitems__([9])


def test_a_broken_image_ends_a_run_at_its_start_unless_a_few_may_be_skipped(tmp_path, capsys):
    folder = pictures(tmp_path / "pets", "train/cat/", "train/dog/", "val/cat/", "val/dog/")
    broken = folder / "train/dog/3.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    recipe = Recipe(
        config=Config,
        data=lambda cfg: load(folder, image_size=4),
        model=lambda cfg, data: nn.Sequential(nn.Flatten(), nn.Linear(48, 2)),
        loss=lambda model, batch, cfg: cross_entropy(model(batch["image"]), batch["label"]),
    )
    argv = ["--max-steps", "5", "--batch-size", "4", "--workers", "0", "--out"]
    with pytest.raises(SystemExit) as left:
        main(recipe, [*argv, "one"])
    assert left.value.code == 2
    said = capsys.readouterr()
    assert "dog/3.png (row 8): " in said.err
    assert not list(tmp_path.glob("one/*"))
    main(recipe, [*argv, "two", "--skip-bad", "3"])
    assert "dog/3.png" in json.loads((tmp_path / "two/result.json").read_text())["examples_replaced"]["8"]


# labels and what they are not


NEW = {"features": ["h", "w"], "label": "species"}


@pytest.mark.parametrize("suffix", ["csv", "parquet", "npz"])
def test_new_data_may_lack_the_label(suffix, tmp_path):
    rows = {"h": [1.0, 2.0], "w": [2.0, 3.0]}
    path = tmp_path / f"new.{suffix}"
    np.savez(path, **rows) if suffix == "npz" else table(path, **rows)
    found = load(path, columns=NEW, split_seed=None)
    assert set(found.train) == {"features"}
    assert found.train["features"].tolist() == [[1, 2], [2, 3]]
    refused("no column 'species'", path, columns=NEW)


@pytest.mark.parametrize("n", [1, 2])
def test_new_data_may_have_one_row_or_one_class(n, tmp_path):
    path = table(tmp_path / "new.csv", h=[1] * n, w=[2] * n, species=["dog"] * n)
    found = load(path, columns=NEW, split_seed=None)
    assert found.train["label"].tolist() == [0] * n
    refused("has 1 different values; 2 to", path, columns=NEW)
    path = table(tmp_path / "empty.parquet", h=[1] * n, w=[2] * n, species=[None] * n)
    assert set(load(path, columns=NEW, split_seed=None).train) == {"features"}
    folder = pictures(tmp_path / "pets", "dog/", n=n)
    assert kept(load(folder, split_seed=None)) == {"train": n}
    refused("pets has one class, 'dog'", folder)


@pytest.mark.parametrize(("name", "whole"), [("target", True), ("target", False), ("y", True)])
def test_many_different_numbers_called_target_are_to_be_predicted(name, whole, tmp_path):
    numbers = [100 + 37 * i + (0 if whole else 0.5) for i in range(500)]
    data = load(table(tmp_path / "x.csv", a=list(range(500)), **{name: numbers}))
    assert data.classes is None
    assert data.train["target"].dtype == torch.float32
    assert data.train["target"].shape == (400,)
    data = load(table(tmp_path / "few.csv", a=list(range(500)), **{name: [i % 50 for i in range(500)]}))
    assert len(data.classes) == 50


def test_labels_in_memory_are_whole_numbers():
    x = np.zeros((20, 2))
    data = load({"features": x, "label": np.arange(20) % 2 + 0.0})
    assert data.train["label"].dtype == torch.int64
    for worst in (0.5, np.nan, np.inf):
        label = np.where(np.arange(20) == 7, worst, 1.0)
        refused("column 'label' is .* in row 7 .*whole numbers", {"features": x, "label": label})


# values and choices that were taken without a word


def test_numbers_too_large_for_float32_are_refused(tmp_path):
    big = [1e300 if i == 7 else 1.0 for i in range(20)]
    refused("'x' is too large for float32 in row 7", table(tmp_path / "x.parquet", x=big, label=[0, 1] * 10))
    lists = table(tmp_path / "l.parquet", x=[[one, 0.0] for one in big], label=[0, 1] * 10)
    refused("'x' is too large for float32 in row 7", lists)


def test_text_that_is_missing_is_named(tmp_path):
    path = table(tmp_path / "x.parquet", text=[None if i == 7 else "a" for i in range(20)], label=[0, 1] * 10)
    with pytest.raises(InputError, match=r"column 'text' has no text in row 7"):
        load(path, split_seed=None).train.__getitems__([6, 7])


def test_columns_that_are_left_out_are_told(tmp_path):
    import datetime

    path = table(tmp_path / "x.parquet", x=[1] * 20, day=[datetime.date(2020, 1, 1)] * 20, pair=[{"a": 1}] * 20)
    with pytest.warns(UserWarning, match=r"x.parquet: left out 'day' \(date32\), 'pair' \(dict\), neither numbers"):
        assert set(load(path).train) == {"features"}


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"label": ["x", "label"]}, r"columns names \['x', 'label'\] for label; it is one column"),
        ({"features": []}, "names no column"),
        ({}, "names no column"),
    ],
)
def test_a_choice_of_columns_that_cannot_be_meant_is_refused(columns, why, tmp_path):
    for source in (table(tmp_path / "x.csv"), {"x": np.zeros(20), "label": np.zeros(20)}):
        refused(why, source, columns=columns)


def test_columns_side_by_side_are_of_one_shape():
    found = {"a": np.zeros(10), "b": np.zeros((10, 2))}
    refused(r"'a' is of shape \(10,\) and 'b' of \(10, 2\)", found, columns={"features": ["a", "b"]})


@pytest.mark.parametrize("name", ["x.parquet", "X.CSV", "x.csv.gz", "x.npz", "x.png", "x.txt.gz"])
def test_a_table_or_an_image_holds_no_tokens(name, tmp_path):
    (tmp_path / name).write_bytes(bytes(100))
    refused(f"{name} holds no tokens; they come from", tmp_path / name, length=8)
    (tmp_path / "x.py").write_bytes(bytes(100))
    assert len(load("x.py", length=8).train) == 9


@pytest.mark.parametrize(
    ("x", "why"),
    [
        ([[True, None if i == 7 else False] for i in range(20)], "column 'x' misses a number in row 7"),
        ([None if i == 7 else [1, 2] for i in range(20)], "column 'x' is missing in row 7"),
        ([[[1], None if i == 7 else [1]] for i in range(20)], "column 'x' misses a list in row 7"),
        ([[1] * (3 if i == 7 else 2) for i in range(20)], r"different lengths .*, 3 where others have 2, in row 7"),
        ([[[1], [1] * (2 if i == 7 else 1)] for i in range(20)], r", 2 where others have 1, in row 7"),
    ],
)
def test_lists_with_holes_and_of_other_lengths_are_named(x, why, tmp_path):
    refused(why, table(tmp_path / "x.parquet", x=x, label=[0, 1] * 10))


def test_lists_of_different_lengths_in_memory_are_named():
    x = [[1] * (3 if i == 7 else 2) for i in range(20)]
    refused("train column 'x' has rows of different lengths, the first is row 7; pad", {"x": x})


def test_what_is_wrong_with_an_array_names_its_file(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros(20), name=np.array(["a"] * 20))
    refused(r"x\.npz: train column 'name' holds <U1", tmp_path / "x.npz")
    np.save(tmp_path / "x.npy", np.zeros((0, 3)))
    refused(r"x\.npy: train is empty", tmp_path / "x.npy")
