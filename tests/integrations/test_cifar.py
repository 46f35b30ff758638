import json
import math
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_model
from scripts import INTEGRATIONS, check_interrupted_run, load_script, read_log, run_script

from bayesify import bayesify, evaluate, from_pretrained
from bayesify.data import make_loader, prepare
from bayesify.errors import ConfigError, DataError
from bayesify.evaluation import CorruptionReport, evaluate_corruptions
from bayesify.recipes import RECIPES

FOLDER = INTEGRATIONS / "cifar"
sys.path.insert(0, str(FOLDER))

import data as cifar  # noqa: E402
from experiment import configure, some  # noqa: E402
from wide_resnet import WideResNet  # noqa: E402

CLASSES = ["cat", "dog", "frog"]


def write_split(path, count, seed, **labels):
    """32×32 noise whose mean brightness tells the class."""
    rng = np.random.default_rng(seed)
    codes = [row % 3 for row in range(count)]
    pixels = [rng.integers(0, 86, (32, 32, 3)) + 84 * code for code in codes]
    columns = {"img": [Image.fromarray(array.astype(np.uint8)) for array in pixels]}
    columns |= dict.fromkeys(labels, codes) if labels else {"label": codes}
    names = {name: ClassLabel(names=list(values)) for name, values in (labels or {"label": CLASSES}).items()}
    Dataset.from_dict(columns, features=Features({"img": ImageFeature(), **names})).to_parquet(path)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    write_split(folder / "train.parquet", 40, 0)
    write_split(folder / "test.parquet", 12, 1)
    return folder


@pytest.fixture
def small_run(small_data):
    """Call run.py's main on the small data."""
    options = {"data": str(small_data), "depth": 10, "width": 1, "steps": 4, "batch_size": 8, "validation": 0.2}
    script = load_script(FOLDER)
    return lambda output, **more: script.main(output=output, **{**options, "corrupted_images": 0, **more})


def test_published_network_and_recipe_have_the_published_size():
    network = WideResNet(28, 10)
    assert sum(p.numel() for p in network.parameters()) == 36_479_194
    bnn = bayesify(network, RECIPES["cifar10-gaussian"].rank1)
    assert sum(p.numel() for p in bnn.parameters()) == 36_635_882
    with torch.no_grad():
        # Half of the factors start at −1, two units from a prior of scale 0.1: 200 nats each.
        assert bnn.kl().item() / 50_000 == pytest.approx(158, rel=0.01)


def test_network_computes_what_its_definition_says():
    network = WideResNet(10, 2, num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    x = network.conv(images)
    assert [tuple(stage(torch.zeros(1, c, s, s)).shape) for stage, c, s in
            zip(network.stages, (16, 32, 64), (32, 32, 16), strict=True)] == [
        (1, 32, 32, 32), (1, 64, 16, 16), (1, 128, 8, 8)
    ]  # fmt: skip
    for (block,) in network.stages:
        y = torch.relu(block.norm1(x))
        branch = block.conv2(torch.relu(block.norm2(block.conv1(y))))
        x = branch + block.shortcut(y)
    expected = network.head(torch.relu(network.norm(x)).mean(dim=(2, 3)))
    torch.testing.assert_close(network(images), expected)
    with pytest.raises(ValueError, match="6 n \\+ 4"):
        WideResNet(12)


# ------------------------------------------------------------------------------------------------ data


def test_augmentation_pads_crops_and_flips_each_image_by_itself():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images = cifar.Images(pixels, torch.arange(60), training=True, seed=5)
    images.set_epoch(2)
    rows = torch.randperm(60, generator=generator).tolist()
    batch, labels = images.__getitems__(rows)
    assert labels.tolist() == rows
    mean, std = np.float32(cifar.MEAN)[:, None, None], np.float32(cifar.STD)[:, None, None]
    for row, result in zip(rows, batch, strict=True):
        plain = (pixels[row].numpy().astype(np.float32) / np.float32(255) - mean) / std
        padded = np.pad(plain, ((0, 0), (4, 4), (4, 4)))
        top, left = images.shifts[row].tolist()
        expected = padded[:, top : top + 32, left : left + 32]
        if images.flips[row]:
            expected = expected[:, :, ::-1]
        np.testing.assert_array_equal(result.numpy(), expected)
    assert set(images.shifts.flatten().tolist()) == set(range(9))
    assert 10 < images.flips.sum() < 50


def test_augmentation_depends_on_seed_epoch_and_row_only():
    pixels = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)

    def augmented(rows, seed=0, epoch=0):
        images = cifar.Images(pixels, torch.zeros(30), training=True, seed=seed)
        torch.manual_seed(len(rows))
        images.set_epoch(epoch)
        return images.__getitems__(rows)[0]

    whole = augmented(range(30))
    torch.testing.assert_close(augmented([7, 3]), whole[[7, 3]], rtol=0, atol=0)
    torch.testing.assert_close(augmented([3])[0], whole[3], rtol=0, atol=0)
    for other in (augmented(range(30), seed=1), augmented(range(30), epoch=1)):
        assert sum(torch.equal(a, b) for a, b in zip(whole, other, strict=True)) < 5


def test_both_routes_to_the_network_give_the_same_clean_numbers(small_data):
    splits = cifar.load_splits(str(small_data))
    images = cifar.Images.read(splits.get("test"), "img", "label")
    prepared = prepare(splits, "test", cifar.PREPROCESSING)
    for row in range(12):
        assert torch.equal(images[row][0], prepared[row][0])
    rank1 = configure(RECIPES["cifar10-gaussian"], {"members": 2}).rank1
    bnn = bayesify(WideResNet(10, 1, 3), rank1)
    batches = [images.__getitems__(range(start, start + 6)) for start in (0, 6)]
    options = {"samples": 1, "seed": 3, "progress": False}
    ours = evaluate(bnn, batches, **options).metrics["bayesian"]
    theirs = evaluate(bnn, make_loader(prepared, 6), **options).metrics["bayesian"]
    assert ours == theirs
    report = evaluate_corruptions(bnn, prepared, corruptions=["fog"], severities=[1], batch_size=6, **options)
    assert {name: ours[name] for name in report.summary["bayesian"]["clean"]} == report.summary["bayesian"]["clean"]


def test_fine_labels_are_taken_where_there_are_coarse_ones_too(tmp_path, small_data):
    coarse = {"fine_label": CLASSES, "coarse_label": ["x", "y", "z"]}
    for split in ("train", "test"):
        write_split(tmp_path / f"{split}.parquet", 6, 0, **coarse)
    assert cifar.load_splits(str(tmp_path)).label_names == CLASSES
    assert cifar.load_splits(str(tmp_path), "coarse_label").label_names == ["x", "y", "z"]
    with pytest.raises(DataError, match="fine"):
        cifar.load_splits(str(small_data), "fine")


# ------------------------------------------------------------------------------------------------ options


def test_options_replace_those_of_the_recipe():
    base = RECIPES["cifar10-gaussian"]
    given = {"members": 2, "epochs": None, "seed": 7, "output": "x", "batch_size": 32}
    chosen = configure(base, given, ["init=normal", "init_scale=0.5", 'weight_decay_on=["kernels"]', "accumulation=2"])
    assert (chosen.rank1.members, chosen.rank1.init, chosen.rank1.init_scale) == (2, "normal", 0.5)
    assert chosen.rank1.prior_scale == base.rank1.prior_scale
    assert (chosen.tuning.epochs, chosen.tuning.seed, chosen.tuning.weight_decay_on) == (250, 7, ("kernels",))
    assert chosen.tuning.learning_rate == pytest.approx(0.1 * 64 / 128)
    assert configure(base, {"batch_size": 32, "learning_rate": 0.3}).tuning.learning_rate == 0.3
    assert configure(base, {}) == base
    for wrong in ("init", "colour=3", "members=none"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            configure(base, {}, [wrong])


def test_some_rows_are_spread_over_all():
    data = Dataset.from_dict({"row": list(range(10))})
    assert list(some(data, 4)["row"]) == [0, 2, 5, 7]
    assert len(some(data, None)) == len(some(data, 11)) == 10


# ------------------------------------------------------------------------------------------------ runs


def test_script_trains_evaluates_and_saves(small_data, tmp_path):
    output, cache = tmp_path / "output", tmp_path / "cache"
    arguments = ["--data", small_data, "--output", output, "--depth", "10", "--width", "1", "--steps", "2"]
    arguments += ["--batch-size", "8", "--validation", "0.2", "--corruption", "fog", "--corruption", "contrast"]
    arguments += ["--severity", "1", "--corruption-cache", cache]
    printed = run_script(FOLDER, *arguments)
    assert "2 steps of 8 images, learning rate 0.00625" in printed
    rows = read_log(output)
    assert rows[-1]["step"] == 2
    assert all(math.isfinite(row["validation_nll"]) for row in rows[1:])
    report = json.loads((output / "report.json").read_text())
    corrupted = CorruptionReport.load(output)
    assert [(r["corruption"], r["severity"]) for r in corrupted.sets] == [("clean", 0), ("fog", 1), ("contrast", 1)]
    assert len(list(cache.iterdir())) == 2

    bnn = from_pretrained(output, base_model=WideResNet(10, 1, 3))
    assert bnn.label_names == CLASSES
    assert bnn.preprocessing == cifar.PREPROCESSING
    test = prepare(cifar.load_splits(str(small_data)), "test", bnn.preprocessing)
    again = evaluate(bnn, make_loader(test, 8), samples=1, progress=False).metrics["bayesian"]
    assert again == pytest.approx(report["metrics"]["bayesian"])
    clean = corrupted.summary["bayesian"]["clean"]
    assert clean == pytest.approx({name: again[name] for name in clean})
    assert all(math.isfinite(value) for row in corrupted.sets for value in list(row.values())[3:])


def test_interrupted_run_goes_on_with_the_numbers_of_an_unbroken_one(small_run, tmp_path, monkeypatch):
    check_interrupted_run(small_run, tmp_path, monkeypatch)


def test_deterministic_network_learns_and_is_saved(small_run, tmp_path, small_data):
    output = tmp_path / "plain"
    small_run(output, deterministic=True, steps=30, learning_rate=0.05, validation=0.0)
    metrics = json.loads((output / "report.json").read_text())["metrics"]["deterministic"]
    assert metrics["accuracy"] > 0.9  # brightness tells the classes apart
    network = WideResNet(10, 1, 3)
    load_model(network, str(output / "model.safetensors"))
    test = prepare(cifar.load_splits(str(small_data)), "test", cifar.PREPROCESSING)
    again = evaluate(network, make_loader(test, 8), name="deterministic", progress=False).metrics["deterministic"]
    assert again == pytest.approx(metrics)
    with pytest.raises(ConfigError, match="--deterministic"):
        small_run(tmp_path / "other", deterministic=True, members=2)


def test_wrong_corruption_is_found_before_the_training(small_run, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean fog"):
        small_run(tmp_path / "other", corrupted_images=2, corruption=["fogg"])
    assert not (tmp_path / "other").exists()


def test_point_factors_are_batch_ensemble(small_run, tmp_path):
    small_run(tmp_path, posterior="deterministic", steps=2, option=["init=normal", "init_scale=0.5", "log_every=1"])
    rows = read_log(tmp_path)
    assert [row["kl"] for row in rows if "kl" in row] == [0.0, 0.0]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["samples"] == "posterior mean"
