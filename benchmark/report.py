"""The README's tables and figures, from the results that benchmark.study keeps.

    python -m benchmark.report headline

Prints a study's table and draws benchmark/figures/STUDY.png (demonstrations: only the table).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

from baselines.common import task_name
from benchmark.study import DEMOS, STUDIES, result

FIGURES = Path(__file__).parent / "figures"

# a study's columns: a score of each run, a structured array with a row per evaluation
SCORES = {
    "point2d": {
        "best evaluation": lambda run: run["return_mean"].max(),
        "last evaluation": lambda run: run["return_mean"][-1],
    }
}
SCORES["hopper"] = SCORES["point2d"] | {
    "sparse return, mean of the last five": lambda run: run["sparse_return"][-5:].mean()
}
SCORES["headline"] = {
    "best evaluation": lambda run: run["return_mean"].max(),
    "mean of the last five": lambda run: run["return_mean"][-5:].mean(),
    "mean of the second half": lambda run: run["return_mean"][len(run) // 2 :].mean(),
}
SCORES["demonstrations"] = {  # evaluated every 5,000 steps; the warm start lasts from 10,000 to 20,000
    "distance at first": lambda run: run["imitation_distance"][1],
    "after the warm start": lambda run: run["imitation_distance"][3],
    "share of the first": lambda run: run["imitation_distance"][3] / run["imitation_distance"][1],
    "lowest in between": lambda run: run["lowest_of_batches"][3] / run["imitation_distance"][1],
    "rewarded episodes": lambda run: run["rewarded_episodes"][-1],
    "return at the end": lambda run: run["return_mean"][-1],
}
FORMATS = {"headline": ".0f", "demonstrations": ".4g"}  # the others': .1f
PAPER = {  # Table 1: best evaluation of a run of a million steps, mean over five seeds
    "td3": {"Hopper": 1320.8, "HalfCheetah": 3251.3, "Walker2d": 1426.6},
    "td3-il": {"Hopper": 2437.9, "HalfCheetah": 5843.9, "Walker2d": 2488.5},
    "td3-gild": {"Hopper": 3538.6, "HalfCheetah": 9997.6, "Walker2d": 4113.6},
}

QUANTITIES = {  # a study's panels, one per task and quantity
    "headline": {"return_mean": "return"},
    "point2d": {"return_mean": "return"},
    "hopper": {
        "return_mean": "return",
        "sparse_return": "sparse return",
        "q_mean": "critic's mean value",
        "imitation_distance": "imitation distance",
    },
}
STYLES = {  # a variant's name and color
    "td3": ("TD3", "0.5"),
    "td3-il": ("TD3+IL", "tab:orange"),
    "td3-bc": ("behaviour cloning (TD3+IL, β = 0)", "goldenrod"),
    "td3-gild-A": ("TD3+GILD to the end, (A)", "tab:green"),
    "td3-gild-B": ("TD3+GILD to the end, (B)", "tab:blue"),
    "td3-gild-10k-A": ("TD3+GILD for 10,000 iterations, (A)", "tab:olive"),
    "td3-gild-10k-B": ("TD3+GILD for 10,000 iterations, (B)", "tab:cyan"),
    "td3-gild": ("TD3+GILD for 10,000 iterations", "tab:blue"),
    "td3-gild-frozen": ("TD3+GILD to the end, ω frozen", "tab:pink"),
    "td3-gild-end": ("TD3+GILD to the end", "tab:green"),
    "td3-gild-released": ("TD3+GILD, released settings", "tab:red"),
    "ddpg-gild-B": ("DDPG+GILD to the end, (B)", "tab:purple"),
    "sac-gild-B": ("SAC+GILD to the end, (B)", "tab:brown"),
}
OWN_NAMES = {  # where a study means something else by a variant
    "headline": {"td3-gild-frozen": "TD3+GILD for 10,000 iterations, ω frozen"},
    "demonstrations": {"ddpg": "DDPG+GILD", "td3": "TD3+GILD", "sac": "SAC+GILD"},
}


def name(study: str, variant: str) -> str:
    return OWN_NAMES.get(study, {}).get(variant) or STYLES[variant][0]


def load(study: str) -> dict[str, dict[str, list[np.ndarray]]]:
    """The finished runs by task and variant, a structured array each."""
    results = {}
    for env_id in STUDIES[study].tasks:
        for variant, (_, seeds) in STUDIES[study].variants.items():
            paths = [result(study, variant, env_id, seed) for seed in range(1, seeds + 1)]
            runs = [np.genfromtxt(path, delimiter=",", names=True) for path in paths if path.exists()]
            if runs:
                results.setdefault(task_name(env_id), {})[variant] = runs
    return results


def t_quantile(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t: t = sqrt(n) tan x, with x of density ~ cos(x)^(n - 1)."""
    x = np.linspace(0, np.pi / 2, 100_001)
    weight = np.cos((x[1:] + x[:-1]) / 2) ** (freedom - 1)
    share = np.concatenate([[0], np.cumsum(weight) / weight.sum()])
    return freedom**0.5 * np.tan(np.interp(0.95, share, x))


def interval(scores, form: str) -> str:
    """The mean over the seeds; of two or more with the half width of its 95 % interval, Student's t."""
    if len(scores) == 1:
        return f"{scores[0]:{form}}"
    half_width = t_quantile(len(scores) - 1) * np.std(scores, ddof=1) / len(scores) ** 0.5
    return f"{np.mean(scores):{form}} ± {half_width:{form}}"


def table(study: str, results) -> str:
    """A row per task and variant: each score's mean over the seeds, and its interval.

    A study of one task also shows each seed's score, the headline the paper's figure.
    """
    scores, form = SCORES[study], FORMATS.get(study, ".1f")
    one_task = len(STUDIES[study].tasks) == 1
    head = [""] if one_task else ["task", "", "seeds"]
    for score in scores:
        head += [score, "each seed"] if one_task else [score]
    head += ["best in the paper"] if study == "headline" else []
    lines = [head, ["---"] * len(head)]
    for task, variants in results.items():
        for variant, runs in variants.items():
            cells = [name(study, variant)]
            cells = cells if one_task else [task, *cells, str(len(runs))]
            for score in scores.values():
                each = [score(run) for run in runs]
                cells.append(interval(each, form))
                cells += [", ".join(f"{one:{form}}" for one in each)] if one_task else []
            if study == "headline":
                paper = PAPER.get(variant, {}).get(task)
                cells.append(f"{paper:{form}}" if paper else "")
            lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def demonstrated_return(task: str) -> float:
    with np.load(DEMOS / f"{task}-td3.npz", allow_pickle=False) as file:
        return json.loads(str(file["metadata"]))["return_mean"]


def figure(study: str, results) -> Path:
    """A panel per task and quantity: the mean over the seeds as a thick line, each seed as a thin one."""
    quantities, tasks = QUANTITIES[study], list(results)
    rows, columns = len(quantities), len(tasks)
    size = {"figsize": (9 if columns > 1 else 7, 1.2 + 2.6 * rows), "layout": "constrained"}
    fig, axes = plt.subplots(rows, columns, sharex=True, squeeze=False, **size)
    labels = {}
    for column, task in enumerate(tasks):
        for axis, (quantity, label) in zip(axes[:, column], quantities.items(), strict=True):
            for variant, runs in results[task].items():
                steps, color = runs[0]["global_step"] / 1_000, STYLES[variant][1]
                curves = np.array([run[quantity] for run in runs])
                (line,) = axis.plot(steps, curves.mean(0), color=color, linewidth=1.8)
                axis.plot(steps, curves.T, color=color, alpha=0.35, linewidth=0.6)
                labels[name(study, variant)] = line
            if quantity == "return_mean":
                line = axis.axhline(demonstrated_return(task), color="black", linestyle=":")
                labels["demonstrations"] = line
            axis.set_ylabel(label if column == 0 else "")
            axis.grid(alpha=0.3)
        axes[0, column].set_title(task if columns > 1 else "")
        axes[-1, column].set_xlabel("environment steps, in thousands")
    labels["demonstrations"] = labels.pop("demonstrations")  # last
    fig.legend(labels.values(), labels, loc="outside lower center", ncols=3 if columns > 1 else 2, fontsize=8)
    FIGURES.mkdir(exist_ok=True)
    path = FIGURES / f"{study}.png"
    fig.savefig(path, dpi=150, metadata={"Software": None})
    return path


@dataclass
class Args:
    study: tyro.conf.Positional[str]  # headline, point2d, hopper or demonstrations


def main(args: Args):
    results = load(args.study)
    if not results:
        sys.exit(f"{args.study} has no results yet: python -m benchmark.study {args.study}")
    print(table(args.study, results))
    if args.study in QUANTITIES:
        print(figure(args.study, results))


if __name__ == "__main__":
    main(tyro.cli(Args))
