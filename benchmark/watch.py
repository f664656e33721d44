"""A trained checkpoint as a GIF: greedy episodes, as in the script's evaluation.

    pip install -r benchmark/requirements.txt
    python benchmark/watch.py --checkpoint runs/<run>/checkpoint.pt --out watch.gif
    python benchmark/watch.py --checkpoint benchmark/policies/<policy>.pt --out watch.gif

SMAX: the team in blue, the enemy in red, lines for shots; a disc has the unit's size and is filled as high as it has
health. MPE: agents in blue, landmarks black or, covered, green (a checkpoint from JaxMARL's double plays mpe2 here).
MuJoCo: a camera goes with the robot; without a display this needs EGL (`apt-get install -y libegl1 libgl1-mesa-dri`,
no GPU), or OSMesa (`libosmesa6`) with MUJOCO_GL=osmesa. StarCraft II and Football are not drawn.
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
import tyro
from tqdm import tqdm

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
    """pictures a second; by default 10 steps for SMAX, 5 for MPE, the robot's own time for MuJoCo"""
    every: int | None = None
    """steps from one picture to the next; by default 1, or what makes some 25 pictures a second for MuJoCo"""
    max_frames: int = 200
    """pictures after which it ends"""
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
def recurrent_policy(script, checkpoint: dict):
    """The greedy policy of a recurrent actor as a function of obs (n, obs_dim), masks (n, n_actions), and start."""
    settings, weights = checkpoint["args"], checkpoint["learned"]["actor"]
    inputs, n_actions = len(weights["base.0.weight"]), len(weights["head.1.bias"])
    actor = script.RecurrentNetwork(inputs, n_actions, settings["hidden_size"], 0.01, settings["recurrent"])
    actor.load_state_dict(weights)
    hidden = None

    def act(obs, masks, start):
        nonlocal hidden
        hidden = torch.zeros(1, len(obs), settings["hidden_size"]) if hidden is None else hidden
        obs = torch.as_tensor(obs, dtype=torch.float32)
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


def watch_mpe(script, checkpoint: dict, args: Args):
    """mpe2's game, drawn here: its own picture zooms to and fro and cuts off what lies at its edge."""
    needs("mpe2", "../requirements.txt", args)
    from PIL import Image, ImageDraw

    settings = checkpoint["args"]
    game = script.Navigation(settings["n_agents"], settings["local_ratio"], args.seed)
    act, world = recurrent_policy(script, checkpoint), game.game.world

    def draw():
        agents, landmarks = ([x.state.p_pos for x in group] for group in (world.agents, world.landmarks))
        image = Image.new("RGB", (2 * args.width, 2 * args.width), "white")
        canvas, scale = ImageDraw.Draw(image), args.width / 1.5  # everything starts within -1 and 1

        def disc(place, radius, **colors):
            (x, y), r = args.width + scale * place * [1, -1], scale * radius
            canvas.ellipse((x - r, y - r, x + r, y + r), **colors)

        for body, place in zip(world.agents, agents, strict=True):
            disc(place, body.size, fill="lightsteelblue", outline="royalblue", width=3)
        for place in landmarks:
            covered = min(np.linalg.norm(place - other) for other in agents) < world.agents[0].size
            disc(place, 0.05, fill="seagreen" if covered else "black")
        return np.asarray(image.resize((args.width, args.width), Image.Resampling.LANCZOS))

    def play():
        for episode in range(args.episodes):
            game.reset()
            steps, total, done = 0, 0.0, False
            yield draw
            while not done:
                seen = game.observe()
                rewards, terminated, truncated, _ = game.step(act(seen["obs"], seen["action_mask"], start=steps == 0))
                steps, total, done = steps + 1, total + np.mean(rewards), terminated or truncated
                yield draw
            tell(f"episode {episode + 1}: return {total:.3f} (per agent)")

    return 5, play()


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


BENCHMARKS = {"smac": watch_smac, "mpe": watch_mpe, "mamujoco": watch_mamujoco}


# -------------------------------------------------------------------------------------------------------- pictures
def few_colors(frames: list[np.ndarray], colors: int, scale: float) -> list[np.ndarray]:
    """The frames in one palette, without dithering, so that what does not move does not change."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    if scale < 1:
        size = round(images[0].width * scale), round(images[0].height * scale)
        images = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    some = np.concatenate([np.asarray(image) for image in images[:: max(1, len(images) // 12)]])
    palette = Image.fromarray(some).quantize(colors)
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
    if args.width < 32:
        fail("--width", args.width, "must be at least 32")
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
    except OSError as error:
        fail("--out", args.out, error.strerror)
    sys.path.insert(0, str(ROOT))
    return checkpoint, importlib.import_module(name), BENCHMARKS[benchmark]


def main(args: Args):
    checkpoint, script, watch = read(args)
    torch.set_num_threads(1)
    steps_per_second, play = watch(script, checkpoint, args)
    every = args.every or max(1, round(steps_per_second / 25))
    fps = args.fps or min(50, steps_per_second / every)
    frames = []
    for step, draw in enumerate(tqdm(play, unit="step")):
        if step % every == 0:
            frames.append(np.asarray(draw())[..., :3])
        if len(frames) == args.max_frames:
            tell(f"stopped after {step} steps at --max-frames {args.max_frames}")
            break
    data = encode(frames, fps, args.max_kib)
    args.out.write_bytes(data)
    print(f"{args.out}: {len(data) / 1024:.0f} KiB")
    if len(data) > 1024 * args.max_kib:
        print(f"that is more than --max-kib {args.max_kib}: fewer --max-frames help", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
