import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from bayesify import bayesify, from_pretrained
from bayesify.errors import BayesifyError, FormatError
from bayesify.hub import load_base, load_model, origin_of, push_folder, push_to_hub, save_pretrained, save_timm_folder

WEIGHTS, CONFIG = "bayesify.safetensors", "bayesify_config.json"


def images():
    return (torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)),)


def tokens():
    return (torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(3)),)


def numbers():
    return (torch.randn(4, 5, generator=torch.Generator().manual_seed(3)),)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()


def timm_model(folder, name="test_resnet", **options):
    torch.manual_seed(0)
    save_timm_folder(timm.create_model(name, num_classes=5, **options), folder)
    return load_base(folder, label_names=["a", "b", "c"])


def bert(folder):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=5
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return load_base(folder, label_names=["a", "b", "c"])


def changed(bnn, inputs):
    """As after training: other factors, a trained bias, other statistics."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _, _, factor in bnn.factors():
            for parameter in factor.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        next(p for n, p in bnn.slow_parameters() if n.endswith("bias")).add_(0.5)
        bnn.train()(*inputs)
    return bnn.eval()


def outputs(bnn, inputs):
    return bnn.predict(*inputs, samples=2, seed=5).outputs


@pytest.fixture(params=["timm", "bert"])
def saved(request, tmp_path):
    """(Bayesian model from a base folder with a new head, its inputs, its base)."""
    make, inputs = {"timm": (timm_model, images()), "bert": (bert, tokens())}[request.param]
    base = make(tmp_path / "base")
    before = base.model(*inputs)
    bnn = bayesify(base.model, members=2)
    bnn.origin, bnn.label_names = origin_of(bnn.model, base), base.label_names
    return changed(bnn, inputs), inputs, getattr(before, "logits", before)


def test_round_trip(saved, tmp_path):
    bnn, inputs, before = saved
    expected = outputs(bnn, inputs)
    assert not torch.allclose(expected.mean((0, 1)), before, atol=1e-3)
    bnn.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", WEIGHTS, CONFIG]
    again = from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(again, inputs), expected)
    assert again.label_names == ["a", "b", "c"]
    assert (again.origin.id, again.config, again.task) == (bnn.origin.id, bnn.config, bnn.task)
    assert not again.training
    again.save_pretrained(tmp_path / "out")
    assert torch.equal(outputs(from_pretrained(tmp_path / "out"), inputs), expected)


def test_a_delta_holds_what_differs_and_full_holds_all(saved, tmp_path):
    bnn, inputs, _ = saved
    state = bnn.model.state_dict()
    bnn.save_pretrained(tmp_path / "delta")
    delta = load_file(tmp_path / "delta" / WEIGHTS)
    slow = {name for name in delta if ".rank1." not in name}
    base = load_base(tmp_path / "base", label_names=["a", "b", "c"]).model.state_dict()
    bias = next(n for n, _ in bnn.slow_parameters() if n.endswith("bias"))
    head = {"fc.weight", "classifier.weight"} & state.keys()
    assert bias in slow
    assert head
    assert head <= slow
    assert not any(torch.equal(delta[name], base[name]) for name in slow - head)
    if any("running_mean" in name for name in state):
        assert {name for name in state if "running_" in name} <= slow
    assert len(slow) < len(base) / 2 or "running_mean" in str(slow)

    bnn.save_pretrained(tmp_path / "full", full=True)
    assert load_file(tmp_path / "full" / WEIGHTS).keys() == state.keys()
    shutil.rmtree(tmp_path / "base")
    assert torch.equal(outputs(from_pretrained(tmp_path / "full"), inputs), outputs(bnn, inputs))
    with pytest.raises(BayesifyError, match="as base_model="):
        from_pretrained(tmp_path / "delta")


def test_a_new_head_is_saved_whatever_the_seed(tmp_path):
    timm_model(tmp_path / "base")
    torch.manual_seed(0)
    base = load_base(tmp_path / "base", label_names=["a", "b", "c"])
    bnn = bayesify(base.model, members=2)
    bnn.origin = origin_of(bnn.model, base)
    torch.manual_seed(0)
    bnn.save_pretrained(tmp_path / "out")
    assert "fc.weight" in load_file(tmp_path / "out" / WEIGHTS)


def test_a_base_in_halves_that_was_trained_in_full(tmp_path):
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).bfloat16().save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base")
    bnn = bayesify(base.model, members=2)
    bnn.origin = origin_of(bnn.model, base)
    bnn = changed(bnn, tokens())
    bnn.save_pretrained(tmp_path / "out")
    again = from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert torch.equal(outputs(again, tokens()), outputs(bnn, tokens()))


OWN_CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class OwnConfig(PreTrainedConfig):
    model_type = "own"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.words, self.inner = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        return SequenceClassifierOutput(logits=self.head(self.inner(self.words(input_ids)).relu().mean(1)))
"""


def test_a_base_with_code_of_its_own_and_a_new_head(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForSequenceClassification": "modeling_own.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {"words.weight": (50, 8), "inner.weight": (8, 8), "head.weight": (2, 8)}
    state = {name: torch.randn(size, generator=torch.Generator().manual_seed(0)) for name, size in sizes.items()}
    state |= {"inner.bias": torch.zeros(8), "head.bias": torch.zeros(2)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    base = load_base(folder, label_names=["a", "b", "c"], trust_remote_code=True)
    bnn = bayesify(base.model, members=2)
    bnn.origin, bnn.label_names = origin_of(bnn.model, base), base.label_names
    bnn = changed(bnn, tokens())
    bnn.save_pretrained(tmp_path / "out")
    again = from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(outputs(again, tokens()), outputs(bnn, tokens()))
    assert again.label_names == ["a", "b", "c"]


def test_what_a_tokenizer_writes_is_saved_pushed_and_saved_again(hub, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from bayesify.data import TextPreprocessing

    words = Tokenizer(WordLevel({"a": 0, "[UNK]": 1, "[PAD]": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ messages }}x"}
    bnn = bayesify(plain(), members=2)
    bnn.preprocessing = TextPreprocessing(tokenizer)
    for temperature in (1.0, 2.0):
        bnn.temperature = temperature
        bnn.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, base_model=plain())
    assert again.temperature == 2.0
    assert again.preprocessing.tokenizer.chat_template == tokenizer.chat_template
    push_folder(tmp_path, "me/model")
    assert {"chat_template.jinja", "additional_chat_templates/rag.jinja"} <= hub[0][1]


def test_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(tmp_path / "base")
    bnn = changed(bayesify(GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval(), members=2), tokens())
    for full in (False, True):
        bnn.save_pretrained(tmp_path / str(full), full=full)
        again = from_pretrained(tmp_path / str(full))
        assert again.model.lm_head.weight is again.model.transformer.wte.weight
        assert torch.equal(outputs(again, tokens()), outputs(bnn, tokens()))
    assert "transformer.wte.weight" not in load_file(tmp_path / "False" / WEIGHTS)


def test_a_module_of_your_own(tmp_path):
    bnn = changed(bayesify(plain(), members=2), numbers())
    bnn.save_pretrained(tmp_path / "out")
    again = from_pretrained(tmp_path / "out", base_model=plain())
    assert torch.equal(outputs(again, numbers()), outputs(bnn, numbers()))
    with pytest.raises(BayesifyError, match="pass it as base_model="):
        from_pretrained(tmp_path / "out")


class TimeFirst(nn.Module):
    """One layer works on [time, batch, channels]; another is never called."""

    def __init__(self):
        super().__init__()
        self.inner, self.spare, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.inner(x.transpose(0, 1)).transpose(0, 1).mean(1))


def test_what_example_inputs_told_is_kept(tmp_path):
    x = torch.randn(4, 8, 5)
    bnn = bayesify(TimeFirst(), members=2, init="normal", example_inputs=x)
    assert set(bnn.report.converted) == {"inner", "head"}
    bnn.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, base_model=TimeFirst())
    assert set(again.report.converted) == {"inner", "head"}
    assert torch.equal(outputs(again, (x,)), outputs(bnn, (x,)))


def test_arguments_of_timm_are_kept(tmp_path):
    base = timm_model(tmp_path / "base", "test_vit", img_size=32)
    for model, origin in (
        (base.model, origin_of(base.model, base)),
        (timm.create_model("test_vit", img_size=32, num_classes=3), None),
        (timm.create_model("test_vit", img_size=32, num_classes=0), None),
    ):
        bnn = changed(bayesify(model.eval(), members=2), images())
        bnn.origin = origin
        bnn.save_pretrained(tmp_path / "out", full=True)
        assert torch.equal(outputs(from_pretrained(tmp_path / "out"), images()), outputs(bnn, images()))


def smoother(model):
    model.act1 = nn.SiLU()


def another_head(model):
    model.fc = nn.Linear(model.fc.in_features, 4)


def longer_head(model):
    model.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(model.fc.in_features, 3))


def pooled_otherwise(model):
    model.reset_classifier(3, global_pool="max")


def shorter(model):
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(model.layer3[-1].conv3.out_channels, 3)


@pytest.mark.parametrize("change", [smoother, another_head, longer_head, pooled_otherwise, shorter, "argument"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("based", [False, True], ids=["name", "folder"])
def test_a_network_that_was_changed_is_one_of_your_own(change, full, based, tmp_path):
    def build():
        torch.manual_seed(0)
        options = {"act_layer": nn.SiLU} if change == "argument" else {}
        if based and change != "argument":
            model = timm_model(tmp_path / "base").model
        else:
            model = timm.create_model("test_resnet", num_classes=5, **options)
        if change != "argument":
            change(model)
        return model.eval()

    bnn = changed(bayesify(build(), members=2), images())
    with pytest.warns(UserWarning, match="saved as one of your own, with all weights"):
        bnn.save_pretrained(tmp_path / "out", full=full)
    with pytest.raises(BayesifyError, match="pass it as base_model="):
        from_pretrained(tmp_path / "out")
    again = from_pretrained(tmp_path / "out", base_model=build())
    assert torch.equal(outputs(again, images()), outputs(bnn, images()))


def test_a_transformers_network_that_was_changed_is_one_of_your_own(tmp_path):
    bnn = bayesify(bert(tmp_path / "base").model, members=2)
    bnn.model.dropout.p = 0.3  # of training: no difference
    bnn.save_pretrained(tmp_path / "out")
    assert from_pretrained(tmp_path / "out").model.config.model_type == "bert"
    other = bert(tmp_path / "base").model
    other.classifier = nn.Linear(16, 4)
    with pytest.warns(UserWarning, match=r"'classifier\.weight' is not what transformers builds"):
        bayesify(other, members=2).save_pretrained(tmp_path / "out")


def test_a_relative_base_folder_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm_model("base")
    base = load_base("base")
    bnn = bayesify(base.model, members=2)
    bnn.origin = origin_of(bnn.model, base)
    bnn.save_pretrained("out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(outputs(from_pretrained("../out"), images()), outputs(bnn, images()))


def test_the_base_can_be_given_in_other_ways(saved, tmp_path):
    bnn, inputs, _ = saved
    bnn.save_pretrained(tmp_path / "out")
    (tmp_path / "base").rename(tmp_path / "moved")
    again = from_pretrained(tmp_path / "out", base_model=tmp_path / "moved")
    assert torch.equal(outputs(again, inputs), outputs(bnn, inputs))
    assert again.origin.id == str(tmp_path / "moved")


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FormatError, match="something else"):
        bayesify(plain(), members=2).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_killed_save_is_no_model_and_can_be_repeated(tmp_path, monkeypatch):
    """What was saved before is gone then, but nothing is read that does not belong together."""
    timm_model(tmp_path / "base")
    base = load_base(tmp_path / "base")
    bnn = bayesify(base.model, members=2)
    bnn.origin = origin_of(bnn.model, base)
    bnn.save_pretrained(tmp_path / "out")
    replace = os.replace

    def killed(source, target):
        if os.path.basename(target) == CONFIG:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    bnn.temperature = 3.0
    with pytest.raises(KeyboardInterrupt):
        bnn.save_pretrained(tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(FormatError, match=f"{CONFIG}: not found"):
        from_pretrained(tmp_path / "out")
    (tmp_path / "first" / ".saving-1").mkdir(parents=True)
    (tmp_path / "again" / f".saving-{os.getpid()}" / "half").mkdir(parents=True)  # in a container, numbers repeat
    for folder in ("out", "first", "again"):
        bnn.save_pretrained(tmp_path / folder)
        assert from_pretrained(tmp_path / folder).temperature == 3.0


def _edited(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def _cut(file):
    file.write_bytes(file.read_bytes()[:-50])


def _weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


BROKEN = {
    "truncated weights": (lambda f: _cut(f / WEIGHTS), f"{WEIGHTS}: truncated"),
    "truncated config": (lambda f: _cut(f / CONFIG), f"{CONFIG}: truncated"),
    "not an object": (lambda f: (f / CONFIG).write_text("[1]"), f"{CONFIG}: expected a JSON object"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: not found"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG}: not found"),
    "foreign config": (lambda f: (f / CONFIG).write_text('{"a": 1}'), f"{CONFIG}: field format_version is missing"),
    "unknown field": (lambda f: _edited(f, extra=1), f"{CONFIG}: field extra is unknown"),
    "newer": (lambda f: _edited(f, format_version=99), f"{CONFIG}: format_version 99 is newer"),
    "unknown option": (lambda f: _edited(f, rank1={"memberz": 2}), f"{CONFIG}: rank1: unknown field 'memberz'"),
    "bad option": (lambda f: _edited(f, rank1={"members": -2}), f"{CONFIG}: rank1: members must be"),
    "other sites": (lambda f: _edited(f, sites={"0": 0, "7": 0}), f"{CONFIG}: does not fit .*'7'"),
    "bad sites": (lambda f: _edited(f, sites={"0": "first"}), f"{CONFIG}: field sites"),
    "bad labels": (lambda f: _edited(f, labels="abc"), f"{CONFIG}: field labels"),
    "bad task": (lambda f: _edited(f, task="x"), f"{CONFIG}: field task"),
    "bad preprocessing": (lambda f: _edited(f, preprocessing={"type": "x"}), f"{CONFIG}: preprocessing.type"),
    "unknown library": (lambda f: _edited(f, base_model={"library": "x"}), f"{CONFIG}: base_model.library"),
    "pattern of another model": (lambda f: _edited(f, rank1={"include": ["no"]}), f"{CONFIG}: does not fit"),
    "other members": (lambda f: _edited(f, rank1={"members": 3}), f"{WEIGHTS}: .* has shape"),
    "wrong shape": (lambda f: _weights(f, lambda s: s.update({"0.bias": torch.zeros(3)})), f"{WEIGHTS}: 0.bias has"),
    "missing tensor": (lambda f: _weights(f, lambda s: s.pop("0.bias")), f"{WEIGHTS}: 0.bias is missing"),
    "unknown tensor": (lambda f: _weights(f, lambda s: s.update(x=torch.zeros(3))), f"{WEIGHTS}: x is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_and_the_given_model_is_unchanged(case, tmp_path):
    bayesify(plain(), members=2).save_pretrained(tmp_path)
    damage, message = BROKEN[case]
    damage(tmp_path)
    model = plain()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(FormatError, match=message):
        from_pretrained(tmp_path, base_model=model)
    assert classes == [type(module) for module in model.modules()]
    assert list(before) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


@pytest.mark.parametrize("name", ["os.system", "PreTrainedTokenizer", "AutoModel", "__class__", "pipeline", ""])
def test_hostile_class_names_are_refused(name, saved, tmp_path):
    bnn, _, _ = saved
    bnn.save_pretrained(tmp_path / "out", full=True)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    _edited(tmp_path / "out", base_model={**config["base_model"], "architecture": name})
    with pytest.raises(FormatError, match=f"{CONFIG}: base_model.architecture '{name}' is no model"):
        from_pretrained(tmp_path / "out")


def test_hostile_arguments_are_refused(tmp_path):
    base = timm_model(tmp_path / "base")
    bnn = bayesify(base.model, members=2)
    bnn.origin = origin_of(bnn.model, base)
    bnn.save_pretrained(tmp_path / "out", full=True)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    _edited(tmp_path / "out", base_model={**config["base_model"], "model_args": {"checkpoint_path": "evil.pth"}})
    with pytest.raises(FormatError, match="must not hold checkpoint_path"):
        from_pretrained(tmp_path / "out")
    _edited(tmp_path / "out", weights="changed")
    with pytest.raises(BayesifyError, match="must not hold checkpoint_path"):
        from_pretrained(tmp_path / "out")


def test_a_saved_model_in_the_cache_of_the_hub(saved, tmp_path):
    bnn, _, _ = saved
    cached = tmp_path / "hub" / "models--someone--bayesian"
    bnn.save_pretrained(cached / "snapshots" / ("a" * 40), full=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    code = (
        "from bayesify.hub import load_model; model, base = load_model('someone/bayesian'); print(model.members, base)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment) == "2 None\n"


def test_load_model_of_either_kind(tmp_path):
    base = timm_model(tmp_path / "base")
    save_pretrained(bayesify(base.model, members=2), tmp_path / "out", full=True)
    assert load_model(tmp_path / "out")[0].members == 2
    assert load_model(tmp_path / "base", num_labels=4)[1].label_names == ["0", "1", "2", "3"]
    with pytest.raises(BayesifyError, match="neither a folder"):
        load_model("nothing_like_this")


@pytest.fixture
def hub(monkeypatch):
    """Uploads that are only written down: [(repo_id, {file}, options)]."""
    uploads = []

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, ignore_patterns, **options):
        from huggingface_hub.utils import filter_repo_objects

        files = [
            os.path.relpath(os.path.join(place, name), folder_path)
            for place, _, names in os.walk(folder_path)
            for name in names
        ]
        kept = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        uploads.append((repo_id, set(kept), options))

    class Address(str):
        repo_id = "me/model"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: Address("https://hub/me/model"))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    return uploads


def test_push_is_one_commit_without_checkpoints(hub, tmp_path):
    bnn = bayesify(plain(), members=2)
    bnn.save_pretrained(tmp_path)
    for name in ("checkpoint/model.safetensors", "checkpoint/checkpoint.json", ".checkpoint.old/a.json", "log.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name in ("report.json", "report.md", "reliability.png"):
        (tmp_path / name).write_text("{}")
    assert push_folder(tmp_path, "me/model", message="First") == "https://hub/me/model"
    ((repo, files, options),) = hub
    assert repo == "me/model"
    assert files == {CONFIG, WEIGHTS, "README.md", "report.json", "report.md", "reliability.png"}
    assert options == {"commit_message": "First"}


def test_push_refuses_what_others_cannot_use(hub, saved, tmp_path):
    bnn, _, _ = saved
    bnn.save_pretrained(tmp_path / "out")
    with pytest.raises(BayesifyError, match="save it with full weights"):
        push_folder(tmp_path / "out", "me/model")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(BayesifyError, match="save it with full weights"):
        push_folder(tmp_path / "out", "me/model")
    with pytest.raises(FormatError, match="not found"):
        push_folder(tmp_path, "me/model")
    assert hub == []
    assert bnn.push_to_hub("me/model") == push_to_hub(bnn, "me/model")
    assert [files for _, files, _ in hub] == [{CONFIG, WEIGHTS, "README.md"}] * 2


def test_a_refusal_of_the_hub_is_one_error(monkeypatch, tmp_path):
    bayesify(plain(), members=2).save_pretrained(tmp_path)

    def create_repo(*args, **options):
        raise RuntimeError("401\n  unauthorized")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    with pytest.raises(BayesifyError, match="me/model could not be uploaded: 401 unauthorized"):
        push_folder(tmp_path, "me/model")
