"""The experiment: it learns, it compares fairly, and its table says what its models do."""

import copy
import csv
import json
import os
import subprocess
import sys
import timeit
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from test_pruning import pruned_by_hand

import NNI_Pruning as script
from conftest import (
    QUICK,
    QUICK_TUNING,
    SCRIPT,
    accuracy_range,
    has_accuracy,
    read_idx,
    run_python,
    saved_weights,
    table_of,
)

PRUNED = [f"{pruner}_{sparsity}" for pruner, sparsity in product(script.PRUNERS, script.SPARSITIES)]
NAMES = ["baseline", *PRUNED]


def digits_for_testing():
    """The digits' test images, of 20 x 20 in a frame of 28."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    _, test = train_test_split(range(1797), test_size=0.2, random_state=0, stratify=labels)
    small = images[test].float().view(-1, 1, 8, 8) / 16 * 255
    large = F.interpolate(small, scale_factor=2.5, mode="bilinear").round().byte()
    return F.pad(large[:, 0], (4, 4, 4, 4)), labels[test]


def has_real_mnist(data_dir) -> bool:
    return len(read_idx(data_dir)[1]) == 60_000


def mnist_for_testing(data_dir, subset: int):
    """The test images of a --subset of MNIST."""
    _, training_labels, images, labels = read_idx(data_dir)
    generator = torch.Generator().manual_seed(0)
    # The script draws the training images first, from the same generator.
    torch.randperm(len(training_labels), generator=generator)
    kept = torch.randperm(len(labels), generator=generator)[: subset // 6]
    return images[kept], labels[kept]


class Finished(NamedTuple):
    """A run that is over, and what its results are compared with."""

    process: subprocess.CompletedProcess
    folder: Path
    images: torch.Tensor  # of the test set, as are the labels
    labels: torch.Tensor
    goal: float  # % of them that the baseline must get right


@pytest.fixture(scope="module", params=["digits", "mnist"])
def finished(request, data_dir, tmp_path_factory) -> Finished:
    """The real script as a process: defaults on the digits, or a subset of MNIST-format files."""
    folder = tmp_path_factory.mktemp("run")
    if request.param == "digits":
        options = ["--dataset", "digits"]
        images, labels = digits_for_testing()
        goal = 97
    else:
        options = "--subset 6000 --epochs 2 --seed 3".split()
        if not has_real_mnist(data_dir):  # fewer images: as many steps as with the real ones
            options += ["--batch-size", "64"]
        images, labels = mnist_for_testing(data_dir, 6000)
        goal = 94
    process = run_python(folder, SCRIPT, "--data-dir", data_dir, *options)
    assert process.returncode == 0, process.stderr
    return Finished(process, folder / "checkpoints", images, labels, goal)


def results_in(folder) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_it_learns(finished):
    rows = results_in(finished.folder)["rows"]
    baseline, *pruned = rows
    assert [row["name"] for row in rows] == NAMES
    assert baseline["accuracy"] >= finished.goal
    for row in pruned:
        # No pruned model reaches this before fine-tuning.
        assert row["accuracy"] >= finished.goal - 3
        assert row["accuracy"] > row["accuracy_before"] + 10
    parameters = {row["sparsity"]: row["parameters"] for row in rows}
    assert parameters[0.75] < parameters[0.5] < parameters[None]


def is_parameter(key: str) -> bool:
    """Whether a tensor of a state_dict is a parameter, and not one of BatchNorm's statistics."""
    return not key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_table_files_and_models_agree_with_the_tests_own_count(finished):
    folder = finished.folder
    images, labels = finished.images, finished.labels
    rows = results_in(folder)["rows"]
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    table = table_of(finished.process.stdout)
    assert list(table) == list(lines) == NAMES
    baseline = saved_weights(folder / "baseline.pth")
    for row in rows:
        name = row["name"]
        cells = table[name]
        content = torch.load(folder / f"{name}.pth", weights_only=True)
        weights = content.pop("state_dict")
        assert has_accuracy(row["accuracy"], weights, images, labels)
        assert row["accuracy"] == content["accuracy"]
        assert row["accuracy"] == float(lines[name]["accuracy"])
        # The baseline has no cell "before tuning", so its accuracy comes first.
        assert f"{row['accuracy']:.2f}" == cells[0 if name == "baseline" else 1]
        assert row["test_images"] == len(labels)
        parameters = [value.numel() for key, value in weights.items() if is_parameter(key)]
        assert row["parameters"] == sum(parameters)
        assert f"{row['parameters']:,}" in cells
        if name != "baseline":  # pruned from the saved file, and measured before it was trained on
            before, _ = pruned_by_hand(baseline, row["pruner"], row["sparsity"])
            assert has_accuracy(row["accuracy_before"], before, images, labels)
            assert f"{row['accuracy_before']:.2f}" == cells[0]
            assert not weights["conv1.weight"].equal(before["conv1.weight"])


def test_what_a_user_sees(finished):
    process = finished.process
    heading, _, last, saved = process.stdout.split("\n\n")
    assert heading.startswith("MNIST (") != ("NOT MNIST (" in heading)
    for part in (f"torch {torch.__version__}", "NNI 3.0", " epochs; seeds "):
        assert part in heading
    assert "--seeds 0 1 2 3 4" in last  # one seed: no verdict, but how to get one
    assert max(map(len, process.stdout.splitlines())) <= 120
    for noise in ("Traceback", "Warning", "Filter"):  # NNI's chatter is silenced
        assert noise not in process.stderr + process.stdout
    results = ["results.json", "results.csv", "results.png"]
    assert saved == f"Saved: checkpoints{os.sep} (5 models, {', '.join(results)})\n"
    files = [*(f"{name}.pth" for name in NAMES), *results]
    assert sorted(path.name for path in finished.folder.iterdir()) == sorted(files)


def test_results_say_with_what_settings_they_were_made(finished, data_dir):
    output = finished.process.stdout
    settings = results_in(finished.folder)["settings"]
    assert f"({settings.pop('train_images'):,} training and " in output
    assert f"CPU, {settings.pop('threads')} threads" in output
    assert settings.pop("bfloat16") == (", bf16;" in output)
    is_mnist = settings["dataset"] == "mnist"
    epochs = 2 if is_mnist else 20
    assert settings == {
        "dataset": "digits" if "NOT MNIST" in output else "mnist",
        "test_images": len(finished.labels),
        "baseline_epochs": epochs,
        "finetune_epochs": epochs,
        "batch_size": 256 if is_mnist and has_real_mnist(data_dir) else 64,
        "lr": 0.01,
        "baseline": None,
        "pruner": list(script.PRUNERS),
        "sparsity": list(script.SPARSITIES),
        "seeds": [3 if is_mnist else 0],
        "controls": False,
        "device": "cpu",
    }


def test_each_of_several_seeds_is_a_run_of_its_own(call):
    # Also: a row depends on no other, neither of another pruner nor of another seed.
    options = "--dataset digits --subset 300 --epochs 2 --sparsity 0.5".split()
    alone, *_ = call(*options, "--seed", 1, "--pruner", "FPGMPruner", "--checkpoint-dir", "alone")
    both, *_ = call(*options, "--seeds", 0, 1)
    for row in (*alone, *both):
        del row["training_seconds"]
    assert len(both) == 6
    of_seed_1 = {row["name"]: row for row in both if row["seed"] == 1}
    assert alone == [of_seed_1["baseline"], of_seed_1["FPGMPruner_0.5"]]
    first = script.load_model("checkpoints/baseline.pth")
    second = script.load_model("checkpoints/seed_1/baseline.pth")
    assert [first.about["seed"], second.about["seed"]] == [0, 1]
    assert not first.output.weight.equal(second.output.weight)


def test_a_given_baseline_is_used_and_not_trained(call):
    trained, *_ = call(*QUICK)
    given = Path("checkpoints") / "baseline.pth"
    rows, out, _ = call(*QUICK_TUNING, "--baseline", given, "--seed", 5, "--controls")
    assert f"{given} (1) + 1 epochs" in out  # nothing was trained: it says so
    baseline, pruned, *_ = rows
    assert baseline["training_seconds"] is None
    assert baseline["accuracy"] == trained[0]["accuracy"]
    assert baseline["baseline_id"] == trained[0]["baseline_id"]
    assert baseline["epochs"] == 1
    assert pruned["training_seconds"] > 0
    assert "scratch_0.5_2_epochs" in [row["name"] for row in rows]
    assert script.load_model(given).about["seed"] == 0  # not overwritten


def test_controls_are_as_long_as_they_say_and_start_where_they_say(call, tmp_path, monkeypatch):
    trainings = []
    seconds = []
    train = script.train

    def train_and_record(model, *data, **settings):
        trainings.append((copy.deepcopy(model.state_dict()), settings))
        seconds.append(train(model, *data, **settings))
        return seconds[-1]

    monkeypatch.setattr(script, "train", train_and_record)
    options = "--epochs 2 --finetune-epochs 1 --controls --seed 3 --sparsity 0.75 0.5".split()
    rows, *_ = call(*QUICK, *options)
    names = ["baseline", "L1NormPruner_0.75", "L1NormPruner_0.5", "baseline_1_more_epochs"]
    names += [f"scratch_{sparsity}_{n}_epochs" for sparsity in (0.75, 0.5) for n in (3, 1)]
    assert [row["name"] for row in rows] == names
    assert [settings["epochs"] for _, settings in trainings] == [2, 1, 1, 1, 3, 1, 3, 1]
    assert [row["epochs"] for row in rows] == [2, 1, 1, 1, 3, 1, 3, 1]
    assert [row["training_seconds"] for row in rows] == seconds
    assert {(s["lr"], s["batch_size"], s["seed"]) for _, s in trainings} == {(0.01, 64, 3)}
    weights = {name: start for name, (start, _) in zip(names, trainings, strict=True)}
    saved = saved_weights(tmp_path / "checkpoints" / "baseline.pth")
    assert_equal(weights["baseline_1_more_epochs"], saved)
    for sparsity in (0.75, 0.5):
        expected, _ = pruned_by_hand(saved, "L1NormPruner", sparsity)
        start = weights[f"L1NormPruner_{sparsity}"]
        # NNI's new BatchNorm layers count their batches anew.
        assert_equal({key: start[key] for key in start if "num_batches" not in key}, expected)
    # Random weights: what a new network of these widths gets by the seed.
    widths = {"baseline": script.WIDTHS}
    widths |= dict.fromkeys(("scratch_0.75_3_epochs", "scratch_0.75_1_epochs"), (8, 16, 32, 12))
    widths |= dict.fromkeys(("scratch_0.5_3_epochs", "scratch_0.5_1_epochs"), (16, 32, 64, 24))
    for name, width in widths.items():
        torch.manual_seed(3)
        assert_equal(weights[name], script.CNN(width).state_dict())


def assert_equal(weights: dict, expected: dict) -> None:
    for name, value in weights.items():
        assert value.equal(expected[name]), name


# --------------------------------------------------------------------- devices and threads

# An accelerator that this machine cannot have: CUDA on a Mac, Metal (mps) anywhere else.
ABSENT_DEVICE, OTHER_DEVICE = ("cuda", "mps") if sys.platform == "darwin" else ("mps", "cuda")


def test_auto_does_without_an_accelerator_that_does_not_compute(call, monkeypatch):
    monkeypatch.setattr(getattr(torch, OTHER_DEVICE), "is_available", lambda: False)
    monkeypatch.setattr(getattr(torch, ABSENT_DEVICE), "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    rows, out, err = call(*QUICK, "--device", "auto")
    assert len(rows) == 2
    assert "\nCPU, " in out
    (reason,) = [line for line in err.splitlines() if ABSENT_DEVICE in line]
    assert "CPU" in reason
    monkeypatch.setattr(getattr(torch, ABSENT_DEVICE), "is_available", lambda: False)
    assert script.select_device("auto") == torch.device("cpu")  # nothing announced, nothing said
    assert ABSENT_DEVICE not in call(*QUICK, "--device", "auto", "--subset", 70)[2]


def test_a_device_by_name_that_does_not_compute_is_an_error_before_training(call, tmp_path):
    error, out, err = call(*QUICK, "--device", ABSENT_DEVICE)
    assert isinstance(error, script.ExperimentError)
    assert ABSENT_DEVICE in str(error)
    assert "\n" not in str(error)
    assert out + err == ""
    assert not [*tmp_path.rglob("*.*")]


def test_the_experiment_on_whatever_accelerator_there_is(data_dir, tmp_path):
    device = script.select_device("auto")
    if device.type == "cpu":
        pytest.skip("this machine has no accelerator that torch can use")
    process = run_python(tmp_path, SCRIPT, "--dataset", "digits", "--device", "auto")
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr
    assert f"\n{device.type}" in process.stdout
    images, labels = digits_for_testing()
    results = results_in(tmp_path / "checkpoints")
    assert results["settings"]["device"] == device.type
    for row in results["rows"]:
        assert row["accuracy"] >= (97 if row["name"] == "baseline" else 94)
        # Here the CPU computes, and it rounds differently: one image may change its class.
        weights = saved_weights(tmp_path / "checkpoints" / f"{row['name']}.pth")
        lowest, highest = accuracy_range(weights, images, labels)
        one_image = 101 / len(labels)  # in percent, and a little more for the last digits
        assert lowest - one_image <= row["accuracy"] <= highest + one_image


def test_threads_are_no_more_than_the_processors_that_a_container_allows(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    try:
        torch.set_num_threads(3)  # as on a machine with three cores
        monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own choice
        script.limit_threads()
        assert torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        script.limit_threads()
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)  # as where torch itself already respects the affinity
        script.limit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------ training, closer


class RecordingModel(torch.nn.Module):
    """A model that is always right, and that records which images it is shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(10))
        self.seen = []
        self.corners = []
        self.modes = set()
        self.clock = 0

    def forward(self, images):
        pixels = images[:, 0] * script.DEVIATION + script.MEAN
        values = (pixels[:, 14, 14] * 255).round().long()
        self.seen += values.tolist()
        self.corners += [bool(image[0, 0] > 0.9) for image in pixels]
        self.modes.add(self.training)
        self.clock += 1
        return F.one_hot(values % 10, 10) + self.weight * 0


def test_order_shifts_labels_and_time(monkeypatch):
    # Image n is filled with the value n; the frame outside is white, so that a shift shows.
    images = torch.full((40, 30, 30), 255, dtype=torch.uint8)
    images[:, 1:29, 1:29] = torch.arange(40, dtype=torch.uint8)[:, None, None]
    labels = torch.arange(40) % 10
    model = RecordingModel()
    other = RecordingModel()
    reported = []
    monkeypatch.setattr(timeit, "default_timer", lambda: model.clock)

    def after_epoch(accuracy):
        reported.append(accuracy)
        model.clock += 1000

    settings = {"epochs": 2, "lr": 0.01, "batch_size": 4, "after_epoch": after_epoch}
    seconds = script.train(model, images, labels, seed=0, **settings)
    assert seconds == 20  # batches of a second, and nothing of what comes between the epochs
    assert model.modes == {True}  # BatchNorm learns in training alone
    assert reported == [100.0, 100.0]  # labels stay with their images
    first, second = model.seen[:40], model.seen[40:]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != list(range(40))  # shuffled
    assert first != second  # each time anew
    assert 0 < sum(model.corners) < 80  # of two epochs, some images are shifted, some not
    script.train(other, images, labels, seed=1, **settings)
    assert other.seen != model.seen


@pytest.mark.parametrize("in_hardware", [True, False])
def test_only_training_computes_in_bfloat16_and_only_in_hardware(in_hardware, monkeypatch):
    monkeypatch.setattr(script, "computes_bfloat16", lambda device: in_hardware)
    model = script.CNN((8, 8, 8, 8))
    seen = set()
    model.conv2.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    images, labels = torch.randint(256, (8, 30, 30), dtype=torch.uint8), torch.arange(8)
    script.train(model, images, labels, epochs=1, lr=0.01, batch_size=8, seed=0)
    assert seen == {torch.bfloat16 if in_hardware else torch.float32}
    assert all(value.dtype == torch.float32 for value in model.parameters())
    seen.clear()
    script.evaluate(model, images[:, 1:29, 1:29], labels)
    assert seen == {torch.float32}
