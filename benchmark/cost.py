"""What GILD and checkpoints cost, measured side by side.

    python -m benchmark.cost

The three learners take turns, 50 iterations each, on Hopper's shapes; a number is the median over the rounds.
Then checkpoints with a full replay buffer of a million transitions are written, the largest that there are.
"""

import statistics
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro


@dataclass
class Args:
    rounds: int = 15  # how often the learners take turns
    iterations: int = 50  # learner iterations in a turn
    threads: int = 1  # CPU threads of PyTorch


class Learner:
    """One algorithm's networks on random data, and its iteration as the script's loop does it."""

    def __init__(self, algorithm: str, obs_dim: int = 11, action_dim: int = 3):
        self.script = import_module(f"gild_{algorithm}")
        self.algorithm, self.args = algorithm, self.script.Args(cuda=False)
        device, box = torch.device("cpu"), gym.spaces.Box(-1.0, 1.0, (action_dim,))
        self.actor = self.script.Actor(obs_dim, box)
        self.critic = self.script.Critic(obs_dim, action_dim)
        self.gild = self.script.GILD(obs_dim, action_dim)
        self.target_actor, self.target_critic = deepcopy(self.actor), deepcopy(self.critic)
        networks = (self.actor, self.critic, self.gild)
        self.optimizers = [torch.optim.Adam(network.parameters(), 3e-4, fused=True) for network in networks]
        self.buffer = self.script.ReplayBuffer(10_000, obs_dim, action_dim, device)
        rng = np.random.default_rng(0)
        for _ in range(10_000):
            obs, next_obs = rng.normal(size=(2, obs_dim))
            self.buffer.add(obs, rng.uniform(-1, 1, action_dim), rng.normal(), next_obs, False)

    def iterate(self, number: int, with_gild: bool):
        script, args, alpha = self.script, self.args, 0.2
        actor_optimizer, critic_optimizer, gild_optimizer = self.optimizers
        batch = self.buffer.sample(args.batch_size)
        critics = self.critic, self.target_critic
        if self.algorithm == "td3":
            noise = args.policy_noise, args.noise_clip
            loss, q, *_ = script.critic_loss(*critics, self.target_actor, batch, args.gamma, *noise)
        elif self.algorithm == "ddpg":
            loss, q = script.critic_loss(*critics, self.target_actor, batch, args.gamma)
        else:
            loss, q, _ = script.critic_loss(*critics, self.actor, batch, args.gamma, alpha)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        if number % getattr(args, "policy_frequency", 1):
            return
        sac = (torch.randn(3, *batch[1].shape), alpha) if self.algorithm == "sac" else ()
        if with_gild:
            demo, val_obs = self.buffer.sample(args.batch_size)[:2], self.buffer.sample(args.batch_size)[0]
            w_rl = script.rl_weight(q, args.il_beta)
            phi_grad, omega_grad, *_ = script.gild_gradients(
                *(self.actor, self.critic, self.gild, batch[0], demo, val_obs, *sac),
                *(w_rl, args.learning_rate, args.meta_loss),
            )
            script.step(gild_optimizer, self.gild, omega_grad)
        else:
            loss = script.rl_loss(self.actor, self.critic, batch[0], *(sac and (sac[0][0], alpha)))
            loss = loss[0] if self.algorithm == "sac" else loss
            phi_grad = script.gradient(loss, dict(self.actor.named_parameters()))
        script.step(actor_optimizer, self.actor, phi_grad)
        with torch.no_grad():
            for target, online in ((self.target_critic, self.critic), (self.target_actor, self.actor)):
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), args.tau)


def checkpoint_seconds(learner: Learner, obs_dim: int, action_dim: int) -> float:
    """Seconds to write a checkpoint with a full buffer: the median of three."""
    script = learner.script
    buffer = script.ReplayBuffer(1_000_000, obs_dim, action_dim, torch.device("cpu"))
    buffer.rows.normal_()
    buffer.added = len(buffer.rows)
    learners = {"actor": learner.actor, "critic": learner.critic, "optimizer": learner.optimizers[0]}
    seconds = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        (Path(folder) / "evaluations.csv").touch()
        for _ in range(3):
            start = time.perf_counter()
            script.save_checkpoint(Path(folder), 0, learners, [], buffer)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(args: Args):
    torch.set_num_threads(args.threads)
    learners = {algorithm: Learner(algorithm) for algorithm in ("ddpg", "td3", "sac")}
    times = {(algorithm, with_gild): [] for algorithm in learners for with_gild in (False, True)}
    for _ in range(args.rounds + 1):
        for (algorithm, with_gild), taken in times.items():
            start = time.perf_counter()
            for number in range(args.iterations):
                learners[algorithm].iterate(number, with_gild)
            taken.append((time.perf_counter() - start) / args.iterations * 1e3)
    print("| learner | vanilla, ms | with GILD, ms | ratio | a run with 1 % of GILD |")
    print("|---|---|---|---|---|")
    for algorithm in learners:
        vanilla, with_gild = (
            times[algorithm, kind][1:] for kind in (False, True)
        )  # the first round warms up
        ratio = statistics.median(g / v for g, v in zip(with_gild, vanilla, strict=True))
        milliseconds = f"{statistics.median(vanilla):.2f} | {statistics.median(with_gild):.2f}"
        print(f"| {algorithm.upper()} | {milliseconds} | {ratio:.2f} | {0.99 + 0.01 * ratio:.3f} |")
    between = (
        50_000 * statistics.median(times["td3", False]) / 1e3
    )  # the learner's part of the default frequency
    for task, dims in {"Hopper": (11, 3), "Ant": (111, 8)}.items():
        seconds = checkpoint_seconds(learners["td3"], *dims)
        share = f"{seconds / between:.2%} of the {between:.0f} s between two"
        print(f"{task}: a checkpoint takes {seconds:.2f} s, {share}")


if __name__ == "__main__":
    main(tyro.cli(Args))
