"""The training loop: what a run repeats, what it leaves alone, and that GILD's objective stays alive."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ALGORITHMS, ROOT, same, short_run, write_demonstrations


def test_two_runs_are_identical(gild_script):
    first, second = (short_run(gild_script, ws_frac=0.2) for _ in range(2))
    assert same(first[0], second[0]) and first[1] == second[1]
    assert not same(first[0], short_run(gild_script, ws_frac=0.2, seed=2)[0])


def test_without_warm_start_gild_is_the_vanilla_algorithm(gild_script, vanilla_script):
    gild, vanilla = short_run(gild_script, ws_frac=0.0), short_run(vanilla_script)
    assert same(gild[0], vanilla[0]) and gild[1] == vanilla[1]
    assert not same(gild[0], short_run(gild_script, ws_frac=0.2)[0])


def test_evaluation_changes_nothing_in_training(gild_script):
    often = short_run(gild_script, ws_frac=0.2, eval_frequency=10, eval_episodes=1)
    seldom = short_run(gild_script, ws_frac=0.2, eval_frequency=1_000, eval_episodes=3)
    assert same(often[0], seldom[0])
    assert len(often[1].splitlines()) == 1 + 35 and len(seldom[1].splitlines()) == 1 + 1


# 0.1 * 350 = 35 of the 150 iterations, or all of them; TD3 updates the actor in every second one
UPDATES = {0.0: (0, 0, 0), 0.1: (35, 17, 35), 1.0: (150, 75, 150)}


@pytest.mark.parametrize("ws_frac", UPDATES)
def test_the_number_of_gild_updates(gild_script, algorithm, monkeypatch, ws_frac):
    original = gild_script.gild_gradients
    omegas, omega_steps, demonstration_reads = [], [], []

    def counted(actor, critic, gild, *args):
        omegas.append([p.detach().clone() for p in gild.parameters()])
        omega_steps.append(original(actor, critic, gild, *args))
        return omega_steps[-1]

    original_sample = gild_script.DemonstrationBuffer.sample
    monkeypatch.setattr(gild_script, "gild_gradients", counted)
    monkeypatch.setattr(
        gild_script.DemonstrationBuffer,
        "sample",
        lambda self, size: demonstration_reads.append(size) or original_sample(self, size),
    )
    short_run(gild_script, ws_frac=ws_frac, gild_lr=1e-3, gild_eps=1e-12)
    expected = UPDATES[ws_frac][ALGORITHMS.index(algorithm)]
    assert len(omegas) == expected
    assert len(demonstration_reads) == expected  # and none after the warm start
    if (
        expected
    ):  # the loop's steps on omega are Adam's along the gradients under test: the first one moves by lr
        largest = max((a - b).abs().max() for a, b in zip(omegas[0], omegas[1], strict=True))
        assert abs(largest - 1e-3) < 1e-5


def test_the_warm_start_needs_the_demonstrations_only_then(gild_script, monkeypatch):
    monkeypatch.setattr(gild_script, "DemonstrationBuffer", None)
    short_run(gild_script, ws_frac=0.0)
    with pytest.raises(TypeError):
        short_run(gild_script, ws_frac=0.01)


def scalars(name):
    (run_dir,) = (path for path in (Path.cwd() / "runs").iterdir())
    return [event.value for event in EventAccumulator(str(run_dir)).Reload().Scalars(name)]


@pytest.mark.parametrize("settings", ["released", "default"])
def test_the_released_settings_collapse_and_the_defaults_do_not(settings):
    """As released, omega shrinks while Q is silent, f becomes the constant ln 2 and its slope dies."""
    import gild_ddpg

    released = dict(gild_init="random", gild_lr=1e-4, gild_eps=1e-8, gild_weight_decay=1e-4)
    defaults = dict(gild_init="imitation")
    short_run(
        gild_ddpg,
        **(released if settings == "released" else defaults),
        **dict(ws_frac=1.0, total_timesteps=1_700, learning_starts=200, batch_size=64, eval_frequency=5_000),
    )
    slope, objective = scalars("losses/gild_action_grad_norm"), scalars("losses/gild_loss")
    if settings == "released":
        assert slope[0] > 1e-3 and slope[-1] < 1e-3 * slope[0]
        assert objective[-1] == pytest.approx(0.6931, abs=1e-2)
    else:
        assert min(slope) > 1e-2


@pytest.mark.parametrize(("task", "env_id"), [("Point2D", "Point2D-v0"), ("HalfCheetah", "HalfCheetah-v4")])
def test_the_fitted_objective_is_the_imitation_error(gild_script, algorithm, task, env_id):
    args = gild_script.Args(env_id=env_id)
    env = gild_script.make_env(args, training=True)
    path = ROOT / "demos" / f"{task}-{algorithm}.npz"
    demonstrations = gild_script.DemonstrationBuffer(path, args.env_id, env, torch.device("cpu"))
    torch.manual_seed(0)
    gild = gild_script.GILD(demonstrations.obs.shape[1], demonstrations.actions.shape[1])
    assert gild_script.fit_imitation(gild, demonstrations, env.action_space, iterations=1_000) < 5e-3
    demo_obs, demo_action = demonstrations.sample(1_000)
    action = (torch.rand_like(demo_action) * 2 - 1).requires_grad_()
    error = (action - demo_action).pow(2).mean(1, keepdim=True)
    slope, expected = (
        torch.autograd.grad(f.sum(), action)[0] for f in (gild(demo_obs, demo_action, action), error)
    )
    assert torch.cosine_similarity(slope, expected).mean() > 0.95


def test_the_logs_of_a_run(gild_script, algorithm):
    short_run(gild_script, ws_frac=1.0)
    losses = "actor_loss", "gild_loss", "meta_loss", "gild_action_grad_norm", "meta_grad_norm", "qf1_values"
    charts = "imitation_distance", "SPS", "episodic_return"
    names = [f"losses/{name}" for name in losses] + [f"charts/{name}" for name in charts]
    for name in [*names, "eval/return_mean", "eval/return_std"]:
        assert np.isfinite(scalars(name)).all() and len(scalars(name)) > 0, name
    (run_dir,) = (Path.cwd() / "runs").iterdir()
    rows = (run_dir / "evaluations.csv").read_text().splitlines()
    assert rows[0] == "global_step,return_mean,return_std"
    assert [row.split(",")[0] for row in rows[1:]] == ["150", "300", "350"]
    about = json.loads((run_dir / "args.json").read_text())
    assert about["args"]["ws_frac"] == 1.0 and about["versions"]["torch"] == torch.__version__


def test_policies_are_kept_when_asked(vanilla_script):
    args = vanilla_script.Args(env_id="Point2D-v0", total_timesteps=30, eval_frequency=10, cuda=False)
    args.keep_policies, args.eval_episodes, args.buffer_size = True, 1, 100
    run_dir = vanilla_script.train(args)
    assert sorted(path.name for path in (run_dir / "policies").iterdir()) == ["10.pt", "20.pt", "30.pt"]
    last = torch.load(run_dir / "policies" / "30.pt", weights_only=True)
    newest = torch.load(run_dir / "policy.pt", weights_only=True)
    assert last["global_step"] == newest["global_step"] == 30 and same(last["actor"], newest["actor"])


def run_alone(script, folder, *flags):
    """The script as the only one in an empty folder, as a user would start it."""
    shutil.copy(ROOT / script, folder)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, script, "--no-cuda", "--eval-episodes", "1", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_script_alone_in_an_empty_folder(algorithm, tmp_path):
    flags = "--env-id Hopper-v4 --total-timesteps 316 --learning-starts 256 --eval-frequency 200 --ws-frac 1"
    shutil.copy(ROOT / "demos" / "Hopper-td3.npz", tmp_path / "d.npz")
    run = run_alone(f"gild_{algorithm}.py", tmp_path, *flags.split(), "--demo-path", "d.npz")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""  # none of Gymnasium's or MuJoCo's notices
    lines = run.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith("runs/Hopper-v4__gild_") and "return" in lines[2]
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert {"policy.pt", "evaluations.csv", "args.json"} <= {path.name for path in run_dir.iterdir()}


def test_the_console_has_the_runs_own_lines_only(tmp_path):
    """HalfCheetah is the task at which MuJoCo itself prints a deprecation notice."""
    flags = "--env-id HalfCheetah-v4 --ws-frac 0 --total-timesteps 50 --eval-frequency 50"
    run = run_alone("gild_td3.py", tmp_path, *flags.split())
    assert (run.returncode, run.stderr) == (0, "")
    assert len(run.stdout.splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gild_td3.py", "runs"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id Hopper-v4", "no demonstrations in"),
        ("--env-id Hopper-v4 --demo-path point2d.npz", "demonstrations of Point2D, not of Hopper"),
        ("--env-id Hoppr-v4 --ws-frac 0", "Hoppr"),
        ("--env-id CartPole-v1 --ws-frac 0", "must have vectors in a Box"),
        ("--env-id Point2D-v0", "envs"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, flags, words):
    write_demonstrations(tmp_path / "point2d.npz")
    run = run_alone("gild_td3.py", tmp_path, *flags.split())
    assert run.returncode == 2 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and words in run.stderr
    assert not (tmp_path / "runs").exists()
