"""benchmark/speed.py: synthetic environments fit the scripts, numbers are put together right. Also speed_grf.py,
speed_mujoco.py and speed_peers.py."""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import a2po_grf
import a2po_mamujoco
import a2po_mpe
import a2po_smac
from benchmark import speed, speed_grf, speed_mujoco, speed_peers

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*_*.py"))


def only_line(capsys) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def real_spaces(benchmark):
    """Of the observations and actions of the benchmark's typical task."""
    if benchmark == "mpe":
        return a2po_mpe.navigation_space(3), gym.spaces.MultiDiscrete([5] * 3)
    if benchmark == "grf":
        envs = a2po_grf.Football("5_vs_5", dict.fromkeys(a2po_grf.Reward.TERMS, 1.0), seed=1)
        return envs.observation_space, envs.action_space
    if benchmark == "smac":
        pytest.importorskip("jaxmarl", reason="needs SMAX")
        envs = a2po_smac.SMAX("3s5z", 1, 1)
    else:
        pytest.importorskip("envpool", reason="needs EnvPool")
        envs = a2po_mamujoco.MaMuJoCo("Ant", "4x2", "v5", 1, 1, 1)
    return envs.single_observation_space, envs.single_action_space


def sizes(space):
    """All of a space but for the bounds of its numbers."""
    if isinstance(space, gym.spaces.Dict):
        return {name: sizes(part) for name, part in space.items()}
    return (space.shape, space.dtype) if isinstance(space, gym.spaces.Box) else space


@pytest.mark.parametrize("benchmark", speed.TYPICAL)
def test_synthetic_spaces_are_the_real_ones(benchmark):
    spaces = speed.spaces(**speed.complete_shape(benchmark, {}))
    assert [sizes(space) for space in spaces] == [sizes(space) for space in real_spaces(benchmark)]


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("benchmark", speed.TYPICAL)
def test_synthetic_environments_play(benchmark, n):
    rewards = (n,) if benchmark == "mpe" else ()
    envs = speed.Synthetic(*speed.spaces(**speed.complete_shape(benchmark, {"n": n})), 4, rewards, ["won"])
    first, _ = envs.reset(seed=1)
    last, ended = np.zeros(4, bool), [0, 0]
    for _ in range(601):
        obs, reward, terminated, truncated, info = envs.step(envs.action_space.sample())
        assert envs.observation_space.contains(obs)
        assert reward.shape == (4, *rewards)
        done = terminated | truncated
        assert not (terminated & truncated).any() and not (last & done).any()  # a new episode has a step at least
        last, ended = done, [ended[0] + terminated.sum(), ended[1] + truncated.sum()]
    assert min(ended) > 5 and 20 < sum(ended) < 80  # 40 expected
    assert envs.single_action_space.shape[0] == n
    assert not np.array_equal(obs["obs"], first["obs"]) and not info["episode"]["won"].any()
    if benchmark != "mamujoco":
        assert obs["action_mask"][..., 0].all() and obs["alive"].all() and 0 < obs["action_mask"].mean() < 1


@pytest.mark.parametrize("agent_id", [False, True])
def test_synthetic_environments_have_the_agents_numbers(agent_id, monkeypatch):
    monkeypatch.setattr(a2po_mpe, "make_envs", None)  # and what it was before, afterwards
    script, settings, n = speed.synthetic_script("a2po_mpe", {})
    (obs,) = speed.spaces(**speed.complete_shape("mpe", {}))[0]["obs"].shape[1:]
    envs = script.make_envs(script.Args(num_envs=2, agent_id=agent_id, **settings))
    envs.reset()
    assert envs.look("cpu")["obs"].shape == (2, n, obs + n * agent_id)


def job(script, **changes):
    common = {"real": False, "num_envs": 2, "num_steps": 10, "threads": 1, "iterations": 2, "warmup": 1, "seconds": 60}
    return common | {"script": script, "options": {"update_epochs": "2"}, "shape": {"n": 3}} | changes


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_measurement_reads_the_times_of_a_run(script, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, script, raising=False)  # it changes the script
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    result = speed.measure(job(script, shape={"n": 2}, options={"update_epochs": "2", "reward_win": "3"}))
    assert {len(result[name]) for name in speed.TAGS} == {2} and min(result["rollout"] + result["update"]) > 0
    for rate, *parts in zip(result["steps_per_second"], result["rollout"], result["update"], strict=True):
        assert 15 < rate * sum(parts) < 20.5  # 20 steps less the filler ones
    settings = result["settings"]
    assert {"update_epochs": 2, "num_steps": 10}.items() <= settings.items()
    assert settings.get("agent_blocks", 2) == 2 and settings.get("reward_win", 3) == 3
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_a_measurement_is_a_process_of_its_own():
    result = speed.run_measurement(job("a2po_mpe"))
    assert len(result["update"]) == 2 and 50 < result["peak_memory_mib"] < 5000


def test_a_script_that_fails_is_told_in_one_line():
    with pytest.raises(speed.Failed) as failure:
        speed.run_measurement(job("a2po_mpe", options={"gamma": "3"}))
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


# ------------------------------------------------------------------------------------------------------ speed_grf.py
@pytest.mark.parametrize(
    "options", ["--num-envs 0", "--processes 0", "--turns 0", "--seconds 0", "--out nowhere/x.json"]
)
def test_speed_grf_answers_a_wrong_value_with_one_line(options, capsys):
    with pytest.raises(SystemExit) as stop:
        speed_grf.check_args(speed_grf.parse_args(speed_grf.Args, "", options.split()))
    assert stop.value.code == 2 and options.split()[0] in only_line(capsys)


# --------------------------------------------------------------------------------------------------- speed_mujoco.py
SHORT = {"script": "a2po_mamujoco", "options": {"scenario": "Hopper", "partition": "3x1", "update_epochs": "1"}}
SHORT |= {"threads": 1, "num_envs": 3, "num_steps": 20, "warmup": 1}


def test_speed_mujoco_plays_the_same_work_twice(tmp_path, monkeypatch):
    """Its process and its measurement, on a real robot; another step of the robots would be noticed."""
    envpool = pytest.importorskip("envpool", reason="needs EnvPool")
    job = SHORT | {"iterations": 2, "seconds": 1e9}
    numbers = speed_mujoco.run_measurement(job)
    assert {who: len(seconds) for who, seconds in numbers.items()} == {"script": 2, "envpool": 2, "unpinned": 2}
    assert all(seconds > 0 for who in numbers for seconds in numbers[who])
    make, seeds, offsets = envpool.make, iter(range(100)), []

    def make_another(*words, **options):
        offsets.append(options["thread_affinity_offset"])
        return make(*words, **options | {"seed": next(seeds)})

    monkeypatch.setattr(envpool, "make", make_another)
    monkeypatch.setattr(os, "cpu_count", lambda: SHORT["threads"])  # so that the script pins its thread
    monkeypatch.chdir(tmp_path)
    for name in ("SummaryWriter", "Run"):  # what it changes, in a process of its own
        monkeypatch.setattr(a2po_mamujoco, name, getattr(a2po_mamujoco, name))
    for name in ("lap", "save"):
        monkeypatch.setattr(a2po_mamujoco.Run, name, getattr(a2po_mamujoco.Run, name))
    with pytest.raises(SystemExit, match="not the same work"):
        speed_mujoco.measure(job)
    assert offsets == [0, 0, -1], "the script's, the same again, and as by default"


def test_speed_mujoco_table():
    turns = [{"num_envs": 16, "script": [1.0, 2.0, 4.0], "envpool": [0.5, 1.5, 1.0], "unpinned": [1.0, 1.8, 4.0]}]
    turns += [{"num_envs": 30, "script": [2.0], "envpool": [1.0], "unpinned": [1.6]}]
    turns += [{"num_envs": 16, "script": [2.0] * 3, "envpool": [1.8] * 3, "unpinned": [2.0] * 3}]
    result = {"scenario": "Ant", "partition": "4x2", "threads": 2, "turns": turns}
    heading, _, first, second = speed_mujoco.table(result).splitlines()
    assert heading.startswith("| Ant 4x2, 2 threads |")
    # Of 0.5, 0.75, 0.25 and 0.9 three times; unpinned of 1, 0.9, 1 and 1 three times.
    assert first == "| 16 environments | 2000 | 2424 | 0.82 (0.50, 0.90) | 2000 | 1.00 (1.00, 1.00) |"
    assert second == "| 30 environments | 1995 | 3990 | 0.50 (0.50) | 2494 | 0.80 (0.80) |"  # 133 steps of each


@pytest.mark.parametrize(
    "options",
    ["--num-envs 16 0", "--num-envs 4001", "--num-envs", "--turns 0", "--iterations 0", "--warmup -1", "--threads 0"]
    + ["--script a2po_smac", "--script nothing"],
)
def test_speed_mujoco_answers_a_wrong_value_with_one_line(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        speed_mujoco.main(
            speed_mujoco.parse_args(speed_mujoco.Args, "", ["--out", str(tmp_path / "x"), *options.split()])
        )
    assert stop.value.code == 2 and options.split()[0] in only_line(capsys)


def test_speed_mujoco_passes_the_scripts_line_on(tmp_path, capsys):
    pytest.importorskip("envpool", reason="needs EnvPool")
    words = ["--out", str(tmp_path / "x"), "--partition", "3x1"]
    with pytest.raises(SystemExit) as stop:
        speed_mujoco.main(speed_mujoco.parse_args(speed_mujoco.Args, "", words))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and "--partition 3x1" in lines[-1] and not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------------------------------- speed_peers.py
TRAINER = """
import subprocess, time
import gym, wandb
from onpolicy.runner.shared.mpe_runner import MPERunner

def main(flags):
    assert "--ppo_epoch" in flags and issubclass(gym.Env, object)
    open("left.txt", "w").close()
    environment = subprocess.Popen(["sleep", "600"])
    print(environment.pid, file=open(PIDS, "w"), flush=True)
    for _ in range(ROUNDS):
        time.sleep(0.05)
        MPERunner().train()
"""
RUNNER = """
import time

class MPERunner:
    def train(self):
        time.sleep(0.02)
"""


@pytest.fixture
def on_policy(tmp_path):
    """A checkout of the MAPPO authors' code, as far as it is used; `rounds` iterations are its whole training."""

    def make(rounds: int, pids: str = "/dev/null") -> Path:
        files = {"scripts/train/train_mpe.py": TRAINER.replace("ROUNDS", str(rounds)).replace("PIDS", repr(pids))}
        files["runner/shared/mpe_runner.py"] = RUNNER
        for name, text in files.items():
            path = tmp_path / "theirs" / "onpolicy" / name
            path.parent.mkdir(parents=True)
            path.write_text(text)
        return tmp_path / "theirs"

    return make


def test_speed_peers_takes_the_seconds_apart_and_leaves_the_folder_alone(on_policy, tmp_path, monkeypatch, capsys):
    theirs = on_policy(rounds=100)
    monkeypatch.setattr(speed_peers, "run_ours", lambda *_: {"rollout": [0.01, 0.03], "update": [0.01, 0.01]})
    before = sorted(tmp_path.rglob("*"))
    words = [f"on-policy={theirs}", "--out", str(tmp_path / "x.json"), *"--turns 1 --iterations 3 --warmup 1".split()]
    speed_peers.main(speed_peers.parse_args(speed_peers.Args, "", words))
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "x.json"])
    turns = json.loads((tmp_path / "x.json").read_text())["peers"]["on-policy"]["turns"]
    (seconds,) = turns["on-policy"]
    assert len(seconds["rollout"]) == len(seconds["update"]) == 3
    assert min(seconds["rollout"]) >= 0.05 and min(seconds["update"]) >= 0.02
    table = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in table[2:]] == list(turns) and len(turns) == 3
    # The median of our iterations is 0.03, the mean of 0.02 and 0.04.
    ratio = statistics.median(map(sum, zip(seconds["rollout"], seconds["update"], strict=True))) / 0.03
    assert table[-1] == f"| mappo_mpe, jaxmarl | 0.020 | 0.010 | 0.030 | {ratio:.2f} |"


def test_speed_peers_leaves_no_process_of_a_trainer(on_policy, tmp_path):
    theirs = on_policy(rounds=100, pids=str(tmp_path / "pid"))
    args = speed_peers.Args((f"on-policy={theirs}",), tmp_path / "x.json", iterations=1, warmup=0)
    speed_peers.run_peer("on-policy", theirs, args, threads=1)
    status, begin = Path("/proc", (tmp_path / "pid").read_text().strip(), "status"), time.monotonic()
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() - begin < 30, "it goes on"
        time.sleep(0.01)


def test_speed_peers_says_in_one_line_that_a_trainer_ended(on_policy, tmp_path, capsys):
    args = speed_peers.Args((f"on-policy={on_policy(rounds=2)}",), tmp_path / "x.json", iterations=3, warmup=0)
    with pytest.raises(SystemExit) as stop:
        speed_peers.main(args)
    assert stop.value.code == 1 and "on-policy ended with status 0 after 2 iterations: " in only_line(capsys)


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "peers: name at least one, as NAME=FOLDER"),
        ("on-policy", "on-policy: must be NAME=FOLDER, with a name of on-policy, cleanmarl, harl, authors, jaxmarl"),
        ("marl=x", "marl=x: must be NAME=FOLDER"),
        ("harl=nowhere", "harl=nowhere: there is no nowhere/harl/configs/algos_cfgs/happo.yaml"),
        ("on-policy=theirs --turns 0", "--turns 0: must be at least 1"),
        ("on-policy=theirs --warmup -1", "--warmup -1: must be at least 0"),
    ],
)
def test_speed_peers_answers_a_wrong_value_with_one_line(words, message, on_policy, monkeypatch, capsys):
    monkeypatch.chdir(on_policy(rounds=1).parent)
    with pytest.raises(SystemExit) as stop:
        speed_peers.main(speed_peers.parse_args(speed_peers.Args, "", [*words.split(), "--out", "x.json"]))
    assert stop.value.code == 2 and message in only_line(capsys)
