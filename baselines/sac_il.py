"""SAC+IL: SAC with a conventional imitation loss, Eq. (3); GILD's main baseline.

`diff baselines/sac.py baselines/sac_il.py` shows the imitation term. --il-beta 0 is behaviour cloning.

    Eq. (2)        L_RL, the vanilla actor's loss             rl_loss
    Eq. (3)        L_IL, conventional imitation, and w_rl     il_loss, rl_weight
    Eq. (5)        critic step, vanilla SAC's                 critic_loss

    python -m baselines.sac_il --env-id Hopper-v4
"""

import math
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
    learning_rate: float = 3e-4  # learning rate of actor, critic and temperature
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


def gradient(loss, params, **kwargs):
    """The gradient of `loss` w.r.t. a dict of parameters, as a dict. Leaves every .grad alone."""
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()), **kwargs), strict=True))


def critic_gradient(critic, target_critic, actor, batch, alpha, args):
    """The gradient of Eq. (5) w.r.t. theta, as a dict by parameter name, and values to log."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=args.bf16):
        loss, q1, q2 = critic_loss(critic, target_critic, actor, batch, alpha, args)
    log = {"losses/qf_loss": loss / 2, "losses/qf1_values": q1, "losses/qf2_values": q2}
    return gradient(loss, dict(critic.named_parameters())), {k: value.detach() for k, value in log.items()}


def actor_gradient(actor, critic, obs, demo, noise, alpha, args):
    """The gradient of Eq. (3) w.r.t. phi, as a dict by parameter name, log pi, and values to log."""
    loss, log_prob, q = rl_loss(actor, critic, obs, noise, alpha)
    imitation_loss, distance = il_loss(actor, *demo)
    log = {"losses/actor_loss": loss.detach(), "charts/imitation_distance": distance.detach()}
    loss = rl_weight(q, args.il_beta) * loss + imitation_loss
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
    actor_optimizer = torch.optim.Adam(actor.parameters(), args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.learning_rate, fused=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], args.learning_rate)
    parts = {"actor": actor, "actor_optimizer": actor_optimizer}
    parts |= {"critic": critic, "target_critic": target_critic, "critic_optimizer": critic_optimizer}
    parts |= {"log_alpha": nn.ParameterList([log_alpha]), "alpha_optimizer": alpha_optimizer}
    parts["buffer"] = buffer

    run_dir, writer, last_step, evaluations = start_run(args, parts, generators)
    if args.clone_steps > 0 and last_step == 0:
        clone(actor, demonstrations, args)

    update_critic, update_actor = critic_gradient, actor_gradient
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # compile the gradients with the losses
        torch._inductor.config.fallback_random = True  # the random numbers of a run without --compile
        update_critic, update_actor = map(torch.compile, (update_critic, update_actor))

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
            demo = demonstrations.sample(args.batch_size)
            noise = torch.randn_like(batch[1])
            phi_grad, log_prob, actor_log = update_actor(actor, critic, batch[0], demo, noise, alpha, args)
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
