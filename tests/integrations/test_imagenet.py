import json
import math
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scripts import INTEGRATIONS, check_interrupted_run, load_script, read_log, run_script
from torchvision.transforms import functional as F

from bayesify import FineTuner, bayesify, evaluate, from_pretrained
from bayesify.data import make_loader, preprocessing_for
from bayesify.data.seeding import seeded
from bayesify.errors import ConfigError, DataError
from bayesify.evaluation import ALEXNET_ERRORS, CorruptionReport, evaluate_corruptions
from bayesify.hub import load_base, save_timm_folder
from bayesify.recipes import RECIPES

FOLDER = INTEGRATIONS / "imagenet"
sys.path.insert(0, str(FOLDER))

import folders  # noqa: E402

WNIDS = ["n01440764", "n01443537", "n02102040"]


def write_images(root, count, size=(40, 48), seed=0):
    """`count` smooth JPEGs for each class."""
    rng = np.random.default_rng(seed)
    for wnid in WNIDS:
        (root / wnid).mkdir(parents=True)
        for number in range(count):
            noise = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
            noise.resize(size, Image.Resampling.BICUBIC).save(root / wnid / f"ILSVRC_{number}.JPEG")


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    write_images(root / "train", 8)
    write_images(root / "val", 4, size=(60, 40), seed=1)
    for corruption in ("fog", "contrast", "speckle_noise"):
        write_images(root / "imagenet-c" / corruption / "1", 2, size=(32, 32), seed=len(corruption))
    return root


@pytest.fixture
def small_run(small_data):
    """Call run.py's main on the small data."""
    options = {"model": "resnet10t", "image_size": 32, "steps": 4, "batch_size": 8, "validation": 0.2}
    script = load_script(FOLDER)
    return lambda output, **more: script.main(data=small_data, output=output, **{**options, **more})


def test_published_network_and_recipe_have_the_published_size():
    network = timm.create_model("resnet50")
    assert sum(p.numel() for p in network.parameters()) == 25_557_032
    bnn = bayesify(network, RECIPES["imagenet-gaussian"].rank1)
    assert sum(p.numel() for p in bnn.parameters()) == 25_978_144
    with torch.no_grad():
        # A quarter of the factors start at −1, two units from a prior of scale 0.05: 800 nats each.
        assert bnn.kl().item() / 1_281_167 == pytest.approx(32.7, rel=0.01)


# ------------------------------------------------------------------------------------------------ folders


def test_folder_gives_sorted_classes_and_reads_images_when_asked(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / WNIDS[0] / "notes.txt").write_text("no image")
    (tmp_path / WNIDS[2] / "ILSVRC_1.JPEG").write_bytes(b"broken")
    classes = folders.class_names(tmp_path)
    assert classes == WNIDS
    data = folders.read_folder(tmp_path, classes)
    assert data["label"][:] == [0, 0, 1, 1, 2, 2]
    with Image.open(tmp_path / WNIDS[1] / "ILSVRC_0.JPEG") as image:
        assert np.array_equal(np.asarray(data[2]["image"]), np.asarray(image))
    prepared = folders.prepare_folder(data, folders.RandomCrops((3, 32, 32)))
    assert prepared[4][1] == 2
    with pytest.raises(DataError, match="row 5"):
        prepared[5]


def test_folder_errors_name_the_folder(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        folders.class_names(tmp_path / "none")
    with pytest.raises(DataError, match="holds no folders"):
        folders.class_names(tmp_path)
    write_images(tmp_path, 1)
    with pytest.raises(DataError, match=f"{WNIDS[2]}: not one of the 2 classes"):
        folders.read_folder(tmp_path, WNIDS[:2])
    with pytest.raises(DataError, match="is not ImageNet-C"):
        folders.imagenet_c(tmp_path, WNIDS, folders.RandomCrops(), 2)


def test_evaluation_resizes_to_256_and_crops_the_center():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    resized = image.resize((341, 256), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized)[16:240, 58:282].astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    expected = F.normalize(torch.from_numpy(pixels), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(folders.RandomCrops().eval_transform()(image), expected, rtol=0, atol=1e-6)


def test_training_crops_from_8_percent_of_the_area_and_flips():
    # Red and green tell the column and the row, so the corners of a crop tell where it was.
    rows, columns = np.mgrid[0:256, 0:256].astype(np.uint8)
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], 2))
    transform = folders.RandomCrops((3, 64, 64), mean=(0, 0, 0), std=(1, 1, 1)).train_transform()
    with seeded(0):
        crops = [255 * transform(image) for _ in range(200)]
    widths = torch.stack([crop[0].mean(0)[-1] - crop[0].mean(0)[0] for crop in crops])
    heights = torch.stack([crop[1].mean(1)[-1] - crop[1].mean(1)[0] for crop in crops])
    areas = (widths.abs() + 2) * (heights + 2) / 256**2
    assert (heights > 0).all()
    assert 60 < (widths < 0).sum() < 140
    assert 0.07 < areas.min() < 0.2
    assert areas.max() > 0.85
    assert 0.42 < areas.mean() < 0.54


def test_mce_is_the_mean_error_over_that_of_alexnet(tmp_path):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    preprocessing = folders.RandomCrops((3, 32, 32), crop_pct=1.0)
    for severity in range(1, 6):
        write_images(tmp_path / "fog" / str(severity), 3, size=(32, 32), seed=severity)
    errors = []
    for _, _, loader in folders.imagenet_c(tmp_path, WNIDS, preprocessing, 4):
        with torch.no_grad():
            wrong = [(network(x).argmax(-1) != y).double() for x, y in loader]
        errors.append(torch.cat(wrong).mean().item())
    assert len(errors) == 5
    report = evaluate_corruptions(
        network,
        folders.imagenet_c(tmp_path, WNIDS, preprocessing, 4),
        name="model",
        reference_errors=ALEXNET_ERRORS,
        progress=False,
    )
    assert report.summary["model"]["mce"] == pytest.approx(100 * sum(errors) / 5 / 0.819324)


# ------------------------------------------------------------------------------------------------ runs


def test_script_trains_evaluates_and_saves(small_data, tmp_path):
    arguments = [small_data, "--output", tmp_path, "--model", "resnet10t", "--image-size", "32", "--steps", "2"]
    arguments += ["--batch-size", "8", "--validation", "0.2", "--imagenet-c", small_data / "imagenet-c"]
    printed = run_script(FOLDER, *arguments)
    assert "2 steps of 8 images, learning rate 0.003125" in printed
    rows = read_log(tmp_path)
    assert rows[-1]["step"] == 2
    assert all(math.isfinite(row["validation_nll"]) for row in rows[1:])

    bnn = from_pretrained(tmp_path)
    assert bnn.label_names == WNIDS
    validation = folders.prepare_folder(folders.read_folder(small_data / "val", WNIDS), bnn.preprocessing)
    options = {"samples": 1, "progress": False}
    clean = evaluate(bnn, make_loader(validation, 8), **options).metrics["bayesian"]
    reported = json.loads((tmp_path / "report.json").read_text())["metrics"]["bayesian"]
    assert reported == pytest.approx(clean)
    corrupted = CorruptionReport.load(tmp_path)
    assert [(r["corruption"], r["severity"]) for r in corrupted.sets] == [("clean", 0), ("fog", 1), ("contrast", 1)]
    for row in corrupted.sets[1:]:
        data = folders.read_folder(small_data / "imagenet-c" / row["corruption"] / "1", WNIDS)
        crops = folders.RandomCrops((3, 32, 32), crop_pct=1.0)
        again = evaluate(bnn, make_loader(folders.prepare_folder(data, crops), 8), **options).metrics["bayesian"]
        assert {name: row[name] for name in again if name in row} == pytest.approx(
            {name: value for name, value in again.items() if name in row}
        )
        assert all(math.isfinite(value) for value in again.values())


def test_interrupted_run_goes_on_with_the_numbers_of_an_unbroken_one(small_run, tmp_path, monkeypatch):
    check_interrupted_run(small_run, tmp_path, monkeypatch)


def test_deterministic_network_starts_as_published_and_is_saved_with_its_preprocessing(
    small_run, tmp_path, small_data, monkeypatch
):
    started = {}
    fit = FineTuner.fit

    def spy(self, resume=False):
        started.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return fit(self, resume)

    monkeypatch.setattr(FineTuner, "fit", spy)
    small_run(tmp_path, deterministic=True, steps=1)
    assert started["fc.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert not started["fc.bias"].any()
    assert not started["layer1.0.bn2.weight"].any()  # residual branches start closed
    base = load_base(tmp_path)
    preprocessing = preprocessing_for(base.model, base.library, base.id, "image")
    assert (preprocessing.input_size, preprocessing.crop_pct) == ((3, 32, 32), 0.875)
    data = folders.prepare_folder(folders.read_folder(small_data / "val", base.label_names), preprocessing)
    again = evaluate(base.model, make_loader(data, 8), name="deterministic", progress=False)
    reported = json.loads((tmp_path / "report.json").read_text())["metrics"]
    assert reported["deterministic"] == pytest.approx(again.metrics["deterministic"])


def test_pretrained_weights_keep_what_they_know(small_run, small_data, tmp_path, capsys):
    network = timm.create_model("resnet10t", num_classes=3)
    torch.nn.init.normal_(network.layer1[0].bn2.weight)
    save_timm_folder(network, tmp_path / "base", WNIDS)
    given = {"model": str(tmp_path / "base"), "pretrained": True, "steps": 1}
    small_run(tmp_path / "tuned", learning_rate=1e-9, **given)
    assert "Random signs" in capsys.readouterr().out
    bnn = from_pretrained(tmp_path / "tuned")
    assert bnn.config.init == "normal"
    assert bnn.config.posterior == "normal"
    torch.testing.assert_close(bnn.model.layer1[0].bn2.weight, network.layer1[0].bn2.weight)
    torch.testing.assert_close(bnn.model.fc.weight, network.fc.weight)
    with pytest.raises(ConfigError, match="from scratch"):
        small_run(tmp_path / "other", recipe="imagenet-cauchy", **given)
    with pytest.raises(ConfigError, match="--deterministic"):
        small_run(tmp_path / "other", deterministic=True, members=2)


def test_corruptions_are_generated_where_imagenet_c_is_not_at_hand(small_run, tmp_path, small_data):
    small_run(tmp_path, steps=1, members=1, test_images=6, generate_corruptions=2)
    report = CorruptionReport.load(tmp_path)
    assert len(report.sets) == 1 + 15 * 5
    assert {row["examples"] for row in report.sets} == {2}
    assert math.isfinite(report.summary["bayesian"]["mce"])
    with pytest.raises(DataError, match="is not ImageNet-C"):
        small_run(tmp_path / "other", imagenet_c_folder=small_data)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match="not both"):
        small_run(tmp_path / "other", imagenet_c_folder=small_data / "imagenet-c", generate_corruptions=2)
