"""Statistics, verdicts, table, picture and result files, against cases worked out by hand."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from scipy import stats

import NNI_Pruning as script
from conftest import QUICK, ROOT, files_of, has_accuracy, read_idx, saved_weights, table_of

REFERENCE = ROOT / "checkpoints" / "reference"
SETTINGS = {"dataset": "mnist", "train_images": 60_000, "baseline_epochs": 3}
SETTINGS |= {"finetune_epochs": 3, "batch_size": 256, "lr": 0.01}


def rows_of(accuracies: dict[str, list[float]], seeds=None, images=10_000) -> list[dict]:
    """Rows with made-up accuracies, one per name and seed.

    The name tells what a model is: baseline, baseline_N_more_epochs, scratch_SPARSITY_N_epochs or
    PRUNER_SPARSITY.
    """
    rows = []
    for name, values in accuracies.items():
        first, *rest = name.split("_")
        if "Pruner" in first:
            kind = "pruned"
        elif first == "scratch":
            kind = "scratch"
        else:
            kind = "trained_on" if rest else "baseline"
        is_small = kind in ("pruned", "scratch")
        for seed, accuracy in zip(seeds or range(len(values)), values, strict=True):
            row = {
                "name": name,
                "kind": kind,
                "seed": seed,
                "epochs": 3,
                "pruner": first if kind == "pruned" else None,
                "sparsity": float(rest[0]) if is_small else None,
                "widths": [1],
                "parameters": 250 if is_small else 1000,
                "macs": 5000,
                "accuracy_before": 10.0 if kind == "pruned" else None,
                "accuracy": accuracy,
                "training_seconds": (2.0 if is_small else 8.0) + seed,
                "baseline_id": f"of seed {seed}",
                "test_images": images,
                **SETTINGS,
            }
            rows.append(row)
    return rows


def verdicts_of(accuracies: dict[str, list[float]]) -> dict[str, dict]:
    found = script.verdicts(script.as_frame(rows_of(accuracies)))
    return {verdict.pop("claim"): verdict for verdict in found}


def test_interval_of_a_hand_made_case_and_of_scipy():
    # Differences 1, 2, 3: mean 2, standard deviation 1, error 1/sqrt(3); t(0.975, 2) = 4.3027.
    baseline = [50.0, 50.0, 50.0]
    pruned = [51.0, 52.0, 53.0]
    (verdict,) = verdicts_of({"baseline": baseline, "L1NormPruner_0.5": pruned}).values()
    assert (verdict["answer"], verdict["seeds"]) == ("cannot tell", 3)
    assert verdict["difference"] == pytest.approx(2)
    assert verdict["low"] == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert verdict["high"] == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)
    # The seeds differ by far more than the models do: only pairing shows the gain.
    baseline = [90.0, 95.0, 99.0, 97.1]
    pruned = [90.11, 95.10, 99.09, 97.2]
    (verdict,) = verdicts_of({"baseline": baseline, "L1NormPruner_0.5": pruned}).values()
    interval = stats.ttest_rel(pruned, baseline).confidence_interval()
    assert [verdict["low"], verdict["high"]] == pytest.approx([*interval], abs=1e-5)
    assert verdict["answer"] == "yes"


HOLDS = "L1NormPruner_0.5 is less than 0.10 pp below baseline"
BETTER = "FPGMPruner_0.5 is better than L1NormPruner_0.5"


CASES = {
    "noise": {
        "baseline": [99.5, 99.4, 99.6],
        "L1NormPruner_0.5": [99.3, 99.6, 99.4],
        "FPGMPruner_0.5": [99.4, 99.5, 99.4],
    },
    "both fall far, and L1 further": {
        "baseline": [99.5, 99.51, 99.49],
        "L1NormPruner_0.5": [98.0, 98.02, 98.01],
        "FPGMPruner_0.5": [98.5, 98.5, 98.51],
    },
    "L1 falls by less than 0.1": {
        "baseline": [99.5, 99.4, 99.6],
        "L1NormPruner_0.5": [99.48, 99.39, 99.58],
    },
    "equal differences": {"baseline": [99.5, 99.4], "L1NormPruner_0.5": [99.9, 99.8]},
    "controls": {
        "baseline": [99.5, 99.4],
        "L1NormPruner_0.5": [99.5, 99.4],
        "baseline_4_more_epochs": [99.9, 99.81],
        "scratch_0.5_8_epochs": [98.0, 98.01],
    },
}


@pytest.mark.parametrize(
    ("case", "claim", "answer"),
    [
        ("noise", HOLDS, "cannot tell"),
        ("noise", BETTER, "cannot tell"),
        ("both fall far, and L1 further", HOLDS, "no"),
        ("both fall far, and L1 further", BETTER, "yes"),
        ("L1 falls by less than 0.1", HOLDS, "yes"),
        ("equal differences", HOLDS, "cannot tell"),
        ("controls", f"{HOLDS}_4_more_epochs", "no"),
        ("controls", "L1NormPruner_0.5 is better than scratch_0.5_8_epochs", "yes"),
    ],
)
def test_answers(case, claim, answer):
    assert verdicts_of(CASES[case])[claim]["answer"] == answer


def test_equal_differences_have_no_interval():
    verdict = verdicts_of(CASES["equal differences"])[HOLDS]
    assert verdict["low"] is None
    assert verdict["high"] is None


def test_each_claim_is_about_one_model_and_its_own_size():
    pruned = {f"{pruner}_{s}": [s, s] for pruner in script.PRUNERS for s in (0.5, 0.75)}
    scratch = {f"scratch_{s}_6_epochs": [s, s] for s in (0.5, 0.75)}
    found = verdicts_of({"baseline": [99.0, 98.0], **pruned, **scratch})
    expected = []
    for sparsity in (0.5, 0.75):
        names = [f"{pruner}_{sparsity}" for pruner in script.PRUNERS]
        for name in names:
            expected.append(f"{name} is less than 0.10 pp below baseline")
            expected.append(f"{name} is better than scratch_{sparsity}_6_epochs")
        expected.append(f"{names[1]} is better than {names[0]}")
    assert list(found) == expected


def test_seeds_of_one_baseline_give_no_verdict_against_it():
    rows = rows_of({"baseline": [99.5] * 3, "L1NormPruner_0.5": [98.0, 98.1, 98.2]})
    rows += rows_of({"scratch_0.5_6_epochs": [90.0, 90.1, 90.3]})
    assert HOLDS in script.report(script.as_frame(rows))
    for row in rows:
        row["baseline_id"] = "of seed 0"
    text = script.report(script.as_frame(rows))
    assert HOLDS not in text
    assert "L1NormPruner_0.5 is better than scratch_0.5_6_epochs" in text
    assert "The other verdicts hold for it only" in text
    assert "Several seeds start from one baseline" in text
    # Without a control there is no claim left, but there are several seeds.
    text = script.report(script.as_frame(rows[:6]))
    assert "Several seeds start from one baseline" in text
    assert "With one seed" not in text


def test_a_line_of_the_table():
    # Seeds in another order, and a baseline without a pruned model: rows are still paired by seed.
    # The standard deviation of 99.0 and 99.4 is 0.28 (of the sample; 0.20 of all).
    rows = rows_of({"baseline": [99.5, 99.7, 50.0]}, seeds=[0, 1, 9])
    rows += rows_of({"L1NormPruner_0.5": [99.4, 99.0]}, seeds=[1, 0])
    cells = table_of(script.report(script.as_frame(rows)))["L1NormPruner_0.5"]
    assert cells[:4] == ["10.00 ± 0.00", "99.20 ± 0.28", "-0.40", "250"]
    assert cells[4:] == ["4.0x", "5,000", "2.5 ± 0.7", "3.4x"]  # (8 + 9) / (2 + 3)


def test_of_two_rows_of_a_baseline_that_of_its_training_counts():
    trained = rows_of({"baseline": [99.5], "L1NormPruner_0.5": [99.4]})
    given = rows_of({"baseline": [99.5], "FPGMPruner_0.5": [99.3]})
    given[0]["training_seconds"] = None
    for rows in (trained + given, given + trained):
        table = table_of(script.report(script.as_frame(rows)))
        assert table["baseline"][-2:] == ["8.0", "1.0x"]
        assert table["FPGMPruner_0.5"][-1] == "4.0x"


def test_with_one_seed_the_report_says_which_difference_can_be_chance():
    rows = rows_of({"baseline": [99.5], "L1NormPruner_0.5": [99.23]})
    # 99.23 % of 10,000, a right and a wrong one added: 1.96 * sqrt(2 * p * (1 - p) / 10,002)
    assert "less than 0.24 pp can be chance" in script.report(script.as_frame(rows))
    rows = rows_of({"baseline": [100.0], "L1NormPruner_0.5": [100.0]}, images=360)
    assert "less than 0.76 pp can be chance" in script.report(script.as_frame(rows))  # not 0.00
    # Two seeds, but no model with both: still no verdict.
    rows = rows_of({"baseline": [99.5, 99.6]}) + rows_of({"L1NormPruner_0.5": [99.4]})
    assert "With one seed and 10,000 test images" in script.report(script.as_frame(rows))


@pytest.fixture
def axes_of(monkeypatch, tmp_path):
    """Draw rows, and return the left and the right half of the picture."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, format: figures.append(figure))

    def draw(rows):
        script.draw(script.as_frame(rows), tmp_path / "results.png")
        return figures[-1].axes

    return draw


def test_marks_of_the_picture_are_where_they_belong(axes_of):
    rows = rows_of({"baseline": [99.5, 99.7], "FPGMPruner_0.5": [99.0, 99.4]})
    rows += rows_of({"scratch_0.5_3_epochs": [98.0, 98.0], "baseline_3_more_epochs": [99.8, 99.8]})
    left, right = axes_of(rows)
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == [  # the large models first
        "baseline\n1,000 parameters",
        "baseline_3_more_epochs\n1,000 parameters",
        "FPGMPruner_0.5\n250 parameters",
        "scratch_0.5_3_epochs\n250 parameters",
    ]
    dots = [line.get_xdata().tolist() for line in left.lines if line.get_marker() == "o"]
    assert dots == [[99.5, 99.7], [99.8, 99.8], [99.0, 99.4], [98.0, 98.0]]
    means = [container.lines[0].get_xydata()[0].tolist() for container in left.containers]
    assert means == [[99.6, 0], [99.8, 1], [99.2, 2], [98.0, 3]]
    band = left.patches[0].get_extents().transformed(left.transData.inverted())
    assert [band.x0, band.x1] == pytest.approx([99.5, 99.6])  # from 0.1 below the baseline's mean
    # Two bars for each model: the training of the baseline before it, and its own after that.
    before, own = right.patches[0::2], right.patches[1::2]
    bars = [(bar.get_x(), bar.get_width()) for bar in before]
    assert bars == [(0, 0), (0, 8.5), (0, 8.5), (0, 0)]
    bars = [(bar.get_x(), bar.get_width()) for bar in own]
    assert bars == [(0, 8.5), (8.5, 8.5), (8.5, 2.5), (0, 2.5)]
    baseline, trained_on, pruned, scratch = [bar.get_facecolor() for bar in own]
    assert baseline == trained_on == scratch
    assert pruned != baseline


def test_the_picture_shows_no_training_of_a_given_baseline(axes_of):
    rows = rows_of({"baseline": [99.5], "FPGMPruner_0.5": [99.0]})
    rows[0]["training_seconds"] = None
    _, right = axes_of(rows)
    assert [bar.get_width() for bar in right.patches] == [0, 2.0]  # of the pruned model
    assert [text.get_text() for text in right.texts] == [" 2.0 s"]


def test_a_report_of_earlier_runs(call, tmp_path):
    rows, out, _ = call(*QUICK, "--seeds", 0, 1)
    content = json.loads((tmp_path / "checkpoints" / "results.json").read_text(encoding="utf-8"))
    assert content["heading"] == out.split("\n\n")[0]
    assert content["rows"] == rows
    again, printed, _ = call("--report", "checkpoints/results.json")
    assert again == content["rows"]
    shown = out[: out.index("\n\nSaved: ")]
    picture = Path("checkpoints") / "results.png"
    assert printed == f"{shown}\n\nSaved: {picture}\n"
    # An export of NNI's trials, one for each seed.
    halves = (rows[:2], rows[2:])
    trials = [{"value": json.dumps({**content, "rows": half})} for half in halves]
    (tmp_path / "trials.json").write_text(json.dumps(trials), encoding="utf-8")
    before = files_of(tmp_path)
    _, printed, _ = call("--report", "trials.json")
    assert printed == f"{shown}\n\nSaved: trials.png\n"
    call("--report", "trials.json", "checkpoints/results.json")
    after = files_of(tmp_path)
    assert after.keys() - before.keys() == {"trials.png", "report.png"}
    assert all(after[name] == content for name, content in before.items())  # no picture replaced


def refusal(call, tmp_path, *contents) -> str:
    """The message with which `--report` refuses files of these contents."""
    paths = []
    for number, content in enumerate(contents):
        paths.append(tmp_path / f"{number}.json")
        text = content if isinstance(content, str) else json.dumps(content)
        paths[-1].write_text(text, encoding="utf-8")
    error, out, _ = call("--report", *paths)
    assert isinstance(error, script.ExperimentError)
    assert out == ""
    message = str(error)
    assert str(paths[-1]) in message
    assert "\n" not in message
    return message


OTHER_VALUES = {
    "dataset": "digits",
    "train_images": 6000,
    "test_images": 1000,
    "baseline_epochs": 4,
    "finetune_epochs": 9,
    "batch_size": 64,
    "lr": 0.02,
}


@pytest.mark.parametrize("setting", OTHER_VALUES)
def test_unlike_runs_are_refused_with_what_differs(setting, call, tmp_path):
    rows = rows_of({"baseline": [99.5], "L1NormPruner_0.5": [99.0]}, seeds=[0])
    others = rows_of({"baseline": [99.6], "L1NormPruner_0.5": [99.1]}, seeds=[1])
    runs = [{"heading": "first", "rows": rows}, {"heading": "second", "rows": others}]
    assert call("--report", *write_json(tmp_path, runs))[0] == rows + others
    for row in others:
        row[setting] = OTHER_VALUES[setting]
    message = refusal(call, tmp_path, *runs)
    values = f"{rows[0][setting]} and {OTHER_VALUES[setting]}"
    assert f"the runs differ: {setting} is {values}" in message


def write_json(folder, contents) -> list:
    paths = [folder / f"like_{number}.json" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    return paths


def test_rows_that_do_not_belong_together_are_refused(call, tmp_path):
    accuracies = {"baseline": [99.5, 99.6], "L1NormPruner_0.5": [99.0, 99.1]}
    run = {"heading": "run", "rows": rows_of(accuracies)}

    other_baseline = {"heading": "run", "rows": rows_of(accuracies)}
    other_baseline["rows"][0]["baseline_id"] = "another"
    assert "seed 0 has different baselines" in refusal(call, tmp_path, other_baseline)

    lacks_one = {"heading": "run", "rows": rows_of(accuracies)[1:]}
    assert "seed 0 has no baseline" in refusal(call, tmp_path, lacks_one)

    other_result = {"heading": "run", "rows": rows_of(accuracies)}
    other_result["rows"][3]["accuracy"] = 98.0
    message = refusal(call, tmp_path, run, other_result)
    assert "L1NormPruner_0.5, seed 1, has two results" in message


def test_files_that_are_no_results_are_refused(call, tmp_path):
    run = {"heading": "run", "rows": rows_of({"baseline": [99.5], "L1NormPruner_0.5": [99.0]})}
    enormous = {"heading": "run", "rows": [{**row, "seed": 2**70} for row in run["rows"]]}
    for content in ("", "3", "{}", '{"rows": [{"name": "baseline"}]}', {**run, "rows": []}):
        assert "is not a results.json" in refusal(call, tmp_path, content)
    for content in ({**run, "heading": 5}, {**run, "heading": ["a"]}, {**run, "rows": 7}, enormous):
        assert "is not a results.json" in refusal(call, tmp_path, content)
    error, *_ = call("--report", "missing.json")
    assert "missing.json" in str(error)


def test_reference_models_have_the_accuracies_of_their_results(data_dir):
    *_, images, labels = read_idx(data_dir)
    if len(labels) != 10_000:
        pytest.skip("this is not the real MNIST")
    _, rows = script.read_results([REFERENCE / "results.json"])
    rows = {row["name"]: row for row in rows if row["seed"] == 0}
    paths = sorted(REFERENCE.glob("*.pth"))
    assert len(paths) == 5
    for path in paths:
        accuracy = rows[path.stem]["accuracy"]
        assert has_accuracy(accuracy, saved_weights(path), images, labels)
