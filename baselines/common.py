"""What the baselines share: environment, buffers, evaluation, runs and their checkpoints; no algorithm.

Each gild script has its own copy of PLUMBING, so that it works alone. Edit it here, then copy it to them
with `python -m tests.copies --fix`.
"""

import json
import os
import random
import shlex
import signal
import sys
import time
from dataclasses import asdict, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# PLUMBING, the same in every script: environment, buffers, evaluation, runs and their checkpoints

SPARSE_THRESHOLDS = {"Hopper": 1.0, "Walker2d": 1.0, "HalfCheetah": 2.0, "Ant": 1.0}  # metres along +x


class InputError(ValueError):
    """A user's mistake, reported in one line."""


class SparseReward(gym.Wrapper):
    """The task's own reward while the agent is more than `threshold` metres ahead of its start, else 0."""

    def __init__(self, env: gym.Env, threshold: float):
        super().__init__(env)
        self.threshold = threshold
        self.x_init = float(getattr(env.unwrapped, "init_qpos", [0.0])[0])  # the model's, not the episode's

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        if "x_position" not in info:
            raise InputError("--sparse-threshold needs a task whose info has x_position")
        ahead = info["x_position"] - self.x_init > self.threshold
        return obs, reward if ahead else 0.0, terminated, truncated, info


def task_name(env_id: str) -> str:
    """`Hopper` for `Hopper-v4`, `Point2D` for `envs:Point2D-v0`."""
    return env_id.split(":")[-1].rsplit("-v", 1)[0]


def make_env(args, training: bool, render_mode: str | None = None) -> gym.Env:
    """The task, with actions in [-1, 1] whatever its own box; sparse for training unless --dense."""
    env_id = "envs:Point2D-v0" if args.env_id == "Point2D-v0" else args.env_id
    kwargs = {"render_mode": render_mode} if render_mode else {}
    if args.env_id == "Ant-v4":
        kwargs["use_contact_forces"] = True  # |S| = 111, as in the paper
    if env_id == "envs:Point2D-v0" and training and args.dense:
        kwargs["reward"] = "dense"
    try:
        env = gym.make(env_id, **kwargs)
    except (gym.error.Error, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--env-id {args.env_id}: {reason} (your own: module:Env-v0)") from None
    spaces, box = (env.observation_space, env.action_space), env.action_space
    vectors = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
    width = box.high - box.low if vectors and box.dtype.kind == "f" else np.zeros(1)
    if not (np.isfinite(width) & (width > 0)).all():
        raise InputError(f"--env-id {args.env_id} has {spaces}, not Box vectors with bounded float actions")
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 1_000)
        if training:
            print(f"{args.env_id} registers no max_episode_steps; episodes are cut at 1,000", file=sys.stderr)
    task = args.env_id.rsplit("-v", 1)[0]  # with its module: another one's Hopper keeps its own reward
    threshold = SPARSE_THRESHOLDS.get(task) if args.sparse_threshold is None else args.sparse_threshold
    if training and not args.dense and threshold is not None:
        env = SparseReward(env, threshold)

    # copies, so neither side can modify the other's arrays; clipped, as rescaling may round past the box
    def inside(action):
        return np.clip(action, box.low, box.high).astype(box.dtype)

    env = gym.wrappers.TransformAction(env, inside, box)
    env = gym.wrappers.TransformObservation(env, lambda obs: np.array(obs, np.float32), env.observation_space)
    env = gym.wrappers.TransformReward(env, lambda reward: np.asarray(reward).item())
    env.box = box  # in the units of the task and of demonstration files
    return env if (box.low == -1).all() and (box.high == 1).all() else gym.wrappers.RescaleAction(env, -1, 1)


class ReplayBuffer:
    """D: a ring of transitions; a row is (s, a, r, s', terminated) in float32."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.added = 0

    def add(self, obs, action, reward, next_obs, terminated):
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        if not np.isfinite(row).all():
            raise FloatingPointError(f"observation, action or reward not finite at step {self.added + 1}")
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1

    def sample(self, batch_size: int):
        """obs (N, |S|), action (N, |A|), reward (N, 1), next_obs (N, |S|), terminated (N, 1)"""
        filled = min(self.added, len(self.rows))
        index = torch.randint(filled, (batch_size,), device=self.rows.device)
        return self.rows[index].split(self.widths, dim=1)

    def state_dict(self):
        return {"rows": self.rows[: self.added].clone(), "added": self.added}  # a view would save all rows

    def load_state_dict(self, state):
        self.rows[: len(state["rows"])], self.added = state["rows"], state["added"]


class DemonstrationBuffer:
    """D_dem: the pairs (s_d, a_d) of a demonstration file, actions rescaled from the box to [-1, 1]."""

    def __init__(self, path: str | Path, env_id: str, env: gym.Env, device: torch.device):
        try:
            with np.load(path, allow_pickle=False) as file:
                obs, actions = np.float32(file["observations"]), np.float64(file["actions"])
                task = task_name(json.loads(str(file["metadata"]))["env_id"])
        except Exception as error:  # a missing, damaged or foreign file fails in a dozen ways
            raise InputError(f"cannot read demonstrations from {path} ({error!r}); set --demo-path") from None
        pairs, box = obs.shape[:1], env.get_wrapper_attr("box")
        shapes = [pairs + env.observation_space.shape, pairs + box.shape]
        if task != task_name(env_id):
            raise InputError(f"{path} has demonstrations of {task}, not {task_name(env_id)}")
        if pairs == (0,):
            raise InputError(f"{path} holds no pairs")
        if [obs.shape, actions.shape] != shapes:
            raise InputError(f"{path}: the shapes are {obs.shape} and {actions.shape}, not {shapes}")
        low, high = np.float64(box.low), np.float64(box.high)
        finite = np.isfinite(obs).all(1) & np.isfinite(actions).all(1)
        excess = np.maximum(low - actions, actions - high)
        outside = (excess > 1e-6 * np.maximum(abs(low), abs(high))).any(1)  # beyond rounding error
        if not finite.all():
            raise InputError(f"{path}: pair {finite.argmin()} is not finite")
        if outside.any():
            pair = outside.argmax()
            raise InputError(f"{path}: the action of pair {pair} is {excess[pair].max():.3g} outside the box")
        actions = ((actions - (high + low) / 2) / ((high - low) / 2)).clip(-1, 1)
        self.obs, self.actions = (torch.tensor(x, dtype=torch.float32, device=device) for x in (obs, actions))

    def sample(self, batch_size: int):
        """s_d (N, |S|), a_d (N, |A|)"""
        index = torch.randint(len(self.obs), (batch_size,), device=self.obs.device)
        return self.obs[index], self.actions[index]


def evaluate(act, actor, env: gym.Env, episodes: int, seed: int) -> np.ndarray:
    """The undiscounted return of each episode, (episodes,). The same seed gives the same starts."""
    returns = np.zeros(episodes)
    for i in range(episodes):
        obs, _ = env.reset(seed=seed + i)
        ended = False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(act(actor, obs))
            returns[i] += reward
            ended = terminated or truncated
    return returns


def save_evaluation(run_dir: Path, writer, args, global_step: int, returns, evaluations: list, policy: dict):
    """Logs the returns, saves the policy, and adds a row to evaluations.csv.

    A run that resumes from an earlier step keeps its newer rows and policy until it has got as far again.
    """
    mean, std = returns.mean(), returns.std()
    writer.add_scalar("eval/return_mean", mean, global_step)
    writer.add_scalar("eval/return_std", std, global_step)
    policy |= {"global_step": global_step, "args": asdict(args)}
    path = run_dir / "evaluations.csv"
    rows = path.read_text().splitlines()[1:] if path.exists() else []
    newer = [row for row in rows if int(row.split(",")[0]) > global_step]
    if not newer:
        save(run_dir / "policy.pt", policy)
    if args.keep_policies:
        save(run_dir / "policies" / f"{global_step}.pt", policy)
    evaluations.append(f"{global_step},{mean},{std}")
    save(path, "\n".join([*evaluations, *newer]) + "\n")
    tqdm.write(f"step {global_step:>9,}   return {mean:8.1f} ± {std:.1f}")


def check(args):
    """Raises InputError if an argument is out of range or a package is missing."""
    for field in fields(args):
        name, value = field.name, getattr(args, field.name)
        low = 1 if field.type is int and name not in ("seed", "clone_steps") else 0
        high = {"gamma": 1, "tau": 1, "ws_frac": 1, "torch_threads": 1_000}.get(name, 1e9)
        if type(value) in (int, float) and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value} is not between {low} and {high:g}")
    if args.batch_size > args.learning_starts:
        raise InputError(f"--batch-size {args.batch_size} exceeds --learning-starts {args.learning_starts}")
    if getattr(args, "compile", False) and not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise InputError(f"--compile needs PyTorch 2.11 or later, not {torch.__version__}")
    if args.track and not find_spec("wandb"):
        raise InputError("--track needs Weights & Biases: pip install wandb")


def command_line(Args):
    """The arguments. --resume takes the run's; only its length, tracking and --demo-path may be changed."""
    args = tyro.cli(Args)
    if args.resume is None:
        return args
    try:
        saved = json.loads(Path(args.resume, "args.json").read_text("utf-8"))["args"]
        run = Args(**saved)
        if vars(run).keys() != saved.keys():
            raise ValueError("it lacks some of its arguments")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {args.resume}: not a run of this script ({error})") from None
    args = tyro.cli(Args, default=run)
    free = "resume", "total_timesteps", "demo_path", "track", "wandb_project_name"
    for name, old in vars(run).items():
        if name not in free and old != getattr(args, name):
            raise InputError(f"--resume {args.resume}: the run has {name} {old}, not {getattr(args, name)}")
    if getattr(run, "ws_frac", 1) < 1:  # the warm start keeps its length; 1 stays "to the end"
        args.ws_frac = min(1.0, round(run.ws_frac * run.total_timesteps) / args.total_timesteps)
    return args


def last_evaluation(run_dir: Path) -> int:
    """The step of a run's last evaluation, 0 before the first. A finished run was evaluated at its end."""
    path = run_dir / "evaluations.csv"
    return int(path.read_text().splitlines()[-1].split(",")[0]) if path.exists() else 0


def start_run(args, parts: dict, generators: list):
    """A new run or args.resume: its folder, its TensorBoard writer, its last step and its evaluations."""
    if args.resume:
        run_dir = Path(args.resume)
        last_step, evaluations = load_checkpoint(run_dir / "checkpoint.pt", parts, generators)
        if max(last_step, last_evaluation(run_dir)) >= args.total_timesteps:
            raise InputError("nothing to do: the run is complete; raise --total-timesteps to extend it")
    else:
        env_id = args.env_id.replace(":", "-").replace("/", "-")
        run_dir = Path(f"runs/{env_id}__{args.exp_name}__{args.seed}__{time.time():.6f}")
        last_step, evaluations = 0, ["global_step,return_mean,return_std"]
        versions = {package: version(package) for package in ("torch", "gymnasium", "mujoco", "numpy")}
        save(run_dir / "args.json", json.dumps({"args": asdict(args), "versions": versions}, indent=2))
        save_checkpoint(run_dir / "checkpoint.pt", parts, generators, 0, evaluations)  # fail early
    if args.track:
        import wandb

        project, name = args.wandb_project_name, run_dir.resolve().name
        wandb.init(project=project, id=name, resume="allow", config=asdict(args), sync_tensorboard=True)
    if args.total_timesteps <= args.learning_starts:
        print(f"no update: the first comes after {args.learning_starts:,} steps", file=sys.stderr)
    device = next(parts["actor"].parameters()).device
    resumed = f", resumed from step {last_step:,}" if args.resume else ""
    print(f"{run_dir} on {device}{resumed}", flush=True)
    run_dir = run_dir.absolute()  # an environment may change the working directory
    return run_dir, SummaryWriter(run_dir, purge_step=last_step + 1), last_step, evaluations


def save(path: Path, data):
    """Writes a string, or anything torch.save can, atomically: `path` is never left half-written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode()) if isinstance(data, str) else torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch raises its own on top of the file system's
        if temporary.exists():
            temporary.unlink()
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(f"{path} could not be written: {cause}") from None


def save_checkpoint(path: Path, parts: dict, generators: list, global_step: int, evaluations: list[str]):
    """Saves a run's whole state between two episodes, when there is no simulator state to save."""
    networks = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    # -inf is not refused: it is SAC's log_alpha with --alpha 0
    if not all((weight < torch.inf).all() for network in networks for weight in network.parameters()):
        raise FloatingPointError(f"a network is not finite at step {global_step}; {path} is older")
    state = {name: part.state_dict() for name, part in parts.items()}
    device = next(parts["actor"].parameters()).device
    numpy_states = [  # np.random itself and an environment's RandomState have the older methods
        g.bit_generator.state if isinstance(g, np.random.Generator) else g.get_state(legacy=False)
        for g in (np.random, *generators)
    ]
    state |= {"global_step": global_step, "evaluations": evaluations, "torch": torch.get_rng_state()}
    state["cuda"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    state["random"] = json.dumps([random.getstate(), numpy_states], default=np.ndarray.tolist)
    save(path, state)


def load_checkpoint(path: Path, parts: dict, generators: list) -> tuple[int, list[str]]:
    """Restores what `save_checkpoint` saved. Returns the step and the evaluations."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        (number, words, gauss), numpy_states = json.loads(state["random"])
        random.setstate((number, tuple(words), gauss))
        for g, generator_state in zip((np.random, *generators), numpy_states, strict=True):
            if isinstance(g, np.random.Generator):
                g.bit_generator.state = generator_state
            else:
                g.set_state(generator_state)
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"])
        return state["global_step"], state["evaluations"]
    except Exception as error:  # a missing, damaged or foreign file fails in a dozen ways
        raise InputError(f"{path} is not a checkpoint of this run: {error!r:.300}") from None


received_signals = []


def stop_after_episode(number, frame):
    """Signal handler: the run ends with its episode and leaves a checkpoint. A repeat ends it now."""
    received_signals.append(number)
    signal.signal(number, signal.SIG_DFL)
    print("stopping after this episode; Ctrl-C again stops at once", file=sys.stderr)


def main(train, Args):
    """Runs a script's `train` from the command line. A user error exits with one line and status 2."""
    for name in {"SIGINT", "SIGTERM", "SIGBREAK"} & set(dir(signal)):  # the last is Windows'
        signal.signal(getattr(signal, name), stop_after_episode)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(errors="replace")  # a console without "±"
    torch.use_deterministic_algorithms(True)  # set here, not in `train`: a notebook keeps its own settings
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill the whole replay buffer
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU
    try:
        args = command_line(Args)
        torch.set_num_threads(args.torch_threads)
        run_dir = train(args)
    except (InputError, FloatingPointError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    if received_signals and last_evaluation(run_dir) < args.total_timesteps:
        command = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
        command += ["--resume", str(run_dir), "--total-timesteps", str(args.total_timesteps)]
        print(f"to resume: cd {shlex.quote(os.getcwd())} && {shlex.join(command)}")
        sys.exit(128 + received_signals[0])
