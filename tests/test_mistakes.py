"""User mistakes: exit code 2, no traceback, nothing written, and one line (or tyro's box) that says why."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import gild_td3
from tests.conftest import ROOT, call, write_demonstrations

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date")  # Gymnasium's notice on every -v4 task
SHORT = "--env-id Point2D-v0 --total-timesteps 300 --learning-starts 256 --eval-episodes 1 --no-cuda"
SHORT = f"{SHORT} --gild-init random".split()

# flags that tyro or Args itself refuses, and words that tyro's box must have
BOX = {
    "--ws-frac 1.5": "--ws-frac 1.5 is not between 0 and 1",
    "--ws-frac -0.1": "ws-frac",
    "--ws-frac much": "ws-frac",
    "--gamma 1.1": "--gamma 1.1 is not between 0 and 1",
    "--gamma nan": "gamma",
    "--tau -1": "tau",
    "--learning-rate -0.001": "learning-rate",
    "--learning-rate inf": "learning-rate",
    "--total-timesteps 0": "total-timesteps",
    "--total-timesteps 1e6": "total-timesteps",
    "--buffer-size 0": "buffer-size",
    "--buffer-size 100000000000": "--buffer-size 100000000000 is not between 1 and 1e+09",
    "--batch-size 0": "batch-size",
    "--batch-size 257": "--batch-size 257 exceeds --learning-starts 256",
    "--learning-starts -1": "learning-starts",
    "--policy-frequency 0": "policy-frequency",
    "--policy-noise -1": "policy-noise",
    "--exploration-noise -1": "exploration-noise",
    "--eval-frequency 0": "eval-frequency",
    "--eval-episodes 0": "eval-episodes",
    "--checkpoint-frequency 0": "checkpoint-frequency",
    "--torch-threads 0": "torch-threads",
    "--torch-threads 100000": "torch-threads",
    "--seed -1": "seed",
    "--seed 5000000000": "seed",
    "--seed one": "seed",
    "--sparse-threshold far": "sparse-threshold",
    "--il-beta -1": "il-beta",
    "--gild-init imitate": "gild-init",
    "--gild-lr nan": "gild-lr",
    "--gild-eps -1": "gild-eps",
    "--gild-weight-decay -1": "gild-weight-decay",
    "--meta-loss gains": "meta-loss",
    "--ws-fraction 0.1": "--ws-frac",  # the nearest flag
    "--cudagraphs": "--cudagraphs",
    "0.1": "Unrecognized",
}

# flags that a script refuses itself, and words that its line must have
LINE = {
    "--env-id Hoper-v4": "Hopper",
    "--env-id Hopper-v9": "`v4`, `v5`",
    "--env-id no_such_module:Env-v0": "no_such_module",
    "--env-id a:b:c": "a:b:c",
    "--env-id CartPole-v1": "Discrete(2)",
    "--env-id Blackjack-v1": "Tuple",
    "--demo-path none.npz": "none.npz",
    "--demo-path text.npz": "text.npz",
    "--demo-path truncated.npz": "truncated.npz",
    "--demo-path pickled.npz": "pickled.npz",
    "--demo-path hopper.npz": "hopper.npz has demonstrations of Hopper, not Point2D",
    "--demo-path nan.npz": "nan.npz: pair 0 is not finite",
    "--demo-path pairless.npz": "pairless.npz holds no pairs",
    "--demo-path outside.npz": "outside.npz: the action of pair 3 is 0.5 outside",
    "--env-id Walker2d-v4 --demo-path hopper.npz": "hopper.npz has demonstrations of Hopper, not Walker2d",
    "--resume runs/none": "runs/none",
    "--resume text.npz": "text.npz",
    "--resume empty": "empty",
    "--resume other": "other: not a run of this script",
    "--resume unreadable": "unreadable: not a run of this script",
    "--resume without": "without/checkpoint.pt is not a checkpoint of this run",
    "--resume truncated": "truncated/checkpoint.pt is not a checkpoint of this run",
    "--resume foreign": "foreign/checkpoint.pt is not a checkpoint of this run",
    "--resume older": "older/checkpoint.pt is not a checkpoint of this run",
    "--resume whole --seed 5": "the run has seed 1, not 5",
    "--resume whole --gild-lr 0.1": "the run has gild_lr 0.0001, not 0.1",
    "--resume whole --no-compile --env-id Hopper-v4": "the run has env_id Point2D-v0, not Hopper-v4",
    "--resume whole --ws-frac 0.5": "the run has ws_frac 0.01, not 0.5",
    "--resume finished": "nothing to do",
    "--resume finished --total-timesteps 300": "nothing to do",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with bad files, with a run to resume, a finished one and damaged ones."""
    folder = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(gild_td3, *SHORT, "--checkpoint-frequency", "1", "--seed", "1")
        (run_dir,) = (folder / "runs").iterdir()
        run_dir.rename(folder / "finished")
        shutil.rmtree(folder / "runs")
    damaged = "whole", "other", "unreadable", "without", "truncated", "foreign", "older"
    for name in damaged:
        shutil.copytree(folder / "finished", folder / name)
        (folder / name / "evaluations.csv").unlink()
    (folder / "empty").mkdir()
    metadata = json.loads((folder / "other" / "args.json").read_text())
    metadata["args"]["another"] = 1  # an argument that this version does not have
    (folder / "other" / "args.json").write_text(json.dumps(metadata))
    (folder / "unreadable" / "args.json").write_text("{")
    (folder / "without" / "checkpoint.pt").unlink()
    checkpoint = folder / "truncated" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100_000])
    state = torch.load(folder / "whole" / "checkpoint.pt", weights_only=True)
    narrow = torch.nn.Linear(2, 2).state_dict()
    torch.save({**state, "actor": narrow}, folder / "foreign" / "checkpoint.pt")
    del state["random"]
    torch.save(state, folder / "older" / "checkpoint.pt")

    good = write_demonstrations(folder / "good.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(good[: len(good) // 2])
    (folder / "text.npz").write_text("observations")
    metadata = {"metadata": np.array('{"env_id": "Point2D-v0"}')}
    pickled = np.array([{}])
    np.savez(folder / "pickled.npz", observations=pickled, actions=pickled, **metadata)
    write_demonstrations(folder / "hopper.npz", "Hopper-v4", 11, 3)
    bad, far = np.full((8, 2), np.nan), np.zeros((8, 2))
    np.savez(folder / "nan.npz", observations=bad, actions=bad, **metadata)
    np.savez(folder / "pairless.npz", observations=bad[:0], actions=bad[:0], **metadata)
    far[3] = 1.5
    np.savez(folder / "outside.npz", observations=far, actions=far, **metadata)
    return folder


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def flags_of(text):
    return [*([] if "--resume" in text else SHORT), *text.split()]


def text_of(err):
    """The words in tyro's box, whatever it is drawn with."""
    return " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("flags", BOX)
def test_tyro_says_what_is_wrong_with_an_argument(flags, tmp_path):
    code, out, err = call(gild_td3, *flags_of(flags))
    assert (code, out) == (2, "") and not list(tmp_path.iterdir())
    assert BOX[flags] in text_of(err) and "Traceback" not in err


@pytest.mark.parametrize("flags", LINE)
def test_a_mistake_gets_one_line(flags, folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = files(folder)
    code, out, err = call(gild_td3, *flags_of(flags))
    assert (code, out) == (2, "") and before == files(folder)
    (line,) = err.splitlines()
    assert line.startswith("gild_td3.py: ") and LINE[flags] in line


def test_a_baseline_refuses_the_same_mistakes(folder, monkeypatch):
    monkeypatch.chdir(folder)
    flags = [flag for flag in SHORT if flag not in ("--gild-init", "random")]
    script = import_module("baselines.ddpg_il")
    code, _, err = call(script, *flags, "--demo-path", "hopper.npz")
    assert code == 2 and "demonstrations of Hopper, not Point2D" in err
    code, _, err = call(script, "--resume", "whole")
    assert code == 2 and "whole: not a run of this script" in err


def test_demonstrations_may_move():
    """A run remembers the path that it was given, and another one can be given when it is resumed."""
    first = write_demonstrations(Path("first.npz").absolute())
    flags = "--ws-frac 1 --total-timesteps 260 --checkpoint-frequency 1 --demo-path first.npz"
    assert call(gild_td3, *SHORT, *flags.split())[0] == 0
    (run_dir,) = Path("runs").iterdir()
    second = first.rename("second.npz")
    code, _, err = call(gild_td3, "--resume", run_dir, "--total-timesteps", "300")
    assert code == 2 and "first.npz" in err and err.endswith("set --demo-path\n")
    assert call(gild_td3, "--resume", run_dir, "--total-timesteps", "300", "--demo-path", second)[0] == 0
    assert (run_dir / "evaluations.csv").read_text().splitlines()[-1].startswith("300,")


def test_a_run_of_another_script_is_not_resumed():
    """TD3's networks have the names and shapes of TD3+IL's."""
    td3, td3_il = import_module("baselines.td3"), import_module("baselines.td3_il")
    flags = "--env-id Point2D-v0 --total-timesteps 40 --learning-starts 32 --batch-size 32 --eval-episodes 1"
    assert call(td3, *flags.split(), "--no-cuda", "--buffer-size", "40")[0] == 0
    (run_dir,) = Path("runs").iterdir()
    code, out, err = call(td3_il, "--resume", run_dir, "--total-timesteps", "50")
    assert (code, out) == (2, "") and "not a run of this script" in err


def test_compile_on_an_old_pytorch(monkeypatch):
    monkeypatch.setattr(torch._dynamo, "config", object())  # before 2.11 it has no trace_autograd_ops
    code, out, err = call(gild_td3, "--compile", "--env-id", "Point2D-v0")
    assert (code, out) == (2, "") and "--compile needs PyTorch 2.11 or later" in text_of(err)


def test_arguments_are_checked_in_a_notebook_too(gild_script):
    for changes in (
        dict(gamma=1.5),
        dict(batch_size=64, learning_starts=63),
        dict(tau=float("nan")),
        dict(seed=-1),
    ):
        with pytest.raises(gild_script.InputError):
            gild_script.Args(**changes)
    assert issubclass(gild_script.InputError, ValueError)
    assert gild_script.Args(gamma=0, ws_frac=1, gild_lr=0).ws_frac == 1  # integers, where 0.0 would do


class Spaces(gym.Env):
    """A task with the spaces of the test."""

    def __init__(self, action_space, width=2):
        self.action_space = action_space
        self.observation_space = gym.spaces.Box(np.arange(-width, 0, dtype=np.float32), np.float32(9))


Box = gym.spaces.Box
SPACES = {
    "discrete": gym.spaces.Discrete(3),
    "integers": Box(0, 3, (2,), np.int64),
    "a matrix": Box(-1, 1, (2, 2)),
    "a width of zero": Box(np.float32([-1, 2]), np.float32([1, 2])),
    "no upper bound": Box(np.float32([-1, -1]), np.float32([1, np.inf])),
    "no bound": Box(-np.inf, np.inf, (2,)),
}


@pytest.mark.parametrize("space", SPACES)
def test_only_a_bounded_box_of_floats_is_an_action_space(space, tmp_path):
    gym.register("Spaces-v0", partial(Spaces, SPACES[space]), disable_env_checker=True)
    code, out, err = call(gild_td3, *flags_of("--env-id Spaces-v0 --ws-frac 0"))
    del gym.registry["Spaces-v0"]
    assert (code, out) == (2, "") and not list(tmp_path.iterdir())
    (line,) = err.splitlines()
    assert "Spaces-v0" in line and "bounded float actions" in line


def test_a_message_about_a_wide_box_is_one_line():
    """NumPy breaks the bounds of 40 coordinates into lines."""
    gym.register("Spaces-v0", partial(Spaces, SPACES["discrete"], width=40), disable_env_checker=True)
    code, _, err = call(gild_td3, *flags_of("--env-id Spaces-v0 --ws-frac 0"))
    del gym.registry["Spaces-v0"]
    assert code == 2 and len(err.splitlines()) == 1


def test_track_without_wandb_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(gild_td3, "find_spec", lambda name: None if name == "wandb" else "there")
    code, out, err = call(gild_td3, *SHORT, "--track")
    assert (code, out) == (2, "") and not list(tmp_path.iterdir())
    assert "pip install wandb" in err and "Traceback" not in err


def test_a_task_without_a_position_refuses_a_threshold():
    code, _, err = call(gild_td3, *flags_of("--env-id Pendulum-v1 --sparse-threshold 1 --ws-frac 0"))
    assert code == 2 and len(err.splitlines()) == 1 and "x_position" in err


def test_a_run_too_short_for_an_update_says_so_and_runs(tmp_path):
    code, out, err = call(gild_td3, *SHORT, "--total-timesteps", "256")
    assert code == 0 and len(list(tmp_path.glob("runs/*/policy.pt"))) == 1
    assert err == "no update: the first comes after 256 steps\n"
    assert out.splitlines()[-1].startswith("step       256   return")
    assert "no update" not in call(gild_td3, *SHORT, "--total-timesteps", "257")[2]


def test_an_error_in_the_users_own_code_keeps_its_traceback(monkeypatch):
    def mine(*args):
        raise RuntimeError("my own mistake")

    monkeypatch.setattr(gild_td3, "critic_loss", mine)
    with pytest.raises(RuntimeError, match="my own mistake"):
        call(gild_td3, *SHORT, "--ws-frac", "0")


def test_a_nan_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(gild_td3, "act", lambda actor, obs: np.full(2, np.nan))
    code, _, err = call(gild_td3, *SHORT, "--ws-frac", "0")
    (line,) = err.splitlines()
    assert code == 2 and "action or reward not finite at step 257" in line


def alone(folder, *command):
    """The real command line; a script that is in the folder is on its own."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if command[0] == "-m":
        environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("gild_td3.py --gamma 1.5", "--gamma 1.5 is not between 0 and 1"),
        ("gild_td3.py --env-id Hopper-v4", "gild_td3.py: cannot read demonstrations from"),
        ("gild_td3.py --env-id Point2D-v0", "No module named 'envs'"),
        (
            "-m baselines.td3_il --env-id Point2D-v0 --demo-path none.npz",
            "td3_il.py: cannot read demonstrations from none.npz",
        ),
        ("gild_td3.py --env-id Pendulum-v1 --ws-frac 0", "could not be written"),
    ],
)
def test_on_the_real_command_line(tmp_path, command, words):
    shutil.copy(ROOT / "gild_td3.py", tmp_path)
    (tmp_path / "runs").write_text("a file where the folder of the runs should be")
    run = alone(tmp_path, *command.split())
    assert (run.returncode, run.stdout) == (2, "") and "Traceback" not in run.stderr, run.stderr
    assert words in text_of(run.stderr)
    # none but tyro and Gymnasium (its notice on every -v4 task takes two) writes more than one line
    assert len(run.stderr.splitlines()) <= (5 if "gamma" in command else 3 if "-v4" in command else 1)
    assert {path.name for path in tmp_path.iterdir()} == {"gild_td3.py", "runs"}
