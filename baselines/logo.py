"""LOGO: TRPO with guidance from demonstrations; Rengarajan, Vaidya, Sarvesh, Kalathil, Shakkottai, ICLR 2022.

An iteration takes two trust-region steps. The first improves the return, as TRPO does. The second moves the
policy towards the demonstrations, by no more than delta_k, which decays when the returns rise.

    step 1, policy improvement   max E[rho A_r], KL(pi_k, pi) <= max_kl           trust_region_step
    step 2, policy guidance      max E[rho A_g], KL(pi_k+1/2, pi) <= delta_k      trust_region_step
    A_g's reward                 r_g = -log D(s, a)                               guidance_reward
    D                            whether (s, a) is pi_k's or a demonstration      discriminator_loss
    delta_k                                                                       Radius

In both steps rho is pi / pi_k, because pi_k acted. Unlike in the released code, a time limit is no terminal
state (the last observation's value is bootstrapped); advantages do not cross episodes; rollouts have a fixed
number of steps; the line search also bounds the KL divergence; a rollout without any reward skips step 1,
which would only follow the value network's errors; and the environment gets a clipped copy of the action.

    python -m baselines.logo --env-id Hopper-v4
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
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

from baselines.common import (
    DemonstrationBuffer,
    ReplayBuffer,
    check,
    evaluate,
    main,
    make_env,
    received_signals,
    save_checkpoint,
    save_evaluation,
    start_run,
    task_name,
)

DELTAS = {"Hopper": 0.01, "HalfCheetah": 0.2, "Walker2d": 0.05}  # the authors'; 0.05 for the other tasks


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of this experiment
    seed: int = 1  # seed of networks, environment and exploration
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
    num_steps: int = 20_000  # environment steps per rollout
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    max_kl: float = 0.01  # KL bound of step 1

    demo_path: str | None = None  # demonstrations D_dem, .npz; None: SAC's in demos/ for the task
    delta: float | None = None  # delta_0, the initial KL bound of step 2; None: by task
    delta_decay: float = 0.95  # factor by which delta_k decays
    delta_iterations: int = 50  # K_delta, iterations before the first decay
    discriminator_lr: float = 3e-4  # learning rate of the discriminator
    discriminator_steps: int = 1  # updates per iteration, each on the whole rollout and all demonstrations

    batch_size = learning_starts = property(lambda self: self.num_steps)  # the update follows the rollout

    def __post_init__(self):
        check(self)


# ALGO LOGIC: networks, in float64 for the sake of conjugate gradients and L-BFGS


def mlp(inputs: int, outputs: int, hidden: int = 128) -> nn.Sequential:
    """The last layer starts with a tenth of PyTorch's weights and zero biases."""
    layers = nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
    last = nn.Linear(hidden, outputs)
    last.weight.data *= 0.1
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last).double()


class Actor(nn.Module):
    """pi: (N, |S|) -> mean (N, |A|) and log std (|A|,) of a Gaussian."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim, dtype=torch.float64))

    def forward(self, obs):
        return self.net(obs), self.log_std


# ALGO LOGIC: advantages and guidance


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


def discriminator_loss(discriminator, obs, action, demo_obs, demo_action):
    """Cross-entropy of D, the sigmoid of the discriminator's output: 1 is the policy, 0 a demonstration."""
    policy = discriminator(torch.cat([obs, action], 1))
    demonstration = discriminator(torch.cat([demo_obs, demo_action], 1))
    return -F.logsigmoid(policy).mean() - F.logsigmoid(-demonstration).mean()


@torch.no_grad()
def guidance_reward(discriminator, obs, action):
    """r_g = -log D(s, a), (N, 1), with D at least 1e-8."""
    return -F.logsigmoid(discriminator(torch.cat([obs, action], 1))).clamp(min=math.log(1e-8))


def estimate(critic, obs, reward, next_obs, end, args):
    """Advantages, and what the value network is to be fitted to, (N, 1) each."""
    with torch.no_grad():
        value, next_value = critic(obs), critic(next_obs)
    advantage = advantages(reward, value, next_value, end, args.gamma, args.gae_lambda)
    return advantage, advantage + value


def fit_value(critic, obs, target):
    """Least squares with a small L2 penalty: 25 iterations of L-BFGS. Returns the loss before them."""
    optimizer = torch.optim.LBFGS(critic.parameters(), 1, 25, history_size=10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        penalty = sum((weight**2).sum() for weight in critic.parameters())
        loss = F.mse_loss(critic(obs), target) + 1e-3 * penalty
        loss.backward()
        return loss

    return optimizer.step(loss)


# ALGO LOGIC: the trust-region step


def surrogate_loss(actor, obs, action, old_log_prob, advantage):
    """-mean rho A, with rho = pi / pi_k"""
    return -((log_density(actor, obs, action) - old_log_prob).exp() * advantage).mean()


def mean_kl(old, new):
    """The mean KL(old || new) of two Gaussian policies at the same states, each a mean and a log std."""
    (old_mean, old_log_std), (mean, log_std) = old, new
    ratio = (2 * (old_log_std - log_std)).exp() + ((old_mean - mean) / log_std.exp()) ** 2
    return (0.5 * (ratio - 1) + log_std - old_log_std).sum(-1).mean()


def fisher_product(actor, obs, damping=0.01):
    """The function v -> (F + damping) v. F is the Hessian of the mean KL from the actor as it is."""
    new = actor(obs)
    old = [value.detach() for value in new]
    params = list(actor.parameters())
    slope = parameters_to_vector(torch.autograd.grad(mean_kl(old, new), params, create_graph=True))

    def product(v):
        return parameters_to_vector(torch.autograd.grad(slope @ v, params, retain_graph=True)) + damping * v

    return product


def conjugate_gradients(product, b, iterations=10, tolerance=1e-10):
    """Solves A x = b approximately, in at most `iterations` steps; product(v) is A v."""
    x, residual, direction = torch.zeros_like(b), b, b
    for _ in range(iterations):
        square = residual @ residual
        if square < tolerance:
            break
        along = product(direction)
        size = square / (direction @ along)
        x = x + size * direction
        residual = residual - size * along
        direction = residual + (residual @ residual) / square * direction
    return x


@torch.no_grad()
def assign(module, vector):
    """Sets a module's parameters, in their own memory: rounding can depend on where a matrix starts."""
    parameters = list(module.parameters())
    for parameter, values in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(values.view_as(parameter))


def trust_region_step(actor, obs, action, old_log_prob, advantage, radius):
    """Maximises mean rho A within a mean KL of `radius` from the actor as it is. Returns that KL."""
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    loss = surrogate_loss(actor, obs, action, old_log_prob, advantage)
    slope = parameters_to_vector(torch.autograd.grad(loss, list(actor.parameters())))
    product = fisher_product(actor, obs)
    direction = conjugate_gradients(product, -slope)
    full_step = direction * (2 * radius / (direction @ product(direction)).clamp(min=1e-30)).sqrt()

    with torch.no_grad():
        start, old = parameters_to_vector(actor.parameters()), [value.clone() for value in actor(obs)]
        for halvings in range(10):
            step = 0.5**halvings * full_step
            assign(actor, start + step)
            gain = loss - surrogate_loss(actor, obs, action, old_log_prob, advantage)
            kl = mean_kl(old, actor(obs))
            if gain > 0.1 * -(slope @ step) and kl <= 1.5 * radius:
                return kl.item()
    assign(actor, start)
    return 0.0


class Radius:
    """delta_k, and the mean episode returns of the last ten rollouts (initially a single 0)."""

    def __init__(self, delta):
        self.delta, self.returns = delta, [0.0]

    def update(self, iteration, mean_return, args):
        """Decays delta_k in iteration k = 0, 1, ... if k > K_delta and the return beats the recent mean."""
        if iteration > args.delta_iterations and mean_return > np.mean(self.returns):
            self.delta = max(5e-7, args.delta_decay * self.delta)
        self.returns = [*self.returns, mean_return][-10:]

    def state_dict(self):
        return {"delta": self.delta, "returns": self.returns}

    def load_state_dict(self, state):
        self.delta, self.returns = state["delta"], state["returns"]


@torch.no_grad()
def sample(actor, obs, explore=True):
    """A sample of the policy, or its mean, neither of them clipped: (..., |S|) -> (..., |A|) in NumPy."""
    mean, log_std = actor(obs)
    noise = torch.randn_like(mean) if explore else 0
    return (mean + log_std.exp() * noise).float().numpy(force=True)


def act(actor, obs, explore=False):
    """The deterministic policy, or a sample of it, NumPy to NumPy."""
    obs = torch.as_tensor(obs, dtype=torch.float64, device=actor.log_std.device)
    return sample(actor, obs, explore).clip(-1, 1)


def train(args: Args) -> Path:
    """Runs the training, or with args.resume the rest of it. Returns the run's folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    env = gym.wrappers.RecordEpisodeStatistics(make_env(args, training=True), stats_key="run")
    eval_env = make_env(args, training=False)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    shipped = Path(__file__).parents[1] / "demos" / f"{task_name(args.env_id)}-sac.npz"
    demonstrations = DemonstrationBuffer(args.demo_path or shipped, args.env_id, env, device)
    demo_obs, demo_action = demonstrations.obs.double(), demonstrations.actions.double()

    obs, _ = env.reset(seed=args.seed)
    generators = [env.unwrapped.np_random]
    rollout = ReplayBuffer(args.num_steps, obs_dim, action_dim, device)  # the next one overwrites it
    actor = Actor(obs_dim, action_dim).to(device)
    critic, guide_critic = (mlp(obs_dim, 1).to(device) for _ in range(2))  # V of the two rewards
    discriminator = mlp(obs_dim + action_dim, 1).to(device)
    optimizer = torch.optim.Adam(discriminator.parameters(), args.discriminator_lr)
    radius = Radius(DELTAS.get(task_name(args.env_id), 0.05) if args.delta is None else args.delta)
    parts = {"actor": actor, "critic": critic, "guide_critic": guide_critic, "rollout": rollout}
    parts |= {"discriminator": discriminator, "optimizer": optimizer, "radius": radius}

    run_dir, writer, last_step, evaluations = start_run(args, parts, generators)

    ended = last_step > 0  # a resumed run starts a new episode
    last_checkpoint, start_time = last_step, time.time()
    for global_step in tqdm(range(last_step + 1, args.total_timesteps + 1), unit=" steps", disable=None):
        # ALGO LOGIC: act
        if ended:
            obs, _ = env.reset()
        action = sample(actor, torch.as_tensor(obs, dtype=torch.float64, device=device))
        next_obs, reward, terminated, truncated, info = env.step(action.clip(-1, 1))
        end = 1 if terminated else 2 if truncated else 0
        rollout.add(obs, action, reward, next_obs, end)
        obs, ended = next_obs, terminated or truncated
        if ended:
            writer.add_scalar("charts/episodic_return", info["run"]["r"], global_step)
            writer.add_scalar("charts/episodic_length", info["run"]["l"], global_step)

        # ALGO LOGIC: learn
        if global_step % args.num_steps == 0:
            states, actions, rewards, next_states, ends = rollout.rows.double().split(rollout.widths, dim=1)
            mean_return = (rewards.sum() / (ends != 0).sum().clamp(min=1)).item()
            radius.update(global_step // args.num_steps - 1, mean_return, args)
            guide_rewards = guidance_reward(discriminator, states, actions)
            gae, target = estimate(critic, states, rewards, next_states, ends, args)
            guide_gae, guide_target = estimate(guide_critic, states, guide_rewards, next_states, ends, args)
            log_probs = log_density(actor, states, actions).detach()  # log pi_k, in both steps

            for _ in range(args.discriminator_steps):
                loss = discriminator_loss(discriminator, states, actions, demo_obs, demo_action)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            log = {"losses/discriminator_loss": loss, "losses/value_loss": fit_value(critic, states, target)}
            if rewards.any():  # step 1, policy improvement
                kl = trust_region_step(actor, states, actions, log_probs, gae, args.max_kl)
                log["losses/kl_improvement"] = kl
            if radius.delta > 6e-7:  # step 2, policy guidance, until delta_k is at its floor
                log["losses/guide_value_loss"] = fit_value(guide_critic, states, guide_target)
                kl = trust_region_step(actor, states, actions, log_probs, guide_gae, radius.delta)
                log["losses/kl_guidance"] = kl

            log |= {"charts/delta": radius.delta, "charts/rewarded_steps": (rewards != 0).double()}
            log |= {"charts/guidance_reward": guide_rewards, "losses/log_std": actor.log_std}
            for name, value in log.items():
                writer.add_scalar(name, torch.as_tensor(value).mean().item(), global_step)
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
