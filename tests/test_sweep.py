"""Sweeps, for real: the README's YAML, NNI's own manager and trials, machines over SSH.

Each has a free port and its own HOME, so that it cannot touch the user's own experiments.
"""

import contextlib
import csv
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import site
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import requests
import yaml
from packaging.version import Version

import NNI_Pruning as script
from conftest import ROOT, SCRIPT, TIMEOUT, run_python

BIN = Path(sys.executable).parent
BASH = shutil.which("bash")
SSHD = shutil.which("sshd", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin")))
SMALL = "--subset 600 --batch-size 64"

needs_a_shell = pytest.mark.skipif(
    os.name == "nt" or BASH is None, reason="a trial's command is a line for bash"
)
needs_nnictl = pytest.mark.skipif(
    os.name == "nt" or platform.machine() not in ("x86_64", "AMD64"),
    reason="sweeps work on Linux and macOS, on x86-64: NNI has no program for others",
)


def readme_yaml(platform: str) -> dict:
    """The README's experiment: the block for `local`, and over it what `platform` changes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    by_platform = {block["trainingService"]["platform"]: block for block in blocks}
    return by_platform["local"] | by_platform[platform]


def until(condition, seconds: float = TIMEOUT):
    """Wait until `condition()` is true, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.1)
    return value


def free_port() -> int:
    """A port that is most likely free, as is the next one, which NNI takes as well.

    It is below those that a system hands out itself.
    """
    return random.SystemRandom().randrange(20_000, 32_000, 2)


def processes_with(name: str, value: str) -> list[psutil.Process]:
    """The processes in whose environment the variable begins with the value."""
    processes = []
    for process in psutil.process_iter(["environ"]):
        variables = process.info["environ"] or {}  # None: it may not be read
        if variables.get(name, "").startswith(value):
            processes.append(process)
    return processes


def sweep(config: dict, folder: Path, data_dir: Path, meanwhile=lambda: None) -> dict[str, str]:
    """Do what the README says, from the baseline to `nnictl stop`.

    Returns the status of each trial by its id. `meanwhile` is called once the experiment runs. No
    process is left, whatever happens.
    """
    if sys.version_info >= (3, 14) and Version(version("typeguard")) < Version("4.1.3"):
        pytest.skip("nnictl needs a newer typeguard here: see the README")
    code = folder / "code"
    port = free_port()
    code.mkdir()
    for name in ("NNI_Pruning.py", ".nniignore"):
        shutil.copy(ROOT / name, code)
    first = f"{SMALL} --epochs 1 --sparsity 0.5 --pruner L1NormPruner".split()
    run_python(code, SCRIPT, "--data-dir", data_dir, *first).check_returncode()
    # The README's command, with options that make it small.
    options = f"--data-dir {shlex.quote(str(data_dir))} {SMALL} --finetune-epochs 1"
    command = config["trialCommand"].replace("NNI_Pruning.py", f"NNI_Pruning.py {options}")
    config["trialCommand"] = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    (code / "sweep.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    variables = {
        "HOME": f"{folder}/home",
        "NNI_CONFIG_DIR": f"{folder}/home",  # not in the environment of Python
        "PYTHONUSERBASE": site.getuserbase(),  # which would move with HOME
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "no_proxy": "*",
    }

    def nnictl(command: str) -> int:
        return subprocess.call(["nnictl", *command.split()], env=os.environ | variables, cwd=code)

    session = requests.Session()
    session.trust_env = False  # no proxy between this machine and itself

    def get(what: str):
        return session.get(f"http://127.0.0.1:{port}/api/v1/nni/{what}", timeout=TIMEOUT).json()

    try:
        # More than once: nnictl gives up if the manager takes more than 3 s to start.
        until(lambda: nnictl(f"create --config sweep.yml --port {port}") == 0)
        meanwhile()
        until(lambda: get("check-status")["status"] == "DONE")
        statuses = {trial["trialJobId"]: trial["status"] for trial in get("trial-jobs")}
        for kind in ("csv", "json"):
            nnictl(f"experiment export --type {kind} --filename sweep.{kind}")
        nnictl(f"stop --port {port}")
        until(lambda: not processes_with("HOME", f"{folder}/"), 120)
    finally:
        for process in processes_with("HOME", f"{folder}/"):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for log in (*folder.rglob("nnimanager.log"), *folder.rglob("trial.stderr")):
            # pytest shows this where the test fails.
            print(log, log.read_text(encoding="utf-8")[-2000:], sep="\n")
    return statuses


def assert_all_succeeded_and_were_exported(folder: Path, statuses: dict[str, str]) -> None:
    """One trial for each pruner and sparsity, and NNI exported the results that each has saved."""
    assert list(statuses.values()) == ["SUCCEEDED"] * 4
    with (folder / "code" / "sweep.csv").open(newline="", encoding="utf-8") as file:
        exported = {row["trialJobId"]: row for row in csv.DictReader(file)}
    assert exported.keys() == statuses.keys()
    for trial, row in exported.items():
        (saved,) = folder.rglob(f"checkpoints/{trial}/results.json")
        result = json.loads(saved.read_text(encoding="utf-8"))["rows"][-1]
        assert row["default"] == str(result["accuracy"])
        # NNI 3.0 may record two trials that start together with each other's parameters.
        for name in ("name", "pruner", "sparsity", "parameters", "macs", "training_seconds"):
            assert row[name] == str(result[name])
    report = ["--report", f"{folder}/code/sweep.json", "--checkpoint-dir", str(folder)]
    rows = script.main(report)
    pairs = [f"{pruner}_{sparsity}" for pruner in script.PRUNERS for sparsity in script.SPARSITIES]
    assert sorted(row["name"] for row in rows) == sorted(pairs + ["baseline"] * 4)
    assert (folder / "code" / "sweep.png").stat().st_size > 0


@pytest.mark.slow
@needs_nnictl
def test_local_sweep(data_dir, tmp_path, capsys):
    assert_all_succeeded_and_were_exported(
        tmp_path, sweep(readme_yaml("local"), tmp_path, data_dir)
    )
    assert "\nFPGMPruner_0.75 " in capsys.readouterr().out


@pytest.mark.slow
@needs_nnictl
def test_killed_trial_is_shown_as_failed(data_dir, tmp_path):
    def kill_one():
        # A trial with a folder has its parameters: had it died before, NNI would hand them on.
        checkpoints = tmp_path / "code" / "checkpoints"
        trials = until(lambda: [path.name for path in checkpoints.iterdir() if path.is_dir()])
        for process in processes_with("NNI_TRIAL_JOB_ID", trials[0]):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[1:2] == ["NNI_Pruning.py"]:  # and not its shell
                    process.kill()

    config = readme_yaml("local") | {"maxTrialNumber": 2}
    # Long enough to be killed before it ends: of an option given twice, the last counts.
    longer = "NNI_Pruning.py --finetune-epochs 20"
    config["trialCommand"] = config["trialCommand"].replace("NNI_Pruning.py", longer)
    config["searchSpace"]["sparsity"]["_value"] = [0.5]
    statuses = sweep(config, tmp_path, data_dir, kill_one)
    assert sorted(statuses.values()) == ["FAILED", "SUCCEEDED"]


@contextlib.contextmanager
def machine(home: Path):
    """Start an SSH server; yields the entry of NNI's machineList that reaches it."""
    home.mkdir()
    key = home / "key"  # of the server and of the user
    port = free_port()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # which init makes elsewhere
    # NNI would install itself and its old typeguard on the machine. Without an index and without
    # dependencies, pip does nothing. (On Python 3.14, the README sets no-deps.)
    variables = [f'"HOME={home}"', "PIP_NO_INDEX=1", "PIP_NO_DEPS=1"]
    variables.append(f'"PYTHONUSERBASE={site.getuserbase()}"')
    options = [
        f'AuthorizedKeysFile="{key}.pub"',
        "StrictModes=no",  # others may write to a folder above ours
        f"ListenAddress=127.0.0.1:{port}",
        "PidFile=none",
        "Subsystem=sftp internal-sftp",
        f"SetEnv={' '.join(variables)}",
    ]
    command = [SSHD, "-D", "-e", "-f", "/dev/null", "-h", str(key)]
    for option in options:
        command += ["-o", option]
    pipes = {"stderr": subprocess.PIPE, "encoding": "utf-8"}
    server = subprocess.Popen(command, **pipes)
    try:
        line = server.stderr.readline()
        assert "listening" in line, line
        entry = {"host": "127.0.0.1", "port": port, "user": psutil.Process().username()}
        yield entry | {"sshKeyFile": str(key), "pythonPath": str(BIN)}
    finally:
        server.terminate()
        server.communicate(timeout=TIMEOUT)


@pytest.mark.slow
@needs_nnictl
@pytest.mark.skipif(SSHD is None, reason="sshd (Debian's openssh-server) is not installed")
def test_sweep_over_ssh(data_dir, tmp_path):
    # HOME of both machines is in the sweep's folder: a process left there would be found.
    homes = [tmp_path / "machine1", tmp_path / "machine2"]
    config = readme_yaml("remote")
    config["nniManagerIp"] = "127.0.0.1"
    assert len(config["trainingService"]["machineList"]) == 2
    with machine(homes[0]) as first, machine(homes[1]) as second:
        config["trainingService"]["machineList"] = [first, second]
        assert_all_succeeded_and_were_exported(tmp_path, sweep(config, tmp_path, data_dir))
    for home in homes:
        assert len([*home.rglob("checkpoints/*/results.json")]) == 2
        (code,) = home.rglob("upload/trial_code")
        copied = {path.name for path in (*code.iterdir(), *code.glob("checkpoints/*.*"))}
        expected = ".nniignore NNI_Pruning.py baseline.pth checkpoints sweep.yml"
        assert sorted(copied) == expected.split()


def test_kubernetes_yaml_is_valid(tmp_path, monkeypatch):
    """As far as it goes without a cluster: only keys that NNI knows, and all that it needs."""
    # NNI would write into the environment of Python, which may be another user's.
    monkeypatch.setenv("NNI_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    script.import_nni()  # without it NNI cannot be imported on Python 3.14
    from nni.experiment.config import ExperimentConfig

    # Without the address, NNI would look for one, and fail on a machine without a network.
    config = {**readme_yaml("frameworkcontroller"), "nniManagerIp": "127.0.0.1"}
    (tmp_path / "sweep.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    ExperimentConfig.load(tmp_path / "sweep.yml").validate()


@needs_a_shell
def test_cancelled_trial_ends(tmp_path):
    """NNI stops a trial by SIGINT to its shell alone: a Python left behind would train on."""
    (tmp_path / "NNI_Pruning.py").write_text("import time; time.sleep(600)", encoding="utf-8")
    quoted = shlex.quote(sys.executable)
    command = readme_yaml("local")["trialCommand"].replace("python", quoted, 1)
    # Were Ctrl-C ignored by whatever started pytest, the shell would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shell = psutil.Popen([BASH, "-c", command], cwd=tmp_path)
    (child,) = until(shell.children)
    until(lambda: "NNI_Pruning.py" in child.cmdline())  # no longer a copy of the shell
    time.sleep(0.5)  # for the shell to go on from starting it to waiting for it
    shell.send_signal(signal.SIGINT)
    assert shell.wait(TIMEOUT) == -2  # dead of it: an exit status would be a trial that failed
    child.wait(60)


@pytest.fixture
def parse_in_trial(monkeypatch):
    """`parse_options` without arguments, in a trial with these parameters."""

    def parse(parameters: dict):
        monkeypatch.setattr(script.import_nni(), "get_next_parameter", lambda: parameters)
        monkeypatch.setenv("NNI_PLATFORM", "local")
        return script.parse_options([])

    return parse


FITTING = {"pruner": "FPGMPruner", "sparsity": 0.25}


def test_parameters_are_options(parse_in_trial):
    args = parse_in_trial({**FITTING, "finetune_epochs": 2, "controls": True})
    assert (args.pruner, args.sparsity) == (["FPGMPruner"], [0.25])
    assert (args.finetune_epochs, args.controls) == (2, True)
    assert not parse_in_trial({**FITTING, "controls": False}).controls


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({**FITTING, "sparsty": 1}, "sparsty.*finetune_epochs.*sparsity"),  # and the known ones
        ({**FITTING, "sparsty": False}, "sparsty.*finetune_epochs.*sparsity"),
        ({}, "one --pruner"),
    ],
)
def test_unfit_parameters_are_named(parse_in_trial, capsys, given, named):
    with pytest.raises(SystemExit, match="2"):
        parse_in_trial(given)
    assert re.search(rf"\nNNI_Pruning\.py: error: .*{named}.*\n\Z", capsys.readouterr().err)


def test_what_a_trial_reports(data_dir, tmp_path):
    """Without NNI's manager: parameters come from parameter.cfg, metrics go to .nni/metrics."""
    given = {"pruner": "FPGMPruner", "sparsity": 0.75, "finetune_epochs": 2}
    file = tmp_path / "parameter.cfg"
    file.write_text(json.dumps({"parameter_id": 0, "parameters": given}), encoding="utf-8")
    names = {"PLATFORM": "local", "TRIAL_JOB_ID": "one", "SYS_DIR": ".", "OUTPUT_DIR": "."}
    trial = {f"NNI_{name}": value for name, value in names.items()}
    # 601 is prime. So a share of 601 training images cannot be one of 100 test images, but 0 and 1.
    options = ["--data-dir", data_dir, *SMALL.split(), "--epochs", 1, "--subset", 601]
    process = run_python(tmp_path, SCRIPT, *options, **trial)
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr
    text = (tmp_path / ".nni" / "metrics").read_text(encoding="utf-8")
    reported = [json.loads(line) for line in re.findall(r"^ME\d{6}(.*)$", text, re.MULTILINE)]
    # Of the fine-tuning alone: the baseline's epochs would mislead an assessor.
    assert [metric["type"] for metric in reported] == ["PERIODICAL", "PERIODICAL", "FINAL"]
    *shares, final = [json.loads(metric["value"]) for metric in reported]
    right = [share / 100 * 601 for share in shares]
    assert right == pytest.approx([round(number) for number in right])
    saved = tmp_path / "checkpoints" / "one" / "results.json"
    results = json.loads(saved.read_text(encoding="utf-8"))
    shared = {name: results[name] for name in ("heading", "rows")}
    row = results["rows"][-1]
    assert final == {**row, **given, **shared, "default": row["accuracy"]}
