"""Pruning against independent computations: norms, zeroed channels and arithmetic."""

import ast
import copy
import logging
import math
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from packaging.version import Version
from torch import nn
from torch.nn.utils import parametrizations

import NNI_Pruning as script
from conftest import ROOT, logits_of, run_python

L1 = "L1NormPruner"
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
parametrize = pytest.mark.parametrize


def pruned_by_hand(weights, pruner, sparsity, scored=None):
    """What pruning must make of a state_dict, by indexing; and the state_dict with zeros instead.

    The filters of the lowest scores go. L1: the sum of a filter's absolute values (Li et al. 2017).
    FPGM: the sum of a filter's distances to all filters of its layer (He et al. 2019). The filters
    of `scored` get the scores, if there is one.
    """
    kept = {}
    for name in "conv1 conv2 conv3 hidden".split():
        filters = (scored or weights)[f"{name}.weight"].flatten(1).double()
        distances = (filters[:, None] - filters).norm(dim=2)
        scores = (filters.abs() if pruner == L1 else distances).sum(1)
        kept[name] = scores.argsort()[int(len(scores) * sparsity) :].sort().values
    # A channel of conv3 is 2 x 2 features to the hidden layer.
    positions = (kept["conv3"][:, None] * 4 + torch.arange(4)).flatten()
    inputs = {
        "conv2.weight": kept["conv1"],
        "conv3.weight": kept["conv2"],
        "hidden.weight": positions,
        "output.weight": kept["hidden"],
    }
    compact = dict(weights)
    zeroed = dict(weights)
    for name, value in weights.items():
        if value.dim() > 0:  # all but BatchNorm's count of batches
            # Of BatchNorm, too: a masked channel would still emit its bias (NNI issue 2130).
            layer = name.split(".")[0].replace("norm", "conv")
            outputs = kept.get(layer, slice(None))
            zeroed[name] = torch.zeros_like(value)
            zeroed[name][outputs] = compact[name] = value[outputs]
            if name in inputs:
                compact[name] = compact[name][:, inputs[name]]
    return compact, zeroed


def with_distinct_values(model, dtype):
    """A copy of the network. In each of its tensors, all values differ, and none is zero."""
    torch.manual_seed(0)
    model = copy.deepcopy(model).to(dtype)
    for tensor in model.state_dict().values():
        size = tensor.numel()
        # With all digits of the dtype, so that rounding shows. Variances are positive.
        values = torch.randperm(size, dtype=dtype) / size + 0.5
        if tensor.dim() > 1:
            # Of variance 2 / fan-in, as He et al. (2015) draw weights. The mean is not quite 0,
            # because then a value could be.
            values = (values - 0.997) * (24 * len(tensor) / size) ** 0.5
        tensor.copy_(values.view_as(tensor) if tensor.dim() else torch.tensor(100))
    return model


@parametrize("pruner", script.PRUNERS)
@parametrize(
    ("sparsity", "widths"), [(0.5, script.WIDTHS), (0.75, script.WIDTHS), (0.99, (7, 12, 10, 5))]
)
def test_prune_keeps_the_filters_of_highest_score(pruner, sparsity, widths):
    model = with_distinct_values(script.CNN(widths), torch.float32)
    expected, zeroed = pruned_by_hand(model.state_dict(), pruner, sparsity)
    compact = script.prune(model, pruner, sparsity, torch.rand(8, 1, 28, 28))
    assert type(compact) is script.CNN
    assert not compact.training
    torch.testing.assert_close(compact.state_dict(), expected, rtol=0, atol=0)
    # The plain lines of NNI make the same model, but for BatchNorm's count of batches.
    for key, value in script.prune_cnn(model.eval(), pruner, sparsity).state_dict().items():
        assert "num_batches" in key or value.equal(expected[key])
    # It computes what the original computes with zeros for the other filters.
    images = torch.randint(256, (64, 28, 28), dtype=torch.uint8)
    wanted = logits_of(zeroed, images)
    assert (compact(script.normalize(images)) - wanted).abs().max() < 1e-4
    assert wanted.std() > 1e-3  # else the comparison would mean nothing


@parametrize("sparsity", [0.75, 0.99])
def test_macs_by_arithmetic(sparsity):
    widths = (9, 20, 33, 7)
    model = script.prune(script.CNN(widths), L1, sparsity, torch.rand(8, 1, 28, 28))
    c1, c2, c3, h = (width - int(width * sparsity) for width in widths)
    conv1, conv2, conv3 = 25 * c1, 9 * c1 * c2, 9 * c2 * c3
    linear = 4 * c3 * h + 10 * h
    macs = 144 * conv1 + 100 * conv2 + 25 * conv3 + linear
    model.train()
    assert script.count_macs(model) == macs
    assert not model.norm2.running_mean.any()  # counting taught the statistics nothing


# ------------------------------------------------------------------- the oracle by value


def norms_and_output(model, inputs, dtype):
    """On random numbers: the norm of the output of each call of a layer, and the whole output."""
    norms = []
    for layer in model.modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_hook(lambda *call: norms.append(call[2].norm()))
    torch.manual_seed(0)
    tests = [
        torch.rand_like(value, dtype=dtype) if value.is_floating_point() else value.clone()
        for value in inputs
    ]
    output = model(*tests)
    return [getattr(output, "logits", output), *norms]


def outputs_of(layer):
    return layer.weight.shape[isinstance(layer, nn.ConvTranspose2d)]


def pruned_and_checked(model, inputs, pruner=L1, dtype=torch.float64, keep=()):
    """Prune, and compare with the network whose lost channels are zero, at each layer.

    Uses nothing that `prune` says: it finds by value which weights are left. Also returns the names
    of the layers that lost output channels, each half of them.
    """
    original = with_distinct_values(model, dtype).eval()
    compact = script.prune(original, pruner, 0.5, inputs, keep)
    narrower = []
    for name, large in original.named_modules():
        if isinstance(large, LAYERS):
            small = compact.get_submodule(name)
            assert outputs_of(small) in (outputs_of(large), math.ceil(outputs_of(large) / 2))
            if outputs_of(small) < outputs_of(large):
                narrower.append(name)
            for key, value in small.named_parameters():
                tensor = large.get_parameter(key).data
                is_left = torch.isin(tensor, value)
                assert is_left.sum() == value.numel(), "the copy has a value of its own"
                tensor *= is_left
    tolerance = torch.finfo(dtype).eps ** 0.5
    found, wanted = (norms_and_output(network, inputs, dtype) for network in (compact, original))
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert all(map(torch.any, wanted))  # else the comparison would mean nothing
    return compact, " ".join(narrower)


# ----------------------------------------------------------------- other people's networks


class Net(nn.Sequential):
    """Layers, and a function of the inputs and of them in place of `forward`."""

    def __init__(self, steps, *layers):
        super().__init__(*layers)
        self.steps = steps

    def forward(self, *inputs):
        return self.steps(*inputs, *self)


class WithOption(nn.Sequential):
    def forward(self, x, mask=None):
        self.seen = super().forward(x if mask is None else mask)
        return self.seen


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


@dataclass
class Output:
    logits: torch.Tensor


def conv(inputs=16, outputs=16, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def end(classes=5):
    return Net(lambda x, linear: linear(x.flatten(2).mean(2)), nn.Linear(16, classes))


def classifier(*layers):
    return nn.Sequential(conv(3), *layers, end())


def block(steps, *layers):
    return classifier(Net(steps, *layers), conv())


def on_tokens(steps, *layers):
    tokens = Net(lambda x: x.flatten(2).transpose(1, 2))
    return classifier(conv(), tokens, Net(steps, *layers), tokens)


def on_frames(x, net):
    return net(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (4, 2)).mean(0)


IMAGES = torch.rand(2, 3, 8, 8)
# The mean over channels is another one if channels go. It shows in few outputs.
GATE = Net(lambda x, b: x * F.hardsigmoid(b(x).mean((1, 2, 3), True)), conv(bias=False))
GATED = nn.Sequential(conv(3, bias=False), GATE, conv(), end())
TIED = classifier(conv(), conv(), conv())
TIED[2].weight = TIED[3].weight
TWO_NAMES = block(lambda x, b, same: b(x), conv(), nn.Identity())
TWO_NAMES[1][1] = TWO_NAMES[1][0]
HOOKED = classifier(conv())
HOOKED[0].register_forward_hook(lambda layer, args, output: output * 2)
# The layers that lose channels, the network, and its inputs if not IMAGES. Layer "1.0" is the first
# one inside the second.
NETS = {
    # BatchNorm and sigmoid make a removed channel another number than zero.
    "chain": ("0 3", classifier(nn.BatchNorm2d(16), nn.Sigmoid(), conv())),
    "residual": ("0 1.0 2", block(lambda x, b: b(input=x) + x, conv())),
    "depthwise": ("0 1 2", classifier(conv(groups=16), conv())),
    "multiplied": ("0 1 2", classifier(conv(outputs=32, groups=16), conv(32))),
    "grouped": ("0 1 2", classifier(conv(groups=4), conv())),
    "transposed": ("0 1 2", classifier(nn.ConvTranspose2d(16, 16, 2, groups=2), conv())),
    "chunk": ("0 1.0 2", block(lambda x, b: b([*x.chunk(2, 1)][1]), conv(8))),
    "excite": (
        "0 1.0 1.1 2",
        block(
            lambda x, a, b: x * b(a(x.mean((2, 3))))[:, :, None, None],
            nn.Linear(16, 4),
            nn.Linear(4, 16),
        ),
    ),
    "one channel": ("0 2", classifier(conv(16, 1), conv(1))),
    "cat": (
        "0 1.0 2",
        classifier(Net(lambda x, b: torch.cat([x, torch.cat([b(x)])], axis=1), conv()), conv(32)),
    ),
    "cat in space": ("0 1.0 2", block(lambda x, b: torch.cat([x, b(x)], 2), conv())),
    "padded": ("0 2", classifier(nn.ZeroPad2d(1), conv())),
    "padded with ones": ("2", classifier(nn.ConstantPad2d(1, 1.0), conv())),
    "LayerNorm": (
        "0 3.1",
        on_tokens(lambda x, n, a: a(n(x)), nn.LayerNorm(16), nn.Linear(16, 16)),
    ),
    # The mean over channels changes, by too little for float32.
    "mean": ("2", classifier(Net(lambda x: x * (1 + x.mean() / 1e5)), conv())),
    "spatial attention": ("2", block(lambda x, b: x * b(x.mean(1, True)), conv(1, 1))),
    "argmax": ("0.0 0.2", nn.Sequential(GATED, Net(lambda x: x.argmax(1)))),
    "fixed view": ("2", classifier(Net(lambda x: x.view(2, 4, 16, 16)), conv(4))),
    "parameter": ("2", block(lambda x, b: x * F.relu(b.bias)[:, None, None], conv())),
    "fusion": ("0 1.0 2", block(lambda x, b, n: b(x) * n.weight.sum(), conv(), nn.LayerNorm(2))),
    "unlike widths": (
        "2",
        classifier(Net(lambda x, b: x.chunk(2, 1)[1] + b(x), conv(16, 8)), conv(8)),
    ),
    "encoder": (
        "0 3.0.linear1",
        on_tokens(lambda x, e: e(x), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)),
    ),
    "input": (
        "1",
        Net(lambda x, a, *rest: rest[1](rest[0](x + a(x))), conv(3, 3), conv(3), end()),
    ),
    "frozen": ("2", classifier(torchvision.ops.FrozenBatchNorm2d(16), conv())),
    "no statistics": ("0 2", classifier(nn.BatchNorm2d(16, track_running_stats=False), conv())),
    "class": ("0 2", classifier(NormAct(16), conv())),
    "PReLU": ("0 3", classifier(nn.PReLU(16), nn.PReLU(), conv())),
    "called twice": ("0 1.0 2", block(lambda x, b: b(b(x)), conv())),
    "two names": ("0 1.0 2", TWO_NAMES),
    "tied": ("0", TIED),
    "parametrized": ("2", classifier(parametrizations.weight_norm(conv()), conv())),
    "option": ("0 1", WithOption(*classifier(conv()))),
    "hook": ("0 1", HOOKED),
    "question": (
        "0 1.1 2",
        block(lambda x, b, c: c(x) if b(x).sum() > -1e9 else -x, conv(), conv()),
    ),
    "shapes": ("0 1.0 2", block(lambda x, b: b(x[: len(x), :, : x.shape[2] // 2]), conv())),
    "two ways": (
        "1.0 2",
        block(
            lambda x, a, b, m, n: (a if len(x) < 3 else b)(x) + m(n(x), n(x), n(x))[0].mean(),
            conv(),
            conv(),
            nn.MultiheadAttention(64, 1),
            nn.Flatten(2),
        ),
    ),
    # NaN ends in the sign: only the comparison shows what depends on what.
    "sign": ("2", classifier(Net(torch.sign), conv())),
    # And nothing of this shows on images: there, the ReLU passes all on.
    "saturated": (
        "2",
        classifier(
            Net(
                lambda x: torch.cat(
                    [F.relu(x[:, : x.shape[1] // 2] + 9), x[:, x.shape[1] // 2 :] + 9], 1
                )
            ),
            conv(),
        ),
    ),
    # This shows at the output alone.
    "number of channels": (
        "0.0",
        Net(lambda x, net: net(x) * len(net[1].bias), classifier(conv())),
    ),
    "dataclass": ("0", nn.Sequential(conv(3), end(), Net(lambda x: Output(x * x.mean())))),
    # Time comes first, and ReLU is silent: channels that are constant are not chosen.
    "frames": (
        "0.0 0.2",
        Net(on_frames, classifier(nn.ReLU6(), conv())),
        torch.rand(2, 4, 3, 8, 8),
    ),
    "one logit": ("0", nn.Sequential(conv(3), end(1)), IMAGES[:1]),
    "in place": (
        "1 2",
        Net(
            lambda words, x, e, a, b, end: end(
                b(a(x.mul_(2))).relu_() * e(words.remainder_(5)).mean()
            ),
            nn.Embedding(9, 16),
            *classifier(conv()),
        ),
        torch.arange(2),
        IMAGES,
    ),
    "float32": ("0 1.0 2", block(lambda x, b: b(x.float()), conv())),
}


@parametrize("name", NETS)
def test_small_networks_compute_what_they_did_without_the_lost_channels(name):
    names, net, *inputs = NETS[name]
    inputs = tuple(inputs) or (IMAGES,)
    before = copy.deepcopy(inputs)
    pruner = "FPGMPruner" if name in "depthwise excite cat" else L1
    dtype = torch.float32 if name == "float32" else torch.float64
    compact, narrower = pruned_and_checked(net, inputs, pruner, dtype)
    assert narrower == names
    # What was tied is still tied.
    assert len([*compact.parameters()]) == len([*net.parameters()])
    assert all(map(torch.equal, inputs, before))


@parametrize("dtype", [torch.float64, torch.float16])
def test_precision_zeros_and_frozen_parameters_stay_and_so_does_the_original(dtype):
    net = classifier(nn.BatchNorm2d(16)).to(dtype)
    weight = net[0].weight.requires_grad_(False)
    nn.init.zeros_(net[2][0].weight)
    before = copy.deepcopy(net.state_dict())
    compact = script.prune(net, L1, np.float32(0.5), IMAGES)
    assert torch.isin(compact[0].weight.double(), weight.double()).all()  # not rounded
    assert {p.dtype for p in compact.parameters()} == {dtype}
    assert not compact[0].weight.requires_grad
    assert compact[2][0].weight.eq(0).sum() == 5 * 8
    assert all(p.grad is None for p in compact.parameters())
    assert net.training
    assert all(map(torch.equal, net.state_dict().values(), before.values()))


def settings():
    """What a caller may have set, and finds again."""
    values = [torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()]
    values += [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), warnings.filters[:]]
    return [*values, logging.getLogger("nni").level, torch.get_rng_state().tolist()]


@parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_the_caller_has_set_does_not_matter_and_stays(context):
    copies = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        logging.getLogger("nni").setLevel(seed)
        with context(), torch.autocast("cpu"):
            before = settings()
            compact = script.prune(NETS["cat"][1], L1, 0.5, IMAGES)
            assert settings() == before
        copies.append(compact.parameters())
    assert all(map(torch.equal, *copies))
    compact(IMAGES).sum().backward()
    assert all(p.grad.any() for p in compact.parameters())


def test_what_forward_stores_stays_out_of_the_copy():
    net = WithOption(*classifier(nn.Dropout(), conv()))  # in training mode
    seen = net(IMAGES)  # deepcopy refuses it
    compact = script.prune(net, L1, 0.5, IMAGES)
    assert net.seen is seen
    assert compact.seen.equal(seen)


def test_added_layers_lose_the_channels_whose_mean_score_is_lowest():
    net = with_distinct_values(NETS["residual"][1], torch.float64)
    compact = script.prune(net, L1, 0.25, IMAGES)
    first, second = net[0], net[1][0]
    norms = sum(layer.weight.abs().sum((1, 2, 3)) for layer in (first, second))
    kept = norms.argsort()[4:].sort().values
    assert compact[0].bias.equal(first.bias[kept])
    assert compact[1][0].weight.equal(second.weight[kept][:, kept])


@parametrize("number", [math.inf, 1e300, math.nan, 0])
def test_no_single_number_hides_a_difference(number, monkeypatch):
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    wanted = torch.linspace(0, 1, 100, dtype=torch.float64)
    wanted[50] = number
    script.assert_alike(wanted + 1e-12, wanted)  # rounding, where numbers cancel out
    with pytest.raises(AssertionError):
        script.assert_alike(wanted + 1e-6, wanted)


@parametrize(("keep", "names"), [("1", "0 3 12"), (["0", "2"], "1.0 3 12")])
def test_keep_names_layers_and_blocks(keep, names, caplog):
    depthwise = conv(groups=16)
    net = classifier(nn.Sequential(conv(), conv()), depthwise, conv(), *[nn.ReLU()] * 8, conv())
    assert pruned_and_checked(net, (IMAGES,), keep=keep)[1] == names
    # Not of what is in keep, but of what leads into a depthwise layer in it.
    assert all("stay in 1.1: " in message for message in caplog.messages)


@parametrize(
    ("name", "words"),
    [
        ("chain", ""),
        ("two names", ""),
        ("mean", "stay in 0: the inputs of a layer depend on many of them"),
        ("frozen", "stay in 0: they meet what has a fixed size"),
        ("tied", "stay in 2, 3: their parameters are shared"),
        ("question", "stay in 1.0: with NaN in them, the network fails: RuntimeError: it asks"),
        ("sign", "stay in 0: without some, 2 gets wrong inputs"),
        ("two ways", "stay in 1.1: they never ran"),
    ],
)
def test_what_keeps_its_channels_is_logged(caplog, name, words):
    script.prune(NETS[name][1], L1, 0.5, IMAGES)
    assert words in caplog.text
    assert bool(caplog.messages) == bool(words)


class Single(nn.Conv2d):
    def __deepcopy__(self, memo):
        raise TypeError("one of its kind")


@parametrize(
    ("word", "argument", "value"),
    [
        ("pruner", "pruner", "L3NormPruner"),
        ("sparsity", "sparsity", 1.0),
        ("sparsity", "sparsity", 0.0001),
        ("block", "keep", "block"),
        ("backbone", "example_input", {"x": IMAGES}),
        ("backbone", "example_input", [IMAGES]),
        ("fit", "example_input", IMAGES[:, :2]),
        ("once", "model", classifier(nn.LazyConv2d(16, 3))),
        ("copied.*one of its kind", "model", classifier(Single(16, 16, 1))),
        ("nothing", "model", nn.Conv2d(3, 5, 1)),
    ],
)
def test_what_cannot_be_pruned_is_one_line(word, argument, value):
    arguments = {"model": TIED, "pruner": L1, "sparsity": 0.5, "example_input": IMAGES}
    with pytest.raises(script.ExperimentError, match=word) as caught:
        script.prune(**{**arguments, argument: value})
    assert "\n" not in str(caught.value)


# Parameters left at 0.5.
SLOW = {
    "resnet18": 3_055_880,
    "mobilenet_v2": 1_221_768,
    "efficientnet_b0": 1_701_446,
    "convnext_tiny": 15_636_616,
    "shufflenet_v2_x1_0": 1_177_502,
}
FAMILIES = [pytest.param(*family, marks=pytest.mark.slow) for family in SLOW.items()]


@parametrize(("name", "left"), [("mobilenet_v3_small", 911_224), *FAMILIES])
def test_networks_of_torchvision_compute_what_they_did_without_the_lost_channels(name, left):
    model = getattr(torchvision.models, name)()
    compact, _ = pruned_and_checked(model, (torch.rand(2, 3, 64, 64),))
    assert script.count_parameters(compact) == left


# ---------------------------------------------------------------------------- Python 3.14


def test_import_nni_repairs_what_python_3_14_removed(monkeypatch):
    # Python 3.12 and 3.13 make ast.Str when it is asked for.
    for name in ("Str", "__getattr__"):
        monkeypatch.delattr(ast, name, raising=False)
    for name in [name for name in sys.modules if name.startswith("typeguard")]:
        monkeypatch.delitem(sys.modules, name)
    # For sweeps on Python 3.14, the README upgrades the typeguard that NNI pins.
    if Version(version("typeguard")) < Version("4.1.3"):
        with pytest.raises(ImportError, match="cannot import name 'Str' from 'ast'"):
            import typeguard
    script.import_nni()
    import typeguard  # noqa: F401


def test_pytest_starts_without_the_plugin_of_typeguard(tmp_path):
    arguments = ["-c", str(ROOT / ".pytest.ini"), "--version"]
    code = "import ast\nfor name in ('Str', '__getattr__'): vars(ast).pop(name, None)\n"
    code += f"import pytest\nraise SystemExit(pytest.main({arguments}))"
    assert run_python(tmp_path, "-c", code).returncode == 0
