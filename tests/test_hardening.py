"""A bad day: kills, full disks, hostile bytes, odd environments, and what a run may touch at all.

Most runs here are forked from one process that has imported everything (the fixture `farm`): a
real process each, with its own files, signals and limits, but in half a second in place of five.
Faults of downloads are in test_download.py, wrong options and unfit .pth files of known kinds in
test_bad_input.py.
"""

import contextlib
import copy
import csv
import ctypes
import gc
import importlib
import io
import itertools
import json
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST

import NNI_Pruning as script
from conftest import ROOT, files_of, idx_bytes

if sys.platform != "linux":
    pytest.skip("the faults are injected by Linux's means", allow_module_level=True)

pytestmark = pytest.mark.slow

TINY = "--dataset digits --subset 400 --epochs 1 --width 0.1 --device cpu".split()
ONE_PRUNER = "--pruner L1NormPruner --sparsity 0.5".split()
QUICK = [*TINY, *ONE_PRUNER]
MODELS = {"baseline.pth", "L1NormPruner_0.5.pth"}  # that QUICK makes
FILES = {*MODELS, "results.json", "results.csv", "results.png"}
SAVES = 8  # of QUICK: whether the folder can be written, 2 models, JSON and CSV twice, the picture
MIB = 2**20

# ------------------------------------------------------------------- a process that forks runs

LATE_IMPORTS = (  # those of the script that are made inside a function
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "nni.compression.pruning"),
    *("nni.compression.speedup", "scipy.stats", "sklearn.datasets", "sklearn.model_selection"),
)


def serve() -> None:
    """Fork a child for each order on stdin; answer with its process id, and later its status."""
    with contextlib.redirect_stdout(io.StringIO()):
        for name in LATE_IMPORTS:
            importlib.import_module(name)
    gc.freeze()  # else a child's collections touch, and so copy, all of these objects
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        elif not (answer := os.fork()):
            break
        print(answer, flush=True)
    else:
        return
    with_end = order.pop("with_end")
    try:
        status = child(**order)
        if not with_end:  # a second is saved
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    finally:
        gc.unfreeze()
    sys.exit(status)


def child(folder: str, argv: list[str] | None, faults: list[list], out: str, err: str) -> int:
    """A run in `folder`, with the functions of this module that `faults` names called before."""
    os.chdir(folder)
    for at, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), *((path, os.O_WRONLY | os.O_CREAT) for path in (out, err))]
    ):
        os.dup2(os.open(path, flags), at)
    torch.set_num_threads(1)
    for name, *values in faults:
        globals()[name](*values)
    return 0 if argv is None else script.command_line(argv)


def wait_until(done) -> None:
    """Call `done` until it gives something; half a minute at most."""
    for _ in range(3000):
        with contextlib.suppress(BlockingIOError):  # a pipe with nothing in it
            if done():
                return
        time.sleep(0.01)
    raise TimeoutError


class Farm:
    """The test's side of serve()."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # for what the children say
        self.numbers = itertools.count()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import conftest, test_hardening as t; t.serve()"],
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **order) -> int:
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, folder: Path, argv, *faults, out=None, err=None, with_end=False) -> Namespace:
        """Start a run.

        Args:
            argv: of the script; None calls the faults alone.
            faults: the name of a function of this module, and its arguments.
            out, err: paths for stdout and stderr in place of files of their own.
            with_end: let the interpreter end as always, flushing its streams; it takes a second.
        """
        number = next(self.numbers)
        out, err = (
            Path(out or self.folder / f"{number}.out"),
            Path(err or self.folder / f"{number}.err"),
        )
        argv = None if argv is None else list(map(str, argv))
        order = {"folder": str(folder), "argv": argv, "faults": faults, "with_end": with_end}
        pid = self.ask(**order, out=str(out), err=str(err))
        return Namespace(pid=pid, out=out, err=err)

    def wait(self, run: Namespace) -> tuple[int, str, str]:
        """(status, stdout, stderr); a status below 0 is the signal that ended the run."""
        status = self.ask(wait=run.pid)
        return status, *(p.read_text() if p.is_file() else "" for p in (run.out, run.err))

    def run(self, folder: Path, argv, *faults: tuple, **keywords) -> tuple[int, str, str]:
        return self.wait(self.start(folder, argv, *faults, **keywords))


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    farm = Farm(tmp_path_factory.mktemp("farm"))
    yield farm
    farm.process.stdin.close()
    farm.process.wait()


@pytest.fixture(scope="module")
def finished(farm, tmp_path_factory) -> Path:
    """The working directory of a run of QUICK; tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    status, _, err = farm.run(folder, QUICK)
    assert status == 0, err
    assert set(files_of(folder / "checkpoints")) == {*FILES, ".lock"}
    return folder


@pytest.fixture
def earlier(finished, tmp_path) -> Path:
    """tmp_path, with an earlier run's files in it; the checkpoint folder."""
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


PROGRESS = re.compile(r"\d+/\d+ [^:]+: epoch \d+ of \d+, loss [\d.]+, [\d.]+ s")


def beside_progress(err: str) -> list[str]:
    """The lines on stderr that are no progress."""
    return [line for line in err.splitlines() if not PROGRESS.fullmatch(line)]


def assert_one_error(err: str, *parts: str) -> None:
    (line,) = beside_progress(err)
    assert line.startswith("NNI_Pruning.py: error: ")
    for part in parts:
        assert part in line


def assert_all_there(folder: Path) -> None:
    """Every file of a run is there and whole."""
    assert set(files_of(folder)) == {*FILES, ".lock"}
    assert_whole(folder)


def assert_whole(folder: Path) -> None:
    for path in folder.rglob("*.pth"):
        script.load_checkpoint(path)
    rows = script.read_rows(folder / "results.json")
    with (folder / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file, restkey="more"))
    assert {row.name for row in rows} | {line["name"] for line in lines} <= {
        Path(name).stem for name in MODELS
    }
    assert all(None not in line.values() and "more" not in line for line in lines)
    picture = (folder / "results.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture.endswith(b"IEND\xaeB`\x82")


# --------------------------------------------------------------------------------- SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Doomed:
    """A file whose writer dies with half of the bytes on disk."""

    def __init__(self, file) -> None:
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        die()


STAGES = ("opened", "half written", "not synced", "not renamed", "renamed")


def kill_in_save(number: int, stage: str) -> None:
    """Die in the number-th save: the hooks see each temporary file that is opened."""
    saves, now = itertools.count(1), []
    path_open, path_replace, fsync = Path.open, Path.replace, os.fsync

    def hooked_open(path, *arguments, **keywords):
        file = path_open(path, *arguments, **keywords)
        now[:] = [stage] if path.suffix == ".tmp" and next(saves) == number else []
        if now == ["opened"]:
            die()
        return Doomed(file) if now == ["half written"] else file

    def hooked_fsync(fd):
        if now == ["not synced"]:
            die()
        fsync(fd)

    def hooked_replace(path, target):
        if now == ["not renamed"]:
            die()
        path_replace(path, target)
        if now == ["renamed"]:
            die()

    Path.open, Path.replace, os.fsync = hooked_open, hooked_replace, hooked_fsync


def assert_old_or_new(before: dict[str, bytes], folder: Path, seed: int) -> None:
    """Each file is as it was before, or whole and of the run with `seed`."""
    assert_whole(folder)
    after = files_of(folder)
    assert not FILES & before.keys() - after.keys()
    changed = {name for name, content in after.items() if content != before.get(name)}
    for name in changed & MODELS:
        assert script.load_checkpoint(folder / name)[1]["seed"] == seed
    if "results.json" in changed:
        assert {row.seed for row in script.read_rows(folder / "results.json")} == {seed}
    strange = changed - FILES - {".lock"}
    assert all(re.fullmatch(r"\..*\.tmp|\.writable", name) for name in strange)
    assert len(strange) <= 1  # what the killed run before this one left is gone


def assert_next_run_works(farm: Farm, folder: Path) -> None:
    """No lock blocks it, and what killed runs left goes."""
    status, _, err = farm.run(folder.parent, [*QUICK, "--seed", 99])
    assert (status, beside_progress(err)) == (0, [])
    assert_all_there(folder)
    assert {script.load_checkpoint(path)[1]["seed"] for path in folder.glob("*.pth")} == {99}


def test_sigkill_inside_a_save(farm, earlier):
    kills = random.Random(1).sample(list(itertools.product(range(1, SAVES + 1), STAGES)), 10)
    for seed, (number, stage) in enumerate(kills, start=1):
        before = files_of(earlier)
        fault = ("kill_in_save", number, stage)
        status, _, _ = farm.run(earlier.parent, [*QUICK, "--seed", seed], fault)
        assert status == -signal.SIGKILL, (number, stage)
        assert_old_or_new(before, earlier, seed)
    assert_next_run_works(farm, earlier)


def test_sigkill_at_any_moment(farm, earlier):
    moments = random.Random(2)
    start = time.monotonic()
    assert_next_run_works(farm, earlier)
    length = time.monotonic() - start
    kills = 0
    for seed in range(1, 100):
        before = files_of(earlier)
        run = farm.start(earlier.parent, [*QUICK, "--seed", seed])
        time.sleep(moments.uniform(0, length))
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGKILL)
        status, _, err = farm.wait(run)
        assert status in (0, -signal.SIGKILL), err
        assert_old_or_new(before, earlier, seed)
        kills += status != 0  # some are over before they are killed: those do not count
        if kills == 10:
            break
    assert kills == 10
    assert_next_run_works(farm, earlier)


def test_sigkill_inside_a_save_of_another_seed(farm, tmp_path):
    # Models of further seeds lie in folders of their own, and so does what a killed run leaves.
    argv = [*QUICK, "--seeds", 0, 1]
    fault = ("kill_in_save", SAVES, "half written")  # in place of the picture: seed 1's baseline
    assert farm.run(tmp_path, argv, fault)[0] == -signal.SIGKILL
    folder = tmp_path / "checkpoints"
    assert [path.parent.name for path in folder.rglob("*.tmp")] == ["seed_1"]
    assert farm.run(tmp_path, argv)[0] == 0
    assert not list(folder.rglob("*.tmp"))
    assert {path.name for path in (folder / "seed_1").iterdir()} == MODELS


# ------------------------------------------------------------------------------- disk full


def limit_file_size(size: int) -> None:
    """No file of this process may grow beyond `size`: the system refuses, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("victim", "size", "baseline"),
    [
        ("baseline.pth", 1000, False),  # the first file of a run
        ("results.json", 1200, True),  # nothing is trained or saved before it
        ("L1NormPruner_0.5.pth", 5000, True),  # NNI's own temporary file is as large
        ("results.png", 20_000, False),  # the last
    ],
)
def test_a_full_disk(victim, size, baseline, farm, finished, earlier):
    before = files_of(earlier)
    # Of another seed, so that a file that were written would differ.
    argv = [*QUICK, "--seed", 5]
    if baseline:
        argv += ["--baseline", finished / "checkpoints" / "baseline.pth"]
    status, _, err = farm.run(earlier.parent, argv, ("limit_file_size", size))
    assert status == 1
    assert_one_error(err)
    if victim != "L1NormPruner_0.5.pth":
        assert_one_error(err, f"cannot write checkpoints/{victim}", "File too large")
    after = files_of(earlier)
    assert after.keys() == before.keys()  # so no temporary file
    assert after[victim] == before[victim]
    assert_whole(earlier)


def test_a_full_disk_under_stdout(farm, earlier):
    picture = (earlier / "results.png").read_bytes()
    status, _, err = farm.run(earlier.parent, [*QUICK, "--seed", 5], out="/dev/full", with_end=True)
    assert status == 1
    assert_one_error(err, "No space left on device")
    assert_all_there(earlier)
    assert (earlier / "results.png").read_bytes() != picture


# ------------------------------------------------------------------------- two runs at once


def hold_the_folder() -> None:
    """Wait inside the run, before the first results are written, and say so with a file."""

    def wait(*_):
        Path("holding").touch()
        signal.pause()

    script.write_results = wait


def test_two_runs_in_one_folder(farm, earlier):
    first = farm.start(earlier.parent, [*QUICK, "--seed", 1], ("hold_the_folder",))
    try:
        wait_until((earlier.parent / "holding").exists)
        before = files_of(earlier)
        assert script.load_checkpoint(earlier / "baseline.pth")[1]["seed"] == 1  # it is at work
        start = time.monotonic()
        status, out, err = farm.run(earlier.parent, [*QUICK, "--seed", 2])
        assert time.monotonic() - start < 5  # it did not wait, and trained nothing
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert_one_error(err, "another run is using checkpoints")
        assert files_of(earlier) == before
    finally:
        os.kill(first.pid, signal.SIGKILL)
        status = farm.wait(first)[0]
    assert status == -signal.SIGKILL
    assert_next_run_works(farm, earlier)


# ------------------------------------------------------------------------- fuzzed data files


def changed_bytes(rng: random.Random, content: bytes, numbers: list[int]) -> bytes:
    """One change of a kind that disks, networks, editors and hostile people make."""
    at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    early = rng.randrange(min(16, len(content) or 1))
    junk = rng.randbytes(rng.choice((1, 2, 4, 784)))
    return rng.choice(
        (
            lambda: content[:early] + rng.randbytes(1) + content[early + 1 :],
            lambda: content[:at] + rng.randbytes(1) + content[at + 1 :],
            lambda: (
                content[: early & ~3]
                + rng.choice(numbers).to_bytes(4, "big")
                # a whole number of the header
                + content[(early & ~3) + 4 :]
            ),
            lambda: content[:at],
            lambda: content[end:],
            lambda: content[:at] + content[end:],
            lambda: content[:at] + junk + content[at:],
            lambda: content[:at] + junk + content[at + len(junk) :],
            lambda: content + junk,
            lambda: content[:at] + bytes(end - at) + content[end:],
            lambda: content + content,
            lambda: rng.randbytes(len(content)),
        )
    )()


def put(path: Path, content: bytes) -> None:
    """Write a new file: to empty an old one, some file systems wait for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def count_in(content: bytes, dimensions: int) -> int | None:
    """The items of a sound idx file; None if it is not one. Written apart from the script's."""
    tail = b"\0\0\0\x1c" * (dimensions - 1)
    header = 8 + len(tail)
    if not content.startswith(bytes((0, 0, 8, dimensions))) or content[8:header] != tail:
        return None
    count = int.from_bytes(content[4:8], "big")
    fits = len(content) == header + count * 784 ** (dimensions == 3)
    return count if count and fits else None


def test_fuzzed_data_files(tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [])  # were a file found missing, nothing is downloaded
    rng = random.Random(3)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    sound = {}
    for name, dimensions in script.MNIST_FILES.items():
        shape, above = ((20, 28, 28), 256) if dimensions == 3 else ((20,), 10)
        sound[name] = idx_bytes(torch.randint(above, shape, generator=generator))
    sizes = [0, 1, 10, 19, 20, 21, 27, 28, 56, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
    outcomes = Counter()
    for case in range(2500):
        now = dict(sound)
        for name in rng.sample(list(now), rng.choice((1, 1, 1, 2))):
            for _ in range(rng.choice((1, 1, 2))):
                now[name] = changed_bytes(rng, now[name], sizes)
            if case % 50 == 0:  # a file under another's name
                now[name] = rng.choice(list(sound.values()))
        for name, content in now.items():
            put(raw / name, content)
        counts = [count_in(now[name], d) for name, d in script.MNIST_FILES.items()]
        fits = None not in counts and counts[0] == counts[1] and counts[2] == counts[3]
        fits = fits and max(now["train-labels-idx1-ubyte"][8:]) < 10
        fits = fits and max(now["t10k-labels-idx1-ubyte"][8:]) < 10
        try:
            parts = script.load_mnist(tmp_path)
        except script.ExperimentError as error:
            assert not fits, case
            assert str(raw) in str(error)
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        assert fits, case
        for content, values in zip(now.values(), itertools.chain(*parts), strict=True):
            assert idx_bytes(values) == content
        outcomes["loaded"] += 1
    assert min(outcomes["refused"], outcomes["loaded"]) > 200  # else it is no test


def test_torchvisions_old_cache_is_not_read(data_dir, tmp_path):
    # Next to raw/, torchvision's MNIST prefers what its versions before 0.9 left in processed/:
    # a file whose counts and shapes nobody has checked.
    folder = tmp_path / "MNIST"
    folder.mkdir()
    (folder / "raw").symlink_to(data_dir / "MNIST" / "raw")
    (folder / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 5, 5), torch.zeros(2)), folder / "processed" / name)
    (images, labels), _ = script.load_mnist(tmp_path)
    wanted = (data_dir / "MNIST" / "raw" / "train-labels-idx1-ubyte").read_bytes()
    assert images.shape == (len(labels), 28, 28)
    assert idx_bytes(labels) == wanted


# ---------------------------------------------------------------------- fuzzed command lines

NUMBERS = ("1", "2", "7", "1000", "1000000000", "٣")
NO_NUMBERS = ("0", "-1", "1.5", "1e3", "x", "", "nan", "9" * 5000, "1000000001", "--")
SHARES = ("0.5", "0.75", ".1", "1e-9", "0.9999999999999999", "5e-1")
NO_SHARES = ("0", "1", "-0.5", "1.0000000001", "inf", "nan", "1e-999", "0,5", "50%", "")
PATHS = (
    *("checkpoints", "new/deep", "sp ace", "ünï ☃", "-x", ".", "", "~", "%s", "{}", "\udcff", "*"),
    *("file", "file/below", "sound.json", "empty.json", "long" * 100, "/proc/none", "/dev/null"),
    *("two\nlines", "/dev/null/below", "\x1b[31m", "sound.json/"),
)
OPTIONS = {  # name: right values, wrong values
    "--data-dir": (PATHS, ()),
    "--dataset": (("mnist", "digits"), ("MNIST", "", "cifar10", "mnist ")),
    "--checkpoint-dir": (PATHS, ()),
    "--epochs": (NUMBERS, NO_NUMBERS),
    "--finetune-epochs": (NUMBERS, NO_NUMBERS),
    "--batch-size": (NUMBERS, NO_NUMBERS),
    "--subset": (NUMBERS, NO_NUMBERS),
    "--lr": (("0.1", "1e-3", "1e300", "5e-324"), ("0", "-1", "inf", "nan", "1e-999", "x", "")),
    "--sparsity": (SHARES, NO_SHARES),
    "--pruner": (script.PRUNERS, ("L1", "", "l1normpruner", "LevelPruner")),
    "--width": (("0.1", "1", "64", "1e-9"), ("0", "64.1", "1e9", "-1", "nan", "x", "")),
    "--seeds": (("0", "1", str(2**63 - 1)), ("-1", str(2**63), "x", "", "0.5")),
    "--seed": (("0", "42"), ("-1", "x")),
    "--device": (("auto", "cpu"), ("tpu", "", "CPU", "cuda:99")),
    "--baseline": (PATHS, ()),
    "--report": (PATHS, ()),
    "--controls": ((), ()),
    "--verbose": ((), ()),
}
LETTERS = "ab 0159.-=+_%'\"\\\t\n\r\x07\x1b\x85\u2028äß☃中٣\u202e\U0001f600\udc80{}[]$*#@!"


def random_command_line(rng: random.Random) -> list[str]:
    argv = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 5))):
        name = rng.choice(list(OPTIONS))
        right, wrong = OPTIONS[name]
        values = [rng.choice(right)] if right else []
        kind = rng.random()
        if kind < 0.12 and wrong:
            values = [rng.choice(wrong)]
        elif kind < 0.16:
            values = ["".join(rng.choices(LETTERS, k=rng.randrange(12)))]
        elif kind < 0.18:
            values = []
        elif kind < 0.20:
            name = rng.choice(("--epoch", "-e", "--", "-", "--Seeds", "--report-all", "-h"))
        elif kind < 0.23:
            values = ["--"]  # argparse drops it, even out of --lr=--
        elif kind < 0.35 and right:
            values += rng.choices(right, k=2)  # one value too many for most
        if values and rng.random() < 0.3:
            argv += [f"{name}={values[0]}", *values[1:]]
        else:
            argv += [name, *values]
    if rng.random() < 0.05:
        argv.insert(rng.randrange(len(argv) + 1), "".join(rng.choices(LETTERS, k=5)))
    return argv


def assert_in_range(options: Namespace) -> None:
    counts = [options.epochs, options.finetune_epochs, options.batch_size, options.subset]
    assert all(count is None or 1 <= count <= 10**9 for count in counts)
    assert all(0 < sparsity < 1 for sparsity in options.sparsity)
    assert all(0 <= seed < 2**63 for seed in options.seeds)
    assert set(options.pruner) <= set(script.PRUNERS)
    assert 0 < options.lr < math.inf
    assert 0 < options.width <= 64
    assert options.device in ("cpu", "cuda", "mps")
    assert isinstance(options.data_dir, Path)
    assert isinstance(options.baseline, Path | None)
    for values in (options.sparsity, options.seeds, options.pruner):
        assert len(set(values)) == len(values) > 0


def command_line(argv: list[str]) -> tuple[int, str, str]:
    """(status, stdout, stderr) of script.command_line, with streams as Python makes them."""
    streams = [
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors)
        for errors in ("strict", "backslashreplace")
    ]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            status = script.command_line(argv)
        except SystemExit as stop:
            status = stop.code or 0
    for stream in streams:
        stream.flush()
    return status, *(stream.buffer.getvalue().decode() for stream in streams)


def test_fuzzed_command_lines(finished, tmp_path, monkeypatch):
    folder = tmp_path / "above" / "here"  # a junk path that leads up stays in tmp_path
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    ran = []
    monkeypatch.setattr(script, "experiment", lambda options, *_: ran.append(options))
    monkeypatch.setattr(script, "draw", lambda *_: None)
    monkeypatch.delenv("NNI_PLATFORM", raising=False)
    (folder / "file").touch()
    (folder / "empty.json").touch()
    shutil.copy(finished / "checkpoints" / "results.json", folder / "sound.json")
    rng = random.Random(4)
    outcomes = Counter()
    failures = {}
    for _ in range(2200):
        argv = random_command_line(rng)
        ran.clear()
        try:
            status, out, err = command_line(argv)
            if ran:
                assert_in_range(ran[0])
        except Exception as error:  # collected, so that one run shows them all
            failures[repr(error)] = argv
            continue
        outcomes[status] += 1
        lines = 0 if status == 0 else 1
        sound = status in (0, 1, 2) and err.count("\n") == lines
        if not sound or not err.startswith("NNI_Pruning.py: error: " * lines) or (lines and out):
            failures[err] = argv
    assert not failures
    assert min(outcomes[status] for status in (0, 1, 2)) > 100, outcomes


# ----------------------------------------------------------------- fuzzed models and results


def test_fuzzed_models(tmp_path):
    rng = random.Random(5)
    path = tmp_path / "model.pth"
    script.save_model(path, script.CNN((3, 2, 2, 3)), dataset="digits", seed=0)
    sound = path.read_bytes()
    pickled = range(sound.index(b"format") - 40, sound.index(b"output.bias") + 300)
    outcomes = Counter()
    for case in range(600):
        content = sound
        for _ in range(rng.choice((1, 1, 1, 3))):
            if case % 2:  # where the dictionary is, most changes mean something
                at = rng.choice(pickled)
                content = content[:at] + rng.randbytes(1) + content[at + 1 :]
            else:
                content = changed_bytes(rng, content, [0, 1, 2**31, 2**32 - 1])
        put(path, content)
        try:
            model, _ = script.load_checkpoint(path)
        except script.ExperimentError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        assert len(model.widths) == 4
        assert all(1 <= width <= script.MAX_WIDTH for width in model.widths)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        assert not model.training
        outcomes["loaded"] += 1
    assert min(outcomes["refused"], outcomes["loaded"]) > 50


def watch_memory(path: str) -> None:
    """Load a hostile file; the megabytes that it took at most go to stdout."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(script.ExperimentError):
        script.load_checkpoint(path)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


def test_a_model_that_unpacks_to_a_thousand_times_its_size(farm, tmp_path):
    path = tmp_path / "bomb.pth"
    buffer = io.BytesIO()
    small = torch.zeros(64, dtype=torch.uint8)
    content = {"format": script.CHECKPOINT_FORMAT, "widths": [1] * 4, "state_dict": {}}
    torch.save({**content, "more": small}, buffer)
    with (
        zipfile.ZipFile(buffer) as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            content = plain.read(name)
            # 64 bytes become 256 MiB: the sizes are single bytes of the pickle, K@, made long.
            if name.endswith("data.pkl"):
                content = content.replace(b"K@", b"J" + (256 * MIB).to_bytes(4, "little"))
            with packed.open(name, "w") as file:
                for _ in range(256 if name.endswith("data/0") else 0):
                    file.write(bytes(MIB))
                if not name.endswith("data/0"):
                    file.write(content)
    assert path.stat().st_size < MIB
    torch.load(path, weights_only=True)  # the file is made right: torch does unpack it
    status, out, err = farm.run(tmp_path, None, ("watch_memory", str(path)))
    assert status == 0, err
    assert int(out) < 64


STRANGE = (
    *(None, True, 0, -1, 1.5, 2**63, 10**400, -(10**400), 1e308, math.nan, math.inf, -0.0, "", "x"),
    *(
        "a\nb",
        "☃" * 50,
        "\udcff",
        [],
        [1],
        ["x"],
        {},
        {"a": 1},
        [[0] * 4],
        "0.5",
        200.0,
        "baseline",
    ),
)


def with_strange_value(rng: random.Random, content: dict) -> str:
    """results.json with a value somewhere in it replaced, deleted or doubled."""
    content = copy.deepcopy(content)
    row = rng.choice(content["rows"])
    kind = rng.random()
    if kind < 0.75:
        row[rng.choice(list(row))] = rng.choice(STRANGE)
    elif kind < 0.80:
        content["rows"] = rng.choice(STRANGE)
    elif kind < 0.85:
        del row[rng.choice(list(row))]
    elif kind < 0.90:
        content["rows"].append(rng.choice([row, *STRANGE]))
    elif kind < 0.95:
        content = [{"value": rng.choice([content, *STRANGE])}]
    else:
        row["training_losses"] = row["training_accuracies"] = rng.choice(STRANGE)
    return json.dumps(content)


def test_fuzzed_results(finished, tmp_path, monkeypatch):
    rng = random.Random(6)
    path = tmp_path / "results.json"
    sound = (finished / "checkpoints" / "results.json").read_text()
    deep = ["[" * 10**5, '{"rows":' * 10**5, "[" * 10**5 + "]" * 10**5]
    texts = [with_strange_value(rng, json.loads(sound)) for _ in range(600)]
    changed = [changed_bytes(rng, sound.encode(), [0, 2**31]) for _ in range(300)]
    draw, outcomes, failures = script.draw, Counter(), {}
    for content in [*(text.encode() for text in [*deep, *texts]), *changed]:
        put(path, content)
        # Drawing takes a fifth of a second.
        monkeypatch.setattr(script, "draw", draw if outcomes[0] % 8 == 0 else lambda *_: None)
        argv = ["--report", str(path), "--checkpoint-dir", str(tmp_path)]
        try:
            status, out, err = command_line(argv)
        except Exception as error:  # collected, so that one run shows them all
            failures[repr(error)] = content[-2000:]
            continue
        outcomes[status] += 1
        if (status, err.count("\n"), bool(out)) not in ((0, 0, True), (1, 1, False)):
            failures[err] = content[-2000:]
    assert not failures
    assert min(outcomes[0], outcomes[1]) > 50, outcomes


# ----------------------------------------------------------------------------- environments


def environment(**changes: str | None) -> dict[str, str]:
    """Of this process, with changes; None takes a variable away."""
    new = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return {name: value for name, value in new.items() if value is not None}


def start(*arguments, **keywords) -> subprocess.CompletedProcess:
    """The script as a process, in a working directory and environment of the test's."""
    command = [sys.executable, ROOT / "NNI_Pruning.py", *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **keywords
    )


def without_roots_powers() -> None:
    """Let the permissions of files bind root, too: drop CAP_DAC_OVERRIDE for what is executed."""
    pr_capbset_drop, cap_dac_override = 24, 1
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


def test_no_home_and_a_working_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()  # no folder can be made below it, not even by root
    home = environment(HOME=str(tmp_path / "file" / "home"), XDG_CACHE_HOME=None, USER=None)
    here = tmp_path / "read-only"
    here.mkdir(mode=0o555)
    keywords = {"env": home, "cwd": here, "preexec_fn": without_roots_powers}
    probe = subprocess.run(["touch", "probe"], capture_output=True, check=False, **keywords)
    if probe.returncode == 0:
        pytest.skip("here every folder can be written")
    process = start(*QUICK, "--checkpoint-dir", tmp_path / "checkpoints", **keywords)
    assert (process.returncode, beside_progress(process.stderr)) == (0, [])
    assert_all_there(tmp_path / "checkpoints")
    process = start(*QUICK, **keywords)
    assert (process.returncode, process.stderr.count("\n")) == (1, 1)
    assert_one_error(process.stderr, "checkpoint folder checkpoints", "Permission denied")


def test_paths_and_a_terminal_without_unicode(data_dir, tmp_path):
    (tmp_path / "-d äta ☃").symlink_to(data_dir)
    process = start(
        *("--data-dir=-d äta ☃", "--checkpoint-dir=-new/chéck 'point\" ☃"),
        *("--dataset", "mnist", "--subset", "300", "--epochs", "1", "--width", "0.1", *ONE_PRUNER),
        cwd=tmp_path,
        env=environment(LC_ALL="C", PYTHONIOENCODING="ascii", HOME=None, PYTHONUTF8="0"),
    )
    assert (process.returncode, beside_progress(process.stderr)) == (0, [])
    assert process.stdout.isascii()
    assert "MNIST" in process.stdout
    assert_all_there(tmp_path / "-new" / "chéck 'point\" ☃")
    assert len(list(tmp_path.iterdir())) == 2


def set_term(value: str) -> None:
    os.environ["TERM"] = value


def test_a_dumb_terminal_gets_plain_lines(farm, tmp_path):
    ours, theirs = pty.openpty()
    run = farm.start(tmp_path, QUICK, ("set_term", "dumb"), err=os.ttyname(theirs))
    status = farm.wait(run)[0]
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    os.close(theirs)
    assert status == 0
    assert len(shown.splitlines()) == 2
    assert beside_progress(shown.replace("\r\n", "\n")) == []


def test_a_reader_of_both_streams_that_leaves_early(farm, tmp_path):
    # `2>&1 | head -1`: nobody sees the progress or the table, but the models were asked for.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run = farm.start(tmp_path, QUICK, out=pipe, err=pipe, with_end=True)
    wait_until(lambda: os.read(reader, 40))
    os.close(reader)
    assert farm.wait(run)[0] == 0
    assert_all_there(tmp_path / "checkpoints")


@pytest.mark.parametrize("argv", [["--help"], ["--report", "checkpoints/results.json"], QUICK])
def test_nobody_reads_stdout(argv, farm, earlier, tmp_path):
    # As `| head -1` on a bad day: the reader has gone before the first byte. Nothing is shown at
    # the process's end either, and all that the run was to make is there.
    if argv != ["--help"]:
        (earlier / "results.png").unlink()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run = farm.start(tmp_path, argv, ("wait_for", "gone"), out=pipe, with_end=True)
    wait_until((tmp_path / "opened").exists)
    os.close(reader)
    (tmp_path / "gone").touch()
    status, _, err = farm.wait(run)
    assert (status, beside_progress(err)) == (0, [])
    assert_all_there(earlier)


def wait_for(name: str) -> None:
    Path("opened").touch()
    wait_until(Path(name).exists)


def without(stream: str) -> None:
    """As `>&-` does it: Python finds the stream closed and makes it None."""
    setattr(sys, stream, None)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_is_closed_from_the_start(stream, farm, tmp_path):
    status, out, err = farm.run(tmp_path, QUICK, ("without", stream), with_end=True)
    assert (status, beside_progress(err)) == (0, [])
    assert ("L1NormPruner 0.5" in out) == (stream == "stderr")
    assert_all_there(tmp_path / "checkpoints")


def one_core_and_little_memory() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    # Not RLIMIT_AS: torch's libraries for CUDA alone take more addresses, of which few are used.
    resource.setrlimit(resource.RLIMIT_DATA, (1536 * MIB, 1536 * MIB))


def test_one_core_and_little_memory(data_dir, tmp_path):
    # On the whole data set, and as many threads as torch likes.
    argv = ["--data-dir", data_dir, "--dataset", "mnist", "--epochs", 1, "--width", 0.1]
    command = [sys.executable, ROOT / "NNI_Pruning.py", *argv, *ONE_PRUNER, "--device", "cpu"]
    with (tmp_path / "out").open("w+") as out, (tmp_path / "err").open("w+") as err:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=tmp_path,
            env=environment(OMP_NUM_THREADS=None),
            stdout=out,
            stderr=err,
            preexec_fn=one_core_and_little_memory,  # noqa: PLW1509 - it starts no thread
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (tmp_path / "err").read_text()
    assert "1 threads" in (tmp_path / "out").read_text()
    assert usage.ru_maxrss < 1536 * 1024  # kilobytes
    assert_all_there(tmp_path / "checkpoints")


# -------------------------------------------------------------------------- widths, repetition

SPARSITIES = (0.01, 0.1, 0.33, 0.9, 0.99)


@pytest.mark.parametrize("width", [0.3, 0.03, 0.001])
def test_widths_that_do_not_divide(width, farm, tmp_path):
    # At 0.3 no share is whole; of a layer with one or two channels hardly any can go.
    argv = ["--dataset", "digits", "--subset", 400, "--epochs", 1, "--width", width]
    status, _, err = farm.run(tmp_path, [*argv, "--device", "cpu", "--sparsity", *SPARSITIES])
    assert (status, beside_progress(err)) == (0, [])
    layers = script.scaled_widths(width)
    assert all(
        abs(a - b * width) <= 0.5 or a <= 2 for a, b in zip(layers, script.WIDTHS, strict=True)
    )
    rows = script.read_rows(tmp_path / "checkpoints" / "results.json")
    wanted = [("baseline", layers)]
    wanted += [
        (f"{pruner}_{sparsity}", tuple(n - math.floor(n * sparsity) for n in layers))
        for pruner in script.PRUNERS
        for sparsity in SPARSITIES
    ]
    assert [(row.name, row.widths) for row in rows] == wanted
    for row in rows:
        assert min(row.widths) >= 1
        assert len(row.training_losses) == 1  # it was fine-tuned
        path = tmp_path / "checkpoints" / f"{row.name}.pth"
        assert script.load_model(path).widths == row.widths


def test_a_baseline_of_zeros(farm, tmp_path):
    # A sound file by every check, in which no channel is better than another.
    model = script.CNN(script.scaled_widths(0.1))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    script.save_model(tmp_path / "zeros.pth", model, dataset="digits")
    status, _, err = farm.run(tmp_path, [*QUICK, "--baseline", "zeros.pth"])
    assert "Traceback" not in err
    assert len(beside_progress(err)) == (1 if status else 0)
    assert status in (0, 1)


def repeat(times: int) -> None:
    """Run experiments in this process; memory, open files and threads after each go to stdout."""
    gc.unfreeze()  # the collections come as seldom as in any process
    for _ in range(times):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            script.main([*QUICK, "--subset", "100"])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(list(Path("/proc/self/fd").iterdir()))
        print(pages, files, len(list(Path("/proc/self/task").iterdir())), flush=True)


def test_25_experiments_in_one_process(farm, tmp_path):
    status, out, err = farm.run(tmp_path, None, ("repeat", 25))
    assert status == 0, err
    pages, files, threads = zip(*(map(int, line.split()) for line in out.splitlines()), strict=True)
    assert len(pages) == 25
    assert max(pages[4:]) < 1.05 * pages[4]
    assert len(set(files[4:])) == 1
    assert len(set(threads[4:])) == 1


# -------------------------------------------------------------------------------- security

# Run with the hook in place before the first import. Events: what, and where or with what.
AUDITED = """
import json, os, sys
events, watching = [], True
changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
paths = {"os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.rename", "os.link", "os.symlink"}
paths |= {"os.chmod", "os.chown", "os.utime", "os.mkfifo", "os.mknod", "os.setxattr"}
starts = ("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "subprocess.", "pty.", "os.exec")
starts += ("os.system", "os.posix_spawn", "os.spawn", "os.fork", "pickle.", "marshal.load")

def hook(event, values):
    if not watching:
        return
    if event == "open":
        path, _, flags = values
        if isinstance(flags, int) and flags & changing and not isinstance(path, int):
            events.append(("write", os.path.realpath(os.fsdecode(path))))
    elif event in paths:
        two = 2 if event in ("os.rename", "os.link", "os.symlink") else 1
        for path in values[:two]:
            if not isinstance(path, int):
                events.append(("write", os.path.realpath(os.fsdecode(path))))
    elif event.startswith(starts) and event != "marshal.loads":
        events.append((event, [str(value) for value in values]))

sys.addaudithook(hook)
sys.dont_write_bytecode = True
settings = json.loads(sys.argv[1])
sys.path.insert(0, settings["root"])
import NNI_Pruning as script
script.main(settings["argv"])
found = {"run": events[:]}
events.clear()
from torchvision.datasets import MNIST
MNIST.mirrors = settings["mirrors"]
script.main(settings["download"])
found["download"] = events[:]
watching = False
with open(settings["events"], "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def audited(data_dir, tmp_path_factory):
    """The audit events of the main job with MNIST on disk, and of one without; the folders."""
    folder = tmp_path_factory.mktemp("audited").resolve()
    temporary = folder / "temporary"
    temporary.mkdir()
    small = "--subset 300 --epochs 1 --width 0.1 --device cpu".split()
    settings = {
        "root": str(ROOT),
        "argv": ["--data-dir", str(data_dir), *small],
        "mirrors": ["http://127.0.0.1:9/a/", "http://127.0.0.1:9/b/"],  # nobody listens there
        "download": ["--data-dir", "data", "--checkpoint-dir", "other", *small, *ONE_PRUNER],
        "events": str(folder / "events.json"),
    }
    process = subprocess.run(
        [sys.executable, "-c", AUDITED, json.dumps(settings)],
        cwd=folder,
        env=environment(TMPDIR=str(temporary), no_proxy="*", TORCHINDUCTOR_CACHE_DIR=None),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads((folder / "events.json").read_text()), folder, temporary


def of_kind(audited, *starts: str) -> dict[str, list]:
    return {
        when: [(event, values) for event, values in events if event.startswith(starts)]
        for when, events in audited[0].items()
    }


def test_nothing_is_written_elsewhere(audited):
    import matplotlib as mpl

    _, folder, temporary = audited
    # ModelSpeedup keeps a state_dict in a temporary file for a moment, and torch makes an empty
    # folder there; matplotlib makes its own two folders where they are not, and lists the fonts.
    own = [folder / "checkpoints", folder / "other", folder / "data", temporary]
    own += [Path(mpl.get_configdir()).resolve(), Path(mpl.get_cachedir()).resolve()]
    written = {
        Path(path)
        for events in of_kind(audited, "write").values()
        for _, path in events
        if path != os.devnull
    }
    assert folder / "checkpoints" / "results.json" in written  # the hook does see
    assert {path for path in written if not any(path.is_relative_to(o) for o in own)} == set()
    assert {path.name for path in folder.iterdir()} == {
        *("checkpoints", "other", "data", "temporary", "events.json")
    }
    assert not [path for path in temporary.rglob("*") if path.is_file()]


def test_no_program_is_started(audited):
    found = of_kind(audited, "subprocess.", "os.", "pty.")
    # Where torch is built for CUDA, its import asks ldconfig for the libraries.
    events = [e for when in found.values() for e in when if "ldconfig" not in e[1][0]]
    assert events == []


def test_nothing_is_unpickled(audited):
    assert of_kind(audited, "pickle.", "marshal.load") == {"run": [], "download": []}


def test_the_only_connections_are_torchvisions_download(audited):
    found = of_kind(audited, "socket.", "urllib.", "http.", "ftplib.", "smtplib.")
    # urllib3, which NNI imports, looks whether IPv6 is there: a socket that is never connected.
    quiet = {"socket.__new__", "socket.bind"}
    assert {event for event, _ in found["run"]} <= quiet
    assert all("'::1'" in values[1] for event, values in found["run"] if event == "socket.bind")
    events = [(event, values) for event, values in found["download"] if event not in quiet]
    reached = {values[1] for event, values in events if event == "socket.connect"}
    assert reached == {"('127.0.0.1', 9)"}
    names = {values[0] for event, values in events if event.startswith("socket.get")}
    assert names <= {"127.0.0.1"}
    asked = {values[0] for event, values in events if event == "urllib.Request"}
    assert asked
    assert all(url.startswith("http://127.0.0.1:9/") for url in asked)
