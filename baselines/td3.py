"""TD3: the vanilla algorithm that GILD is added to; Fujimoto, van Hoof, Meger, ICML 2018.

`diff baselines/td3.py gild_td3.py` shows GILD, and then its copy of baselines/common.py. With --dense this
trains an Expert on the task's own reward.

    Eq. (2)        L_RL, the vanilla actor's loss             rl_loss
    Eq. (5)        critic step, vanilla TD3's                 critic_loss

    python -m baselines.td3 --env-id Hopper-v4
"""

import random
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from baselines.common import (
    ReplayBuffer,
    check,
    evaluate,
    main,
    make_env,
    received_signals,
    save_checkpoint,
    save_evaluation,
    start_run,
)


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
    learning_rate: float = 3e-4  # learning rate of actor and critic
    buffer_size: int = 1_000_000  # capacity of the replay buffer D, in transitions
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak averaging rate of the target networks
    batch_size: int = 256  # N: transitions per update
    learning_starts: int = 10_000  # steps with random actions before the first update
    critic_norm: bool = False  # LayerNorm before each ReLU of the critic
    policy_noise: float = 0.2  # std of the noise on target actions (actions are in [-1, 1])
    noise_clip: float = 0.5  # bound on the noise on target actions
    policy_frequency: int = 2  # critic updates per update of actor and targets
    exploration_noise: float = 0.1  # std of the exploration noise

    def __post_init__(self):
        check(self)


# ALGO LOGIC: networks


def mlp(inputs: int, outputs: int, hidden: int = 256, norm: bool = False) -> nn.Sequential:
    layers = []
    for width in (inputs, hidden):
        layer_norm = [nn.LayerNorm(hidden)] if norm else []
        layers += [nn.Linear(width, hidden), *layer_norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class Actor(nn.Module):
    """phi: (N, |S|) -> (N, |A|), in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, action_dim)

    def forward(self, obs):
        return torch.tanh(self.net(obs))


class Critic(nn.Module):
    """theta: twin action values Q1, Q2: (N, |S|), (N, |A|) -> (N, 1), (N, 1)."""

    def __init__(self, obs_dim: int, action_dim: int, norm: bool = False):
        super().__init__()
        self.net1 = mlp(obs_dim + action_dim, 1, norm=norm)
        self.net2 = mlp(obs_dim + action_dim, 1, norm=norm)

    def forward(self, obs, action):
        x = torch.cat([obs, action], 1)
        return self.net1(x), self.net2(x)

    def q1(self, obs, action):
        return self.net1(torch.cat([obs, action], 1))


# ALGO LOGIC: losses and gradients, in the paper's order


def critic_loss(critic, target_critic, target_actor, batch, args):
    """Eq. (5) with TD3's tricks: noise on the target action, the smaller target. Also returns Q1, Q2."""
    obs, action, reward, next_obs, terminated = batch
    with torch.no_grad():
        noise = (torch.randn_like(action) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_action = (target_actor(next_obs) + noise).clamp(-1, 1)
        next_q = torch.min(*target_critic(next_obs, next_action))
        target = reward + (1 - terminated) * args.gamma * next_q
    q1, q2 = critic(obs, action)
    return F.mse_loss(q1, target) + F.mse_loss(q2, target), q1, q2


def rl_loss(actor, critic, obs):
    """Eq. (2): L_RL(phi) = -mean Q(s, phi(s))."""
    return -critic.q1(obs, actor(obs)).mean()


def gradient(loss, params, **kwargs):
    """The gradient of `loss` w.r.t. a dict of parameters, as a dict. Leaves every .grad alone."""
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()), **kwargs), strict=True))


def critic_gradient(critic, target_critic, target_actor, batch, args):
    """The gradient of Eq. (5) w.r.t. theta, as a dict by parameter name, and values to log."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=args.bf16):
        loss, q1, q2 = critic_loss(critic, target_critic, target_actor, batch, args)
    log = {"losses/qf_loss": loss / 2, "losses/qf1_values": q1, "losses/qf2_values": q2}
    return gradient(loss, dict(critic.named_parameters())), {k: value.detach() for k, value in log.items()}


def actor_gradient(actor, critic, obs):
    """The gradient of Eq. (2) w.r.t. phi, as a dict by parameter name, and values to log."""
    loss = rl_loss(actor, critic, obs)
    return gradient(loss, dict(actor.named_parameters())), {"losses/actor_loss": loss.detach()}


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


@torch.no_grad()
def act(actor, obs):
    """The deterministic policy, NumPy to NumPy: (..., |S|) -> (..., |A|)."""
    device = next(actor.parameters()).device
    return actor(torch.as_tensor(obs, dtype=torch.float32, device=device)).numpy(force=True)


def train(args: Args) -> Path:
    """Runs the training, or with args.resume the rest of it. Returns the run's folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    env = gym.wrappers.RecordEpisodeStatistics(make_env(args, training=True), stats_key="run")
    eval_env = make_env(args, training=False)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]

    rng = np.random.default_rng(args.seed + 1_000)  # not the task's seed: actions could equal its noise
    env.action_space.seed(args.seed + 2_000)
    obs, _ = env.reset(seed=args.seed)
    generators = [env.unwrapped.np_random, env.action_space.np_random, rng]
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    actor = Actor(obs_dim, action_dim).to(device)
    critic = Critic(obs_dim, action_dim, args.critic_norm).to(device)
    target_actor, target_critic = deepcopy(actor), deepcopy(critic)
    actor_optimizer = torch.optim.Adam(actor.parameters(), args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.learning_rate, fused=True)
    parts = {"actor": actor, "target_actor": target_actor, "actor_optimizer": actor_optimizer}
    parts |= {"critic": critic, "target_critic": target_critic, "critic_optimizer": critic_optimizer}
    parts["buffer"] = buffer

    run_dir, writer, last_step, evaluations = start_run(args, parts, generators)

    update_critic, update_actor = critic_gradient, actor_gradient
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # compile the gradients with the losses
        torch._inductor.config.fallback_random = True  # the random numbers of a run without --compile
        update_critic, update_actor = map(torch.compile, (update_critic, update_actor))

    ended = last_step > 0  # a resumed run starts a new episode
    last_checkpoint, start_time, actor_log = last_step, time.time(), {}
    for global_step in tqdm(range(last_step + 1, args.total_timesteps + 1), unit=" steps", disable=None):
        # ALGO LOGIC: act
        if ended:
            obs, _ = env.reset()
        if global_step <= args.learning_starts:
            action = env.action_space.sample()
        else:
            noise = rng.normal(0, args.exploration_noise, action_dim)
            action = (act(actor, obs) + noise).clip(-1, 1).astype(np.float32)
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
            critic_grad, critic_log = update_critic(critic, target_critic, target_actor, batch, args)
            step(critic_optimizer, critic, critic_grad)

            if iteration % args.policy_frequency == 0:
                phi_grad, actor_log = update_actor(actor, critic, batch[0])
                step(actor_optimizer, actor, phi_grad)
                update_target(target_critic, critic, args.tau)
                update_target(target_actor, actor, args.tau)

            if iteration % 100 == 0:
                for name, value in (critic_log | actor_log).items():
                    writer.add_scalar(name, value.mean().item(), global_step)
                sps = (global_step - last_step) / (time.time() - start_time)
                writer.add_scalar("charts/SPS", int(sps), global_step)

        if global_step % args.eval_frequency == 0 or global_step == args.total_timesteps:
            returns = evaluate(act, actor, eval_env, args.eval_episodes, seed=args.seed + 100)
            policy = {"actor": actor.state_dict(), "script": f"baselines.{Path(__file__).stem}"}
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


if __name__ == "__main__":
    main(train, Args)
