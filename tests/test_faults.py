"""What people meet: wrong options, damaged files, no network, a full disk, Ctrl-C.

Each ends in a clear message and an exit status, and damages no file that was there before.
"""

import pickle
import runpy
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
import tqdm
from torchvision.datasets import MNIST

import NNI_Pruning as script
from conftest import ARCHIVES, QUICK, QUICK_TUNING, SCRIPT, files_of, idx_bytes


@pytest.fixture
def fails(call, tmp_path):
    """Call `main`, which has to end in an error and leave every file as it was; the message."""

    def check(*arguments) -> str:
        before = files_of(tmp_path)
        error, out, _ = call(*arguments)
        assert isinstance(error, script.ExperimentError)
        assert out == ""
        assert files_of(tmp_path) == before  # and no temporary file
        return str(error)

    return check


WRONG = """
    --sparsity=0.0078 --sparsity=1 --sparsity=nan --epochs=0 --epochs=2.5 --finetune-epochs=0
    --batch-size=-1 --subset=0 --lr=0 --lr=inf --finetune-lr=nan --seed=-1 --seed=4294967296
    --baseline=has_epochs.pth
"""


@pytest.mark.parametrize("argument", WRONG.split())
def test_a_wrong_option_is_named(argument, call):
    error, out, err = call(*QUICK, argument)
    assert (error.code, out) == (2, "")
    assert argument.partition("=")[0] in err.rpartition("error: ")[2]  # usage lists all options


def test_a_device_that_does_not_compute_is_named(fails, monkeypatch):
    # An accelerator that this machine cannot have: CUDA on a Mac, Metal (mps) anywhere else.
    absent = "cuda" if sys.platform == "darwin" else "mps"
    assert fails(*QUICK, "--device", absent).startswith(f"--device {absent} does not work: ")
    monkeypatch.delattr(script.F, "conv2d")  # there, but too old for torch
    assert fails(*QUICK, "--device", "cpu").startswith("--device cpu does not work: ")


# ----------------------------------------------------------------------------- .pth files


class Evil:
    """Unpickled by a plain torch.load, this would make the file "executed"."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_an_unfit_baseline_is_named(call, fails, tmp_path):
    call(*QUICK)
    saved = tmp_path / "checkpoints" / "baseline.pth"
    content = torch.load(saved, weights_only=True)
    bad = tmp_path / "bad.pth"
    for spoil in (
        lambda: None,  # there is no such file
        lambda: bad.write_bytes(saved.read_bytes()[:9999]),
        lambda: bad.write_bytes(pickle.dumps(Evil(), protocol=2)),
        lambda: torch.save({**content, "accuracy": Evil()}, bad),
        lambda: torch.save(content["state_dict"], bad),  # of another script, say
        lambda: torch.save({**content, "dataset": "mnist"}, bad),
        lambda: torch.save({**content, "train_images": 60_000}, bad),
        lambda: torch.save({**content, "epochs": None}, bad),
        lambda: shutil.copy(saved.with_name("L1NormPruner_0.5.pth"), bad),
    ):
        bad.unlink(missing_ok=True)
        spoil()
        assert str(bad) in fails(*QUICK_TUNING, "--baseline", bad)


# ----------------------------------------------------------------------------- MNIST files


@pytest.mark.parametrize("is_missing", [True, False])
def test_damaged_data_is_named_and_no_digits_step_in(is_missing, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [])
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ARCHIVES:
        shape = (20, 28, 28) if "images" in name else (20,)
        (raw / name[:-3]).write_bytes(idx_bytes(torch.randint(10, shape)))
    damaged = raw / "train-images-idx3-ubyte"
    if is_missing:  # one of the four
        damaged.unlink()
    else:  # half unpacked
        damaged.write_bytes(damaged.read_bytes()[:8000])
    message = fails(*QUICK[2:])
    assert message.startswith("MNIST cannot be downloaded or read (")
    assert f"delete {raw.relative_to(tmp_path)} " in message


def test_without_a_network(call, fails, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as deaf:  # it has a port and does not listen: each call is refused
        deaf.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
        monkeypatch.setattr(MNIST, "mirrors", [mirror])
        message = fails(*QUICK[2:], "--dataset", "mnist")
        _, out, err = call(*QUICK[2:])
    assert socket.getdefaulttimeout() is None  # the script's own is over
    # And the system's reason, in the user's language.
    for part in ("MNIST cannot be downloaded or read (", mirror, "urlopen error"):
        assert part in message
    assert f"{message}. Using scikit-learn's digits instead.\n" in err
    assert "NOT MNIST (200 training and 33 test images)" in out


# ----------------------------------------------------------------- folders, room, divergence


def test_a_folder_that_cannot_be_made(fails, tmp_path):
    (tmp_path / "file").touch()
    message = fails(*QUICK, "--checkpoint-dir", "file/new")
    assert f"cannot write {Path('file', 'new', '.writable')}" in message


def test_a_full_disk_leaves_earlier_files_whole(call, fails, monkeypatch):
    call(*QUICK)

    def fill_the_disk(path, content):
        path.touch()
        if content:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    message = fails(*QUICK, "--seed", 5)
    assert message == f"cannot write {Path('checkpoints', 'baseline.pth')}: No space left on device"


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    path.write_bytes(b"old")
    write_bytes = Path.write_bytes

    def write_half(file, content):  # and die, as after a kill
        write_bytes(file, content[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(KeyboardInterrupt):
        script.write(path, b"new one")
    assert path.read_bytes() == b"old"


def test_a_loss_that_diverges(fails):
    assert "lower --lr" in fails(*QUICK, "--lr", "1e30")


# ---------------------------------------------------------------- the script as it is called


@pytest.fixture
def start(tmp_path, monkeypatch):
    """What `python NNI_Pruning.py` does, in this process and in tmp_path."""

    def start(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return start


def test_a_missing_nni_is_said_before_anything_is_trained(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nni", None)
    with pytest.raises(SystemExit, match=r"^NNI_Pruning.py: error: NNI is missing .*\)$"):
        start(*QUICK)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_is_ready(start, tmp_path, monkeypatch, capsys):
    def press_ctrl_c(bar, text):
        if not bar.desc.startswith("baseline"):
            raise KeyboardInterrupt

    monkeypatch.setattr(tqdm.tqdm, "set_postfix_str", press_ctrl_c)
    with pytest.raises(SystemExit, match="130"):
        start(*QUICK)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("NNI_Pruning.py: interrupted; ")
    folder = tmp_path / "checkpoints"
    assert set(files_of(folder)) == {"baseline.pth", "results.csv"}
    _, row = script.load_checkpoint(folder / "baseline.pth")
    assert [*script.read_results(folder / "results.csv")["accuracy"]] == [row["accuracy"]]
