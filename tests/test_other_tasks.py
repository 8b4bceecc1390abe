"""Tasks that are not MuJoCo's: other action boxes, other habits of an environment's author."""

import random
from importlib import import_module
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import register

import gild_td3
from baselines import td3
from baselines.common import InputError, SparseReward
from demos.collect import save_demonstrations
from tests.conftest import ROOT, same, short_run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's own advice on such tasks

BOXES = {"unit": (-1.0, 1.0), "small": (-0.05, 0.05), "large": (-20.0, 20.0), "shifted": (3.0, 5.0)}
EDGES = {  # bounds that float32 arithmetic steps over: the box and its dtype
    "asymmetric": (-1.0, 0.2, np.float32),
    "third": (-0.3, 0.9, np.float32),
    "double": (-0.1, 0.1, np.float64),
    "wide": (-226.74268, 224.91557, np.float32),
}
SCRIPTS = [path.stem for path in ROOT.glob("gild_*.py")]
SCRIPTS += [
    f"baselines.{path.stem}" for path in (ROOT / "baselines").glob("[!_]*.py") if path.stem != "common"
]
HABITS = ["mutates arrays", "fills info", "random state", "global random", "no limit"]


class Walk(gym.Env):
    """A point in the plane. The action's place in the box moves it by up to 0.1; reward near (0.5, 0.3)."""

    def __init__(self, low=-1.0, high=1.0, dtype=np.float32, habit=None):  # no render_mode, as many have none
        self.action_space = gym.spaces.Box(low, high, (2,), dtype)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.habit, self.middle, self.half = habit, (high + low) / 2, (high - low) / 2

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.habit == "random state":  # as dm_control has it
            if seed is not None:
                self.legacy = np.random.RandomState(seed)
            self._np_random = self.legacy
        if self.habit == "global random":
            self.state = np.array([random.gauss(0, 0.1), np.random.randn() / 10])
        elif self.habit == "random state":
            self.state = self.legacy.randn(2) / 10
        else:
            self.state = self.np_random.normal(0, 0.1, 2)
        self.steps = 0
        return self.state if self.habit == "mutates arrays" else self.state.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        move = 0.1 * (np.float64(action) - self.middle) / self.half
        self.steps += 1
        if self.habit == "mutates arrays":
            action *= 10.0
            self.state += move
        else:
            self.state = self.state + move
        distance = np.linalg.norm(self.state - (0.5, 0.3))
        reward, info = float(distance < 0.4), {}
        if self.habit == "fills info":
            reward = np.array([reward], np.float32)
            info = {"episode": "mine", "contacts": np.zeros(self.steps % 3)}
        return self.state, reward, False, False, info


def add(name, limit=25, **kwargs):
    register(f"{name}-v0", entry_point=Walk, max_episode_steps=limit, kwargs=kwargs)


for _name, (_low, _high) in BOXES.items():
    add(f"Walk-{_name}", low=_low, high=_high)
for _name, (_low, _high, _dtype) in EDGES.items():
    add(f"Walk-{_name}", low=_low, high=_high, dtype=_dtype)
for _habit in HABITS:
    add(f"Walk-{_habit.replace(' ', '-')}", limit=None if _habit == "no limit" else 25, habit=_habit)


def run(script, name, **changes):
    """A short run on `Walk-NAME-v0`. Returns its last checkpoint."""
    settings = dict(total_timesteps=225, learning_starts=200, checkpoint_frequency=1, eval_frequency=100)
    short_run(script, env_id=f"Walk-{name}-v0", **(settings | changes))
    return torch.load(newest(name) / "checkpoint.pt", weights_only=True)


def has_wrapper(env, wrapper):
    while isinstance(env, gym.Wrapper) and not isinstance(env, wrapper):
        env = env.env
    return isinstance(env, wrapper)


def newest(name):
    return max(Path("runs").glob(f"Walk-{name}-v0__*"), key=lambda path: path.stat().st_mtime_ns)


def demonstrations(name, low, high):
    """A file whose actions fill the box, in the box's units."""
    rng = np.random.default_rng(0)
    actions = (high + low) / 2 + (high - low) / 2 * rng.uniform(-1, 1, (64, 2))
    save_demonstrations(f"{name}.npz", f"Walk-{name}-v0", rng.normal(size=(64, 2)), actions)
    return f"{name}.npz"


def test_every_box_learns_the_same(gild_script, algorithm):
    """Replay, losses, noise and demonstrations are in [-1, 1], so that no constant depends on the box."""
    more = {"autotune": True} if algorithm == "sac" else {}
    states = {}
    for name, (low, high) in BOXES.items():
        demo_path = demonstrations(name, low, high)
        states[name] = run(gild_script, name, ws_frac=1.0, demo_path=demo_path, **more)
    networks = ["actor", "critic", "gild"] + ["log_alpha"] * (algorithm == "sac")
    for name in list(BOXES)[1:]:
        rows = states[name]["buffer"]["rows"], states["unit"]["buffer"]["rows"]
        torch.testing.assert_close(*rows, rtol=0, atol=2e-5)
        for network in networks:
            for key, weight in states["unit"][network].items():
                torch.testing.assert_close(states[name][network][key], weight, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("bound", [-1.0, 1.0])
def test_no_action_leaves_the_box(name, bound, monkeypatch):
    """Walk asserts that its box contains the action; a saturated actor acts on the bounds themselves."""
    monkeypatch.setattr(td3, "act", lambda actor, obs: np.full((*np.shape(obs)[:-1], 2), bound, np.float32))
    state = run(td3, name)
    action = state["buffer"]["rows"][200:, 2:4]
    assert (action.abs() <= 1).all() and (action == bound).any()


@pytest.mark.parametrize("name", EDGES)
def test_demonstrations_on_the_bounds_load(name):
    low, high, dtype = EDGES[name]
    box = gym.spaces.Box(low, high, (2,), dtype)
    actions = np.float32([box.low, box.high, np.nextafter(np.float32(box.high), np.float32(np.inf))])
    save_demonstrations("edge.npz", f"Walk-{name}-v0", np.zeros((3, 2)), actions)
    env = td3.make_env(td3.Args(env_id=f"Walk-{name}-v0"), training=True)
    buffer = gild_td3.DemonstrationBuffer("edge.npz", f"Walk-{name}-v0", env, torch.device("cpu"))
    assert torch.equal(buffer.actions, torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.0, 1.0]]))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("actions", np.nan, "pair 5 is not finite"),
        ("observations", np.inf, "pair 5 is not finite"),
        ("actions", 5.3, "pair 5 is 0.3 outside"),
        ("actions", 2.0, "pair 5 is 1 outside"),
    ],
)
def test_the_first_bad_pair_is_named(column, value, message):
    data = {"observations": np.zeros((9, 2)), "actions": np.full((9, 2), 4.0)}
    data[column][5, 1] = value
    save_demonstrations("bad.npz", "Walk-shifted-v0", **data)
    env = td3.make_env(td3.Args(env_id="Walk-shifted-v0"), training=True)
    with pytest.raises(gild_td3.InputError, match=message):
        gild_td3.DemonstrationBuffer("bad.npz", "Walk-shifted-v0", env, torch.device("cpu"))


def test_arrays_are_copied_on_both_sides():
    """A task that changes the action it was given, and the observation it has returned, spoils neither."""
    rows = run(td3, "mutates-arrays")["buffer"]["rows"]
    plain = run(td3, "unit")["buffer"]["rows"]
    torch.testing.assert_close(rows, plain, rtol=0, atol=1e-6)
    assert ((rows[:, :2] - rows[:, 5:7]).abs() > 0).any(1).all()  # s' is not s


def test_any_info_and_a_reward_in_an_array():
    state, plain = run(td3, "fills-info"), run(td3, "unit")
    assert state["evaluations"] == plain["evaluations"]
    assert same(state["actor"], plain["actor"])


@pytest.mark.parametrize("name", ["unit", "random-state", "global-random"])
def test_every_generator_is_saved(name):
    """Resumed after 200 steps, a run is the uninterrupted one, wherever the task draws its numbers."""
    whole = run(td3, name, learning_starts=150, total_timesteps=250)
    cut = run(td3, name, learning_starts=150, total_timesteps=200)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    resumed = run(td3, name, learning_starts=150, total_timesteps=250, resume=str(newest(name)))
    assert cut["global_step"] == 200 and resumed["global_step"] == whole["global_step"] == 250
    assert whole["random"] == resumed["random"] and whole["evaluations"] == resumed["evaluations"]
    assert torch.equal(whole["buffer"]["rows"], resumed["buffer"]["rows"])
    assert same(whole["actor"], resumed["actor"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_task_is_made_from_the_seed(name, monkeypatch):
    """It may draw from the global generators in its __init__."""
    script = import_module(name)

    class Made(Exception):
        pass

    def make_env(*args, **kwargs):
        raise Made(random.random(), np.random.rand(), torch.rand(()).item())

    def draws(state, seed):
        random.seed(state), np.random.seed(state), torch.manual_seed(state)
        with pytest.raises(Made) as made:
            script.train(script.Args(seed=seed, cuda=False))
        return made.value.args

    monkeypatch.setattr(script, "make_env", make_env)
    assert draws(1, seed=3) == draws(2, seed=3)
    assert not set(draws(1, seed=3)) & set(draws(1, seed=4))


class Wind(gym.Env):
    """A point that the wind moves, distributed as random actions (uniform) or exploration noise (normal)."""

    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, law):
        self.law, self.numbers = law, {"uniform": (-1, 1), "normal": (0, 0.1)}[law]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        wind = getattr(self.np_random, self.law)(*self.numbers, 2)
        return np.float32(wind), 0.0, False, False, {}


for _law in ("uniform", "normal"):
    register(f"Wind-{_law}-v0", entry_point=Wind, max_episode_steps=50, kwargs={"law": _law})


def scripts_with(*flags):
    return [name for name in SCRIPTS if {*flags} <= vars(import_module(name).Args()).keys()]


WINDY = [("uniform", name) for name in scripts_with("learning_starts")]
WINDY += [("normal", name) for name in scripts_with("clone_steps", "exploration_noise")]


@pytest.mark.parametrize(("law", "name"), WINDY)
def test_actions_are_not_the_task_s_random_numbers(law, name, monkeypatch):
    """Random actions, and exploration noise from a clone's start on, come from seeds of their own."""
    script, changes = import_module(name), {"total_timesteps": 200, "checkpoint_frequency": 1}
    if law == "normal":
        changes["clone_steps"] = 1
        monkeypatch.setattr(script, "act", lambda actor, obs: np.zeros((*np.shape(obs)[:-1], 2), np.float32))
    if name in scripts_with("demo_path"):
        changes["demo_path"] = "wind.npz"
        save_demonstrations("wind.npz", f"Wind-{law}-v0", np.zeros((64, 2)), np.zeros((64, 2)))
    short_run(script, env_id=f"Wind-{law}-v0", **changes)
    path = next(Path("runs").glob("*/checkpoint.pt"))
    rows = torch.load(path, weights_only=True)["buffer"]["rows"]
    action, wind = rows[:, 2:4], rows[:, 5:7]
    assert len(rows) == 200 and action.std() > 0.05
    assert abs(np.corrcoef(action.flatten(), wind.flatten())[0, 1]) < 0.2  # by chance 0.05


def test_a_name_alone_makes_no_task_sparse():
    """Another module's Hopper keeps its own reward, and its Point2D its own arguments."""
    names = "Hopper-v0", "Point2D-v9"
    try:
        for name in names:
            register(name, entry_point=Walk, max_episode_steps=25, kwargs={"habit": "fills info"})
            for dense in (False, True):
                args = td3.Args(env_id=f"{__name__}:{name}", dense=dense)
                env = td3.make_env(args, training=True)
                assert not has_wrapper(env, SparseReward)
                env.reset(seed=0)
                assert sum(env.step(np.float32([1, 0.6]))[1] for _ in range(4)) == 3
    finally:
        for name in names:
            gym.registry.pop(name, None)
    hopper = td3.make_env(td3.Args(env_id="Hopper-v4"), training=True)
    assert has_wrapper(hopper, SparseReward)


def test_a_task_without_time_limit_gets_one(capsys):
    run(td3, "no-limit", total_timesteps=1_001, learning_starts=1_001, eval_frequency=1_001, eval_episodes=1)
    err = capsys.readouterr().err
    assert err.count("Walk-no-limit-v0 registers no max_episode_steps; episodes are cut at 1,000") == 1
    env = td3.make_env(td3.Args(env_id="Walk-no-limit-v0"), training=False)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[3] for _ in range(1_000)]
    assert ends == [False] * 999 + [True]


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-1, 1, (2,), np.int64),
        gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 0])),
        gym.spaces.Box(-np.inf, np.inf, (2,)),
        gym.spaces.Box(-3e38, 3e38, (2,)),
        gym.spaces.Box(-1, 1, (2, 2)),
        gym.spaces.Discrete(3),
        gym.spaces.Dict({"arm": gym.spaces.Box(-1, 1, (2,))}),
    ],
)
def test_other_action_spaces_are_refused(space, monkeypatch):
    init = Walk.__init__

    def with_space(self, **kwargs):
        init(self, **kwargs)
        self.action_space = space

    monkeypatch.setattr(Walk, "__init__", with_space)
    with pytest.raises(InputError) as refusal:
        td3.make_env(td3.Args(env_id="Walk-unit-v0"), training=True)
    assert "Walk-unit-v0" in str(refusal.value) and len(str(refusal.value).splitlines()) == 1
