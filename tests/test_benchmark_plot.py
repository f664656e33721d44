"""benchmark/plot.py: its numbers on hand-made files."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmark import plot
from benchmark.run import FREE


def write_run(path, values, steps=None, metric="win_rate", seconds=None):
    """seconds: of the run at each evaluation; where there are none, the lines do not have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = steps or range(100, 100 * len(values) + 1, 100)
    records = [{"step": s, metric: v} for s, v in zip(steps, values, strict=True)]
    records = [record | ({"seconds": seconds[k]} if seconds else {}) for k, record in enumerate(records)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def cells(table):
    """Rows of a Markdown table as lists, without the rule."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return [rows[0], *rows[2:]]


def test_score_is_the_median_of_the_last_ten(tmp_path):
    values = [1.0] * 5 + [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    found = plot.read_run(write_run(tmp_path / "t" / "a2po_smac__7.jsonl", values))
    assert (found.task, found.algorithm, found.seed) == ("t", "a2po_smac", 7)
    assert found.score("win_rate") == pytest.approx(0.45)


def test_paper_table(tmp_path):
    for task, scores in (("t", {1: 0.5, 2: 1.0, 3: 0.75}), ("u", {1: 0.25, 2: 0.75, 3: 0.25})):
        for seed, score in scores.items():
            write_run(tmp_path / task / f"a2po_smac__{seed}.jsonl", [score] * 10)
    write_run(tmp_path / "t" / "mappo_smac__1.jsonl", [0.5] * 10)
    runs = plot.read([tmp_path])
    metrics = plot.choose_metrics(runs, "auto")
    header, *rows = cells(plot.paper_table(runs, metrics))
    assert header == ["task", "a2po_smac", "mappo_smac"]
    # The standard deviation of 50, 100, 75 with n - 1 is 25, that of 25, 75, 25 is 50 / sqrt(3).
    assert rows[0] == ["t", "75.0 (25.00)", "50.0 (one seed)"]
    assert rows[1][:2] == ["u", f"25.0 ({50 / 3**0.5:.2f})"]
    assert rows[2][:2] == ["overall (mean)", f"50.0 ({(25 + 50 / 3**0.5) / 2:.2f})"]
    _, first, *_ = cells(plot.run_table(runs, metrics, reach=0.75))
    assert first == ["t", "a2po_smac", "1, 2, 3", "1000, 1000, 1000", "0.5, 1.0, 0.75", "None, 100, 100"]


def write_match(path, *evaluations):
    """A Football run; of each evaluation a list for each of assist, goal, lost, pass, attempts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [dict(zip(plot.COUNTED, episodes, strict=True)) for episodes in evaluations]
    lines = [json.dumps({"step": k, "win_rate": 0.5} | record) for k, record in enumerate(records)]
    path.write_text("\n".join(lines) + "\n")


def test_behaviour_is_table_3(tmp_path):
    """Of the last ten evaluations; a run that tries no pass has no pass rate; no other benchmark has the table."""
    old = [[9, 9], [9, 9], [9, 9], [9, 9], [9, 9]]
    new = [[0, 1], [1, 2], [2, 3], [1, 2], [4, 8]]
    write_match(tmp_path / "t" / "a2po_grf__1.jsonl", old, *[new] * 9, [[2, 3], [1, 2], [2, 3], [7, 0], [8, 0]])
    write_match(tmp_path / "t" / "a2po_grf__2.jsonl", [[0, 0], [0, 0], [1, 1], [0, 0], [0, 0]])
    write_match(tmp_path / "t" / "mappo_grf__1.jsonl", [[0, 0], [0, 1], [1, 1], [0, 0], [0, 0]])
    write_run(tmp_path / "u" / "a2po_smac__1.jsonl", [0.5] * 10)
    header, *rows = cells(plot.behaviour_table(plot.read([tmp_path])))
    assert header == ["task", "metric", "a2po_grf", "mappo_grf", "a2po_smac"]
    assists, passes, attempts = (9 + 5) / 20, (9 * 3 + 7) / 20, (9 * 12 + 8) / 20
    assert rows[0] == ["t", "Assist", f"{assists / 2:.2f} ({assists / 2**0.5:.2f})", "0.00 (one seed)", ""]
    assert rows[1] == ["t", "Goal", f"0.75 ({1.5 / 2**0.5:.2f})", "0.50 (one seed)", ""]
    assert rows[2] == ["t", "Lost", f"1.75 ({1.5 / 2**0.5:.2f})", "1.00 (one seed)", ""]
    assert rows[3][:3] == ["t", "Pass", f"{passes / 2:.2f} ({passes / 2**0.5:.2f})"]
    assert rows[4] == ["t", "Pass Rate, %", f"{100 * passes / attempts:.1f} (one seed)", "", ""] and len(rows) == 5
    assert plot.behaviour_table(plot.read([tmp_path / "u"])) == ""


def test_returns_have_the_digits_that_they_need():
    assert [plot.number(x, "episodic_return") for x in (1234.56, -12.345, 0.1234)] == ["1235", "-12.3", "0.12"]


def test_a_bar_in_a_task_does_not_end_its_cell(tmp_path):
    write_run(tmp_path / "Humanoid-9|8" / "a2po_mujoco__1.jsonl", [1.0] * 10, metric="episodic_return")
    runs = plot.read([tmp_path])
    assert "Humanoid-9\\|8" in plot.paper_table(runs, plot.choose_metrics(runs, "auto"))


@pytest.mark.parametrize("values, middle", [([5.0], 5), ([1.0, 3.0, 8.0], 4), ([0.0, 2.0, 4.0, 90.0], 3)])
def test_iqm(values, middle):
    assert plot.iqm(np.array(values)) == pytest.approx(middle)
    assert plot.iqm(np.array(values)[::-1, None] * [1, 2]) == pytest.approx([middle, 2 * middle])


def test_curves_of_different_steps_meet_on_a_grid():
    curves = [(np.array([0.0, 100, 200]), np.array([0.0, 1, 3])), (np.array([50.0, 250]), np.array([0.0, 2]))]
    grid = plot.common_grid(curves)
    assert grid[0] == 50 and grid[-1] == 200
    values = plot.on_grid(curves, np.array([50.0, 150, 200]))
    assert values == pytest.approx(np.array([[0.5, 2, 3], [0, 1, 1.5]]))
    assert plot.common_grid([(np.array([10.0]), np.zeros(1)), (np.array([20.0]), np.zeros(1))]) == [10]


def test_probability_of_improvement():
    x, y = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[2.0, 0.0], [2.0, 1.0]])
    assert plot.improvement(x, y) == pytest.approx((0.5 + 0.25) / 2)  # by task 1/2, and two ties of four


def test_areas_are_paired_by_seed(tmp_path):
    """Means over the evaluations that all runs have; differences by seed, of the seeds that both have."""
    pytest.importorskip("rliable")
    for seed, area in {1: 0.5, 2: 0.25, 3: 0.75, 4: 1.0}.items():
        write_run(tmp_path / "t" / f"x_smac__{seed}.jsonl", [0.0, 2 * area], steps=[1000, 2000])
    for seed, area in {1: 0.25, 2: 0.25, 3: 0.25}.items():
        write_run(tmp_path / "t" / f"y_smac__{seed}.jsonl", [2 * area, 0.0, 1.0], steps=[1000, 2005, 3000])
    runs = plot.read([tmp_path])
    _, row = cells(plot.area_table(runs, plot.choose_metrics(runs, "auto"), plot.Args(paths=())))
    # Differences 0.25, 0, 0.5: with three seeds the bootstrap's 95% reach to the smallest and the largest.
    # Their mean is .25 and its standard error .25 / sqrt(3): t is sqrt(3), whose p with two degrees of freedom is
    # 1 - t / sqrt(2 + t^2).
    p = f"{1 - (3 / 5) ** 0.5:.3f}"
    assert row == ["t", "x_smac", "y_smac", "1, 2, 3", "50.00", "25.00", "25.00 [0.00, 50.00]", "2 of 3", p]
    pair = {"t": {name: [run for run in some if run.seed == 1] for name, some in runs["t"].items()}}
    (_, row) = cells(plot.area_table(pair, {"t": "win_rate"}, plot.Args(paths=())))
    assert row[-3:] == ["25.00 [one seed]", "1 of 1", ""]


def test_the_t_test_is_paired_and_welchs_over_tasks():
    """With one task SciPy's paired test; with two, Welch's test of one's differences against the negative others."""
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    x, y = generator.normal(0, 1, 6) + 0.5, generator.normal(0, 3, 6)
    assert plot.t_test([x - y]) == pytest.approx(stats.ttest_rel(x, y).pvalue)
    for few in (y, y[:3]):
        assert plot.t_test([x, few]) == pytest.approx(stats.ttest_ind(x, -few, equal_var=False).pvalue)
    assert plot.t_test([np.full(3, 0.5)] * 2) == 0 and plot.t_test([np.zeros(3)] * 2) == 1


def test_an_algorithm_has_one_colour_in_all_pictures():
    """Variants have the next ones, and dashes where there are no more; or the algorithm's, where it is not there."""
    first = plot.styles(["mappo_smac", "a2po_smac", "kl_smac", "a2po_smac gae_lambda=0.9"])
    second = plot.styles(["a2po_mpe-no-preopc", "happo_mpe", "a2po_mpe", "mappo"])
    assert first["a2po_smac"] == second["a2po_mpe"] and first["mappo_smac"] == second["mappo"]
    assert plot.styles(["happo_smac-preopc", "coppo_smac"])["happo_smac-preopc"] == second["happo_mpe"]
    many = plot.styles(["coppo", *(f"a2po_smac critic_steps={k}" for k in range(9)), "a2po_smac"])
    for some in (first, second, many):
        assert len({tuple(style.values()) for style in some.values()}) == len(some)


def test_areas_of_curves_that_are_not_as_dense_are_told(tmp_path, capsys):
    pytest.importorskip("rliable")
    for name, k in {"x": 4, "y": 2, "z": 2}.items():
        write_run(tmp_path / "t" / f"{name}_smac__1.jsonl", [0.5] * k, steps=range(4000 // k, 4001, 4000 // k))
    for names, told in (("yz", False), ("xyz", True)):
        runs = {"t": {name: some for name, some in plot.read([tmp_path])["t"].items() if name[0] in names}}
        plot.area_table(runs, {"t": "win_rate"}, plot.Args(paths=()))
        assert ("plot.py: warning: t: areas are means over 2 to 4 evaluations" in capsys.readouterr().err) == told


def test_areas_and_curves_over_hours(tmp_path, monkeypatch, capsys):
    """Figure 19: of two that learn the same by the step, the one that takes longer has the smaller area."""
    pytest.importorskip("rliable")
    pytest.importorskip("matplotlib")
    hours = {"x": [1, 2, 3, 4, 5], "y": [2, 4, 6, 8, 10]}
    for name, times in hours.items():
        for seed in (1, 2):
            file = tmp_path / "t" / f"{name}_smac__{seed}.jsonl"
            write_run(file, [0.0, 0.25, 0.5, 0.75, 1.0], seconds=[3600 * h for h in times])
    runs = plot.read([tmp_path])
    args = plot.Args(paths=(), over="hours")
    # From y's first evaluation, after 2 hours, to x's last, after 5: x goes from .25 to 1, y from 0 to .375.
    _, row = cells(plot.area_table(runs, {"t": "win_rate"}, args))
    assert row == ["t", "x_smac", "y_smac", "1, 2", "62.50", "18.75", "43.75 [43.75, 43.75]", "2 of 2", "0.000"]
    _, row = cells(plot.area_table(runs, {"t": "win_rate"}, plot.Args(paths=())))
    assert row[4:] == ["50.00", "50.00", "0.00 [0.00, 0.00]", "0 of 2", "1.000"]
    drawn = []
    draw = plot.draw

    def recording(axes, curves, *others):
        drawn.append(curves)
        draw(axes, curves, *others)

    monkeypatch.setattr(plot, "draw", recording)
    for k, over in enumerate(plot.AXES):
        drawn.clear()
        files = [tmp_path / f"{k}.svg", tmp_path / f"{k}-efficiency.svg"]
        options = ["--over", over, "--out", str(files[0]), "--efficiency", str(files[1]), "--reps", "20"]
        plot.main(plot.parse_args(plot.Args, "", [str(tmp_path / "t"), *options]))
        printed = capsys.readouterr().out
        assert ("first run's end" in printed, "last step that all" in printed) == (over == "hours", over == "steps")
        assert all(f"<!-- {plot.AXES[over]} -->" in file.read_text() for file in files)
        # x and y in the learning curves, then in sample efficiency: where the evaluations of a run are.
        where = [curves[0][0][0].tolist() for curves in drawn]
        assert where == 2 * (list(hours.values()) if over == "hours" else [[100, 200, 300, 400, 500]] * 2)


@pytest.mark.parametrize("seconds", [None, ["soon"] * 2])
def test_no_hours_without_seconds(tmp_path, seconds, capsys):
    file = write_run(tmp_path / "t" / "x_smac__1.jsonl", [0.0, 1.0], seconds=seconds)
    write_run(tmp_path / "t" / "y_smac__1.jsonl", [0.0, 1.0], seconds=[1, 2])
    with pytest.raises(SystemExit) as exit:
        plot.main(plot.parse_args(plot.Args, "", [str(tmp_path), "--over", "hours"]))
    assert exit.value.code == 2
    assert f"plot.py: error: --over hours: {file} does not say the seconds" in capsys.readouterr().err


def test_areas_over_tasks_of_several_benchmarks(tmp_path):
    """By method; a return on the scale from the task's lowest to its highest evaluation, a win rate as it is."""
    pytest.importorskip("rliable")
    for seed, (x, y) in {1: (0.5, 0.25), 2: (0.75, 0.5)}.items():
        write_run(tmp_path / "won" / f"a2po_smac-no-preopc__{seed}.jsonl", [x, x])
        write_run(tmp_path / "won" / f"mappo_smac__{seed}.jsonl", [y, y])
    for seed, (x, y) in {1: ([-10.0, 0.0], [10.0, -10.0]), 2: ([0.0, 30.0], [0.0, 0.0]), 3: ([9.0], [9.0])}.items():
        write_run(tmp_path / "paid" / f"a2po_mpe-no-preopc__{seed}.jsonl", x, metric="episodic_return")
        write_run(tmp_path / "paid" / f"mappo_mpe__{seed}.jsonl", y, metric="episodic_return")
    assert plot.method("a2po_grf-no-preopc gae_lambda=0.9") == "a2po-no-preopc gae_lambda=0.9"
    assert plot.method("idea of_mpe_s") == "idea of_mpe_s"
    runs = plot.read([tmp_path], methods=True)
    metrics = plot.choose_metrics(runs, "auto")
    assert plot.scales(runs, metrics) == {"won": (0.0, 1.0), "paid": (-10.0, 40.0)}
    last = cells(plot.area_table(runs, metrics, plot.Args(paths=())))[-1]
    # Up to the first step alone, which all runs of the task have: on the scale 0 and .5, .25 and .25, .475 and .475,
    # with means of .2417 and .4083. With win rates of .5 and .25, .75 and .5, over both .4333 and .3917. The extreme
    # resamples of the first, differences of -.5, 0 and 0, are -.5 and 0; those of the second are always .25. Welch's t
    # is (.25 - .1667) / .1667, with the first's two degrees of freedom.
    assert last[:4] == ["2 tasks", "a2po-no-preopc", "mappo", "2 to 3 of each"]
    assert last[4:] == ["43.33", "39.17", "4.17 [-12.50, 12.50]", "2 of 5", f"{1 - 0.5 / 1.5:.3f}"]
    runs = plot.read([tmp_path])
    assert len(cells(plot.area_table(runs, metrics, plot.Args(paths=())))) == 3, "a row per task: no pair is in both"


def test_last_line_that_was_cut_off(tmp_path, capsys):
    path = write_run(tmp_path / "t" / "a__1.jsonl", [0.5, 0.75])
    path.write_text(path.read_text() + '{"step": 300, "win_')
    assert [record["step"] for record in plot.read_records(path)] == [100, 200]
    assert "cut off" in capsys.readouterr().err
    path.write_text('{"step": 1, "win\n' + path.read_text())
    with pytest.raises(SystemExit) as stop:
        plot.read_records(path)
    assert stop.value.code == 2 and "a__1.jsonl:1" in capsys.readouterr().err


def test_steps_that_go_back_are_noticed(tmp_path, capsys):
    """As where two runs wrote one file; a repeated evaluation is none of that."""
    records = plot.read_records(write_run(tmp_path / "a2po_smac__1.jsonl", [0.0, 0.1, 0.2], (100, 200, 200)))
    assert [record["win_rate"] for record in records] == [0.0, 0.2] and not capsys.readouterr().err
    records = plot.read_records(write_run(tmp_path / "a2po_smac__1.jsonl", [0.0, 0.1, 0.2], (100, 300, 200)))
    assert [record["step"] for record in records] == [100, 200, 300] and "not in order" in capsys.readouterr().err


def test_records_come_by_step_and_the_later_of_two_counts(tmp_path):
    path = write_run(tmp_path / "t" / "a__1.jsonl", [0.1, 0.2, 0.3], [200, 100, 200])
    assert [(r["step"], r["win_rate"]) for r in plot.read_records(path)] == [(100, 0.2), (200, 0.3)]


def test_later_evaluations_can_be_left_out(tmp_path, monkeypatch, capsys):
    """Everything is then as if the run had ended there, and a run that began later is not there."""
    write_run(tmp_path / "t" / "a__1.jsonl", [0.5] * 10 + [1.0] * 10)
    write_run(tmp_path / "t" / "b__1.jsonl", [0.25], steps=[1001])
    runs = plot.read([tmp_path], until=1000)
    assert list(runs["t"]) == ["a"] and "b__1.jsonl: has no evaluation so early" in capsys.readouterr().err
    assert runs["t"]["a"][0].curve("win_rate")[0].tolist() == list(range(100, 1001, 100))
    assert runs["t"]["a"][0].score("win_rate") == 0.5
    monkeypatch.chdir(tmp_path)
    plot.main(plot.parse_args(plot.Args, "", ["t", "--until", "1e3"]))
    assert cells(capsys.readouterr().out.split("\n\n")[5])[1][3:5] == ["1000", "0.5"]
    plot.main(plot.parse_args(plot.Args, "", ["t"]))
    assert cells(capsys.readouterr().out.split("\n\n")[5])[1][3:5] == ["2000", "1.0"]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--until 0", "--until 0: must be a number above 0"),
        ("--until nan", "--until nan: must be a number above 0"),
        ("--until 1e3 --orders x.png", "--until 1000: is not for --orders, which counts all iterations of a run"),
    ],
)
def test_steps_that_cannot_be_the_last_are_told_before_anything_is_read(
    options, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.parse_args(plot.Args, "", ["nowhere", *options.split()]))
    assert stop.value.code == 2 and capsys.readouterr().err == f"plot.py: error: {message}\n"


@pytest.mark.parametrize(
    "line",
    ['{"step": 1}', '{"win_rate": 1}', '{"step": 1, "win_rate": NaN}', '{"step": 1, "returns": ["a"]}', "[1]", "3"],
)
def test_bad_records(tmp_path, line, capsys):
    (tmp_path / "a__1.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit) as stop:
        plot.read([tmp_path])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["nowhere"],
        ["."],
        ["t/notes.txt"],
        ["t", "--out", "x.pdf"],
        ["t", "u", "--reference", "3"],
        ["t", "--reference", "nan", "--out", "x.png"],
        ["t", "--title", r"$\frac$", "--out", "x.png"],
        ["t", "--metric", "episodic_return"],
        ["t", "--tasks", "z"],
        ["t", "--improvement", "x.png"],
        ["t", "--reps", "0"],
        ["t", "--until", "99.5"],
        ["t", "--seed", "-1"],
        ["t", "--algorithms", "b"],
        ["folder"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(tmp_path, options, monkeypatch, capsys):
    for task in "tu":
        write_run(tmp_path / task / "a__1.jsonl", [0.5] * 10)
    (tmp_path / "t" / "notes.txt").write_text("")
    (tmp_path / "folder" / "eval.jsonl").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if options == ["."] else tmp_path)
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.parse_args(plot.Args, "", options))
    errors = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("plot.py: error: ")


def test_metrics_by_task(tmp_path):
    write_run(tmp_path / "t" / "a__1.jsonl", [0.5] * 10)
    write_run(tmp_path / "u" / "a__1.jsonl", [12.0] * 10, metric="episodic_return")
    lines = [json.dumps({"step": s, "win_rate": 1.0, "returns": [1.0, 2.0]}) for s in (1, 2)]
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a__1.jsonl").write_text("\n".join(lines))
    runs = plot.read([tmp_path])
    assert plot.choose_metrics(runs, "auto") == {"t": "win_rate", "u": "episodic_return", "v": "win_rate"}
    assert plot.choose_metrics({"v": runs["v"]}, "episodic_return") == {"v": "episodic_return"}
    assert runs["v"]["a"][0].score("episodic_return") == 1.5
    rows = cells(plot.paper_table(runs, plot.choose_metrics(runs, "auto")))
    assert [row[1] for row in rows[1:]] == ["50.0 (one seed)", "12.0 (one seed)", "100.0 (one seed)"]  # no overall


def test_run_directories(tmp_path, capsys):
    """Ablations are told apart by config.json; of two runs with one seed the one that got further counts."""
    configs = [{}, {"preopc": False}, {"clip_adaptation": 1.0}, {"agent_order": "random"}, {}]
    configs = [{"preopc": True, "clip_adaptation": 0.5, "agent_order": "semi-greedy"} | config for config in configs]
    for number, config in enumerate(configs):
        folder = tmp_path / "runs" / f"3s5z-smax__a2po_smac__1__{100 + number}"
        write_run(folder / "eval.jsonl", [number / 10] * (12 if number == 4 else 10))
        (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "runs" / "3s5z-smax__a2po_smac__2__105").mkdir()  # has not evaluated yet
    runs = plot.read([tmp_path / "runs"])
    assert set(runs["3s5z-smax"]) == {"a2po_smac" + end for end in ("", "-no-preopc", "-fixed-clip", "-random")}
    assert [r.path.parent.name[-3:] for r in runs["3s5z-smax"]["a2po_smac"]] == ["104"]
    assert "__100" in capsys.readouterr().err


SETTINGS = {"script": "a2po_smac", "exp_name": "a2po_smac", "learning_rate": 5e-4, "gamma": 0.99}
SETTINGS |= {"preopc": True, "clip_adaptation": 0.5, "agent_order": "semi-greedy"}


def write_configured(folder, settings, seed=1, called=None, as_file=False):
    """A run directory in `folder`, or with as_file what run.py collects of it; returns the evaluations' path."""
    called = called or settings["exp_name"]
    if as_file:
        path, config = folder / "3m" / f"{called}__{seed}.jsonl", folder / "3m" / f"{called}__{seed}.config.json"
    else:
        path = folder / f"3m__{called}__{seed}__{100 + len(list(folder.glob('*')))}" / "eval.jsonl"
        config = path.with_name("config.json")
    write_run(path, [0.5] * 10)
    config.write_text(json.dumps(settings | {"seed": seed}))
    return path


def groups(*folders):
    """Name -> seeds, of the only task."""
    (by,) = plot.read(folders).values()
    return {name: [run.seed for run in some] for name, some in by.items()}


@pytest.mark.parametrize("as_file", [True, False], ids=["files", "run directories"])
def test_runs_with_other_settings_are_not_pooled(tmp_path, as_file):
    write_configured(tmp_path / "a", SETTINGS, 1, as_file=as_file)
    write_configured(tmp_path / "b", SETTINGS | {"learning_rate": 3e-4}, 2, as_file=as_file)
    one, other = "a2po_smac learning_rate=0.0005", "a2po_smac learning_rate=0.0003"
    assert groups(tmp_path) == {one: [1], other: [2]}
    assert groups(tmp_path / "a") == {"a2po_smac": [1]}, "nothing to tell it from"
    (by,) = plot.read([tmp_path], algorithms=["a2po"], methods=True).values()
    assert [*by] == [other.replace("_smac", "", 1), one.replace("_smac", "", 1)], "both are a2po"
    write_configured(tmp_path / "a", SETTINGS | {"preopc": False}, 2, as_file=as_file)
    assert groups(tmp_path) == {one: [1], other: [2], "a2po_smac-no-preopc learning_rate=0.0005": [2]}
    write_configured(tmp_path / "c", SETTINGS | {"gamma": 0.9}, 3, as_file=as_file)
    assert groups(tmp_path / "a", tmp_path / "c") == {
        "a2po_smac gamma=0.99": [1],
        "a2po_smac gamma=0.9": [3],
        "a2po_smac-no-preopc gamma=0.99": [2],
    }


def test_settings_that_do_not_change_the_numbers_tell_nothing_apart(tmp_path):
    """Nor do the machine, the versions and what an older run does not have."""
    beside = {"git_commit": "abc", "versions": {"torch": "2.13.0"}, "device": "cuda", "reason": "as asked for"}
    free = dict.fromkeys(FREE - {"exp_name"}, 7)
    older = {name: value for name, value in SETTINGS.items() if name not in ("gamma", "exp_name")}
    some = [SETTINGS, SETTINGS | free, SETTINGS | beside | {"stretches": [{"step": 0, "changed": {}}]}, older]
    some.append(SETTINGS | {"stretches": [{"step": 5, "changed": {"torch_threads": 2, "total_timesteps": 9}}]})
    for seed, settings in enumerate(some, 1):
        write_configured(tmp_path, settings, seed, "a2po_smac")
    write_run(tmp_path / "3m" / "a2po_smac__6.jsonl", [0.5] * 10)  # without settings
    assert groups(tmp_path) == {"a2po_smac": [1, 2, 3, 4, 5, 6]}


def test_an_older_run_goes_where_it_fits_and_nowhere_if_that_is_not_clear(tmp_path):
    older = {name: value for name, value in SETTINGS.items() if name != "gamma"}
    write_configured(tmp_path, SETTINGS, 1)
    write_configured(tmp_path, older, 2)
    write_configured(tmp_path, SETTINGS | {"learning_rate": 3e-4}, 3)
    one, other = "a2po_smac learning_rate=0.0005", "a2po_smac learning_rate=0.0003"
    assert groups(tmp_path) == {one: [1, 2], other: [3]}
    write_configured(tmp_path, SETTINGS | {"gamma": 0.9}, 4)
    ones = {f"a2po_smac gamma={gamma} learning_rate=0.0005": seeds for gamma, seeds in ((0.99, [1]), (0.9, [4]))}
    assert groups(tmp_path) == {**ones, one: [2], "a2po_smac gamma=0.99 learning_rate=0.0003": [3]}


def test_a_run_that_was_resumed_with_other_settings_is_a_group_of_its_own(tmp_path):
    changed = [{"step": 0, "changed": {}}, {"step": 300, "changed": {"learning_rate": 3e-4, "cuda": False}}]
    write_configured(tmp_path, SETTINGS, 1)
    write_configured(tmp_path, SETTINGS | {"stretches": changed}, 2)
    write_configured(tmp_path, SETTINGS | {"stretches": [*changed, {"step": 400, "changed": {}}]}, 3)
    text = "a2po_smac resumed at 300 with learning_rate=0.0003"
    assert groups(tmp_path) == {"a2po_smac": [1], text: [2], f"{text} resumed at 400 with its first settings": [3]}


def test_names_are_exp_name_the_script_or_what_the_file_is_called(tmp_path):
    write_configured(tmp_path / "a", SETTINGS | {"exp_name": "idea", "preopc": False}, 1)
    assert groups(tmp_path / "a") == {"idea-no-preopc": [1]}
    write_configured(tmp_path / "a", SETTINGS | {"exp_name": "idea", "script": "kl_smac"}, 2)
    assert groups(tmp_path / "a") == {"idea-no-preopc script=a2po_smac": [1], "idea script=kl_smac": [2]}
    for called, script in (("a2po_smac", "a2po_smac_mean"), ("a2po_smac-by-hand", "a2po_smac"), ("mine", "a2po_smac")):
        write_configured(tmp_path / "b", SETTINGS | {"script": script, "exp_name": script}, 1, called, as_file=True)
    assert set(groups(tmp_path / "b")) == {"a2po_smac_mean", "a2po_smac-by-hand", "mine"}


@pytest.mark.parametrize(
    "script, settings, end", [("happo", {"preopc": True}, "-preopc"), ("mappo", {"vtrace": True}, "-vtrace")]
)
def test_corrections_of_the_baselines_are_named_and_pooled_with_older_runs(tmp_path, script, settings, end):
    """Which do not have the setting."""
    common = {"script": f"{script}_smac", "exp_name": f"{script}_smac", "gamma": 0.99}
    write_configured(tmp_path, common, 1)
    write_configured(tmp_path, common | {name: False for name in settings}, 2)
    write_configured(tmp_path, common | settings, 1)
    write_configured(tmp_path, common | settings, 2, f"{script}_smac{end}", as_file=True)
    assert groups(tmp_path) == {f"{script}_smac": [1, 2], f"{script}_smac{end}": [1, 2]}


def test_an_ablation_in_between_is_named():
    for c, end in ((0.5, ""), (1, "-fixed-clip"), (0.3, " clip_adaptation=0.3")):
        assert plot.variant({"clip_adaptation": c}) == end
    assert (
        plot.variant({"preopc": False, "clip_adaptation": 1.0, "agent_order": "greedy"})
        == "-no-preopc-fixed-clip-greedy"
    )
    assert plot.variant({"preopc_targets": False, "clip_adaptation": 0.5}) == "-gae-targets"


def test_algorithms_are_chosen_with_or_without_their_settings(tmp_path):
    for seed, rate in ((1, 5e-4), (2, 3e-4)):
        write_configured(tmp_path, SETTINGS | {"learning_rate": rate}, seed)
    write_configured(tmp_path, SETTINGS | {"preopc": False}, 3)
    names = [f"a2po_smac learning_rate={rate}" for rate in (0.0003, 0.0005)]
    assert list(plot.read([tmp_path], algorithms=["a2po_smac"])["3m"]) == names
    assert list(plot.read([tmp_path], algorithms=names[::-1])["3m"]) == names[::-1]
    with pytest.raises(SystemExit):
        plot.read([tmp_path], algorithms=["happo_smac"])


RESULTS = Path(__file__).resolve().parents[1] / "benchmark" / "results"


@pytest.mark.parametrize("section", ["table2", "figure3", "figure3-former-ratio", "figure4", "figure5-7", "figure10"])
def test_published_runs_are_grouped_as_they_are_called(section):
    runs = plot.read([RESULTS / section])
    found = [run for by in runs.values() for some in by.values() for run in some]
    assert len(found) == len(list((RESULTS / section).rglob("*__*.jsonl")))
    assert {run.algorithm for run in found} == {run.path.name.split("__")[0] for run in found}
    assert all(run.algorithm == run.path.name.split("__")[0] for run in found)


def test_published_runs_of_two_lambdas_stay_apart():
    assert groups(RESULTS / "preopc" / "lambda-0.91", RESULTS / "preopc" / "lambda-1.0") == {
        f"a2po_smac{end} gae_lambda={trace}": [1, 2, 3] for end in ("", "-no-preopc") for trace in (0.91, 1.0)
    }


def write_orders(folder, name, seed, ranks, places=None):
    path = write_run(folder / f"{name}__{seed}.jsonl", [0.5] * 10)
    counts = {"rank": ranks, "position": places or ranks}
    path.with_suffix(".orders.json").write_text(json.dumps(counts))


def test_shares_of_ranks_are_of_all_iterations_of_all_seeds(tmp_path, monkeypatch, capsys):
    """And they are the heights of the figure's bars, which stand on each other from rank 1."""
    pytest.importorskip("rliable")
    pytest.importorskip("matplotlib")
    write_orders(tmp_path / "t", "a2po_smac-cyclic", 1, [[1, 3], [4, 0]], [[4, 0], [0, 4]])
    write_orders(tmp_path / "t", "a2po_smac-cyclic", 2, [[6, 0], [0, 6]], [[6, 0], [0, 6]])
    write_orders(tmp_path / "t", "a2po_smac-greedy", 1, [[2, 2], [2, 2]])
    write_orders(tmp_path / "u", "a2po_smac-cyclic", 1, [[1, 1, 2], [2, 1, 1], [1, 2, 1]])
    runs = plot.read([tmp_path])
    shares = plot.read_orders(runs)
    assert shares["t"]["a2po_smac-cyclic"]["rank"] == pytest.approx(np.array([[0.7, 0.3], [0.4, 0.6]]))
    assert shares["t"]["a2po_smac-cyclic"]["position"].tolist() == [[1, 0], [0, 1]]
    assert shares["t"]["a2po_smac-greedy"]["rank"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    figures = []
    monkeypatch.setattr(plot, "save", lambda *inputs: figures.append(inputs))
    plot.main(plot.Args((tmp_path,), orders=(tmp_path / "o.png",), reps=20))
    ((figure, files, _),) = figures
    assert files == (tmp_path / "o.png",)
    panels = [axes for axes in figure.axes if axes.get_title() and axes.get_visible()]
    names = ["t\na2po_smac-cyclic (2 seeds)", "t\na2po_smac-greedy (1 seed)"]
    assert [axes.get_title() for axes in panels] == names + names + ["u\na2po_smac-cyclic (1 seed)"] * 2
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in panels[0].patches]
    assert np.array(bars) == pytest.approx(np.array([(1, 0, 0.7), (2, 0, 0.4), (1, 0.7, 0.3), (2, 0.4, 0.6)]))
    thirds = [(bar.get_height(), bar.get_facecolor()) for bar in panels[4].patches]
    assert [height for height, _ in thirds] == [0.25, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.25, 0.25]
    assert len({color for _, color in thirds}) == 3
    labels = [axes.get_ylabel() for axes in figure.axes if axes not in panels and axes.get_visible()]
    assert labels == ["rank by E|A|, 1 is the largest", "place in the order"] * 2


@pytest.mark.parametrize(
    "orders",
    ["", "{", "[]", "{}", '{"rank": [[1]]}', '{"rank": [], "position": []}', '{"rank": [[1, 2]], "position": [[1, 2]]}']
    + ['{"rank": [[1, "a"], [2, 1]], "position": [[1, 2], [2, 1]]}', '{"rank": [[1, 2], [2]], "position": [[1], [1]]}']
    + [
        '{"rank": [[0, 0], [2, 1]], "position": [[1, 2], [2, 1]]}',
        '{"rank": [[-1, 2], [2, 1]], "position": [[1, 2], [2, 1]]}',
    ],
)
def test_a_run_without_ranks_is_one_line(tmp_path, orders, capsys):
    """A baseline, a run of before they were logged, a file that is something else; before anything is worked out."""
    write_orders(tmp_path / "t", "a2po_smac", 1, [[1, 2], [2, 1]])
    write_run(tmp_path / "t" / "mappo_smac__1.jsonl", [0.5] * 10)
    if orders:
        (tmp_path / "t" / "mappo_smac__1.orders.json").write_text(orders)
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.Args((tmp_path,), orders=(tmp_path / "o.png",)))
    (line,) = capsys.readouterr().err.splitlines()
    file = tmp_path / "t" / "mappo_smac__1.orders.json"
    assert stop.value.code == 2 and line.startswith(f"plot.py: error: --orders, {file}: has no ranks of agents")
    assert plot.read_orders(plot.read([tmp_path], algorithms=["a2po_smac"]))["t"].keys() == {"a2po_smac"}


def test_other_bad_orders_are_one_line(tmp_path, capsys):
    """A run directory without events, and seeds with different numbers of agents."""
    (tmp_path / "runs").mkdir()
    write_configured(tmp_path / "runs", SETTINGS)
    write_orders(tmp_path / "t", "a2po_smac", 1, [[1, 2], [2, 1]])
    write_orders(tmp_path / "t", "a2po_smac", 2, [[1]])
    for folder, why in (
        ("runs", "__100: has no ranks of agents"),
        ("t", "t a2po_smac: its runs have different numbers"),
    ):
        with pytest.raises(SystemExit) as stop:
            plot.read_orders(plot.read([tmp_path / folder]))
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("plot.py: error: --orders") and why in line


def test_over_tasks_only_what_all_have(tmp_path, capsys):
    for task, name, seeds in (
        ("t", "a", (1, 2)),
        ("t", "b", (1, 2)),
        ("u", "a", (1, 2)),
        ("u", "b", (1,)),
        ("v", "a", (1,)),
    ):
        for seed in seeds:
            write_run(tmp_path / task / f"{name}__{seed}.jsonl", [seed / 2] * 10)
    runs = plot.read([tmp_path])
    matrices = plot.score_matrices(runs, plot.choose_metrics(runs, "auto"))
    assert matrices["a"].tolist() == [[0.5, 0.5], [1, 1]] and matrices["b"].tolist() == [[0.5, 0.5]]
    assert "not as many seeds" in capsys.readouterr().err


def test_intervals_agree_with_rliable():
    rliable = pytest.importorskip("rliable.metrics")
    scores = np.random.default_rng(0).random((5, 3))
    assert plot.middle_of(scores, "iqm") == pytest.approx(rliable.aggregate_iqm(scores), abs=1e-12)
    args = plot.Args(paths=(), reps=200)
    low, high = plot.intervals(scores, lambda x: plot.middle_of(x, "iqm"), args)
    assert low < plot.middle_of(scores, "iqm") < high
    assert (low, high) == plot.intervals(scores, lambda x: plot.middle_of(x, "iqm"), args)
    x, y = scores.round(1), np.random.default_rng(1).random((4, 3)).round(1)
    assert plot.improvement(x, y) == pytest.approx(rliable.probability_of_improvement(x, y))


def test_figures(tmp_path, capsys):
    pytest.importorskip("rliable")
    pytest.importorskip("matplotlib")
    for name, seeds in (("a2po_smac", (1, 2)), ("mappo_smac", (1,))):
        for seed in seeds:
            write_run(tmp_path / "t" / f"{name}__{seed}.jsonl", np.linspace(0, 1, 12).tolist())
    options = ["--out", "c.png", "c.svg", "--efficiency", "e.svg", "--improvement", "i.svg", "--table", "t.md"]
    options = [str(tmp_path / o) if "." in o else o for o in options]
    reference = ["--reference", "0.2", "--reference-label", "random policy", "--title", "T", "--reps", "20"]
    plot.main(plot.parse_args(plot.Args, "", [str(tmp_path / "t"), *options, *reference]))
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "c.svg").read_text()
    assert "mappo_smac (1 seed, no interval)" in svg and "random policy" in svg
    printed = capsys.readouterr()
    assert (tmp_path / "t.md").read_text().strip() == printed.out.strip()
    assert "mappo_smac: one seed, therefore no interval" in printed.err


def test_a_picture_of_too_many_algorithms_is_refused(tmp_path, capsys):
    pytest.importorskip("rliable")
    for k in range(plot.MOST_CURVES + 1):
        write_run(tmp_path / "t" / f"idea{k}_smac__1.jsonl", [0.5] * 10)
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.Args((tmp_path / "t",), out=(tmp_path / "c.png",), reps=20))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"--out: {plot.MOST_CURVES + 1} names of algorithms are too many" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_table_on_a_full_disk_is_one_line(tmp_path, capsys):
    pytest.importorskip("rliable")
    write_run(tmp_path / "t" / "a__1.jsonl", [0.5] * 10)
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.Args((tmp_path / "t",), table=Path("/dev/full"), reps=20))
    errors = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert stop.value.code == 2 and errors == ["plot.py: error: /dev/full: cannot be written: No space left on device"]
