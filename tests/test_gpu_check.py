"""The check of a GPU, walked on the CPU at a tiny size; its figures there mean nothing."""

import json
import sys

import pytest

import gpu_check


def test_the_whole_path_on_the_cpu(tmp_path, monkeypatch, capsys):
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--tiny", "--out", str(out)])
    assert gpu_check.main() == 0
    found = json.loads(out.read_text())
    assert found["failed"] == []
    assert found["machine"]["card"] is None
    assert "tests" not in found  # those are for GPUs
    assert found["generation"]["tokens"] == 4 * 4
    assert found["lmpo"]["update_mfu"] is None
    assert found["lmpo"]["peak_mib"] is None
    assert found["lmpo"]["response_tokens"] == 2 * 2 * 2 * 4
    assert "lmpo.update_seconds" in capsys.readouterr().out


def test_a_part_that_fails_takes_nothing_with_it(tmp_path, monkeypatch):
    def fails(self):
        raise RuntimeError("out of memory")

    out = tmp_path / "found.json"
    monkeypatch.setattr(gpu_check.World, "train", fails)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--tiny", "--out", str(out)])
    assert gpu_check.main() == 1
    found = json.loads(out.read_text())
    assert found["failed"] == ["lmpo"]
    assert found["lmpo"]["error"] == "RuntimeError: out of memory"
    assert found["generation"]["tokens_a_second"] > 0


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert capsys.readouterr().err.startswith("gpu_check: torch sees no GPU")


@pytest.mark.parametrize(
    ("card", "tflops"), [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", None), (None, None)]
)
def test_cards_that_are_not_in_the_table_have_no_peak(card, tflops):
    assert gpu_check.peak_tflops(card) == tflops
