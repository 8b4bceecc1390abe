"""PPO, PPO+IL and LOGO: their parts against dense or written-out computations, and their loops replayed."""

import difflib
import os
import signal
from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import parameters_to_vector

import evaluate
from baselines import logo, ppo, ppo_il
from envs.point2d import Point2D
from tests.conftest import call, same, write_demonstrations
from tests.soak import assert_same_run
from tests.test_loop import Adam, float64  # and its Near-v0: short episodes, terminated or truncated
from tests.test_resume import Killed, interrupted, kill, run_dir, state_of
from tests.test_shared_blocks import arguments, blocks, lines_of

SCRIPTS = [ppo, ppo_il, logo]
NAMES = ["ppo", "ppo_il", "logo"]


@pytest.fixture(params=SCRIPTS, ids=NAMES)
def script(request):
    return request.param


# ADVANTAGES AND LOSSES


def advantages_by_double_loop(reward, value, next_value, end, gamma, gae_lambda):
    """Eq. (11), (12): the sum of all later delta, as far as the episode or the rollout goes."""
    result = []
    for t in range(len(reward)):
        total = 0.0
        for later in range(t, len(reward)):
            future = 0.0 if end[later] == 1 else gamma * next_value[later]
            total += (gamma * gae_lambda) ** (later - t) * (reward[later] + future - value[later])
            if end[later] != 0:
                break
        result.append(total)
    return torch.stack(result)


def test_advantages(script):
    """A termination at step 3 and a truncation at step 7 of eleven; the end is within an episode."""
    torch.manual_seed(0)
    reward, value, next_value = torch.randn(3, 11, 1, dtype=torch.float64)
    end = torch.zeros(11, 1, dtype=torch.float64)
    end[3], end[7] = 1, 2
    inputs = reward, value, next_value, end, 0.9, 0.7
    expected = advantages_by_double_loop(*inputs)
    torch.testing.assert_close(script.advantages(*inputs), expected, rtol=0, atol=1e-12)
    assert expected[3] == reward[3] - value[3]
    assert expected[7] == reward[7] + 0.9 * next_value[7] - value[7]


@pytest.mark.parametrize("script", [ppo, ppo_il], ids=NAMES[:2])
def test_clipped_losses_by_hand(script):
    ratio = torch.tensor([[1.5], [1.5], [0.5], [0.5], [1.1]])
    advantage = torch.tensor([[2.0], [-2.0], [2.0], [-2.0], [3.0]])
    # min(rho A, clipped rho A): 1.2 * 2, 1.5 * -2, 0.5 * 2, 0.8 * -2, 1.1 * 3
    loss = script.policy_loss(ratio, advantage, 0.2)
    assert loss.item() == pytest.approx(-(2.4 - 3.0 + 1.0 - 1.6 + 3.3) / 5, abs=1e-6)
    value, old_value = torch.tensor([[1.0], [1.0], [1.1]]), torch.tensor([[0.0], [2.0], [1.0]])
    target = torch.tensor([[2.0], [2.0], [0.0]])
    # clipped values 0.2, 1.8, 1.1; the larger error counts: 1.8, 1.0, 1.1
    loss = script.value_loss(value, old_value, target, 0.2)
    assert loss.item() == pytest.approx(0.5 * (1.8**2 + 1.0**2 + 1.1**2) / 3, abs=1e-6)


# NETWORKS


@pytest.mark.parametrize("script", [ppo, ppo_il], ids=NAMES[:2])
def test_ppo_starts_with_orthogonal_weights(script):
    actor, critic = script.Actor(11, 3), script.mlp(11, 1, gain=1.0)
    for net, outputs, gain in ((actor.net, 3, 0.01), (critic, 1, 1.0)):
        w1, b1, w2, b2, w3, b3 = net.parameters()
        assert [w.shape for w in (w1, w2, w3)] == [(64, 11), (64, 64), (outputs, 64)]
        torch.testing.assert_close(w1.T @ w1, 2 * torch.eye(11), rtol=0, atol=1e-5)
        torch.testing.assert_close(w2 @ w2.T, 2 * torch.eye(64), rtol=0, atol=1e-5)
        torch.testing.assert_close(w3 @ w3.T, gain**2 * torch.eye(outputs), rtol=0, atol=1e-6)
        assert not any(b.any() for b in (b1, b2, b3))
    assert not actor.log_std.any()


def test_logo_starts_with_a_small_last_layer():
    actor = logo.Actor(11, 3)
    w1, b1, w2, b2, w3, b3 = actor.net.parameters()
    assert [w.shape for w in (w1, w2, w3)] == [(128, 11), (128, 128), (3, 128)]
    bounds = [w.abs().max() for w in (w1, b1, w2, b2, w3)]
    expected = [11**-0.5, 11**-0.5, 128**-0.5, 128**-0.5, 0.1 * 128**-0.5]
    assert all(0.9 * e < b <= e for b, e in zip(bounds, expected, strict=True))
    assert not b3.any() and not actor.log_std.any() and w1.dtype == torch.float64


# LOGO'S SOLVER


def positive_definite(n=12):
    torch.manual_seed(0)
    root = torch.randn(n, n, dtype=torch.float64)
    return root @ root.T + torch.eye(n), torch.randn(n, dtype=torch.float64)


def test_conjugate_gradients_against_a_dense_solve():
    matrix, b = positive_definite()
    x = logo.conjugate_gradients(lambda v: matrix @ v, b, iterations=60, tolerance=1e-24)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=0, atol=1e-10)
    x = logo.conjugate_gradients(lambda v: matrix @ v, b, iterations=60)
    residual = b - matrix @ x
    assert 1e-24 < residual @ residual < 1e-10
    assert torch.equal(logo.conjugate_gradients(lambda v: matrix @ v, 0 * b), 0 * b)


def best_in_krylov_space(matrix, b, iterations):
    """What conjugate gradients are after so many iterations: the solution in the span of b, A b, A^2 b."""
    basis = [b / b.norm()]
    for _ in range(iterations - 1):
        v = matrix @ basis[-1]
        for _ in range(2):
            for q in basis:
                v = v - (q @ v) * q
        basis.append(v / v.norm())
    q = torch.stack(basis, 1)
    return q @ torch.linalg.solve(q.T @ matrix @ q, q.T @ b)


def test_conjugate_gradients_after_a_few_iterations():
    matrix, b = positive_definite()
    x = logo.conjugate_gradients(lambda v: matrix @ v, b, iterations=4)
    torch.testing.assert_close(x, best_in_krylov_space(matrix, b, 4), rtol=1e-9, atol=0)


def network(weights, x):
    """A network of three layers with tanh, from the list of its weights and biases."""
    w1, b1, w2, b2, w3, b3 = weights
    return ((x @ w1.T + b1).tanh() @ w2.T + b2).tanh() @ w3.T + b3


def policy(flat, shapes, obs):
    """The Gaussian policy of a vector that begins with the log std."""
    log_std, *weights = (
        part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)
    )
    return Normal(network(weights, obs), log_std.exp())


@pytest.fixture
def small(monkeypatch):
    """LOGO's networks with six units a layer, so that F is a small matrix."""
    monkeypatch.setattr(logo, "mlp", partial(logo.mlp, hidden=6))


def actor_and_data(seed=0, n=50):
    torch.manual_seed(seed)
    actor = logo.Actor(3, 2)
    for parameter in actor.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    obs = torch.randn(n, 3, dtype=torch.float64)
    mean, log_std = (value.detach() for value in actor(obs))
    z = torch.randn_like(mean)
    return actor, obs, mean + log_std.exp() * z, z


def shapes_of(actor):
    return [parameter.shape for parameter in actor.parameters()]


def hessian_of_kl(flat, shapes, obs):
    old = policy(flat.detach(), shapes, obs)

    def kl(new):
        return kl_divergence(old, policy(new, shapes, obs)).sum(-1).mean()

    return torch.func.hessian(kl)(flat)


def test_fisher_product_against_the_hessian_of_the_mean_kl(small):
    actor, obs, *_ = actor_and_data()
    flat = parameters_to_vector(actor.parameters()).detach()
    fisher = hessian_of_kl(flat, shapes_of(actor), obs)
    assert len(flat) > 70 and torch.linalg.matrix_rank(fisher) > 20
    for damping in (0.0, 0.3):
        product = logo.fisher_product(actor, obs, damping)
        for v in torch.randn(3, len(flat), dtype=torch.float64):
            torch.testing.assert_close(product(v), fisher @ v + damping * v, rtol=1e-10, atol=1e-12)


def step_of(actor, obs, action, advantage, radius):
    """The KL that a trust-region step returns, the true one, and how much mean rho A has gained."""
    old = deepcopy(actor)
    log_prob = logo.log_density(actor, obs, action).detach()
    kl = logo.trust_region_step(actor, obs, action, log_prob, advantage, radius)
    before, after = (policy(parameters_to_vector(a.parameters()), shapes_of(a), obs) for a in (old, actor))
    true_kl = kl_divergence(before, after).sum(-1).mean().item()
    rho = (after.log_prob(action) - before.log_prob(action)).sum(-1, keepdim=True).exp()
    return kl, true_kl, ((rho - 1) * (advantage - advantage.mean())).mean().item()


@pytest.mark.parametrize("radius", [1e-4, 0.01, 0.2, 1.0])
def test_an_accepted_step_stays_near_its_radius(small, radius):
    """Advantages of any scale, random ones and those of a narrower policy, whose KL grows fastest."""
    for seed in range(4):
        actor, obs, action, z = actor_and_data(seed)
        for advantage in (7 + 100 * torch.randn(50, 1, dtype=torch.float64), -(z**2).sum(1, keepdim=True)):
            kl, true_kl, gain = step_of(deepcopy(actor), obs, action, advantage, radius)
            assert kl == pytest.approx(true_kl, rel=1e-9)
            assert (0.4 if radius < 0.1 else 0.02) * radius < kl <= 1.5 * radius and gain > 0


def test_a_step_that_gains_nothing_is_taken_back():
    """A constant advantage has no slope, and a slope that is not finite leads nowhere."""
    actor, obs, action, _ = actor_and_data()
    before = deepcopy(actor.state_dict())
    log_prob = logo.log_density(actor, obs, action).detach()
    for constant in (1.0, torch.nan):
        advantage = torch.full((50, 1), constant, dtype=torch.float64)
        assert logo.trust_region_step(actor, obs, action, log_prob, advantage, 0.01) == 0.0
        assert same(before, actor.state_dict())


def test_the_value_network_is_fitted_with_its_penalty(small):
    """Where the fit ends the gradient of mean (V - R)^2 + 1e-3 sum theta^2 is zero."""
    torch.manual_seed(0)
    critic, obs = logo.mlp(3, 1), torch.randn(100, 3, dtype=torch.float64)
    target = 3 + obs[:, :1]
    first = logo.fit_value(critic, obs, target)
    for _ in range(40):
        logo.fit_value(critic, obs, target)
    weights = [parameter.detach() for parameter in critic.parameters()]

    def loss(weights):
        return ((network(weights, obs) - target) ** 2).mean() + 1e-3 * sum((w**2).sum() for w in weights)

    assert loss(weights) < 0.1 * first
    assert max(slope.abs().max() for slope in torch.func.grad(loss)(weights)) < 1e-4


# LOGO'S GUIDANCE


def test_the_radius_decays_when_returns_rise():
    args = logo.Args(delta_iterations=3, delta_decay=0.5)
    radius = logo.Radius(0.08)
    # never in k = 0, 1, 2, 3; then 5 > mean(0, 1, 2, 3, 4), 2 < mean(0, ..., 5), 3 > mean(0, ..., 2)
    deltas = [0.08, 0.08, 0.08, 0.08, 0.04, 0.04, 0.02]
    for k, mean_return in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 2.0, 3.0]):
        radius.update(k, mean_return, args)
        assert radius.delta == deltas[k]
    for i in range(60):
        radius.update(7 + i, 10.0 + i, args)
    assert radius.delta == 5e-7 and radius.returns == [60.0 + i for i in range(10)]
    radius.update(99, 64.5, args)  # the mean of the last ten: not exceeded
    copy = logo.Radius(1.0)
    copy.load_state_dict(radius.state_dict())
    assert vars(copy) == vars(radius)


@pytest.mark.parametrize("wrong_polarity", [False, True])
def test_the_guidance_reward_leads_to_the_demonstrations(wrong_polarity):
    """With the labels swapped it falls on demonstrations."""
    torch.manual_seed(0)
    discriminator, obs = logo.mlp(4, 1), torch.randn(200, 2, dtype=torch.float64)
    pairs = (obs, -obs, obs + 0.1, obs)  # the policy's actions are -s, the demonstrations' s
    before = logo.guidance_reward(discriminator, *pairs[2:]).mean()
    optimizer = torch.optim.Adam(discriminator.parameters(), 3e-3)
    for _ in range(50):
        loss = logo.discriminator_loss(discriminator, *(pairs[2:] + pairs[:2] if wrong_polarity else pairs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy, demonstrations = (logo.guidance_reward(discriminator, *p).mean() for p in (pairs[:2], pairs[2:]))
    if wrong_polarity:
        assert demonstrations < before - 0.3 and demonstrations < policy
    else:
        assert demonstrations > before + 0.3 and demonstrations > policy
    d = torch.sigmoid(discriminator(torch.cat(pairs[:2], 1)))
    torch.testing.assert_close(logo.guidance_reward(discriminator, *pairs[:2]), -d.log())
    discriminator[-1].bias.data.fill_(-1e4)
    torch.testing.assert_close(
        logo.guidance_reward(discriminator, *pairs[:2]), torch.full_like(d, -np.log(1e-8))
    )


def test_without_any_reward_there_is_guidance_only(monkeypatch):
    radii = []
    monkeypatch.setattr(logo, "trust_region_step", lambda *inputs: radii.append(inputs[-1]) or 0.0)
    settings = dict(num_steps=50, eval_episodes=1, total_timesteps=100, cuda=False, max_kl=0.3, delta=0.2)
    logo.train(logo.Args(env_id="Point2D-v0", **settings))
    assert radii == [0.2, 0.2]
    logo.train(logo.Args(env_id="Point2D-v0", **settings, dense=True))
    assert radii[2:] == [0.3, 0.2, 0.3, 0.2]
    logo.train(logo.Args(env_id="Point2D-v0", **settings | {"delta": 6e-7}, dense=True))
    assert radii[6:] == [0.3, 0.3]  # guidance has ended


# RECORDED RUNS

SETTINGS = dict(env_id="Near-v0", seed=3, cuda=False, eval_frequency=1_000, eval_episodes=1)
SETTINGS |= dict(num_steps=48, batch_size=16, update_epochs=3, learning_rate=1e-3, gamma=0.9, gae_lambda=0.8)
SETTINGS |= dict(clip_coef=0.13, vf_coef=0.7, ent_coef=0.02, max_grad_norm=0.3, rl_weight=0.6, min_std=0.995)
SETTINGS |= dict(max_kl=0.02, delta=0.05, delta_decay=0.8, delta_iterations=1, discriminator_lr=2e-3)
SETTINGS |= dict(discriminator_steps=2, total_timesteps=192)


def settings_for(script, **changes):
    fields = script.Args.__dataclass_fields__
    return {name: value for name, value in (SETTINGS | changes).items() if name in fields}


def recorded_run(script, monkeypatch, **changes):
    """A run of four rollouts. Its networks before and after it, and everything that was drawn or stepped."""
    run = SimpleNamespace(observed=[], steps=[], added=[], noise=[], permutations=[], demonstrations=[])
    write_demonstrations("demonstrations.npz", "Near-v0")
    run.args = script.Args(**settings_for(script, demo_path="demonstrations.npz", **changes))
    start_run, make_env, add = script.start_run, script.make_env, script.ReplayBuffer.add

    def recorded_start(args, parts, generators):
        run.start, run.parts = deepcopy({name: part.state_dict() for name, part in parts.items()}), parts
        return start_run(args, parts, generators)

    class Recorded(gym.Wrapper):
        def reset(self, **kwargs):
            obs, info = self.env.reset(**kwargs)
            run.observed.append(np.float64(obs))
            return obs, info

        def step(self, action):
            result = self.env.step(action)
            run.observed.append(np.float64(result[0]))
            run.steps.append((np.float64(action), *result[1:4], len(run.observed) - 1))
            return result

    def recorded_env(args, training):
        return Recorded(make_env(args, training)) if training else make_env(args, training)

    def recorded_add(buffer, *row):
        run.added.append(tuple(np.array(value, np.float64) for value in row))
        add(buffer, *row)

    def spy(owner, name, target):
        original = getattr(owner, name)

        def spied(*inputs, **kwargs):
            result = original(*inputs, **kwargs)
            target.append(deepcopy(result))
            return result

        patch.setattr(owner, name, spied)

    with monkeypatch.context() as patch:
        patch.setattr(script, "start_run", recorded_start)
        patch.setattr(script, "make_env", recorded_env)
        patch.setattr(script.ReplayBuffer, "add", recorded_add)
        spy(torch, "randperm", run.permutations)
        spy(torch, "randn_like", run.noise)
        if hasattr(script, "il_loss"):
            spy(script.DemonstrationBuffer, "sample", run.demonstrations)
        script.train(run.args)
    assert len(run.steps) == len(run.added) == run.args.total_timesteps
    ends = Counter(steps[2:4] for steps in run.steps)
    assert ends[True, False] >= 3 and ends[False, True] >= 3
    return run


def rollouts(run):
    """Each rollout's columns: s, a, r, s', end, as float64."""
    columns = [torch.tensor(np.stack(column)) for column in zip(*run.added, strict=True)]
    columns = [column.view(len(column), -1) for column in columns]
    return zip(*(column.split(run.args.num_steps) for column in columns), strict=True)


def weights_of(state, prefix=""):
    return [state[f"{prefix}{layer}.{kind}"].double() for layer in (0, 2, 4) for kind in ("weight", "bias")]


class Running:
    """Mean and variance of all values so far, and of 1e-4 values with mean 0 and variance 1."""

    def __init__(self):
        self.n, self.sum, self.squares = 1e-4, 0.0, 1e-4

    def add(self, x):
        self.n, self.sum, self.squares = self.n + 1, self.sum + x, self.squares + x**2

    def std(self):
        return np.sqrt(self.squares / self.n - (self.sum / self.n) ** 2 + 1e-8)


def normalised(run):
    """The observations in the order in which they came, and the rewards, each by the statistics so far."""
    running, observations = Running(), []
    for obs in run.observed:
        running.add(obs)
        observations.append(((obs - running.sum / running.n) / running.std()).clip(-10, 10))
    returns, discounted, rewards = Running(), 0.0, []
    for _, reward, terminated, *_ in run.steps:
        discounted = reward + (0.0 if terminated else run.args.gamma * discounted)
        returns.add(discounted)
        rewards.append(np.clip(reward / returns.std(), -10, 10))
    return observations, rewards, running


def check_transitions(run, observations, rewards):
    """What was stored is what the environment did, and the noise was added to the policy's mean."""
    for i, (row, step) in enumerate(zip(run.added, run.steps, strict=True)):
        obs, action, reward, next_obs, end = row
        taken, _, terminated, truncated, k = step
        np.testing.assert_allclose(obs, observations[k - 1], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(next_obs, observations[k], rtol=1e-6, atol=1e-6)
        assert reward == pytest.approx(rewards[i], rel=1e-9)
        assert end == (1 if terminated else 2 if truncated else 0)
        np.testing.assert_array_equal(taken, action.clip(-1, 1))
    assert (np.abs([row[1] for row in run.added]) > 1).any()


def check_exploration(run, i, phi, obs, action):
    """The rollout's actions are the mean plus std times the noise drawn at each step."""
    noise = torch.stack(run.noise[i * run.args.num_steps : (i + 1) * run.args.num_steps]).double()
    expected = network(phi[1:], obs) + phi[0].exp() * noise
    torch.testing.assert_close(action, expected, rtol=0, atol=2e-6)


def density(phi, obs, action):
    return Normal(network(phi[1:], obs), phi[0].exp()).log_prob(action).sum(1, keepdim=True)


# THE LOOPS


def ppo_objective(weights, batch, args):
    """Eq. (9), negated, with phi = (log std, policy network) and theta in one list."""
    phi, theta = weights[:7], weights[7:]
    obs, action, old_log_prob, old_value, advantage = batch
    target = advantage + old_value
    advantage = (advantage - advantage.mean()) / (advantage.var().sqrt() + 1e-8)
    rho, value = (density(phi, obs, action) - old_log_prob).exp(), network(theta, obs)
    low, high = 1 - args.clip_coef, 1 + args.clip_coef
    surrogate = torch.where(advantage > 0, rho.clip(max=high), rho.clip(min=low)) * advantage
    near = old_value + (value - old_value).clip(-args.clip_coef, args.clip_coef)
    error = torch.maximum((value - target) ** 2, (near - target) ** 2).mean() / 2
    entropy = Normal(0 * phi[0], phi[0].exp()).entropy().sum()
    return -surrogate.mean() + args.vf_coef * error - args.ent_coef * entropy


@pytest.mark.parametrize("anneal_lr", [True, False])
@pytest.mark.parametrize("script", [ppo, ppo_il], ids=NAMES[:2])
def test_ppo_against_an_independent_loop(script, anneal_lr, monkeypatch):
    with float64():
        run = recorded_run(script, monkeypatch, anneal_lr=anneal_lr)
    args, il = run.args, script is ppo_il
    observations, rewards, running = normalised(run)
    check_transitions(run, observations, rewards)
    start = run.start
    weights = [start["actor"]["log_std"], *weights_of(start["actor"], "net.")]
    weights += weights_of(start["critic"])
    adam, permutations = Adam(args.learning_rate, eps=1e-5), iter(run.permutations)
    demonstrations, clipped = iter(run.demonstrations), 0

    for i, (obs, action, reward, next_obs, end) in enumerate(rollouts(run)):
        phi, theta = weights[:7], weights[7:]
        check_exploration(run, i, phi, obs, action)
        statistics = Running()
        for seen in run.observed[: run.steps[(i + 1) * args.num_steps - 1][-1] + 1]:
            statistics.add(seen)
        mean, std = torch.tensor(statistics.sum / statistics.n), torch.tensor(statistics.std())
        old_log_prob, value = density(phi, obs, action), network(theta, obs)
        next_value = network(theta, next_obs)
        advantage = advantages_by_double_loop(reward, value, next_value, end, args.gamma, args.gae_lambda)
        adam.lr = args.learning_rate * (1 - i / 4) if anneal_lr else args.learning_rate
        for _ in range(args.update_epochs):
            for index in next(permutations).split(args.batch_size):
                batch = [column[index] for column in (obs, action, old_log_prob, value, advantage)]
                demo = next(demonstrations) if il else None

                def objective(weights, batch=batch, demo=demo, mean=mean, std=std):
                    loss = ppo_objective(weights, batch, args)
                    if demo is None:
                        return loss
                    demo_obs = ((demo[0] - mean) / std).clip(-10, 10)
                    return args.rl_weight * loss - density(weights[:7], demo_obs, demo[1]).mean()

                slopes = torch.func.grad(objective)(weights)
                norm = sum((slope**2).sum() for slope in slopes).sqrt()
                clipped += norm > args.max_grad_norm
                scale = (args.max_grad_norm / (norm + 1e-6)).clip(max=1)
                weights = adam.step(weights, [slope * scale for slope in slopes])
                if il:
                    weights[0] = weights[0].clip(min=np.log(args.min_std))

    assert next(permutations, None) is None and next(demonstrations, None) is None and clipped > 0
    actor = run.parts["actor"].state_dict()
    result = [actor["log_std"], *weights_of(actor, "net."), *weights_of(run.parts["critic"].state_dict())]
    torch.testing.assert_close(result, weights, rtol=0, atol=1e-8)
    np.testing.assert_allclose(actor["obs_mean"], running.sum / running.n, rtol=1e-9)
    np.testing.assert_allclose((actor["obs_var"] + 1e-8).sqrt(), running.std(), rtol=1e-9)
    if il:
        assert (weights[0] == np.log(args.min_std)).any()


def trpo_step(flat, shapes, obs, action, old_log_prob, advantage, radius):
    """The step on a vector of parameters, with a dense F."""
    advantage = (advantage - advantage.mean()) / (advantage.var().sqrt() + 1e-8)

    def surrogate(flat):
        log_prob = policy(flat, shapes, obs).log_prob(action).sum(1, keepdim=True)
        return ((log_prob - old_log_prob).exp() * advantage).mean()

    slope, old = torch.func.grad(surrogate)(flat), policy(flat, shapes, obs)
    matrix = hessian_of_kl(flat, shapes, obs) + 0.01 * torch.eye(len(flat))
    for iterations in range(1, 11):
        direction = best_in_krylov_space(matrix, slope, iterations)
        if ((slope - matrix @ direction) ** 2).sum() < 1e-10:
            break
    direction *= (2 * radius / (direction @ matrix @ direction)) ** 0.5
    for fraction in (1.0, 0.5, 0.25, 0.125, 1 / 16, 1 / 32):
        new = flat + fraction * direction
        kl = kl_divergence(old, policy(new, shapes, obs)).sum(-1).mean()
        if surrogate(new) - surrogate(flat) > 0.1 * fraction * (slope @ direction) and kl <= 1.5 * radius:
            return new
    return flat


@pytest.mark.parametrize("radius", [0.05, 3.0])
def test_steps_against_a_dense_computation(small, radius):
    """From a policy that did not act; at the large radius steps are halved for a gain that is too small."""
    for seed in range(12):
        actor, obs, action, _ = actor_and_data(seed)
        advantage, offset = (torch.randn(50, 1, dtype=torch.float64) for _ in range(2))
        data = obs, action, logo.log_density(actor, obs, action).detach() + 0.5 * offset, advantage, radius
        flat = parameters_to_vector(actor.parameters()).detach()
        expected = trpo_step(flat, shapes_of(actor), *data)
        places = [parameter.data_ptr() for parameter in actor.parameters()]
        assert logo.trust_region_step(actor, *data) > 0
        assert places == [parameter.data_ptr() for parameter in actor.parameters()]  # rounding depends on it
        result = parameters_to_vector(actor.parameters()).detach()
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3 * (expected - flat).norm().item())


def test_logo_against_an_independent_loop(small, monkeypatch):
    fits, fit_value = [], logo.fit_value

    def recorded_fit(critic, obs, target):
        before = deepcopy(critic.state_dict())
        loss = fit_value(critic, obs, target)
        fits.append((weights_of(before), target, weights_of(deepcopy(critic.state_dict()))))
        return loss

    monkeypatch.setattr(logo, "fit_value", recorded_fit)
    run = recorded_run(logo, monkeypatch)
    args = run.args
    check_transitions(run, run.observed, [reward for _, reward, *_ in run.steps])
    file = np.load("demonstrations.npz")
    demo = torch.tensor(np.concatenate([file["observations"], file["actions"]], 1)).double()
    actor, shapes = run.parts["actor"], shapes_of(run.parts["actor"])
    names = [name for name, _ in actor.named_parameters()]
    flat = torch.cat([run.start["actor"][name].flatten() for name in names])
    critics = [weights_of(run.start[name]) for name in ("critic", "guide_critic")]
    discriminator, adam = weights_of(run.start["discriminator"]), Adam(args.discriminator_lr)
    delta, last_returns, fits = args.delta, [0.0], iter(fits)

    for i, (obs, action, reward, next_obs, end) in enumerate(rollouts(run)):
        old = policy(flat, shapes, obs)
        phi = [
            part.view(shape)
            for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        check_exploration(run, i, phi, obs, action)
        mean_return = reward.sum().item() / (end > 0).sum().item()
        delta *= args.delta_decay if i > args.delta_iterations and mean_return > np.mean(last_returns) else 1
        last_returns.append(mean_return)
        pairs, old_log_prob = torch.cat([obs, action], 1), old.log_prob(action).sum(1, keepdim=True)
        guidance = -torch.sigmoid(network(discriminator, pairs)).log()
        for _ in range(args.discriminator_steps):

            def cross_entropy(weights, pairs=pairs):
                policy, demonstrations = (torch.sigmoid(network(weights, x)) for x in (pairs, demo))
                return -policy.log().mean() - (1 - demonstrations).log().mean()

            discriminator = adam.step(discriminator, torch.func.grad(cross_entropy)(discriminator))
        for j, (rewards, radius) in enumerate([(reward, args.max_kl), (guidance, delta)]):
            value, next_value = network(critics[j], obs), network(critics[j], next_obs)
            advantage = advantages_by_double_loop(
                rewards, value, next_value, end, args.gamma, args.gae_lambda
            )
            _before, target, critics[j] = next(fits)
            torch.testing.assert_close(target, advantage + value, rtol=0, atol=1e-7)
            flat = trpo_step(flat, shapes, obs, action, old_log_prob, advantage, radius)

    assert next(fits, None) is None and args.delta * args.delta_decay**2 <= delta < args.delta
    assert run.parts["radius"].delta == pytest.approx(delta, rel=1e-12)
    torch.testing.assert_close(parameters_to_vector(actor.parameters()).detach(), flat, rtol=0, atol=1e-6)
    result = weights_of(run.parts["discriminator"].state_dict())
    torch.testing.assert_close(result, discriminator, rtol=0, atol=1e-9)


# EVALUATION, RESUMING, MISTAKES

FLAGS = """--env-id Near-v0 --total-timesteps 230 --num-steps 64 --eval-frequency 50 --eval-episodes 2
--checkpoint-frequency 60 --no-cuda --seed 2"""


def flags_for(script):
    """--demo-path, and PPO's smaller minibatches, where there are such."""
    write_demonstrations("demonstrations.npz", "Near-v0")
    flags = FLAGS if script is ppo else f"{FLAGS} --demo-path {Path('demonstrations.npz').absolute()}"
    return flags if script is logo else f"{flags} --batch-size 32"


def test_evaluation_leaves_training_alone_and_statistics_frozen(script):
    """Twenty evaluations or one: the same run. The statistics of the saved policy are its training's."""
    states = []
    for frequency in (10, 1_000):
        assert call(script, *flags_for(script).split(), "--eval-frequency", frequency)[0] == 0
        path = run_dir()
        states.append(torch.load(path / "policy.pt", weights_only=True)["actor"])
        path = path.rename(f"{frequency}")
    assert same(*states)
    actor, module, args, _ = evaluate.load_policy(path / "policy.pt")
    env = module.make_env(args, training=False)
    returns = evaluate_returns(module, actor, env, args)
    row = (path / "evaluations.csv").read_text().splitlines()[-1]
    assert [float(value) for value in row.split(",")[1:]] == [np.mean(returns), np.std(returns)]
    assert same(states[0], actor.state_dict())
    obs = torch.tensor([[0.3, -0.2], [50.0, 0.0]])
    action = module.act(actor, obs.numpy())
    if script is not logo:
        mean, var = states[0]["obs_mean"], states[0]["obs_var"]
        assert (mean.abs() > 0.01).all() and (var < 0.9).all()
        obs = ((obs - mean) / (var + 1e-8) ** 0.5).clip(-10, 10).float()
        assert obs[1, 0] == 10
    expected = network(weights_of(states[0], "net."), obs.double()).clip(-1, 1)
    np.testing.assert_allclose(action, expected, rtol=0, atol=1e-6)
    assert module.act(actor, np.zeros((99, 2), np.float32), explore=True).std() > 0.5


def evaluate_returns(module, actor, env, args):
    return module.evaluate(module.act, actor, env, args.eval_episodes, seed=args.seed + 100)


def test_actions_beyond_the_box_are_clipped_in_evaluation(script):
    actor = script.Actor(2, 2)
    actor.net[-1].bias.data[:] = torch.tensor([3.0, -3.0])
    assert script.act(actor, np.zeros(2, np.float32)).tolist() == [1.0, -1.0]


@pytest.mark.parametrize("step", [150, 200])
def test_a_killed_run_is_resumed_bit_for_bit(script, step, monkeypatch, tmp_path):
    """From a checkpoint within a rollout, in the second and in the third one."""
    flags = flags_for(script)
    with pytest.raises(Killed):
        interrupted(script, monkeypatch, step, kill, flags)
    path = run_dir()
    checkpoint = state_of(path)
    assert checkpoint["global_step"] in range(66, step) and checkpoint["global_step"] % 64 > 0
    assert call(script, "--resume", path)[0] == 0
    resumed = path.rename(tmp_path / "resumed")
    assert call(script, *flags.split())[0] == 0
    assert_same_run(resumed, run_dir())
    assert state_of(resumed)["global_step"] > checkpoint["global_step"]


def test_a_signal_leaves_a_checkpoint_at_the_end_of_the_episode(script, monkeypatch, tmp_path):
    flags = flags_for(script)
    how = partial(os.kill, os.getpid(), signal.SIGTERM)
    code, out, err = interrupted(script, monkeypatch, 100, how, flags)
    path = run_dir()
    assert code == 128 + signal.SIGTERM and 100 <= state_of(path)["global_step"] < 112
    assert err == "stopping after this episode; Ctrl-C again stops at once\n"
    assert f"--resume {path} --total-timesteps 230" in out.splitlines()[-1]
    assert call(script, "--resume", path)[0] == 0
    resumed = path.rename(tmp_path / "resumed")
    assert call(script, *flags.split())[0] == 0
    for name in ("evaluations.csv", "policy.pt"):
        a, b = (folder / name for folder in (resumed, run_dir()))
        if name == "policy.pt":
            assert same(*(torch.load(file, weights_only=True)["actor"] for file in (a, b)))
        else:
            assert a.read_text() == b.read_text()


MISTAKES = {
    "--env-id Hoper-v4": "Hopper",
    "--demo-path none.npz": "cannot read demonstrations from none.npz",
    "--batch-size 100": "--batch-size is 1, or does not divide --num-steps 64",
    "--batch-size 1": "--batch-size is 1, or does not divide --num-steps 64",
    "--batch-size 0": "--batch-size 0 is not between 1",
    "--gamma 1.1": "--gamma 1.1 is not between 0 and 1",
    "--num-steps 0": "--num-steps 0 is not between 1",
    "--resume none": "none: not a run of this script",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(script, mistake):
    flag = mistake.split()[0]
    if flag[2:].replace("-", "_") not in script.Args.__dataclass_fields__:
        mistake, words = "--tau 0.1", "--tau"
    else:
        words = MISTAKES[mistake]
    code, out, err = call(
        script, *("" if "resume" in mistake else flags_for(script)).split(), *mistake.split()
    )
    assert (code, out) == (2, "") and "Traceback" not in err and not Path("runs").exists()
    assert words in " ".join(err.replace("│", " ").split())
    if flag in ("--env-id", "--demo-path", "--resume") and "--tau" not in mistake:
        assert len(err.splitlines()) == 1


def test_a_nan_is_reported_in_one_line(script, monkeypatch):
    monkeypatch.setattr(script, "sample", lambda actor, obs: np.full(2, np.nan))
    code, _, err = call(script, *flags_for(script).split())
    assert code == 2 and len(err.splitlines()) == 1 and "action or reward not finite at step 1" in err


@pytest.mark.parametrize("what", [0, 1], ids=["observation", "reward"])
def test_a_nan_of_the_task_stops_the_run_and_the_checkpoint_before_it_stays(script, what, monkeypatch):
    original, steps = Point2D.step, Counter()

    def poisoned(self, action):
        result = list(original(self, action))
        steps["made"] += 1
        if steps["made"] == 130:
            result[what] = result[what] * np.nan
        return tuple(result)

    flags = flags_for(script).replace("--eval-frequency 50", "--eval-frequency 1000")
    with monkeypatch.context() as patch:
        patch.setattr(Point2D, "step", poisoned)
        code, _, err = call(script, *flags.split())
    assert code == 2 and err.endswith("observation, action or reward not finite at step 130\n")
    state = state_of(run_dir())
    parts = [part for part in state.values() if isinstance(part, dict)]
    tensors = [value for part in parts for value in part.values() if torch.is_tensor(value)]
    assert 60 <= state["global_step"] < 130 and all(value.isfinite().all() for value in tensors)


# WHAT THE FILES SHARE


def test_the_files_repeat_each_other_to_the_letter():
    """And `diff baselines/ppo.py baselines/ppo_il.py` shows the imitation term only."""
    a, b, c = (blocks(f"baselines/{name}.py") for name in NAMES)
    assert {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)} == {
        "Args",
        "train",
        "il_loss",
    }
    shared = a.keys() & c.keys()
    assert {"log_density", "advantages", "sample"} == {name for name in shared if a[name] == c[name]}
    lines = [lines_of(f"baselines/{name}.py") for name in NAMES[:2]]
    changes = [line[2:].strip() for line in difflib.ndiff(*lines) if line.startswith("- ")]
    assert len(changes) == 1 and changes[0].startswith("batch_size: int")


def test_arguments_are_those_of_the_other_baselines():
    """But for a longer run, smaller minibatches, and what the seed is used for."""
    for name, other in (("ppo", "td3"), ("ppo_il", "td3_il"), ("logo", "td3_il"), ("ppo_il", "logo")):
        a, b = (arguments(f"baselines/{script}.py") for script in (name, other))
        shared = a.keys() & b.keys() - {"total_timesteps", "num_steps", "batch_size", "seed", "demo_path"}
        assert len(shared) >= 14 and all(a[argument] == b[argument] for argument in shared)
