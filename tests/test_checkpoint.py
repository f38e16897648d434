"""Checkpoints: whole entries or none, never those of other work, never in the way of anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vmq.checkpoint import Checkpoint
from vmq.errors import OutputError

ARRAYS = {
    "weights/conv.1": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "": np.array(3.5),
    "zero ü": np.array([1, -2], np.int8),
    "none": np.zeros((0, 4), np.float32),
}


def same(found: dict[str, np.ndarray] | None) -> bool:
    return found is not None and list(found) == list(ARRAYS) and all(
        found[n].dtype == a.dtype and found[n].shape == a.shape and np.array_equal(found[n], a)
        for n, a in ARRAYS.items())


def test_what_was_saved_is_loaded(tmp_path: Path):
    folder = tmp_path / "out.unfinished"
    checkpoint = Checkpoint(folder, ["key", 1])
    assert not folder.exists()
    assert checkpoint.load("blocks-0-1") is None
    checkpoint.save("blocks-0-1", ARRAYS)
    checkpoint.save("empty", {})
    assert same(checkpoint.load("blocks-0-1"))
    again = Checkpoint(folder, ["key", 1], resume=True)
    assert same(again.load("blocks-0-1"))
    assert again.load("empty") == {}
    assert again.load("blocks-0-2") is None
    again.save("blocks-0-1", {"other": np.ones(1)})
    assert list(again.load("blocks-0-1") or ()) == ["other"]
    assert len(list(folder.iterdir())) == 2
    again.finish()
    assert list(tmp_path.iterdir()) == []
    again.finish()                                 # there is nothing left to remove


def test_other_work_reads_nothing(tmp_path: Path):
    Checkpoint(tmp_path / "f", {"seed": 0}).save("a", ARRAYS)
    for key in ({"seed": 1}, {"seed": "0"}, None, [{"seed": 0}]):
        assert Checkpoint(tmp_path / "f", key, resume=True).load("a") is None
    assert same(Checkpoint(tmp_path / "f", {"seed": 0}, resume=True).load("a"))


def test_keys_may_hold_anything_and_do_not_depend_on_order(tmp_path: Path):
    Checkpoint(tmp_path / "f", {"a": Path("x"), "b": (1, 2)}).save("a", ARRAYS)
    assert same(Checkpoint(tmp_path / "f", {"b": (1, 2), "a": Path("x")}, resume=True).load("a"))


def test_without_resume_what_is_there_goes(tmp_path: Path):
    Checkpoint(tmp_path / "f", 1).save("a", ARRAYS)
    fresh = Checkpoint(tmp_path / "f", 1)
    assert fresh.load("a") is None
    assert list(tmp_path.iterdir()) == []
    fresh.save("a", ARRAYS)
    assert same(fresh.load("a"))


def test_without_a_folder_it_forgets():
    checkpoint = Checkpoint()
    checkpoint.save("a", ARRAYS)
    assert checkpoint.load("a") is None
    checkpoint.finish()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_nothing(share: float, tmp_path: Path):
    checkpoint = Checkpoint(tmp_path, "k")
    checkpoint.save("a", ARRAYS)
    path, = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    assert Checkpoint(tmp_path, "k", resume=True).load("a") is None


def test_a_damaged_byte_is_noticed_or_harmless(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path, "k")
    checkpoint.save("a", ARRAYS)
    path, = tmp_path.iterdir()
    content = path.read_bytes()
    nothing = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        found = checkpoint.load("a")
        nothing += found is None
        assert found is None or same(found), place
    assert nothing > 0.3 * len(content)


def test_anything_else_under_its_name_is_nothing(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path, "k")
    checkpoint.save("a", ARRAYS)
    path, = tmp_path.iterdir()
    np.savez(path, other=np.ones(2))
    assert checkpoint.load("a") is None
    for content in (b"hello", b""):
        path.write_bytes(content)
        assert checkpoint.load("a") is None


@pytest.mark.parametrize("what", ["notes.txt", "deeper/"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_is_not_ours_is_refused_and_kept(what: str, resume: bool, tmp_path: Path):
    folder = tmp_path / "out.onnx.unfinished"
    Checkpoint(folder, 1).save("a", ARRAYS)
    foreign = folder / what
    foreign.mkdir() if what.endswith("/") else foreign.write_text("mine")
    before = sorted(folder.iterdir())
    with pytest.raises(OutputError, match=r"out\.onnx\.unfinished is in the way.*move it away") as caught:
        Checkpoint(folder, 1, resume)
    assert "\n" not in str(caught.value)
    assert sorted(folder.iterdir()) == before


def test_a_file_in_its_place_is_refused_and_kept(tmp_path: Path):
    path = tmp_path / "f"
    path.write_text("mine")
    with pytest.raises(OutputError, match="is in the way"):
        Checkpoint(path, 1)
    assert path.read_text() == "mine"


def test_where_it_cannot_write_it_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot keep unfinished work in .*; make room there, or give -o") as caught:
        Checkpoint(tmp_path / "file" / "f", 1).save("a", ARRAYS)
    assert "\n" not in str(caught.value)
