"""DiffAIL: its denoiser, discriminator and reward, its loop, and what is SAC in it."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import evaluate
from baselines import diffail
from tests.conftest import ROOT, call, write_demonstrations
from tests.soak import assert_same_run
from tests.test_resume import Killed, interrupted, kill, run_dir, state_of
from tests.test_shared_blocks import arguments, blocks

FLAGS = """--env-id Point2D-v0 --total-timesteps 320 --learning-starts 150 --batch-size 32 --no-cuda
--eval-frequency 90 --eval-episodes 1 --checkpoint-frequency 1 --buffer-size 1000"""
STEPS, OBS_DIM, ACTION_DIM = 5, 3, 2
M = OBS_DIM + ACTION_DIM


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    return diffail.Denoiser(OBS_DIM, ACTION_DIM, hidden=16, steps=STEPS)


class Exact:
    """A denoiser that is off by `error` in each component."""

    alpha_bar = torch.linspace(0.9, 0.2, STEPS)

    def __init__(self, noise, error):
        self.noise, self.error = noise, error

    def __call__(self, x_t, t):
        return self.noise + self.error


def test_the_noise_levels(denoiser):
    """The variance of x_t is 1 if that of x is; beta rises linearly."""
    beta = np.linspace(1e-4, 0.02, STEPS)
    expected = [math.prod(1 - beta[: i + 1]) for i in range(STEPS)]
    np.testing.assert_allclose(denoiser.alpha_bar, expected)
    seen = []
    denoiser.forward = lambda x_t, t: seen.append(x_t) or torch.zeros_like(x_t)
    x, noise = torch.full((STEPS, M), 2.0), torch.full((STEPS, M), 3.0)
    error = diffail.diffusion_error(denoiser, x, torch.arange(STEPS), noise)
    assert (error == 9).all()
    for row, level in zip(seen[0], expected, strict=True):
        np.testing.assert_allclose(row, 2 * level**0.5 + 3 * (1 - level) ** 0.5)


def test_the_discriminators_loss_by_its_definition():
    torch.set_default_dtype(torch.float64)
    demo_error, error = torch.rand(8, M), torch.rand(8, M) + 0.1
    d_demo, d = (math.e ** -e.mean(1) for e in (demo_error, error))
    expected = -d_demo.log().mean() - (1 - d).log().mean()
    torch.testing.assert_close(diffail.discriminator_loss(demo_error, error), expected)
    at_one = diffail.discriminator_loss(torch.zeros(8, M), torch.zeros(8, M))
    assert at_one.isfinite() and at_one > 10  # what the policy does is taken for a demonstration


def test_the_gradient_penalty_by_finite_differences(denoiser):
    x, t, noise = torch.randn(4, M), torch.tensor([0, 1, 3, 4]), torch.randn(4, M)
    for parameter in denoiser.parameters():
        parameter.data *= 2  # steep enough for a penalty far from 1

    def d(x):
        return torch.exp(-diffail.diffusion_error(denoiser, x, t, noise).mean(1)).detach()

    h, slope = 1e-6, torch.zeros(4, M)
    for j in range(M):
        shift = h * torch.eye(M)[j]
        slope[:, j] = (d(x + shift) - d(x - shift)) / (2 * h)
    expected = ((slope.pow(2).sum(1).sqrt() - 1) ** 2).mean()
    penalty = diffail.gradient_penalty(denoiser, x, t, noise)
    torch.testing.assert_close(penalty, expected, rtol=1e-6, atol=0)
    assert penalty < 0.95
    diffail.gradient(penalty, dict(denoiser.named_parameters()), allow_unused=True)  # it trains psi


@pytest.mark.parametrize("kind", ["consistent", "per-component"])
def test_the_reward_by_loops(kind, denoiser):
    """And the released form is never the smaller one: exp is convex."""
    x, noise = torch.randn(3, M), torch.randn(STEPS, 3, M)
    rewards = diffail.surrogate_reward(denoiser, x, noise, kind)
    for i in range(3):
        d = []
        for t in range(STEPS):
            error = diffail.diffusion_error(denoiser, x[i : i + 1], torch.tensor([t]), noise[t, i : i + 1])
            d.append(math.exp(-error.mean().item()) if kind == "consistent" else (-error).exp().mean().item())
        assert math.isclose(rewards[i, 0], -math.log(1 - sum(d) / STEPS), rel_tol=1e-9)
    other = diffail.surrogate_reward(denoiser, x, noise, "per-component")
    assert rewards.shape == (3, 1) and (other >= rewards - 1e-12).all()


def test_the_reward_is_finite_at_both_ends():
    noise = torch.randn(STEPS, 6, M)
    for error, low, high in ((0.0, 10, 20), (1e-4, 5, 20), (30.0, 0, 1e-6)):
        perfect = Exact(noise.flatten(0, 1), error)
        reward = diffail.surrogate_reward(perfect, torch.zeros(6, M), noise, "consistent")
        assert reward.isfinite().all() and (low <= reward).all() and (reward <= high).all()


def test_the_denoiser_tells_demonstrations_from_random_actions():
    """On the shipped file of Hopper: its loss falls on demonstrations, and they get the higher reward."""
    args = diffail.Args(env_id="Hopper-v4")
    env = diffail.make_env(args, training=False)
    demonstrations = diffail.DemonstrationBuffer(
        ROOT / "demos/Hopper-sac.npz", args.env_id, env, torch.device("cpu")
    )
    torch.manual_seed(0)
    denoiser = diffail.Denoiser(11, 3, 128, 10)
    std, mean = torch.std_mean(demonstrations.obs, 0)
    denoiser.mean, denoiser.std = mean, std
    optimizer = torch.optim.Adam(denoiser.parameters(), 3e-3)
    losses = []
    for _ in range(800):
        obs, action = demonstrations.sample(256)
        fake = denoiser.pair(obs, 2 * torch.rand_like(action) - 1)
        psi_grad, log = diffail.discriminator_gradient(denoiser, denoiser.pair(obs, action), fake, 0.0)
        diffail.step(optimizer, denoiser, psi_grad)
        losses.append(-log["charts/d_demo"].mean().log().item())
    obs, action = demonstrations.sample(1_000)
    noise = torch.randn(10, 1_000, 14)
    rewards = [
        diffail.surrogate_reward(denoiser, denoiser.pair(obs, a), noise, "consistent").mean()
        for a in (action, 2 * torch.rand_like(action) - 1)
    ]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])
    assert rewards[0] > 4 * rewards[1] > 0


# THE LOOP


def squashed(actor, obs, noise):
    """An action and its log-density by torch.distributions."""
    mean, log_std = actor.gaussian(obs)
    tanh = TanhTransform(cache_size=1)
    policy = TransformedDistribution(Normal(mean, log_std.exp()), tanh)
    action = tanh(mean + log_std.exp() * noise)
    return action, policy.log_prob(action).sum(1, keepdim=True)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_ten_iterations_against_an_independent_loop(weight, monkeypatch):
    """From the checkpoint at step 200, whose random numbers are drawn again in the order of the loop.

    Random actions, which do not touch PyTorch's generator, last until step 290.
    """
    flags = FLAGS.replace("320", "300").replace("150", "290") + f" --gp-weight {weight}"
    states, original = {}, diffail.save_checkpoint

    def save_checkpoint(path, parts, generators, global_step, evaluations):
        original(path, parts, generators, global_step, evaluations)
        states[global_step] = torch.load(path, weights_only=True)

    monkeypatch.setattr(diffail, "save_checkpoint", save_checkpoint)
    assert call(diffail, *flags.split())[0] == 0
    start, end = states[200], states[300]

    args = diffail.Args(env_id="Point2D-v0")
    env = diffail.make_env(args, training=True)
    demonstrations = diffail.DemonstrationBuffer(
        ROOT / "demos/Point2D-sac.npz", args.env_id, env, torch.device("cpu")
    )
    actor, critic, target = diffail.Actor(2, 2), diffail.Critic(2, 2), diffail.Critic(2, 2)
    denoiser = diffail.Denoiser(2, 2, 128, 10)
    names = {"actor": actor, "critic": critic, "target_critic": target, "denoiser": denoiser}
    for name, module in names.items():
        module.load_state_dict(start[name])
    log_alpha = torch.tensor(0.2).log().requires_grad_()
    optimizers = {
        "denoiser": torch.optim.Adam(denoiser.parameters(), 3e-5),
        "critic": torch.optim.Adam(critic.parameters(), 3e-4, (0.25, 0.999)),
        "actor": torch.optim.Adam(actor.parameters(), 3e-4, (0.25, 0.999)),
        "alpha": torch.optim.Adam([log_alpha], 3e-4, (0.25, 0.999)),
    }

    def minimise(name, loss):
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()

    def error_of(x, t, noise):
        level = denoiser.alpha_bar[t].unsqueeze(1)
        return (noise - denoiser(level.sqrt() * x + (1 - level).sqrt() * noise, t)).square()

    mean, std = start["denoiser"]["mean"], start["denoiser"]["std"]
    torch.testing.assert_close(mean, demonstrations.obs.mean(0))
    torch.testing.assert_close(std, demonstrations.obs.std(0, correction=0))

    def pairs(obs, action):
        return torch.cat([(obs - mean) / std, action], 1)

    torch.set_rng_state(start["torch"])
    rows = end["buffer"]["rows"]
    for filled in range(291, 301):
        torch.randn(2)  # the exploration
        x_d = pairs(*demonstrations.sample(32))
        obs, action, *_ = rows[torch.randint(filled, (32,))].split((2, 2, 1, 2, 1), 1)
        x, t, noise = pairs(obs, action), torch.randint(10, (3, 32)), torch.randn(3, 32, 4)
        demo_error, error = error_of(x_d, t[0], noise[0]).mean(1), error_of(x, t[1], noise[1]).mean(1)
        loss = demo_error.mean() - (1 - (-error.clamp(min=1e-6)).exp()).log().mean()
        if weight:
            share = torch.rand(32, 1)
            between = (share * x_d + (1 - share) * x).requires_grad_()
            d = (-error_of(between, t[2], noise[2]).mean(1)).exp()
            (slope,) = torch.autograd.grad(d.sum(), between, create_graph=True)
            loss = loss + weight * (slope.square().sum(1).sqrt() - 1).square().mean()
        minimise("denoiser", loss)

        obs, action, _, next_obs, terminated = rows[torch.randint(filled, (32,))].split((2, 2, 1, 2, 1), 1)
        noise = torch.randn(10, 32, 4)
        with torch.no_grad():
            levels = [torch.full((32,), t) for t in range(10)]
            d = [
                (-error_of(pairs(obs, action), t, e).mean(1)).exp()
                for t, e in zip(levels, noise, strict=True)
            ]
            reward = -2 * (1 - torch.stack(d).mean(0).clamp(max=1 - 1e-6)).log()[:, None]
            alpha = log_alpha.exp()
            next_action, next_log_prob = squashed(actor, next_obs, torch.randn(32, 2))
            soft_q = torch.minimum(*target(next_obs, next_action)) - alpha * next_log_prob
            y = reward + 0.99 * (1 - terminated) * soft_q
        minimise("critic", sum((q - y).square().mean() for q in critic(obs, action)))
        new_action, log_prob = squashed(actor, obs, torch.randn(32, 2))
        minimise("actor", (alpha * log_prob - torch.minimum(*critic(obs, new_action))).mean())
        minimise("alpha", -(log_alpha * (log_prob.detach() - 1)).mean())  # target entropy -|A| / 2
        for old, new in zip(target.parameters(), critic.parameters(), strict=True):
            old.data = 0.995 * old.data + 0.005 * new.data
    assert not terminated.any() and reward.std() > 0
    for name, module in names.items():
        for key, value in module.state_dict().items():
            torch.testing.assert_close(end[name][key], value, rtol=0, atol=5e-6, msg=f"{name} {key}")
    torch.testing.assert_close(end["log_alpha"]["0"], log_alpha.detach(), rtol=0, atol=1e-6)
    for state in end["alpha_optimizer"]["state"].values():  # Adam's step hardly shows the target entropy
        expected = optimizers["alpha"].state[log_alpha]["exp_avg_sq"]
        torch.testing.assert_close(state["exp_avg_sq"], expected, rtol=1e-3, atol=0)
    moved = (end["denoiser"]["net.0.weight"] - start["denoiser"]["net.0.weight"]).abs().max()
    assert moved > 1e-4


def test_the_tasks_reward_is_not_used(monkeypatch):
    """Training is the same under any reward."""
    runs = []
    for shift in (0.0, 5.0):
        original = diffail.make_env

        def make_env(args, training, shift=shift, original=original):
            env = original(args, training)
            return diffail.gym.wrappers.TransformReward(env, lambda reward: reward + shift)

        with monkeypatch.context() as patch:
            patch.setattr(diffail, "make_env", make_env)
            assert call(diffail, *FLAGS.split())[0] == 0
        runs.append(state_of(run_dir()))
        run_dir().rename(f"run{shift}")
    a, b = runs
    assert all(torch.equal(a["actor"][name], b["actor"][name]) for name in a["actor"])


def test_terminations_are_stored_if_asked_for(monkeypatch):
    class Ending(diffail.gym.Wrapper):
        def step(self, action):
            obs, reward, _, truncated, info = self.env.step(action)
            self.steps = getattr(self, "steps", 0) + 1
            return obs, reward, self.steps % 20 == 0, truncated, info

    original = diffail.make_env
    monkeypatch.setattr(diffail, "make_env", lambda args, training: Ending(original(args, training)))
    args = diffail.Args(env_id="Point2D-v0", total_timesteps=100, learning_starts=100, batch_size=8)
    args.cuda, args.eval_episodes, args.checkpoint_frequency, args.buffer_size = False, 1, 1, 200
    for args.terminations, expected in ((True, 5), (False, 0)):
        rows = torch.load(diffail.train(args) / "checkpoint.pt", weights_only=True)["buffer"]["rows"]
        assert rows[:, -1].sum() == expected and len(rows) == 100


def test_a_killed_run_is_resumed_bit_for_bit(monkeypatch, tmp_path):
    with pytest.raises(Killed):
        interrupted(diffail, monkeypatch, 270, kill, FLAGS)
    path = run_dir()
    assert state_of(path)["global_step"] == 200
    assert call(diffail, "--resume", path)[0] == 0
    resumed = path.rename(tmp_path / "resumed")
    assert call(diffail, *FLAGS.split())[0] == 0
    assert_same_run(resumed, run_dir())
    assert {"denoiser", "denoiser_optimizer", "log_alpha"} <= state_of(resumed).keys()
    actor, module, args, global_step = evaluate.load_policy(run_dir() / "policy.pt")
    assert (module, global_step) == (diffail, 320)
    env = module.make_env(args, training=False)
    returns = module.evaluate(module.act, actor, env, 1, seed=args.seed + 100)
    assert (run_dir() / "evaluations.csv").read_text().splitlines()[-1] == f"320,{returns[0]},0.0"


MISTAKES = {
    "--reward consistant": "per-component",
    "--denoiser-lr -1": "--denoiser-lr -1.0 is not between 0",
    "--diffusion-steps 0": "--diffusion-steps 0 is not between 1",
    "--gp-weight -1": "--gp-weight -1.0 is not between 0",
    "--env-id Hoper-v4": "Hoper",
    "--demo-path none.npz": "cannot read demonstrations from none.npz",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(mistake, tmp_path):
    """Or the box that tyro draws, for what it finds."""
    code, out, err = call(diffail, *FLAGS.split(), *mistake.split())
    assert (code, out) == (2, "") and "Traceback" not in err and not list(tmp_path.iterdir())
    assert MISTAKES[mistake] in " ".join(err.replace("│", " ").split())


def test_demonstrations_of_another_task_are_refused(tmp_path):
    path = write_demonstrations(tmp_path / "hopper.npz", "Hopper-v4", 11, 3)
    code, _, err = call(diffail, *FLAGS.split(), "--demo-path", path)
    assert code == 2 and err.count("\n") == 1 and "of Hopper, not Point2D" in err


def test_what_is_sacs_is_the_same_to_the_letter():
    vanilla, ours = blocks("baselines/sac.py"), blocks("baselines/diffail.py")
    assert {name for name in vanilla if vanilla[name] != ours.get(name)} == {"Args", "train"}
    a, b = arguments("baselines/sac.py"), arguments("baselines/diffail.py")
    changed = {"dense", "batch_size", "autotune"}  # the comments of the first two
    assert {name for name in a if a[name] != b.get(name)} == changed
