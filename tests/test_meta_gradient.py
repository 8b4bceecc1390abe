"""The meta-loss's gradient for omega, against finite differences and an independent composition."""

import pytest
import torch
import torch.nn as nn
from torch.func import functional_call, grad, vmap

OBS_DIM, ACTION_DIM = 4, 2


def small_mlp(inputs, outputs, norm=False):
    layers = nn.Linear(inputs, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU()
    layers = [layer for layer in layers if norm or not isinstance(layer, nn.LayerNorm)]
    return nn.Sequential(*layers, nn.Linear(5, outputs))


class Problem:
    """Networks and batches in float64, and L_meta(phi'(omega)) written out anew from the paper."""

    def __init__(self, script, algorithm, batch_size, lr, seed=0, norm=False):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        self.script, self.sac, self.lr, self.beta = script, algorithm == "sac", lr, 1.5
        self.alpha = 0.2
        self.actor, self.critic = script.Actor(OBS_DIM, ACTION_DIM), script.Critic(OBS_DIM, ACTION_DIM, norm)
        self.gild = script.GILD(OBS_DIM, ACTION_DIM)
        self.obs, self.demo_obs, self.val_obs = torch.randn(3, batch_size, OBS_DIM)
        self.demo_action = torch.rand(batch_size, ACTION_DIM) * 1.8 - 0.9
        self.noise = torch.randn(3, batch_size, ACTION_DIM)
        self.phi = {k: v.detach() for k, v in self.actor.named_parameters()}
        self.omega = {k: v.detach() for k, v in self.gild.named_parameters()}

    def gradients(self, kind):
        """What the training loop gets."""
        sac = (self.noise, self.alpha) if self.sac else ()
        demo = self.demo_obs, self.demo_action
        args = self.script.Args(learning_rate=self.lr, il_beta=self.beta, meta_loss=kind)
        return self.script.gild_gradients(
            self.actor, self.critic, self.gild, self.obs, demo, self.val_obs, *sac, args
        )

    def act(self, phi, obs, noise):
        """Action and log-density; for a deterministic policy the latter is 0."""
        out = functional_call(self.actor, phi, (obs, noise) if self.sac else (obs,))
        return out if self.sac else (out, torch.zeros(len(obs), 1))

    def q(self, obs, action):
        out = self.critic(obs, action)
        return out if torch.is_tensor(out) else torch.minimum(*out) if self.sac else out[0]

    def value(self, phi, obs, noise):
        action, log_prob = self.act(phi, obs, noise)
        return self.q(obs, action) - self.alpha * log_prob

    def rl(self, phi):
        return -self.value(phi, self.obs, self.noise[0]).mean()

    def il(self, phi):
        if not self.sac:
            return ((self.act(phi, self.demo_obs, None)[0] - self.demo_action) ** 2).mean()
        mean, log_std = functional_call(self.actor.net, self.net(phi), self.demo_obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
        return -squashed.log_prob(self.demo_action).sum(-1).mean()

    @staticmethod
    def net(phi):
        return {k.removeprefix("net."): v for k, v in phi.items()}

    def general(self, phi, omega):
        action, _ = self.act(phi, self.demo_obs, self.noise[1])
        return functional_call(self.gild, omega, (self.demo_obs, self.demo_action, action)).mean()

    def w_rl(self):
        """Eq. (3): beta / mean |Q(s, phi(s))|"""
        action, _ = self.act(self.phi, self.obs, self.noise[0])
        return self.beta / self.q(self.obs, action).detach().abs().mean()

    def meta(self, omega, kind):
        """L_meta(phi'(omega)), Eqs. (6) to (8)"""
        rl, il, w_rl = grad(self.rl)(self.phi), grad(self.il)(self.phi), self.w_rl()
        general = grad(self.general)(self.phi, omega)
        ahead = {k: self.phi[k] - self.lr * (rl[k] + general[k]) for k in self.phi}
        pseudo = {k: self.phi[k] - self.lr * (w_rl * rl[k] + il[k]) for k in self.phi}
        gain = self.value(ahead, self.val_obs, self.noise[2])
        if kind == "intuitive":
            return -gain.mean()
        return -torch.tanh(gain - self.value(pseudo, self.val_obs, self.noise[2]).detach()).mean()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["gain", "intuitive"])
def test_every_coordinate_by_finite_differences(gild_script, algorithm, kind, norm, monkeypatch):
    monkeypatch.setattr(gild_script, "mlp", small_mlp)
    problem = Problem(gild_script, algorithm, batch_size=16, lr=0.3, norm=norm)
    _, omega_grad, *_ = problem.gradients(kind)
    found = torch.cat([g.flatten() for g in omega_grad.values()])
    assert found.abs().max() > 1e-5
    sizes = [value.numel() for value in problem.omega.values()]
    step = 1e-6

    def meta(change):
        parts = zip(problem.omega.items(), change.split(sizes), strict=True)
        return problem.meta({k: value + part.view_as(value) for (k, value), part in parts}, kind)

    every_coordinate = step * torch.eye(len(found))
    differences = (vmap(meta)(every_coordinate) - vmap(meta)(-every_coordinate)) / (2 * step)
    torch.testing.assert_close(found, differences, rtol=0, atol=1e-6 * found.abs().max().item())


def test_random_directions_by_finite_differences(gild_script, algorithm):
    problem = Problem(gild_script, algorithm, batch_size=32, lr=0.1)
    _, omega_grad, *_ = problem.gradients("gain")
    norm = torch.sqrt(sum((g**2).sum() for g in omega_grad.values()))
    step = 1e-6
    for seed in range(5):
        torch.manual_seed(seed)
        # half along the gradient: a random direction alone has next to no part of it in so many dimensions
        noise = {k: torch.randn_like(g) for k, g in omega_grad.items()}
        length = torch.sqrt(sum((n**2).sum() for n in noise.values()))
        direction = {k: g / norm + noise[k] / length for k, g in omega_grad.items()}
        up = problem.meta({k: v + step * direction[k] for k, v in problem.omega.items()}, "gain")
        down = problem.meta({k: v - step * direction[k] for k, v in problem.omega.items()}, "gain")
        expected = sum((omega_grad[k] * direction[k]).sum() for k in omega_grad)
        assert abs((up - down) / (2 * step) - expected) < 1e-6 * abs(expected)


@pytest.mark.parametrize("kind", ["gain", "intuitive"])
def test_independent_composition(gild_script, algorithm, kind):
    problem = Problem(gild_script, algorithm, batch_size=32, lr=0.1)
    phi_grad, omega_grad, *_ = problem.gradients(kind)
    expected = grad(problem.meta)(problem.omega, kind)
    rl, general = grad(problem.rl)(problem.phi), grad(problem.general)(problem.phi, problem.omega)
    for name, value in omega_grad.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-14)
    for name, value in phi_grad.items():  # Eq. (7)
        torch.testing.assert_close(value, rl[name] + general[name], rtol=1e-10, atol=1e-14)


def test_no_parameter_is_touched(gild_script, algorithm):
    problem = Problem(gild_script, algorithm, batch_size=8, lr=0.1)
    modules = (problem.actor, problem.critic, problem.gild)
    before = [[p.clone() for p in module.parameters()] for module in modules]
    problem.gradients("gain")
    for module, values in zip(modules, before, strict=True):
        for parameter, value in zip(module.parameters(), values, strict=True):
            assert torch.equal(parameter, value)
            assert parameter.grad is None


def test_a_gild_step_gains_value(gild_script, algorithm):
    """The sign: a step against the meta-gradient makes GILD's look-ahead better."""
    problem = Problem(gild_script, algorithm, batch_size=64, lr=1.0)
    _, omega_grad, *_ = problem.gradients("gain")
    norm = torch.sqrt(sum((g**2).sum() for g in omega_grad.values()))
    moved = {k: problem.omega[k] - 1e-2 * omega_grad[k] / norm for k in omega_grad}

    def look_ahead_value(omega):
        return -problem.meta(omega, "intuitive")

    assert problem.meta(moved, "gain") < problem.meta(problem.omega, "gain")
    assert look_ahead_value(moved) > look_ahead_value(problem.omega)
