"""Pruning against oracles of its own: norms, zeroed channels and arithmetic."""

import copy
from importlib.metadata import version
from itertools import product

import pytest
import torch
import torchvision
from packaging.version import Version

import NNI_Pruning as script
from conftest import ROOT, SCRIPT, logits_of, python

CASES = list(product(script.PRUNERS, (0.5, 0.75, 0.99), (script.WIDTHS, (7, 12, 10, 5))))


def pruned_by_hand(weights: dict, pruner: str, sparsity: float) -> tuple[dict, dict]:
    """What pruning must make of a state_dict, by indexing; and the state_dict with zeros instead.

    The filters of the lowest scores go. L1: the sum of a filter's absolute values (Li et al. 2017).
    FPGM: the sum of a filter's distances to all filters of its layer (He et al. 2019).
    """
    kept = {}
    for name in ("conv1", "conv2", "conv3", "hidden"):
        filters = weights[f"{name}.weight"].flatten(1).double()
        distances = (filters[:, None] - filters[None]).norm(dim=2)
        scores = (filters.abs() if pruner == "L1NormPruner" else distances).sum(1)
        kept[name] = scores.argsort()[int(len(scores) * sparsity) :].sort().values
    # A channel of conv3 is 2 x 2 features to the hidden layer.
    positions = (kept["conv3"][:, None] * 4 + torch.arange(4)).flatten()
    inputs = {"conv2.weight": kept["conv1"], "conv3.weight": kept["conv2"]}
    inputs |= {"hidden.weight": positions, "output.weight": kept["hidden"]}
    compact, zeroed = {}, {}
    for name, value in weights.items():
        # Of BatchNorm, too: a masked channel would still emit its bias (NNI issue 2130).
        layer = name.split(".")[0].replace("norm", "conv")
        outputs = kept.get(layer, ...) if value.dim() else ...
        zeroed[name] = torch.zeros_like(value)
        compact[name] = zeroed[name][outputs] = value[outputs]
        if name in inputs:
            compact[name] = compact[name][:, inputs[name]]
    return compact, zeroed


@pytest.mark.parametrize(("pruner", "sparsity", "widths"), CASES)
def test_what_stays_is_what_the_norm_picks_and_answers_as_if_the_rest_were_zero(
    pruner, sparsity, widths
):
    torch.manual_seed(1)
    model = script.CNN(widths)
    for norm in (model.norm2, model.norm3):  # new ones hold 0 and 1: no mistake would show
        for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            value.uniform_(0.5, 1.5)
    expected, zeroed = pruned_by_hand(model.state_dict(), pruner, sparsity)
    compact = script.prune(model, pruner, sparsity, torch.rand(8, 1, 28, 28), keep=["output"])
    assert type(compact) is script.CNN
    assert not compact.training
    assert compact.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in compact.state_dict().items())
    images = torch.randint(256, (64, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        logits, wanted = compact(script.normalised(images)), logits_of(zeroed, images)
    assert (logits - wanted).abs().max() < 1e-4
    assert wanted.std() > 1e-3  # else the comparison would mean nothing


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("widths", [script.WIDTHS, (9, 20, 33, 7)])
def test_parameters_and_macs_by_arithmetic_and_by_nni(sparsity, widths):
    model = script.CNN(widths)
    if sparsity:
        model = script.prune(model, "L1NormPruner", sparsity, torch.rand(8, 1, 28, 28), ["output"])
    c1, c2, c3, h = (width - int(width * sparsity) for width in widths)
    assert model.widths == (c1, c2, c3, h)
    convolutions = 5 * 5 * c1, 3 * 3 * c1 * c2, 3 * 3 * c2 * c3
    linear = c3 * 2 * 2 * h + h * 10
    norms_and_biases = c1 + 2 * (c2 + c3) + h + 10
    assert script.count_parameters(model) == sum(convolutions) + linear + norms_and_biases
    macs = sum(a * b for a, b in zip(convolutions, (12 * 12, 10 * 10, 5 * 5), strict=True)) + linear
    model.train()
    assert script.count_macs(model) == macs
    assert model.norm2.running_mean.eq(0).all()  # counting taught the statistics nothing
    script.import_nni()
    from nni.compression.utils.counter import count_flops_params

    # NNI's "flops" are multiply-accumulates, and it leaves out normalisation's parameters.
    found = count_flops_params(model, torch.zeros(1, 1, 28, 28), verbose=False)[:2]
    assert found == (macs, script.count_parameters(model) - 2 * (c2 + c3))


# ----------------------------------------------------------------- other people's networks

OTHERS = {"resnet18": "fc", "mobilenet_v3_small": "classifier.3", "squeezenet1_1": "classifier"}


@pytest.mark.parametrize("pruner", script.PRUNERS)
@pytest.mark.parametrize("network", OTHERS)
def test_networks_of_torchvision(network, pruner):
    torch.manual_seed(0)
    model = getattr(torchvision.models, network)()
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    images, labels = torch.rand(8, 3, 64, 64), torch.arange(8)
    compact = script.prune(model, pruner, 0.5, images, keep=OTHERS[network])
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert type(compact) is type(model)
    assert [p.requires_grad for p in compact.parameters()].count(False) == 1  # still frozen
    # Half of both neighbours' channels is a quarter of the weights; the kept layer, depthwise
    # convolutions and branches that are added up lose less.
    left = script.count_parameters(compact) / script.count_parameters(model)
    assert 0.25 < left < 0.5
    before, logits = copy.deepcopy(compact.state_dict()), compact.train()(images)
    assert logits.shape == (8, 1000)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    torch.optim.SGD(compact.parameters(), lr=1.0).step()
    assert any(not value.equal(before[name]) for name, value in compact.named_parameters())


class Untraceable(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("network", "keep", "sparsity", "reason"),
    [
        ("shufflenet_v2_x1_0", "fc", 0.5, "Group|Empty"),  # NNI's own errors
        ("squeezenet1_1", "fc", 0.5, "keep .*fc.*no attribute `fc`"),
        ("squeezenet1_1", "features.0", 0.5, "another shape"),  # the output layer is not kept
        ("squeezenet1_1", "classifier", 0.0001, "no channel went"),
        ("squeezenet1_1", "classifier", 1.0, "between 0 and 1"),
        (None, "", 0.5, "TraceError"),
    ],
)
def test_what_cannot_be_pruned_is_a_clear_error(network, keep, sparsity, reason):
    model = getattr(torchvision.models, network)() if network else Untraceable(4, 4)
    example = torch.rand(8, 3, 64, 64) if network else torch.rand(8, 4)
    with pytest.raises(script.ExperimentError, match=reason):
        script.prune(model, "L1NormPruner", sparsity, example, [keep])


# --------------------------------------------------------------- Python 3.14, missing NNI

# Python 3.14 took these names from ast; the typeguard that NNI pins imports one of them. 3.12 and
# 3.13 make them when they are asked for.
AS_ON_3_14 = """
import ast, sys, warnings
warnings.simplefilter("ignore")
for name in ("Str", "Num", "Bytes", "NameConstant", "Ellipsis"):
    if hasattr(ast, name):
        delattr(ast, name)
if hasattr(ast, "__getattr__"):
    del ast.__getattr__
"""


def test_nni_needs_the_mend_on_python_3_14_and_the_script_has_it(tmp_path):
    # For sweeps on Python 3.14 the README has typeguard upgraded: NNI then needs no mend.
    if Version(version("typeguard")) < Version("4.1.3"):
        process = python(tmp_path, "-c", f"{AS_ON_3_14}import nni")
        assert "cannot import name 'Str'" in process.stderr
    mended = f"{AS_ON_3_14}sys.path.insert(0, {str(ROOT)!r})\nimport NNI_Pruning as script\n"
    mended += "script.import_nni()\nprint(ast.Str is ast.Constant)"
    assert python(tmp_path, "-c", mended).stdout == "True\n"


def test_pytest_starts_without_the_plugin_of_typeguard(tmp_path):
    arguments = ["-c", str(ROOT / ".pytest.ini"), "--version"]
    code = f"{AS_ON_3_14}import pytest\nsys.exit(pytest.main({arguments}))"
    process = python(tmp_path, "-c", code)
    assert process.returncode == 0, process.stderr


def test_a_missing_nni_is_said_before_anything_is_trained(tmp_path):
    options = ["--dataset", "digits"]
    code = f"import runpy, sys\nsys.modules['nni'] = None\nsys.argv[1:] = {options}\n"
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    process = python(tmp_path, "-c", code)
    assert process.returncode == 1
    assert process.stderr.startswith("NNI_Pruning.py: error: NNI is missing")
    assert "--platform macosx_10_9_x86_64 --target " in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.iterdir())
