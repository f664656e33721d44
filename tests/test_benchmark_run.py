"""benchmark/run.py: its matrices, and what it skips and resumes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmark import plot, run

ROOT = Path(__file__).resolve().parents[1]


def test_nothing_heavy_is_imported():
    code = "import runpy, sys; [runpy.run_path(f'benchmark/{n}.py') for n in ('plot', 'run')]; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"ray", "matplotlib", "rliable", "torch"} & set(modules.split())


def jobs_of(*argv):
    return run.make_jobs(run.tyro.cli(run.Args, args=list(argv)))


def test_counts():
    scripts = {path.stem for path in ROOT.glob("*_*.py")}

    def existing(benchmark):
        return sum(f"{algorithm}_{benchmark}" in scripts for algorithm in run.ALL)

    assert len(jobs_of("table2")[0]) == 12 * 4 * 3
    assert len(jobs_of("table2", "--smax", "--seeds", "5")[0]) == 9 * 4
    assert len(jobs_of("figure3", "--seeds", "1")[0]) == 14 * existing("mamujoco")
    assert len(jobs_of("figure10", "--seeds", "1")[0]) == 4 * existing("mpe")
    assert len(jobs_of("figure4", "--seeds", "1")[0]) == 2 * existing("grf")
    assert len(jobs_of("figure5", "--seeds", "1", "--tasks", "3s5z")[0]) == 2
    assert len(jobs_of("figure6", "--seeds", "1", "--tasks", "3s5z")[0]) == 6
    assert len(jobs_of("figure5-7", "--smax", "--seeds", "1")[0]) == 8
    assert len(jobs_of("table6")[0]) == 2 * 4 + 3 * existing("mamujoco")
    assert [job.script.stem for job in jobs_of("table2", "--tasks", "3s5z", "--algorithms", "mappo")[0]] == [
        "mappo_smac"
    ] * 3
    assert jobs_of("figure3", "--smax")[0] == []


@pytest.mark.parametrize("matrix", run.MATRICES)
def test_every_command_is_one_of_its_script(matrix, monkeypatch):
    """All options exist and pass the script's own checks; the variants are named as plot.py names them."""
    jobs, missing = jobs_of(matrix, "--seeds", "1", "--total-timesteps", "1000")
    assert jobs and len({job.name for job in jobs}) == len(jobs)
    assert not [name for name in missing if (ROOT / name).exists()]
    for job in jobs:
        command = job.command(cpus=2)
        module = run.load(job.script)
        monkeypatch.setattr(module, "find_starcraft2", lambda: (True, ""), raising=False)
        monkeypatch.setattr(module, "find_football", lambda: True, raising=False)
        args = module.complete_args(module.parse_args(command[2:]))
        assert (args.seed, args.total_timesteps, args.torch_threads) == (1, 1000, 2)
        assert plot.variant(vars(args)) == job.variant
        assert module.parse_args([*job.options, "--total-timesteps", "1000"]) == run.settings(job)


def test_smax_tasks_are_those_of_the_script():
    module = run.load(ROOT / "a2po_smac.py")
    assert set(run.SMAC_MAPS) == set(module.TABLE_7) - {"2m_vs_1z", "2s_vs_1sc"}, "those are ours"
    assert set(run.NOT_ON_SMAX) == set(run.SMAC_MAPS) - set(module.SMAX_MAPS)


def test_every_free_setting_is_one_of_some_script():
    scripts = [run.load(path) for path in ROOT.glob("*_*.py")]
    assert run.FREE <= {name for script in scripts for name in script.Args.__dataclass_fields__}


def test_football_tasks_are_those_of_the_script():
    module = run.load(ROOT / "a2po_grf.py")
    for task in module.SCENARIOS:
        benchmark, options = run.task_options(task, smax=False)
        assert benchmark == "grf" and options[:2] == ("--scenario", task)
        assert ("--share-parameters" in options) == task.startswith("11_vs_11"), "as in the paper"
    assert run.task_options("protoss_5_vs_5", smax=False)[0] == "smac"


def test_mujoco_tasks_are_those_of_the_script():
    module = run.load(ROOT / "a2po_mamujoco.py")
    tasks = {f"{robot}-{partition}" for robot, partitions in module.PARTITIONS.items() for partition in partitions}
    assert set(run.MUJOCO_TASKS) == tasks - {"HumanoidStandup-17x1"} and len(run.MUJOCO_TASKS) == 14


FAKE = '''
"""Counts to --total-timesteps, 100 steps an iteration, and stops on SIGTERM as the real ones do."""
import dataclasses, json, os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import tyro

@dataclass
class Args:
    map: str = "3s5z"
    simulator: str = "auto"
    seed: int = 1
    total_timesteps: int = 1000
    gae_lambda: float | None = None
    preopc: bool = True
    torch_threads: int | None = None
    resume: str = ""
    fail: bool = False
    sleep: float = 0.0

def parse_args(argv=None):
    args = tyro.cli(Args, args=argv)
    if args.resume:
        saved = json.loads((Path(args.resume) / "checkpoint.pt").read_text())["args"]
        args = tyro.cli(Args, default=Args(**saved), args=argv)
    return args

def complete_args(args):
    if args.total_timesteps < 1:
        print("fake: error: --total-timesteps", file=sys.stderr)
        raise SystemExit(2)
    gae_lambda = 0.95 if args.gae_lambda is None else args.gae_lambda
    return dataclasses.replace(args, simulator="smax", gae_lambda=gae_lambda)

def main(args):
    args = complete_args(args)
    if args.fail:
        sys.exit("no luck")
    name, step = f"{args.map}-smax__{Path(__file__).stem}__{args.seed}__{time.time_ns()}", 0
    run_dir = Path(args.resume or f"runs/{name}")
    if args.resume:
        step = json.loads((run_dir / "checkpoint.pt").read_text())["step"]
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(dataclasses.asdict(args)))
    print(run_dir, os.environ["OMP_NUM_THREADS"], flush=True)
    stops = []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
    while step < args.total_timesteps and not stops:
        time.sleep(args.sleep)
        step += 100
        with (run_dir / "eval.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "win_rate": 0.5}) + "\\n")
        share = 100 * step // args.total_timesteps
        print(f"\\r {share}%|##  | {step}/{args.total_timesteps} [SPS 7]", end="", flush=True)
    saved = {"step": step, "args": dataclasses.asdict(args) | {"resume": ""}}
    (run_dir / "checkpoint.pt").write_text(json.dumps(saved))
    sys.exit(143 if stops else 0)

if __name__ == "__main__":
    main(parse_args())
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The folder of a project with one script, in which run.py makes its jobs."""
    (tmp_path / "a2po_smac.py").write_text(FAKE)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.delitem(sys.modules, "a2po_smac", raising=False)
    yield tmp_path
    sys.modules.pop("a2po_smac", None)


def start(job, base, run_dir=None):
    return run.run_process(job.command(1, run_dir), base, run.log_of(job, base), 0)


def fake_jobs(*argv):
    return jobs_of("figure5", "--smax", "--tasks", "3s5z", "--seeds", "1", *argv)[0]


def test_new_done_cut_off(fake):
    plain, ablation = fake_jobs("--total-timesteps", "300")
    assert run.find_run(plain, fake) == ("new", None)
    assert start(plain, fake) == 0
    state, run_dir = run.find_run(plain, fake)
    assert state == "done" and not run_dir.is_absolute()
    assert run.find_run(ablation, fake) == ("new", None)  # other settings
    assert run.progress_of(run.log_of(plain, fake)) == (1.0, "300/300 [SPS 7]")
    assert f"{run_dir} 1" in run.log_of(plain, fake).read_text()  # OMP_NUM_THREADS

    longer, _ = fake_jobs("--total-timesteps", "500")
    assert run.find_run(longer, fake) == ("cut off", run_dir)
    assert longer.command(1, run_dir)[2:6] == ["--resume", str(run_dir), "--total-timesteps", "500"]
    assert start(longer, fake, run_dir) == 0
    steps = [json.loads(line)["step"] for line in (fake / run_dir / "eval.jsonl").read_text().splitlines()]
    assert steps == [100, 200, 300, 400, 500]
    assert run.find_run(longer, fake)[0] == run.find_run(plain, fake)[0] == "done"
    other, _ = fake_jobs("--total-timesteps", "300", "--options=--gae-lambda 0.9")
    assert run.find_run(other, fake)[0] == "new"
    same, _ = fake_jobs("--options=--gae-lambda 0.95 --total-timesteps 500")
    assert run.find_run(same, fake)[0] == "done"


def test_run_without_checkpoint_starts_anew_and_a_cut_line_is_no_step(fake):
    job, _ = fake_jobs("--total-timesteps", "300")
    start(job, fake)
    run_dir = fake / run.find_run(job, fake)[1]
    (run_dir / "eval.jsonl").write_text('{"step": 200, "win_rate": 1}\n{"step": 300, "win')
    assert run.find_run(job, fake)[0] == "cut off"
    (run_dir / "checkpoint.pt").unlink()
    assert run.find_run(job, fake) == ("new", None)


def test_what_others_run_is_left_alone(fake):
    job, _ = fake_jobs("--total-timesteps", "300")
    start(job, fake)
    longer, _ = fake_jobs("--total-timesteps", "900")
    run_dir = run.find_run(longer, fake)[1]
    log = run.log_of(longer, fake)
    with log.open("ab") as file:  # a process of an earlier call
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run.find_run(longer, fake)[0] == "running"
        assert isinstance(start(longer, fake, run_dir), str)
    assert run.find_run(longer, fake) == ("cut off", run_dir)
    log.unlink()  # not in our log, and just written to
    assert run.find_run(longer, fake) == ("running", run_dir)
    for file in (fake / run_dir).iterdir():
        os.utime(file, (time.time() - 1000,) * 2)
    assert run.find_run(longer, fake) == ("cut off", run_dir)


def test_failure_has_status_and_reason(fake):
    job, _ = fake_jobs("--options=--fail")
    assert start(job, fake) == 1
    assert run.reason_of(run.log_of(job, fake)) == "no luck"


@pytest.fixture
def ignoring_ctrl_c():
    """As what a shell starts in the background does, and Ray's workers with it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_becomes_sigterm(fake, ignoring_ctrl_c):
    job, _ = fake_jobs("--total-timesteps", "100000", "--options=--sleep 0.02")

    def interrupt():
        while not list(fake.glob("runs/*/eval.jsonl")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert start(job, fake) == 143
    assert run.find_run(job, fake)[0] == "cut off"


def test_collect(fake, capsys):
    jobs = fake_jobs("--total-timesteps", "1000")
    start(jobs[1], fake)
    assert run.collect(jobs, fake, fake / "results") == 1
    assert sorted(path.name for path in (fake / "results" / "3s5z-smax").iterdir()) == [
        "a2po_smac-no-preopc__1.config.json",
        "a2po_smac-no-preopc__1.jsonl",
    ]
    assert "not finished (new): 3s5z-smax__a2po_smac__1" in capsys.readouterr().out
    (found,) = plot.read([fake / "results"])["3s5z-smax"]["a2po_smac-no-preopc"]
    assert found.records[-1]["step"] == 1000


def test_dry_run_prints_what_is_missing(fake, capsys):
    argv = ["figure5", "--smax", "--tasks", "3s5z", "--seeds", "1", "--total-timesteps", "200", "--dir", str(fake)]
    start(fake_jobs("--total-timesteps", "200")[0], fake)
    assert run.main(run.tyro.cli(run.Args, args=[*argv, "--dry-run"])) == 0
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert "--no-preopc" in line and "--torch-threads 1" in line
    assert "2 jobs: 1 done, 1 new" in printed.err


def test_a_game_that_is_not_here_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run.load(ROOT / "mappo_smac.py"), "find_starcraft2", lambda: (False, "no game"))
    run.settings.cache_clear()
    with pytest.raises(SystemExit) as stop:
        run.main(run.tyro.cli(run.Args, args=["table2", "--algorithms", "mappo", "--dir", str(tmp_path)]))
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run.py: error: mappo_smac.py --map MMM") and "no game" in line


@pytest.mark.parametrize(
    "argv",
    [
        ["figure3", "--smax"],
        ["table2", "--total-timesteps", "0"],
        ["table2", "--cpus-per-job", "0"],
        ["table2", "--gpus-per-job", "-1"],
        ["table2", "--algorithms", "qmix"],
        ["table2", "--dir", "/nowhere"],
        ["table2", "--seeds", "-4", "--tasks", "3s5z"],
        ["table2", "--options=--nonsense 3", "--tasks", "3s5z"],
    ],
    ids=" ".join,
)
def test_bad_options_are_one_line(argv, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run.main(run.tyro.cli(run.Args, args=argv))
    errors = [line for line in capsys.readouterr().err.splitlines() if "left out" not in line]
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("run.py: error: ")


def test_view_redraws_on_a_terminal_only():
    class Terminal(list):
        write = list.append
        isatty = staticmethod(lambda: True)
        flush = staticmethod(lambda: None)

    terminal = Terminal()
    view = run.View(terminal, now=0)
    for _ in range(2):
        view.update({"running": 1}, {"job": (0.5, "x" * 500)}, 0.25, now=60)
    assert terminal[1] == "\x1b[2F\x1b[J" and "0:03:00 left" in terminal[2]
    assert all(len(line) < 500 for line in terminal)
    pipe = Terminal()
    pipe.isatty = lambda: False
    view = run.View(pipe, now=0)
    for now in (0, 30, 61):
        view.update({"running": 1}, {"job": (0.5, "")}, 0.25, now)
    assert len(pipe) == 2 and "\x1b" not in "".join(pipe)
