"""What GILD and checkpoints cost, measured side by side.

    python -m benchmark.cost

The three learners take turns of 50 iterations on Hopper's shapes, on the CPU, and on the GPU if there is one;
each number is the median over the rounds. Then checkpoints with a full replay buffer of a million
transitions are written.
"""

import statistics
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import tyro

ALGORITHMS = ("ddpg", "td3", "sac")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@dataclass
class Args:
    rounds: int = 15  # how often each learner takes a turn
    iterations: int = 50  # learner iterations per turn
    threads: int = 1  # CPU threads of PyTorch


class Learner:
    """One algorithm's networks and random data, updated by the functions of its gild script.

    `compile` is torch.compile, or None; `changes` are changes to the script's Args.
    """

    def __init__(
        self, algorithm: str, device="cpu", compile=None, obs_dim=11, action_dim=3, capacity=10_000, **changes
    ):
        self.script = script = import_module(f"gild_{algorithm}")
        self.sac, self.args = algorithm == "sac", script.Args(cuda=False, **changes)
        self.actor, self.critic = script.Actor(obs_dim, action_dim), script.Critic(obs_dim, action_dim)
        self.gild, self.target_critic = script.GILD(obs_dim, action_dim), deepcopy(self.critic)
        self.networks = {"actor": self.actor, "critic": self.critic, "gild": self.gild}
        self.networks["target_critic"] = self.target_critic
        if not self.sac:
            self.networks["target_actor"] = self.target_actor = deepcopy(self.actor)
        for network in self.networks.values():
            network.to(device)
        adam = partial(torch.optim.Adam, lr=self.args.learning_rate, fused=True)
        self.optimizers = {
            name: adam(self.networks[name].parameters()) for name in ("actor", "critic", "gild")
        }
        self.buffer = script.ReplayBuffer(capacity, obs_dim, action_dim, torch.device(device))
        self.buffer.rows.normal_()
        _, action, _, _, terminated = self.buffer.rows.split(self.buffer.widths, dim=1)
        action.uniform_(-1, 1)
        terminated.bernoulli_(0.1)
        self.buffer.added = capacity
        updates = script.critic_gradient, script.actor_gradient, script.gild_gradients
        if compile:
            torch._dynamo.config.trace_autograd_ops = True  # as the scripts do
            torch._inductor.config.fallback_random = True
            updates = map(compile, updates)
        self.update_critic, self.update_actor, self.update_gild = updates
        self.alpha, self.log = [torch.tensor(0.2, device=device)] if self.sac else [], {}

    def step(self, name: str, grad: dict):
        self.script.step(self.optimizers[name], self.networks[name], grad)

    def step_critic(self):
        """Returns the batch."""
        batch = self.buffer.sample(self.args.batch_size)
        policy = self.actor if self.sac else self.target_actor
        inputs = self.critic, self.target_critic, policy, batch, *self.alpha, self.args
        grad, log = self.update_critic(*inputs)
        self.step("critic", grad)
        self.log |= log
        return batch

    def step_actor(self, batch, with_gild: bool):
        obs, action, *_ = batch
        if with_gild:
            demo = self.buffer.sample(self.args.batch_size)[:2]
            val_obs = self.buffer.sample(self.args.batch_size)[0]
            inputs = [self.actor, self.critic, self.gild, obs, demo, val_obs]
            inputs += [torch.randn(3, *action.shape, device=action.device)] if self.sac else []
            phi_grad, omega_grad, *_, log = self.update_gild(*inputs, *self.alpha, self.args)
            self.step("gild", omega_grad)
        else:
            noise = [torch.randn_like(action)] if self.sac else []
            phi_grad, *_, log = self.update_actor(self.actor, self.critic, obs, *noise, *self.alpha)
        self.step("actor", phi_grad)
        self.log |= log
        self.script.update_target(self.target_critic, self.critic, self.args.tau)
        if not self.sac:
            self.script.update_target(self.target_actor, self.actor, self.args.tau)

    def iterate(self, number: int, with_gild: bool):
        batch = self.step_critic()
        if number % getattr(self.args, "policy_frequency", 1) == 0:
            self.step_actor(batch, with_gild)


def checkpoint_seconds(obs_dim: int, action_dim: int) -> float:
    """Seconds to write a checkpoint of TD3+GILD with a full buffer: the median of three."""
    learner = Learner("td3", obs_dim=obs_dim, action_dim=action_dim, capacity=1_000_000)
    optimizers = {f"{name}_optimizer": optimizer for name, optimizer in learner.optimizers.items()}
    parts = {**learner.networks, **optimizers, "buffer": learner.buffer}
    seconds = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for _ in range(3):
            start = time.perf_counter()
            learner.script.save_checkpoint(Path(folder, "checkpoint.pt"), parts, [], 0, [])
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def wait():
    """Until the GPU is done, so that the clock has its work too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(args: Args):
    torch.set_num_threads(args.threads)
    learners = {(name, device): Learner(name, device) for device in DEVICES for name in ALGORITHMS}
    times = {(learner, with_gild): [] for learner in learners for with_gild in (False, True)}
    for _ in range(args.rounds + 1):
        for (learner, with_gild), taken in times.items():
            start = time.perf_counter()
            for number in range(args.iterations):
                learners[learner].iterate(number, with_gild)
            wait()
            taken.append((time.perf_counter() - start) / args.iterations * 1e3)
    print("| learner | vanilla, ms | with GILD, ms | ratio | a run with 1 % of GILD (vanilla: 1) |")
    print("|---|---|---|---|---|")
    for learner in learners:
        vanilla, with_gild = (times[learner, kind][1:] for kind in (False, True))  # the first warms up
        ratio = statistics.median(g / v for g, v in zip(with_gild, vanilla, strict=True))
        medians = f"{statistics.median(vanilla):.2f} | {statistics.median(with_gild):.2f}"
        name = f"{learner[0].upper()}, {learner[1]}"
        print(f"| {name} | {medians} | {ratio:.2f} | {0.99 + 0.01 * ratio:.3f} |")
    between = 50_000 * statistics.median(times[("td3", "cpu"), False][1:]) / 1e3  # the learner's part of it
    for task, dims in {"Hopper": (11, 3), "Ant": (111, 8)}.items():
        seconds = checkpoint_seconds(*dims)
        share = f"{seconds / between:.2%} of the {between:.0f} s of learning between two"
        print(f"{task}: a checkpoint takes {seconds:.2f} s, {share}")


if __name__ == "__main__":
    main(tyro.cli(Args))
