"""The lower level's losses against formulas written out anew, in float64."""

from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

from tests.conftest import short_run

OBS_DIM, ACTION_DIM, N, GAMMA, ALPHA = 5, 3, 40, 0.9, 0.3
BOX = gym.spaces.Box(np.float32([-2, -1, 0]), np.float32([2, 3, 1]))  # neither centred nor of unit size


@pytest.fixture
def nets(gild_script):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    actor, critic = gild_script.Actor(OBS_DIM, BOX).double(), gild_script.Critic(OBS_DIM, ACTION_DIM)
    target_actor, target_critic = (
        gild_script.Actor(OBS_DIM, BOX).double(),
        gild_script.Critic(OBS_DIM, ACTION_DIM),
    )
    return actor, critic, target_actor, target_critic


@pytest.fixture
def batch(nets):
    obs, next_obs = torch.randn(2, N, OBS_DIM)
    action = torch.tensor(BOX.low) + torch.rand(N, ACTION_DIM) * torch.tensor(BOX.high - BOX.low)
    return obs, action, torch.randn(N, 1), next_obs, (torch.rand(N, 1) < 0.3).double()


def policy(actor, obs):
    """SAC's policy, put together from PyTorch's distributions."""
    mean, log_std = actor.net(obs).chunk(2, -1)
    low, high = torch.tensor(BOX.low).double(), torch.tensor(BOX.high).double()
    squash = [TanhTransform(), AffineTransform((high + low) / 2, (high - low) / 2)]
    return TransformedDistribution(Normal(mean, log_std.clamp(-20, 2).exp()), squash)


def critic_loss(script, algorithm, nets, batch, noise=(0.0, 0.5)):
    actor, critic, target_actor, target_critic = nets
    if algorithm == "sac":
        return script.critic_loss(critic, target_critic, actor, batch, GAMMA, ALPHA)
    more = noise if algorithm == "td3" else ()
    return script.critic_loss(critic, target_critic, target_actor, batch, GAMMA, *more)


def test_the_critics_target(gild_script, algorithm, nets, batch):
    """Eq. (5): y = r + gamma Q'(s', a') where the episode goes on, r where it has terminated."""
    actor, critic, target_actor, target_critic = nets
    obs, action, reward, next_obs, terminated = batch
    torch.manual_seed(1)
    loss, q1, *_ = critic_loss(gild_script, algorithm, nets, batch)
    torch.manual_seed(1)
    expected = 0.0
    if algorithm == "sac":
        noise = torch.randn_like(action)
        mean, log_std = actor.net(next_obs).chunk(2, -1)
        u = mean + noise * log_std.clamp(-20, 2).exp()
        next_action = torch.tanh(u) * actor.action_scale + actor.action_bias
        entropy = -policy(actor, next_obs).log_prob(next_action).sum(-1, keepdim=True)
        value = torch.minimum(*target_critic(next_obs, next_action)) + ALPHA * entropy
    elif algorithm == "td3":
        value = torch.minimum(*target_critic(next_obs, target_actor(next_obs)))
    else:
        value = target_critic(next_obs, target_actor(next_obs))
    target = torch.where(terminated > 0, reward, reward + GAMMA * value).detach()
    outputs = critic(obs, action)
    for q in outputs if isinstance(outputs, tuple) else [outputs]:
        expected = expected + ((q - target) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q1, outputs[0] if isinstance(outputs, tuple) else outputs)


def test_td3s_target_noise_is_clipped_and_scaled_to_the_box(batch):
    import gild_td3

    torch.manual_seed(0)
    actor, critic = gild_td3.Actor(OBS_DIM, BOX).double(), gild_td3.Critic(OBS_DIM, ACTION_DIM)
    seen = []
    spy = deepcopy(critic)
    spy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    gild_td3.critic_loss(critic, spy, actor, batch, GAMMA, 10.0, 0.5)  # noise so large that the clip decides
    (action,) = seen
    low, high = torch.tensor(BOX.low).double(), torch.tensor(BOX.high).double()
    bound = 0.5 * (high - low) / 2
    change = action - actor(batch[3])
    inside = (action > low + 1e-9) & (action < high - 1e-9)
    assert (action >= low - 1e-9).all() and (action <= high + 1e-9).all() and inside.any()
    assert (change.abs() <= bound + 1e-6).all()
    at_bound = ((change.abs() - bound).abs() < 1e-6) & inside
    assert at_bound.sum() > 0.8 * inside.sum()


def test_the_actors_loss(gild_script, algorithm, nets, batch):
    """Eq. (2): the mean of -Q_1, and for SAC of alpha log pi - min Q."""
    actor, critic, *_ = nets
    obs, noise = batch[0], torch.randn(N, ACTION_DIM)
    if algorithm == "sac":
        loss, log_prob = gild_script.rl_loss(actor, critic, obs, noise, ALPHA)
        action = actor(obs, noise)[0]
        expected_log_prob = policy(actor, obs).log_prob(action).sum(-1, keepdim=True)
        torch.testing.assert_close(log_prob, expected_log_prob, rtol=1e-6, atol=1e-6)
        expected = (ALPHA * expected_log_prob - torch.minimum(*critic(obs, action))).mean()
    else:
        loss = gild_script.rl_loss(actor, critic, obs)
        q = critic(obs, actor(obs))
        expected = -(q[0] if isinstance(q, tuple) else q).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_the_imitation_loss(gild_script, algorithm, nets, batch):
    """Eq. (3): the squared error, or for SAC the negative log-likelihood of the squashed, scaled policy."""
    actor, (obs, action) = nets[0], batch[:2]
    if algorithm == "sac":
        loss, distance = gild_script.il_loss(actor, obs, action)
        mean_action = actor(obs, torch.zeros(N, ACTION_DIM))[0]
        torch.testing.assert_close(distance, ((mean_action - action) ** 2).mean())
        expected = -policy(actor, obs).log_prob(action).sum(-1).mean()
    else:
        loss = gild_script.il_loss(actor(obs), action)
        expected = ((actor(obs) - action) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_demonstrated_actions_on_the_boundary_stay_finite(nets, batch):
    import gild_sac

    actor = gild_sac.Actor(OBS_DIM, BOX)
    action = torch.tensor(BOX.high).expand(N, ACTION_DIM)
    loss, _ = gild_sac.il_loss(actor.float(), batch[0].float(), action)
    assert loss.isfinite()


def test_the_weight_of_rl_has_a_floor(gild_script):
    q = torch.tensor([[2.0], [-4.0]], requires_grad=True)
    weight = gild_script.rl_weight(q, 2.5)
    assert weight.item() == pytest.approx(2.5 / 3) and not weight.requires_grad
    assert gild_script.rl_weight(torch.zeros(4, 1), 2.5) == pytest.approx(2.5e6)


def test_the_policy_stays_in_the_box(gild_script, algorithm, nets):
    obs = 100 * torch.randn(200, OBS_DIM)
    low, high = torch.tensor(BOX.low) - 1e-6, torch.tensor(BOX.high) + 1e-6
    noise = (torch.randn(200, ACTION_DIM),) if algorithm == "sac" else ()
    out = nets[0](obs, *noise)
    action = out[0] if algorithm == "sac" else out
    assert ((low <= action) & (action <= high)).all()


def test_a_time_limit_is_no_terminal_state(vanilla_script, tmp_path):
    """Point2D's episodes end by truncation, Hopper's by falling: only the latter is stored as an end."""
    short_run(vanilla_script, checkpoint_frequency=1)
    short_run(vanilla_script, env_id="Hopper-v4", checkpoint_frequency=1)
    ends = {}
    for path in tmp_path.glob("runs/*/checkpoint.pt"):
        state = torch.load(path, weights_only=True)
        ends[path.parent.name.split("__")[0]] = state["rows"][:, -1]
    assert len(ends["Point2D-v0"]) >= 200 and ends["Point2D-v0"].sum() == 0
    falls = ends["Hopper-v4"]
    assert falls[-1] == 1 and 3 <= falls.sum() < len(falls) / 3
