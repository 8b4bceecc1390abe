"""PPO: the on-policy baseline; Schulman, Wolski, Dhariwal, Radford, Klimov, arXiv 1707.06347.

`diff baselines/ppo.py baselines/ppo_il.py` shows the imitation term. Settings are CleanRL's for continuous
actions, with one environment: observations and rewards are normalised by running statistics and clipped to
±10; actions are unbounded Gaussian samples, of which the environment gets a copy clipped to its box.

    Eq. (11), (12) generalized advantage estimation           advantages
    Eq. (7)        clipped surrogate objective                policy_loss
    Eq. (9)        with value loss and entropy                value_loss, ppo_loss

CleanRL is not followed in two points. A time limit is not a terminal state: the last observation's value is
bootstrapped. And a policy is evaluated by its mean action, with the observation statistics of its training,
where CleanRL samples actions and collects new statistics.

    python -m baselines.ppo --env-id Hopper-v4
"""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from gymnasium.wrappers.utils import RunningMeanStd
from tqdm import tqdm

from baselines.common import (
    InputError,
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
    seed: int = 1  # seed of networks, environment, exploration and minibatches
    cuda: bool = True  # run on the GPU if there is one
    torch_threads: int = 1  # CPU threads of PyTorch
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
    total_timesteps: int = 30_000_000  # environment steps of the run
    learning_rate: float = 3e-4  # learning rate of actor and critic
    anneal_lr: bool = True  # lower it linearly, to 0 after --total-timesteps
    num_steps: int = 2_048  # environment steps per rollout
    batch_size: int = 64  # N: transitions per minibatch
    update_epochs: int = 10  # passes over a rollout
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    clip_coef: float = 0.2  # epsilon, the clipping range of probability ratio and value
    vf_coef: float = 0.5  # c1, the weight of the value loss
    ent_coef: float = 0.0  # c2, the weight of the entropy
    max_grad_norm: float = 0.5  # bound of the gradient's norm

    learning_starts = property(lambda self: self.num_steps)  # the first update follows the first rollout

    def __post_init__(self):
        if self.batch_size == 1 or self.num_steps % max(self.batch_size, 1):  # one advantage has no std
            raise InputError(f"--batch-size is 1, or does not divide --num-steps {self.num_steps}")
        check(self)


# ALGO LOGIC: networks


def mlp(inputs: int, outputs: int, gain: float, hidden: int = 64) -> nn.Sequential:
    """Orthogonal weights, the last layer's scaled by `gain`, and zero biases."""
    layers = nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
    layers = *layers, nn.Linear(hidden, outputs)
    for layer, scale in zip(layers[::2], (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """pi: normalised observations (N, |S|) -> mean (N, |A|) and log std (|A|,) of a Gaussian.

    It also has the statistics that observations are normalised with: they are a part of the policy.
    """

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, action_dim, gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        self.register_buffer("obs_mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("obs_var", torch.ones(obs_dim, dtype=torch.float64))

    def forward(self, obs):
        return self.net(obs), self.log_std

    def normalize(self, obs):
        """The task's observations, as the networks see them. The statistics stay as they are."""
        obs = (obs - self.obs_mean) / (self.obs_var + 1e-8).sqrt()
        return obs.clamp(-10, 10).to(self.log_std.dtype)


# ALGO LOGIC: losses, in the paper's order


def log_density(actor, obs, action):
    """log pi(a|s) of unbounded Gaussian actions, (N, 1)"""
    mean, log_std = actor(obs)
    z = (action - mean) / log_std.exp()
    return (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)


def advantages(reward, value, next_value, end, gamma, gae_lambda):
    """Generalized advantage estimation, PPO's Eq. (11), (12), for consecutive steps, (N, 1).

    `end` is 0 within an episode, 1 where it terminates, 2 where it is truncated. next_value is V of the
    observation that the step led to, an episode's last one included; only termination makes it worthless.
    """
    delta = reward + gamma * next_value * (end != 1) - value
    advantage, later = [], 0.0
    for step_delta, step_end in zip(reversed(delta.tolist()), reversed(end.tolist()), strict=True):
        later = step_delta[0] + gamma * gae_lambda * (0.0 if step_end[0] else later)
        advantage.append([later])
    return delta.new_tensor(advantage[::-1])


def policy_loss(ratio, advantage, clip_coef):
    """Eq. (7): -mean min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A), with rho = pi / pi_old."""
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage).mean()


def value_loss(value, old_value, target, clip_coef):
    """V's squared error, halved; there is nothing to gain beyond epsilon from the old value."""
    clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((value - target) ** 2, (clipped - target) ** 2).mean()


def ppo_loss(actor, critic, batch, args):
    """Eq. (9), negated, for a minibatch, and values to log."""
    obs, action, old_log_prob, old_value, advantage = batch
    target = old_value + advantage
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    log_ratio = log_density(actor, obs, action) - old_log_prob
    loss = policy_loss(log_ratio.exp(), advantage, args.clip_coef)
    critic_loss = value_loss(critic(obs), old_value, target, args.clip_coef)
    entropy = (actor.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
    log = {"losses/policy_loss": loss, "losses/value_loss": critic_loss, "losses/entropy": entropy}
    log["losses/approx_kl"] = log_ratio.exp() - 1 - log_ratio  # its mean estimates KL(pi_old, pi)
    return loss + args.vf_coef * critic_loss - args.ent_coef * entropy, log


@torch.no_grad()
def sample(actor, obs, explore=True):
    """A sample of the policy, or its mean, neither of them clipped: (..., |S|) -> (..., |A|) in NumPy."""
    mean, log_std = actor(obs)
    noise = torch.randn_like(mean) if explore else 0
    return (mean + log_std.exp() * noise).float().numpy(force=True)


def act(actor, obs, explore=False):
    """The deterministic policy, or a sample of it, at the task's observations, NumPy to NumPy."""
    obs = actor.normalize(torch.as_tensor(obs, device=actor.log_std.device))
    return sample(actor, obs, explore).clip(-1, 1)


class Statistics:
    """Attributes of a normalising wrapper (NumPy arrays) as a part of the checkpoint."""

    def __init__(self, owner, *names):
        self.owner, self.names = owner, names

    def state_dict(self):
        return {name: torch.tensor(getattr(self.owner, name), dtype=torch.float64) for name in self.names}

    def load_state_dict(self, state):
        for name in self.names:
            setattr(self.owner, name, state[name].numpy())


def train(args: Args) -> Path:
    """Runs the training, or with args.resume the rest of it. Returns the run's folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    env = gym.wrappers.RecordEpisodeStatistics(make_env(args, training=True), stats_key="run")
    env = obs_normalizer = gym.wrappers.NormalizeObservation(env)
    obs_normalizer.obs_rms = RunningMeanStd(shape=env.observation_space.shape)  # in float64; its own: float32
    env = gym.wrappers.TransformObservation(env, lambda obs: obs.clip(-10, 10), env.observation_space)
    env = reward_normalizer = gym.wrappers.NormalizeReward(env, gamma=args.gamma)
    env = gym.wrappers.TransformReward(env, lambda reward: np.clip(reward, -10, 10))
    eval_env = make_env(args, training=False)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]

    obs, _ = env.reset(seed=args.seed)
    generators = [env.unwrapped.np_random]
    rollout = ReplayBuffer(args.num_steps, obs_dim, action_dim, device)  # the next one overwrites it
    actor = Actor(obs_dim, action_dim).to(device)
    critic = mlp(obs_dim, 1, gain=1.0).to(device)  # V
    params = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(params, args.learning_rate, eps=1e-5, fused=True)
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer, "rollout": rollout}
    parts["obs_rms"] = Statistics(obs_normalizer.obs_rms, "mean", "var", "count")
    parts["return_rms"] = Statistics(reward_normalizer.return_rms, "mean", "var", "count")
    parts["discounted_reward"] = Statistics(reward_normalizer, "discounted_reward")

    run_dir, writer, last_step, evaluations = start_run(args, parts, generators)

    ended = last_step > 0  # a resumed run starts a new episode
    last_checkpoint, start_time = last_step, time.time()
    for global_step in tqdm(range(last_step + 1, args.total_timesteps + 1), unit=" steps", disable=None):
        # ALGO LOGIC: act
        if ended:
            obs, _ = env.reset()
        action = sample(actor, torch.as_tensor(obs, device=device))
        next_obs, reward, terminated, truncated, info = env.step(action.clip(-1, 1))
        end = 1 if terminated else 2 if truncated else 0
        rollout.add(obs, action, reward, next_obs, end)
        obs, ended = next_obs, terminated or truncated
        if ended:
            writer.add_scalar("charts/episodic_return", info["run"]["r"], global_step)
            writer.add_scalar("charts/episodic_length", info["run"]["l"], global_step)
        actor.obs_mean.copy_(torch.from_numpy(obs_normalizer.obs_rms.mean))
        actor.obs_var.copy_(torch.from_numpy(obs_normalizer.obs_rms.var))

        # ALGO LOGIC: learn
        if global_step % args.num_steps == 0:
            states, actions, rewards, next_states, ends = rollout.rows.split(rollout.widths, dim=1)
            with torch.no_grad():  # the policy is still the one that acted
                log_probs = log_density(actor, states, actions)
                values, next_values = critic(states), critic(next_states)
            gae = advantages(rewards, values, next_values, ends, args.gamma, args.gae_lambda)
            if args.anneal_lr:
                progress = (global_step // args.num_steps - 1) / (args.total_timesteps // args.num_steps)
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)

            for _ in range(args.update_epochs):
                for index in torch.randperm(args.num_steps, device=device).split(args.batch_size):
                    batch = [column[index] for column in (states, actions, log_probs, values, gae)]
                    loss, log = ppo_loss(actor, critic, batch, args)
                    optimizer.zero_grad()
                    loss.backward()
                    norm = nn.utils.clip_grad_norm_(params, args.max_grad_norm)
                    optimizer.step()

            log |= {"losses/grad_norm": norm, "losses/log_std": actor.log_std, "losses/values": values}
            log["charts/rewarded_steps"] = (rewards != 0).double()
            for name, value in log.items():
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
