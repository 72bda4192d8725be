"""Sweeps, for real: the README's YAML, NNI's own manager and trials, machines over SSH.

Every experiment gets a free port and a folder of its own, which is HOME to nnictl and to all that
it starts: neither meets an experiment of whoever runs the tests.
"""

import contextlib
import csv
import getpass
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import matplotlib
import psutil
import pytest
import yaml
from nni.experiment.config import ExperimentConfig

import NNI_Pruning as script
from conftest import ROOT, run_script

BIN = Path(sys.executable).parent
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
SMALL = "--subset 600 --epochs 1 --batch-size 64".split()
SETTINGS = {"MPLCONFIGDIR": matplotlib.get_cachedir()}  # no list of fonts anew in each HOME


def readme_yaml(platform: str) -> dict:
    """The README's experiment: the block for `local`, and over it what `platform` changes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    config = {}
    for name in dict.fromkeys(("local", platform)):
        (block,) = [block for block in blocks if f"platform: {name}" in block]
        config |= yaml.safe_load(block)
    return config


def until(condition, seconds: float, what: str = ""):
    """What `condition` gives once it is true; None where `what` is empty and it never is."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            assert not what, f"waited {seconds} s for {what}"
            return None
        time.sleep(0.1)
    return value


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A free port whose successor is free too: NNI asks for both."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
                return first.getsockname()[1]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Manager, tuner, trials and trial keepers: all that names the folder, or works in it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            inside = f"{process.cwd()}/".startswith(f"{folder}/")
            if process.pid != os.getpid() and (inside or f"{folder}/" in words):
                found.append(process)
    return found


def scripts_of(folder: Path) -> list[psutil.Process]:
    """The Pythons that run the script below a folder."""
    found = []
    for process in processes_of(folder):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:2] == ["NNI_Pruning.py"]:
                found.append(process)
    return found


class Experiment:
    """A folder with a copy of the repository's files, a HOME, and NNI's manager for both."""

    def __init__(self, config: dict, folder: Path, baseline: Path, data_dir: Path):
        self.folder, self.port = folder, free_port()
        self.home, self.code = folder / "home", folder / "code"
        self.checkpoints = self.code / "checkpoints"
        self.home.mkdir()
        self.checkpoints.mkdir(parents=True)
        for path in (ROOT / "NNI_Pruning.py", ROOT / ".nniignore"):
            shutil.copy(path, self.code)
        shutil.copy(baseline, self.checkpoints / "baseline.pth")
        (self.checkpoints / "large.pth").touch()  # as an earlier run may leave it: not to be copied
        # The data's size alone is not the README's.
        small = shlex.join(["NNI_Pruning.py", "--data-dir", str(data_dir), *SMALL])
        config["trialCommand"] = config["trialCommand"].replace("NNI_Pruning.py", small)
        (self.code / "sweep.yml").write_text(yaml.safe_dump(config))

    def nnictl(self, command: str) -> subprocess.CompletedProcess:
        path = f"{BIN}:{os.environ['PATH']}"
        environment = {**os.environ, **SETTINGS, "PATH": path, "HOME": str(self.home)}
        return subprocess.run(
            [BIN / "nnictl", *command.split()],
            env=environment,
            cwd=self.code,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    def get(self, what: str):
        """An answer of the manager, which is also the portal's source."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", f"/api/v1/nni/{what}")
            return json.load(connection.getresponse())

    def statuses(self) -> dict[str, str]:
        """The status of each trial by its id, after all have ended."""
        try:
            until(lambda: self.get("check-status")["status"] == "DONE", 90, "the experiment's end")
        except (AssertionError, OSError) as error:  # OSError: there is no manager any more
            logs = [*self.folder.rglob("nnimanager.log"), *self.folder.rglob("trial.stderr")]
            pytest.fail(f"{error}\n" + "\n".join(log.read_text()[-2000:] for log in logs))
        return {trial["trialJobId"]: trial["status"] for trial in self.get("trial-jobs")}

    def export(self) -> list[dict[str, str]]:
        self.nnictl("experiment export --type csv --filename sweep.csv")
        with (self.code / "sweep.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def results(self, trial: str) -> Path:
        """The trial's own results.json, wherever it worked."""
        (path,) = self.folder.rglob(f"checkpoints/{trial}/results.json")
        return path


@contextlib.contextmanager
def running(config: dict, folder: Path, baseline: Path, data_dir: Path):
    """A started Experiment; however this ends, it is stopped, and no process of it is left."""
    experiment = Experiment(config, folder, baseline, data_dir)
    try:
        for _ in range(3):  # nnictl gives up if the manager takes more than a few seconds to start
            created = experiment.nnictl(f"create --config sweep.yml --port {experiment.port}")
            if created.returncode == 0:
                break
        assert created.returncode == 0, created.stdout + created.stderr
        yield experiment
    finally:
        try:
            experiment.nnictl(f"stop --port {experiment.port}")
            until(lambda: not processes_of(folder), 10)
        finally:
            left = processes_of(folder)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    assert not left


def check_exported(experiment: Experiment) -> None:
    """Four trials succeeded, one for each pair, and the export has what each found itself."""
    statuses = experiment.statuses()
    assert list(statuses.values()) == ["SUCCEEDED"] * 4
    exported = experiment.export()
    assert {row["trialJobId"] for row in exported} == statuses.keys()
    pairs = sorted((row["pruner"], float(row["sparsity"])) for row in exported)
    assert pairs == sorted(product(script.PRUNERS, script.SPARSITIES))
    for row in exported:
        # NNI 3.0 may record two trials that start together with each other's parameters; the
        # columns must be what the trial really ran with.
        own = json.loads(experiment.results(row["trialJobId"]).read_text())["rows"][-1]
        assert (row["pruner"], float(row["sparsity"])) == (own["pruner"], own["sparsity"])
        assert float(row["default"]) == own["accuracy"]
        assert int(row["parameters"]) == own["parameters"]
        assert int(row["macs"]) == own["macs"]
        assert float(row["training_seconds"]) == own["training_seconds"]


@pytest.fixture(scope="module")
def baseline(data_dir, tmp_path_factory) -> Path:
    """One trained baseline, for the trials to start from."""
    folder = tmp_path_factory.mktemp("baseline")
    places = ["--data-dir", str(data_dir), "--checkpoint-dir", str(folder)]
    script.main([*places, *SMALL, "--pruner", "FPGMPruner", "--sparsity", "0.5"])
    return folder / "baseline.pth"


@pytest.mark.slow
def test_local_sweep(baseline, data_dir, tmp_path, capsys):
    with running(readme_yaml("local"), tmp_path, baseline, data_dir) as experiment:
        check_exported(experiment)
        experiment.nnictl("experiment export --type json --filename sweep.json")
    # The final look: from NNI's export to the table and the picture of a single run.
    exported = tmp_path / "code" / "sweep.json"
    rows = script.main(["--report", str(exported), "--checkpoint-dir", str(tmp_path)])
    trials = {f"{p}_{s}" for p, s in product(script.PRUNERS, script.SPARSITIES)}
    assert {row.name for row in rows} == {"baseline", *trials}
    assert "FPGMPruner 0.75" in capsys.readouterr().out
    assert (tmp_path / "results.png").stat().st_size > 0


@pytest.mark.slow
def test_killed_trial_is_shown_as_failed(baseline, data_dir, tmp_path):
    config = readme_yaml("local")
    config["searchSpace"]["sparsity"]["_value"] = [0.5]
    config["maxTrialNumber"] = 2
    with running(config, tmp_path, baseline, data_dir) as experiment:

        def started():
            """A trial that has its parameters: had it died before, NNI would hand them on."""
            return next(experiment.checkpoints.glob("*/.lock"), None)

        killed = until(started, 60, "a trial").parent.name
        (process,) = [
            process
            for process in scripts_of(tmp_path)
            if process.environ()["NNI_TRIAL_JOB_ID"] == killed
        ]
        process.send_signal(signal.SIGKILL)
        statuses = experiment.statuses()
        assert statuses.pop(killed) == "FAILED"
        assert list(statuses.values()) == ["SUCCEEDED"]
        (row,) = experiment.export()
        assert row["trialJobId"] in statuses
        own = json.loads(experiment.results(row["trialJobId"]).read_text())["rows"][-1]
        assert float(row["default"]) == own["accuracy"]


@contextlib.contextmanager
def machine(folder: Path, home: Path):
    """An SSH server of its own; gives the entry of NNI's machineList that reaches it.

    Keys are of the default kind, and the server accepts what it accepts by default.
    """
    for path in (folder, home):
        path.mkdir(parents=True)
    for name in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
        subprocess.run(command, check=True)
    environment = SETTINGS | {"HOME": home, "PIP_NO_INDEX": "1"}  # NNI upgrades itself: not here
    port = free_port()
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "user_key.pub",
        "PidFile": "none",
        "StrictModes": "no",  # the folder may be inside one that others can write
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "Subsystem": "sftp internal-sftp",
        "SetEnv": " ".join(f"{name}={value}" for name, value in environment.items()),
    }
    lines = [f"{name} {value}\n" for name, value in settings.items()]
    (folder / "sshd_config").write_text("".join(lines))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # which init makes elsewhere
    command = [SSHD, "-D", "-f", folder / "sshd_config", "-E", folder / "log"]
    server = subprocess.Popen(command)
    try:
        until(lambda: answers(port) or server.poll() is not None, 10, "sshd")
        assert server.poll() is None, (folder / "log").read_text()
        yield {
            "host": "127.0.0.1",
            "port": port,
            "user": getpass.getuser(),
            "sshKeyFile": str(folder / "user_key"),
            "pythonPath": str(BIN),
        }
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.slow
@pytest.mark.skipif(SSHD is None, reason="sshd (Debian's openssh-server) is not installed")
def test_sweep_over_ssh(baseline, data_dir, tmp_path):
    folder = tmp_path / "sweep"  # HOME of both machines is in it too: what stays there is found
    homes = [folder / "machine1", folder / "machine2"]
    config = readme_yaml("remote") | {"nniManagerIp": "127.0.0.1"}
    assert len(config["trainingService"]["machineList"]) == 2
    with (
        machine(tmp_path / "ssh1", homes[0]) as first,
        machine(tmp_path / "ssh2", homes[1]) as second,
    ):
        config["trainingService"]["machineList"] = [first, second]
        with running(config, folder, baseline, data_dir) as experiment:
            check_exported(experiment)
            trials = experiment.statuses()
    for home in homes:
        assert sum(home in experiment.results(trial).parents for trial in trials) == 2
        (code,) = home.rglob("upload/trial_code")
        copied = {path.name for path in [*code.iterdir(), *code.glob("checkpoints/*.pth")]}
        ours = {".nniignore", "NNI_Pruning.py", "sweep.yml", "checkpoints", "baseline.pth"}
        assert copied == ours


def test_kubernetes_yaml_is_valid(tmp_path):
    """As far as it goes without a cluster: only keys that NNI knows, and all that it needs."""
    config = readme_yaml("frameworkcontroller")
    path = tmp_path / "sweep.yml"
    path.write_text(yaml.safe_dump(config))
    loaded = ExperimentConfig.load(path)
    loaded.validate()
    assert loaded.json()["trainingService"]["platform"] == "frameworkcontroller"
    assert "NNI_Pruning.py" in loaded.json()["trainingService"]["trialCommand"]
    # The check itself: it would find a key that is missing, and one that is misspelt.
    role = config["trainingService"]["taskRoles"][0]
    for name, error in ((None, ValueError), ("cpuNumbers", AttributeError)):
        broken = {key: value for key, value in role.items() if key != "cpuNumber"}
        broken |= {} if name is None else {name: 1}
        config["trainingService"]["taskRoles"] = [broken]
        path.write_text(yaml.safe_dump(config))
        with pytest.raises(error, match=r"(?i)cpu_?number"):
            ExperimentConfig.load(path).validate()


def trial_without_manager(data_dir, folder, parameters: dict, *options):
    """The script as a trial that gets its parameters from a file, and reports into one.

    NNI has this channel for machines that it uses again and again, as on Kubernetes.
    """
    trial = {"parameter_id": 0, "parameters": parameters}
    (folder / "parameter.cfg").write_text(json.dumps(trial))
    names = {"PLATFORM": "local", "TRIAL_JOB_ID": "one", "SYS_DIR": folder, "OUTPUT_DIR": folder}
    environment = os.environ | {f"NNI_{name}": str(value) for name, value in names.items()}
    process = run_script(data_dir, folder, *options, env=environment)
    reported = re.findall(r"^ME\d{6}(.*)$", (folder / ".nni" / "metrics").read_text(), re.MULTILINE)
    return process, [json.loads(line) for line in reported]


@pytest.mark.parametrize(("target", "number", "status"), [("shell", 2, -2), ("python", 9, 137)])
def test_signals_reach_the_right_process(tmp_path, target, number, status):
    """NNI stops a trial by SIGINT to its shell alone: a Python left behind would train on.

    That the shell dies of the signal, and otherwise has an exit status, is what lets NNI tell a
    trial that was cancelled from one that failed.
    """
    (tmp_path / "NNI_Pruning.py").write_text("import time; time.sleep(100)")
    command = readme_yaml("local")["trialCommand"].replace("python", sys.executable, 1)
    shell = subprocess.Popen(["/bin/bash", "-c", command], cwd=tmp_path)
    try:
        python = until(lambda: scripts_of(tmp_path), 10, "the trial")[0]
        time.sleep(0.2)  # for the shell to go on from starting it to waiting for it
        os.kill(shell.pid if target == "shell" else python.pid, number)
        assert shell.wait(10) == status
        python.wait(10)
    finally:
        for process in [shell, *scripts_of(tmp_path)]:
            process.kill()


@pytest.mark.parametrize(
    ("parameters", "named"),
    [({"sparsty": 0.5}, "--sparsty"), ({"pruner": "FPGMPruner"}, "one sparsity")],
)
def test_unfit_parameters_are_named(data_dir, tmp_path, parameters, named):
    process, reported = trial_without_manager(data_dir, tmp_path, parameters)
    assert process.returncode == 2
    assert re.fullmatch(rf"NNI_Pruning\.py: error: .*{named}.*\n", process.stderr)
    assert not reported
    assert not (tmp_path / "checkpoints").exists()


def test_what_a_trial_reports(data_dir, baseline, tmp_path):
    parameters = {"pruner": "FPGMPruner", "sparsity": 0.75, "finetune_epochs": 2}
    options = [*SMALL, "--baseline", baseline]
    process, reported = trial_without_manager(data_dir, tmp_path, parameters, *options)
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr
    results = json.loads((tmp_path / "checkpoints" / "one" / "results.json").read_text())
    own = results["rows"][-1]
    values = [json.loads(metric["value"]) for metric in reported]
    assert [metric["type"] for metric in reported] == ["PERIODICAL", "PERIODICAL", "FINAL"]
    assert values[:2] == own["training_accuracies"]
    assert values[2]["default"] == own["accuracy"]
    assert {name: values[2][name] for name in parameters} == parameters
