"""Meta-Critic on SAC: an additional objective for the actor, learned online.

Zhou, Li, Yang, Wang, Hospedales: "Online Meta-Critic Learning for Off-Policy Actor-Critic Methods", NeurIPS
2020. The actor minimises L_RL + h_omega, and omega is trained so that h_omega lowers L_RL further on held-out
transitions. No demonstrations are used. Compare: `diff baselines/sac.py baselines/meta_critic_sac.py`.

    L_RL           the vanilla actor's loss, GILD's Eq. (2)               rl_loss
    h_omega        mean of f_omega(actor features) over d_trn             MetaCritic
    phi_old        phi - eta dL_RL / dphi, on d_trn                       meta_critic_gradients
    phi_new        phi_old - eta dh_omega / dphi, taken at phi            meta_critic_gradients
    L_meta         tanh(L_RL(phi_new) - L_RL(phi_old)), on d_val          meta_loss
    critic step    vanilla SAC's, GILD's Eq. (5)                          critic_loss

The released code differs. Its look-ahead moves the two hidden layers (--look-ahead trunk), it compares
phi_old and phi_new on different noise, its actor's loss is built before the critic's step, its critic takes
two steps per update, and it tunes the temperature on every task. Here the look-ahead moves the whole actor,
the noise is the same, the actor's loss is the updated critic's, and the rest is vanilla SAC's.

    python -m baselines.meta_critic_sac --env-id Hopper-v4
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
from torch.func import functional_call
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
    learning_rate: float = 3e-4  # eta: learning rate of actor, critic, temperature and look-ahead
    buffer_size: int = 1_000_000  # capacity of the replay buffer D, in transitions
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak averaging rate of the target networks
    batch_size: int = 256  # N: transitions per update
    learning_starts: int = 10_000  # steps with random actions before the first update
    critic_norm: bool = False  # LayerNorm before each ReLU of the critic
    alpha: float = 0.2  # temperature of the entropy term; its initial value if autotuned (0 stays 0)
    autotune: bool | None = None  # tune alpha to entropy -|A|; None: not on Hopper, HalfCheetah, Point2D

    meta_lr: float = 1e-3  # learning rate of omega
    meta_weight_decay: float = 1e-4  # L2 penalty on omega
    meta_obs_action: bool = False  # give f_omega the state and the action too
    look_ahead: Literal["actor", "trunk", "first-layer"] = "actor"  # actor layers that the look-ahead moves

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


class MetaCritic(nn.Module):
    """omega: f(features) or f(features, s, a) >= 0, (N, 1). Its mean is h_omega.

    The features, (N, 256), are the output of the actor's second hidden layer.
    """

    def __init__(self, inputs: int):
        super().__init__()
        self.net = mlp(inputs, 1, hidden=100)

    def forward(self, *inputs):
        return F.softplus(self.net(torch.cat(inputs, 1)))


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
    """Eq. (2): L_RL(phi) = mean [alpha log pi(a|s) - min(Q1, Q2)(s, a)]. Also returns log pi."""
    action, log_prob = actor(obs, noise)
    q = torch.min(*critic(obs, action))
    return (alpha * log_prob - q).mean(), log_prob


def meta_loss(new, old, actor, critic, val_obs, val_noise, alpha):
    """L_meta = tanh(L_RL(phi_new) - L_RL(phi_old)), negative where h_omega lowers L_RL. phi's are dicts."""

    def loss(phi):
        return rl_loss(
            lambda *inputs: functional_call(actor, phi, inputs), critic, val_obs, val_noise, alpha
        )[0]

    with torch.no_grad():
        old_loss = loss(old)
    return torch.tanh(loss(new) - old_loss)


def gradient(loss, params, **kwargs):
    """The gradient of `loss` w.r.t. a dict of parameters, as a dict. Leaves every .grad alone."""
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()), **kwargs), strict=True))


def critic_gradient(critic, target_critic, actor, batch, alpha, args):
    """The gradient of Eq. (5) w.r.t. theta, as a dict by parameter name, and values to log."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=args.bf16):
        loss, q1, q2 = critic_loss(critic, target_critic, actor, batch, alpha, args)
    log = {"losses/qf_loss": loss / 2, "losses/qf1_values": q1, "losses/qf2_values": q2}
    return gradient(loss, dict(critic.named_parameters())), {k: value.detach() for k, value in log.items()}


def meta_critic_gradients(actor, critic, meta_critic, batch, noise, val_obs, val_noise, alpha, args):
    """The gradients of an update, without changing a parameter; `batch` is (s, a) of d_trn.

    Returns that of L_RL + h_omega w.r.t. phi, and that of L_meta w.r.t. omega, as dicts by name,
    log pi, and values to log.
    """
    phi, omega, lr = dict(actor.named_parameters()), dict(meta_critic.named_parameters()), args.learning_rate
    obs, action = batch
    actor_loss, log_prob = rl_loss(actor, critic, obs, noise, alpha)
    rl_grad = gradient(actor_loss, phi)

    # the gradient of h_omega, a function of omega; 0 for the last layer, which comes after the features
    features = actor.net[:-1](obs)
    inputs = (features, obs, action) if args.meta_obs_action else (features,)
    aux_loss = meta_critic(*inputs).mean()
    feature_grad = gradient(aux_loss, {"features": features}, create_graph=True)["features"]
    kwargs = {"grad_outputs": feature_grad, "create_graph": True, "materialize_grads": True}
    aux_grad = gradient(features, phi, **kwargs)

    # the look-ahead without and with h_omega
    layers = {"actor": "net", "trunk": ("net.0", "net.2"), "first-layer": "net.0"}[args.look_ahead]
    moved = [name for name in phi if name.startswith(layers)]
    old = {name: value.detach() for name, value in phi.items()}
    old |= {name: old[name] - lr * rl_grad[name] for name in moved}
    new = old | {name: old[name] - lr * aux_grad[name] for name in moved}

    # autograd computes dL_meta / dphi_new and then -eta d^2 h_omega / dphi domega; omega enters only through
    # the gradient of h_omega, so neither the critic nor L_RL is differentiated twice
    loss = meta_loss(new, old, actor, critic, val_obs, val_noise, alpha)
    omega_grad = gradient(loss, omega)

    phi_grad = {name: rl_grad[name] + aux_grad[name].detach() for name in phi}
    log = {
        "losses/actor_loss": actor_loss,
        "losses/aux_loss": aux_loss,
        "losses/meta_loss": loss,
        "losses/aux_grad_norm": torch.stack([g.norm() for g in aux_grad.values()]).norm(),
        "losses/meta_grad_norm": torch.stack([g.norm() for g in omega_grad.values()]).norm(),
    }
    return phi_grad, omega_grad, log_prob.detach(), {name: value.detach() for name, value in log.items()}


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
    inputs = actor.net[-1].in_features + (obs_dim + action_dim if args.meta_obs_action else 0)
    meta_critic = MetaCritic(inputs).to(device)
    adam = {"weight_decay": args.meta_weight_decay, "fused": True}
    meta_optimizer = torch.optim.Adam(meta_critic.parameters(), args.meta_lr, **adam)
    parts |= {"meta_critic": meta_critic, "meta_optimizer": meta_optimizer}

    run_dir, writer, last_step, evaluations = start_run(args, parts, generators)

    update_critic, update_actor = critic_gradient, meta_critic_gradients
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
            batch = buffer.sample(args.batch_size)
            alpha = log_alpha.exp().detach()
            critic_grad, log = update_critic(critic, target_critic, actor, batch, alpha, args)
            step(critic_optimizer, critic, critic_grad)
            noise = torch.randn_like(batch[1])
            val_obs, val_noise = buffer.sample(args.batch_size)[0], torch.randn_like(noise)
            phi_grad, omega_grad, log_prob, actor_log = update_actor(
                actor, critic, meta_critic, batch[:2], noise, val_obs, val_noise, alpha, args
            )
            step(meta_optimizer, meta_critic, omega_grad)
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
