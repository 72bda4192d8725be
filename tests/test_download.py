"""How MNIST arrives: from mirrors that are sound, broken or silent, and from archives on disk.

The mirrors are HTTP servers on this machine, so torchvision's own download code runs as it would
on the internet. Its checksums are replaced by those of the served archives, which may be made of
scikit-learn's digits.
"""

import gzip
import hashlib
import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST

import NNI_Pruning as script
from conftest import ARCHIVES, ROOT, files_of

SILENCE = 10  # seconds, of a silent mirror: longer than a whole test may take
ALL_FILES = {*ARCHIVES, *script.MNIST_FILES}

# ----------------------------------------------------------------------- mirrors and faults


class Handler(BaseHTTPRequestHandler):
    """Gives the requested archive to the server's `answer`, which does with it what it likes."""

    def do_GET(self):
        path = self.server.folder / Path(self.path).name
        self.server.answer(self, path.read_bytes())

    def begin(self, length, kind="application/gzip"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """Clients hang up early on purpose (torchvision asks twice): that is no error here."""


def sound(request, content):
    request.begin(len(content))
    request.wfile.write(content)


def not_found(request, content):
    request.send_error(404)


def html_page(request, content):
    """What a hotel's network answers to everything."""
    page = b"<html><body>Please log in</body></html>"
    request.begin(len(page), "text/html")
    request.wfile.write(page)


def wrong_bytes(request, content):
    request.begin(len(content))
    request.wfile.write(content[:-1] + bytes([content[-1] ^ 1]))


def cut(request, content):
    request.begin(len(content))
    request.wfile.write(content[: len(content) // 2])


def silent(request, content):
    request.server.test_is_over.wait(SILENCE)


def falls_silent(request, content):
    cut(request, content)
    silent(request, content)


@pytest.fixture
def mirror(archives):
    """Start a mirror on a free port and return its address; each mirror ends with the test."""
    servers = []

    def start(answer=sound) -> str:
        server = Server(("127.0.0.1", 0), Handler)
        server.folder, server.answer, server.test_is_over = archives, answer, threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.test_is_over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def refusing():
    """The address of a port that is taken but not listened on: connections to it are refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/"


@pytest.fixture(autouse=True)
def checksums(archives, monkeypatch) -> list:
    """Have torchvision expect the served archives, and reach them without any proxy."""
    resources = [(n, hashlib.md5((archives / n).read_bytes()).hexdigest()) for n in ARCHIVES]
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setenv("no_proxy", "*")
    return resources


@pytest.fixture
def use(monkeypatch):
    """Set the mirrors that torchvision knows."""
    return lambda *urls: monkeypatch.setattr(MNIST, "mirrors", list(urls))


# ------------------------------------------------------------------------ what is expected


@pytest.fixture(scope="module")
def contents(archives) -> dict[str, bytes]:
    """The unpacked files by name."""
    return {Path(name).stem: gzip.decompress((archives / name).read_bytes()) for name in ARCHIVES}


@pytest.fixture(scope="module")
def expected(contents) -> list[torch.Tensor]:
    """The four tensors, read from the bytes by hand: 16 bytes of header before images, 8 before
    labels.
    """
    tensors = []
    for name, content in contents.items():
        shape, header = ((-1, 28, 28), 16) if "images" in name else ((-1,), 8)
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)
        tensors.append(values.view(shape))
    return tensors


@pytest.fixture
def raw(tmp_path) -> Path:
    """The folder, not there yet, in which a test's MNIST is to arrive."""
    return tmp_path / "new" / "data" / "MNIST" / "raw"


def assert_arrived(raw: Path, expected, contents) -> None:
    """load_mnist gives the expected tensors, and only the eight whole files lie in the folder."""
    parts = script.load_mnist(raw.parent.parent)
    for got, wanted in zip(itertools.chain(*parts), expected, strict=True):
        assert got.dtype == (torch.int64 if got.dim() == 1 else torch.uint8)
        assert torch.equal(got, wanted.to(got.dtype))
    assert {path.name for path in raw.iterdir()} == ALL_FILES  # no staging folder, no half file
    assert all((raw / name).read_bytes() == content for name, content in contents.items())


def put_archives(archives: Path, raw: Path, names=ARCHIVES) -> None:
    raw.mkdir(parents=True)
    for name in names:
        shutil.copy(archives / name, raw)


def spoil(path: Path) -> None:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ----------------------------------------------------------------------------------- tests


def test_everything_arrives_whole(mirror, use, raw, expected, contents, capsys):
    use(mirror())
    assert_arrived(raw, expected, contents)
    assert capsys.readouterr() == ("", "")  # torchvision's progress bars are not shown


@pytest.mark.parametrize(
    "fault",
    [None, not_found, html_page, wrong_bytes, cut, silent, falls_silent],
    ids=lambda fault: fault.__name__ if fault else "refused",
)
def test_the_second_mirror_helps_when_the_first_fails(
    fault, mirror, refusing, use, raw, expected, contents, monkeypatch, capsys
):
    monkeypatch.setattr(script, "DOWNLOAD_TIMEOUT", 0.5)
    before, start = socket.getdefaulttimeout(), time.monotonic()
    use(mirror(fault) if fault else refusing, mirror())
    assert_arrived(raw, expected, contents)
    assert time.monotonic() - start < SILENCE  # a silent mirror was not waited for
    assert capsys.readouterr() == ("", "")
    assert socket.getdefaulttimeout() == before  # the rest of the process keeps its own


def test_without_a_network_the_digits_step_in(refusing, use, raw, capsys):
    use(refusing, refusing)
    data = script.load_data(None, raw.parent.parent, subset=None, device="cpu")
    assert data.name == "digits"
    assert "NOT MNIST" in str(data)
    assert len(data.train_labels) + len(data.test_labels) == 1797
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for part in (str(raw), refusing, "refused", "digits"):
        assert part in err
    assert not list(raw.iterdir())


def test_without_a_network_mnist_by_name_is_an_error_that_helps(refusing, use, raw):
    use(refusing)
    with pytest.raises(script.ExperimentError) as caught:
        script.load_data("mnist", raw.parent.parent, subset=None, device="cpu")
    assert caught.value.status == 1
    for part in (*ARCHIVES, str(raw), refusing, "refused"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(raw.iterdir())


def test_a_folder_that_cannot_be_written_lets_the_digits_step_in(tmp_path, use, capsys):
    use()
    (tmp_path / "file").touch()  # even root makes no folder below a file
    assert script.load_data(None, tmp_path / "file", subset=None, device="cpu").name == "digits"
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "cannot be written" in err


@pytest.mark.parametrize("fault", [not_found, cut, wrong_bytes])
def test_a_download_broken_off_leaves_only_whole_files(fault, mirror, use, raw, contents, archives):
    def first_file_only(request, content):
        (sound if request.path.endswith(ARCHIVES[0]) else fault)(request, content)

    use(mirror(first_file_only))
    with pytest.raises(script.NoMNISTError):
        script.load_mnist(raw.parent.parent)
    unpacked = Path(ARCHIVES[0]).stem
    assert {path.name for path in raw.iterdir()} == {ARCHIVES[0], unpacked}
    assert (raw / ARCHIVES[0]).read_bytes() == (archives / ARCHIVES[0]).read_bytes()
    assert (raw / unpacked).read_bytes() == contents[unpacked]


def test_archives_on_disk_need_no_network(archives, refusing, use, raw, expected, contents):
    use(refusing)
    put_archives(archives, raw)
    assert_arrived(raw, expected, contents)


def test_only_what_is_missing_is_downloaded(archives, mirror, use, raw, expected, contents):
    asked = set()

    def remember(request, content):
        asked.add(Path(request.path).name)
        sound(request, content)

    use(mirror(remember))
    put_archives(archives, raw, ARCHIVES[:2])
    assert_arrived(raw, expected, contents)
    assert asked == set(ARCHIVES[2:])


@pytest.mark.parametrize("dataset", [None, "mnist"])
def test_a_wrong_archive_on_disk_is_named(dataset, archives, refusing, use, raw, capsys):
    use(refusing)
    put_archives(archives, raw)
    spoil(raw / ARCHIVES[3])
    before = files_of(raw)
    with pytest.raises(script.ExperimentError) as caught:
        script.load_data(dataset, raw.parent.parent, subset=None, device="cpu")
    assert str(raw / ARCHIVES[3]) in str(caught.value)
    assert "delete" in str(caught.value)
    assert before.items() <= files_of(raw).items()  # nothing of the user's is changed
    assert "digits" not in capsys.readouterr().err  # damage is not absence: no quiet way round it


def test_a_wrong_archive_on_disk_is_replaced_from_the_network(
    archives, mirror, use, raw, expected, contents
):
    use(mirror())
    put_archives(archives, raw)
    spoil(raw / ARCHIVES[0])
    assert_arrived(raw, expected, contents)


def test_a_replaced_archive_is_not_blamed_for_the_next_failure(archives, mirror, use, raw):
    def first_file_only(request, content):
        (sound if request.path.endswith(ARCHIVES[0]) else not_found)(request, content)

    use(mirror(first_file_only))
    put_archives(archives, raw, ARCHIVES[:1])
    spoil(raw / ARCHIVES[0])
    with pytest.raises(script.NoMNISTError, match="404"):
        script.load_mnist(raw.parent.parent)


def test_two_runs_may_download_into_one_folder(mirror, use, raw, expected, contents, checksums):
    first_requests, together = itertools.count(), threading.Barrier(2)

    def wait_for_both(request, content):
        if next(first_requests) < 2:  # each run's first request: neither is ahead of the other
            together.wait(60)
        sound(request, content)

    settings = {"mirrors": [mirror(wait_for_both)], "resources": checksums}
    program = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from torchvision.datasets import MNIST
import NNI_Pruning as script
script.DOWNLOAD_TIMEOUT = 60
for name, value in json.loads({json.dumps(settings)!r}).items():
    setattr(MNIST, name, value)
for part in script.load_mnist(Path({str(raw.parent.parent)!r})):
    print(*(int(values.sum()) for values in part))
"""
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([sys.executable, "-c", program], **keywords) for _ in range(2)]
    try:
        ends = [run.communicate(timeout=60) for run in runs]
    finally:
        for run in runs:
            run.kill()
    train, test = expected[:2], expected[2:]
    sums = "".join(" ".join(str(int(v.sum())) for v in part) + "\n" for part in (train, test))
    assert ends == [(sums, "")] * 2
    assert [run.returncode for run in runs] == [0, 0]
    use()  # what lies there now needs no network
    assert_arrived(raw, expected, contents)
