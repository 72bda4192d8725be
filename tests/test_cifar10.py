"""The example on CIFAR-10: what its CSV says, against the models it saves."""

import pickle

import pandas as pd
import pytest
import torch
import torchvision

from conftest import REFERENCE

FILES = "data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 batches.meta test_batch"


@pytest.mark.slow
def test_the_csv_agrees_with_the_saved_models(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for name in FILES.split():
        images = torch.randint(256, (100, 3072), dtype=torch.uint8)
        labels = torch.randint(10, (100,))
        content = {"data": images.numpy(), "labels": labels.tolist(), "label_names": []}
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    monkeypatch.syspath_prepend(REFERENCE)
    import cifar10

    results = tmp_path / "reference" / "cifar10.csv"
    results.parent.mkdir()
    monkeypatch.setattr(cifar10, "RESULTS", results)
    monkeypatch.chdir(tmp_path)
    cifar10.main(["--epochs", "1", "--seeds", "0"])

    frame = pd.read_csv(results, dtype={"wrong": str})
    assert frame["name"].nunique() == 6
    for row in frame.to_dict("records"):
        a, b, c = (16, 32, 64) if row["name"] == "baseline" else (8, 16, 32)
        model = cifar10.resnet20(a, b, c).double().eval()
        model.load_state_dict(torch.load(tmp_path / f"cifar10_{row['name']}_0.pth"))
        # The last images made are those of the test.
        is_wrong = model(images.view(-1, 3, 32, 32).double()).argmax(1) != labels
        assert [*map(int, row["wrong"].split())] == is_wrong.nonzero().flatten().tolist()
        assert row["accuracy"] == 100 - is_wrong.sum()
        # The first convolution; the blocks' two each; the shortcuts; BatchNorm; the classifier.
        weights = 27 * a + 54 * a * a + 9 * (a * b + 5 * b * b + b * c + 5 * c * c) + a * b + b * c
        assert row["parameters"] == weights + 14 * (a + b + c) + 10 * c + 10
