"""Pruning against oracles of its own: norms, zeroed channels and arithmetic."""

import platform
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

import NNI_Pruning as script
from conftest import ROOT

CASES = list(product(script.PRUNERS, (0.1, 0.5, 0.75, 0.99), (script.WIDTHS, (7, 12, 10, 5))))
PADDED = 28 + 2 * script.MAX_SHIFT  # side of a training image


def random_model(widths) -> script.CNN:
    """A model whose normalisation layers, too, hold values that a mistake would show in."""
    torch.manual_seed(1)
    model = script.CNN(widths)
    for name, value in model.state_dict().items():
        if "norm" in name and value.is_floating_point():
            value.copy_(torch.rand(value.shape) + 0.5)
    return model.eval()


def padded_images(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images of noise, padded as Data has them, and labels."""
    images = torch.randint(256, (number, PADDED, PADDED), dtype=torch.uint8)
    return images, torch.arange(number) % 10


def l1_score(weight):
    """The L1 norm of each filter (Li et al. 2017)."""
    return weight.flatten(1).abs().sum(1)


def fpgm_score(weight):
    """The sum of each filter's distances to all filters of its layer (He et al. 2019)."""
    filters = weight.flatten(1).double()
    return (filters[:, None] - filters[None]).norm(dim=2).sum(1)


SCORES = {"L1NormPruner": l1_score, "FPGMPruner": fpgm_score}


def kept_channels(model, pruner, sparsity) -> dict[str, torch.Tensor]:
    """By layer, the indices of the channels that a good pruner keeps: all but the lowest scores."""
    kept = {}
    for name in ("conv1", "conv2", "conv3", "hidden"):
        scores = SCORES[pruner](getattr(model, name).weight.detach())
        dropped = int(len(scores) * sparsity)
        kept[name] = scores.argsort()[dropped:].sort().values
    return kept


@pytest.mark.parametrize(("pruner", "sparsity", "widths"), CASES)
def test_kept_filters_are_those_that_the_norm_picks(pruner, sparsity, widths):
    model = random_model(widths)
    compact = script.prune(model, pruner, sparsity)
    kept = kept_channels(model, pruner, sparsity)
    conv1, conv2, conv3, hidden = kept.values()
    positions = (conv3[:, None] * 4 + torch.arange(4)).flatten()  # a channel is 2 x 2 features
    assert compact.conv1.weight.equal(model.conv1.weight[conv1])
    assert compact.conv2.weight.equal(model.conv2.weight[conv2][:, conv1])
    assert compact.conv3.weight.equal(model.conv3.weight[conv3][:, conv2])
    assert compact.hidden.weight.equal(model.hidden.weight[hidden][:, positions])
    assert compact.output.weight.equal(model.output.weight[:, hidden])
    assert compact.output.bias.equal(model.output.bias)


@pytest.mark.parametrize(("pruner", "sparsity", "widths"), CASES)
def test_compact_model_equals_the_original_with_channels_zeroed(pruner, sparsity, widths):
    # A masked channel would still emit its BatchNorm's bias (NNI issue 2130), so that goes too.
    model = random_model(widths)
    compact = script.prune(model, pruner, sparsity)
    kept = kept_channels(model, pruner, sparsity)
    with torch.no_grad():
        for name, channels in kept.items():
            gone = torch.ones(getattr(model, name).weight.shape[0], dtype=torch.bool)
            gone[channels] = False
            with_its_norm = {name, name.replace("conv", "norm")}  # conv1 and hidden have none
            for layer in (layer for at, layer in model.named_children() if at in with_its_norm):
                layer.weight[gone] = 0
                if layer.bias is not None:
                    layer.bias[gone] = 0
        images = torch.randn(64, 1, 28, 28)
        logits, expected = compact(images), model(images)
    assert logits.shape == (64, 10)
    assert (logits - expected).abs().max() < 1e-5
    assert expected.std() > 1e-3  # else the comparison would mean nothing


@pytest.mark.parametrize("sparsity", [None, 0.01, 0.1, 0.33, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("factor", [1, 0.3, 0.05, 0.001])
def test_parameters_and_macs_by_arithmetic(sparsity, factor):
    model = script.CNN(script.scaled_widths(factor))
    c1, c2, c3, h = widths = model.widths
    assert widths == tuple(max(2, round(width * factor)) for width in script.WIDTHS)
    if sparsity is not None:
        model = script.prune(model, "L1NormPruner", sparsity)
        c1, c2, c3, h = (width - int(width * sparsity) for width in widths)
        assert min(c1, c2, c3, h) >= 1
    convolutions = 5 * 5 * c1, 3 * 3 * c1 * c2, 3 * 3 * c2 * c3
    linear = c3 * 2 * 2 * h, h * 10
    norms_and_biases = c1 + 2 * (c2 + c3) + h + 10
    assert model.widths == (c1, c2, c3, h)
    assert script.count_parameters(model) == sum(convolutions) + sum(linear) + norms_and_biases
    positions = 12 * 12, 10 * 10, 5 * 5
    macs = sum(a * b for a, b in zip(convolutions, positions, strict=True)) + sum(linear)
    assert script.count_macs(model) == macs


@pytest.mark.parametrize("pruner", script.PRUNERS)
def test_what_the_defaults_promise(pruner):
    baseline = random_model(script.WIDTHS)
    parameters = script.count_parameters(baseline)
    assert 80_000 <= parameters <= 120_000
    for sparsity, times in ((0.5, 3.8), (0.75, 14)):
        compact = script.prune(baseline, pruner, sparsity)
        assert parameters / script.count_parameters(compact) >= times


@pytest.mark.parametrize("sparsity", script.SPARSITIES)
def test_the_original_stays_as_it_was(sparsity):
    model = random_model(script.WIDTHS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    script.prune(model, "FPGMPruner", sparsity)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_pruning_a_saved_baseline_leaves_its_file_alone(tmp_path):
    path = tmp_path / "baseline.pth"
    script.save_model(path, random_model(script.WIDTHS), dataset="mnist")
    before = path.read_bytes()
    script.prune(script.load_model(path), "L1NormPruner", 0.5)
    assert path.read_bytes() == before


def test_fine_tuning_a_compact_model_trains_all_of_it():
    compact = script.prune(random_model(script.WIDTHS), "L1NormPruner", 0.5)
    before = {name: value.clone() for name, value in compact.named_parameters()}
    images, labels = padded_images(64)
    script.train(compact, images, labels, epochs=1, lr=0.01, batch_size=32, seed=0)
    assert not any(value.equal(before[name]) for name, value in compact.named_parameters())


@pytest.mark.parametrize("in_hardware", [True, False])
def test_only_training_computes_in_bfloat16_and_only_in_hardware(in_hardware, monkeypatch):
    monkeypatch.setattr(script, "computes_bfloat16", lambda device: in_hardware)
    model, seen = script.CNN((8, 8, 8, 8)), []
    for layer in (model.conv2, model.hidden):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    images, labels = padded_images(64)
    script.train(model, images, labels, epochs=1, lr=0.01, batch_size=32, seed=0)
    assert set(seen) == {torch.bfloat16 if in_hardware else torch.float32}
    assert all(value.dtype == torch.float32 for value in model.parameters())
    seen.clear()
    script.evaluate(model, images[:, 1:29, 1:29], labels)
    assert set(seen) == {torch.float32}


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Linux's flags of x86"
)
def test_bfloat16_is_found_where_the_system_lists_it():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    found = script.computes_bfloat16(torch.device("cpu"))
    assert found == bool(flags & {"avx512_bf16", "amx_bf16"})


def test_training_order_is_shuffled_every_epoch_and_test_order_never(monkeypatch):
    class Spy(torch.nn.Module):
        """Stands in for the model, and writes down which images it is shown."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(10))
            self.seen = []

        def forward(self, images):
            pixels = images[:, 0, 14, 14] * script.DEVIATION + script.MEAN
            self.seen += (pixels * 255).round().int().tolist()
            return images[:, 0, :1, 0] * 0 + self.weight

    images = torch.arange(40, dtype=torch.uint8)[:, None, None].expand(40, PADDED, PADDED)
    labels = torch.arange(40) % 10
    spy = Spy()
    script.train(spy, images, labels, epochs=2, lr=0.01, batch_size=16, seed=0)
    first, second = spy.seen[:40], spy.seen[40:]
    assert sorted(first) == sorted(second) == list(range(40))
    assert list(range(40)) not in (first, second)
    assert first != second
    spy.seen.clear()
    script.evaluate(spy, images[..., :28, :28], labels)
    assert spy.seen == list(range(40))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_trains_and_agrees_with_the_cpu(tmp_path):
    model = random_model(script.WIDTHS)
    images = torch.randn(64, 1, 28, 28)
    with torch.no_grad():
        expected = model(images)
        assert (model.cuda()(images.cuda()).cpu() - expected).abs().max() < 1e-2


# ------------------------------------------------------------------------------ Python 3.14

# Python 3.14 took these names from ast; the typeguard that NNI pins imports one of them.
OLD_NAMES = "Str", "Num", "Bytes", "NameConstant", "Ellipsis"
AS_ON_3_14 = f"""
import ast, runpy, sys, warnings
warnings.simplefilter("ignore")
for name in {OLD_NAMES}:
    if hasattr(ast, name):
        delattr(ast, name)
if hasattr(ast, "__getattr__"):  # 3.12 and 3.13 make them when they are asked for
    del ast.__getattr__
"""


@pytest.fixture
def python_3_14(tmp_path):
    """Run Python code in a process, after AS_ON_3_14."""

    def start(code: str):
        command = [sys.executable, "-c", AS_ON_3_14 + code]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    return start


def test_nni_cannot_be_imported_without_the_names(python_3_14):
    assert "cannot import name 'Str' from 'ast'" in python_3_14("import nni").stderr


def test_the_script_runs_without_the_names(python_3_14, tmp_path):
    options = "--dataset digits --subset 400 --epochs 1 --width 0.1 --pruner FPGMPruner".split()
    code = f"sys.argv[1:] = {options}\nrunpy.run_path({script.__file__!r}, run_name='__main__')"
    process = python_3_14(code)
    assert process.returncode == 0, process.stderr
    assert "FPGMPruner 0.75" in process.stdout


def test_pytest_starts_without_the_names(python_3_14):
    arguments = ["-c", str(ROOT / ".pytest.ini"), "--version"]
    process = python_3_14(f"import pytest\nsys.exit(pytest.main({arguments}))")
    assert process.returncode == 0, process.stderr
