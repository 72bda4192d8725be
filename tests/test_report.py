"""Statistics, verdicts and result files."""

import contextlib
import csv
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys

import pytest
import torch

import NNI_Pruning as script
from conftest import ROOT


def rows_of(accuracies: dict[str, list[float]], images: int = 10_000) -> list[script.Row]:
    """Rows of a run with controls, with made-up accuracies by name, one per seed."""
    rows = []
    seeds = len(next(iter(accuracies.values())))
    for seed in range(seeds):
        jobs = script.planned(seed, script.WIDTHS, 4, 4, script.PRUNERS, [0.5], controls=True)
        rows += [
            script.Row(
                **vars(job),
                parameters=1000 if job.sparsity is None else 250,
                macs=5000,
                test_images=images,
                accuracy_before=10.0 if job.kind == "pruned" else None,
                accuracy=accuracies[job.name][seed],
                training_seconds=8.0 if job.sparsity is None else 2.0,
                training_losses=[0.5],
                training_accuracies=[98.0],
            )
            for job in jobs
            if job.name in accuracies
        ]
    return rows


def answers(rows) -> dict[str, str]:
    return {verdict.claim: verdict.answer for verdict in script.verdicts(rows)}


HOLDS, BETTER = (
    "accuracy holds (falls by less than 0.10 pp) at 0.5",
    "FPGM is better than L1 at 0.5",
)


def test_interval_of_a_hand_made_case():
    # Differences 1, 2, 3: mean 2, standard deviation 1, error 1/sqrt(3); t(0.975, 2) = 4.3027.
    ours, theirs = {0: 51.0, 1: 52.0, 2: 53.0}, {0: 50.0, 1: 50.0, 2: 50.0}
    verdict = script.judge("", ours, theirs, images=1)
    assert verdict.difference == pytest.approx(2)
    assert verdict.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert verdict.high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)
    assert (verdict.answer, verdict.seeds) == ("cannot tell", 3)


def test_differences_are_paired_over_seeds():
    # The seeds differ by far more than the models do; only pairing shows the constant gain.
    ours, theirs = {0: 90.1, 1: 95.1, 2: 99.1}, {2: 99.0, 1: 95.0, 0: 90.0}
    verdict = script.judge("", ours, theirs, images=10_000)
    assert verdict.answer == "yes"
    assert verdict.difference == pytest.approx(0.1)


def test_only_common_seeds_count():
    verdict = script.judge("", {0: 51.0, 1: 52.0, 7: 0.0}, {0: 50.0, 1: 50.0, 3: 99.0}, 100)
    assert (verdict.seeds, verdict.difference) == (2, pytest.approx(1.5))
    assert script.judge("", {0: 51.0}, {1: 50.0}, 100) is None


def test_one_seed_uses_the_binomial_error_and_says_so():
    # Wilson's interval of 90 of 100 by hand: 82.5637 to 94.4773; sqrt(7.4363² + 4.4773²) = 8.6801
    verdict = script.judge("", {0: 90.0}, {0: 90.0}, images=100)
    assert verdict.high == pytest.approx(8.6801, abs=1e-3)
    assert verdict.low == pytest.approx(-8.6801, abs=1e-3)
    rows = rows_of({"baseline": [99.5], "L1NormPruner_0.5": [99.4], "FPGMPruner_0.5": [99.4]})
    assert "binomial" in script.report(rows)


def test_all_right_on_few_images_proves_little():
    # 360 of 360 against 360 of 360: the plain binomial error is 0, and would say "yes".
    verdict = script.judge("", {0: 100.0}, {0: 100.0}, images=360, tolerance=0.1)
    assert verdict.answer == "cannot tell"
    # Wilson's lower end of n of n is n / (n + z²): 1 - 360 / 363.8415 = 1.0558 %
    assert verdict.low == pytest.approx(-1.0558, abs=1e-3)


def test_noise_gives_cannot_tell():
    rows = rows_of(
        {
            "baseline": [99.5, 99.4, 99.6],
            "L1NormPruner_0.5": [99.3, 99.6, 99.4],
            "FPGMPruner_0.5": [99.4, 99.5, 99.4],
        }
    )
    assert answers(rows)[HOLDS] == "cannot tell"
    assert answers(rows)[BETTER] == "cannot tell"


def test_a_fall_gives_no_and_a_gain_yes():
    rows = rows_of(
        {
            "baseline": [99.50, 99.51, 99.49],
            "L1NormPruner_0.5": [98.00, 98.02, 98.01],
            "FPGMPruner_0.5": [98.50, 98.50, 98.51],
        }
    )
    assert answers(rows)[HOLDS] == "no"
    assert answers(rows)[BETTER] == "yes"


def test_no_change_at_all_holds():
    same = [99.5, 99.4, 99.6]
    rows = rows_of({"baseline": same, "L1NormPruner_0.5": same, "FPGMPruner_0.5": same})
    assert answers(rows)[HOLDS] == "yes"
    assert answers(rows)[BETTER] == "cannot tell"


def test_controls_add_their_claims():
    same = [99.5, 99.4]
    rows = rows_of(
        {
            "baseline": same,
            "baseline_4_more": [99.9, 99.8],
            "L1NormPruner_0.5": same,
            "scratch_0.5_8": [98.0, 98.0],
            "scratch_0.5_4": [99.9, 99.8],
        }
    )
    found = answers(rows)
    assert found["... and against the baseline trained as long, at 0.5"] == "no"
    assert found["pruning is better than 8 epochs from scratch at 0.5"] == "yes"
    assert found["pruning is better than 4 epochs from scratch at 0.5"] == "no"


def test_mean_and_deviation_over_seeds():
    rows = rows_of({"baseline": [99.5, 99.7], "L1NormPruner_0.5": [99.0, 99.4]})
    line = next(line for line in script.report(rows).splitlines() if "L1NormPruner" in line)
    cells = re.split(r"\s{2,}", line)
    assert cells[1:5] == ["10.00 ± 0.00", "99.20 ± 0.28", "-0.40", "250"]
    assert cells[5] == "4.0×"
    assert cells[-2:] == ["2.0 ± 0.0", "4.0×"]


# -------------------------------------------------------------------------- of real runs

SMALL = "--subset 600 --epochs 1 --batch-size 64 --width 0.25 --sparsity 0.5".split()


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A run over two seeds with controls: (rows, stdout, folder)."""
    folder = tmp_path_factory.mktemp("report")
    output = io.StringIO()
    argv = [*SMALL, "--seeds", "0", "1", "--controls", "--data-dir", str(data_dir)]
    with contextlib.redirect_stdout(output):
        rows = script.main([*argv, "--checkpoint-dir", str(folder)])
    return rows, output.getvalue(), folder


def test_seeds_and_controls_make_all_their_rows(finished):
    rows, _, folder = finished
    names = ["baseline", "baseline_1_more", "L1NormPruner_0.5", "FPGMPruner_0.5"]
    names += ["scratch_0.5_2", "scratch_0.5_1"]
    assert [(row.seed, row.name) for row in rows] == [(s, n) for s in (0, 1) for n in names]
    saved = {"baseline.pth", "L1NormPruner_0.5.pth", "FPGMPruner_0.5.pth"}
    assert {path.name for path in folder.glob("*.pth")} == saved
    assert {path.name for path in (folder / "seed_1").glob("*.pth")} == saved


def test_json_and_csv_agree_with_the_printed_table(finished):
    rows, stdout, folder = finished
    content = json.loads((folder / "results.json").read_text())
    assert content["format"] == script.RESULTS_FORMAT
    assert {"settings", "versions", "hardware", "rows", "verdicts"} <= content.keys()
    assert script.read_rows(folder / "results.json") == rows
    assert stdout == f"{content['heading']}\n\n{script.report(rows)}\n"
    assert max(map(len, stdout.splitlines())) <= 120
    with (folder / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["name"], int(line["seed"])) for line in lines] == [(r.name, r.seed) for r in rows]
    assert [float(line["accuracy"]) for line in lines] == [row.accuracy for row in rows]


def test_report_prints_the_same_table_again(finished, call):
    _, stdout, folder = finished
    status, again, _ = call("--report", folder / "results.json", "--checkpoint-dir", "again")
    assert status == 0
    assert again.strip() in stdout


def test_picture_is_drawn(finished):
    assert (finished[2] / "results.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_run_goes_on(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, stdout, stderr = call(*SMALL, "--pruner", "L1NormPruner")
    assert status == 0
    assert "L1NormPruner 0.5" in stdout
    assert "results.png was not drawn" in stderr.splitlines()[-1]


def test_killed_after_the_second_row_results_hold_those_two(data_dir, tmp_path):
    command = [sys.executable, script.__file__, "--data-dir", str(data_dir), *SMALL]
    process = subprocess.Popen(
        [*command, "--finetune-epochs", "3"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if line.startswith("3/3"):  # the third row's first epoch is over: two rows are finished
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stderr.close()
    process.wait()
    rows = script.read_rows(tmp_path / "checkpoints" / "results.json")
    assert [row.name for row in rows] == ["baseline", "L1NormPruner_0.5"]


def test_progress_is_one_bar_on_a_terminal(data_dir, tmp_path):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # 100 columns
    command = [sys.executable, script.__file__, "--data-dir", str(data_dir), *SMALL]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(stderr)
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        shown += chunk
    stdout = process.communicate()[0]
    os.close(terminal)
    assert process.returncode == 0
    assert b"%|" in shown
    assert b"FPGMPruner 0.5: epoch 1 of 1" in shown
    assert b"%|" not in stdout


# ------------------------------------------------------------------------ peers' counters


@pytest.fixture(params=[0, 0.1, 0.5, 0.75, 0.99])
def model(request):
    return script.CNN(script.pruned_widths(script.WIDTHS, request.param)).eval()


def test_nni_counts_the_same_parameters_and_macs(model):
    from nni.compression.utils.counter import count_flops_params

    # NNI's "flops" are multiply-accumulates, and it leaves out normalisation's parameters.
    macs, parameters, _ = count_flops_params(model, torch.zeros(1, 1, 28, 28), verbose=False)
    assert parameters + 2 * sum(model.widths[1:3]) == script.count_parameters(model)
    assert macs == script.count_macs(model)


def test_thop_counts_the_same_parameters_and_macs(model):
    thop = pytest.importorskip("thop")
    # It counts normalisation as well: told not to, it must come to our number.
    nothing = {torch.nn.BatchNorm2d: lambda *_: None}
    macs, parameters = thop.profile(model, (torch.zeros(1, 1, 28, 28),), nothing, verbose=False)
    assert parameters == script.count_parameters(model)
    assert macs == script.count_macs(model)


# ------------------------------------------------------------------------- reference run


@pytest.mark.skipif(
    not (ROOT / "checkpoints" / "reference" / "results.json").exists(), reason="no reference run"
)
class TestReference:
    folder = ROOT / "checkpoints" / "reference"

    def test_readme_holds_its_table_and_verdict_word_for_word(self):
        content = json.loads((self.folder / "results.json").read_text())
        rows = script.read_rows(self.folder / "results.json")
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert content["heading"] in readme
        assert script.results_table(rows) in readme
        assert script.verdict_table(rows).strip() in readme
        assert "checkpoints/reference/results.png" in readme

    def test_each_model_has_the_accuracy_of_the_results(self, archives, data_dir):
        if (data_dir / "MNIST/raw/t10k-labels-idx1-ubyte").stat().st_size != 10_008:
            pytest.skip("this is not the real MNIST")
        data = script.load_data("mnist", data_dir, None, "cpu")
        rows = [row for row in script.read_rows(self.folder / "results.json") if row.seed == 0]
        saved = [row for row in rows if row.kind in ("baseline", "pruned")]
        assert {path.stem for path in self.folder.glob("*.pth")} == {row.name for row in saved}
        for row in saved:
            model = script.load_model(self.folder / f"{row.name}.pth")
            accuracy = script.evaluate(model, data.test_images, data.test_labels)
            # On another processor sums round otherwise: an image or two may tip over.
            assert accuracy == pytest.approx(row.accuracy, abs=0.021)
            assert model.widths == row.widths
