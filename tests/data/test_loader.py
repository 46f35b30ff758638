import random
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from bayesify.data import (
    ImagePreprocessing,
    PreparedDataset,
    TextPreprocessing,
    load_data,
    make_loader,
    prepare,
)
from bayesify.errors import DataError

PREPROCESSING = ImagePreprocessing((3, 16, 16))


def make_data(count: int = 12) -> datasets.Dataset:
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": [i % 3 for i in range(count)]}, features=features)


def make_prepared(seed: int = 5, **options) -> PreparedDataset:
    options = {"num_classes": 3, "training": True, "color_jitter": 0.2, **options}
    return PreparedDataset(make_data(), PREPROCESSING, "image", "label", seed=seed, **options)


def batches(loader) -> list[torch.Tensor]:
    return [
        torch.cat([batch[0].flatten(1).sum(1) for batch in loader]),
        torch.cat([batch[1] for batch in loader]),
    ]


def test_items_depend_on_seed_epoch_and_row_alone():
    one, other = make_prepared(), make_prepared()
    forward = [one[i][0] for i in range(len(one))]
    torch.rand(7)
    random.random()
    backward = [other[i][0] for i in reversed(range(len(other)))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert torch.equal(one[-1][0], one[11][0])
    other.set_epoch(1)
    assert not any(torch.equal(forward[i], other[i][0]) for i in range(len(other)))
    other.set_epoch(0)
    assert torch.equal(forward[3], other[3][0])
    assert not torch.equal(forward[3], make_prepared(seed=6)[3][0])


def test_items_are_the_same_in_another_process():
    prepared = make_prepared()
    prepared.set_epoch(2)
    code = (
        "import sys; sys.path.insert(0, 'tests/data'); import test_loader as t; p = t.make_prepared(); "
        "p.set_epoch(2); print(*[p[i][0].double().sum().item() for i in (7, 1)])"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert [float(value) for value in printed] == [prepared[i][0].double().sum().item() for i in (7, 1)]


def test_workers_do_not_matter():
    prepared = make_prepared()
    for epoch in (0, 1):
        prepared.set_epoch(epoch)
        alone = batches(make_loader(prepared, 4, shuffle=True, seed=9))
        helped = batches(make_loader(prepared, 4, shuffle=True, seed=9, workers=2))
        assert torch.equal(alone[0], helped[0])
        assert torch.equal(alone[1], helped[1])


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    batches(make_loader(make_prepared(), 4, shuffle=True))
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_evaluation_is_deterministic_and_in_order():
    prepared = make_prepared(training=False)
    expected = PREPROCESSING.eval_transform()(prepared.dataset[2]["image"])
    assert torch.equal(prepared[2][0], expected)
    pixels, labels = next(iter(make_loader(prepared, 12)))
    assert labels.tolist() == prepared.labels == [i % 3 for i in range(12)]
    assert torch.equal(pixels[2], expected)


def test_order_follows_the_epoch():
    prepared = make_prepared()
    loader = make_loader(prepared, 12, shuffle=True)
    orders = []
    for epoch in (0, 1, 0):
        prepared.set_epoch(epoch)
        orders.append(list(loader.sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(12))
    assert len(make_loader(prepared, 5)) == 3
    assert len(make_loader(prepared, 5, drop_last=True)) == 2


def test_accelerate_passes_the_epoch_on():
    from accelerate import Accelerator

    prepared = make_prepared()
    prepared.set_epoch(3)
    expected = batches(make_loader(prepared, 4, shuffle=True))
    loader = Accelerator(cpu=True).prepare_data_loader(make_loader(prepared, 4, shuffle=True))
    prepared.set_epoch(0)
    loader.set_epoch(3)
    pixels = torch.cat([batch[0].flatten(1).sum(1) for batch in loader])
    assert torch.equal(pixels.cpu(), expected[0])


def test_without_labels():
    prepared = PreparedDataset(make_data().remove_columns("label"), PREPROCESSING, "image", "label")
    assert prepared.labels is None
    assert prepared[0][1] is None
    batch = next(iter(make_loader(prepared, 5)))
    assert isinstance(batch, tuple)
    assert [part.shape for part in batch] == [(5, 3, 16, 16)]


def test_dict_batches_for_transformers():
    preprocessing = ImagePreprocessing((3, 16, 16), as_dict=True)
    prepared = PreparedDataset(make_data(), preprocessing, "image", "label")
    assert prepared.num_classes == 3
    batch = next(iter(make_loader(prepared, 4)))
    assert batch["labels"].tolist() == [0, 1, 2, 0]
    assert torch.equal(batch["pixel_values"][1], prepared[1][0])


def test_text_batches(minilm, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "train.csv").write_text("text,label\na cat,x\nthe quick brown fox,y\na dog,x\n")
    splits = load_data(tmp_path)
    prepared = prepare(splits, "train", TextPreprocessing(AutoTokenizer.from_pretrained(minilm)), training=True)
    first, second = list(make_loader(prepared, 2, workers=1))
    assert first["input_ids"].shape == (2, 6)
    assert second["input_ids"].shape == (1, 4)
    assert first["labels"].tolist() == [0, 1]
    unlabeled = prepare(splits, "train", prepared.preprocessing, labels=False)
    assert "labels" not in next(iter(make_loader(unlabeled, 2)))
    with pytest.raises(DataError, match="model takes images; the data set holds texts"):
        prepare(splits, "train", PREPROCESSING)


def test_bad_rows_are_named():
    data = make_data()
    with pytest.raises(DataError, match="row 2: label 2 in column 'label' is not one of the 2 classes"):
        PreparedDataset(data, PREPROCESSING, "image", "label", num_classes=2)
    with pytest.raises(DataError, match="there is no column 'picture'; columns: image, label"):
        PreparedDataset(data, PREPROCESSING, "picture")
    cells = data.cast_column("image", datasets.Image(decode=False))["image"][:]
    cells[3] = {"bytes": cells[3]["bytes"][:60], "path": "broken.png"}
    cells[4] = None
    broken = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image())
    prepared = PreparedDataset(broken, PREPROCESSING, "image")
    with pytest.raises(DataError, match=r"row 3 \(broken.png\): column 'image' cannot be read"):
        prepared[3]
    with pytest.raises(DataError, match="row 4: column 'image' cannot be read: the value is missing"):
        prepared[4]


def test_flowers_train_like_evaluation(shared_data):
    splits = load_data(shared_data / "flowers", split="train[:20]")
    training = prepare(splits, "train", PREPROCESSING, training=True)
    evaluation = prepare(splits, "train", PREPROCESSING)
    (augmented, labels), (plain, same) = (next(iter(make_loader(data, 20))) for data in (training, evaluation))
    assert torch.equal(labels, same)
    assert evaluation.num_classes == 5
    close = torch.cdist(augmented.mean((2, 3)), plain.mean((2, 3))).argmin(1) == torch.arange(20)
    assert close.float().mean() > 0.5  # an augmented photograph still has the colors of its own original
