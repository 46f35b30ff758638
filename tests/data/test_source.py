import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bayesify.data import load_data
from bayesify.errors import ConfigError, DataError

TEXTS = ["a first text", "another, longer text", "the third of them", "and the last one"]


def write_images(root: Path, classes: dict[str, int], seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def table(labels, texts=TEXTS) -> pd.DataFrame:
    return pd.DataFrame({"id": range(len(labels)), "text": texts[: len(labels)], "label": labels})


def test_importing_the_package_stays_light():
    import subprocess

    code = "import bayesify.data, sys; print(*{'timm', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


def test_image_folder_with_splits_has_one_encoding(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "dog": 2})
    write_images(tmp_path / "val", {"dog": 2, "cat": 1})
    write_images(tmp_path / "test", {"dog": 1})
    splits = load_data(tmp_path)
    assert (splits.kind, splits.input_column, splits.label_names) == ("image", "image", ["cat", "dog"])
    assert Counter(splits.get("train")["label"]) == {0: 3, 1: 2}
    assert Counter(splits.get("val")["label"]) == {0: 1, 1: 2}
    assert splits.get("test")["label"][:] == [1]
    expected = np.asarray(Image.open(tmp_path / "test" / "dog" / "0.png"))
    assert np.array_equal(np.asarray(splits.get("test")[0]["image"]), expected)


def test_image_folder_without_splits_may_have_a_class_called_test(tmp_path):
    write_images(tmp_path, {"test": 2, "control": 2})
    splits = load_data(tmp_path)
    assert splits.label_names == ["control", "test"]
    assert splits.test is None
    assert Counter(splits.get("train")["label"]) == {0: 2, 1: 2}


@pytest.mark.parametrize("root", ["", "train/"])
def test_a_folder_inside_that_of_a_class_is_no_class(tmp_path, root):
    for name in ("cat/1.png", "dog/2.png", "dog/more/3.png"):
        file = tmp_path / f"{root}{name}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    with pytest.raises(DataError, match=r"dog/more/3.png lies deeper than other images"):
        load_data(tmp_path)


def test_unlabeled_images(tmp_path):
    for i in range(3):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    splits = load_data(tmp_path)
    assert splits.label_column is None
    assert splits.label_names == []
    assert len(splits.get("train")) == 3


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl", "json"])
def test_tables_round_trip(tmp_path, kind):
    frames = {"train": table(["no", "yes", "no", "yes"]), "validation": table(["yes", "maybe"])}
    for name, frame in frames.items():
        file = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            frame.to_parquet(file)
        elif kind in ("csv", "tsv"):
            frame.to_csv(file, index=False, sep="\t" if kind == "tsv" else ",")
        else:
            frame.to_json(file, orient="records", lines=kind == "jsonl")
    splits = load_data(tmp_path)
    assert (splits.kind, splits.input_column, splits.label_column) == ("text", "text", "label")
    assert splits.label_names == ["maybe", "no", "yes"]
    assert splits.get("train")["label"][:] == [1, 2, 1, 2]
    assert splits.get("validation")["label"][:] == [2, 0]
    assert splits.get("train")["text"][:] == TEXTS


def test_integer_labels_are_encoded_over_all_splits(tmp_path):
    table([10, 2, 10, 2]).to_csv(tmp_path / "train.csv")
    table([30, 2]).to_csv(tmp_path / "test.csv")
    splits = load_data(tmp_path)
    assert splits.label_names == ["2", "10", "30"]
    assert splits.get("test")["label"][:] == [2, 0]


def test_class_labels_of_another_order_are_translated(tmp_path):
    for name, names, labels in (("train", ["a", "b"], [0, 1]), ("test", ["b", "a", "c"], [0, 1, 2])):
        features = datasets.Features({"text": datasets.Value("string"), "intent": datasets.ClassLabel(names=names)})
        data = datasets.Dataset.from_dict({"text": TEXTS[: len(labels)], "intent": labels}, features=features)
        data.to_parquet(tmp_path / f"{name}.parquet")
    splits = load_data(tmp_path)
    assert splits.label_column == "intent"
    assert splits.label_names == ["a", "b", "c"]
    assert splits.get("test")["intent"][:] == [1, 0, 2]


def test_file_names_give_splits(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev", "test", "oos_test"):
        table([0, 1]).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "notes.json").write_text('{"not": "data"}')
    splits = load_data(tmp_path)
    assert {name: len(data) for name, data in splits.named.items()} == {
        "train": 4,
        "validation": 2,
        "test": 2,
        "oos_test": 2,
    }


def test_file_names_that_contain_a_split(tmp_path):
    for name in ("birds_train", "birds-val", "birds.test"):
        table([0, 1]).to_csv(tmp_path / f"{name}.csv")
    assert set(load_data(tmp_path).named) == {"train", "validation", "test"}
    assert set(load_data(tmp_path / "birds.test.csv").named) == {"test"}
    assert set(load_data(f"{tmp_path}/*train.csv").named) == {"train"}


def test_a_single_file_is_train(tmp_path):
    table([0, 1]).to_csv(tmp_path / "birds.csv")
    assert set(load_data(tmp_path / "birds.csv").named) == {"train"}


def test_saved_to_disk(tmp_path):
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": ["x", "y", "x", "y"]})
    datasets.DatasetDict({"train": data, "valid": data.select([0])}).save_to_disk(tmp_path / "both")
    splits = load_data(tmp_path / "both")
    assert splits.get("train")["label"][:] == [0, 1, 0, 1]
    assert splits.get("validation")["label"][:] == [0]
    data.save_to_disk(tmp_path / "one")
    assert load_data(tmp_path / "one").get("train")["text"][:] == TEXTS


def test_images_stored_without_their_schema(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    cell = {"bytes": (tmp_path / "red.png").read_bytes(), "path": "red.png"}
    (tmp_path / "red.png").unlink()
    pd.DataFrame({"picture": [cell, cell], "class": ["r", "s"]}).to_parquet(tmp_path / "train.parquet")
    splits = load_data(tmp_path)
    assert (splits.kind, splits.input_column, splits.label_column) == ("image", "picture", "class")
    assert splits.get("train")[0]["picture"].getpixel((0, 0)) == (255, 0, 0)


def test_the_longest_text_is_the_input_and_pairs_are_known(tmp_path):
    frame = pd.DataFrame({"key": ["k1", "k2"], "body": TEXTS[:2], "target": ["long label name " * 9, "b"]})
    frame.to_csv(tmp_path / "one.csv")
    assert load_data(tmp_path / "one.csv").input_column == "body"
    assert load_data(tmp_path / "one.csv", text_column="key").input_column == "key"
    frame = pd.DataFrame({"hypothesis": ["h", "i"], "premise": TEXTS[:2], "label": [0, 1]})
    frame.to_csv(tmp_path / "two.csv")
    splits = load_data(tmp_path / "two.csv")
    assert (splits.input_column, splits.text_pair_column) == ("premise", "hypothesis")


def test_missing_labels_mean_no_labels(tmp_path):
    table(["a", "b"]).to_csv(tmp_path / "train.csv")
    table(["a", "b"]).drop(columns="label").to_csv(tmp_path / "test.csv")
    splits = load_data(tmp_path)
    assert splits.label_names == ["a", "b"]
    assert "label" not in splits.get("test").column_names
    table([0, 1]).to_parquet(tmp_path / "train.parquet")
    table([-1, -1]).to_parquet(tmp_path / "test.parquet")
    splits = load_data(tmp_path)
    assert splits.label_names == ["0", "1"]
    assert "label" not in splits.get("test").column_names


def test_a_part_of_a_split_keeps_the_encoding(tmp_path):
    table(["b", "c", "a", "b"]).to_csv(tmp_path / "train.csv")
    table(["d", "c", "a", "b"]).to_csv(tmp_path / "test.csv")
    splits = load_data(tmp_path, split="test[1:3]")
    assert set(splits.named) == {"test"}
    assert splits.label_names == ["a", "b", "c", "d"]
    assert splits.get("test")["label"][:] == [2, 0]
    with pytest.raises(DataError, match=r"no split 'dev'; its splits: train, test"):
        load_data(tmp_path, split="dev")
    with pytest.raises(DataError, match="not understood"):
        load_data(tmp_path, split="test[some]")


def test_hold_out_is_stratified_and_repeatable(tmp_path):
    labels = ["a"] * 40 + ["b"] * 20 + ["lonely"]
    pd.DataFrame({"text": [f"text {i}" for i in range(61)], "label": labels}).to_csv(tmp_path / "train.csv")
    splits = load_data(tmp_path)
    held = splits.split_validation(0.2, seed=3)
    assert Counter(held.get("validation")["label"]) == {0: 8, 1: 4}
    both = held.get("train")["text"][:] + held.get("validation")["text"][:]
    assert sorted(both) == sorted(splits.get("train")["text"])
    assert held.get("validation")["text"][:] == splits.split_validation(0.2, seed=3).get("validation")["text"][:]
    assert held.get("validation")["text"][:] != splits.split_validation(0.2, seed=4).get("validation")["text"][:]
    assert held.split_validation(0.5) is held
    with pytest.raises(ConfigError, match="between 0 and 1"):
        splits.split_validation(1.5)
    with pytest.raises(DataError, match="cannot hold out"):
        splits.split_validation(0.001)


def test_errors_say_what_exists(tmp_path):
    table([0, 1]).to_csv(tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"text_column='txt'.*columns: .*id, label, text.*Did you mean 'text'"):
        load_data(tmp_path, text_column="txt")
    with pytest.raises(DataError, match="does not hold images"):
        load_data(tmp_path, image_column="text")
    with pytest.raises(DataError, match="both input and label"):
        load_data(tmp_path, text_column="text", label_column="text")
    with pytest.raises(ConfigError, match="not both"):
        load_data(tmp_path, text_column="text", image_column="id")
    for option in ("subset", "revision"):
        with pytest.raises(ConfigError, match=f"{option}='mrpc' is for data sets on the Hub"):
            load_data(tmp_path, **{option: "mrpc"})
    with pytest.raises(DataError, match="no split 'test'; its splits: train"):
        load_data(tmp_path).get("test")
    with pytest.raises(DataError, match="no such file or folder"):
        load_data(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data: expected images"):
        load_data(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="not a table"):
        load_data(tmp_path / "notes.txt")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="could not be read from disk"):
        load_data(tmp_path / "broken.parquet")
    table([0.5, 1.5]).to_csv(tmp_path / "real.csv")
    with pytest.raises(DataError, match=r"holds float values such as 0\.5"):
        load_data(tmp_path / "real.csv")
    table([0, 1])[["id", "label"]].to_csv(tmp_path / "numbers.csv")
    with pytest.raises(DataError, match=r"no column holds images or texts; columns: .*id \(int64\)"):
        load_data(tmp_path / "numbers.csv")


def test_an_unreachable_hub_data_set_is_named(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'someone/something' could not be loaded from the Hugging Face Hub"):
        load_data("someone/something")


def test_clinc150(shared_data):
    splits = load_data(shared_data / "clinc150")
    sizes = {name: len(data) for name, data in splits.named.items()}
    assert [sizes[name] for name in ("train", "validation", "test", "oos_test")] == [15000, 3000, 4500, 1000]
    assert (splits.kind, splits.input_column, splits.label_column) == ("text", "text", "label")
    assert splits.label_names[150] == "oos"
    assert set(splits.get("oos_test")["label"]) == {150}


def test_flowers(shared_data):
    splits = load_data(shared_data / "flowers").split_validation(0.1, seed=0)
    assert splits.label_names == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    assert Counter(splits.get("validation")["label"]) == dict.fromkeys(range(5), 10)
    assert len(splits.get("train")) == 450
