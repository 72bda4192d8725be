"""What structured channel pruning does to a CNN: accuracy, size and training time, on MNIST.

    python NNI_Pruning.py                          # everything
    python NNI_Pruning.py --subset 6000 --epochs 2 # a first look, in seconds

Trains a baseline CNN and saves it; prunes it with NNI's L1NormPruner and FPGMPruner at two channel
sparsities, makes each pruned model really smaller with ModelSpeedup, fine-tunes it and saves it;
prints one table. On two cores of an AMD EPYC (torch 2.15.0, NNI 3.0) this takes 48 s and reaches,
mean of five seeds: 99.57 % baseline, 99.5 % with 3.9 times fewer parameters, 99.23 % with 15 times.

The file reads in the order in which it runs; `main`, at its end, is the experiment. To take a model
home, or to prune a network of your own: `from NNI_Pruning import load_model, prune`.
"""

import argparse
import ast
import contextlib
import copy
import io
import json
import logging
import math
import os
import socket
import sys
import warnings
from importlib.metadata import version
from itertools import cycle, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Other packages are imported where they are used: load_model needs torch alone, prune NNI too.

PRUNERS = ("L1NormPruner", "FPGMPruner")
SPARSITIES = (0.5, 0.75)  # the two configurations: the share of each layer's channels that goes

# Output channels of the three convolutions and of the hidden linear layer. At 0.75 the convolutions
# keep 8, 16 and 32: whole vectors of a processor, which odd widths would leave half empty.
WIDTHS = (32, 64, 128, 48)
LAYERS = ("conv1", "conv2", "conv3", "hidden")  # those layers, by their names in CNN

EPOCHS = {"mnist": 3, "digits": 20}  # the 1,437 digits make few steps an epoch
BATCH_SIZE = {"mnist": 256, "digits": 64}
LEARNING_RATE = 1e-2  # the peak of the one-cycle schedule
LABEL_SMOOTHING = 0.1
MAX_SHIFT = 1  # pixels by which training images are moved, up or down and left or right

MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels, scaled to 0..1
TOLERANCE = 0.1  # percentage points: a smaller fall counts as accuracy that holds


class ExperimentError(Exception):
    """What a user can mend: printed as a message, without a traceback."""


# ---------------------------------------------------------------------------------- model
class CNN(nn.Module):
    """Three convolutions, two of them with max pooling and batch normalisation, two linear layers.

    The same class is the baseline and every pruned model; only `widths` differ: output channels of
    conv1, conv2, conv3, and output features of hidden. Input: float (N, 1, 28, 28), pixels in 0..1
    normalised with MEAN and DEVIATION. Output: (N, 10) logits.
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
        self.output = nn.Linear(features, 10)

    def forward(self, images: Tensor) -> Tensor:
        # Pooled first, a map takes a quarter of the work to normalise.
        x = F.relu(self.conv1(images), inplace=True)
        x = F.relu(self.norm2(self.pool(self.conv2(x))), inplace=True)
        x = F.relu(self.norm3(self.pool(self.conv3(x))), inplace=True)
        x = F.relu(self.hidden(x.flatten(1)), inplace=True)
        return self.output(x)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(len(getattr(self, layer).weight) for layer in LAYERS)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: CNN) -> int:
    """Multiply-accumulates of one image's forward pass: half of torch's count of operations."""
    model.eval()  # else BatchNorm would take the zeros into its statistics
    image = torch.zeros(1, 1, 28, 28, device=model.output.weight.device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image)
    return counter.get_total_flops() // 2


def load_model(path: str | Path) -> CNN:
    """The ready model of a .pth file, on the CPU and in eval mode; `about` has its other values.

    ExperimentError where the file is missing, damaged or another's.
    """
    try:
        about = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file
        weights = about.pop("state_dict")
        model = CNN(tuple(len(weights[f"{layer}.weight"]) for layer in LAYERS))
        model.load_state_dict(weights)
    except Exception as error:  # whatever a damaged or strange file makes torch raise
        reason = f"missing, damaged or not a model of this script: {type(error).__name__}"
        raise ExperimentError(f"{path} cannot be loaded ({reason})") from error
    model.about = about
    return model.eval()


# ----------------------------------------------------------------------------------- data
def load_data(name: str | None, data_dir: Path, subset: int | None):
    """Load MNIST or scikit-learn's digits; with name None MNIST, or the digits if that fails.

    With `subset`, so many training and a sixth as many test images, the same for every seed.
    Returns the name, (images, labels) for training and (images, labels) for testing. Images: uint8
    (N, 28, 28), for training padded with MAX_SHIFT pixels of background on each side, so that a
    shifted image is a mere slice; labels: int64 (N,). ExperimentError where MNIST is damaged, or
    was asked for by name and is not to be had.
    """
    if name != "digits":
        from torchvision.datasets import MNIST

        socket.setdefaulttimeout(10)  # seconds; torchvision sets none and would wait for ever
        try:
            parts = [MNIST(data_dir, train=train, download=True) for train in (True, False)]
            parts = [(part.data, part.targets) for part in parts]
            for x, y in parts:
                if x.shape != (len(y), 28, 28) or y.max() > 9:
                    raise ValueError("not as many labels 0 to 9 as images of 28 x 28")
            name = "mnist"
        except Exception as error:  # torchvision raises the same for no network and for bad files
            raw = data_dir / "MNIST" / "raw"
            there = raw.is_dir() and any(raw.iterdir())
            advice = f"delete {raw} and run again" if there else f"put its .gz files into {raw}"
            message = f"MNIST is not to be had: {' '.join(str(error).split())}; {advice}"
            if there or name == "mnist":
                raise ExperimentError(message) from error
            print(f"{message}. Going on with scikit-learn's digits", file=sys.stderr)
            name = "digits"
    if name == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        # 1,797 handwritten digits of 8 x 8, in MNIST's form: 20 x 20 in a frame of 28.
        x, y = map(torch.tensor, load_digits(return_X_y=True))
        x = F.interpolate(x.float().view(-1, 1, 8, 8) / 16 * 255, size=(20, 20), mode="bilinear")
        x = F.pad(x.round().byte(), (4, 4, 4, 4)).squeeze(1)
        split = train_test_split(torch.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
        parts = [(x[part], y[part]) for part in split]
    if subset is not None:
        generator = torch.Generator().manual_seed(0)
        for at, size in enumerate((subset, max(1, subset // 6))):
            kept = torch.randperm(len(parts[at][1]), generator=generator)[:size]
            parts[at] = [values[kept] for values in parts[at]]
    (x, y), testing = parts
    return name, (F.pad(x, (MAX_SHIFT,) * 4), y), testing


def normalised(images: Tensor) -> Tensor:
    """uint8 (N, H, W) pixels as the float (N, 1, H, W) that the model takes."""
    return images.unsqueeze(1).float().sub_(255 * MEAN).mul_(1 / (255 * DEVIATION))


# ------------------------------------------------------------------- training, evaluation
def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; emulated, it would cost time."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def train(model, images, labels, *, epochs, lr, batch_size, seed, title="", after_epoch=None):
    """Train, with the images in another order every epoch; returns the seconds of training alone.

    AdamW (Loshchilov and Hutter 2019), the one-cycle schedule (Smith and Topin 2018), label
    smoothing (Szegedy et al. 2016), and, where the device computes bfloat16, mixed precision
    (Micikevicius et al. 2018): layers compute in bfloat16; weights, loss and optimizer are float32.

    Images: uint8 (N, H, W), 28 x 28 pixels padded by MAX_SHIFT on each side; each batch is shifted
    by up to that many pixels. Labels: int64 (N,). `seed` decides order and shifts; `after_epoch` is
    called with the accuracy on the epoch's training images in percent. ExperimentError where the
    weights become NaN or infinite.
    """
    from torch.utils.benchmark import timer  # reads the clock once the device has done its work
    from tqdm import trange

    device = images.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    steps = math.ceil(len(images) / batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=computes_bfloat16(device))
    seconds = 0.0
    for _ in (progress := trange(epochs, desc=title, unit="epoch")):
        model.train()
        start = timer()
        # All that is random in an epoch is drawn at once, on the CPU: nothing in the loop below
        # waits for the device, and the order is the same on each kind of device.
        order = torch.randperm(len(images), generator=generator).to(device)
        shifts = torch.randint(2 * MAX_SHIFT + 1, (steps, 2), generator=generator).tolist()
        correct = torch.zeros((), device=device)
        for batch, (down, right) in zip(order.split(batch_size), shifts, strict=True):
            target = labels[batch]
            # index_select copies whole images, ten times as fast as images[batch] gathers bytes.
            padded = images.index_select(0, batch)
            shifted = normalised(padded[:, down : down + 28, right : right + 28])
            with mixed:
                logits = model(shifted).float()
            F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            correct += (logits.detach().argmax(1) == target).sum()
        seconds += timer() - start
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ExperimentError(f"{title}: the loss diverged; lower --lr (now {lr:g})")
        accuracy = 100 * correct.item() / len(images)
        progress.set_postfix_str(f"{accuracy:.2f} % of the training images right")
        if after_epoch:
            after_epoch(accuracy)
    return seconds


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent. Images: uint8 (N, 28, 28); labels: int64 (N,)."""
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    correct = sum((model(normalised(x)).argmax(1) == target).sum() for x, target in batches)
    return 100 * correct.item() / len(labels)


# -------------------------------------------------------------------------------- pruning
def import_nni():
    """NNI, with its pruners and ModelSpeedup, and quiet; ExperimentError where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they concern NNI's own code
        # NNI 3.0, its last release, requires a typeguard (< 4.1.3) that imports ast.Str, which
        # Python 3.14 removed, and never uses it. Goes when NNI admits a newer typeguard.
        if not hasattr(ast, "Str"):
            ast.Str = ast.Constant
        try:
            import nni.compression.pruning
            import nni.compression.speedup
        except ModuleNotFoundError as error:
            pip, target = f"{sys.executable} -m pip install", Path(torch.__file__).parents[1]
            raise ExperimentError(
                f"NNI is missing, or not all there ({error}): {pip} -r requirements.txt\n"
                "before that, on Apple silicon and ARM Linux, for which it has no wheel:\n"
                f"{pip} nni==3.0 --no-deps --only-binary :all: --platform macosx_10_9_x86_64"
                f" --target {target}"
            ) from error
    nni.silence_stdout()
    logging.getLogger("nni").setLevel(logging.ERROR)
    return nni


def prune(
    model: nn.Module, pruner: str, sparsity: float, example_input: Tensor, keep: str | list[str]
) -> nn.Module:
    """A really smaller copy of a network, without the share `sparsity` of each layer's channels.

    L1NormPruner drops the filters of least L1 norm (Li et al. 2017), FPGMPruner those nearest to
    the geometric median of their layer (He et al. 2019). See NNI's documentation, "Pruning Quick
    Start" and "Speed Up Model with Mask". The copy is on the CPU and in eval mode; its parameters
    are new tensors, so make the optimizer for its fine-tuning afterwards.

    `model` is any network of one input and one output tensor that torch.fx can trace; its Conv2d
    and Linear layers are pruned. `pruner` is a name of PRUNERS; `example_input` a batch of eight or
    so: with a single input NNI may find less to prune. `keep` names layers, or blocks of layers,
    that keep all their channels: the output layer, whose channels are the classes, and others.
    Layers whose outputs are added up keep each channel that one of them keeps. ExperimentError
    where the network cannot be traced or shrunk.
    """
    nni, keep = import_nni(), [keep] if isinstance(keep, str) else keep
    with contextlib.redirect_stdout(io.StringIO()):  # NNI prints
        try:
            if not 0 < sparsity < 1:
                raise ValueError("sparsity must lie between 0 and 1, both excluded")
            compact, example_input = copy.deepcopy(model).cpu().eval(), example_input.cpu()
            blocks = [compact.get_submodule(name).named_modules(prefix=name) for name in keep]
            whole = [name for block in blocks for name, _ in block]
            config = {"op_types": ["Conv2d", "Linear"], "exclude_op_names": whole}
            config["sparse_ratio"] = float(sparsity)  # the share to go, not the density
            shape = compact(example_input).shape
            nni_pruner = getattr(nni.compression.pruning, pruner)(compact, [config])
            _, masks = nni_pruner.compress()
            nni_pruner.unwrap_model()
            # ModelSpeedup's own tracer fails on torch >= 2.2 ('NoneType' object has no attribute
            # 'startswith', NNI issue 5768); it takes a graph from torch.fx instead.
            graph = torch.fx.symbolic_trace(compact)
            speedup = nni.compression.speedup.ModelSpeedup
            compact = speedup(compact, example_input, masks, graph_module=graph).speedup_model()
            if compact.eval()(example_input).shape != shape:
                raise ValueError("it gives another shape: does keep name the output layer?")
            if not count_parameters(compact) < count_parameters(model):
                raise ValueError("no channel went: the sparsity is too low")
            for name, parameter in compact.named_parameters():  # what was frozen stays frozen
                parameter.requires_grad_(model.get_parameter(name).requires_grad)
        except Exception as error:  # whatever NNI or the tracer raises
            asked = f"the network cannot be pruned with {pruner}, sparsity {sparsity}, keep {keep}"
            raise ExperimentError(f"{asked}: {type(error).__name__}: {error}") from error
    return compact


# --------------------------------------------------------------------------------- report
def write(path: Path, content: bytes) -> None:
    """Write a file that after a kill is whole or as it was; ExperimentError where it cannot be."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ExperimentError(f"cannot write {path}: {error.strerror}") from error


def as_frame(rows: list[dict]):
    """The rows of results.json as a DataFrame; KeyError, TypeError, ValueError if they are not."""
    import pandas as pd

    types = dict.fromkeys(("seed", "epochs", "parameters", "macs", "test_images"), int)
    types |= dict.fromkeys(("sparsity", "accuracy_before", "accuracy", "training_seconds"), float)
    frame = pd.DataFrame(rows).astype(types).drop_duplicates(["name", "seed", "accuracy"])
    if frame.dropna(subset="pruner").duplicated(["name", "seed"]).any():
        raise ValueError("a model has two results: show unlike runs apart")
    if "baseline" not in set(frame["name"]):
        raise ValueError("there is no baseline")
    return frame.drop_duplicates(["name", "seed"])  # a sweep's trials each measured the baseline


def read_results(paths: list[Path]) -> tuple[str, list[dict]]:
    """Heading and rows of results.json files and exports of NNI's trials; else ExperimentError."""
    headings, rows = [], []
    for path in paths:
        try:
            runs = json.loads(path.read_text(encoding="utf-8"))
            # An export is a list: of what each trial reported at its end, as text.
            runs = [json.loads(run["value"]) for run in runs] if isinstance(runs, list) else [runs]
            headings += [run["heading"] for run in runs]
            rows += [row for run in runs for row in run["rows"]]
            as_frame(rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = "no results.json of this script and no export of its NNI trials, or does not fit"
            raise ExperimentError(f"{path} is {what} ({type(error).__name__}: {error})") from error
    return "\n".join(dict.fromkeys(headings)), rows  # each heading once


def verdicts(rows) -> list[dict]:
    """What several seeds say of each claim, by Student's t over differences paired by seed.

    "yes" where the whole 95 % interval of the difference lies above 0 (above -TOLERANCE for
    accuracy that holds), "no" where all of it lies below, else "cannot tell". `rows`: of as_frame.
    """
    from scipy import stats

    accuracy = rows.pivot(index="seed", columns="name", values="accuracy")
    claims = []  # (claim, difference by seed, tolerance)
    for sparsity, pruned in rows.dropna(subset="pruner").groupby("sparsity"):
        one, *others = pruned["name"].unique()
        ours = accuracy[[one, *others]].mean(axis=1, skipna=False)  # of the pruners
        for name, theirs in accuracy[rows["name"].unique()].items():
            if name.startswith("baseline"):
                claim = f"accuracy holds at {sparsity}: less than {TOLERANCE:.2f} pp below {name}"
                claims.append((claim, ours - theirs, TOLERANCE))
            elif name.startswith(f"scratch_{sparsity}_"):
                claims.append((f"pruning is better than {name}", ours - theirs, 0))
            elif name in others:
                claims.append((f"{name} is better than {one}", theirs - accuracy[one], 0))
    found = []
    for claim, difference, tolerance in claims:
        paired = difference.dropna().round(6)
        if len(paired) < 2:
            continue
        mean, low, high, answer = float(paired.mean()), None, None, "cannot tell"
        if paired.nunique() > 1:  # were all equal, an interval of width 0 would prove nothing
            low, high = map(float, stats.t.interval(0.95, len(paired) - 1, mean, paired.sem()))
            answer = "yes" if low > -tolerance else "no" if high < -tolerance else answer
        verdict = {"claim": claim, "answer": answer, "difference": mean, "low": low, "high": high}
        found.append(verdict | {"seeds": len(paired)})
    return found


def spread(values, digits: int) -> str:
    """Mean ± standard deviation; of one value, the value; of none, nothing."""
    numbers = (values.mean(), values.std())
    return " ± ".join(f"{number:.{digits}f}" for number in numbers if not math.isnan(number))


def report(rows) -> str:
    """The table, one line per model over all its seeds, and what may be read from it."""
    from tabulate import tabulate

    baseline = rows[rows["name"] == "baseline"].set_index("seed")
    lines = []
    for name, own in rows.set_index("seed").groupby("name", sort=False):
        same = baseline.reindex(own.index)  # the baselines of the same seeds
        ratio = same.mean(numeric_only=True) / own.mean(numeric_only=True)
        line = {
            "model": name,
            "before\ntuning, %": spread(own["accuracy_before"], 2),
            "accuracy\n%": spread(own["accuracy"], 2),
            "pp to\nbaseline": f"{(own['accuracy'] - same['accuracy']).mean():+.2f}",
            "parameters": f"{own['parameters'].iloc[0]:,}",
            "times\nfewer": f"{ratio['parameters']:.1f}×",
            "MACs per\nimage": f"{own['macs'].iloc[0]:,}",
            "training\ntime, s": spread(own["training_seconds"], 1),
            "times\nfaster": f"{ratio['training_seconds']:.1f}×".replace("nan×", ""),
        }
        lines.append(line)
    looks = {"colalign": ["left"], "stralign": "right", "disable_numparse": True}
    table = tabulate(lines, headers="keys", **looks)
    if claims := verdicts(rows):
        below = tabulate(claims, headers="keys", floatfmt="+.2f")
        note = "In pp; Student's 95 % interval, paired by seed; unless named, the pruners' mean."
        return f"{table}\n\n{below}\n\n{note}"
    # 95 % of the difference of two proportions, with a right and a wrong image added to each
    # (Agresti and Caffo 2000): honest also where all images are right.
    images = rows["test_images"].min()
    p = (rows["accuracy"].min() / 100 * images + 1) / (images + 2)
    least = 100 * 1.96 * math.sqrt(2 * p * (1 - p) / (images + 2))
    return (
        f"{table}\n\nOne seed, {images:,} test images: models less than {least:.2f} pp apart cannot"
        " be told apart.\nSeveral seeds can tell more: --seeds 0 1 2 3 4."
    )


def draw(rows, path: Path) -> None:
    """Draw accuracy against parameters, and against all the training that a model took (PNG)."""
    from matplotlib.figure import Figure  # without pyplot: no screen is looked for

    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    first = rows[rows["name"] == "baseline"].set_index("seed")["training_seconds"]
    models = rows.set_index("seed").groupby("name", sort=False)
    for marker, (name, own) in zip(cycle("Dos^vXP<>"), models):
        seconds, accuracy = own["training_seconds"], own["accuracy"]
        if name != "baseline" and not name.startswith("scratch"):  # it began as the baseline
            seconds = seconds + first
        style = {"label": name, "fmt": marker, "capsize": 4}
        for axes, x in ((left, own["parameters"]), (right, seconds)):
            axes.errorbar(x.mean(), accuracy.mean(), accuracy.std(), **style)
    left.set(xscale="log", xlabel="parameters", ylabel="accuracy on the test images, %")
    right.set(xlabel="all the training behind it, s")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(content := io.BytesIO())
    write(path, content.getvalue())


# ----------------------------------------------------------------------------------- main
def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line; in a trial of an NNI experiment the trial's parameters are options, too."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if trial := "NNI_PLATFORM" in os.environ:
        # To be asked for once: NNI hands out the next parameters at each call.
        for name, value in (import_nni().get_next_parameter() or {}).items():
            argv += [f"--{name.replace('_', '-')}", str(value)]
    title = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser("NNI_Pruning.py", description=title, allow_abbrev=False)
    devices = ["cpu", *(name for name in ("mps", "cuda") if getattr(torch, name).is_available())]
    add, shown, several = parser.add_argument, "(default: %(default)s)", {"nargs": "+"}
    add("--data-dir", type=Path, default="data", help=f"MNIST's, downloaded if missing {shown}")
    add("--dataset", choices=("mnist", "digits"), help="default: mnist; digits where that fails")
    add("--checkpoint-dir", type=Path, default="checkpoints", help=f"for all results {shown}")
    add("--epochs", type=int, help=f"of the baseline (default: {EPOCHS})")
    add("--finetune-epochs", type=int, help="of each pruned model (default: as --epochs)")
    add("--batch-size", type=int, help=f"in images (default: {BATCH_SIZE})")
    add("--lr", type=float, default=LEARNING_RATE, help=f"peak learning rate {shown}")
    add("--sparsity", type=float, default=SPARSITIES, help=f"channel sparsity {shown}", **several)
    add("--pruner", choices=PRUNERS, default=PRUNERS, help=f"to compare {shown}", **several)
    add("--subset", type=int, metavar="N", help="use at most N training and N/6 test images")
    add("--seeds", "--seed", type=int, default=[0], help=f"a run for each {shown}", **several)
    add("--controls", action="store_true", help="baseline trained on, compact nets from scratch")
    add("--device", choices=("auto", *devices), default="auto", help=f"to train on {shown}")
    add("--baseline", type=Path, metavar="PTH", help="start from this file (default: train one)")
    add("--report", type=Path, metavar="JSON", help="only show earlier results", **several)
    args = parser.parse_args(argv)
    for name in ("epochs", "finetune_epochs", "batch_size", "lr", "subset"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is not above 0")
    if not all(0 < sparsity < 1 for sparsity in args.sparsity):
        parser.error("argument --sparsity: it must lie between 0 and 1, both excluded")
    if not all(0 <= seed < 2**63 for seed in args.seeds):
        parser.error("argument --seeds: they must lie between 0 and 2**63 - 1")
    if trial and not len(args.pruner) == len(args.sparsity) == len(args.seeds) == 1:
        parser.error("a trial of an NNI experiment needs one --pruner, one --sparsity, one --seed")
    if args.device == "auto":
        args.device = devices[-1]
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    """The experiment, in order; prints its report, also when it is cut short; returns its rows."""
    args = parse_options(argv)
    folder = args.checkpoint_dir / os.environ.get("NNI_TRIAL_JOB_ID", "")  # trials share no files
    if args.report:
        heading, rows = read_results(args.report)
        frame = as_frame(rows)
        print(f"{heading}\n\n{report(frame)}")
        draw(frame, folder / "results.png")
        return rows
    nni, trial = import_nni(), "NNI_PLATFORM" in os.environ
    write(folder / ".writable", b"")  # like NNI, missed here before anything is trained
    (folder / ".writable").unlink()

    dataset, training, testing = load_data(args.dataset, args.data_dir, args.subset)
    training, testing = ([part.to(args.device) for part in pair] for pair in (training, testing))
    epochs = args.epochs or EPOCHS[dataset]
    finetune_epochs = args.finetune_epochs or epochs
    recipe = {"lr": args.lr, "batch_size": args.batch_size or BATCH_SIZE[dataset]}
    if args.baseline:
        about = load_model(args.baseline).about
        if (about.get("name"), about.get("dataset")) != ("baseline", dataset):
            raise ExperimentError(f"{args.baseline} is not a baseline of this script on {dataset}")
        epochs = about["epochs"]
    data = "MNIST" if dataset == "mnist" else "scikit-learn digits, NOT MNIST"
    first = f"{args.baseline} ({epochs})" if args.baseline else epochs
    device = f"CPU, {torch.get_num_threads()} threads" if args.device == "cpu" else args.device
    heading = (
        f"{data} ({len(training[1]):,} training and {len(testing[1]):,} test images);"
        f" {first} + {finetune_epochs} epochs; seeds {', '.join(map(str, args.seeds))};\n"
        f"{device}{', bf16' * computes_bfloat16(torch.device(args.device))};"
        f" torch {torch.__version__}, NNI {version('nni')}"
    )
    versions = {name: version(name) for name in ("torch", "torchvision", "nni", "numpy")}
    run = {"heading": heading, "settings": vars(args), "python": sys.version, "versions": versions}
    # The first seed's models lie in the folder itself, those of others in their own.
    homes = {seed: folder / f"seed_{seed}" for seed in args.seeds} | {args.seeds[0]: folder}
    rows = []

    def finish(model: CNN, name: str, seed: int, epochs: int, pruner=None, sparsity=None) -> None:
        """What every model shares: measure, train, measure again, save, note the row."""
        model.to(args.device, memory_format=torch.channels_last)  # the faster layout
        row = {"name": name, "seed": seed, "epochs": epochs, "pruner": pruner, "sparsity": sparsity}
        row |= {"widths": model.widths, "parameters": count_parameters(model)}
        row |= {"macs": count_macs(model), "test_images": len(testing[1])}
        row["accuracy_before"] = evaluate(model, *testing) if pruner else None
        row["training_seconds"] = None
        trained = not (name == "baseline" and args.baseline)
        if trained:
            this = {"epochs": epochs, "seed": seed, "title": f"{name}, seed {seed}"}
            # Not of the test images: an assessor that stops trials early would choose by them.
            tell = nni.report_intermediate_result if trial and pruner else None
            row["training_seconds"] = train(model, *training, **this, **recipe, after_epoch=tell)
        row["accuracy"] = evaluate(model, *testing)
        if trained:
            weights = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
            torch.save({"dataset": dataset, **row, "state_dict": weights}, content := io.BytesIO())
            write(homes[seed] / f"{name}.pth", content.getvalue())
        rows.append(row)
        frame = as_frame(rows)
        results = {**run, "rows": rows, "verdicts": verdicts(frame)}
        write(folder / "results.json", json.dumps(results, indent=1, default=str).encode())
        write(folder / "results.csv", frame.to_csv(index=False).encode())

    try:
        for seed in args.seeds:
            torch.manual_seed(seed)
            baseline = args.baseline or homes[seed] / "baseline.pth"
            finish(load_model(baseline) if args.baseline else CNN(), "baseline", seed, epochs)

            widths = {}
            for pruner, sparsity in product(args.pruner, args.sparsity):
                # From the file, and seeded anew: a row does not depend on the rows before it.
                torch.manual_seed(seed)
                model, example_input = load_model(baseline), torch.rand(8, 1, 28, 28)
                model = prune(model, pruner, sparsity, example_input, keep=["output"])
                widths[sparsity] = model.widths
                finish(model, f"{pruner}_{sparsity}", seed, finetune_epochs, pruner, sparsity)

            if args.controls:
                name = f"baseline_{finetune_epochs}_more_epochs"
                finish(load_model(baseline), name, seed, finetune_epochs)
                # As long as baseline and fine-tuning together, and as long as fine-tuning alone.
                lengths = (epochs + finetune_epochs, finetune_epochs)
                for sparsity, length in product(args.sparsity, lengths):
                    torch.manual_seed(seed)
                    name = f"scratch_{sparsity}_{length}_epochs"
                    finish(CNN(widths[sparsity]), name, seed, length, sparsity=sparsity)
        if trial:
            # NNI 3.0 hands two trials that start together each other's parameters, and its records
            # keep the swap. In the exported CSV these, the true ones, take the records' place.
            (row,) = (row for row in rows if row["pruner"])
            final = {**row, **(nni.get_current_parameter() or {}), "heading": heading, "rows": rows}
            nni.report_final_result({**final, "default": row["accuracy"]})
    finally:  # what is finished is shown, whatever happened
        if rows:
            frame = as_frame(rows)
            print(f"{heading}\n\n{report(frame)}")
            draw(frame, folder / "results.png")
    return rows


if __name__ == "__main__":
    try:
        main()
    except ExperimentError as error:
        sys.exit(f"NNI_Pruning.py: error: {error}")
    except KeyboardInterrupt:
        print("NNI_Pruning.py: interrupted", file=sys.stderr)
        sys.exit(130)
