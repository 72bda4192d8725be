"""The README against the script and the reference run: code that runs, options, figures."""

import re
import shutil
from itertools import product

import pandas as pd
from test_pruning import SLOW

import NNI_Pruning as script
from conftest import REFERENCE, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_options_that_the_readme_names_exist(call):
    _, usage, _ = call("--help")
    known = re.findall(r"--[a-z-]+", usage)
    named = re.findall(r"`(--[a-z-]+)", README)
    for line in README.splitlines():
        named += re.findall(r" (--[a-z-]+)", line.partition("NNI_Pruning.py")[2])
    assert {"--report", "--controls", "--subset", "--baseline", "--device"} <= set(named)
    assert set(named) <= set(known)


def test_code_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REFERENCE, tmp_path / "checkpoints" / "reference")
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    again, layer = [line for line in lines if line != "0 Filter"]  # NNI's
    assert again == "torch.Size([2, 1000])"
    assert layer.startswith("Conv2d(1, 16, ")


RUNS = {
    path.stem: script.read_results(path)
    for path in REFERENCE.glob("*.csv")
    if not path.stem.startswith("cifar10")
}


def test_the_tables_of_results_are_those_of_the_reference_runs():
    frame = RUNS["bfloat16"]
    first = frame.query("seed == 0 and kind in ('baseline', 'pruned')")
    assert "\n\n".join(script.report(first).split("\n\n")[:2]) in README
    reports = (REFERENCE / "README.md").read_text(encoding="utf-8")
    assert all(script.report(frame) in reports for frame in RUNS.values())
    accuracy = frame.groupby("name")["accuracy"].mean().map("{:.2f}".format)
    for sparsity in script.SPARSITIES:
        both = " and ".join(accuracy[f"{pruner}_{sparsity}"] for pruner in script.PRUNERS)
        assert f"{both} %" in " ".join(README.split())


def difference(run, one, other):
    """Wrong images of `one` minus those of `other`, with the interval, as the README has it."""
    by_model = RUNS[run].set_index(["name", "seed"])["wrong"].loc[[one, other]]
    is_wrong = by_model.str.get_dummies(" ").reindex(columns=map(str, range(10_000)), fill_value=0)
    points = 100 * (is_wrong.loc[one] - is_wrong.loc[other])
    mean = 100 * points.mean(axis=None)
    half = 100 * script.half_interval(points)
    return f"{mean:.1f} ({mean - half:.1f} to {mean + half:.1f})"


NAMES = {
    "L1NormPruner": "L1NormPruner_{sparsity}",
    "FPGMPruner": "FPGMPruner_{sparsity}",
    "random filters": "random_{sparsity}",
    "scratch": "scratch_{sparsity}_{epochs}_epochs",
    "the baseline": "baseline",
}


def test_differences_of_the_table_and_in_sentences():
    rows = re.findall(r"^\| ([\w ]+) than ([\w ]+) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 9
    for one, other, cells in rows:
        expected = []
        for (run, epochs), sparsity in product((("bfloat16", 6), ("gentle", 4)), (0.5, 0.75)):
            sizes = {"sparsity": sparsity, "epochs": epochs}
            pair = [NAMES[label].format(**sizes) for label in (one, other)]
            expected.append(difference(run, *pair))
        assert cells == " | ".join(expected)
    text = " ".join(README.split())
    for pruner, sparsity in product(script.PRUNERS, script.SPARSITIES):
        assert difference("bfloat16", f"{pruner}_{sparsity}", "baseline_3_more_epochs") in text
    for sparsity in script.SPARSITIES:
        pair = (f"scratch_{sparsity}_3_epochs", f"L1NormPruner_{sparsity}")
        assert difference("bfloat16", *pair) in text


def test_the_table_of_cifar10():
    files = [REFERENCE / "cifar10.csv", REFERENCE / "cifar10_torch_pruning.csv"]
    frame = pd.concat([pd.read_csv(path, dtype={"wrong": str}) for path in files])
    is_wrong = frame.set_index(["name", "seed"])["wrong"].str.get_dummies(" ")
    is_wrong = is_wrong.reindex(columns=map(str, range(10_000)), fill_value=0)
    for name, rows in frame.groupby("name"):
        cell = f"{rows['accuracy'].mean():.2f} ± "
        if name == "baseline":
            cell = f"{rows['parameters'].iloc[0]:,} "
        else:
            points = 100 * (is_wrong.loc["baseline"] - is_wrong.loc[name]).dropna()
            cell += f"{script.half_interval(points):.2f} "
        assert f"| {cell}|" in README


def test_the_table_of_networks_is_that_of_the_tests():
    rows = re.findall(r"^\| (\w+) \| [\d,]+ \| ([\d,]+) \| .* ms \|", README, re.MULTILINE)
    assert len(rows) == 4
    assert {name: int(left.replace(",", "")) for name, left in rows}.items() <= SLOW.items()
