"""GILD on SAC: reinforcement learning from sparse rewards with a meta-learned imitation objective.

Deng, Zheng, He, Weng, Shao: "Enhancing Online Reinforcement Learning with Meta-Learned Objective from
Offline Data", AAAI 2025. Imitating sub-optimal demonstrations finds the first rewards, but later holds the
policy back. GILD replaces the imitation loss with a small network f_omega(s_d, a_d, a) and trains it so that
an actor step on RL + GILD raises the critic's value more than one on RL + imitation.

Departures (see README.md): f is first fitted to the imitation error, omega's Adam has a large epsilon, w_rl
takes Q at phi(s), Eq. (8)'s sign is corrected. Additions, off by default: --clone-steps and --critic-norm.

    Eq. (2)        L_RL, the vanilla actor's loss             rl_loss
    Eq. (3)        L_IL, conventional imitation, and w_rl     il_loss, rl_weight
    Eq. (5)        critic step, vanilla SAC's                 critic_loss
    Eq. (6)        pseudo-update with RL+IL                   gild_gradients
    Eq. (7)        actor step with RL+GILD                    gild_gradients, GILD
    Eq. (8)        meta-loss                                  meta_loss
    Eq. (9), (10)  its gradient for omega                     gild_gradients
    Eq. (11)       step on omega                              train

    python gild_sac.py --env-id Hopper-v4 --ws-frac 0.01
"""
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11", "gymnasium[mujoco]>=1.1", "mujoco>=3.1", "numpy>=1.26", "tensorboard>=2.16", "tqdm>=4.66",
#   "tyro>=0.9",
# ]
# ///

import json
import math
import os
import random
import shlex
import signal
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import gymnasium as gym
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
    exp_name: str = Path(__file__).stem  # name of this experiment
    seed: int = 1  # seed of networks, environment, exploration and replay
    cuda: bool = True  # run on the GPU if there is one
    torch_threads: int = 1  # CPU threads of PyTorch
    compile: bool = False  # torch.compile the updates; slow to start, needs PyTorch >= 2.11, a C++ compiler
    bf16: bool = False  # autocast the critic's loss to bfloat16; slower on a CPU without bf16 instructions
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "gild"  # project in Weights & Biases
    keep_policies: bool = False  # keep the actor of every evaluation, runs/<run>/policies/<step>.pt
    checkpoint_frequency: int = 50_000  # environment steps between checkpoints, runs/<run>/checkpoint.pt
    resume: str | None = None  # resume the run in this folder, runs/<run>
    eval_frequency: int = 5_000  # environment steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation

    env_id: str = "Hopper-v4"  # Gymnasium id with Box observations and actions, or Point2D-v0 (in envs/)
    dense: bool = False  # train on the dense reward; else the paper's five tasks are sparse
    sparse_threshold: float | None = None  # reward only so many metres ahead of the start; None: the paper's
    total_timesteps: int = 1_000_000  # environment steps of the run
    learning_rate: float = 3e-4  # learning rate of actor, critic, temperature and look-ahead (paper's alpha)
    buffer_size: int = 1_000_000  # capacity of the replay buffer D, in transitions
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak averaging rate of the target networks
    batch_size: int = 256  # N: transitions, and demonstrations, per update
    learning_starts: int = 10_000  # steps with random actions before the first update
    critic_norm: bool = False  # LayerNorm before each ReLU of the critic
    alpha: float = 0.2  # temperature of the entropy term; its initial value if autotuned (0 stays 0)
    autotune: bool | None = None  # tune alpha to entropy -|A|; None: not on Hopper, HalfCheetah, Point2D

    demo_path: str | None = None  # demonstrations D_dem, .npz; None: those in demos/ for task and algorithm
    clone_steps: int = 0  # behaviour cloning updates before the first step; the clone replaces random actions
    il_beta: float = 2.5  # w_rl = il_beta / mean |Q|, the weight of RL against imitation in RL+IL
    ws_frac: float = 0.01  # GILD in the first ws_frac * total_timesteps critic updates; 1: to the end
    gild_lr: float = 1e-4  # learning rate of omega
    gild_eps: float = 1e-3  # Adam's epsilon for omega, large so that small meta-gradients make small steps
    gild_weight_decay: float = 0.0  # L2 penalty on omega; the released 1e-4 with eps 1e-8 makes f collapse
    gild_init: Literal["imitation", "random"] = "imitation"  # f's start: fitted to the imitation error or not
    meta_loss: Literal["gain", "intuitive"] = "gain"  # Eq. (8), or Table 2's ablation: -Q after the GILD step

    def __post_init__(self):
        check(self)


# ALGO LOGIC: networks


def mlp(inputs: int, outputs: int, hidden: int = 256, norm: bool = False) -> nn.Sequential:
    layers = []
    for width in (inputs, hidden):
        layer_norm = [nn.LayerNorm(hidden)] if norm else []
        layers += [nn.Linear(width, hidden), *layer_norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


def xavier(network: nn.Sequential) -> nn.Sequential:
    """Xavier-uniform weights and zero biases, as in pranz24's SAC, which the paper builds on."""
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


class Actor(nn.Module):
    """phi: (N, |S|), standard normal noise (N, |A|) -> action (N, |A|), in [-1, 1], and log pi (N, 1)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = xavier(mlp(obs_dim, 2 * action_dim))

    def gaussian(self, obs):
        """Mean and log std of the Gaussian that tanh squashes."""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def log_density(self, u, mean, log_std):
        """log pi of the action tanh(u): the Gaussian's log-density at u minus the log-slope of tanh."""
        gaussian = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2) without cancellation
        return (gaussian - log_slope).sum(-1, keepdim=True)

    def forward(self, obs, noise):
        mean, log_std = self.gaussian(obs)
        u = mean + log_std.exp() * noise
        return torch.tanh(u), self.log_density(u, mean, log_std)


class Critic(nn.Module):
    """theta: twin action values Q1, Q2: (N, |S|), (N, |A|) -> (N, 1), (N, 1)."""

    def __init__(self, obs_dim: int, action_dim: int, norm: bool = False):
        super().__init__()
        self.net1 = xavier(mlp(obs_dim + action_dim, 1, norm=norm))
        self.net2 = xavier(mlp(obs_dim + action_dim, 1, norm=norm))

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


def critic_loss(critic, target_critic, actor, batch, alpha, args):
    """Eq. (5) with SAC's target: the smaller Q of a sampled action, plus entropy. Also returns Q1, Q2."""
    obs, action, reward, next_obs, terminated = batch
    with torch.no_grad():
        next_action, next_log_prob = actor(next_obs, torch.randn_like(action))
        next_q = torch.min(*target_critic(next_obs, next_action))
        target = reward + (1 - terminated) * args.gamma * (next_q - alpha * next_log_prob)
    q1, q2 = critic(obs, action)
    return F.mse_loss(q1, target) + F.mse_loss(q2, target), q1, q2


def rl_loss(actor, critic, obs, noise, alpha):
    """Eq. (2): L_RL(phi) = mean [alpha log pi(a|s) - min(Q1, Q2)(s, a)]. Also returns log pi and Q."""
    action, log_prob = actor(obs, noise)
    q = torch.min(*critic(obs, action))
    return (alpha * log_prob - q).mean(), log_prob, q


def il_loss(actor, demo_obs, demo_action):
    """Eq. (3): L_IL(phi) = -mean log pi(a_d|s_d). Also returns the mean action's squared error."""
    mean, log_std = actor.gaussian(demo_obs)
    u = torch.atanh(demo_action.clamp(-1 + 1e-6, 1 - 1e-6))  # u would be infinite on the boundary
    return -actor.log_density(u, mean, log_std).mean(), F.mse_loss(torch.tanh(mean), demo_action)


def rl_weight(q, il_beta):
    """w_rl of Eqs. (3) and (6): beta / mean |Q|, with a floor, as sparse rewards can leave Q near 0 for long.

    The paper has Q(s, a); this Q is at the actor's own actions, as in TD3+BC. `rl_loss` has computed it.
    """
    return il_beta / q.detach().abs().mean().clamp(min=1e-6)


def meta_loss(look_ahead, pseudo, actor, critic, val_obs, noise, alpha, kind):
    """Eq. (8): -mean tanh(Q(s, phi'(s)) - Q(s, phi_hat(s))), the negated gain of a GILD step over an IL step.

    The paper prints the opposite sign; minimised, that would make GILD worse than imitation.
    Q is the soft value of an action that both actors sample with the same noise.
    """
    action, log_prob = functional_call(actor, look_ahead, (val_obs, noise))
    q = torch.min(*critic(val_obs, action)) - alpha * log_prob
    if kind == "intuitive":
        return -q.mean()
    with torch.no_grad():
        action, log_prob = functional_call(actor, pseudo, (val_obs, noise))
        pseudo_q = torch.min(*critic(val_obs, action)) - alpha * log_prob
    return -torch.tanh(q - pseudo_q).mean()


def gradient(loss, params, **kwargs):
    """The gradient of `loss` w.r.t. a dict of parameters, as a dict. Leaves every .grad alone."""
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()), **kwargs), strict=True))


def critic_gradient(critic, target_critic, actor, batch, alpha, args):
    """The gradient of Eq. (5) w.r.t. theta, as a dict by parameter name, and values to log."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=args.bf16):
        loss, q1, q2 = critic_loss(critic, target_critic, actor, batch, alpha, args)
    log = {"losses/qf_loss": loss / 2, "losses/qf1_values": q1, "losses/qf2_values": q2}
    return gradient(loss, dict(critic.named_parameters())), {k: value.detach() for k, value in log.items()}


def actor_gradient(actor, critic, obs, noise, alpha):
    """The gradient of Eq. (2) w.r.t. phi, as a dict by parameter name, log pi, and values to log."""
    loss, log_prob, _ = rl_loss(actor, critic, obs, noise, alpha)
    log = {"losses/actor_loss": loss.detach()}
    return gradient(loss, dict(actor.named_parameters())), log_prob.detach(), log


def gild_gradients(actor, critic, gild, obs, demo, val_obs, noise, alpha, args):
    """Lines 6 to 9 of Algorithm 1, in float32; changes no parameter. `demo` is (s_d, a_d).

    `noise` is standard normal, (3, N, |A|), for the actions at s, s_d and s_val. Returns the gradients for
    phi (Eq. 7) and omega (Eq. 10), as dicts by parameter name, log pi at s, and values to log.
    """
    phi, omega, lr = dict(actor.named_parameters()), dict(gild.named_parameters()), args.learning_rate
    demo_obs, demo_action = demo
    rl_noise, demo_noise, val_noise = noise
    actor_loss, rl_log_prob, q = rl_loss(actor, critic, obs, rl_noise, alpha)
    rl_grad = gradient(actor_loss, phi)
    action, _ = actor(demo_obs, demo_noise)

    # Eq. (6): the pseudo-update phi_hat, where one step with plain imitation would lead
    imitation_loss, distance = il_loss(actor, demo_obs, demo_action)
    w_rl = rl_weight(q, args.il_beta)
    il_grad = gradient(imitation_loss, phi)
    pseudo = {k: phi[k].detach() - lr * (w_rl * rl_grad[k] + il_grad[k]) for k in phi}

    # Eq. (7): the actor's gradient with GILD. The look-ahead phi', a function of omega, is a plain step along
    # it; the actor takes an Adam step
    gild_loss = gild(demo_obs, demo_action, action).mean()
    (action_grad,) = torch.autograd.grad(gild_loss, action, create_graph=True)  # separately, to log it
    gild_grad = gradient(action, phi, grad_outputs=action_grad, create_graph=True)
    look_ahead = {k: phi[k].detach() - lr * (rl_grad[k] + gild_grad[k]) for k in phi}

    # Eqs. (8) to (10): autograd computes dL_meta/dphi' and then -lr d^2 L_GILD / dphi domega; omega enters
    # only through the gradient of L_GILD, so neither the critic nor L_RL is differentiated twice
    loss = meta_loss(look_ahead, pseudo, actor, critic, val_obs, val_noise, alpha, args.meta_loss)
    omega_grad = gradient(loss, omega)

    phi_grad = {k: rl_grad[k] + gild_grad[k].detach() for k in phi}
    log = {
        "losses/actor_loss": actor_loss,
        "losses/gild_loss": gild_loss,
        "losses/meta_loss": loss,
        "losses/gild_action_grad_norm": len(action) * action_grad.norm(dim=1).mean(),  # undoes the mean's 1/N
        "losses/meta_grad_norm": torch.stack([g.norm() for g in omega_grad.values()]).norm(),
        "charts/imitation_distance": distance,
    }
    return phi_grad, omega_grad, rl_log_prob.detach(), {name: value.detach() for name, value in log.items()}


def step(optimizer, module, grad):
    """One step of the optimizer along a gradient given by parameter name."""
    for name, parameter in module.named_parameters():
        parameter.grad = grad[name]
    optimizer.step()


@torch.no_grad()
def update_target(target, online, tau):
    """Polyak averaging: target <- (1 - tau) target + tau online."""
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.lerp_(new, tau)


def fit_imitation(gild, demonstrations, iterations=2_000, batch_size=256):
    """Fits f(s_d, a_d, a) to mean_j (a_j - a_d,j)^2, by regression. Returns the error of the last batch.

    Half of the actions are uniform over the box, half near a_d, where imitation needs the slope. A random f
    does not imitate, and cannot learn to until the critic has seen rewards: the meta-gradient is tiny before.
    The weights of s_d stay at 0 here: the error does not depend on s_d, and large observations spoil the fit.
    """
    gild.net[0].weight.data[:, : demonstrations.obs.shape[1]] = 0
    optimizer = torch.optim.Adam(gild.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        demo_obs, demo_action = demonstrations.sample(batch_size)
        anywhere = 2 * torch.rand_like(demo_action) - 1
        close = (demo_action + 0.2 * torch.randn_like(demo_action)).clamp(-1, 1)
        action = torch.where(torch.rand_like(demo_action[:, :1]) < 0.5, anywhere, close)
        error = (action - demo_action).pow(2).mean(1, keepdim=True)
        loss = F.mse_loss(gild(0 * demo_obs, demo_action, action), error)  # 0: no gradient for those weights
        step(optimizer, gild, gradient(loss, dict(gild.named_parameters())))
        schedule.step()
    return loss.item()


def clone(actor, demonstrations, args):
    """Behaviour cloning: minimises L_IL of Eq. (3) alone, before the first step."""
    optimizer = torch.optim.Adam(actor.parameters(), args.learning_rate, fused=True)
    for _ in tqdm(range(args.clone_steps), unit=" clone updates", disable=None):
        demo_obs, demo_action = demonstrations.sample(args.batch_size)
        loss, _ = il_loss(actor, demo_obs, demo_action)
        step(optimizer, actor, gradient(loss, dict(actor.named_parameters())))


@torch.no_grad()
def act(actor, obs, explore=False):
    """The deterministic policy, or a sample of it, NumPy to NumPy: (..., |S|) -> (..., |A|)."""
    device = next(actor.parameters()).device
    mean, log_std = actor.gaussian(torch.as_tensor(obs, dtype=torch.float32, device=device))
    noise = torch.randn_like(mean) if explore else 0
    return torch.tanh(mean + log_std.exp() * noise).numpy(force=True)


def train(args: Args) -> Path:
    """Runs the training, or with args.resume the rest of it. Returns the run's folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    env = gym.wrappers.RecordEpisodeStatistics(make_env(args, training=True), stats_key="run")
    eval_env = make_env(args, training=False)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    fixed = task_name(args.env_id) in ("Hopper", "HalfCheetah", "Point2D")
    autotune = not fixed if args.autotune is None else args.autotune
    gild_iterations = round(args.ws_frac * args.total_timesteps)
    if gild_iterations > 0 or args.clone_steps > 0:
        shipped = Path(__file__).parent / "demos" / f"{task_name(args.env_id)}-sac.npz"
        demonstrations = DemonstrationBuffer(args.demo_path or shipped, args.env_id, env, device)

    env.action_space.seed(args.seed + 1_000)  # not the task's seed: actions could equal its noise
    obs, _ = env.reset(seed=args.seed)
    generators = [env.unwrapped.np_random, env.action_space.np_random]
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    actor = Actor(obs_dim, action_dim).to(device)
    critic = Critic(obs_dim, action_dim, args.critic_norm).to(device)
    target_critic = deepcopy(critic)
    log_alpha = nn.Parameter(torch.tensor(args.alpha, device=device).log())
    actor_optimizer = torch.optim.Adam(actor.parameters(), args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.learning_rate, fused=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], args.learning_rate)
    parts = {"actor": actor, "actor_optimizer": actor_optimizer}
    parts |= {"critic": critic, "target_critic": target_critic, "critic_optimizer": critic_optimizer}
    parts |= {"log_alpha": nn.ParameterList([log_alpha]), "alpha_optimizer": alpha_optimizer}
    parts["buffer"] = buffer
    if gild_iterations > 0:
        gild = GILD(obs_dim, action_dim).to(device)
        adam = {"eps": args.gild_eps, "weight_decay": args.gild_weight_decay, "fused": True}
        gild_optimizer = torch.optim.Adam(gild.parameters(), args.gild_lr, **adam)
        parts |= {"gild": gild, "gild_optimizer": gild_optimizer}

    run_dir, writer, last_step, evaluations = start_run(args, parts, generators)
    if gild_iterations > 0 and args.gild_init == "imitation" and last_step == 0:
        writer.add_scalar("losses/gild_fit", fit_imitation(gild, demonstrations), 0)
    if args.clone_steps > 0 and last_step == 0:
        clone(actor, demonstrations, args)

    updates = critic_gradient, actor_gradient, gild_gradients
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # compile the gradients with the losses
        torch._inductor.config.fallback_random = True  # the random numbers of a run without --compile
        updates = map(torch.compile, updates)
    update_critic, update_actor, update_gild = updates

    ended = last_step > 0  # a resumed run starts a new episode
    last_checkpoint, start_time = last_step, time.time()
    for global_step in tqdm(range(last_step + 1, args.total_timesteps + 1), unit=" steps", disable=None):
        # ALGO LOGIC: act
        if ended:
            obs, _ = env.reset()
        if global_step <= args.learning_starts and args.clone_steps == 0:
            action = env.action_space.sample()
        else:
            action = act(actor, obs, explore=True)
        next_obs, reward, terminated, truncated, info = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)  # not `truncated`: bootstrap at the time limit
        obs, ended = next_obs, terminated or truncated
        if ended:
            writer.add_scalar("charts/episodic_return", info["run"]["r"], global_step)
            writer.add_scalar("charts/episodic_length", info["run"]["l"], global_step)

        # ALGO LOGIC: learn
        iteration = global_step - args.learning_starts
        if iteration > 0:
            batch = buffer.sample(args.batch_size)
            alpha = log_alpha.exp().detach()
            critic_grad, log = update_critic(critic, target_critic, actor, batch, alpha, args)
            step(critic_optimizer, critic, critic_grad)
            if iteration <= gild_iterations:  # the warm start
                demo = demonstrations.sample(args.batch_size)
                val_obs = buffer.sample(args.batch_size)[0]
                noise = torch.randn(3, *batch[1].shape, device=device)
                phi_grad, omega_grad, log_prob, actor_log = update_gild(
                    actor, critic, gild, batch[0], demo, val_obs, noise, alpha, args
                )
                step(gild_optimizer, gild, omega_grad)  # Eq. (11)
            else:
                noise = torch.randn_like(batch[1])
                phi_grad, log_prob, actor_log = update_actor(actor, critic, batch[0], noise, alpha)
            step(actor_optimizer, actor, phi_grad)
            log |= actor_log | {"losses/alpha": alpha, "losses/log_prob": log_prob}
            if autotune:
                alpha_loss = -(log_alpha * (log_prob - action_dim)).mean()  # target entropy -|A|
                (log_alpha.grad,) = torch.autograd.grad(alpha_loss, log_alpha)
                alpha_optimizer.step()
            update_target(target_critic, critic, args.tau)

            if iteration % 100 == 0:
                for name, value in log.items():
                    writer.add_scalar(name, value.mean().item(), global_step)
                sps = (global_step - last_step) / (time.time() - start_time)
                writer.add_scalar("charts/SPS", int(sps), global_step)

        if global_step % args.eval_frequency == 0 or global_step == args.total_timesteps:
            returns = evaluate(act, actor, eval_env, args.eval_episodes, seed=args.seed + 100)
            policy = {"actor": actor.state_dict(), "script": Path(__file__).stem}
            save_evaluation(run_dir, writer, args, global_step, returns, evaluations, policy)
        if ended and (received_signals or global_step >= last_checkpoint + args.checkpoint_frequency):
            save_checkpoint(run_dir / "checkpoint.pt", parts, generators, global_step, evaluations)
            last_checkpoint = global_step
            if received_signals:
                break
    env.close()
    eval_env.close()
    writer.close()
    return run_dir


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


if __name__ == "__main__":
    main(train, Args)
