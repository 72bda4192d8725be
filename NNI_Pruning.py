"""What structured channel pruning does to a CNN: accuracy, size and speed, on MNIST.

    python NNI_Pruning.py                          # everything
    python NNI_Pruning.py --subset 6000 --epochs 2 # a quick look

The script trains a CNN. It prunes it with NNI's L1NormPruner and FPGMPruner at two channel
sparsities, makes each pruned model smaller with ModelSpeedup, and fine-tunes it. It saves every
model, prints a table, and compares the models. With one seed, this took 28 s on two cores of an AMD
EPYC with bfloat16 (torch 2.14.1, NNI 3.0). Five seeds: 99.57 % for the baseline; 99.47 % (L1) and
99.51 % (FPGM) at sparsity 0.5 with 3.9 times fewer parameters; 99.23 % at 0.75 with 15.3 times
fewer. Filters chosen at random do as well: 99.50 % and 99.26 %.

Start at `main`: it is the experiment. The functions before it are in the order in which it calls
them. The section after it, "own networks", is not part of it: `prune` does for networks of others
what `prune_cnn` does for this one. `from NNI_Pruning import load_model, prune` gives you both.
"""

import argparse
import ast
import contextlib
import copy
import ctypes
import gc
import io
import logging
import math
import os
import socket
import sys
import timeit
import traceback
import warnings
from collections import Counter
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Tracer
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# Other packages are imported where they are used. So load_model needs only torch, and prune only
# torch and NNI.

PRUNERS = ("L1NormPruner", "FPGMPruner")
SPARSITIES = (0.5, 0.75)  # the two configurations: the share of each layer's channels to remove

# The layers of CNN that are pruned, and their output channels. At sparsity 0.75 the convolutions
# keep 8, 16 and 32 channels: multiples of 8 fill a processor's vector registers.
LAYERS = ("conv1", "conv2", "conv3", "hidden")
WIDTHS = (32, 64, 128, 48)

# "digits" are scikit-learn's 1,797 handwritten digits, used where MNIST cannot be downloaded.
EPOCHS = {"mnist": 3, "digits": 20}  # an epoch of the digits has few steps
BATCH_SIZE = {"mnist": 256, "digits": 64}
LEARNING_RATE = 1e-2  # the peak of the one-cycle schedule
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 1  # training images move by up to this many pixels, vertically and horizontally

MEAN = 0.1307  # of MNIST's training pixels, scaled to 0..1
DEVIATION = 0.3081  # standard deviation of the same pixels

# The columns of results.csv. Runs can be compared if their SETTINGS are equal.
SETTINGS = (
    "dataset train_images test_images baseline_epochs finetune_epochs batch_size lr finetune_lr"
).split()
COLUMNS = [*"name kind seed pruner sparsity epochs epochs_before".split(), *SETTINGS]
COLUMNS += "hardware versions parameters macs accuracy_before training_seconds".split()
COLUMNS += "accuracy wrong inference_us".split()
MARGIN = 0.1  # percentage points: accuracies that differ by less count as equal


class ExperimentError(Exception):
    """An error that the user can fix. It prints as a message, without a traceback."""


def one_line(error):
    first_line = str(error).split("\n")[0]
    return f"{type(error).__name__}: {first_line}"


# -------------------------------------------------------------------------------- options
def parse_options(arguments: list[str], is_trial: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "NNI_Pruning.py",
        description="Prune a CNN on MNIST, and compare accuracy, size and speed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    count = number_between(1, math.inf)
    seed = number_between(0, 2**32)  # torch takes the last 32 bits of a larger one
    rate = number_between(1e-9, math.inf)  # a lower one changes no weight
    sparsity = number_between(1 / max(WIDTHS), 1)  # a lower one removes no channel
    option("--data-dir", type=Path, default="data", help="MNIST's folder")
    option("--dataset", choices=EPOCHS, help="mnist, or digits if it cannot be downloaded")
    option("--checkpoint-dir", type=Path, default="checkpoints", help="folder for all results")
    option("--epochs", type=count, help=f"epochs of the baseline; None means {EPOCHS}")
    option("--finetune-epochs", type=count, help="of each pruned model; None: as the baseline")
    option("--batch-size", type=count, help=f"in images; None means {BATCH_SIZE}")
    option("--lr", type=rate, default=LEARNING_RATE, help="peak rate from random weights")
    option("--finetune-lr", type=rate, help="peak rate of the fine-tuning; None means --lr")
    option("--sparsity", type=sparsity, nargs="+", default=SPARSITIES, help="channels to remove")
    option("--pruner", nargs="+", choices=PRUNERS, default=PRUNERS, help="pruners to compare")
    option("--subset", type=count, help="train on so many images, test on a sixth as many")
    option("--seeds", "--seed", type=seed, nargs="+", default=[0], help="one run for each")
    option("--controls", action="store_true", help="add models to compare with: see the README")
    option("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="where to compute")
    option("--baseline", type=Path, help="a saved baseline to start from")
    option("--report", type=Path, help="only show this results.csv file")

    args = parser.parse_args(arguments)
    if args.baseline and args.epochs:
        parser.error("--epochs is for a baseline to be trained: leave it out with --baseline")
    if is_trial and len(args.pruner) * len(args.sparsity) * len(args.seeds) > 1:
        parser.error("a trial of an NNI experiment needs one --pruner, one --sparsity, one --seed")
    return args


def number_between(low: float, high: float):
    """A `type` for argparse: a number of the same type as `low`, at least `low` and below `high`.

    A whole number may be given as 2.0: a search space of NNI can.
    """

    def number(text):
        value = float(text)
        if not low <= value < high or type(low)(value) != value:
            allowed = f"{type(low).__name__} in [{low:g}, {high:g})"
            raise argparse.ArgumentTypeError(f"{text} is no {allowed}")
        return type(low)(value)

    return number


# -------------------------------------------------------------------------------- machine
def import_nni():
    """Import NNI with its pruners and ModelSpeedup, also on Python 3.14, and silence it.

    Raises ExperimentError if it is missing.
    """
    warnings.filterwarnings("ignore", module="nni|torch.utils._pytree")  # about NNI's own code
    # NNI 3.0, the last release, requires a typeguard (< 4.1.3) that imports ast.Str but never uses
    # it. Python 3.14 removed that name. On 3.12 and 3.13, hasattr would print a warning.
    if "Str" not in vars(ast):
        ast.Str = ast.Constant
    try:
        import nni.compression.pruning
        import nni.compression.speedup
    except ModuleNotFoundError as error:
        raise ExperimentError(
            f"NNI is missing ({error}): {sys.executable} -m pip install -r requirements.txt"
            " (Apple silicon and ARM Linux need the README's command for them)"
        ) from error
    nni.silence_stdout()
    logging.getLogger("nni").setLevel(logging.CRITICAL)  # prune itself says what is wrong
    return nni


def limit_threads():
    """Use no more threads than processors that this process may use."""
    if "OMP_NUM_THREADS" not in os.environ:  # else the user has decided
        from joblib import cpu_count  # reads affinity and a container's quota

        torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))


def keep_freed_memory():
    # Linux's C library gives the memory of large tensors back to the system, and asks for it again
    # in the next step. This can slow the baseline by half, and not the small models.
    with contextlib.suppress(AttributeError):  # macOS and Windows have no mallopt
        mallopt = ctypes.pythonapi.mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: 32 MiB, the largest value


def select_device(name: str) -> torch.device:
    """The named device, tried with a small convolution. Raises ExperimentError if that fails."""
    try:
        image = torch.ones(1, 1, 3, 3, device=name)
        F.conv2d(image, image).item()
        return image.device
    except Exception as error:  # a driver can be missing or too old; torch raises many errors
        raise ExperimentError(f"--device {name} does not work: {one_line(error)}") from error


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware; emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def write(path: Path, content: bytes):
    """Write a file, or raise ExperimentError. After a crash, the file is the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ExperimentError(f"cannot write {path}: {error.strerror}") from error


# ----------------------------------------------------------------------------------- data
def load_data(requested: str | None, data_dir: Path, subset: int | None):
    """Load "mnist" or "digits". None means MNIST, or the digits if it cannot be downloaded.

    Returns the name of the dataset, (images, labels) for training, and the same for testing. Images
    are uint8 (N, 28, 28), labels int64 (N,). With `subset`, there are that many training images and
    a sixth as many test images, the same for every seed.

    Raises ExperimentError if MNIST cannot be read, or is asked for and cannot be downloaded.
    """
    dataset = requested or "mnist"
    if dataset == "mnist":
        try:
            training, testing = load_mnist(data_dir)
        except ExperimentError as error:
            if requested or any(data_dir.glob("MNIST/raw/*")):  # damaged or incomplete
                raise
            print(f"{error}. Using scikit-learn's digits instead.", file=sys.stderr)
            dataset = "digits"
    if dataset == "digits":
        training, testing = load_small_digits()
    if subset is not None:
        generator = torch.Generator().manual_seed(0)
        training = random_part(*training, subset, generator)
        testing = random_part(*testing, subset // 6 or 1, generator)
    return dataset, training, testing


def load_mnist(data_dir):
    """Training and test set of MNIST, downloaded if they are not in `data_dir`."""
    from torchvision.datasets import MNIST

    raw = data_dir / "MNIST" / "raw"
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds; torchvision sets no timeout and could wait forever
    try:
        parts = [MNIST(data_dir, train=is_train, download=True) for is_train in (True, False)]
    except Exception as error:  # torchvision raises the same error for no network and bad files
        raise ExperimentError(
            f"MNIST cannot be downloaded or read ({' '.join(str(error).split())});"
            f" delete {raw} to download it again, or put its four .gz files there"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_before)
    return [(part.data, part.targets) for part in parts]


def load_small_digits():
    """Training and test set of scikit-learn's 1,797 handwritten digits, in MNIST's format."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # 8 x 8 pixels, 0 to 16
    images = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16 * 255
    images = F.interpolate(images, size=(20, 20), mode="bilinear").round().byte()
    images = F.pad(images, (4, 4, 4, 4)).squeeze(1)  # 20 x 20 in a frame of 28 x 28, as MNIST
    labels = torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [(images[part], labels[part]) for part in (order[:1437], order[1437:])]


def random_part(images: Tensor, labels: Tensor, size: int, generator: torch.Generator):
    """At most `size` random images, with their labels."""
    chosen = torch.randperm(len(labels), generator=generator)[:size]
    return images[chosen], labels[chosen]


def normalize(images: Tensor) -> Tensor:
    """uint8 (N, H, W) pixels as the float (N, 1, H, W) that the model takes."""
    # The same as (pixels / 255 - MEAN) / DEVIATION, with fewer passes over the pixels.
    return images.unsqueeze(1).float().sub_(255 * MEAN).mul_(1 / (255 * DEVIATION))


# ---------------------------------------------------------------------------------- model
class CNN(nn.Module):
    """A small CNN for 28 x 28 images: three convolutions and two linear layers.

    The baseline and all pruned models are of this class. They differ in `widths`: the output
    channels of conv1, conv2 and conv3, and the output features of hidden.

    Input: float (N, 1, 28, 28), pixels in 0..1, normalized with MEAN and DEVIATION.
    Output: float (N, 10), logits.
    """

    def __init__(self, widths=WIDTHS):
        super().__init__()
        c1, c2, c3, features = widths
        # On the largest feature map, pooling and BatchNorm would take longer than the convolution.
        # So conv1 has stride 2 instead of pooling, and no BatchNorm.
        self.conv1 = nn.Conv2d(1, c1, 5, stride=2)  # 28 -> 12
        # A convolution before a BatchNorm needs no bias: BatchNorm has one.
        self.conv2 = nn.Conv2d(c1, c2, 3, bias=False)  # 12 -> 10, pooled to 5
        self.norm2 = nn.BatchNorm2d(c2)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1, bias=False)  # 5 -> 5, pooled to 2
        self.norm3 = nn.BatchNorm2d(c3)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(c3 * 2 * 2, features)
        self.output = nn.Linear(features, 10)

    def forward(self, images):
        # Pooling comes before normalization: the smaller map takes a quarter of the work.
        x = F.relu(self.conv1(images), inplace=True)
        x = F.relu(self.norm2(self.pool(self.conv2(x))), inplace=True)
        x = F.relu(self.norm3(self.pool(self.conv3(x))), inplace=True)
        x = F.relu(self.hidden(x.flatten(1)), inplace=True)
        return self.output(x)

    @property
    def widths(self):
        return tuple(len(getattr(self, name).weight) for name in LAYERS)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: CNN) -> int:
    """Multiply-accumulates (MACs) of one image's forward pass: half of torch's count."""
    spare = copy.deepcopy(model).cpu()  # BatchNorm's statistics change in training mode
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        spare(torch.zeros(1, 1, 28, 28))
    return counter.get_total_flops() // 2


def load_model(path: str | Path) -> CNN:
    """Load a model that this script saved; it is on the CPU and in eval mode.

    Raises ExperimentError if the file cannot be read or is not a model saved by this script.
    """
    return load_checkpoint(path)[0]


def load_checkpoint(path: Path) -> tuple[CNN, dict]:
    """Load a model as load_model does, and its row of the results."""
    try:
        # With weights_only, no code in the file runs.
        row = torch.load(path, map_location="cpu", weights_only=True)
        weights = row.pop("state_dict")
        model = CNN([len(weights[f"{layer}.weight"]) for layer in LAYERS])
        model.load_state_dict(weights)
    except Exception as error:  # a damaged file can make torch raise almost any error
        raise ExperimentError(f"{path} is no model of this script: {one_line(error)}") from error
    return model.eval(), row


def save_model(path: Path, model: CNN, row: dict):
    """Save a model and its row of the results to a file that load_model reads."""
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    file = io.BytesIO()
    torch.save({**row, "state_dict": weights}, file)
    write(path, file.getvalue())


# ------------------------------------------------------------------- training, evaluation
def synchronized_time(device: torch.device) -> float:
    """The time in seconds, after the device finishes all work queued on it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return timeit.default_timer()


def batches(images: Tensor, labels: Tensor, size: int, generator: torch.Generator):
    """Yield the batches of one epoch, in a new order: images (size, 28, 28), and their labels.

    Args:
        images: uint8 (N, 28 + 2 * MAX_SHIFT, 28 + 2 * MAX_SHIFT). Each batch takes a slice of
            28 x 28 at a random place.
        labels: int64 (N,).
    """
    # The CPU draws all random numbers of an epoch at once. So the steps never wait for the device,
    # and the order is the same on every kind of device.
    order = torch.randperm(len(images), generator=generator).to(images.device)
    parts = order.split(size)
    corners = torch.randint(2 * MAX_SHIFT + 1, (len(parts), 2), generator=generator)
    for indices, (top, left) in zip(parts, corners.tolist()):
        # index_select copies whole images; images[indices] would take ten times as long.
        padded = images.index_select(0, indices)
        yield padded[:, top : top + 28, left : left + 28], labels[indices]


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    epochs_before: int = 0,
    lr: float,
    batch_size: int,
    seed: int,
    title: str = "",
) -> float:
    """Train a model in place and return the seconds of the training steps alone.

    Uses AdamW (Loshchilov and Hutter 2019), the one-cycle schedule (Smith and Topin 2018) and label
    smoothing (Szegedy et al. 2016). If the device computes bfloat16, it also uses mixed precision
    (Micikevicius et al. 2018): the layers compute in bfloat16, while weights, loss and optimizer
    stay in float32.

    Args:
        images, labels: uint8 (N, 28, 28), int64 (N,). Each batch is shifted at random.
        epochs_before: as many epochs of this seed the model has seen; the training goes on with
            the next ones.
        lr: the peak of the one-cycle schedule.
        seed: decides the order of the images, and the shifts.

    Raises ExperimentError if a weight becomes NaN or infinite.
    """
    from tqdm import trange

    device = images.device
    mixed_precision = torch.autocast(device.type, torch.bfloat16, enabled=computes_bfloat16(device))
    model.train()
    # The first step takes longer: torch chooses its kernels. So a copy takes one before the clock.
    with mixed_precision:
        copy.deepcopy(model)(normalize(images[:batch_size])).sum().backward()

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    # This check before each step would start CUDA, also for a model on the CPU. It can be broken.
    optimizer._accelerator_graph_capture_health_check = lambda: None
    steps = epochs * math.ceil(len(images) / batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    padded = F.pad(images, [MAX_SHIFT] * 4)  # with background
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs_before):
        next(batches(padded, labels, batch_size, generator))  # draws all numbers of an epoch
    seconds = 0.0
    progress = trange(epochs, desc=title, unit="epoch")
    for _ in progress:
        start = synchronized_time(device)
        right = 0
        for batch, target in batches(padded, labels, batch_size, generator):
            with mixed_precision:
                logits = model(normalize(batch)).float()
            F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            right += (logits.detach().argmax(1) == target).sum()
        seconds += synchronized_time(device) - start
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ExperimentError(f"{title}: the loss diverged; lower --lr or --finetune-lr")
        share = 100 * right.item() / len(images)
        progress.set_postfix_str(f"{share:.2f} % of the training images right")
    return seconds


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> dict:
    """What the results say about a model on test images, without mixed precision.

    Args:
        images: uint8 (N, 28, 28).
        labels: int64 (N,).

    Returns "accuracy", in percent; "wrong", the numbers of the images that the model gets wrong, as
    text; and "inference_us", microseconds for one image in the fastest batch, with `normalize`.
    """
    model.eval()
    # On a GPU, small batches would measure how long it takes to start the work.
    size = 250 if images.device.type == "cpu" else len(images)
    model(normalize(images[:size]))  # the first call takes longer
    predicted = []
    fastest = math.inf
    for batch in images.split(size):
        start = synchronized_time(images.device)
        predicted.append(model(normalize(batch)).argmax(1))
        fastest = min(fastest, (synchronized_time(images.device) - start) / len(batch))
    wrong = (torch.cat(predicted) != labels).nonzero().flatten().tolist()
    return {
        "accuracy": 100 * (len(labels) - len(wrong)) / len(labels),
        "wrong": " ".join(map(str, wrong)),
        "inference_us": 1e6 * fastest,
    }


# -------------------------------------------------------------------------------- pruning
def prune_cnn(model: CNN, pruner: str, sparsity: float, scored: CNN | None = None) -> CNN:
    """Prune a CNN in eval mode with NNI, in place, and return it: NNI's "Pruning Quick Start".

    `prune`, at the end of this file, does the same for networks of other people.

    Args:
        pruner: L1NormPruner removes the filters of smallest L1 norm (Li et al. 2017), FPGMPruner
            those nearest to the geometric median of their layer (He et al. 2019).
        sparsity: the share of each layer's channels to remove.
        scored: the CNN whose filters get the scores, if it is not the model itself.
    """
    nni = import_nni()
    config = {
        "op_types": ["Conv2d", "Linear"],
        "exclude_op_names": ["output"],  # it has one output for each class
        "sparse_ratio": sparsity,
    }
    nni_pruner = getattr(nni.compression.pruning, pruner)(scored or model, [config])
    _, masks = nni_pruner.compress()  # zeros for the weights of the filters to remove
    nni_pruner.unwrap_model()  # the pruner has put each layer into a wrapper of its own
    # ModelSpeedup tries the model on random numbers to learn what else goes with the filters.
    torch.manual_seed(0)
    images = torch.rand(8, 1, 28, 28)  # of a single image, it would prune nothing
    # ModelSpeedup's own tracer fails on torch >= 2.2 ('NoneType' object has no attribute
    # 'startswith', NNI issue 5768). It accepts a graph from torch.fx instead.
    graph = torch.fx.symbolic_trace(model)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints "0 Filter"
        speedup = nni.compression.speedup.ModelSpeedup(model, images, masks, graph_module=graph)
        return speedup.speedup_model()


# ---------------------------------------------------------------------- results, report
def read_results(path: Path):
    """The rows of a results.csv file, or of the trials that NNI has exported, as a DataFrame.

    Raises ExperimentError if it is not that, or if the trials cannot be compared.
    """
    import pandas as pd

    try:
        # "wrong" is text, also where it is one number or empty.
        frame = pd.read_csv(path, usecols=COLUMNS, dtype={"wrong": str}).fillna({"wrong": ""})
        if frame.empty:
            raise ValueError("it has no rows")
        # A given baseline may have been trained otherwise.
        values = frame.query("kind == 'pruned'")[SETTINGS].nunique()
        if values.max() > 1:
            raise ValueError(f"its models differ in {' and '.join(values[values > 1].index)}")
    except Exception as error:  # a file can hold anything
        raise ExperimentError(f"{path} cannot be shown: {one_line(error)}") from error
    return frame.drop_duplicates(["name", "seed"])  # a tuner may try the same twice


def comparisons(frame) -> list[dict]:
    """Each pruned model against those of its size, and those of full size.

    Differences in accuracy, in percentage points, over the seeds that both models have.
    """
    is_wrong = frame.set_index(["name", "seed"])["wrong"].str.get_dummies(" ")
    # Those are the images that some model gets wrong. Add the others.
    images = map(str, range(frame["test_images"].iloc[0]))
    is_wrong = is_wrong.reindex(columns=images, fill_value=0)
    models = frame.drop_duplicates("name").to_dict("records")
    models.sort(key=lambda model: model["kind"] == "pruned")  # the pruned ones last
    lines = []
    for other, model in combinations(models, 2):
        is_of_one_size = other["sparsity"] == model["sparsity"] or math.isnan(other["sparsity"])
        if model["kind"] != "pruned" or not is_of_one_size:
            continue
        differences = 100 * (is_wrong.loc[other["name"]] - is_wrong.loc[model["name"]]).dropna()
        if differences.empty:  # no seed in common
            continue
        mean = differences.mean(axis=None)
        half = half_interval(differences)
        low = mean - half
        high = mean + half
        line = {"model": model["name"], "compared with": other["name"], "difference": mean}
        lines.append({**line, "low": low, "high": high, "conclusion": conclusion(low, high)})
    return lines


def half_interval(differences) -> float:
    """Half of the 95 % interval of the mean of differences: a row for each seed, a column an image.

    The larger of Student's interval over the seeds and the normal one over the images. Few seeds
    can lie close together by chance. Then the images tell how large a difference has to be. Where
    hardly any image differs, up to 3.7 of so many could, in every seed (rule of three, 97.5 %).
    """
    from scipy import stats

    over_seeds = stats.t.ppf(0.975, len(differences) - 1) * differences.mean(axis=1).sem()
    over_images = stats.norm.ppf(0.975) * differences.mean().sem()
    floor = 370 / differences.shape[1] if differences.any().sum() < 4 else 0
    return max(floor, over_images, over_seeds)  # of one seed, over_seeds is NaN: never larger


def conclusion(low: float, high: float) -> str:
    """What an interval of the difference in accuracy says, in words that `report` explains."""
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return f"equal within {MARGIN}" if max(-low, high) < MARGIN else "cannot tell"


def results_table(frame) -> str:
    """One line per model: means over its seeds."""
    import tabulate

    tabulate.MIN_PADDING = 0  # a heading needs no more room than its words
    frame = frame.assign(wrong=frame["wrong"].str.count(r"\d+"))
    lines = []
    for name, model in frame.groupby("name", sort=False):
        mean = model.mean(numeric_only=True)
        spread = f" +- {model['wrong'].std():.0f}" if len(model) > 1 else ""
        line = {
            "model": name,
            "before\ntraining": f"{mean['accuracy_before']:.2f}",
            "accuracy\n%": f"{mean['accuracy']:.2f}",
            f"wrong of\n{mean['test_images']:,.0f}": f"{mean['wrong']:.0f}{spread}",
            "para-\nmeters": f"{mean['parameters']:,.0f}",
            "MACs\n10^6": f"{mean['macs'] / 1e6:.2f}",
            "train\ns": f"{mean['training_seconds']:.1f}",
            "inference\nus": f"{mean['inference_us']:.1f}",
        }
        # An interrupted run has not trained each model with each seed.
        baseline = frame.query("name == 'baseline' and seed in @model.seed")
        if len(baseline):  # exported trials have none
            times = baseline.mean(numeric_only=True) / mean
            line["times\nfewer"] = f"{times['parameters']:.1f}x"
            line["times\nfaster"] = f"{times['inference_us']:.1f}x"
        lines.append(line)
    return tabulate.tabulate(
        lines, "keys", colalign=["left"], stralign="right", disable_numparse=True
    )


def report(frame) -> str:
    """What was run, the table of the models, and what can be concluded from it."""
    from tabulate import tabulate

    run = frame.iloc[-1]  # the first can be a given baseline, of another run
    data = "MNIST" if run["dataset"] == "mnist" else "scikit-learn digits, NOT MNIST"
    parts = [
        f"{data} ({run['train_images']:,} training and {run['test_images']:,} test images)\n"
        f"{run['baseline_epochs']} + {run['finetune_epochs']} epochs;"
        f" peak rates {run['lr']:g} + {run['finetune_lr']:g};"
        f" seeds {', '.join(map(str, frame['seed'].unique()))}\n"
        f"{' and '.join(frame['hardware'].unique())}; {' and '.join(frame['versions'].unique())}",
        results_table(frame),
    ]
    lines = comparisons(frame)
    if lines:
        parts.append(tabulate(lines, headers="keys", floatfmt="+.2f"))
        parts.append(
            "Differences in accuracy, in percentage points, with 95 % intervals (low to high).\n"
            "better, worse: the whole interval is above 0, or below.\n"
            f"equal within {MARGIN}: the interval holds 0, and no difference of {MARGIN} or more.\n"
            "cannot tell: neither."
        )
    if frame["seed"].nunique() == 1 or "given" in set(frame["kind"]):
        parts.append(
            "All these models come from one trained baseline. Another one can come out otherwise:\n"
            "--seeds 0 1 2 3 4 trains five."
        )
    elif lines:
        parts.append(
            f"Each line alone is wrong at most about 1 time in 20, and the table has {len(lines)}."
        )
    return "\n\n".join(parts)


COLORS = {"L1NormPruner": "#0072b2", "FPGMPruner": "#d55e00"}  # the color-blind can tell them apart


def draw(frame, path: Path):
    """Draw accuracy (each seed, mean, standard deviation) and training time as a PNG file."""
    # Jupyter may name one that is not installed. Nothing else of this process needs a backend.
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib.figure import Figure  # pyplot would look for a screen

    figure = Figure(figsize=(9, 4), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    baseline = frame.query("name == 'baseline'")["training_seconds"]
    for name, model in frame.groupby("name", sort=False):
        color = COLORS.get(model["pruner"].iloc[0], "#595959")  # grey: by neither pruner
        accuracy = model["accuracy"]
        left.plot(accuracy, [name] * len(accuracy), "|", color=color)
        left.errorbar(accuracy.mean(), name, xerr=accuracy.std(), fmt="o", color=color)
        earlier = baseline.mean() if len(baseline) and model["epochs_before"].any() else 0
        seconds = model["training_seconds"].mean()
        right.barh(name, earlier, color="#cccccc")
        bar = right.barh(name, seconds, left=earlier, color=color)
        right.bar_label(bar, [f"{earlier + seconds:.1f} s"], padding=3)
    left.invert_yaxis()
    left.set_xlabel("test accuracy, %\neach seed, mean and standard deviation")
    right.set_xlabel("training, s\nlight grey: that of the baseline, before")
    right.margins(x=0.3)  # room for the seconds

    file = io.BytesIO()
    figure.savefig(file, format="png")  # a user's matplotlibrc may name another format
    write(path, file.getvalue())


# ----------------------------------------------------------------------------- experiment
def trial_options() -> list[str]:
    """The parameters of a trial of an NNI experiment, as options of the command line."""
    # NNI hands out those of the next trial at each call, so call it only once.
    parameters = import_nni().get_next_parameter() or {}
    return [f"--{name.replace('_', '-')}={value}" for name, value in parameters.items()]


def row_of_baseline(path: Path, data: dict, testing) -> dict:
    """The row of a saved baseline, evaluated here.

    Raises ExperimentError if it was trained on other images, or does not say for how many epochs.
    """
    model, row = load_checkpoint(path)
    wanted = {"name": "baseline", **data}
    if not row.get("epochs") or not wanted.items() <= row.items():
        raise ExperimentError(f"{path} does not fit: it needs epochs, and {wanted}")
    model.to(testing[0].device, memory_format=torch.channels_last)  # as the other models
    return {**row, **evaluate(model, *testing), "kind": "given"}


def networks(seed: int, saved: Path, pruners, sparsities, epochs, finetune_epochs, controls: bool):
    """Yield the networks of one seed, in the order of the experiment, before their training.

    Each as its name, kind, columns of its own, and CNN. The first is the baseline: before the next,
    the caller trains it and saves it as `saved`.
    """
    # 1. The baseline.
    torch.manual_seed(seed)
    yield "baseline", "baseline", {"epochs": epochs, "epochs_before": 0}, CNN()

    # 2. The baseline, pruned with each pruner at each sparsity.
    later = {"epochs": finetune_epochs, "epochs_before": epochs}
    widths = {}  # by sparsity; all pruners remove equally many
    for pruner, sparsity in product(dict.fromkeys(pruners), dict.fromkeys(sparsities)):  # each once
        model = prune_cnn(load_model(saved), pruner, sparsity)
        widths[sparsity] = model.widths
        own = {"pruner": pruner, "sparsity": sparsity, **later}
        yield f"{pruner}_{sparsity}", "pruned", own, model

    # 3. The controls: the baseline for as many more epochs as a pruned model; models that lose
    # filters chosen at random; networks of the pruned sizes from random weights, for all epochs
    # together and for the fine-tuning's.
    if not controls:
        return
    yield f"baseline_{finetune_epochs}_more_epochs", "trained_on", later, load_model(saved)
    torch.manual_seed(-1 - seed)  # other weights than those from which the baseline started
    random = CNN()
    for sparsity in widths:
        model = prune_cnn(load_model(saved), "L1NormPruner", sparsity, scored=random)
        yield f"random_{sparsity}", "random", {"sparsity": sparsity, **later}, model
    for sparsity, length in product(widths, (epochs + finetune_epochs, finetune_epochs)):
        torch.manual_seed(seed)
        own = {"sparsity": sparsity, "epochs": length, "epochs_before": 0}
        yield f"scratch_{sparsity}_{length}_epochs", "scratch", own, CNN(widths[sparsity])


def show(path: Path):
    """Print the report of a results.csv file, and draw it beside the file."""
    frame = read_results(path)
    print(report(frame))
    draw(frame, path.with_suffix(".png"))
    print(f"\nSaved: {path.with_suffix('.png')}")


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the experiment, print its report, and return the rows of its results."""
    import pandas as pd

    is_trial = "NNI_PLATFORM" in os.environ
    arguments = sys.argv[1:] if argv is None else argv
    if is_trial:
        arguments = [*arguments, *trial_options()]
    args = parse_options(arguments, is_trial)
    if args.report:
        show(args.report)
        return []

    # What is wrong with NNI, the device or the folder shows here, before anything is trained.
    nni = import_nni()
    limit_threads()
    keep_freed_memory()
    device = select_device(args.device)
    folder = args.checkpoint_dir / os.environ.get("NNI_TRIAL_JOB_ID", "")  # of a trial: its own
    probe = folder / ".writable"
    write(probe, b"")
    probe.unlink(missing_ok=True)  # another run may have taken it away
    dataset, training, testing = load_data(args.dataset, args.data_dir, args.subset)
    training = [values.to(device) for values in training]
    testing = [values.to(device) for values in testing]

    data = {"dataset": dataset, "train_images": len(training[1]), "test_images": len(testing[1])}
    given = row_of_baseline(args.baseline, data, testing) if args.baseline else None
    epochs = given["epochs"] if given else args.epochs or EPOCHS[dataset]
    finetune_epochs = args.finetune_epochs or epochs
    precision = "bfloat16" if computes_bfloat16(device) else "float32"
    settings = {
        **data,
        "baseline_epochs": epochs,
        "finetune_epochs": finetune_epochs,
        "batch_size": args.batch_size or BATCH_SIZE[dataset],
        "lr": args.lr,
        "finetune_lr": args.finetune_lr or args.lr,
        "hardware": f"{device.type}, {torch.get_num_threads()} threads, {precision}",
        "versions": f"torch {torch.__version__}, NNI {version('nni')}",
    }

    rows = []
    results = folder / "results.csv"
    chosen = (args.pruner, args.sparsity, epochs, finetune_epochs, args.controls)
    for seed in dict.fromkeys(args.seeds):  # each once
        # The models of the first seed lie in the folder itself.
        models_dir = folder if seed == args.seeds[0] else folder / f"seed_{seed}"
        saved = args.baseline or models_dir / "baseline.pth"
        for name, kind, own, model in networks(seed, saved, *chosen):
            if given and kind == "baseline":  # it is trained and saved
                rows.append({**given, "seed": seed})
                continue
            model.to(device, memory_format=torch.channels_last)  # the faster layout
            row = {"name": name, "kind": kind, "seed": seed, **own, **settings}
            row["accuracy_before"] = evaluate(model, *testing)["accuracy"]
            row["training_seconds"] = train(
                model,
                *training,
                epochs=row["epochs"],
                epochs_before=row["epochs_before"],
                lr=row["finetune_lr"] if row["epochs_before"] else row["lr"],
                batch_size=row["batch_size"],
                seed=seed,
                title=f"{name}, seed {seed}",
            )
            row |= evaluate(model, *testing)
            row |= {"parameters": count_parameters(model), "macs": count_macs(model)}
            save_model(models_dir / f"{name}.pth", model, row)
            rows.append(row)
            write(results, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False).encode())

    if is_trial:
        # The baseline is followed by the trial's pruned model. NNI maximizes "default".
        nni.report_final_result({**rows[1], "default": rows[1]["accuracy"]})
    show(results)
    print(f"Saved: {folder}{os.sep} (models, results.csv)")
    return rows


# --------------------------------------------------------------------------- own networks
PRUNABLE = (nn.Conv2d, nn.Linear)
CHANNELWISE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.PReLU)  # channel by channel
NARROWABLE = (*PRUNABLE, nn.Conv1d, nn.ConvTranspose2d, *CHANNELWISE)  # all that NNI makes narrower


class Conflict(Exception):
    """What does not work with fewer channels. Argument: a list of nodes, each with a reason."""


def prune(model: nn.Module, pruner: str, sparsity: float, example_input, keep=()) -> nn.Module:
    """Return a copy of a network with fewer channels.

    L1NormPruner removes the filters of smallest L1 norm (Li et al. 2017), FPGMPruner those nearest
    to the geometric median of their layer (He et al. 2019). See NNI's "Pruning Quick Start".

    The copy computes what `model` computes with zeros for the removed channels: `prune` compares
    the two at the output of every layer, in float64 and on random numbers. Where they differ, or
    where NNI fails, the layers before that place keep their channels, or else the block around it
    does. A warning of the logger "NNI_Pruning" tells why. The output's layers always keep theirs.
    The copy is on the CPU and in eval mode, its parameters are new: make the optimizer for its
    fine-tuning afterwards. A head that only training uses may not fit it.

    Args:
        model: a network that torch.fx can trace; blocks that it cannot trace stay as they are. Its
            Conv2d and Linear layers are pruned; summed ones lose the same channels.
        pruner: a name from PRUNERS.
        sparsity: the share of each layer's channels to remove; between 0 and 1, both excluded.
        example_input: a batch of two, as a tensor, or a tuple of tensors for several inputs. Time
            and memory grow with the batch and the area of images: take the smallest that fit.
        keep: names of more Conv2d or Linear layers, or blocks of them, that keep their channels.

    Raises ExperimentError if an argument is wrong, or if the network cannot be pruned.
    """
    if pruner not in PRUNERS or not 0 < sparsity < 1:
        raise ExperimentError(f"pruner must be in {PRUNERS}, and sparsity between 0 and 1")
    kept = set()  # names of layers
    opaque = set()  # names of blocks that stay as they are; each is one node of the graph
    for name in [keep] if isinstance(keep, str) else keep or ():
        try:
            kept.update(dict(model.get_submodule(name).named_modules(prefix=name)))
        except AttributeError as error:
            raise ExperimentError(f"keep names {name}, which the network lacks") from error
    # NNI needs gradients, and draws random numbers. What the caller has set stays as it is.
    with (
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        contextlib.ExitStack() as at_the_end,
    ):
        torch.default_generator.manual_seed(0)
        at_the_end.callback(torch.set_default_dtype, torch.get_default_dtype())
        at_the_end.callback(gc.unfreeze)
        gc.freeze()  # else each collection of garbage goes through all modules: 0.2 s
        dtype = dtype_to_compare_in(model, example_input)
        while True:
            try:
                narrower, channels = run_nni(model, pruner, sparsity, example_input, kept, opaque)
                gc.collect()  # what NNI leaves is in reference cycles
                compact = with_layers(model, narrower)
                torch.set_default_dtype(dtype)
                compare(model, compact, channels, example_input, opaque)
                break
            except Conflict as conflict:
                keep_more(conflict, kept, opaque)
            gc.collect()
    if not narrower:
        raise ExperimentError("no channel was removed: sparsity is too low, or keep too long")
    for name, layer in model.named_modules():
        if type(layer) in PRUNABLE and len(layer.weight) == len(compact.get_submodule(name).weight):
            keep_channels(kept, {name}, "NNI removes none there")
    return compact


def copy_of(model):
    """A copy on the CPU, in eval mode, also of tensors that a forward pass has computed."""
    memo = {
        id(value): value.detach().clone()
        for value in tree_leaves([vars(module) for module in model.modules()])
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, memo).cpu().eval()


def working_copy(model):
    network = copy_of(model)  # network.to(dtype) would make complex numbers real
    return network.double() if torch.get_default_dtype() == torch.float64 else network.float()


def random_inputs(example_input):
    """The same random numbers at each call, in the example's shapes. Whole numbers stay."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for value in [example_input] if isinstance(example_input, Tensor) else example_input:
        numbers = value.cpu().clone()
        if value.is_floating_point():
            numbers = torch.rand(value.shape, generator=generator)
        elif value.dtype == torch.uint8:  # an image; NNI fails if there is a 255
            numbers.random_(255, generator=generator)
        inputs.append(numbers)
    return inputs


@torch.no_grad()
def dtype_to_compare_in(model, example_input):
    for dtype in (torch.float64, torch.float32):  # some networks ask for float32 in their own code
        torch.set_default_dtype(dtype)
        try:
            working_copy(model)(*random_inputs(example_input))
            return dtype
        except Exception as error:  # the network's own code can raise anything
            failure = error
    raise ExperimentError(f"example_input does not fit: {one_line(failure)}") from failure


class BlockTracer(Tracer):
    """Makes the blocks in `opaque` single nodes."""

    def create_args_for_root(self, root_fn, is_module, inputs):
        # Arguments of forward that the user does not pass have their default values.
        names = [f"input_{number}" for number in range(len(inputs))]
        return root_fn, [self.root, *(self.create_proxy("placeholder", n, (), {}) for n in names)]

    def is_leaf_module(self, module, name):
        return name in self.opaque or super().is_leaf_module(module, name)


@torch.no_grad()
def trace(model, example_input, opaque):
    """A copy of the network as a graph of torch.fx. Blocks that it cannot trace become opaque."""
    while True:
        network = working_copy(model)  # a new one: what `forward` writes to it is a Proxy
        tracer = BlockTracer()
        tracer.opaque = opaque
        try:  # after an error, module_stack has the blocks in which it was
            network = GraphModule(network, tracer.trace(network, random_inputs(example_input)))
            break
        except Exception as error:  # the network's own code can raise anything
            add_block(opaque, tracer.module_stack, f"torch.fx fails: {one_line(error)}", error)
    for node in network.graph.nodes:  # NNI reads some arguments by their positions
        default = [0] if node.target in (torch.cat, torch.concat, torch.stack) else []
        if default or type(layer_of(node)) in NARROWABLE:
            node.args = (*node.args, *node.kwargs.values(), *default)[:2]
            node.kwargs = {}
    return network


def add_block(opaque, module_stack, reason, error):
    """Make the smallest of these blocks opaque that is not yet. Returns its name."""
    names = [name for name, _ in module_stack.values() if name not in opaque]
    if not names:
        raise ExperimentError(f"the network cannot be pruned: {reason}") from error
    opaque.add(names[-1])
    return names[-1]


def layer_of(node):
    """The module that a node calls, if it has parameters or buffers."""
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(node.target)
        if module.state_dict():
            return module
    return None


def keep_channels(kept, names, reason):
    new = ", ".join(sorted(names - kept))
    if new:
        logging.getLogger("NNI_Pruning").warning(f"All channels stay in {new}: {reason}")
    kept.update(names)


def layers_to_prune(graph, model, kept):
    """The names of the layers that may lose channels. Adds to `kept` those that may not."""
    kept.update(layers_before(graph.output_node()))
    uses = Counter(value for _, value in model.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        layer = layer_of(node)
        if layer is not None:
            parameters = model.get_submodule(node.target).parameters()
            if type(layer) not in NARROWABLE or any(uses[value] > 1 for value in parameters):
                reason = f"NNI does not prune {type(layer).__name__}, or what shares parameters"
                keep_channels(kept, {node.target, *layers_before(node)}, reason)
    names = [
        node.target
        for node in graph.nodes
        if type(layer_of(node)) in PRUNABLE and node.target not in kept
    ]
    if names:
        return names
    raise ExperimentError("nothing can be pruned: no layer may lose channels")


def keep_more(conflict, kept, opaque):
    """For each node: keep the layers before it, or else itself, or else the block around it."""
    before = set(kept)
    for node, reason in conflict.args[0]:
        more = layers_before(node) - before
        if not more:
            more = {add_block(opaque, node.meta.get("nn_module_stack", {}), reason, conflict)}
        keep_channels(kept, more, reason)


def layers_before(node):
    """The names of the Conv2d and Linear layers whose output channels reach a node."""
    seen = set()
    waiting = [node]
    if node.op == "call_module":  # all calls of the layer
        waiting = node.graph.find_nodes(op=node.op, target=node.target)
    while waiting:
        for source in set(waiting.pop().all_input_nodes) - seen:
            seen.add(source)
            if layer_of(source) is None or isinstance(layer_of(source), CHANNELWISE):
                waiting.append(source)
    return {source.target for source in seen if type(layer_of(source)) in PRUNABLE}


class Workarounds:
    """Methods that replace those of NNI's ModelSpeedup, or go before them."""

    def tensor_propagate_check(self, value):
        """NNI's refuses a single logit."""
        return value.numel() % self.batch_size == 0

    def fix_mask_conflict(self):
        """NNI's fails on a product of 16 channels and one. What it leaves, `compare` finds."""
        with contextlib.suppress(AssertionError):
            super().fix_mask_conflict()

    def indirect_backward(self, value, mask):
        """NNI's fails on several outputs of a layer. Its gradients of 1 cancel out in softmax."""
        if mask is not None and value.requires_grad:
            value.backward(mask * torch.rand_like(value), retain_graph=True)

    def initialize_propagate(self, inputs):
        """NNI takes a parameter of equal numbers, such as the zeros of a new layer, for unused."""
        super().initialize_propagate(inputs)
        for parameter in self.graph_module.parameters():
            parameter.grad = torch.zeros_like(parameter)  # also where no gradient arrives
            if parameter.min() == parameter.max():
                parameter.data.uniform_()  # NNI restores all parameters afterwards

    @torch.no_grad()
    def replace_compressed_modules(self):
        """NNI's fails on layers that lose nothing, but which it cannot make anew."""
        tools = import_nni().compression.speedup.replacement
        self.narrower = {}  # the new layers by name
        self.channels = {}  # by node: their axis, inputs lost, outputs lost, outputs left
        for node, info in self.node_infos.items():
            layer = layer_of(node)
            if type(layer) in NARROWABLE:
                axis = -1 if isinstance(layer, nn.Linear) else 1
                mask = self.node_infos[node.args[0]].output_masks
                inputs_lost, _ = tools.convert_to_coarse_mask(mask, axis)
                lost, left = tools.convert_to_coarse_mask(info.output_masks, axis)
                if len(inputs_lost) or len(lost):
                    masks = ([mask], info.output_masks, info.param_masks)
                    make = tools.replace_module[type(layer).__name__]
                    self.narrower[node.target] = make(layer, masks)
                    self.channels[node.name] = axis, inputs_lost, lost, left


def run_nni(model, pruner, sparsity, example_input, kept, opaque):
    """Prune a copy of the network with NNI. Returns `narrower` and `channels` of Workarounds."""
    nni = import_nni()
    tools = nni.compression.speedup
    tools.model_speedup.sparsity_stats = lambda masks: ""  # for log lines, a third of NNI's time
    # NNI's other ways to propagate masks fail on some functions, such as a relu of a parameter.
    updater = tools.mask_updater.DefaultMaskUpdater()
    updater.detect = lambda _, node: node.op != "call_module"
    is_double = any(value.dtype == torch.float64 for value in model.parameters())
    torch.set_default_dtype(torch.float64 if is_double else torch.float32)
    network = trace(model, example_input, opaque)
    names = layers_to_prune(network.graph, model, kept)
    inputs = random_inputs(example_input)
    speedup_class = type("Speedup", (Workarounds, tools.ModelSpeedup), {})
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # NNI prints
            # The graph is from torch.fx, for the reason that `prune_cnn` gives.
            nni_logger = logging.getLogger("nni")  # silent
            speedup = speedup_class(network, inputs, {}, graph_module=network, logger=nni_logger)
            speedup.batch_size = max(2, len(inputs[0]))
            speedup.mask_updaters.insert(0, updater)
            # 1. Choose the channels to remove.
            configs = configs_of(names, network, sparsity)
            nni_pruner = getattr(nni.compression.pruning, pruner)(network, configs)
            _, speedup.masks = nni_pruner.compress()
            nni_pruner.unwrap_model()
            # 2. Make the smaller layers.
            speedup.speedup_model()
    except Exception as error:  # NNI raises errors of many kinds
        node = network.graph.output_node()
        for frame, _ in traceback.walk_tb(error.__traceback__):
            node = frame.f_locals.get("node", node)  # NNI's functions call it so
        code = traceback.extract_tb(error.__traceback__)[-1].line  # NNI's assertions have no words
        raise Conflict([(node, f"NNI fails at {node}: {one_line(error)} (`{code}`)")]) from error
    return speedup.narrower, speedup.channels


def configs_of(names, network, sparsity):
    """NNI's configurations, one for each layer."""
    config = {"op_names": names, "sparse_ratio": sparsity}
    # Groups ("denpendency" is NNI's spelling) make summed layers lose the same channels.
    configs = import_nni().compression.speedup.auto_set_denpendency_group_ids(network, [config])
    for config in configs:
        if "dependency_group_id" in config:
            # NNI cannot add the scores of layers that differ in kind or in number of channels.
            weight = network.get_submodule(config["op_names"][0]).weight
            config["dependency_group_id"] += f" {weight.dim()} {len(weight)}"
    # NNI's own order is that of a set of strings, another one in each process.
    return sorted(configs, key=lambda config: names.index(config["op_names"][0]))


def with_layers(model, narrower):
    """A copy of the network with NNI's layers. Its forward pass has never run."""
    compact = copy_of(model)
    originals = compact.state_dict(keep_vars=True)
    for name, layer in narrower.items():
        for key, value in layer.state_dict(keep_vars=True).items():
            original = originals[f"{name}.{key}"]
            value.data = value.data.to(original)
            value.requires_grad_(original.requires_grad)
            if value.dim() == 0:
                value.data.copy_(original)  # NNI resets BatchNorm's count of batches
        compact.set_submodule(name, layer)
    return compact.eval()


@torch.no_grad()
def compare(model, compact, channels, example_input, opaque):
    """Run both networks, node by node. Raises Conflict with all nodes where they differ."""
    conflicts = []

    def compute(node, wanted, function, *arguments):
        try:
            found = function(*arguments)
            if node.op == "output" or layer_of(node):
                assert_alike(found, wanted)
            return found
        except Exception as error:  # the network's own code can raise anything
            conflicts.append((node, f"with fewer channels, {node} fails: {one_line(error)}"))
            return copy.deepcopy(wanted)  # go on with it, and find all conflicts

    copied = Interpreter(trace(compact, example_input, opaque))
    original = Interpreter(trace(model, example_input, opaque))
    for run in (copied, original):
        run.args_iter = iter(random_inputs(example_input))
    for node, other in zip(original.graph.nodes, copied.graph.nodes):
        if node.name in channels:  # with zeros for the lost ones; `wanted` is without them
            axis, inputs_lost, lost, left = channels[node.name]
            (value, *others), _ = original.fetch_args_kwargs_from_env(node)
            value = layer_of(node)(value.index_fill(axis, inputs_lost, 0), *others)
            original.env[node] = value.index_fill(axis, lost, 0)
            wanted = value.index_select(axis, left)
        else:
            original.env[node] = wanted = original.run_node(node)
        copied.env[other] = compute(node, wanted, copied.run_node, other)
    if not conflicts:  # once more as the user runs it
        compute(node, wanted, working_copy(compact), *random_inputs(example_input))
    if conflicts:
        raise Conflict(conflicts)


def assert_alike(found, wanted):
    tolerance = torch.finfo(torch.get_default_dtype()).eps ** 0.5
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        if isinstance(other, Tensor):
            atol = tolerance * other.to(torch.complex128).abs().nanmean().nan_to_num()
            torch.testing.assert_close(one, other, rtol=tolerance, atol=atol, equal_nan=True)


# --------------------------------------------------------------------------- command line
if __name__ == "__main__":
    try:
        main()
    except ExperimentError as error:
        sys.exit(f"NNI_Pruning.py: error: {error}")
    except KeyboardInterrupt:
        print("NNI_Pruning.py: interrupted; finished models are saved", file=sys.stderr)
        sys.exit(130)
