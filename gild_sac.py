# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4", "gymnasium[mujoco]>=1.1", "mujoco>=3.1", "numpy>=1.26", "tensorboard>=2.16", "tqdm>=4.66",
#   "tyro>=0.9",
# ]
# ///
"""GILD on SAC: reinforcement learning from sparse rewards with a meta-learned imitation objective.

Deng, Zheng, He, Weng, Shao: "Enhancing Online Reinforcement Learning with Meta-Learned Objective from
Offline Data", AAAI 2025. Imitating sub-optimal demonstrations finds the first rewards, but holds the policy
back later. GILD puts a small network f_omega(s_d, a_d, a) in the place of the imitation loss, and trains it
so that an actor step with it gains more value, by the critic's word, than a step with plain imitation would.

    Eq. (2)        L_RL, the vanilla actor's loss             rl_loss
    Eq. (3)        L_IL, conventional imitation, and w_rl     il_loss, rl_weight
    Eq. (5)        critic step, vanilla SAC's                 critic_loss
    Eq. (6)        pseudo-update with RL+IL                   gild_gradients
    Eq. (7)        actor step with RL+GILD                    gild_gradients, GILD
    Eq. (8)        meta-loss                                  meta_loss
    Eq. (9), (10)  its gradient for omega                     gild_gradients
    Eq. (11)       step on omega                              step, in the loop

    python gild_sac.py --env-id Hopper-v4 --ws-frac 0.01
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
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = "gild_sac"  # the name of this experiment
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
    learning_rate: float = 3e-4  # of actor, critic, temperature and look-ahead (the paper's alpha)
    buffer_size: int = 1_000_000  # transitions that the replay buffer D holds
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate at which the target networks follow
    batch_size: int = 256  # N: of transitions, and of demonstrations
    learning_starts: int = 10_000  # steps with random actions before the first update
    alpha: float = 0.2  # temperature of the entropy, or where its tuning starts
    autotune: bool | None = None  # tune it to the entropy -|A| [default: not in Hopper, HalfCheetah, Point2D]

    demo_path: str | None = None  # demonstrations D_dem, .npz [default: those shipped for task and algorithm]
    il_beta: float = 2.5  # beta in w_rl = beta / mean |Q|, the weight of RL in RL+IL
    ws_frac: float = 0.01  # warm start: GILD for the first ws_frac * total_timesteps iterations only
    gild_lr: float = 1e-4  # learning rate of omega
    gild_eps: float = 1e-3  # Adam's epsilon for omega: large, so that a small meta-gradient makes small steps
    gild_weight_decay: float = 0.0  # L2 of omega; at 1e-4, the released code's, the objective collapses
    gild_init: Literal["imitation", "random"] = "imitation"  # f starts as the squared imitation error
    meta_loss: Literal["gain", "intuitive"] = "gain"  # Eq. (8), or the value of the GILD step alone (Table 2)


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


class DemonstrationBuffer:
    """D_dem: the pairs (s_d, a_d) of a demonstration file. Raises InputError if they don't fit the task."""

    def __init__(self, path: Path, env_id: str, env: gym.Env, device: torch.device):
        try:
            with np.load(path, allow_pickle=False) as file:
                obs, actions = np.float32(file["observations"]), np.float32(file["actions"])
                task = task_name(json.loads(str(file["metadata"]))["env_id"])
        except Exception as error:  # a missing, damaged or foreign file fails in a dozen ways
            raise InputError(f"no demonstrations in {path} ({error!r}); --demo-path names a file") from None
        pairs = obs.shape[:1]
        shapes = [pairs + env.observation_space.shape, pairs + env.action_space.shape]
        low, high = env.action_space.low - 1e-6, env.action_space.high + 1e-6
        if task != task_name(env_id):
            raise InputError(f"{path} has demonstrations of {task}, not of {task_name(env_id)}")
        if pairs == (0,) or [obs.shape, actions.shape] != shapes:
            raise InputError(f"{path} has arrays of {obs.shape} and {actions.shape}, not of {shapes}")
        if not (np.isfinite(obs).all() and ((low <= actions) & (actions <= high)).all()):
            raise InputError(f"{path} has observations that are not finite or actions outside of the box")
        self.obs, self.actions = torch.from_numpy(obs).to(device), torch.from_numpy(actions).to(device)

    def sample(self, batch_size: int):
        """s_d (N, |S|), a_d (N, |A|)"""
        index = torch.randint(len(self.obs), (batch_size,), device=self.obs.device)
        return self.obs[index], self.actions[index]


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

    def unsquash(self, action):
        """u of an action, kept off the box's boundary, where it would be infinite"""
        return torch.atanh(((action - self.action_bias) / self.action_scale).clamp(-1 + 1e-6, 1 - 1e-6))

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


class GILD(nn.Module):
    """omega: the general imitation objective f(s_d, a_d, a) >= 0, (N, 1). Its mean is L_GILD of Eq. (7)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + 2 * action_dim, 1)

    def forward(self, demo_obs, demo_action, action):
        return F.softplus(self.net(torch.cat([demo_obs, demo_action, action], 1)))


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


def il_loss(actor, demo_obs, demo_action):
    """Eq. (3): L_IL(phi) = -mean log pi(a_d|s_d). Also the mean action's squared distance to a_d."""
    mean, log_std = actor.gaussian(demo_obs)
    distance = F.mse_loss(actor.squash(mean), demo_action)
    return -actor.log_density(actor.unsquash(demo_action), mean, log_std).mean(), distance


def rl_weight(q, il_beta):
    """Eq. (3): w_rl = beta / mean |Q(s, a)|. Sparse rewards may leave Q at 0 for long, hence the floor."""
    return il_beta / q.detach().abs().mean().clamp(min=1e-6)


def meta_loss(look_ahead, pseudo, actor, critic, val_obs, noise, alpha, kind):
    """Eq. (8): -mean tanh(Q(s, phi'(s)) - Q(s, phi_hat(s))), what a GILD step gains over an imitation step.

    Q is the soft value of an action that both actors make of the same noise. The sign is not the paper's:
    minimised as printed, the loss makes GILD worse than imitation.
    """
    action, log_prob = functional_call(actor, look_ahead, (val_obs, noise))
    q = soft_value(critic, val_obs, action, log_prob, alpha)
    if kind == "intuitive":
        return -q.mean()
    with torch.no_grad():
        action, log_prob = functional_call(actor, pseudo, (val_obs, noise))
        pseudo_q = soft_value(critic, val_obs, action, log_prob, alpha)
    return -torch.tanh(q - pseudo_q).mean()


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


def gild_gradients(actor, critic, gild, obs, demo, val_obs, noise, alpha, w_rl, lr, meta_kind):
    """Lines 6 to 9 of Algorithm 1, without changing a parameter; `demo` is (s_d, a_d).

    `noise` is the standard normal noise, (N, |A|) each, of the actions at s, s_d and s_val. Returns the
    gradients for phi (Eq. 7) and omega (Eq. 10), as dicts by parameter name, log pi at s, and values to log.
    """
    phi, omega = dict(actor.named_parameters()), dict(gild.named_parameters())
    demo_obs, demo_action = demo
    rl_noise, demo_noise, val_noise = noise
    actor_loss, rl_log_prob = rl_loss(actor, critic, obs, rl_noise, alpha)
    rl_grad = gradient(actor_loss, phi)
    action, _ = actor(demo_obs, demo_noise)

    # Eq. (6): the pseudo-update, where one step with plain imitation would lead
    imitation_loss, distance = il_loss(actor, demo_obs, demo_action)
    il_grad = gradient(imitation_loss, phi)
    pseudo = {k: phi[k].detach() - lr * (w_rl * rl_grad[k] + il_grad[k]) for k in phi}

    # Eq. (7): the actor's gradient with GILD, and the look-ahead along it, a function of omega
    gild_loss = gild(demo_obs, demo_action, action).mean()
    gild_grad = gradient(gild_loss, {"action": action, **phi}, create_graph=True)
    look_ahead = {k: phi[k].detach() - lr * (rl_grad[k] + gild_grad[k]) for k in phi}

    # Eq. (8) to (10): autograd walks dL_meta/dphi', then -lr d^2 L_GILD / dphi domega; as omega acts through
    # L_GILD's gradient alone, neither the critic nor L_RL is differentiated twice
    loss = meta_loss(look_ahead, pseudo, actor, critic, val_obs, val_noise, alpha, meta_kind)
    omega_grad = gradient(loss, omega)

    phi_grad = {k: rl_grad[k] + gild_grad[k].detach() for k in phi}
    log = {
        "losses/actor_loss": actor_loss,
        "losses/gild_loss": gild_loss,
        "losses/meta_loss": loss,
        "losses/gild_action_grad_norm": len(action) * gild_grad["action"].norm(dim=1).mean(),  # a pair's
        "losses/meta_grad_norm": torch.stack([g.norm() for g in omega_grad.values()]).norm(),
        "charts/imitation_distance": distance,
    }
    return phi_grad, omega_grad, rl_log_prob.detach(), {name: value.detach() for name, value in log.items()}


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


def fit_imitation(gild, demonstrations, action_space, iterations=2_000, batch_size=256):
    """Starts f(s_d, a_d, a) as mean_j (a_j - a_d,j)^2, by regression. Returns the error of the last batch.

    Half of the actions are drawn from the whole box and half close to a_d, where imitation needs the slope.
    A random f would stay a stranger to imitation: while the critic is silent, the meta-gradient is, too.
    f starts blind to s_d, on which this error does not depend: large observations would blur its slope.
    """
    gild.net[0].weight.data[:, : demonstrations.obs.shape[1]] = 0
    bounds = action_space.low, action_space.high
    low, high = (torch.as_tensor(bound).to(demonstrations.obs) for bound in bounds)
    optimizer = torch.optim.Adam(gild.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        demo_obs, demo_action = demonstrations.sample(batch_size)
        anywhere = low + (high - low) * torch.rand_like(demo_action)
        close = demo_action + 0.1 * (high - low) * torch.randn_like(demo_action)
        action = torch.where(torch.rand_like(demo_action[:, :1]) < 0.5, anywhere, close.clamp(low, high))
        error = (action - demo_action).pow(2).mean(1, keepdim=True)
        loss = F.mse_loss(gild(0 * demo_obs, demo_action, action), error)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


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
    gild_iterations = round(args.ws_frac * args.total_timesteps)
    if gild_iterations > 0:
        demo_path = args.demo_path or Path(__file__).parent / "demos" / f"{task_name(args.env_id)}-sac.npz"
        demonstrations = DemonstrationBuffer(demo_path, args.env_id, env, device)

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
    if gild_iterations > 0:
        gild = GILD(obs_dim, action_dim).to(device)
        adam |= {"lr": args.gild_lr, "eps": args.gild_eps, "weight_decay": args.gild_weight_decay}
        gild_optimizer = torch.optim.Adam(gild.parameters(), **adam, fused=True)
        learners |= {"gild": gild, "gild_optimizer": gild_optimizer}

    compiled = torch.compile if args.compile and can_compile() else lambda function: function
    update_critic, update_actor = compiled(critic_gradients), compiled(actor_gradients)
    update_gild = compiled(gild_gradients)

    def learn(batch, demo=None, val_batch=None):
        """One iteration. Returns what to log."""
        alpha = log_alpha.exp().detach()
        critic_grad, qf_loss, q1, q2 = update_critic(critic, target_critic, actor, batch, args.gamma, alpha)
        step(critic_optimizer, critic, critic_grad)
        log = {"losses/qf_loss": qf_loss / 2, "losses/qf1_values": q1, "losses/qf2_values": q2}

        noise = torch.randn_like(batch[1])
        if demo:  # the warm start
            noise = (noise, torch.randn_like(noise), torch.randn_like(noise))
            w_rl = rl_weight(q1, args.il_beta)
            lr, kind = args.learning_rate, args.meta_loss
            phi_grad, omega_grad, log_prob, actor_log = update_gild(
                actor, critic, gild, batch[0], demo, val_batch[0], noise, alpha, w_rl, lr, kind
            )
            step(gild_optimizer, gild, omega_grad)  # Eq. (11)
        else:
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
    if gild_iterations > 0 and args.gild_init == "imitation" and first_step == 1:
        writer.add_scalar("losses/gild_fit", fit_imitation(gild, demonstrations, env.action_space), 0)

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
            if iteration <= gild_iterations:  # the warm start
                batches += [demonstrations.sample(args.batch_size), buffer.sample(args.batch_size)]
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
