"""evaluate.py: the returns of a saved policy by the script that wrote it, its video, and what is refused."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import gymnasium as gym
import imageio
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

import evaluate
from evaluate import load_policy, rollout
from tests.conftest import ROOT

SHIPPED = ROOT / "demos" / "policies"


class Track(gym.Env):
    """The action moves a point along x, from x = 5, with a reward of 1 per step. It cannot be rendered."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, low=-1.0, high=1.0, render_mode=None):
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high), (1,))
        self.init_qpos, self.render_mode = [5.0], render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = 5.0, 0
        return np.array([self.x, self.t]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x, self.t = self.x + float(action[0]), self.t + 1
        return np.array([self.x, self.t]), 1.0, False, self.t == 10, {"x_position": self.x}

    def render(self):
        raise OSError("no renderer")


gym.register("Track-v0", Track)


@pytest.fixture(autouse=True)
def own_imports(tmp_path, monkeypatch):
    """Scripts of a test's folder are forgotten after it."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def write_policy(path, script="baselines.td3", weights=None, saved=None, **changes):
    """A policy file of an untrained actor. `changes` are the run's arguments; `saved` are further ones."""
    module = import_module(script)
    args = module.Args(**changes)
    if weights is None:
        env = module.make_env(args, training=False)
        torch.manual_seed(0)
        weights = module.Actor(env.observation_space.shape[0], env.action_space.shape[0]).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    policy = {"actor": weights, "script": script, "global_step": 20, "args": asdict(args) | (saved or {})}
    torch.save(policy, path)
    return path


def call(tool, *flags, encoding="utf-8"):
    """Runs a tool in this process, as its command line would. Returns exit code, output and error output."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers, argv = [signal.getsignal(number) for number in numbers], sys.argv
    out, err, code = *(io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)), 0
    sys.argv = [tool.__file__, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            evaluate.command_line(tool.main, tool.Args)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    return code, *(stream.buffer.getvalue().decode(encoding) for stream in map(flushed, (out, err)))


def flushed(stream):
    stream.flush()
    return stream


def refusal(tool, *flags, box=False):
    """The line (of a wrong argument, tyro's box) that a command ends with; it leaves no file behind."""
    before = sorted(Path().rglob("*"))
    code, out, err = call(tool, *flags)
    assert code == 2 and out == "" and sorted(Path().rglob("*")) == before, (code, out, err)
    if not box:
        assert err.startswith(f"{Path(tool.__file__).name}: ") and len(err.splitlines()) == 1, err
    return " ".join(err.replace("│", " ").split())


def returns(policy, episodes, seed):
    """Each episode's own and sparse return, as the command prints their mean."""
    code, out, err = call(evaluate, policy, "--episodes", episodes, "--seed", seed)
    assert code == 0, err
    return [float(line.split()[-3]) for line in out.splitlines()[:3]]


# THE RETURNS


@pytest.mark.parametrize(
    "name, changes",
    [
        ("Hopper-td3", {}),
        ("Hopper-sac", {"sparse_threshold": 0.3, "dense": True}),
        ("Point2D-td3", {"dense": True}),
    ],
)
def test_both_returns_against_the_environments(name, changes):
    """The task's return is the evaluation environment's, the sparse one the sparse training environment's."""
    actor, script, args, _ = load_policy(SHIPPED / f"{name}.pt")
    policy = write_policy(
        Path("policy.pt"), script.__name__, actor.state_dict(), env_id=args.env_id, seed=4, **changes
    )
    actor, script, args, global_step = load_policy(policy)
    assert args.seed == 4 and global_step == 20
    expected = []
    for training in (False, True):
        args.dense = False
        env = script.make_env(args, training)
        obs, _ = env.reset(seed=3)
        total, ended = 0.0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(script.act(actor, obs))
            total, ended = total + reward, terminated or truncated
        expected.append(total)
    dense, sparse, _ = returns(policy, episodes=1, seed=3)
    assert [dense, sparse] == pytest.approx(expected, abs=0.051)  # one decimal is printed
    assert dense == sparse if name == "Point2D-td3" else 0 < sparse < dense - 10


@pytest.mark.parametrize("threshold, rewarded", [(None, 10), (0.0, 10), (3.5, 7), (8.75, 2), (12.0, 0)])
def test_the_sparse_return_is_counted_from_the_start(threshold, rewarded):
    """An actor that always moves by 1, from x = 5."""
    weights = {"net.4.weight": torch.zeros(1, 256), "net.4.bias": torch.full((1,), 20.0)}
    whole = torch.load(write_policy(Path("untrained.pt"), env_id="Track-v0"), weights_only=True)["actor"]
    policy = write_policy(
        Path("p.pt"), weights=whole | weights, env_id="Track-v0", sparse_threshold=threshold
    )
    assert returns(policy, episodes=3, seed=0) == [10, rewarded, 10]


def test_a_dense_run_with_a_threshold_that_its_task_cannot_have():
    policy = write_policy(Path("p.pt"), env_id="Pendulum-v1", dense=True, sparse_threshold=1.0)
    dense, sparse, steps = returns(policy, episodes=1, seed=0)
    assert dense < 0 and np.isnan(sparse) and steps == 200


def test_another_environment():
    policy = SHIPPED / "Hopper-td3.pt"
    assert load_policy(policy, env_id="Hopper-v5")[2].env_id == "Hopper-v5"
    assert "size mismatch" in refusal(evaluate, policy, "--env-id", "Walker2d-v4")


def test_ten_episodes_from_ten_starts():
    actor, script, args, _ = load_policy(SHIPPED / "Point2D-sac.pt")
    env = script.make_env(args, training=False)
    plain = rollout(actor, script, args, env, seed=0)
    noisy, again = (rollout(actor, script, args, env, seed=0, explore=True) for _ in range(2))
    plain, noisy = ([next(episodes) for _ in range(2)] for episodes in (plain, noisy))
    assert np.array_equal(plain[0]["actions"], plain[1]["actions"])  # Point2D has one start
    assert not np.array_equal(noisy[0]["actions"], noisy[1]["actions"])
    assert np.array_equal(noisy[0]["actions"], next(again)["actions"])
    np.testing.assert_array_equal(plain[0]["actions"][0], script.act(actor, np.zeros(2, np.float32)))


# THE SCRIPT


def imported(name, folder):
    return evaluate.import_script(name, folder / f"{name.replace('.', '/')}.py", folder)


def edited(folder, name="my_experiment", hidden=64):
    """A copy of a script, renamed and edited as a user would."""
    text = (ROOT / "gild_td3.py").read_text("utf-8")
    assert "hidden: int = 256" in text
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(text.replace("hidden: int = 256", f"hidden: int = {hidden}"), "utf-8")
    return path


def test_a_copied_and_edited_script(tmp_path):
    """Its run is evaluated by the copy, from its folder, also where the output has no ±."""
    edited(tmp_path)
    script = imported("my_experiment", tmp_path)
    settings = dict(env_id="Point2D-v0", total_timesteps=20, eval_episodes=1, buffer_size=50, ws_frac=0.0)
    run_dir = script.train(script.Args(**settings, cuda=False))
    del sys.modules["my_experiment"]
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", run_dir, "--episodes", "2"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        encoding="ascii",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["task", "sparse", "steps"]
    actor, script, args, _ = load_policy(run_dir / "policy.pt")
    assert script.__name__ == "my_experiment" and actor.net[0].out_features == 64
    assert (args.env_id, args.ws_frac, args.total_timesteps) == ("Point2D-v0", 0, 20)


def test_each_folder_has_its_own_script(tmp_path, monkeypatch):
    """Two scripts of one name in one process, neither of them in the current folder."""
    policies = {}
    for hidden in (64, 32):
        folder = tmp_path / f"{hidden}"
        edited(folder, hidden=hidden)
        module = imported("my_experiment", folder)
        weights = module.Actor(2, 2).state_dict()
        policies[hidden] = folder / "runs" / "run" / "policies" / "20.pt"
        write_policy(policies[hidden], "gild_td3", weights, env_id="Point2D-v0")
        policy = torch.load(policies[hidden], weights_only=True) | {"script": "my_experiment"}
        torch.save(policy, policies[hidden])
    for hidden, policy in policies.items():
        actor, script, _, _ = load_policy(policy)
        assert actor.net[0].out_features == hidden and Path(script.__file__).parent.name == f"{hidden}"
        assert call(evaluate, policy, "--episodes", "1")[0] == 0
    moved = Path("moved.pt")
    policies[64].rename(moved)
    assert "my_experiment, which is not in" in refusal(evaluate, moved)
    script = (tmp_path / "64" / "my_experiment.py").rename(tmp_path / "64" / "renamed.py")
    assert call(evaluate, moved, "--script", script)[0] == 0
    assert "is not a Python file" in refusal(evaluate, moved, "--script", "missing.py")
    assert "is not a Python file" in refusal(evaluate, moved, "--script", ROOT / "README.md")


@pytest.mark.parametrize("name", ["my-experiment", "gild_td3.v2", "gild td3"])
def test_a_script_whose_name_is_not_an_identifier(tmp_path, name):
    weights = import_module("gild_td3").Actor(2, 2).state_dict()
    policy = torch.load(
        write_policy(Path("p.pt"), "gild_td3", weights, env_id="Point2D-v0"), weights_only=True
    )
    torch.save(policy | {"script": name}, "p.pt")
    edited(tmp_path, name, hidden=256)
    assert Path(load_policy("p.pt")[1].__file__).name == f"{name}.py"


def test_a_script_of_the_baselines_folder(tmp_path):
    """An edited copy of the whole project: its baselines, not this one's."""
    (tmp_path / "baselines").mkdir()
    for name in ("__init__", "common", "td3"):
        text = (ROOT / "baselines" / f"{name}.py").read_text("utf-8")
        text = text.replace("hidden: int = 256", "hidden: int = 64")
        (tmp_path / "baselines" / f"{name}.py").write_text(text, "utf-8")
    weights = imported("baselines.td3", tmp_path).Actor(2, 2).state_dict()
    policy = write_policy(Path("runs/run/policy.pt"), weights=weights, env_id="Point2D-v0")
    actor, script, *_ = load_policy(policy)
    assert actor.net[0].out_features == 64 and Path(script.__file__).is_relative_to(tmp_path)


def test_a_policy_that_does_not_fit_its_script(tmp_path):
    script = edited(tmp_path)
    policy = write_policy(Path("narrow.pt"), "gild_td3", env_id="Point2D-v0")
    assert "size mismatch for net." in refusal(evaluate, policy, "--script", script)
    policy = write_policy(Path("other.pt"), env_id="Point2D-v0", saved={"hidden": 64})
    assert "unexpected keyword argument 'hidden'" in refusal(evaluate, policy)
    policy = write_policy(Path("range.pt"), env_id="Point2D-v0", saved={"gamma": 2.0})
    assert "--gamma 2.0" in refusal(evaluate, policy)
    policy = write_policy(Path("id.pt"), env_id="Point2D-v0", saved={"env_id": "Gone-v0"})
    assert "module:Env-v0" in refusal(evaluate, policy)
    Path("empty.py").touch()
    assert "has no attribute 'Args'" in refusal(evaluate, policy, "--script", "empty.py")
    policy = write_policy(Path("tracked.pt"), env_id="Point2D-v0", saved={"track": True})
    assert load_policy(policy)[2].track is False  # whether Weights & Biases is installed or not


NO_POLICIES = {
    "empty": b"",
    "text": b"weights",
    "no entries": {},
    "a checkpoint": {"actor": {}, "global_step": 20},
    "of an older version": {
        "actor": {},
        "script": "td3",
        "global_step": 20,
        "env_id": "Hopper-v4",
        "seed": 1,
    },
    "a path for a script": {"actor": {}, "script": "../gild_td3", "global_step": 20, "args": {}},
}


@pytest.mark.parametrize("kind", NO_POLICIES)
def test_a_file_that_is_not_a_policy(kind):
    path, content = Path("policy.pt"), NO_POLICIES[kind]
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert "policy.pt is not a policy file" in refusal(evaluate, path)


def test_a_run_without_a_policy():
    Path("run").mkdir()
    assert "first evaluation" in refusal(evaluate, "run")
    assert "there is no" in refusal(evaluate, "missing.pt")


def test_an_actor_that_is_not_finite():
    weights = torch.load(write_policy(Path("good.pt"), env_id="Track-v0"), weights_only=True)["actor"]
    weights = {name: weight.fill_(torch.nan) for name, weight in weights.items()}
    policy = write_policy(Path("p.pt"), weights=weights, env_id="Track-v0")
    assert "not finite" in refusal(evaluate, policy)


# THE COMMAND

WRONG = {
    "--episodes 0": "--episodes 0 is less than 1",
    "--seed -1": "--seed -1 is negative",
    "--video walk.avi": "ends neither in .mp4 nor in .gif",
    "--video walk.gif --render": "exclude each other",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_arguments(flags):
    assert WRONG[flags] in refusal(evaluate, SHIPPED / "Point2D-td3.pt", *flags.split(), box=True)


def test_an_output_without_plus_minus():
    code, out, err = call(evaluate, SHIPPED / "Point2D-td3.pt", "--episodes", "1", encoding="ascii")
    assert code == 0 and "71.1 ? 0.0" in out, err


def test_a_video():
    flags = "--episodes", "2", "--video", "walk.gif"
    code, out, err = call(evaluate, SHIPPED / "Point2D-td3.pt", *flags)
    assert code == 0 and "walk.gif: 200 frames" in out, err
    assert 150 < len(imageio.mimread("walk.gif", memtest=False)) <= 200  # equal frames become one
    assert [path.name for path in Path().iterdir()] == ["walk.gif"]


def test_a_video_is_written_frame_by_frame(monkeypatch):
    log = []

    class Writer(contextlib.AbstractContextManager):
        def __init__(self, path, *args, **kwargs):
            self.path = path
            log.append("open")

        def append_data(self, frame):
            assert frame.shape == (256, 256, 3)
            log.append("frame")

        def __exit__(self, *error):
            self.path.touch()
            log.append("close")

    td3 = import_module("baselines.td3")
    act = td3.act
    monkeypatch.setattr(imageio, "get_writer", Writer)
    monkeypatch.setattr(td3, "act", lambda *inputs: log.append("act") or act(*inputs))
    assert call(evaluate, SHIPPED / "Point2D-td3.pt", "--episodes", "1", "--video", "walk.mp4")[0] == 0
    assert log == ["open", *["act", "frame"] * 100, "close"] and Path("walk.mp4").exists()


def test_what_cannot_be_rendered(monkeypatch):
    """One line with the remedy, and no file left."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    point, track = SHIPPED / "Point2D-td3.pt", write_policy(Path("track.pt"), env_id="Track-v0")
    assert "needs a display" in refusal(evaluate, point, "--render")
    assert "no renderer" in refusal(evaluate, track, "--video", "walk.gif")

    def fail(*args):
        raise mujoco.FatalError("an OpenGL platform library has not been loaded")

    monkeypatch.setattr(MujocoRenderer, "render", fail)
    assert "MUJOCO_GL=egl" in refusal(evaluate, SHIPPED / "Hopper-td3.pt", "--video", "walk.gif")
    monkeypatch.setitem(sys.modules, "pygame", None)
    pendulum = write_policy(Path("pendulum.pt"), env_id="Pendulum-v1")
    assert "pip install" in refusal(evaluate, pendulum, "--video", "walk.gif")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert "pip install imageio-ffmpeg" in refusal(evaluate, point, "--video", "walk.mp4")
    assert "could not be written" in refusal(evaluate, point, "--video", "missing/walk.gif")


def test_a_video_that_fails_leaves_the_old_one(monkeypatch):
    Path("walk.gif").write_bytes(b"old")
    weights = torch.load(write_policy(Path("good.pt"), env_id="Point2D-v0"), weights_only=True)["actor"]
    weights = {name: weight.fill_(torch.nan) for name, weight in weights.items()}
    policy = write_policy(Path("bad.pt"), weights=weights, env_id="Point2D-v0")
    assert "not finite" in refusal(evaluate, policy, "--video", "walk.gif")
    assert Path("walk.gif").read_bytes() == b"old"
