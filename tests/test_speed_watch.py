"""benchmark/speed.py: synthetic environments fit the scripts, numbers are put together right. benchmark/watch.py."""

import importlib.util
import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import a2po_grf
import a2po_mamujoco
import a2po_mpe
import a2po_smac

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"smac": a2po_smac, "mpe": a2po_mpe, "mamujoco": a2po_mamujoco, "grf": a2po_grf}


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmark" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


speed, speed_grf, watch = load("speed"), load("speed_grf"), load("watch")


def only_line(capsys) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# ------------------------------------------------------------------------------------------------------ speed_grf.py
@pytest.mark.parametrize(
    "options", ["--num-envs 0", "--processes 0", "--turns 0", "--seconds 0", "--out nowhere/x.json"]
)
def test_speed_grf_answers_a_wrong_value_with_one_line(options, capsys):
    with pytest.raises(SystemExit) as stop:
        speed_grf.check_args(speed_grf.tyro.cli(speed_grf.Args, args=options.split()))
    assert stop.value.code == 2 and options.split()[0] in only_line(capsys)


# ---------------------------------------------------------------------------------------------------------- speed.py
def real_envs(benchmark):
    """What stands in the place of the synthetic ones in a run of the typical task, with 3 environments."""
    if benchmark == "smac":
        pytest.importorskip("jaxmarl", reason="needs SMAX")
        return a2po_smac.SMAX("3s5z", 3, 1)
    if benchmark == "mamujoco":
        pytest.importorskip("envpool", reason="needs EnvPool")
        return a2po_mamujoco.MaMuJoCo("Ant", "4x2", "v5", 3, 1, 1)
    if benchmark == "mpe":
        envs = speed.Synthetic(gym.spaces.Box(0, 1), gym.spaces.Discrete(1), 3)
        a2po_mpe.set_spaces(envs, 3)
        return envs
    game = a2po_grf.Football("5_vs_5", dict.fromkeys(a2po_grf.Reward.TERMS, 1.0))
    return speed.Synthetic(game.observation_space, game.action_space, 3)


def sizes(space):
    """All of a space but for the bounds of its numbers."""
    if isinstance(space, gym.spaces.Dict):
        return {name: sizes(part) for name, part in space.items()}
    return (space.shape, space.dtype) if isinstance(space, gym.spaces.Box) else space


@pytest.mark.parametrize("benchmark", SCRIPTS)
def test_synthetic_spaces_are_the_real_ones(benchmark):
    envs, real = speed.BENCHMARKS[benchmark](SCRIPTS[benchmark], {}, 3), real_envs(benchmark)
    for name in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
        assert sizes(getattr(envs, name)) == sizes(getattr(real, name)), name
    if benchmark == "mamujoco":
        np.testing.assert_array_equal(envs.has_joint, real.has_joint)
        real.close()


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("benchmark", SCRIPTS)
def test_synthetic_environments_play(benchmark, n):
    envs = speed.BENCHMARKS[benchmark](SCRIPTS[benchmark], {"n": n}, 4)
    obs, _ = envs.reset(seed=1)
    first, last, ended = obs, np.zeros(4, bool), [0, 0]
    for _ in range(601):
        obs, reward, terminated, truncated, info = envs.step(envs.action_space.sample())
        assert envs.observation_space.contains(obs)
        assert reward.shape == ((4, n) if benchmark == "mpe" else (4,))
        done = terminated | truncated
        assert not (terminated & truncated).any() and not (last & done).any()  # a new episode has a step at least
        last, ended = done, [ended[0] + terminated.sum(), ended[1] + truncated.sum()]
    assert min(ended) > 5 and 20 < sum(ended) < 80  # 40 expected
    assert envs.single_action_space.shape[0] == n
    if benchmark in ("smac", "grf"):
        assert obs["action_mask"][..., 0].all() and obs["alive"].all() and 0 < obs["action_mask"].mean() < 1
        assert not np.array_equal(obs["obs"], first["obs"]) and not info["won"].any()


def job(script, **changes):
    common = {"real": False, "num_envs": 2, "num_steps": 10, "threads": 1, "iterations": 2, "warmup": 1, "seconds": 60}
    return common | {"script": script, "options": {"update_epochs": "2"}, "shape": {"n": 3}} | changes


def test_a_measurement_reads_the_times_of_a_real_run():
    result = speed.run_measurement(job("a2po_mamujoco", options={"update_epochs": "2", "map": "of no interest"}))
    assert {len(result[name]) for name in speed.TAGS} == {2} and min(result["rollout"] + result["update"]) > 0
    for rate, *parts in zip(result["steps_per_second"], result["rollout"], result["update"], strict=True):
        assert 15 < rate * sum(parts) < 20.5  # 20 steps less the filler ones
    assert 50 < result["peak_memory_mib"] < 5000
    assert {"update_epochs": 2, "num_steps": 10, "agent_blocks": 3}.items() <= result["settings"].items()


def test_a_script_that_fails_is_told_in_one_line():
    with pytest.raises(speed.Failed) as failure:
        speed.run_measurement(job("a2po_mamujoco", options={"gamma": "3"}))
    message, status = failure.value.args
    assert status == 2 and "--gamma 3.0: must be within 0 and 1" in message and "\n" not in message


def measured(rollout, update, memory):
    rates = [1000.0] * len(rollout)
    return {"rollout": rollout, "update": update, "steps_per_second": rates, "peak_memory_mib": memory, "settings": {}}


def test_medians_and_ratios():
    turns = {
        "one": [measured([1, 2, 3], [1, 1, 1], 100), measured([1, 2, 9], [2, 2, 2], 120)],
        "two": [measured([2, 2, 2], [5, 5, 5], 300), measured([2, 2, 2], [10, 10, 10], 200)],
    }
    rows = speed.summarize(turns)
    one, two = rows["one"], rows["two"]
    assert (one["rollout"], one["update"], one["peak_memory_mib"]) == (2, 1.5, 120)
    assert one["iteration"] == 3.5  # of 2 3 4 and 3 4 11
    assert one["ratio"] == 1 and one["ratio_by_turn"] == [1, 1]
    assert one["iteration_by_turn"] == [3, 4] and two["iteration_by_turn"] == [7, 12]
    assert two["ratio"] == 9.5 / 3.5 and two["ratio_by_turn"] == [7 / 3, 3]
    assert (two["rollout_ratio"], two["update_ratio"]) == (2 / 3.5, 7.5 / 3.5)


def test_scripts_take_turns_and_the_tables_are_written(tmp_path, monkeypatch, capsys):
    asked = []

    def pretend(job):
        asked.append((job["script"], job["shape"]["n"]))
        factor = job["shape"]["n"] * (2 if job["script"] == "a2po_smac" else 1)
        config = {"device": "cpu", "versions": {}, "num_steps": 50, "num_envs": 16}
        return measured([0.5 * factor], [1.0 * factor], 100 * factor) | {"settings": config}

    monkeypatch.setattr(speed, "run_measurement", pretend)
    scripts = ("mappo_smac", "a2po_smac")
    speed.main(speed.Args(tmp_path / "new" / "out", scripts, sweep="agents", agents=(2, 27), turns=2))
    assert asked == [(script, n) for n in (2, 27) for _ in range(2) for script in scripts]
    result = json.loads((tmp_path / "new" / "out" / "speed.json").read_text())
    assert [point["scripts"]["a2po_smac"]["ratio"] for point in result["points"]] == [2, 2]
    text = (tmp_path / "new" / "out" / "speed.md").read_text()
    assert "| a2po_smac | 2.000 | 4.000 | 6.000 | 2.00 (0.67 + 1.33) | 2.00 to 2.00 | 1000 | 400 |" in text
    assert "| 27 | 40.500 (27.000) | 81.000 (54.000) | 2700 | 5400 |" in text
    assert text.strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scripts": ("ppo_smac",)}, "--scripts ppo_smac: must be one of a2po_grf, "),
        ({"scripts": ()}, "--scripts: needs at least one"),
        ({"scripts": ("a2po_smac", "a2po_smac")}, "each once"),
        ({"turns": 0}, "--turns 0: must be at least 1"),
        ({"warmup": -1}, "--warmup -1: must be at least 0"),
        ({"agents": (3, 0)}, "--agents 0: must be at least 1"),
        ({"seconds": 0.0}, "--seconds 0.0: must be above 0"),
        ({"sweep": "length", "lengths": ()}, "--sweep length: needs values"),
        ({"real": True, "n_agents": 3}, "--n-agents: is for synthetic data"),
        ({"real": True, "sweep": "agents"}, "--sweep agents: is for synthetic data"),
        ({"options": ("epochs",)}, "--options epochs: must be NAME=VALUE"),
        ({"options": ("epochs=3",)}, "--options epochs=3: none of the scripts has epochs"),
        ({"out": Path(__file__)}, "--out "),
    ],
)
def test_speed_bad_input(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        speed.main(speed.Args(**{"out": tmp_path} | options))
    assert end.value.code == 2 and message in only_line(capsys)


# ---------------------------------------------------------------------------------------------------------- watch.py
def checkpoint_of(path, script="a2po_mpe", **settings):
    hidden, n = 16, 3
    actor = a2po_mpe.RecurrentNetwork(4 + 2 * n + 4 * (n - 1), 5, hidden, gain=0.01)
    args = {"hidden_size": hidden, "n_agents": n, "local_ratio": 0.0} | settings
    torch.save({"args": args, "script": script, "actor": actor.state_dict()}, path)
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


def test_the_recurrent_policy_is_the_evaluation_s(tmp_path):
    """Same greedy actions as script.evaluate over two episodes with a mask, the GRU zeroed in between."""
    torch.manual_seed(0)
    checkpoint = torch.load(checkpoint_of(tmp_path / "checkpoint.pt"), weights_only=True)
    checkpoint["actor"]["head.1.weight"].normal_()
    act = watch.recurrent_policy(a2po_mpe, checkpoint)
    actor = a2po_mpe.RecurrentNetwork(18, 5, 16, gain=0.01)
    actor.load_state_dict(checkpoint["actor"])
    obs, hidden = torch.randn(6, 3, 18), torch.zeros(3, 16)
    for t in range(6):
        with torch.no_grad():
            logits, states = actor(obs[t][None], hidden, torch.full((1, 3), float(t in (0, 3))))
        hidden = states[0]
        mask = np.ones((3, 5), bool)
        mask[0, logits[0, 0].argmax()] = t % 2 == 0  # the best one is forbidden now and then
        expected = logits[0].masked_fill(~torch.as_tensor(mask), -torch.inf).argmax(-1)
        np.testing.assert_array_equal(act(obs[t], mask, start=t in (0, 3)), expected)


def test_watch_writes_a_gif(tmp_path, capsys):
    pytest.importorskip("imageio", reason="stands in benchmark/requirements.txt only")
    pytest.importorskip("mpe2")
    from PIL import Image

    out = tmp_path / "new" / "x.gif"
    watch.main(watch.Args(checkpoint_of(tmp_path / "checkpoint.pt"), out, episodes=2, max_frames=30, width=64))
    with Image.open(out) as image:
        assert image.size == (64, 64) and image.n_frames > 15 and image.info["duration"] >= 200
    assert out.stat().st_size < 100_000 and "stopped after 29 steps" in capsys.readouterr().out
