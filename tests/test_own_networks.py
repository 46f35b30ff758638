"""Networks of one's own, with recurrent layers, labels and batches as people write them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import IterableDataset, TensorDataset

from bayesify import ELBO, BayesianModel, FineTuneConfig, FineTuner, bayesify, evaluate
from bayesify.errors import ConfigError, DataError, RowsError, TrainingError

PATIENTS, HOURS, CHANNELS = 6, 7, 5
LENGTHS = torch.tensor([3, 7, 2, 5, 5, 1])


class Records(nn.Module):
    """The last state of an LSTM, read by a head."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(CHANNELS, 8, batch_first=True)
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.rnn(x)[1][0][-1])


class Packed(Records):
    enforce_sorted = False

    def forward(self, x: Tensor, lengths: Any) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.enforce_sorted)
        return self.head(self.rnn(packed)[1][0][-1])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(PATIENTS, HOURS, CHANNELS, generator=torch.Generator().manual_seed(1))


def by_hand(bnn: BayesianModel, *inputs: Any) -> Tensor:
    """[K, B, C], member by member on plain networks."""
    return torch.stack([bnn.merge(k)(*inputs) for k in range(bnn.members)])


# ------------------------------------------------------------------------------------------------ one logit


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("flat", [False, True], ids=["B1", "B"])
def test_one_logit_against_labels_of_any_shape(x: Tensor, column: bool, flat: bool) -> None:
    class Flat(Records):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze(1)

    bnn = bayesify((Flat if flat else Records)(1), members=2, task="multilabel", init_scale=0.5)
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    given = labels[:, None] if column else labels
    outputs = bnn.train()(x)
    expected = F.binary_cross_entropy_with_logits(outputs.flatten(), labels.repeat(2))
    torch.testing.assert_close(ELBO(bnn, 100)(outputs, given).nll, expected)
    predictive = bnn.eval().predict(x)
    mixed = F.binary_cross_entropy(predictive.member_probs.mean((0, 1)).flatten(), labels)
    torch.testing.assert_close(predictive.nll(given), mixed)
    metrics = evaluate(bnn, [(x, given)], progress=False).metrics["bayesian"]
    assert metrics["nll"] == pytest.approx(float(mixed), abs=1e-5)


def test_classes_are_not_taken_for_values(x: Tensor) -> None:
    labels = torch.tensor([1, 0, 0, 1, 0, 0])
    bnn = bayesify(Records(1), members=2)
    data = TensorDataset(x, labels)
    with pytest.raises(DataError, match="Give the task: 'multilabel'"):
        FineTuner(bnn, data, config=FineTuneConfig(epochs=1), progress=False).fit()
    with pytest.raises(DataError, match="task='multilabel' if it is the logit"):
        FineTuner(Records(1), data, config=FineTuneConfig(epochs=1), progress=False).fit()
    with pytest.raises(DataError, match="task='multilabel' if it is the logit"):
        evaluate(Records(1), [(x, labels)], progress=False)
    with pytest.raises(ConfigError, match="task= is for plain networks"):
        FineTuner(bnn, data, task="multilabel")
    with pytest.raises(ConfigError, match="unknown"):
        FineTuner(Records(1), data, task="binary")  # type: ignore[arg-type]


def test_a_plain_network_has_the_task_that_is_given(x: Tensor) -> None:
    labels = torch.tensor([1, 0, 0, 1, 0, 0])
    network = Records(1)
    expected = F.binary_cross_entropy_with_logits(network(x)[:, 0], labels.float()).detach()
    metrics = evaluate(network, [(x, labels)], progress=False, task="multilabel").metrics["bayesian"]
    assert metrics["nll"] == pytest.approx(float(expected), abs=1e-5)
    data = TensorDataset(x, labels)
    options = FineTuneConfig(epochs=1, batch_size=PATIENTS, log_every=1)
    history = FineTuner(network, data, data, options, task="multilabel", progress=False).fit().history
    assert history[0]["nll"] == pytest.approx(float(expected), abs=1e-5)


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_mappings_train_as_tuples_do(x: Tensor, task: Any) -> None:
    labels = torch.rand(PATIENTS, 3, generator=torch.Generator().manual_seed(2)).round()
    pairs = list(zip(x, labels, strict=True))
    mappings = [{"x": a, "labels": b} for a, b in pairs]
    found = []
    for data in (pairs, mappings):
        bnn = bayesify(Records(3), members=2, task=task)
        fit = FineTuner(bnn, data, data, FineTuneConfig(epochs=2, batch_size=3), progress=False).fit()  # type: ignore[arg-type]
        found.append([{k: v for k, v in row.items() if k != "seconds"} for row in fit.history])
    assert found[0] == found[1]


def test_a_loss_in_a_mapping(x: Tensor) -> None:
    class WithLoss(Records):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = super().forward(x)
            return {"loss": F.mse_loss(logits, labels), "logits": logits}

    data = [{"x": a, "labels": torch.ones(2)} for a in x]
    expected = F.mse_loss(Records()(x), torch.ones(PATIENTS, 2)).detach()
    bnn = bayesify(WithLoss(), members=2, init="ones", posterior="deterministic")
    options = FineTuneConfig(epochs=1, batch_size=PATIENTS, log_every=1)
    row = FineTuner(bnn, data, data, options, progress=False).fit().history[0]  # type: ignore[arg-type]
    assert row["nll"] == pytest.approx(float(expected), abs=1e-5)


def test_data_of_the_wrong_kind(x: Tensor) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from zip(x, torch.zeros(PATIENTS), strict=True)

    data = TensorDataset(x, torch.zeros(PATIENTS, dtype=torch.long))
    bnn = bayesify(Records(), members=2)
    for pair in ((Stream(), None), (data, Stream())):
        with pytest.raises(DataError, match="map-style data set, with len"):
            FineTuner(bnn, *pair)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected batches, such as a DataLoader; found TensorDataset"):
        evaluate(bnn, data, progress=False)


def test_nan_is_named_where_it_is(x: Tensor) -> None:
    labels = torch.zeros(PATIENTS, dtype=torch.long)
    holed = x.clone()
    holed[2, 1, 0] = math.nan
    good, bad = TensorDataset(x, labels), TensorDataset(holed, labels)
    options = FineTuneConfig(epochs=1, batch_size=3)
    with pytest.raises(DataError, match=r"validation batch holds NaN.*\(3, 7, 5\)"):
        FineTuner(bayesify(Records(), members=2), good, bad, options, progress=False).fit()
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d .*Its batch holds NaN"):
        FineTuner(bayesify(Records(), members=2), bad, good, options, progress=False).fit()
    with pytest.raises(DataError, match="outputs hold NaN"):
        bayesify(Records(), members=2, init="ones").fit_spread([(holed, labels)])


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("kind", [list, np.asarray, torch.as_tensor])
def test_lengths_of_any_kind(x: Tensor, kind: Any) -> None:
    bnn = bayesify(Packed(), members=3, init_scale=0.5).eval()
    lengths = kind(LENGTHS.tolist())
    expected = by_hand(bnn, x, LENGTHS)
    torch.testing.assert_close(bnn.predict(x, lengths).outputs[:, 0], expected)
    torch.testing.assert_close(bnn(x, lengths), expected.softmax(-1).mean(0).log())


class PackedData(Packed):
    """A layer on the data of a packed sequence, whose rows lie hour by hour."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, lengths: Any) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed = packed._replace(data=self.embed(packed.data).relu())
        return self.head(self.rnn(packed)[1][0][-1])


class HourMajor(Records):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, lengths: Any) -> Tensor:
        rows = self.embed(x.transpose(0, 1).reshape(-1, CHANNELS)).relu()
        return super().forward(rows.view(x.shape[1], x.shape[0], CHANNELS).transpose(0, 1))


class HoursFirst(Records):
    """Of [time, batch, channels], by the defaults of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(CHANNELS, 8)


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize("shape", [(HOURS, PATIENTS), (PATIENTS, HOURS), (9, 8), (9, 9)])
def test_hours_before_patients_are_refused(shape: tuple[int, int], members: int) -> None:
    bnn = bayesify(HoursFirst().eval(), members=members, init_scale=0.5)
    for call in (bnn.predict, bnn, bnn.train()):
        with pytest.raises(RowsError):
            call(torch.randn(*shape, CHANNELS))


class SortedByHand(Records):
    def forward(self, x: Tensor, lengths: Any) -> Tensor:
        lengths, order = lengths.sort(descending=True)
        packed = pack_padded_sequence(x[order], lengths, batch_first=True)
        return self.head(self.rnn(packed)[1][0][-1][order.argsort()])


def test_sorted_rows_are_seen_after_a_first_call_of_one_example(x: Tensor) -> None:
    bnn = bayesify(SortedByHand().eval(), members=3, init_scale=0.5)
    alone = bnn.predict(x[:1], LENGTHS[:1]).outputs
    for k in range(3):
        torch.testing.assert_close(alone[k, 0], bnn.merge(k)(x[:1], LENGTHS[:1]))
    for _ in range(2):
        with pytest.raises(RowsError, match=r"members are mixed in 'rnn'.*or was sorted"):
            bnn.predict(x, LENGTHS)


@pytest.mark.parametrize("network", [PackedData, HourMajor])
def test_rows_that_are_not_member_by_member_are_refused(x: Tensor, network: Any) -> None:
    bnn = bayesify(network(), members=3, init_scale=0.5, noise="member").eval()
    for call in (bnn.predict, bnn, bnn.train()):
        with pytest.raises(RowsError, match=r"members are mixed in 'embed'.*exclude="):
            call(x, LENGTHS)
    data = [((a, length), 0) for a, length in zip(x, LENGTHS, strict=True)]
    with pytest.raises(RowsError, match="members are mixed in 'embed'"):
        FineTuner(
            bnn,
            data,  # type: ignore[arg-type]
            config=FineTuneConfig(epochs=1),
            collate_fn=lambda rows: (torch.stack([a for (a, _), _ in rows]), torch.stack([n for (_, n), _ in rows]),
                                     torch.tensor([label for _, label in rows])),
            progress=False,
        ).fit()  # fmt: skip
    apart = bayesify(network(), members=3, init_scale=0.5, noise="member", exclude="embed").eval()
    torch.testing.assert_close(apart.predict(x, LENGTHS).outputs[:, 0], by_hand(apart, x, LENGTHS))


def test_a_table_that_is_the_same_for_all(x: Tensor) -> None:
    class WithTable(Records):
        def __init__(self) -> None:
            super().__init__()
            self.reader = nn.GRU(4, 8, batch_first=True)
            self.register_buffer("table", torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(3)))

        def forward(self, x: Tensor) -> Tensor:
            described = self.reader(self.table)[1][-1].mean(0)
            return self.head(self.rnn(x)[1][0][-1] + described)

    bnn = bayesify(WithTable(), members=3, init_scale=0.5).eval()
    outputs = bnn.predict(x).outputs[:, 0]
    assert "same for every example" in next(v for name, v in bnn.report.skipped.items() if name.startswith("reader"))
    torch.testing.assert_close(outputs, by_hand(bnn, x))


def test_a_recurrent_layer_that_is_called_for_each_patient(x: Tensor) -> None:
    class OneByOne(Records):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            states = [self.rnn(x[i : i + 1, :length])[1][0][-1, 0] for i, length in enumerate(lengths.tolist())]
            return self.head(torch.stack(states))

    for inputs in (None, (x, LENGTHS)):
        bnn = bayesify(OneByOne(), members=3, init_scale=0.5, example_inputs=inputs).eval()
        outputs = bnn.predict(x, LENGTHS).outputs[:, 0]
        assert any("anew for every example" in reason for reason in bnn.report.skipped.values())
        assert {name for name, _, _ in bnn.factors()} == {"head"}
        torch.testing.assert_close(outputs, by_hand(bnn, x, LENGTHS))


def test_what_cannot_be_repeated_is_explained(x: Tensor) -> None:
    class Sorted(Packed):
        enforce_sorted = True

    class Stateful(Records):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.head(self.rnn(x, (h, h))[1][0][-1])

    lengths = LENGTHS.sort(descending=True).values
    bnn = bayesify(Sorted(), members=3)
    for model in (bnn.train(), bnn.eval()):
        with pytest.raises(DataError, match="enforce_sorted=False"):
            model(x, lengths)
    stateful = bayesify(Stateful(), members=3)
    for model in (stateful.train(), stateful.eval()):
        with pytest.raises(DataError, match=r"\[layers, \d+ rows, features\]; found \(1, 6, 8\)"):
            model(x, torch.zeros(1, PATIENTS, 8))


# ------------------------------------------------------------------------------------------------ outputs


class Several(Records):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.days = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Any:
        h = self.rnn(x)[1][0]
        death, days = self.head(h[-1]), self.days(h[-1])
        return {"tuple": (death, days, h), "mapping": {"death": death, "days": days, "state": h}}[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
def test_several_outputs(x: Tensor, kind: str) -> None:
    """The first is what predictions are made of; all others are averaged over members."""
    bnn = bayesify(Several(kind), members=3, init_scale=0.5).eval()
    bnn.temperature = 2.0
    members = [bnn.merge(k)(x) for k in range(3)]
    parts = [list(m.values()) if kind == "mapping" else list(m) for m in members]
    death, days, states = (torch.stack([part[i] for part in parts]) for i in range(3))
    expected = [(death / 2).softmax(-1).mean(0).log(), days.mean(0), states.mean(0)]
    for model in (bnn, bnn.fuse(example_inputs=(x,))):
        found = model(x)
        found = list(found.values()) if kind == "mapping" else list(found)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bnn.predict(x).log_probs, expected[0], atol=1e-5, rtol=1e-5)
