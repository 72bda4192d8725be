"""Pruning against independent computations: norms, zeroed channels and arithmetic."""

import copy
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from packaging.version import Version
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import NNI_Pruning as script
from conftest import ROOT, SCRIPT, logits_of, run_python

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
    compact = {}
    zeroed = {}
    for name, value in weights.items():
        if value.dim() == 0:  # BatchNorm's count of batches
            compact[name] = value
            zeroed[name] = value
            continue
        # Of BatchNorm, too: a masked channel would still emit its bias (NNI issue 2130).
        layer = name.split(".")[0].replace("norm", "conv")
        outputs = kept.get(layer, slice(None))
        zeroed[name] = torch.zeros_like(value)
        zeroed[name][outputs] = value[outputs]
        compact[name] = value[outputs]
        if name in inputs:
            compact[name] = compact[name][:, inputs[name]]
    return compact, zeroed


@pytest.mark.parametrize(("pruner", "sparsity", "widths"), CASES)
def test_prune_keeps_the_filters_of_highest_score(pruner, sparsity, widths):
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
    # It computes what the original computes with zeros for the other filters.
    images = torch.randint(256, (64, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        logits = compact(script.normalize(images))
        wanted = logits_of(zeroed, images)
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
    conv1 = 5 * 5 * c1
    conv2 = 3 * 3 * c1 * c2
    conv3 = 3 * 3 * c2 * c3
    linear = c3 * 2 * 2 * h + h * 10
    norms_and_biases = c1 + 2 * (c2 + c3) + h + 10
    parameters = conv1 + conv2 + conv3 + linear + norms_and_biases
    assert script.count_parameters(model) == parameters
    macs = conv1 * 12 * 12 + conv2 * 10 * 10 + conv3 * 5 * 5 + linear
    model.train()
    assert script.count_macs(model) == macs
    assert model.norm2.running_mean.eq(0).all()  # counting taught the statistics nothing
    script.import_nni()
    from nni.compression.utils.counter import count_flops_params

    # NNI's "flops" are multiply-accumulates, and it leaves out normalization's parameters.
    by_nni = count_flops_params(model, torch.zeros(1, 1, 28, 28), verbose=False)[:2]
    assert by_nni == (macs, parameters - 2 * (c2 + c3))


# ----------------------------------------------------------------- other people's networks


def with_distinct_values(model: nn.Module) -> nn.Module:
    """The network in float64, each of its tensors filled with values that are all different."""
    model = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            size = tensor.numel()
            values = torch.randperm(size, generator=generator).double() / size
            if tensor.dim() > 1:
                # Uniform and of variance 2 / fan-in, as He et al. (2015) draw weights. The mean is
                # not 0.5, because then a value could be zero.
                fan_in = size / len(tensor)
                values = (values - 0.497) * (12 * 2 / fan_in) ** 0.5
            else:
                values = values + 0.5  # variances are positive
            tensor.copy_(values.view_as(tensor))
    return model


def found_by_value(small: Tensor, large: Tensor) -> tuple[Tensor, ...]:
    """Where in one tensor the values of another are: coordinates, one tensor for each axis."""
    values, order = large.flatten().sort()
    ranks = torch.searchsorted(values, small.flatten()).clamp(max=len(values) - 1)
    assert values[ranks].equal(small.flatten()), "the pruned network has a value of its own"
    return torch.unravel_index(order[ranks], large.shape)


def channels_kept(small: nn.Module, large: nn.Module) -> tuple[Tensor, Tensor]:
    """Which input and output channels of a layer its pruned copy has, found by value."""
    name = "weight" if large._parameters.get("weight") is not None else "running_mean"
    coordinates = found_by_value(getattr(small, name), getattr(large, name))
    first_axis = coordinates[0]
    if len(coordinates) == 1:  # each channel by itself, as in BatchNorm
        return first_axis, first_axis
    # With groups, the second axis of the weight counts the channels of one group.
    length_per_group = len(large.weight) // getattr(large, "groups", 1)
    group = first_axis // length_per_group
    second_axis = coordinates[1] + group * large.weight.shape[1]
    if isinstance(large, nn.ConvTranspose2d):
        return first_axis, second_axis
    return second_axis, first_axis


def zero_all_but(channels: Tensor, axis: int, value: Tensor) -> Tensor:
    zeroed = torch.zeros_like(value)
    index = channels.unique()
    return zeroed.index_copy(axis, index, value.index_select(axis, index))


def zero_what_was_lost(model: nn.Module, compact: nn.Module) -> None:
    """Set to zero, at each call of a layer, the channels that its pruned copy lacks."""
    for name, large in model.named_modules():
        small = compact.get_submodule(name)
        tensors = {**large._parameters, **large._buffers}  # not those of layers inside it
        present = {key: value for key, value in tensors.items() if value is not None}
        if all(getattr(small, key).equal(value) for key, value in present.items()):
            continue
        axis = -1 if isinstance(large, nn.Linear) else 1
        inputs, outputs = channels_kept(small, large)
        before = partial(zero_all_but, inputs, axis)
        after = partial(zero_all_but, outputs, axis)
        # The default values of the arguments bind this layer's functions, not the last layer's.
        large.register_forward_pre_hook(lambda _, args, zero=before: (zero(args[0]),))
        large.register_forward_hook(lambda _, args, output, zero=after: zero(output))


def pruned_and_checked(model, inputs, keep, pruner="L1NormPruner", sparsity=0.5) -> nn.Module:
    """Prune, and compare with the network whose lost channels are zero, in float64.

    Uses neither NNI's masks nor what `prune` says: it finds by value which channels are left.
    """
    model = with_distinct_values(model)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    compact = script.prune(model, pruner, sparsity, inputs, keep)
    zero_what_was_lost(model, compact)
    with torch.inference_mode():
        values = tree_leaves(compact(*inputs))
        references = tree_leaves(model(*inputs))
    for value, reference in zip(values, references, strict=True):
        assert value.shape == reference.shape
        scale = reference.abs().max()
        assert scale > 0
        assert (value - reference).abs().max() <= 1e-6 * scale
    return compact


class Net(nn.Module):
    """A small network: some layers, and what `forward` does with them."""

    def __init__(self, forward, **layers) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.steps = forward

    def forward(self, x):
        return self.steps(self, x)

    def masked(self, maps, value, count):
        """The five logits, with a value in place of the first ones."""
        logits = self.fc(maps.mean((2, 3)))
        return torch.cat([torch.full_like(logits[:, :count], value), logits[:, count:]], 1)


class NetOfTwoInputs(Net):
    def forward(self, x, y):
        return self.steps(self, x, y)


def mean(maps: Tensor) -> Tensor:
    return maps.mean((2, 3))


def residual(net, x):
    x = net.relu(net.a(x))
    x = net.relu(net.norm(net.b(x)) + x)
    return net.fc(mean(net.relu(net.c(x) + x)))


def concatenated(net, x):
    x = net.a(x)
    return net.fc(mean(net.d(torch.cat([net.b(x), net.c(x), x], 1))))


def squeezed_and_excited(net, x):
    x = net.a(x)
    scale = net.expand(F.relu(net.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
    return net.fc(mean(net.b(x * scale)))


def excited_by_linear_layers(net, x):
    x = net.a(x)
    scale = net.expand(F.relu(net.squeeze(mean(x)))).sigmoid()
    return net.fc(mean(net.b(x * scale[:, :, None, None])))


def recurrent(net, x):
    x = net.c(net.b(net.a(x)))
    state = F.relu(x)
    for _ in range(3):
        state = F.relu(net.d(state) + x)
    return net.fc(mean(state))


def norm_of_two(net, x):
    return net.fc(mean(net.c(net.norm(net.b(net.a(x))) + net.norm(net.d(x)))))


def dictionary(net, x):
    x = net.b(net.a(x))
    return {"logits": net.fc(mean(x)), "maps": [net.c(x)]}


def tokens(net, x):
    x = net.c(net.a(x)).flatten(2).transpose(1, 2)
    x = x + net.down(F.gelu(net.up(net.norm(x))))
    return net.fc(net.norm2(x).mean(1))


def in_chain(*names):
    def forward(net, x):
        for name in names:
            x = F.relu(getattr(net, name)(x))
        return net.fc(mean(x))

    return forward


def tied_net() -> Net:
    net = Net(in_chain("a", "d", "b", "c"), d=nn.Conv2d(16, 16, 1))
    net.c.weight = net.b.weight
    return net


def conv(inputs=16, outputs=16, size=3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **options)


class DependsOnData(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


class Case(NamedTuple):
    """How to make a network, what to keep, and which layers then lose output channels."""

    make: Callable[[], nn.Module]
    keep: str | list[str]
    narrower: str  # their names, with spaces between them


# These lose fewer than half of the channels: each group must lose as many as the others, or a
# linear layer scales a convolution's output.
LESS_THAN_HALF = ("grouped", "squeeze and excite, linear")
IMAGES = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
NETS = {
    "chain": Case(lambda: Net(in_chain("a", "b")), "fc", "a b"),
    "batch norm": Case(lambda: Net(in_chain("a", "n", "b"), n=nn.BatchNorm2d(16)), "fc", "a b"),
    "residual": Case(lambda: Net(residual, relu=nn.ReLU(), norm=nn.BatchNorm2d(16)), "fc", "a b c"),
    "cat": Case(lambda: Net(concatenated, d=conv(48)), "fc", "a b c d"),
    "depthwise": Case(lambda: Net(in_chain("a", "d", "b"), d=conv(groups=16)), "fc", "a b d"),
    "grouped": Case(lambda: Net(in_chain("a", "d", "b"), d=conv(groups=4)), "fc", "a b d"),
    "transposed": Case(
        lambda: Net(in_chain("a", "d", "b"), d=nn.ConvTranspose2d(16, 16, 3)),
        "fc",
        "a b",
    ),
    "squeeze and excite": Case(
        lambda: Net(squeezed_and_excited, squeeze=conv(16, 4, 1), expand=conv(4, 16, 1)),
        "fc",
        "a b squeeze expand",
    ),
    "squeeze and excite, linear": Case(
        lambda: Net(excited_by_linear_layers, squeeze=nn.Linear(16, 4), expand=nn.Linear(4, 16)),
        "fc",
        "a b squeeze expand",
    ),
    "flatten 4 x 4": Case(
        lambda: Net(
            lambda net, x: net.fc(net.b(net.a(x)).flatten(1)),
            b=conv(stride=3, padding=1),
            fc=nn.Linear(256, 5),
        ),
        "fc",
        "a b",
    ),
    "PReLU": Case(
        lambda: Net(in_chain("a", "p", "b", "q", "q"), p=nn.PReLU(16), q=nn.PReLU()),
        "fc",
        "a b",
    ),
    "dict": Case(lambda: Net(dictionary), ["fc", "c"], "a b"),
    "one logit": Case(lambda: Net(in_chain("a", "b"), fc=nn.Linear(16, 1)), "fc", "a b"),
    "called twice, kept": Case(lambda: Net(in_chain("a", "b", "b", "c")), ["fc", "b"], "c"),
    "recurrent, kept": Case(lambda: Net(recurrent, d=conv(padding=1)), ["fc", "d"], "a b"),
    "norm of two, kept": Case(
        lambda: Net(norm_of_two, norm=nn.BatchNorm2d(16), d=conv(3, padding=1)),
        ["fc", "norm"],
        "a c",
    ),
    "tied, kept": Case(tied_net, ["fc", "b", "c"], "a"),
    "group norm": Case(lambda: Net(in_chain("a", "n", "b"), n=nn.GroupNorm(4, 16)), "fc", "b"),
    "transformer": Case(
        lambda: Net(
            tokens,
            norm=nn.LayerNorm(16),
            up=nn.Linear(16, 32),
            down=nn.Linear(32, 16),
            norm2=nn.LayerNorm(16),
        ),
        "fc",
        "a up",
    ),
    "not traceable, kept": Case(
        lambda: Net(in_chain("a", "d", "b"), d=DependsOnData()), ["fc", "d"], "b"
    ),
    "3-D convolution": Case(
        lambda: Net(
            lambda net, x: net.fc(net.d(net.b(net.a(x))[:, :, None]).mean((2, 3, 4))),
            d=nn.Conv3d(16, 16, 1),
        ),
        "fc",
        "a",
    ),
}


def output_channels(net: nn.Module) -> dict[str, int]:
    layers = net.named_modules()
    return {name: len(m.weight) for name, m in layers if isinstance(m, nn.Conv2d | nn.Linear)}


@pytest.mark.parametrize("pruner", script.PRUNERS)
@pytest.mark.parametrize("name", NETS)
def test_small_networks_compute_what_they_did_without_the_lost_channels(name, pruner):
    torch.manual_seed(0)
    case = NETS[name]
    net = case.make()
    before = output_channels(net)
    after = output_channels(pruned_and_checked(net, (IMAGES,), case.keep, pruner))
    narrower = set(case.narrower.split())
    assert {layer for layer in before if after[layer] < before[layer]} == narrower
    if name not in LESS_THAN_HALF:
        assert all(2 * after[layer] == before[layer] for layer in narrower)


@pytest.mark.parametrize("batch", [1, 10, 32])
def test_any_batch_and_two_inputs(batch):
    torch.manual_seed(0)
    net = NetOfTwoInputs(lambda net, x, y: net.fc(mean(net.b(F.relu(net.a(x) + net.d(y))))))
    net.d = conv(1, padding=1)
    inputs = (torch.rand(batch, 3, 12, 12), torch.rand(batch, 1, 12, 12))
    compact = pruned_and_checked(net, inputs, "fc")
    assert [len(compact.get_submodule(name).weight) for name in "abd"] == [8, 8, 8]


def test_inputs_of_whole_numbers():
    torch.manual_seed(0)
    net = NetOfTwoInputs(lambda net, x, y: net.fc(net.e(x) + mean(net.b(net.a(y / 255.0)))))
    net.e = nn.Embedding(9, 16)
    words = torch.arange(8)
    pixels = torch.randint(256, (8, 3, 12, 12))
    compact = script.prune(net, "L1NormPruner", 0.5, (words, pixels), "fc")
    assert compact(words, pixels).shape == (8, 5)
    assert len(compact.a.weight) == 8
    # With one word alone, NNI takes the embedding's output for constant.
    with pytest.raises(script.ExperimentError, match=r"`add` in forward .*: b, e$"):
        script.prune(net, "L1NormPruner", 0.5, (words[:1], pixels[:1]), "fc")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_precision_stays(dtype):
    torch.manual_seed(0)
    net = Net(in_chain("a", "n", "b"), n=nn.BatchNorm2d(16)).to(dtype)
    compact = script.prune(net, "L1NormPruner", 0.5, IMAGES, "fc")
    assert {value.dtype for value in compact.parameters()} == {dtype}
    assert compact.n.running_mean.dtype == dtype
    kept = net.a.weight.double().abs().sum((1, 2, 3)).argsort()[8:].sort().values
    assert compact.a.weight.equal(net.a.weight[kept])


def test_tied_layers_stay_tied():
    compact = script.prune(tied_net(), "L1NormPruner", 0.5, IMAGES, ["fc", "b", "c"])
    assert compact.b.weight is compact.c.weight
    assert compact.b.weight.grad is None  # NNI leaves one


def test_the_description_of_a_loaded_model_is_not_that_of_the_copy():
    model = script.CNN()
    model.about = {"accuracy": 99.5}
    images = torch.rand(8, 1, 28, 28)
    assert not hasattr(script.prune(model, "L1NormPruner", 0.5, images, "output"), "about")
    assert model.about == {"accuracy": 99.5}
    net = Net(in_chain("a", "b"))
    net.about = "an attribute of one's own"
    assert script.prune(net, "L1NormPruner", 0.5, IMAGES, "fc").about == net.about


def test_an_output_with_infinite_numbers():
    torch.manual_seed(0)
    net = Net(lambda net, x: net.masked(net.b(net.a(x)), -torch.inf, 4))
    compact = script.prune(net, "L1NormPruner", 0.5, IMAGES, "fc")
    assert [len(layer.weight) for layer in (compact.a, compact.b)] == [8, 8]


def test_a_network_that_changes_its_input_in_place():
    torch.manual_seed(0)
    net = Net(lambda net, x: net.fc(mean(net.b(net.a(x.mul_(2).sub_(1))))))
    images = IMAGES.clone()
    compact = script.prune(net, "L1NormPruner", 0.5, images, "fc")
    assert len(compact.a.weight) == 8
    assert images.equal(IMAGES)
    # Each run of the network has its own copy: a second change would give the number -1.
    net = NetOfTwoInputs(lambda net, x, y: net.fc(net.e(x.sub_(1)) + mean(net.b(net.a(y)))))
    net.e = nn.Embedding(9, 16)
    words = torch.arange(1, 9)
    compact = script.prune(net, "L1NormPruner", 0.5, (words, images), "fc")
    assert len(compact.a.weight) == 8
    assert words.equal(torch.arange(1, 9))


def with_zeros() -> Net:
    net = Net(in_chain("a", "b"))
    nn.init.zeros_(net.fc.weight)
    return net


def halves(net, x):
    left, right = net.a(x).chunk(2, 1)
    return net.fc(mean(net.d(left) * net.d2(right)))


def with_scale(net, x):
    return net.fc(mean(net.b(net.a(x)) * net.scale))


# Each network, and what the message about it must match.
REFUSED = {
    "complex": (
        lambda: Net(with_scale, scale=nn.Parameter(torch.rand(16, 1, 1, dtype=torch.complex64))),
        "scale is complex",
    ),
    "hidden by a mask": (
        lambda: Net(
            lambda net, x: net.masked(net.b(net.a(x)) * net.d(x).mean(1, True), -1e9, 2),
            d=conv(3, padding=1),
        ),
        "`mean` in forward computes other values; .*in keep: d$",
    ),
    "hidden by infinity": (
        lambda: Net(
            lambda net, x: net.masked(net.b(net.a(x)) * net.d(x).mean(1, True), -torch.inf, 4),
            d=conv(3, padding=1),
        ),
        "`mean` in forward computes other values; .*in keep: d$",
    ),
    "twice": (lambda: Net(in_chain("a", "b", "b")), r"layer b is called twice: .*name it in keep"),
    "three times": (lambda: Net(in_chain("a", "b", "b", "b")), r"layer b is called 3 times"),
    "BatchNorm twice": (
        lambda: Net(norm_of_two, norm=nn.BatchNorm2d(16), d=conv(3, padding=1)),
        r"layer norm is called twice: .*name it in keep",
    ),
    "tied": (tied_net, r"layers b and c share a parameter: .*name them in keep"),
    "not the output": (lambda: Net(lambda net, x: net.b(net.a(x))), "layer b computes the output"),
    "softmax over channels": (
        lambda: Net(lambda net, x: net.fc(mean(net.b(net.a(x).softmax(1))))),
        "`softmax` in forward .*in keep: a$",
    ),
    "mean over channels": (
        lambda: Net(
            lambda net, x: net.fc(mean(net.b(net.a(x)) * net.d(x).mean(1, True))),
            d=conv(3, padding=1),
        ),
        "`mean` in forward computes other values; .*in keep: d$",
    ),
    "view": (
        lambda: Net(lambda net, x: net.fc(net.a(x).view(-1, 2304)), fc=nn.Linear(2304, 5)),
        "`view` in forward .*in keep: a$",
    ),
    "view by size": (
        lambda: Net(lambda net, x: net.fc(net.a(x).view(x.size(0), 2304)), fc=nn.Linear(2304, 5)),
        "`view` in forward .*in keep: a$",
    ),
    "chunk": (lambda: Net(halves, d=conv(8), d2=conv(8)), "`getitem` in forward .*in keep: a$"),
    "channel shuffle": (
        lambda: Net(in_chain("a", "s", "b"), s=nn.ChannelShuffle(2)),
        "layer s computes other values; .*in keep: a$",
    ),
    "pixel shuffle": (
        lambda: Net(in_chain("a", "s", "b"), s=nn.PixelShuffle(2), b=conv(4)),
        "layer s .*in keep: a$",
    ),
    "parameter": (
        lambda: Net(with_scale, scale=nn.Parameter(torch.rand(16, 1, 1))),
        "`mul` in forward .*in keep: b$",
    ),
    "weight read": (
        lambda: Net(lambda net, x: net.fc(mean(F.conv2d(net.a(x), net.b.weight)))),
        "`conv2d` in forward .*in keep: a$",
    ),
    "LSTM": (
        lambda: Net(
            lambda net, x: net.fc(net.d(net.b(net.a(x)).flatten(2).mT)[0].mean(1)),
            d=nn.LSTM(16, 16),
        ),
        "NNI cannot prune layer d",
    ),
    "data": (
        lambda: Net(in_chain("a", "d"), d=DependsOnData()),
        "cannot trace layer d .*name blocks in keep",
    ),
    "wrong shape": (lambda: Net(in_chain("fc")), "does not fit layer fc"),
    "zeros": (with_zeros, "fc.weight is all zero"),
    "meta": (lambda: Net(in_chain("a")).to("meta"), "cannot be copied: .* meta tensor"),
    "nothing left": (
        lambda: Net(in_chain("a", "n"), n=nn.GroupNorm(4, 16)),
        "every layer is in keep",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_would_come_out_wrong_is_refused_with_its_layer(name):
    torch.manual_seed(0)
    make, message = REFUSED[name]
    with pytest.raises(script.ExperimentError, match=message) as caught:
        script.prune(make(), "L1NormPruner", 0.5, IMAGES, [] if name == "not the output" else "fc")
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------- networks of torchvision

# Of ConvNeXt, only the first layers of the MLPs: all others feed a normalization over channels.
CONVNEXT_KEEPS = [
    name
    for name, layer in torchvision.models.convnext_tiny().named_modules()
    if isinstance(layer, (nn.Conv2d, nn.Linear)) and not name.endswith("block.3")
]
SHUFFLENET_KEEPS = [
    name
    for name, _ in torchvision.models.shufflenet_v2_x1_0().named_modules()
    if name.endswith(("branch1", "branch2.5"))
]
# Each network, what is kept, and the parameters left at 0.5. They hold for seed 0: for some
# networks, it depends on NNI's random numbers what more can go.
FAMILIES = {
    "mobilenet_v3_small": ("classifier.3", 911_224),
    "resnet18": ("fc", 3_055_880),
    "mobilenet_v2": ("classifier", 1_221_768),
    "efficientnet_b0": ("classifier", 1_701_446),
    "convnext_tiny": (CONVNEXT_KEEPS, 15_636_616),
    "shufflenet_v2_x1_0": (["fc", "conv1", *SHUFFLENET_KEEPS], 1_179_026),
}
QUICK_FAMILY = "mobilenet_v3_small"
SLOW_FAMILIES = [name for name in FAMILIES if name != QUICK_FAMILY]


@pytest.mark.parametrize(
    "name", [QUICK_FAMILY, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FAMILIES)]
)
def test_networks_of_torchvision_compute_what_they_did_without_the_lost_channels(name):
    torch.manual_seed(0)
    keep, left = FAMILIES[name]
    model = getattr(torchvision.models, name)()
    compact = pruned_and_checked(model, (torch.rand(8, 3, 64, 64),), keep)
    assert type(compact) is type(model)
    assert script.count_parameters(compact) == left


@pytest.mark.parametrize(
    ("network", "keep", "pruner"),
    [
        ("mobilenet_v3_small", "classifier.3", "FPGMPruner"),
        ("squeezenet1_1", "classifier", "L1NormPruner"),
    ],
)
def test_a_pruned_network_trains_and_the_original_stays(network, keep, pruner):
    torch.manual_seed(0)
    model = getattr(torchvision.models, network)()
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    images, labels = torch.rand(8, 3, 64, 64), torch.arange(8)
    compact = script.prune(model, pruner, 0.5, images, keep=keep)
    assert model.training
    assert not compact.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in compact.parameters()].count(False) == 1  # still frozen
    assert all(parameter.grad is None for parameter in compact.parameters())
    untrained = copy.deepcopy(compact.state_dict())
    logits = compact.train()(images)
    assert logits.shape == (8, 1000)
    F.cross_entropy(logits, labels).backward()
    torch.optim.SGD(compact.parameters(), lr=1.0).step()
    assert any(not value.equal(untrained[name]) for name, value in compact.named_parameters())


@pytest.mark.parametrize(
    ("keep", "sparsity", "reason"),
    [
        ("head", 0.5, "keep names head, .*the output layer is fc"),
        ([], 0.5, "layer fc computes the output"),
        ("fc", 0.0001, "no channel was removed"),
        ("fc", 1.0, "between 0 and 1"),
        ("fc", 0, "between 0 and 1"),
        (["a", "b", "fc"], 0.5, "every layer is in keep"),
    ],
)
def test_wrong_arguments_are_a_clear_error(keep, sparsity, reason):
    with pytest.raises(script.ExperimentError, match=reason):
        script.prune(Net(in_chain("a", "b")), "L1NormPruner", sparsity, IMAGES, keep)


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


def test_nni_fails_without_ast_str_and_import_nni_repairs_it(tmp_path):
    # For sweeps on Python 3.14, the README upgrades typeguard. Then NNI does not fail.
    if Version(version("typeguard")) < Version("4.1.3"):
        process = run_python(tmp_path, "-c", f"{AS_ON_3_14}import nni")
        assert "cannot import name 'Str'" in process.stderr
    mended = f"{AS_ON_3_14}sys.path.insert(0, {str(ROOT)!r})\nimport NNI_Pruning as script\n"
    mended += "script.import_nni()\nprint(ast.Str is ast.Constant)"
    assert run_python(tmp_path, "-c", mended).stdout == "True\n"


def test_pytest_starts_without_the_plugin_of_typeguard(tmp_path):
    arguments = ["-c", str(ROOT / ".pytest.ini"), "--version"]
    code = f"{AS_ON_3_14}import pytest\nsys.exit(pytest.main({arguments}))"
    process = run_python(tmp_path, "-c", code)
    assert process.returncode == 0, process.stderr


def test_a_missing_nni_is_said_before_anything_is_trained(tmp_path):
    options = ["--dataset", "digits"]
    code = f"import runpy, sys\nsys.modules['nni'] = None\nsys.argv[1:] = {options}\n"
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    process = run_python(tmp_path, "-c", code)
    assert process.returncode == 1
    assert process.stderr.startswith("NNI_Pruning.py: error: NNI is missing")
    assert "--platform macosx_10_9_x86_64 --target " in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.iterdir())
