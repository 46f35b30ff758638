"""Corrupted images, the folder that keeps them, and the numbers of evaluations on them."""

from __future__ import annotations

import io
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bayesify.data import HubImagePreprocessing, ImagePreprocessing, PreparedDataset
from bayesify.data.seeding import seed_of
from bayesify.errors import ConfigError, DataError, FormatError
from bayesify.evaluation import (
    ALEXNET_ERRORS,
    CORRUPTIONS,
    CorruptedImages,
    CorruptionReport,
    classification_metrics,
    corruption_sets,
    evaluate_corruptions,
    imagecorruptions_compat,
    plots,
)
from bayesify.evaluation.stages import Stages
from bayesify.predictive import Predictive

from .fakes import FakeBayesian, Lookup
from .test_evaluate import picture, share

pytestmark = pytest.mark.skipif(
    find_spec("imagecorruptions") is None, reason="the extra bayesify[corruptions] is not installed"
)

SIZE_32 = ImagePreprocessing((3, 32, 32), crop_pct=1.0)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def prepared(
    images: Sequence[Any], preprocessing: Any = SIZE_32, labels: list[int] | None = None, **options: Any
) -> PreparedDataset:
    columns = {"image": list(images), "label": labels or [row % 3 for row in range(len(images))]}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return PreparedDataset(data, preprocessing, "image", "label", num_classes=3, **options)


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(float)


def batches_of(sets: Any) -> list[tuple[str, int, list[Any]]]:
    return [(name, severity, list(batches)) for name, severity, batches in sets]


def same(one: list[tuple[str, int, list[Any]]], other: list[tuple[str, int, list[Any]]]) -> bool:
    assert [entry[:2] for entry in one] == [entry[:2] for entry in other]
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a[2], b[2], strict=True)]
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


class Linear(nn.Module):
    """A linear classifier of 3 classes on the pixels, which counts its calls."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        weight = torch.randn(3, 3 * 32 * 32, generator=torch.Generator().manual_seed(seed)) / 30
        self.weight = nn.Parameter(weight)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.flatten(1) @ self.weight.T


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_corruption_changes_the_image_and_nothing_else(corruption: str) -> None:
    image = photo(45, 33)
    data = prepared([image], ImagePreprocessing((3, 64, 64)))
    modules = set(sys.modules)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    changes = []
    for severity in range(1, 6):
        corrupted, cropped = CorruptedImages(data, corruption, severity).image(0)
        assert (corrupted.mode, corrupted.size, cropped) == ("RGB", image.size, False)
        changes.append(np.abs(pixels(corrupted) - pixels(image)).mean())
        again = CorruptedImages(data, corruption, severity).image(0)[0]
        assert corrupted.tobytes() == again.tobytes()
    assert min(changes) > 0.2
    assert changes[4] > changes[0] or corruption == "frost"  # its picture of ice is drawn, and some are bright
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert not {"pkg_resources", "imagecorruptions"} & (set(sys.modules) - modules)


def test_corruptions_with_a_formula() -> None:
    image = photo(32, 32)
    data = prepared([image] * 3)
    x = pixels(image) / 255
    found = CorruptedImages(data, "contrast", 4).image(0)[0]
    mean = x.mean((0, 1), keepdims=True)
    assert np.array_equal(pixels(found), np.floor(np.clip((x - mean) * 0.1 + mean, 0, 1) * 255))
    found = CorruptedImages(data, "gaussian_noise", 2, seed=5).image(1)[0]
    noise = np.random.RandomState(seed_of(5, "gaussian_noise", 2, 1) % 2**32).normal(size=x.shape, scale=0.12)
    assert np.array_equal(pixels(found), np.floor(np.clip(x + noise, 0, 1) * 255))


@pytest.mark.parametrize("corruption", ["gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "fog", "frost"])
def test_randomness_is_that_of_seed_severity_and_row(corruption: str) -> None:
    data = prepared([photo(32, 32)] * 4)
    images = CorruptedImages(data, corruption, 3)
    forward = [images.image(index)[0].tobytes() for index in range(4)]
    np.random.seed(1)
    backward = [images.image(index)[0].tobytes() for index in (3, 2, 1, 0)]
    assert forward == backward[::-1]
    assert len(set(forward)) == 4
    assert CorruptedImages(data, corruption, 3, rows=[2]).image(0)[0].tobytes() == forward[2]
    assert CorruptedImages(data, corruption, 3, seed=1).image(0)[0].tobytes() != forward[0]


def test_workers_change_nothing() -> None:
    data = prepared([photo(32, 32, seed) for seed in range(5)])
    options = {"corruptions": ["impulse_noise", "snow"], "severities": [2], "batch_size": 2}
    before = torch.get_rng_state()
    alone = batches_of(corruption_sets(data, **options))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(batches_of(corruption_sets(data, **options, workers=2)), alone)
    assert not torch.equal(alone[0][2][0][0], alone[1][2][0][0])


def clip() -> Any:
    from transformers import CLIPImageProcessor

    return HubImagePreprocessing(CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32))


def vit() -> Any:
    from transformers import ViTImageProcessor

    return HubImagePreprocessing(ViTImageProcessor(size={"height": 32, "width": 36}))


PREPROCESSING: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "center": (lambda: ImagePreprocessing((3, 36, 32), crop_pct=0.8), (32, 36)),
    "squash": (lambda: ImagePreprocessing((3, 36, 32), crop_mode="squash"), (32, 36)),
    "border": (lambda: ImagePreprocessing((3, 36, 36), crop_mode="border"), (36, 36)),
    "gray": (lambda: ImagePreprocessing((1, 32, 32), mean=(0.5,), std=(0.2,)), (32, 32)),
    "clip": (clip, (32, 32)),
    "vit": (vit, (36, 32)),
}


@pytest.mark.parametrize("case", PREPROCESSING)
def test_large_images_are_corrupted_at_the_size_of_the_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, size = PREPROCESSING[case]
    data = prepared([photo(90, 70), photo(32, 32)], make())
    assert CorruptedImages(data, "contrast", 1).image(0)[0].size == size
    assert [CorruptedImages(data, "contrast", 1).image(row)[1] for row in range(2)] == [True, False]
    monkeypatch.setattr("bayesify.evaluation.corrupted.corrupt", lambda image, corruption, severity: image)
    images = CorruptedImages(data, "contrast", 1)
    for row in range(2):  # a corruption that does nothing leaves the clean input
        assert torch.allclose(images[row][0], data[row][0], atol=0.03)
        assert images[row][1] == data[row][1]


def test_preprocessing_that_cannot_be_divided_is_applied_after_the_corruption() -> None:
    from transformers import MobileViTImageProcessor

    processor = MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    preprocessing = HubImagePreprocessing(processor)  # it also swaps the channels, which would be done twice
    assert Stages.of(preprocessing).crop is None
    images = CorruptedImages(prepared([photo(60, 50)], preprocessing), "fog", 1)
    assert images.image(0)[0].size == (60, 50)
    assert images[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK"])
def test_images_of_any_mode(mode: str) -> None:
    image = photo(32, 32)
    stored = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    stored = stored if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    stored.save(file, "TIFF")
    images = CorruptedImages(prepared([{"bytes": file.getvalue(), "path": None}]), "brightness", 3)
    corrupted = images.image(0)[0]
    assert corrupted.mode == "RGB"
    plain = pixels(image.convert("L").convert("RGB") if mode in ("L", "I;16") else image)
    assert 20 < (pixels(corrupted) - plain).mean() < 90  # brighter by up to 0.3 of 255


@pytest.mark.parametrize(
    ("image", "height", "message"),
    [
        (photo(32, 31), 32, r"row 1: column 'image' .* need 32×32 pixels or more; found 32×31$"),
        (photo(90, 90), 20, r"found 32×20 after the model's resizing and cropping"),
        ({"bytes": b"no image", "path": None}, 32, "row 1: column 'image' cannot be corrupted: UnidentifiedImageErr"),
        (None, 32, "row 1.*the value is missing"),
    ],
)
def test_images_that_cannot_be_corrupted(image: Any, height: int, message: str) -> None:
    data = prepared([photo(32, 32), image], ImagePreprocessing((3, height, 32)))
    with pytest.raises(DataError, match=message):
        CorruptedImages(data, "fog", 1)[1]


# ------------------------------------------------------------------------------------------------ the cache


def test_cache_gives_the_same_and_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared([photo(32, 32, 0), photo(70, 50, 1), photo(32, 32, 2)])
    options = {"corruptions": ["glass_blur", "pixelate"], "severities": [1, 4], "batch_size": 2}
    plain = batches_of(corruption_sets(data, **options))
    assert same(batches_of(corruption_sets(data, **options, cache=tmp_path)), plain)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 4
    with monkeypatch.context() as patch:
        patch.setattr("bayesify.evaluation.corrupted.corrupt", None)
        assert same(batches_of(corruption_sets(data, **options, cache=tmp_path, workers=1)), plain)
        with pytest.raises(DataError, match="row 0"):
            batches_of(corruption_sets(data, **options))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_cache_of_other_images_seed_preprocessing_or_rows_is_not_used(tmp_path: Path) -> None:
    images = [photo(70, 50, seed) for seed in range(4)]
    others: list[tuple[PreparedDataset, dict[str, Any]]] = [
        (prepared(images), {}),
        (prepared([*images[:3], photo(70, 50, 9)]), {}),
        (prepared(images), {"seed": 1}),
        (prepared(images), {"limit": 2}),
        (prepared(images, ImagePreprocessing((3, 32, 40))), {}),
    ]
    for count, (data, options) in enumerate(others, 1):
        found = batches_of(corruption_sets(data, ["impulse_noise"], [2], **options, cache=tmp_path))
        assert len(list(tmp_path.iterdir())) == count
        assert same(found, batches_of(corruption_sets(data, ["impulse_noise"], [2], **options)))


def test_cache_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    data = prepared([photo(32, 32), photo(32, 32), photo(20, 20)])
    with pytest.raises(DataError, match="row 2"):
        batches_of(corruption_sets(data, ["fog"], [1], batch_size=1, cache=tmp_path))
    assert list(tmp_path.iterdir()) == []
    good = corruption_sets(prepared([photo(32, 32)]), ["fog"], [1], cache=tmp_path)
    batches_of(good)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(FormatError, match="Delete it to make it anew"):
        batches_of(good)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.fixture
def ready() -> tuple[Tensor, dict[tuple[str, int], list[Any]], Tensor]:
    """Outputs [3, 1, 11 · 40, 4], clean and 2 × 5 sets of 40 rows each, and targets [440]."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (440,), generator=generator)
    outputs = torch.randn(3, 1, 440, 4, generator=generator)
    outputs[:, :, torch.arange(440), targets] += torch.linspace(4, -1, 440)
    keys = [("clean", 0), *((name, severity) for severity in range(1, 6) for name in ("fog", "snow"))]
    rows = torch.arange(440).split(40)
    return outputs, {key: [(r, targets[r])] for key, r in zip(keys, rows, strict=True)}, targets


def ece(probs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
    confidence, right = probs.max(-1), probs.argmax(-1) == targets
    total = 0.0
    for i in range(15):
        inside = (confidence >= i / 15) & (confidence < (i + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_means_equal_their_loops(ready: tuple[Tensor, dict[tuple[str, int], list[Any]], Tensor]) -> None:
    outputs, sets, targets = ready
    report = evaluate_corruptions(
        FakeBayesian(outputs),
        sets,
        baseline=Lookup(outputs[0, 0]),
        reference_errors={"fog": 0.5, "snow": 0.8},
        progress=False,
    )
    assert report.models == ["bayesian", "deterministic"]
    for model, members in (("bayesian", outputs), ("deterministic", outputs[:1])):
        probs = torch.softmax(members.double(), -1).mean((0, 1)).numpy()
        y = targets.numpy()
        nll, right, gaps, errors = [], [], [], {"fog": 0.0, "snow": 0.0}
        for (name, severity), [(rows, _)] in sets.items():
            if severity == 0:
                continue
            r = rows.numpy()
            nll.append(-np.mean([math.log(probs[b, y[b]]) for b in r]))
            right.append(np.mean(probs[r].argmax(-1) == y[r]))
            gaps.append(ece(probs[r], y[r]))
            errors[name] += (1 - right[-1]) / 5
        summary = report.summary[model]
        found = {key: summary["corrupted"][key] for key in ("nll", "accuracy", "ece")}
        expected = {"nll": np.mean(nll), "accuracy": np.mean(right), "ece": np.mean(gaps)}
        assert found == pytest.approx(expected, abs=1e-6)
        assert abs(ece(probs[40:], y[40:]) - found["ece"]) > 0.02  # pooled is something else
        assert summary["mce"] == pytest.approx(100 * (errors["fog"] / 0.5 + errors["snow"] / 0.8) / 2)
        assert summary["severities"][5]["nll"] == pytest.approx(np.mean(nll[8:]))
        assert summary["corruptions"]["snow"]["accuracy"] == pytest.approx(np.mean(right[1::2]))
        assert summary["clean"] == classification_metrics(Predictive(members[:, :, :40]), targets[:40])


def test_mce_needs_reference_errors_and_all_severities(
    ready: tuple[Tensor, dict[tuple[str, int], list[Any]], Tensor],
) -> None:
    outputs, sets, _ = ready
    model = FakeBayesian(outputs)
    assert "mce" not in evaluate_corruptions(model, sets, progress=False).summary["bayesian"]
    some = [(*key, batches) for key, batches in sets.items() if key[1] < 5]
    options: dict[str, Any] = {"reference_errors": ALEXNET_ERRORS, "progress": False}
    assert "mce" not in evaluate_corruptions(model, iter(some), **options).summary["bayesian"]
    with pytest.raises(ConfigError, match="lack snow"):
        evaluate_corruptions(model, sets, reference_errors={"fog": 0.5}, progress=False)
    assert tuple(ALEXNET_ERRORS) == CORRUPTIONS
    # Relative to AlexNet's own mean errors, AlexNet has 100; its published mean error over all sets is 78.8 %.
    assert sum(ALEXNET_ERRORS.values()) / 15 == pytest.approx(0.788, abs=1e-3)


def test_images_are_evaluated_as_sets_given_by_hand(tmp_path: Path) -> None:
    data = prepared([photo(32, 32, seed) for seed in range(9)])
    options: dict[str, Any] = {"corruptions": ["fog", "contrast"], "severities": [1, 3], "batch_size": 4}
    report = evaluate_corruptions(Linear(), data, **options, limit=4, seed=2, progress=False)
    assert [row["examples"] for row in report.sets] == [4] * 5
    rows = [0, 2, 4, 6]
    clean = torch.stack([data[row][0] for row in rows])
    targets = torch.tensor([row % 3 for row in rows])
    assert report.summary["bayesian"]["clean"] == classification_metrics(
        Predictive(Linear()(clean)[None, None].detach()), targets
    )
    by_hand = [
        (name, severity, [(torch.stack([CorruptedImages(data, name, severity, seed=2)[r][0] for r in rows]), targets)])
        for name in ("fog", "contrast")
        for severity in (1, 3)
    ]
    assert evaluate_corruptions(Linear(), by_hand, progress=False).sets == report.sets[1:]


# ------------------------------------------------------------------------------------------------ files


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    data = prepared([photo(32, 32, seed) for seed in range(4)])
    options: dict[str, Any] = {"corruptions": ["fog", "shot_noise"], "severities": [1, 2], "progress": False}
    whole = evaluate_corruptions(Linear(), data, baseline=Linear(1), **options, output=tmp_path / "whole")

    class Failing(Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        evaluate_corruptions(Failing(), data, baseline=Linear(1), **options, output=tmp_path / "part")
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["corruptions.jsonl"]
    model, baseline = Linear(), Linear(1)
    rest = evaluate_corruptions(model, data, baseline=baseline, **options, output=tmp_path / "part")
    assert (model.calls, baseline.calls) == (2, 2)
    assert rest == whole
    for name in ("corruptions.json", "corruptions.md", "corruptions.jsonl", "corruptions.png"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    more = {**options, "severities": [1, 2, 5]}
    evaluate_corruptions(model, data, baseline=baseline, **more, output=tmp_path / "part")
    assert (model.calls, baseline.calls) == (4, 4)


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    images = [photo(32, 32, seed) for seed in range(4)]
    options: dict[str, Any] = {"corruptions": ["fog"], "severities": [1], "progress": False, "output": tmp_path}
    evaluate_corruptions(Linear(), prepared(images), **options)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    changed: list[tuple[Any, PreparedDataset, dict[str, Any], str]] = [
        (Linear(), prepared(images), {"seed": 1}, r"images .*seed \(then 0, now 1\)"),
        (Linear(1), prepared(images), {}, "other settings: models"),
        (Linear(), prepared([*images[:3], photo(32, 32, 9)]), {}, "other settings: images"),
        (Linear(), prepared(images, labels=[0, 1, 2, 1]), {}, "other settings: labels"),
        (Linear(), prepared(images), {"limit": 3}, r"examples \(then 4, now 3\)"),
        (Linear(), prepared(images), {"baseline": Linear(1)}, "other settings: models"),
    ]
    for model, data, more, message in changed:
        with pytest.raises(FormatError, match=message):
            evaluate_corruptions(model, data, **{**options, **more})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 1, "settings": {}}\n{}'])
def test_a_bad_log_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "corruptions.jsonl").write_text(text)
    with pytest.raises(FormatError, match="not a log of bayesify"):
        evaluate_corruptions(Linear(), {("fog", 1): []}, output=tmp_path, progress=False)


def test_report_round_trip_and_pages(
    ready: tuple[Tensor, dict[tuple[str, int], list[Any]], Tensor], tmp_path: Path
) -> None:
    outputs, sets, _ = ready
    outputs[:, :, 45] = torch.tensor([-math.inf, -math.inf, -math.inf, 0.0])  # an infinite NLL in one set
    sets["fog", 1][0][1][5] = 0
    options: dict[str, Any] = {"baseline": Lookup(outputs[0, 0]), "name": "$net|", "progress": False}
    report = evaluate_corruptions(
        FakeBayesian(outputs), sets, **options, reference_errors=ALEXNET_ERRORS, output=tmp_path
    )
    assert report.summary["$net|"]["corrupted"]["nll"] == math.inf
    assert CorruptionReport.load(tmp_path) == report
    json.loads((tmp_path / "corruptions.json").read_text(), parse_constant=pytest.fail)
    again = evaluate_corruptions(
        FakeBayesian(outputs), sets, **options, reference_errors=ALEXNET_ERRORS, output=tmp_path
    )
    assert again == report
    text = (tmp_path / "corruptions.md").read_text()
    ours, theirs = (report.summary[model]["corrupted"]["ece"] for model in report.models)
    shown = [f"**{value:.4f}**" if value == min(ours, theirs) else f"{value:.4f}" for value in (ours, theirs)]
    assert f"| {' | '.join(shown)} | fraction |" in text
    assert f"{report.summary['$net|']['mce']:.2f}" in text
    assert "spread over corruption types" in text
    assert "$net\\|, clean" in text
    assert "$net|, corrupted" in str(report)
    assert "AUC-PR" not in text
    pixels = picture(tmp_path / "corruptions.png")
    for color in (plots.BLUE, plots.ORANGE):
        assert share(pixels, color) > 0.0005


@pytest.mark.parametrize(
    "text",
    [None, "{", "[]", '{"format_version": 2}', '{"format_version": 1}', '{"format_version": 1, "sets": [{}]}'],
)
def test_a_bad_report_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "corruptions.json").write_text(text)
    with pytest.raises(FormatError, match=r"corruptions\.json"):
        CorruptionReport.load(tmp_path)


# ------------------------------------------------------------------------------------------------ misuse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruptions": ["frog"]}, "'frog' is unknown.*Did you mean fog?"),
        ({"corruptions": []}, "one or more names"),
        ({"corruptions": "fog"}, "a list"),
        ({"severities": [0]}, "from 1 to 5; found"),
        ({"severities": []}, "from 1 to 5; found"),
        ({"severities": [1.0]}, "whole numbers"),
        ({"limit": 0}, "limit must be a positive"),
        ({"batch_size": 0}, "batch_size ≥ 1"),
        ({"name": "deterministic", "baseline": Linear()}, "choose another name"),
        ({"reference_errors": {"fog": 0.5}}, "lack gaussian_noise"),
        ({"reference_errors": ALEXNET_ERRORS, "severities": [1]}, "Evaluate all five"),
        ({"reference_errors": {**ALEXNET_ERRORS, "fog": 82.0}}, r"fractions in \(0, 1\]"),
    ],
)
def test_options_without_meaning_are_refused_first(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    places = {"output": tmp_path / "out", "cache": tmp_path / "cache"}
    with pytest.raises(ConfigError, match=message):
        evaluate_corruptions(Linear(), prepared([photo(32, 32)]), **options, **places, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_data_without_meaning_are_refused() -> None:
    training = prepared([photo(32, 32)], training=True)
    with pytest.raises(ConfigError, match="training=False"):
        evaluate_corruptions(Linear(), training, progress=False)
    unlabeled = prepared([photo(32, 32)])
    unlabeled.labels = None
    with pytest.raises(DataError, match="no labels"):
        evaluate_corruptions(Linear(), unlabeled, progress=False)
    batch = (torch.zeros(1, 3, 32, 32), torch.tensor([0]))
    sets: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "no set"),
        ([("fog", 6, [batch])], {}, "found 'fog', 6"),
        ({"fog": [batch]}, {}, "expected sets"),
        ([("fog", 1, iter([batch]))], {"baseline": Linear()}, "fog 1 are an iterator"),
        ([("fog", 1, [batch[:1]])], {}, "no labels"),
        ([("fog", 1, [])], {}, "empty"),
    ]
    for data, options, message in sets:
        with pytest.raises(DataError, match=message):
            evaluate_corruptions(Linear(), data, **options, progress=False)
    with pytest.raises(ConfigError, match="made already"):
        evaluate_corruptions(Linear(), [("fog", 1, [batch])], limit=3, progress=False)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imagecorruptions_compat._functions.cache_clear()
    monkeypatch.setattr(imagecorruptions_compat, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "bayesify\[corruptions\]"'):
        corruption_sets(prepared([photo(32, 32)]))


def test_progress_is_shown_on_stderr(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    data = prepared([photo(32, 32)] * 3)
    options: dict[str, Any] = {"corruptions": ["fog"], "severities": [1, 2], "batch_size": 2, "name": "[b]net[/b]"}
    evaluate_corruptions(Linear(), data, **options)
    out, err = capfd.readouterr()
    assert out == ""
    assert "fog 2, [b]net[/b]" in err
    assert "6/6" in err
    evaluate_corruptions(Linear(), data, **options, progress=False)
    assert capfd.readouterr() == ("", "")
