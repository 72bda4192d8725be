"""How fast is the script? Against the stock recipe, and against what the machine can do.

    python tests/benchmark.py            # real MNIST in data/, some minutes on two cores
    python tests/benchmark.py --quick    # a subset: a look at the table, not at its figures

All in one process, interleaved; medians. No test: timings do not belong into a test run.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

sys.path.insert(0, str(Path(__file__).parent.parent))

import NNI_Pruning as script

STOCK = "stock recipe, one epoch"
GOAL = 99.0  # % of the test images
RECIPE = {"lr": script.LEARNING_RATE, "batch_size": script.BATCH_SIZE["mnist"], "seed": 0}


def seconds_of(work, device: torch.device) -> float:
    start = script.synchronized_time(device)
    work()
    return script.synchronized_time(device) - start


def stock_epoch(data_dir: Path, size: int, device: torch.device) -> float:
    """Seconds of the first epoch of PyTorch's basic MNIST example, by its published settings.

    1,199,882 parameters, a DataLoader of PIL images, batch 64, Adadelta, learning rate 1.
    """
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


def new_model(sparsity: float, device: torch.device) -> script.CNN:
    """The script's CNN with random weights, as narrow as after pruning."""
    torch.manual_seed(0)
    widths = tuple(round(width * (1 - sparsity)) for width in script.WIDTHS)
    return script.CNN(widths).to(device, memory_format=torch.channels_last)


def inference(model: script.CNN, images: torch.Tensor) -> float:
    """Seconds to classify all images, in float32."""
    batches = script.normalize(images).split(1000)
    model.eval()
    with torch.inference_mode():
        model(batches[0])
        return seconds_of(lambda: [model(batch) for batch in batches], images.device)


def time_to_goal(training, testing) -> float:
    """Training seconds of the shortest schedule, annealed to its end, whose model reaches GOAL."""
    for epochs in (3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 2, 3, 4):  # below 1: of so many images
        part = [values[: int(len(values) * min(epochs, 1))] for values in training]
        model = new_model(0, training[0].device)
        seconds = script.train(model, *part, epochs=max(1, int(epochs)), **RECIPE)
        if script.evaluate(model, *testing) >= GOAL:
            return seconds
    return float("nan")


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The machine's own GFLOP/s: the best of several products of square matrices.

    As a 1 x 1 convolution, which is the same: on AMD's processors torch's matrix product by MKL may
    have half the speed.
    """
    pixels, weight = torch.rand(2, 2048, 2048, device=device).to(dtype)
    pixels = pixels.view(1, 32, 64, 2048).permute(0, 3, 1, 2)
    weight = weight[:, :, None, None]
    seconds = min(seconds_of(lambda: F.conv2d(pixels, weight), device) for _ in range(20))
    return 2e-9 * 2048**3 / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the script and the stock recipe.")
    parser.add_argument("--data-dir", type=Path, default="data", help="where MNIST is; data")
    devices = ("cpu", "auto", "cuda", "mps")
    parser.add_argument("--device", choices=devices, default="cpu", help="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; 3")
    parser.add_argument("--quick", action="store_true", help="6,000 images, one repeat")
    args = parser.parse_args()
    script.limit_threads()
    device = script.select_device(args.device)
    repeats = 1 if args.quick else args.repeats
    _, *data = script.load_data("mnist", args.data_dir, 6000 if args.quick else None)
    training, testing = ([values.to(device) for values in pair] for pair in data)
    images = len(training[1])

    def our_epoch(sparsity: float) -> float:
        return script.train(new_model(sparsity, device), *training, epochs=1, **RECIPE)

    # What is measured, and its FLOPs: two a MAC; three times as many in training, whose backward
    # pass goes to the input and to the weights.
    cases = {STOCK: (partial(stock_epoch, args.data_dir, images, device), 0)}
    for sparsity in (0, *script.SPARSITIES):
        model = new_model(sparsity, device)
        macs = script.count_macs(model)
        cases[f"our epoch at {sparsity}"] = partial(our_epoch, sparsity), 6 * macs * images
        work = partial(inference, model, testing[0])
        cases[f"inference at {sparsity}"] = work, 2 * macs * len(testing[1])
    cases[f"our training to {GOAL:g} %"] = partial(time_to_goal, training, testing), 0

    our_epoch(0)  # the first steps pay for what later ones find ready
    runs = [{name: measure() for name, (measure, _) in cases.items()} for _ in range(repeats)]
    seconds = {name: median(run[name] for run in runs) for name in cases}
    pruned = len(script.PRUNERS) * sum(seconds[f"our epoch at {s}"] for s in script.SPARSITIES)
    epochs = script.EPOCHS["mnist"]
    seconds[f"our five trainings, {epochs} epochs"] = epochs * (seconds["our epoch at 0"] + pruned)

    lines = []
    for name, value in seconds.items():
        baseline = seconds["inference at 0" if "inference" in name else "our epoch at 0"]
        _, flops = cases.get(name, (None, 0))
        rate = flops / value / 1e9 if flops else None
        lines.append((name, value, value / seconds[STOCK], value / baseline, rate))
    product_rates = (product_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16))
    print(
        f"MNIST ({images:,} training and {len(testing[1]):,} test images); {device.type},"
        f" {torch.get_num_threads()} threads; medians of {repeats}; torch {torch.__version__};\n"
        "the machine's own GFLOP/s: float32 {:.0f}, bfloat16 {:.0f}\n".format(*product_rates)
    )
    headers = ("", "seconds", "x stock", "x baseline", "GFLOP/s")
    print(tabulate(lines, headers, floatfmt=("", ".2f", ".2f", ".2f", ".0f")))


if __name__ == "__main__":
    main()
