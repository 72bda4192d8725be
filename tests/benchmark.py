"""How fast is the script? Against the stock recipe, and against what the machine can do.

    python tests/benchmark.py            # real MNIST in data/, some minutes on two cores
    python tests/benchmark.py --quick    # a subset: a look at the table, not at its figures

Everything runs in one process, interleaved, `--repeats` times; the table gives medians. Nothing
here is a test: timings do not belong into a test run.

The stock recipe is written from the published settings of PyTorch's basic MNIST example: two 3 x 3
convolutions of 32 and 64 channels, max pooling, dropout, linear layers of 128 and 10 (1,199,882
parameters), a DataLoader of PIL images with ToTensor and Normalize, batch 64, Adadelta, lr 1.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

sys.path.insert(0, str(Path(__file__).parent.parent))

import NNI_Pruning as script

GOAL = 99.0  # % of the test images, for "time to"
RECIPE = {"lr": script.LEARNING_RATE, "batch_size": script.BATCH_SIZE["mnist"], "seed": 0}


def seconds_of(work, device: str) -> float:
    synchronize = torch.accelerator.synchronize if device != "cpu" else lambda: None
    synchronize()  # a clock tells the truth only once the device has done what it was given
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def stock_epoch(data_dir: Path, size: int, device: str) -> float:
    """Seconds of the first epoch of the stock recipe on so many images."""
    torch.manual_seed(0)
    steps = [transforms.ToTensor(), transforms.Normalize((script.MEAN,), (script.DEVIATION,))]
    dataset = MNIST(data_dir, train=True, transform=transforms.Compose(steps))
    loader = DataLoader(Subset(dataset, range(size)), batch_size=64, shuffle=True)
    convolutions = nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
    linear = nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)
    layers = *convolutions, nn.Dropout(0.25), nn.Flatten(), *linear, nn.LogSoftmax(dim=1)
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)

    def epoch():
        for images, labels in loader:
            batch, target = images.to(device), labels.to(device)
            optimizer.zero_grad()
            F.nll_loss(model(batch), target).backward()
            optimizer.step()

    return seconds_of(epoch, device)


def new_model(sparsity: float, device: str) -> script.CNN:
    """The script's CNN with random weights, as narrow as after pruning."""
    torch.manual_seed(0)
    widths = tuple(round(width * (1 - sparsity)) for width in script.WIDTHS)
    return script.CNN(widths).to(device, memory_format=torch.channels_last)


def inference(model: script.CNN, images: torch.Tensor) -> float:
    """Seconds to classify all images, in float32."""
    batches = script.normalised(images).split(1000)
    model.eval()
    with torch.inference_mode():
        model(batches[0])
        return seconds_of(lambda: [model(batch) for batch in batches], images.device.type)


def time_to_goal(training, testing) -> tuple[float, str]:
    """Training seconds of the shortest schedule whose model reaches GOAL.

    Each is a training of its own, annealed to its end: an epoch on 3/8 of the images, on 4/8, ...,
    on all of them; then two epochs, three, four.
    """
    for epochs in (3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 2, 3, 4):
        part = [values[: int(len(values) * min(epochs, 1))] for values in training]
        model = new_model(0, training[0].device.type)
        seconds = script.train(model, *part, epochs=max(1, int(epochs)), **RECIPE)
        if (accuracy := script.evaluate(model, *testing)) >= GOAL:
            break
    return seconds, f"{accuracy:.2f} % after {epochs:g} epochs"


def product_rate(dtype: torch.dtype, device: str, size: int = 2048) -> float:
    """The machine's own GFLOP/s in products of square matrices, the best of several.

    Also as the 1 x 1 convolution that is the same product: on a CPU torch gives matrices to MKL and
    convolutions to oneDNN, and on AMD's processors MKL may have half the speed.
    """
    a, b = torch.rand(2, size, size, device=device).to(dtype)
    pixels = a.view(1, 32, size // 32, size).permute(0, 3, 1, 2)
    products = (lambda: a @ b, lambda: F.conv2d(pixels, b[:, :, None, None]))
    return 2e-9 * size**3 / min(seconds_of(work, device) for work in products * 10)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--data-dir", type=Path, default="data", help="where MNIST is; data")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"torch's name of it; here {device}")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; 3")
    parser.add_argument("--quick", action="store_true", help="6,000 images, one repeat")
    args = parser.parse_args()
    device, repeats = args.device, 1 if args.quick else args.repeats
    _, *data = script.load_data("mnist", args.data_dir, 6000 if args.quick else None)
    training, testing = ([values.to(device) for values in pair] for pair in data)
    images, epochs = len(training[1]), script.EPOCHS["mnist"]
    bfloat16 = script.computes_bfloat16(torch.device(device))

    def our_epoch(sparsity: float) -> float:
        return script.train(new_model(sparsity, device), *training, epochs=1, **RECIPE)

    stock, ours, classified = (
        "stock recipe, one epoch",
        "our epoch: baseline",
        "inference: baseline",
    )
    names = {0: "baseline"} | {sparsity: str(sparsity) for sparsity in script.SPARSITIES}
    macs = {sparsity: script.count_macs(new_model(sparsity, device)) for sparsity in names}
    cases = {stock: (partial(stock_epoch, args.data_dir, images, device), 0)}  # (measure, FLOPs)
    for sparsity, name in names.items():
        # Forward, and backward to the input and to the weights: three times two FLOPs a MAC.
        cases[f"our epoch: {name}"] = partial(our_epoch, sparsity), 6 * macs[sparsity] * images
    for sparsity, name in names.items():
        work = partial(inference, new_model(sparsity, device), testing[0])
        cases[f"inference: {name}"] = work, 2 * macs[sparsity] * len(testing[1])

    seconds, goals = {name: [] for name in cases}, []
    our_epoch(0)  # the first steps pay for what later ones find ready
    for _ in range(repeats):
        for name, (measure, _) in cases.items():
            seconds[name].append(measure())
        goals.append(time_to_goal(training, testing))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    pruned = len(script.PRUNERS) * sum(median[f"our epoch: {s}"] for s in script.SPARSITIES)
    all_five = f"five trainings of {epochs} epochs (sum of epochs above)"
    median[all_five] = epochs * (median[ours] + pruned)
    median[f"to {GOAL:g} %: {goals[0][1]}"] = statistics.median(value for value, _ in goals)

    product = product_rate(torch.float32, device)
    product_trained = product_rate(torch.bfloat16, device) if bfloat16 else product
    lines = []
    for name, value in median.items():
        inferring = name.startswith("inference")  # in float32 everywhere
        line = [name, f"{value:.2f}", "" if inferring else f"{value / median[stock]:.2f}"]
        line.append(f"{value / median[classified if inferring else ours]:.2f}")
        if name in cases and (gflops := cases[name][1] / value / 1e9):
            share = gflops / (product if inferring else product_trained)
            line += [f"{gflops:.0f}", f"{100 * share:.0f}"]
        lines.append(line)
    print(
        f"MNIST ({images:,} training and {len(testing[1]):,} test images); {device},"
        f" {torch.get_num_threads()} threads; medians of {repeats}; torch {torch.__version__};\n"
        f"matrix product: float32 {product:.0f} GFLOP/s"
        f"{f', bfloat16 {product_trained:.0f} GFLOP/s' if bfloat16 else ''}\n"
    )
    headers = ("", "seconds", "× stock", "× baseline", "GFLOP/s", "% of product")
    alignment = ("left", *("right",) * 5)
    print(tabulate(lines, headers, disable_numparse=True, colalign=alignment))


if __name__ == "__main__":
    main()
