"""Training with a2po_mpe.py: rewards and advantages per agent, evaluation, interruption and resumption, workers that
fail, the run directory, wrong input; and the update of all MPE scripts against plain loops."""

import dataclasses
import importlib.metadata
import json
import math
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from helpers import Skirmish, assert_same_training, differences, evaluations, in_double, load, make_args, scalars
from helpers import train as train_on
from reference import Reference
from test_env_mpe import AGENTS, N, jax_games, workers  # noqa: F401, fixtures

import a2po_mpe as script

ROOT = Path(__file__).parents[1]
SCRIPTS = ["a2po_mpe", "mappo_mpe", "coppo_mpe", "happo_mpe"]
SMALL = {"n_agents": 3, "local_ratio": 0.5, "seed": 3, "total_timesteps": 30, "num_envs": 2, "num_steps": 10}
SMALL |= {"num_workers": 1, "hidden_size": 8, "update_epochs": 4, "eval_every": 10**9, "eval_episodes": 2}
SMALL |= {"save_every": 10**9, "torch_threads": 1, "cuda": False, "learning_rate": 3e-3, "max_grad_norm": 0.3}
SMALL |= {"huber_delta": 0.5, "clip_coef": 0.05}


class Recorder(gym.vector.VectorWrapper):
    """Keeps every step of the simulator; in step `signal_at` sends a signal, in those of `kill_at` kills a worker."""

    def __init__(self, envs, signal_at=None, kill_at=()):
        super().__init__(envs)
        self.record, self.seen, self.signal_at, self.kill_at = [], None, signal_at, kill_at

    def reset(self, **options):
        self.seen, info = self.env.reset(**options)
        return self.seen, info

    def step(self, actions):
        if len(self.record) == self.signal_at:
            signal.raise_signal(signal.SIGTERM)
        if len(self.record) in self.kill_at:
            self.env.processes[0].kill()
        before, (self.seen, *results, info) = self.seen, self.env.step(actions)
        self.record.append((before, np.array(actions), *results, self.seen))
        return self.seen, *results, info

    def get_state(self):
        return self.env.get_state()

    def set_state(self, state):
        self.env.set_state(state)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(where, **options of Recorder or Args, argv=None) -> (checkpoint, run directory, games, exit status).

    Episodes take 6 steps here, so that they end within a rollout of 10.
    """
    pytest.importorskip("mpe2")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(script, "EPISODE_STEPS", 6)
    make_envs = script.make_envs

    def run(where="run", argv=None, **options):
        at, games = {name: options.pop(name) for name in ("signal_at", "kill_at") if name in options}, []

        def recorded(args):
            envs = make_envs(args)
            envs.env = Recorder(envs.env, **at)
            games.append(envs.env)
            return envs

        monkeypatch.setattr(script, "make_envs", recorded)
        (tmp_path / where).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / where)
        status = 0
        try:
            script.main(script.parse_args(argv) if argv else script.Args(**SMALL | options))
        except SystemExit as error:
            status = error.code
        (run_dir,) = (tmp_path / where / "runs").iterdir()
        saved = run_dir / "checkpoint.pt"
        return torch.load(saved, weights_only=True) if saved.exists() else None, run_dir, games[0], status

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("local_ratio", [0.0, 0.5])
def test_advantages_by_agent(local_ratio, train, monkeypatch):
    """General-sum: an agent's advantages follow from its own rewards. Cooperative: all agents' rewards are one."""
    calls, function = [], script.preopc_advantages
    monkeypatch.setattr(
        script, "preopc_advantages", lambda *inputs: calls.append((inputs, function(*inputs))) or calls[-1][1]
    )
    train(local_ratio=local_ratio, num_envs=4)
    (rewards, values, terminated, done, *rest), advantages = calls[0]
    assert rewards.shape == advantages.shape == (10, 4, 3) and values.shape == (11, 4, 3) and not terminated.any()
    assert done[5].all() and done.sum() == 4, "cut where the episode ends"
    assert (rewards != rewards[..., :1]).any() == (local_ratio > 0)
    changed = rewards.clone()
    changed[..., 1] += 1.0
    moved = (function(changed, values, terminated, done, *rest) != advantages).any(0).any(0)
    assert moved.tolist() == [False, True, False]


def test_steps_and_returns(train):
    """Fillers count neither as steps nor in returns; the return is the mean over agents of their sums of rewards."""
    checkpoint, run_dir, games, _ = train(total_timesteps=50)
    training = games.record[: checkpoint["progress"]["iteration"] * 10]
    filler = np.array([False] + [x[4].any() for x in training[:-1]])
    assert checkpoint["progress"]["global_step"] == 2 * (~filler).sum() and filler.sum() >= 3
    expected = np.mean(np.sum([reward for _, _, reward, *_ in training[:6]], 0))
    logged = scalars(run_dir)
    assert logged["charts/episodic_return"][0].value == pytest.approx(expected, rel=1e-5)
    assert {event.value for event in logged["charts/episodic_length"]} == {6.0}


def parts(envs):
    """All tensors in the environments' state."""
    state = envs.get_state()
    return [*state["simulator"], *state["obs"].values(), *state["episodes"]]


def test_evaluation(workers):  # noqa: F811
    """The actor's most likely actions from new starts; the first episodes of as many environments as asked for."""
    torch.manual_seed(0)
    actor, games = script.RecurrentNetwork(18, 5, 8, gain=1.0), Recorder(workers)
    envs = script.Episodes(games)
    envs.reset(seed=6)
    before = parts(envs)
    episodes = script.evaluate(actor, envs, 3, torch.device("cpu"))
    assert all(map(torch.equal, before, parts(envs))), "the games are as they were"
    rewards = np.array([reward for _, _, reward, *_ in games.record])
    assert len(rewards) == 25 and {episode["length"] for episode in episodes} == {25}
    assert [episode["return"] for episode in episodes] == pytest.approx(rewards.mean(-1).sum(0)[:3], abs=1e-3)
    assert [episode["env"] for episode in episodes] == [0, 1, 2]
    hidden = torch.zeros(N * AGENTS, 8)
    with torch.no_grad():
        for seen, actions, *_ in games.record:
            hidden = actor.gru(actor.base(torch.as_tensor(seen["obs"]).flatten(0, 1)), hidden)
            assert np.array_equal(actions, actor.head(hidden).argmax(-1).view(N, AGENTS).numpy())
    games.record.clear()
    episodes = script.evaluate(actor, envs, 6, torch.device("cpu"))
    rewards = np.array([reward for _, _, reward, *_ in games.record])
    expected = [*rewards[:25].mean(-1).sum(0), *rewards[26:].mean(-1).sum(0)[:2]]
    assert len(rewards) == 51 and [e["return"] for e in episodes] == pytest.approx(expected, abs=1e-3)


def test_seeds_and_evaluation_in_training(train):
    """The same seed gives the same weights, with evaluations between and another number of workers; others differ."""
    first, run_dir, _, _ = train("a")
    assert differences(first, train("b", eval_every=1, num_workers=2)[0]) == []
    assert any("/actor/" in path for path in differences(first, train("c", seed=4)[0], ["learned"]))
    assert len(evaluations(run_dir)) == 1


def resume_changes_nothing(train, simulator):
    """A signal, a checkpoint after the iteration, and --resume ends where an uninterrupted run does."""
    options = {"total_timesteps": 90, "eval_every": 30, "save_every": 40, "simulator": simulator}
    whole, whole_dir, _, status = train("whole", **options)
    assert status == 0
    half, run_dir, _, status = train("half", signal_at=13, **options)
    assert status == 128 + signal.SIGTERM and half["progress"]["iteration"] == 2
    resumed, again, _, status = train("half", argv=["--resume", str(run_dir), "--num-workers", "2"])
    assert status == 0 and again == run_dir
    assert differences(whole, resumed) == []
    assert resumed["progress"]["global_step"] == whole["progress"]["global_step"]
    kept, expected = ([{**e, "seconds": 0} for e in evaluations(d)] for d in (run_dir, whole_dir))
    assert kept == expected and len(expected) >= 3


def test_resume_mpe2(train):
    resume_changes_nothing(train, "mpe2")


def test_a_dead_worker_is_replaced_and_the_run_goes_on(train):
    """Its games' episodes are dropped and counted; their steps are none."""
    with pytest.warns(UserWarning, match="worker 0 died; the episodes of its games are dropped"):
        checkpoint, run_dir, games, status = train(total_timesteps=50, num_workers=2, kill_at=(12,))
    assert status == 0 and checkpoint["progress"]["crashes"] == 1 and checkpoint["progress"]["iteration"] == 3
    # Steps 6, 13, 20 and 27 are fillers; environment 0 lost step 12, began anew in step 13, then every 7th.
    truncated = np.array([truncated for _, _, _, _, truncated, _ in games.record[:30]])
    assert np.flatnonzero(truncated[:, 1]).tolist() == [5, 12, 19, 26]
    assert np.flatnonzero(truncated[:, 0]).tolist() == [5, 12, 19, 26]
    assert checkpoint["progress"]["global_step"] == 60 - 8 - 1
    logged = scalars(run_dir)
    assert [event.value for event in logged["charts/crashes"]] == [0, 1, 1]
    assert {event.value for event in logged["charts/episodic_length"]} == {6.0}


def test_games_that_fail_again_and_again_end_the_run(train):
    """The last weights are saved, the message says how to go on, and one can."""
    with pytest.warns(UserWarning, match="worker 0 died"):
        saved, run_dir, _, status = train(kill_at=range(12, 99))
    assert "games failed 3 times" in status and f"--resume runs/{run_dir.name}" in status
    assert saved["progress"]["iteration"] == 1 and saved["envs"] is None
    resumed, _, _, status = train(argv=["--resume", str(run_dir)])
    assert status == 0 and resumed["progress"]["global_step"] >= 30


# -------------------------------------------------------------------------------------- run directory, wrong input
@pytest.mark.parametrize("name", SCRIPTS)
def test_run_directory(name, tmp_path, monkeypatch):
    """config.json, eval.jsonl, TensorBoard keys and the checkpoint, as DESIGN section 7 has them."""
    pytest.importorskip("mpe2")
    script = load(name)
    monkeypatch.setattr(script, "EPISODE_STEPS", 6)
    monkeypatch.chdir(tmp_path)
    script.main(script.Args(**SMALL | {"total_timesteps": 60, "eval_every": 20, "num_envs": 3, "eval_episodes": 4}))
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith(f"spread-3-0.5-mpe2__{name}__3__")
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"config", "eval", "checkpoint", "events"}
    config = json.loads((run_dir / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(script.Args)} <= config.keys()
    assert None not in config.values() and config.get("agent_blocks", 3) == 3, "each agent is a block"
    assert config["versions"]["mpe2"] == importlib.metadata.version("mpe2")
    lines = evaluations(run_dir)
    assert len(lines) >= 2 and sorted(e["step"] for e in lines) == [e["step"] for e in lines]
    for line in lines:
        assert line.keys() == {"step", "seconds", "episodic_return", "returns"}
        assert len(line["returns"]) == 4 and line["episodic_return"] == pytest.approx(np.mean(line["returns"]))
    charts = "episodic_return episodic_length SPS learning_rate crashes".split()
    losses = "policy_loss value_loss entropy approx_kl clipfrac explained_variance".split()
    expected = {f"charts/{c}" for c in charts} | {f"losses/{x}" for x in losses}
    expected |= {"eval/episodic_return", "time/rollout_seconds", "time/update_seconds"}
    if name == "a2po_mpe":
        expected |= {f"a2po/position_{k}/{x}" for k in (1, 2, 3) for x in ("clipfrac", "preceding_clipfrac", "ratio")}
        expected |= {f"a2po/rank_of_agent/{i}" for i in range(3)}
    if name in ("a2po_mpe", "happo_mpe"):
        expected |= {f"{name.split('_')[0]}/position_of_agent/{i}" for i in range(3)}
    logged = scalars(run_dir)
    assert expected <= logged.keys()
    assert all(math.isfinite(event.value) for events in logged.values() for event in events)
    assert [event.value for event in logged["eval/episodic_return"]] == pytest.approx(
        [e["episodic_return"] for e in lines]
    )


WRONG = [
    ("--n-agents 1", "--n-agents 1"),
    ("--n-agents 0", "--n-agents 0"),
    ("--n-agents -2", "--n-agents -2"),
    ("--local-ratio 1.5", "--local-ratio 1.5"),
    ("--local-ratio -0.5", "--local-ratio -0.5"),
    ("--local-ratio nan", "--local-ratio nan"),
    ("--num-workers 0", "--num-workers 0"),
    ("--worker-timeout inf", "--worker-timeout inf"),
    ("--num-envs 0", "--num-envs 0"),
    ("--num-steps 24", "--num-steps 24"),
    ("--agent-blocks 4", "--agent-blocks 4"),
    ("--agent-blocks 0", "--agent-blocks 0"),
    ("--gae-lambda 1.1", "--gae-lambda 1.1"),
    ("--learning-rate inf", "--learning-rate inf"),
    ("--clip-adaptation 2.0", "--clip-adaptation 2.0"),
    ("--seed -1", "--seed -1"),
    ("--eval-only", "--eval-only"),
    ("--checkpoint good.pt", "--checkpoint good.pt"),
    ("--eval-only --checkpoint none.pt", "--checkpoint none.pt"),
    ("--eval-only --checkpoint corrupt.pt", "--checkpoint corrupt.pt"),
    ("--eval-only --checkpoint smac.pt", "--checkpoint smac.pt"),
    ("--eval-only --checkpoint old.pt", "--checkpoint old.pt"),
    ("--eval-only --checkpoint good.pt --n-agents 5", "--n-agents 5: good.pt is of 3"),
    ("--eval-only --checkpoint good.pt --hidden-size 16", "--hidden-size 16: good.pt is of 8"),
    ("--resume nowhere", "--resume nowhere"),
    ("--resume run --num-envs 3", "--num-envs 3: run/checkpoint.pt is of"),
    ("--resume run --local-ratio 0", "--local-ratio 0.0: run/checkpoint.pt is of"),
    ("--resume fast --simulator mpe2", "--simulator mpe2: fast/checkpoint.pt is of"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with good and bad checkpoints."""
    pytest.importorskip("mpe2")
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        script.main(script.Args(**SMALL | {"total_timesteps": 1, "eval_episodes": 1}))
        (made,) = (folder / "runs").iterdir()
        made.rename(folder / "run")
        (folder / "runs").rmdir()
    good = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
    torch.save(good, folder / "good.pt")
    torch.save(good | {"args": {"map": "3m", "seed": 1}, "script": "a2po_smac"}, folder / "smac.pt")
    torch.save({name: part for name, part in good.items() if name != "learned"} | good["learned"], folder / "old.pt")
    (folder / "fast").mkdir()
    torch.save(good | {"args": good["args"] | {"simulator": "jaxmarl"}}, folder / "fast" / "checkpoint.pt")
    (folder / "corrupt.pt").write_bytes(b"no checkpoint at all")
    return folder


@pytest.mark.parametrize(("command", "named"), WRONG, ids=[command for command, _ in WRONG])
def test_wrong_input(command, named, files, monkeypatch, capsys):
    """Status 2 and one line on stderr with the option and its value."""
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as left:
        script.main(dataclasses.replace(script.parse_args(command.split()), torch_threads=1))
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("a2po_mpe.py: error: ") and named in lines[0]
    assert not (files / "runs").exists(), "nothing is left behind"


def eval_only(simulator, files, monkeypatch, capsys):
    """The checkpoint's networks play, in either simulator; nothing is trained or written."""
    monkeypatch.chdir(files)
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    words = f"--eval-only --checkpoint good.pt --eval-episodes 5 --num-envs {N} --simulator {simulator}".split()
    script.main(script.parse_args(words))
    assert "5 greedy episodes: return -" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before


def test_eval_only_mpe2(files, monkeypatch, capsys):
    eval_only("mpe2", files, monkeypatch, capsys)


def test_command_line():
    """The real thing: a wrong value in a process of its own."""
    command = [sys.executable, ROOT / "a2po_mpe.py", "--n-agents", "1"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1 and "--n-agents 1" in process.stderr


def test_import_needs_no_simulator():
    """Importing the script imports neither JAX nor mpe2."""
    code = "import a2po_mpe, sys; print([m for m in ('jax', 'jaxmarl', 'mpe2', 'pettingzoo') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.strip() == "[]", process.stdout + process.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_pins(name):
    """The versions in the script's PEP 723 block are the installed ones."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    block = lines[lines.index("# /// script") + 1 : lines.index("# ///")]
    for pin in tomllib.loads("\n".join(line[2:] for line in block))["dependencies"]:
        package, version = pin.split("==")
        assert importlib.metadata.version(package).split("+")[0] == version


@pytest.mark.parametrize("name", SCRIPTS)
def test_table_10(name):
    """The defaults are the paper's."""
    script = load(name)
    args = vars(script.complete_args(script.Args()))
    paper = {"update_epochs": 8, "chunk_length": 5, "ent_coef": 0.05, "learning_rate": 2e-4, "gae_lambda": 0.97}
    paper |= {"clip_coef": 0.2, "n_agents": 3, "local_ratio": 0.0, "agent_blocks": 3, "clip_adaptation": 0.5}
    assert {name: value for name, value in paper.items() if name in args}.items() <= args.items()
    assert script.EPISODE_STEPS == 25 and len(paper.keys() & args.keys()) >= 8
    if "agent_blocks" in args:
        assert script.complete_args(script.Args(n_agents=5)).agent_blocks == 5


# ---------------------------------------------------------------------------- JAX's threads and forks do not mix
def test_resume_jaxmarl(train, jax_games):  # noqa: F811
    resume_changes_nothing(train, "jaxmarl")


def test_eval_only_jaxmarl(files, monkeypatch, capsys, jax_games):  # noqa: F811
    eval_only("jaxmarl", files, monkeypatch, capsys)


# ------------------------------------------------------------------------------------------ the update in plain loops
OPTIONS = [("a2po_mpe", {"cumulative_blocks": True}), ("happo_mpe", {"preopc": True}), ("mappo_mpe", {"vtrace": True})]
OPTIONS += [("a2po_mpe", {"preopc_targets": False}), ("coppo_mpe", {"vtrace": True})]
OPTIONS += [(name, options) for name in SCRIPTS for options in ({"critic_steps": 2}, {"recurrent": False})]


@pytest.mark.parametrize("general", [False, True], ids=["cooperative", "general-sum"])
@pytest.mark.parametrize(("name", "options"), [*[(name, {}) for name in SCRIPTS], *OPTIONS], ids=str)
def test_training_is_the_algorithm_in_plain_loops(name, options, general, tmp_path):
    """Two iterations of main, in double, and of loops over samples: rewards, values and advantages of each agent."""
    module = load(name)
    args = make_args(module, agent_blocks=3, update_epochs=5, clip_coef=0.03, max_grad_norm=0.15, **options)
    with in_double():
        run = train_on(module, tmp_path, lambda N: Skirmish(N, dtype=np.float64, general=general), args)
    record = run.games[0].record
    assert general == any((np.ndim(step.rewards) == 2 and np.ptp(step.rewards, 1).any()) for step in record)
    networks = [[run.initial[part]] * Skirmish.n for part in ("actor", "critic")]
    assert_same_training(run, Reference(name.split("_")[0], *networks, run.args), record)


@pytest.mark.parametrize(("name", "options"), [*[(name, {}) for name in SCRIPTS], *OPTIONS], ids=str)
def test_training_on_a_gpu(name, options, tmp_path):
    """Pretended: nothing there meets a tensor of the CPU, and the numbers are the CPU's."""
    module = load(name)
    options = options | {"total_timesteps": 10, "update_epochs": 2}
    here, there = (make_args(module, cuda=cuda, **options) for cuda in (False, True))
    here = train_on(module, tmp_path / "here", lambda N: Skirmish(N, general=True), here)
    with elsewhere(module):
        there = train_on(module, tmp_path / "there", lambda N: Skirmish(N, general=True), there)
    assert there.status == 0 and differences(here.checkpoint, there.checkpoint) == []
    assert len(evaluations(there.folder)) == 1
