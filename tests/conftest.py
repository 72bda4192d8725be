"""What the tests share: the script as a module and as a process, and MNIST-format data."""

import gzip
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import NNI_Pruning as script  # noqa: E402

ARCHIVES = [f"{name}.gz" for name in script.MNIST_FILES]


def idx_bytes(values: torch.Tensor) -> bytes:
    """A uint8 tensor in the idx format of MNIST's files."""
    header = bytes((0, 0, 8, values.dim()))
    shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + shape + values.byte().numpy().tobytes()


@pytest.fixture(scope="session")
def archives(tmp_path_factory) -> Path:
    """A folder with the four .gz files: the real MNIST where it is found, else made of digits."""
    for folder in (os.environ.get("MNIST_DIR"), ROOT / "data" / "MNIST" / "raw"):
        if folder and all((Path(folder) / name).is_file() for name in ARCHIVES):
            return Path(folder)
    folder = tmp_path_factory.mktemp("archives")
    values = [values for part in script.load_digits() for values in part]
    for name, content in zip(ARCHIVES, values, strict=True):
        (folder / name).write_bytes(gzip.compress(idx_bytes(content), mtime=0))
    return folder


@pytest.fixture(scope="session")
def data_dir(archives, tmp_path_factory) -> Path:
    """A --data-dir with the four unpacked files of `archives`; tests must not change it."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ARCHIVES:
        with gzip.open(archives / name) as packed, (raw / Path(name).stem).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return folder


def run_script(data_dir, folder, *arguments, **keywords) -> subprocess.CompletedProcess:
    """Run the real script as a process in `folder`, on `data_dir`, to its end.

    The folder is not the repository: a run must write to its own folders alone.
    """
    command = [sys.executable, str(ROOT / "NNI_Pruning.py"), "--data-dir", str(data_dir)]
    keywords = {"capture_output": True, "text": True, "timeout": 100, **keywords}
    return subprocess.run([*command, *map(str, arguments)], cwd=folder, check=False, **keywords)


@pytest.fixture
def run(data_dir, tmp_path):
    """run_script, in tmp_path."""
    return partial(run_script, data_dir, tmp_path)


@pytest.fixture
def call(data_dir, tmp_path, monkeypatch, capsys):
    """Run the script's command line in this process, in tmp_path: (status, stdout, stderr)."""

    def start(*arguments):
        monkeypatch.chdir(tmp_path)
        argv = ["--data-dir", str(data_dir), *map(str, arguments)]
        try:
            status = script.command_line(argv)
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capsys.readouterr()

    return start


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content: to compare before and after."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
