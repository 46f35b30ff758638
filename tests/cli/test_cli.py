import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from commands import SHORT, run, write_images
from PIL import Image
from processes import two_processes
from safetensors.torch import load_file

import bayesify
from bayesify import Rank1Config, from_pretrained
from bayesify.cli import app
from bayesify.cli.options import flag_of
from bayesify.data import load_data, make_loader, prepare
from bayesify.errors import DataError
from bayesify.evaluation import evaluate
from bayesify.finetune import FineTuneConfig
from bayesify.hub import load_base
from bayesify.recipes import RECIPES

ROOT = Path(bayesify.__file__).parents[1]
COMMANDS = typer.main.get_command(app).commands


def command_line(*arguments, launcher=("-m", "bayesify")):
    """A command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Where the tests run in the background, interrupts are ignored, which a child would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def log(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------ the commands


def test_processes_of_their_own(tmp_path):
    started = {
        "version": command_line("--version"),
        "help": command_line("finetune", "--help"),
        "error": command_line("convert", "resnet5O", tmp_path / "out"),
    }
    done = {name: (*process.communicate(), process.returncode) for name, process in started.items()}
    assert done["version"] == (f"bayesify {bayesify.__version__}\n", "", 0)
    assert done["help"][2] == 0
    assert "--learning-rate" in done["help"][0]
    output, error, code = done["error"]
    assert (output, code) == ("", 1)
    assert error.startswith("Error: 'resnet5O' is neither a folder nor a model of timm. Did you mean resnet50")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_command_has_help_with_defaults():
    assert list(COMMANDS) == [
        "inspect",
        "convert",
        "finetune",
        "calibrate",
        "evaluate",
        "corruptions",
        "predict",
        "generate",
        "push",
    ]
    for name in COMMANDS:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output
    assert "[default: 0.0003]" in run("finetune", "--help").output


@pytest.mark.parametrize(
    ("name", "cls"),
    [("inspect", Rank1Config), ("convert", Rank1Config), ("finetune", Rank1Config), ("finetune", FineTuneConfig)],
)
def test_options_are_the_fields_of_the_configs(name, cls):
    options = {option.name: option for option in COMMANDS[name].params}
    for field in dataclasses.fields(cls):
        option = options[field.name]
        assert flag_of(field.name) in option.opts
        assert option.help, field.name
        default = tuple(option.default or ()) if isinstance(field.default, tuple) else option.default
        assert default == field.default, field.name


def test_no_steps_are_an_error_and_not_all_epochs(vit, images, tmp_path):
    result = run("finetune", vit, images, "--output", tmp_path / "run", "--steps", 0)
    assert result.exit_code == 1
    assert "steps" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_recipe_stands_where_nothing_is_typed(vit, images, tmp_path):
    options = ["--recipe", "imagenet-cauchy", "--members", 2, "--batch-size", 6, "--steps", 2, "--milestones", 0.5]
    typed = ["--posterior", "cauchy", "--no-member-bias", "--eval-samples", 0, "--learning-rate", 0.01]
    result = run("finetune", vit, images, "--output", tmp_path / "run", *options, *typed)
    assert result.exit_code == 0, result.output
    rank1 = json.loads((tmp_path / "run" / "bayesify_config.json").read_text())["rank1"]
    expected = RECIPES["imagenet-cauchy"].override(members=2, member_bias=False).rank1
    assert Rank1Config.from_dict(rank1) == expected
    (trained,) = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()][-2:-1]
    assert trained["learning_rate"]["kernels"] == pytest.approx(0.01 * 0.1), "after one milestone"
    assert run("finetune", vit, images, "--output", tmp_path / "x", "--recipe", "nothing").exit_code == 1
    assert not (tmp_path / "x").exists()


def test_inspect(vit):
    result = run("inspect", vit, "--members", 3, "--exclude", "blocks.*.mlp.*", "--factors", "inputs")
    assert result.exit_code == 0
    assert "blocks.0.attn.qkv" in result.output
    assert "exclude" in result.output
    report = json.loads(run("inspect", vit, "--members", 3, "--exclude", "blocks.*.mlp.*", "--json").stdout)
    assert report["members"] == 3
    assert report["converted"]["blocks.0.attn.qkv"] == "Linear"
    assert "blocks.0.mlp.fc1" in report["skipped"]
    expected = bayesify.inspect(load_base(vit).model, members=3, exclude=("blocks.*.mlp.*",)).to_dict()
    assert report == json.loads(json.dumps(expected))


def test_inspect_checks(bert):
    result = run("inspect", bert, "--check", "--num-labels", 3)
    assert result.exit_code == 0
    assert "Checked:" in result.output


def test_inspect_shows_costs_and_what_a_first_site_changes():
    result = run("inspect", "test_resnet", "--no-pretrained", "--sites", "last-stage", "--cost", "--first-site")
    assert "once for all members" in result.stdout
    assert "layer4" in result.stdout
    refused = run("inspect", "test_resnet", "--no-pretrained", "--cost", "--json")
    assert refused.exit_code != 0
    assert "--cost: these tables are not part" in refused.output


def test_inspect_without_weights():
    result = run("inspect", "test_resnet", "--no-pretrained", "--members", 2, "--num-labels", 3)
    assert result.exit_code == 0
    assert "2 members add" in result.output


def test_convert(vit, bert, tmp_path):
    options = ("--members", 2, "--num-labels", 3)
    for base, kind in ((vit, "image"), (bert, "text")):
        assert run("convert", base, tmp_path / kind, *options).exit_code == 0
        bnn = from_pretrained(tmp_path / kind)
        assert (bnn.members, bnn.label_names, bnn.preprocessing.kind) == (2, ["0", "1", "2"], kind)
        (head,) = bnn.config.new_layers
        signs = {(name, side): bool((factor.loc < 0).any()) for name, side, factor in bnn.factors()}
        assert [key for key, negative in signs.items() if negative] == [(head, "s")]
        again = run("convert", base, tmp_path / kind, *options)
        assert again.exit_code == 1
        assert "already holds a model" in again.stderr
    assert run("convert", "test_resnet", tmp_path / "new", "--no-pretrained", *options).exit_code == 0
    new = from_pretrained(tmp_path / "new")
    assert (new.members, new.config.new_layers) == (2, ())
    result = run("inspect", tmp_path / "new")
    assert "2 members add" in result.output
    assert run("inspect", tmp_path / "new", "--members", 3).exit_code == 1


# ------------------------------------------------------------------------------------------------ end to end


def test_finetune_writes_what_it_says(trained):
    assert sorted(path.name for path in trained.iterdir()) == [
        "README.md",
        "bayesify.safetensors",
        "bayesify_config.json",
        "checkpoint",
        "log.jsonl",
        "reliability.png",
        "report.json",
        "report.md",
        "risk_coverage.png",
        "uncertainty.png",
    ]
    assert len([row for row in log(trained) if "loss" in row]) == 6
    assert len([row for row in log(trained) if "validation_nll" in row]) == 3
    card = (trained / "README.md").read_text()
    assert "| accuracy |" in card
    assert "reliability.png" in card


def test_the_model_is_saved_if_the_evaluation_fails(vit, images, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise DataError("not to be evaluated")

    monkeypatch.setattr("bayesify.evaluation.evaluate", fails)
    result = run("finetune", vit, images, "--output", tmp_path / "run", *SHORT, "--steps", 2)
    assert (result.exit_code, result.stderr) == (1, "Error: not to be evaluated\n")
    assert from_pretrained(tmp_path / "run").members == 2


def test_one_class_is_no_classification(vit, images, tmp_path):
    shutil.copytree(images / "train" / "cat", tmp_path / "data" / "train" / "cat")
    result = run("finetune", vit, tmp_path / "data", "--output", tmp_path / "run", *SHORT)
    assert (result.exit_code, tree(tmp_path / "run")) == (1, {})
    assert "has one class (cat)" in result.stderr


def test_labels_out_of_distribution_are_not_read(bert, texts, tmp_path):
    run("finetune", bert, texts, "--output", tmp_path / "run", *SHORT, "--steps", 1)
    (tmp_path / "far.csv").write_text("text,target\nwhat,0.5\nwho,0.25\n")
    result = run("evaluate", tmp_path / "run", texts, "--ood", tmp_path / "far.csv")
    assert result.exit_code == 0, result.stderr
    assert "AUROC" in result.output


def test_evaluate_and_predict_agree_with_python(trained, images, tmp_path):
    bnn = from_pretrained(trained)
    assert bnn.label_names == ["cat", "dog", "emu"]
    loader = make_loader(prepare(load_data(images), "test", bnn.preprocessing), 32)
    stored = json.loads((trained / "report.json").read_text())
    expected = evaluate(bnn, loader, seed=3, progress=False)
    assert stored["metrics"]["bayesian"] == pytest.approx(expected.metrics["bayesian"], abs=1e-6)

    result = run("evaluate", trained, images, "--samples", 2, "--seed", 5, "--output", tmp_path / "report")
    assert result.exit_code == 0
    expected = evaluate(bnn, loader, samples=2, seed=5, progress=False)
    measured = json.loads((tmp_path / "report" / "report.json").read_text())
    assert measured["metrics"]["bayesian"] == expected.metrics["bayesian"]
    assert f"{expected.metrics['bayesian']['nll']:.4f}" in result.output
    assert [row["class"] for row in measured["classes"]]

    files = sorted(map(str, (images / "test").rglob("*.png")))
    rows = json.loads(run("predict", trained, images / "test", "--json", "--top", 2).stdout)
    transform = bnn.preprocessing.eval_transform()
    prediction = bnn.predict(torch.stack([transform(Image.open(file)) for file in files]))
    assert [row["input"] for row in rows] == files
    assert [row["entropy"] for row in rows] == pytest.approx(prediction.entropy.tolist(), abs=1e-6)
    assert [row["mutual_information"] for row in rows] == pytest.approx(
        prediction.mutual_information.tolist(), abs=1e-6
    )
    probs, order = prediction.probs.topk(2)
    for row, p, c in zip(rows, probs.tolist(), order.tolist(), strict=True):
        assert [found["class"] for found in row["classes"]] == [bnn.label_names[i] for i in c]
        assert [found["probability"] for found in row["classes"]] == pytest.approx(p, abs=1e-6)
    sorted_rows = json.loads(run("predict", trained, *files, "--json", "--sort-uncertain").stdout)
    assert [r["entropy"] for r in sorted_rows] == sorted((r["entropy"] for r in rows), reverse=True)
    table = run("predict", trained, files[0]).output
    assert "mutual" in table
    assert f"{rows[0]['entropy']:.4f}" in table


def test_texts_end_to_end(bert, texts, tmp_path):
    out = tmp_path / "out"
    result = run(
        "finetune", bert, texts, "--output", out, *SHORT, "--epochs", 1, "--max-length", 16, "--train", "factors"
    )
    assert result.exit_code == 0, result.output
    bnn = from_pretrained(out)
    assert bnn.label_names == ["bad", "good"]  # not the class of the out-of-scope split
    assert bnn.preprocessing.max_length == 16
    for file in ("bayesify_config.json", "report.json", "tokenizer.json"):
        assert (out / file).is_file()

    result = run("evaluate", out, texts, "--ood-split", "oos_test")
    assert result.exit_code == 0, result.output
    assert "AUROC" in result.output

    (tmp_path / "lines.txt").write_text("fine number 1\n\npoor number 2\n")
    rows = json.loads(run("predict", out, tmp_path / "lines.txt", "who is that", "--json").stdout)
    assert [row["input"] for row in rows] == ["fine number 1", "poor number 2", "who is that"]
    batch = bnn.preprocessing.collate([bnn.preprocessing(row["input"]) for row in rows], None)
    assert [row["entropy"] for row in rows] == pytest.approx(bnn.predict(**batch).entropy.tolist(), abs=1e-6)
    assert json.loads(run("predict", out, "notes.txt", "--text", "--json").stdout)[0]["input"] == "notes.txt"
    assert run("predict", out, "notes.txt").exit_code == 1

    again = run("finetune", out, texts, "--output", tmp_path / "again", *SHORT[2:], "--steps", 1)
    assert again.exit_code == 0, again.output
    assert from_pretrained(tmp_path / "again").config == bnn.config
    refused = run("finetune", out, texts, "--output", tmp_path / "refused", "--members", 3, "--steps", 1)
    assert refused.exit_code == 1
    assert "--members" in refused.stderr
    assert not (tmp_path / "refused").exists()


def test_standard_input(bert, tmp_path, monkeypatch):
    run("convert", bert, tmp_path / "out")
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["predict", str(tmp_path / "out"), "-", "--json"], input="one\ntwo\n")
    assert [row["input"] for row in json.loads(result.stdout)] == ["one", "two"]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_deterministic_baseline(kind, request, tmp_path, trained):
    model, data = (
        request.getfixturevalue(name) for name in (("vit", "images") if kind == "image" else ("bert", "texts"))
    )
    base = tmp_path / "base"
    result = run("finetune", model, data, "--output", base, *SHORT[2:], "--steps", 3, "--deterministic")
    assert result.exit_code == 0, result.output
    measured = json.loads((base / "report.json").read_text())["metrics"]["deterministic"]
    assert load_base(base).label_names == (["cat", "dog", "emu"] if kind == "image" else ["bad", "good"])
    assert not any(path.suffix in (".bin", ".pt", ".pth", ".pkl") for path in base.rglob("*"))
    alone = run("evaluate", base, data, "--output", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    again = json.loads((tmp_path / "alone" / "report.json").read_text())["metrics"]["deterministic"]
    assert again == pytest.approx(measured, abs=1e-5)
    if kind == "image":
        both = run("evaluate", trained, data, "--baseline", base, "--output", tmp_path / "both")
        assert both.exit_code == 0, both.output
        metrics = json.loads((tmp_path / "both" / "report.json").read_text())["metrics"]
        assert list(metrics) == ["bayesian", "deterministic"]
        assert metrics["deterministic"] == pytest.approx(measured, abs=1e-5)
    refused = run("finetune", model, data, "--output", tmp_path / "no", "--deterministic", "--members", 2)
    assert refused.exit_code == 1
    assert "--members" in refused.stderr


def test_labels_are_matched_by_name(trained, images, tmp_path):
    write_images(tmp_path / "two", ["emu", "cat"], 3)
    result = run("evaluate", trained, tmp_path / "two", "--split", "train", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    bnn = from_pretrained(trained)
    prepared = prepare(load_data(tmp_path / "two"), "train", bnn.preprocessing, num_classes=3)
    prepared.labels = [{0: 0, 1: 2}[label] for label in prepared.labels]
    expected = evaluate(bnn, make_loader(prepared, 32), progress=False).metrics["bayesian"]["nll"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]["bayesian"]["nll"] == expected
    (tmp_path / "two" / "cat").rename(tmp_path / "two" / "fox")
    before = tree(tmp_path / "out")
    result = run("evaluate", trained, tmp_path / "two", "--split", "train", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "'fox'" in result.stderr
    assert tree(tmp_path / "out") == before


# ------------------------------------------------------------------------------------------------ runs


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(trained, vit, images, tmp_path, monkeypatch):
    arguments = ["finetune", vit, images, "--output", tmp_path / "run", *SHORT]
    arguments += ["--steps", 6, "--eval-every", 2, "--seed", 3]
    from bayesify.finetune import FineTuner

    save = FineTuner._save

    def interrupted(self, optimizer, progress, best):
        save(self, optimizer, progress, best)
        if progress["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "_save", interrupted)
        result = run(*arguments)
    assert result.exit_code == 130
    assert "--resume goes on from the last checkpoint" in result.stderr
    assert not (tmp_path / "run" / "bayesify_config.json").exists()
    before = tree(tmp_path / "run")
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "--resume" in refused.stderr
    assert tree(tmp_path / "run") == before

    assert run(*arguments, "--resume").exit_code == 0
    assert log(tmp_path / "run") == log(trained)
    assert (tmp_path / "run" / "report.json").read_text() == (trained / "report.json").read_text()
    one, two = (load_file(folder / "bayesify.safetensors") for folder in (tmp_path / "run", trained))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)

    assert run(*arguments, "--resume").exit_code == 0  # of a finished run: the same again
    assert log(tmp_path / "run") == log(trained)


def test_a_killed_process_can_be_resumed(vit, images, tmp_path):
    arguments = ["finetune", vit, images, "--output", tmp_path / "run", *SHORT, "--eval-every", 1]
    process = command_line(*arguments, "--steps", 2000)
    try:
        limit = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoint").is_dir() and time.monotonic() < limit and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "The same command with --resume" in error
    assert "Traceback" not in error


def test_two_processes_train_as_one(vit, images, tmp_path):
    arguments = ["finetune", vit, images, *SHORT, "--steps", 3, "--posterior", "deterministic", "--init", "ones"]
    process = command_line(*arguments, "--output", tmp_path / "two", launcher=(*two_processes(), "-m", "bayesify"))
    assert run(*arguments, "--output", tmp_path / "one").exit_code == 0
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert output.count("Best validation NLL") == 1
    assert len(json.loads((tmp_path / "two" / "checkpoint" / "checkpoint.json").read_text())["progress"]["random"]) == 2
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        one.pop("learning_rate", None), two.pop("learning_rate", None)
        assert two == pytest.approx(one, abs=1e-5)
    scores = [
        json.loads((tmp_path / name / "report.json").read_text())["metrics"]["bayesian"] for name in ("one", "two")
    ]
    assert scores[1]["nll"] == pytest.approx(scores[0]["nll"], abs=1e-5)


# ------------------------------------------------------------------------------------------------ bad inputs


BAD = {
    "unknown model": (["finetune", "resnet5O", "{images}", "--output", "{out}"], "Did you mean resnet50"),
    "unknown data": (["finetune", "{vit}", "./nowhere", "--output", "{out}"], "does not exist"),
    "unknown column": (["finetune", "{vit}", "{images}", "--output", "{out}", "--label-column", "x"], "not a column"),
    "no site": (["finetune", "{vit}", "{images}", "--output", "{out}", "--include", "nothing"], "nothing"),
    "foreign folder": (["finetune", "{vit}", "{images}", "--output", "{foreign}"], "something else"),
    "foreign, resumed": (["finetune", "{vit}", "{images}", "--output", "{foreign}", "--resume"], "something else"),
    "existing run": (["finetune", "{vit}", "{images}", "--output", "{trained}"], "--resume"),
    "bad option": (["finetune", "{vit}", "{images}", "--output", "{out}", "--members", "0"], "members must be"),
    "bad choice": (["finetune", "{vit}", "{images}", "--output", "{out}", "--train", "x"], "train='x' is unknown"),
    "texts for a vit": (["finetune", "{vit}", "{texts}", "--output", "{out}"], "takes images"),
    "unknown split": (["evaluate", "{trained}", "{images}", "--split", "x"], "no split 'x'"),
    "report in a foreign folder": (["evaluate", "{trained}", "{images}", "--output", "{foreign}"], "something else"),
    "out of distribution texts": (["evaluate", "{trained}", "{images}", "--ood", "{texts}"], "takes images"),
    "unknown ood split": (["evaluate", "{trained}", "{images}", "--ood-split", "x"], "no split 'x'"),
    "baseline with other classes": (["evaluate", "{trained}", "{images}", "--baseline", "{vit}"], "different classes"),
    "unknown corruption": (["corruptions", "{trained}", "{images}", "--corruption", "frog"], "Did you mean fog?"),
    "unknown severity": (["corruptions", "{trained}", "{images}", "--severity", "6", "--output", "{out}"], "found [6]"),
    "corrupted texts": (["corruptions", "{trained}", "{texts}", "--cache", "{out}"], "takes images"),
    "part of an mCE": (["corruptions", "{trained}", "{images}", "--mce", "--severity", "1"], "Evaluate all five"),
    "corruptions in a foreign folder": (
        ["corruptions", "{trained}", "{images}", "--output", "{foreign}"], "something else"
    ),
    "draws of a plain network": (["evaluate", "{vit}", "{images}", "--samples", "2"], "--samples is for"),
    "members of a plain network": (["corruptions", "{vit}", "{images}", "--member-chunk", "1"], "--member-chunk is"),
    "draws that predict": (["predict", "{vit}", "{images}/train/cat", "--samples", "2"], "bayesify convert"),
    "part of a folder": (["evaluate", "{trained}", "{images}", "--subset", "mrpc"], "is for data sets on the Hub"),
    "bad device": (["evaluate", "{trained}", "{images}", "--device", "abacus"], "abacus"),
    "no such image": (["predict", "{trained}", "none.png"], "neither an image file"),
    "broken image": (["predict", "{trained}", "{foreign}/broken.png"], "cannot be read as an image"),
    "folder without images": (["predict", "{trained}", "{texts}"], "holds no image"),
    "text for an image model": (["predict", "{trained}", "hello", "--text"], "takes images"),
    "not a model": (["push", "{images}", "me/model"], "not found"),
    "local base": (["push", "{trained}", "me/model"], "--full"),
    "converted twice": (["convert", "{trained}", "{out}"], "already converted"),
    "foreign output": (["convert", "{vit}", "{foreign}"], "something else"),
    "nothing to inspect": (["inspect", "{foreign}"], "not a model folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_one_line_and_change_nothing(case, vit, images, texts, trained, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "broken.png").write_bytes(b"no image")
    places = {
        "vit": vit,
        "images": images,
        "texts": texts,
        "trained": trained,
        "out": tmp_path / "out",
        "foreign": tmp_path / "foreign",
    }
    arguments, message = BAD[case]
    before = tree(trained), tree(tmp_path)
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert (tree(trained), tree(tmp_path)) == before


def test_push(trained, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    from_pretrained(folder).save_pretrained(folder, full=True)
    calls = []
    monkeypatch.setattr("bayesify.hub.push_folder", lambda *args, **options: calls.append((args, options)) or "address")
    result = run("push", folder, "me/model", "--private", "--message", "First")
    assert result.exit_code == 0
    assert result.stdout == "address\n"
    assert calls == [((folder, "me/model"), {"private": True, "message": "First"})]
