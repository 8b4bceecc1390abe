"""demos.convert: every format comes through whole; what is hostile or does not fit is refused in one line."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest

from demos import convert
from demos.collect import save_demonstrations
from tests.conftest import ROOT, write_demonstrations
from tests.test_evaluate import call
from tests.test_evaluate import refusal as refused_command

ROWS = np.random.default_rng(0).uniform(-1, 1, (50, 4))  # of Point2D: |S| = |A| = 2


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    folder = tmp_path / "minari"
    folder.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    return folder


def load(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name != "metadata"}, json.loads(
            str(file["metadata"])
        )


def flags(source, **options):
    """A command's arguments; an option that is None is left out."""
    given = [(f"--{name.replace('_', '-')}", value) for name, value in options.items() if value is not None]
    return str(source), *(part for option in given for part in option)


def converted(source, env_id=None):
    code, out, err = call(convert, *flags(source, out="out.npz", env_id=env_id))
    assert code == 0 and out.startswith("out.npz: ") and err == "", err
    return load("out.npz")


def refusal(source, env_id="Point2D-v0", out="out.npz", to_minari=None):
    """The line that a conversion ends with; it leaves no file behind."""
    return refused_command(convert, *flags(source, env_id=env_id, out=out, to_minari=to_minari))


def assert_rows(path, rows=ROWS):
    data, metadata = converted(path, "Point2D-v0")
    assert np.array_equal(np.hstack([data["observations"], data["actions"]]), np.float32(rows))
    assert metadata == {"env_id": "Point2D-v0", "source": Path(path).name}


def spoiled(column, value):
    """ROWS with one bad cell."""
    rows = ROWS.copy()
    rows[3, column] = value
    return rows


# ROWS: .csv, .npy and pickles


@pytest.mark.parametrize("first", ["", "x,y,a0,a1\n", '\ufeff"x","y","1st","2nd"\n', "# x y a0 a1\n"])
def test_csv(first):
    lines = "\n".join(",".join(map(repr, row)) for row in ROWS.tolist())
    Path("rows.csv").write_text(first + lines, encoding="utf-8")
    assert_rows("rows.csv")


@pytest.mark.parametrize("header", ["0,1,2,3\n", '"0","1","2","3"\r\n', "0, 1, 2, 3\n"])
def test_a_csv_with_the_header_of_pandas(header):
    """DataFrame(rows).to_csv(path, index=False) numbers the columns; they are not the first pair."""
    Path("rows.csv").write_text(header + "\n".join(",".join(map(repr, row)) for row in ROWS.tolist()))
    assert_rows("rows.csv")


def test_a_csv_with_an_index():
    lines = [",".join(map(str, [i, *row])) for i, row in enumerate(ROWS.tolist())]
    for header in (",0,1,2,3", ",x,y,a,b", '"",x,y,a,b'):
        Path("rows.csv").write_text("\n".join([header, *lines]))
        assert "to_csv(index=False)" in refusal("rows.csv")
    Path("rows.csv").write_text("\n".join(["0,1,2,3,4", *lines]))
    assert "are 2 + 2 wide" in refusal("rows.csv")


@pytest.mark.parametrize("kind", ["<f8", ">f4", "i2"])
def test_npy(kind):
    np.save("rows.npy", ROWS.round().astype(kind))
    assert_rows("rows.npy", ROWS.round())


@pytest.mark.parametrize(
    "array", [ROWS, np.asfortranarray(ROWS), ROWS.astype(">f4"), np.repeat(ROWS, 2, 1)[:, ::2]]
)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(array, protocol):
    for core in (b"numpy._core", b"numpy.core"):  # as NumPy 2 writes them, and NumPy 1
        content = pickle.dumps(array, protocol)
        assert b"numpy._core" in content
        if protocol < 4:
            Path("rows.pkl").write_bytes(content.replace(b"numpy._core", core))
        else:  # the length comes before a name, and the frame's before all
            for module in (b"multiarray", b"numeric"):
                old, new = (bytes([len(b"%s.%s" % (c, module))]) + c for c in (b"numpy._core", core))
                content = content.replace(old + b"." + module, new + b"." + module)
            size = int.from_bytes(content[3:11], "little") - (core == b"numpy.core")
            Path("rows.pkl").write_bytes(content[:3] + size.to_bytes(8, "little") + content[11:])
        assert_rows("rows.pkl", array)


def test_a_pickle_of_python_2():
    text = b"U\x01b", b"U\x02f8", b"U\x01<", b"T" + len(ROWS.tobytes()).to_bytes(4, "little") + ROWS.tobytes()
    content = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt%stR(I1\n(I50\nI4\nt"
    content += b"cnumpy\ndtype\n(%sI0\nI1\ntR(I3\n%sNNNI-1\nI-1\nI0\ntbI00\n%stb."
    Path("rows").mkdir()
    Path("rows/Hopper.demo").write_bytes(content % text)  # a suffix without a meaning
    assert_rows("rows/Hopper.demo")


class Tripwire:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def stack_global(module, name, *arguments):
    """A pickle that calls module.name, where the name may have dots."""
    start = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return start + b"\x93(" + b"".join(pickle.dumps(a, 0)[:-1] for a in arguments) + b"tR."


OPEN = "open('tripped', 'w')"
plain = pickle.dumps(np.zeros(1), 2)
HOSTILE = {
    "os.system": b"cos\nsystem\n(S'touch tripped'\ntR.",
    "posix.system": pickle.dumps(Tripwire(os.system, "touch tripped"), 2),
    "eval": pickle.dumps(Tripwire(eval, OPEN), 4),
    "exec, python 2's name": b'c__builtin__\nexec\n(S"' + OPEN.encode() + b'"\ntR.',
    "eval inside of an array's state": plain[:-2] + pickle.dumps(Tripwire(eval, OPEN), 2)[2:-1] + b"b.",
    "eval inside of an array of objects": pickle.dumps(np.array([Tripwire(eval, OPEN)]), 4),
    "eval as an argument of the dtype": b"cnumpy\ndtype\n("
    + pickle.dumps(Tripwire(eval, OPEN), 0)[:-1]
    + b"tR.",
    "numpy's own exec": stack_global("numpy.testing._private.utils", "runstring", OPEN, {}),
    "numpy's own exec, by dots": stack_global("numpy", "testing._private.utils.runstring", OPEN, {}),
    "a method of an admitted class": stack_global("numpy", "ndarray.tofile", np.zeros(1), "tripped"),
    "numpy.load": stack_global("numpy", "load", "x.npy", None, True),
    "numpy.fromfile": stack_global("numpy.core.multiarray", "fromfile", "x.npy"),
    "numpy.memmap": stack_global("numpy", "memmap", "tripped", "u1", "w+", 0, 8),
    "getattr": b"c__builtin__\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
    "objects": pickle.dumps(np.array([[{}, 1], [2, 3]], dtype=object), 4),
    "records": pickle.dumps(np.zeros(5, "f8,f8,f8,f8"), 4),
    "records of objects, forged flags": pickle.dumps(np.zeros(5, "f8"), 0).replace(b"Vf8", b"VO8"),
    "text": pickle.dumps(np.full((5, 4), "left"), 4),
    "complex": pickle.dumps(ROWS + 1j, 4),
    "bool": pickle.dumps(ROWS > 0, 4),
    "a masked array": pickle.dumps(np.ma.array(ROWS), 4),
    "a scalar": pickle.dumps(np.float64(1.0), 4),
    "a list": pickle.dumps(ROWS.tolist(), 4),
    "a dict of arrays": pickle.dumps({"observations": ROWS}, 4),
    "an empty ndarray": b"cnumpy\nndarray\n((I50\nI4\ntS'f8'\ntR.",
    "a class, changed": b"cnumpy\ndtype\n(N}S'array'\nI1\nstb.",
    "a persistent id": b"Ptripped\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "too many bytes": pickle.dumps(np.zeros((5, 4)), 0).replace(b"I5\n", b"I4\n"),
    "too few bytes": pickle.dumps(np.zeros((5, 4)), 0).replace(b"I5\n", b"I500000000000\n"),
    "truncated": pickle.dumps(ROWS, 4)[:100],
    "empty": b"",
    "no pickle": b"observations, actions",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles(kind):
    Path("rows.pkl").write_bytes(HOSTILE[kind])
    np.save("x.npy", np.array([Tripwire(eval, OPEN)]), allow_pickle=True)
    assert "rows.pkl is not an array of numbers" in refusal("rows.pkl")  # and has left no file `tripped`


def test_the_hostile_pickles_bite():
    for kind in ("os.system", "eval", "eval inside of an array of objects", "numpy's own exec, by dots"):
        pickle.loads(HOSTILE[kind])
        Path("tripped").unlink()


UNFIT = {
    "wide": (np.zeros((5, 5)), "are 2 + 2 wide"),
    "narrow": (np.zeros((5, 3)), "are 2 + 2 wide"),
    "flat": (np.zeros(4), "are 2 + 2 wide"),
    "a cube": (np.zeros((5, 4, 4)), "are 2 + 2 wide"),
    "no pairs": (np.zeros((0, 4)), "holds no pairs"),
    "nan": (spoiled(0, np.nan), "rows.npy: pair 3 is not finite"),
    "infinite": (spoiled(1, np.inf), "rows.npy: pair 3 is not finite"),
    "nan action": (spoiled(3, np.nan), "rows.npy: pair 3 is not finite"),
    "infinite in float32": (spoiled(1, 1e39), "rows.npy: pair 3 is not finite"),
    "outside": (spoiled(3, 1.25), "rows.npy: the action of pair 3 is 0.25 outside the box"),
    "just outside": (spoiled(3, -1.00001), "rows.npy: the action of pair 3 is 1e-05 outside the box"),
    "objects": (np.array([[Tripwire(eval, OPEN)] * 4]), "is not an array of numbers"),
    "text": (np.full((5, 4), "left"), "is not an array of numbers"),
    "records": (np.zeros(5, "f8,f8"), "is not an array of numbers"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_unfit_rows(kind):
    rows, words = UNFIT[kind]
    np.save("rows.npy", rows, allow_pickle=True)
    assert words in (line := refusal("rows.npy")) and line.startswith("convert.py: rows.npy")


def test_other_formats_are_refused_by_name():
    """With the formats that are read."""
    Path("rows.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n")
    Path("rows.H5").write_bytes(b"\x89HDF\r\n\x1a\n")
    for name in ("rows.hdf5", "rows.H5"):
        assert "is an HDF5 file" in (line := refusal(name)) and ".npz, .csv, .npy and pickles of" in line
    for content, words in (({"observations": ROWS}, "a dict"), ([[1.0, 2.0, 0.0, 0.0]], "a list")):
        Path("rows.pkl").write_bytes(pickle.dumps(content))
        assert f"it holds {words}, not an array" in (line := refusal("rows.pkl")) and "formats read:" in line
    Path("rows.txt").write_text("1 2 0 0\n")
    assert "formats read:" in refusal("rows.txt")


# .npz


def test_an_npz_without_metadata():
    """The trainer refuses it; --env-id adds what it lacks."""
    obs, actions, ends = ROWS[:, :2], ROWS[:, 2:], np.arange(50) % 10 == 9
    np.savez("mine.npz", observations=obs, actions=actions, truncations=ends, extra=np.zeros(3))
    assert "--env-id" in refusal("mine.npz", env_id=None)
    assert "--env-id" in refusal("mine.npz", env_id=None, out=None, to_minari="me/there-v0")
    assert "shapes are (50, 2)" in refusal("mine.npz", env_id="Hopper-v4")
    data, metadata = converted("mine.npz", "Point2D-v0")
    assert metadata == {"env_id": "Point2D-v0", "source": "mine.npz"}
    assert data.keys() == {"observations", "actions", "truncations"}
    assert np.array_equal(data["observations"], np.float32(obs)) and data["actions"].dtype == np.float32
    assert np.array_equal(data["actions"], np.float32(actions)) and np.array_equal(data["truncations"], ends)
    np.savez("mine.npz", observations=obs, actions=actions, metadata=np.array(json.dumps({"author": "me"})))
    assert converted("mine.npz", "Point2D-v0")[1]["author"] == "me"
    np.savez("mine.npz", obs=obs, acts=actions)
    assert "its arrays are ['obs', 'acts']" in refusal("mine.npz")
    np.savez("mine.npz", observations=obs, actions=actions * 2)
    assert "mine.npz: the action of pair " in refusal("mine.npz")
    np.savez("mine.npz", observations=np.array([Tripwire(eval, OPEN)]), actions=actions)
    assert "no demonstrations in mine.npz" in refusal("mine.npz")


def test_an_npz_with_metadata():
    write_demonstrations("kept.npz")
    for env_id in (None, "Point2D-v0"):
        assert "kept.npz need not be converted; --to-minari" in refusal("kept.npz", env_id)
    assert "has demonstrations of Point2D, not Hopper" in refusal("kept.npz", "Hopper-v4")


def test_actions_a_hair_outside_are_kept():
    rows = spoiled(3, 1 + 5e-7)
    np.save("rows.npy", rows)
    assert_rows("rows.npy", rows)
    assert np.float32(rows[3, 3]) > 1


@pytest.mark.parametrize(
    "content", ["", "x,y,a,b\n", "1,2,0,0\n1,2,0\n", "1,2,0,left\n", "1,2,0,\n", "1;2;0;0\n"]
)
def test_bad_csv(content):
    Path("rows.csv").write_text(content)
    assert "rows.csv" in refusal("rows.csv")


def test_arguments_that_do_not_fit():
    np.save("rows.npy", ROWS)
    assert "--env-id" in refusal("rows.npy", env_id=None)
    assert "CartPole" in refusal("rows.npy", env_id="CartPole-v1")
    assert "Point3D" in refusal("rows.npy", env_id="Point3D-v0")
    assert "11 + 3" in refusal("rows.npy", env_id="Hopper-v4")
    assert "missing.pkl could not be read" in refusal("missing.pkl")
    assert "there is no folder none" in refusal("rows.npy", out="none/out.npz")
    assert "rows.npy" in refusal("rows.npy", env_id=None, out=None, to_minari="me/there-v0")
    assert "minari download nowhere" in refusal("nowhere")
    assert "minari download" in refusal(Path.cwd())
    Path("out.npz").mkdir()
    assert "out.npz could not be written" in refusal("rows.npy")
    for more in ("", "--out a.npz --to-minari me/there-v0"):
        assert "one of --out" in refused_command(convert, "rows.npy", *more.split(), box=True)
    assert "does not end in .npz" in refused_command(convert, "rows.npy", "--out", "a.pkl", box=True)


# MINARI


def record(dataset_id, env_id="envs:Point2D-v0", lengths=(100, 30), wrapped=lambda env: env):
    """A dataset as Minari makes it (its collector would need JAX); the second episode is cut short."""
    env = wrapped(gym.make(env_id))
    env.action_space.seed(0)
    buffers, steps = [], []
    for seed, length in enumerate(lengths):
        columns = {name: [] for name in ("observations", "actions", "rewards", "terminations", "truncations")}
        obs, _ = env.reset(seed=seed)
        for _ in range(length):
            action = env.action_space.sample()
            step = [obs, action, *env.step(action)[:-1]]
            obs = step.pop(2)
            steps.append(step)
            for column, value in zip(columns.values(), step, strict=True):
                column.append(value)
        columns["observations"].append(obs)
        buffers.append(minari.data_collector.EpisodeBuffer(**columns))
    minari.create_dataset_from_buffers(dataset_id, buffers, env=env)
    return [np.array(column) for column in zip(*steps, strict=True)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", ["envs:Point2D-v0", "Pendulum-v1", "Hopper-v5"])
def test_a_recorded_dataset(datasets, env_id):
    lengths = (100, 30) if env_id == "envs:Point2D-v0" else (200, 30) if env_id == "Pendulum-v1" else (9, 5)
    obs, actions, rewards, terminations, truncations = record("me/walks/test-v3", env_id, lengths)
    truncations[-1] = True  # an episode that was cut short is marked, or it would join the next
    if env_id == "Hopper-v5":
        truncations[8] = True
    for source in ("me/walks/test-v3", datasets / "me/walks/test-v3", datasets / "me/walks/test-v3/data"):
        data, metadata = converted(source)
        for name, expected in (("observations", obs), ("actions", actions), ("rewards", rewards)):
            assert np.array_equal(data[name], expected.astype(np.float32)) and data[name].dtype == np.float32
        assert np.array_equal(data["terminations"], terminations)
        assert np.array_equal(data["truncations"], truncations)
        returns = np.array([rewards[: lengths[0]].sum(), rewards[lengths[0] :].sum()])
        assert metadata["env_id"] == env_id.removeprefix("envs:") and metadata["episodes"] == 2
        assert metadata["source"] == "Minari dataset me/walks/test-v3"
        assert metadata["return_mean"] == pytest.approx(returns.mean(), rel=1e-5)
        assert metadata["return_std"] == pytest.approx(returns.std(), rel=1e-4, abs=1e-6)


FOREIGN = {  # wrappers, and words of the refusal
    "half the actions": (
        lambda env: gym.wrappers.RescaleAction(env, -0.5, 0.5),
        "actions were recorded in Box(-0.5",
    ),
    "another scale of observations": (
        lambda env: gym.wrappers.NormalizeObservation(env),
        "recorded through ['NormalizeObservation'], but Hopper-v5 has the wrappers []",
    ),
    "the time as an observation": (gym.wrappers.TimeAwareObservation, "observations were recorded in Box("),
    "a sticky action": (
        lambda env: gym.wrappers.StickyAction(gym.wrappers.RecordEpisodeStatistics(env), 0.5),
        "recorded through ['StickyAction'], but Hopper-v5 has the wrappers []",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_dataset_recorded_through_a_wrapper(kind):
    """Its steps are not the environment's: half the actions, say, would load as if they were whole."""
    wrapped, words = FOREIGN[kind]
    record("me/foreign-v0", "Hopper-v5", (5, 5), wrapped)
    for env_id in (None, "Hopper-v5"):
        assert words in refusal("me/foreign-v0", env_id)


@pytest.mark.filterwarnings("ignore")
def test_wrappers_that_change_no_step(datasets):
    record("me/good-v0", "Hopper-v5", (5, 5), gym.wrappers.RecordEpisodeStatistics)
    assert len(converted("me/good-v0")[0]["actions"]) == 10
    path = datasets / "me/good-v0/data/metadata.json"
    metadata = json.loads(path.read_text())
    assert "RecordEpisodeStatistics" in metadata.pop("env_spec")
    path.write_text(json.dumps(metadata))
    assert converted("me/good-v0", "Hopper-v4")[1]["env_id"] == "Hopper-v4"


@pytest.mark.parametrize("task", ["Hopper-td3", "Point2D-ddpg"])
def test_to_minari_and_back(datasets, task):
    shipped = ROOT / "demos" / f"{task}.npz"
    assert call(convert, *flags(shipped, to_minari="me/there-v0"))[0] == 0
    expected, about = load(shipped)
    data, metadata = converted("me/there-v0")
    assert data.keys() == expected.keys()
    for name, column in expected.items():
        assert data[name].dtype == column.dtype and data[name].tobytes() == column.tobytes()
    assert {name: metadata[name] for name in ("env_id", "episodes")} == {
        name: about[name] for name in ("env_id", "episodes")
    }
    metadata = json.loads((datasets / "me/there-v0/data/metadata.json").read_text())
    assert json.loads(metadata["env_spec"])["additional_wrappers"] == []
    dataset = minari.load_dataset("me/there-v0")
    assert dataset.total_episodes == about["episodes"] and dataset.total_steps == len(expected["actions"])
    for episode in dataset:
        assert len(episode.observations) == len(episode.actions) + 1
        assert np.array_equal(episode.observations[-1], episode.observations[-2])
        assert (episode.terminations | episode.truncations).nonzero()[0].tolist() == [len(episode) - 1]
    assert "repeated" in dataset.storage.metadata["description"]
    assert dataset.recover_environment().spec.id == about["env_id"]
    assert list(minari.list_local_datasets()) == ["me/there-v0"]
    assert minari.namespace.list_local_namespaces() == ["me"]
    assert "already" in refusal(shipped, env_id=None, out=None, to_minari="me/there-v0")


def test_a_dataset_is_whole_or_not_there(datasets, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    arguments = dict(out=None, env_id=None, to_minari="me/there-v0")
    shipped = ROOT / "demos" / "Point2D-td3.npz"
    with monkeypatch.context() as patch:
        patch.setattr(minari.dataset._storages.hdf5_storage.HDF5Storage, "update_episodes", full)
        assert "no space left" in refusal(shipped, **arguments) and list(datasets.rglob("*")) == []
    assert call(convert, *flags(shipped, **arguments))[0] == 0


def test_demonstrations_that_are_not_whole_episodes():
    minari_id = dict(env_id=None, out=None, to_minari="me/there-v0")
    write_demonstrations("pairs.npz")
    assert "rewards" in refusal("pairs.npz", **minari_id)
    flags = {"terminations": np.zeros(8, bool), "truncations": np.zeros(8, bool)}
    pairs = np.zeros((8, 2))
    save_demonstrations("cut.npz", "Point2D-v0", pairs, pairs, rewards=np.zeros(8), **flags)
    assert "end" in refusal("cut.npz", **minari_id)
    flags["truncations"][-1] = True
    for mistake in (np.zeros(7), np.zeros((8, 1)), np.full(8, np.nan), np.full(8, "1 reward")):
        save_demonstrations("bad.npz", "Point2D-v0", pairs, pairs, **flags, rewards=mistake)
        assert "bad.npz" in refusal("bad.npz", **minari_id)
    for mistake in ("there", "me/there", "../there-v0", "/there-v0", ""):
        assert "is not the id of a dataset" in refusal("cut.npz", **{**minari_id, "to_minari": mistake})


@pytest.mark.filterwarnings("ignore")
def test_datasets_that_are_refused(datasets):
    box = gym.spaces.Box(-np.inf, np.inf, (2,))
    record("me/good-v0")

    def refused(**metadata):
        """The refusal of the good dataset after a change of its metadata; None removes an entry."""
        path = datasets / "me/good-v0/data/metadata.json"
        whole = path.read_text()
        changed = json.loads(whole) | metadata
        path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))
        line = refusal("me/good-v0", env_id=None)
        path.write_text(whole)
        return line

    serialize = minari.serialization.serialize_space
    assert "Dict" in refused(
        observation_space=serialize(gym.spaces.Dict({"achieved": box, "observation": box}))
    )
    assert "Discrete" in refused(action_space=serialize(gym.spaces.Discrete(2)))
    assert "--env-id" in refused(env_spec=None)
    refused(observation_space="Box")
    refused(data_format="floppy")
    refused(minari_version="9.9.9")
    # an environment that would be called at reading
    spec = json.loads(gym.make("Pendulum-v1").spec.to_json())
    spec |= {"entry_point": "os:system", "kwargs": {"command": "touch tripped"}}
    refused(env_spec=json.dumps(spec), observation_space=None, action_space=None)
    refused(env_spec=json.dumps(spec | {"id": "no_such_module:Env-v0"}))
    # what does not fit the environment
    assert "observations were recorded in Box(-inf, inf, (2,)" in refusal("me/good-v0", env_id="Hopper-v5")
    steps = {"observations": np.zeros((3, 2)), "rewards": np.zeros(2), "truncations": np.array([False, True])}
    steps["terminations"] = np.zeros(2, bool)
    for number, changes in enumerate(
        (
            {"actions": np.full((2, 2), 1.5)},
            {"actions": np.full((2, 2), np.nan)},
            {"actions": np.zeros((2, 2)), "observations": np.zeros((2, 2))},
            {"actions": np.zeros((2, 2)), "rewards": np.array([0, np.nan])},
            {"actions": np.zeros((2, 2)), "rewards": np.zeros(1)},
            {"actions": np.zeros((2, 2)), "terminations": np.zeros(3, bool)},
        )
    ):
        buffer = minari.data_collector.EpisodeBuffer(**(steps | changes))
        minari.create_dataset_from_buffers(f"me/bad-v{number}", [buffer], env=gym.make("envs:Point2D-v0"))
        assert f"me/bad-v{number}" in refusal(f"me/bad-v{number}", env_id=None)
    (datasets / "me/good-v0/data/main_data.hdf5").write_bytes(b"damaged")
    assert "me/good-v0" in refusal("me/good-v0", env_id=None)


def test_without_minari(monkeypatch):
    for package in ("minari", "h5py"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert 'pip install "minari[hdf5]"' in refusal("me/there-v0")


# THE COMMAND LINE


def test_a_mistake_keeps_the_file_that_is_there(tmp_path):
    """What is refused leaves every file as it was; what is not, in a process of its own, replaces one."""
    np.save("good.npy", ROWS)
    np.save("outside.npy", spoiled(2, 1.1))
    Path("hostile.pkl").write_bytes(HOSTILE["os.system"])
    write_demonstrations("kept.npz")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "outside the box" in refusal("outside.npy", out="kept.npz")
    assert "system" in refusal("hostile.pkl", out="kept.npz")
    assert "minari download mujoco/hopper/expert-v0" in refusal("mujoco/hopper/expert-v0", out="kept.npz")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    command = [sys.executable, "-m", "demos.convert", *flags("good.npy", out="kept.npz", env_id="Point2D-v0")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and "50 pairs" in done.stdout
    assert np.array_equal(load("kept.npz")[0]["actions"], np.float32(ROWS[:, 2:]))
