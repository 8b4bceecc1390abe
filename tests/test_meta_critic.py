"""Meta-Critic on DDPG, TD3 and SAC: its meta-gradient, its loop, and what is vanilla in it."""

from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch._dynamo.utils import counters
from torch.func import grad, vmap

import evaluate
from tests.conftest import ALGORITHMS, call, same, short_run
from tests.soak import assert_same_run
from tests.test_loop import (
    SETTINGS,
    Adam,
    Reference,
    Run,
    add,
    float64,
    load,
    mlp,
    parameters,
    part,
    record,
    settings_for,
)
from tests.test_resume import Killed, interrupted, kill, run_dir, state_of
from tests.test_shared_blocks import arguments, blocks, lines_of

LOOK_AHEADS = {"actor": 6, "trunk": 4, "first-layer": 2}  # the parameters that the look-ahead moves
OBS_DIM, ACTION_DIM = 3, 2


@pytest.fixture
def script(algorithm):
    return import_module(f"baselines.meta_critic_{algorithm}")


# INDEPENDENT IMPLEMENTATION


class MetaCriticReference(Reference):
    """The vanilla algorithm of test_loop with Meta-Critic, on lists of parameters."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.meta_critic = parameters(part(run.start, "meta_critic"))
        self.meta_adam = Adam(self.args.meta_lr, weight_decay=self.args.meta_weight_decay)

    def h(self, phi, omega, obs, action):
        """h_omega: the mean softplus of a network of the actor's second hidden layer."""
        w1, b1, w2, b2, *_ = phi
        inputs = ((obs @ w1.T + b1).relu() @ w2.T + b2).relu()
        if self.args.meta_obs_action:
            inputs = torch.cat([inputs, obs, action], 1)
        return mlp(omega, inputs).exp().log1p().mean()

    def meta_loss(self, omega, obs, action, noise, val_obs, val_noise):
        """tanh(L_RL(phi_new) - L_RL(phi_old)) as a function of omega."""
        moved = LOOK_AHEADS[self.args.look_ahead]
        rl = grad(self.rl_loss)(self.actor, obs, noise)[:moved]
        aux = grad(self.h)(self.actor, omega, obs, action)[:moved]
        old = add(self.actor[:moved], rl, -self.args.learning_rate) + self.actor[moved:]
        new = add(old[:moved], aux, -self.args.learning_rate) + self.actor[moved:]
        return torch.tanh(self.rl_loss(new, val_obs, val_noise) - self.rl_loss(old, val_obs, val_noise))

    def iterate(self, iteration):
        args = self.args
        if self.sac:
            self.alpha = self.log_alpha[0].exp()
        obs, action, reward, next_obs, terminated = self.next("replay")
        target = self.target(reward, next_obs, terminated)
        theta_grad = grad(self.critic_loss)(self.critic, obs, action, target)
        self.critic = self.critic_adam.step(self.critic, theta_grad)
        if not self.run.has_actor_step(iteration):
            return
        noise = self.noise()
        val_obs, val_noise = self.next("replay")[0], self.noise()
        inputs = obs, action, noise, val_obs, val_noise
        rl = grad(self.rl_loss)(self.actor, obs, noise)
        phi_grad = add(rl, grad(self.h)(self.actor, self.meta_critic, obs, action))
        log_prob = self.act(self.actor, obs, noise)[1]
        omega_grad = grad(self.meta_loss)(self.meta_critic, *inputs)
        self.meta_critic = self.meta_adam.step(self.meta_critic, omega_grad)
        self.actor = self.actor_adam.step(self.actor, phi_grad)
        if self.sac and args.autotune:
            self.log_alpha = self.alpha_adam.step(self.log_alpha, [action.shape[1] - log_prob.mean()])
        self.target_critic = self.polyak(self.target_critic, self.critic)
        self.target_actor = self.polyak(self.target_actor, self.actor)


# THE META-GRADIENT


def small_mlp(inputs, outputs, hidden=None, norm=False):
    return nn.Sequential(nn.Linear(inputs, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs))


class Problem:
    """Networks and batches in float64: the script's gradients, and the reference's meta-loss."""

    def __init__(self, script, algorithm, lr, n=16, **changes):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        self.args = script.Args(learning_rate=lr, **changes)
        self.actor, self.critic = script.Actor(OBS_DIM, ACTION_DIM), script.Critic(OBS_DIM, ACTION_DIM)
        width = self.actor.net[-1].in_features
        self.meta_critic = script.MetaCritic(width + (OBS_DIM + ACTION_DIM) * self.args.meta_obs_action)
        obs, val_obs = torch.randn(2, n, OBS_DIM)
        noise, val_noise = torch.randn(2, n, ACTION_DIM)
        action = torch.rand(n, ACTION_DIM) * 2 - 1
        self.networks = self.actor, self.critic, self.meta_critic
        self.batch, self.inputs = (obs, action), (obs, action, noise, val_obs, val_noise)
        self.sampled = (noise, val_obs, val_noise, 0.2) if algorithm == "sac" else (val_obs,)
        self.script, self.reference = script, MetaCriticReference.__new__(MetaCriticReference)
        actor, critic, self.omega = ([p.detach() for p in net.parameters()] for net in self.networks)
        vars(self.reference).update(args=self.args, actor=actor, critic=critic, alpha=0.2)
        vars(self.reference).update(sac=algorithm == "sac", td3=algorithm == "td3")

    def gradients(self):
        """The script's, for phi and for omega."""
        result = self.script.meta_critic_gradients(*self.networks, self.batch, *self.sampled, self.args)
        return [list(gradients.values()) for gradients in result[:2]]

    def meta(self, omega):
        return self.reference.meta_loss(omega, *self.inputs)


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS)
@pytest.mark.parametrize("meta_obs_action", [False, True])
def test_every_coordinate_by_finite_differences(script, algorithm, look_ahead, meta_obs_action, monkeypatch):
    monkeypatch.setattr(script, "mlp", small_mlp)
    changes = {"look_ahead": look_ahead, "meta_obs_action": meta_obs_action}
    problem = Problem(script, algorithm, lr=0.3, **changes)
    found = torch.cat([g.flatten() for g in problem.gradients()[1]])
    assert found.abs().max() > 1e-6
    sizes, step = [value.numel() for value in problem.omega], 1e-6

    def meta(change):
        parts = zip(problem.omega, change.split(sizes), strict=True)
        return problem.meta([value + part.view_as(value) for value, part in parts])

    every_coordinate = step * torch.eye(len(found))
    differences = (vmap(meta)(every_coordinate) - vmap(meta)(-every_coordinate)) / (2 * step)
    torch.testing.assert_close(found, differences, rtol=0, atol=1e-5 * found.abs().max().item())


def test_independent_composition(script, algorithm):
    """With the networks and the learning rate of a run; every part of omega has a gradient at the start."""
    problem = Problem(script, algorithm, lr=3e-4, n=64)
    phi_grad, omega_grad = problem.gradients()
    expected = grad(problem.meta)(problem.omega)
    for value, other in zip(omega_grad, expected, strict=True):
        assert value.abs().max() > 0
        torch.testing.assert_close(value, other, rtol=1e-7, atol=1e-18)
    reference, (obs, action, noise, *_) = problem.reference, problem.inputs
    rl = grad(reference.rl_loss)(reference.actor, obs, noise)
    aux = grad(reference.h)(reference.actor, problem.omega, obs, action)
    torch.testing.assert_close(phi_grad, add(rl, aux), rtol=1e-10, atol=1e-14)
    assert all(value.abs().max() > 0 for value in aux[:4])
    assert all((value == 0).all() for value in aux[4:])  # of the last layer, which is behind the features


def test_a_step_on_omega_lowers_the_actors_loss(script, algorithm):
    """The sign: against the meta-gradient the look-ahead gets better."""
    problem = Problem(script, algorithm, lr=1.0, n=64)
    _, omega_grad = problem.gradients()
    norm = torch.sqrt(sum((g**2).sum() for g in omega_grad))
    obs, action, noise, *val = problem.inputs
    reference = problem.reference

    def loss_after_the_step(omega):
        rl = grad(reference.rl_loss)(reference.actor, obs, noise)
        step = add(rl, grad(reference.h)(reference.actor, omega, obs, action))
        return reference.rl_loss(add(reference.actor, step, -1.0), *val)

    moved = add(problem.omega, omega_grad, -1e-2 / norm)
    assert loss_after_the_step(moved) < loss_after_the_step(problem.omega)


def test_no_parameter_is_touched(script, algorithm):
    problem = Problem(script, algorithm, lr=0.1)
    before = [[p.clone() for p in network.parameters()] for network in problem.networks]
    problem.gradients()
    for network, values in zip(problem.networks, before, strict=True):
        for parameter, value in zip(network.parameters(), values, strict=True):
            assert torch.equal(parameter, value) and parameter.grad is None


def test_bf16_stays_away_from_second_derivatives(script, algorithm):
    exact, other = (Problem(script, algorithm, lr=0.1, bf16=bf16) for bf16 in (False, True))
    torch.testing.assert_close(exact.gradients(), other.gradients(), rtol=0, atol=0)


# THE LOOP


def recorded_run(algorithm, **changes) -> Run:
    script, starts = import_module(f"baselines.meta_critic_{algorithm}"), SETTINGS["learning_starts"]
    settings = settings_for(script, meta_lr=2e-3, meta_weight_decay=1e-2, **changes)
    with float64(), pytest.MonkeyPatch.context() as patch:
        start = load(script.train(script.Args(**settings, total_timesteps=starts, checkpoint_frequency=1)))
        events = record(script, patch)
        args = script.Args(**settings, total_timesteps=230, checkpoint_frequency=starts + 15)
        end = load(script.train(args))
    steps = [i for i, (kind, _) in enumerate(events) if kind == "step"]
    return Run("meta_critic", algorithm, args, 0, start, end, events[: steps[end["global_step"]]])


VARIANTS = {"default": {}, "variants": {"look_ahead": "first-layer", "meta_obs_action": True}}
VARIANTS["variants"] |= {"autotune": False, "policy_frequency": 2}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_loop(algorithm, changes):
    """All weights after 15 iterations or more."""
    run = recorded_run(algorithm, **changes)
    reference = MetaCriticReference(run)
    for iteration in range(1, run.iterations + 1):
        reference.iterate(iteration)
    assert run.iterations >= 15 and not any(list(unused) for unused in reference.samples.values())
    names = ["actor", "critic", "target_critic", "log_alpha" if algorithm == "sac" else "target_actor"]
    names.append("meta_critic")
    values = {name: parameters(part(run.end, name)) for name in names}
    expected = {name: getattr(reference, name) for name in names}
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-9)


def make_constant(script, monkeypatch):
    """f_omega is the constant ln 2, and the random numbers of the rest are those of the vanilla script."""
    initialise, gradients, state = script.MetaCritic.__init__, script.meta_critic_gradients, []

    def constant(self, *args):
        with torch.random.fork_rng():
            initialise(self, *args)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    class Buffer(script.ReplayBuffer):
        def add(self, *transition):
            super().add(*transition)
            self.samples = 0

        def sample(self, batch_size):
            self.samples += 1
            state[:] = [torch.get_rng_state()] if self.samples == 2 else []
            return super().sample(batch_size)

    def rewound(*args):
        torch.set_rng_state(*state)
        return gradients(*args)

    monkeypatch.setattr(script.MetaCritic, "__init__", constant)
    monkeypatch.setattr(script, "ReplayBuffer", Buffer)
    monkeypatch.setattr(script, "meta_critic_gradients", rewound)


def test_with_a_constant_h_it_is_the_vanilla_algorithm(script, vanilla_script, monkeypatch):
    """Bit for bit: actor, critic, targets, temperature, replay and evaluations."""
    settings = {"checkpoint_frequency": 1, "learning_starts": 150, "total_timesteps": 200}
    learned, _ = short_run(script, **settings)
    with monkeypatch.context() as patch:
        make_constant(script, patch)
        weights, csv = short_run(script, **settings, meta_lr=0.0)
    vanilla_weights, vanilla_csv = short_run(vanilla_script, **settings)
    assert same(weights, vanilla_weights) and csv == vanilla_csv and not same(weights, learned)
    paths = sorted(Path("runs").iterdir(), key=lambda path: path.stat().st_ctime_ns)
    _, ours, vanilla = map(load, paths)
    for name, value in vanilla.items():
        if isinstance(value, dict):
            value, other = value.get("state", value), ours[name].get("state", ours[name])
            torch.testing.assert_close(other, value, rtol=0, atol=0)


# OPTIONS, RESUMING, EVALUATION, MISTAKES

FLAGS = """--env-id Point2D-v0 --total-timesteps 320 --learning-starts 150 --batch-size 32 --no-cuda
--eval-frequency 90 --eval-episodes 1 --checkpoint-frequency 150 --buffer-size 230"""


def test_a_killed_run_is_resumed_bit_for_bit(script, monkeypatch, tmp_path):
    """From step 200; the meta-critic and its optimizer are parts of the checkpoint."""
    with pytest.raises(Killed):
        interrupted(script, monkeypatch, 270, kill, FLAGS)
    path = run_dir()
    assert state_of(path)["global_step"] == 200
    assert call(script, "--resume", path)[0] == 0
    resumed = path.rename(tmp_path / "resumed")
    assert call(script, *FLAGS.split())[0] == 0
    assert_same_run(resumed, run_dir())
    assert {"meta_critic", "meta_optimizer"} <= state_of(resumed).keys()
    # and its policy can be evaluated
    actor, module, args, global_step = evaluate.load_policy(run_dir() / "policy.pt")
    assert (module, global_step) == (script, 320)
    env = module.make_env(args, training=False)
    returns = module.evaluate(module.act, actor, env, 1, seed=args.seed + 100)
    assert (run_dir() / "evaluations.csv").read_text().splitlines()[-1] == f"320,{returns[0]},0.0"


def test_a_run_with_compile(script, algorithm, monkeypatch):
    """Executed without generating C++. Each update is one graph; to 1e-8, in float64."""
    monkeypatch.setattr(script, "mlp", small_mlp)
    compile = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", compile)
    counters.clear()
    settings = {"total_timesteps": 240, "batch_size": 32}
    with float64():
        exact, _ = short_run(script, **settings)
        assert not counters["stats"]
        compiled, _ = short_run(script, **settings, compile=True)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    torch.testing.assert_close(compiled, exact, rtol=0, atol=1e-8)
    torch.compiler.reset()


MISTAKES = {
    "--look-ahead head": "first-layer",
    "--meta-lr -1": "--meta-lr -1.0 is not between 0",
    "--meta-weight-decay -1": "--meta-weight-decay -1.0 is not between 0",
    "--batch-size 151": "--batch-size 151 exceeds --learning-starts 150",
    "--env-id Hoper-v4": "Hoper",
    "--demo-path none.npz": "--demo-path",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(script, mistake, tmp_path):
    """Or the box that tyro draws, for what it finds."""
    code, out, err = call(script, *FLAGS.split(), *mistake.split())
    assert (code, out) == (2, "") and "Traceback" not in err and not list(tmp_path.iterdir())
    assert MISTAKES[mistake] in " ".join(err.replace("│", " ").split())
    if mistake.split()[0] == "--env-id":
        assert len(err.splitlines()) == 1


# WHAT THE FILES SHARE

OWN = {"MetaCritic", "meta_loss", "meta_critic_gradients"}


def test_the_files_repeat_each_other_to_the_letter():
    """The three share what their vanilla scripts share, and Meta-Critic itself; SAC's is given noise."""
    vanilla, ours = ([blocks(f"baselines/{form}{a}.py") for a in ALGORITHMS] for form in ("", "meta_critic_"))
    for old, new in zip(vanilla, ours, strict=True):
        changed = {name for name in old if old[name] != new.get(name)}
        assert changed == {"Args", "train", "actor_gradient"} and new.keys() - old.keys() == OWN
    ddpg, td3, sac = ours
    assert all(ddpg[name] == td3[name] for name in OWN) and td3["MetaCritic"] == sac["MetaCritic"]


def test_a_diff_with_the_vanilla_script_shows_meta_critic(algorithm):
    """Half a dozen lines of the vanilla script are changed, and its actor_gradient is replaced."""
    vanilla, ours = (lines_of(f"baselines/{form}{algorithm}.py") for form in ("", "meta_critic_"))
    start = next(i for i, line in enumerate(vanilla) if line.startswith("def actor_gradient"))
    end = next(i for i, line in enumerate(vanilla) if line.startswith("def step"))
    gone = [line for line in vanilla[:start] + vanilla[end:] if line not in ours]
    words = ["learning_rate:", "update_critic, update_actor = critic_gradient", "update_actor(actor"]
    assert len(gone) == 3 and all(word in line for word, line in zip(words, gone, strict=True))


def test_arguments_are_those_of_the_vanilla_script(algorithm):
    a, b = (arguments(f"baselines/{form}{algorithm}.py") for form in ("", "meta_critic_"))
    assert {name for name in a if a[name] != b[name]} == {"learning_rate"}
    own = [arguments(f"baselines/meta_critic_{other}.py") for other in ALGORITHMS]
    assert all(b[name] == other[name] for other in own for name in b.keys() - a.keys())
    assert b.keys() - a.keys() == {"meta_lr", "meta_weight_decay", "meta_obs_action", "look_ahead"}
