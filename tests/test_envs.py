"""The environments: rewards by hand, Gymnasium's checker, and the wrappers of the scripts."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from baselines.common import InputError, SparseReward, make_env
from baselines.td3 import Args
from envs.point2d import Point2D
from envs.sparse import SPARSE_THRESHOLDS

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date")  # Gymnasium's notice on every -v4 task
TASKS = {"Hopper-v4": (11, 1.0), "Walker2d-v4": (17, 1.0), "HalfCheetah-v4": (17, 2.0), "Ant-v4": (111, 1.0)}


def pushed(env, x):
    """Resets an environment and puts its body at x, moving forward at 1 m/s."""
    env.reset(seed=0)
    data = env.unwrapped
    qpos, qvel = data.data.qpos.copy(), data.data.qvel.copy()
    qpos[0], qvel[0] = x, 1.0
    data.set_state(qpos, qvel)


@pytest.mark.parametrize("env_id", TASKS)
def test_sparse_rewards_by_hand(env_id):
    obs_dim, threshold = TASKS[env_id]
    args = Args(env_id=env_id)
    sparse, dense = make_env(args, training=True), make_env(args, training=False)
    assert sparse.observation_space.shape == (obs_dim,)
    action = np.full(sparse.action_space.shape, 0.1, np.float32)
    seen = set()
    for x in (-threshold - 1, 0.0, threshold - 0.2, threshold + 0.1, threshold + 5):
        pushed(sparse, x), pushed(dense, x)
        for _ in range(3):
            obs, reward, terminated, truncated, info = sparse.step(action)
            dense_obs, dense_reward, *dense_ends, dense_info = dense.step(action)
            ahead = dense.unwrapped.data.qpos[0] > threshold
            assert info["x_position"] == dense_info["x_position"]
            assert reward == (dense_reward if ahead else 0.0)
            assert np.array_equal(obs, dense_obs) and [terminated, truncated] == dense_ends
            seen.add(bool(ahead))
    assert seen == {True, False}


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5", "Ant-v4"])
def test_registered_ids_are_the_scripts_environments(env_id):
    """envs:SparseHopper-v4 and the scripts' own wrapper give the same observations and rewards."""
    registered, own = gym.make(f"envs:Sparse{env_id}"), make_env(Args(env_id=env_id), training=True)
    rewarded = 0
    for x in (0.0, 3.0):
        pushed(registered, x), pushed(own, x)
        for _ in range(5):
            action = np.zeros(own.action_space.shape, np.float32)
            a, b = registered.step(action), own.step(action)
            assert np.array_equal(np.float32(a[0]), b[0]) and a[1:4] == b[1:4]
            rewarded += a[1] != 0
    assert rewarded == 5


def test_every_sparse_id_is_registered():
    for task in SPARSE_THRESHOLDS:
        assert {f"Sparse{task}-v4", f"Sparse{task}-v5"} <= set(gym.registry)
    assert {env_id.removesuffix("-v4"): delta for env_id, (_, delta) in TASKS.items()} == SPARSE_THRESHOLDS


def test_the_threshold_can_be_changed_and_needs_a_position():
    near, far = (make_env(Args(env_id="Hopper-v4", sparse_threshold=x), training=True) for x in (0.0, 4.0))
    rewards = []
    for env in (near, far):
        pushed(env, 2.0)
        rewards.append(env.step(np.zeros(3, np.float32))[1])
    assert rewards[0] > 0 == rewards[1]
    env = make_env(Args(env_id="Pendulum-v1", sparse_threshold=1.0), training=True)
    env.reset(seed=0)
    with pytest.raises(InputError, match="x_position"):
        env.step(np.zeros(1, np.float32))


def test_the_distance_is_measured_from_the_models_own_position():
    env = gym.make("Hopper-v4")
    env.unwrapped.init_qpos[0] = 5.0
    env = SparseReward(env, 1.0)
    rewards = []
    for x in (5.5, 6.5):
        pushed(env, x)
        rewards.append(env.step(np.zeros(3, np.float32))[1])
    assert rewards[0] == 0 < rewards[1]


def test_the_tasks_time_limit_is_kept(capsys):
    env = make_env(Args(env_id="HalfCheetah-v4"), training=True)
    env.reset(seed=0)
    ends = [env.step(np.zeros(6, np.float32))[2:4] for _ in range(1_000)]
    assert not any(terminated for terminated, _ in ends)
    assert [truncated for _, truncated in ends] == [False] * 999 + [True]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("dense", "training"), [(False, True), (True, True), (True, False)])
def test_dense_and_evaluation_rewards(dense, training):
    """--dense trains on the task's reward; Point2D's evaluation is its sparse reward."""
    env = make_env(Args(env_id="Hopper-v4", dense=dense), training)
    env.reset(seed=0)
    assert (env.step(np.zeros(3, np.float32))[1] > 0) == dense
    env = make_env(Args(env_id="Point2D-v0", dense=dense), training)
    env.reset(seed=0)
    reward = env.step(np.ones(2, np.float32))[1]
    assert reward == (pytest.approx(-np.hypot(0.9, 3**0.5 - 0.1)) if dense and training else 0.0)


class Boxed(gym.Env):
    """Keeps the actions that it is given, and hands out its own arrays."""

    def __init__(self, low, high, dtype=np.float32):
        self.action_space = gym.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
        self.observation_space = gym.spaces.Box(-9, 9, (2,), np.int64)
        self.state, self.actions = np.zeros(2, np.int64), []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.state, {}

    def step(self, action):
        self.actions.append(action)
        self.state += 1
        return self.state, np.float32(0.5), False, False, {}


gym.register("Boxed-v0", entry_point=Boxed, disable_env_checker=True, kwargs={"low": [-1], "high": [1]})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("low", "high"), [(-0.3, 0.9), (-226.74268, 224.91557), (-1, 1), (0, 1e-3), (5, 6)])
def test_actions_of_any_box(low, high, dtype, monkeypatch):
    """Actions in [-1, 1] reach the task in its own box and type, never outside by a rounding."""
    box = {"low": [low, -1], "high": [high, 1], "dtype": dtype}
    monkeypatch.setattr(gym.registry["Boxed-v0"], "kwargs", box)
    env = make_env(Args(env_id="Boxed-v0"), training=True)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    env.reset(seed=0)
    rows = np.linspace(-1, 1, 201, dtype=np.float32)
    for row in (*rows, np.float32(-1.5), np.float32(1.5)):
        action = np.array([row, -row])
        before = action.copy()
        env.step(action)
        assert np.array_equal(action, before)
    actions, box = np.array(env.unwrapped.actions), env.unwrapped.action_space
    assert actions.dtype == dtype and all(action in box for action in actions)
    first, last = actions[:, 0][[0, 200]]
    assert (first, last) == pytest.approx((box.low[0], box.high[0]), rel=1e-6, abs=1e-9)
    expected = low + (rows.astype(np.float64) + 1) / 2 * (np.float64(high) - low)
    np.testing.assert_allclose(actions[:201, 0], expected, atol=1e-6 * max(abs(low), abs(high)))
    assert np.array_equal(actions[-2:], [[box.low[0], 1], [box.high[0], -1]])


def test_observations_and_rewards_are_the_runs_own():
    env = make_env(Args(env_id="Boxed-v0"), training=True)
    first, _ = env.reset(seed=0)
    second, reward, *_ = env.step(np.zeros(1, np.float32))
    assert first.tolist() == [0, 0] and second.tolist() == [1, 1]  # the task overwrites its own array
    assert first.dtype == second.dtype == np.float32 and type(reward) is float
    second[:] = 7
    assert env.unwrapped.state.tolist() == [1, 1]


def test_a_task_without_a_time_limit_gets_one(capsys):
    env = make_env(Args(env_id="Boxed-v0"), training=True)
    make_env(Args(env_id="Boxed-v0"), training=False)
    (line,) = capsys.readouterr().err.splitlines()  # once, not for the evaluations too
    assert line == "Boxed-v0 registers no max_episode_steps; episodes are cut at 1,000"
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(1_000)]
    assert ends == [(False, False)] * 999 + [(False, True)]


@pytest.mark.filterwarnings("ignore:.*A Box observation space")  # a plane has no bounds
def test_point2d_passes_gymnasiums_checker():
    check_env(gym.make("Point2D-v0", render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("reward", ["sparse", "dense"])
def test_point2d_against_its_formula(reward):
    goal = (0.5, -0.3)
    env = gym.make("Point2D-v0", goal=goal, goal_radius=0.05, reward_radius=0.4, reward=reward)
    rng = np.random.default_rng(0)
    kinds = set()
    for episode in range(40):
        obs, _ = env.reset(seed=episode)
        assert np.array_equal(obs, [0.0, 0.0])
        position = np.zeros(2)
        for t in range(1, 101):
            # steps towards the goal and beyond the box, disturbed so that some episodes miss it for long
            action = (10 * (goal - position) + rng.normal(0, episode / 10, 2)).astype(np.float32)
            obs, value, terminated, truncated, _ = env.step(action)
            position = position + 0.1 * np.clip(action, -1, 1).astype(np.float64)
            distance = np.sqrt(((position - goal) ** 2).sum())
            np.testing.assert_allclose(obs, position, atol=1e-12)
            assert terminated == (distance < 0.05)
            assert truncated == (t == 100)
            if reward == "dense":
                expected, kind = -distance, "dense"
            elif distance < 0.05:
                expected, kind = 100 - t, "goal"
            elif distance < 0.4:
                expected, kind = 1 - distance, "near"
            else:
                expected, kind = 0.0, "far"
            assert value == pytest.approx(expected, abs=1e-9)
            kinds.add(kind)
            if terminated or truncated:
                break
    assert kinds == ({"dense"} if reward == "dense" else {"goal", "near", "far"})


def test_point2d_defaults():
    env = Point2D()
    assert np.linalg.norm(env.goal) == pytest.approx(2.0)
    assert (env.goal_radius, env.reward_radius, env.reward) == (0.02, 0.2, "sparse")
    with pytest.raises(ValueError, match="sparse"):
        Point2D(reward="shaped")


def test_point2d_renders_its_path():
    env = gym.make("Point2D-v0", render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    for _ in range(10):
        env.step(np.ones(2, np.float32))
    after = env.render()
    assert before.shape == (256, 256, 3) and before.dtype == np.uint8
    changed = np.argwhere((before != after).any(-1))
    assert changed[:, 0].max() <= 128 and changed[:, 1].min() >= 127  # up and to the right
