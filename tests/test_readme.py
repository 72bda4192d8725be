"""The README against the script and the reference run: code that runs, options, figures."""

import re
import shutil

import pandas as pd
from test_pruning import SLOW

import NNI_Pruning as script
from conftest import REFERENCE, ROOT, read_mnist

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


def test_code_runs_as_it_stands(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REFERENCE, tmp_path / "checkpoints" / "reference")
    shutil.copytree(data_dir, tmp_path / "data")
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    again, exported, layer, digit = [line for line in lines if line != "0 Filter"]  # NNI's
    assert (again, exported) == ("torch.Size([2, 1000])", "torch.Size([5, 1000])")
    assert layer.startswith("Conv2d(1, 16, ")
    *_, test_labels = read_mnist(data_dir)
    if len(test_labels) == 10_000:
        assert digit == str(int(test_labels[0]))


def test_the_first_table_is_that_of_seed_0_of_the_reference_run():
    frame = pd.read_csv(REFERENCE / "bfloat16.csv")
    frame = frame[frame["seed"] == 0]
    for row in frame[frame["kind"].isin(["baseline", "pruned"])].to_dict("records"):
        line = next(line for line in README.splitlines() if line.startswith(f"{row['name']} "))
        assert f" {row['accuracy']:.2f} " in line
        assert f" {row['parameters']:,} " in line


def test_reference_tables_and_the_readmes_means_are_those_of_the_runs():
    reports = (REFERENCE / "README.md").read_text(encoding="utf-8")
    means = {}
    for path in REFERENCE.glob("*.csv"):
        frame = script.read_results(path)
        assert script.report(frame) in reports
        wrong = (100 - frame["accuracy"]) / 100 * frame["test_images"]
        means[path.stem] = wrong.groupby(frame["name"]).mean()
    for name in means["bfloat16"].index:
        numbers = [f"{means[run][name]:.1f}" for run in ("bfloat16", "float32", "avx2")]
        assert " / ".join(numbers) in README, name


def test_the_table_of_networks_is_that_of_the_tests():
    rows = re.findall(r"^\| (\w+) \| [\d,]+ \| ([\d,]+) \| .* ms \|", README, re.MULTILINE)
    assert len(rows) == 4
    assert {name: int(left.replace(",", "")) for name, left in rows}.items() <= SLOW.items()
