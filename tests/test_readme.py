"""The README against the script: its code runs as it stands, its tables are those of the runs."""

import re
import shutil
from pathlib import Path

import pytest

import NNI_Pruning as script
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_first_block_holds_the_two_commands():
    block = re.search(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1].splitlines()
    assert [line.split()[-1] for line in block] == ["NNI_Pruning.py", "pytest"]


def test_options_that_the_readme_names_exist(call):
    _, usage, _ = call("--help")
    known = re.findall(r"--[a-z-]+", usage)
    commands = [line.partition("NNI_Pruning.py")[2] for line in README.splitlines()]
    named = re.findall(r"`(--[a-z-]+)", README)
    for command in commands:
        named += re.findall(r" (--[a-z-]+)", command)
    assert {"--report", "--controls", "--epochs", "--baseline"} <= set(named)
    assert set(named) <= set(known)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[-1][:40])
def test_code_runs_as_it_stands(snippet, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reference = Path("checkpoints", "reference")
    shutil.copytree(ROOT / reference, tmp_path / reference)
    shutil.copytree(data_dir, tmp_path / "data")
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.fullmatch(r"\d|torch.Size\(\[2, 1000\]\)", capsys.readouterr().out.strip())


def test_the_reference_table_is_that_of_the_reference_run():
    folder = ROOT / "checkpoints" / "reference"
    rows = script.read_results([folder / "results.json"])[1]
    table = script.report(script.as_frame(rows))
    assert table in (folder / "README.md").read_text(encoding="utf-8")
    # The first screen's run is that of seed 0.
    pruned = [row for row in rows if row["seed"] == 0 and row["sparsity"] and row["pruner"]]
    for row in pruned:
        line = next(line for line in README.splitlines() if line.startswith(f"{row['name']} "))
        assert [f"{row[key]:.2f}" for key in ("accuracy_before", "accuracy")] == line.split()[1:3]
