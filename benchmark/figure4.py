"""The paper's Figure 4 on Point2D, from real runs: what imitation and GILD do to a policy.

    python -m benchmark.sweep benchmark/studies/point2d.toml
    python -m benchmark.figure4

(i)   the trajectory of each evaluation, beside those of the Behavior policy, and the goal
(ii)  the path of the policy's parameters, on the return over the plane of their two principal components
      (Li et al., NeurIPS 2018); each point of the surface is the mean of 10 episodes
(iii) KL(policy || Behavior) of SAC, mean over the demonstrated states. SAC's Behavior policy is a SAC policy,
      so it has a density of its own; tanh squashes both Gaussians alike and leaves their divergence as it is
(iv)  GILD's loss and meta-loss over training

Draws benchmark/figures/figure4.png. The seed is that of (i) and (ii); (iii) and (iv) take every finished one.
"""

from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from baselines.common import last_evaluation
from benchmark.sweep import ROOT, find_run, load_study, read_log, runs_of
from envs.point2d import Point2D
from evaluate import InputError, command_line, load_policy, rollout

PATHS = {"ddpg": "DDPG", "ddpg-il": "DDPG+IL", "ddpg-gild": "DDPG+GILD"}  # variants in (i) and (ii)
KL = {"sac-il": ("SAC+IL", "tab:orange"), "sac-gild": ("SAC+GILD", "tab:blue")}  # in (iii)
LOSSES = "sac-gild"  # in (iv)


@dataclass
class Args:
    study: Path = ROOT / "benchmark" / "studies" / "point2d.toml"  # the study whose runs are drawn
    seed: int = 1  # seed of the runs in (i) and (ii)
    cells: int = 25  # points of the surface along each axis
    episodes: int = 10  # episodes for each of them
    figures: Path = ROOT / "benchmark" / "figures"  # folder of the figure

    def __post_init__(self):
        if self.cells < 2 or self.episodes < 1:
            raise ValueError("--cells must be 2 or more, --episodes 1 or more")


def find_runs(study: Path, seed: int) -> dict[str, dict[int, Path]]:
    """The folders of the finished runs that the figure needs, by variant and seed."""
    found = {variant: {} for variant in (*PATHS, *KL)}
    for run in runs_of(load_study(study)):
        if run.variant in found:
            run_dir = find_run(Path("runs"), run)
            if run_dir and last_evaluation(run_dir) >= run.args["total_timesteps"]:
                found[run.variant][run.seed] = run_dir
    missing = [variant for variant in PATHS if seed not in found[variant]]
    missing += [variant for variant in KL if not found[variant]]
    if missing:
        needs = f"runs/ has no finished {', '.join(missing)} of {study.stem} (--seed {seed})"
        raise InputError(f"{needs}: python -m benchmark.sweep {study} makes them")
    return found


def policies(run_dir: Path) -> dict[int, dict[str, torch.Tensor]]:
    """The actor's weights at each evaluation, by step."""
    paths = sorted((run_dir / "policies").glob("*.pt"), key=lambda path: int(path.stem))
    return {int(path.stem): torch.load(path, weights_only=True)["actor"] for path in paths}


def trajectories(run_dir: Path) -> dict[int, np.ndarray]:
    """The positions of each evaluation's first episode, (episode's steps + 1, 2), by step."""
    actor, script, args, _ = load_policy(run_dir / "policy.pt")
    env, positions = script.make_env(args, training=False), {}
    for step, weights in policies(run_dir).items():
        actor.load_state_dict(weights)
        next(rollout(actor, script, args, env, seed=0))
        positions[step] = np.array(env.unwrapped.path)
    return positions


def principal_plane(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last of the points (n, d), and their two principal directions about it, (2, d), orthonormal."""
    differences = points - points[-1]
    return points[-1], np.linalg.svd(differences, full_matrices=False)[2][:2]


def surface(run_dir: Path, cells: int, episodes: int, bar) -> tuple[np.ndarray, ...]:
    """Returns over the plane of a run's parameters.

    x and y (cells,), the mean returns (cells, cells), and the run's path in the plane, (evaluations, 2).
    """
    actor, script, args, _ = load_policy(run_dir / "policy.pt")
    env = script.make_env(args, training=False)
    points = []
    for weights in policies(run_dir).values():
        actor.load_state_dict(weights)
        points.append(torch.nn.utils.parameters_to_vector(actor.parameters()).detach().double().numpy())
    origin, directions = principal_plane(np.array(points))
    path = (np.array(points) - origin) @ directions.T
    margin = 0.15 * np.ptp(path, axis=0) + 1e-3
    x, y = np.linspace(path.min(0) - margin, path.max(0) + margin, cells).T
    returns = np.zeros((cells, cells))
    for row, column in np.ndindex(cells, cells):
        point = origin + x[column] * directions[0] + y[row] * directions[1]
        torch.nn.utils.vector_to_parameters(torch.from_numpy(point).float(), actor.parameters())
        runs = islice(rollout(actor, script, args, env, seed=0), episodes)
        returns[row, column] = np.mean([episode["rewards"].sum() for episode in runs])
        bar.update()
    return x, y, returns, path


@torch.no_grad()
def kl_divergence(actor, behavior, obs: torch.Tensor) -> float:
    """KL(actor || behavior), the mean over the states `obs` (N, |S|), of SAC's squashed Gaussians."""
    pair = []
    for policy in (actor, behavior):
        mean, log_std = policy.gaussian(obs)
        pair.append(torch.distributions.Normal(mean, log_std.exp()))
    return torch.distributions.kl_divergence(*pair).sum(-1).mean().item()


def divergences(run_dir: Path) -> dict[int, float]:
    """KL(policy || Behavior) at each evaluation of a SAC run, by step."""
    actor, *_ = load_policy(run_dir / "policy.pt")
    behavior, *_ = load_policy(ROOT / "demos" / "policies" / "Point2D-sac.pt")
    with np.load(ROOT / "demos" / "Point2D-sac.npz", allow_pickle=False) as file:
        obs, values = torch.from_numpy(file["observations"]), {}
    for step, weights in policies(run_dir).items():
        actor.load_state_dict(weights)
        values[step] = kl_divergence(actor, behavior, obs)
    return values


def behavior_trajectories(algorithm: str, count: int = 10) -> list[np.ndarray]:
    """The positions of the first demonstrated episodes."""
    with np.load(ROOT / "demos" / f"Point2D-{algorithm}.npz", allow_pickle=False) as file:
        ends = np.flatnonzero(file["terminations"] | file["truncations"]) + 1
        return np.split(file["observations"], ends)[:count]


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """The centred moving mean."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def mean_and_each(axis, series: list[dict[int, float]], color: str, label: str):
    """Each seed thin, their mean thick."""
    steps = sorted(set.intersection(*(set(values) for values in series)))
    table = np.array([[values[step] for step in steps] for values in series])
    if len(table) > 1:
        axis.plot(
            np.divide(steps, 1_000),
            np.transpose([smooth(row) for row in table]),
            color=color,
            alpha=0.3,
            linewidth=0.6,
        )
    return axis.plot(np.divide(steps, 1_000), smooth(table.mean(0)), color=color, linewidth=1.8, label=label)[
        0
    ]


def draw_trajectories(axis, run_dir: Path, title: str, goal):
    paths = trajectories(run_dir)
    for positions in behavior_trajectories("ddpg"):
        (line,) = axis.plot(*positions.T, color="0.6", linewidth=1.2, zorder=3, label="Behavior")
    norm = plt.Normalize(0, max(paths) / 1_000)
    for step, positions in paths.items():
        axis.plot(*positions.T, color=plt.cm.viridis(norm(step / 1_000)), linewidth=1, alpha=0.8)
    axis.plot(*goal, "r*", markersize=11, zorder=4)
    axis.set_title(title, fontsize=10)
    axis.set_xlim(-2.5, 2.5)
    axis.set_ylim(-2.5, 2.5)
    axis.set_aspect("equal")
    return line, plt.cm.ScalarMappable(norm, "viridis")


def draw_surface(axis, x, y, returns, path):
    image = axis.pcolormesh(x, y, returns, cmap="magma", vmin=0, vmax=84, shading="nearest", rasterized=True)
    axis.plot(*path.T, color="red", linewidth=1)
    for start, end in list(pairwise(path))[:: max(1, len(path) // 8)]:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "red", "lw": 1})
    axis.plot(*path[0], "o", color="white", markersize=4)
    axis.plot(*path[-1], "*", color="red", markeredgecolor="white", markersize=11)
    axis.set_xlabel("first component", fontsize=8)
    return image


def main(args: Args):
    found, goal = find_runs(args.study, args.seed), Point2D().goal
    fig = plt.figure(figsize=(9, 9), layout="constrained")
    rows = fig.subfigures(3, 1, height_ratios=[1, 1, 0.9])
    top, middle, (left, right) = (row.subplots(1, count) for row, count in zip(rows, (3, 3, 2), strict=True))
    for axis, (variant, title) in zip(top, PATHS.items(), strict=True):
        behavior, colors = draw_trajectories(axis, found[variant][args.seed], title, goal)
    top[0].legend(handles=[behavior], fontsize=8, loc="lower left")
    top[0].set_ylabel("(i) trajectories")
    rows[0].colorbar(colors, ax=top, label="steps, in thousands")

    with tqdm(total=3 * args.cells**2, desc="surface", unit=" points", disable=None) as bar:
        for axis, variant in zip(middle, PATHS, strict=True):
            image = draw_surface(axis, *surface(found[variant][args.seed], args.cells, args.episodes, bar))
    middle[0].set_ylabel("(ii) second component")
    rows[1].colorbar(image, ax=middle, label="return")

    for variant, (label, color) in KL.items():
        mean_and_each(left, [divergences(run_dir) for run_dir in found[variant].values()], color, label)
    left.set_title("(iii) KL(policy || Behavior)", fontsize=10)
    left.set_ylabel("nats")
    left.legend(fontsize=8)
    logs = [read_log(run_dir)[0] for run_dir in found[LOSSES].values()]
    twin, lines = right.twinx(), []
    for axis, name, label, color in (
        (right, "losses/gild_loss", "GILD loss", "tab:blue"),
        (twin, "losses/meta_loss", "meta-loss", "tab:red"),
    ):
        lines.append(mean_and_each(axis, [log[name] for log in logs], color, label))
        axis.set_ylabel(label, color=color)
    right.set_title(f"(iv) losses of {KL[LOSSES][0]}", fontsize=10)
    right.legend(handles=lines, fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("environment steps, in thousands", fontsize=9)
        axis.grid(alpha=0.3)
    args.figures.mkdir(parents=True, exist_ok=True)
    path = args.figures / "figure4.png"
    fig.savefig(path, dpi=150, metadata={"Software": None})
    counts = {len(found[variant]) for variant in KL}
    seeds = " or ".join(map(str, sorted(counts))) + (" seed" if counts == {1} else " seeds")
    print(f"{path}: (i), (ii) of seed {args.seed}; (iii), (iv) of {seeds}: each thin, their mean thick,")
    print("moving means over five points")


if __name__ == "__main__":
    command_line(main, Args)
