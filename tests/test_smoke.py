"""The design card's smoke test: the real script, as a process, on a subset of the data."""

import re

import pytest
import torch

import NNI_Pruning as script
from conftest import run_script

ROWS = ["baseline", *(f"{p}_{s}" for p in script.PRUNERS for s in script.SPARSITIES)]


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """One run of the main job on 1,200 images: (process, checkpoint folder)."""
    folder = tmp_path_factory.mktemp("smoke")
    options = "--subset 1200 --epochs 2 --batch-size 64 --seed 3".split()
    process = run_script(data_dir, folder, *options)
    return process, folder / "checkpoints"


def table_of(stdout: str) -> dict[str, list[str]]:
    """The table's cells by the name of the model's file; cells are two or more spaces apart."""
    lines = stdout.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("-----")) + 1
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start : start + len(ROWS)]]
    return {row[0].replace(" ", "_"): row[1:] for row in rows}


def test_exit_status_and_channels(trained):
    process, _ = trained
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert "Warning" not in process.stderr  # NNI's chatter is silenced


def test_heading_says_what_was_run_on(trained):
    heading = trained[0].stdout.splitlines()[0]
    for part in ("MNIST", "1,200 training", "2 + 2 epochs", "seed 3", torch.__version__, "NNI 3.0"):
        assert part in heading
    assert "digits" not in heading


def test_table_has_the_five_rows_and_fits(trained):
    process, _ = trained
    assert list(table_of(process.stdout)) == ROWS
    assert max(map(len, process.stdout.splitlines())) <= 120


def test_each_saved_model_gives_the_accuracy_of_the_table(trained, data_dir):
    process, folder = trained
    data = script.load_data("mnist", data_dir, subset=1200, device="cpu")
    rows = table_of(process.stdout)
    assert {path.stem for path in folder.glob("*.pth")} == set(ROWS)
    for name, cells in rows.items():
        model = script.load_model(folder / f"{name}.pth")
        assert not model.training
        accuracy = script.evaluate(model, data.test_images, data.test_labels)
        assert f"{accuracy:.2f}" in cells[:2]
        assert f"{script.count_parameters(model):,}" in cells


def test_checkpoints_are_plain_dictionaries(trained):
    content = torch.load(trained[1] / "FPGMPruner_0.75.pth", weights_only=True)
    state = content.pop("state_dict")
    assert content["widths"] == list(script.pruned_widths(script.WIDTHS, 0.75))
    described = {key: content[key] for key in ("pruner", "sparsity", "dataset", "seed")}
    assert described == {
        "pruner": "FPGMPruner",
        "sparsity": 0.75,
        "dataset": "mnist",
        "seed": 3,
    }
    assert all(type(value) is torch.Tensor for value in state.values())


def test_the_same_seed_gives_the_same_accuracies(trained, call):
    process, folder = trained
    # A single row, started from the saved baseline: it depends on no row that came before it.
    options = ["--subset", "1200", "--epochs", "2", "--batch-size", "64", "--seed", "3"]
    options += ["--pruner", "FPGMPruner", "--baseline", folder / "baseline.pth"]
    status, stdout, _ = call(*options)
    assert status == 0
    again = {line.split("  ")[0]: line.split()[2:4] for line in stdout.splitlines()}
    before = {line.split("  ")[0]: line.split()[2:4] for line in process.stdout.splitlines()}
    for row in ("FPGMPruner 0.5", "FPGMPruner 0.75"):
        assert again[row] == before[row]
