"""Two processes, started by torchrun, come to what one comes to; an error in one ends all, and nothing hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compiling import clips, network
from test_resume import CHILD, RECIPE, command, effort, kept  # noqa: F401  (effort: a fixture)
from tiny_matting import save, save_pictures

import vmq
from vmq import processes
from vmq.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1",
               "TORCH_CPP_LOG_LEVEL": "ERROR"}        # as the program sets it before torch is imported


def torchrun(*arguments: str, count: int = 2) -> list[str]:
    """The command that runs CHILD in so many processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *arguments]


def run_each(code: str, count: int, *arguments: str) -> list[tuple[int, str, str]]:
    """Run code in processes that find each other as those of torchrun do; exit code, stdout and stderr of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [subprocess.Popen(
        [sys.executable, "-c", code, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
             "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        for rank in range(count)]
    try:
        said = [child.communicate(timeout=900) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *text) for child, text in zip(children, said, strict=True)]


# -- sharing out -----------------------------------------------------------------------------------------


def test_one_process_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes.joined():
        assert not torch.distributed.is_initialized()
        assert (processes.rank(), processes.count(), processes.threads(), processes.gpu()) == (0, 1, 0, 0)
        results = processes.mine([3, 1, 2])
        assert results == [3, 1, 2]
        assert processes.together(results) is results
        assert processes.first(lambda: "x") == "x"
        assert processes.spokesman() == ""
    monkeypatch.setenv("WORLD_SIZE", "1")                     # torchrun --nproc-per-node 1
    monkeypatch.setenv("RANK", "0")
    assert not processes.launched()


SHARE = """
import sys, time
from datetime import timedelta
import ml_dtypes, numpy as np, torch
from torch import nn
from vmq import processes
from vmq.errors import ProcessError
from vmq.lanes import Lanes, generator

torch.manual_seed(0)
parameters = [nn.Parameter(torch.randn(shape)) for shape in ((6, 5, 3, 3), (6,), (4,), ())]
items = [torch.randn(1, 5, 9, 11) for _ in range(5)]
def loss(x):
    y = torch.conv2d(x, parameters[0], parameters[1]).tanh()
    y = (y + 0.1 * torch.randn(y.shape, generator=generator())).square().mean()
    return y * parameters[3] if x is items[4] else y          # which one process alone computes
def gradients(owners=None):
    with Lanes() as lanes:
        value = lanes.gradients(loss, items, parameters, 7, owners)
    assert parameters[2].grad is None
    return [torch.tensor(value), *(p.grad.clone() for p in parameters if p.grad is not None)]
expected = gradients()
processes.TIMEOUT = timedelta(seconds=120)
with processes.joined():
    me, count = processes.rank(), processes.count()
    assert (count, processes.threads() >= 1) == (3, True)
    assert processes.mine(range(8)) == list(range(me, 8, 3))
    for total in range(8):                                    # for some there is nothing to do
        assert processes.together([k * k for k in processes.mine(range(total))]) == [k * k for k in range(total)]
    arrays = processes.together([np.full(3, k, ml_dtypes.int4) for k in processes.mine(range(4))])
    assert [(a.dtype, a.tolist()) for a in arrays] == [(np.dtype(ml_dtypes.int4), [k] * 3) for k in range(4)]
    with Lanes() as lanes:
        assert lanes.map(lambda k: -k, range(7)) == [0, -1, -2, -3, -4, -5, -6]
    assert processes.first(lambda: (me, processes.threads())) == (0, 0)
    for owners in (None, [4, 2, 0, 5, 1]):
        for found, one in zip(gradients(owners), expected, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-7)
            assert all(torch.equal(found, other) for other in processes.together([found]))
    shared = torch.full((2, 2), float(me))
    processes.spread(shared, 5)
    assert shared.eq(2.0).all()
    processes.agree("colour", "blue")
    try:
        processes.agree("colour", "blue" if me else "green")
    except ProcessError as error:
        print(error)
    processes.together([None])
print("left")
"""


def test_sharing_out():
    done = run_each(SHARE, 3)
    assert [code for code, _, _ in done] == [0] * 3, done
    for _, said, _ in done:
        assert said.startswith("the processes do not have the same colour; they need the same command")
        assert said.endswith("\nleft\n")


SILENT = """
import sys, time
from datetime import timedelta
from vmq import processes
from vmq.errors import VmqError
from vmq.cli import _fail
processes.TIMEOUT = timedelta(seconds=6)
try:
    with processes.joined():
        if processes.rank():
            time.sleep(20)                                    # at work on something else
            sys.exit(0)
        started = time.monotonic()
        processes.together([1])
except VmqError as error:
    print(time.monotonic() - started)
    sys.exit(_fail(str(error)))
"""


def test_a_process_that_does_not_answer():
    (code, took, said), _ = run_each(SILENT, 2)
    assert code == 2, said
    assert said.startswith("vmq: error: another process has ended, or has not answered for 0.1 minutes; see what it ")
    assert float(took) < 12.0                                 # so that it did not wait for the other's end


# -- the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, footage, a recipe and the command line as a program."""
    folder = tmp_path_factory.mktemp("work")
    network().save(folder / "model.onnx")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "child.py").write_text(CHILD)
    for clip in clips(3, 6):
        save_pictures(folder / "footage" / clip.name, clip.frames())
    return folder


def test_killed_and_resumed_two_processes_write_what_one_writes(work: Path, tmp_path: Path):
    assert main(command(work, tmp_path / "one.onnx")) == 0
    two, dump = tmp_path / "two.onnx", tmp_path / "dump"
    arguments = torchrun(str(work / "child.py"), *command(work, two, "--dump", str(dump), "--resume", "--json"))
    child = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
    ends = time.monotonic() + 900
    try:
        while child.poll() is None and len(kept(two)) < 2 and time.monotonic() < ends:
            time.sleep(0.005)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    before = kept(two)
    assert before[:2] == ["blocks-0-0", "blocks-0-1"]
    assert not two.exists()
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert two.read_bytes() == (tmp_path / "one.onnx").read_bytes()
    assert done.stdout.count('"size_bytes"') == 1             # one of the two speaks
    assert kept(two) == []
    assert len(list(dump.glob("*_calibrate_network.json"))) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(
        [".two.onnx.lock"] if (tmp_path / ".two.onnx.lock").exists() else []), "dump", "one.onnx", "two.onnx"]


BROKEN = f"""
import os
from vmq.errors import MediaError
from vmq.lanes import Lanes
real, left = Lanes.gradients, [5]
def gradients(*arguments):
    left[0] -= 1
    if left[0] < 0 and os.environ["RANK"] == "1":
        raise MediaError("clip0 is gone; bring it back")
    return real(*arguments)
Lanes.gradients = gradients
{CHILD}"""


def test_an_error_in_one_process_ends_all_with_one_line(work: Path, tmp_path: Path):
    done = run_each(BROKEN, 2, *command(work, tmp_path / "out.onnx"))
    assert [code for code, _, _ in done] == [2, 2], done
    said = "".join(text for _, _, text in done)
    assert said == f"vmq: error: process 1 on {socket.gethostname()}: clip0 is gone; bring it back\n"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".onnx"] == []


def test_an_error_of_all_is_said_once(work: Path, tmp_path: Path):
    done = run_each(CHILD, 2, "compile", str(work / "none.onnx"), "-o", str(tmp_path / "out.onnx"))
    assert [code for code, _, _ in done] == [2, 2], done
    said = "".join(text for _, _, text in done)
    assert said.startswith("vmq: error: ")
    assert "none.onnx" in said
    assert said.count("\n") == 1


def test_other_commands_are_not_shared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    for rank, said in enumerate(("vmq: error: torchrun is for `vmq compile` and `vmq eval`", "")):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["passes"]) == 2
        assert capsys.readouterr().err.split(";")[0] == said


def test_eval_prints_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number, clip in enumerate(clips(3, 4)):
        save_pictures(tmp_path / "set" / f"clip{number}" / "com", clip.frames())
        if number != 1:
            save_pictures(tmp_path / "set" / f"clip{number}" / "pha", clip.alpha() or ())
    network().save(tmp_path / "a.onnx")
    words = ["eval", str(tmp_path / "a.onnx"), save(tmp_path / "b.onnx", (32, 48)), str(tmp_path / "set"),
             "--reference", str(tmp_path / "a.onnx"), "--json"]
    assert main([*words, "-q"]) == 0
    expected = capsys.readouterr().out
    done = subprocess.run(torchrun("-m", "vmq", *words, "--threads", "1"), env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
def test_two_gpus_learn_what_one_learns(work: Path, tmp_path: Path):
    errors = []
    for count in (1, 2):
        out = tmp_path / f"{count}.onnx"
        done = subprocess.run(torchrun(str(work / "child.py"), *command(work, out, "--device", "cuda"), count=count),
                              env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        errors.append(vmq.Session(out))
    frames = list(clips(1, 6)[0].frames())
    one, two = (torch.tensor([s.alpha_of(s.step(f)).mean() for f in frames]) for s in errors)
    torch.testing.assert_close(one, two, rtol=0.05, atol=0.01)
