"""benchmark/watch.py draws what a checkpoint plays; benchmark/policy.py makes a small file of it that does the same."""

import contextlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import a2po_grf
import a2po_mpe
from benchmark import policy, watch

ROOT = Path(__file__).resolve().parents[1]


def only_line(capsys) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def checkpoint_of(path, script="a2po_mpe", **settings):
    hidden, n = 16, 3
    args = {"hidden_size": hidden, "recurrent": True, "n_agents": n, "local_ratio": 0.0} | settings
    actor = a2po_mpe.RecurrentNetwork(4 + 2 * n + 4 * (n - 1), 5, hidden, gain=0.01, deep=args.get("deep", False))
    torch.save({"args": args, "script": script, "learned": {"actor": actor.state_dict()}}, path)
    return path


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoint": Path("nowhere/checkpoint.pt")}, "nowhere/checkpoint.pt: no such file"),
        ({"checkpoint": Path(__file__)}, "is not a checkpoint of these scripts"),
        ({"script": "ppo"}, "was written by ppo.py, which is not in "),
        ({"script": "../a2po_mpe"}, "was written by ../a2po_mpe.py, which is not in "),
        ({"script": "a2po_smac", "simulator": "starcraft2"}, "is of StarCraft II"),
        ({"out": Path("x.mp4")}, "--out x.mp4: must end in .gif"),
        ({"out": Path("/proc/x.gif")}, "--out /proc/x.gif: No such file"),
        ({"episodes": 0}, "--episodes 0: must be at least 1"),
        ({"max_frames": 0}, "--max-frames 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"fps": 51}, "--fps 51: must be at most 50"),
        ({"width": 8}, "--width 8: must be within 32 and 4096"),
        ({"width": 60000}, "--width 60000: must be within 32"),
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


def test_a_script_of_another_benchmark_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(watch.BENCHMARKS, "mpe")
    with pytest.raises(SystemExit) as end:
        watch.main(watch.Args(checkpoint_of(tmp_path / "checkpoint.pt"), tmp_path / "x.gif"))
    assert end.value.code == 2 and "is of a2po_mpe; only smac, grf, mamujoco can be drawn" in only_line(capsys)


def test_watch_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        watch.main(watch.Args(checkpoint_of(tmp_path / "checkpoint.pt"), tmp_path / "x.gif"))
    assert end.value.code == 2
    assert "needs the package imageio: pip install -r benchmark/requirements.txt" in only_line(capsys)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("recurrent", [True, False])
def test_the_recurrent_policy_is_the_evaluation_s(recurrent, deep, tmp_path):
    """Same greedy actions as script.evaluate over two episodes with a mask, the GRU zeroed in between."""
    torch.manual_seed(0)
    path = checkpoint_of(tmp_path / "checkpoint.pt", recurrent=recurrent, deep=deep)
    checkpoint = torch.load(path, weights_only=True)
    weights = checkpoint["learned"]["actor"]
    weights["head.4.weight" if deep else "head.1.weight"].normal_()
    act = watch.recurrent_policy(a2po_mpe, checkpoint)
    actor = a2po_mpe.RecurrentNetwork(18, 5, 16, gain=0.01, deep=deep)
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


@pytest.mark.parametrize("agent_id", [True, False])
def test_the_recurrent_policy_sees_the_agents_numbers(agent_id):
    """As the evaluation's does."""
    torch.manual_seed(0)
    actors = torch.nn.ModuleList([a2po_grf.RecurrentNetwork(7 + 3 * agent_id, 19, 16, 1.0)])
    settings = {"hidden_size": 16, "agent_id": agent_id}
    act = watch.recurrent_policy(a2po_grf, {"args": settings, "learned": {"actor": actors.state_dict()}})
    obs, ids = torch.randn(3, 7), torch.eye(3)
    seen = {"obs": (torch.cat([obs, ids], -1) if agent_id else obs)[None], "action_mask": torch.ones(1, 3, 19)}
    expected, _, _ = a2po_grf.act(actors, seen | {"start": torch.ones(1)}, torch.zeros(1, 3, 16), greedy=True)
    assert len(set(expected[0].tolist())) > 1
    np.testing.assert_array_equal(act(obs.numpy(), np.ones((3, 19)), start=True), expected[0])


@pytest.mark.parametrize("networks", [1, 3])
def test_the_recurrent_policy_of_a_list_of_networks(networks, tmp_path):
    """Football's, which all agents share or each has its own: the actions are those of script.act."""
    torch.manual_seed(0)
    actors = torch.nn.ModuleList([a2po_grf.RecurrentNetwork(7, 19, 16, 1.0) for _ in range(networks)])
    checkpoint = {"args": {"hidden_size": 16}, "learned": {"actor": actors.state_dict()}}
    act, hidden = watch.recurrent_policy(a2po_grf, checkpoint), torch.zeros(1, 3, 16)
    actions = []
    for t, obs in enumerate(torch.randn(8, 3, 7)):
        mask, start = torch.ones(1, 3, 19), torch.tensor([float(t in (0, 4))])
        mask[..., ::2] = t % 2
        seen = {"obs": obs[None], "action_mask": mask, "start": start}
        expected, _, hidden = a2po_grf.act(actors, seen, hidden, greedy=True)
        actions.append(act(obs.numpy(), mask[0].numpy(), start=bool(start)))
        np.testing.assert_array_equal(actions[-1], expected[0])
    assert len(np.unique(actions)) > 3


def test_watch_writes_a_gif(tmp_path, capsys):
    pytest.importorskip("imageio", reason="stands in benchmark/requirements.txt only")
    pytest.importorskip("mpe2")
    from PIL import Image, ImageSequence

    out = tmp_path / "new" / "x.gif"
    watch.main(watch.Args(checkpoint_of(tmp_path / "checkpoint.pt"), out, episodes=9, max_frames=30, width=64))
    with Image.open(out) as image:
        frames = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
        assert image.size == (64, 64) and len(frames) > 1 and sum(frames) == 30 * 200  # equal pictures are one frame
    told = capsys.readouterr().out
    assert out.stat().st_size < 100_000 and "stopped at --max-frames 30" in told
    assert "episode 1: " in told and "episode 2: " not in told, "no more is played than is drawn"


# ------------------------------------------------------------------------------------------------------------- MPE
COLORS = {"steel": (176, 196, 222), "blue": (65, 105, 225), "green": (46, 139, 87), "white": (255, 255, 255)}
COLORS |= {"black": (0, 0, 0), "lightgrey": (211, 211, 211), "red": (178, 34, 34), "pale": (100, 149, 237)}
COLORS |= {"yellow": (255, 255, 0), "grass": (163, 201, 139), "grey": (105, 105, 105)}


def nearest(image) -> np.ndarray:
    """The names of the nearest colours: edges are smooth."""
    names, colors = np.array(list(COLORS)), np.array(list(COLORS.values()))
    return names[np.linalg.norm(image[..., None, :].astype(float) - colors, axis=-1).argmin(-1)]


def test_navigation_picture():
    """From -5 to 5 in 400 pixels: 40 in a unit, the middle at (200, 200), y upwards."""
    image = watch.navigation_picture([(4.5, 0), (-1, -2)], [(4.45, 0.05), (-1, -2.2), (0, 4)], 5.0, 0.15, 400)
    assert image.shape == (400, 400, 3) and image.dtype == np.uint8
    names = nearest(image)
    assert names[202, 383] == names[280, 160] == "steel"
    assert names[198, 378] == "green" and names[288, 160] == names[40, 200] == "black"
    assert image[159:162, 180].min() < 240 and image[180, 239:242].min() < 240  # the square from -1 to 1
    assert names[100, 300] == "white"


@pytest.mark.parametrize("action", [1, 2, 3, 4])
def test_nobody_leaves_the_picture(action, tmp_path):
    """All agents run in one direction all the time, so that they end far out of the square in which they begin."""
    pytest.importorskip("mpe2")
    checkpoint = torch.load(checkpoint_of(tmp_path / "checkpoint.pt"), weights_only=True)
    checkpoint["learned"]["actor"]["head.1.bias"][action] = 100.0
    args = watch.Args(Path(), Path(), episodes=2, width=200)
    fps, play = watch.watch_mpe(a2po_mpe, checkpoint, args)
    images = np.stack([draw() for draw in play])
    assert fps == 5 and images.shape == (2 * 30, 200, 200, 3)
    border = np.concatenate([images[:, [0, -1]], images[:, :, [0, -1]].swapaxes(1, 2)], 1)
    assert (border == 255).all()
    seen = [np.argwhere(nearest(images[i]) == "blue") for i in (0, 25)]
    assert len(seen[1]) > 0.5 * len(seen[0]) > 20  # one may hide another
    square = np.argwhere((images[0] == COLORS["lightgrey"]).all(-1))
    corner, opposite = square.min(0), square.max(0)
    assert 20 < corner.min() and opposite.max() < 180  # the square is in the picture, and small
    assert ((seen[1] < corner - 5) | (seen[1] > opposite + 5)).any(1).all()  # they are out of it


# -------------------------------------------------------------------------------------------------------- Football
METRES = np.array([54.4, 83.6])  # in a unit of the engine's coordinates
engine = pytest.mark.skipif(not a2po_grf.find_football(), reason="gfootball is not installed, the README says how")


def raw(left=((-50, 0), (10, -20), (-10, 25)), right=((50, 0), (20, 10)), ball=(0.0, 0.0, 0.0), owner=None, **changes):
    """What pictures need of a raw observation, from places in metres: keepers first, player 1 of the left an agent."""
    observation = {"ball": np.array(ball) / [*METRES, 1], "ball_direction": np.zeros(3), "score": [0, 0]}
    observation |= {"game_mode": 0, "left_agent_controlled_player": [1]}
    observation["ball_owned_team"], observation["ball_owned_player"] = owner or (-1, -1)
    for name, places in (("left", left), ("right", right)):
        observation[f"{name}_team"] = np.array(places) / METRES
        observation[f"{name}_team_direction"] = np.zeros((len(places), 2))
        observation[f"{name}_team_active"] = np.ones(len(places), bool)
        observation[f"{name}_team_roles"] = np.arange(len(places))
    assert set(changes) <= set(observation)
    return observation | changes


def color(image, x, y) -> str:
    """At a place in metres: 480 pixels are 120 m, 34 above the grass are the text's."""
    return str(nearest(image[round(34 + 160 + 4 * y), round(240 + 4 * x)]))


def test_football_players():
    image = watch.football_picture(raw(owner=(0, 1), ball=(30, 30, 0)), 480)
    assert image.shape == (34 + 320, 480, 3) and image.dtype == np.uint8
    assert color(image, 10, -20) == "blue" and color(image, -10, 25) == "pale" and color(image, 20, 10) == "red"
    assert color(image, -50, 0) == color(image, 50, 0) == "white"  # keepers are rings
    assert color(image, -48.4, 0) == "blue" and color(image, 48.4, 0) == "red"
    assert color(image, 12.8, -20) == "yellow" and color(image, 22.8, 10) == color(image, -7.2, 25) == "grass"
    image = watch.football_picture(raw(owner=(0, 1), right=((50, 0), (13, -20))), 480)
    assert color(image, 12.8, -20) == "yellow"  # also with an opponent there
    image = watch.football_picture(raw(owner=(1, 1)), 480)
    assert color(image, 12.8, -20) == "grass" and color(image, 22.8, 10) == "yellow"


def test_football_players_sent_off_are_not_there():
    image = watch.football_picture(raw(left_team_active=np.array([True, False, True])), 480)
    assert color(image, 10, -20) == "grass" and color(image, -10, 25) == "pale"


def test_football_players_directions():
    """0.8 m in a step are 4 m in half a second; the engine's y points down, as the picture's does."""
    moving = raw(right_team_direction=np.array([(0, 0), (0, 0.8)]) / METRES)
    assert color(watch.football_picture(raw(), 480), 20, 13) == "grass"
    image = watch.football_picture(moving, 480)
    assert color(image, 20, 13) == "red" and color(image, 20, 15) == color(image, 20, 7) == "grass"


def test_football_pitch():
    image = watch.football_picture(raw(left=((-50, -20),), right=((50, -20),), ball=(30, 30, 0)), 480).astype(int)
    for x, y in ((0, 20), (-55, 30), (55, -30), (30, 36), (-30, -36), (38.5, 10), (-38.5, 15), (49.5, 6), (-49.5, -6)):
        place = round(194 + 4 * y), round(240 + 4 * x)
        around = image[place[0] - 1 : place[0] + 2, place[1] - 1 : place[1] + 2]
        assert around.max((0, 1)).min() > 220, (x, y)  # a white line
    assert color(image, 9.15 + 4, 0) == color(image, 58, 20) == color(image, 20, 38) == "grass"
    assert color(image, 56.3, 2) == color(image, -56.3, -2) == "white"  # in the goals
    assert color(image, 56.3, 5) == "grass"


@pytest.mark.parametrize("x, y", [(-55, -36), (-55, 36), (55, -36), (55, 36), (0, -36)])
@pytest.mark.parametrize("height", [0, 3, 10])
def test_football_ball(x, y, height):
    """White above its shadow, in the picture also when it is high at the upper line."""
    image = watch.football_picture(raw(ball=(x, y, height)), 480)
    assert color(image, x, y) == ("grey" if height else "white")
    assert color(image, x, y - height) == "white"
    assert "black" in {color(image, x + dx, y - height) for dx in (-1, -1.25, 1, 1.25)}  # its edge


def test_football_ball_is_never_out_of_the_picture():
    image = watch.football_picture(raw(ball=(-20, -36, 60)), 480)
    assert {"white", "black"} <= set(nearest(image[:12, 240 - 80]))


def test_football_trail():
    before = np.array([(0, 10, 0), (10, 10, 0)]) / [*METRES, 1]
    moved = raw(left=((-50, 0),), right=((50, 0),), ball=(20, 10, 0))
    assert color(watch.football_picture(moved, 480), 15, 10) == "grass"
    image = watch.football_picture(moved, 480, trail=before)
    assert color(image, 15, 10) == color(image, 5, 10) == "black" and color(image, 25, 10) == "grass"


def test_football_text():
    plain = watch.football_picture(raw(), 480)
    image = watch.football_picture(raw(score=[2, 1]), 480, step=7, note="corner")
    changed = (image != plain).any(-1)
    assert changed[:34].any() and not changed[34:].any()
    columns = np.flatnonzero(changed.any(0))
    assert columns.min() < 80 and columns.max() > 440 and ((columns > 210) & (columns < 270)).any()
    assert {"blue", "red", "black"} <= set(nearest(image[:34, 200:280]).flat)


@pytest.mark.parametrize(
    "ball, direction, score, expected",
    [
        ((54, 1, 0.5), (3, 0.2, 0), [2, 1], (56.275, 1 + 0.2 * 2.275 / 3, 0.5)),
        ((-54, 0, 1), (-1, 0, 0), [1, 2], (-56.275, 0, 1)),
        ((54, 20, 9), (0.5, -0.1, 0), [2, 1], (56.275, 2.7, 2)),  # from a header that was not seen: between the posts
        ((54, -1, 0), (-1, 0, 0), [2, 1], (56.275, -1, 0)),  # by an own goal: without a direction
    ],
)
def test_football_goal(ball, direction, score, expected):
    before = raw(ball=ball, ball_direction=np.array(direction) / [*METRES, 1], score=[1, 1])
    shown = watch.with_goal(before, score)
    np.testing.assert_allclose(shown["ball"] * [*METRES, 1], expected, atol=1e-6)
    assert shown["score"] == score and before["score"] == [1, 1]
    assert color(watch.football_picture(shown, 480), 56.25, shown["ball"][1] * 83.6 - shown["ball"][2]) == "white"


def football_checkpoint(path, scenario="academy_empty_goal", networks=1, obs_dim=None, hidden_size=16):
    n, left, right, _ = a2po_grf.SCENARIOS.get(scenario, a2po_grf.SCENARIOS["5_vs_5"])
    obs_dim = obs_dim or a2po_grf.feature_bounds(left, right).shape[1]
    actors = torch.nn.ModuleList([a2po_grf.RecurrentNetwork(obs_dim, 19, 16, 0.01) for _ in range(networks)])
    settings = vars(a2po_grf.Args(scenario=scenario, hidden_size=hidden_size))
    torch.save({"args": settings, "script": "a2po_grf", "learned": {"actor": actors.state_dict()}}, path)
    return path


@pytest.mark.parametrize(
    "found, options, message",
    [
        (False, {}, "needs the package gfootball: README.md, section Set-up"),
        (True, {"scenario": "6_vs_6"}, "is of the scenario 6_vs_6, which a2po_grf.py does not know"),
        (True, {"scenario": "5_vs_5", "networks": 3}, "its networks do not fit 4 agents"),
        (True, {"obs_dim": 50}, "its networks do not fit 1 agents that observe"),
        (True, {"hidden_size": 8}, "does not fit a2po_grf.py as it is now: "),
    ],
)
def test_football_bad_input(found, options, message, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "imageio" or find(name))
    monkeypatch.setattr(a2po_grf, "find_football", lambda: found)
    path = football_checkpoint(tmp_path / "checkpoint.pt", **options)
    with pytest.raises(SystemExit) as end:
        watch.main(watch.Args(path, tmp_path / "x.gif"))
    assert end.value.code == 2 and message in only_line(capsys)
    assert "\n## Google Research Football\n" in (ROOT / "README.md").read_text()


def test_football_episodes(tmp_path, capsys, monkeypatch):
    """Of a made-up game: after a goal, and at the end, the picture stays; a goal is seen, not the kick-off after it."""
    shot = raw(ball=(52, 0, 0), ball_direction=np.array([2, 0, 0]) / [*METRES, 1])
    kick_off = raw(score=[1, 0], game_mode=1)
    story = [raw(ball=(50, 0, 0)), shot, kick_off, raw(score=[1, 0], ball=(0, 30, 0)), raw(score=[1, 0], game_mode=5)]

    class Game(a2po_grf.Football):
        def reset(self, seed=None):
            self.rest = iter(story)
            self.raw = next(self.rest)

        def step(self, action):
            assert action.shape == (1,)
            self.raw = next(self.rest)
            return 0.5, self.raw is story[-1], False, {}

        def observe(self):
            return {"obs": np.zeros(self.observation_space["obs"].shape), "action_mask": np.ones((1, 19), np.int8)}

    monkeypatch.setattr(a2po_grf, "Football", Game)
    monkeypatch.setattr(a2po_grf, "find_football", lambda: True)
    checkpoint = torch.load(football_checkpoint(tmp_path / "checkpoint.pt"), weights_only=True)
    fps, play = watch.watch_grf(a2po_grf, checkpoint, watch.Args(Path(), Path(), episodes=2, width=480))
    images = [draw() for draw in play]
    assert fps == 10 and len(images) == 2 * (1 + 1 + 10 + 1 + 10)
    told = capsys.readouterr().out.splitlines()
    assert told == [f"episode {e}: 1 : 0 after 4 steps, return 2.000" for e in (1, 2)]
    first, shot, goal, on, end = (images[i] for i in (0, 1, 2, 12, 13))
    assert all((images[i] == goal).all() for i in range(2, 12)) and all((images[i] == end).all() for i in range(13, 23))
    for x, image in ((50, first), (52, shot), (56.25, goal)):
        assert color(image, x, 0) == "white" and "black" in {color(image, x, dy) for dy in (1, 1.25)}
    trail = watch.with_goal(story[1], [1, 0]), 480, 2, "goal", [story[0]["ball"], story[1]["ball"]]
    assert (goal == watch.football_picture(*trail)).all()
    assert (on == watch.football_picture(story[3], 480, 3, trail=[kick_off["ball"]])).all()
    assert (end == watch.football_picture(story[4], 480, 4, "throw-in")).all()


@engine
def test_a_football_episode_is_the_evaluation_s(capsys):
    saved = torch.load(ROOT / "benchmark" / "policies" / "grf-academy_run_to_score.pt", weights_only=True)
    args = a2po_grf.Args(**saved["args"] | {"num_envs": 1, "num_workers": 1})
    envs = a2po_grf.make_envs(args)
    n, obs_dim = envs.single_observation_space["obs"].shape
    actors = torch.nn.ModuleList([a2po_grf.RecurrentNetwork(obs_dim, 19, args.hidden_size, 0.01) for _ in range(n)])
    actors.load_state_dict(saved["learned"]["actor"])
    (episode,) = a2po_grf.evaluate(actors, envs, 1, torch.device("cpu"))
    envs.close()
    _, play = watch.watch_grf(a2po_grf, saved, watch.Args(Path(), Path(), seed=1000 * args.seed))
    assert len(list(play)) == 1 + episode["length"] - 1 + 10
    told = f"{episode['goal']} : {episode['lost']} after {episode['length']} steps, return {episode['return']:.3f}"
    assert f"episode 1: {told}" in capsys.readouterr().out


@engine
def test_watch_writes_a_gif_of_football(tmp_path, capsys):
    pytest.importorskip("imageio", reason="stands in benchmark/requirements.txt only")
    from PIL import Image, ImageSequence

    out, path = tmp_path / "x.gif", ROOT / "benchmark" / "policies" / "grf-academy_run_to_score.pt"
    watch.main(watch.Args(path, out, max_frames=15))
    with Image.open(out) as image:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        assert image.size == (320, 22 + 213) and len(frames) == 15 and image.info["duration"] == 100
    for frame in frames:
        blue, red = ((nearest(frame) == team).sum() for team in ("blue", "red"))
        assert 40 < blue < 250 and 200 < red < 900  # two of ours, six of theirs
    assert "15 pictures of 320 x 235" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- pictures
def test_rare_colours_stay():
    """Yellow and blue in one of 60 pictures, of a ground in many shades."""
    frames = np.random.default_rng(0).integers(100, 140, (60, 40, 40, 3), dtype=np.uint8)
    frames[30, :8, :8], frames[30, :8, 8:16] = (255, 255, 0), (65, 105, 225)
    for colors in (128, 32):
        few = watch.few_colors(list(frames), colors, 1)
        assert nearest(few[30][4, 4]) == "yellow" and nearest(few[30][4, 12]) == "blue"
        assert len(np.unique(np.reshape(few, (-1, 3)), axis=0)) <= colors


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


def test_a_policy_does_not_replace_its_run(tmp_path, capsys):
    """The checkpoint has what the run needs to go on."""
    path = checkpoint_of(tmp_path / "checkpoint.pt")
    before = path.read_bytes()
    (tmp_path / "link.pt").symlink_to(path)
    for out in (path, tmp_path / "link.pt"):
        with pytest.raises(SystemExit) as end:
            policy.main(policy.Args(path, out))
        assert end.value.code == 2 and "is the checkpoint itself" in only_line(capsys) and path.read_bytes() == before
