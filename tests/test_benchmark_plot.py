"""benchmark/plot.py: its numbers on hand-made files."""

import json

import numpy as np
import pytest

from benchmark import plot


def write_run(path, values, steps=None, metric="win_rate"):
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = steps or range(100, 100 * len(values) + 1, 100)
    path.write_text("".join(json.dumps({"step": s, metric: v}) + "\n" for s, v in zip(steps, values, strict=True)))
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


@pytest.mark.parametrize("line", ['{"step": 1}', '{"win_rate": 1}', '{"step": 1, "win_rate": NaN}', "[1]", "3"])
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
        ["t", "--metric", "episodic_return"],
        ["t", "--tasks", "z"],
        ["t", "--improvement", "x.png"],
        ["t", "--reps", "0"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(tmp_path, options, monkeypatch, capsys):
    for task in "tu":
        write_run(tmp_path / task / "a__1.jsonl", [0.5] * 10)
    (tmp_path / "t" / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if options == ["."] else tmp_path)
    with pytest.raises(SystemExit) as stop:
        plot.main(plot.tyro.cli(plot.Args, args=options))
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
    for number, config in enumerate(configs):
        folder = tmp_path / "runs" / f"3s5z-smax__a2po_smac__1__{100 + number}"
        write_run(folder / "eval.jsonl", [number / 10] * (12 if number == 4 else 10))
        (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "runs" / "3s5z-smax__a2po_smac__2__105").mkdir()  # has not evaluated yet
    runs = plot.read([tmp_path / "runs"])
    assert set(runs["3s5z-smax"]) == {"a2po_smac" + end for end in ("", "-no-preopc", "-fixed-clip", "-random")}
    assert [r.path.parent.name[-3:] for r in runs["3s5z-smax"]["a2po_smac"]] == ["104"]
    assert "__100" in capsys.readouterr().err


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
    plot.main(plot.tyro.cli(plot.Args, args=[str(tmp_path / "t"), *options, *reference]))
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "c.svg").read_text()
    assert "mappo_smac (1 seed, no interval)" in svg and "random policy" in svg
    printed = capsys.readouterr()
    assert (tmp_path / "t.md").read_text().strip() == printed.out.strip()
    assert "mappo_smac: one seed, therefore no interval" in printed.err
