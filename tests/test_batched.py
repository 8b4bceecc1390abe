"""benchmark.batched: a run in a batch learns, acts and is evaluated as its script would have it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from baselines.common import evaluate, make_env
from benchmark import batched, report
from benchmark.gild_td3_variants import omega_direction
from benchmark.sweep import load_study, runs_of, seconds_per_step
from demos.collect import save_demonstrations
from gild_td3 import GILD, Actor, Args, Critic, act, clone
from tests.conftest import ROOT

CAPPED = "benchmark.gild_td3_variants --gild-init random --rl-weight capped --il-beta 0.5"
VARIANTS = {
    "td3": "baselines.td3",
    "il": "baselines.td3_il",
    "bc": "baselines.td3_il --il-beta 0",
    "gild": "gild_td3 --gild-init random --ws-frac 0.5",
    "short": "gild_td3 --gild-init random --ws-frac 0.02",
    "frozen": "gild_td3 --gild-init random --ws-frac 0.5 --gild-lr 0",
    "flipped": f"{CAPPED} --omega flipped --release linear",
    "capped": f"{CAPPED} --omega frozen --release never",
    "dropped": f"{CAPPED} --ws-frac 0.02",
}
GILD_ENDS = {"gild": 45, "short": 2, "frozen": 45, "flipped": 90, "capped": 90, "dropped": 2}  # of 90 steps
LAMBDA = 0.75  # of the runs that have one


def study(tmp_path, variants=VARIANTS, flags="", steps=100):
    path = tmp_path / "some.toml"
    lines = ["seeds = [3]", f'flags = "--learning-starts 40 --batch-size 32 {flags}"']
    lines += ["[tasks]", f"Point2D-v0 = {steps}", "[variants]"]
    path.write_text("\n".join(lines + [f'{name} = {{ run = "{run}" }}' for name, run in variants.items()]))
    return path


NORMED = {k: f"{VARIANTS[k]} --critic-norm" for k in ("flipped", "capped", "dropped")}


@pytest.mark.parametrize("variants, kinds", [
    (VARIANTS, [(4, (4, 6)), (2, (4, 6))]),
    (NORMED, [(2, (2, 3)), (1, (2, 3))]),
], ids=["all", "critic-norm"])  # fmt: skip
def test_an_update_is_the_scripts(variants, kinds, tmp_path):
    """Two iterations in float64 beside each run's own script; in the second GILD has ended for some runs."""
    path = study(tmp_path, variants, flags="--policy-noise 0 --policy-frequency 1 --learning-rate 1e-3")
    learners = made(path)
    weights = [batched.first_weights(one.args) for one in learners]
    weights = [
        {name: {k: np.float64(p) for k, p in net.items()} for name, net in nets.items()} for nets in weights
    ]
    for one, nets in zip(learners, weights, strict=True):  # |Q| for beta / |Q| above the cap, or below
        last = "net1.6.bias" if variants == NORMED else "net1.4.bias"
        nets["critic"][last] += {"il": 1.0, "capped": 0.0}.get(one.run.variant, 3.0)
    torch.manual_seed(0)
    demos = [(torch.randn(50, 2).double(), torch.rand(50, 2).double()) for _ in learners]
    batch = batched.Batch(learners, weights, demos, torch.device("cpu"), compile=False)
    batch.rows, batch.added = torch.randn_like(batch.rows, dtype=torch.float64), torch.tensor(60)
    scripts = [script_learner(one, start) for one, start in zip(learners, weights, strict=True)]
    for iteration, expected in zip((2, 3), kinds, strict=True):
        transitions, demo, val_obs = batch.sample(), batch.sample_demo(), batch.sample()[0]
        imitates = [one.is_il or iteration <= one.gild_iterations for one in learners]
        most = [LAMBDA if "variants" in one.run.script else 1.0 for one in learners]
        lam = [x * y for x, y in zip(imitates, most, strict=True)]
        batch.lam = torch.tensor(lam).double()
        batch.sample, sample = iter([transitions, (val_obs,)]).__next__, batch.sample
        batch.sample_demo, sample_demo = iter([demo]).__next__, batch.sample_demo
        kind = batched.kind_of_iteration(learners, np.array(lam), iteration)
        assert kind == (True, *expected)
        batch.learn(*kind)
        batch.sample, batch.sample_demo = sample, sample_demo
        for slot, (one, nets, optimizers) in enumerate(scripts):
            own = [x[slot] for x in transitions], [x[slot] for x in demo], val_obs[slot]
            follows_f = lam[slot] > 0 and not one.is_il
            script_update(one, nets, optimizers, *own, follows_f)
            for name, net in nets.items():
                if name == "gild" and not follows_f:
                    continue
                for key, parameter in net.named_parameters():
                    ours = batch.nets[name][key]
                    torch.testing.assert_close(ours[slot], parameter, atol=1e-12, rtol=0)
                    if name == "gild" and one.kind == batched.LEARNED:  # second-order effects are small there
                        moments, theirs = (o["gild"].state for o in (batch.optimizers, optimizers))
                        ours, theirs = moments[ours]["exp_avg"][slot], theirs[parameter]["exp_avg"]
                        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-18)


def made(path):
    (learners,) = batched.batches(runs_of(load_study(path)))
    assert len(learners) == len(load_study(path).variants)
    return learners


def script_learner(one, start):
    nets = {"actor": Actor(2, 2), "critic": Critic(2, 2, one.args.critic_norm), "gild": GILD(2, 2)}
    nets = {name: net.double() for name, net in nets.items()}
    for name, net in nets.items():
        net.load_state_dict({k: torch.from_numpy(p) for k, p in start[name].items()})
    adam = partial(torch.optim.Adam, lr=one.args.learning_rate)
    optimizers = {name: adam(nets[name].parameters()) for name in ("actor", "critic")}
    optimizers["gild"] = adam(nets["gild"].parameters(), lr=1e-4, eps=1e-3)
    return one, nets | {f"target_{name}": deepcopy(nets[name]) for name in ("actor", "critic")}, optimizers


def script_update(one, nets, optimizers, transitions, demo, val_obs, follows_f):
    """An iteration by the functions of the run's own script."""
    script = import_module(one.run.script)
    args, is_variant = script.Args(**one.run.args), "variants" in one.run.script
    actor, critic, gild, obs = nets["actor"], nets["critic"], nets["gild"], transitions[0]
    targets, own_half = (nets["target_critic"], nets["target_actor"]), [None] if is_variant else []
    critic_grad, _ = script.critic_gradient(critic, *targets, transitions, *own_half, args)
    script.step(optimizers["critic"], critic, critic_grad)
    if one.is_il:
        phi_grad, _ = script.actor_gradient(actor, critic, obs, demo, args)
    elif not follows_f:
        phi_grad, _ = script.actor_gradient(actor, critic, obs)
    else:
        lam = [torch.tensor(LAMBDA).double()] if is_variant else []
        phi_grad, omega_grad, _ = script.gild_gradients(actor, critic, gild, obs, demo, val_obs, *lam, args)
        if is_variant and omega_grad:
            omega_grad = omega_direction(omega_grad, args)
        if omega_grad and args.gild_lr > 0:
            script.step(optimizers["gild"], gild, omega_grad)
    script.step(optimizers["actor"], actor, phi_grad)
    for name in ("actor", "critic"):
        script.update_target(nets[f"target_{name}"], nets[name], args.tau)


def test_a_clone_is_the_scripts(tmp_path):
    """As gild_td3.clone makes it from the same demonstrations; the actor's Adam then starts anew."""
    runs = {"gild": "gild_td3 --clone-steps 5", "il": "baselines.td3_il --clone-steps 5"}
    learners = made(study(tmp_path, runs, flags="--learning-rate 1e-3"))
    weights, demos = [batched.first_weights(one.args) for one in learners], [torch.rand(50, 2)] * 2
    batch = batched.Batch(learners, weights, [demos] * 2, torch.device("cpu"), compile=False)
    samples, sample_demo = [], batch.sample_demo
    batch.sample_demo = lambda: samples.append(sample_demo()) or samples[-1]
    batch.clone()
    assert len(samples) == 5
    for slot, one in enumerate(learners):
        _, nets, _ = script_learner(one, weights[slot])
        pairs = iter([[side[slot] for side in sample] for sample in samples])
        demonstrations = SimpleNamespace(sample=lambda size, pairs=pairs: next(pairs))
        clone(nets["actor"].float(), demonstrations, one.args)
        for key, parameter in nets["actor"].named_parameters():
            for name in ("actor", "target_actor"):
                torch.testing.assert_close(batch.nets[name][key][slot], parameter)
    assert not any(
        value.any() for state in batch.optimizers["actor"].state.values() for value in state.values()
    )


def test_a_random_direction_has_the_meta_gradients_length(tmp_path):
    variants = {"learned": f"{CAPPED} --release never", "random": f"{CAPPED} --omega random --release never"}
    learners = made(study(tmp_path, variants))
    weights, demos = [batched.first_weights(one.args) for one in learners], [torch.ones(9, 2)] * 2
    batch = batched.Batch(learners, weights, [demos] * 2, torch.device("cpu"), compile=False)
    gradient = {k: torch.randn_like(p) for k, p in batch.nets["gild"].items()}
    direction = batch.omega_direction(gradient, 2)
    for slot in range(2):
        before, after = (
            torch.cat([x[slot].flatten() for x in tree.values()]) for tree in (gradient, direction)
        )
        torch.testing.assert_close(after.norm(), before.norm())
        cosine = torch.cosine_similarity(before, after, dim=0)
        assert cosine > 0.999 if learners[slot].args.omega == "learned" else abs(cosine) < 0.1


def test_a_batch_fits_f_as_the_runs_flags_say(tmp_path):
    differences = "benchmark.gild_td3_variants --gild-fit differences"
    runs = {"td3": "baselines.td3", "gild": "gild_td3 --ws-frac 1", "closer": differences, "random": CAPPED}
    learners = {one.run.variant: one for one in made(study(tmp_path, runs))}
    fits = {name: batched.fit_of(one) for name, one in learners.items()}
    assert fits == {"td3": "", "gild": "demonstrations", "closer": "differences", "random": ""}
    first = batched.first_weights(learners["closer"].args, "differences")["gild"]["net.0.weight"]
    assert (first[:, :2] == 0).all() and (first[:, 2:4] == -first[:, 4:]).all() and first[:, 4:].any()


def test_a_batch_starts_with_the_scripts_first_weights(tmp_path):
    one = made(study(tmp_path))[0]
    torch.manual_seed(one.args.seed)
    nets = {"actor": Actor(2, 2), "critic": Critic(2, 2), "gild": GILD(2, 2)}  # in gild_td3.train's order
    found = batched.first_weights(one.args)
    for name, net in nets.items():
        for key, parameter in net.state_dict().items():
            assert np.array_equal(found[name][key], parameter)


def test_the_demonstrations_of_a_run_are_those_of_its_flags(tmp_path):
    """For benchmark.fit --run; batches leave such runs out."""
    save_demonstrations(tmp_path / "mine.npz", "Point2D-v0", np.ones((7, 2)), np.zeros((7, 2)))
    args = Args(env_id="Point2D-v0", demo_path=str(tmp_path / "mine.npz"))
    assert batched.demonstrations_of(args).obs.tolist() == 7 * [[1, 1]]


def test_actions_have_noise_and_only_the_critics_gradients_are_in_bfloat16(tmp_path):
    demos, gradients = [torch.zeros(9, 2), torch.zeros(9, 2)], []
    inputs = [torch.rand(1, 32, width) for width in (2, 2, 1, 2, 1)]
    for flags in ("", "--bf16"):
        learners = made(study(tmp_path, {"il": "baselines.td3_il"}, f"{flags} --policy-noise 0"))
        weights = [batched.first_weights(learners[0].args)]
        batch = batched.Batch(learners, weights, [demos], torch.device("cpu"), compile=False)
        nets, knobs = batch.nets, (batch.beta, batch.cap, batch.plain, batch.by_error, batch.lam + 1)
        critic, _ = batch.critic_gradient(nets["critic"], nets["critic"], nets["actor"], inputs)
        actor, *_ = batch.actor_gradient(nets["actor"], nets["critic"], inputs[0], inputs[:2], *knobs)
        gradients.append((critic["net1.2.weight"], actor["net.2.weight"]))
    (critic, actor), (critic_bf16, actor_bf16) = gradients
    assert torch.equal(actor, actor_bf16) and not torch.equal(critic, critic_bf16)
    assert (critic - critic_bf16).norm() < 0.1 * critic.norm()
    chosen = []
    for _ in range(1_000):
        batch.choose()
        chosen.append(batch.action - batch.policy(batch.obs))
    assert torch.stack(chosen).std().item() == pytest.approx(0.1, rel=0.1)


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def start(path, results):
    command = [sys.executable, "-m", "benchmark.batched", path, "--results", results]
    command += ["--no-compile", "--processes", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)


def train(path, results):
    process = start(path, results)
    out, _ = process.communicate()
    assert process.returncode == 0
    return out


def test_a_study_ends_with_results_twice_the_same(tmp_path):
    path = study(tmp_path, flags="--eval-frequency 40 --eval-episodes 2 --bf16", steps=90)
    for folder in ("a", "b"):
        assert "9 of 9 runs to train, in batches of 9\n" in train(path, folder)
    for variant, script in VARIANTS.items():
        first, second = (rows_of(tmp_path / folder / "some" / f"{variant}-Point2D-3.csv") for folder in "ab")
        assert [row["global_step"] for row in first] == ["40", "80", "90"]
        assert first == second
        torch.manual_seed(3)
        env = make_env(Args(env_id="Point2D-v0"), training=False)
        expected = evaluate(act, Actor(2, 2), env, 2, seed=103).mean()  # no update was made so far
        assert float(first[0]["return_mean"]) == pytest.approx(expected, rel=1e-3)
        gild_ends = GILD_ENDS.get(variant, 0)
        assert [row["f_mean"] != "nan" for row in first] == [False, gild_ends >= 40, gild_ends >= 50]
        about = json.loads((tmp_path / "a" / "some" / f"{variant}-Point2D-3.json").read_text())
        assert about["script"] == script.split()[0]
        assert about["batch"].items() >= {"runs": 9, "device": "cpu"}.items()
    assert "0 of 9 runs to train\n" in train(path, "a")
    assert seconds_per_step(tmp_path / "a") == {}  # a run in a batch has no time of its own
    some = load_study(path)
    assert report.time_table(some, report.load(some, tmp_path / "a")) == ""


def test_only_the_variants_evaluate_their_clone(tmp_path):
    """As in the scripts, which have no row for step 0."""
    runs = {"gild": "gild_td3 --gild-init random", "capped": CAPPED}
    train(study(tmp_path, runs, "--clone-steps 2 --eval-frequency 40 --eval-episodes 1", steps=50), "a")
    steps = {run: [row["global_step"] for row in rows_of(f"a/some/{run}-Point2D-3.csv")] for run in runs}
    assert steps == {"gild": ["40", "50"], "capped": ["0", "40", "50"]}


def test_nothing_outlives_a_study_that_is_killed(tmp_path):
    process = start(study(tmp_path, {"td3": "baselines.td3"}, flags="--eval-frequency 41", steps=10**5), "a")
    while "step 82" not in process.stdout.readline():  # it learns
        assert process.poll() is None
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_sigterm_ends_a_child_whatever_its_parent_does(tmp_path):
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        envs = batched.Environments(made(study(tmp_path, {"td3": "baselines.td3"})), 2, 2, processes=1)
        envs.finish()  # it has started
        with batched.FORK.Pool(1, batched.be_child) as pool:
            assert pool.apply(signal.getsignal, (signal.SIGTERM,)) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, handler)
    (process,) = envs.processes
    process.terminate()
    process.join(20)
    exitcode = process.exitcode
    process.kill()
    assert exitcode == -signal.SIGTERM


def test_environments_give_what_the_scripts_would(tmp_path):
    """Transitions and episodes of two runs in two processes, against one loop over an environment."""
    learners = made(study(tmp_path, {"td3": "baselines.td3", "il": "baselines.td3_il"}))
    envs, rng = batched.Environments(learners, 2, 2, processes=2), np.random.default_rng(0)
    env = make_env(learners[0].args, training=True)
    obs, episodes = env.reset(seed=3)[0], 0
    envs.finish()
    for _ in range(250):
        action = np.float32(rng.uniform(-1, 1, 2))
        envs.action[:] = action
        envs.start()
        envs.finish()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        expected = np.float32([*obs, *action, reward, *next_obs, terminated])
        assert (envs.row == expected).all()
        if terminated or truncated:
            episodes, next_obs = episodes + 1, env.reset()[0]
        obs = next_obs
        assert (envs.obs == obs).all() and (envs.episodes == episodes).all()
    assert episodes == 2


def test_rollouts_are_evaluations_of_both_rewards():
    torch.manual_seed(0)
    actor, args = Actor(11, 3), Args(env_id="Hopper-v4", eval_episodes=3, sparse_threshold=0.0)
    for training, returns in zip((False, True), batched.rollouts(actor, args), strict=True):
        expected = evaluate(act, actor, make_env(args, training), 3, seed=101)
        assert returns == pytest.approx(expected, rel=1e-4) and expected.any()
    assert np.isnan(batched.rollouts(Actor(2, 2), Args(env_id="Point2D-v0"))[1]).all()


def test_a_minibatch_has_rows_that_were_stored(tmp_path):
    learners = made(study(tmp_path, {"td3": "baselines.td3", "il": "baselines.td3_il"}))
    weights = [batched.first_weights(one.args) for one in learners]
    demos = [(torch.full((n, 2), float(n)), torch.full((n, 2), float(n))) for n in (3, 5)]
    batch = batched.Batch(learners, weights, demos, torch.device("cpu"), compile=False)
    for number in range(1, 8):
        batch.new_row[:] = torch.tensor([[number], [-number]])
        batch.observe()
    obs, action, *_ = (torch.cat(x, 1) for x in zip(*(batch.sample() for _ in range(20)), strict=True))
    assert sorted({*obs[0].flatten().tolist()}) == [*range(1, 8)] and (obs[0, :, :1] == action[0]).all()
    assert sorted({*obs[1].flatten().tolist()}) == [*range(-7, 0)]
    demo_obs, demo_actions = batch.sample_demo()
    assert (demo_obs[0] == 3).all() and (demo_obs[1] == 5).all() and (demo_actions[1] == 5).all()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("gild_sac", "gild_sac cannot be part of a batch"),
        ("benchmark.gild_td3_variants --meta-critic q2", "it has flags that batches do not know"),
        ("benchmark.gild_td3_variants --gild-form weight", "it has flags that batches do not know"),
        ("benchmark.gild_td3_variants --rl-weight ramped", "it has flags that batches do not know"),
        ("gild_td3 --gild-weight-decay 1e-4", "it has flags that batches do not know"),
        (
            "benchmark.gild_td3_variants --clone-steps 9 --clone-labels",
            "it has flags that batches do not know",
        ),
        ("gild_td3 --buffer-size 90", "--total-timesteps 100 exceeds --buffer-size 90"),
    ],
)
def test_a_run_that_batches_do_not_know_is_left_out(tmp_path, capsys, run, message):
    path = study(tmp_path, {"some": run, "td3": "baselines.td3"})
    ((one,),) = batched.batches(runs_of(load_study(path)))
    assert one.run.variant == "td3"
    assert f"some-Point2D-3 is left out: {message}" in capsys.readouterr().out
