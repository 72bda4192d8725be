"""The README against the script: what it promises must be what is there."""

import dataclasses
import functools
import re
import subprocess
import sys

import torch

import NNI_Pruning as script
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@functools.cache
def help_text() -> str:
    command = [sys.executable, script.__file__, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_option_list_is_that_of_the_script():
    # In the README each option is a table row that begins with its name in backquotes.
    listed = re.findall(r"^\| `(--[a-z-]+)", README, re.MULTILINE)
    options = set(re.findall(r"^  (--[a-z-]+)", help_text(), re.MULTILINE))
    assert options
    assert sorted(listed) == sorted(options)


def test_help_shows_every_default():
    entries = re.split(r"^  (?=-)", help_text(), flags=re.MULTILINE)[1:]
    without = [entry.split()[0] for entry in entries if "default: " not in " ".join(entry.split())]
    assert without == ["-h,"]


def test_columns_are_those_of_the_script():
    # The README explains each column in a table row that begins with its name in bold.
    explained = re.findall(r"^\| \*\*(.+?)\*\*", README, re.MULTILINE)
    assert explained == [column.replace("\n", " ") for column in script.COLUMNS]


def test_fields_of_the_results_are_named():
    text, help_words = README, " ".join(help_text().split())
    for field in (*dataclasses.fields(script.Row), *dataclasses.fields(script.Verdict)):
        assert f"`{field.name}`" in text
        assert field.name in help_words


def test_loading_example_runs_as_printed(tmp_path, data_dir, monkeypatch, capsys):
    example = re.search(r"^```python\n(.*?load_model.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "checkpoints").mkdir()
    path = re.search(r'load_model\("(.+?)"\)', example)[1]
    torch.manual_seed(0)
    script.save_model(tmp_path / path, script.CNN((4, 4, 4, 4)))
    (tmp_path / "data").symlink_to(data_dir)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert re.fullmatch(r"\d\n", capsys.readouterr().out)


def test_first_block_holds_the_two_commands():
    block = re.search(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1].splitlines()
    assert len(block) == 2
    assert "requirements.txt" in block[0]
    assert block[0].endswith("NNI_Pruning.py")
    assert block[1].endswith("-m pytest")
