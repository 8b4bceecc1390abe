"""DiffAIL: SAC on the reward of a diffusion discriminator; Wang, Wu, Pang, Zhang, Yin, AAAI 2024.

A denoiser is trained on demonstrations, and against the policy's own pairs (s, a). Pairs that it denoises
well look demonstrated, and SAC is rewarded for them; the task's own reward is stored but not used.
`diff baselines/sac.py baselines/diffail.py` shows DiffAIL.

    x_t              sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) epsilon, x = (s, a)   diffusion_error
    D(x)             exp(-mean_j (epsilon_psi(x_t, t) - epsilon)_j^2)                  discriminator_loss
    L_D              -mean log D(x_d) - mean log(1 - D(x)) + w mean (|dD/dx| - 1)^2    discriminator_gradient
    r                -log(1 - mean_t D(x)), for SAC                                    surrogate_reward
    actor, critic    vanilla SAC's, GILD's Eqs. (2) and (5)                            rl_loss, critic_loss

The reward uses the D that is trained; the released code's, --reward per-component, is mean_j exp(-...), which
is larger. Training episodes end only at the time limit, and the simulator runs on past termination: r is
positive, so a longer episode would pay more than better imitation. The constants are the authors', SAC's too:
Adam's beta_1 is 0.25, the target entropy -|A| / 2. (Theirs ends up higher: their log-density lacks
(|A| - 1) log sqrt(2 pi).) Initial weights, losses and one update per step are vanilla SAC's, and only the
denoiser sees scaled observations.

    python -m baselines.diffail --env-id Hopper-v4
"""

import math
import random
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
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

# the authors', by task: width of the denoiser, weight of the gradient penalty, whether it scales observations
SETTINGS = {"Hopper": (256, 0.0, True), "Walker2d": (128, 0.001, True)}
SETTINGS |= {"HalfCheetah": (128, 0.1, False), "Ant": (128, 0.1, False)}  # other tasks: (128, 0.1, True)


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
    dense: bool = False  # log the task's own dense reward; training uses none
    sparse_threshold: float | None = None  # reward only so many metres ahead of the start; None: the paper's
    total_timesteps: int = 1_000_000  # environment steps of the run
    learning_rate: float = 3e-4  # learning rate of actor, critic and temperature
    buffer_size: int = 1_000_000  # capacity of the replay buffer D, in transitions
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak averaging rate of the target networks
    batch_size: int = 256  # N: transitions, and demonstrations, per update
    learning_starts: int = 10_000  # steps with random actions before the first update
    critic_norm: bool = False  # LayerNorm before each ReLU of the critic
    alpha: float = 0.2  # temperature of the entropy term; its initial value if autotuned (0 stays 0)
    autotune: bool = True  # tune alpha to the entropy -|A| / 2

    demo_path: str | None = None  # demonstrations D_dem, .npz; None: SAC's in demos/ for the task
    denoiser_lr: float = 3e-5  # learning rate of psi
    diffusion_steps: int = 10  # T, the number of noise levels
    gp_weight: float | None = None  # w, the weight of the gradient penalty; None: the authors', by task
    reward: Literal["consistent", "per-component"] = "consistent"  # D in the reward: trained or released
    reward_scale: float = 2.0  # factor of the reward
    terminations: bool = False  # end training episodes where the task terminates, not only at the time limit

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


class Denoiser(nn.Module):
    """psi: the noise in x_t: (N, m), diffusion step t (N,) -> (N, m), where x is a pair (s, a)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, steps: int):
        super().__init__()
        m = obs_dim + action_dim
        self.register_buffer("mean", torch.zeros(obs_dim))  # s is scaled with these, where it is
        self.register_buffer("std", torch.ones(obs_dim))
        self.register_buffer("alpha_bar", (1 - torch.linspace(1e-4, 0.02, steps)).cumprod(0))
        self.register_buffer("frequencies", 10_000 ** -torch.linspace(0, 1, 8))
        self.embedding = nn.Sequential(nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16))
        layers = nn.Linear(m + 16, hidden), nn.Mish(), nn.Linear(hidden, hidden), nn.Mish()
        self.net = nn.Sequential(*layers, nn.Linear(hidden, hidden), nn.Mish(), nn.Linear(hidden, m))

    def pair(self, obs, action):
        """x, (N, m)"""
        return torch.cat([(obs - self.mean) / self.std, action], 1)

    def forward(self, x_t, t):
        angle = t[:, None] * self.frequencies
        embedding = self.embedding(torch.cat([angle.sin(), angle.cos()], 1))
        return self.net(torch.cat([x_t, embedding], 1))


# ALGO LOGIC: losses and gradients, in the paper's order


def diffusion_error(denoiser, x, t, noise):
    """The squared error of the denoiser's noise, of each component of x_t: (N, m)."""
    alpha_bar = denoiser.alpha_bar[t, None]
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    return (denoiser(x_t, t) - noise) ** 2


def discriminator_loss(demo_error, error):
    """L_D without the penalty, from errors (N, m): log D is the negative mean, the diffusion loss."""
    error = error.mean(1).clamp(min=1e-6)  # D < 1
    return demo_error.mean() - torch.log(-torch.expm1(-error)).mean()


def gradient_penalty(denoiser, x, t, noise):
    """mean (|dD/dx| - 1)^2"""
    x = x.detach().requires_grad_()
    d = torch.exp(-diffusion_error(denoiser, x, t, noise).mean(1))
    slope = gradient(d.sum(), {"x": x}, create_graph=True)["x"]
    return ((slope.norm(dim=1) - 1) ** 2).mean()


@torch.no_grad()
def surrogate_reward(denoiser, x, noise, kind):
    """r = -log(1 - mean_t D(x)), (N, 1); `noise` is (T, N, m)."""
    t = torch.arange(len(noise), device=x.device).repeat_interleave(len(x))
    error = diffusion_error(denoiser, x.repeat(len(noise), 1), t, noise.flatten(0, 1))
    if kind == "consistent":
        error = error.mean(1, keepdim=True)
    d = torch.exp(-error).mean(1).view(len(noise), len(x), 1).mean(0)
    return -torch.log(1 - d.clamp(max=1 - 1e-6))


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
    """Eq. (2): L_RL(phi) = mean [alpha log pi(a|s) - min(Q1, Q2)(s, a)]. Also returns log pi."""
    action, log_prob = actor(obs, noise)
    q = torch.min(*critic(obs, action))
    return (alpha * log_prob - q).mean(), log_prob


def gradient(loss, params, **kwargs):
    """The gradient of `loss` w.r.t. a dict of parameters, as a dict. Leaves every .grad alone."""
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()), **kwargs), strict=True))


def discriminator_gradient(denoiser, x_d, x, gp_weight):
    """The gradient of L_D w.r.t. psi, as a dict by parameter name, and values to log."""
    t = torch.randint(len(denoiser.alpha_bar), (3, len(x)), device=x.device)
    noise = torch.randn(3, *x.shape, device=x.device)
    demo_error = diffusion_error(denoiser, x_d, t[0], noise[0])
    error = diffusion_error(denoiser, x, t[1], noise[1])
    loss = discriminator_loss(demo_error, error)
    log = {"losses/discriminator_loss": loss}
    log |= {"charts/d_demo": torch.exp(-demo_error.mean(1)), "charts/d_policy": torch.exp(-error.mean(1))}
    if gp_weight > 0:
        between = torch.lerp(x, x_d, torch.rand(len(x), 1, device=x.device))
        penalty = log["losses/gradient_penalty"] = gradient_penalty(denoiser, between, t[2], noise[2])
        loss = loss + gp_weight * penalty
    return gradient(loss, dict(denoiser.named_parameters())), {k: value.detach() for k, value in log.items()}


def critic_gradient(critic, target_critic, actor, batch, alpha, args):
    """The gradient of Eq. (5) w.r.t. theta, as a dict by parameter name, and values to log."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=args.bf16):
        loss, q1, q2 = critic_loss(critic, target_critic, actor, batch, alpha, args)
    log = {"losses/qf_loss": loss / 2, "losses/qf1_values": q1, "losses/qf2_values": q2}
    return gradient(loss, dict(critic.named_parameters())), {k: value.detach() for k, value in log.items()}


def actor_gradient(actor, critic, obs, noise, alpha):
    """The gradient of Eq. (2) w.r.t. phi, as a dict by parameter name, log pi, and values to log."""
    loss, log_prob = rl_loss(actor, critic, obs, noise, alpha)
    log = {"losses/actor_loss": loss.detach()}
    return gradient(loss, dict(actor.named_parameters())), log_prob.detach(), log


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
def act(actor, obs, explore=False):
    """The deterministic policy, or a sample of it, NumPy to NumPy: (..., |S|) -> (..., |A|)."""
    device = next(actor.parameters()).device
    mean, log_std = actor.gaussian(torch.as_tensor(obs, dtype=torch.float32, device=device))
    noise = torch.randn_like(mean) if explore else 0
    return torch.tanh(mean + log_std.exp() * noise).numpy(force=True)


class NoTermination(gym.Wrapper):
    """Episodes end at the time limit only; the task goes on after what it calls its end."""

    def step(self, action):
        obs, reward, _, truncated, info = self.env.step(action)
        return obs, reward, False, truncated, info


def train(args: Args) -> Path:
    """Runs the training, or with args.resume the rest of it. Returns the run's folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    env = make_env(args, training=True)
    env = env if args.terminations else NoTermination(env)
    env = gym.wrappers.RecordEpisodeStatistics(env, stats_key="run")
    eval_env = make_env(args, training=False)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    hidden, gp_weight, scaled = SETTINGS.get(task_name(args.env_id), (128, 0.1, True))
    gp_weight = gp_weight if args.gp_weight is None else args.gp_weight
    shipped = Path(__file__).parents[1] / "demos" / f"{task_name(args.env_id)}-sac.npz"
    demonstrations = DemonstrationBuffer(args.demo_path or shipped, args.env_id, env, device)

    env.action_space.seed(args.seed + 1_000)  # not the task's seed: actions could equal its noise
    obs, _ = env.reset(seed=args.seed)
    generators = [env.unwrapped.np_random, env.action_space.np_random]
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    actor = Actor(obs_dim, action_dim).to(device)
    critic = Critic(obs_dim, action_dim, args.critic_norm).to(device)
    target_critic = deepcopy(critic)
    log_alpha = nn.Parameter(torch.tensor(args.alpha, device=device).log())
    betas = 0.25, 0.999
    actor_optimizer = torch.optim.Adam(actor.parameters(), args.learning_rate, betas, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.learning_rate, betas, fused=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], args.learning_rate, betas)
    parts = {"actor": actor, "actor_optimizer": actor_optimizer}
    parts |= {"critic": critic, "target_critic": target_critic, "critic_optimizer": critic_optimizer}
    parts |= {"log_alpha": nn.ParameterList([log_alpha]), "alpha_optimizer": alpha_optimizer}
    parts["buffer"] = buffer
    denoiser = Denoiser(obs_dim, action_dim, hidden, args.diffusion_steps).to(device)
    if scaled:
        std, mean = torch.std_mean(demonstrations.obs, 0, correction=0)
        denoiser.mean, denoiser.std = mean, torch.where(std > 1e-3, std, 1)  # constant features as they are
    denoiser_optimizer = torch.optim.Adam(denoiser.parameters(), args.denoiser_lr, fused=True)
    parts |= {"denoiser": denoiser, "denoiser_optimizer": denoiser_optimizer}

    run_dir, writer, last_step, evaluations = start_run(args, parts, generators)

    update_critic, update_actor = critic_gradient, actor_gradient
    update_denoiser, reward_of = discriminator_gradient, surrogate_reward
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # compile the gradients with the losses
        torch._inductor.config.fallback_random = True  # the random numbers of a run without --compile
        update_critic, update_actor = map(torch.compile, (update_critic, update_actor))
        update_denoiser, reward_of = map(torch.compile, (update_denoiser, reward_of))

    ended = last_step > 0  # a resumed run starts a new episode
    last_checkpoint, start_time = last_step, time.time()
    for global_step in tqdm(range(last_step + 1, args.total_timesteps + 1), unit=" steps", disable=None):
        # ALGO LOGIC: act
        if ended:
            obs, _ = env.reset()
        if global_step <= args.learning_starts:
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
            x_d = denoiser.pair(*demonstrations.sample(args.batch_size))
            x = denoiser.pair(*buffer.sample(args.batch_size)[:2])
            psi_grad, denoiser_log = update_denoiser(denoiser, x_d, x, gp_weight)
            step(denoiser_optimizer, denoiser, psi_grad)

            batch = buffer.sample(args.batch_size)
            x = denoiser.pair(*batch[:2])
            noise = torch.randn(args.diffusion_steps, *x.shape, device=device)
            surrogate = args.reward_scale * reward_of(denoiser, x, noise, args.reward)
            batch = *batch[:2], surrogate, *batch[3:]  # in place of the environment's reward
            alpha = log_alpha.exp().detach()
            critic_grad, log = update_critic(critic, target_critic, actor, batch, alpha, args)
            step(critic_optimizer, critic, critic_grad)
            noise = torch.randn_like(batch[1])
            phi_grad, log_prob, actor_log = update_actor(actor, critic, batch[0], noise, alpha)
            step(actor_optimizer, actor, phi_grad)
            log |= actor_log | {"losses/alpha": alpha, "losses/log_prob": log_prob}
            log |= denoiser_log | {"charts/surrogate_reward": surrogate}
            if args.autotune:
                alpha_loss = -(log_alpha * (log_prob - action_dim / 2)).mean()  # target entropy -|A| / 2
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
