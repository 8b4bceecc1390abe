"""TD3+GILD with other weights, starts, releases and upper levels, for studies; the paper's is gild_td3.py.

With the default flags a run is gild_td3.py's, bit for bit, and what is the same is imported from there. Here
is what the flags change; w = min(1, beta / mean |Q|), and lambda is 1 until imitation is released:

    --rl-weight capped    one weight of RL everywhere: w L_RL + lambda L_IL in Eq. (6), w L_RL + lambda L_GILD
                          in Eq. (7), tanh(w (Q(phi') - Q(phi_hat))) in Eq. (8)
    --rl-weight ramped    the same, but w grows to that over the first 40,000 iterations, the time constant of
                          Q's level
    --clone-labels        half of the pairs that the actor imitates are states of D with the clone's action
    --release R           how lambda ends: at once after the warm start (drop), linearly to 0 over the run
                          (linear), by the training returns (returns), or never
    --release-bar X, --release-rate Y    by the training returns: every 1,000 steps lambda is multiplied by Y
                          if the last ten episodes have X times the clone's return, and else divided by it
    --omega O             the direction of omega's step: the meta-gradient (learned), its negative (flipped),
                          a random one of the same length (random), none (frozen)
    --gild-form F         f as a network, as a learned weight times the imitation error (weight), or as the
                          imitation error itself (error), which makes the run RL+IL
    --gild-fit F          where f is fitted to the imitation error at first: at the demonstrations, as in
                          gild_td3.py, or at differences a - a_d of every size (differences)
    --meta-critic q2      Q1 and Q2 learn from disjoint halves of D; Q1 trains the actor, Q2 judges in Eq. (8)

    python -m benchmark.gild_td3_variants --rl-weight capped --clone-steps 20000 --release returns
"""

import random
import time
from collections import deque
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

import gild_td3
from baselines.common import (
    DemonstrationBuffer,
    InputError,
    ReplayBuffer,
    evaluate,
    main,
    make_env,
    received_signals,
    save_checkpoint,
    save_evaluation,
    start_run,
    task_name,
)
from gild_td3 import (
    GILD,
    Actor,
    Critic,
    act,
    actor_gradient,
    clone,
    fit_imitation,
    gradient,
    il_loss,
    mlp,
    rl_loss,
    rl_weight,
    step,
    update_target,
)


@dataclass
class Args(gild_td3.Args):
    exp_name: str = Path(__file__).stem  # name of this experiment
    rl_weight: Literal["one", "capped", "ramped"] = "one"  # weight of L_RL in Eq. (7): 1, or w
    clone_labels: bool = False  # imitate the clone in states of D as well
    release: Literal["drop", "linear", "returns", "never"] = "drop"  # how the weight of L_GILD ends
    release_bar: float = 1.0  # by returns: share of the clone's return above which lambda falls
    release_rate: float = 0.97  # by returns: factor of lambda every 1,000 steps
    omega: Literal["learned", "frozen", "flipped", "random"] = "learned"  # direction of omega's step
    gild_form: Literal["network", "weight", "error"] = "network"  # what f is
    gild_fit: Literal["demonstrations", "differences"] = "demonstrations"  # where f's first fit is made
    meta_critic: Literal["q1", "q2"] = "q1"  # the critic in Eq. (8)

    def __post_init__(self):
        super().__post_init__()
        if self.clone_labels and self.clone_steps == 0:
            raise InputError("--clone-labels needs a clone: --clone-steps 20000")
        if self.meta_loss != "gain":
            raise InputError("--meta-loss intuitive is in gild_td3.py only")
        if self.meta_critic == "q2" and self.bf16:
            raise InputError("--meta-critic q2 --bf16: it is in float32 only")


class WeightedError(torch.nn.Module):
    """f = u(s_d, a_d) mean_j (a_j - a_d,j)^2: which demonstrations count. u has mean 1 over a batch."""

    def __init__(self, demonstrations: DemonstrationBuffer):
        super().__init__()
        obs = demonstrations.obs
        self.net = mlp(obs.shape[1] + demonstrations.actions.shape[1], 1)
        self.register_buffer("mean", obs.mean(0))
        self.register_buffer("std", obs.std(0).clamp(min=1e-3))

    def forward(self, demo_obs, demo_action, action):
        obs = ((demo_obs - self.mean) / self.std).clamp(-5, 5)
        weight = F.softplus(self.net(torch.cat([obs, demo_action], 1)))
        return weight / weight.mean() * (action - demo_action).pow(2).mean(1, keepdim=True)


class Error(torch.nn.Module):
    """f = mean_j (a_j - a_d,j)^2, without parameters: its mean is L_IL of Eq. (3)."""

    def forward(self, demo_obs, demo_action, action):
        return (action - demo_action).pow(2).mean(1, keepdim=True)


def fit_differences(gild, demonstrations, iterations=2_000, batch_size=256):
    """Fits f for differences a - a_d of every size up to 2, so that it has a slope close to a_d too.

    f sees the difference alone: s_d's weights are 0, a_d's are those of a with the sign changed, and these
    inputs keep them so. Returns the error of the last batch.
    """
    obs_dim, action_dim = demonstrations.obs.shape[1], demonstrations.actions.shape[1]
    weights, device = gild.net[0].weight.data, demonstrations.obs.device
    weights[:, :obs_dim] = 0
    weights[:, obs_dim:-action_dim] = -weights[:, -action_dim:]
    optimizer = torch.optim.Adam(gild.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    obs = torch.zeros(batch_size, obs_dim, device=device)
    for _ in range(iterations):
        size = 0.01 ** torch.rand(batch_size, 1, device=device)  # 0.01 to 1
        action = size * (2 * torch.rand(batch_size, action_dim, device=device) - 1)
        error = (2 * action).pow(2).mean(1, keepdim=True)
        loss = F.mse_loss(gild(obs, -action, action), error)
        step(optimizer, gild, gradient(loss, dict(gild.named_parameters())))
        schedule.step()
    return loss.item()


FITS = {"demonstrations": fit_imitation, "differences": fit_differences}


class Release:
    """lambda, the weight of imitation. By returns: down while recent episodes are as good as the clone's."""

    def __init__(self, args):
        self.args, self.value, self.bar = args, 1.0, []  # the returns of the episodes before the first update
        self.recent = deque(maxlen=10)

    def episode(self, global_step: int, episodic_return: float):
        episodes = self.bar if global_step <= self.args.learning_starts else self.recent
        episodes.append(float(episodic_return))

    def update(self, global_step: int):
        """To be called after every environment step."""
        args = self.args
        if args.release == "linear":
            self.value = 1 - global_step / args.total_timesteps
        if args.release == "returns" and global_step % 1_000 == 0 and len(self.recent) == self.recent.maxlen:
            good = np.mean(self.recent) >= args.release_bar * np.mean(self.bar)
            self.value = min(1.0, self.value * args.release_rate ** (1 if good else -1))
        if args.release == "drop":
            warm_start = round(args.ws_frac * args.total_timesteps)
            self.value = float(global_step - args.learning_starts < warm_start)

    def state_dict(self):
        return {"value": self.value, "bar": list(self.bar), "recent": list(self.recent)}

    def load_state_dict(self, state):
        self.value, self.bar = state["value"], state["bar"]
        self.recent.extend(state["recent"])


def sample_halves(buffer: ReplayBuffer, batch_size: int):
    """What buffer.sample draws, and whether each row is one of Q1's half of D, (N, 1): every second one."""
    filled = min(buffer.added, len(buffer.rows))
    index = torch.randint(filled, (batch_size,), device=buffer.rows.device)
    return buffer.rows[index].split(buffer.widths, dim=1), (index % 2 == 0).float()[:, None]


class GradientScale:
    """The running root mean square of omega's gradient, which stands for its unit in --gild-form weight."""

    def __init__(self):
        self.mean_square, self.rewarded = 0.0, False

    def state_dict(self):
        return vars(self).copy()

    def load_state_dict(self, state):
        vars(self).update(state)


def critic_gradient(critic, target_critic, target_actor, batch, own, args):
    """Eq. (5) as in gild_td3.py; with --meta-critic q2 each twin learns from its own half of the batch.

    `own` (N, 1) is 1 where Q1 may learn, 0 where Q2 may. Their target is their own half's too: twins that
    shared the smaller target would share their data.
    """
    if args.meta_critic == "q1":
        return gild_td3.critic_gradient(critic, target_critic, target_actor, batch, args)
    obs, action, reward, next_obs, terminated = batch
    with torch.no_grad():
        noise = (torch.randn_like(action) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_action = (target_actor(next_obs) + noise).clamp(-1, 1)
        targets = [reward + (1 - terminated) * args.gamma * q for q in target_critic(next_obs, next_action)]
    values, halves = critic(obs, action), (own, 1 - own)
    twins = zip(values, targets, halves, strict=True)
    loss = sum(((q - target).pow(2) * half).sum() / half.sum().clamp(min=1) for q, target, half in twins)
    q1, q2 = values
    log = {"losses/qf_loss": loss / 2, "losses/qf1_values": q1, "losses/qf2_values": q2}
    return gradient(loss, dict(critic.named_parameters())), {k: value.detach() for k, value in log.items()}


def ramp(iteration: int, args) -> float:
    """The factor of w: grows to 1 in the time constant with which Q, through its targets, finds its level."""
    share = iteration * args.tau * (1 - args.gamma) / args.policy_frequency
    return min(1.0, share) if args.rl_weight == "ramped" else 1.0


@torch.no_grad()
def with_labels(demo, obs, clone):
    """The first half of the pairs `demo`, and the second half of the states `obs` with the clone's action."""
    demo_obs, demo_action = (half[: len(obs) // 2] for half in demo)
    obs = obs[len(obs) // 2 :]
    return torch.cat([demo_obs, obs]), torch.cat([demo_action, clone(obs)])


def gild_gradients(actor, critic, gild, obs, demo, val_obs, lam, args, grown=1.0):
    """gild_td3.gild_gradients with w and lambda, `lam`; `grown` is w's factor. A frozen f's dict is empty."""
    phi, omega, lr = dict(actor.named_parameters()), dict(gild.named_parameters()), args.learning_rate
    demo_obs, demo_action = demo
    actor_loss, q = rl_loss(actor, critic, obs)
    rl_grad = gradient(actor_loss, phi)
    action = actor(demo_obs)
    w_rl = w_pseudo = grown * rl_weight(q, args.il_beta).clamp(max=1)
    if args.rl_weight == "one":
        w_rl, w_pseudo = torch.ones_like(w_rl), rl_weight(q, args.il_beta)
    imitation_loss = il_loss(action, demo_action)
    gild_loss = gild(demo_obs, demo_action, action).mean()
    log = {"losses/actor_loss": actor_loss, "losses/gild_loss": gild_loss, "charts/rl_weight": w_rl}
    log |= {"charts/imitation_distance": imitation_loss, "charts/lambda": lam}
    if args.omega == "frozen" or not omega:
        gild_grad = gradient(gild_loss, phi)
        phi_grad = {k: w_rl * rl_grad[k] + lam * gild_grad[k] for k in phi}
        return phi_grad, {}, {name: value.detach() for name, value in log.items()}

    # Eq. (6)
    il_grad = gradient(imitation_loss, phi, retain_graph=True)
    pseudo = {k: phi[k].detach() - lr * (w_pseudo * rl_grad[k] + lam * il_grad[k]) for k in phi}

    # Eq. (7)
    (action_grad,) = torch.autograd.grad(gild_loss, action, create_graph=True)
    gild_grad = gradient(action, phi, grad_outputs=action_grad, create_graph=True)
    look_ahead = {k: phi[k].detach() - lr * (w_rl * rl_grad[k] + lam * gild_grad[k]) for k in phi}

    # Eqs. (8) to (10)
    judge = critic.net1 if args.meta_critic == "q1" else critic.net2
    q = judge(torch.cat([val_obs, functional_call(actor, look_ahead, val_obs)], 1))
    with torch.no_grad():
        pseudo_q = judge(torch.cat([val_obs, functional_call(actor, pseudo, val_obs)], 1))
    loss = -torch.tanh(w_rl * (q - pseudo_q)).mean()
    omega_grad = gradient(loss, omega)

    phi_grad = {k: w_rl * rl_grad[k] + lam * gild_grad[k].detach() for k in phi}
    log["losses/meta_loss"] = loss
    log["losses/gild_action_grad_norm"] = len(action) * action_grad.norm(dim=1).mean()  # undoes 1/N
    log["losses/meta_grad_norm"] = norm(omega_grad)
    return phi_grad, omega_grad, {name: value.detach() for name, value in log.items()}


def norm(grad):
    return torch.stack([g.norm() for g in grad.values()]).norm()


def omega_direction(omega_grad, args):
    """What omega's step follows, by --omega."""
    if args.omega == "flipped":
        return {k: -g for k, g in omega_grad.items()}
    if args.omega == "random":
        noise = {k: torch.randn_like(g) for k, g in omega_grad.items()}
        length = norm(omega_grad) / norm(noise)
        return {k: length * g for k, g in noise.items()}
    return omega_grad


def scaled(omega_grad, scale: GradientScale):
    """The gradient divided by its running RMS, all zeros before the first reward: Q is noise until then."""
    if not scale.rewarded:
        return {k: torch.zeros_like(g) for k, g in omega_grad.items()}
    square = norm(omega_grad).item() ** 2
    scale.mean_square = 0.99 * scale.mean_square + 0.01 * square if scale.mean_square else square
    return {k: g / (scale.mean_square**0.5 + 1e-12) for k, g in omega_grad.items()}


def train(args: Args) -> Path:
    """Runs the training, or with args.resume the rest of it. Returns the run's folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    env = gym.wrappers.RecordEpisodeStatistics(make_env(args, training=True), stats_key="run")
    eval_env = make_env(args, training=False)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    shipped = Path(__file__).parents[1] / "demos" / f"{task_name(args.env_id)}-td3.npz"
    demonstrations = DemonstrationBuffer(args.demo_path or shipped, args.env_id, env, device)

    rng = np.random.default_rng(args.seed + 1_000)  # not the task's seed: actions could equal its noise
    env.action_space.seed(args.seed + 2_000)
    obs, _ = env.reset(seed=args.seed)
    generators = [env.unwrapped.np_random, env.action_space.np_random, rng]
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    actor = Actor(obs_dim, action_dim).to(device)
    critic = Critic(obs_dim, action_dim, args.critic_norm).to(device)
    target_actor, target_critic, cloned = deepcopy(actor), deepcopy(critic), deepcopy(actor)
    actor_optimizer = torch.optim.Adam(actor.parameters(), args.learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.learning_rate, fused=True)
    parts = {"actor": actor, "target_actor": target_actor, "actor_optimizer": actor_optimizer}
    parts |= {"critic": critic, "target_critic": target_critic, "critic_optimizer": critic_optimizer}
    parts |= {"clone": cloned, "buffer": buffer}
    parts |= {"release": (release := Release(args)), "scale": (scale := GradientScale())}
    forms = {"network": lambda: GILD(obs_dim, action_dim), "weight": lambda: WeightedError(demonstrations)}
    gild = forms.get(args.gild_form, Error)().to(device)
    learned = args.omega != "frozen" and args.gild_form != "error"
    if args.gild_form != "error":
        adam = {"eps": args.gild_eps, "weight_decay": args.gild_weight_decay, "fused": True}
        gild_optimizer = torch.optim.Adam(gild.parameters(), args.gild_lr, **adam)
        parts |= {"gild": gild, "gild_optimizer": gild_optimizer}

    run_dir, writer, last_step, evaluations = start_run(args, parts, generators)
    if args.gild_form == "network" and args.gild_init == "imitation" and last_step == 0:
        writer.add_scalar("losses/gild_fit", FITS[args.gild_fit](gild, demonstrations), 0)

    updates = critic_gradient, actor_gradient, gild_gradients
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # compile the gradients with the losses
        torch._inductor.config.fallback_random = True  # the random numbers of a run without --compile
        updates = map(torch.compile, updates)
    update_critic, update_actor, update_gild = updates

    def save_policy(global_step):
        returns = evaluate(act, actor, eval_env, args.eval_episodes, seed=args.seed + 100)
        policy = {"actor": actor.state_dict(), "script": "benchmark.gild_td3_variants"}
        save_evaluation(run_dir, writer, args, global_step, returns, evaluations, policy)

    if args.clone_steps > 0 and last_step == 0:
        clone(actor, demonstrations, args)
        target_actor.load_state_dict(actor.state_dict())
        cloned.load_state_dict(actor.state_dict())
        evaluations[1:] = []  # of a run killed before its first checkpoint
        save_policy(0)

    ended = last_step > 0  # a resumed run starts a new episode
    last_checkpoint, start_time, actor_log = last_step, time.time(), {}
    for global_step in tqdm(range(last_step + 1, args.total_timesteps + 1), unit=" steps", disable=None):
        # ALGO LOGIC: act
        if ended:
            obs, _ = env.reset()
        if global_step <= args.learning_starts and args.clone_steps == 0:
            action = env.action_space.sample()
        else:
            noise = rng.normal(0, args.exploration_noise, action_dim)
            action = (act(actor, obs) + noise).clip(-1, 1).astype(np.float32)
        next_obs, reward, terminated, truncated, info = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)  # not `truncated`: bootstrap at the time limit
        scale.rewarded = scale.rewarded or reward != 0
        obs, ended = next_obs, terminated or truncated
        if ended:
            release.episode(global_step, info["run"]["r"])
            writer.add_scalar("charts/episodic_return", info["run"]["r"], global_step)
            writer.add_scalar("charts/episodic_length", info["run"]["l"], global_step)

        # ALGO LOGIC: learn
        iteration = global_step - args.learning_starts
        if iteration > 0:
            batch, own = sample_halves(buffer, args.batch_size)
            critic_grad, critic_log = update_critic(critic, target_critic, target_actor, batch, own, args)
            step(critic_optimizer, critic, critic_grad)

            if iteration % args.policy_frequency == 0:
                if release.value > 0:
                    demo = demonstrations.sample(args.batch_size)
                    if args.clone_labels:
                        demo = with_labels(demo, batch[0], cloned)
                    val_obs = buffer.sample(args.batch_size)[0]
                    lam = torch.tensor(release.value, device=device)
                    grown = torch.tensor(ramp(iteration, args), device=device)
                    phi_grad, omega_grad, actor_log = update_gild(
                        actor, critic, gild, batch[0], demo, val_obs, lam, args, grown
                    )
                    if learned:
                        omega_grad = omega_direction(omega_grad, args)
                        if args.gild_form == "weight":
                            omega_grad = scaled(omega_grad, scale)
                        step(gild_optimizer, gild, omega_grad)  # Eq. (11)
                else:
                    phi_grad, actor_log = update_actor(actor, critic, batch[0])
                step(actor_optimizer, actor, phi_grad)
                update_target(target_critic, critic, args.tau)
                update_target(target_actor, actor, args.tau)

            if iteration % 100 == 0:
                for name, value in (critic_log | actor_log).items():
                    writer.add_scalar(name, value.mean().item(), global_step)
                sps = (global_step - last_step) / (time.time() - start_time)
                writer.add_scalar("charts/SPS", int(sps), global_step)
        release.update(global_step)

        if global_step % args.eval_frequency == 0 or global_step == args.total_timesteps:
            save_policy(global_step)
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
