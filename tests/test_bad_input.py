"""Wrong options, damaged files and interruptions: a status, one line that helps, nothing spoilt."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch

import NNI_Pruning as script
from conftest import ROOT, files_of

# Quick also where an error goes unnoticed, so that a failing test does not train for minutes.
SMALL = "--subset 600 --epochs 1 --width 0.1 --pruner L1NormPruner --sparsity 0.5".split()
QUICK = ["--dataset", "digits", *SMALL]
WIDTHS = script.scaled_widths(0.1)  # those of QUICK
EARLIER = b"a model that an earlier run saved"


@pytest.fixture(autouse=True)
def one_thread():
    """On models this small, more threads only wait for each other: seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    """The default checkpoint folder of `call` and `run`, with an earlier run's model in it."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "baseline.pth").write_bytes(EARLIER)
    return folder


def assert_one_line(status: int, out: str, err: str, wanted_status: int) -> None:
    assert (status, out) == (wanted_status, "")
    assert err.startswith("NNI_Pruning.py: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1  # so there is no traceback, and no epoch was trained either


@pytest.fixture
def fails(call, tmp_path, checkpoints):
    """Call the command line, which has to fail with one line and change no file; the line."""

    def check(wanted_status: int, *arguments) -> str:
        before = files_of(tmp_path)
        status, out, err = call(*arguments)
        assert_one_line(status, out, err, wanted_status)
        after = files_of(tmp_path)
        if after.keys() != before.keys():
            assert after.pop("checkpoints/.lock") == b""
        assert after == before
        return err

    return check


# ---------------------------------------------------------------------------- wrong usage

BELOW_ONE = ("0", "-1", "1.5", "x", "")
WRONG_VALUES = {
    "--sparsity": ("0", "1", "-0.5", "1.5", "nan", "abc"),
    "--pruner": ("NoSuchPruner",),
    "--dataset": ("cifar10",),
    "--device": ("tpu",),
    "--epochs": BELOW_ONE,
    "--finetune-epochs": BELOW_ONE,
    "--batch-size": BELOW_ONE,
    "--subset": BELOW_ONE,
    "--lr": ("0", "-0.1", "inf", "nan", "x"),
    "--width": ("0", "-1", "nan", "1e9", "x"),
    "--seed": ("-1", "x", str(2**63)),
}


@pytest.mark.parametrize(
    ("option", "value"),
    [(option, value) for option, values in WRONG_VALUES.items() for value in values],
)
def test_a_wrong_value_is_named_with_its_option(option, value, fails):
    err = fails(2, *QUICK, option, value)
    assert option in err
    assert repr(value) in err


def test_one_wrong_value_among_right_ones(fails):
    assert "'1.0'" in fails(2, *QUICK, "--sparsity", "0.5", "1.0", "0.75")
    assert "'Nobody'" in fails(2, *QUICK, "--pruner", "FPGMPruner", "Nobody")


@pytest.mark.parametrize("arguments", [["--epoch", "3"], ["digits"], ["--epochs"]])
def test_options_that_are_unknown_or_incomplete(arguments, fails):
    # --epoch: were abbreviations allowed, a script that uses one would break with a new option.
    assert arguments[0] in fails(2, *QUICK, *arguments)


def test_a_subset_larger_than_the_data(fails):
    err = fails(2, *QUICK, "--subset", 1438)
    assert "--subset 1438" in err
    assert "1437" in err


def test_a_subset_as_large_as_the_data(data_dir):
    data = script.load_data("digits", data_dir, subset=1437, device="cpu")
    assert len(data.train_labels) == 1437


@pytest.mark.parametrize(
    ("device", "there"),
    [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())],
)
def test_a_device_that_is_not_there(device, there, fails):
    if there:
        pytest.skip(f"this machine has {device}")
    assert f"--device {device}" in fails(2, *QUICK, "--device", device)


def test_wrong_usage_of_the_real_process(run, checkpoints):
    process = run(*QUICK, "--sparsity", "1.5")
    assert_one_line(process.returncode, process.stdout, process.stderr, 2)
    assert files_of(checkpoints) == {"baseline.pth": EARLIER}


# ------------------------------------------------------------------------- damaged data files

IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def with_count(content: bytes, count: int) -> bytes:
    """An idx file whose header promises `count` items."""
    return content[:4] + count.to_bytes(4, "big") + content[8:]


DAMAGES = {
    "truncated images": (IMAGES, lambda c: c[:-1]),
    "truncated labels": (LABELS, lambda c: c[: len(c) // 2]),
    "truncated header": (IMAGES, lambda c: c[:9]),
    "empty": (LABELS, lambda c: b""),
    "longer": (IMAGES, lambda c: c + b"\0"),
    "a web page": (LABELS, lambda c: b"<html>Please log in</html>" * 400),
    "still packed": (IMAGES, lambda c: b"\x1f\x8b\x08\x00" + c[4:]),
    "not bytes but floats": (IMAGES, lambda c: b"\0\0\x0d\x03" + c[4:]),
    "labels where images belong": (IMAGES, lambda c: b"\0\0\x08\x01" + c[4:]),
    "not 28 x 28": (IMAGES, lambda c: c[:8] + bytes((0, 0, 0, 14, 0, 0, 0, 56)) + c[16:]),
    "no items": (LABELS, lambda c: with_count(c[:8], 0)),
    "four billion items": (IMAGES, lambda c: with_count(c, 2**32 - 1)),
    "a label above 9": (LABELS, lambda c: c[:-1] + bytes([10])),
}


@pytest.fixture
def damage(data_dir, tmp_path):
    """Make a --data-dir with one file changed (the others are links: tests copy no 50 MB)."""

    def make(name: str, change) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(data_dir, folder, copy_function=os.symlink)
        path = folder / "MNIST" / "raw" / name
        content = change(path.read_bytes())
        path.unlink()
        path.write_bytes(content)
        return path

    return make


@pytest.mark.parametrize("dataset", [[], ["--dataset", "mnist"]], ids=["default", "mnist"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_data_file_is_named(kind, dataset, damage, fails):
    path = damage(*DAMAGES[kind])
    err = fails(1, *SMALL, "--data-dir", path.parent.parent.parent, *dataset)
    assert str(path) in err  # and no going on with the digits: damage is not absence
    assert "delete" in err


@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte", LABELS])
def test_fewer_labels_than_images(name, damage, fails):
    path = damage(name, lambda c: with_count(c, int.from_bytes(c[4:8], "big") - 1)[:-1])
    err = fails(1, *SMALL, "--data-dir", path.parent.parent.parent)
    assert str(path.parent) in err
    assert "delete" in err


# ------------------------------------------------------------------------ unfit --baseline files


class Evil:
    """Unpickled by a plain torch.load, this would make the file "executed"."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def repack(**changes):
    """A sound file's dictionary with some of its values replaced; a callable gets the old one."""

    def make(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        for name, change in changes.items():
            content[name] = change(content[name]) if callable(change) else change
        torch.save(content, path)

    return make


def each_weight(change):
    return repack(state_dict=lambda weights: {k: change(v) for k, v in weights.items()})


def with_nan(weights: dict) -> dict:
    weights["conv2.weight"][0, 0, 0, 0] = torch.nan
    return weights


def without_a_layer(weights: dict) -> dict:
    return {name: value for name, value in weights.items() if name != "output.bias"}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def evil_archive(path: Path) -> None:
    torch.save(Evil(), path)


def evil_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil()))


def only_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


UNFIT = {
    "missing": (Path.unlink, "no such file"),
    "folder": (only_a_folder, ""),
    "text": (lambda path: path.write_text("accuracy: 99 %\n" * 100), ""),
    "empty": (lambda path: path.write_bytes(b""), ""),
    "truncated": (cut_short, ""),
    "evil archive": (evil_archive, ""),
    "evil pickle": (evil_pickle, ""),
    "evil value": (repack(accuracy=Evil()), ""),
    "other widths": (
        lambda path: script.save_model(path, script.CNN(script.scaled_widths(0.2))),
        "--width",
    ),
    "other data": (repack(dataset="mnist"), "mnist"),
    "not a dictionary": (lambda path: torch.save([1, 2], path), ""),
    "weights alone": (lambda path: torch.save(script.CNN(WIDTHS).state_dict(), path), ""),
    "other format": (repack(format=99), "version"),
    "format a tensor": (repack(format=torch.zeros(2)), ""),
    "widths of a billion": (repack(widths=[10**9] * 4), "widths"),
    "widths of 0": (repack(widths=[0] * 4), "widths"),
    "widths that do not fit": (repack(widths=[8] * 4), "shape"),
    "a layer too few": (repack(state_dict=without_a_layer), "layers"),
    "not a number": (repack(state_dict=with_nan), "conv2.weight"),
    "expanded": (each_weight(lambda v: torch.zeros((), dtype=v.dtype).expand(v.shape)), ""),
    "half precision": (each_weight(lambda v: v.half()), ""),
    "sparse": (each_weight(lambda v: v.to_sparse()), ""),
    "no content": (each_weight(lambda v: v.to("meta")), ""),
}


@pytest.fixture
def given(tmp_path) -> Path:
    """A sound --baseline file for QUICK, to be spoilt."""
    path = tmp_path / "given.pth"
    script.save_model(path, script.CNN(WIDTHS), dataset="digits")
    assert script.check_baseline(path, WIDTHS) == "digits"  # unspoilt, it would be accepted
    return path


@pytest.mark.parametrize("kind", UNFIT)
def test_an_unfit_baseline_is_named(kind, given, fails, tmp_path):
    spoil, word = UNFIT[kind]
    spoil(given)
    err = fails(1, *QUICK, "--baseline", given)
    assert str(given) in err
    assert word in err
    assert not (tmp_path / "executed").exists()


def test_an_evil_baseline_in_the_real_process(given, run, checkpoints, tmp_path):
    evil_archive(given)
    process = run(*QUICK, "--baseline", given)
    assert_one_line(process.returncode, process.stdout, process.stderr, 1)
    assert not (tmp_path / "executed").exists()
    assert (checkpoints / "baseline.pth").read_bytes() == EARLIER


# ---------------------------------------------------------------------------- checkpoint folder


@pytest.mark.parametrize("below", [".", "new", "new/newer"])
def test_a_checkpoint_folder_that_cannot_be_made(below, fails, tmp_path):
    # Found out before the training: the one line on stderr is the error. Even root can make no
    # folder where a file is.
    (tmp_path / "file").write_text("a file")
    err = fails(1, *QUICK, "--checkpoint-dir", tmp_path / "file" / below)
    assert str(tmp_path / "file" / below) in err
    assert "--checkpoint-dir" in err


def test_a_checkpoint_folder_in_use(fails, checkpoints):
    with filelock.FileLock(checkpoints / ".lock"):
        err = fails(1, *QUICK)
    assert str(checkpoints.name) in err
    assert "another run" in err


# --------------------------------------------------------------------------- during the training


def test_a_loss_that_becomes_nan(fails):
    err = fails(1, *QUICK, "--lr", "1e30")
    assert "loss" in err
    assert "lower --lr" in err


def test_a_later_loss_that_becomes_nan_leaves_the_rows_before_it(call, given):
    # With --baseline the first row needs no training, so only the pruned model's loss is NaN.
    status, out, err = call(*QUICK, "--baseline", given, "--lr", "1e30")
    assert status == 1
    assert "baseline" in out
    assert err.splitlines()[-1].startswith("NNI_Pruning.py: error: ")
    assert "lower --lr" in err
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent there")
def test_ctrl_c_keeps_what_is_ready(checkpoints, tmp_path):
    # Were Ctrl-C ignored by whatever started pytest, the child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, ROOT / "NNI_Pruning.py", *QUICK, "--finetune-epochs", "1000000"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        second_row = re.compile(r"L1NormPruner.0\.5: epoch 1 ")
        assert any(second_row.search(line) for line in process.stderr)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert re.search(r"^baseline\b", out, re.MULTILINE)
    assert "L1NormPruner" not in out
    # The baseline was finished; of the pruned model there is nothing, not even half a file.
    files = {path.name for path in checkpoints.iterdir()}
    assert {name for name in files if name.endswith((".pth", ".tmp"))} == {"baseline.pth"}
    assert script.load_model(checkpoints / "baseline.pth").widths == WIDTHS
