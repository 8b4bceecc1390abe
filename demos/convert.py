"""Turns demonstrations of other formats into the project's .npz, and the .npz into a Minari dataset.

    python -m demos.convert mujoco/hopper/expert-v0 --out hopper.npz          # Minari, by id or by folder
    python -m demos.convert hopper.pkl --out hopper.npz --env-id Hopper-v4    # or .csv, .npy: rows of [s, a]
    python -m demos.convert demos/Hopper-td3.npz --to-minari me/hopper-v0

A CSV may begin with a line of names. A file of another suffix is taken for a pickle of one NumPy array, like
those released with the paper; nothing else is ever unpickled. Minari is optional: pip install "minari[hdf5]".
Its episodes have one observation more, after the last action. On the way in it is left out; on the way out
the last one is repeated, since the .npz has no other, and the dataset's description says so.
"""

import json
import os
import pickle
import re
import sys
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

import gild_td3
from demos.collect import save_demonstrations

KINDS = {"observations": np.float32, "actions": np.float32, "rewards": np.float32}
KINDS |= {"terminations": bool, "truncations": bool}
PICKLED = {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}  # the words of pickled arrays of numbers
for core in ("numpy.core", "numpy._core"):  # in NumPy 1 and 2
    PICKLED |= {f"{core}.multiarray._reconstruct", f"{core}.numeric._frombuffer"}


@dataclass
class Args:
    source: tyro.conf.Positional[str]  # a file, or a Minari dataset's id or folder
    out: Path | None = None  # the .npz file to write
    to_minari: str | None = None  # or: make the source, an .npz, the Minari dataset of this id
    env_id: str | None = None  # a Gymnasium id [default: the one that the source tells, which rows do not]


# READING: the arrays of each format by their names in the .npz


class Call:
    """What a pickle asks to be called, written down and not done."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class ArrayUnpickler(pickle.Unpickler):
    """Each of the words in PICKLED becomes a `Call`, and any other is refused.

    NumPy's own functions would be no safe choice: a forged state makes them take bytes for pointers.
    """

    def find_class(self, module, name):
        if f"{module}.{name}" not in PICKLED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return Call


def read_pickle(file):
    """The array in a pickle of any protocol, made from its bytes. Raises all kinds of exceptions."""
    array = ArrayUnpickler(file, encoding="latin1").load()
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
    names = not any(re.match(r"\s*([-+.\d]|nan|inf)", cell, re.IGNORECASE) for cell in cells)
    return np.loadtxt(lines, delimiter=",", skiprows=int(names), ndmin=2)


def read_rows(path: Path, env_id: str):
    """The observations (M, |S|) and actions (M, |A|) in a file of rows [s, a]. Raises ValueError, OSError."""
    with open(path, "rb") as file:
        try:
            if path.suffix.lower() == ".csv":
                rows = read_csv(file)
            elif path.suffix.lower() == ".npy":
                rows = np.lib.format.read_array(file, allow_pickle=False)
            else:
                rows = read_pickle(file)
            if rows.dtype.kind not in "fiu":
                raise ValueError(f"its type is {rows.dtype}")
        except Exception as error:  # a damaged or hostile file fails in a dozen ways
            raise ValueError(f"{path} is no array of numbers: {error!r}") from None
    env = gild_td3.make_env(gild_td3.Args(env_id=env_id), training=False)
    width, actions = env.observation_space.shape[0], env.action_space.shape[0]
    if rows.ndim != 2 or rows.shape[1] != width + actions:
        raise ValueError(f"{path} has shape {rows.shape}, but rows of {env_id} are {width} + {actions} wide")
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
        raise ValueError('Minari datasets need more packages: pip install "minari[hdf5]"') from None


def read_minari(source: str, env_id: str | None):
    """A Minari dataset's five arrays, its environment's id, and metadata for the .npz. Raises ValueError."""
    minari = import_minari()
    folder = Path(source) if Path(source).is_dir() else minari.storage.local.get_dataset_path(source)
    folder = folder if (folder / "metadata.json").is_file() else folder / "data"
    if not folder.is_dir():
        raise ValueError(f"{source} is no file, and no dataset on this machine: minari download {source}")
    try:
        about = json.loads((folder / "metadata.json").read_text())
        # a dataset without its spaces would have Minari call whatever the file names as the environment
        spaces = [json.loads(about[name])["type"] for name in ("observation_space", "action_space")]
        if spaces != ["Box", "Box"]:
            raise ValueError(f"its observations and actions are {spaces}, but must be Box")
        if env_id is None and "env_spec" not in about:
            raise ValueError("it does not tell its environment, so --env-id must")
        env_id = env_id or json.loads(about["env_spec"])["id"].split(":")[-1]
        columns = {name: [] for name in KINDS}
        for episode in minari.MinariDataset(folder):
            for name, column in columns.items():
                column.append(getattr(episode, name)[: -1 if name == "observations" else None])
            # a recording that was cut short counts as a truncated episode, or it would join the next one
            columns["truncations"][-1][-1] |= not episode.terminations[-1]
        data = {name: np.concatenate(columns[name]).astype(kind) for name, kind in KINDS.items()}
        _, returns = episodes(data)
        metadata = {"source": f"Minari dataset {about['dataset_id']}", "episodes": len(returns)}
        metadata |= {"return_mean": float(returns.mean()), "return_std": float(returns.std())}
        return data, env_id, metadata
    except Exception as error:
        raise ValueError(f"no demonstrations in {source}: {error!r}") from None


def read_npz(path: Path):
    """A demonstration file's arrays, and its metadata. Raises ValueError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name].astype(kind) for name, kind in KINDS.items() if name in file}
            return data, {"env_id": None, **json.loads(str(file["metadata"]))}
    except Exception as error:
        raise ValueError(f"no demonstrations in {path}: {error!r}") from None


# WRITING


def check(path: Path, env_id: str) -> gym.Env:
    """The environment, if the demonstration file fits it; else raises ValueError."""
    env = gild_td3.make_env(gild_td3.Args(env_id=env_id), training=False)
    gild_td3.DemonstrationBuffer(path, env_id, env, torch.device("cpu"))
    data, _ = read_npz(path)
    for name in data.keys() - {"observations", "actions"}:
        if data[name].shape != data["actions"].shape[:1] or not np.isfinite(data[name]).all():
            raise ValueError(f"{path} has {name} that are not finite numbers, one for each pair")
    return env


def write_npz(source: str, out: Path, env_id: str | None):
    """Writes any other format as .npz. Raises ValueError or OSError, and then leaves `out` as it was."""
    path = Path(source)
    if path.is_dir() or not (path.is_file() or "." in path.name):  # the id of a dataset has no dot
        data, env_id, metadata = read_minari(source, env_id)
    elif path.suffix.lower() == ".npz":
        raise ValueError(f"{source} need not be converted; --to-minari makes a Minari dataset of it")
    elif env_id is None:
        raise ValueError(f"{source} does not tell its environment, so --env-id must")
    else:
        data, metadata = read_rows(path, env_id), {"source": path.name}
    with TemporaryDirectory(prefix=".convert-", dir=out.parent) as folder:
        trial = Path(folder) / out.name
        save_demonstrations(trial, env_id, **data, metadata=metadata)
        try:
            check(trial, env_id)
        except ValueError as error:
            raise ValueError(str(error).replace(str(trial), source)) from None
        os.replace(trial, out)
    print(f"{out}: {len(data['actions'])} pairs of {env_id}, from {metadata['source']}")


def write_minari(path: Path, dataset_id: str, env_id: str | None):
    """Writes whole episodes as a new Minari dataset. Raises ValueError or OSError, and then writes none."""
    minari = import_minari()
    try:
        namespace, *_ = minari.dataset.minari_dataset.parse_dataset_id(dataset_id)
    except (ValueError, TypeError):
        raise ValueError(f"{dataset_id} is no id of a dataset, like me/hopper-v0") from None
    target = minari.storage.local.get_dataset_path(dataset_id)
    if target.exists():
        raise ValueError(f"there is a dataset {dataset_id} already")
    data, about = read_npz(path)
    env = check(path, env_id or str(about["env_id"]))
    if data.keys() != KINDS.keys() or not (data["terminations"] | data["truncations"])[-1]:
        raise ValueError(f"{path} must have {', '.join(list(KINDS)[2:])} and end with an episode, for Minari")
    starts, _ = episodes(data)
    buffers = []
    for first, end in pairwise([*starts, len(data["rewards"])]):
        episode = {name: column[first:end] for name, column in data.items()}
        episode["observations"] = data["observations"][[*range(first, end), end - 1]]
        buffers.append(minari.data_collector.EpisodeBuffer(**episode))
    note = "The observation after an episode's last action is not known: the one before it is repeated."
    entries = {"dataset_id": dataset_id, "minari_version": minari.__version__}
    entries |= {"description": f"Demonstrations of {path.name}. {note}"}
    with TemporaryDirectory(prefix=".convert-", dir=minari.storage.local.get_dataset_path()) as folder:
        whole = Path(folder) / "dataset"
        whole.mkdir()
        new = minari.dataset.minari_storage.MinariStorage.new
        storage = new(whole / "data", env.observation_space, env.action_space, env.spec)
        storage.update_metadata(entries)
        storage.update_episodes(buffers)
        target.parent.mkdir(parents=True, exist_ok=True)
        if namespace and namespace not in minari.namespace.list_local_namespaces():
            minari.namespace.create_namespace(namespace)
        whole.rename(target)
    print(f"{dataset_id}: {len(data['rewards'])} pairs of {env.spec.id}, from {path.name}")


def main(args: Args):
    if (args.out is None) == (args.to_minari is None):
        raise ValueError("one of --out FILE and --to-minari ID is needed")
    with warnings.catch_warnings(action="ignore"):  # what they are about, the checks tell in one line
        if args.out is not None:
            write_npz(args.source, args.out, args.env_id)
        else:
            write_minari(Path(args.source), args.to_minari, args.env_id)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (OSError, ValueError, ImportError, gym.error.Error) as error:
        print(f"demos.convert: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
