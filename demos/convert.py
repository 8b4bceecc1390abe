"""Converts demonstrations of other formats to the project's .npz, and the .npz to a Minari dataset.

    python -m demos.convert mujoco/hopper/expert-v0 --out hopper.npz          # Minari, by id or by folder
    python -m demos.convert hopper.pkl --out hopper.npz --env-id Hopper-v4    # or .csv, .npy: rows of [s, a]
    python -m demos.convert arrays.npz --out hopper.npz --env-id Hopper-v4    # adds the metadata
    python -m demos.convert demos/Hopper-td3.npz --to-minari me/hopper-v0

A CSV may begin with a line of names. A file with any other suffix is read as a pickle of one NumPy array, as
released with the paper; nothing else is ever unpickled. Minari is optional: pip install "minari[hdf5]". Its
episodes have one more observation, after the last action: reading drops it, and writing repeats the last one
there is, as the dataset's description says.
"""

import json
import os
import pickle
import re
import warnings
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import gymnasium as gym
import numpy as np
import torch
import tyro

from baselines import common, td3
from demos.collect import KINDS, save_demonstrations
from evaluate import InputError, command_line

FORMATS = "formats read: Minari datasets, .npz, .csv, .npy and pickles of one NumPy array"
PICKLED = {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}  # what a pickled array of numbers refers to
for core in ("numpy.core", "numpy._core"):  # in NumPy 1 and 2
    PICKLED |= {f"{core}.multiarray._reconstruct", f"{core}.numeric._frombuffer"}
HARMLESS = {"RecordEpisodeStatistics", "RecordVideo"}  # wrappers that change no step


@dataclass
class Args:
    source: tyro.conf.Positional[str]  # a file, or a Minari dataset's id or folder
    out: Path | None = None  # the .npz file to write
    to_minari: str | None = None  # or: the id of the Minari dataset to make of the source, an .npz
    env_id: str | None = None  # a Gymnasium id; None: the source's own, which rows lack

    def __post_init__(self):
        if (self.out is None) == (self.to_minari is None):
            raise ValueError("one of --out FILE and --to-minari ID is needed")
        if self.out and self.out.suffix != ".npz":
            raise ValueError(f"--out {self.out} does not end in .npz")


def make_env(env_id: str) -> gym.Env:
    try:
        return common.make_env(td3.Args(env_id=env_id), training=False)
    except ValueError as error:
        raise InputError(str(error)) from None


# READING: the arrays of each format by their names in the .npz


class Call:
    """A call that a pickle asks for, recorded instead of made."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class ArrayUnpickler(pickle.Unpickler):
    """Turns each of the names in PICKLED into a `Call`, and refuses all others.

    Calling NumPy's own functions would not be safe: a forged state makes them take bytes for pointers.
    """

    def find_class(self, module, name):
        if f"{module}.{name}" not in PICKLED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return Call


def read_pickle(file):
    """The array in a pickle of any protocol, made from its bytes. Raises all kinds of exceptions."""
    array = ArrayUnpickler(file, encoding="latin1").load()
    if not isinstance(array, Call):
        raise ValueError(f"it holds a {type(array).__name__}, not an array")
    if hasattr(array, "state"):
        _, shape, dtype, fortran, data = array.state
        order = "F" if fortran else "C"
    else:
        data, dtype, shape, order = array.args  # of _frombuffer, in protocol 5
    data = data.args[0] if isinstance(data, Call) else data  # of encode, in protocols 0 to 2
    data = data.encode("latin1") if isinstance(data, str) else data
    kind, byte_order = dtype.args[0], dtype.state[1]
    if not re.fullmatch("[fiu][1248]", kind):
        raise ValueError(f"its type is {kind}")
    return np.frombuffer(data, np.dtype(kind).newbyteorder(byte_order)).reshape(shape, order=order)


def read_csv(file):
    lines = file.read().decode("utf-8-sig").splitlines()
    cells = "".join(lines[:1]).split(",")
    if len(cells) > 1 and not cells[0].strip('" '):
        raise ValueError("its first column is an index; pandas omits it with to_csv(index=False)")
    numbered = [cell.strip('" ') for cell in cells] == [str(i) for i in range(len(cells))]  # pandas' header
    named = not any(re.match(r"\s*([-+.\d]|nan|inf)", cell, re.IGNORECASE) for cell in cells)
    return np.loadtxt(lines, delimiter=",", skiprows=int(numbered or named), ndmin=2)


def read_rows(path: Path, env_id: str):
    """The observations (M, |S|) and actions (M, |A|) in a file of rows [s, a]."""
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() == ".csv":
                rows = read_csv(file)
            elif path.suffix.lower() == ".npy":
                rows = np.lib.format.read_array(file, allow_pickle=False)
            else:
                rows = read_pickle(file)
        if rows.dtype.kind not in "fiu":
            raise ValueError(f"its type is {rows.dtype}")
    except OSError as error:
        raise InputError(f"{path} could not be read: {error}") from None
    except Exception as error:  # a damaged or hostile file fails in a dozen ways
        raise InputError(f"{path} is not an array of numbers: {error!r:.300} ({FORMATS})") from None
    env = make_env(env_id)
    width, actions = env.observation_space.shape[0], env.action_space.shape[0]
    if rows.ndim != 2 or rows.shape[1] != width + actions:
        raise InputError(f"{path} has shape {rows.shape}, but rows of {env_id} are {width} + {actions} wide")
    return {"observations": rows[:, :width], "actions": rows[:, width:]}


def episodes(data):
    """Where each episode starts, (E,), and its return, (E,)."""
    starts = np.flatnonzero(np.r_[True, (data["terminations"] | data["truncations"])[:-1]])
    return starts, np.add.reduceat(data["rewards"].astype(float), starts)


def import_minari():
    try:
        import_module("h5py")  # which Minari's files need
        return import_module("minari")
    except ImportError:
        raise InputError('Minari datasets need more packages: pip install "minari[hdf5]"') from None


def check_recording(metadata: dict, spaces: list, env_id: str):
    """Raises InputError if a dataset's steps are not the environment's own, but those of a wrapper."""
    env = make_env(env_id)
    own_spaces = env.observation_space, env.get_wrapper_attr("box")
    for name, space, own in zip(("observations", "actions"), spaces, own_spaces, strict=True):
        bounds = zip((space.low, space.high), (own.low, own.high), strict=True)
        if space.shape != own.shape or not all(np.allclose(a, b) for a, b in bounds):
            raise InputError(f"its {name} were recorded in {space}, but {env_id} has {own}")
    spec = json.loads(metadata.get("env_spec") or "{}")
    wrappers = [wrapper["name"] for wrapper in spec.get("additional_wrappers") or ()]
    wrappers = [name for name in wrappers if name not in HARMLESS]
    own_wrappers = [wrapper.name for wrapper in env.unwrapped.spec.additional_wrappers]
    if wrappers != own_wrappers:
        raise InputError(f"it was recorded through {wrappers}, but {env_id} has the wrappers {own_wrappers}")


def read_minari(source: str, env_id: str | None):
    """A Minari dataset's five arrays, its environment's id, and metadata for the .npz."""
    minari = import_minari()
    folder = Path(source) if Path(source).is_dir() else minari.storage.local.get_dataset_path(source)
    folder = folder if (folder / "metadata.json").is_file() else folder / "data"
    if not folder.is_dir():
        raise InputError(
            f"{source} is neither a file nor a dataset on this machine: minari download {source}"
        )
    try:
        about = json.loads((folder / "metadata.json").read_text("utf-8"))
        # without its spaces, Minari would call whatever the file names as the environment
        spaces = [about[name] for name in ("observation_space", "action_space")]
        types = [json.loads(space)["type"] for space in spaces]
        if types != ["Box", "Box"]:
            raise InputError(f"its observations and actions are {types}, but must be Box")
        if env_id is None and "env_spec" not in about:
            raise InputError("it does not name its environment, so --env-id must")
        env_id = env_id or json.loads(about["env_spec"])["id"].split(":")[-1]
        check_recording(about, [minari.serialization.deserialize_space(space) for space in spaces], env_id)
        columns = {name: [] for name in KINDS}
        for episode in minari.MinariDataset(folder):
            for name, column in columns.items():
                column.append(getattr(episode, name)[: -1 if name == "observations" else None])
            # an unfinished episode counts as truncated, or it would join the next one
            columns["truncations"][-1][-1] |= not episode.terminations[-1]
        data = {name: np.concatenate(columns[name]).astype(kind) for name, kind in KINDS.items()}
        _, returns = episodes(data)
        metadata = {"source": f"Minari dataset {about['dataset_id']}", "episodes": len(returns)}
        metadata |= {"return_mean": float(returns.mean()), "return_std": float(returns.std())}
        return data, env_id, metadata
    except Exception as error:  # a damaged or foreign dataset fails in a dozen ways
        reason = error if isinstance(error, InputError) else f"{error!r:.300}"
        raise InputError(f"no demonstrations in {source}: {reason}") from None


def read_npz(path: Path):
    """A demonstration file's arrays and metadata, {} where it has none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"observations", "actions"} <= set(file.files):
                raise InputError(f"its arrays are {file.files}, not observations and actions")
            data = {name: file[name].astype(kind) for name, kind in KINDS.items() if name in file}
            return data, dict(json.loads(str(file["metadata"]))) if "metadata" in file else {}
    except Exception as error:  # a missing, damaged or foreign file fails in a dozen ways
        reason = error if isinstance(error, InputError) else f"{error!r:.300}"
        raise InputError(f"no demonstrations in {path}: {reason}") from None


# WRITING


def check(path: Path, env_id: str) -> gym.Env:
    """The environment, if the demonstration file fits it; else raises InputError."""
    env = make_env(env_id)
    try:
        common.DemonstrationBuffer(path, env_id, env, torch.device("cpu"))
    except ValueError as error:
        raise InputError(str(error)) from None
    data, _ = read_npz(path)
    for name in data.keys() - {"observations", "actions"}:
        if data[name].shape != data["actions"].shape[:1] or not np.isfinite(data[name]).all():
            raise InputError(f"{path} has {name} that are not finite numbers, one for each pair")
    return env


def write_npz(source: str, out: Path, env_id: str | None):
    """Writes any other format as .npz. Raises InputError, and then leaves `out` as it was."""
    path, metadata = Path(source), {"source": Path(source).name}
    if path.is_dir() or not (path.is_file() or "." in path.name):  # the id of a dataset has no dot
        data, env_id, metadata = read_minari(source, env_id)
    elif path.suffix.lower() in (".hdf5", ".h5"):
        raise InputError(f"{source} is an HDF5 file, which is not read ({FORMATS})")
    else:
        data, known = read_npz(path) if path.suffix.lower() == ".npz" else (None, {})
        if "env_id" in known:
            check(path, env_id or str(known["env_id"]))
            raise InputError(f"{source} need not be converted; --to-minari makes a Minari dataset of it")
        if env_id is None:
            raise InputError(f"{source} does not name its environment, so --env-id must")
        data, metadata = data or read_rows(path, env_id), known | metadata
    if not out.parent.is_dir():
        raise InputError(f"{out} could not be written: there is no folder {out.parent}")
    try:
        with TemporaryDirectory(prefix=".convert-", dir=out.parent) as folder:
            trial = Path(folder) / out.name
            save_demonstrations(trial, env_id, **data, metadata=metadata)
            try:
                check(trial, env_id)
            except InputError as error:
                raise InputError(str(error).replace(str(trial), source)) from None
            os.replace(trial, out)
    except OSError as error:
        raise InputError(f"{out} could not be written: {error}") from None
    print(f"{out}: {len(data['actions'])} pairs of {env_id}, from {metadata['source']}")


def write_minari(path: Path, dataset_id: str, env_id: str | None):
    """Writes whole episodes as a new Minari dataset. Raises InputError, and then writes none."""
    minari = import_minari()
    try:
        namespace, *_ = minari.dataset.minari_dataset.parse_dataset_id(dataset_id)
    except (ValueError, TypeError):
        raise InputError(f"{dataset_id} is not the id of a dataset, like me/hopper-v0") from None
    target = minari.storage.local.get_dataset_path(dataset_id)
    if target.exists():
        raise InputError(f"there already is a dataset {dataset_id}")
    data, about = read_npz(path)
    if "env_id" not in about:
        raise InputError(f"{path} does not name its environment; --out with --env-id writes a file that does")
    env = check(path, env_id or str(about["env_id"]))
    if data.keys() != KINDS.keys() or not (data["terminations"] | data["truncations"])[-1]:
        raise InputError(f"{path} must have {', '.join(list(KINDS)[2:])} and end with an episode, for Minari")
    starts, _ = episodes(data)
    buffers = []
    for first, end in pairwise([*starts, len(data["rewards"])]):
        episode = {name: column[first:end] for name, column in data.items()}
        episode["observations"] = data["observations"][[*range(first, end), end - 1]]
        buffers.append(minari.data_collector.EpisodeBuffer(**episode))
    note = "The observation after an episode's last action is not known: the one before it is repeated."
    entries = {"dataset_id": dataset_id, "minari_version": minari.__version__}
    entries |= {"description": f"Demonstrations of {path.name}. {note}"}
    try:
        with TemporaryDirectory(prefix=".convert-", dir=minari.storage.local.get_dataset_path()) as folder:
            whole = Path(folder) / "dataset"
            whole.mkdir()
            spaces = env.observation_space, env.get_wrapper_attr("box")
            new = minari.dataset.minari_storage.MinariStorage.new
            storage = new(whole / "data", *spaces, env.unwrapped.spec)
            storage.update_metadata(entries)
            storage.update_episodes(buffers)
            target.parent.mkdir(parents=True, exist_ok=True)
            if namespace and namespace not in minari.namespace.list_local_namespaces():
                minari.namespace.create_namespace(namespace)
            whole.rename(target)
    except OSError as error:
        raise InputError(f"{target} could not be written: {error}") from None
    print(f"{dataset_id}: {len(data['rewards'])} pairs of {env.unwrapped.spec.id}, from {path.name}")


def main(args: Args):
    with warnings.catch_warnings(action="ignore"):  # what matters is checked, and reported in one line
        if args.out is not None:
            write_npz(args.source, args.out, args.env_id)
        else:
            write_minari(Path(args.source), args.to_minari, args.env_id)


if __name__ == "__main__":
    command_line(main, Args)
