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

    def __init__(self, algorithm: str, compiled=lambda function: function, obs_dim=11, action_dim=3):
        self.script = import_module(f"gild_{algorithm}")
        self.algorithm, self.args = algorithm, self.script.Args(cuda=False)
        box = gym.spaces.Box(-1.0, 1.0, (action_dim,))
        self.actor = self.script.Actor(obs_dim, box)
        self.critic = self.script.Critic(obs_dim, action_dim)
        self.gild = self.script.GILD(obs_dim, action_dim)
        self.target_actor, self.target_critic = deepcopy(self.actor), deepcopy(self.critic)
        self.networks = (self.actor, self.critic, self.gild)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), 3e-4, fused=True) for network in self.networks
        ]
        functions = self.script.critic_gradients, self.script.actor_gradients, self.script.gild_gradients
        self.update_critic, self.update_actor, self.update_gild = map(compiled, functions)
        self.buffer = self.script.ReplayBuffer(10_000, obs_dim, action_dim, torch.device("cpu"))
        rng = np.random.default_rng(0)
        for _ in range(10_000):
            obs, next_obs = rng.normal(size=(2, obs_dim))
            self.buffer.add(obs, rng.uniform(-1, 1, action_dim), rng.normal(), next_obs, False)

    def step_critic(self):
        """Returns the batch and Q."""
        args, batch = self.args, self.buffer.sample(self.args.batch_size)
        actor = self.actor if self.algorithm == "sac" else self.target_actor
        more = (args.policy_noise, args.noise_clip) if self.algorithm == "td3" else ()
        more = (torch.tensor(0.2),) if self.algorithm == "sac" else more
        inputs = self.critic, self.target_critic, actor, batch, args.gamma, *more
        grad, _, q, *_ = self.update_critic(*inputs)
        self.script.step(self.optimizers[1], self.critic, grad)
        return batch, q

    def step_actor(self, batch, q, with_gild: bool):
        args, script = self.args, self.script
        noise = torch.randn_like(batch[1]) if self.algorithm == "sac" else None
        if with_gild:
            demo, val_obs = self.buffer.sample(args.batch_size)[:2], self.buffer.sample(args.batch_size)[0]
            inputs = [self.actor, self.critic, self.gild, batch[0], demo, val_obs]
            if self.algorithm == "sac":
                inputs += [(noise, torch.randn_like(noise), torch.randn_like(noise)), torch.tensor(0.2)]
            inputs += [script.rl_weight(q, args.il_beta), args.learning_rate, args.meta_loss]
            phi_grad, omega_grad, *_ = self.update_gild(*inputs)
            script.step(self.optimizers[2], self.gild, omega_grad)
        else:
            inputs = [noise, torch.tensor(0.2)] if self.algorithm == "sac" else []
            phi_grad, *_ = self.update_actor(self.actor, self.critic, batch[0], *inputs)
        script.step(self.optimizers[0], self.actor, phi_grad)
        with torch.no_grad():
            pairs = [(self.target_critic, self.critic), (self.target_actor, self.actor)]
            for target, online in pairs[: 1 if self.algorithm == "sac" else 2]:
                torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), args.tau)

    def iterate(self, number: int, with_gild: bool):
        batch, q = self.step_critic()
        if number % getattr(self.args, "policy_frequency", 1) == 0:
            self.step_actor(batch, q, with_gild)


def checkpoint_seconds(learner: Learner, obs_dim: int, action_dim: int) -> float:
    """Seconds to write a checkpoint with a full buffer: the median of three."""
    script = learner.script
    buffer = script.ReplayBuffer(1_000_000, obs_dim, action_dim, torch.device("cpu"))
    buffer.rows.normal_()
    buffer.added = len(buffer.rows)
    learners = {"actor": learner.actor, "critic": learner.critic, "optimizer": learner.optimizers[0]}
    seconds = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for name in ("args.json", "evaluations.csv"):
            (Path(folder) / name).touch()
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
        vanilla, with_gild = (times[algorithm, kind][1:] for kind in (False, True))  # the first warms up
        ratio = statistics.median(g / v for g, v in zip(with_gild, vanilla, strict=True))
        milliseconds = f"{statistics.median(vanilla):.2f} | {statistics.median(with_gild):.2f}"
        print(f"| {algorithm.upper()} | {milliseconds} | {ratio:.2f} | {0.99 + 0.01 * ratio:.3f} |")
    # the learner's part of the time between two checkpoints, by default
    between = 50_000 * statistics.median(times["td3", False]) / 1e3
    for task, dims in {"Hopper": (11, 3), "Ant": (111, 8)}.items():
        seconds = checkpoint_seconds(learners["td3"], *dims)
        share = f"{seconds / between:.2%} of the {between:.0f} s between two"
        print(f"{task}: a checkpoint takes {seconds:.2f} s, {share}")


if __name__ == "__main__":
    main(tyro.cli(Args))
