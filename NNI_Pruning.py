"""What structured channel pruning does to a CNN: accuracy, size and training time, on MNIST.

    python NNI_Pruning.py                          # everything
    python NNI_Pruning.py --subset 6000 --epochs 2 # a first look, in seconds
    python NNI_Pruning.py --help                   # every option and its default

Trains a baseline CNN and saves it; prunes it with NNI's L1NormPruner and FPGMPruner at two channel
sparsities, makes each pruned model really smaller with ModelSpeedup, fine-tunes it and saves it;
prints one table. To take a compact model home: `model = load_model("checkpoints/....pth")`.

The file reads in the order in which it runs: settings, model, checkpoints, data, training,
pruning, report, options, main.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import http.client
import io
import math
import os
import shutil
import socket
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path

import filelock
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# NNI, torchvision and scikit-learn are imported in the one function that needs each: load_model
# then works where they are not installed (NNI has no wheel for ARM), and --help is quick.

# ------------------------------------------------------------------------------- settings

PRUNERS = ("L1NormPruner", "FPGMPruner")
SPARSITIES = (0.5, 0.75)  # configurations 1 and 2: the share of each layer's channels that goes

# Output channels of the three convolutions and of the hidden linear layer. At 0.75, 64 channels
# become 16, the width of one AVX-512 vector of floats: narrower layers would not train faster.
WIDTHS = (64, 64, 64, 32)
MAX_WIDTH = 4096  # of a layer; more is a typing error or a hostile file
CLASSES = 10

EPOCHS = {"mnist": 4, "digits": 40}  # the 1,437 digits make only a few steps an epoch
BATCH_SIZE = {"mnist": 512, "digits": 128}
LEARNING_RATE = 1e-2  # the peak of the one-cycle schedule
MAX_SHIFT = 2  # pixels by which training images are moved, up or down and left or right

MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels, scaled to 0..1

DOWNLOAD_TIMEOUT = 10  # seconds that a mirror may stay silent
CHECKPOINT_FORMAT = 1


class ExperimentError(Exception):
    """What a user can mend: printed as one line, without a traceback; ends with `status`."""

    status = 1


class UsageError(ExperimentError):
    """An option whose value turned out wrong only after the command line was read."""

    status = 2


# ---------------------------------------------------------------------------------- model


class CNN(nn.Module):
    """Three convolutions with batch normalisation, two max poolings, two linear layers.

    The same class is the baseline and every pruned model; only `widths` differ.

    Args:
        widths: output channels of conv1, conv2 and conv3, and output features of hidden.

    Input: float (N, 1, 28, 28), normalised with MEAN and DEVIATION. Output: (N, 10) logits.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        c1, c2, c3, features = widths
        # Stride 2 in place of a pooling: on the largest map, pooling and normalising cost more
        # time than the convolution itself. No bias before a BatchNorm, which brings its own.
        self.conv1 = nn.Conv2d(1, c1, 5, stride=2, bias=False)  # 28 -> 12
        self.norm1 = nn.BatchNorm2d(c1)
        self.conv2 = nn.Conv2d(c1, c2, 3, bias=False)  # 12 -> 10, pooled to 5
        self.norm2 = nn.BatchNorm2d(c2)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1, bias=False)  # 5 -> 5, pooled to 2
        self.norm3 = nn.BatchNorm2d(c3)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(c3 * 2 * 2, features)
        self.output = nn.Linear(features, CLASSES)
        self.to(memory_format=torch.channels_last)  # oneDNN's and cuDNN's faster layout here

    def forward(self, images: Tensor) -> Tensor:
        # Pooling before normalising gives the same kind of network for a quarter of the work.
        x = F.relu(self.norm1(self.conv1(images)), inplace=True)
        x = F.relu(self.norm2(self.pool(self.conv2(x))), inplace=True)
        x = F.relu(self.norm3(self.pool(self.conv3(x))), inplace=True)
        x = F.relu(self.hidden(x.flatten(1)), inplace=True)
        return self.output(x)

    @property
    def widths(self) -> tuple[int, ...]:
        layers = (self.conv1, self.conv2, self.conv3)
        return (*(layer.out_channels for layer in layers), self.hidden.out_features)


def scaled_widths(factor: float) -> tuple[int, ...]:
    """WIDTHS times `factor`, rounded, at least 1 each."""
    return tuple(max(1, round(width * factor)) for width in WIDTHS)


def pruned_widths(widths: tuple[int, ...], sparsity: float) -> tuple[int, ...]:
    """The widths left when the share `sparsity` (rounded down, as NNI does) of each layer goes."""
    return tuple(width - int(width * sparsity) for width in widths)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulate operations of one image's forward pass, convolutions and linear layers.

    torch's counter gives floating-point operations, two to each multiply-accumulate.
    """
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 1, 28, 28, device=device))
    return counter.get_total_flops() // 2


# ---------------------------------------------------------------------------- checkpoints


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, which afterwards is either whole or as it was before.

    Raises:
        ExperimentError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
        temporary.replace(path)
    except OSError as error:
        raise ExperimentError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_model(path: Path, model: CNN, **what: str | float | None) -> None:
    """Save widths, weights and `what` the model is (plain values) as a dictionary, atomically."""
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    content = {"format": CHECKPOINT_FORMAT, "widths": list(model.widths), **what}
    buffer = io.BytesIO()  # the archive is written in memory first, so only one place can fail
    torch.save({**content, "state_dict": weights}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> tuple[CNN, dict]:
    """Read a file of save_model. It may come from a stranger: nothing in it is run or believed.

    Returns:
        The model, on the CPU and in eval mode, and the rest of the file's dictionary.

    Raises:
        ExperimentError: no such file, or not (or not wholly) a checkpoint of this script.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about some of what it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ExperimentError(f"{path}: there is no such file") from error
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise ExperimentError(
            f"{path} is not a checkpoint of this script, or is damaged; it was not loaded"
        ) from error
    try:
        return checked_model(content), {k: v for k, v in content.items() if k != "state_dict"}
    except ValueError as error:
        raise ExperimentError(f"{path} cannot be used: {error}") from error


def checked_model(content: object) -> CNN:
    """The model in a checkpoint's dictionary; ValueError says what is wrong with it."""
    if not isinstance(content, dict) or not {"format", "widths", "state_dict"} <= content.keys():
        raise ValueError("it is not a checkpoint of this script")
    if content["format"] != CHECKPOINT_FORMAT:
        raise ValueError("its format is that of another version of this script")
    widths, weights = content["widths"], content["state_dict"]
    if (
        not isinstance(widths, list)
        or len(widths) != len(WIDTHS)
        or not all(type(width) is int and 1 <= width <= MAX_WIDTH for width in widths)
    ):
        raise ValueError(f"it gives no {len(WIDTHS)} layer widths between 1 and {MAX_WIDTH}")
    with torch.device("meta"):  # shapes without memory: a hostile file gets none
        expected = CNN(tuple(widths)).state_dict()
    if not isinstance(weights, dict) or weights.keys() != expected.keys():
        raise ValueError("its layers are not those of this model")
    for name, wanted in expected.items():
        weight = weights[name]
        if (
            not isinstance(weight, Tensor)
            or weight.layout != torch.strided
            or (weight.shape, weight.dtype) != (wanted.shape, wanted.dtype)
            or not weight.is_contiguous()
        ):
            raise ValueError(f"{name} does not have the shape that its widths ask for")
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds numbers that are infinite or not numbers")
    model = CNN(tuple(widths))
    model.load_state_dict(weights)
    return model.eval()


def load_model(path: str | Path) -> CNN:
    """The ready model of a .pth file, compact or not, on the CPU and in eval mode.

    Input: float images (N, 1, 28, 28), pixels in 0..1 normalised with mean 0.1307 and deviation
    0.3081. Output: (N, 10) logits. Needs neither NNI nor a pruner.

    Raises:
        ExperimentError: no such file, or not (or not wholly) a checkpoint of this script.
    """
    model, _ = load_checkpoint(path)
    return model


@contextlib.contextmanager
def checkpoint_folder(folder: Path):
    """Make the folder and hold it for this run alone; found out before anything is trained.

    The lock is the system's, on an open file: it ends with the process, however that ends.

    Raises:
        ExperimentError: the folder cannot be written, or another run is using it.
    """
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        write_atomically(folder / ".writable", b"")
        (folder / ".writable").unlink()
        for leftover in folder.glob(".*.tmp"):  # of a run that was killed inside a save
            leftover.unlink()
    except filelock.Timeout as error:
        raise ExperimentError(
            f"another run is using {folder}; wait for it, or give this one its own --checkpoint-dir"
        ) from error
    except (OSError, ExperimentError) as error:
        raise ExperimentError(
            f"cannot write into the checkpoint folder {folder}"
            f" ({getattr(error, 'strerror', None) or error}); choose another --checkpoint-dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


# ----------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """A data set in memory, normalised; images are float32, labels int64.

    Training images are (N, 1, 28 + 2 * MAX_SHIFT, 28 + 2 * MAX_SHIFT), padded with background so
    that a shifted image is a mere slice; test images are (N, 1, 28, 28).
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __str__(self) -> str:
        full_name = {"mnist": "MNIST", "digits": "scikit-learn's digits, NOT MNIST"}[self.name]
        sizes = f"{len(self.train_labels):,} training and {len(self.test_labels):,} test images"
        return f"{full_name} ({sizes})"


class NoMNISTError(ExperimentError):
    """MNIST is neither on disk nor downloadable: the one error that has a fallback."""


MNIST_FILES = {  # unpacked name: number of dimensions in the idx header
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}


def load_data(name: str | None, data_dir: Path, subset: int | None, seed: int, device) -> Data:
    """Load MNIST or the digits; with name None MNIST, and the digits where there is no MNIST.

    Args:
        subset: keep the first `subset` training and `subset` / 6 test images of a shuffle that
            `seed` decides; None keeps all.

    Raises:
        ExperimentError: a file is damaged, MNIST was asked for by name and is not to be had, or
            the subset is larger than the data.
    """
    try:
        parts = load_digits() if name == "digits" else load_mnist(data_dir)
    except NoMNISTError as error:
        if name == "mnist":
            raise
        print(f"{error}; going on with scikit-learn's digits instead", file=sys.stderr)
        name, parts = "digits", load_digits()
    (train_images, train_labels), (test_images, test_labels) = parts
    if subset is not None:
        if subset > len(train_labels):
            raise UsageError(
                f"--subset {subset} is more than the {len(train_labels)} training images"
            )
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randperm(len(train_labels), generator=generator)[:subset]
        train_images, train_labels = train_images[kept], train_labels[kept]
        kept = torch.randperm(len(test_labels), generator=generator)[: max(1, subset // 6)]
        test_images, test_labels = test_images[kept], test_labels[kept]
    return Data(
        name or "mnist",
        normalised(F.pad(train_images, (MAX_SHIFT,) * 4)).to(device),
        train_labels.to(device),
        normalised(test_images).to(device),
        test_labels.to(device),
    )


def normalised(images: Tensor) -> Tensor:
    """uint8 (N, H, W) pixels as the float (N, 1, H, W) that the model takes."""
    return images.float().div_(255).sub_(MEAN).div_(DEVIATION).unsqueeze(1)


def load_mnist(data_dir: Path):
    """(images, labels) for training and for testing, uint8 (N, 28, 28) and int64 (N,).

    Raises:
        NoMNISTError: not on disk and not downloadable.
        ExperimentError: a file on disk is truncated or not MNIST.
    """
    from torchvision.datasets import MNIST

    raw = data_dir / "MNIST" / "raw"  # where torchvision.datasets.MNIST(data_dir) looks
    if not all((raw / name).is_file() for name in MNIST_FILES):
        download_mnist(raw)
    counts = [check_idx(raw / name, dimensions) for name, dimensions in MNIST_FILES.items()]
    if counts[0] != counts[1] or counts[2] != counts[3]:
        raise ExperimentError(f"{raw}: not as many labels as images; delete the files, run again")
    train, test = (MNIST(data_dir, train=train) for train in (True, False))
    for dataset, name in ((train, "train-labels-idx1-ubyte"), (test, "t10k-labels-idx1-ubyte")):
        if dataset.targets.max() >= CLASSES:
            raise damaged(raw / name, "it holds labels above 9")
    return (train.data, train.targets), (test.data, test.targets)


def damaged(path: Path, reason: str) -> ExperimentError:
    return ExperimentError(f"{path} is not MNIST: {reason}; delete it and run again")


def check_idx(path: Path, dimensions: int) -> int:
    """The number of items of an idx file of bytes (the format of MNIST's authors), checked."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
    except OSError as error:
        raise ExperimentError(f"cannot read {path}: {error.strerror}") from error
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, 8, dimensions)):
        raise damaged(path, "its header is wrong")
    shape = [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]
    if shape[1:] != [28, 28][: dimensions - 1]:
        raise damaged(path, "its images are not 28 x 28")
    if shape[0] < 1 or size != len(header) + math.prod(shape):
        raise damaged(path, f"{size} bytes do not fit its header, so it is truncated or changed")
    return shape[0]


def download_mnist(raw: Path) -> None:
    """Put the four unpacked files into `raw`: from archives that lie there, or from the network.

    torchvision's own MNIST(download=True) unpacks in place, so a second run could read a half
    file, and it does not turn to the next mirror when one falls silent. So its parts are used
    here in a folder of our own, and the finished files are moved into place.
    """
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive

    wrong_archive = None
    try:
        raw.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".download-", dir=raw))
    except OSError as error:
        raise NoMNISTError(f"no MNIST in {raw}, and it cannot be written: {error}") from error
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        for archive, md5 in MNIST.resources:
            if (raw / Path(archive).stem).is_file():
                continue
            if (raw / archive).is_file():
                if check_integrity(raw / archive, md5):
                    shutil.copy(raw / archive, staging)
                else:
                    wrong_archive = raw / archive
            failures = []
            for mirror in MNIST.mirrors:
                try:
                    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar per file
                        download_url(mirror + archive, str(staging), archive, md5)
                    break
                except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
                    failures.append(
                        f"{mirror}: {' '.join(str(error).split()) or type(error).__name__}"
                    )
            else:
                if wrong_archive:
                    raise damaged(wrong_archive, "its checksum is wrong")
                raise NoMNISTError(
                    f"MNIST is not in {raw} and cannot be downloaded ({'; '.join(failures)})."
                    f" To use your own copy, put {', '.join(name for name, _ in MNIST.resources)}"
                    f" there"
                )
            extract_archive(str(staging / archive))
            for file in (archive, Path(archive).stem):
                (staging / file).replace(raw / file)
    except OSError as error:  # disk full, say
        raise ExperimentError(f"cannot store MNIST in {raw}: {error.strerror or error}") from error
    finally:
        socket.setdefaulttimeout(timeout)
        shutil.rmtree(staging, ignore_errors=True)


def load_digits():
    """scikit-learn's 1,797 handwritten 8 x 8 digits in MNIST's form: 20 x 20 in a frame of 28.

    As load_mnist; a fifth, the same always, is for testing.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_sklearn_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 * 255
    images = F.interpolate(images, size=(20, 20), mode="bilinear").round().byte()
    images = F.pad(images, (4, 4, 4, 4)).squeeze(1)
    labels = torch.tensor(labels)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    return (images[train], labels[train]), (images[test], labels[test])


# ------------------------------------------------------------------- training, evaluation


def keep_freed_memory() -> None:
    """Have glibc keep the pages of freed tensors (elsewhere: do nothing).

    By default it hands every large block back to the system at once, and each training step pays
    for fresh zeroed pages: a third of a step at batch size 1000. The parameters are
    M_MMAP_THRESHOLD (-3) and M_TRIM_THRESHOLD (-1) of mallopt(3).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, 1 << 30)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock tells the truth."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


@dataclass
class Training:
    """What a training took and how it went: seconds of the loop alone, and a value per epoch."""

    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)  # % of that epoch's training images


def train(
    model: CNN,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    after_epoch=lambda epoch, training: None,
) -> Training:
    """Train with AdamW and the one-cycle schedule (Smith and Topin 2018), shuffled every epoch.

    Args:
        images: padded by MAX_SHIFT on each side; each batch is shifted by up to that many pixels.
        seed: decides the order of the images and their shifts.
        after_epoch: called with the epoch's number, from 1, and the Training so far; not timed.

    Raises:
        ExperimentError: the loss became NaN or infinite.
    """
    device = images.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=device.type != "mps")
    steps = math.ceil(len(images) / batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    training = Training()
    for epoch in range(1, epochs + 1):
        model.train()
        synchronize(device)
        start = time.perf_counter()
        # All that is random in an epoch is drawn at once, on the CPU: nothing in the loop below
        # waits for the device, and the order is the same on each kind of device.
        order = torch.randperm(len(images), generator=generator).to(device)
        shifts = torch.randint(2 * MAX_SHIFT + 1, (steps, 2), generator=generator).tolist()
        loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        for batch, (down, right) in zip(order.split(batch_size), shifts, strict=True):
            target = labels[batch]
            logits = model(images[:, :, down : down + 28, right : right + 28][batch])
            loss = F.cross_entropy(logits, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            loss_sum += loss.detach() * len(batch)
            correct += (logits.detach().argmax(1) == target).sum()
        synchronize(device)
        training.seconds += time.perf_counter() - start
        training.losses.append(loss_sum.item() / len(images))
        training.accuracies.append(100 * correct.item() / len(images))
        if not math.isfinite(training.losses[-1]):
            raise ExperimentError(
                f"the loss became {training.losses[-1]} in epoch {epoch}; lower --lr (now {lr:g})"
            )
        after_epoch(epoch, training)
    model.eval()
    return training


@torch.inference_mode()
def evaluate(model: CNN, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent. Images (N, 1, 28, 28), normalised; labels (N,)."""
    model.eval()
    batches = zip(images.split(1000), labels.split(1000), strict=True)
    correct = sum((model(batch).argmax(1) == target).sum() for batch, target in batches)
    return 100 * correct.item() / len(labels)


# -------------------------------------------------------------------------------- pruning


def prune(model: CNN, pruner: str, sparsity: float, verbose: bool = False) -> CNN:
    """A really smaller copy of `model`: the share `sparsity` of each layer's channels is gone.

    L1NormPruner drops the filters of least L1 norm (Li et al. 2017), FPGMPruner those nearest to
    the geometric median of their layer (He et al. 2019). See NNI's documentation, "Pruning Quick
    Start" and "Speed Up Model with Mask".

    Args:
        model: on the CPU; it stays as it is.
        pruner: one of PRUNERS.
        sparsity: between 0 and 1, both excluded.
        verbose: let NNI's own messages through.
    """
    with contextlib.ExitStack() as silence:
        if not verbose:
            # NNI logs, prints and warns; what it prints concerns its own graph, not the result.
            silence.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
            silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
        import nni
        from nni.compression import pruning
        from nni.compression.speedup import ModelSpeedup

        if not verbose:
            nni.silence_stdout()

        pruned = copy.deepcopy(model).eval()
        # The output layer stays whole: its channels are the ten digits.
        config = [
            {
                "op_types": ["Conv2d", "Linear"],
                "exclude_op_names": ["output"],
                "sparse_ratio": sparsity,
            }
        ]
        nni_pruner = getattr(pruning, pruner)(pruned, config)
        _, masks = nni_pruner.compress()
        nni_pruner.unwrap_model()
        # ModelSpeedup's own tracer fails on torch >= 2.2 ('NoneType' object has no attribute
        # 'startswith', NNI issue 5768); it takes a graph from torch.fx instead. Its masks spread
        # through a batch of random images; a batch of 1 would prune nothing (NNI issue 5735).
        images = torch.rand(8, 1, 28, 28)
        graph = torch.fx.symbolic_trace(pruned)
        ModelSpeedup(pruned, images, masks, graph_module=graph).speedup_model()

    # What NNI made must be what was asked for, and a plain CNN of ours: rebuild it as one.
    widths = pruned_widths(model.widths, sparsity)
    assert pruned.widths == widths, f"NNI left {pruned.widths} channels, not {widths}"
    compact = CNN(widths)
    compact.load_state_dict(pruned.state_dict())
    return compact.eval()


# --------------------------------------------------------------------------------- report


@dataclass
class Row:
    """One line of the table: a model, and what was measured of it."""

    name: str  # also the name of its .pth file
    pruner: str | None
    sparsity: float | None
    seed: int
    parameters: int
    macs: int
    accuracy_before: float | None  # % of the test images, right after pruning
    accuracy: float  # % of the test images, after (fine-)tuning
    training: Training | None  # None where --baseline skipped it

    @property
    def label(self) -> str:
        return self.name if self.pruner is None else f"{self.pruner} {self.sparsity}"


COLUMNS = (
    "model",
    "pruned, %",
    "accuracy, %",
    "difference, pp",
    "parameters",
    "fewer",
    "MACs/image",
    "training, s",
    "faster",
)


def report(rows: list[Row]) -> str:
    """The table. `pruned` is the accuracy before fine-tuning; the first row is the baseline."""
    baseline = rows[0]
    lines = []
    for row in rows:
        seconds = row.training and row.training.seconds
        compared = row is not baseline
        lines.append(
            (
                row.label,
                "" if row.accuracy_before is None else f"{row.accuracy_before:.2f}",
                f"{row.accuracy:.2f}",
                f"{row.accuracy - baseline.accuracy:+.2f}" if compared else "",
                f"{row.parameters:,}",
                f"{baseline.parameters / row.parameters:.1f}×" if compared else "",
                f"{row.macs:,}",
                "" if seconds is None else f"{seconds:.1f}",
                f"{baseline.training.seconds / seconds:.1f}×"
                if compared and baseline.training
                else "",
            )
        )
    alignment = ("left", *("right",) * (len(COLUMNS) - 1))
    return tabulate(lines, COLUMNS, disable_numparse=True, colalign=alignment)


def say(message: str) -> None:
    """Progress goes to stderr: stdout carries the table alone and can be piped."""
    print(message, file=sys.stderr, flush=True)


def encodable(text: str, encoding: str | None) -> str:
    """The text, with plain letters for the table's signs where the encoding lacks them."""
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return text.replace("×", "x")
    return text


# -------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line and exit status 2, without argparse's page of usage in front of it."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def checked(kind, wanted: str, accept):
    """An argparse type: what `kind` makes of the text, if `accept` says yes to it."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


COUNT = checked(int, "a whole number from 1 to 1,000,000,000", lambda n: 1 <= n <= 10**9)
SEED = checked(int, "a whole number from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)
SPARSITY = checked(float, "a number between 0 and 1, both excluded", lambda x: 0 < x < 1)
RATE = checked(float, "a number above 0", lambda x: 0 < x < math.inf)
MAX_FACTOR = MAX_WIDTH // max(WIDTHS)
FACTOR = checked(float, f"a number above 0, up to {MAX_FACTOR}", lambda x: 0 < x <= MAX_FACTOR)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as it can be before the data is there."""
    parser = Parser(
        prog="NNI_Pruning.py",
        description="Structured channel pruning of a CNN on MNIST: accuracy, size, training time.",
        allow_abbrev=False,
    )
    per_data_set = "default: {mnist} on MNIST, {digits} on the digits".format
    add = parser.add_argument
    add(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="where MNIST is, or is downloaded to (default: %(default)s)",
    )
    add(
        "--dataset",
        choices=("mnist", "digits"),
        help="digits: scikit-learn's, which need no download (default: mnist; digits where MNIST"
        " is not to be had)",
    )
    add(
        "--checkpoint-dir",
        type=Path,
        default=Path("checkpoints"),
        help="where the models are saved, one .pth file each (default: %(default)s)",
    )
    add("--epochs", type=COUNT, help=f"of the baseline ({per_data_set(**EPOCHS)})")
    add("--finetune-epochs", type=COUNT, help="of each pruned model (default: as --epochs)")
    add("--batch-size", type=COUNT, help=f"in images ({per_data_set(**BATCH_SIZE)})")
    add(
        "--lr",
        type=RATE,
        default=LEARNING_RATE,
        help="peak learning rate of every training (default: %(default)s)",
    )
    add(
        "--sparsity",
        type=SPARSITY,
        nargs="+",
        default=list(SPARSITIES),
        help="shares of each layer's channels to prune (default: %(default)s)",
    )
    add(
        "--pruner",
        choices=PRUNERS,
        nargs="+",
        default=list(PRUNERS),
        help="NNI's pruners to compare (default: %(default)s)",
    )
    add(
        "--width",
        type=FACTOR,
        default=1.0,
        help="multiplies every layer width of the baseline (default: %(default)s)",
    )
    add(
        "--subset",
        type=COUNT,
        metavar="N",
        help="use only N training images and N/6 test images (default: all)",
    )
    add(
        "--seed",
        type=SEED,
        default=0,
        help="decides first weights, order and shifts of the images (default: %(default)s)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto is cuda or mps where there is one, else cpu (default: %(default)s)",
    )
    add(
        "--baseline",
        type=Path,
        metavar="PATH",
        help="start from this .pth file (default: train a baseline)",
    )
    add("--verbose", action="store_true", help="let NNI's own messages through (default: silent)")
    options = parser.parse_args(argv)

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if options.device == "auto":
        options.device = next(device for device in ("cuda", "mps", "cpu") if there[device])
    elif not there[options.device]:
        parser.error(f"--device {options.device}: there is none on this machine, or torch lacks it")
    return options


# ----------------------------------------------------------------------------------- main


def describe(data: Data, epochs: int, finetune_epochs: int, seed: int, device: str) -> str:
    """The line above the table: what was run, and on what."""
    if device == "cuda":
        device = torch.cuda.get_device_name()
    elif device == "cpu":
        device = f"CPU ({torch.get_num_threads()} threads)"
    return (
        f"{data}; {epochs} + {finetune_epochs} epochs; seed {seed}; {device};"
        f" torch {torch.__version__}, NNI {version('nni')}"
    )


def load_baseline(path: Path, widths: tuple[int, ...]) -> tuple[CNN, dict]:
    """A --baseline file; ExperimentError if it is unfit to be pruned in this run."""
    model, what = load_checkpoint(path)
    if model.widths != widths:
        raise ExperimentError(
            f"--baseline {path} has layer widths {model.widths}, where {widths} are expected;"
            " choose an unpruned model, and the --width that it was trained with"
        )
    return model, what


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the experiment, print its table (also when cut short) and return the table's rows."""
    options = parse_options(argv)
    keep_freed_memory()
    with checkpoint_folder(options.checkpoint_dir):
        return experiment(options)


def experiment(options: argparse.Namespace) -> list[Row]:
    """Train or load the baseline; prune, fine-tune and save a model per pruner and sparsity."""
    device, seed = torch.device(options.device), options.seed
    widths = scaled_widths(options.width)
    if options.baseline:
        load_baseline(options.baseline, widths)  # an unfit file is found out first
    data = load_data(options.dataset, options.data_dir, options.subset, seed, device)
    epochs = options.epochs or EPOCHS[data.name]
    finetune_epochs = options.finetune_epochs or epochs
    rows: list[Row] = []

    def train_here(model: CNN, name: str, epochs: int) -> Training:
        return train(
            model,
            data.train_images,
            data.train_labels,
            epochs=epochs,
            lr=options.lr,
            batch_size=options.batch_size or BATCH_SIZE[data.name],
            seed=seed,
            after_epoch=lambda epoch, training: say(
                f"{name}: epoch {epoch} of {epochs}, loss {training.losses[-1]:.4f},"
                f" {training.seconds:.1f} s"
            ),
        )

    def finish(model: CNN, name: str, pruner=None, sparsity=None, before=None, training=None):
        """Measure and save a model that is ready, and give it its row."""
        row = Row(
            name=name,
            pruner=pruner,
            sparsity=sparsity,
            seed=seed,
            parameters=count_parameters(model),
            macs=count_macs(model),
            accuracy_before=before,
            accuracy=evaluate(model, data.test_images, data.test_labels),
            training=training,
        )
        if training:
            save_model(
                options.checkpoint_dir / f"{name}.pth",
                model,
                pruner=pruner,
                sparsity=sparsity,
                accuracy=row.accuracy,
                dataset=data.name,
                seed=seed,
            )
        rows.append(row)

    try:
        torch.manual_seed(seed)
        if options.baseline:
            baseline_path = options.baseline
            finish(load_model(baseline_path).to(device), "baseline")
        else:
            baseline_path = options.checkpoint_dir / "baseline.pth"
            model = CNN(widths).to(device)
            finish(model, "baseline", training=train_here(model, "baseline", epochs))

        for pruner, sparsity in product(options.pruner, options.sparsity):
            name = f"{pruner}_{sparsity}"
            # From the file, and seeded anew: a row is the same whichever rows came before it.
            torch.manual_seed(seed)
            model = prune(load_model(baseline_path), pruner, sparsity, options.verbose).to(device)
            before = evaluate(model, data.test_images, data.test_labels)
            # The pruned layers are new tensors; train() makes a new optimizer for them.
            training = train_here(model, name, finetune_epochs)
            finish(model, name, pruner, sparsity, before, training)
    finally:
        if rows:
            heading = describe(data, epochs, finetune_epochs, seed, options.device)
            print(encodable(f"{heading}\n\n{report(rows)}", sys.stdout.encoding))
    return rows


def command_line() -> int:
    """Run main; what a user can mend ends in one line on stderr and an exit status."""
    try:
        main()
        sys.stdout.flush()
    except ExperimentError as error:
        say(f"NNI_Pruning.py: error: {error}")
        return error.status
    except KeyboardInterrupt:
        say("NNI_Pruning.py: interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
