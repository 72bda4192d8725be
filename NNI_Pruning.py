"""What structured channel pruning does to a CNN: accuracy, size and speed, on MNIST.

    python NNI_Pruning.py                          # everything
    python NNI_Pruning.py --subset 6000 --epochs 2 # a quick look

The script trains a CNN. It prunes it with NNI's L1NormPruner and FPGMPruner at two channel
sparsities, makes each pruned model smaller with ModelSpeedup, and fine-tunes it. It saves every
model, prints a table, and compares the models. With one seed, this took 32 s on two cores of an
Intel Xeon with bfloat16 (torch 2.14.1, NNI 3.0). Twenty seeds: 99.55 % for the baseline; 99.49 %
(L1) and 99.51 % (FPGM) at sparsity 0.5 with 3.9 times fewer parameters; 99.23 % and 99.24 % at 0.75
with 15.3 times fewer. After this fine-tuning, filters chosen at random do as well. After a short
and gentle one (--finetune-epochs 1 --finetune-lr 0.001), they do not.

Start at `main`: it is the experiment. The functions before it are in the order in which it calls
them. The section after it, "own networks", is not part of it: `prune` does for networks of others
what `prune_cnn` does for this one. `from NNI_Pruning import load_model, prune` gives you both.
"""

import argparse
import ast
import contextlib
import copy
import io
import logging
import math
import os
import socket
import sys
import timeit
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
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
CONVOLUTION = nn.modules.conv._ConvNd  # transposed ones too
NORM = nn.modules.batchnorm._NormBase  # BatchNorm and InstanceNorm
STATE = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}  # of all these
INPUTS = ("in_channels", "in_features")  # the attributes that count a layer's channels
OUTPUTS = ("out_channels", "out_features", "num_features", "num_parameters")
# What tells Python a number that is in a tensor, such as the condition of an `if`.
QUESTIONS = set(
    "__bool__ __int__ __float__ __complex__ __index__ __contains__ __array__"
    " item tolist numpy equal allclose is_nonzero".split()
)


def prune(model: nn.Module, pruner: str, sparsity: float, example_input, keep=()) -> nn.Module:
    """Return a copy of a network with fewer channels.

    L1NormPruner removes the filters of smallest L1 norm (Li et al. 2017), FPGMPruner those nearest
    to the geometric median of their layer (He et al. 2019). Layers whose outputs are added lose the
    same channels: NNI takes the mean of their scores.

    The copy lacks exactly the channels that NNI's pruner chose. It computes what `model` computes
    with zeros for them: `prune` compares the two at every call of a layer and at the output, in
    float64 and on random numbers. Where they would differ, layers keep their channels, and a
    warning of the logger "NNI_Pruning" tells why. The output's layers always keep theirs. What the
    network does with inputs of other sizes, or only in training, cannot be seen.

    The copy is on the CPU and in eval mode. Make the optimizer for its fine-tuning afterwards. Do
    not prune in two threads at once: torch's default dtype changes for a while.

    Args:
        model: a network. Its convolutions and Linear layers are pruned.
        pruner: a name from PRUNERS.
        sparsity: the share of each layer's channels to remove; between 0 and 1, both excluded.
        example_input: a batch of two, as a tensor, or a tuple of tensors for several inputs. Time
            and memory grow with the batch and the area of images: take the smallest that fit.
        keep: names of more layers, or blocks of them, that keep their channels.

    Raises ExperimentError if an argument is wrong, or if the network cannot be pruned.
    """
    if pruner not in PRUNERS or not 0 < sparsity < 1:
        raise ExperimentError(f"pruner must be in {PRUNERS}, and sparsity between 0 and 1")
    example = (example_input,) if isinstance(example_input, Tensor) else example_input
    if not isinstance(example, tuple) or not all(isinstance(value, Tensor) for value in example):
        raise ExperimentError(
            "example_input must be a tensor or a tuple of tensors; of a network that takes lists or"
            " dicts, prune a part that takes tensors (model.backbone, say) and put it back"
        )
    stays = dict.fromkeys(names_below(model, keep), "")  # layers that keep their channels, and why
    with settings_for_pruning():
        runs = record(model, example)
        reach = explore(runs, stays)
        groups = groups_of(runs, reach, stays)
        chosen = choose(model, runs, reach, groups, stays, pruner, float(sparsity))
        while chosen:
            compact, conflicts = cut_and_compare(model, runs, chosen, example)
            if not conflicts:
                break
            for name, reason in blamed(conflicts, runs, reach, chosen).items():
                for member in groups[name]:
                    chosen.pop(member, None)
                    stays.setdefault(member, reason)
    lines = warnings_about(model, runs, stays)
    if not chosen:
        reason = lines[0] if lines else "all layers belong to the output, or to keep"
        raise ExperimentError(f"nothing can be pruned: {reason}")
    for name, layer in runs.layers.items():
        lost = chosen.get(name, torch.tensor(0)).sum()
        small = compact.get_submodule(name)
        assert is_channelwise(layer) or outputs_of(layer) - lost == len(filters_of(small))
    for line in lines:
        logging.getLogger("NNI_Pruning").warning(line)
    return compact


def names_below(model, keep):
    """The names of these modules, and of all modules inside them."""
    names = []
    for name in [keep] if isinstance(keep, str) else keep or ():
        try:
            names += dict(model.get_submodule(name).named_modules(prefix=name))
        except AttributeError as error:
            raise ExperimentError(f"keep names {name}, which the network lacks") from error
    return names


@contextlib.contextmanager
def settings_for_pruning():
    """No gradients, no mixed precision, all on the CPU. What the caller has set comes back."""
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.compiler.set_stance("force_eager"),  # compiled code calls no layers
        contextlib.ExitStack() as at_the_end,
    ):
        at_the_end.callback(torch.set_default_dtype, torch.get_default_dtype())
        nni_logger = logging.getLogger("nni")
        at_the_end.callback(nni_logger.setLevel, nni_logger.level)
        fastpath = torch.backends.mha
        at_the_end.callback(fastpath.set_fastpath_enabled, fastpath.get_fastpath_enabled())
        fastpath.set_fastpath_enabled(False)  # it calls no layers either
        yield


def copy_of(model):
    """A copy on the CPU, in eval mode, also of tensors that a forward pass has computed."""
    memo = {
        id(value): value.detach().clone()
        for value in leaves([vars(module) for module in model.modules()])
        if not value.is_leaf
    }
    try:
        with torch.enable_grad():  # else parts that are compiled to TorchScript come out frozen
            return copy.deepcopy(model, memo).cpu().eval()
    except Exception as error:  # the network's own code can raise anything
        raise ExperimentError(f"the network cannot be copied: {one_line(error)}") from error


def working_copy(model, dtype):
    network = copy_of(model)  # network.to(dtype) would make complex numbers real
    return network.double() if dtype == torch.float64 else network.float()


def random_inputs(example, dtype):
    """The same random numbers at each call, in the example's shapes. Whole numbers stay."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(value.shape, dtype=dtype, generator=generator)
        if value.is_floating_point()
        else value.detach().cpu()
        for value in example
    ]


def compute(network, inputs, dtype):
    """The network's output, with `dtype` for what it creates itself."""
    torch.set_default_dtype(dtype)
    torch.default_generator.manual_seed(0)
    return network(*(value.clone() for value in inputs))


def leaves(value):
    """The tensors in nested tuples, lists and dicts."""
    return [part for part in tree_leaves(value) if isinstance(part, Tensor)]


def tensors_of(value):
    """The tensors in an object of any class."""
    memo = {}
    copy.deepcopy(value, memo)
    return [part for part in memo.values() if isinstance(part, Tensor)]


# Layers


def layers_of(network):
    """The layers that can be made narrower, by name: all their tensors are theirs alone."""
    modules = [*network.modules()]
    uses = Counter(id(value) for module in modules for value in module._parameters.values())
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (CONVOLUTION, nn.Linear, NORM, nn.PReLU))
        and module.state_dict().keys() <= STATE
        and all(uses[id(value)] == 1 for value in module.parameters())
        and getattr(module, "num_parameters", 2) > 1  # a PReLU with one for all channels
    }


def outputs_of(layer):
    """The number of its output channels."""
    return next(getattr(layer, name) for name in OUTPUTS if hasattr(layer, name))


def is_depthwise(layer):
    return isinstance(layer, CONVOLUTION) and layer.groups == layer.in_channels > 1


def is_channelwise(layer):
    """Whether each output channel depends on one input channel alone."""
    return is_depthwise(layer) or not isinstance(layer, (CONVOLUTION, nn.Linear))


def is_transposed(layer):
    return isinstance(layer, CONVOLUTION) and layer.transposed


def channel_axis(layer):
    if isinstance(layer, nn.Linear):
        return -1
    return -1 - len(layer.kernel_size) if isinstance(layer, CONVOLUTION) else 1


def outputs_behind(layer, inputs):
    """A mask of the output channels of a channelwise layer, from one of its input channels."""
    return inputs.repeat_interleave(outputs_of(layer) // len(inputs))


def first_argument(args, kwargs):
    return next(iter((*args, *kwargs.values())))


def forward_with(value, forward, args, kwargs):
    """Call `forward` with another first argument."""
    if args:
        return forward(value, *args[1:], **kwargs)
    return forward(**{**kwargs, next(iter(kwargs)): value})


# What depends on what


@dataclass
class Event:
    """A call of a module in the first run."""

    name: str
    output: Tensor | None = None
    end: int = 0  # the number of the next event that is not inside this call


@dataclass
class Run:
    """What one run with NaN shows."""

    filled: dict  # by layer: a mask of the output channels that are NaN
    skips: bool  # blocks without NaN do not run
    position: int = 0  # the number of the next event
    reached: dict = field(default_factory=dict)  # by layer: a mask of the inputs that are NaN
    unclear: list = field(default_factory=list)  # layers with inputs that are NaN only in part
    obstacle: str | None = None  # why the filled channels have to stay; "" is the output


class NaNRuns(TorchFunctionMode):
    """Runs a network with NaN in some channels: what becomes NaN depends on them.

    The first run, without NaN, records what each module returns. In later runs, layers return what
    is recorded: NaN ends at convolutions and Linear layers, and passes through channelwise layers.
    All else runs as it does for the network's user, but for blocks that no NaN reaches.
    """

    def __init__(self, network, inputs, dtype):
        super().__init__()
        self.network, self.inputs, self.dtype = network, inputs, dtype
        self.layers = layers_of(network)
        self.events = []
        self.used = set()  # ids of the parameters that functions get
        self.now = None  # the present Run; None: the first run
        for name, module in network.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.forward = partial(self.call, name, module.forward)
        with self:
            compute(network, inputs, dtype)
        self.order = [event.name for event in self.events if event.name in self.layers]

    def run(self, filled, skips=True) -> Run:
        """Run the network with NaN in these output channels of layers."""
        now = self.now = Run(filled, skips)
        try:
            with self:
                output = compute(self.network, self.inputs, self.dtype)
            if any(map(is_of_nan, tensors_of(output))):
                now.obstacle = ""
        except Exception as error:  # the network's own code can raise anything
            now.obstacle = f"with NaN in them, the network fails: {one_line(error)}"
        return now

    def fixed_inputs(self):
        """By layer: a mask of the inputs that depend, channel for channel, on what cannot be cut.

        These are the network's inputs, and the parameters and buffers that other code uses than
        that of their layers. What one number of a tensor reaches as well as all of them together
        does not depend on it channel for channel.
        """
        tensors = [*self.network.parameters(), *self.network.buffers(), *self.inputs]
        tensors = [value for value in tensors if can_be_nan(value) and value.numel() > 1]
        before = [value.data for value in tensors]
        reached = []
        for filled in (slice(1), slice(None)):
            for value, data in zip(tensors, before):
                value.data = data.clone(memory_format=torch.contiguous_format)
                value.data.view(-1)[filled] = math.nan
            reached.append(self.run({}, skips=False).reached)
        for value, data in zip(tensors, before):
            value.data = data
        none = torch.tensor(False)  # where the network fails on NaN before
        of_one, of_all = reached
        return {name: of_all.get(name, none) & ~of_one.get(name, none) for name in self.order}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.now is None:
            self.used.update(map(id, leaves((args, kwargs))))
        elif function.__name__ in QUESTIONS and any(map(is_of_nan, leaves((args, kwargs)))):
            raise RuntimeError("it asks for their numbers")
        result = function(*args, **kwargs)
        for value in leaves(result) if self.now else ():
            if not can_be_nan(value) and any(map(is_of_nan, leaves((args, kwargs)))):
                value.is_made_of_nan = True
        return result

    def call(self, name, forward, *args, **kwargs):
        """What a module does instead of its `forward`."""
        if self.now is None:
            return self.record(name, forward, args, kwargs)
        event = self.events[self.now.position]
        if event.name != name:
            raise RuntimeError("it takes another way")
        self.now.position += 1
        with torch._C.DisableTorchFunction():  # what is called here is not the network's
            output = None
            if name in self.layers:
                output = self.output_of_layer(event, first_argument(args, kwargs))
            elif self.can_skip(event, leaves((args, kwargs))):
                output = clean_copy(event.output)
        if output is None:
            return forward(*args, **kwargs)
        self.now.position = event.end
        return output

    def record(self, name, forward, args, kwargs):
        event = Event(name)
        self.events.append(event)
        output = forward(*args, **kwargs)
        event.end = len(self.events)
        if isinstance(output, Tensor):
            event.output = output  # which later code may change in place: its numbers do not matter
        layer = self.layers.get(name)
        shape = getattr(output, "shape", ())
        if layer and shape[channel_axis(layer) :][:1] != (outputs_of(layer),):
            del self.layers[name]  # of a derived class that returns something else
        return output

    def can_skip(self, event, arguments):
        """Whether a block can return what is recorded: neither it nor its arguments are NaN."""
        if event.output is None or not self.now.skips:
            return False
        inside = self.events[self.now.position : event.end]
        is_filled = any(other.name in self.now.filled for other in inside)
        return not is_filled and not any(map(is_of_nan, arguments))

    def output_of_layer(self, event, value):
        """The recorded output, with NaN in the filled channels and in those of NaN inputs."""
        name, now = event.name, self.now
        layer = self.layers[name]
        axis = channel_axis(layer)
        is_nan = torch.zeros(value.shape[axis], dtype=torch.bool)
        if is_of_nan(value):
            channels = value.movedim(axis, 0).flatten(1)
            is_nan = channels.isnan().any(1)
            if channels[is_nan].nan_to_num(0).any():
                now.unclear.append(name)
        now.reached[name] = is_nan | now.reached.get(name, is_nan)
        mask = outputs_behind(layer, is_nan) if is_channelwise(layer) else now.filled.get(name)
        output = clean_copy(event.output)
        if mask is not None and mask.any():
            output.movedim(axis, 0)[mask] = math.nan
        return output


def can_be_nan(value):
    return value.is_floating_point() or value.is_complex()


def is_of_nan(value):
    """Whether a tensor has a NaN, or is a truth value or a whole number made of one."""
    if not can_be_nan(value):
        return hasattr(value, "is_made_of_nan")
    is_clean = getattr(value, "clean_version", None) == value._version
    return not is_clean and bool(value.sum().isnan() and value.isnan().any())


def clean_copy(value):
    """A copy that is known to have no NaN until it changes in place."""
    value = value.clone()
    value.clean_version = value._version
    return value


def record(model, example):
    """Run a copy of the network for the first time."""
    for name, value in model.named_parameters():
        if is_lazy(value):
            raise ExperimentError(f"{name} is uninitialized: run the network once before")
    is_double = any(value.dtype == torch.float64 for value in model.parameters())
    dtype = torch.float64 if is_double else torch.float32
    network = working_copy(model, dtype)
    try:
        return NaNRuns(network, random_inputs(example, dtype), dtype)
    except Exception as error:  # the network's own code can raise anything
        raise ExperimentError(f"example_input does not fit: {one_line(error)}") from error


def explore(runs, stays):
    """For each layer, which inputs of the layers behind depend on its output channels.

    Returns, by layer and by layer behind it, a label for each input: 1 if it depends on the first
    half of the channels, 2 if on the second, 3 if on both. Adds to `stays`.
    """
    fixed = runs.fixed_inputs()
    for name in stays.keys() & set(runs.order):
        if is_depthwise(runs.layers[name]):
            fixed[name] = torch.tensor(True)
    reach = {}
    for name in dict.fromkeys(runs.order):
        channels = outputs_of(runs.layers[name])
        if is_channelwise(runs.layers[name]) or channels == 1:
            continue
        behind = reach[name] = {}
        first_half = torch.arange(channels) < channels // 2
        for label, half in ((1, first_half), (2, ~first_half)):
            run = runs.run({name: half})
            for reader, mask in run.reached.items():
                if mask.any():
                    behind[reader] = behind.get(reader, 0) + label * mask
            if run.obstacle is not None:
                stays.setdefault(name, run.obstacle)
        if any(map(is_mixed, behind.values())):
            stays.setdefault(name, "the inputs of a layer depend on many of them")
        if any((fixed[reader] & (labels > 0)).any() for reader, labels in behind.items()):
            stays.setdefault(name, "they meet what has a fixed size")
    return reach


def is_mixed(labels):
    return labels.max() == 3


def groups_of(runs, reach, stays):
    """By layer, the layers that lose the same channels: these meet at the same inputs of a layer.

    Adds to `stays`.
    """
    groups = {name: [name] for name in reach}
    names = [*reach]
    givers = {}  # by layer behind: for each input, the number of a layer that reaches it, or -1
    for number, name in enumerate(names):
        for reader, labels in reach[name].items():
            if is_mixed(labels):  # those that it multiplies, say, may lose channels all the same
                continue
            giver = givers.setdefault(reader, torch.full_like(labels, -1))
            for other in giver[(labels > 0) & (giver >= 0)].unique():
                group = [*dict.fromkeys(groups[names[other]] + groups[name])]
                groups.update(dict.fromkeys(group, group))
            giver[labels > 0] = number
    for group in groups.values():
        if len({outputs_of(runs.layers[name]) for name in group}) > 1:
            stays.setdefault(group[0], "they meet more channels, or fewer")
        for reason in [stays[name] for name in group if name in stays][:1]:
            stays.update({name: stays.get(name, reason) for name in group})
    return groups


def blocks_of(runs, name, readers):
    """How many blocks of a layer's channels have to lose equally many.

    A block is what a group of a convolution computes or reads, or what a chunk leaves.
    """
    channels = outputs_of(runs.layers[name])
    sizes = [channels // getattr(runs.layers[name], "groups", 1)]
    for reader, labels in readers.items():
        sizes.append(int((labels > 0).sum()))
        groups = getattr(runs.layers[reader], "groups", 1)
        if groups > 1 and not is_depthwise(runs.layers[reader]):
            sizes.append(min(channels, len(labels) // groups))
    return math.lcm(*(channels // math.gcd(channels, size) for size in sizes))


def choose(model, runs, reach, groups, stays, pruner, sparsity):
    """NNI's choice: by layer, a mask of the output channels to remove. Adds to `stays`."""
    names = [name for name in groups if name not in stays]
    layers = nn.Sequential()  # all Linear, because NNI knows few classes
    configs = []
    for number, name in enumerate(names):
        layers.append(nn.Linear(1, 1, bias=False))
        layers[-1].weight = nn.Parameter(filters_of(model.get_submodule(name)))
        config = {"op_names": [str(number)], "sparse_ratio": sparsity}
        config["dependency_group_id"] = groups[name][0]
        config["internal_metric_block"] = blocks_of(runs, name, reach[name])
        configs.append(config)
    if not configs:
        return {}
    _, masks = getattr(import_nni().compression.pruning, pruner)(layers, configs).compress()
    chosen = {}
    for number, name in enumerate(names):
        mask = masks[str(number)]["weight"].amax(1) == 0
        if mask.any():
            chosen[name] = mask
        else:
            stays[name] = "sparsity is too low to remove one"
    return chosen


def filters_of(layer):
    """The weights of a layer: a row for each output channel."""
    weight = layer.weight.detach().cpu()
    if is_transposed(layer):
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1) if weight.dtype == torch.float64 else weight.flatten(1).float()


# The copy


def cut_and_compare(model, runs, chosen, example):
    """A copy without the chosen channels, and its conflicts, as `compare` returns them."""
    run = runs.run(chosen, skips=False)
    conflicts = [(runs.order.index(name), f"{name} uses a part of them") for name in run.unclear]
    if run.obstacle is not None:
        conflicts.append((len(runs.order), run.obstacle))
    compact = copy_of(model)
    left = {}  # by layer: masks of the inputs and of the outputs that are left
    for name, inputs in run.reached.items():
        layer = compact.get_submodule(name)
        outputs = chosen.get(name, torch.zeros(outputs_of(layer), dtype=torch.bool))
        if is_channelwise(layer):
            outputs = outputs_behind(layer, inputs)
        left[name] = ~inputs, ~outputs
        try:
            cut(layer, *left[name])
        except RuntimeError as error:  # groups of unlike sizes
            conflicts.append((runs.order.index(name), f"{name} cannot be cut: {one_line(error)}"))
    return compact, conflicts or compare(model, compact, left, example)


def cut(layer, inputs, outputs):
    """Leave a layer only these channels, given as masks, in place."""
    for value in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
        if value.dim() == 1:
            value.data = value.data[outputs]
        elif value.dim() > 1:
            value.data = cut_weight(layer, value.data, inputs, outputs)
    by_input = (*INPUTS, "groups") if is_depthwise(layer) else INPUTS
    for names, mask in ((by_input, inputs), (OUTPUTS, outputs)):
        for name in vars(layer).keys() & names:
            setattr(layer, name, int(mask.sum()))


def cut_weight(layer, weight, inputs, outputs):
    rows, columns = (inputs, outputs) if is_transposed(layer) else (outputs, inputs)
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        return weight[rows][:, columns]
    # Each group of rows has columns of its own.
    mask = columns.view(groups, -1).repeat_interleave(len(rows) // groups, dim=0)[rows]
    return weight[rows][mask].view(len(mask), -1, *weight.shape[2:])


class Comparison:
    """Compares the inputs of layers and the output of a copy with those of the original.

    After the first sample of a batch, layers do not pass on what they compute, but random numbers,
    the same in both networks. Else a function that is saturated, say, would hide what differs.
    """

    def __init__(self, left):
        self.left = left  # by layer: masks of the inputs and of the outputs that the copy has
        self.wanted = []  # the original's calls: layer, inputs and outputs that the copy has
        self.generator = torch.Generator().manual_seed(0)
        self.number = 0  # of the next call in the copy
        self.conflicts = []  # the number of a call, and a reason

    def run(self, call, network, example, dtype):
        for name in self.left:
            layer = network.get_submodule(name)
            layer.forward = partial(call, name, layer, layer.forward)
        return tensors_of(compute(network, random_inputs(example, dtype), dtype))

    def call_original(self, name, layer, forward, *args, **kwargs):
        """With zeros for the inputs that the copy lacks."""
        inputs, outputs = self.left[name]
        axis = channel_axis(layer)
        value = first_argument(args, kwargs).clone()
        channels = value.movedim(axis, 0)
        wanted = channels[inputs].movedim(0, axis)
        channels[~inputs] = 0
        output = forward_with(value, forward, args, kwargs)
        output[1:].normal_(generator=self.generator).pow_(3)
        self.wanted.append((name, wanted, output.movedim(axis, 0)[outputs].movedim(0, axis)))
        return output

    def call_copy(self, name, layer, forward, *args, **kwargs):
        """Where the inputs differ, go on with those that are wanted: to find all conflicts."""
        wanted_name, inputs, outputs = self.wanted.pop(0)
        if name != wanted_name:
            raise RuntimeError("it takes another way")
        try:
            assert_alike(first_argument(args, kwargs), inputs)
        except AssertionError:
            self.conflicts.append((self.number, f"without some, {name} gets wrong inputs"))
        self.number += 1
        output = forward_with(inputs, forward, args, kwargs)
        output[1:] = outputs[1:]
        return output


def compare(model, compact, left, example):
    """Run both networks. Returns conflicts: the number of a layer's call, and a reason."""
    for dtype in (torch.float64, torch.float32):  # some networks ask for float32 in their own code
        comparison = Comparison(left)
        try:
            network = working_copy(model, dtype)
            wanted = comparison.run(comparison.call_original, network, example, dtype)
        except Exception as error:  # the network's own code can raise anything
            failure = error
            continue
        try:
            network = working_copy(compact, dtype)
            found = comparison.run(comparison.call_copy, network, example, dtype)
            if not comparison.conflicts:
                for one, other in zip(found, wanted, strict=True):
                    assert_alike(one, other)
        except Exception as error:
            reason = f"without some, the network fails: {one_line(error)}"
            comparison.conflicts.append((comparison.number, reason))
        return comparison.conflicts
    raise ExperimentError(f"the network fails in its second run: {one_line(failure)}") from failure


def assert_alike(found, wanted):
    """Raise AssertionError if two tensors differ by more than rounding."""
    tolerance = torch.finfo(torch.get_default_dtype()).eps ** 0.5
    close = partial(torch.testing.assert_close, found, wanted, rtol=tolerance, equal_nan=True)
    try:
        close(atol=0)
    except AssertionError:
        # Where large numbers cancel out, rounding shows. Neither zeros nor infinity, nor one huge
        # number, say how large the others are.
        sizes = wanted.to(torch.complex128).abs()
        typical = sizes[sizes.isfinite() & (sizes > 0)].median()
        close(atol=tolerance * typical.item())


def blamed(conflicts, runs, reach, chosen):
    """The layers that cause these conflicts, each with a reason."""
    reasons = {}
    for number, reason in conflicts:
        place = runs.order[number] if number < len(runs.order) else "output"
        reasons.update({name: reason for name in chosen if place in reach[name]})
    if not reasons:  # NaN did not show it, so try the last layer before
        number, reason = conflicts[0]
        before = [name for name in runs.order[:number] if name in chosen]
        reasons[(before or [*chosen])[-1]] = reason
    return reasons


def warnings_about(model, runs, stays):
    """A line for each reason why layers keep their channels, and one for those that never ran."""
    names = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (CONVOLUTION, nn.Linear)):
            continue
        reason = stays.get(name)
        if name not in runs.layers:
            reason = "their parameters are shared, or not a plain weight and bias"
        elif name not in runs.order and not runs.used & {*map(id, runs.layers[name].parameters())}:
            reason = "they never ran, and what leads to them may not fit any more"
        if reason:
            names.setdefault(reason, []).append(name)
    return sorted(f"All channels stay in {', '.join(names[reason])}: {reason}" for reason in names)


# --------------------------------------------------------------------------- command line
if __name__ == "__main__":
    try:
        main()
    except ExperimentError as error:
        sys.exit(f"NNI_Pruning.py: error: {error}")
    except KeyboardInterrupt:
        print("NNI_Pruning.py: interrupted; finished models are saved", file=sys.stderr)
        sys.exit(130)
