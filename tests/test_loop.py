"""The training loop of every script, checked against an independent implementation of the equations."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from shutil import copytree
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.func import grad

from tests.conftest import ALGORITHMS, write_demonstrations

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")  # the -v4 tasks

# ACCESSORS: everything these tests know about the scripts' internals

W_RL_FROM_ACTOR_LOSS = True  # w_rl from the updated critic's |Q(s, phi(s))|, not the old one's |Q(s, a)|


def load(run_dir) -> dict:
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def part(checkpoint: dict, name: str):
    """The state dict of a network or optimizer."""
    return checkpoint.get("learners", checkpoint)[name]


def parameters(state_dict: dict) -> list[torch.Tensor]:
    """A network's parameters, without an actor's buffers `action_scale` and `action_bias`."""
    return [value for name, value in state_dict.items() if not name.startswith("action_")]


def optimizer_steps(checkpoint: dict, name: str) -> int:
    state = part(checkpoint, f"{name}_optimizer")["state"]
    return int(state[0]["step"]) if state else 0


def stored_rows(checkpoint: dict) -> torch.Tensor:
    """The replay buffer's rows (s, a, r, s', terminated), oldest first."""
    return checkpoint.get("buffer", checkpoint)["rows"]


def resume(script, run_dir: Path, **settings):
    kind = str if "str" in str(script.Args.__dataclass_fields__["resume"].type) else Path
    script.train(script.Args(**settings, resume=kind(run_dir)))


def observed_environments(script, monkeypatch) -> dict[bool, list]:
    """Lists that collect (observation, action) from training (True) and evaluation (False) environments."""
    seen = {True: [], False: []}
    make_env = script.make_env

    class Observed(gym.Wrapper):
        def reset(self, **kwargs):
            self.obs, info = self.env.reset(**kwargs)
            return self.obs, info

        def step(self, action):
            self.pairs.append((np.array(self.obs), np.array(action)))
            self.obs, *rest = self.env.step(action)
            return self.obs, *rest

    def make_observed(args, training, **kwargs):
        env = Observed(make_env(args, training, **kwargs))
        env.pairs = seen[training]
        return env

    monkeypatch.setattr(script, "make_env", make_observed)
    return seen


def make_actor_constant(script, monkeypatch, output):
    """The actor's network returns `output` for every observation (and log std 0 in SAC)."""
    initialise = script.Actor.__init__

    def constant(self, *args):
        initialise(self, *args)
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)
        parameter.data[: len(output)] = torch.tensor(output)  # the last layer's bias

    monkeypatch.setattr(script.Actor, "__init__", constant)


# SCRIPTS, TASKS, SETTINGS

METHODS = {"gild": "gild_{}", "vanilla": "baselines.{}", "il": "baselines.{}_il"}
SCRIPTS = [(method, algorithm) for method in METHODS for algorithm in ALGORITHMS]
CPU = torch.device("cpu")


class Wide(gym.Env):
    """Random observations and 100-dimensional actions: a few steps give a large sample of the noise."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (100,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def observe(self):
        return self.np_random.normal(size=2).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return self.observe(), 0.0, False, False, {}


gym.register("Wide-v0", entry_point=Wide, max_episode_steps=20)
# dense rewards and short episodes, some of which terminate and some of which are truncated
near = {"goal": (0.25, 0.1), "goal_radius": 0.18, "reward": "dense"}
gym.register("Near-v0", entry_point="envs.point2d:Point2D", kwargs=near, max_episode_steps=12)

# not the defaults: they would hide a loop that ignores an argument
SETTINGS = dict(env_id="Near-v0", seed=3, cuda=False, learning_starts=200, batch_size=32, buffer_size=1_000)
SETTINGS |= dict(eval_frequency=1_000, eval_episodes=1, learning_rate=1e-3, gamma=0.9, tau=0.01)
SETTINGS |= dict(policy_noise=0.8, noise_clip=0.97, policy_frequency=3, alpha=0.3, autotune=True, il_beta=1.7)
SETTINGS |= dict(gild_lr=2e-3, gild_eps=1e-6, gild_weight_decay=1e-5, gild_init="random", ws_frac=0.0)


def settings_for(script, **changes) -> dict:
    return {name: value for name, value in (SETTINGS | changes).items() if hasattr(script.Args, name)}


def import_script(method, algorithm):
    return import_module(METHODS[method].format(algorithm))


@pytest.fixture(params=SCRIPTS, ids="_".join)
def script(request):
    return import_script(*request.param)


def demonstrations(folder, *args) -> str:
    return str(write_demonstrations(folder / "demonstrations.npz", *args))


# RECORDED RUNS


@dataclass
class Run:
    method: str
    algorithm: str
    args: Any
    warm_start: int  # iterations
    start: dict  # a checkpoint with the first weights
    end: dict  # the checkpoint after the last one
    events: list  # ("step" | "replay" | "demonstrations" | "noise", tensors), in order, up to `end`

    @property
    def iterations(self) -> int:
        return self.end["global_step"] - self.args.learning_starts

    def has_actor_step(self, iteration) -> bool:
        return self.algorithm != "td3" or iteration % self.args.policy_frequency == 0

    def uses_gild(self, iteration) -> bool:
        return self.method == "gild" and iteration <= self.warm_start and self.has_actor_step(iteration)


def record(script, monkeypatch) -> list:
    """A list that collects the run's steps, samples (as float64) and Gaussian noise."""
    events = []

    def spy(owner, name, kind):
        original = getattr(owner, name)

        def recorded(self, *args):
            result = original(self, *args)
            if kind != "step":
                result = [value.double() for value in result]
            events.append((kind, result))
            return result

        monkeypatch.setattr(owner, name, recorded)

    def spy_on_noise(name):
        original = getattr(torch, name)

        def recorded(*args, **kwargs):
            noise = original(*args, **kwargs)
            if noise.shape[-2:] == (SETTINGS["batch_size"], 2):  # not SAC's exploration
                events.extend(("noise", value) for value in noise.reshape(-1, *noise.shape[-2:]))
            return noise

        monkeypatch.setattr(torch, name, recorded)

    spy(script.ReplayBuffer, "add", "step")
    spy(script.ReplayBuffer, "sample", "replay")
    if hasattr(script, "DemonstrationBuffer"):
        spy(script.DemonstrationBuffer, "sample", "demonstrations")
    spy_on_noise("randn")
    spy_on_noise("randn_like")
    return events


@contextmanager
def float64():
    """Double precision, so that Adam cannot amplify rounding errors."""

    def linear(layer, x):  # the scripts pass float32 observations to their actors
        return torch.nn.functional.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.nn.Linear, "forward", linear)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def recorded_run(method, algorithm, folder, warm_start=11, **changes) -> Run:
    """A run of 15 to 26 iterations."""
    script, total, starts = import_script(method, algorithm), 230, SETTINGS["learning_starts"]
    changes |= {"ws_frac": warm_start / total, "demo_path": demonstrations(folder, "Near-v0")}
    settings = settings_for(script, **changes)
    with float64(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        first = settings | ({"clone_steps": 0} if "clone_steps" in settings else {})
        start = load(script.train(script.Args(**first, total_timesteps=starts, checkpoint_frequency=1)))
        events = record(script, monkeypatch)
        args = script.Args(**settings, total_timesteps=total, checkpoint_frequency=starts + 15)
        end = load(script.train(args))
    steps = [i for i, (kind, _) in enumerate(events) if kind == "step"]
    events = events[: steps[end["global_step"]]]
    return Run(method, algorithm, args, warm_start, start, end, events)


@pytest.fixture(scope="module", params=SCRIPTS, ids="_".join)
def run(request, tmp_path_factory):
    return recorded_run(*request.param, tmp_path_factory.mktemp("run"))


# INDEPENDENT IMPLEMENTATION


def mlp(params, x):
    size = len(params) // 2 - 1  # parameters of a hidden layer: 2, or 4 with LayerNorm
    for i in (0, size):
        w, b, *norm = params[i : i + size]
        x = x @ w.T + b
        if norm:
            variance = x.var(-1, correction=0, keepdim=True)
            x = (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * norm[0] + norm[1]
        x = x.relu()
    return x @ params[-2].T + params[-1]


def gaussian(phi, obs):
    mean, log_std = mlp(phi, obs).chunk(2, -1)
    return torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())


def log_density(normal, u):
    """log pi of the action tanh(u); 1 - tanh(u)^2 = cosh(u)^-2"""
    return (normal.log_prob(u) + 2 * u.cosh().log()).sum(-1, keepdim=True)


def add(a, b, scale=1.0):
    return [x + scale * y for x, y in zip(a, b, strict=True)]


class Adam:
    """Algorithm 1 of Kingma and Ba, with an L2 penalty."""

    def __init__(self, lr, eps=1e-8, weight_decay=0.0):
        self.lr, self.eps, self.weight_decay, self.t, self.m, self.v = lr, eps, weight_decay, 0, None, None

    def step(self, params, gradients):
        self.t += 1
        gradients = add(gradients, params, self.weight_decay)
        zeros = [0 * g for g in gradients]
        self.m = [0.9 * m + 0.1 * g for m, g in zip(self.m or zeros, gradients, strict=True)]
        self.v = [0.999 * v + 0.001 * g * g for v, g in zip(self.v or zeros, gradients, strict=True)]
        m = [m / (1 - 0.9**self.t) for m in self.m]
        v = [v / (1 - 0.999**self.t) for v in self.v]
        return add(params, [m / (v.sqrt() + self.eps) for m, v in zip(m, v, strict=True)], -self.lr)


class Reference:
    """DDPG, TD3 or SAC, alone or with IL or GILD, on lists of parameters and a run's recorded samples."""

    def __init__(self, run: Run):
        self.run, self.args = run, run.args
        self.sac, self.td3 = run.algorithm == "sac", run.algorithm == "td3"
        self.samples = {
            kind: iter([value for event, value in run.events if event == kind])
            for kind in ("replay", "demonstrations", "noise")
        }
        self.actor, self.critic = (parameters(part(run.start, name)) for name in ("actor", "critic"))
        clone_adam = Adam(self.args.learning_rate)
        for _ in range(getattr(self.args, "clone_steps", 0)):
            demo = self.next("demonstrations")
            self.actor = clone_adam.step(self.actor, grad(self.il_loss)(self.actor, *demo))
        self.target_actor, self.target_critic = self.actor, self.critic
        self.actor_adam, self.critic_adam, self.alpha_adam = (Adam(self.args.learning_rate) for _ in range(3))
        self.alpha = 0.0
        if self.sac:
            self.log_alpha = parameters(part(run.start, "log_alpha"))
        if run.method == "gild":
            self.gild = parameters(part(run.start, "gild"))
            self.gild_adam = Adam(self.args.gild_lr, self.args.gild_eps, self.args.gild_weight_decay)

    def next(self, kind):
        return next(self.samples[kind])

    def noise(self):
        return self.next("noise") if self.sac else None

    def act(self, phi, obs, noise=None):
        """The action and its log-density, 0 for a deterministic policy."""
        if not self.sac:
            return torch.tanh(mlp(phi, obs)), 0.0
        normal = gaussian(phi, obs)
        u = normal.mean + normal.stddev * noise
        return torch.tanh(u), log_density(normal, u)

    def q_values(self, theta, obs, action):
        size = 6 if len(theta) in (6, 12) else 10  # parameters of one network, 10 with LayerNorm
        obs_action = torch.cat([obs, action], 1)
        return [mlp(theta[i : i + size], obs_action) for i in range(0, len(theta), size)]

    def q(self, theta, obs, action):
        """The Q that the actor maximises: TD3's first, SAC's smaller one."""
        q = self.q_values(theta, obs, action)
        return torch.minimum(*q) if self.sac else q[0]

    def value(self, theta, phi, obs, noise):
        action, log_prob = self.act(phi, obs, noise)
        return self.q(theta, obs, action) - self.alpha * log_prob

    def target(self, reward, next_obs, terminated):
        args = self.args
        if self.td3:
            noise = torch.clip(args.policy_noise * self.next("noise"), -args.noise_clip, args.noise_clip)
            action = torch.clip(self.act(self.target_actor, next_obs)[0] + noise, -1, 1)
            value = torch.minimum(*self.q_values(self.target_critic, next_obs, action))
        else:
            policy = self.actor if self.sac else self.target_actor
            value = self.value(self.target_critic, policy, next_obs, self.noise())
        return torch.where(terminated == 1, reward, reward + args.gamma * value)

    def critic_loss(self, theta, obs, action, target):
        """Eq. (5)"""
        return sum(((q - target) ** 2).mean() for q in self.q_values(theta, obs, action))

    def rl_loss(self, phi, obs, noise):
        """Eq. (2)"""
        return -self.value(self.critic, phi, obs, noise).mean()

    def il_loss(self, phi, demo_obs, demo_action):
        """L_IL of Eq. (3)"""
        if self.sac:
            return -log_density(gaussian(phi, demo_obs), torch.atanh(demo_action)).mean()
        return ((self.act(phi, demo_obs)[0] - demo_action) ** 2).mean()

    def gild_loss(self, phi, omega, demo_obs, demo_action, noise):
        """L_GILD of Eq. (7)"""
        action, _ = self.act(phi, demo_obs, noise)
        return mlp(omega, torch.cat([demo_obs, demo_action, action], 1)).exp().log1p().mean()

    def meta_loss(self, omega, rl, pseudo, demo, demo_noise, val_obs, val_noise):
        """Eq. (8) as a function of omega, through the look-ahead"""
        gild = grad(self.gild_loss)(self.actor, omega, *demo, demo_noise)
        look_ahead = add(self.actor, add(rl, gild), -self.args.learning_rate)
        value = self.value(self.critic, look_ahead, val_obs, val_noise)
        if self.args.meta_loss == "intuitive":
            return -value.mean()
        return -torch.tanh(value - self.value(self.critic, pseudo, val_obs, val_noise)).mean()

    def polyak(self, target, online):
        tau = self.args.tau
        return [(1 - tau) * old + tau * new for old, new in zip(target, online, strict=True)]

    def iterate(self, iteration):
        args, run = self.args, self.run
        if self.sac:
            self.alpha = self.log_alpha[0].exp()
        obs, action, reward, next_obs, terminated = self.next("replay")
        q = self.q_values(self.critic, obs, action)[0]
        target = self.target(reward, next_obs, terminated)
        theta_grad = grad(self.critic_loss)(self.critic, obs, action, target)
        self.critic = self.critic_adam.step(self.critic, theta_grad)
        if not run.has_actor_step(iteration):
            return

        noise = self.noise()
        actor_action, log_prob = self.act(self.actor, obs, noise)
        phi_grad = rl = grad(self.rl_loss)(self.actor, obs, noise)
        if run.method == "il" or run.uses_gild(iteration):
            demo = self.next("demonstrations")
            if W_RL_FROM_ACTOR_LOSS:
                q = self.q(self.critic, obs, actor_action)
            rl_il = add(grad(self.il_loss)(self.actor, *demo), rl, args.il_beta / q.abs().mean())
        if run.method == "il":
            phi_grad = rl_il  # Eq. (3)
        elif run.uses_gild(iteration):
            pseudo = add(self.actor, rl_il, -args.learning_rate)  # Eq. (6)
            demo_noise, val_noise, val_obs = self.noise(), self.noise(), self.next("replay")[0]
            phi_grad = add(rl, grad(self.gild_loss)(self.actor, self.gild, *demo, demo_noise))  # Eq. (7)
            omega_grad = grad(self.meta_loss)(self.gild, rl, pseudo, demo, demo_noise, val_obs, val_noise)
            self.gild = self.gild_adam.step(self.gild, omega_grad)  # Eq. (11)
        self.actor = self.actor_adam.step(self.actor, phi_grad)
        if self.sac and args.autotune:  # alpha rises while the entropy is below -|A|
            self.log_alpha = self.alpha_adam.step(self.log_alpha, [action.shape[1] - log_prob.mean()])
        self.target_critic = self.polyak(self.target_critic, self.critic)
        self.target_actor = self.polyak(self.target_actor, self.actor)


def assert_equals_reference(run: Run):
    reference = Reference(run)
    for iteration in range(1, run.iterations + 1):
        reference.iterate(iteration)
    assert not any(list(unused) for unused in reference.samples.values())
    names = ["actor", "critic", "target_critic", "log_alpha" if run.algorithm == "sac" else "target_actor"]
    names += ["gild"] * (run.method == "gild")
    values = {name: parameters(part(run.end, name)) for name in names}
    expected = {name: getattr(reference, name) for name in names}
    # they differ by 2e-14; the steps to be told apart are of the size of the learning rates, 1e-3 and 2e-3
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-11)


def test_loop(run):
    """All weights after a run with the end of the warm start in its middle."""
    assert_equals_reference(run)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids="gild_{}".format)
def test_loop_with_intuitive_meta_loss(algorithm, tmp_path):
    """The ablation of Table 2. Also a fixed temperature, and TD3 with a GILD step at the warm start's end."""
    run = recorded_run("gild", algorithm, tmp_path, warm_start=12, meta_loss="intuitive", autotune=False)
    assert_equals_reference(run)


@pytest.mark.parametrize(("method", "algorithm"), SCRIPTS, ids=map("_".join, SCRIPTS))
def test_loop_from_a_clone_with_norms(method, algorithm, tmp_path):
    """--clone-steps, where there are demonstrations, and --critic-norm."""
    run = recorded_run(method, algorithm, tmp_path, clone_steps=9, critic_norm=True)
    assert len(part(run.start, "critic")) == (20 if algorithm != "ddpg" else 10)
    assert_equals_reference(run)


# THE REST OF THE LOOP


def test_one_update_per_step(run):
    step, counts = 0, {}
    for kind, _ in run.events:
        step += kind == "step"
        counts.setdefault(step, Counter())[kind] += 1
    for step, count in counts.items():
        iteration = step - run.args.learning_starts
        with_gild = iteration > 0 and run.uses_gild(iteration)
        with_il = iteration > 0 and run.method == "il" and run.has_actor_step(iteration)
        assert count["replay"] == (iteration > 0) + with_gild, step
        assert count["demonstrations"] == with_gild + with_il, step
    iterations = range(1, run.iterations + 1)
    assert optimizer_steps(run.end, "critic") == len(iterations)
    assert optimizer_steps(run.end, "actor") == sum(map(run.has_actor_step, iterations))
    if run.method == "gild":
        assert optimizer_steps(run.end, "gild") == sum(map(run.uses_gild, iterations))


def trajectory(env, actions, seed):
    """The transitions (s, a, r, s', terminated) that these actions make, each with the rest of the step."""
    obs, _ = env.reset(seed=seed)
    for action in actions:
        next_obs, reward, terminated, truncated, info = env.step(action)
        yield np.array([*obs, *action, reward, *next_obs, terminated]), terminated, truncated, info
        obs = env.reset()[0] if terminated or truncated else next_obs


def test_stored_transitions(run):
    """The environment's own trajectory: each episode's final observation, termination but not truncation."""
    rows = stored_rows(run.end).numpy()
    ends = Counter()
    actions = rows[:, 2:4].astype(np.float32)
    for row, (expected, *end, _) in zip(rows, trajectory(gym.make("Near-v0"), actions, seed=3), strict=True):
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-6)
        ends[tuple(end)] += 1
    assert ends[True, False] >= 3 and ends[False, True] >= 3


REWARDS = {"sparse": {"sparse_threshold": 0.0}, "never": {"sparse_threshold": 1e9}, "dense": {"dense": True}}


@pytest.mark.parametrize("changes", REWARDS.values(), ids=REWARDS)
def test_training_reward(script, changes, tmp_path):
    """The dense reward beyond --sparse-threshold, or everywhere with --dense."""
    demo_path = demonstrations(tmp_path, "Hopper-v4", 11, 3)
    settings = settings_for(script, env_id="Hopper-v4", learning_starts=1_000, demo_path=demo_path)
    args = script.Args(**settings, **changes, total_timesteps=120, checkpoint_frequency=1)
    rows = stored_rows(load(script.train(args))).numpy()
    threshold = changes.get("sparse_threshold", -np.inf)
    steps, rewarded = trajectory(gym.make("Hopper-v4"), rows[:, 11:14], seed=3), Counter()
    for row, (expected, *_, info) in zip(rows, steps, strict=True):
        ahead = info["x_position"] > threshold
        expected[14] *= ahead
        np.testing.assert_allclose(row, expected, rtol=1e-6, atol=1e-6)
        rewarded[ahead] += 1
    assert (rewarded[True] > 10) == (threshold < 1e9) and (rewarded[False] > 10) == (threshold >= 0)


def test_evaluation(script, tmp_path, monkeypatch):
    """Each evaluation uses the dense reward, the same seeds and no exploration."""
    make_actor_constant(script, monkeypatch, [20.0, -20.0, 20.0])  # tanh(20) is 1
    changes = {"env_id": "Hopper-v4", "learning_starts": 1_000, "eval_frequency": 40, "eval_episodes": 3}
    settings = settings_for(script, **changes, demo_path=demonstrations(tmp_path, "Hopper-v4", 11, 3))
    run_dir = script.train(script.Args(**settings, total_timesteps=100))
    env, returns, sparse_returns = gym.make("Hopper-v4"), [], []
    for seed in (103, 104, 105):
        env.reset(seed=seed)
        ended, rewards, positions = False, [], []
        while not ended:
            _, reward, terminated, truncated, info = env.step(np.float32([1, -1, 1]))
            rewards.append(reward)
            positions.append(info["x_position"])
            ended = terminated or truncated
        returns.append(sum(rewards))
        sparse_returns.append(np.dot(rewards, np.array(positions) > 1.0))
    assert len(set(returns)) == 3 and np.mean(sparse_returns) < 0.9 * np.mean(returns)
    table = np.loadtxt(run_dir / "evaluations.csv", delimiter=",", skiprows=1)
    expected = [(step, np.mean(returns), np.std(returns)) for step in (40, 80, 100)]
    np.testing.assert_allclose(table, expected, rtol=1e-12)


def assert_uniform(counts):
    """A chi-square test, at five standard deviations."""
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("clone_steps", [0, 3])
def test_exploration(script, clone_steps, tmp_path, monkeypatch):
    """Uniform actions at first, or a clone's, then the policy's with Gaussian noise; none in evaluations."""
    random_steps = 40 if clone_steps == 0 or not hasattr(script.Args, "clone_steps") else 0
    seen = observed_environments(script, monkeypatch)
    changes = {"env_id": "Wide-v0", "learning_starts": 40, "learning_rate": 0.0, "exploration_noise": 0.2}
    changes["clone_steps"] = clone_steps
    settings = settings_for(script, **changes, demo_path=demonstrations(tmp_path, "Wide-v0", 2, 100))
    run_dir = script.train(script.Args(**settings, total_timesteps=80))
    phi = parameters(torch.load(run_dir / "policy.pt", weights_only=True)["actor"])
    (obs, action), (eval_obs, eval_action) = (
        (torch.tensor(np.array(values).squeeze()) for values in zip(*seen[training], strict=True))
        for training in (True, False)
    )

    assert len(action) == 80
    if random_steps:
        assert (action[:40].abs().amax(1) > 0.9).all()
        assert_uniform(torch.histc(action[:40], 20, -1, 1))
    if "sac" in script.__name__:  # Gaussian before the tanh
        action, eval_action = action.atanh(), eval_action.atanh()
        mean, std, eval_mean = (
            gaussian(phi, obs).mean,
            gaussian(phi, obs).stddev,
            gaussian(phi, eval_obs).mean,
        )
    else:
        mean, std, eval_mean = mlp(phi, obs).tanh(), torch.full((80, 1), 0.2), mlp(phi, eval_obs).tanh()
    torch.testing.assert_close(eval_action, eval_mean, rtol=0, atol=1e-4)
    for noise in ((action - mean) / std)[random_steps:].split(40):
        # 4,000 independent standard normal numbers; the bounds are more than four standard errors
        assert abs(noise.mean()) < 0.07 and abs(noise.std() - 1) < 0.05
        assert abs((noise.abs() < 1).float().mean() - 0.683) < 0.035
        for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
            assert abs((a * b).mean()) < 0.07


def test_replay_buffer_is_sampled_uniformly(script):
    """From the filled part, and after wrap-around from the newest transitions."""
    torch.manual_seed(0)
    buffer = script.ReplayBuffer(50, 2, 1, CPU)
    for first, last, oldest in ((0, 30, 0), (30, 120, 70)):
        for i in range(first, last):
            buffer.add(np.array([i, -i]), np.array([i]), 2 * i, np.array([i + 1, -i]), i % 2 == 0)
        obs, action, reward, next_obs, terminated = buffer.sample(20_000)
        i = obs[:, :1]
        assert torch.equal(
            torch.cat([i, -i, i, 2 * i, i + 1, -i, 1 - i % 2], 1),
            torch.cat([obs, action, reward, next_obs, terminated], 1),
        )
        assert i.min() == oldest and i.max() == last - 1
        assert_uniform(torch.histc(i, last - oldest, oldest - 0.5, last - 0.5))


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "vanilla" not in s], indirect=True, ids="_".join)
def test_demonstrations_are_sampled_uniformly(script, tmp_path):
    torch.manual_seed(0)
    path = demonstrations(tmp_path, "Near-v0")
    env = script.make_env(script.Args(env_id="Near-v0"), training=True)
    obs, action = script.DemonstrationBuffer(path, "Near-v0", env, CPU).sample(20_000)
    file = np.load(path)
    pairs, counts = np.unique(torch.cat([obs, action], 1), axis=0, return_counts=True)
    expected = np.concatenate([file["observations"], file["actions"]], 1)
    np.testing.assert_allclose(pairs, expected[np.lexsort(expected.T[::-1])], atol=1e-6)
    assert_uniform(counts)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids="gild_{}".format)
def test_after_the_warm_start_gild_is_the_vanilla_algorithm(algorithm, tmp_path, monkeypatch):
    """The vanilla script resumes a GILD run after its warm start and continues it bit for bit."""
    gild, vanilla = import_script("gild", algorithm), import_script("vanilla", algorithm)
    settings = {"checkpoint_frequency": 20, "demo_path": demonstrations(tmp_path, "Near-v0")}
    args = gild.Args(**settings_for(gild, **settings, ws_frac=11 / 230), total_timesteps=230)
    first = gild.train(args)
    before = load(first)
    assert before["global_step"] > 211
    second = copytree(first, tmp_path / "copy")
    monkeypatch.setattr(gild.DemonstrationBuffer, "sample", None)
    resume(gild, first, **settings_for(gild, **settings, ws_frac=11 / 270), total_timesteps=270)
    resume(vanilla, second, **settings_for(vanilla, **settings), total_timesteps=270)
    a, b = load(first), load(second)
    assert a["global_step"] == b["global_step"] > before["global_step"] + 20
    names = ["actor", "critic", "target_critic", "log_alpha" if algorithm == "sac" else "target_actor"]
    for name in [*names, "actor_optimizer", "critic_optimizer"]:
        values = [part(checkpoint, name) for checkpoint in (a, b)]
        values = [value.get("state", value) for value in values]
        torch.testing.assert_close(*values, rtol=0, atol=0)
    assert torch.equal(stored_rows(a), stored_rows(b))
    torch.testing.assert_close(part(a, "gild"), part(before, "gild"), rtol=0, atol=0)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "sac" in s], indirect=True, ids="_".join)
@pytest.mark.parametrize(("env_id", "tuned"), [("Hopper-v4", False), ("Walker2d-v4", True)])
def test_sac_tunes_its_temperature_by_task(script, env_id, tuned, tmp_path):
    dims = {"Hopper-v4": (11, 3), "Walker2d-v4": (17, 6)}[env_id]
    changes = {"env_id": env_id, "demo_path": demonstrations(tmp_path, env_id, *dims), "autotune": None}
    settings = settings_for(script, **changes, learning_starts=40)
    checkpoint = load(script.train(script.Args(**settings, total_timesteps=90, checkpoint_frequency=1)))
    (log_alpha,) = parameters(part(checkpoint, "log_alpha"))
    assert (abs(log_alpha.exp() - 0.3) > 1e-3) == tuned


@pytest.mark.parametrize("name", ["diffail", *(f"meta_critic_{algorithm}" for algorithm in ALGORITHMS)])
def test_other_baselines_have_norms_too(name, tmp_path):
    script = import_module(f"baselines.{name}")
    settings = settings_for(script, demo_path=demonstrations(tmp_path, "Near-v0"), critic_norm=True)
    run_dir = script.train(script.Args(**settings, total_timesteps=230, checkpoint_frequency=1))
    shapes = [list(weights.shape) for weights in part(load(run_dir), "critic").values()]
    layers = [[256, 4], [256], [256], [256], [256, 256], [256], [256], [256], [1, 256], [1]]
    assert shapes == layers * (1 if name.endswith("ddpg") else 2)
