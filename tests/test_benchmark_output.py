"""The programs of benchmark/: a wrong command line is one line, and so is what they cannot write, before they have
worked for it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from benchmark import (
    bounds,
    cli,
    plot,
    policy,
    random_mpe,
    run,
    sampled_mpe,
    speed,
    speed_grf,
    speed_mujoco,
    speed_peers,
    upside_down,
    watch,
)

WORK = {  # what begins each program's work
    run: ("find_run", "run_all"),
    plot: ("read",),
    speed: ("run_measurement",),
    bounds: ("study",),
    speed_grf: ("BareEngines", "Games"),
    speed_mujoco: ("run_measurement",),
    speed_peers: ("run_peer",),
    random_mpe: ("random_returns",),
    sampled_mpe: ("train_theirs", "read_ours", "read_evaluations"),
    upside_down: ("measure",),
}
TABLE2 = ["table2", "--smax", "--tasks", "3s5z", "--algorithms", "mappo", "--seeds", "1"]
CASES = [
    (run, [*TABLE2, "--collect", "FILE/x"]),
    (run, [*TABLE2, "--collect", "FILE"]),
    (run, [*TABLE2, "--dir", "FOLDER"]),
    (plot, ["FILE", "--table", "FILE/x.md"]),
    (plot, ["FILE", "--table", "FOLDER"]),
    (plot, ["FILE", "--out", "FILE/x.png"]),
    (plot, ["FILE", "--efficiency", "x.svg", "FILE/x.svg"]),
    (plot, ["FILE", "--improvement", "FILE/a/x.svg"]),
    (plot, ["FILE", "--orders", "FILE/x.png"]),
    (speed, ["--out", "FILE/x"]),
    (speed, ["--out", "FOLDER"]),
    (bounds, ["--out", "FILE"]),
    (bounds, ["--out", "FOLDER"]),
    (speed_grf, ["--out", "FILE/x.json"]),
    (speed_grf, ["--out", "nowhere/x.json"]),
    (speed_mujoco, ["--out", "FILE/x.json"]),
    (speed_mujoco, ["--out", "FOLDER"]),
    (speed_peers, ["cleanmarl=.", "--out", "FILE/x.json"]),
    (speed_peers, ["cleanmarl=.", "--out", "FOLDER"]),
    (random_mpe, ["FILE/x.json"]),
    (sampled_mpe, ["cleanmarl", "--out", "FILE/x.jsonl"]),
    (sampled_mpe, ["cleanmarl", "--out", "FOLDER"]),
    (policy, ["FILE", "FILE/x.pt"]),
    (upside_down, ["FILE", "--out", "FILE/x.json"]),
]


@pytest.mark.parametrize(
    "program, words, text",
    [
        (run, "table3", "invalid choice 'table3' for argument 'matrix'. Expected one of ('table2', 'figure3',"),
        (run, "", "Missing from"),
        (run, "table2 --total-timesteps x", "{None}|INT could be instantiated from ['x']; see --help"),
        (plot, "runs --reps 1.5", "error: parsing --reps: invalid literal for int() with base 10: '1.5'; see --help"),
        (plot, "runs --metric wins", "invalid choice 'wins' for argument '--metric'. Expected one of ('auto', "),
        (speed, "--out", "Missing value for argument '--out'. Expected 1 values; see --help"),
        (bounds, "--out x --gamma", "Unrecognized options: --gamma; see"),
        (random_mpe, "", "PATH JSON file to write"),
        (sampled_mpe, "runs/x", "Missing from"),
        (policy, "one", "PATH file to write (required)"),
        (speed_grf, "--nonsense 3", "Unrecognized options: --nonsense, 3; see --help"),
        (speed_mujoco, "--num-envs 4", "--out PATH JSON file of all turns (required)"),
        (speed_peers, "harl=x", "Missing from"),
        (upside_down, "--reps", "Unrecognized options: --reps"),
        (watch, "--out x.gif", "--checkpoint PATH"),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_one_line(program, words, text, capsys):
    with pytest.raises(SystemExit) as stop:
        program.parse_args(program.Args, program.__doc__, words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"{Path(program.__file__).name}: error: ") and text in line, line


def test_help_is_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run.parse_args(run.Args, "What it does.", ["--help"])
    told = capsys.readouterr()
    assert stop.value.code == 0 and "What it does." in told.out and "--seeds" in told.out and not told.err


@pytest.mark.parametrize("program, argv", CASES, ids=lambda x: " ".join(x) if isinstance(x, list) else x.__name__)
def test_it_is_told_before_the_work(program, argv, tmp_path, monkeypatch, capsys):
    (tmp_path / "FILE").write_text("")  # as root, no permission is refused; nothing can be below a file
    for name in ("speed.md", "summary.json"):  # files to write
        (tmp_path / "FOLDER" / name).mkdir(parents=True)
    (tmp_path / "FOLDER" / "runs").write_text("")  # a folder to write to
    (tmp_path / "cleanmarl").mkdir()
    for name in ("mappo_lstm_multienvs.py", "config.json"):
        (tmp_path / "cleanmarl" / name).write_text("")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    for name in WORK.get(program, ()):
        monkeypatch.setattr(program, name, lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(SystemExit) as stop:
        program.main(program.parse_args(program.Args, "", argv))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "cannot be written: " in line
    assert line.startswith(f"{Path(program.__file__).name}: error: ")
    assert sorted(tmp_path.rglob("*")) == before, "and it leaves nothing behind"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_in_the_end_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(random_mpe, "random_returns", lambda *_: [1.0, 2.0])
    with pytest.raises(SystemExit) as stop:
        random_mpe.main(random_mpe.Args(Path("/dev/full")))
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        stop.value.code == 2 and line == "random_mpe.py: error: /dev/full: cannot be written: No space left on device"
    )


def test_what_is_written_is_whole_or_as_it_was(tmp_path):
    """A file, or what a link names; what is no file, such as a pipe, is written to, and stays what it is."""
    file, link, pipe = tmp_path / "a.json", tmp_path / "link", tmp_path / "pipe"
    cli.write(file, "old")
    link.symlink_to(file)
    (tmp_path / "a.json.part").symlink_to("/dev/full")
    for path in (file, link):
        (tmp_path / "a.json.part").unlink(missing_ok=True)
        (tmp_path / "a.json.part").symlink_to("/dev/full")
        with pytest.raises(OSError):
            cli.write(path, b"new")
        assert file.read_text() == "old" and not (tmp_path / "a.json.part").exists()
    cli.write(link, b"new")
    assert file.read_text() == "new" and link.is_symlink()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    cli.write(pipe, "told")
    assert os.read(reader, 9) == b"told" and pipe.is_fifo()
    os.close(reader)


def test_what_is_written_to_stdout(tmp_path):
    """To a pipe, behind what was printed."""
    code = "import pathlib; from benchmark import cli; out = pathlib.Path('/dev/stdout'); print(1, flush=True); "
    code += "cli.check_writable(out); cli.write(out, 'told'); print(2)"
    root = Path(__file__).resolve().parents[1]
    told = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True).stdout
    assert told == b"1\ntold2\n"


def test_a_check_leaves_everything_as_it_was(tmp_path, monkeypatch):
    """Also what a link names that is not there; a folder in which no file can be made is told."""
    (tmp_path / "link").symlink_to(tmp_path / "new")
    before = sorted(tmp_path.iterdir())
    cli.check_writable(tmp_path / "link")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "there").write_text("old")
    with pytest.raises(OSError):
        (tmp_path / "there.part").mkdir()
        cli.check_writable(tmp_path / "there")
    os.chmod(tmp_path / "there", 0o640)
    (tmp_path / "there.part").rmdir()
    cli.write(tmp_path / "there", "new")
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o640


WRITING = {  # program: what it is called with, and what takes its work's place
    random_mpe: (["OUT"], {"random_returns": lambda *_: [1.0, 2.0]}),
    upside_down: (["x.pt", "--out", "OUT"], {"measure": lambda _: {}}),
    speed_mujoco: (["--out", "OUT"], {"run_measurement": lambda _: {}, "table": lambda _: ""}),
    plot: (["t", "--out", "OUT"], {}),
    policy: (["checkpoint.pt", "OUT"], {}),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("program", WRITING, ids=lambda program: program.__name__)
def test_a_full_disk_leaves_the_old_file(program, tmp_path, monkeypatch, capsys):
    words, instead = WRITING[program]
    for name, function in instead.items():
        monkeypatch.setattr(program, name, function)
    monkeypatch.chdir(tmp_path)
    Path("t").mkdir()
    Path("t", "a2po_mpe__1.jsonl").write_text('{"step": 1, "returns": [1.0]}\n{"step": 2, "returns": [2.0]}\n')
    torch.save({"args": {}, "script": "x", "learned": {}}, "checkpoint.pt")
    Path("old.png").write_text("old")
    Path("old.png.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stop:
        program.main(program.parse_args(program.Args, "", [word.replace("OUT", "old.png") for word in words]))
    assert stop.value.code == 2 and "old.png: cannot be written: No space" in capsys.readouterr().err
    assert Path("old.png").read_text() == "old"


def test_random_mpe_writes_the_levels_of_four_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(random_mpe, "random_returns", lambda n_agents, local_ratio, episodes: [-n_agents, -local_ratio])
    random_mpe.main(random_mpe.Args(tmp_path / "new" / "random.json"))
    levels = json.loads((tmp_path / "new" / "random.json").read_text())
    assert list(levels) == ["spread-3-0", "spread-3-0.5", "spread-5-0", "spread-5-0.5"]
    assert levels["spread-5-0.5"] == {"episodes": 2, "mean": -2.75, "standard_error": round(2.25 / 2**0.5, 3)}


def test_sampled_returns_of_a_run_in_windows(tmp_path, capsys):
    """Of two files of events the later one counts from where the run was resumed; a step may end its window."""
    names = "script git_commit critic_steps update_epochs gae_lambda cumulative_blocks agent_id deep".split()
    names.append("preopc_targets")
    (tmp_path / "config.json").write_text(json.dumps(dict.fromkeys(names, "x") | {"script": "a2po_mpe", "seed": 7}))
    for returns in ({1200: 1.0, 2000: 2.0, 2800: 9.0}, {2400: 4.0, 3200: 5.0, 4000: 7.0, 4800: 8.0}):
        writer = SummaryWriter(tmp_path, filename_suffix=f".{len(returns)}", purge_step=min(returns))
        for step, value in returns.items():
            writer.add_scalar("charts/episodic_return", value, step)
        writer.close()
    evaluations = [{"step": step, "returns": [-1.0, step / 1000]} for step in (2000, 4000, 4400)]
    lines = "".join(json.dumps(line) + "\n" for line in evaluations)
    (tmp_path / "eval.jsonl").write_text(lines + '{"step": 5200, "ret')  # it was cut off
    out = tmp_path / "out.jsonl"
    sampled_mpe.main(sampled_mpe.Args(tmp_path, out, total_timesteps=4000, window=2000))
    record = json.loads(out.read_text())
    assert record["seed"] == 7 and record["trainer"] == "ours" and record["returns"] == [1.5, 5.333]
    assert all(record[name] == "x" for name in names[1:]) and record["greedy"] == [[2000, 0.5], [4000, 1.5]]
    SummaryWriter(tmp_path, filename_suffix=".9").close()  # resumed, and stopped at once
    (tmp_path / "smac").mkdir()
    (tmp_path / "smac" / "config.json").write_text('{"script": "a2po_smac"}')
    for path, steps, window, text in (
        (tmp_path, 9000, 2000, "has not come to step 9000"),
        (tmp_path, 1000, 500, "--window 500: must be within 1000 and"),
        (tmp_path, 4000, 1000, "--window 1000: must be so large"),
        (tmp_path / "a", 4000, 2000, "is neither a run"),
        (tmp_path / "smac", 4000, 2000, "is not of a script for MPE"),
    ):
        with pytest.raises(SystemExit) as stop:
            sampled_mpe.main(sampled_mpe.Args(path, out, total_timesteps=steps, window=window))
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and text in line and len(out.read_text().splitlines()) == 1


def test_sampled_returns_of_the_authors_trainer(tmp_path):
    """A made-up one, which logs what it is given as returns: the settings, and that nothing else is taken for one."""
    files = {
        "config/pettingzoo.yaml": "simple_spread: {env_args: {local_ratio: 0.5}}",
        "runner/pettingzoo_runner.py": """
            import numpy as np
            class PettingZooRunner:
                def run(self, settings, flags):
                    assert settings["share_policy"] and settings["use_cum_sequence"]
                    assert settings["env_args"]["local_ratio"] == 0 and flags["--use_two_stage"] == "True"
                    for step in range(800, settings["num_env_steps"] + 1, 800):
                        self.log_train({"average_episode_rewards": int(flags["--seed"])}, step)
                        self.log_train({"agent0/individual_rewards": 99}, step)
                    assert settings["use_eval"] and settings["eval_episodes"] == 32
                    self.log_env({"eval_average_episode_rewards": np.array([1.0, 4.0])}, 3200)
            """,
        "scripts/train/train_pettingzoo.py": """
            import yaml
            ShareDummyVecEnv, ShareSubprocVecEnv = "here", "processes"
            def main(words):
                from onpolicy.runner.pettingzoo_runner import PettingZooRunner
                flags = dict(zip(words[::2], words[1::2]))
                assert flags["--log_interval"] == "1" and ShareSubprocVecEnv == "here"
                with open("onpolicy/config/pettingzoo.yaml") as file:
                    PettingZooRunner().run(yaml.safe_load(file)["simple_spread"], flags)
            """,
    }
    for name, text in files.items():
        file = tmp_path / "theirs" / "onpolicy" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    words = "theirs --out out.jsonl --seed 3 --total-timesteps 4000 --window 2000".split()
    subprocess.run([sys.executable, sampled_mpe.__file__, *words], cwd=tmp_path, check=True)
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert record["trainer"] == "authors" and record["seed"] == 3 and record["returns"] == [3.0, 3.0]
    assert record["greedy"] == [[3200, 2.5]]


def test_on_the_back(tmp_path, monkeypatch):
    """The share of steps with a torso whose angle has a negative cosine, and the returns, of a checkpoint."""
    pytest.importorskip("envpool")
    monkeypatch.setattr(upside_down, "STEPS", 3)
    policy_file = Path(__file__).resolve().parents[1] / "benchmark/policies/mujoco-halfcheetah-2x3.pt"
    monkeypatch.chdir(tmp_path)
    upside_down.main(upside_down.Args((policy_file,), Path("out.json")))
    (record,) = json.loads(Path("out.json").read_text())
    assert record["script"] == "a2po_mamujoco" and record["on_its_back"] == 0 and len(record["returns"]) == 32
    monkeypatch.setattr(upside_down, "TORSO_ANGLE", slice(None))  # many numbers, some of them beyond pi / 2
    assert upside_down.measure(policy_file)["on_its_back"] > 0


@pytest.mark.parametrize("name", ["LICENSE", "benchmark/policies/smac-3s5z-smax.pt"])
def test_what_is_no_cheetah_is_one_line(name, capsys):
    with pytest.raises(SystemExit) as stop:
        upside_down.main(upside_down.Args((Path(__file__).resolve().parents[1] / name,)))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and name in line
