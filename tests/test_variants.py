"""The study-only variants of gild_td3.py: the default is the reference, and each flag does what it says."""

import math
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch

import gild_td3
from benchmark import fit
from benchmark import gild_td3_variants as variants
from demos.collect import save_demonstrations
from tests.conftest import ROOT, call, same, short_run
from tests.soak import assert_same_run

FLAGS = """--env-id Point2D-v0 --total-timesteps 400 --learning-starts 200 --batch-size 32 --no-cuda
--eval-frequency 100 --eval-episodes 1 --checkpoint-frequency 150 --buffer-size 330 --gild-init random"""
ALL = """--rl-weight ramped --clone-steps 20 --clone-labels --release returns --gild-form weight
--meta-critic q2 --critic-norm"""


def learners(seed=0, obs_dim=3, action_dim=2, pairs=16):
    """Networks, a batch of states, demonstrations and validation states in float64."""
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    networks = gild_td3.Actor(obs_dim, action_dim), gild_td3.Critic(obs_dim, action_dim)
    networks += (gild_td3.GILD(obs_dim, action_dim),)
    obs, val_obs, demo_obs = torch.randn(3, pairs, obs_dim)
    return networks, obs, (demo_obs, torch.rand(pairs, action_dim) * 2 - 1), val_obs


def args_of(**changes):
    return variants.Args(env_id="Point2D-v0", **changes)


@pytest.mark.parametrize("changes", [{}, {"clone_steps": 20, "critic_norm": True}], ids=["default", "both"])
def test_the_default_is_gild_td3(changes):
    changes = {"ws_frac": 0.1, "gild_lr": 1e-2, **changes}
    ours, theirs = (short_run(script, **changes) for script in (variants, gild_td3))
    rows = [row for row in ours[1].splitlines() if not row.startswith("0,")]  # only they evaluate the clone
    assert same(ours[0], theirs[0]) and rows == theirs[1].splitlines()


@pytest.mark.parametrize("flags", ["--release never --omega random", ALL])
def test_a_stopped_run_resumes_as_if_it_had_not_been(flags, tmp_path):
    command = [*FLAGS.split(), *flags.split()]
    assert call(variants, *command)[0] == 0
    (whole,) = (tmp_path / "runs").iterdir()
    whole = whole.rename(tmp_path / "whole")
    assert call(variants, *command, "--total-timesteps", "301")[0] == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert call(variants, "--resume", path, "--total-timesteps", "400")[0] == 0
    assert_same_run(path, whole)


def finite_difference(gild, meta_loss, epsilon=1e-8):
    """d meta_loss / d omega along a random direction, by central differences."""
    direction = {name: torch.randn_like(value) for name, value in gild.named_parameters()}
    values = []
    for sign in (1, -1):
        moved = deepcopy(gild)
        for name, value in moved.named_parameters():
            value.data += sign * epsilon * direction[name]
        values.append(meta_loss(moved))
    return direction, (values[0] - values[1]) / (2 * epsilon)


@pytest.mark.parametrize(("judge", "lam", "grown"), [("q1", 1.0, 1.0), ("q2", 0.3, 1.0), ("q1", 0.3, 0.6)])
def test_the_gradients_with_one_capped_weight(judge, lam, grown):
    """Against the equations of --rl-weight capped, written out with plain autograd on copied actors."""
    (actor, critic, gild), obs, demo, val_obs = learners()
    args = args_of(rl_weight="capped", il_beta=0.02, meta_critic=judge, learning_rate=0.1)
    lam = torch.tensor(lam)
    w = min(1.0, 0.02 / critic.q1(obs, actor(obs)).abs().mean().item())
    assert w < 1
    w *= grown

    def moved(loss):
        grads = torch.autograd.grad(loss, list(actor.parameters()))
        copy = deepcopy(actor)
        for parameter, grad in zip(copy.parameters(), grads, strict=True):
            parameter.data -= args.learning_rate * grad
        return copy, grads

    def losses(gild):
        rl = -critic.q1(obs, actor(obs)).mean()
        imitation = (actor(demo[0]) - demo[1]).pow(2).mean()
        pseudo, _ = moved(w * rl + lam * imitation)
        rl = -critic.q1(obs, actor(obs)).mean()
        return pseudo, *moved(w * rl + lam * gild(*demo, actor(demo[0])).mean())

    def meta_loss(gild):
        pseudo, ahead, _ = losses(gild)
        q, pseudo_q = (critic(val_obs, policy(val_obs))[judge == "q2"] for policy in (ahead, pseudo))
        return -torch.tanh(w * (q - pseudo_q)).mean().item()

    inputs = actor, critic, gild, obs, demo, val_obs, lam, args, grown
    phi_grad, omega_grad, log = variants.gild_gradients(*inputs)
    expected = losses(gild)[2]
    for ours, theirs in zip(phi_grad.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert math.isclose(log["losses/meta_loss"].item(), meta_loss(gild), rel_tol=1e-9, abs_tol=1e-14)
    direction, slope = finite_difference(gild, meta_loss)
    inner = sum((omega_grad[name] * direction[name]).sum().item() for name in direction)
    assert math.isclose(inner, slope, rel_tol=1e-4) and slope != 0


def test_a_ramped_weight_grows_while_q_finds_its_level():
    """With Q always at its target, that of a reward of 1 at each step is at 1 - 1/e of its level by then."""
    args = args_of(rl_weight="ramped")
    assert [variants.ramp(i, args) for i in (0, 10_000, 40_000, 90_000)] == pytest.approx([0, 0.25, 1, 1])
    assert variants.ramp(1, args_of(rl_weight="capped")) == 1
    target_q = 0.0
    for iteration in range(40_000):
        if iteration % args.policy_frequency == 0:
            target_q += args.tau * (1 + args.gamma * target_q - target_q)
    assert target_q * (1 - args.gamma) == pytest.approx(1 - math.exp(-1), abs=1e-3)


def test_a_frozen_f_gives_the_actor_the_same_gradient_and_omega_none():
    (actor, critic, gild), obs, demo, val_obs = learners()
    inputs = actor, critic, gild, obs, demo, val_obs, torch.tensor(0.7)
    learned, _, _ = variants.gild_gradients(*inputs, args_of(rl_weight="capped"))
    frozen, nothing, _ = variants.gild_gradients(*inputs, args_of(rl_weight="capped", omega="frozen"))
    assert nothing == {}
    for name in learned:
        torch.testing.assert_close(frozen[name], learned[name])


def test_the_error_form_is_conventional_imitation():
    (actor, critic, _), obs, demo, val_obs = learners()
    inputs = actor, critic, variants.Error(), obs, demo, val_obs, torch.tensor(1.0)
    phi_grad, nothing, _ = variants.gild_gradients(*inputs, args_of())
    loss = -critic.q1(obs, actor(obs)).mean() + (actor(demo[0]) - demo[1]).pow(2).mean()
    assert nothing == {}
    for ours, theirs in zip(
        phi_grad.values(), torch.autograd.grad(loss, list(actor.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def demonstrations():
    env = gild_td3.make_env(gild_td3.Args(env_id="Point2D-v0"), training=True)
    path = ROOT / "demos" / "Point2D-td3.npz"
    return gild_td3.DemonstrationBuffer(path, "Point2D-v0", env, torch.device("cpu"))


@pytest.mark.parametrize("choice", variants.FITS)
def test_a_fit_to_differences_has_a_slope_close_to_a_demonstration(choice, demonstrations):
    torch.manual_seed(0)
    gild = gild_td3.GILD(2, 2)
    assert 0 < variants.FITS[choice](gild, demonstrations, iterations=600) < 1e-3
    far, near = (fit.slope_cosine(gild, demonstrations, distance) for distance in (0.5, 0.03))
    assert far > 0.9 and (near > 0.9) == (choice == "differences"), near
    if choice == "differences":
        demo_obs, demo_action = demonstrations.obs, demonstrations.actions
        values = gild(demo_obs, demo_action, 0.5 * demo_action)  # f knows the difference alone
        torch.testing.assert_close(values, gild(0 * demo_obs, 0 * demo_action, -0.5 * demo_action))


def test_the_measures_of_a_fit(demonstrations):
    error = variants.Error()
    away = lambda *pair: -error(*pair)  # noqa: E731
    assert fit.slope_cosine(error, demonstrations, 0.1) == pytest.approx(1, abs=0.01)
    assert fit.slope_cosine(away, demonstrations, 0.1) == pytest.approx(-1, abs=0.01)
    distances = []
    for updates in (0, 100):
        torch.manual_seed(0)
        distances.append(fit.clone_distance(error, demonstrations, args_of(batch_size=64), updates))
    assert distances[1] < 0.2 * distances[0]


def test_the_description_of_f(demonstrations):
    torch.manual_seed(0)
    actor, weights = gild_td3.Actor(2, 2), torch.tensor([[3.0], [-4.0]])
    with torch.no_grad():
        difference = actor(demonstrations.obs) - demonstrations.actions
    length, length_there, cosine, alike = fit.describe(variants.Error(), actor, demonstrations)
    assert length == pytest.approx(difference.norm(dim=1).mean().item())  # its slope is the difference
    assert length_there == 0 and cosine == pytest.approx(1)
    assert alike == pytest.approx(difference.mean(0).norm().item() / length)
    push = lambda demo_obs, demo_action, action: action @ weights  # noqa: E731
    assert fit.describe(push, actor, demonstrations)[::3] == pytest.approx([5, 1])


def test_a_run_is_described(tmp_path, capsys):
    assert call(variants, *FLAGS.split(), "--gild-init", "imitation", "--gild-lr", "0.1")[0] == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    fit.main(fit.Args(run=run_dir))
    fitted, learned = (line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines()[-2:])
    assert sum(old != new for old, new in zip(fitted, learned, strict=True)) >= 3  # of 4, to three digits
    with pytest.raises(fit.InputError, match="is no run of"):
        fit.main(fit.Args(run=tmp_path))
    (tmp_path / "args.json").write_text('{"args": {')
    with pytest.raises(fit.InputError, match="is no run of"):
        fit.main(fit.Args(run=tmp_path))


@pytest.mark.parametrize(("init", "name"), [("imitation", "as fitted"), ("random", "at first")])
def test_a_frozen_f_is_described_as_it_was_at_first(init, name, tmp_path, capsys, monkeypatch):
    """With the run's own start and demonstrations."""
    short_fit = partial(variants.FITS["demonstrations"], iterations=20)
    monkeypatch.setitem(variants.FITS, "demonstrations", short_fit)
    rng = np.random.default_rng(0)
    path = tmp_path / "mine.npz"
    save_demonstrations(path, "Point2D-v0", rng.uniform(0, 1, (40, 2)), rng.uniform(-1, 1, (40, 2)))
    flags = ["--gild-init", init, "--demo-path", path, "--gild-lr", "0"]
    assert call(variants, *FLAGS.split(), *flags)[0] == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    fit.main(fit.Args(run=run_dir))
    first, learned = (line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[-2:])
    assert first[0].strip() == name and first[1:] == learned[1:]


@pytest.mark.parametrize("choice", variants.FITS)
def test_the_flag_chooses_the_fit(choice, monkeypatch):
    called = []
    monkeypatch.setitem(variants.FITS, choice, lambda *_: called.append(choice) or 0.0)
    short_run(variants, ws_frac=0.1, gild_init="imitation", gild_fit=choice)
    assert called == [choice]


def test_the_weighted_error_has_weights_of_mean_one():
    _, _, (demo_obs, demo_action), _ = learners()

    class Demonstrations:
        obs, actions = 100 * demo_obs + 7, demo_action

    torch.set_default_dtype(torch.float64)
    f = variants.WeightedError(Demonstrations)
    values = f(Demonstrations.obs, demo_action, demo_action + 0.5)
    assert math.isclose(values.mean().item(), 0.25) and values.std() > 1e-3


def test_half_of_the_pairs_have_the_clones_labels():
    (clone, _, _), obs, demo, _ = learners()
    demo_obs, demo_action = variants.with_labels(demo, obs, clone)
    assert torch.equal(demo_obs[:8], demo[0][:8]) and torch.equal(demo_action[:8], demo[1][:8])
    assert torch.equal(demo_obs[8:], obs[8:]) and torch.equal(demo_action[8:], clone(obs)[8:])
    assert not demo_action.requires_grad


def test_labels_and_the_ramp_change_a_run(monkeypatch):
    settings = dict(ws_frac=1.0, clone_steps=5, rl_weight="capped")
    capped, labelled, ramped = (
        short_run(variants, **settings | change)[0]
        for change in ({}, {"clone_labels": True}, {"rl_weight": "ramped"})
    )
    assert not same(capped, labelled) and not same(capped, ramped)
    monkeypatch.setattr(variants, "ramp", lambda iteration, args: 1.0)
    assert same(capped, short_run(variants, **settings | {"rl_weight": "ramped"})[0])


def test_the_labels_are_those_of_the_policy_before_the_first_step(monkeypatch, tmp_path):
    clones, with_labels = [], variants.with_labels

    def noted(demo, obs, clone):
        clones.append(deepcopy(clone.state_dict()))
        return with_labels(demo, obs, clone)

    monkeypatch.setattr(variants, "with_labels", noted)
    short_run(variants, ws_frac=1.0, clone_steps=5, clone_labels=True, keep_policies=True)
    (path,) = (tmp_path / "runs").glob("*/policies/0.pt")
    first = torch.load(path, weights_only=True)["actor"]
    assert len(clones) == 30 and all(same(clone, first) for clone in clones)


def test_labels_need_a_clone():
    code, _, err = call(variants, *FLAGS.split(), "--clone-labels")
    assert code == 2 and "--clone-labels needs a clone: --clone-steps 20000" in err


def test_a_flag_that_would_do_nothing_is_refused():
    for flags in ("--meta-loss intuitive", "--meta-critic q2 --bf16"):
        code, _, err = call(variants, *FLAGS.split(), *flags.split())
        assert code == 2 and flags in err


def test_omega_directions():
    grad = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    flipped = variants.omega_direction(grad, args_of(omega="flipped"))
    drawn = variants.omega_direction(grad, args_of(omega="random"))
    assert all(torch.equal(flipped[name], -grad[name]) for name in grad)
    torch.testing.assert_close(variants.norm(drawn), variants.norm(grad))
    assert sum((drawn[name] * grad[name]).sum() for name in grad).abs() < 0.9 * variants.norm(grad) ** 2
    assert variants.omega_direction(grad, args_of()) is grad


def test_the_meta_gradient_waits_for_a_reward_and_has_unit_scale():
    scale, grad = variants.GradientScale(), {"a": torch.full((4,), 1e-6)}
    assert not variants.scaled(grad, scale)["a"].any()
    scale.rewarded = True
    for _ in range(3):
        torch.testing.assert_close(variants.norm(variants.scaled(grad, scale)), torch.tensor(1.0))


@pytest.mark.parametrize("bar, rate", [(1.0, 0.97), (0.5, 0.9)])
def test_release_by_returns(bar, rate):
    """Down at each thousandth step while the last ten episodes are at the bar, and else back."""
    args = args_of(release="returns", release_bar=bar, release_rate=rate, learning_starts=10_000)
    release = variants.Release(args)
    release.episode(4_000, 100.0)  # the clone's: mean 200
    release.episode(9_000, 300.0)
    for good, expected in ((True, rate), (True, rate**2), (False, rate), (False, 1.0), (False, 1.0)):
        for _ in range(10):
            release.episode(20_000, 200.0 * bar + (1 if good else -1))
        release.update(20_500)
        release.update(21_000)
        assert math.isclose(release.value, expected)


def test_release_over_time():
    linear = variants.Release(args_of(release="linear", total_timesteps=1_000))
    linear.update(250)
    never = variants.Release(args_of(release="never", total_timesteps=1_000))
    never.update(999)
    drop = variants.Release(args_of(release="drop", total_timesteps=1_000, learning_starts=256, ws_frac=0.1))
    values = []
    for step in (1, 355, 356):  # iteration 100, of step 356, is the last one of the warm start
        drop.update(step)
        values.append(drop.value)
    assert (linear.value, never.value, values) == (0.75, 1.0, [1.0, 1.0, 0.0])


def test_each_twin_learns_from_its_half():
    (actor, critic, _), obs, (_, action), next_obs = learners()
    batch = obs, action, torch.randn(16, 1), next_obs, torch.zeros(16, 1)
    own = (torch.arange(16) % 2 == 0).double()[:, None]
    grad, _ = variants.critic_gradient(
        critic, deepcopy(critic), actor, batch, own, args_of(meta_critic="q2", policy_noise=0.0)
    )
    for net, half in ((critic.net1, slice(0, None, 2)), (critic.net2, slice(1, None, 2))):
        with torch.no_grad():
            next_q = net(torch.cat([next_obs, actor(next_obs)], 1))
        error = net(torch.cat([obs, action], 1)) - (batch[2] + 0.99 * next_q)
        expected = torch.autograd.grad(error[half].pow(2).mean(), list(net.parameters()))
        prefix = "net1." if net is critic.net1 else "net2."
        ours = [grad[name] for name in grad if name.startswith(prefix)]
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_clone_acts_from_the_first_step(tmp_path):
    """Its return stands in the evaluations at step 0, and its first actions are near its own."""
    run_dir = variants.train(
        args_of(
            clone_steps=300,
            gild_form="error",
            total_timesteps=200,
            learning_starts=200,
            batch_size=64,
            exploration_noise=0.05,
            eval_episodes=1,
            checkpoint_frequency=1,
            cuda=False,
        )
    )
    rows = (run_dir / "evaluations.csv").read_text().splitlines()
    assert rows[1].startswith("0,") and float(rows[1].split(",")[1]) > 60  # the demonstrations have 71
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    actor = gild_td3.Actor(2, 2)
    actor.load_state_dict(state["actor"])
    obs, action, *_ = state["buffer"]["rows"].split((2, 2, 1, 2, 1), dim=1)
    assert (actor(obs) - action).abs().mean() < 0.06
