"""Odd files and folders: nothing is lost, nothing is misread, and what cannot be meant is refused in one line."""

import gzip
import json
import os
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from scaletrain import InputError, load


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
