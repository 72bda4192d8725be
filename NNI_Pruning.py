"""What structured channel pruning does to a CNN: accuracy, size and training time, on MNIST.

    python NNI_Pruning.py                          # everything
    python NNI_Pruning.py --subset 6000 --epochs 2 # a first look, in seconds
    python NNI_Pruning.py --help                   # every option and its default

Trains a baseline CNN and saves it; prunes it with NNI's L1NormPruner and FPGMPruner at two channel
sparsities, makes each pruned model really smaller with ModelSpeedup, fine-tunes it and saves it;
prints one table. To take a compact model home: `model = load_model("checkpoints/....pth")`.

On two cores of an AMD EPYC (torch 2.15.0, NNI 3.0) it takes 45 s and reaches, mean of five seeds:
99.57 % baseline, 99.5 % with 3.9 times fewer parameters, 99.23 % with 15 times fewer.

The file reads in the order in which it runs: settings, model, checkpoints, data, training,
pruning; jobs, statistics, report, result files; options, NNI trial, main.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import csv
import ctypes
import gc
import http.client
import io
import json
import logging
import math
import os
import platform
import shutil
import socket
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path

import filelock
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# NNI, torchvision and scikit-learn are imported in the one function that needs each: load_model
# then works where they are not installed (NNI has no wheel for ARM), and --help is quick.

# ------------------------------------------------------------------------------- settings

PRUNERS = ("L1NormPruner", "FPGMPruner")
SPARSITIES = (0.5, 0.75)  # configurations 1 and 2: the share of each layer's channels that goes

# Output channels of the three convolutions and of the hidden linear layer. At 0.75 the convolutions
# keep 8, 16 and 32: whole vectors of a processor, which odd widths would leave half empty.
WIDTHS = (32, 64, 128, 48)
MAX_WIDTH = 4096  # of a layer; more is a typing error or a hostile file
CLASSES = 10

EPOCHS = {"mnist": 3, "digits": 20}  # the 1,437 digits make few steps an epoch
BATCH_SIZE = {"mnist": 256, "digits": 64}
LEARNING_RATE = 1e-2  # the peak of the one-cycle schedule
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 1  # pixels by which training images are moved, up or down and left or right

MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels, scaled to 0..1

DOWNLOAD_TIMEOUT = 10  # seconds that a mirror may stay silent
CHECKPOINT_FORMAT = 2  # 1: other layers
RESULTS_FORMAT = 1
TOLERANCE = 0.1  # percentage points: a smaller fall counts as accuracy that holds


class ExperimentError(Exception):
    """What a user can mend: printed as one line, without a traceback; ends with `status`."""

    status = 1


class UsageError(ExperimentError):
    """An option whose value turned out wrong only after the command line was read."""

    status = 2


# ---------------------------------------------------------------------------------- model


class CNN(nn.Module):
    """Three convolutions, two of them with max pooling and batch normalisation, two linear layers.

    The same class is the baseline and every pruned model; only `widths` differ.

    Args:
        widths: output channels of conv1, conv2 and conv3, and output features of hidden.

    Input: float (N, 1, 28, 28), normalised with MEAN and DEVIATION. Output: (N, 10) logits.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        c1, c2, c3, features = widths
        # On the largest map pooling and normalising cost more time than the convolution itself. So
        # conv1 has stride 2 instead, and no BatchNorm: what it is shown is normalised already.
        self.conv1 = nn.Conv2d(1, c1, 5, stride=2)  # 28 -> 12
        # No bias before a BatchNorm, which brings its own.
        self.conv2 = nn.Conv2d(c1, c2, 3, bias=False)  # 12 -> 10, pooled to 5
        self.norm2 = nn.BatchNorm2d(c2)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1, bias=False)  # 5 -> 5, pooled to 2
        self.norm3 = nn.BatchNorm2d(c3)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(c3 * 2 * 2, features)
        self.output = nn.Linear(features, CLASSES)
        self.to(memory_format=torch.channels_last)  # oneDNN's and cuDNN's faster layout here

    def forward(self, images: Tensor) -> Tensor:
        # Pooled first, a map takes a quarter of the work to normalise.
        x = F.relu(self.conv1(images), inplace=True)
        x = F.relu(self.norm2(self.pool(self.conv2(x))), inplace=True)
        x = F.relu(self.norm3(self.pool(self.conv3(x))), inplace=True)
        x = F.relu(self.hidden(x.flatten(1)), inplace=True)
        return self.output(x)

    @property
    def widths(self) -> tuple[int, ...]:
        layers = (self.conv1, self.conv2, self.conv3)
        return (*(layer.out_channels for layer in layers), self.hidden.out_features)


def scaled_widths(factor: float) -> tuple[int, ...]:
    """WIDTHS times `factor`, rounded; at least 2 each, since ModelSpeedup fails on a single one."""
    return tuple(max(2, round(width * factor)) for width in WIDTHS)


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
        with zipfile.ZipFile(path) as archive:  # torch.save's format; torch itself never compresses
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it would unpack to more than it is")
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
    if type(content["format"]) is not int or content["format"] != CHECKPOINT_FORMAT:
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
            or (weight.layout, weight.device.type) != (torch.strided, "cpu")
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
        # Of a run that was killed inside a save.
        for leftover in (*folder.glob(".*.tmp"), *folder.glob("seed_*/.*.tmp")):
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
    """A data set in memory: images as bytes, which train and evaluate normalise, labels as int64.

    Training images are (N, 28 + 2 * MAX_SHIFT, 28 + 2 * MAX_SHIFT), padded with background so that
    a shifted image is a mere slice; test images are (N, 28, 28).
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


def load_data(name: str | None, data_dir: Path, subset: int | None, device) -> Data:
    """Load MNIST or the digits; with name None MNIST, and the digits where there is no MNIST.

    Args:
        subset: keep the first `subset` training and `subset` / 6 test images of a shuffle, the
            same whatever the run's seed, so that seeds are compared on the same images.

    Raises:
        ExperimentError: a file is damaged, MNIST was asked for by name and is not to be had, or
            the subset is larger than the data.
    """
    try:
        parts = load_digits() if name == "digits" else load_mnist(data_dir)
    except NoMNISTError as error:
        if name == "mnist":
            archives = ", ".join(f"{file}.gz" for file in MNIST_FILES)
            raw = data_dir / "MNIST" / "raw"
            raise ExperimentError(f"{error}. Put {archives} into {raw} yourself") from error
        say(f"{error}. Going on with scikit-learn's digits instead")
        name, parts = "digits", load_digits()
    (train_images, train_labels), (test_images, test_labels) = parts
    if subset is not None:
        if subset > len(train_labels):
            raise UsageError(
                f"--subset {subset} is more than the {len(train_labels)} training images"
            )
        generator = torch.Generator().manual_seed(0)
        kept = torch.randperm(len(train_labels), generator=generator)[:subset]
        train_images, train_labels = train_images[kept], train_labels[kept]
        kept = torch.randperm(len(test_labels), generator=generator)[: max(1, subset // 6)]
        test_images, test_labels = test_images[kept], test_labels[kept]
    return Data(
        name or "mnist",
        F.pad(train_images, (MAX_SHIFT,) * 4).to(device),
        train_labels.to(device),
        test_images.to(device),
        test_labels.to(device),
    )


def normalised(images: Tensor) -> Tensor:
    """uint8 (N, H, W) pixels as the float (N, 1, H, W) that the model takes."""
    return images.unsqueeze(1).float().sub_(255 * MEAN).mul_(1 / (255 * DEVIATION))


def load_mnist(data_dir: Path):
    """(images, labels) for training and for testing, uint8 (N, 28, 28) and int64 (N,).

    Raises:
        NoMNISTError: not on disk and not downloadable.
        ExperimentError: a file on disk is truncated or not MNIST.
    """
    raw = data_dir / "MNIST" / "raw"  # where torchvision.datasets.MNIST(data_dir) has them, too
    if not all((raw / name).is_file() for name in MNIST_FILES):
        download_mnist(raw)
    items = {name: read_idx(raw / name, dimensions) for name, dimensions in MNIST_FILES.items()}
    parts = []
    for part in ("train", "t10k"):
        images, labels = items[f"{part}-images-idx3-ubyte"], items[f"{part}-labels-idx1-ubyte"]
        if len(images) != len(labels):
            raise ExperimentError(
                f"{raw}: not as many labels as images; delete the files, run again"
            )
        if labels.max() >= CLASSES:
            raise damaged(raw / f"{part}-labels-idx1-ubyte", "it holds labels above 9")
        parts.append((images, labels.long()))
    return parts


def damaged(path: Path, reason: str) -> ExperimentError:
    return ExperimentError(f"{path} is not MNIST: {reason}; delete it and run again")


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 items, (N, 28, 28) or (N,), of an idx file (the format of MNIST's authors).

    torchvision's reader would take a file for whole without looking.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, 8, dimensions)):
                raise damaged(path, "its header is wrong")
            shape = [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]
            if shape[1:] != [28, 28][: dimensions - 1]:
                raise damaged(path, "its images are not 28 x 28")
            if shape[0] < 1 or size != len(header) + math.prod(shape):
                reason = f"{size} bytes do not fit its header, so it is truncated or changed"
                raise damaged(path, reason)
            return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).view(shape)
    except OSError as error:
        raise ExperimentError(f"cannot read {path}: {error.strerror}") from error


def download_mnist(raw: Path) -> None:
    """Put the four unpacked files into `raw`: from archives that lie there, or from the network.

    torchvision's own MNIST(download=True) unpacks in place, so a second run could read a half
    file. So its parts are used here, in a folder of our own; finished files move into place.
    """
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import check_integrity, extract_archive

    try:
        raw.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".download-", dir=raw))
    except OSError as error:
        reason = f"it cannot be written: {error.strerror}"
        raise NoMNISTError(f"MNIST is not in {raw}, and {reason}") from error
    try:
        for archive, md5 in MNIST.resources:
            unpacked = Path(archive).stem
            if (raw / unpacked).is_file():
                continue
            if check_integrity(raw / archive, md5):
                shutil.copy(raw / archive, staging)
            else:
                failures = download_archive(archive, md5, staging)
                if failures and (raw / archive).exists():
                    raise damaged(raw / archive, "its checksum is wrong")
                if failures:
                    raise NoMNISTError(
                        f"MNIST is not in {raw} and could not be downloaded: {'; '.join(failures)}"
                    )
            extract_archive(str(staging / archive))
            for name in (archive, unpacked):
                (staging / name).replace(raw / name)
    except OSError as error:  # disk full, say
        raise ExperimentError(f"cannot store MNIST in {raw}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def download_archive(archive: str, md5: str, folder: Path) -> list[str]:
    """Try one mirror after the other; the reasons why each failed, empty if one gave the file."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import download_url

    failures = []
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none and would wait for ever
    try:
        for mirror in MNIST.mirrors:
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # torchvision's progress bars
                    download_url(mirror + archive, str(folder), archive, md5)
                return []
            except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                failures.append(f"{mirror}: {reason}")
    finally:
        socket.setdefaulttimeout(timeout)
    return failures


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
    for fresh zeroed pages: a seventh of a step at batch size 1000. The parameters are
    M_MMAP_THRESHOLD (-3) and M_TRIM_THRESHOLD (-1) of mallopt(3).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, 1 << 30)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; emulated, it would cost time."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return False


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
    """Train, with the images in another order every epoch.

    AdamW (Loshchilov and Hutter 2019), the one-cycle schedule (Smith and Topin 2018), label
    smoothing (Szegedy et al. 2016), and, where the device computes bfloat16, mixed precision
    (Micikevicius et al. 2018): layers compute in bfloat16; weights, loss and optimizer are float32.

    Args:
        images: uint8 (N, H, W), 28 x 28 pixels padded by MAX_SHIFT on each side; each batch is
            shifted by up to that many pixels.
        labels: int64 (N,).
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
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=computes_bfloat16(device))
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
            # index_select copies whole images, ten times as fast as images[batch] gathers bytes.
            padded = images.index_select(0, batch)
            shifted = normalised(padded[:, down : down + 28, right : right + 28])
            with mixed:
                logits = model(shifted).float()
            loss = F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING)
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
        finite = torch.stack([weight.isfinite().all() for weight in model.parameters()]).all()
        if not math.isfinite(training.losses[-1]) or not finite:
            raise ExperimentError(
                f"the loss or the weights became infinite or NaN in epoch {epoch}; lower --lr"
                f" (now {lr:g})"
            )
        after_epoch(epoch, training)
    model.eval()
    return training


@torch.inference_mode()
def evaluate(model: CNN, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent. Images: uint8 (N, 28, 28); labels: int64 (N,)."""
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    correct = sum((model(normalised(x)).argmax(1) == target).sum() for x, target in batches)
    return 100 * correct.item() / len(labels)


# -------------------------------------------------------------------------------- pruning


@contextlib.contextmanager
def silence():
    """Keep NNI quiet: what it logs, prints and warns of concerns its own graph, not the result."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def import_nni():
    """NNI, its pruners and ModelSpeedup; its imports warn of what only concerns itself.

    Raises:
        ExperimentError: NNI is not installed.
    """
    with silence():
        # NNI 3.0, its last release, requires a typeguard (< 4.1.3) that imports ast.Str, which
        # Python 3.14 removed, and never uses it. Goes when NNI admits a newer typeguard.
        if not hasattr(ast, "Str"):
            ast.Str = ast.Constant
        try:
            import nni
            from nni.compression import pruning
            from nni.compression.speedup import ModelSpeedup
        except ModuleNotFoundError as error:
            if error.name != "nni":
                raise
            raise ExperimentError(
                "NNI is not installed. On Apple silicon and ARM Linux, which it has no wheel for:"
                f" {sys.executable} -m pip install nni==3.0 --no-deps --only-binary :all:"
                f" --platform macosx_10_9_x86_64 --target {sysconfig.get_path('purelib')};"
                f" then, and elsewhere: {sys.executable} -m pip install -r requirements.txt"
            ) from error
    return nni, pruning, ModelSpeedup


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

    Raises:
        ExperimentError: a layer would lose all its channels, or NNI has no room for its files.
    """
    problem = None
    nni, pruning, ModelSpeedup = import_nni()
    with contextlib.nullcontext() if verbose else silence():
        from nni.compression.speedup.error_code import EmptyLayerError

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
        try:
            ModelSpeedup(pruned, images, masks, graph_module=graph).speedup_model()
        except EmptyLayerError:
            problem = f"at {sparsity} {pruner} leaves a layer without channels; lower --sparsity"
        except (OSError, RuntimeError) as error:  # it keeps the weights in a temporary file
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            problem = f"NNI cannot write to {tempfile.gettempdir()}: {reason.strerror}"
        # NNI's graphs are reference cycles: megabytes that would otherwise wait for the collector.
        del graph, masks, nni_pruner
        gc.collect()
    if problem:
        raise ExperimentError(problem)

    # What NNI made must be what was asked for, and a plain CNN of ours: rebuild it as one.
    widths = pruned_widths(model.widths, sparsity)
    assert pruned.widths == widths, f"NNI left {pruned.widths} channels, not {widths}"
    compact = CNN(widths)
    compact.load_state_dict(pruned.state_dict())
    return compact.eval()


# ----------------------------------------------------------------- jobs, rows, statistics


def epochs_of(number: int) -> str:
    return "1 epoch" if number == 1 else f"{number} epochs"


@dataclass(frozen=True)
class Job:
    """A model to be made: what one row of the table is to be about, for one seed."""

    kind: str  # "baseline", "pruned", or a control: "continued", "scratch"
    seed: int
    widths: tuple[int, ...]
    epochs: int  # of its (last) training; 0 where --baseline skips it
    pruner: str | None = None
    sparsity: float | None = None

    @property
    def name(self) -> str:
        return {
            "baseline": "baseline",
            "pruned": f"{self.pruner}_{self.sparsity}",
            "continued": f"baseline_{self.epochs}_more",
            "scratch": f"scratch_{self.sparsity}_{self.epochs}",
        }[self.kind]

    @property
    def label(self) -> str:
        return {
            "baseline": "baseline",
            "pruned": f"{self.pruner} {self.sparsity}",
            "continued": f"baseline + {epochs_of(self.epochs)}",
            "scratch": f"scratch {self.sparsity}, {epochs_of(self.epochs)}",
        }[self.kind]


@dataclass(frozen=True, kw_only=True)
class Row(Job):
    """A finished job and what was measured: a row of the table and of results.json."""

    parameters: int
    macs: int  # multiply-accumulates of one image's forward pass
    test_images: int
    accuracy_before: float | None  # % of the test images, right after pruning
    accuracy: float  # % of the test images, at the end
    training_seconds: float | None  # inside the training loop; None where --baseline skipped it
    training_losses: list[float]  # one value per epoch
    training_accuracies: list[float]  # one value per epoch, % of that epoch's training images


def planned(
    seed: int,
    widths: tuple[int, ...],
    epochs: int,
    finetune_epochs: int,
    pruners: list[str],
    sparsities: list[float],
    controls: bool = False,
) -> list[Job]:
    """The jobs of one seed, in the order in which they run; `epochs` 0: the baseline is there."""
    jobs = [Job("baseline", seed, widths, epochs)]
    if controls:
        jobs.append(Job("continued", seed, widths, finetune_epochs))
    jobs += [
        Job("pruned", seed, pruned_widths(widths, sparsity), finetune_epochs, pruner, sparsity)
        for pruner, sparsity in product(pruners, sparsities)
    ]
    if controls:
        # As long as baseline and fine-tuning together, and as long as fine-tuning alone.
        lengths = dict.fromkeys((epochs + finetune_epochs, finetune_epochs))
        jobs += [
            Job("scratch", seed, pruned_widths(widths, sparsity), length, sparsity=sparsity)
            for sparsity, length in product(sparsities, lengths)
        ]
    return jobs


def by_name(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """{name: {seed: row}}, in the order in which the names first come."""
    table: dict[str, dict[int, Row]] = {}
    for row in rows:
        table.setdefault(row.name, {})[row.seed] = row
    return table


def accuracies(rows: list[Row], kind: str, sparsity=None, pruner=None, epochs=None):
    """{seed: accuracy}, the mean of the rows that match."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row.kind, row.sparsity) != (kind, sparsity):
            continue
        if pruner in (None, row.pruner) and epochs in (None, row.epochs):
            found.setdefault(row.seed, []).append(row.accuracy)
    return {seed: statistics.mean(values) for seed, values in found.items()}


@dataclass(frozen=True)
class Verdict:
    """A claim, and what the runs say of it. Differences are in percentage points."""

    claim: str
    answer: str  # "yes", "no" or "cannot tell"
    difference: float
    low: float  # of the 95 % confidence interval
    high: float
    seeds: int


def binomial_error(accuracy: float, images: int) -> float:
    """The standard error of an accuracy measured on so many images, both in percent."""
    return math.sqrt(accuracy * (100 - accuracy) / images)


def judge(
    claim: str, ours: dict[int, float], theirs: dict[int, float], images: int, tolerance: float = 0
) -> Verdict | None:
    """Is `ours` better than `theirs` less `tolerance`? Accuracies in percent, by seed.

    "yes" where the whole 95 % interval lies above -tolerance, "no" where all of it lies below.
    With several seeds the interval is Student's t over the paired differences; with one, it is
    Newcombe's (1998) for the difference of two binomial proportions of `images` images each,
    which stays honest near 100 %. None where the two have no seed in common.
    """
    from scipy import stats  # slow to import, and needed at the end only

    seeds = ours.keys() & theirs.keys()
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    difference = statistics.mean(differences)
    if len(seeds) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(seeds))
        below = above = error * stats.t.ppf(0.975, len(seeds) - 1)
    else:
        (seed,) = seeds
        a, b = ours[seed], theirs[seed]
        (a_low, a_high), (b_low, b_high) = (
            stats.binomtest(right, images).proportion_ci(method="wilson")
            for right in (min(round(accuracy * images / 100), images) for accuracy in (a, b))
        )
        below = math.hypot(a - 100 * a_low, 100 * b_high - b)
        above = math.hypot(100 * a_high - a, b - 100 * b_low)
    low, high = float(difference - below), float(difference + above)
    answer = "yes" if low > -tolerance else "no" if high < -tolerance else "cannot tell"
    return Verdict(claim, answer, difference, low, high, len(seeds))


def verdicts(rows: list[Row]) -> list[Verdict]:
    """The experiment's questions, as far as the rows can answer them."""
    baseline, continued = (accuracies(rows, kind) for kind in ("baseline", "continued"))
    images = min(row.test_images for row in rows)
    sparsities = list(dict.fromkeys(row.sparsity for row in rows if row.kind == "pruned"))
    held = f"accuracy holds (falls by less than {TOLERANCE:.2f} pp)"
    found = []
    for sparsity in sparsities:
        pruned = accuracies(rows, "pruned", sparsity)
        found.append(judge(f"{held} at {sparsity}", pruned, baseline, images, TOLERANCE))
        if continued:
            claim = f"... and against the baseline trained as long, at {sparsity}"
            found.append(judge(claim, pruned, continued, images, TOLERANCE))
    for sparsity in sparsities:
        l1, fpgm = (accuracies(rows, "pruned", sparsity, pruner) for pruner in PRUNERS)
        found.append(judge(f"FPGM is better than L1 at {sparsity}", fpgm, l1, images))
    for sparsity in sparsities:
        pruned = accuracies(rows, "pruned", sparsity)
        lengths = {row.epochs for row in rows if (row.kind, row.sparsity) == ("scratch", sparsity)}
        for epochs in sorted(lengths, reverse=True):
            scratch = accuracies(rows, "scratch", sparsity, epochs=epochs)
            claim = f"pruning is better than {epochs_of(epochs)} from scratch at {sparsity}"
            found.append(judge(claim, pruned, scratch, images))
    return [verdict for verdict in found if verdict]


# --------------------------------------------------------------------------------- report

COLUMNS = (
    "model",
    "before\ntuning, %",  # accuracy right after pruning
    "accuracy\n%",
    "pp to\nbaseline",
    "parameters",
    "times\nfewer",
    "MACs per\nimage",
    "training\ntime, s",
    "times\nfaster",
)


def spread(values: list[float | None], digits: int) -> str:
    """Mean ± standard deviation; of one value, the value; of none, nothing."""
    if not values or None in values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def signed(points: float) -> str:
    return f"{round(points, 2) + 0.0:+.2f}"  # adding 0.0 makes -0.0 a plain 0.0


def results_table(rows: list[Row]) -> str:
    """One line per model, over all its seeds, compared with the baseline of the same seeds."""
    table = by_name(rows)
    baseline = table["baseline"]
    lines = []
    for name, by_seed in table.items():
        row, *_ = same = list(by_seed.values())
        pairs = [(row, baseline[row.seed]) for row in same if row.seed in baseline]
        against = times_fewer = times_faster = ""
        if name != "baseline" and pairs:
            against = signed(statistics.mean(a.accuracy - b.accuracy for a, b in pairs))
            times_fewer = f"{pairs[0][1].parameters / row.parameters:.1f}×"
            if all(a.training_seconds and b.training_seconds for a, b in pairs):
                ours = sum(a.training_seconds for a, b in pairs)
                times_faster = f"{sum(b.training_seconds for a, b in pairs) / ours:.1f}×"
        lines.append(
            (
                row.label,
                spread([row.accuracy_before for row in same], 2),
                spread([row.accuracy for row in same], 2),
                against,
                f"{row.parameters:,}",
                times_fewer,
                f"{row.macs:,}",
                spread([row.training_seconds for row in same], 1),
                times_faster,
            )
        )
    alignment = ("left", *("right",) * (len(COLUMNS) - 1))
    return tabulate(lines, COLUMNS, disable_numparse=True, colalign=alignment)


def verdict_table(rows: list[Row]) -> str:
    """What the rows say of each claim, and what the intervals rest on; nothing if nothing."""
    found = verdicts(rows)
    if not found:
        return ""
    lines = [
        (v.claim, v.answer, signed(v.difference), f"{signed(v.low)} to {signed(v.high)}")
        for v in found
    ]
    headers = ("claim", "answer", "pp", "95 % interval")
    alignment = ("left", "left", "right", "right")
    if max(verdict.seeds for verdict in found) > 1:
        basis = "Intervals: Student's t over the seeds, paired. At a sparsity: mean of its pruners."
    else:
        basis = (
            "One seed: the intervals hold the binomial error of the test images alone.\n"
            "How much seeds differ is not in them; --seeds 0 1 2 3 4 measures it."
        )
    table = tabulate(lines, headers, disable_numparse=True, colalign=alignment)
    return f"\n\n{table}\n\n{basis}"


def report(rows: list[Row]) -> str:
    """The table and the verdict under it."""
    return results_table(rows) + verdict_table(rows)


def put(text: str, stream) -> None:
    """Print to stdout or stderr, also where its encoding lacks the table's signs.

    Where nobody reads any more (`| head -1`) or the stream was closed, the run goes on: its files
    were asked for, too.

    Raises:
        ExperimentError: the stream is a file, and the disk is full.
    """
    if stream is None:
        return
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.replace("×", "x").replace("±", "+-")
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        # What is still in the stream's buffer would fail once more at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise ExperimentError(f"cannot write the output: {error.strerror}") from error


def say(message: str) -> None:
    """To stderr: stdout carries the report alone, and can be piped."""
    put(message, sys.stderr)


def error_line(message: object) -> str:
    """A message as the one line that it is to be, even where a path in it has several."""
    return f"NNI_Pruning.py: error: {' '.join(str(message).split())}"


class Progress:
    """On a terminal one bar for the whole run, elsewhere one line an epoch; on stderr."""

    def __init__(self, jobs: list[Job]) -> None:
        seeds = len({job.seed for job in jobs}) > 1
        self.names = [f"{job.label}, seed {job.seed}" if seeds else job.label for job in jobs]
        # An epoch counts by its arithmetic, so that the time left is about right.
        macs = {widths: count_macs(CNN(widths)) for widths in {job.widths for job in jobs}}
        self.weights = [macs[job.widths] for job in jobs]
        dumb = sys.stderr is None or os.environ.get("TERM") == "dumb"
        terminal = not dumb and sys.stderr.isatty()
        self.bar = tqdm(
            total=sum(job.epochs * w for job, w in zip(jobs, self.weights, strict=True)),
            disable=not terminal,
            bar_format="{percentage:3.0f}%|{bar}| {remaining} left, {desc}",
        )

    def epoch(self, at: int, job: Job, epoch: int, training: Training) -> None:
        text = (
            f"{at + 1}/{len(self.names)} {self.names[at]}: epoch {epoch} of {job.epochs},"
            f" loss {training.losses[-1]:.4f}"
        )
        if self.bar.disable:
            say(f"{text}, {training.seconds:.1f} s")
        else:
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(self.weights[at])


# Okabe and Ito's colours, which the colour-blind can tell apart; the markers differ as well.
STYLES = {
    "baseline": ("#000000", "D"),
    "continued": ("#666666", "d"),
    "L1NormPruner": ("#0072B2", "o"),
    "FPGMPruner": ("#D55E00", "s"),
    "scratch": ("#009E73", "^"),
}


def draw(rows: list[Row], path: Path) -> None:
    """Draw accuracy against parameters, and training time beside it, one mark per model (PNG)."""
    try:
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where there is no HOME
        from matplotlib.figure import Figure  # without pyplot: no screen is looked for
    except ImportError as error:
        say(f"{path.name} was not drawn: {error}")
        return
    groups = [list(by_seed.values()) for by_seed in by_name(rows).values()]
    figure = Figure(figsize=(10, 6), dpi=130, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    drawn: dict[int, int] = {}  # marks so far at a parameter count: they stand side by side
    for at, group in enumerate(groups):
        row = group[0]
        colour, marker = STYLES[row.pruner or row.kind]
        accuracy = [row.accuracy for row in group]
        mean, seconds = statistics.mean(accuracy), [row.training_seconds for row in group]
        drawn[row.parameters] = drawn.get(row.parameters, -1) + 1
        x = row.parameters * 1.25 ** drawn[row.parameters]
        error = (
            statistics.stdev(accuracy) if len(group) > 1 else binomial_error(mean, row.test_images)
        )
        left.errorbar(x, mean, error, color=colour, marker=marker, markersize=10, capsize=4)
        text = row.label.replace("NormPruner", "").replace("Pruner", "")
        left.annotate(
            text,
            (x, mean + error),
            (0, 9),  # points above the error bar
            textcoords="offset points",
            rotation=90,
            ha="center",
            color=colour,
        )
        if row.kind == "baseline":
            left.axhline(mean, color=colour, linestyle="--", linewidth=1, zorder=0)
        if None not in seconds:
            right.barh(at, statistics.mean(seconds), color=colour)
            text = f" {spread(seconds, 1)}"
            right.annotate(text, (statistics.mean(seconds), at), va="center")
    left.set(
        xscale="log",
        xlabel="parameters (equal ones side by side)",
        ylabel="accuracy on the test images, %",
    )
    several = max(map(len, groups)) > 1
    bars = "standard deviation over seeds" if several else "binomial standard error"
    left.set_title(f"accuracy ± {bars}")
    low, high = left.get_ylim()
    left.set_ylim(low, high + 0.45 * (high - low))  # room for the labels
    left.margins(x=0.1)
    right.set_title("training time, s")
    right.set_yticks(range(len(groups)), [group[0].label for group in groups])
    right.invert_yaxis()
    right.margins(x=0.35)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


# --------------------------------------------------------------------------- result files


def plain(row: Row) -> dict:
    """A row as results.json has it."""
    return {"name": row.name, **asdict(row)}


def write_results(folder: Path, rows: list[Row], about: dict) -> None:
    """Write results.json and results.csv of all the rows so far, each atomically.

    results.json: "format", `about` (settings, versions, hardware), "rows" (the fields of Row) and
    "verdicts" (the fields of Verdict). results.csv: the rows, less what is a value per epoch.
    """
    content = {
        "format": RESULTS_FORMAT,
        **about,
        "rows": [plain(row) for row in rows],
        "verdicts": [asdict(verdict) for verdict in verdicts(rows)],
    }
    text = json.dumps(content, indent=1, allow_nan=False, default=str)
    write_atomically(folder / "results.json", text.encode())
    table = io.StringIO()
    single = [name for name, value in plain(rows[0]).items() if not isinstance(value, list | tuple)]
    writer = csv.DictWriter(table, single, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(map(plain, rows))
    write_atomically(folder / "results.csv", table.getvalue().encode())


def read_rows(path: Path) -> list[Row]:
    """The rows of a results.json, or of an export of NNI's trials (`nnictl experiment export`).

    Raises:
        ExperimentError: it is neither.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            found = content["rows"]
        else:  # an export: a list of trials, with the final result that each reported, as text
            found = [row for trial in content for row in json.loads(trial["value"])["rows"]]
        rows = [checked_row(values) for values in found]
        if not any(row.kind == "baseline" for row in rows):
            raise ValueError("there is no baseline among its rows")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExperimentError(
            f"{path} is neither a results.json of this script nor an export of its NNI trials"
            f" ({type(error).__name__}: {error})"
        ) from error
    return rows


def checked_row(values: dict) -> Row:
    """The row that `plain` made; KeyError, TypeError or ValueError where a value is unfit."""
    row = Row(**{field.name: values[field.name] for field in fields(Row)})
    if row.kind not in ("baseline", "pruned", "continued", "scratch"):
        raise ValueError(f"unknown kind {row.kind!r}")
    counts = (row.parameters, row.macs, row.test_images)
    if not all(type(count) is int and 0 < count < 10**15 for count in counts):
        raise ValueError(f"{row.kind}: parameters, macs and test_images are not whole numbers")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (row.seed, row.epochs)):
        raise ValueError(f"{row.kind}: seed and epochs are not whole numbers")
    numbers = [row.accuracy, row.accuracy_before, row.training_seconds, row.sparsity]
    if not all(n is None or (type(n) in (int, float) and 0 <= n < 1e15) for n in numbers):
        raise ValueError(f"{row.kind}: a measured value is not a number of 0 or more")
    if row.accuracy is None or row.accuracy > 100:
        raise ValueError(f"{row.kind}: the accuracy is not in percent")
    if row.pruner not in (None, *PRUNERS):
        raise ValueError(f"unknown pruner {row.pruner!r}")
    return replace(row, widths=tuple(row.widths))


# -------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line and exit status 2, without argparse's page of usage in front of it."""
        self.exit(2, f"{error_line(message)} (--help lists the options)\n")

    def _print_message(self, message: str, file=None) -> None:
        put(message.rstrip("\n"), file)  # --help and errors, too, may find no reader


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
        epilog="results.json holds heading, settings, versions, hardware; rows, each with name, "
        f"{', '.join(field.name for field in fields(Row))}; verdicts, each with "
        f"{', '.join(field.name for field in fields(Verdict))}. results.csv holds the rows.",
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
        "--seeds",
        "--seed",
        type=SEED,
        nargs="+",
        default=[0],
        help="each decides first weights, order and shifts of the images; with several, the whole"
        " experiment is run for each (default: 0)",
    )
    add(
        "--controls",
        action="store_true",
        help="add fair comparisons: the baseline trained on, compact models trained from scratch"
        " (default: without)",
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
    add(
        "--report",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="only print the table of earlier runs, from their results.json or from an export of"
        " NNI trials, and draw results.png (default: run the experiment)",
    )
    add("--verbose", action="store_true", help="let NNI's own messages through (default: silent)")
    options = parser.parse_args(argv)
    if [] in vars(options).values():  # what argparse makes of --lr=--
        parser.error("'--' is not a value of an option")
    for name in ("seeds", "pruner", "sparsity"):  # said twice is meant once
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if options.device == "auto":
        options.device = next(device for device in ("cuda", "mps", "cpu") if there[device])
    elif not there[options.device]:
        parser.error(f"--device {options.device}: there is none on this machine, or torch lacks it")
    return options


# ------------------------------------------------------------------------------- NNI trial


def trial_arguments() -> list[str]:
    """The trial's parameters, as options of the same names; none outside an NNI experiment.

    To be called once: NNI hands out the next parameters at each call.
    """
    if "NNI_PLATFORM" not in os.environ:
        return []
    nni, *_ = import_nni()
    arguments = []
    for name, value in (nni.get_next_parameter() or {}).items():
        values = value if isinstance(value, list | tuple) else [value]
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return arguments


def report_epoch(training: Training) -> None:
    """An intermediate result: accuracy on that epoch's training images.

    Not on the test images: an assessor that stops trials early would choose by them.
    """
    import_nni()[0].report_intermediate_result(training.accuracies[-1])


def report_to_experiment(rows: list[Row]) -> None:
    """The trial's final result: accuracy, and all that --report needs for the table."""
    nni, *_ = import_nni()
    row = rows[-1]
    nni.report_final_result(
        {
            # NNI 3.0 hands two trials that start together each other's parameters, and its records
            # keep the swap. In the exported CSV these, the true ones, take the records' place.
            **(nni.get_current_parameter() or {}),
            "default": row.accuracy,
            "parameters": row.parameters,
            "macs": row.macs,
            "training_seconds": row.training_seconds,
            "rows": [plain(row) for row in rows],
        }
    )


# ----------------------------------------------------------------------------------- main


def describe(data: Data, epochs: int, finetune_epochs: int, seeds: list[int], device: str) -> str:
    """The line above the table: what was run, and on what."""
    numbers = ", ".join(map(str, seeds))
    return (
        f"{data}; {epochs} + {finetune_epochs} epochs; seed{'s' * (len(seeds) > 1)} {numbers};"
        f" {device}; torch {torch.__version__}, NNI {version('nni')}"
    )


def hardware() -> dict[str, str | int | None]:
    """The machine, as far as Python knows it."""
    name = platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux says more here
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
    }


def device_name(device: str) -> str:
    """The device, and the precision of training where it is not float32."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"CPU, {torch.get_num_threads()} threads" if device == "cpu" else device.upper()
    return f"{name}, bf16" if computes_bfloat16(torch.device(device)) else name


def check_baseline(path: Path, widths: tuple[int, ...]) -> str | None:
    """The data set that a --baseline file was trained on; ExperimentError if it is unfit."""
    model, what = load_checkpoint(path)
    if model.widths != widths:
        raise ExperimentError(
            f"--baseline {path} has layer widths {model.widths}, where {widths} are expected;"
            " choose an unpruned model, and the --width that it was trained with"
        )
    return what.get("dataset")


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the experiment, print its report (also when cut short) and return its rows."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse_options([*arguments, *trial_arguments()])
    if options.report:
        rows = [row for path in options.report for row in read_rows(path)]
        options.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        draw(rows, options.checkpoint_dir / "results.png")
        put(report(rows), sys.stdout)
        return rows
    import_nni()  # missing, it is said before anything is trained
    folder, trial = options.checkpoint_dir, "NNI_PLATFORM" in os.environ
    if trial:
        if (len(options.pruner), len(options.sparsity), len(options.seeds)) != (1, 1, 1):
            raise UsageError(
                "a trial of an NNI experiment needs one pruner, one sparsity, one seed"
            )
        folder = folder / os.environ["NNI_TRIAL_JOB_ID"]  # trials must not share files
    with checkpoint_folder(folder):
        return experiment(options, folder, trial)


def run_job(job: Job, data: Data, baseline: Path, options, after_epoch) -> tuple[CNN, Row]:
    """Make one model and measure it; `baseline` is the file that it starts from, if it does."""
    # Seeded anew, and from the baseline's file: a row does not depend on the rows before it.
    torch.manual_seed(job.seed)
    before = None
    if job.kind == "pruned":
        model = prune(load_model(baseline), job.pruner, job.sparsity, options.verbose)
        before = evaluate(model.to(options.device), data.test_images, data.test_labels)
    elif job.kind == "continued" or job.epochs == 0:
        model = load_model(baseline).to(options.device)
    else:
        model = CNN(job.widths).to(options.device)
    assert model.widths == job.widths
    training = Training()
    if job.epochs:
        training = train(
            model,
            data.train_images,
            data.train_labels,
            epochs=job.epochs,
            lr=options.lr,
            batch_size=options.batch_size or BATCH_SIZE[data.name],
            seed=job.seed,
            after_epoch=after_epoch,
        )
    return model, Row(
        **vars(job),
        parameters=count_parameters(model),
        macs=count_macs(model),
        test_images=len(data.test_labels),
        accuracy_before=before,
        accuracy=evaluate(model, data.test_images, data.test_labels),
        training_seconds=training.seconds if job.epochs else None,
        training_losses=training.losses,
        training_accuracies=training.accuracies,
    )


def experiment(options: argparse.Namespace, folder: Path, trial: bool) -> list[Row]:
    """Run the jobs of every seed, one after the other; save models and results as they come."""
    widths = scaled_widths(options.width)
    if options.baseline:  # an unfit one is found out before the data is loaded
        trained_on = check_baseline(options.baseline, widths)
    data = load_data(options.dataset, options.data_dir, options.subset, options.device)
    if options.baseline and trained_on != data.name:
        raise ExperimentError(
            f"--baseline {options.baseline} was trained on {trained_on},"
            f" and this run is on {data.name}"
        )
    epochs = options.epochs or EPOCHS[data.name]
    finetune_epochs = options.finetune_epochs or epochs
    jobs = [
        job
        for seed in options.seeds
        for job in planned(
            seed,
            widths,
            0 if options.baseline else epochs,
            finetune_epochs,
            options.pruner,
            options.sparsity,
            options.controls,
        )
    ]
    heading = describe(data, epochs, finetune_epochs, options.seeds, device_name(options.device))
    about = {
        "heading": heading,
        "settings": vars(options),
        "versions": {name: version(name) for name in ("torch", "torchvision", "nni", "numpy")}
        | {"python": platform.python_version()},
        "hardware": {"device": device_name(options.device), **hardware()},
    }
    rows: list[Row] = []
    progress = Progress(jobs)
    keep_freed_memory()  # not before: what loading the data took can go back
    try:
        for at, job in enumerate(jobs):
            # The first seed's models lie in the folder itself, those of others in their own.
            home = folder if job.seed == options.seeds[0] else folder / f"seed_{job.seed}"

            def after_epoch(epoch, training, at=at, job=job):
                progress.epoch(at, job, epoch, training)
                if trial and job.kind == "pruned":
                    report_epoch(training)

            baseline = options.baseline or home / "baseline.pth"
            model, row = run_job(job, data, baseline, options, after_epoch)
            if job.epochs and job.kind in ("baseline", "pruned"):
                home.mkdir(exist_ok=True)
                save_model(
                    home / f"{job.name}.pth",
                    model,
                    pruner=job.pruner,
                    sparsity=job.sparsity,
                    accuracy=row.accuracy,
                    dataset=data.name,
                    seed=job.seed,
                )
            rows.append(row)
            write_results(folder, rows, about)
        if trial:
            report_to_experiment(rows)
        draw(rows, folder / "results.png")
    finally:  # what is finished is shown, whatever happened
        progress.bar.close()
        if rows:
            put(f"{heading}\n\n{report(rows)}", sys.stdout)
    return rows


def command_line(argv: list[str] | None = None) -> int:
    """Run main; what a user can mend ends in one line on stderr and an exit status."""
    try:
        main(argv)
    except ExperimentError as error:
        say(error_line(error))
        return error.status
    except KeyboardInterrupt:
        say("NNI_Pruning.py: interrupted")
        return 130
    except OSError as error:
        say(error_line(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        exhausted = ("out of memory", "not enough memory", "can't allocate memory")  # torch's words
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in exhausted):
            raise  # a mistake of ours: the traceback is wanted
        say(error_line("not enough memory; lower --batch-size or --width, or use a --subset"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
