"""From a name to training data: files, folders, arrays, tokens; what cannot be read is named in one line."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from scaletrain import Data, InputError, load
from scaletrain.content import fingerprint
from scaletrain.data import Part
from scaletrain.permutation import seed_for
from scaletrain.sources import files, split
from scaletrain.sources.split import hold_out
from scaletrain.sources.table import Table, as_table, check_readable

N = 60


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def species(i):
    return ("cat", "dog", "owl")[i * i % 3 if i % 2 else i % 3]


def rows():
    return [{"height": i / 2, "width": i, "species": species(i)} for i in range(N)]


def write(path, content=None):
    """Write the rows in the format that the file's name says; returns the path as text."""
    table = datasets.Dataset.from_list(content or rows())
    if path.suffix in (".csv", ".tsv"):
        table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix in (".json", ".jsonl"):
        path.write_text("\n".join(json.dumps(row) for row in content or rows()))
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        import pyarrow as pa

        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.data.table.schema) as writer:
            writer.write_table(table.data.table)
    return str(path)


CHOSEN = {"features": ["height", "width"], "label": "species"}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet", "arrow"])
def test_a_table_gives_the_same_columns_from_every_kind_of_file(suffix, tmp_path):
    data = load(write(tmp_path / f"animals.{suffix}"), columns=CHOSEN)
    assert data.classes == ["cat", "dog", "owl"]
    assert data.train["features"].dtype == torch.float32
    together = torch.cat([data.train["features"], data.val["features"]])
    labels = torch.cat([data.train["label"], data.val["label"]])
    for (height, width), label in zip(together.tolist(), labels.tolist(), strict=True):
        assert (height, data.classes[label]) == (width / 2, species(int(width)))
    assert sorted(together[:, 1].tolist()) == list(range(N))
    assert len(data.val["label"]) == round(
        sum(round(0.2 * sum(species(i) == s for i in range(N))) for s in data.classes)
    )


def test_columns_are_found_by_type_and_name(tmp_path):
    content = [{"a": i / 2, "b": i, "label": species(i), "curve": [i, i + 1]} for i in range(N)]
    data = load(write(tmp_path / "animals.parquet", content))
    assert {name: tuple(column.shape[1:]) for name, column in data.train.items()} == {
        "curve": (2,), "features": (2,), "label": (),
    }  # fmt: skip


def test_labels_that_are_numbers_count_from_0_and_keep_their_names(tmp_path):
    content = [{"x": i / 7, "target": 1 + 2 * (i % 2)} for i in range(N)]
    data = load(write(tmp_path / "odd.csv", content))
    assert data.classes == ["1", "3"]
    assert set(data.train["label"].tolist()) == {0, 1}


def test_text_stays_text_and_is_read_row_by_row_or_many_at_once(tmp_path):
    content = [{"text": f"row {i}", "label": species(i)} for i in range(N)]
    data = load(write(tmp_path / "texts.csv", content))
    found = {data.train[i]["text"]: int(data.train[i]["label"]) for i in range(len(data.train))}
    assert all(data.classes[label] == species(int(text.split()[1])) for text, label in found.items())


def folder_of_images(folder, splits=("",), size=(9, 7)):
    for name in splits:
        for cls in ("cat", "dog"):
            (folder / name / cls).mkdir(parents=True)
            for i in range(10):
                value = 100 + i if cls == "cat" else 200 + i
                Image.new("RGB", size, (value, 0, 255)).save(folder / name / cls / f"{i}.png")
    return str(folder)


def test_a_folder_of_images_gives_images_and_the_names_of_their_folders(tmp_path):
    data = load(folder_of_images(tmp_path / "pets"), image_size=8)
    assert data.classes == ["cat", "dog"]
    assert data.train["image"].shape == (16, 3, 8, 8)
    for image, label in zip(data.train["image"], data.train["label"], strict=True):
        assert image[2].unique() == 1
        assert image[1].unique() == 0
        assert (image[0, 0, 0] * 255 > 150) == label


def test_the_splits_of_a_hub_layout_are_kept(tmp_path):
    data = load(folder_of_images(tmp_path / "pets", ("train", "validation", "test")))
    assert [len(part["label"]) for part in (data.train, data.val, data.test)] == [20, 20, 20]
    assert data.train["image"].shape[1:] == (3, 7, 9)
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        write(folder / f"{name}-00000-of-00001.parquet")
    data = load(str(tmp_path / "hub"), columns=CHOSEN)
    assert len(data.test["label"]) == N
    assert len(data.train["label"]) + len(data.val["label"]) == N


def test_a_saved_dataset_is_read(tmp_path):
    datasets.Dataset.from_list(rows()).save_to_disk(tmp_path / "saved")
    assert load(str(tmp_path / "saved"), columns=CHOSEN).classes == ["cat", "dog", "owl"]


def test_arrays_come_from_npy_npz_and_memory_without_a_copy(tmp_path, monkeypatch):
    x = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
    y = np.arange(N) % 3
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "xy.npz", x=x, label=y)
    assert np.array_equal(load(tmp_path / "x.npy", split_seed=None).train["features"].numpy(), x)
    assert np.array_equal(load(tmp_path / "xy.npz", split_seed=None).train["x"].numpy(), x)
    monkeypatch.setattr(split, "COPIED_BYTES", 0)
    data = load({"x": x, "label": y})
    assert isinstance(data.train, Part)
    assert data.train.whole["x"].data_ptr() == x.ctypes.data
    assert {int(data.train[i]["label"]) for i in range(len(data.train))} == {0, 1, 2}
    assert len(data.train) + len(data.val) == N


def test_tokens_are_windows_that_overlap_by_one_and_the_end_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_bytes(bytes(range(200)) + bytes(55))
    (np.arange(255) % 50_000).astype(np.uint16).tofile(tmp_path / "tokens.bin")
    np.save(tmp_path / "tokens.npy", np.arange(255))
    for name in ("book.txt", "tokens.bin", "tokens.npy"):
        data = load(tmp_path / name, length=10)
        assert (len(data.train), len(data.val)) == (20, 5)
        windows = data.train.__getitems__(list(range(20)))["tokens"]
        assert windows.dtype == torch.int64
        if name != "book.txt":
            assert torch.equal(windows, torch.arange(201)[:, None].unfold(0, 11, 10)[:, 0])
            assert data.val[0]["tokens"].tolist() == list(range(204, 215))


def test_pythons_own_source_is_there_without_a_network():
    passages = load("stdlib")
    assert len(passages.classes) > 10
    assert len(passages.train) > 5 * len(passages.val) / 2 > 5000
    tokens = load("stdlib", length=64)
    assert len(tokens.train) > 100_000
    assert tokens.train[0]["tokens"].shape == (65,)


def test_a_table_too_large_to_copy_stays_on_the_disk_and_gives_the_same(tmp_path, monkeypatch):
    path = write(tmp_path / "animals.parquet")
    small = load(path, columns=CHOSEN)
    monkeypatch.setattr("scaletrain.sources.columns.COPIED_BYTES", 0)
    large = load(path, columns=CHOSEN)
    assert isinstance(large.train, Part)
    assert isinstance(large.train.whole, Table)
    for i in range(len(large.train)):
        assert large.train[i]["label"] == small.train["label"][i]
        assert torch.equal(large.train[i]["features"], small.train["features"][i])


def test_above_two_million_nothing_is_stored_for_the_split(monkeypatch):
    monkeypatch.setattr(split, "RANKED", 50)
    monkeypatch.setattr(split, "COPIED_BYTES", 0)
    data = load({"x": np.arange(N)})
    train, val = ({int(part[i]["x"]) for i in range(len(part))} for part in (data.train, data.val))
    assert len(val) == round(0.2 * N)
    assert train | val == set(range(N))
    assert not train & val


def test_the_split_is_the_hash_of_seed_and_index_ranked_within_the_class():
    label = np.arange(300) % 3
    chosen = hold_out(label, 0.2, seed=5)
    for cls in range(3):
        members = sorted(np.flatnonzero(label == cls), key=lambda i: seed_for(5, int(i)))
        assert set(members[:20]) == set(np.flatnonzero(chosen & (label == cls)))


def test_a_dataset_of_numbers_is_read_as_a_table_and_one_with_a_transform_is_left_alone():
    numbers = datasets.Dataset.from_dict({"x": [[1.0, 2.0], [3.0, 4.0]], "y": [0, 1]})
    batch = as_table(numbers, "train").__getitems__([1, 0])
    assert batch["x"].tolist() == [[3.0, 4.0], [1.0, 2.0]]
    assert batch["y"].tolist() == [1, 0]
    transformed = numbers.with_transform(lambda batch: batch)
    assert as_table(transformed, "train") is transformed


def test_data_is_told_apart_by_a_sample_of_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr("scaletrain.sources.columns.COPIED_BYTES", 0)
    other = [row | {"height": row["height"] + (i == 0)} for i, row in enumerate(rows())]
    prints = {
        name: fingerprint(load(write(tmp_path / f"{name}.parquet", content), columns=CHOSEN))
        for name, content in {"one": rows(), "same": rows(), "other": other}.items()
    }
    assert prints["one"] != prints["other"]
    moved = fingerprint(load(write(tmp_path / "one.parquet"), columns=CHOSEN))
    assert prints["one"] == moved


# what cannot be read


def refused(match, *args, **kwargs):
    with pytest.raises(InputError, match=match) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_kind_are_named(tmp_path):
    refused("nowhere.csv: no such file", "nowhere.csv")
    (tmp_path / "x.xlsx").write_text("x")
    refused("'.xlsx' is not a known kind of file", str(tmp_path / "x.xlsx"))
    (tmp_path / "empty.csv").touch()
    refused("empty.csv is empty", str(tmp_path / "empty.csv"))
    (tmp_path / "folder").mkdir()
    refused("folder is an empty folder", str(tmp_path / "folder"))


def test_without_a_network_a_hub_id_is_refused_within_seconds(monkeypatch):
    import time

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    refused("neither built in .* nor a file here, and the Hub cannot be reached; go online, or", "someone/thing")
    assert time.monotonic() - began < 10


def test_the_hub_is_asked_where_it_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "_hub_is_reachable", lambda: True)
    asked = []

    def answer(name):
        asked.append(name)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(rows())})

    monkeypatch.setattr(files, "_load", answer)
    assert load("someone/animals", columns=CHOSEN).classes == ["cat", "dog", "owl"]
    assert asked == ["someone/animals"]


@pytest.mark.parametrize(
    ("change", "columns", "why"),
    [
        (lambda i: {"height": None if i == 17 else 1.0}, CHOSEN, "column 'height' is missing in row 17"),
        (
            lambda i: {"height": float("nan") if i == 17 else 1.0},
            CHOSEN,
            "column 'height' is NaN or infinite in row 17",
        ),
        (lambda i: {"species": None if i == 3 else species(i)}, CHOSEN, "column 'species' has no label in row 3"),
        (lambda i: {"species": "cat"}, CHOSEN, "column 'species' has 1 different values"),
        (lambda i: {"label": i / 3}, None, "column 'label' is 0.33.* in row 1 .*whole numbers or names"),
        (lambda i: {}, {"features": ["heigth"], "label": "species"}, "no column 'heigth'; .*did you mean 'height'"),
        (lambda i: {}, {"features": ["species"]}, "column 'species' holds .*; features needs numbers"),
        (lambda i: {"curve": [1.0] * (2 if i != 5 else 3)}, {"x": "curve"}, "'curve' has rows of different lengths"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_column_and_row(change, columns, why, tmp_path):
    path = write(tmp_path / "animals.parquet", [row | change(i) for i, row in enumerate(rows())])
    refused(f"animals.parquet.*{why}", path, columns=columns)


def test_a_label_that_training_does_not_know_is_named(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.parquet")
    write(folder / "test.parquet", [row | {"species": "eel"} if i == 4 else row for i, row in enumerate(rows())])
    refused("test: column 'species' is 'eel', which no training example has in row 4", str(folder), columns=CHOSEN)


def test_images_that_are_broken_of_other_sizes_or_of_one_class_are_named(tmp_path):
    refused(
        "the images have different sizes, 9 x 7 in row 0 and 4 x 4 in row 3; give image_size",
        _mixed(tmp_path / "mixed"),
    )
    folder = folder_of_images(tmp_path / "pets")
    (tmp_path / "pets/dog/4.png").write_bytes(b"no image")
    named = r"image .*dog/4\.png \(row 14\): cannot identify image file"
    with pytest.raises(InputError, match=named):
        check_readable(load(folder, image_size=8, split_seed=None).train)
    lazy = load(folder, image_size=8, split_seed=None).train
    assert lazy.__getitems__([13, 15])["image"].shape == (2, 3, 8, 8)
    with pytest.raises(InputError, match=named):
        lazy.__getitems__([13, 14])
    shutil.copytree(folder, tmp_path / "all/train")
    shutil.copytree(folder, tmp_path / "all/val")
    refused(named.replace("dog", "val/dog"), str(tmp_path / "all"), image_size=8)
    for i in range(10):
        (tmp_path / f"pets/cat/{i}.png").unlink()
    (tmp_path / "pets/cat").rmdir()
    (tmp_path / "pets/dog/4.png").unlink()
    refused("pets has one class", folder)


def _mixed(folder):
    folder_of_images(folder)
    Image.new("RGB", (4, 4)).save(folder / "cat/3.png")
    return str(folder)


def test_a_file_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "animals.parquet"
    write(path)
    path.write_bytes(path.read_bytes()[:-20])
    refused("cannot read .*animals.parquet: ", str(path))
    np.save(tmp_path / "x.npy", np.zeros((9, 9)))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-20])
    refused("cannot read .*x.npy: ", tmp_path / "x.npy")
    arrow = tmp_path / "animals.arrow"
    datasets.Dataset.from_list(rows()).save_to_disk(tmp_path / "saved")
    arrow.write_bytes((tmp_path / "saved/data-00000-of-00001.arrow").read_bytes()[:-300])
    refused("cannot read .*animals.arrow: ", str(arrow))
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": ')
    refused("cannot read .*bad.jsonl: ", str(tmp_path / "bad.jsonl"))


def test_arrays_with_nan_objects_or_too_few_rows_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([[1.0], [np.nan]]))
    refused("x.npz: array 'x' row 1 holds NaN", tmp_path / "x.npz")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    refused("cannot read .*o.npy: ", tmp_path / "o.npy")
    refused("2 examples are too few to hold out 20%", {"x": np.arange(2)})


def test_tokens_that_do_not_fill_a_window_are_refused(tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    refused("short.txt: 9 tokens do not fill a window of 64", tmp_path / "short.txt", length=64)
    np.save(tmp_path / "x.npy", np.zeros((3, 3)))
    refused("x.npy holds float64 of shape .*; tokens are one row of integers", tmp_path / "x.npy", length=2)
    refused("nowhere.txt: no such file", "nowhere.txt", length=4)


def test_an_empty_split_is_refused():
    with pytest.raises(InputError, match="val is empty"):
        Data(train={"x": np.arange(3)}, val={"x": np.arange(0)})
