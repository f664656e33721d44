"""benchmark/watch.py draws what a checkpoint plays; benchmark/policy.py makes a small file of it that does the same."""

import contextlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import a2po_mpe
from benchmark import policy, watch

ROOT = Path(__file__).resolve().parents[1]


def only_line(capsys) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def checkpoint_of(path, script="a2po_mpe", **settings):
    hidden, n = 16, 3
    actor = a2po_mpe.RecurrentNetwork(4 + 2 * n + 4 * (n - 1), 5, hidden, gain=0.01)
    args = {"hidden_size": hidden, "recurrent": True, "n_agents": n, "local_ratio": 0.0} | settings
    torch.save({"args": args, "script": script, "learned": {"actor": actor.state_dict()}}, path)
    return path


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoint": Path("nowhere/checkpoint.pt")}, "nowhere/checkpoint.pt: no such file"),
        ({"checkpoint": Path(__file__)}, "is not a checkpoint of these scripts"),
        ({"script": "ppo"}, "was written by ppo.py, which is not in "),
        ({"script": "../a2po_mpe"}, "was written by ../a2po_mpe.py, which is not in "),
        ({"script": "a2po_grf"}, "is of a2po_grf; only smac, mpe, mamujoco can be drawn"),
        ({"script": "a2po_smac", "simulator": "starcraft2"}, "is of StarCraft II"),
        ({"out": Path("x.mp4")}, "--out x.mp4: must end in .gif"),
        ({"episodes": 0}, "--episodes 0: must be at least 1"),
        ({"max_frames": 0}, "--max-frames 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"fps": 51}, "--fps 51: must be at most 50"),
        ({"width": 8}, "--width 8: must be at least 32"),
    ],
)
def test_watch_bad_input(options, message, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "imageio" or find(name))
    saved = {name: options.pop(name) for name in ("script", "simulator") if name in options}
    path = checkpoint_of(tmp_path / "checkpoint.pt", **saved)
    with pytest.raises(SystemExit) as end:
        watch.main(watch.Args(**{"checkpoint": path, "out": tmp_path / "x.gif"} | options))
    assert end.value.code == 2 and message in only_line(capsys)


def test_watch_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        watch.main(watch.Args(checkpoint_of(tmp_path / "checkpoint.pt"), tmp_path / "x.gif"))
    assert end.value.code == 2
    assert "needs the package imageio: pip install -r benchmark/requirements.txt" in only_line(capsys)


@pytest.mark.parametrize("recurrent", [True, False])
def test_the_recurrent_policy_is_the_evaluation_s(recurrent, tmp_path):
    """Same greedy actions as script.evaluate over two episodes with a mask, the GRU zeroed in between."""
    torch.manual_seed(0)
    path = checkpoint_of(tmp_path / "checkpoint.pt", recurrent=recurrent)
    checkpoint = torch.load(path, weights_only=True)
    weights = checkpoint["learned"]["actor"]
    weights["head.1.weight"].normal_()
    act = watch.recurrent_policy(a2po_mpe, checkpoint)
    actor = a2po_mpe.RecurrentNetwork(18, 5, 16, gain=0.01)
    actor.load_state_dict(weights)
    obs, hidden = torch.randn(6, 3, 18), torch.zeros(3, 16)
    for t in range(6):
        with torch.no_grad():
            logits, states = actor(obs[t][None], hidden, torch.full((1, 3), float(t in (0, 3) or not recurrent)))
        hidden = states[0]
        mask = np.ones((3, 5), bool)
        mask[0, logits[0, 0].argmax()] = t % 2 == 0  # the best one is forbidden now and then
        expected = logits[0].masked_fill(~torch.as_tensor(mask), -torch.inf).argmax(-1)
        np.testing.assert_array_equal(act(obs[t], mask, start=t in (0, 3)), expected)


def test_watch_writes_a_gif(tmp_path, capsys):
    pytest.importorskip("imageio", reason="stands in benchmark/requirements.txt only")
    pytest.importorskip("mpe2")
    from PIL import Image, ImageSequence

    out = tmp_path / "new" / "x.gif"
    watch.main(watch.Args(checkpoint_of(tmp_path / "checkpoint.pt"), out, episodes=2, max_frames=30, width=64))
    with Image.open(out) as image:
        frames = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
        assert image.size == (64, 64) and len(frames) > 1 and sum(frames) == 30 * 200  # equal pictures are one frame
    assert out.stat().st_size < 100_000 and "stopped after 29 steps" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- policy.py
@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Of a2po_mpe, after two iterations."""
    pytest.importorskip("mpe2")
    folder = tmp_path_factory.mktemp("run")
    options = "--num-envs 2 --num-steps 5 --total-timesteps 20 --update-epochs 1 --hidden-size 16 --eval-episodes 2"
    with contextlib.chdir(folder):
        a2po_mpe.main(a2po_mpe.parse_args([*options.split(), "--num-workers", "1", "--torch-threads", "1"]))
    (run,) = folder.glob("runs/*")
    return run


def test_a_policy_plays_as_its_checkpoint_does(run_folder, tmp_path, capsys, monkeypatch):
    small = tmp_path / "new" / "policy.pt"
    policy.main(policy.Args(run_folder / "checkpoint.pt", small))
    saved = torch.load(small, weights_only=True)
    assert set(saved) == {"args", "script", "learned"} and set(saved["learned"]) == {"actor"}
    assert small.stat().st_size < 0.6 * (run_folder / "checkpoint.pt").stat().st_size
    assert f"{small}: " in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    told = []
    for path in (run_folder / "checkpoint.pt", small):
        a2po_mpe.main(a2po_mpe.parse_args(["--eval-only", "--checkpoint", str(path)]))
        told.append(capsys.readouterr().out)
    assert "2 greedy episodes" in told[0] and told[0] == told[1] and not Path("runs").exists()

    pytest.importorskip("imageio", reason="stands in benchmark/requirements.txt only")
    for path in (run_folder / "checkpoint.pt", small):
        watch.main(watch.Args(path, path.with_suffix(".gif"), width=64))
    assert small.with_suffix(".gif").read_bytes() == (run_folder / "checkpoint.gif").read_bytes()


@pytest.mark.parametrize("contents", [None, {"args": {}, "script": "a2po_mpe", "actor": {}}, [1]])
def test_what_is_no_checkpoint_is_told_in_one_line(contents, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    if contents is not None:
        torch.save(contents, path)
    with pytest.raises(SystemExit) as end:
        policy.main(policy.Args(path, tmp_path / "policy.pt"))
    assert end.value.code == 2 and "checkpoint.pt: " in only_line(capsys)


def test_a_folder_that_cannot_be_is_told_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        policy.main(policy.Args(checkpoint_of(tmp_path / "checkpoint.pt"), Path(__file__) / "policy.pt"))
    assert end.value.code == 2 and "policy.pt: " in only_line(capsys)


POLICIES = sorted((ROOT / "benchmark" / "policies").glob("*.pt"))


@pytest.mark.parametrize("path", POLICIES, ids=[path.stem for path in POLICIES])
def test_the_policies_here_fit_their_scripts(path):
    saved = torch.load(path, weights_only=True)
    script = importlib.import_module(saved["script"])
    args = script.Args(**saved["args"])
    assert not args.resume and args.hidden_size and path.stat().st_size < 1_000_000
