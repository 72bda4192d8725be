"""What the tests share: the script as a module and as a process, data, a second forward pass."""

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import NNI_Pruning as script  # noqa: E402

ARCHIVES = [name for name, _ in MNIST.resources]
SCRIPT = ROOT / "NNI_Pruning.py"
REFERENCE = ROOT / "checkpoints" / "reference"
SHORT = "--dataset digits --subset 200 --pruner L1NormPruner --sparsity 0.5".split()
QUICK = [*SHORT, "--epochs", "1"]
QUICK_TUNING = [*SHORT, "--finetune-epochs", "1"]  # for a run with --baseline
TIMEOUT = 1200  # seconds; 20 are enough here, but other machines are slower, or busy

# Variables that the user has set for other programs must not change the results of the tests.
OTHERS = "FORCE_COLOR PYTHON_COLORS PYTHONDEVMODE PYTHONOPTIMIZE PYTHONWARNINGS NNI_ TQDM_ DNNL_"
for variable in list(os.environ):
    if variable.startswith((*OTHERS.split(), "ONEDNN_")):
        del os.environ[variable]
# Beside another busy program, two threads that wait for each other take longer than one.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def idx_bytes(values):
    """A uint8 tensor in the idx format of MNIST's files."""
    uint8 = 8  # the format's code for this type
    shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, uint8, values.dim())) + shape + values.byte().numpy().tobytes()


def read_mnist(data_dir: Path):
    """Training images and labels, test images and labels."""
    training, test = (MNIST(data_dir, train=is_train) for is_train in (True, False))
    return training.data, training.targets, test.data, test.targets


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A --data-dir with MNIST's four files, packed and unpacked; tests must not change it.

    The real files, if all four are in data/. Otherwise files made of scikit-learn's digits.
    """
    data_dir = tmp_path_factory.mktemp("data")
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    real = ROOT / "data" / "MNIST" / "raw"
    are_real = all(check_integrity(real / name, md5) for name, md5 in MNIST.resources)
    training, test = script.load_small_digits()
    for name, values in zip(ARCHIVES, (*training, *test), strict=True):
        packed = (real / name).read_bytes() if are_real else gzip.compress(idx_bytes(values))
        (raw / name).write_bytes(packed)
        (raw / name[:-3]).write_bytes(gzip.decompress(packed))
    return data_dir


def saved_weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def logits_of(weights, images):
    """The forward pass of the script's network, written anew; images: uint8 (N, 28, 28)."""
    x = (images[:, None].to(weights["conv1.weight"].dtype) / 255 - 0.1307) / 0.3081
    x = F.conv2d(x, weights["conv1.weight"], weights["conv1.bias"], stride=2).relu()
    for number, padding in ((2, 0), (3, 1)):
        x = F.max_pool2d(F.conv2d(x, weights[f"conv{number}.weight"], padding=padding), 2)
        names = ("running_mean", "running_var", "weight", "bias")
        x = F.batch_norm(x, *(weights[f"norm{number}.{name}"] for name in names)).relu()
    x = F.linear(x.flatten(1), weights["hidden.weight"], weights["hidden.bias"]).relu()
    return F.linear(x, weights["output.weight"], weights["output.bias"])


def wrong_images(weights, images, labels):
    """The numbers of the images that these weights get wrong, in float64 and without `evaluate`.

    And of those on which the script's float32 may decide otherwise: two logits are almost equal.
    """
    logits = logits_of({name: value.double() for name, value in weights.items()}, images)
    largest, second = logits.topk(2).values.T
    is_close = largest - second < 1e-5 * logits.abs().max()
    return [{*part.nonzero().flatten().tolist()} for part in (logits.argmax(1) != labels, is_close)]


def accuracy_of(weights, images, labels):
    """The accuracy of these weights in percent, to compare with."""
    wrong, close = wrong_images(weights, images, labels)
    shares = [100 * len(part) / len(labels) for part in (wrong, close)]
    return pytest.approx(100 - shares[0], abs=shares[1] + 1e-9)


def run_python(folder, *arguments, **variables):
    """Run Python, most often with SCRIPT, as a process in `folder`, to its end."""
    command = [sys.executable, *map(str, arguments)]
    # Without PYTHONIOENCODING, it would write as the system does.
    variables = {**os.environ, "PYTHONIOENCODING": "utf-8", **variables}
    options = {"capture_output": True, "encoding": "utf-8", "timeout": TIMEOUT}
    return subprocess.run(command, check=False, cwd=folder, env=variables, **options)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run `main` in this process, in tmp_path; its rows or its error, stdout, stderr."""

    def start(*arguments):
        monkeypatch.chdir(tmp_path)
        try:
            result = script.main([str(argument) for argument in arguments])
        except (script.ExperimentError, SystemExit, KeyboardInterrupt) as error:
            result = error
        return result, *capsys.readouterr()

    return start


def table_of(text: str):
    """The cells of a report's table by model; cells are two or more spaces apart."""
    body = re.search(r"^---.*?\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)[1]
    lines = [re.split(r"\s{2,}", line) for line in body.splitlines()]
    return {name: cells for name, *cells in lines}


def files_of(folder: Path):
    """Every file below a folder, with its content: to compare before and after."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
