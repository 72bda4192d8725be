"""Statistics, verdicts, table, picture and result files, against cases worked out by hand."""

import json

import pytest
from matplotlib.figure import Figure
from scipy import stats

import NNI_Pruning as script
from conftest import QUICK, ROOT, accuracy_of, read_idx, saved_weights, table_of

REFERENCE = ROOT / "checkpoints" / "reference"


def rows_of(accuracies: dict[str, list[float]], seeds=None, images=10_000) -> list[dict]:
    """Rows with made-up accuracies, of each name one per seed; a pruned model is L1's or FPGM's."""
    rows = []
    for name, values in accuracies.items():
        pruner, _, sparsity = name.partition("_") if "Pruner" in name else (None, "", None)
        small = sparsity or "scratch" in name
        for seed, accuracy in zip(seeds or range(len(values)), values, strict=True):
            row = {"name": name, "seed": seed, "widths": [1], "epochs": 3, "pruner": pruner}
            row |= {"sparsity": sparsity and float(sparsity), "test_images": images, "macs": 5000}
            row |= {"parameters": 250 if small else 1000, "accuracy": accuracy}
            row |= {"accuracy_before": 10.0 if pruner else None}
            rows.append(row | {"training_seconds": 2.0 + seed if small else 8.0 + seed})
    return rows


def verdicts_of(accuracies: dict[str, list[float]]) -> dict[str, dict]:
    found = script.verdicts(script.as_frame(rows_of(accuracies)))
    return {verdict.pop("claim"): verdict for verdict in found}


def test_interval_of_a_hand_made_case_and_of_scipy():
    # Differences 1, 2, 3: mean 2, standard deviation 1, error 1/sqrt(3); t(0.975, 2) = 4.3027.
    ours, theirs = [51.0, 52.0, 53.0], [50.0, 50.0, 50.0]
    (verdict,) = verdicts_of({"baseline": theirs, "L1NormPruner_0.5": ours}).values()
    assert (verdict["answer"], verdict["seeds"]) == ("cannot tell", 3)
    assert verdict["difference"] == pytest.approx(2)
    assert verdict["low"] == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert verdict["high"] == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)
    # The seeds differ by far more than the models do: only pairing shows the gain.
    ours, theirs = [90.11, 95.10, 99.09, 97.2], [90.0, 95.0, 99.0, 97.1]
    (verdict,) = verdicts_of({"baseline": theirs, "L1NormPruner_0.5": ours}).values()
    interval = stats.ttest_rel(ours, theirs).confidence_interval()
    assert [verdict["low"], verdict["high"]] == pytest.approx([*interval], abs=1e-5)
    assert verdict["answer"] == "yes"


HOLDS = "accuracy holds at 0.5: less than 0.10 pp below baseline"
BETTER = "FPGMPruner_0.5 is better than L1NormPruner_0.5"


def test_answers():
    base, l1, fpgm = "baseline", "L1NormPruner_0.5", "FPGMPruner_0.5"
    noisy = {base: [99.5, 99.4, 99.6], l1: [99.3, 99.6, 99.4], fpgm: [99.4, 99.5, 99.4]}
    worse = {base: [99.5, 99.51, 99.49], l1: [98.0, 98.02, 98.01], fpgm: [98.5, 98.5, 98.51]}
    held = {base: [99.5, 99.4, 99.6], l1: [99.48, 99.39, 99.58], fpgm: [99.48, 99.38, 99.58]}
    for case, answers in ((noisy, ("cannot tell",) * 2), (worse, ("no", "yes"))):
        found = verdicts_of(case)
        assert (found[HOLDS]["answer"], found[BETTER]["answer"]) == answers
    assert verdicts_of(held)[HOLDS]["answer"] == "yes"  # it falls, but by less than 0.1
    same = verdicts_of({base: [99.5, 99.4], l1: [99.9, 99.8]})[HOLDS]  # equal differences
    assert (same["answer"], same["low"], same["high"]) == ("cannot tell", None, None)
    controls = {"baseline_4_more_epochs": [99.9, 99.81], "scratch_0.5_8_epochs": [98.0, 98.01]}
    found = verdicts_of({base: [99.5, 99.4], l1: [99.5, 99.4], **controls})
    assert found[f"{HOLDS}_4_more_epochs"]["answer"] == "no"
    assert found["pruning is better than scratch_0.5_8_epochs"]["answer"] == "yes"


def test_a_line_of_the_table():
    # Seeds in another order, and one of the baseline's without a pruned model: paired by seed all
    # the same. The standard deviation of 99.0 and 99.4 is 0.28 (of the sample; 0.20 of all).
    rows = rows_of({"baseline": [99.5, 99.7, 50.0]}, seeds=[0, 1, 9])
    rows += rows_of({"L1NormPruner_0.5": [99.4, 99.0]}, seeds=[1, 0])
    cells = table_of(script.report(script.as_frame(rows)))["L1NormPruner_0.5"]
    assert cells[:4] == ["10.00 ± 0.00", "99.20 ± 0.28", "-0.40", "250"]
    assert cells[4:] == ["4.0×", "5,000", "2.5 ± 0.7", "3.4×"]  # (8 + 9) / (2 + 3)


def test_one_seed_says_how_far_apart_is_apart():
    rows = rows_of({"baseline": [99.5], "L1NormPruner_0.5": [99.23]})
    # 99.23 % of 10,000, a right and a wrong one added: 1.96 * sqrt(2 * p * (1 - p) / 10,002)
    assert "less than 0.24 pp apart" in script.report(script.as_frame(rows))
    rows = rows_of({"baseline": [100.0], "L1NormPruner_0.5": [100.0]}, images=360)
    assert "less than 0.76 pp apart" in script.report(script.as_frame(rows))  # not 0.00


def test_marks_of_the_picture_are_where_they_belong(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: figures.append(figure))
    rows = rows_of({"baseline": [99.5, 99.7], "FPGMPruner_0.5": [99.0, 99.4]})
    rows += rows_of({"scratch_0.5_3_epochs": [98.0, 98.0]})
    script.draw(script.as_frame(rows), tmp_path / "results.png")
    marks = [[c.lines[0].get_xydata()[0] for c in axes.containers] for axes in figures[0].axes]
    assert [mark.tolist() for mark in marks[0]] == [[1000, 99.6], [250, 99.2], [250, 98]]
    # All the training: the pruned model's 2.5 s after the baseline's 8.5 s.
    assert [mark[0] for mark in marks[1]] == [8.5, 11.0, 2.5]


def test_a_report_of_earlier_runs(call, tmp_path):
    rows, out, _ = call(*QUICK, "--seeds", 0, 1)
    content = json.loads((tmp_path / "checkpoints" / "results.json").read_text())
    assert content["heading"] == out.split("\n\n")[0]
    assert content["rows"] == json.loads(json.dumps(rows))
    again, printed, _ = call("--report", "checkpoints/results.json")
    assert again == content["rows"]
    assert printed == out
    trials = [{"value": json.dumps(content | {"rows": rows[at : at + 2]})} for at in (0, 2)]
    (tmp_path / "trials.json").write_text(json.dumps(trials))
    assert call("--report", "trials.json")[1] == out  # an export of NNI's trials, a seed each
    for row in content["rows"]:
        row["accuracy"] -= 1  # of a run with other settings, say
    (tmp_path / "other.json").write_text(json.dumps(content))
    error, *_ = call("--report", "checkpoints/results.json", "other.json")
    assert "other.json is" in str(error)
    assert "two results" in str(error)
    for text in ("", '{"rows": [{"name": "baseline"}]}', json.dumps({"rows": rows[1:2]})):
        (tmp_path / "other.json").write_text(text)
        error, *_ = call("--report", "other.json")
        assert "other.json is no results.json" in str(error)


def test_reference_models_have_the_accuracies_of_their_results(data_dir):
    *_, images, labels = read_idx(data_dir)
    if len(labels) != 10_000:
        pytest.skip("this is not the real MNIST")
    _, rows = script.read_results([REFERENCE / "results.json"])
    rows = {row["name"]: row for row in rows[::-1]}
    paths = sorted(REFERENCE.glob("*.pth"))
    assert len(paths) == 5
    for path in paths:
        # On another processor sums round otherwise: an image or two may tip over.
        wanted = pytest.approx(rows[path.stem]["accuracy"], abs=0.021)
        assert accuracy_of(saved_weights(path), images, labels) == wanted
