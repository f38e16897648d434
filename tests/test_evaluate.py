"""`vmq eval` scores 8-bit mattes of a closed loop over each clip, against true alpha and against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
import tiny_matting as tiny
from numpy.typing import NDArray

from vmq.clips import Clip, open_clips
from vmq.errors import MediaError, ModelError, OptionError
from vmq.evaluate import ModelScores, evaluate, to_json, to_lines
from vmq.metrics import dtssd, mad, mse, score_clip

MEASURES = ["SAD", "MAD", "MSE", "Grad", "Conn", "dtSSD", "F"]


def dataset(folder: Path, lengths: Sequence[int] = (4, 2), size: tuple[int, int] = (16, 24), *,
            alpha: bool = True) -> list[Clip]:
    for number, length in enumerate(lengths):
        tiny.save_pictures(folder / f"clip{number}" / "com", tiny.frames(length, size, seed=number))
        if alpha:
            true = [frame[0] for frame in tiny.frames(length, size, seed=100 + number)]
            tiny.save_pictures(folder / f"clip{number}" / "pha", true)
    return open_clips([folder])


def rounded(clip: Clip, ratio: float = 1.0) -> list[NDArray[np.uint8]]:
    return [np.rint(np.float32(a) * 255).astype(np.uint8) for a in tiny.alphas(clip.frames(), ratio)]


def true_alpha(clip: Clip) -> list[NDArray[np.uint8]]:
    found = clip.alpha()
    assert found is not None
    return list(found)


def test_scores_of_each_clip_from_the_zero_state(tmp_path: Path) -> None:
    clips, model = dataset(tmp_path / "set"), tiny.save(tmp_path / "m.onnx")
    result = evaluate([model], clips, threads=1)[model]
    assert list(result.clips) == ["clip0", "clip1"]
    for clip in clips:
        expected = score_clip(rounded(clip), true_alpha(clip))
        found = result.clips[clip.name]
        assert found is not None
        for name, value in expected.as_dict().items():
            assert found.as_dict()[name] == pytest.approx(value, rel=1e-6), name
    assert result.fidelity is None


def test_the_mean_counts_every_clip_the_same(tmp_path: Path) -> None:
    clips, model = dataset(tmp_path / "set", (5, 1)), tiny.save(tmp_path / "m.onnx")
    result = evaluate([model], clips, threads=1)[model]
    first, second = result.clips["clip0"], result.clips["clip1"]
    assert first is not None
    assert second is not None
    assert result.mean is not None
    assert pytest.approx((first.MAD + second.MAD) / 2) == result.mean.MAD


def test_a_dataset_may_be_one_clip(tmp_path: Path) -> None:
    dataset(tmp_path / "set")
    model = tiny.save(tmp_path / "m.onnx")
    assert list(evaluate([model], open_clips([tmp_path / "set" / "clip1"]), threads=1)[model].clips) == ["clip1"]


def test_fidelity_to_a_reference(tmp_path: Path) -> None:
    """The reference is fed ratio 0.5 by its own input, the model has none: alpha differs by half."""
    clips = dataset(tmp_path / "set")
    model, other = tiny.save(tmp_path / "m.onnx"), tiny.save(tmp_path / "r.onnx", ratio=True)
    results = evaluate([model, other], clips, reference=other, downsample_ratio=0.5, threads=1)
    assert results[other].fidelity == {"MAD": 0.0, "MSE": 0.0, "dtSSD": 0.0}
    rows = []
    for clip in clips:
        ours, theirs = rounded(clip), rounded(clip, 0.5)
        steps = [dtssd(ours[k], theirs[k], ours[k - 1], theirs[k - 1]) for k in range(1, len(ours))]
        rows.append((np.mean([mad(p, t) for p, t in zip(ours, theirs, strict=True)]),
                     np.mean([mse(p, t) for p, t in zip(ours, theirs, strict=True)]), np.mean([0.0, *steps])))
    fidelity = results[model].fidelity
    assert fidelity is not None
    assert list(fidelity) == ["MAD", "MSE", "dtSSD"]
    np.testing.assert_allclose(list(fidelity.values()), np.mean(rows, axis=0), rtol=1e-6)


def test_without_alpha_only_fidelity_is_known(tmp_path: Path) -> None:
    clips, model = dataset(tmp_path / "set", alpha=False), tiny.save(tmp_path / "m.onnx")
    with pytest.raises(OptionError, match=r"clip0 has no alpha to score against: .*--reference"):
        evaluate([model], clips, threads=1)
    results = evaluate([model], clips, reference=model, threads=1)
    assert to_json(results) == {"models": {model: {"mean": None, "clips": {"clip0": None, "clip1": None},
                                                   "fidelity": {"MAD": 0.0, "MSE": 0.0, "dtSSD": 0.0}}}}
    lines = to_lines(results, model)
    assert lines[0].split() == ["distance", "to", model, "MAD", "MSE", "dtSSD"]
    assert not any("mean  " in line for line in lines)


def test_clips_with_and_without_alpha_mix(tmp_path: Path) -> None:
    dataset(tmp_path / "set")
    tiny.save_pictures(tmp_path / "set" / "plain", tiny.frames(2))
    model = tiny.save(tmp_path / "m.onnx")
    result = evaluate([model], open_clips([tmp_path / "set"]), threads=1)[model]
    assert result.clips["plain"] is None
    assert result.mean is not None
    first_words = [line.split()[0] for line in to_lines({model: result})[1:4]]
    assert first_words == ["clip0", "clip1", "mean"]


def test_json_has_the_shape_that_scripts_rely_on(tmp_path: Path) -> None:
    clips = dataset(tmp_path / "set")
    first, second = tiny.save(tmp_path / "a.onnx"), tiny.save(tmp_path / "b.onnx", foreground=False)
    plain = to_json(evaluate([first, second, first], clips, threads=1))
    assert list(plain["models"]) == [first, second]
    for entry in plain["models"].values():
        assert list(entry) == ["mean", "clips"]
        assert list(entry["mean"]) == MEASURES
        assert {name: list(scores) for name, scores in entry["clips"].items()} == {
            "clip0": MEASURES, "clip1": MEASURES}
        assert all(type(value) is float for value in entry["mean"].values())
    assert plain["models"][first] == plain["models"][second]
    assert "fidelity" in to_json(evaluate([first], clips, reference=second, threads=1))["models"][first]


def test_the_table_is_aligned_and_states_the_convention(tmp_path: Path) -> None:
    clips, model = dataset(tmp_path / "set"), tiny.save(tmp_path / "m.onnx")
    lines = to_lines(evaluate([model], clips, reference=model, threads=1), "ref.onnx")
    head, *rows = lines[:4]
    assert head.split() == [model, *MEASURES]
    assert [row.split()[0] for row in rows] == ["clip0", "clip1", "mean"]
    assert len({len(line) for line in (head, *rows)}) == 1
    text = "\n".join(lines)
    assert "distance to ref.onnx" in text
    assert "first frame of each clip counted as 0" in text


def test_another_size_than_the_models(tmp_path: Path) -> None:
    clips = dataset(tmp_path / "set", size=(18, 24))
    model, free = tiny.save(tmp_path / "m.onnx"), tiny.save(tmp_path / "free.onnx", ("h", "w"))
    for models, reference in (([model], None), ([free, model], None), ([free], model)):
        with pytest.raises(MediaError, match=r"m\.onnx takes frames of 24x16, but clip0 is 24x18: "):
            evaluate(models, clips, reference=reference, threads=1)
    assert evaluate([free], clips, threads=1)[free].mean


def test_a_model_without_a_number_is_named_as_such(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> m (float[1, 3, 16, 24] x)
        => (float[1, 1, 16, 24] y) <int64[1] axes = {1}, float minus = {-2.0}> {
            mean = ReduceMean <keepdims = 1> (x, axes)
            below = Add (mean, minus)
            y = Sqrt (below)
        }""")
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(ModelError, match="NaN"):
        evaluate([str(tmp_path / "nan.onnx")], dataset(tmp_path / "set"), threads=1)


def test_progress_counts_all_frames_of_all_models(tmp_path: Path) -> None:
    clips, model = dataset(tmp_path / "set"), tiny.save(tmp_path / "m.onnx")
    told: list[tuple[str, float, float | None]] = []
    evaluate([model], clips, reference=model, threads=1, report=lambda *args: told.append(args))
    assert [done for _, done, _ in told] == list(range(1, 13))
    assert {total for _, _, total in told} == {12}
    assert told[-1][0] == f"{model} on clip1"


def test_nothing_scored_has_no_mean() -> None:
    assert ModelScores().mean is None


@pytest.mark.slow
def test_rvm_scores_what_it_is_known_to(shared: Path, tmp_path: Path) -> None:
    """FP32 RVM on one clip of vm-mini: MAD 2.50, MSE 0.73 and dtSSD 2.06, the latter without the first frame."""
    from models import rvm

    rvm.export(rvm.build("mobilenetv3", rvm.load_state(shared / "rvm" / "rvm_mobilenetv3.safetensors")),
               tmp_path / "rvm.onnx", size=(288, 512))
    clips = open_clips([shared / "vm-mini" / "eval" / "rapper_a-00__indoor_shibuyasky"])
    mean = evaluate([str(tmp_path / "rvm.onnx")], clips, threads=2)[str(tmp_path / "rvm.onnx")].mean
    assert mean is not None
    assert pytest.approx(2.50, abs=0.006) == mean.MAD
    assert pytest.approx(0.73, abs=0.006) == mean.MSE
    assert mean.dtSSD_later == pytest.approx(2.06, abs=0.006)
