"""The lower level's losses and gradients against formulas written out anew, in float64."""

from copy import deepcopy
from importlib import import_module

import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from tests.conftest import short_run

OBS_DIM, ACTION_DIM, N, GAMMA, ALPHA, BETA = 5, 3, 40, 0.9, 0.3, 1.5


@pytest.fixture
def nets(gild_script):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    widths = OBS_DIM, ACTION_DIM
    actor, critic = gild_script.Actor(*widths), gild_script.Critic(*widths)
    return actor, critic, gild_script.Actor(*widths), gild_script.Critic(*widths)


@pytest.fixture
def batch(nets):
    obs, next_obs = torch.randn(2, N, OBS_DIM)
    action = torch.rand(N, ACTION_DIM) * 2 - 1
    return obs, action, torch.randn(N, 1), next_obs, (torch.rand(N, 1) < 0.3).double()


def policy(actor, obs):
    """SAC's policy, put together from PyTorch's distributions."""
    mean, log_std = actor.net(obs).chunk(2, -1)
    return TransformedDistribution(Normal(mean, log_std.clamp(-20, 2).exp()), TanhTransform())


def q1(critic, obs, action):
    out = critic(obs, action)
    return out[0] if isinstance(out, tuple) else out


def critic_inputs(script, algorithm, nets, batch, **changes):
    """The arguments of critic_loss and critic_gradient."""
    actor, critic, target_actor, target_critic = nets
    if algorithm == "sac":
        return critic, target_critic, actor, batch, torch.tensor(ALPHA), script.Args(gamma=GAMMA, **changes)
    changes = {"policy_noise": 0.0, **changes} if algorithm == "td3" else changes
    return critic, target_critic, target_actor, batch, script.Args(gamma=GAMMA, **changes)


def expected_critic_loss(algorithm, nets, batch):
    """Eq. (5), y = r + gamma Q'(s', a'), or r after a terminal state. For SAC it draws the noise anew."""
    actor, critic, target_actor, target_critic = nets
    obs, action, reward, next_obs, terminated = batch
    if algorithm == "sac":
        mean, log_std = actor.net(next_obs).chunk(2, -1)
        next_action = torch.tanh(mean + torch.randn_like(action) * log_std.clamp(-20, 2).exp())
        entropy = -policy(actor, next_obs).log_prob(next_action).sum(-1, keepdim=True)
        value = torch.minimum(*target_critic(next_obs, next_action)) + ALPHA * entropy
    elif algorithm == "td3":
        value = torch.minimum(*target_critic(next_obs, target_actor(next_obs)))
    else:
        value = target_critic(next_obs, target_actor(next_obs))
    target = torch.where(terminated > 0, reward, reward + GAMMA * value).detach()
    outputs = critic(obs, action)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(((q - target) ** 2).mean() for q in outputs)


def test_the_critics_target(gild_script, algorithm, nets, batch):
    inputs = critic_inputs(gild_script, algorithm, nets, batch)
    torch.manual_seed(1)
    loss, value, *_ = gild_script.critic_loss(*inputs)
    torch.manual_seed(1)
    torch.testing.assert_close(loss, expected_critic_loss(algorithm, nets, batch), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(value, q1(nets[1], *batch[:2]))


def test_the_critics_gradient(gild_script, algorithm, nets, batch):
    inputs, critic = critic_inputs(gild_script, algorithm, nets, batch), nets[1]
    torch.manual_seed(1)
    found, log = gild_script.critic_gradient(*inputs)
    torch.manual_seed(1)
    expected = torch.autograd.grad(expected_critic_loss(algorithm, nets, batch), list(critic.parameters()))
    assert list(found) == [name for name, _ in critic.named_parameters()]
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert log and not any(value.requires_grad for value in log.values())


def test_td3s_target_noise_is_clipped_and_its_action_stays_in_the_box():
    import gild_td3

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    actor, critic = gild_td3.Actor(OBS_DIM, ACTION_DIM), gild_td3.Critic(OBS_DIM, ACTION_DIM)
    with torch.no_grad():
        actor.net[-1].bias.copy_(torch.tensor([0.0, 2.0, -2.0]))  # in the middle and close to both ends
    seen, spy = [], deepcopy(critic)
    spy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    obs, action, reward, next_obs = (torch.randn(1_000, n) for n in (OBS_DIM, ACTION_DIM, 1, OBS_DIM))
    batch = obs, action, reward, next_obs, torch.zeros(1_000, 1)
    args = gild_td3.Args(policy_noise=10.0, noise_clip=0.5)  # noise so large that the clip decides
    gild_td3.critic_loss(critic, spy, actor, batch, args)
    change = seen[0] - actor(next_obs)
    inside = seen[0].abs() < 1
    assert seen[0].abs().max() == 1 and (~inside).any(0).tolist() == [False, True, True]
    assert change.abs().max() <= 0.5 + 1e-12
    at_bound = ((change.abs() - 0.5).abs() < 1e-12) & inside
    assert at_bound.sum() > 0.9 * inside.sum()


def rl_inputs(algorithm, nets, batch):
    """The arguments of rl_loss."""
    if algorithm == "sac":
        return nets[0], nets[1], batch[0], torch.randn(N, ACTION_DIM), torch.tensor(ALPHA)
    return nets[0], nets[1], batch[0]


def expected_rl_loss(actor, critic, obs, noise=None, alpha=None):
    """Eq. (2), and the Q in it: the mean of -Q_1, and for SAC of alpha log pi - min Q."""
    if noise is None:
        q = q1(critic, obs, actor(obs))
        return -q.mean(), q
    mean, log_std = actor.net(obs).chunk(2, -1)
    action = torch.tanh(mean + noise * log_std.clamp(-20, 2).exp())
    q = torch.minimum(*critic(obs, action))
    return (alpha * policy(actor, obs).log_prob(action).sum(-1, keepdim=True) - q).mean(), q


@pytest.mark.parametrize("name", ["gild_{}", "baselines.{}", "baselines.{}_il"])
def test_the_actors_loss(algorithm, name, nets, batch):
    inputs = rl_inputs(algorithm, nets, batch)
    found = import_module(name.format(algorithm)).rl_loss(*inputs)
    loss, q = expected_rl_loss(*inputs)
    if algorithm == "sac":
        log_prob = policy(nets[0], batch[0]).log_prob(nets[0](batch[0], inputs[3])[0]).sum(-1, keepdim=True)
        torch.testing.assert_close(found[1], log_prob, rtol=1e-6, atol=1e-6)
    if name != "baselines.{}":
        torch.testing.assert_close(found[-1], q, rtol=1e-9, atol=1e-9)
    found = found if torch.is_tensor(found) else found[0]
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-6)


def expected_il_loss(actor, obs, action, stochastic):
    """Eq. (3): the squared error, or for SAC the negative log-likelihood of the squashed policy."""
    if stochastic:
        return -policy(actor, obs).log_prob(action).sum(-1).mean()
    return ((actor(obs) - action) ** 2).mean()


def test_the_imitation_loss(gild_script, algorithm, nets, batch):
    actor, (obs, action) = nets[0], batch[:2]
    if algorithm == "sac":
        loss, distance = gild_script.il_loss(actor, obs, action)
        mean_action = actor(obs, torch.zeros(N, ACTION_DIM))[0]
        torch.testing.assert_close(distance, ((mean_action - action) ** 2).mean())
    else:
        loss = gild_script.il_loss(actor(obs), action)
    torch.testing.assert_close(
        loss, expected_il_loss(actor, obs, action, algorithm == "sac"), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", ["baselines.{}", "baselines.{}_il"])
def test_the_baselines_actor_gradient(algorithm, name, nets, batch):
    """Eq. (2), and Eq. (3): w_rl L_RL + L_IL with w_rl = beta / mean |Q(s, phi(s))|. Both log L_RL."""
    script, inputs = import_module(name.format(algorithm)), rl_inputs(algorithm, nets, batch)
    loss, q = expected_rl_loss(*inputs)
    expected_log = loss.detach()
    demo, args = [], []
    if name.endswith("il"):
        pairs = torch.randn(N, OBS_DIM), torch.rand(N, ACTION_DIM) * 1.8 - 0.9
        demo, args = [pairs], [script.Args(il_beta=BETA)]
        w_rl = BETA / q.detach().abs().mean()
        loss = w_rl * loss + expected_il_loss(nets[0], *pairs, algorithm == "sac")
    found, *log_prob, log = script.actor_gradient(*inputs[:3], *demo, *inputs[3:], *args)
    expected = torch.autograd.grad(loss, list(nets[0].parameters()))
    assert list(found) == [name for name, _ in nets[0].named_parameters()]
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(log["losses/actor_loss"], expected_log, rtol=1e-6, atol=0)
    assert not any(value.requires_grad for value in [*log_prob, *log.values()])
    assert len(log_prob) == (algorithm == "sac")


def test_demonstrated_actions_on_the_boundary_give_a_finite_loss():
    import gild_sac

    actor = gild_sac.Actor(OBS_DIM, ACTION_DIM)
    action = torch.tensor([[1.0, -1.0, 1.0]]).expand(N, ACTION_DIM)
    loss, _ = gild_sac.il_loss(actor, torch.randn(N, OBS_DIM), action)
    assert loss.isfinite()


def test_the_weight_of_rl_has_a_floor(gild_script):
    q = torch.tensor([[2.0], [-4.0]], requires_grad=True)
    weight = gild_script.rl_weight(q, 2.5)
    assert weight.item() == pytest.approx(2.5 / 3) and not weight.requires_grad
    assert gild_script.rl_weight(torch.zeros(4, 1), 2.5) == pytest.approx(2.5e6)


def test_the_policy_stays_in_the_box(gild_script, algorithm):
    obs = 100 * torch.randn(200, OBS_DIM)
    actor = gild_script.Actor(OBS_DIM, ACTION_DIM)
    noise = (torch.randn(200, ACTION_DIM),) if algorithm == "sac" else ()
    out = actor(obs, *noise)
    action = out[0] if algorithm == "sac" else out
    assert action.shape == (200, ACTION_DIM) and action.abs().max() <= 1
    assert abs(gild_script.act(actor, obs.numpy())).max() <= 1


def test_bf16_rounds_the_critics_loss(vanilla_script, algorithm):
    torch.manual_seed(0)
    nets = [net(OBS_DIM, ACTION_DIM) for net in 2 * (vanilla_script.Actor, vanilla_script.Critic)]
    shapes = (N, OBS_DIM), (N, ACTION_DIM), (N, 1), (N, OBS_DIM), (N, 1)
    batch = [torch.rand(shape) for shape in shapes]
    gradients = []
    for bf16 in (False, True):
        torch.manual_seed(1)
        inputs = critic_inputs(vanilla_script, algorithm, nets, batch, bf16=bf16)
        critic_grad, _ = vanilla_script.critic_gradient(*inputs)
        gradients.append(torch.cat([g.flatten() for g in critic_grad.values()]))
    exact, rounded = gradients
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.999


def test_bf16_leaves_the_actors_alone(algorithm):
    """GILD's steps are in float32, so methods would not be comparable otherwise. Vanilla's sees no flag."""
    torch.manual_seed(0)
    script = import_module(f"baselines.{algorithm}_il")
    actor, critic = script.Actor(OBS_DIM, ACTION_DIM), script.Critic(OBS_DIM, ACTION_DIM)
    demo = torch.randn(N, OBS_DIM), torch.rand(N, ACTION_DIM) * 1.8 - 0.9
    noise = [torch.randn(N, ACTION_DIM), torch.tensor(0.2)] if algorithm == "sac" else []
    inputs = actor, critic, torch.randn(N, OBS_DIM), demo, *noise
    exact, other = (script.actor_gradient(*inputs, script.Args(bf16=bf16))[0] for bf16 in (False, True))
    assert exact["net.0.weight"].dtype == torch.float32
    assert all(torch.equal(exact[name], other[name]) for name in exact)


def test_only_a_terminal_state_ends_the_bootstrap(vanilla_script, tmp_path):
    """Point2D's episodes end by truncation, Hopper's by falling: only the latter is stored as an end."""
    short_run(vanilla_script, total_timesteps=201, checkpoint_frequency=1)
    short_run(vanilla_script, env_id="Hopper-v5", total_timesteps=201, checkpoint_frequency=1)
    ends = {}
    for path in tmp_path.glob("runs/*/checkpoint.pt"):
        state = torch.load(path, weights_only=True)
        ends[path.parent.name.split("__")[0]] = state["buffer"]["rows"][:, -1]
    assert len(ends["Point2D-v0"]) == 200 and ends["Point2D-v0"].sum() == 0
    falls = ends["Hopper-v5"]
    assert falls[-1] == 1 and 3 <= falls.sum() < len(falls) / 3
