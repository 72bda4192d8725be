"""How fast is the script? Against the stock recipe, and against what the machine can do.

    python tests/benchmark.py            # real MNIST in data/, about four minutes on two cores
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


class StockNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(9216, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
            nn.LogSoftmax(dim=1),
        )


def stock_epoch(data_dir: Path, size: int, device: torch.device) -> float:
    """Seconds of the first epoch of the stock recipe on so many images."""
    torch.manual_seed(0)
    steps = [transforms.ToTensor(), transforms.Normalize((script.MEAN,), (script.DEVIATION,))]
    dataset = MNIST(data_dir, train=True, transform=transforms.Compose(steps))
    loader = DataLoader(Subset(dataset, range(size)), batch_size=64, shuffle=True)
    model = StockNet().to(device)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    model.train()
    script.synchronize(device)
    start = time.perf_counter()
    for images, labels in loader:
        batch, target = images.to(device), labels.to(device)
        optimizer.zero_grad()
        F.nll_loss(model(batch), target).backward()
        optimizer.step()
    script.synchronize(device)
    return time.perf_counter() - start


def trained(
    data: script.Data, widths: tuple[int, ...], epochs: int = 1, images: int | None = None
) -> tuple[script.CNN, float]:
    """A model trained by the script from random weights, and the seconds that this took."""
    torch.manual_seed(0)
    model = script.CNN(widths).to(data.train_images.device)
    training = script.train(
        model,
        data.train_images[:images],
        data.train_labels[:images],
        epochs=epochs,
        lr=script.LEARNING_RATE,
        batch_size=script.BATCH_SIZE["mnist"],
        seed=0,
    )
    return model, training.seconds


def inference(data: script.Data, sparsity: float, batch_size: int = 1000) -> float:
    """Seconds to classify all test images."""
    model = script.CNN(script.pruned_widths(script.WIDTHS, sparsity))
    model = model.to(data.test_images.device).eval()
    batches = script.normalised(data.test_images).split(batch_size)
    with torch.inference_mode():
        model(batches[0])
        script.synchronize(data.test_images.device)
        start = time.perf_counter()
        for batch in batches:
            model(batch)
        script.synchronize(data.test_images.device)
    return time.perf_counter() - start


def time_to_goal(data: script.Data) -> tuple[float, str]:
    """Training seconds of the shortest schedule whose model reaches GOAL.

    Each is a training of its own, annealed to its end: an epoch on 3/8 of the images, on 4/8, ...,
    on all of them; then two epochs, three, four.
    """
    images = len(data.train_labels)
    parts = [(1, eighths / 8) for eighths in range(3, 9)]
    for epochs, share in (*parts, (2, 1), (3, 1), (4, 1)):
        model, seconds = trained(data, script.WIDTHS, epochs, int(images * share))
        accuracy = script.evaluate(model, data.test_images, data.test_labels)
        if accuracy >= GOAL:
            break
    return seconds, f"{accuracy:.2f} % after {epochs * share:g} epochs"


def matrix_product_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """The machine's own GFLOP/s in products of square matrices, the best of several.

    Also as the 1 x 1 convolution that is the same product: on a CPU torch gives matrices to MKL and
    convolutions to oneDNN, and on AMD's processors MKL may have half the speed.
    """
    a, b = torch.rand(2, size, size, device=device).to(dtype)
    pixels = a.view(1, 32, size // 32, size).permute(0, 3, 1, 2)
    best = float("inf")
    for product in (lambda: a @ b, lambda: F.conv2d(pixels, b[:, :, None, None])):
        for _ in range(10):
            script.synchronize(device)
            start = time.perf_counter()
            product()
            script.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="6,000 images, one repeat")
    options = parser.parse_args()
    device = torch.device(options.device)
    script.keep_freed_memory()
    data = script.load_data("mnist", options.data_dir, 6000 if options.quick else None, device)
    images = len(data.train_labels)

    def an_epoch(factor: float, sparsity: float, share: int = 1):
        widths = script.pruned_widths(script.scaled_widths(factor), sparsity)
        # Forward, and backward to the input and to the weights: three times two FLOPs a MAC.
        flops = 6 * script.count_macs(script.CNN(widths)) * (images // share)
        return lambda: trained(data, widths, 1, images // share)[1], flops

    def classified(sparsity: float):
        macs = script.count_macs(script.CNN(script.pruned_widths(script.WIDTHS, sparsity)))
        return lambda: inference(data, sparsity), 2 * macs * len(data.test_labels)

    stock, ours, smaller = "stock recipe, one epoch", "our epoch: baseline", "our epoch: {}".format
    cases = {
        stock: (lambda: stock_epoch(options.data_dir, images, device), None),
        ours: an_epoch(1, 0),
        smaller(0.5): an_epoch(1, 0.5),
        smaller(0.75): an_epoch(1, 0.75),
        "baseline, 1/4 of the images": an_epoch(1, 0, 4),
        "baseline, 1/2 of the images": an_epoch(1, 0, 2),
        "baseline, 1/4 of the images, width × 2": an_epoch(2, 0, 4),
        "baseline, 1/4 of the images, width × 4": an_epoch(4, 0, 4),
        "inference: baseline": classified(0),
        "inference: 0.5": classified(0.5),
        "inference: 0.75": classified(0.75),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    reached = []
    trained(data, script.WIDTHS, 1, 512)  # the first steps pay for what later ones find ready
    for repeat in range(1 if options.quick else options.repeats):
        for name, (measure, _) in cases.items():
            seconds[name].append(measure())
            print(f"{repeat + 1}: {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
        reached.append(time_to_goal(data))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    goal, how = statistics.median(s for s, _ in reached), reached[0][1]
    one = median[ours] + 2 * median[smaller(0.5)] + 2 * median[smaller(0.75)]
    five = f"five trainings of {script.EPOCHS['mnist']} epochs (sum of epochs above)"
    median |= {five: script.EPOCHS["mnist"] * one, f"to {GOAL:g} %: {how}": goal}

    bfloat16 = script.computes_bfloat16(device)
    product = matrix_product_rate(device, torch.float32)
    training_product = matrix_product_rate(device, torch.bfloat16) if bfloat16 else product
    lines = []
    for name, value in median.items():
        flops = cases.get(name, (None, None))[1]
        inferring = name.startswith("inference")  # in float32 everywhere
        reference = "inference: baseline" if inferring else ours
        rate = product if inferring else training_product
        lines.append(
            (
                name,
                f"{value:.2f}",
                "" if inferring else f"{value / median[stock]:.2f}",
                f"{value / median[reference]:.2f}",
                f"{flops / value / 1e9:.0f}" if flops else "",
                f"{100 * flops / value / 1e9 / rate:.0f}" if flops else "",
            )
        )
    print(
        f"{data}; {script.device_name(options.device)}; medians of {len(reached)};"
        f" torch {torch.__version__};\nmatrix product: float32 {product:.0f} GFLOP/s"
        f"{f', bfloat16 {training_product:.0f} GFLOP/s' if bfloat16 else ''}\n"
    )
    headers = ("", "seconds", "× stock", "× baseline", "GFLOP/s", "% of product")
    alignment = ("left", *("right",) * 5)
    print(tabulate(lines, headers, disable_numparse=True, colalign=alignment))


if __name__ == "__main__":
    main()
