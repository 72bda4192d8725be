"""What structured channel pruning does to a CNN: accuracy, size and training time, on MNIST.

    python NNI_Pruning.py                          # everything
    python NNI_Pruning.py --subset 6000 --epochs 2 # a quick look

The script trains a CNN. It prunes it with NNI's L1NormPruner and FPGMPruner at two channel
sparsities, makes each pruned model smaller with ModelSpeedup, and fine-tunes it. It saves every
model and prints one table. With one seed, this took 30 and 57 s on two machines with two cores of
an AMD EPYC (torch 2.15.0, NNI 3.0). The mean accuracies of five seeds are 99.57 % for the baseline,
99.53 % (L1) and 99.48 % (FPGM) at sparsity 0.5 with 3.9 times fewer parameters, and 99.23 % and
99.22 % at 0.75 with 15.3 times fewer.

Start at `main`, at the end: it is the experiment. The functions before it are in groups: model,
data, training, pruning, results, report, options. To load a saved model, or to prune a network of
your own: `from NNI_Pruning import load_model, prune`.
"""

import argparse
import ast
import contextlib
import copy
import gc
import hashlib
import io
import json
import logging
import math
import operator
import os
import socket
import sys
import timeit
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import product
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
TOLERANCE = 0.1  # percentage points; if accuracy falls by less, we say that it holds


class ExperimentError(Exception):
    """An error that the user can fix. It is printed as a message, without a traceback."""


def one_line(error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first_line[:160]}"


class MissingDataError(ExperimentError):
    """MNIST is not there and could not be downloaded."""


# ---------------------------------------------------------------------------------- model
class CNN(nn.Module):
    """A small CNN for 28 x 28 images: three convolutions and two linear layers.

    The baseline and all pruned models are of this class. They differ in `widths`: the output
    channels of conv1, conv2 and conv3, and the output features of hidden.

    Input: float (N, 1, 28, 28), pixels in 0..1, normalized with MEAN and DEVIATION.
    Output: float (N, 10), logits.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
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

    def forward(self, images: Tensor) -> Tensor:
        # Pooling comes before normalization: the smaller map takes a quarter of the work.
        x = F.relu(self.conv1(images), inplace=True)
        x = F.relu(self.norm2(self.pool(self.conv2(x))), inplace=True)
        x = F.relu(self.norm3(self.pool(self.conv3(x))), inplace=True)
        x = F.relu(self.hidden(x.flatten(1)), inplace=True)
        return self.output(x)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(len(getattr(self, name).weight) for name in LAYERS)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: CNN) -> int:
    """Multiply-accumulates (MACs) of one image's forward pass: half of torch's count.

    The model is in eval mode afterwards. In training mode, BatchNorm's statistics would change.
    """
    model.eval()
    image = torch.zeros(1, 1, 28, 28, device=model.output.weight.device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image)
    return counter.get_total_flops() // 2


def load_model(path: str | Path) -> CNN:
    """Load a model that this script saved; it is on the CPU and in eval mode.

    `model.about` is a dictionary of what else the file holds: name, accuracy, epochs and so on.
    Raises ExperimentError if the file cannot be read or is not a model saved by this script.
    """
    try:
        # With weights_only, no code in the file runs.
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content.pop("state_dict")
        model = CNN(tuple(len(weights[f"{layer}.weight"]) for layer in LAYERS))
        model.load_state_dict(weights)
    except Exception as error:  # a damaged file can make torch raise almost any error
        raise ExperimentError(
            f"{path} cannot be read, or is not a model saved by this script"
            f" ({type(error).__name__})"
        ) from error
    model.about = content
    return model.eval()


def save_model(path: Path, model: CNN, about: dict) -> None:
    """Save a model and the values of `about` to a file that load_model reads."""
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    file = io.BytesIO()
    torch.save({**about, "state_dict": weights}, file)
    write(path, file.getvalue())


def fingerprint(model: nn.Module) -> str:
    """Twelve hexadecimal digits that differ between models with different weights.

    In a row of the results, `baseline_id` is the fingerprint of the baseline of the row's seed.
    """
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


# ----------------------------------------------------------------------------------- data
def load_mnist(data_dir: Path):
    """Training and test set of MNIST, downloaded if they are not in `data_dir`."""
    from torchvision.datasets import MNIST

    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds; torchvision sets no timeout and could wait forever
    parts = []
    try:
        for is_train in (True, False):
            part = MNIST(data_dir, train=is_train, download=True)
            # torchvision does not check this. The except below makes it a message.
            if part.data.shape != (len(part.targets), 28, 28):
                raise ValueError("there is not one label for each image of 28 x 28 pixels")
            if part.targets.max() > 9:
                raise ValueError("there is a label above 9")
            parts.append((part.data, part.targets))
    except Exception as error:  # torchvision raises the same error for no network and bad files
        raw = data_dir / "MNIST" / "raw"
        reason = " ".join(str(error).split())
        if raw.is_dir() and any(raw.iterdir()):  # some files are there: they are damaged or too few
            message = f"MNIST cannot be read: {reason}; put all four .gz files into {raw}"
            raise ExperimentError(f"{message}, or delete {raw} to download them again") from error
        message = f"MNIST could not be downloaded: {reason}; put its .gz files into {raw}"
        raise MissingDataError(message) from error
    finally:
        socket.setdefaulttimeout(timeout_before)
    return parts


def load_small_digits():
    """Training and test set of scikit-learn's 1,797 handwritten digits, in MNIST's format."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)  # 8 x 8 pixels, 0 to 16
    images = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16 * 255
    images = F.interpolate(images, size=(20, 20), mode="bilinear").round().byte()
    images = F.pad(images, (4, 4, 4, 4)).squeeze(1)  # 20 x 20 in a frame of 28 x 28, as MNIST
    labels = torch.tensor(labels)
    indices = torch.arange(len(labels))
    index_parts = train_test_split(indices, test_size=0.2, random_state=0, stratify=labels)
    return [(images[part], labels[part]) for part in index_parts]


def load_data(requested: str | None, data_dir: Path, subset: int | None):
    """Load "mnist" or "digits". None means MNIST, or the digits if it cannot be downloaded.

    Returns the name of the dataset, (images, labels) for training, and the same for testing. Images
    are uint8 (N, 28, 28). Training images have MAX_SHIFT more pixels of background on each side:
    `train` cuts 28 x 28 pixels at a random place, which shifts the image. Labels are int64 (N,).
    With `subset`, there are that many training images and a sixth as many test images, the same for
    every seed.

    Raises ExperimentError if MNIST cannot be read, or is asked for and cannot be downloaded.
    """
    dataset = requested or "mnist"
    if dataset == "mnist":
        try:
            training, testing = load_mnist(data_dir)
        except MissingDataError as error:
            if requested == "mnist":
                raise
            print(f"{error}. Using scikit-learn's digits instead.", file=sys.stderr)
            dataset = "digits"
    if dataset == "digits":
        training, testing = load_small_digits()
    if subset is not None:
        generator = torch.Generator().manual_seed(0)
        training = random_part(training, subset, generator)
        testing = random_part(testing, max(1, subset // 6), generator)
    images, labels = training
    training = (F.pad(images, [MAX_SHIFT] * 4), labels)
    return dataset, training, testing


def random_part(data, size: int, generator: torch.Generator):
    """At most `size` random images of (images, labels), with their labels."""
    images, labels = data
    chosen = torch.randperm(len(labels), generator=generator)[:size]
    return images[chosen], labels[chosen]


def normalize(images: Tensor) -> Tensor:
    """uint8 (N, H, W) pixels as the float (N, 1, H, W) that the model takes."""
    # The same as (pixels / 255 - MEAN) / DEVIATION, with fewer passes over the pixels.
    return images.unsqueeze(1).float().sub_(255 * MEAN).mul_(1 / (255 * DEVIATION))


# ------------------------------------------------------------------- training, evaluation
def limit_threads() -> None:
    """Use no more threads than the processors that this process may use.

    torch takes one thread for each core of the machine. With 32 threads on two cores,
    training takes 200 times as long. OMP_NUM_THREADS, if it is set, decides instead.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    from joblib import cpu_count  # reads affinity and a container's quota

    torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))


def why_device_fails(name: str) -> str:
    """Why a device cannot compute; an empty string if it can."""
    # A device may be listed as available and still fail: it, or its driver, can be too old.
    try:
        image = torch.ones(1, 1, 3, 3, device=name)
        F.conv2d(image, image).item()
    except Exception as error:  # torch raises errors of several kinds
        first_line = str(error).split("\n")[0]
        first_sentence = first_line.split(". ")[0]
        return first_sentence or type(error).__name__
    return ""


def select_device(name: str) -> torch.device:
    """The named device; for "auto" the first accelerator that works, otherwise the CPU.

    Raises ExperimentError if the named device does not work.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is part of the messages below
        if name != "auto":
            reason = why_device_fails(name)
            if reason:
                raise ExperimentError(f"--device {name} does not work on this machine: {reason}")
            return torch.device(name)
        for candidate in ("cuda", "mps"):
            if getattr(torch, candidate).is_available():
                reason = why_device_fails(candidate)
                if not reason:
                    return torch.device(candidate)
                print(f"Using the CPU: {candidate} does not work here: {reason}", file=sys.stderr)
    return torch.device("cpu")


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware; emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def synchronized_time(device: torch.device) -> float:
    """The time in seconds, after the device finishes all work queued on it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return timeit.default_timer()


def train(model, images, labels, *, epochs, lr, batch_size, seed, title="", after_epoch=None):
    """Train a model in place and return the seconds of the training steps alone.

    Uses AdamW (Loshchilov and Hutter 2019), the one-cycle schedule (Smith and Topin 2018) and label
    smoothing (Szegedy et al. 2016). If the device computes bfloat16, it also uses mixed precision
    (Micikevicius et al. 2018): the layers compute in bfloat16, while weights, loss and optimizer
    stay in float32.

    Args:
        images: uint8 (N, 28 + 2 * MAX_SHIFT, 28 + 2 * MAX_SHIFT). Each batch takes a slice of
            28 x 28 at a random place.
        lr: the peak of the one-cycle schedule.
        seed: decides the order of the images, and the slices.
        after_epoch: is called with the accuracy on the epoch's training images, in percent.

    Raises ExperimentError if a weight becomes NaN or infinite.
    """
    from tqdm import trange

    device = images.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    if device.type == "cpu":
        # torch 2.15 calls this method before each step. On a machine with a GPU, it initializes
        # CUDA within the timed steps. So here it does nothing.
        optimizer._accelerator_graph_capture_health_check = lambda: None
    steps = math.ceil(len(images) / batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    mixed_precision = torch.autocast(device.type, torch.bfloat16, enabled=computes_bfloat16(device))
    seconds = 0.0
    progress = trange(epochs, desc=title, unit="epoch")
    for _ in progress:
        model.train()
        start = synchronized_time(device)
        # The CPU draws all random numbers of an epoch at once. So the steps never wait for the
        # device, and the order is the same on every kind of device.
        order = torch.randperm(len(images), generator=generator).to(device)
        shifts = torch.randint(2 * MAX_SHIFT + 1, (steps, 2), generator=generator).tolist()
        correct = torch.zeros((), device=device)
        for step, indices in enumerate(order.split(batch_size)):
            top, left = shifts[step]
            target = labels[indices]
            # index_select copies whole images; images[indices] would take ten times as long.
            padded = images.index_select(0, indices)
            shifted = padded[:, top : top + 28, left : left + 28]
            with mixed_precision:
                logits = model(normalize(shifted)).float()
            F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            correct += (logits.detach().argmax(1) == target).sum()
        seconds += synchronized_time(device) - start
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
    correct = 0
    for batch, target in zip(images.split(500), labels.split(500), strict=True):
        predicted = model(normalize(batch)).argmax(1)
        correct += (predicted == target).sum().item()
    return 100 * correct / len(labels)


def import_nni():
    """Import NNI with its pruners and ModelSpeedup, also on Python 3.14, and silence it.

    Raises ExperimentError if it is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warnings are about NNI's own code
        # NNI 3.0, the last release, requires a typeguard (< 4.1.3) that imports ast.Str but never
        # uses it. Python 3.14 removed that name.
        if not hasattr(ast, "Str"):
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


# -------------------------------------------------------------------------------- pruning
PRUNABLE = (nn.Conv2d, nn.Linear)
# Layers whose output channel i depends only on input channel i.
CHANNELWISE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.PReLU)
# All layers that NNI can make narrower.
NARROWABLE = (*PRUNABLE, nn.Conv1d, nn.ConvTranspose2d, *CHANNELWISE)


class Conflict(Exception):
    """(node, reason): a node of the graph that does not work with fewer channels."""


def prune(model: nn.Module, pruner: str, sparsity: float, example_input, keep=()) -> nn.Module:
    """Return a copy of a network with fewer channels.

    L1NormPruner removes the filters of smallest L1 norm (Li et al. 2017), FPGMPruner those nearest
    to the geometric median of their layer (He et al. 2019). See NNI's "Pruning Quick Start".

    The copy computes what `model` computes with zeros for the removed channels. `prune` compares
    the two at the output of every layer, in float64 and on random numbers. Where they differ, or
    where NNI fails, the layers before that place keep their channels, and `prune` starts again. A
    warning of the logger "NNI_Pruning" tells why. The layers of the output always keep theirs.

    The copy is on the CPU and in eval mode. Its parameters are new tensors, so make the optimizer
    for its fine-tuning afterwards. A head that only training uses may not fit the copy.

    Args:
        model: a network that torch.fx can trace; blocks that it cannot trace stay as they are. Its
            Conv2d and Linear layers are pruned; layers whose outputs are added lose the same ones.
        pruner: a name from PRUNERS.
        sparsity: the share of each layer's channels to remove; between 0 and 1, both excluded.
        example_input: a tensor, a batch of about eight examples; or a tuple of tensors for several
            inputs. NNI's time and memory grow with the area of images: take the smallest that fit.
        keep: a name, or names, of more layers or blocks of layers that keep their output channels.

    Raises ExperimentError if an argument is wrong, or if the network cannot be pruned.
    """
    if pruner not in PRUNERS:
        raise ExperimentError(f"pruner is {pruner}, but must be one of {', '.join(PRUNERS)}")
    if not 0 < sparsity < 1:
        raise ExperimentError(f"sparsity is {sparsity}, but must be between 0 and 1, both excluded")
    # NNI needs gradients, and its own random numbers. What the caller has set stays as it is.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network, graph, dtype = trace(model, example_input)
        kept = layers_to_keep(graph, network, [keep] if isinstance(keep, str) else keep)
        while True:
            gc.collect()  # what a failed attempt leaves is in reference cycles
            try:
                pruned, masks = run_nni(graph, network, example_input, pruner, sparsity, kept)
                compact = checked(graph, network, pruned, masks, example_input, dtype)
                break
            except Conflict as conflict:
                node, reason = conflict.args
                more = layers_before(node) - kept
                if not more and node.op == "call_module":
                    more = {node.target} - kept
                if not more:
                    raise ExperimentError(f"the network cannot be pruned: {reason}") from conflict
                keep_channels(kept, more, reason)
    if count_parameters(compact) == count_parameters(model):
        raise ExperimentError("no channel was removed: is sparsity too low?")
    for name, value in (*compact.named_parameters(), *compact.named_buffers()):
        original = operator.attrgetter(name)(model)
        value.data = value.data.to(original.dtype)
        value.requires_grad_(original.requires_grad)
        value.grad = None  # NNI leaves gradients
        if value.dim() == 0:
            value.data.copy_(original)  # NNI resets BatchNorm's count of batches
    return compact


def random_inputs(example_input, dtype):
    """Random numbers of the example's shapes, anew for each run. Whole numbers stay as they are."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for value in [example_input] if isinstance(example_input, Tensor) else example_input:
        numbers = torch.rand(value.shape, generator=generator, dtype=dtype)
        inputs.append(numbers if value.is_floating_point() else value.cpu().clone())
    return inputs


def copy_of(network, dtype):
    network = copy.deepcopy(network)
    # Unlike network.to(dtype), these leave complex numbers complex.
    return network.double() if dtype == torch.float64 else network.float()


class BlockTracer(Tracer):
    """Makes a block that it cannot trace, such as one with an `if` on data, a single node."""

    def create_args_for_root(self, root_fn, is_module, inputs):
        # Arguments of forward that the user does not pass have their default values.
        names = [f"input_{number}" for number in range(len(inputs))]
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]
        return root_fn, [self.root, *proxies]

    def call_module(self, module, forward, args, kwargs):
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:  # the block's own code can raise anything
            return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)


@torch.no_grad()
def trace(model, example_input):
    """A copy of the network, its torch.fx graph, and the dtype to compare in."""
    for dtype in (torch.float64, torch.float32):  # some networks ask for float32 in their own code
        try:
            inputs = random_inputs(example_input, dtype)
            network = copy.deepcopy(model).cpu().eval()
            count_parameters(network)  # fails for a lazy layer that has no shape yet
            copy_of(network, dtype)(*inputs)
            # The network also gets the tensors that its `forward` creates.
            graph = BlockTracer().trace(network, inputs)
            # NNI cannot follow a value that nothing uses.
            graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
            graph.owning_module = network
            return network, graph, dtype
        except Exception as error:  # the network's own code can raise anything
            failure = error
    message = "torch.fx cannot trace the network, or example_input is no tensor or tuple that fits"
    raise ExperimentError(f"{message}: {one_line(failure)}") from failure


def layers_to_keep(graph, network, blocks):
    """The names of the layers that are known beforehand to keep their channels."""
    modules = dict(network.named_modules(remove_duplicate=False))
    kept = layers_before(graph.output_node())
    for block in blocks:
        if block not in modules:
            raise ExperimentError(f"keep names {block}, but the network has no such layer")
        kept.update(name for name in modules if f"{name}.".startswith(f"{block}."))

    uses = Counter(value for _, value in network.named_parameters(remove_duplicate=False))
    constants = set()  # nodes that depend on parameters alone
    for node in graph.nodes:
        layer = layer_of(node)
        sources = set(node.all_input_nodes)
        if layer is not None and any(uses[value] > 1 for value in layer.parameters()):
            names = layers_before(node) | {node.target}
            keep_channels(kept, names, f"{name_of(node)} shares a parameter with another layer")
        elif layer is not None and type(layer) not in NARROWABLE:
            kind = type(layer).__name__
            keep_channels(kept, layers_before(node), f"NNI does not prune {name_of(node)} ({kind})")
        elif node.op == "get_attr" or (sources and sources <= constants):
            constants.add(node)
        elif sources & constants:
            keep_channels(kept, layers_before(node), f"{name_of(node)} reads a parameter")
    return kept


def keep_channels(kept, names, reason):
    new = ", ".join(sorted(names - kept))
    if new:
        logging.getLogger("NNI_Pruning").warning("All channels stay in %s: %s", new, reason)
    kept.update(names)


def layer_of(node):
    """The module that a node calls, if it has parameters or buffers."""
    if node.op != "call_module":
        return None
    module = node.graph.owning_module.get_submodule(node.target)
    return module if module.state_dict() else None


def layers_before(node):
    """The names of the Conv2d and Linear layers whose channels functions and BatchNorm hand on."""
    names = set()
    seen = set()
    waiting = [node]
    if node.op == "call_module":  # all calls of the layer
        waiting = node.graph.find_nodes(op=node.op, target=node.target)
    while waiting:
        for source in set(waiting.pop().all_input_nodes) - seen:
            seen.add(source)
            layer = layer_of(source)
            if type(layer) in PRUNABLE:
                names.add(source.target)
            elif layer is None or isinstance(layer, CHANNELWISE):
                waiting.append(source)
    return names


def name_of(node):
    return f"layer {node.target}" if node.op == "call_module" else f"`{node.name}` in forward"


def run_nni(graph, network, example_input, pruner, sparsity, kept):
    """Prune a copy of the network with NNI. Returns it, and a mask of each node's output."""
    nni = import_nni()
    is_double = next(network.parameters()).dtype == torch.float64
    dtype = torch.float64 if is_double else torch.float32
    network = copy_of(network, dtype)
    # ModelSpeedup's own tracer fails on torch >= 2.2 ('NoneType' object has no attribute
    # 'startswith', NNI issue 5768). It accepts a graph from torch.fx instead.
    traced = GraphModule(network, graph)
    updater = nni.compression.speedup.mask_updater.DefaultMaskUpdater()
    updater.detect = lambda _, node: node.target is operator.getitem
    speedup = nni.compression.speedup.ModelSpeedup(
        network,
        tuple(random_inputs(example_input, dtype)),
        {},
        customized_mask_updaters=[updater],
        graph_module=traced,
        logger=logging.getLogger("nni"),
    )
    # For a network with `x.size()`, NNI deletes this attribute, but never sets it.
    for info in speedup.node_infos.values():
        info._output_randomize = None
    # By NNI's own rules, it follows neither a single logit nor several outputs of one layer.
    speedup.tensor_propagate_check = lambda value: value.numel() % speedup.batch_size == 0
    speedup.indirect_backward = backward_from

    config = {"op_types": ["Conv2d", "Linear"], "exclude_op_names": sorted(kept)}
    config["sparse_ratio"] = sparsity
    # Groups ("denpendency" is NNI's spelling) make layers that are added lose the same channels.
    configs = nni.compression.speedup.auto_set_denpendency_group_ids(traced, [config])
    if not configs:
        kinds = sorted({type(layer).__name__ for layer in network.modules() if layer._parameters})
        message = (
            "nothing can be pruned: no Conv2d or Linear layer may lose channels, and NNI prunes"
        )
        raise ExperimentError(f"{message} no others; the kinds of layers are {', '.join(kinds)}")
    for config in configs:
        if "dependency_group_id" in config:
            # NNI cannot add the scores of layers that differ in kind or in number of channels.
            weight = network.get_submodule(config["op_names"][0]).weight
            config["dependency_group_id"] += f" {weight.dim()} {len(weight)}"
    dtype_before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # NNI creates its layers in the default dtype
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # NNI prints
            # 1. Choose the channels to remove.
            nni_pruner = getattr(nni.compression.pruning, pruner)(network, configs)
            _, speedup.masks = nni_pruner.compress()
            nni_pruner.unwrap_model()
            # 2. Replace the layers by smaller ones. NNI takes constants for unused. So random
            # numbers stand for equal ones, such as the zeros of an untrained layer.
            equal = {}
            for name, parameter in network.named_parameters():
                if parameter.min() == parameter.max():
                    equal[name] = parameter.data.max()
                    parameter.data.uniform_()
            compact = speedup.speedup_model().eval()
            for name, value in equal.items():
                compact.get_parameter(name).data.fill_(value)
    except Exception as error:  # NNI raises errors of many kinds
        # In NNI's functions, `node` is the node on which they work.
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        nodes = [frame.f_locals["node"] for frame in frames if "node" in frame.f_locals]
        node = nodes[-1] if nodes else graph.output_node()
        raise Conflict(node, f"NNI fails at {name_of(node)}: {one_line(error)}") from error
    finally:
        torch.set_default_dtype(dtype_before)
    return compact, {node: info.output_masks for node, info in speedup.node_infos.items()}


def backward_from(value, mask):
    if mask is not None and value.requires_grad:
        value.backward(mask.expand_as(value), retain_graph=True)


class LayerNorms(Interpreter):
    """Runs a network, and takes the norm of each layer's output. What `masks` remove is zero."""

    def __init__(self, network, graph, masks):
        super().__init__(network, graph=graph)
        self.masks = masks
        self.norms = {}  # by node

    def run_node(self, node):
        self.node = node
        output = super().run_node(node)
        if node.op == "output" or layer_of(node) is not None:
            self.norms[node] = norms_of(output)
        return output

    def call_module(self, target, args, kwargs):
        layer = self.fetch_attr(target)
        if not isinstance(layer, NARROWABLE):
            return super().call_module(target, args, kwargs)
        axis = -1 if isinstance(layer, nn.Linear) else 1
        value = self.with_zeros(args[0], self.node.args[0], axis)
        return self.with_zeros(layer(value, *args[1:]), self.node, axis)

    def with_zeros(self, value, node, axis):
        mask = self.masks.get(node)
        if mask is None:
            return value
        is_left = mask.movedim(axis, 0).flatten(1).any(dim=1)
        return (value.movedim(axis, -1) * is_left).movedim(-1, axis)


def norms_of(output):
    """The Euclidean norms of an output, which can be a tensor, a tuple or a dictionary."""
    tensors = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
    norms = [value.to(torch.complex128).norm().item() for value in tensors]
    return torch.tensor(norms, dtype=torch.float64)


@torch.no_grad()
def checked(graph, network, pruned, masks, example_input, dtype):
    """The pruned network, if it computes what the original computes with zeros; or Conflict."""
    original = copy_of(network, dtype)
    pruned = copy_of(pruned, dtype)
    # NNI makes all layers anew. Put back those that lost nothing, so that ties stay.
    for name, module in original.named_modules(remove_duplicate=False):
        if name and str(module) == str(pruned.get_submodule(name)):  # the text has all sizes
            pruned.set_submodule(name, module)

    expected = LayerNorms(original, graph, masks)
    expected.run(*random_inputs(example_input, dtype))
    found = LayerNorms(pruned, graph, {})
    try:
        found.run(*random_inputs(example_input, dtype))
        # Once more without the graph, as the user runs it.
        found.norms[found.node] = norms_of(pruned(*random_inputs(example_input, dtype)))
    except Exception as error:  # the network's own code can raise anything
        reason = f"with fewer channels, {name_of(found.node)} fails: {one_line(error)}"
        raise Conflict(found.node, reason) from error
    # A norm does not tell the order of channels. The norm after the next layer does.
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for node, norms in found.norms.items():
        if not torch.allclose(norms, expected.norms[node], tolerance, 1e-12):
            raise Conflict(node, f"with fewer channels, {name_of(node)} computes other values")
    return pruned


# -------------------------------------------------------------------------------- results
def write(path: Path, content: bytes) -> None:
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


@dataclass(frozen=True)
class Settings:
    """What rows must have in common to be compared; each field is also a column of the results."""

    dataset: str
    train_images: int
    test_images: int
    baseline_epochs: int
    finetune_epochs: int
    batch_size: int
    lr: float


def as_frame(rows: list[dict]):
    """The rows as a DataFrame, each model and seed once. Raises ValueError if the runs differ."""
    import pandas as pd

    whole_numbers = ["seed", "epochs", "parameters", "macs", "train_images", "test_images"]
    numbers = ["sparsity", "accuracy_before", "accuracy", "training_seconds"]
    frame = pd.DataFrame(rows)
    frame = frame.astype(dict.fromkeys(whole_numbers, int))
    frame = frame.astype(dict.fromkeys(numbers, float))
    for setting in fields(Settings):
        values = frame[setting.name].unique()
        if len(values) > 1:
            listed = " and ".join(str(value) for value in values)
            raise ValueError(f"the runs differ: {setting.name} is {listed}")
    is_baseline = frame["kind"] == "baseline"
    for seed, models in frame.groupby("seed"):
        if "baseline" not in set(models["kind"]):
            raise ValueError(f"seed {seed} has no baseline")
        if models["baseline_id"].nunique() > 1:
            raise ValueError(f"the runs differ: seed {seed} has different baselines")
    # The trials of an NNI experiment start from one baseline, and each of them evaluates it. One of
    # these rows is enough. Rows with a training time come first, and the first row stays.
    baselines = frame[is_baseline].sort_values("training_seconds", key=pd.isna, kind="stable")
    baselines = baselines.drop_duplicates("seed")
    # Two files can hold the same row. But two rows of one model that differ are an error.
    others = frame[~is_baseline].drop_duplicates(["name", "seed", "accuracy"])
    repeated = others[others.duplicated(["name", "seed"])]
    if len(repeated) > 0:
        row = repeated.iloc[0]
        raise ValueError(f"{row['name']}, seed {row['seed']}, has two results")
    return pd.concat([baselines, others]).sort_index()


def write_results(folder: Path, description: dict, rows: list[dict]) -> None:
    """Write results.json and results.csv; `description` tells what the rows have in common."""
    frame = as_frame(rows)
    results = {**description, "rows": rows, "verdicts": verdicts(frame)}
    write(folder / "results.json", json.dumps(results, indent=1).encode())
    write(folder / "results.csv", frame.to_csv(index=False).encode())


def read_results(paths: list[Path]) -> tuple[str, list[dict]]:
    """Heading and rows of results.json files and of exported NNI trials.

    Raises ExperimentError if a file is neither, or does not fit the files before it.
    """
    headings = []
    rows = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, list):  # exported trials: each value is what the trial reported
                runs = [json.loads(trial["value"]) for trial in content]
            else:
                runs = [content]
            for run in runs:
                if not isinstance(run["heading"], str):
                    raise TypeError("its heading is not text")
                headings.append(run["heading"])
                rows.extend(run["rows"])
            as_frame(rows)  # raises ValueError if they do not fit
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise ExperimentError(
                f"{path} is not a results.json of this script or an export of its NNI trials,"
                f" or does not fit the others ({type(error).__name__}: {error})"
            ) from error
    return "\n".join(dict.fromkeys(headings)), rows  # each heading once


def seeds_share_a_baseline(frame) -> bool:
    baselines = frame[frame["kind"] == "baseline"]
    return baselines["baseline_id"].nunique() < len(baselines)


def claims_to_test(frame) -> list[tuple[str, str, str, float]]:
    """Claims about the pruned models: (text, name, name of the reference, tolerance).

    A claim is that the difference in accuracy is above -tolerance, in percentage points.
    """
    pruned = frame[frame["kind"] == "pruned"]
    references = list(frame[frame["kind"] == "trained_on"]["name"].unique())
    if not seeds_share_a_baseline(frame):  # one baseline cannot show how baselines differ
        references.insert(0, "baseline")
    claims = []
    for sparsity, models in pruned.groupby("sparsity"):
        names = list(models["name"].unique())
        scratch_models = frame[(frame["kind"] == "scratch") & (frame["sparsity"] == sparsity)]
        for name in names:
            # Does accuracy hold?
            for reference in references:
                text = f"{name} is less than {TOLERANCE:.2f} pp below {reference}"
                claims.append((text, name, reference, TOLERANCE))
            # Is pruning better than training a network of this size from random weights?
            for scratch in scratch_models["name"].unique():
                claims.append((f"{name} is better than {scratch}", name, scratch, 0.0))
        # Is one pruner better than the other?
        first = names[0]
        for name in names[1:]:
            claims.append((f"{name} is better than {first}", name, first, 0.0))
    return claims


def verdicts(frame) -> list[dict]:
    """What several seeds say about each claim; `frame` is from as_frame.

    The interval is Student's 95 % interval of the difference in accuracy, paired by seed. The
    answer is "yes" if all of the interval lies above -tolerance, "no" if all of it lies below, and
    otherwise "cannot tell". Claims with fewer than two seeds are left out.
    """
    from scipy import stats

    accuracy = frame.pivot(index="seed", columns="name", values="accuracy")
    results = []
    for claim, name, reference, tolerance in claims_to_test(frame):
        differences = (accuracy[name] - accuracy[reference]).dropna()
        differences = differences.round(6)  # without the errors of float, equal ones are equal
        seeds = len(differences)
        if seeds < 2:
            continue
        mean = float(differences.mean())
        low = None
        high = None
        answer = "cannot tell"
        if differences.nunique() > 1:  # equal differences would give an interval of width 0
            standard_error = differences.sem()
            interval = stats.t.interval(0.95, df=seeds - 1, loc=mean, scale=standard_error)
            low = float(interval[0])
            high = float(interval[1])
            if low > -tolerance:
                answer = "yes"
            elif high < -tolerance:
                answer = "no"
        verdict = {
            "claim": claim,
            "answer": answer,
            "difference": mean,
            "low": low,
            "high": high,
            "seeds": seeds,
        }
        results.append(verdict)
    return results


# --------------------------------------------------------------------------------- report
def mean_and_deviation(values, digits: int) -> str:
    """Mean ± standard deviation; of one value, the value; of no value, an empty string."""
    values = values.dropna()
    if len(values) == 0:
        return ""
    mean = f"{values.mean():.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {values.std():.{digits}f}"


def results_table(frame) -> str:
    """One line per model, over all its seeds."""
    from tabulate import tabulate

    baselines = frame[frame["kind"] == "baseline"].set_index("seed")
    lines = []
    for name, model_rows in frame.set_index("seed").groupby("name", sort=False):
        baseline = baselines.loc[model_rows.index]  # of the same seeds
        gain = (model_rows["accuracy"] - baseline["accuracy"]).mean()
        parameters = model_rows["parameters"].iloc[0]
        fewer = baseline["parameters"].iloc[0] / parameters
        faster = baseline["training_seconds"].mean() / model_rows["training_seconds"].mean()
        line = {
            "model": name,
            "before\ntuning, %": mean_and_deviation(model_rows["accuracy_before"], 2),
            "accuracy\n%": mean_and_deviation(model_rows["accuracy"], 2),
            "pp to\nbaseline": f"{gain:+.2f}",
            "parameters": f"{parameters:,}",
            "times\nfewer": f"{fewer:.1f}x",
            "MACs per\nimage": f"{model_rows['macs'].iloc[0]:,}",
            "training\ntime, s": mean_and_deviation(model_rows["training_seconds"], 1),
            "times\nfaster": "" if math.isnan(faster) else f"{faster:.1f}x",
        }
        lines.append(line)
    return tabulate(lines, "keys", colalign=["left"], stralign="right", disable_numparse=True)


def smallest_visible_difference(frame) -> float:
    """Percentage points. With a single seed, a smaller difference of two models can be chance.

    The half width of the 95 % interval of the difference of two proportions, with one right and one
    wrong image added to each (Agresti and Caffo 2000). So it is not 0 if all images are right.
    """
    images = frame["test_images"].iloc[0]
    # The accuracy nearest to 50 % has the widest interval.
    accuracy = min(frame["accuracy"], key=lambda percent: abs(percent - 50))
    proportion = (accuracy / 100 * images + 1) / (images + 2)
    return 100 * 1.96 * math.sqrt(2 * proportion * (1 - proportion) / (images + 2))


def report(frame) -> str:
    """The table of the models, and what can be concluded from it; `frame` is from as_frame."""
    from tabulate import tabulate

    parts = [results_table(frame)]
    answers = verdicts(frame)
    if answers:
        parts.append(tabulate(answers, headers="keys", floatfmt="+.2f"))
        parts.append(
            "Differences in percentage points (pp), with 95 % intervals over the seeds."
            f" Each interval alone\nis wrong 1 time in 20, and the table has {len(answers)}."
        )
    elif not seeds_share_a_baseline(frame):
        parts.append(
            f"With one seed and {frame['test_images'].iloc[0]:,} test images, a difference of less"
            f" than {smallest_visible_difference(frame):.2f} pp can be chance.\n"
            "More seeds can tell more: --seeds 0 1 2 3 4"
        )
    if seeds_share_a_baseline(frame):
        parts.append(
            "Several seeds start from one baseline. So the table does not show how baselines\n"
            "differ. No verdict compares a model with it. The other verdicts hold for it only."
        )
    return "\n\n".join(parts)


COLORS = {"L1NormPruner": "#0072b2", "FPGMPruner": "#d55e00"}  # the color-blind can tell them apart


def draw(frame, path: Path) -> None:
    """Draw each model's accuracies and training time, next to the baseline's, as a PNG file."""
    from matplotlib.figure import Figure  # pyplot would look for a screen

    models = [model_rows for _, model_rows in frame.groupby("name", sort=False)]
    # The large ones first; equal sizes stay in their order.
    models.sort(key=lambda model_rows: model_rows["parameters"].iloc[0], reverse=True)
    figure = Figure(figsize=(9, 0.8 + 0.45 * len(models)), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))

    baselines = frame[frame["kind"] == "baseline"].set_index("seed")
    baseline_accuracy = baselines["accuracy"].mean()
    left.axvspan(baseline_accuracy - TOLERANCE, baseline_accuracy, color="#e8e8e8")
    labels = []
    for position, model_rows in enumerate(models):
        first_row = model_rows.iloc[0]
        color = COLORS.get(first_row["pruner"], "#595959")  # grey: not pruned
        labels.append(f"{first_row['name']}\n{first_row['parameters']:,} parameters")

        accuracy = model_rows["accuracy"]
        deviation = accuracy.std() if len(accuracy) > 1 else None
        left.plot(accuracy, [position] * len(accuracy), "o", color=color, alpha=0.35)
        left.errorbar(accuracy.mean(), position, xerr=deviation, fmt="D", color=color, capsize=4)

        earlier_seconds = 0.0
        if first_row["kind"] in ("pruned", "trained_on"):  # the baseline was trained before it
            baseline_seconds = baselines["training_seconds"].loc[model_rows["seed"]]
            earlier_seconds = baseline_seconds.fillna(0).mean()  # 0: it was given, not trained
        seconds = model_rows["training_seconds"].mean()
        if math.isnan(seconds):
            continue  # a given baseline: this run did not train it
        right.barh(position, earlier_seconds, color="#cccccc")
        right.barh(position, seconds, left=earlier_seconds, color=color)
        total = earlier_seconds + seconds
        right.text(total, position, f" {total:.1f} s", verticalalignment="center")
    left.set_yticks(range(len(models)), labels)
    left.invert_yaxis()
    left.set_xlabel(f"test accuracy, %\ngrey band: at most {TOLERANCE} points below the baseline")
    right.set_xlabel("training, s\nlight grey: the baseline's, before it")
    right.margins(x=0.2)  # room for the seconds

    file = io.BytesIO()
    figure.savefig(file, format="png")
    write(path, file.getvalue())


def show_results(heading: str, rows: list[dict], picture: Path) -> None:
    """Print the report and draw the picture."""
    frame = as_frame(rows)
    print(f"{heading}\n\n{report(frame)}")
    draw(frame, picture)


def report_earlier_results(paths: list[Path]) -> list[dict]:
    """Show the results of earlier runs together, and return their rows."""
    heading, rows = read_results(paths)
    picture = paths[0].with_suffix(".png")
    if len(paths) > 1:  # the first file's own picture stays
        picture = paths[0].with_name("report.png")
    show_results(heading, rows, picture)
    print(f"\nSaved: {picture}")
    return rows


# -------------------------------------------------------------------------------- options
def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command line and, in a trial of an NNI experiment, of the trial."""
    parser = argparse.ArgumentParser(
        "NNI_Pruning.py",
        description="Prune a CNN on MNIST, and compare accuracy, size and training time.",
        allow_abbrev=False,
    )
    option = parser.add_argument
    default_text = "(default: %(default)s)"
    option("--data-dir", type=Path, default="data", help=f"MNIST's folder {default_text}")
    option("--dataset", choices=("mnist", "digits"), help="default: mnist; digits if it is missing")
    option(
        "--checkpoint-dir", type=Path, default="checkpoints", help=f"for all results {default_text}"
    )
    option("--epochs", type=int, help=f"of the baseline (default: {EPOCHS})")
    option("--finetune-epochs", type=int, help="of each pruned model (default: like --epochs)")
    option("--batch-size", type=int, help=f"in images (default: {BATCH_SIZE})")
    option("--lr", type=float, default=LEARNING_RATE, help=f"peak learning rate {default_text}")
    option(
        "--sparsity", type=float, nargs="+", default=SPARSITIES, help=f"of channels {default_text}"
    )
    option(
        "--pruner", nargs="+", choices=PRUNERS, default=PRUNERS, help=f"to compare {default_text}"
    )
    option("--subset", type=int, metavar="N", help="use only N training and N/6 test images")
    option(
        "--seeds", "--seed", type=int, nargs="+", default=[0], help=f"a run for each {default_text}"
    )
    option("--controls", action="store_true", help="add models to compare with: see the README")
    option("--device", choices=("cpu", "auto", "cuda", "mps"), default="cpu", help=default_text)
    option("--baseline", type=Path, metavar="PTH", help="a saved baseline to start from")
    option("--report", type=Path, nargs="+", metavar="JSON", help="only show earlier results")

    arguments = list(sys.argv[1:] if argv is None else argv)
    is_trial = "NNI_PLATFORM" in os.environ
    if is_trial:
        arguments += trial_arguments(parser)
    args = parser.parse_args(arguments)
    args.is_trial = is_trial
    for name in ("epochs", "finetune_epochs", "batch_size", "lr", "subset"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is not above 0")
    if not all(0 < sparsity < 1 for sparsity in args.sparsity):
        parser.error("argument --sparsity: it must be between 0 and 1, both excluded")
    if not all(0 <= seed < 2**63 for seed in args.seeds):
        parser.error("argument --seeds: they must be between 0 and 2**63 - 1")
    for name in ("seeds", "sparsity", "pruner"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            parser.error(f"argument --{name}: a value is given twice")
    if args.baseline and args.epochs:
        parser.error("argument --epochs: the --baseline is trained already; use --finetune-epochs")
    if is_trial and any(len(values) > 1 for values in (args.pruner, args.sparsity, args.seeds)):
        parser.error("a trial of an NNI experiment needs one --pruner, one --sparsity, one --seed")
    return args


def trial_arguments(parser: argparse.ArgumentParser) -> list[str]:
    """The parameters of an NNI trial as arguments; a boolean sets or leaves out a flag."""
    known = list(vars(parser.parse_args([])))  # the names of all options
    known.append("seed")  # the other name of --seeds
    arguments = []
    # NNI hands out the parameters of the next trial at each call, so call it only once.
    parameters = import_nni().get_next_parameter() or {}
    for name, value in parameters.items():
        if name.replace("-", "_") not in known:
            parser.error(f"unknown parameter {name!r} of the trial; known: {', '.join(known)}")
        flag = f"--{name.replace('_', '-')}"
        if not isinstance(value, bool):
            arguments += [flag, str(value)]
        elif value:
            arguments.append(flag)
    return arguments


# ----------------------------------------------------------------------------- experiment
@dataclass(frozen=True)
class Run:
    """What all models of a run share; the images and labels are on the device."""

    device: torch.device
    training: tuple[Tensor, Tensor]
    testing: tuple[Tensor, Tensor]
    settings: Settings


def prepare_folder(checkpoint_dir: Path) -> Path:
    """Make the folder for the results; each trial of an NNI experiment has its own.

    Raises ExperimentError if nothing can be written there.
    """
    folder = checkpoint_dir
    if "NNI_TRIAL_JOB_ID" in os.environ:
        folder = checkpoint_dir / os.environ["NNI_TRIAL_JOB_ID"]
    write(folder / ".writable", b"")
    (folder / ".writable").unlink()
    return folder


def prepare_run(args: argparse.Namespace) -> Run:
    """Choose the device, load the data and resolve the options that depend on the data."""
    device = select_device(args.device)
    dataset, training, testing = load_data(args.dataset, args.data_dir, args.subset)
    train_images = len(training[1])
    epochs = args.epochs or EPOCHS[dataset]
    baseline_epochs = epochs
    if args.baseline:
        baseline_epochs = epochs_of(args.baseline, dataset, train_images)
    settings = Settings(
        dataset=dataset,
        train_images=train_images,
        test_images=len(testing[1]),
        baseline_epochs=baseline_epochs,
        finetune_epochs=args.finetune_epochs or epochs,
        batch_size=args.batch_size or BATCH_SIZE[dataset],
        lr=args.lr,
    )
    training = tuple(values.to(device) for values in training)
    testing = tuple(values.to(device) for values in testing)
    return Run(device, training, testing, settings)


def epochs_of(path: Path, dataset: str, train_images: int) -> int:
    """The epochs of a saved baseline. Raises ExperimentError if it was trained on other data."""
    about = load_model(path).about
    expected = {"name": "baseline", "dataset": dataset, "train_images": train_images}
    for key, value in expected.items():
        if about.get(key) != value:
            raise ExperimentError(
                f"{path} is not a baseline that this script trained on {train_images:,} images of"
                f" {dataset}; --dataset and --subset must be those of its training"
            )
    return about["epochs"]


def describe(run: Run, args: argparse.Namespace) -> dict:
    """What results.json says about a run: heading of the report, settings and versions."""
    settings = run.settings
    data = "MNIST" if settings.dataset == "mnist" else "scikit-learn digits, NOT MNIST"
    images = f"{settings.train_images:,} training and {settings.test_images:,} test images"
    epochs = settings.baseline_epochs
    baseline_text = f"{args.baseline} ({epochs})" if args.baseline else str(epochs)
    seeds = ", ".join(str(seed) for seed in args.seeds)
    threads = torch.get_num_threads()
    bfloat16 = computes_bfloat16(run.device)
    hardware = f"CPU, {threads} threads" if run.device.type == "cpu" else run.device.type
    if bfloat16:
        hardware += ", bf16"
    heading = (
        f"{data} ({images}); {baseline_text} + {settings.finetune_epochs} epochs; seeds {seeds};\n"
        f"{hardware}; torch {torch.__version__}, NNI {version('nni')}"
    )
    settings_used = {
        **asdict(settings),
        "baseline": str(args.baseline) if args.baseline else None,
        "pruner": list(args.pruner),
        "sparsity": list(args.sparsity),
        "seeds": args.seeds,
        "controls": args.controls,
        "device": run.device.type,
        "threads": threads,
        "bfloat16": bfloat16,
    }
    versions = {name: version(name) for name in ("torch", "torchvision", "nni", "numpy")}
    return {
        "heading": heading,
        "settings": settings_used,
        "python": sys.version,
        "versions": versions,
    }


def new_row(
    run: Run, model: CNN, *, name, kind, seed, epochs, pruner=None, sparsity=None, baseline_id=None
) -> dict:
    """A row of the results before the training; what is not known yet is None.

    `kind` is "baseline", "pruned", "trained_on" (the baseline, trained for more epochs) or
    "scratch" (a compact network from random weights). `epochs` are those of this training alone.
    """
    return {
        "name": name,
        "kind": kind,
        "seed": seed,
        "epochs": epochs,
        "pruner": pruner,
        "sparsity": sparsity,
        "widths": list(model.widths),
        "parameters": count_parameters(model),
        "macs": count_macs(model),
        "accuracy_before": None,
        "accuracy": None,
        "training_seconds": None,
        "baseline_id": baseline_id,
        **asdict(run.settings),
    }


def train_evaluate_save(run: Run, model: CNN, row: dict, folder: Path, after_epoch=None) -> None:
    """Train a model for the epochs in its row, fill in the row's results, and save both.

    The file has the name of the row: "baseline.pth", for example.
    """
    model.to(run.device, memory_format=torch.channels_last)  # the faster layout
    row["training_seconds"] = train(
        model,
        *run.training,
        epochs=row["epochs"],
        lr=run.settings.lr,
        batch_size=run.settings.batch_size,
        seed=row["seed"],
        title=f"{row['name']}, seed {row['seed']}",
        after_epoch=after_epoch,
    )
    row["accuracy"] = evaluate(model, *run.testing)
    if row["kind"] == "baseline":
        row["baseline_id"] = fingerprint(model)
    save_model(folder / f"{row['name']}.pth", model, row)


def train_baseline(run: Run, folder: Path, seed: int) -> dict:
    """Train a baseline from random weights, save it as baseline.pth, and return its row."""
    torch.manual_seed(seed)
    model = CNN()
    epochs = run.settings.baseline_epochs
    row = new_row(run, model, name="baseline", kind="baseline", seed=seed, epochs=epochs)
    train_evaluate_save(run, model, row, folder)
    return row


def evaluate_baseline(run: Run, path: Path, seed: int) -> dict:
    """Evaluate a baseline that was trained before, and return its row."""
    model = load_model(path)
    epochs = run.settings.baseline_epochs
    row = new_row(run, model, name="baseline", kind="baseline", seed=seed, epochs=epochs)
    model.to(run.device, memory_format=torch.channels_last)
    row["accuracy"] = evaluate(model, *run.testing)
    row["baseline_id"] = fingerprint(model)
    return row


def train_controls(run, baseline_path, models_dir, widths_by_sparsity: dict, seed, baseline_id):
    """Train what the pruned models are compared with; yield each row when its model is saved.

    These are the baseline, trained for as many more epochs as a pruned model, and networks as
    narrow as the pruned models, but from random weights.
    """
    epochs = run.settings.finetune_epochs
    model = load_model(baseline_path)
    row = new_row(
        run,
        model,
        name=f"baseline_{epochs}_more_epochs",
        kind="trained_on",
        seed=seed,
        epochs=epochs,
        baseline_id=baseline_id,
    )
    train_evaluate_save(run, model, row, models_dir)
    yield row

    # Train each network twice: for the epochs of baseline and fine-tuning together, and for the
    # epochs of the fine-tuning alone.
    lengths = (run.settings.baseline_epochs + epochs, epochs)
    for sparsity, length in product(widths_by_sparsity, lengths):
        torch.manual_seed(seed)
        model = CNN(widths_by_sparsity[sparsity])
        row = new_row(
            run,
            model,
            name=f"scratch_{sparsity}_{length}_epochs",
            kind="scratch",
            seed=seed,
            epochs=length,
            sparsity=sparsity,
            baseline_id=baseline_id,
        )
        train_evaluate_save(run, model, row, models_dir)
        yield row


def report_trial(rows: list[dict], heading: str) -> None:
    """Hand NNI the result of a trial: the row of its pruned model, and all its rows."""
    nni = import_nni()
    pruned_rows = [row for row in rows if row["kind"] == "pruned"]
    pruned = pruned_rows[0]  # a trial has one pruner, one sparsity and one seed
    # If two trials start together, NNI 3.0 can record the parameters of one for the other. So the
    # result has the trial's own parameters, and NNI's exported CSV shows those.
    parameters = nni.get_current_parameter() or {}
    result = {**pruned, **parameters, "heading": heading, "rows": rows}
    result["default"] = pruned["accuracy"]
    nni.report_final_result(result)  # NNI maximizes "default"


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the experiment, print its report, and return the rows of its results."""
    args = parse_options(argv)
    if args.report:
        return report_earlier_results(args.report)

    # What can be wrong with the machine shows here, before anything is trained.
    nni = import_nni()
    limit_threads()
    folder = prepare_folder(args.checkpoint_dir)
    run = prepare_run(args)
    description = describe(run, args)
    # After each epoch, a trial reports an accuracy to NNI, whose assessor may stop the trial. It is
    # the accuracy on training images, because the test images must not decide anything.
    after_epoch = nni.report_intermediate_result if args.is_trial else None

    rows = []
    try:
        for seed in args.seeds:
            # The models of the first seed lie in the folder itself.
            models_dir = folder if seed == args.seeds[0] else folder / f"seed_{seed}"

            # 1. Train the baseline and save it. If one is given, only evaluate it.
            if args.baseline:
                baseline_path = args.baseline
                row = evaluate_baseline(run, baseline_path, seed)
            else:
                baseline_path = models_dir / "baseline.pth"
                row = train_baseline(run, models_dir, seed)
            baseline_id = row["baseline_id"]
            rows.append(row)
            write_results(folder, description, rows)

            # 2. Prune it with each pruner at each sparsity, and fine-tune.
            widths_by_sparsity = {}  # the same for every pruner
            for pruner, sparsity in product(args.pruner, args.sparsity):
                # Each row starts from the file and the seed. So it does not depend on other rows.
                torch.manual_seed(seed)
                baseline = load_model(baseline_path)
                example_input = torch.rand(8, 1, 28, 28)
                model = prune(baseline, pruner, sparsity, example_input)
                model.to(run.device, memory_format=torch.channels_last)
                widths_by_sparsity[sparsity] = model.widths

                row = new_row(
                    run,
                    model,
                    name=f"{pruner}_{sparsity}",
                    kind="pruned",
                    seed=seed,
                    epochs=run.settings.finetune_epochs,
                    pruner=pruner,
                    sparsity=sparsity,
                    baseline_id=baseline_id,
                )
                row["accuracy_before"] = evaluate(model, *run.testing)
                train_evaluate_save(run, model, row, models_dir, after_epoch)
                rows.append(row)
                write_results(folder, description, rows)

            # 3. Train the controls, if they are asked for.
            if args.controls:
                controls = train_controls(
                    run, baseline_path, models_dir, widths_by_sparsity, seed, baseline_id
                )
                for row in controls:
                    rows.append(row)
                    write_results(folder, description, rows)
        if args.is_trial:
            report_trial(rows, description["heading"])
    except BaseException:
        # Show what is finished. An error in that must not hide the first one.
        if rows:
            with contextlib.suppress(Exception):
                show_results(description["heading"], rows, folder / "results.png")
        raise
    show_results(description["heading"], rows, folder / "results.png")
    saved = sum(row["training_seconds"] is not None for row in rows)  # not a given baseline
    print(f"\nSaved: {folder}{os.sep} ({saved} models, results.json, results.csv, results.png)")
    return rows


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has others
            stream.reconfigure(errors="replace")  # some consoles have no "±"
    try:
        main()
        sys.stdout.flush()  # so that a closed pipe is noticed here
    except ExperimentError as error:
        sys.exit(f"NNI_Pruning.py: error: {error}")
    except KeyboardInterrupt:
        print("NNI_Pruning.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the output has gone, as with `| head`. The interpreter's last flush would
        # fail, too, so the rest goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
