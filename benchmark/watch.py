"""A trained checkpoint as a GIF: greedy episodes, as in the script's evaluation.

    pip install -r benchmark/requirements.txt
    python benchmark/watch.py --checkpoint runs/<run>/checkpoint.pt --out watch.gif
    python benchmark/watch.py --checkpoint benchmark/policies/<policy>.pt --out watch.gif

SMAX: the team in blue, the enemy in red, lines for shots; a disc has the unit's size and is filled as high as it has
health. MPE: agents in blue, landmarks black or, covered, green; all begin in the grey square (a checkpoint from
JaxMARL's double plays mpe2 here). MuJoCo: a camera goes with the robot; without a display this needs EGL (`apt-get
install -y libegl1 libgl1-mesa-dri`, no GPU), or OSMesa (`libosmesa6`) with MUJOCO_GL=osmesa. Football, from above: the
team in blue, the opponent in red, goalkeepers as rings, who has the ball in a yellow one; lines lead to where players
will be in half a second, and from where the ball was a second ago; it is as far above its shadow as above the grass.
StarCraft II is not drawn.
"""

import ctypes.util
import importlib
import importlib.util
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.cli import check_writable, parse_args, write  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    checkpoint: Path
    """checkpoint.pt of a run, or a policy of benchmark/policies"""
    out: Path
    """GIF to write"""
    episodes: int = 1
    """episodes to play, one after the other"""
    seed: int = 1
    """seed of the episodes"""
    fps: int | None = None
    """pictures a second; by default 10 steps for SMAX and Football, 5 for MPE, the robot's own time for MuJoCo"""
    every: int | None = None
    """steps from one picture to the next; by default 1, or what makes some 25 pictures a second for MuJoCo"""
    max_frames: int = 200
    """pictures after which it ends; a match of Football has 3,000 steps"""
    width: int = 320
    """of the pictures in pixels"""
    max_kib: int = 950
    """size of the file at most; colours are reduced, then pictures made smaller, until it fits"""


def fail(option: str, value, message: str):
    """One line that names the option, the value and what is wrong; exit status 2."""
    print(f"{Path(__file__).name}: error: {option} {value}: {message}", file=sys.stderr)
    raise SystemExit(2)


# ------------------------------------------------------------------------------------------------------ benchmarks
# For each benchmark a function of the imported script, the checkpoint and the arguments, which sets up the game and
# returns the number of steps in a second of it, and a generator that plays: for each step it gives a function that
# draws the picture, called at once or not at all.
def actor_networks(checkpoint: dict) -> tuple[int, dict]:
    """How many networks a recurrent actor has, 0 if it is one and no list of them; and the weights of the first one."""
    weights = checkpoint["learned"]["actor"]
    number = len({name.partition(".")[0] for name in weights if name[0].isdigit()})
    return number, {name.removeprefix("0."): value for name, value in weights.items()} if number else weights


def recurrent_policy(script, checkpoint: dict):
    """The greedy policy of a recurrent actor as a function of obs (n, obs_dim), masks (n, n_actions), and start."""
    settings = checkpoint["args"]
    number, first = actor_networks(checkpoint)
    *_, last_bias = first.values()
    sizes = len(first["base.0.weight"]), len(last_bias), settings["hidden_size"]
    kind = settings.get("recurrent", True), settings.get("deep", False)
    networks = [script.RecurrentNetwork(*sizes, 0.01, *kind) for _ in range(max(1, number))]
    actor = torch.nn.ModuleList(networks) if number else networks[0]
    actor.load_state_dict(checkpoint["learned"]["actor"])
    hidden = None

    def act(obs, masks, start):
        nonlocal hidden
        hidden = torch.zeros(1, len(obs), settings["hidden_size"]) if hidden is None else hidden
        obs = torch.as_tensor(obs, dtype=torch.float32)
        obs = torch.cat([obs, torch.eye(len(obs))], -1) if settings.get("agent_id", False) else obs
        seen = {"obs": obs[None], "action_mask": torch.as_tensor(masks)[None]}
        actions, _, hidden = script.act(actor, seen | {"start": torch.tensor([float(start)])}, hidden, greedy=True)
        return actions[0].numpy()

    return act


def watch_smac(script, checkpoint: dict, args: Args):
    """SMAX, drawn here: JaxMARL's own visualiser needs a second for a picture, and knows no health."""
    if checkpoint["args"]["simulator"] != "smax":
        fail("--checkpoint", args.checkpoint, "is of StarCraft II, which records replays itself; SMAX can be drawn")
    needs("jaxmarl", "../requirements.txt", args)
    from jaxmarl.environments import smax
    from PIL import Image, ImageDraw, ImageFont

    made, original = [], smax.HeuristicEnemySMAX
    smax.HeuristicEnemySMAX = lambda **options: made.append(original(**options)) or made[-1]
    envs = script.SMAX(checkpoint["args"]["map"], 1, args.seed)
    smax.HeuristicEnemySMAX = original
    game = made[0]._env  # knows sizes, ranges and names of the units
    radii, full = np.asarray(game.unit_type_radiuses), np.asarray(game.unit_type_health)
    ranges, n = np.asarray(game.unit_type_attack_ranges), game.num_allies
    act = recurrent_policy(script, checkpoint)

    def look():
        names = ("unit_positions", "unit_types", "unit_alive", "unit_health", "prev_attack_actions")
        return [np.asarray(getattr(envs._state.state, name))[0] for name in names]

    def draw(places, types, alive, health, attacks, corner, scale, size):
        image = Image.new("RGB", (2 * size[0], 2 * size[1]), "white")  # twice the size, for smooth edges
        canvas, font = ImageDraw.Draw(image), ImageFont.load_default(size=0.7 * scale)
        pixels = (places - corner) * [scale, -scale] + [0, image.height]
        for unit in np.flatnonzero(alive):
            number = attacks[unit] - game.num_movement_actions
            target = n + number if unit < n else n - 1 - number  # allies count enemies up; enemies count down from n
            near = number >= 0 and np.linalg.norm(places[unit] - places[target]) < ranges[types[unit]]
            if near and alive[target]:
                canvas.line([*pixels[unit], *pixels[target]], "royalblue" if unit < n else "firebrick", 2)
        for unit in np.flatnonzero(alive):
            (x, y), r = pixels[unit], scale * radii[types[unit]]
            box = (x - r, y - r, x + r, y + r)
            pale, strong = ("white", "cornflowerblue") if unit < n else ("white", "lightcoral")
            angle = np.degrees(np.arccos(1 - 2 * np.clip(health[unit] / full[types[unit]], 0, 1)))
            canvas.ellipse(box, pale)
            canvas.chord(box, 90 - angle, 90 + angle, strong)  # filled from below, as high as there is health
            canvas.ellipse(box, outline="royalblue" if unit < n else "firebrick", width=3)
            canvas.text((x, y), game.unit_type_shorthands[types[unit]], "black", font=font, anchor="mm")
        return np.asarray(image.resize(size, Image.Resampling.LANCZOS))

    def play():
        obs, _ = envs.reset()
        seen = []
        for episode in range(1, args.episodes + 1):
            if len(seen) >= args.max_frames * (args.every or 1):
                break  # of the others no picture would be drawn
            steps, total, done = 0, 0.0, False
            seen.append(look())
            while not done:
                actions = act(obs["obs"][0], obs["action_mask"][0], start=steps == 0)
                obs, reward, terminated, truncated, info = envs.step(actions[None])
                steps, total, done = steps + 1, total + float(reward[0]), bool(terminated[0] or truncated[0])
                seen.append(look())
            end = "won" if info["episode"]["won"][0] else "not won"
            tell(f"episode {episode}: {end} after {steps} steps, return {total:.3f}")
            obs, *_ = envs.step(actions[None])  # next-step autoreset: the first observation of the next one
        # The part of the map where something happens, no higher than wide.
        places = np.concatenate([where[alive] for where, _, alive, *_ in seen])
        center, extent = (places.max(0) + places.min(0)) / 2, np.ptp(places, axis=0) + 2.5
        extent = np.array([max(extent[0], extent[1]), max(extent[1], extent[0] / 2)])
        size = args.width, round(args.width * extent[1] / extent[0])
        for state in seen:
            yield partial(draw, *state, center - extent / 2, 2 * args.width / extent[0], size)

    return 10, play()


def navigation_picture(agents, landmarks, reach: float, size: float, width: int) -> np.ndarray:
    """Agents (n, 2) of radius `size` and landmarks (m, 2), both seen from -reach to reach; (width, width, 3)."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (2 * width, 2 * width), "white")  # twice the size, for smooth edges
    canvas, scale = ImageDraw.Draw(image), width / reach

    def box(place, radius):
        (x, y), r = width + scale * np.multiply(place, [1, -1]), scale * radius
        return x - r, y - r, x + r, y + r

    canvas.rectangle(box((0, 0), 1), outline="lightgrey", width=3)
    for place in agents:
        canvas.ellipse(box(place, size), fill="lightsteelblue", outline="royalblue", width=4)
    for place in landmarks:
        covered = np.linalg.norm(np.subtract(agents, place), axis=1).min() < size
        canvas.ellipse(box(place, 0.05), fill="seagreen" if covered else "black")
    return np.asarray(image.resize((width, width), Image.Resampling.LANCZOS))


def watch_mpe(script, checkpoint: dict, args: Args):
    """mpe2's game, drawn here: its own picture zooms to and fro and cuts off what lies at its edge."""
    needs("mpe2", "../requirements.txt", args)
    settings = checkpoint["args"]
    game = script.Navigation(settings["n_agents"], settings["local_ratio"], args.seed)
    act, world = recurrent_policy(script, checkpoint), game.game.world

    def look():
        return [np.array([body.state.p_pos for body in group]) for group in (world.agents, world.landmarks)]

    def play():
        seen = []
        for episode in range(args.episodes):
            if len(seen) >= args.max_frames * (args.every or 1):
                break  # of the others no picture would be drawn
            game.reset()
            steps, total, done = 0, 0.0, False
            seen.append(look())
            while not done:
                view = game.observe()
                rewards, terminated, truncated, _ = game.step(act(view["obs"], view["action_mask"], start=steps == 0))
                steps, total, done = steps + 1, total + np.mean(rewards), terminated or truncated
                seen += [look()] * (5 if done else 1)  # a second to see the end
            tell(f"episode {episode + 1}: return {total:.3f} (per agent)")
        # One view for all pictures: the square in which all begin, and wherever they go.
        size = world.agents[0].size
        reach = 1.05 * (size + max(1.0, *(np.abs(np.concatenate(places)).max() for places in seen)))
        for agents, landmarks in seen:
            yield partial(navigation_picture, agents, landmarks, reach, size, args.width)

    return 5, play()


# Of Football's pitch, in metres as in the engine's gamedefines.hpp: half its length and width, half of what is drawn,
# and what a unit of the raw observation is.
PITCH, FIELD, METRES = np.array([55.0, 36.0]), np.array([60.0, 40.0]), np.array([54.4, 83.6])
GOAL_DEPTH, HALF_GOAL = 2.55, 3.7
GAME_MODES = ("", "kick-off", "goal kick", "free kick", "corner", "throw-in", "penalty")


def football_picture(raw: dict, width: int, step: int = 0, note: str = "", trail=()) -> np.ndarray:
    """gfootball's raw observation from above, (height, width, 3): a line of text, and 120 x 80 m of grass.

    trail: places (x, y, z) of the ball before, as in the raw observation.
    """
    from PIL import Image, ImageDraw, ImageFont

    head, field = width // 14, round(width * FIELD[1] / FIELD[0])
    image = Image.new("RGB", (2 * width, 2 * (head + field)), "#a3c98b")  # twice the size, for smooth edges
    canvas, scale = ImageDraw.Draw(image), width / FIELD[0]
    canvas.rectangle((0, 0, 2 * width, 2 * head), "white")
    middle, font = (width, head), ImageFont.load_default(size=1.5 * head)
    canvas.text(middle, ":", "black", font=font, anchor="mm")
    for sign, goals, anchor, color in zip((-1, 1), raw["score"], "rl", ("royalblue", "firebrick"), strict=True):
        canvas.text((width + sign * head / 2, head), str(goals), color, font=font, anchor=f"{anchor}m")
    canvas.text((head / 2, head), f"step {step}", "black", font=font, anchor="lm")
    canvas.text((2 * width - head / 2, head), note, "black", font=font, anchor="rm")

    center = np.array([width, 2 * head + field])

    def at(place, height=0.0):
        """Pixels of a place in metres; what is above the grass is further up, but not out of the picture."""
        x, y = center + scale * np.asarray(place)
        return x, max(y - scale * height, 1.5 * scale)

    def around(place, radius, height=0.0):
        (x, y), r = at(place, height), scale * radius
        return x - r, y - r, x + r, y + r

    def rectangle(x, y, **colors):
        canvas.rectangle((*at((min(x), -y)), *at((max(x), y))), **colors)

    thin, thick = max(1, width // 120), max(2, width // 50)
    lines = {"outline": "white", "width": thin}
    length, half = PITCH
    rectangle((-length, length), half, **lines)
    canvas.line((at((0, -half)), at((0, half))), "white", thin)
    canvas.ellipse(around((0, 0), 9.15), **lines)
    for side, arc in ((-1, 0), (1, 180)):
        rectangle((side * length, side * (length - 16.5)), 20.16, **lines)
        rectangle((side * length, side * (length - 5.5)), 9.16, **lines)
        canvas.ellipse(around((side * (length - 11), 0), 0.4), "white")
        canvas.arc(around((side * (length - 11), 0), 9.15), arc - 53, arc + 53, "white", thin)
        rectangle((side * length, side * (length + GOAL_DEPTH)), HALF_GOAL, fill="white", outline="dimgrey", width=3)

    agents, owner = set(raw["left_agent_controlled_player"]), (raw["ball_owned_team"], raw["ball_owned_player"])
    teams = (("left", "royalblue", "cornflowerblue"), ("right", "firebrick", ""))
    players = [(side, player) for side in (0, 1) for player in np.flatnonzero(raw[f"{teams[side][0]}_team_active"])]
    for side, player in sorted(players, key=lambda one: one == owner):  # who has the ball is above all others
        name, strong, pale = teams[side]
        place, moving = (raw[f"{name}_{what}"][player] * METRES for what in ("team", "team_direction"))
        canvas.line((at(place), at(place + 5 * moving)), strong, thick)  # a step is 0.1 s
        if (side, player) == owner:
            canvas.ellipse(around(place, 3.4), "yellow", "black", 2)
        keeper = raw[f"{name}_team_roles"][player] == 0
        fill = "white" if keeper else pale if side == 0 and player not in agents else strong
        canvas.ellipse(around(place, 2.2), fill, strong, thick if keeper else 2)

    path = [at(place[:2] * METRES, place[2]) for place in (*trail, raw["ball"])]
    canvas.line(path, "black", 2)
    (*place, height) = raw["ball"]
    canvas.ellipse(around(place * METRES, 1.0), "dimgrey")
    canvas.ellipse(around(place * METRES, 1.2, height), "white", "black", 3)
    return np.asarray(image.resize((width, head + field), Image.Resampling.LANCZOS))


def with_goal(before: dict, score) -> dict:
    """The last raw observation before a goal, with its score and the ball flown on into the net.

    The engine's next observation is of the kick-off.
    """
    side = 1 if score[0] > before["score"][0] else -1
    ball, speed = before["ball"], before["ball_direction"]  # by step
    x = side * (PITCH[0] + GOAL_DEPTH / 2) / METRES[0]
    steps = (x - ball[0]) / speed[0] if side * speed[0] > 0 else 0.0
    _, y, z = ball + steps * speed
    inside = (HALF_GOAL - 1) / METRES[1]
    return before | {"ball": np.array([x, np.clip(y, -inside, inside), np.clip(z, 0, 2)]), "score": score}


def watch_grf(script, checkpoint: dict, args: Args):
    """gfootball's game, drawn here from its raw observations: the engine's own pictures need OpenGL."""
    settings, path = checkpoint["args"], args.checkpoint
    if not script.find_football():
        fail("--checkpoint", path, "needs the package gfootball: README.md, section Set-up")
    scenario = settings["scenario"]
    if scenario not in script.SCENARIOS:
        fail("--checkpoint", path, f"is of the scenario {scenario}, which {script.__name__}.py does not know")
    weights = {term: settings[f"reward_{term}"] for term in script.Reward.TERMS}
    game, act = script.Football(scenario, weights, args.seed), recurrent_policy(script, checkpoint)
    n, inputs = game.observation_space["obs"].shape
    number, first = actor_networks(checkpoint)
    if len(first["base.0.weight"]) != inputs or number not in (0, 1, n):
        fail("--checkpoint", path, f"its networks do not fit {n} agents that observe {inputs} numbers in {scenario}")

    def play():
        for episode in range(1, args.episodes + 1):
            game.reset()
            raw, trail, steps, total, done = game.raw, [], 0, 0.0, False
            yield partial(football_picture, raw, args.width, note=GAME_MODES[raw["game_mode"]])
            while not done:
                seen, before = game.observe(), raw
                reward, terminated, truncated, _ = game.step(act(seen["obs"], seen["action_mask"], start=steps == 0))
                raw, steps, total, done = game.raw, steps + 1, total + reward, terminated or truncated
                trail = [*trail[-9:], before["ball"]]
                goal = raw["score"] != before["score"]
                shown = with_goal(before, raw["score"]) if goal else raw
                note = "goal" if goal else GAME_MODES[raw["game_mode"]] or ("end" if done else "")
                if raw["game_mode"] != script.NORMAL and not goal:
                    trail = []  # the ball was put somewhere else
                draw = partial(football_picture, shown, args.width, steps, note, trail)
                for _ in range(10 if goal or done else 1):  # a second to see the end
                    yield draw
                trail = [] if goal else trail
            ours, theirs = raw["score"]
            tell(f"episode {episode}: {ours} : {theirs} after {steps} steps, return {total:.3f}")
        game.close()

    return 10, play()


def watch_mamujoco(script, checkpoint: dict, args: Args):
    """The robot in Gymnasium's simulation, which has pictures; EnvPool's, for training, is the same but for them."""
    needs("gymnasium_robotics", "../requirements.txt", args)
    if "MUJOCO_GL" not in os.environ and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        found = [name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if ctypes.util.find_library(library)]
        if not found:
            what = "to draw MuJoCo without a display: apt-get install -y libegl1 libgl1-mesa-dri"
            fail("--checkpoint", args.checkpoint, what)
        os.environ["MUJOCO_GL"] = found[0]
    import gymnasium as gym

    settings = checkpoint["args"]
    scenario, version = settings["scenario"], settings["env_version"]
    version = version if version == "v5" else "v4"  # Gymnasium has no older ones; EnvPool's v2 and v3 move like its v4
    options = {"use_contact_forces": True} if scenario == "Ant" and version == "v4" else {}
    options |= {"width": args.width, "height": 3 * args.width // 4, "camera_name": "track"}
    try:
        env = gym.make(f"{scenario}-{version}", render_mode="rgb_array", **options)
        env.reset(seed=args.seed)
        env.render()
    except Exception as error:
        name = os.environ.get("MUJOCO_GL", "")
        reason = str(error).strip().splitlines()[-1:] or [repr(error)]
        fail("MUJOCO_GL", name, f"cannot draw: {reason[0]} (try egl: apt-get install -y libegl1 libgl1-mesa-dri)")

    joints = script.agent_joints(scenario, settings["partition"])
    learned = checkpoint["learned"]
    normalizer = script.ObservationNormalizer(len(learned["obs_normalizer"]["mean"]))
    normalizer.load_state_dict(learned["obs_normalizer"])
    inputs, d = len(normalizer.mean), max(map(len, joints))
    if env.observation_space.shape != (inputs,):
        fail("--checkpoint", args.checkpoint, f"observes {inputs} numbers, {env.spec.id} has {env.observation_space}")
    actors = torch.nn.ModuleList([script.GaussianActor(inputs, d, settings["hidden_size"]) for _ in joints])
    actors.load_state_dict(learned["actor"])
    policies = script.joint_policies(actors)
    low, high = env.action_space.low, env.action_space.high

    def play():
        for episode in range(args.episodes):
            obs, _ = env.reset(seed=args.seed + episode)
            steps, total, done = 0, 0.0, False
            yield env.render
            while not done:
                actions, _ = script.act(policies, normalizer(torch.as_tensor(obs)[None]), greedy=True)
                action = np.empty_like(low)
                for mine, output in zip(joints, actions[0].clamp(-1, 1).numpy(), strict=True):
                    action[mine] = output[: len(mine)]
                obs, reward, terminated, truncated, _ = env.step(low + (action + 1) / 2 * (high - low))
                steps, total, done = steps + 1, total + float(reward), terminated or truncated
                yield env.render
            tell(f"episode {episode + 1}: {steps} steps, return {total:.1f}")
        env.close()

    return 1 / env.unwrapped.dt, play()


BENCHMARKS = {"smac": watch_smac, "mpe": watch_mpe, "grf": watch_grf, "mamujoco": watch_mamujoco}


# -------------------------------------------------------------------------------------------------------- pictures
def few_colors(frames: list[np.ndarray], colors: int, scale: float) -> list[np.ndarray]:
    """The frames in one palette, without dithering, so that what does not move does not change."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    if scale < 1:
        size = round(images[0].width * scale), round(images[0].height * scale)
        images = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    some = np.concatenate([np.asarray(image) for image in images[:: max(1, len(images) // 50)]])
    palette = Image.fromarray(some).quantize(colors, Image.Quantize.FASTOCTREE)  # others lose what is rare
    plain = Image.Dither.NONE
    return [np.asarray(image.quantize(palette=palette, dither=plain).convert("RGB")) for image in images]


def encode(frames: list[np.ndarray], fps: float, max_kib: int) -> bytes:
    """A GIF of at most max_kib, if 16 colours and a third of the width can do it."""
    import imageio.v3 as iio

    for colors, scale in ((128, 1), (64, 1), (32, 1), (32, 0.75), (16, 0.75), (16, 0.5), (16, 0.33)):
        pictures = few_colors(frames, colors, scale)
        data = iio.imwrite("<bytes>", pictures, extension=".gif", plugin="pillow", duration=1000 / fps, loop=0)
        if len(data) <= 1024 * max_kib:
            break
    tell(f"{len(frames)} pictures of {pictures[0].shape[1]} x {pictures[0].shape[0]}, {colors} colours, {fps:.0f}/s")
    return data


# ------------------------------------------------------------------------------------------------------------ main
def tell(line: str):
    tqdm.write(line)


def needs(package: str, requirements: str, args: Args):
    if importlib.util.find_spec(package) is None:
        path = os.path.normpath(Path("benchmark", requirements))
        fail("--checkpoint", args.checkpoint, f"needs the package {package}: pip install -r {path}")


def read(args: Args):
    """The checkpoint, its imported script and the function that plays it; ends the program at the first wrong value."""
    for name, value in asdict(args).items():
        low = 0 if name == "seed" else 1
        if type(value) is int and not low <= value < 2**31:
            fail(f"--{name.replace('_', '-')}", value, f"must be at least {low}, and below 2^31")
    if not 32 <= args.width <= 4096:
        fail("--width", args.width, "must be within 32 and 4096")
    if args.fps is not None and args.fps > 50:
        fail("--fps", args.fps, "must be at most 50, more than that a GIF cannot do")
    if args.out.suffix != ".gif":
        fail("--out", args.out, "must end in .gif")
    try:
        checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail("--checkpoint", args.checkpoint, "no such file")
    except Exception:
        fail("--checkpoint", args.checkpoint, "is not a checkpoint of these scripts")
    if not isinstance(checkpoint, dict) or not {"args", "script", "learned"} <= set(checkpoint):
        fail("--checkpoint", args.checkpoint, "is not a checkpoint of these scripts")
    name = str(checkpoint["script"])
    if not name.isidentifier() or not (ROOT / f"{name}.py").is_file():
        fail("--checkpoint", args.checkpoint, f"was written by {name}.py, which is not in {ROOT}")
    benchmark = name.rsplit("_", 1)[-1]
    if benchmark not in BENCHMARKS:
        fail("--checkpoint", args.checkpoint, f"is of {name}; only {', '.join(BENCHMARKS)} can be drawn")
    needs("imageio", "requirements.txt", args)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(args.out)
    except OSError as error:
        fail("--out", args.out, error.strerror)
    return checkpoint, importlib.import_module(name), BENCHMARKS[benchmark]


def main(args: Args):
    checkpoint, script, watch = read(args)
    torch.set_num_threads(1)
    try:
        steps_per_second, play = watch(script, checkpoint, args)
    except (KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        fail("--checkpoint", args.checkpoint, f"does not fit {script.__name__}.py as it is now: {reason}")
    every = args.every or max(1, round(steps_per_second / 25))
    fps = args.fps or min(50, steps_per_second / every)
    frames = []
    for step, draw in enumerate(tqdm(play, unit="step")):
        if step % every == 0:
            frames.append(np.asarray(draw())[..., :3])
        if len(frames) == args.max_frames:
            tell(f"stopped at --max-frames {args.max_frames}")
            break
    data = encode(frames, fps, args.max_kib)
    try:
        write(args.out, data)
    except OSError as error:
        fail("--out", args.out, error.strerror)
    print(f"{args.out}: {len(data) / 1024:.0f} KiB")
    if len(data) > 1024 * args.max_kib:
        print(f"that is more than --max-kib {args.max_kib}: fewer --max-frames help", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(parse_args(Args, __doc__))
    except KeyboardInterrupt:
        sys.exit(130)
