"""The experiment: it learns, it compares fairly, and its table says what its models do."""

import copy
import math
import os
import timeit
from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import tqdm
from sklearn.datasets import load_digits
from test_pruning import pruned_by_hand

import NNI_Pruning as script
from conftest import (
    QUICK,
    SCRIPT,
    SHORT,
    accuracy_of,
    read_mnist,
    run_python,
    saved_weights,
    table_of,
    wrong_images,
)


def new_model(seed, widths=script.WIDTHS):
    torch.manual_seed(seed)
    return script.CNN(widths)


NAMES = ["baseline"]
NAMES += [f"{pruner}_{sparsity}" for pruner, sparsity in product(script.PRUNERS, script.SPARSITIES)]


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The real script as a process, on a subset of MNIST-format files."""
    options = "--subset 1800 --epochs 2 --batch-size 64 --seed 3".split()
    folder = tmp_path_factory.mktemp("run")
    backend = "module://matplotlib_inline.backend_inline"  # what Jupyter hands to a `!python`
    process = run_python(folder, SCRIPT, "--data-dir", data_dir, *options, MPLBACKEND=backend)
    assert process.returncode == 0, process.stderr
    _, training_labels, images, labels = read_mnist(data_dir)
    generator = torch.Generator().manual_seed(0)
    # The script draws the training images first, from the same generator.
    chosen = torch.randperm(len(training_labels), generator=generator)[:1800]
    kept = torch.randperm(len(labels), generator=generator)[:300]
    return SimpleNamespace(
        process=process,
        folder=folder / "checkpoints",
        data=f"MNIST ({len(chosen):,} training and {len(kept)} test images)",
        test=(images[kept], labels[kept]),
    )


def rows_in(folder):
    """The rows of results.csv, as they stand there."""
    return pd.read_csv(folder / "results.csv", dtype=str, na_filter=False).to_dict("records")


def test_table_files_and_models_agree_with_the_tests_own_count(finished):
    lines = rows_in(finished.folder)
    table = table_of(finished.process.stdout)
    assert list(table) == NAMES
    baseline = saved_weights(finished.folder / "baseline.pth")
    for name, line in zip(NAMES, lines, strict=True):
        path = finished.folder / f"{name}.pth"
        row = torch.load(path, weights_only=True)
        weights = row.pop("state_dict")
        assert [*line.items()] == [(key, str(row.get(key, ""))) for key in script.COLUMNS]
        wrong = {*map(int, row["wrong"].split())}
        expected, close = wrong_images(weights, *finished.test)
        assert wrong ^ expected <= close
        assert row["accuracy"] == pytest.approx(100 - 100 * len(wrong) / 300)
        # It learns; no pruned model reaches this before fine-tuning.
        assert row["accuracy"] >= (94 if name == "baseline" else 91)
        assert row["accuracy"] > row["accuracy_before"] + 10
        sizes = [parameter.numel() for parameter in script.load_model(path).parameters()]
        assert row["parameters"] == sum(sizes)
        if name == "baseline":
            before = new_model(3).state_dict()
        else:  # pruned from the saved file, and measured before it was trained on
            before, _ = pruned_by_hand(baseline, row["pruner"], row["sparsity"])
            assert not weights["conv1.weight"].equal(before["conv1.weight"])
        assert row["accuracy_before"] == accuracy_of(before, *finished.test)
        cells = [row["accuracy_before"], row["accuracy"]]
        cells = [f"{number:.2f}" for number in cells] + [str(len(wrong)), f"{sum(sizes):,}"]
        assert table[name][:4] == cells


def test_what_a_user_sees(finished):
    process = finished.process
    heading, _, compared, _, note, saved = process.stdout.split("\n\n")
    settings = "2 + 2 epochs; peak rates 0.01 + 0.01; seeds 3"
    assert heading.startswith(f"{finished.data}\n{settings}\ncpu, ")
    assert heading.endswith(f"; torch {torch.__version__}, NNI 3.0")
    pairs = [line.split()[:2] for line in compared.splitlines()[2:]]
    assert [*map(tuple, pairs)] == [*product(NAMES[1:], NAMES[:1]), *zip(NAMES[3:], NAMES[1:])]
    assert "one trained baseline" in note
    assert max(map(len, process.stdout.splitlines())) <= 120
    for noise in ("Traceback", "Warning", "Filter"):  # NNI's chatter is silenced
        assert noise not in process.stderr + process.stdout
    where = f"checkpoints{os.sep}"
    assert saved == f"Saved: {where}results.png\nSaved: {where} (models, results.csv)\n"
    files = [*(f"{name}.pth" for name in NAMES), "results.csv", "results.png"]
    assert sorted(path.name for path in finished.folder.iterdir()) == sorted(files)


def test_the_digits_are_split_at_random():
    _, labels = load_digits(return_X_y=True)
    (images, first), (test_images, last) = script.load_small_digits()
    assert images.shape == (1437, 28, 28)
    assert len(test_images) == 360
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    assert torch.cat((first, last)).equal(torch.tensor(labels)[order])


def test_each_of_several_seeds_is_a_run_of_its_own(call):
    # Also: a row depends on no other, neither of another pruner nor of another seed.
    options = "--dataset digits --subset 300 --epochs 2 --sparsity 0.5 0.5".split()  # taken once
    alone, *_ = call(*options, "--seed", 1, "--pruner", "FPGMPruner", "--checkpoint-dir", "alone")
    both, *_ = call(*options, "--seeds", 0, 1, 0, "--pruner", *script.PRUNERS, "FPGMPruner")
    for row in (*alone, *both):
        del row["training_seconds"], row["inference_us"]
    _, _, _, baseline, _, pruned = both
    assert alone == [baseline, pruned]
    folders = ("alone", "checkpoints/seed_1", "checkpoints")
    same, second, first = (saved_weights(f"{folder}/baseline.pth") for folder in folders)
    assert second["output.weight"].equal(same["output.weight"])
    assert not second["output.weight"].equal(first["output.weight"])


def test_a_given_baseline_is_used_and_not_trained(call, tmp_path):
    (trained, _), *_ = call(*QUICK)
    given = tmp_path / "checkpoints" / "baseline.pth"
    content = given.read_bytes()
    options = "--seed 5 --controls --finetune-epochs 2 --lr 0.02".split()
    (baseline, pruned, *controls), out, _ = call(*SHORT, "--baseline", given, *options)
    assert "\n1 + 2 epochs; peak rates 0.02 + 0.02; seeds 5\n" in out  # not the default's 20
    assert "All these models come from one trained baseline" in out
    assert baseline.pop("inference_us") != trained.pop("inference_us")  # measured anew
    assert baseline == {**trained, "kind": "given", "seed": 5}
    assert (baseline["lr"], pruned["lr"]) == (0.01, 0.02)
    assert pruned["epochs_before"] == 1
    assert "scratch_0.5_3_epochs" in [row["name"] for row in controls]
    before, _ = pruned_by_hand(saved_weights(given), "L1NormPruner", 0.5)
    _, _, test = script.load_data("digits", tmp_path, 200)
    assert pruned["accuracy_before"] == accuracy_of(before, *test)
    assert given.read_bytes() == content


def test_each_training_starts_where_and_is_as_long_and_fast_as_its_row_says(
    call, tmp_path, monkeypatch
):
    _, training, _ = script.load_data("digits", tmp_path, 200)
    train = script.train
    trainings = []

    def train_and_record(model, *data, **settings):
        assert all(map(torch.equal, data, training))
        start = copy.deepcopy(model.state_dict())
        seconds = train(model, *data, **settings)
        trainings.append((start, settings, seconds))
        return seconds

    monkeypatch.setattr(script, "train", train_and_record)
    options = "--epochs 2 --finetune-epochs 1 --finetune-lr 0.002 --controls --seed 3"
    rows, *_ = call(*QUICK, *options.split())
    saved = saved_weights(tmp_path / "checkpoints" / "baseline.pth")
    others = new_model(-4).state_dict()  # of another seed
    pruned, random = (pruned_by_hand(saved, "L1NormPruner", 0.5, by)[0] for by in (saved, others))
    small = new_model(3, (16, 32, 64, 24)).state_dict()
    expected = {  # in this order: initial weights, epochs, epochs before, peak rate
        "baseline": (new_model(3).state_dict(), 2, 0, 0.01),
        "L1NormPruner_0.5": (pruned, 1, 2, 0.002),
        "baseline_1_more_epochs": (saved, 1, 2, 0.002),
        "random_0.5": (random, 1, 2, 0.002),
        "scratch_0.5_3_epochs": (small, 3, 0, 0.01),
        "scratch_0.5_1_epochs": (small, 1, 0, 0.01),
    }
    assert [row["name"] for row in rows] == [*expected]
    for row, (start, settings, seconds) in zip(rows, trainings, strict=True):
        weights, epochs, before, lr = expected[row["name"]]
        wanted = {"epochs": epochs, "epochs_before": before, "batch_size": 64, "seed": 3}
        assert settings == {**wanted, "lr": lr, "title": f"{row['name']}, seed 3"}
        wanted |= {"training_seconds": seconds, "lr": 0.01, "finetune_lr": 0.002}
        assert wanted.items() <= row.items()
        for key, value in start.items():
            # NNI makes BatchNorm anew, with a count of batches of 0.
            assert "num_batches" in key or value.equal(weights[key]), row["name"]


def test_the_lowest_sparsity_removes_a_channel():
    (lowest,) = script.parse_options(["--sparsity", "0.0078125"], False).sparsity
    model = script.prune_cnn(new_model(0).eval(), "L1NormPruner", lowest)
    assert model.widths == (32, 64, 127, 48)


# --------------------------------------------------------------------- devices and threads


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), "cuda", "mps"])
def test_the_defaults_on_the_digits(device, tmp_path):
    try:
        script.select_device(device)
    except script.ExperimentError as error:
        pytest.skip(str(error))
    process = run_python(tmp_path, SCRIPT, "--dataset", "digits", "--device", device)
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr
    assert "NOT MNIST (1,437 training and 360 test images)\n20 + 20 epochs; " in process.stdout
    assert f"; seeds 0\n{device}, " in process.stdout
    _, test = script.load_small_digits()
    folder = tmp_path / "checkpoints"
    for row in rows_in(folder):
        accuracy = float(row["accuracy"])
        assert accuracy >= (97 if row["name"] == "baseline" else 94)
        # Here the CPU computes, and it rounds differently: one of 360 images may change its class.
        wanted = accuracy_of(saved_weights(folder / f"{row['name']}.pth"), *test)
        assert abs(accuracy - wanted.expected) < 0.3


def test_threads_are_no_more_than_the_processors_that_a_container_allows(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    try:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        script.limit_threads()  # the user's own choice, as on a machine with three cores
        assert torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        for before, expected in ((3, 2), (1, 1)):
            torch.set_num_threads(before)
            script.limit_threads()
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------ training, closer


class RecordingModel(torch.nn.Module):
    """A model that is always right, and that records what it is shown."""

    calls = 0  # also those of copies

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(10))
        self.seen = []
        self.corners = []
        self.modes = set()
        self.weights = []
        self.gradients = []

    def forward(self, images):
        pixels = images[:, 0] * script.DEVIATION + script.MEAN
        values = (pixels[:, 14, 14] * 255).round().long()
        self.seen += values.tolist()
        self.corners += (pixels[:, 0, 0] < 0.001).tolist()
        self.modes.add(self.training)
        self.weights.append(self.weight[0].item())
        RecordingModel.calls += 1
        # With these logits, the loss is at its minimum: label smoothing asks for 91 % and 1 %.
        logits = F.one_hot(values % 10, 10) * math.log(91) + self.weight * 0
        if self.training:
            logits.register_hook(self.gradients.append)
        return logits


def test_order_shifts_labels_rates_and_time(monkeypatch):
    # Image n is filled with the value n + 1; outside is black background, so that a shift shows.
    images = torch.arange(1, 41, dtype=torch.uint8)[:, None, None].repeat(1, 28, 28)
    labels = torch.arange(1, 41) % 10
    model = RecordingModel()
    shown = []
    monkeypatch.setattr(tqdm.tqdm, "set_postfix_str", lambda bar, text: shown.append(text))
    monkeypatch.setattr(timeit, "default_timer", lambda: model.calls + 1000 * len(shown))
    # torch's check before each step would start CUDA.
    check = "_accelerator_graph_capture_health_check"
    monkeypatch.setattr(torch.optim.Optimizer, check, None)
    settings = {"lr": 1, "batch_size": 4, "seed": 0}
    seconds = script.train(model, images, labels, epochs=2, **settings)
    # 20 batches, and nothing of what comes before and between the epochs.
    assert seconds == len(model.weights) == 20
    assert model.modes == {True}  # BatchNorm learns in training alone
    assert shown == ["100.00 % of the training images right"] * 2  # labels stay with their images
    assert torch.stack(model.gradients).abs().max() < 1e-6
    first, second = model.seen[:40], model.seen[40:]
    assert sorted(first) == sorted(second) == list(range(1, 41))
    assert first not in (second, list(range(1, 41)))  # shuffled, each time anew
    assert 0 < sum(model.corners) < 80  # of two epochs, some images are shifted, some not
    # Without a gradient, AdamW multiplies the weight by 1 - 0.01 * rate: the one-cycle schedule.
    weights = torch.tensor([*model.weights, model.weight[0].item()])
    rates = 100 * (1 - weights[1:] / weights[:-1])
    assert rates[[0, 5, 19]].tolist() == pytest.approx([1 / 25, 1, 0], abs=1e-4)
    # A later training goes on with the epoch that the first one has not seen.
    later = RecordingModel()
    script.train(later, images, labels, epochs=1, epochs_before=1, **settings)
    assert (later.seen, later.corners) == (second, model.corners[40:])


def test_inference_time_is_that_of_the_fastest_batch(monkeypatch):
    seconds = [9, 4, 3, 2]  # a first call, two batches of 250 images and one of 100
    model = RecordingModel()
    monkeypatch.setattr(timeit, "default_timer", lambda: sum(seconds[: len(model.weights)]))
    images = torch.zeros(600, 28, 28, dtype=torch.uint8)
    images[150:] = 1
    measured = script.evaluate(model, images, torch.zeros(600).long())
    wrong = " ".join(map(str, range(150, 600)))
    assert measured == {
        "accuracy": 25,
        "wrong": wrong,
        "inference_us": pytest.approx(12_000),
    }
    assert model.modes == {False}


@pytest.mark.parametrize("in_hardware", [True, False])
def test_only_training_computes_in_bfloat16_and_only_in_hardware(in_hardware, monkeypatch):
    monkeypatch.setattr(script, "computes_bfloat16", lambda device: in_hardware)
    model = script.CNN((8, 8, 8, 8))
    seen = set()
    model.conv2.register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    images = torch.zeros(8, 28, 28, dtype=torch.uint8)
    labels = torch.arange(8)
    script.train(model, images, labels, epochs=1, lr=0.01, batch_size=8, seed=0)
    assert seen == {torch.bfloat16 if in_hardware else torch.float32}
    seen.clear()
    script.evaluate(model, images, labels)
    assert seen == {torch.float32}
