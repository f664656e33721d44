"""The command line: every wrong input is one line on stderr and status 2, what the options default to, and what is
imported or pinned. SMAC's scripts in full; of the others what they share with these, and their own tests the rest."""

import dataclasses
import importlib.metadata
import subprocess
import sys
import tomllib

import pytest
import torch
from helpers import ROOT, SCRIPTS, SMAC_SCRIPTS, SMALL, Skirmish, in_place_of_the_simulator, load, make_args
from helpers import train as train_on


@pytest.fixture(params=SMAC_SCRIPTS)
def script(request):
    return load(request.param)


def left_with(script, words, capsys):
    """What main leaves on stderr, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        script.main(script.parse_args(words))
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()


# ------------------------------------------------------------------------------------------------- options of all
ANYWHERE = [
    "--critic-steps 0",
    *[f"--{name} 0" for name in "num-envs num-steps total-timesteps update-epochs hidden-size torch-threads".split()],
    *[f"--{name} 0" for name in "chunk-length num-workers eval-every eval-episodes save-every agent-blocks".split()],
    *[f"--{name} -3" for name in "num-envs num-workers agent-blocks".split()],
    *[f"--{name} {x}" for name in "learning-rate worker-timeout".split() for x in ("-0.1", "nan", "inf")],
    "--worker-timeout 1000001.0",
    *["--torch-threads 1025", "--hidden-size 8193", "--num-envs 65537", "--eval-episodes 65537"],
    *[f"--{name} {x}" for name in "clip-coef ent-coef max-grad-norm huber-delta".split() for x in ("-1.0", "nan")],
    *[f"--{name} {x}" for name in "gamma gae-lambda clip-adaptation".split() for x in ("1.5", "-0.5", "nan")],
    "--seed -1",
    "--seed 2147484",
    "--eval-only",
    "--checkpoint good.pt",
    "--resume nowhere",
    "--eval-only --checkpoint none.pt",
    "--eval-only --checkpoint none.pt --resume nowhere",
    "--out scores.jsonl",
    "--exp-name a__b",
    "--cuda False",
    "--track true",
    "--no-track yes",
    "--seed",
    "--seed None",
    "--gamma None",
    "--exp-name --seed 3",
    *[f"--{name} {x}" for name in "seed num-envs num-steps eval-every".split() for x in ("many", "1.5", "1e-3", "inf")],
    *[f"--{name} {x}" for name in "gamma gae-lambda ent-coef learning-rate".split() for x in ("much", "0,5", "1/2")],
    *[f"--{name} most" for name in "simulator agent-order scenario env-version action-ratio".split()],
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_wrong_options(name, tmp_path, monkeypatch, capsys):
    """Of every script, as far as it has them."""
    script = load(name)
    fields = {field.name for field in dataclasses.fields(script.Args)}
    monkeypatch.chdir(tmp_path)
    if hasattr(script, "find_starcraft2"):
        monkeypatch.setattr(script, "find_starcraft2", lambda: (False, "the Python package smacv2 is not installed"))
    if hasattr(script, "find_football"):
        monkeypatch.setattr(script, "find_football", lambda: True)
    monkeypatch.setattr(script, "make_envs", lambda *_: pytest.fail("came as far as the environments"))
    tried = 0
    for command in ANYWHERE:
        words = command.split()
        if {word[2:].replace("-", "_") for word in words if word.startswith("--")} <= fields:
            lines = left_with(script, words, capsys)
            named = command.replace("--eval-only --checkpoint none.pt", "--checkpoint none.pt")
            named = "--eval-only" if "--resume" in words and "--eval-only" in words else named
            named = "--exp-name: " if command == "--exp-name --seed 3" else named
            assert len(lines) == 1 and lines[0].startswith(f"{name}.py: error: {named}"), (command, lines)
            tried += 1
    assert tried > 25 and not any(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capsys):
    """Every option stands there, with what it is."""
    script = load(name)
    with pytest.raises(SystemExit) as left:
        script.parse_args(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in text for field in dataclasses.fields(script.Args))
    assert "discount factor" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_hints(name, tmp_path, monkeypatch, capsys):
    """What may have been meant."""
    script = load(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"")
    benchmark = name.split("_")[1]
    mistyped = {
        "smac": ("--map 3s5x", "did you mean 3s5z?"),
        "mamujoco": ("--scenario Ant --partition 4x22", "did you mean 4x2?"),
        "mpe": None,
    }
    mistyped["grf"] = ("--scenario academy_run_to_skore", "did you mean academy_run_to_score?")
    hints = [
        ("--cuda False", "--cuda or --no-cuda"),
        ("--no-cuda=1", "--cuda or --no-cuda"),
        ("--total-timesteps 1e6.5", "must be a whole number"),
        ("--gamma=x", "must be a number"),
        ("--hidden-size", "needs a value"),
        ("--resume=", "needs a value"),  # of a variable that is not set
        ("--eval-only --checkpoint=", "needs a value"),
        ("--eval-only=true", "--eval-only or --no-eval-only"),
        ("--eval-only --checkpoint run", "run/checkpoint.pt"),
        ("--resume run/checkpoint.pt", "its folder, run"),
        *filter(None, [mistyped[benchmark]]),
    ]
    if benchmark == "mamujoco":
        hints.append(("--scenario Ant --env-version v2", "with --scenario Ant it must be one of v3, v4, v5"))
    for command, hint in hints:
        (line,) = left_with(script, command.split(), capsys)
        assert hint in line and line.startswith(f"{name}.py: error: --"), line
    for command, hint in [("--num_env 3", "; did you mean --num-envs?"), ("3s5z", ""), ("--lr 1e-3", "")]:
        (line,) = left_with(script, command.split(), capsys)
        assert line == f"{name}.py: error: option {command.split()[0]}: is none of those in --help{hint}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults_that_no_table_has(name):
    """MAPPO's, and those that the results are of; the reference in the tests of the update takes whatever is given."""
    benchmark, args = name.split("_")[1], vars(load(name).Args())
    expected = {"huber_delta": 10.0, "max_grad_norm": 10.0, "hidden_size": 64, "critic_steps": 1, "eval_episodes": 32}
    expected |= {"gamma": 0.995 if benchmark == "grf" else 0.99, "cumulative_blocks": False, "recurrent": True}
    expected |= {"deep": benchmark == "mpe", "agent_id": False, "share_parameters": False, "seed": 1}
    of_benchmark = {"mpe": {"num_envs": 32, "num_steps": 25}, "mamujoco": {"num_envs": 16}}
    of_benchmark["grf"] = {"num_envs": 24, "reward_goal": 5.0, "reward_win": 5.0, "reward_position": 1.0}
    of_benchmark["grf"] |= dict.fromkeys(("reward_ball_gained", "reward_ball_lost", "reward_out"), 0.1)
    expected = {option: value for option, value in expected.items() if option in args} | of_benchmark.get(benchmark, {})
    assert {option: args[option] for option in expected} == expected


@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers(name):
    """Whole numbers may be written with an exponent or underscores; names that look like one are left as they are."""
    parse = load(name).parse_args
    words = "--total-timesteps 1e6 --eval-every=2.5E3 --save_every 1_000 --exp-name 1e6 --learning-rate 1e-3".split()
    args = parse(words)
    assert (args.total_timesteps, args.eval_every, args.save_every) == (1_000_000, 2500, 1000)
    assert (args.exp_name, args.learning_rate) == ("1e6", 0.001) and type(args.total_timesteps) is int
    for field in dataclasses.fields(load(name).Args):
        if type(None) in getattr(field.type, "__args__", ()):
            assert getattr(parse([f"--{field.name.replace('_', '-')}", "None"]), field.name) is None


def test_command_line():
    """The real thing: a wrong map in a process of its own."""
    process = subprocess.run([sys.executable, ROOT / "a2po_smac.py", "--map", "4x"], capture_output=True, text=True)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1 and "--map 4x" in process.stderr


# ------------------------------------------------------------------------------------------------ SMAC: wrong input
WRONG = [
    ("--map 3x", "--map 3x"),
    ("--map MMM", "--map MMM"),
    ("--map MMM --simulator smax", "--map MMM"),
    ("--map zerg_0_vs_5", "--map zerg_0_vs_5"),
    ("--simulator starcraft2", "--simulator starcraft2"),
    ("--simulator starcraft2 --map smacv2_5_units", "--map smacv2_5_units"),
    ("--num-steps 25", "--num-steps 25"),
    ("--agent-blocks 4", "--agent-blocks 4"),
    ("--checkpoint good.pt", "--checkpoint good.pt"),
    ("--eval-only --checkpoint corrupt.pt", "--checkpoint corrupt.pt"),
    ("--eval-only --checkpoint half.pt", "--checkpoint half.pt"),
    ("--eval-only --checkpoint foreign.pt", "--checkpoint foreign.pt"),
    ("--eval-only --checkpoint weights.pt", "--checkpoint weights.pt"),
    ("--eval-only --checkpoint old.pt", "--checkpoint old.pt"),
    ("--eval-only --checkpoint other_options.pt", "--checkpoint other_options.pt"),
    ("--eval-only --checkpoint other_networks.pt", "--checkpoint other_networks.pt"),
    ("--eval-only --checkpoint .", "--checkpoint ."),
    ("--eval-only --checkpoint good.pt --map 8m", "--map 8m: good.pt is of 3m"),
    ("--eval-only --checkpoint good.pt --hidden-size 16", "--hidden-size 16: good.pt is of 8"),
    ("--eval-only --checkpoint good.pt --resume run", "--eval-only"),
    ("--resume empty", "--resume empty"),
    ("--resume corrupt", "--resume corrupt"),
    ("--resume old", "--resume old"),
    ("--resume one_optimizer", "is of another version of this script: there is no actor_optimizer in it"),
    ("--resume run --num-envs 3", "--num-envs 3: run/checkpoint.pt is of 2"),
    ("--resume run --map 8m", "--map 8m: run/checkpoint.pt is of 3m"),
    ("--resume run --hidden-size 16", "--hidden-size 16: run/checkpoint.pt is of 8"),
    ("--resume other_script", "--resume other_script"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """For a script a folder with good and bad checkpoints and run directories."""
    made = {}

    def make(script):
        if script.__name__ in made:
            return made[script.__name__]
        folder = made[script.__name__] = tmp_path_factory.mktemp(script.__name__)
        good = train_on(script, tmp_path_factory.mktemp("run"), Skirmish, make_args(script)).checkpoint
        torch.save(good, folder / "good.pt")
        whole = (folder / "good.pt").read_bytes()
        (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
        (folder / "corrupt.pt").write_bytes(b"no checkpoint at all")
        torch.save({"model": torch.ones(3)}, folder / "foreign.pt")
        torch.save([torch.ones(3)], folder / "weights.pt")
        torch.save(good | {"args": good["args"] | {"warp_speed": 9}}, folder / "other_options.pt")
        torch.save(good | {"learned": good["learned"] | {"critic": {}}}, folder / "other_networks.pt")
        # Before November 2026 networks stood at the top, without `learned`.
        old = {"args": good["args"], "script": script.__name__, **good["learned"], "progress": good["progress"]}
        torch.save(old, folder / "old.pt")
        run_directories = {"empty": None, "corrupt": b"nothing", "run": good, "old": old}
        both = {name: part for name, part in good["learned"].items() if not name.endswith("_optimizer")}
        run_directories["one_optimizer"] = good | {"learned": both | {"optimizer": good["learned"]["actor_optimizer"]}}
        run_directories["other_script"] = good | {"script": "ppo"}
        for name, contents in run_directories.items():
            (folder / name).mkdir()
            if isinstance(contents, bytes):
                (folder / name / "checkpoint.pt").write_bytes(contents)
            elif contents:
                torch.save(contents, folder / name / "checkpoint.pt")
        return folder

    return make


@pytest.mark.parametrize(("command", "named"), WRONG, ids=[command for command, _ in WRONG])
def test_wrong_input(script, command, named, files, monkeypatch, capsys):
    """Status 2 and one line on stderr with the option and its value."""
    words = command.split()
    if "--agent-blocks" in words and not hasattr(script.Args, "agent_blocks"):
        return  # it has no blocks
    folder = files(script)
    monkeypatch.chdir(folder)
    with in_place_of_the_simulator(script, Skirmish):
        lines = left_with(script, words + ([] if {"--map", "--resume", "--eval-only"} & set(words) else MAP), capsys)
    assert len(lines) == 1 and lines[0].startswith(f"{script.__name__}.py: error: ") and named in lines[0]
    assert not (folder / "runs").exists(), "nothing is left behind"


MAP = ["--map", "3m"]


def test_a_checkpoint_of_another_script(files, monkeypatch, capsys):
    """A2PO has more options than MAPPO and HAPPO; MAPPO's and CoPPO's are the same: one can evaluate the other's."""
    a2po, mappo, happo, coppo = (load(f"{name}_smac") for name in ("a2po", "mappo", "happo", "coppo"))
    path = str(files(a2po) / "good.pt")
    for other in (mappo, happo):
        lines = left_with(other, ["--eval-only", "--checkpoint", path], capsys)
        assert len(lines) == 1 and f"--checkpoint {path}" in lines[0] and "another script" in lines[0]
    monkeypatch.chdir(files(mappo))
    with in_place_of_the_simulator(coppo, Skirmish):
        coppo.main(coppo.parse_args(["--eval-only", "--checkpoint", "good.pt", "--torch-threads", "1"]))
        assert "2 greedy episodes" in capsys.readouterr().out
        lines = left_with(coppo, ["--resume", "run"], capsys)
    assert len(lines) == 1 and "is of mappo_smac, not of coppo_smac" in lines[0]


def test_checkpoints_from_before_the_agents_numbers(files, monkeypatch, capsys):
    """They are taken for what they are, policies that do not see them."""
    for name in ("a2po_smac", "mappo_smac"):
        script = load(name)
        monkeypatch.chdir(files(script))
        older = torch.load("good.pt", weights_only=True)
        del older["args"]["agent_id"]
        torch.save(older, "older.pt")
        words = ["--eval-only", "--checkpoint", "older.pt", "--torch-threads", "1"]
        assert script.parse_args(words).agent_id is False
        with in_place_of_the_simulator(script, Skirmish):
            script.main(script.parse_args(words))
            assert "2 greedy episodes" in capsys.readouterr().out
            (line,) = left_with(script, [*words, "--agent-id"], capsys)
        assert line.endswith("--agent-id True: older.pt is of False")


def test_compiling_needs_a_compiler(monkeypatch, tmp_path, capsys):
    """Told before the run begins, and not by PyTorch in the middle of its first step."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for name in ("a2po_smac", "mappo_mpe"):
        (line,) = left_with(load(name), ["--compile"], capsys)
        assert "--compile True: needs a C++ compiler" in line
    (tmp_path / "mine++").touch(0o755)
    monkeypatch.setenv("CXX", "mine++")
    script = load("a2po_smac")
    assert script.complete_args(script.parse_args([*MAP, "--compile"])).compile


def test_tracking_needs_its_package(script, monkeypatch, capsys):
    find_spec = script.importlib.util.find_spec
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    (line,) = left_with(script, ["--map", "3m", "--track"], capsys)
    assert "--track" in line and "pip install wandb" in line


# --------------------------------------------------------------------------------------------------- SMAC: defaults
def complete(script, monkeypatch, found=False, **options):
    monkeypatch.setattr(script, "find_starcraft2", lambda: (found, "a test"))
    return script.complete_args(script.Args(**options))


def test_which_game(script, monkeypatch):
    """auto takes StarCraft II where it is installed and has the map."""
    for found, options, simulator in (
        (False, {"map": "3m"}, "smax"),
        (True, {"map": "3m"}, "starcraft2"),
        (True, {"map": "3m", "simulator": "smax"}, "smax"),
        (True, {"map": "protoss_5_vs_5"}, "starcraft2"),
        (True, {"map": "smacv2_5_units"}, "smax"),
    ):
        args = complete(script, monkeypatch, found, **options)
        assert args.simulator == simulator
        assert args.num_envs == (64 if simulator == "smax" else 8) and args.num_envs * args.num_steps == 3200


def test_two_agents_have_blocks_that_fit(monkeypatch):
    """2m_vs_1z and 2s_vs_1sc have fewer agents than 3s5z has blocks."""
    for name in ("a2po_smac", "happo_smac"):
        for map_name in ("2m_vs_1z", "2s_vs_1sc", "2c_vs_64zg"):
            assert complete(load(name), monkeypatch, True, map=map_name).agent_blocks == 2
        for map_name in load(name).SMAC_MAPS:
            agents = AGENTS[map_name]
            assert complete(load(name), monkeypatch, True, map=map_name).agent_blocks <= agents


# smacv2's registry of SMAC's maps
AGENTS = {"3m": 3, "8m": 8, "25m": 25, "5m_vs_6m": 5, "8m_vs_9m": 8, "10m_vs_11m": 10, "27m_vs_30m": 27, "MMM": 10}
AGENTS |= {"MMM2": 10, "2s3z": 5, "3s5z": 8, "3s5z_vs_3s6z": 8, "3s_vs_3z": 3, "3s_vs_4z": 3, "3s_vs_5z": 3}
AGENTS |= {"1c3s5z": 9, "2m_vs_1z": 2, "corridor": 6, "6h_vs_8z": 6, "2s_vs_1sc": 2, "so_many_baneling": 7}
AGENTS |= {"bane_vs_bane": 24, "2c_vs_64zg": 2}


def test_table_7(script, monkeypatch):
    """The paper's settings by map, as DESIGN has them; other maps as 3s5z; options given come first."""
    table = """MMM 3 12 .95 .2, 3s_vs_5z 3 15 .95 .05, 2c_vs_64zg 2 5 .95 .2, 3s5z 3 8 .95 .2, 5m_vs_6m 2 10 .93 .05,
        8m_vs_9m 5 15 .95 .05, 10m_vs_11m 2 10 .97 .2, 6h_vs_8z 2 8 .99 .2, 3s5z_vs_3s6z 2 5 .90 .2, MMM2 2 5 .95 .2,
        27m_vs_30m 3 5 .95 .2, corridor 2 5 .95 .2, 25m 3 8 .95 .2, zerg_5_vs_5 3 8 .95 .2"""
    for row in table.split(","):
        name, blocks, epochs, gae_lambda, eps = row.split()
        args = complete(script, monkeypatch, True, map=name)
        assert (args.update_epochs, args.gae_lambda, args.clip_coef) == (int(epochs), float(gae_lambda), float(eps))
        assert getattr(args, "agent_blocks", int(blocks)) == int(blocks)
        assert args.recurrent == (name not in ("3s_vs_5z", "6h_vs_8z", "corridor"))
        assert (args.learning_rate, args.chunk_length, args.ent_coef, args.total_timesteps) == (5e-4, 10, 0.01, 10**7)
    args = complete(script, monkeypatch, map="3m", update_epochs=2, clip_coef=0.3, num_envs=7, recurrent=False)
    assert (args.update_epochs, args.clip_coef, args.num_envs, args.recurrent) == (2, 0.3, 7, False)
    assert args.num_steps == 450, "as many as make 3,200, in whole chunks"


# -------------------------------------------------------------------------------------------------- files, imports
def test_import_needs_no_simulator():
    """Importing the scripts imports no simulator."""
    simulators = ("jax", "jaxmarl", "smacv2", "mpe2", "pettingzoo", "gfootball", "envpool", "mujoco")
    simulators += ("gymnasium_robotics",)
    code = f"import {', '.join(SCRIPTS)}, sys; print([m for m in {simulators} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.strip() == "[]", process.stdout + process.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_pins(name):
    """The script's PEP 723 block and requirements.txt pin the same versions, and those are installed."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    block = lines[lines.index("# /// script") + 1 : lines.index("# ///")]
    pinned = tomllib.loads("\n".join(line[2:] for line in block))["dependencies"]
    required = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    versions = dict(line.split("==") for line in required if "==" in line)
    assert pinned and all("==" in pin for pin in pinned)
    for package, version in (pin.split("==") for pin in pinned):
        assert versions.get(package, version) == version
        if importlib.util.find_spec(package.replace("-", "_")):
            assert importlib.metadata.version(package).split("+")[0] == version
    assert {"torch", "numpy", "gymnasium", "tyro"} <= {pin.split("==")[0] for pin in pinned}


def test_settings_of_the_small_game():
    """Every name in SMALL is an option of some script, so that none is dropped unseen."""
    fields = {field.name for name in SCRIPTS for field in dataclasses.fields(load(name).Args)}
    assert SMALL.keys() <= fields


QUIET = [("a2po_smac", "simulator='smax'", 1), ("a2po_mpe", "simulator='jaxmarl'", 0), ("a2po_mamujoco", "", 0)]
QUIET += [("a2po_mpe", "num_workers=2", 0)]


@pytest.mark.parametrize(("name", "options", "lines"), QUIET)
def test_simulators_start_without_notices(name, options, lines):
    """Of theirs: JaxMARL tells what it does not find, Gymnasium-Robotics of other robots. In a fresh process."""
    pytest.importorskip("jaxmarl" if lines or options else "envpool")
    code = f"import {name} as s; s.make_envs(s.complete_args(s.Args(num_envs=2, {options}))).close()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == lines, done
