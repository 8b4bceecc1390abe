"""The README's tables and figures, from the results that benchmark.study keeps.

    python -m benchmark.report point2d

Prints the table and writes benchmark/figures/STUDY.png (demonstrations: prints the table only).
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

from benchmark.study import RESULTS, STUDIES

FIGURES = Path(__file__).parent / "figures"
LABELS = {
    "return_mean": "return",
    "sparse_return": "sparse return",
    "q_mean": "critic's mean value",
    "imitation_distance": "imitation distance",
}
PANELS = {"point2d": ["return_mean"], "hopper": list(LABELS)}
SCORES = {
    "point2d": {
        "best evaluation": lambda run: run["return_mean"].max(),
        "last evaluation": lambda run: run["return_mean"][-1],
    }
}
SCORES["hopper"] = SCORES["point2d"] | {
    "sparse return, mean of the last five": lambda run: run["sparse_return"][-5:].mean()
}
SCORES["demonstrations"] = {  # evaluated every 5,000 steps; the warm start lasts from 10,000 to 20,000
    "distance at first": lambda run: run["imitation_distance"][1],
    "after the warm start": lambda run: run["imitation_distance"][3],
    "share of the first": lambda run: run["imitation_distance"][3] / run["imitation_distance"][1],
    "lowest in between": lambda run: run["lowest_of_batches"][3] / run["imitation_distance"][1],
    "rewarded episodes": lambda run: run["rewarded_episodes"][-1],
    "return at the end": lambda run: run["return_mean"][-1],
}
T95 = {3: 4.30, 4: 3.18, 5: 2.78}  # two-sided 95 % quantile of Student's t, by the number of seeds
STYLES = {  # the variants that a figure shows, and the name that its legend and the table give them
    "td3": ("TD3", "0.5"),
    "td3-il": ("TD3+IL", "tab:orange"),
    "td3-bc": ("behaviour cloning (TD3+IL, β = 0)", "gold"),
    "td3-gild-A": ("TD3+GILD to the end, (A)", "tab:green"),
    "td3-gild-B": ("TD3+GILD to the end, (B)", "tab:blue"),
    "td3-gild-10k-A": ("TD3+GILD for 10,000 iterations, (A)", "tab:olive"),
    "td3-gild-10k-B": ("TD3+GILD for 10,000 iterations, (B)", "tab:cyan"),
    "td3-gild-frozen": ("TD3+GILD to the end, ω frozen", "tab:pink"),
    "td3-gild-released": ("TD3+GILD, released settings", "tab:red"),
    "ddpg-gild-B": ("DDPG+GILD to the end, (B)", "tab:purple"),
    "sac-gild-B": ("SAC+GILD to the end, (B)", "tab:brown"),
}


def load(study: str) -> dict[str, list[np.ndarray]]:
    """The results by variant, a structured array a seed; only what has been run."""
    files = {
        variant: sorted((RESULTS / study).glob(f"{variant}-[0-9]*.csv")) for variant in STUDIES[study][1]
    }
    return {
        variant: [np.genfromtxt(path, delimiter=",", names=True) for path in paths]
        for variant, paths in files.items()
        if paths
    }


def interval(scores) -> str:
    """The mean over the seeds; of three or more with the half width of its 95 % interval, Student's t."""
    if len(scores) < 3:  # the interval of two is thirteen times as wide as their distance
        return f"{np.mean(scores):.1f}"
    return f"{np.mean(scores):.1f} ± {T95[len(scores)] * np.std(scores, ddof=1) / len(scores) ** 0.5:.1f}"


def table(study: str, results) -> str:
    """Each variant's scores: mean over the seeds with its interval, and each seed; or the only seed's."""
    scores = SCORES[study]
    if study == "demonstrations":
        lines = [f"| | {' | '.join(scores)} |", "|---" * (1 + len(scores)) + "|"]
        for variant, (run,) in results.items():
            numbers = [score(run) for score in scores.values()]
            cells = [variant, *(f"{n:.3g}" if abs(n) < 100 else f"{n:.0f}" for n in numbers)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)
    lines = ["| | " + " | each seed | ".join(scores) + " | each seed |", "|---" * (1 + 2 * len(scores)) + "|"]
    for variant, runs in results.items():
        cells = [STYLES[variant][0]]
        for score in scores.values():
            each = [score(run) for run in runs]
            cells += [interval(each), ", ".join(f"{one:.1f}" for one in each)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(study: str, results) -> Path:
    """A panel a quantity: the mean over the seeds as a line, each seed as a thin one."""
    panels = PANELS[study]
    size = {"figsize": (7, 1 + 2.8 * len(panels)), "layout": "constrained"}
    fig, axes = plt.subplots(len(panels), 1, sharex=True, squeeze=False, **size)
    for axis, quantity in zip(axes[:, 0], panels, strict=True):
        for variant, runs in results.items():
            name, color = STYLES[variant]
            curves = np.array([run[quantity] for run in runs])
            axis.plot(runs[0]["global_step"], curves.mean(0), color=color, label=name)
            axis.plot(runs[0]["global_step"], curves.T, color=color, alpha=0.25, linewidth=0.7)
        axis.set_ylabel(LABELS[quantity])
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("environment steps")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    FIGURES.mkdir(exist_ok=True)
    path = FIGURES / f"{study}.png"
    fig.savefig(path, dpi=110, metadata={"Software": None})
    return path


@dataclass
class Args:
    study: tyro.conf.Positional[str]  # point2d, hopper or demonstrations


def main(args: Args):
    results = load(args.study)
    print(table(args.study, results))
    if args.study in PANELS:
        print(figure(args.study, results))


if __name__ == "__main__":
    main(tyro.cli(Args))
