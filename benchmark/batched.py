"""Trains the TD3 runs of a study all at once, on one GPU, and writes the results that a sweep would.

    python -m benchmark.batched benchmark/studies/headline.toml

One network of this size leaves a GPU idle. Here the networks, Adam's moments and the replay buffers of all
runs are stacked; torch.vmap makes an update of one run an update of all, and a CUDA graph replays it. The
losses are gild_td3.py's, and a test compares the updates with those of each run's own script. Environments
step in processes of their own while the GPU learns, so that an update cannot draw the transition that is
being made; further processes evaluate.

A run starts with its script's first weights, but draws other random numbers. It can be one of baselines.td3,
baselines.td3_il, gild_td3, and benchmark.gild_td3_variants where f is a network or an error. Until a run has
its result, runs/STUDY-RUN.csv has its evaluations. There are no checkpoints: a study that was stopped begins
again with the runs that have no result.
"""

import csv
import io
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.func import functional_call, grad, vjp

from baselines.common import SPARSE_THRESHOLDS, DemonstrationBuffer, make_env, task_name
from benchmark.gild_td3_variants import FITS, Release
from benchmark.gild_td3_variants import Args as Variant
from benchmark.sweep import COLUMNS, RESULTS, ROOT, Run, check_results, load_study, result, runs_of, write
from evaluate import InputError, command_line
from gild_td3 import GILD, Actor, Critic, act, critic_loss, il_loss, rl_loss, rl_weight

SCRIPTS = "baselines.td3", "baselines.td3_il", "gild_td3", "benchmark.gild_td3_variants"
# arguments in which the runs of a batch may differ
OWN = """exp_name seed env_id il_beta ws_frac gild_init gild_fit rl_weight release release_bar release_rate
omega gild_form"""
LEARNED, FROZEN, NO_F = range(3)  # kinds of run, by the f that the actor follows during the warm start
FORK = multiprocessing.get_context("fork")
NAN = float("nan")


@dataclass
class Args:
    study: tyro.conf.Positional[Path]  # a TOML file
    processes: int = max(os.cpu_count() - 1, 2)  # for environments and evaluations
    compile: bool = True  # torch.compile the updates
    results: Path = RESULTS  # folder of the results


# RUNS


@dataclass
class Learner:
    """A run, and its script's arguments as gild_td3_variants.py would have them."""

    run: Run
    args: Variant

    @property
    def is_il(self) -> bool:
        return self.run.script == "baselines.td3_il"

    @property
    def gild_iterations(self) -> float:
        drops = self.args.release == "drop"
        return round(self.args.ws_frac * self.args.total_timesteps) if drops else float("inf")

    @property
    def kind(self) -> int:
        if self.args.gild_form == "error" or self.gild_iterations == 0:
            return NO_F
        return FROZEN if self.args.omega == "frozen" else LEARNED


def learner(run: Run) -> Learner:
    if run.script not in SCRIPTS:
        raise InputError(f"{run.script} cannot be part of a batch, only {', '.join(SCRIPTS)}")
    args = Variant(**{key: run.args[key] for key in run.args if key in Variant.__dataclass_fields__})
    if run.script == "baselines.td3":
        args = replace(args, ws_frac=0.0)
    if run.script == "baselines.td3_il":
        args = replace(args, gild_form="error", omega="frozen", release="never")
    if args.gild_lr == 0:
        args = replace(args, gild_lr=Variant.gild_lr, omega="frozen")
    beyond = args.gild_form == "weight", args.meta_critic != "q1", args.meta_loss != "gain", args.demo_path
    beyond += args.gild_weight_decay, args.rl_weight == "ramped", args.clone_labels
    if any(beyond):
        raise InputError("it has flags that batches do not know")
    if args.total_timesteps > args.buffer_size:
        raise InputError(f"--total-timesteps {args.total_timesteps} exceeds --buffer-size {args.buffer_size}")
    return Learner(run, args)


def batches(runs: list[Run]) -> list[list[Learner]]:
    """Groups the runs into batches with the same shapes and, except for OWN, the same arguments.

    Runs with a learned f come first and those without an f last, each kind by the length of its warm start,
    longest first: so the runs that follow a learned f are always neighbours, and those with a frozen one too.
    Runs that batches do not know are left out, and said to be.
    """
    found = defaultdict(list)
    for run in runs:
        try:
            one = learner(run)
        except InputError as error:
            print(f"{run.name} is left out: {error}")
            continue
        env = make_env(one.args, training=True)
        alike = {key: value for key, value in asdict(one.args).items() if key not in OWN.split()}
        found[str((env.observation_space.shape, env.action_space.shape, alike))].append(one)
        env.close()
    return [sorted(batch, key=lambda one: (one.kind, -one.gild_iterations)) for batch in found.values()]


def demonstrations_of(args) -> DemonstrationBuffer:
    env, shipped = make_env(args, training=True), ROOT / "demos" / f"{task_name(args.env_id)}-td3.npz"
    return DemonstrationBuffer(args.demo_path or shipped, args.env_id, env, torch.device("cpu"))


def first_weights(args, fit="") -> dict[str, dict[str, np.ndarray]]:
    """A run's networks at its start, as its script makes them; `fit` is its --gild-fit, if it fits f."""
    demonstrations = demonstrations_of(args)
    shape = demonstrations.obs.shape[1], demonstrations.actions.shape[1]
    torch.manual_seed(args.seed)
    nets = {"actor": Actor(*shape)}  # in the script's order
    nets |= {"critic": Critic(*shape, args.critic_norm), "gild": GILD(*shape)}
    if fit:
        FITS[fit](nets["gild"], demonstrations)
    return {name: {k: p.numpy() for k, p in net.state_dict().items()} for name, net in nets.items()}


def fit_of(one: Learner) -> str:
    return "" if one.kind == NO_F or one.args.gild_init == "random" else one.args.gild_fit


# UPDATES: gradients of one run, as functions of its parameters, which are dicts by name


class Bound:
    """A network with these parameters, to be called as gild_td3.py's losses do."""

    def __init__(self, network: torch.nn.Module, parameters: dict):
        self.network, self.parameters = network, parameters

    def __call__(self, *inputs):
        return functional_call(self.network, self.parameters, inputs)

    def q1(self, obs, action):
        net1 = {key[5:]: value for key, value in self.parameters.items() if key.startswith("net1.")}
        return functional_call(self.network.net1, net1, torch.cat([obs, action], 1))


def gradients(args, obs_dim: int, action_dim: int, device_type: str):
    """Functions for the gradients of the critic, the actor, L_IL, L_GILD and the meta-loss."""
    with torch.device("meta"):  # only their structure is used
        shape = obs_dim, action_dim
        actor, critic, gild = Actor(*shape), Critic(*shape, args.critic_norm), GILD(*shape)
    autocast = partial(torch.autocast, device_type, torch.bfloat16, enabled=args.bf16, cache_enabled=False)

    def critic_gradient(theta, target_theta, target_phi, batch):
        """The gradient of Eq. (5), and the mean of Q1."""

        def loss(theta):
            targets = Bound(critic, target_theta), Bound(actor, target_phi)
            value, q1, _ = critic_loss(Bound(critic, theta), *targets, batch, args)
            return value, q1.mean()

        with autocast():
            return grad(loss, has_aux=True)(theta)

    def il_gradient(phi, demo):
        """The gradient of L_IL, and its value."""

        def imitation(phi):
            error = il_loss(Bound(actor, phi)(demo[0]), demo[1])
            return error, error

        return grad(imitation, has_aux=True)(phi)

    def actor_gradient(phi, theta, obs, demo, beta, cap, plain, by_error, lam):
        """w dL_RL + lambda dL_IL, the latter only with `by_error`; w dL_RL; w; Eq. (6)'s direction; L_IL.

        w is min(cap, beta / mean |Q|), but 1 if `plain` or without imitation.
        """

        rl = lambda phi: rl_loss(Bound(actor, phi), Bound(critic, theta), obs)  # noqa: E731
        rl_grad, q = grad(rl, has_aux=True)(phi)
        il_grad, error = il_gradient(phi, demo)
        w_pseudo = torch.minimum(rl_weight(q, beta), cap)
        w = torch.where(plain | (lam == 0), torch.ones_like(w_pseudo), w_pseudo)
        pseudo = {k: w_pseudo * rl_grad[k] + lam * il_grad[k] for k in phi}
        w_rl_grad = {k: w * rl_grad[k] for k in phi}
        return {k: w_rl_grad[k] + by_error * lam * il_grad[k] for k in phi}, w_rl_grad, w, pseudo, error

    def gild_gradient(phi, omega, demo):
        """The gradient of L_GILD w.r.t. phi, its value, and the mean slope of f in the action."""

        def objective(action):
            value = Bound(gild, omega)(*demo, action).mean()
            return value, value

        action, pull_back = vjp(lambda phi: Bound(actor, phi)(demo[0]), phi)
        action_grad, value = grad(objective, has_aux=True)(action)
        return pull_back(action_grad)[0], value, len(action) * action_grad.norm(dim=1).mean()

    def meta_gradient(phi, omega, theta, w_rl_grad, pseudo, demo, val_obs, w, lam):
        """Eqs. (6) to (10): the gradient of L_meta w.r.t. omega, and what gild_gradient returns."""
        lr, q1 = args.learning_rate, Bound(critic, theta).q1
        pseudo_q = q1(val_obs, Bound(actor, {k: phi[k] - lr * pseudo[k] for k in phi})(val_obs))

        def meta_loss(omega):
            gild_grad, *more = gild_gradient(phi, omega, demo)
            look_ahead = {k: phi[k] - lr * (w_rl_grad[k] + lam * gild_grad[k]) for k in phi}
            gain = w * (q1(val_obs, Bound(actor, look_ahead)(val_obs)) - pseudo_q)
            return -torch.tanh(gain).mean(), (gild_grad, *more)

        return grad(meta_loss, has_aux=True)(omega)

    return critic_gradient, actor_gradient, il_gradient, gild_gradient, meta_gradient


def per_run(numbers, like):
    """Reshapes numbers (runs,) so that they broadcast over a tensor (runs, ...)."""
    return numbers.view(-1, *[1] * (like.dim() - 1))


class Batch:
    """All that the runs of a batch learn with; every tensor's first dimension is the run."""

    def __init__(self, learners: list[Learner], weights: list, demos: list[tuple], device, compile: bool):
        self.args, self.device = learners[0].args, device
        self.nets = {
            name: {k: self.tensor(np.stack([start[name][k] for start in weights])) for k in net}
            for name, net in weights[0].items()
        }
        adam = {"lr": self.args.learning_rate, "fused": True, "capturable": device.type == "cuda"}
        gild_adam = {"lr": self.args.gild_lr, "eps": self.args.gild_eps}
        self.optimizers = {
            name: torch.optim.Adam(net.values(), **adam | (gild_adam if name == "gild" else {}))
            for name, net in self.nets.items()
        }
        for name, optimizer in self.optimizers.items():  # a step of length 0 makes its state
            self.step(name, {k: torch.zeros_like(p) for k, p in self.nets[name].items()})
            self.forget(optimizer)
        self.reset_targets()

        obs_dim, action_dim = demos[0][0].shape[1], demos[0][1].shape[1]
        self.widths = obs_dim, action_dim, 1, obs_dim, 1
        self.rows = torch.zeros(len(learners), self.args.total_timesteps, sum(self.widths), device=device)
        self.added = torch.zeros((), dtype=torch.int64, device=device)
        self.new_row = torch.zeros_like(self.rows[:, 0])
        self.obs = torch.zeros_like(self.rows[:, 0, :obs_dim])
        self.action = torch.zeros_like(self.rows[:, 0, :action_dim])
        self.demo_count = self.tensor([[len(actions)] for _, actions in demos])
        self.demos = [
            torch.nn.utils.rnn.pad_sequence(side, True).to(device) for side in zip(*demos, strict=True)
        ]

        self.beta = self.tensor([one.args.il_beta for one in learners])
        self.cap = self.tensor([1.0 if one.args.rl_weight == "capped" else np.inf for one in learners])
        self.plain = self.tensor([one.args.rl_weight == "one" and not one.is_il for one in learners])
        self.by_error = self.tensor([float(one.args.gild_form == "error") for one in learners])
        self.sign = self.tensor([-1.0 if one.args.omega == "flipped" else 1.0 for one in learners])
        self.random = self.tensor([one.args.omega == "random" for one in learners])
        self.any_random = any(one.args.omega == "random" for one in learners)
        self.lam = torch.zeros_like(self.beta)
        self.log = {
            name: torch.full_like(self.beta, NAN) for name in ("q_mean", "error", "f_mean", "f_slope")
        }
        with torch.device("meta"):
            self.actor = Actor(obs_dim, action_dim)
        functions = gradients(self.args, obs_dim, action_dim, device.type)
        functions = [torch.vmap(function, randomness="different") for function in functions]
        if compile:
            torch._dynamo.config.recompile_limit = 100  # functions of vmap share their code, so all count
            functions = [torch.compile(function, dynamic=False) for function in functions]
        self.critic_gradient, self.actor_gradient, self.il_gradient, *functions = functions
        self.gild_gradient, self.meta_gradient = functions

    def forget(self, optimizer):
        """Sets its moments back to 0."""
        for moments in optimizer.state.values():
            for value in moments.values():
                value.zero_()

    def tensor(self, values):
        return torch.as_tensor(values, device=self.device)

    def reset_targets(self):
        for name in ("actor", "critic"):
            self.nets[f"target_{name}"] = {k: p.clone() for k, p in self.nets[name].items()}

    def pick(self, rows, count):
        """A minibatch of rows (runs, rows, width) for each run, from the first `count` of its rows."""
        place = torch.rand(len(rows[0]), self.args.batch_size, 1, dtype=torch.float64, device=self.device)
        index = (place * count).long()
        return [side.gather(1, index.expand(-1, -1, side.shape[2])) for side in rows]

    def sample(self):
        (rows,) = self.pick([self.rows], self.added)
        return rows.split(self.widths, dim=2)

    def sample_demo(self):
        return self.pick(self.demos, self.demo_count[:, :, None])

    def step(self, name: str, gradient: dict):
        for key, parameter in self.nets[name].items():
            parameter.grad = gradient[key]
        self.optimizers[name].step()

    def learn(self, actor_too: bool, learned: int, frozen: tuple[int, int]):
        """One iteration. The first `learned` runs follow and train f, the range `frozen` only follows it."""
        nets, args = self.nets, self.args
        batch = self.sample()
        targets = nets["target_critic"], nets["target_actor"]
        critic_grad, q_mean = self.critic_gradient(nets["critic"], *targets, batch)
        self.step("critic", critic_grad)
        self.log["q_mean"].copy_(q_mean)
        if actor_too:
            self.update_actor(batch[0], self.sample_demo(), self.sample()[0], learned, frozen)
            for name in ("actor", "critic"):
                targets, sources = nets[f"target_{name}"].values(), nets[name].values()
                torch._foreach_lerp_(list(targets), list(sources), args.tau)

    def update_actor(self, obs, demo, val_obs, learned: int, frozen: tuple[int, int]):
        phi, omega, theta = self.nets["actor"], self.nets["gild"], self.nets["critic"]
        weights = self.beta, self.cap, self.plain, self.by_error, self.lam
        phi_grad, w_rl_grad, w, pseudo, error = self.actor_gradient(phi, theta, obs, demo, *weights)
        self.log["error"].copy_(error)

        def part(runs, *trees):
            return torch.utils._pytree.tree_map(lambda tensor: tensor[runs], trees)

        def follow_f(runs, gild_grad, f_mean, f_slope):
            for k, lam in ((k, per_run(self.lam[runs], phi[k])) for k in phi):
                phi_grad[k][runs] += lam * gild_grad[k]
            self.log["f_mean"][runs], self.log["f_slope"][runs] = f_mean, f_slope

        if learned:
            runs = slice(learned)
            inputs = part(runs, phi, omega, theta, w_rl_grad, pseudo, demo, val_obs, w, self.lam)
            omega_grad, more = self.meta_gradient(*inputs)
            follow_f(runs, *more)
            self.step("gild", self.omega_direction(omega_grad, learned))
        if frozen[0] < frozen[1]:
            follow_f(slice(*frozen), *self.gild_gradient(*part(slice(*frozen), phi, omega, demo)))
        self.step("actor", phi_grad)

    def omega_direction(self, gradient: dict, learned: int) -> dict:
        """What omega's step follows, by --omega; zeros for the runs without a step."""

        def square(tree):
            return sum(g.flatten(1).square().sum(1) for g in tree.values())

        direction = {k: per_run(self.sign[:learned], g) * g for k, g in gradient.items()}
        if self.any_random:
            noise = {k: torch.randn_like(g) for k, g in gradient.items()}
            length, random = (square(gradient) / square(noise)).sqrt(), self.random[:learned]
            for k, g in noise.items():
                direction[k] = torch.where(per_run(random, g), per_run(length, g) * g, direction[k])
        rest = {k: torch.zeros_like(p[learned:]) for k, p in self.nets["gild"].items()}
        return {k: torch.cat([direction[k], rest[k]]) for k in direction}

    def policy(self, obs):
        """(runs, |S|) -> (runs, |A|)"""
        return torch.vmap(lambda phi, obs: functional_call(self.actor, phi, obs))(self.nets["actor"], obs)

    def choose(self):
        """Sets the next `action`, with noise."""
        noise = torch.randn_like(self.action) * self.args.exploration_noise
        self.action.copy_((self.policy(self.obs) + noise).clamp(-1, 1))

    def observe(self):
        """Stores the transitions `new_row` and chooses the next `action`."""
        self.rows.index_copy_(1, self.added[None], self.new_row[:, None])
        self.added += 1
        self.choose()

    def clone(self):
        """What gild_td3.clone does, for all runs."""

        def update():
            gradient, _ = self.il_gradient(self.nets["actor"], self.sample_demo())
            self.step("actor", gradient)

        update = self.captured(update)
        for _ in range(self.args.clone_steps):
            update()
        self.forget(self.optimizers["actor"])
        self.reset_targets()

    def captured(self, function):
        """On a GPU `function` as a CUDA graph; what its first calls and the capture did is undone."""
        if self.device.type != "cuda":
            return function
        changed = [self.added, self.action, *self.log.values()]
        changed += [p for net in self.nets.values() for p in net.values()]
        states = [moments for optimizer in self.optimizers.values() for moments in optimizer.state.values()]
        changed += [moment for moments in states for moment in moments.values()]
        saved = [tensor.clone() for tensor in changed]  # not the rows: the next `observe` overwrites these
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        for tensor, before in zip(changed, saved, strict=True):
            tensor.copy_(before)
        return graph.replay


# PROCESSES


def shared(*shape, dtype=np.float32) -> np.ndarray:
    """Zeros that forked processes share."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(multiprocessing.RawArray("b", size), dtype).reshape(shape)


def be_child():
    """SIGTERM ends this process at once, and so does the end of its parent, even if that was killed.

    The parent's handler, which Python runs later, would miss a signal that comes just before a wait.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch(parent):
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


def wait_for(counts: np.ndarray, value: int, processes=()):
    """Waits until every element of a shared array equals `value`, busily at first: most waits are short."""
    since = time.monotonic()
    while (counts != value).any():
        waited = time.monotonic() - since
        time.sleep(0.001 if waited > 0.1 else 0)
        if waited > 10 and not all(process.is_alive() for process in processes):
            raise RuntimeError("a process with environments has ended")


class Environments:
    """The training environments of a batch, in processes of their own."""

    def __init__(self, learners: list[Learner], obs_dim: int, action_dim: int, processes: int):
        runs = len(learners)
        self.action, self.obs = shared(runs, action_dim), shared(runs, obs_dim)
        self.row = shared(runs, 2 * obs_dim + action_dim + 2)  # as in gild_td3.ReplayBuffer
        self.last_return = shared(runs, dtype=np.float64)
        self.episodes, self.rewarded = shared(runs, dtype=np.int64), shared(runs, dtype=np.int64)
        self.turn, self.finished = shared(1, dtype=np.int64), shared(processes, dtype=np.int64)
        slots = sorted(range(runs), key=lambda slot: learners[slot].args.env_id)
        shares = [{slot: learners[slot].args for slot in slots[i::processes]} for i in range(processes)]
        self.processes = [
            FORK.Process(target=self.work, args=share, daemon=True) for share in enumerate(shares)
        ]
        for process in self.processes:
            process.start()

    def work(self, number: int, share: dict):
        be_child()
        envs = {slot: make_env(args, training=True) for slot, args in share.items()}
        returns = self.last_return
        for slot, env in envs.items():
            self.obs[slot], _ = env.reset(seed=share[slot].seed)
        so_far = dict.fromkeys(envs, 0.0)
        for turn in itertools.count(1):
            self.finished[number] = turn
            wait_for(self.turn, turn)
            for slot, env in envs.items():
                next_obs, reward, terminated, truncated, _ = env.step(self.action[slot].copy())
                transition = self.obs[slot], self.action[slot], [reward], next_obs, [terminated]
                self.row[slot] = np.concatenate(transition)
                so_far[slot] += reward
                if terminated or truncated:
                    returns[slot], so_far[slot] = so_far[slot], 0.0
                    self.rewarded[slot] += returns[slot] != 0
                    self.episodes[slot] += 1
                    next_obs, _ = env.reset()
                self.obs[slot] = next_obs

    def start(self):
        """Every environment begins a step, with `action`."""
        self.turn += 1

    def finish(self):
        """Waits for the steps, or the first resets. `row` and `obs` have what came of them."""
        wait_for(self.finished, self.turn[0] + 1, self.processes)


def rollouts(actor, args) -> tuple[np.ndarray, np.ndarray]:
    """The dense and the sparse returns of the episodes that gild_td3.evaluate would run, side by side."""
    envs = [make_env(args, training=False) for _ in range(args.eval_episodes)]
    obs = np.stack([env.reset(seed=args.seed + 100 + i)[0] for i, env in enumerate(envs)])
    threshold = SPARSE_THRESHOLDS.get(task_name(args.env_id), NAN)
    threshold = threshold if args.sparse_threshold is None else args.sparse_threshold
    returns, sparse, running = np.zeros(len(envs)), np.zeros(len(envs)), list(range(len(envs)))
    while running:
        for i, action in zip(running[:], act(actor, obs[running]), strict=True):
            obs[i], reward, terminated, truncated, info = envs[i].step(action)
            x_init = getattr(envs[i].unwrapped, "init_qpos", [NAN])[0]
            returns[i] += reward
            sparse[i] += reward if info.get("x_position", NAN) - x_init > threshold else 0.0
            if terminated or truncated:
                running.remove(i)
                envs[i].close()
    return returns, sparse if threshold == threshold else sparse * NAN


def evaluate_policies(learners: list[Learner], demos: list[tuple], policies, rows):
    """A process: takes (slot, policy, row) from one queue, evaluates, and puts (slot, row) into the other."""
    be_child()
    for slot, parameters, row in iter(policies.get, None):
        args, (demo_obs, demo_actions) = learners[slot].args, demos[slot]
        actor = Actor(demo_obs.shape[1], demo_actions.shape[1])
        actor.load_state_dict({k: torch.from_numpy(p) for k, p in parameters.items()})
        returns, sparse = rollouts(actor, args)
        row["imitation_distance"] = np.square(act(actor, demo_obs.numpy()) - demo_actions.numpy()).mean()
        row |= {"return_mean": returns.mean(), "return_std": returns.std(), "sparse_return": sparse.mean()}
        rows.put((slot, row))


# TRAINING


def kind_of_iteration(learners: list[Learner], lam: np.ndarray, iteration: int) -> tuple:
    """The arguments of Batch.learn."""
    if iteration % learners[0].args.policy_frequency:
        return False, 0, (0, 0)
    kinds = np.array([one.kind for one in learners])
    first, learned, frozen = (kinds == LEARNED).sum(), *((kinds == k) & (lam > 0) for k in (LEARNED, FROZEN))
    return True, int(learned.sum()), (int(first), int(first + frozen.sum()))


def train(learners: list[Learner], processes: int, args: Args):
    """Trains a batch and writes its results. A generator, so that batches take turns on the GPU.

    The part before the first yield forks, so main runs it for all batches before any of them uses the GPU.
    """
    began, common = time.time(), learners[0].args
    tasks = ", ".join(sorted({one.args.env_id for one in learners}))
    demonstrations = [demonstrations_of(one.args) for one in learners]
    demos = [(one.obs, one.actions) for one in demonstrations]
    keys = [(one.args.env_id, one.args.seed, fit_of(one)) for one in learners]
    jobs = {key: (one.args, key[2]) for key, one in zip(keys, learners, strict=True)}
    with FORK.Pool(processes, be_child) as pool:
        weights = dict(zip(jobs, pool.starmap(first_weights, jobs.values(), 1), strict=True))
    policies, rows, tables = FORK.Queue(), FORK.Queue(), [[] for _ in learners]
    policies.cancel_join_thread()  # after a failure do not wait until all have been taken
    evaluate = {"target": evaluate_policies, "args": (learners, demos, policies, rows), "daemon": True}
    evaluators = [FORK.Process(**evaluate) for _ in range(max(1, round(0.4 * processes)))]
    for process in evaluators:
        process.start()
    shape = demos[0][0].shape[1], demos[0][1].shape[1]
    envs = Environments(learners, *shape, max(1, processes - len(evaluators)))
    yield

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = np.random.default_rng(common.seed + 1_000)  # not a task's: the actions could equal its noise
    batch = Batch(learners, [weights[key] for key in keys], demos, device, args.compile)
    observe, graphs = batch.captured(batch.observe), {}
    releases, seen = [Release(one.args) for one in learners], np.zeros(len(learners))
    follows_f = np.array([one.kind != NO_F for one in learners])
    imitates = follows_f | [one.args.gild_form == "error" for one in learners]
    lam, lowest = np.zeros(len(learners), np.float32), np.full(len(learners), NAN)

    def save_policies(global_step):
        log = {name: values.numpy(force=True) for name, values in batch.log.items()}
        actors = {k: p.cpu().clone().numpy() for k, p in batch.nets["actor"].items()}
        for slot in range(len(learners)):
            row = {"global_step": global_step, "q_mean": log["q_mean"][slot], "wall_time": NAN}
            row |= {"lowest_of_batches": lowest[slot], "rewarded_episodes": envs.rewarded[slot]}
            for name in ("f_mean", "f_slope"):
                row[name] = log[name][slot] if follows_f[slot] and lam[slot] > 0 else NAN
            policies.put((slot, {k: p[slot] for k, p in actors.items()}, row))
        print(f"{len(learners)} runs, {tasks}: step {global_step:,}, {time.time() - began:.0f} s", flush=True)

    def collect_rows():
        if not all(process.is_alive() for process in evaluators):
            raise RuntimeError("a process that evaluates has ended")
        while not rows.empty():
            slot, row = rows.get()
            tables[slot] = sorted([*tables[slot], row], key=lambda row: row["global_step"])
            run = learners[slot].run
            write(Path("runs", f"{run.study}-{run.name}.csv"), as_csv(tables[slot]))

    envs.finish()
    copy_in(batch.obs, envs.obs)
    evaluations = range(common.eval_frequency, common.total_timesteps, common.eval_frequency)
    evaluations = {*evaluations, common.total_timesteps}
    if common.clone_steps:
        batch.clone()
        batch.choose()
        evaluations.add(0)
        save_policies(0)
    for global_step in range(1, common.total_timesteps + 1):
        if global_step <= common.learning_starts and common.clone_steps == 0:
            envs.action[:] = rng.uniform(-1, 1, envs.action.shape)
        else:
            envs.action[:] = batch.action.numpy(force=True)
        envs.start()
        iteration = global_step - common.learning_starts
        if iteration > 0:
            lam[:] = [release.value for release in releases]
            copy_in(batch.lam, lam)
            kind = kind_of_iteration(learners, lam, iteration)
            if kind not in graphs:
                graphs[kind] = batch.captured(partial(batch.learn, *kind))
            graphs[kind]()
        yield
        envs.finish()
        copy_in(batch.new_row, envs.row)
        copy_in(batch.obs, envs.obs)
        observe()
        for slot in np.flatnonzero(envs.episodes != seen):
            releases[slot].episode(global_step, envs.last_return[slot])
        seen[:] = envs.episodes
        for release in releases:
            release.update(global_step)
        if iteration > 0 and iteration % 100 == 0:
            error = batch.log["error"].numpy(force=True)
            lowest = np.where(imitates & (lam > 0), np.fmin(lowest, error), lowest)
        if global_step in evaluations:
            save_policies(global_step)
            collect_rows()
    while any(len(table) < len(evaluations) for table in tables):
        collect_rows()
        yield
    for process in (*envs.processes, *evaluators):
        process.terminate()

    versions = {package: version(package) for package in ("torch", "gymnasium", "mujoco", "numpy")}
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    for one, table in zip(learners, tables, strict=True):
        run = one.run
        about = {"script": run.script, "args": run.args}
        about |= {"batch": {"runs": len(learners), "device": where, "seconds": round(time.time() - began)}}
        about |= {"versions": versions}
        if run.script != "benchmark.gild_td3_variants":  # which alone evaluates its clone
            table = [row for row in table if row["global_step"] > 0]
        path = result_of(run, args.results)
        write(path.with_suffix(".json"), (json.dumps(about, indent=2) + "\n").encode())
        write(path, as_csv(table))


def result_of(run: Run, results: Path) -> Path:
    return result(results, run.study, run.variant, run.env_id, run.seed)


def copy_in(tensor: torch.Tensor, array: np.ndarray):
    tensor.copy_(torch.from_numpy(array))


def as_csv(rows: list[dict]) -> bytes:
    text, columns = io.StringIO(), COLUMNS.split(",")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    for row in rows:
        table.writerow([row["global_step"], *(f"{row[name]:.6g}" for name in columns[1:])])
    return text.getvalue().encode()


def take_turn(training, stream: torch.cuda.Stream | None) -> bool:
    """Lets a batch go on, on its stream, up to its next yield. Returns whether it has not ended."""
    with torch.cuda.stream(stream):
        return next(training, "ended") != "ended"


def main(args: Args):
    torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
    study = load_study(args.study)
    runs = runs_of(study)
    check_results(runs, args.results)
    found = batches([run for run in runs if not result_of(run, args.results).exists()])
    sizes = [len(batch) for batch in found]
    left = sum(sizes)
    batched = f", in batches of {', '.join(map(str, sizes))}" if sizes else ""
    print(f"{study.name}: {left} of {len(runs)} runs to train{batched}", flush=True)
    shares = [max(2, round(args.processes * len(batch) / left)) for batch in found]
    trainings = [train(*pair, args) for pair in zip(found, shares, strict=True)]
    for training in trainings:
        next(training)
    torch.manual_seed(0)
    # Kernels of this size leave room on a GPU: with a stream for each batch they overlap. The graphs share a
    # random number generator, so there no two trainings of a study are alike.
    streams = [torch.cuda.Stream() if torch.cuda.is_available() else None for _ in trainings]
    turns = list(zip(trainings, streams, strict=True))
    while turns:
        turns = [turn for turn in turns if take_turn(*turn)]
    print(f"tables and figures: python -m benchmark.report {study.name}")


if __name__ == "__main__":
    command_line(main, Args)
