"""What `prune` costs a network that people know: ResNet-20 on CIFAR-10. From the root:

    python checkpoints/reference/cifar10.py --epochs 10 --seeds 0 1

A pruned network has seen its baseline's epochs as well. So the network from scratch, which trains
for as many epochs as the baseline, has had the shorter training.
"""

import argparse
import copy
import sys
import timeit
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, ops
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
import NNI_Pruning as script

RESULTS = Path(__file__).with_suffix(".csv")  # the models go into the folder above it
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # for training
BATCH_SIZE = 128
LEARNING_RATE = 0.1  # the best of 0.1, 0.2, 0.4 on held-out training images, in a short run


def resnet20(a=16, b=32, c=64):
    """He et al. 2016, section 4.2, with a, b and c channels in its stages; pixels from 0 to 255."""
    # Where a stage begins, the paper adds channels of zeros. A convolution can be pruned.
    to_b = ops.Conv2dNormActivation(a, b, 1, stride=2, activation_layer=None)
    to_c = ops.Conv2dNormActivation(b, c, 1, stride=2, activation_layer=None)
    blocks = [BasicBlock(a, a), BasicBlock(a, a), BasicBlock(a, a)]
    blocks += [BasicBlock(a, b, 2, to_b), BasicBlock(b, b), BasicBlock(b, b)]
    blocks += [BasicBlock(b, c, 2, to_c), BasicBlock(c, c), BasicBlock(c, c)]
    start = [nn.BatchNorm2d(3, affine=False), ops.Conv2dNormActivation(3, a)]  # scales the pixels
    return nn.Sequential(*start, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


def train(model, images, labels, epochs, lr, title):
    """Train a model in place, and return the seconds; lr is the peak of the one-cycle schedule."""
    model.to(DEVICE, memory_format=torch.channels_last).train()
    # An optimizer for each training: pruning has made new parameters.
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=True)
    batches = torch.cat([torch.randperm(len(images)) for _ in range(epochs)]).split(BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    # All places of an image that is shifted by up to 4 pixels: a view, which takes no memory.
    places = nn.functional.pad(images, [4, 4, 4, 4]).unfold(2, 32, 1).unfold(3, 32, 1)
    start = timeit.default_timer()
    for chosen in tqdm(batches, title, unit="step"):
        top, left = torch.randint(9, (2, len(chosen)))
        shifted = places[chosen, :, top, left]
        pixels = torch.where(torch.rand(len(chosen), 1, 1, 1) < 0.5, shifted.flip(3), shifted)
        with torch.autocast(DEVICE.type, torch.bfloat16, script.computes_bfloat16(DEVICE)):
            logits = model(pixels.to(DEVICE, torch.float32, memory_format=torch.channels_last))
        nn.functional.cross_entropy(logits.float(), labels[chosen].to(DEVICE)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return timeit.default_timer() - start


@torch.inference_mode()
def evaluate(model, images, labels):
    """Accuracy, the wrong images, ms for 100 images (the fastest of 50 times): float32, CPU."""
    model.to("cpu", memory_format=torch.channels_last).eval()
    batches = images.to(torch.float32, memory_format=torch.channels_last).split(100)
    with FlopCounterMode(display=False) as count:
        predicted = torch.cat([model(batch).argmax(1) for batch in batches])
    wrong = (predicted != labels).nonzero().flatten().tolist()
    seconds = min(timeit.repeat(lambda: model(batches[0]), number=1, repeat=50))
    row = {"accuracy": 100 - 100 * len(wrong) / len(labels), "wrong": " ".join(map(str, wrong))}
    return row | {"ms_for_100": 1e3 * seconds, "macs": count.get_total_flops() // 2 // len(labels)}


def finish(rows, data, seed, name, model, epochs, lr=LEARNING_RATE, **more):
    """Train a model, save it, and write its row and those before it."""
    row = {"name": name, "seed": seed, "epochs": epochs, "lr": lr, **more}
    row["train_seconds"] = train(model, *data[0], epochs, lr, f"{name}, seed {seed}")
    row |= {"parameters": script.count_parameters(model), **evaluate(model, *data[1])}
    row["versions"] = f"torch {torch.__version__}, NNI {version('nni')}"
    rows.append(row | {"hardware": f"{DEVICE.type}, {torch.get_num_threads()} threads"})
    pd.DataFrame(rows).to_csv(RESULTS, index=False)
    torch.save(model.state_dict(), RESULTS.parents[1] / f"cifar10_{name}_{seed}.pth")


def main(argv=None):
    parser = argparse.ArgumentParser(description="ResNet-20 on CIFAR-10, pruned and fine-tuned")
    parser.add_argument("--epochs", type=int, default=10, help="of a baseline")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5])
    args = parser.parse_args(argv)
    script.limit_threads()
    parts = [datasets.CIFAR10("data", is_train, download=True) for is_train in (True, False)]
    data = [(torch.tensor(p.data).permute(0, 3, 1, 2), torch.tensor(p.targets)) for p in parts]
    rows = []
    for seed in args.seeds:
        torch.manual_seed(seed)
        baseline = resnet20()
        finish(rows, data, seed, "baseline", baseline, args.epochs)
        for sparsity in args.sparsity:
            for pruner in script.PRUNERS:
                name = f"{pruner}_{sparsity}"
                start = timeit.default_timer()
                pruned = script.prune(baseline, pruner, sparsity, torch.rand(2, 3, 32, 32))
                more = {"prune_seconds": timeit.default_timer() - start}
                more["accuracy_before"] = evaluate(pruned, *data[1])["accuracy"]
                finish(rows, data, seed, f"{name}_full", copy.deepcopy(pruned), args.epochs, **more)
                more["lr"] = LEARNING_RATE / 10
                finish(rows, data, seed, f"{name}_gentle", pruned, max(1, args.epochs // 5), **more)
            sizes = [block.conv1.out_channels for block in pruned[2:11:3]]
            finish(rows, data, seed, f"scratch_{sparsity}", resnet20(*sizes), args.epochs)
    frame = pd.DataFrame(rows)
    table = frame.groupby("name", sort=False)[["parameters", "accuracy_before", "accuracy"]].mean()
    is_wrong = frame.set_index(["name", "seed"])["wrong"].str.get_dummies(" ")
    is_wrong = is_wrong.reindex(columns=map(str, range(len(data[1][1]))), fill_value=0)
    for name in table.index:  # against the baseline, in percentage points, with a 95 % interval
        points = 100 * (is_wrong.loc["baseline"] - is_wrong.loc[name])
        table.loc[name, ["difference", "+-"]] = points.mean(axis=None), script.half_interval(points)
    print(table.to_string(float_format="{:.2f}".format, na_rep=""))


if __name__ == "__main__":
    main()
