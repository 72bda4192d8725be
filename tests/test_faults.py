"""What people meet: wrong options, damaged files, no network, a full disk, killed processes.

Each ends in a clear message and an exit status, and damages no file that was there before.
"""

import functools
import hashlib
import http.server
import itertools
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST
from tqdm import tqdm

import NNI_Pruning as script
from conftest import (
    ARCHIVES,
    QUICK,
    QUICK_TUNING,
    SCRIPT,
    TIMEOUT,
    environment,
    files_of,
    idx_bytes,
    read_idx,
    run_python,
    table_of,
)

try:
    import resource
except ImportError:  # on Windows
    resource = None


@pytest.fixture
def fails(call, tmp_path):
    """Call `main`, which has to end in an error and leave every file as it was; the message."""

    def check(status: int, *arguments) -> str:
        before = files_of(tmp_path)
        error, out, err = call(*arguments)
        assert out == ""
        assert before.items() <= files_of(tmp_path).items()
        if status == 2:
            assert isinstance(error, SystemExit)
            assert error.code == 2
            return err.rpartition("error: ")[2]  # without the line that lists all options
        assert isinstance(error, script.ExperimentError)
        return str(error)

    return check


WRONG = """
    --sparsity=0 --sparsity=1 --sparsity=nan --sparsity=x --pruner=L1 --dataset=cifar10 --device=tpu
    --epochs=0 --epochs=1.5 --epoch=3 --finetune-epochs=0 --batch-size=-1 --subset=0 --lr=0 --lr=inf
    --lr=nan --seed=-1 --seed=9223372036854775808 digits --width=2
"""


@pytest.mark.parametrize("argument", WRONG.split())
def test_a_wrong_option_is_named(argument, fails):
    assert argument.partition("=")[0] in fails(2, *QUICK, argument)


def test_a_seed_given_twice_is_named(fails):
    assert "argument --seeds" in fails(2, *QUICK, "--seeds", 0, 1, 0)


def test_epochs_for_a_baseline_that_is_trained_already(saved_baseline, fails):
    message = fails(2, *QUICK, "--baseline", saved_baseline)
    assert "argument --epochs" in message
    assert "--finetune-epochs" in message


# ----------------------------------------------------------------------------- .pth files


class Evil:
    """Unpickled by a plain torch.load, this would make the file "executed"."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.fixture
def saved_baseline(call, tmp_path) -> Path:
    """The undamaged baseline of a run."""
    call(*QUICK, "--checkpoint-dir", "earlier")
    return tmp_path / "earlier" / "baseline.pth"


def test_an_unfit_baseline_is_named(saved_baseline, fails, tmp_path):
    content = torch.load(saved_baseline, weights_only=True)
    pruned = saved_baseline.with_name("L1NormPruner_0.5.pth")
    bad = tmp_path / "bad.pth"
    weights = content["state_dict"]
    for spoil in (
        lambda: None,  # there is no such file
        lambda: bad.write_bytes(pickle.dumps(Evil(), protocol=2)),
        lambda: torch.save({**content, "accuracy": Evil()}, bad),
        lambda: torch.save(weights, bad),  # of another script, say
        lambda: torch.save({**content, "state_dict": dict([*weights.items()][:-1])}, bad),
        lambda: torch.save({**content, "dataset": "mnist"}, bad),
        lambda: torch.save({**content, "train_images": 60_000}, bad),
        lambda: shutil.copy(pruned, bad),
    ):
        bad.unlink(missing_ok=True)
        spoil()
        assert str(bad) in fails(1, *QUICK_TUNING, "--baseline", bad)
        assert not (tmp_path / "executed").exists()


def test_damaged_models_are_refused_or_have_the_right_shape(saved_baseline, tmp_path):
    rng = random.Random(5)
    sound = saved_baseline.read_bytes()
    bad = tmp_path / "bad.pth"
    refused = 0
    for _ in range(150):
        start = rng.randrange(len(sound))
        damaged = sound[:start]
        if rng.random() < 0.5:  # overwritten, not cut off
            damaged += rng.randbytes(9) + sound[start + 9 :]
        bad.write_bytes(damaged)
        try:
            assert script.load_model(bad).widths == script.WIDTHS
        except script.ExperimentError as error:
            assert str(bad) in str(error)
            refused += 1
    assert 50 < refused < 150


# ----------------------------------------------------------------------------- MNIST files

TRAINING_IMAGES = "train-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """The folder of four small sound files; were one missing, there is no network to get it."""
    monkeypatch.setattr(MNIST, "mirrors", [])
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ARCHIVES:
        shape = (20, 28, 28) if "images" in name else (20,)
        values = torch.randint(256 if "images" in name else 10, shape)
        (raw / Path(name).stem).write_bytes(idx_bytes(values))
    return raw


def test_damaged_data_is_named_and_no_digits_step_in(raw, fails, tmp_path):
    for name, spoil in (
        (TRAINING_IMAGES, lambda c: c[: len(c) // 2]),  # half unpacked
        (TEST_LABELS, lambda c: c[:-1] + bytes([10])),  # a label above 9
        (TEST_LABELS, lambda c: c[:7] + bytes([19]) + c[8:-1]),  # fewer labels than images
        # images of 14 x 56
        (TRAINING_IMAGES, lambda c: c[:8] + bytes((0, 0, 0, 14, 0, 0, 0, 56)) + c[16:]),
        (TRAINING_IMAGES, None),  # one of the four is missing, and cannot be downloaded
    ):
        content = (raw / name).read_bytes()
        if spoil:
            (raw / name).write_bytes(spoil(content))
        else:
            (raw / name).unlink()
        message = fails(1, *QUICK[2:], "--data-dir", tmp_path / "data")
        assert f"delete {raw}" in message
        (raw / name).write_bytes(content)


def test_fuzzed_data_files_are_refused_or_read_right(raw, tmp_path):
    rng = random.Random(3)
    sound = files_of(raw)
    read = refused = 0
    for _ in range(150):
        name = rng.choice(sorted(sound))
        content = sound[name]
        start = rng.choice((rng.randrange(20), rng.randrange(len(content))))
        changed = content[:start]
        if rng.random() < 0.5:  # overwritten, not cut off
            changed += rng.randbytes(1) + content[start + 1 :]
        (raw / name).write_bytes(changed)
        try:
            _, (x, y), test = script.load_data("mnist", tmp_path / "data", None)
            tensors = (x[:, 1:-1, 1:-1], y, *test)
            assert all(map(torch.equal, tensors, read_idx(tmp_path / "data")))
            read += 1
        except script.ExperimentError as error:
            assert f"delete {raw}" in str(error)
            refused += 1
        (raw / name).write_bytes(content)
    assert min(read, refused) > 20


def test_mnist_arrives_from_the_second_mirror(data_dir, tmp_path, monkeypatch):
    raw = data_dir / "MNIST" / "raw"
    login_page = tmp_path / "login_page"  # what a hotel's network gives instead of the files
    login_page.mkdir()
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    resources = []
    for name in ARCHIVES:
        (login_page / name).write_text("<html>Please log in</html>", encoding="utf-8")
        shutil.copy(raw / name, mirror)
        md5 = hashlib.md5((raw / name).read_bytes(), usedforsecurity=False)
        resources.append((name, md5.hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(MNIST, "mirrors", [f"{url}/login_page/", f"{url}/mirror/"])
        name, (x, y), _ = script.load_data(None, tmp_path, None)
        server.shutdown()
    assert (name, len(y)) == ("mnist", len(x))
    assert x[:, 1:-1, 1:-1].equal(read_idx(data_dir)[0])


def test_without_a_network(call, fails, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as deaf:  # it has a port and does not listen: each call is refused
        deaf.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
        monkeypatch.setattr(MNIST, "mirrors", [mirror])
        message = fails(1, *QUICK[2:], "--dataset", "mnist")
        _, out, err = call(*QUICK[2:])
    assert socket.getdefaulttimeout() is None  # the script's own is over
    for text in (message, err):
        assert "MNIST could not be downloaded" in text
        assert mirror in text
        assert "urlopen error" in text  # and the system's reason, in the user's language
        assert f"put its .gz files into {Path('data', 'MNIST', 'raw')}" in text
    assert "NOT MNIST (200 training and 33 test images)" in out


# ------------------------------------------------------------------- folders, room, kills


def test_a_folder_that_cannot_be_made(fails, tmp_path):
    (tmp_path / "file").touch()
    message = fails(1, *QUICK, "--checkpoint-dir", "file/new")  # nothing was trained: no output
    assert f"cannot write {Path('file', 'new', '.writable')}" in message


@pytest.mark.skipif(resource is None, reason="Windows cannot limit the size of a file")
def test_a_full_disk_leaves_earlier_files_whole(call, fails, tmp_path):
    call(*QUICK)
    before = files_of(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to let a file grow beyond 5 kB, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        message = fails(1, *QUICK, "--seed", 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message == "cannot write checkpoints/baseline.pth: File too large"
    assert files_of(tmp_path) == before  # and no temporary file


def test_a_picture_that_cannot_be_written_is_the_last_thing_to_fail(call, tmp_path):
    picture = Path("checkpoints") / "results.png"
    (tmp_path / picture).mkdir(parents=True)
    error, out, _ = call(*QUICK)
    assert f"cannot write {picture}" in str(error)
    assert [*table_of(out)] == ["baseline", "L1NormPruner_0.5"]


def test_a_loss_that_diverges(saved_baseline, call, tmp_path):
    (tmp_path / "checkpoints" / "results.png").mkdir(parents=True)
    error, out, _ = call(*QUICK_TUNING, "--baseline", saved_baseline, "--lr", "1e30")
    assert "lower --lr" in str(error)  # and not the picture, which fails after it
    assert "baseline" in out  # the row before it is shown


def assert_whole(folder: Path) -> None:
    for path in folder.rglob("*.pth"):
        script.load_model(path)
    assert script.read_results([folder / "results.json"])
    assert (folder / "results.csv").read_text(encoding="utf-8").endswith("\n")
    assert (folder / "results.png").read_bytes().endswith(b"IEND\xaeB`\x82")


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to a single process")
def test_ctrl_c_keeps_what_is_ready(tmp_path):
    command = [sys.executable, SCRIPT, *QUICK, "--finetune-epochs", "1000000"]
    # Were Ctrl-C ignored by whatever started pytest, the child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipes)
    watchdog = threading.Timer(TIMEOUT, process.kill)
    watchdog.daemon = True  # it must not keep pytest from ending
    watchdog.start()
    shown = ""
    while not re.search(r" [1-9]\d*/1000000 ", shown):  # an epoch of fine-tuning is over
        shown += process.stderr.read(1)
        assert process.poll() is None, shown
    watchdog.cancel()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert err.endswith("NNI_Pruning.py: interrupted\n")
    assert "Traceback" not in err
    assert [*table_of(out)] == ["baseline"]
    names = {"baseline.pth", "results.json", "results.csv", "results.png"}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == names
    assert_whole(tmp_path / "checkpoints")


# Runs the script, and interrupts it while it writes its first pruned model.
INTERRUPTED = """
import runpy, signal, sys
from pathlib import Path

write_bytes = Path.write_bytes


def write_or_interrupt(path, content):
    if "L1NormPruner" in path.name:
        signal.raise_signal(signal.SIGINT)
    return write_bytes(path, content)


signal.signal(signal.SIGINT, signal.default_int_handler)
Path.write_bytes = write_or_interrupt
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_ends_with_its_status_where_the_picture_fails(tmp_path):
    (tmp_path / "checkpoints" / "results.png").mkdir(parents=True)
    process = run_python(tmp_path, "-c", INTERRUPTED, SCRIPT, *QUICK)
    assert process.returncode == 130
    assert process.stderr.endswith("NNI_Pruning.py: interrupted\n")
    assert "Traceback" not in process.stderr
    assert [*table_of(process.stdout)] == ["baseline"]


# ------------------------------------------------------------------------ consoles and pipes


def test_a_console_that_cannot_show_plus_minus(tmp_path):
    results = tmp_path / "checkpoints" / "results.json"
    picture = results.with_name("results.png")
    run = [*QUICK, "--seeds", 0, 1]
    for options, encoding in ((run, "ascii"), (["--report", results], "cp1251")):
        process = run_python(tmp_path, SCRIPT, *options, encoding=encoding)
        assert process.returncode == 0, process.stderr
        _, rows = script.read_results([results])
        report = script.report(script.as_frame(rows))
        assert " ± " in report
        assert report.encode(encoding, "replace").decode(encoding) in process.stdout
        table = process.stdout[process.stdout.index("\n---") + 1 :].split("\n\n")[0]
        assert len({len(line) for line in table.splitlines()}) == 1  # the columns are aligned
        assert picture.read_bytes().endswith(b"IEND\xaeB`\x82")
        picture.unlink()


@pytest.mark.skipif(os.name == "nt", reason="Windows gives another error for a closed pipe")
def test_a_pipe_that_closes(call, tmp_path):
    call(*QUICK)
    command = [sys.executable, SCRIPT, "--report", "checkpoints/results.json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    variables = environment(PYTHONUNBUFFERED="")
    process = subprocess.Popen(command, cwd=tmp_path, env=variables, **pipes)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(TIMEOUT) == 1


def test_without_docstrings(call, monkeypatch):
    monkeypatch.setattr(script, "__doc__", None)  # as under python -OO
    error, out, _ = call("--help")
    assert error.code == 0
    assert "--checkpoint-dir" in out


# ------------------------------------------------------------------------ kills at any moment


def run_to_a_kill(argv: list[str], write_number: int) -> None:
    """Run the script in a fork, and kill it in the middle of its write of that number.

    The first write has the number 1. With 0, the process that forked does the killing.
    """
    numbers = itertools.count(1)
    write_bytes = Path.write_bytes

    def write_or_die(path, content):
        if next(numbers) != write_number:
            return write_bytes(path, content)
        write_bytes(path, content[: len(content) // 2])
        return os.kill(os.getpid(), 9)  # SIGKILL, a name that Windows lacks

    Path.write_bytes = write_or_die
    torch.set_num_threads(1)  # a fork has no others
    tqdm.set_lock(threading.RLock())  # its own: a killed child would leave the shared lock locked
    script.main(argv)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks what has run torch's threads")
@pytest.mark.skipif(
    torch.accelerator.is_available(), reason="with an accelerator, torch cannot train in a fork"
)
def test_sigkill_at_twenty_moments(call, tmp_path):
    call(*QUICK)
    rng = random.Random(1)
    fork = multiprocessing.get_context("fork")

    def start(*seeds: int, write_number: int = 0):
        argv = [*QUICK, "--seeds", *map(str, seeds)]
        process = fork.Process(target=run_to_a_kill, args=(argv, write_number))
        process.start()
        return process

    for write_number in range(1, 9):
        process = start(rng.randrange(99), write_number=write_number)
        process.join(TIMEOUT)
        assert process.exitcode == -9, write_number
        assert_whole(tmp_path / "checkpoints")
    for _ in range(12):
        seconds = rng.uniform(0, 0.9)
        process = start(*range(40))  # which take longer
        process.join(seconds)
        process.kill()
        process.join()
        assert process.exitcode == -9, seconds
        assert_whole(tmp_path / "checkpoints")
    rows, *_ = call(*QUICK)  # and the next run works, and clears away what they left
    assert len(rows) == 2
    assert not [name for name in files_of(tmp_path / "checkpoints") if name.startswith(".")]
