"""Runs a saved policy and prints its returns: the task's own (dense, bar Point2D) and the sparse one.

    python evaluate.py runs/<run>
    python evaluate.py runs/<run>/policies/100000.pt --video hopper.mp4    # kept by --keep-policies

The policy acts without noise in its run's environment, through the script that wrote it. Its episodes start
elsewhere than the evaluations in training; --seed 101 repeats those of a run with seed 1. --render opens a
window, --video records without one. Without a display MuJoCo renders only if MUJOCO_GL is egl or osmesa.
"""

import contextlib
import io
import os
import signal
import sys
import warnings
from copy import copy
from dataclasses import dataclass
from importlib import import_module, invalidate_caches
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
import tyro


@dataclass
class Args:
    policy: tyro.conf.Positional[Path]  # a run's folder, or a policy file
    episodes: int = 10  # number of episodes
    seed: int = 0  # seed of the first episode; each further episode takes the next one
    render: bool = False  # show a window
    video: Path | None = None  # record to this file, .mp4 (pip install imageio-ffmpeg) or .gif
    env_id: str | None = None  # evaluate in this environment, such as module:Env-v0; None: the run's
    script: Path | None = None  # the script that wrote the policy; None: found by its name

    def __post_init__(self):
        if self.episodes < 1:
            raise ValueError(f"--episodes {self.episodes} is less than 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} is negative")
        if self.video and self.render:
            raise ValueError("--render and --video exclude each other")
        if self.video and self.video.suffix not in (".mp4", ".gif"):
            raise ValueError(f"--video {self.video} ends neither in .mp4 nor in .gif")


class InputError(ValueError):
    """A user's mistake, reported in one line."""


def find_script(name: str, policy: Path, script: Path | None) -> tuple[str, Path, Path]:
    """The module name of the script that wrote a policy, its file, and the folder to import it from."""
    if script:
        if script.suffix != ".py" or not script.is_file():
            raise InputError(f"--script {script} is not a Python file")
        file = script.resolve()
        if (file.parent / "__init__.py").exists():
            return f"{file.parent.name}.{file.stem}", file, file.parents[1]
        return file.stem, file, file.parent
    run = [folder.parent for folder in policy.resolve().parents if folder.name == "runs"][:1]
    folders = list(dict.fromkeys([*run, Path.cwd(), Path(__file__).resolve().parent]))
    for folder in folders:
        for file in (folder / f"{name}.py", folder / f"{name.replace('.', '/')}.py"):
            if file.is_file():
                return name, file, folder
    places = ", ".join(map(str, folders))
    raise InputError(f"{policy} was written by {name}, which is not in {places}; --script names its file")


def import_script(name: str, file: Path, folder: Path):
    """The module in this file, even if another file's module has its name already."""
    if sys.path[0] != str(folder):
        sys.path.insert(0, str(folder))  # as Python does with the folder of a script that it runs
    invalidate_caches()
    spec = None
    with contextlib.suppress(ModuleNotFoundError):  # another folder's package lacks it
        spec = find_spec(name)
    if spec and spec.origin and Path(spec.origin).resolve() == file.resolve():
        return import_module(name)
    spec = spec_from_file_location(name, file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_policy(path: Path, script: Path | None = None, env_id: str | None = None):
    """The actor of a policy file or a run, the script that wrote it (a module), its Args, and its step."""
    path = Path(path, "policy.pt") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise InputError(f"there is no {path}; a run writes policy.pt at its first evaluation")
    try:
        policy = torch.load(path, weights_only=True, map_location="cpu")
        weights, name, global_step = policy["actor"], policy["script"], policy["global_step"]
        if Path(name).name != name:
            raise ValueError(f"its script is {name!r}")
        # whoever evaluates a run need not have its tracker installed
        saved = {key: value for key, value in policy["args"].items() if (key, value) != ("track", True)}
    except Exception as error:  # a damaged or foreign file fails in a dozen ways
        raise InputError(f"{path} is not a policy file of this project: {error!r:.150}") from None
    module = import_script(*find_script(name, path, script))
    try:
        args = module.Args(**saved | ({"env_id": env_id} if env_id else {}))
        env = module.make_env(args, training=False)
        actor = module.Actor(env.observation_space.shape[0], env.action_space.shape[0])
        actor.load_state_dict(weights)
        env.close()
    except ValueError as error:  # the script's own refusal
        raise InputError(f"{path}: {error}") from None
    except (TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [repr(error)])[-1].strip()
        raise InputError(f"{path} does not fit {module.__file__}: {reason}") from None
    return actor, module, args, global_step


def sparse_rule(script, args):
    """A function of a step's result: the reward of the run's sparse task, by its own SparseReward wrapper."""
    args = copy(args)
    args.dense = False
    with contextlib.redirect_stderr(io.StringIO()):  # what training says of a task
        env = script.make_env(args, training=True)
    env.close()
    while type(env).__name__ != "SparseReward":
        if env is env.unwrapped:
            return lambda result: result[1]  # the task's own reward is the sparse one
        env = env.env

    def reward(result):
        if "x_position" not in result[4]:
            return np.nan  # only a --dense run can have a threshold then, and it never used it
        env.env = SimpleNamespace(step=lambda action: result)
        return env.step(None)[1]

    return reward


def rollout(actor, script, args, env: gym.Env, seed: int, explore=False, after_step=lambda: None):
    """Endless episodes in an environment of the script's make_env(args, training=False).

    Yields each as a dict of arrays with a row per step: those of a demonstration file, but with actions in
    [-1, 1], and `sparse_rewards`. With `explore` the policy acts as in training: with noise, or a sample.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    sparse = sparse_rule(script, args)
    noisy = explore and hasattr(args, "exploration_noise")  # DDPG and TD3
    sample = {"explore": True} if explore and not noisy else {}  # SAC
    names = ("observations", "actions", "rewards", "sparse_rewards", "terminations", "truncations")
    while True:
        obs, _ = env.reset(seed=seed)
        steps, ended = [], False
        while not ended:
            action = script.act(actor, obs, **sample)
            if noisy:
                noise = rng.normal(0, np.float32(args.exploration_noise), action.shape)
                action = (action + noise).clip(-1, 1).astype(np.float32)
            if not np.isfinite(action).all():
                raise InputError("the policy's action is not finite")
            result = next_obs, reward, terminated, truncated, _ = env.step(action)
            steps.append((obs, action, reward, sparse(result), terminated, truncated))
            after_step()
            obs, ended = next_obs, terminated or truncated
        yield dict(zip(names, map(np.array, zip(*steps, strict=True)), strict=True))
        seed += 1


def make_renderable(script, args, render_mode: str):
    """The environment after a test frame, so that a missing renderer is reported before any episode."""
    window = render_mode == "human"
    if window and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        raise InputError("--render needs a display; --video records without one")
    try:
        env = script.make_env(args, training=False, render_mode=render_mode)
        env.reset()
        if env.render() is None and not window:
            raise ValueError("it has no render_mode rgb_array")
        return env
    except Exception as error:  # each renderer fails in a way of its own
        remedy = "MuJoCo without a display needs MUJOCO_GL=egl, most other tasks pip install pygame"
        raise InputError(f"{args.env_id} cannot be rendered: {error!r:.200} ({remedy})") from None


@contextlib.contextmanager
def video(path: Path, env: gym.Env):
    """Yields a function that adds the environment's frame to a video, which appears when it is complete."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    kind = "GIF-PIL" if path.suffix == ".gif" else "FFMPEG"  # both write frame by frame
    try:
        import imageio

        with imageio.get_writer(part, kind, mode="I", fps=env.metadata.get("render_fps", 30)) as writer:
            yield lambda: writer.append_data(env.render())
        os.replace(part, path)
    except ImportError as error:
        raise InputError(f"{path} needs another package: pip install imageio-ffmpeg ({error})") from None
    except OSError as error:
        raise InputError(f"{path} could not be written: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def main(args: Args):
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # what matters is reported in one line
        actor, script, run, _ = load_policy(args.policy, args.script, args.env_id)
        if args.render or args.video:
            env = make_renderable(script, run, "rgb_array" if args.video else "human")
        else:
            env = script.make_env(run, training=False)
        stack.callback(env.close)
        add_frame = stack.enter_context(video(args.video, env)) if args.video else lambda: None
        episodes = rollout(actor, script, run, env, args.seed, after_step=add_frame)
        rows = [
            (episode["rewards"].sum(), episode["sparse_rewards"].sum(), len(episode["rewards"]))
            for episode in islice(episodes, args.episodes)
        ]
    for name, column in zip(("task return", "sparse return", "steps"), np.transpose(rows), strict=True):
        print(f"{name:13} {column.mean():9.1f} ± {column.std():.1f}")
    if args.video:
        print(f"{args.video}: {sum(steps for *_, steps in rows)} frames")


def command_line(main, Args):
    """Runs a tool's `main` from the command line. A user error exits with one line and status 2."""
    for name in {"SIGINT", "SIGTERM", "SIGBREAK"} & set(dir(signal)):  # the last is Windows'
        signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))  # cleans up first
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # an ASCII terminal has no ±
    try:
        main(tyro.cli(Args))
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command_line(main, Args)
