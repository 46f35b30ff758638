import csv
import json
import math
import statistics
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scripts import INTEGRATIONS, ROOT, read_log, run_script
from torch import nn

from bayesify import bayesify
from bayesify.errors import DataError

SCRIPTS = INTEGRATIONS / "mimic3"
sys.path[:0] = [str(SCRIPTS), str(ROOT / "benchmarks" / "quality")]

import records  # noqa: E402
import sources  # noqa: E402
from mean_field import MeanField  # noqa: E402
from network import MortalityLSTM  # noqa: E402

# ------------------------------------------------------------------------------------------------ generated files


def physionet_rows(letter, patients=15):
    """[(patient, minutes, parameter, value)], in no order of time, and {patient: label}."""
    rng = np.random.default_rng(ord(letter))
    first = 1000 * ord(letter)
    rows, labels = [], {}
    for patient in range(first, first + patients):
        labels[patient] = int(patient % 3 == 0)
        descriptors = {
            "Age": 40 + patient % 50,
            "Gender": patient % 2,
            "Height": -1,
            "Weight": -1 if patient % 4 else 80,
        }
        rows += [(patient, 0, name, float(value)) for name, value in descriptors.items()]
        rows.append((patient, 0, "ICUType", float(patient % 3 + 1)))
        for name, level in (("HR", 80), ("Temp", 37), ("pH", 7.4)):
            for minutes in rng.choice([0, 30, 59, 60, 61, 600, 1439, 2879, 2880], 5):
                rows.append((patient, int(minutes), name, float(np.float32(level * rng.uniform(0.9, 1.1)))))
        if patient % 2:
            rows.append((patient, 700, "MechVent", 1.0))
    rows.append((first, 300, "pH", 735.0))
    return rows, labels


def write_physionet(folder, sets):
    folder.mkdir(exist_ok=True)
    for letter, (rows, labels) in sets.items():
        columns = list(zip(*rows, strict=True))
        types = {"record_id": pa.int32(), "minutes": pa.int32(), "parameter": pa.string(), "value": pa.float32()}
        table = {name: pa.array(c, type=t) for (name, t), c in zip(types.items(), columns, strict=True)}
        pq.write_table(pa.table(table), folder / f"set-{letter}.parquet")
        outcomes = {"record_id": list(labels), "in_hospital_death": list(labels.values())}
        pq.write_table(pa.table(outcomes), folder / f"outcomes-{letter}.parquet")
    return folder


EYES = {"4 Spontaneously": 4.0, "Spontaneously": 4.0, "To Pain": 2.0, "2 To pain": 2.0, "None": 1.0}
WORDS = {"1.0 ET/Trach": 1.0, "No Response-ETT": 1.0, "5 Oriented": 5.0, "Oriented": 5.0, "Confused": 4.0}
TEXTS = {"Glascow coma scale eye opening": EYES, "Glascow coma scale verbal response": WORDS}
NUMBERS = {"Heart Rate": 80.0, "pH": 7.4, "Glucose": 120.0}
HEADER = ["Hours", *sources.MIMIC3_VARIABLES]


def mimic3_stays(first, patients, stays=2):
    """{stay: [{"Hours": …, variable: text}]} and {stay: label}."""
    rng = np.random.default_rng(first)
    files, labels = {}, {}
    for patient in range(first, first + patients):
        for number in range(1, stays + 1):
            stay = f"{patient}_episode{number}_timeseries.csv"
            labels[stay] = int(patient % 3 == 0)
            rows = []
            for hours in sorted(
                rng.choice([-2.0, 0.0, 0.5, 0.9, 1.0, 7.25, 30.0, 47.99, 48.0, 50.0], 6, replace=False)
            ):
                row = {"Hours": hours}
                row |= {n: f"{level * rng.uniform(0.9, 1.1):.4f}" for n, level in NUMBERS.items() if rng.random() < 0.6}
                row |= {name: str(rng.choice(list(texts))) for name, texts in TEXTS.items() if rng.random() < 0.6}
                if rng.random() < 0.5:
                    row["Glascow coma scale total"] = str(rng.integers(13, 16))
                rows.append(row)
            files[stay] = rows
    return files, labels


def write_list(path, labels):
    path.write_text("stay,y_true\n" + "".join(f"{stay},{label}\n" for stay, label in labels.items()))


def write_mimic3(folder, train, test):
    for split, (files, labels) in {"train": train, "test": test}.items():
        (folder / split).mkdir(parents=True)
        write_list(folder / split / "listfile.csv", labels)
        for stay, rows in files.items():
            with (folder / split / stay).open("w", newline="") as file:
                writer = csv.DictWriter(file, HEADER)
                writer.writeheader()
                writer.writerows(rows)
    return folder


# ------------------------------------------------------------------------------------------------ the slow way


def slow_grid(measurements):
    """{(hour, variable): value} of one stay's [(hours, variable, value)]."""
    cells = {}
    for hours, name, value in sorted(measurements, key=lambda m: m[0]):
        if 0 <= hours <= 48:
            cells[min(int(hours), 47), name] = value
    return cells


def slow_quantile(values, q):
    values = sorted(values)
    place = q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def slow_features(stays, training, variables, categorical):
    """Feature rows [48][F] of every stay, one loop at a time; `training` names the stays that statistics come from."""
    grids = {stay: slow_grid(measurements) for stay, measurements in stays.items()}
    statistic, categories = {}, {}
    for name in variables:
        seen = [value for stay in training for (_, n), value in grids[stay].items() if n == name]
        if name in categorical:
            categories[name] = sorted(set(seen))
        elif seen:
            low, high = slow_quantile(seen, 0.001), slow_quantile(seen, 0.999)
            clipped = [min(max(value, low), high) for value in seen]
            statistic[name] = low, high, statistics.fmean(clipped), statistics.pstdev(clipped) or 1.0
    features = {}
    for stay, grid in grids.items():
        rows = []
        latest = {}
        for hour in range(48):
            latest |= {name: value for (h, name), value in grid.items() if h == hour}
            row = []
            for name in variables:
                if name not in categorical:
                    low, high, mean, std = statistic.get(name, (0.0, 0.0, 0.0, 1.0))
                    row.append((min(max(latest[name], low), high) - mean) / std if name in latest else 0.0)
            for name in variables:
                row += [float(latest.get(name) == value) for value in categories.get(name, [])]
            row += [float((hour, name) in grid) for name in variables]
            rows.append(row)
        features[stay] = rows
    return features


def slow_physionet(rows):
    stays = {}
    for patient, minutes, name, value in rows:
        measured = not (value == -1 and name in sources.PHYSIONET_DESCRIPTORS)
        stays.setdefault(str(patient), []).extend([(minutes / 60, name, value)] if measured else [])
    return stays


def slow_mimic3(files):
    """The same of text: one row holds several variables."""
    return {
        stay: [
            (row["Hours"], name, TEXTS[name][text] if name in TEXTS else float(text))
            for row in rows
            for name, text in row.items()
            if name != "Hours"
        ]
        for stay, rows in files.items()
    }


# ------------------------------------------------------------------------------------------------ reading


def test_physionet_features_are_those_of_a_loop(tmp_path):
    sets = {letter: physionet_rows(letter) for letter in "ab"}
    episodes = records.load(write_physionet(tmp_path, sets))
    stays = {**slow_physionet(sets["a"][0]), **slow_physionet(sets["b"][0])}
    expected = slow_features(
        stays, episodes["train"].patients, sources.PHYSIONET_VARIABLES, sources.PHYSIONET_CATEGORICAL
    )
    labels = {str(patient): label for _, of_set in sets.values() for patient, label in of_set.items()}
    for part in episodes.values():
        assert part.labels.tolist() == [labels[patient] for patient in part.patients]
        np.testing.assert_allclose(part.features, [expected[patient] for patient in part.patients], rtol=0, atol=2e-4)
    assert set(episodes["test"].patients) == {str(patient) for patient in sets["b"][1]}
    train = episodes["train"]
    height = train.names.index("Height")
    assert not train.features[..., [height, train.names.index("Height measured")]].any()  # −1 is unknown
    ventilated = train.features[:, :, train.names.index("MechVent=1")]
    odd = [row for row, patient in enumerate(train.patients) if int(patient) % 2]
    assert ventilated[odd].sum(1).tolist() == [48 - 11] * len(odd)  # from minute 700 on


def test_mimic3_features_are_those_of_a_loop(tmp_path):
    train, test = mimic3_stays(100, 12), mimic3_stays(200, 5, stays=1)
    folder = write_mimic3(tmp_path, train, test)
    validating = [stay for stay in train[1] if stay.startswith(("103", "107"))]
    write_list(folder / "val_listfile.csv", {stay: train[1][stay] for stay in validating})
    training = {stay: label for stay, label in train[1].items() if stay not in validating}
    write_list(folder / "train_listfile.csv", training)
    episodes = records.load(folder)
    expected = slow_features(
        slow_mimic3({**train[0], **test[0]}), list(training), sources.MIMIC3_VARIABLES, sources.MIMIC3_CATEGORICAL
    )
    for split, stays in {"train": training, "validation": validating, "test": test[1]}.items():
        part = episodes[split]
        assert part.patients == [stay.split("_")[0] for stay in stays]
        np.testing.assert_allclose(part.features, [expected[stay] for stay in stays], rtol=0, atol=2e-4)
        assert part.labels.tolist() == [{**train[1], **test[1]}[stay] for stay in stays]
    eyes = [name for name in episodes["train"].names if name.startswith("Glascow coma scale eye opening=")]
    assert eyes == [f"Glascow coma scale eye opening={score}" for score in (1, 2, 4)]  # words and numbers are one


def test_test_data_do_not_change_the_others(tmp_path):
    sets = {letter: physionet_rows(letter) for letter in "ab"}
    before = records.load(write_physionet(tmp_path / "before", sets))
    rows = [(p, m, name, 4.0 if name == "ICUType" else 100 * value) for p, m, name, value in sets["b"][0]]
    after = records.load(write_physionet(tmp_path / "after", {**sets, "b": (rows, sets["b"][1])}))
    assert "ICUType=4" not in after["test"].names
    for split in ("train", "validation"):
        assert torch.equal(before[split].features, after[split].features)
    assert not torch.equal(before["test"].features, after["test"].features)
    largest = max(part.features.max() for part in (after["train"], after["validation"]))
    assert after["test"].features.max() <= largest  # clipped to what training knows


def test_no_patient_is_in_two_splits_and_deaths_are_shared(tmp_path):
    train, test = mimic3_stays(100, 30, stays=3), mimic3_stays(200, 3)
    folder = write_mimic3(tmp_path, train, test)
    first, again, other = (records.load(folder, seed=seed) for seed in (0, 0, 1))
    patients = {split: set(part.patients) for split, part in first.items()}
    assert {split: len(names) for split, names in patients.items()} == {"train": 24, "validation": 6, "test": 3}
    assert len(set.union(*patients.values())) == 33
    assert len(first["train"]) == 72  # every stay of a patient goes with the patient
    died = {patient for patient, label in zip(first["validation"].patients, first["validation"].labels) if label}  # noqa: B905
    assert len(died) == 2
    assert again["validation"].patients == first["validation"].patients != other["validation"].patients


# ------------------------------------------------------------------------------------------------ errors


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "train" / "listfile.csv").unlink(), r"train/listfile.csv: not found; expected a CSV"),
        (lambda f: edit(f / "test" / "listfile.csv", "y_true", "label"), r"test/listfile.csv: has no column 'y_true'"),
        (
            lambda f: edit(
                f / "train" / "listfile.csv", "100_episode2_timeseries.csv,0", "100_episode2_timeseries.csv,2"
            ),
            r"train/listfile.csv, line 3: the label is '2'; expected 0",
        ),
        (
            lambda f: (f / "train" / "101_episode1_timeseries.csv").unlink(),
            r"listfile.csv, line 4: names the stay '101_episode1_timeseries.csv'; expected a file",
        ),
        (
            lambda f: edit(f / "train" / "101_episode1_timeseries.csv", "Heart Rate", "Pulse"),
            r"101_episode1_timeseries.csv: has no column 'Heart Rate'",
        ),
        (
            lambda f: (f / "test" / "200_episode1_timeseries.csv").write_text(
                ",".join(HEADER) + "\n0.5" + "," * 17 + "\n1.5,,fast" + "," * 15 + "\n"
            ),
            r"200_episode1_timeseries.csv, line 3: Diastolic blood pressure is 'fast'; expected a number",
        ),
        (
            lambda f: (f / "test" / "200_episode1_timeseries.csv").write_text(
                ",".join(HEADER) + "\n0.5,,,,Dozing" + "," * 13 + "\n"
            ),
            r"200_episode1_timeseries.csv, line 2: Glascow coma scale eye opening is 'Dozing'; expected .*'to pain'",
        ),
        (
            lambda f: [
                write_list(f / name, {f"{patient}_episode1_timeseries.csv": 0 for patient in patients})
                for name, patients in {"train_listfile.csv": (100, 101), "val_listfile.csv": (101, 102)}.items()
            ],
            r"patient 101 is in both the train and the validation split",
        ),
        (lambda f: write_list(f / "test" / "listfile.csv", {}), r"test/listfile.csv: lists no stay"),
    ],
)
def test_mimic3_errors_name_file_and_row(tmp_path, break_it, message):
    folder = write_mimic3(tmp_path, mimic3_stays(100, 6), mimic3_stays(200, 2))
    break_it(folder)
    with pytest.raises(DataError, match=message):
        records.load(folder)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f, s: (f / "set-b.parquet").unlink(), r"set-b.parquet: not found; expected a Parquet file"),
        (lambda f, s: (f / "set-a.parquet").write_bytes(b"PAR1"), r"set-a.parquet: cannot be read as Parquet"),
        (
            lambda f, s: pq.write_table(pa.table({"record_id": [1]}), f / "outcomes-a.parquet"),
            r"outcomes-a.parquet: has no column 'in_hospital_death'",
        ),
        (
            lambda f, s: write_physionet(f, {"a": (s["a"][0], {**s["a"][1], 97001: -1})}),
            r"outcomes-a.parquet, row 1: the label is -1; expected 0",
        ),
        (
            lambda f, s: write_physionet(f, {"a": ([*s["a"][0], (5, 0, "HR", 80.0)], s["a"][1])}),
            r"set-a.parquet, row \d+: patient 5 is not in outcomes-a.parquet",
        ),
        (
            lambda f, s: write_physionet(f, {"a": ([(97000, 0, "Pulse", 80.0), *s["a"][0]], s["a"][1])}),
            r"set-a.parquet, row 0: parameter 'Pulse' is unknown; expected one of Age",
        ),
        (lambda f, s: write_physionet(f, {"b": s["a"]}), r"patient 97\d+ is in both the \w+ and the test split"),
        (lambda f, s: [path.unlink() for path in f.iterdir()], r"found neither test/listfile.csv .* nor outcomes-a"),
    ],
)
def test_physionet_errors_name_file_and_row(tmp_path, break_it, message):
    sets = {letter: physionet_rows(letter) for letter in "ab"}
    break_it(write_physionet(tmp_path, sets), sets)
    with pytest.raises(DataError, match=message):
        records.load(tmp_path)


def test_repeated_outcome_is_an_error(tmp_path):
    write_physionet(tmp_path, {letter: physionet_rows(letter) for letter in "ab"})
    pq.write_table(pa.table({"record_id": [7, 8, 7], "in_hospital_death": [0, 1, 1]}), tmp_path / "outcomes-b.parquet")
    with pytest.raises(DataError, match=r"outcomes-b.parquet: patient 7 has more than one row"):
        records.load(tmp_path)


# ------------------------------------------------------------------------------------------------ networks


def test_lstm_starts_as_published():
    network = MortalityLSTM(10, hidden=16)
    bias = network.lstm.bias_ih_l0 + network.lstm.bias_hh_l0
    assert bias.tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 32
    recurrent = network.lstm.weight_hh_l0
    torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(16))
    assert network.lstm.weight_ih_l0.abs().max() <= math.sqrt(6 / (64 + 10))
    x = torch.randn(3, 48, 10)
    earlier = torch.cat([x[:, :-1], x[:, -1:] + 1], 1)
    assert (network(x) != network(earlier)).all()  # the last hour is seen
    bnn = bayesify(network, members=3, member_bias=True)
    for member in range(3):
        lstm = bnn.merge(member).lstm
        assert torch.equal(lstm.bias_ih_l0 + lstm.bias_hh_l0, bias)


def test_mean_field_is_exact():
    network = MortalityLSTM(4, hidden=3)
    model = MeanField(network, prior_scale=0.5, spread=0.2)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(model.mu, nn.functional.softplus(model.rho)), normal(torch.zeros_like(model.mu), 0.5)
    ).sum()
    torch.testing.assert_close(model.kl(), expected)

    x = torch.randn(5, 48, 4)
    prediction = model.predict(x, samples=3, seed=1)
    generator = torch.Generator().manual_seed(1)
    plain = MortalityLSTM(4, hidden=3).eval()
    for sample in range(3):
        noise = torch.randn(model.mu.shape, generator=generator)
        weights = model.mu + nn.functional.softplus(model.rho) * noise
        nn.utils.vector_to_parameters(weights.detach(), plain.parameters())
        torch.testing.assert_close(prediction.outputs[0, sample], plain(x).detach())
    model(x).square().sum().backward()
    assert (model.mu.grad != 0).float().mean() > 0.9
    assert (model.rho.grad != 0).float().mean() > 0.9


# ------------------------------------------------------------------------------------------------ end to end


@pytest.fixture
def small_data(tmp_path):
    return write_physionet(tmp_path / "data", {letter: physionet_rows(letter, patients=30) for letter in "ab"})


def test_script_trains_both_networks(small_data, tmp_path):
    output = tmp_path / "output"
    options = ["--steps", "4", "--batch-size", "8", "--hidden", "4", "--members", "2", "--samples", "2"]
    printed = run_script(SCRIPTS, small_data, "--output", output, *options)
    assert "train: 24 stays, 33.3 % died" in printed
    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["deterministic", "rank-1 normal"]
    for row in results.values():
        for split in ("validation", "test"):
            assert 0.3 < row[split]["nll"] < 1.5
            assert 0 < row[split]["auc_pr"] <= 1
            assert 0 <= row[split]["ece"] <= 1
    rows = read_log(output / "bayesian")
    assert rows[-1]["step"] == 4
    assert sum("validation_nll" in row for row in rows) == 2  # 24 stays are 3 batches of 8


def test_benchmark_makes_each_run_once(small_data, tmp_path):
    import physionet2012 as benchmark

    options = {"epochs": 1, "hidden": 4, "batch_size": 8, "members": 2, "samples": 2}
    call = {"data": small_data, "output": tmp_path / "out", "methods": "deterministic,ensemble,mean-field,rank1-normal"}
    benchmark.main(**call, seeds=1, **options, search_first=False)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    assert len(files) == 5 + 2  # the deterministic row is one of the ensemble's five
    benchmark.main(**call, seeds=2, **options, search_first=False)
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2 * 7

    table = json.loads((tmp_path / "out" / "table.json").read_text())["methods"]
    odds = [json.loads(path.read_text())["test"]["log_odds"] for path in files if path.name.startswith("deterministic")]
    labels = torch.tensor(list(physionet_rows("b", patients=30)[1].values()))
    probability = torch.tensor(odds).double().sigmoid().mean(0)
    nll = nn.functional.binary_cross_entropy(probability, labels.double())
    assert table["ensemble"]["by_seed"]["test"][0]["nll"] == pytest.approx(float(nll), abs=1e-5)
    both = [score["nll"] for score in table["mean-field"]["by_seed"]["test"]]
    found = table["mean-field"]["test"]["nll"]
    assert found["mean"] == pytest.approx(sum(both) / 2)
    assert found["standard_error"] == pytest.approx(abs(both[0] - both[1]) / 2)
    assert "| Rank-1 Gaussian |" in (tmp_path / "out" / "table.md").read_text()


def test_set_a_of_physionet_2012(data_dir):
    folder = data_dir / "physionet2012"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    episodes = records.load(folder)
    training = [episodes["train"], episodes["validation"]]
    assert sum(len(part) for part in training) == len(episodes["test"]) == 4000
    assert [int(part.labels.sum()) for part in episodes.values()] == [443, 111, 568]
    values = episodes["train"].features[..., episodes["train"].names.index("HR")]
    assert abs(values.mean()) < 0.1  # filled forward, so near the mean of the measured hours
    assert values.abs().max() < 6
