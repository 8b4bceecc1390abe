"""SAC: the vanilla algorithm that GILD is added to; Haarnoja et al., ICML 2018, as by pranz24.

`diff baselines/sac.py gild_sac.py` shows GILD. With --dense this trains an Expert on the task's own reward.

    Eq. (2)        L_RL, the vanilla actor's loss             rl_loss
    Eq. (5)        critic step, vanilla SAC's                 critic_loss

    python -m baselines.sac --env-id Hopper-v4
"""

import contextlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = "sac"  # the name of this experiment
    seed: int = 1  # of networks, environment, exploration and replay
    torch_deterministic: bool = True  # only PyTorch's deterministic kernels
    cuda: bool = True  # run on the GPU if there is one
    torch_threads: int = 1  # CPU threads of PyTorch
    compile: bool = False  # torch.compile the gradients: a minute at the start, faster steps, other rounding
    cudagraphs: bool = False  # on a GPU, replay iterations as CUDA graphs: the same results, sooner
    track: bool = False  # log to Weights & Biases too (needs the wandb package)
    wandb_project_name: str = "gild"  # the project there
    wandb_entity: str | None = None  # the entity (team) there
    capture_video: bool = False  # training episodes as runs/<run>/videos (needs the moviepy package)
    save_model: bool = True  # write the actor to runs/<run>/policy.pt at every evaluation
    keep_policies: bool = False  # keep the actor of every evaluation, as runs/<run>/policies/<step>.pt
    checkpoint_frequency: int = 50_000  # environment steps from one runs/<run>/checkpoint.pt to the next
    resume: Path | None = None  # go on with the run in this folder, runs/<run>
    eval_frequency: int = 5_000  # environment steps from one evaluation to the next
    eval_episodes: int = 10  # episodes in an evaluation

    env_id: str = "Hopper-v4"  # a Gymnasium id with Box observations and actions; Point2D-v0 needs envs/
    dense: bool = False  # train on the task's own dense reward
    sparse_threshold: float | None = None  # metres along x before any reward [default: by task]
    total_timesteps: int = 1_000_000  # environment steps of the run
    learning_rate: float = 3e-4  # of actor, critic and temperature
    buffer_size: int = 1_000_000  # transitions that the replay buffer D holds
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate at which the target networks follow
    batch_size: int = 256  # N: of transitions
    learning_starts: int = 10_000  # steps with random actions before the first update
    alpha: float = 0.2  # temperature of the entropy, or where its tuning starts
    autotune: bool | None = None  # tune it to the entropy -|A| [default: not in Hopper, HalfCheetah, Point2D]


class InputError(ValueError):
    """A mistake in what the user gave, told in one line."""


# ENVIRONMENT

SPARSE_THRESHOLDS = {"Hopper": 1.0, "Walker2d": 1.0, "HalfCheetah": 2.0, "Ant": 1.0}  # metres along +x


class SparseReward(gym.Wrapper):
    """The task's own reward while the agent is more than `threshold` metres ahead of its start, else 0."""

    def __init__(self, env: gym.Env, threshold: float):
        super().__init__(env)
        self.threshold = threshold
        self.x_init = float(getattr(env.unwrapped, "init_qpos", [0.0])[0])  # the model's, not the episode's

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        ahead = info["x_position"] - self.x_init > self.threshold
        return obs, reward if ahead else 0.0, terminated, truncated, info


def task_name(env_id: str) -> str:
    """`Hopper` of `Hopper-v4`, `Point2D` of `envs:Point2D-v0`."""
    return env_id.split(":")[-1].rsplit("-v", 1)[0]


def make_env(args: Args, training: bool, render_mode: str | None = None) -> gym.Env:
    """The task: sparse for training (its own reward with --dense), its own reward for evaluation."""
    task = task_name(args.env_id)
    kwargs = {"use_contact_forces": True} if args.env_id == "Ant-v4" else {}  # |S| = 111, as in the paper
    if task == "Point2D" and training and args.dense:
        kwargs["reward"] = "dense"
    env_id = "envs:Point2D-v0" if args.env_id == "Point2D-v0" else args.env_id
    # Gymnasium and MuJoCo deprecate the -v4 tasks whenever one is made; whatever else they say is passed on
    mujoco_warning = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: "deprecated" in text or print(text, file=sys.stderr))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
            env = gym.make(env_id, render_mode=render_mode, **kwargs)
    finally:
        mujoco.set_mju_user_warning(mujoco_warning)
    spaces = env.observation_space, env.action_space
    vectors = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
    if not vectors or not env.action_space.is_bounded():
        raise InputError(f"{args.env_id} has {spaces}, but must have vectors in a Box, the actions' bounded")
    threshold = SPARSE_THRESHOLDS.get(task) if args.sparse_threshold is None else args.sparse_threshold
    if training and not args.dense and threshold is not None:
        env.reset()
        if "x_position" not in env.step(env.action_space.sample())[4]:
            raise InputError(f"--sparse-threshold: {args.env_id} does not tell its x_position")
        env = SparseReward(env, threshold)
    return env


# BUFFERS


class ReplayBuffer:
    """D: a ring of transitions; a row is (s, a, r, s', terminated) in float32."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)
        size = 4 * capacity * sum(self.widths)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > (torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory):
            raise InputError(f"--buffer-size {capacity} takes {size / 1e9:.1f} GB, more than there is memory")
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.added = 0

    def add(self, obs, action, reward, next_obs, terminated):
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1

    def sample(self, batch_size: int):
        """obs (N, |S|), action (N, |A|), reward (N, 1), next_obs (N, |S|), terminated (N, 1)"""
        filled = min(self.added, len(self.rows))
        index = torch.randint(filled, (batch_size,), device=self.rows.device)
        return self.rows[index].split(self.widths, dim=1)


# ALGO LOGIC: networks

FIXED_ALPHA = ("Hopper", "HalfCheetah", "Point2D")  # tasks in which the temperature is not tuned


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    hidden = 256
    layers = nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


def xavier(network: nn.Sequential) -> nn.Sequential:
    """Xavier-uniform weights and zero biases, as in the SAC of pranz24 that the paper builds on."""
    for layer in network[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return network


class Actor(nn.Module):
    """phi: a Gaussian policy, squashed by tanh into the action box.

    Maps obs (..., |S|) and standard normal noise (..., |A|) to an action and its log-density (..., 1).
    """

    def __init__(self, obs_dim: int, action_space: gym.spaces.Box):
        super().__init__()
        self.net = xavier(mlp(obs_dim, 2 * action_space.shape[0]))
        low, high = (torch.tensor(b, dtype=torch.float32) for b in (action_space.low, action_space.high))
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)

    def gaussian(self, obs):
        """mean and log std, before the tanh"""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def log_density(self, u, mean, log_std):
        """log pi of the action tanh(u): the Gaussian's density, and the Jacobian of squashing and scaling"""
        gaussian = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2) without cancellation
        return (gaussian - log_slope - self.action_scale.log()).sum(-1, keepdim=True)

    def squash(self, u):
        return torch.tanh(u) * self.action_scale + self.action_bias

    def forward(self, obs, noise):
        mean, log_std = self.gaussian(obs)
        u = mean + log_std.exp() * noise
        return self.squash(u), self.log_density(u, mean, log_std)


class Critic(nn.Module):
    """theta: twin action values Q1, Q2: (N, |S|), (N, |A|) -> (N, 1), (N, 1)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net1 = xavier(mlp(obs_dim + action_dim, 1))
        self.net2 = xavier(mlp(obs_dim + action_dim, 1))

    def forward(self, obs, action):
        x = torch.cat([obs, action], 1)
        return self.net1(x), self.net2(x)


# ALGO LOGIC: losses and gradients, in the paper's order


def critic_loss(critic, target_critic, actor, batch, gamma, alpha):
    """Eq. (5) with SAC's target, the smaller soft value of a fresh action. Also returns Q1, Q2."""
    obs, action, reward, next_obs, terminated = batch
    with torch.no_grad():
        next_action, next_log_prob = actor(next_obs, torch.randn_like(action))
        next_value = soft_value(target_critic, next_obs, next_action, next_log_prob, alpha)
        target = reward + (1 - terminated) * gamma * next_value
    q1, q2 = critic(obs, action)
    return F.mse_loss(q1, target) + F.mse_loss(q2, target), q1, q2


def soft_value(critic, obs, action, log_prob, alpha):
    """min(Q1, Q2)(s, a) - alpha log pi(a|s)"""
    return torch.min(*critic(obs, action)) - alpha * log_prob


def rl_loss(actor, critic, obs, noise, alpha):
    """Eq. (2) for SAC: L_RL(phi) = mean [alpha log pi(a|s) - min(Q1, Q2)(s, a)], a ~ phi. Also log pi."""
    action, log_prob = actor(obs, noise)
    return -soft_value(critic, obs, action, log_prob, alpha).mean(), log_prob


def gradient(loss, params, **kwargs):
    """The gradient of `loss` for a dict of parameters, as a dict. No other parameter is touched."""
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()), **kwargs), strict=True))


def critic_gradients(critic, *inputs):
    """The critic's gradient, by parameter name; then what `critic_loss` returns for the inputs, detached."""
    values = critic_loss(critic, *inputs)
    grad = gradient(values[0], dict(critic.named_parameters()))
    return grad, *(value.detach() for value in values)


def actor_gradients(actor, critic, obs, noise, alpha):
    """The gradient of Eq. (2) for phi, as a dict by parameter name, log pi, and values to log."""
    loss, log_prob = rl_loss(actor, critic, obs, noise, alpha)
    log = {"losses/actor_loss": loss.detach()}
    return gradient(loss, dict(actor.named_parameters())), log_prob.detach(), log


def step(optimizer, module, grad):
    """One step of the optimizer along a gradient given by parameter name."""
    for name, parameter in module.named_parameters():
        parameter.grad = grad[name]
    optimizer.step()


def can_compile() -> bool:
    """Sets torch.compile up for the functions above, and tries it."""
    try:
        torch._dynamo.config.trace_autograd_ops = True  # the gradients are part of the functions
        torch._inductor.config.fallback_random = True  # the random numbers are those of the eager path
        torch.compile(torch.sin)(torch.ones(2))
    except Exception as error:  # no compiler, one that does not work, an older PyTorch
        print(f"--compile: going on without it: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def cuda_graphs(learn, warm_up=3):
    """`learn`, its kernels captured once for each kind of call, after `warm_up` plain ones, and replayed."""
    calls, graphs, side = Counter(), {}, torch.cuda.Stream()

    def replay(*batches, **flags):
        kind = (len(batches), *flags.values())
        calls[kind] += 1
        if calls[kind] <= warm_up:  # real iterations, off the default stream as capturing wants it
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                log = learn(*batches, **flags)
            torch.cuda.current_stream().wait_stream(side)
            return log
        if kind not in graphs:
            inputs = [[tensor.clone() for tensor in batch] for batch in batches]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, and runs nothing
                log = learn(*inputs, **flags)
            graphs[kind] = graph, inputs, log
        graph, inputs, log = graphs[kind]
        for old, new in zip(inputs, batches, strict=True):
            torch._foreach_copy_(old, list(new))
        graph.replay()
        return log

    return replay


# EVALUATION


def act(actor, obs, explore=False):
    """The deterministic policy, or a sample of it, NumPy to NumPy: (..., |S|) -> (..., |A|)."""
    with torch.no_grad():
        obs = torch.as_tensor(obs, dtype=torch.float32, device=actor.action_scale.device)
        mean, log_std = actor.gaussian(obs)
        noise = torch.randn_like(mean) if explore else 0
        return actor.squash(mean + log_std.exp() * noise).numpy(force=True)


def evaluate(actor, envs: gym.vector.VectorEnv, seed: int) -> np.ndarray:
    """The undiscounted return of one episode in each of the E environments, (E,)."""
    obs, _ = envs.reset(seed=seed)
    returns, running = np.zeros(envs.num_envs), np.full(envs.num_envs, True)
    while running.any():
        obs, reward, terminated, truncated, _ = envs.step(act(actor, obs))
        returns += reward * running
        running &= ~(terminated | truncated)
    return returns


# RUNS: arguments and files, and checkpoints from which a run goes on as if it had not stopped, to the bit

LOGGING = ["resume", "track", "wandb_project_name", "wandb_entity", "capture_video"]
LOGGING += ["save_model", "keep_policies"]
signals = []  # SIGTERM or SIGINT, when one has come


def parse(**kwargs) -> Args:
    """tyro.cli, with what it prints on a mistake in one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Args, **kwargs)
    except SystemExit as end:
        raise (InputError(re.sub(r"[╭╮╰╯│─\s]+", " ", box.getvalue())) if end.code else end) from None


def command_line() -> tuple[Args, int]:
    """The arguments, and the last step. With --resume they are the run's own; only the last step can rise."""
    args = parse()
    for name, value in vars(args).items():
        least = 1 if type(value) is int and name not in ("seed", "learning_starts") else 0
        most = 1 if name in ("gamma", "tau", "ws_frac") else 1e12
        if type(value) in (int, float) and not least <= value <= most:
            raise InputError(f"--{name.replace('_', '-')} is {value}: it must be from {least} to {most}")
    if args.batch_size > args.learning_starts:
        raise InputError(f"--batch-size {args.batch_size} exceeds --learning-starts {args.learning_starts}")
    if args.resume is None:
        return args, args.total_timesteps
    try:
        run = Args(**json.loads((args.resume / "args.json").read_text())["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"no run of this script in {args.resume}: {error}") from None
    args = parse(default=run)
    free = LOGGING + ["total_timesteps"] * (args.total_timesteps > run.total_timesteps)
    pairs = zip(vars(run).items(), vars(args).values(), strict=True)
    if changed := [f"{name} {old} -> {new}" for (name, old), new in pairs if name not in free and old != new]:
        raise InputError(f"{args.resume} was begun with other arguments: {', '.join(changed)}")
    return replace(args, total_timesteps=run.total_timesteps), args.total_timesteps


def make_run_dir(args: Args) -> Path:
    """A new runs/<task>__<experiment>__<seed>__<time>, with args.json and the head of evaluations.csv."""
    env_id = args.env_id.replace(":", "-").replace("/", "-")
    run_dir = Path("runs", f"{env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    while run_dir.exists():  # begun in the same second
        run_dir = run_dir.with_name(run_dir.name + "x")
    run_dir.mkdir(parents=True)
    versions = {package.__name__: package.__version__ for package in (torch, gym, mujoco, np)}
    (run_dir / "args.json").write_text(json.dumps({"args": asdict(args), "versions": versions}, indent=2))
    (run_dir / "evaluations.csv").write_text("global_step,return_mean,return_std\n")
    return run_dir


def save(path: Path, data):
    """torch.save, atomically: whatever happens, `path` is the old file or the new one."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch raises its own on top of the file system's
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.__context__ or error}") from None


def save_checkpoint(run_dir: Path, global_step: int, learners: dict, generators: list, buffer: ReplayBuffer):
    """Writes all that a run consists of between two episodes, when the simulator needs no state."""
    state = {name: (run_dir / name).read_text() for name in ("args.json", "evaluations.csv")}
    state |= {"global_step": global_step, "added": buffer.added}
    state["learners"] = {name: learner.state_dict() for name, learner in learners.items()}
    state["generators"] = [generator.bit_generator.state for generator in generators]
    state["torch"] = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    rows = buffer.rows[: buffer.added]  # of a mere view, torch.save would write the whole buffer
    state["rows"] = rows.new_empty(0).set_(rows.untyped_storage()[: rows.nbytes], 0, rows.shape)
    save(run_dir / "checkpoint.pt", state)


def load_checkpoint(run_dir: Path, learners: dict, generators: list, buffer: ReplayBuffer) -> int:
    """Puts back what `save_checkpoint` wrote, and drops later evaluations. Returns the step."""
    path = run_dir / "checkpoint.pt"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["args.json"] != (run_dir / "args.json").read_text():
            raise ValueError("it is of a run with other arguments or versions")
        for name, learner in learners.items():
            learner.load_state_dict(state["learners"][name])
        for generator, generator_state in zip(generators, state["generators"], strict=True):
            generator.bit_generator.state = generator_state
        torch.set_rng_state(state["torch"][0])
        torch.cuda.set_rng_state_all(state["torch"][1:])
        buffer.rows[: len(state["rows"])], buffer.added = state["rows"], state["added"]
        (run_dir / "evaluations.tmp").write_text(state["evaluations.csv"])
        os.replace(run_dir / "evaluations.tmp", run_dir / "evaluations.csv")
        return state["global_step"]
    except Exception as error:  # a missing, truncated or foreign file fails in a dozen ways
        raise InputError(f"{path} is no checkpoint to go on from: {str(error).splitlines()[0]}") from None


def stop_after_episode(number, frame):
    """Handles a signal: the run ends with its episode and leaves a checkpoint. A second one ends it now."""
    signals.append(number)
    signal.signal(number, signal.SIG_DFL)
    print("stopping when the episode ends; once more stops at once", file=sys.stderr)


def train(args: Args, last_step: int | None = None) -> Path:
    """One run, or with args.resume the rest of it. Returns its folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    cudagraphs = args.cudagraphs and device.type == "cuda"
    if args.cudagraphs > cudagraphs:
        print("--cudagraphs: going on without it: no GPU is used", file=sys.stderr)
    torch.set_num_threads(args.torch_threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill the whole replay buffer

    env = make_env(args, training=True, render_mode="rgb_array" if args.capture_video else None)
    eval_envs = gym.vector.SyncVectorEnv([lambda: make_env(args, training=False)] * args.eval_episodes)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    autotune = task_name(args.env_id) not in FIXED_ALPHA if args.autotune is None else args.autotune

    torch.manual_seed(args.seed)
    env.action_space.seed(args.seed)
    actor = Actor(obs_dim, env.action_space).to(device)
    critic = Critic(obs_dim, action_dim).to(device)
    target_critic = deepcopy(critic)
    adam = {"lr": args.learning_rate, "capturable": cudagraphs}
    actor_optimizer = torch.optim.Adam(actor.parameters(), **adam, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), **adam, fused=True)
    log_alpha = nn.Parameter(torch.tensor(args.alpha, device=device).log(), requires_grad=autotune)
    alpha_optimizer = torch.optim.Adam([log_alpha], **adam)
    learners = {"actor": actor, "actor_optimizer": actor_optimizer}
    learners |= {"critic": critic, "target_critic": target_critic, "critic_optimizer": critic_optimizer}
    learners |= {"log_alpha": nn.ParameterList([log_alpha]), "alpha_optimizer": alpha_optimizer}

    compiled = torch.compile if args.compile and can_compile() else lambda function: function
    update_critic, update_actor = compiled(critic_gradients), compiled(actor_gradients)

    def learn(batch):
        """One iteration. Returns what to log."""
        alpha = log_alpha.exp().detach()
        critic_grad, qf_loss, q1, q2 = update_critic(critic, target_critic, actor, batch, args.gamma, alpha)
        step(critic_optimizer, critic, critic_grad)
        log = {"losses/qf_loss": qf_loss / 2, "losses/qf1_values": q1, "losses/qf2_values": q2}

        noise = torch.randn_like(batch[1])
        phi_grad, log_prob, actor_log = update_actor(actor, critic, batch[0], noise, alpha)
        step(actor_optimizer, actor, phi_grad)
        if autotune:
            alpha_loss = -(log_alpha * (log_prob - action_dim)).mean()  # target entropy -|A|
            (log_alpha.grad,) = torch.autograd.grad(alpha_loss, log_alpha)
            alpha_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
        return log | actor_log | {"losses/alpha": alpha, "losses/log_prob": log_prob}

    if cudagraphs:
        learn = cuda_graphs(learn)

    run_dir = args.resume or make_run_dir(args)
    print(f"{run_dir} on {device}{', the only device' if args.cuda and device.type == 'cpu' else ''}")
    env = gym.wrappers.RecordEpisodeStatistics(env)
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(run_dir / "videos"))
    obs, _ = env.reset(seed=args.seed)
    first_step, ended = 1, False
    generators = [env.unwrapped.np_random, env.action_space.np_random]
    if args.resume:
        first_step, ended = load_checkpoint(run_dir, learners, generators, buffer) + 1, True
    if args.track:
        import wandb

        project = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_dir.name}
        wandb.init(**project, config=vars(args), sync_tensorboard=True, save_code=True)
    writer = SummaryWriter(run_dir, purge_step=first_step)

    last_step, checkpoint_step, start_time = last_step or args.total_timesteps, first_step - 1, time.time()
    last_good = f"go on from {run_dir}/checkpoint.pt, if there is one"
    progress = tqdm(total=last_step, initial=first_step - 1, unit=" steps", mininterval=1, disable=None)
    for global_step in range(first_step, last_step + 1):
        # ALGO LOGIC: act
        if ended:
            obs, _ = env.reset()
        if global_step <= args.learning_starts:
            action = env.action_space.sample()
        else:
            action = act(actor, obs, explore=True)
        if not np.isfinite(action).all():
            raise FloatingPointError(f"the action is not finite at step {global_step}; {last_good}")
        next_obs, reward, terminated, truncated, info = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)  # a time limit ends no task: only `terminated`
        obs, ended = next_obs, terminated or truncated
        if ended:
            writer.add_scalar("charts/episodic_return", info["episode"]["r"], global_step)
            writer.add_scalar("charts/episodic_length", info["episode"]["l"], global_step)

        # ALGO LOGIC: learn
        iteration = global_step - args.learning_starts
        if iteration > 0:
            batches = [buffer.sample(args.batch_size)]
            log = learn(*batches)
            if iteration % 100 == 0:
                for name, value in log.items():
                    writer.add_scalar(name, value.mean().item(), global_step)
                    if not value.isfinite().all():
                        raise FloatingPointError(f"{name} is not finite at step {global_step}; {last_good}")
                sps = (global_step - first_step + 1) / (time.time() - start_time)
                writer.add_scalar("charts/SPS", int(sps), global_step)

        if global_step % args.eval_frequency == 0 or global_step == last_step:
            returns = evaluate(actor, eval_envs, seed=args.seed + 100)  # the same start states each time
            with open(run_dir / "evaluations.csv", "a") as file:
                file.write(f"{global_step},{returns.mean()},{returns.std()}\n")
            writer.add_scalar("eval/return_mean", returns.mean(), global_step)
            writer.add_scalar("eval/return_std", returns.std(), global_step)
            progress.set_postfix({"return": f"{returns.mean():.1f}"})
            tqdm.write(f"step {global_step:>9,}   return {returns.mean():8.1f} ± {returns.std():.1f}")
            policy = {"actor": actor.state_dict(), "script": Path(__file__).stem, "global_step": global_step}
            policy |= {"env_id": args.env_id, "seed": args.seed}
            if args.save_model:
                save(run_dir / "policy.pt", policy)
            if args.keep_policies:
                save(run_dir / "policies" / f"{global_step}.pt", policy)

        if ended and (signals or global_step >= checkpoint_step + args.checkpoint_frequency):
            save_checkpoint(run_dir, global_step, learners, generators, buffer)
            checkpoint_step = global_step
            if signals:
                break
        progress.update()
    progress.close()
    env.close()
    eval_envs.close()
    writer.close()
    return run_dir


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_after_episode)
    try:
        run_dir = train(*command_line())
    except (InputError, FloatingPointError, gym.error.Error, ModuleNotFoundError, OSError) as error:
        print(f"{Path(__file__).name}: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    if signals:
        script = f"-m {__spec__.name}" if __spec__ else Path(__file__).name
        print(f"to go on: python {script} --resume {run_dir}")
        sys.exit(128 + signals[0])
