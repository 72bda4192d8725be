"""Intervals, conclusions, table, picture and result files, against cases worked out by hand."""

from io import StringIO
from itertools import product

import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

import NNI_Pruning as script
from conftest import QUICK, REFERENCE, files_of, read_idx

SETTINGS = {"dataset": "mnist", "train_images": 60_000, "test_images": 10_000, "lr": 0.01}
SETTINGS |= {"baseline_epochs": 3, "finetune_epochs": 4, "batch_size": 256}
OTHERS = {"hardware": "cpu", "versions": "torch 2", "macs": 3_826_656, "given": False}

# The names of the models are kind, pruner and sparsity here.
BASELINE = "baseline - -"
LONGER = "trained_on - -"
L1 = "pruned L1NormPruner 0.5"
L1_SMALL = "pruned L1NormPruner 0.75"
FPGM = "pruned FPGMPruner 0.5"
SCRATCH = "scratch - 0.5"
SCRATCH_SMALL = "scratch - 0.75"


def frame_of(accuracies):
    """Rows with made-up accuracies: for each name a list, by seed. There is no row for None."""
    frame = pd.DataFrame(accuracies).melt(ignore_index=False).reset_index().dropna()
    frame.columns = ["seed", "name", "accuracy"]
    frame[["kind", "pruner", "sparsity"]] = frame["name"].str.split(expand=True)
    frame["sparsity"] = pd.to_numeric(frame["sparsity"], errors="coerce")  # NaN for -
    times = 10 - 9 * frame["sparsity"].notna()
    return frame.assign(
        parameters=7742 * times,
        accuracy_before=100 * frame["sparsity"],
        training_seconds=2.0 * times + frame["seed"],
        inference_us=4.0 * times + frame["seed"],
        **SETTINGS,
        **OTHERS,
    )


def words_of(text):
    """The text with single spaces. So an empty cell of a table is nothing."""
    return " ".join(text.split())


def test_intervals_of_hand_made_cases_and_of_scipy():
    # Differences 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.303; 4.303/sqrt(3) = 2.48.
    frame = frame_of({BASELINE: [50, 50, 50], L1: [51, 52, 53]})
    assert f"{L1} {BASELINE} +2.00 -0.48 +4.48 cannot tell" in words_of(script.report(frame))
    # Equal differences have no interval.
    frame = frame_of({BASELINE: [99.5, 99.4], L1: [99.9, 99.8]})
    assert f"{L1} {BASELINE} +0.40 cannot tell" in words_of(script.report(frame))
    # The seeds differ by far more than the models do: only pairing shows the gain. One seed has no
    # pruned model, and they come in another order.
    baseline = [90.0, 95.0, 99.0, 97.1]
    pruned = [90.11, 95.1, 99.09, 97.2]
    frame = frame_of({BASELINE: [*baseline, 50.0], L1: [*pruned, None]})
    (line,) = script.comparisons(frame.sort_values("accuracy"))
    interval = stats.ttest_rel(pruned, baseline).confidence_interval()
    assert (line["low"], line["high"]) == pytest.approx(interval, abs=1e-5)


@pytest.mark.parametrize(
    "low, high, words",
    [
        (0.01, 0.02, "better"),
        (0, 0.09, "equal within 0.1"),
        (-0.09, 0, "equal within 0.1"),
        (-0.09, 0.1, "at most 0.1 worse"),
        (-0.09, -0.01, "at most 0.1 worse"),
        (-0.1, -0.01, "worse"),
        (-0.1, 0, "cannot tell"),
    ],
)
def test_conclusions(low, high, words):
    assert script.conclusion(low, high) == words


def test_which_models_are_compared():
    pruned = [L1, FPGM, L1_SMALL]
    models = [BASELINE, LONGER, *pruned, SCRATCH, SCRATCH_SMALL]
    frame = frame_of({name: [99.0, 98.0] for name in models})
    expected = [*product(pruned, [BASELINE, LONGER]), (L1, FPGM)]
    expected += [(L1, SCRATCH), (FPGM, SCRATCH), (L1_SMALL, SCRATCH_SMALL)]
    lines = script.comparisons(frame)
    assert sorted((line["model"], line["compared with"]) for line in lines) == sorted(expected)
    # A given baseline is one for all seeds. Here the baseline of seed 0 was trained.
    frame["given"] = frame.eval("kind == 'baseline' and seed > 0")
    others = {line["compared with"] for line in script.comparisons(frame)}
    assert others == {LONGER, FPGM, SCRATCH, SCRATCH_SMALL}


def test_a_line_of_the_table():
    # Rows are paired by seed: the baseline's third one has no influence. The pruned models have 60
    # and 100 wrong images; their standard deviation is 28 (of the sample; 20 of all). The baseline
    # takes 40 and 41 µs: 9.0 = (40 + 41) / (4 + 5).
    text = script.report(frame_of({BASELINE: [99.5, 99.7, 98.0], L1: [99.4, 99.0, None]}))
    assert f"{L1} 50.00 99.20 80 ± 28 7,742 10.0x 3.83 2.5 4.5 9.0x" in words_of(text)
    assert max(map(len, text.splitlines())) <= 100
    heading = "MNIST (60,000 training and 10,000 test images); 3 + 4 epochs; seeds 0, 1, 2;\ncpu; t"
    assert text.startswith(heading)


@pytest.fixture
def figures(monkeypatch):
    """The figures that the script draws."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: figures.append(figure))
    return figures


def test_values_of_the_picture(figures, tmp_path):
    frame = frame_of({BASELINE: [99.5, 99.7], LONGER: [99, 99], L1: [97, 98], SCRATCH: [96, 96]})
    frame["given"] = frame["kind"] == "baseline"  # its training counts all the same
    script.draw(frame, tmp_path / "results.png")
    left, right = figures[0].axes
    assert [dot.get_xdata()[0] for dot in left.lines] == [99.6, 99, 97.5, 96]
    # Two bars for each model: the training of the baseline before it, and its own after that.
    widths = [bar.get_width() for bar in right.patches]
    assert widths == [0, 20.5, 20.5, 20.5, 20.5, 2.5, 0, 2.5]
    assert [bar.get_x() for bar in right.patches[1::2]] == [0, 20.5, 20.5, 0]


def test_exported_trials_have_no_baseline(call, figures, tmp_path):
    frame_of({L1: [99.4], FPGM: [99.2]}).to_csv(tmp_path / "sweep.csv")
    _, out, _ = call("--report", "sweep.csv")
    assert f"{FPGM} 50.00 99.20 80 7,742 3.83 2.0 4.0" in words_of(out)
    _, _, sentence, _ = out.split("\n\n")  # of one seed
    assert sentence.endswith("--seeds 0 1 2 3 4")
    _, right = figures[0].axes
    assert [bar.get_width() for bar in right.patches] == [0, 2, 0, 2]


def test_a_report_of_earlier_runs(call, tmp_path):
    _, out, _ = call(*QUICK, "--seeds", 0, 1)
    shown, _ = out.split("\n\nSaved: ")
    before = files_of(tmp_path)
    _, out, _ = call("--report", "checkpoints/results.csv")
    assert out.startswith(f"{shown}\n\nSaved: checkpoints")
    # Rows that are the same are there once.
    pd.read_csv("checkpoints/results.csv")[:2].to_csv("half.csv")
    _, out, _ = call("--report", "half.csv", "checkpoints/results.csv")
    assert out == f"{shown}\n\nSaved: report.png\n"
    assert before.items() <= files_of(tmp_path).items()  # no picture replaced


GOOD = frame_of({BASELINE: [99.5], L1: [99.0]})


def file_of(frame):
    return StringIO(frame.to_csv())


def refusal(*files):
    """The message with which `read_results` refuses the files."""
    with pytest.raises(script.ExperimentError) as caught:
        script.read_results(files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("setting", SETTINGS)
def test_unlike_runs_are_refused(setting):
    value = SETTINGS[setting]
    other = GOOD.assign(seed=1, **{setting: f"{value}1"})
    reason = f"the runs differ: {setting} is {value} and {value}1"
    assert reason in refusal(file_of(GOOD), file_of(other))


def test_what_is_no_result_is_refused():
    assert "two different results" in refusal(file_of(GOOD), file_of(GOOD.assign(accuracy=98.0)))
    assert "KeyError" in refusal(file_of(GOOD.drop(columns="pruner")))
    assert "TypeError" in refusal(file_of(GOOD.assign(accuracy="x")))
    assert "EmptyDataError" in refusal(StringIO())
    assert "missing.csv" in refusal("missing.csv")
    assert "results.png" in refusal(REFERENCE / "results.png")


def test_reference_models_have_the_accuracies_of_their_results(data_dir):
    *_, images, labels = read_idx(data_dir)
    if len(labels) != 10_000:
        pytest.skip("this is not the real MNIST")
    rows = script.read_results([REFERENCE / "bfloat16.csv"]).query("seed == 0").set_index("name")
    paths = [*REFERENCE.glob("*.pth")]
    assert len(paths) == 5
    for path in paths:
        accuracy, _ = script.evaluate(script.load_model(path), images, labels)
        # Another processor may round differently, and two of 10,000 images change their class.
        assert accuracy == pytest.approx(rows.accuracy[path.stem], abs=0.021)
