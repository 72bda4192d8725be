"""Sweeps, for real: the README's YAML, NNI's own manager and trials, machines over SSH.

Each has a free port and its own HOME, so that it cannot touch the user's own experiments.
"""

import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import psutil
import pytest
import requests
import yaml

import NNI_Pruning as script
from conftest import QUICK, ROOT, SCRIPT, TIMEOUT, run_python, table_of

BIN = Path(sys.executable).parent
SSHD = Path("/usr/sbin/sshd")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LOCAL, REMOTE, *_ = map(yaml.safe_load, BLOCKS)  # REMOTE is what changes

needs_nnictl = pytest.mark.skipif(
    platform.machine() != "x86_64"  # Windows has another name for it
    or (sys.version_info >= (3, 14) and version("typeguard") == "4.1.2"),
    reason="sweeps need Linux or macOS on x86-64, and the README's typeguard",
)


def until(condition):
    """Wait until `condition()` is true, and return its value."""
    end = time.monotonic() + TIMEOUT
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return value


def free_port():
    """It and the next one, which NNI takes too, are most likely free: systems hand out others."""
    return random.SystemRandom().randrange(20_000, 32_000, 2)


def processes_below(folder):
    """The processes whose HOME is in the folder."""
    processes = []
    for process in psutil.process_iter(["environ"]):
        variables = process.info["environ"] or {}  # None: it may not be read
        if variables.get("HOME", "").startswith(f"{folder}/"):
            processes.append(process)
    return processes


def rows_of(path):
    return pd.read_csv(path, dtype=str).to_dict("records")


def sweep(folder, config):
    """Do what the README says, from the baseline to the report. No process is left."""
    code = folder / "code"
    port = free_port()
    code.mkdir()
    shutil.copy(SCRIPT, code)
    shutil.copy(ROOT / ".nniignore", code)
    run_python(code, SCRIPT, *QUICK).check_returncode()
    small = "--dataset digits --subset 200 --finetune-epochs 1 --baseline"
    command = config["trialCommand"].replace("--baseline", small)
    text = yaml.safe_dump({**config, "trialCommand": command})
    (code / "sweep.yml").write_text(text, encoding="utf-8")
    variables = os.environ | {
        "HOME": f"{folder}/home",
        "NNI_CONFIG_DIR": f"{folder}/home",  # not in the environment of Python
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "no_proxy": "*",
    }

    def nnictl(command):
        return subprocess.call(["nnictl", *command.split()], env=variables, cwd=code)

    def get(what):
        url = f"http://127.0.0.1:{port}/api/v1/nni/{what}"
        return requests.get(url, proxies={"no_proxy": "127.0.0.1"}, timeout=TIMEOUT).json()

    try:
        # More than once: nnictl gives up if the manager takes more than 3 s to start.
        until(lambda: nnictl(f"create --config sweep.yml --port {port}") == 0)
        until(lambda: get("check-status")["status"] == "DONE")
        statuses = [trial["status"] for trial in get("trial-jobs")]
        nnictl("experiment export --type csv --filename sweep.csv")
        nnictl(f"stop --port {port}")
        until(lambda: not processes_below(folder))
    finally:
        for process in processes_below(folder):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    # One trial for each pruner and sparsity, and NNI exported the rows that they have saved.
    assert statuses == ["SUCCEEDED"] * 4
    for row in rows_of(code / "sweep.csv"):
        (saved,) = folder.rglob(f"checkpoints/{row.pop('trialJobId')}/results.csv")
        _, pruned = rows_of(saved)
        assert row == {**pruned, "default": pruned["accuracy"]}
    assert len(table_of(run_python(code, SCRIPT, "--report", "sweep.csv").stdout)) == 4


@pytest.mark.slow
@needs_nnictl
def test_local_sweep(tmp_path):
    sweep(tmp_path, LOCAL)


@contextmanager
def machine(home):
    """Start an SSH server; yields the entry of NNI's machineList that reaches it."""
    home.mkdir()
    port = free_port()
    key = home / "key"  # of the server and of the user
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    with suppress(OSError):
        Path("/run/sshd").mkdir()  # which init makes elsewhere
    # StrictModes: others may write to a folder above ours. PIP: NNI would install itself and its
    # old typeguard on the machine. Without an index and without dependencies, pip does nothing.
    options = f"""
        ListenAddress 127.0.0.1:{port}
        HostKey {key}
        AuthorizedKeysFile {key}.pub
        StrictModes no
        PidFile none
        Subsystem sftp internal-sftp
        SetEnv HOME={home} PIP_NO_INDEX=1 PIP_NO_DEPS=1
    """
    (home / "config").write_text(options, encoding="utf-8")
    command = [SSHD, "-D", "-e", "-f", home / "config"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert "listening" in server.stderr.readline()
        entry = {"host": "127.0.0.1", "port": port, "user": psutil.Process().username()}
        try:
            yield {**entry, "sshKeyFile": str(key), "pythonPath": str(BIN)}
        finally:
            server.terminate()


@pytest.mark.slow
@needs_nnictl
@pytest.mark.skipif(not SSHD.exists(), reason="Debian's openssh-server is not installed")
def test_sweep_over_ssh(tmp_path):
    # HOME of both machines is in the sweep's folder: a process left there would be found.
    homes = [tmp_path / "machine1", tmp_path / "machine2"]
    with machine(homes[0]) as first, machine(homes[1]) as second:
        service = {**REMOTE["trainingService"], "machineList": [first, second]}
        sweep(tmp_path, {**LOCAL, "nniManagerIp": "127.0.0.1", "trainingService": service})
    for home in homes:
        assert len([*home.rglob("checkpoints/*/results.csv")]) == 2
        copied = home.rglob("upload/trial_code/checkpoints/*.*")
        assert [path.name for path in copied] == ["baseline.pth"]


@pytest.mark.skipif(os.name == "nt", reason="a trial's command is a line for bash")
def test_cancelled_trial_ends(tmp_path):
    """NNI stops a trial by SIGINT to its shell alone: a Python left behind would train on."""
    (tmp_path / "NNI_Pruning.py").write_text("import time; time.sleep(600)", encoding="utf-8")
    command = LOCAL["trialCommand"].replace("python", shlex.quote(sys.executable), 1)
    # Were Ctrl-C ignored by whatever started pytest, the shell would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shell = psutil.Popen(["bash", "-c", command], cwd=tmp_path)
    (child,) = until(shell.children)
    until(lambda: "NNI_Pruning.py" in child.cmdline())  # no longer a copy of the shell
    time.sleep(0.5)  # for the shell to go on from starting it to waiting for it
    shell.send_signal(signal.SIGINT)
    assert shell.wait(TIMEOUT) == -2  # dead of it: an exit status would be a trial that failed
    child.wait(60)


@pytest.mark.parametrize(
    "parameters, named",
    [({"pruner": "FPGMPruner"}, "one --sparsity"), ({"sparsty": 1}, "--sparsty=1")],
)
def test_unfit_parameters_are_named(call, monkeypatch, parameters, named):
    monkeypatch.setattr(script.import_nni(), "get_next_parameter", lambda: parameters)
    monkeypatch.setenv("NNI_PLATFORM", "local")  # after the import, which would write a log file
    error, _, printed = call()
    assert isinstance(error, SystemExit)
    assert named in printed


def test_what_a_trial_reports(tmp_path):
    """Without NNI's manager: parameters come from parameter.cfg, metrics go to .nni/metrics."""
    given = {"pruner": "FPGMPruner", "sparsity": 0.75, "finetune_epochs": 2.0, "lr": 0.02}
    text = json.dumps({"parameter_id": 0, "parameters": given})
    (tmp_path / "parameter.cfg").write_text(text, encoding="utf-8")
    trial = {"NNI_PLATFORM": "local", "NNI_TRIAL_JOB_ID": "one", "NNI_SYS_DIR": "."}
    options = "--dataset digits --subset 200 --epochs 1".split()
    process = run_python(tmp_path, SCRIPT, *options, NNI_OUTPUT_DIR=".", **trial)
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr
    text = (tmp_path / ".nni" / "metrics").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ME\d{6}(.*)$", text, re.MULTILINE)
    final = json.loads(json.loads(line)["value"])
    _, pruned = rows_of(tmp_path / "checkpoints" / "one" / "results.csv")
    expected = {**pruned, "default": pruned["accuracy"]}
    assert {name: str(value) for name, value in final.items()} == expected
    assert given.items() <= final.items()
