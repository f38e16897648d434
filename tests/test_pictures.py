"""tools/pictures draws what the models give: moments, differences, and a column of pixels over time."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import tiny_matting as tiny
from numpy.typing import NDArray

SIZE = (16, 24)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "tools")
    return importlib.import_module("pictures")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    tiny.save(tmp_path / "float.onnx", SIZE)
    tiny.save(tmp_path / "free.onnx", ("height", "width"), foreground=False)
    tiny.save_pictures(tmp_path / "clip" / "com", tiny.frames(8, SIZE))
    return [f"FP32={tmp_path / 'float.onnx'}", str(tmp_path / "free.onnx"), "--clip", str(tmp_path / "clip"),
            "--width", str(SIZE[1]), "-o", str(tmp_path / "out.png")]


def tile(picture: NDArray[np.uint8], across: int, down: int, pictures: ModuleType) -> NDArray[np.int64]:
    """A tile of the picture, [h,w,3] RGB."""
    top, left = pictures.HEADER + down * (SIZE[0] + pictures.HEADER), across * (SIZE[1] + pictures.MARGIN)
    return picture[top:top + SIZE[0], left:left + SIZE[1]].astype(np.int64)


def test_tiles_hold_what_the_models_give(pictures: ModuleType, arguments: list[str], tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert pictures.main([*arguments, "--moments", "1", "5", "7", "--column", "3"]) == 0
    assert "frames 1, 5, 7 of clip, column 3 over 8" in capsys.readouterr().out
    picture = cv2.imread(str(tmp_path / "out.png"))[..., ::-1]
    assert picture.shape == (4 * (SIZE[0] + pictures.HEADER) + pictures.HEADER, 4 * SIZE[1] + 3 * pictures.MARGIN, 3)
    frames = tiny.frames(8, SIZE)
    truth = [np.rint(alpha * 255) for alpha in tiny.alphas(frames)]
    for down, moment in enumerate((1, 5, 7)):
        assert (tile(picture, 0, down, pictures) == frames[moment].transpose(1, 2, 0)).all()
        for across in (1, 2):
            assert np.abs(tile(picture, across, down, pictures) - truth[moment][..., None]).max() <= 1
        assert (tile(picture, 3, down, pictures) == 255).all()      # two files, one network: no difference
    over_time = tile(picture, 1, 3, pictures)[..., 0]               # 8 frames over 24 pixels
    assert np.abs(over_time[:, 1::3] - np.stack([t[:, 3] for t in truth], axis=1)).max() <= 1


def test_differences_are_signed_and_seen(pictures: ModuleType) -> None:
    ours, theirs = np.array([[0, 100, 110, 255]], np.uint8), np.array([[0, 110, 100, 0]], np.uint8)
    assert pictures.difference(ours, theirs).tolist() == [
        [[255, 255, 255], [215, 215, 255], [255, 215, 215], [255, 0, 0]]]


def test_the_column_is_where_alpha_is_soft(pictures: ModuleType) -> None:
    alphas = np.zeros((3, 4, 6), np.uint8)
    alphas[:, :, 3:] = 255
    alphas[1:, 2, 3] = 128
    assert pictures.soft_column(alphas) == 3


@pytest.mark.parametrize(("given", "said"), [
    (["--moments", "8"], "--moments 8: clip has frames 0 to 7"),
    (["--column", "24"], "--column 24: clip has columns 0 to 23"),
    (["--clip", "none"], "none does not exist"),
    (["--clip", "."], "holds 2 clips"),
])
def test_what_is_wrong_is_one_line(pictures: ModuleType, arguments: list[str], tmp_path: Path, given: list[str],
                                   said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                   ) -> None:
    tiny.save_pictures(tmp_path / "clip2" / "com", tiny.frames(2, SIZE))
    monkeypatch.chdir(tmp_path)
    assert pictures.main([*arguments, *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_models_are_looked_for_first(pictures: ModuleType, arguments: list[str], tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert pictures.main([*arguments[:1], *arguments[2:]]) == 2
    assert "two models or more" in capsys.readouterr().err
    assert pictures.main(["a=none.onnx", *arguments]) == 2
    assert "none.onnx is no file" in capsys.readouterr().err
    other = tiny.save(tmp_path / "other.onnx", (8, 12))
    assert pictures.main([other, *arguments]) == 2
    assert "give models of one size" in capsys.readouterr().err
