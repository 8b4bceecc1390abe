"""Tables and figures of a study, from its results.

    python -m benchmark.report headline

Prints Markdown and draws benchmark/figures/NAME.png and .svg: the learning curves. If two variants have a
run on every task it adds NAME-scores (interquartile mean and performance profile over tasks, after Agarwal
et al., NeurIPS 2021), and if three differ in --ws-frac alone NAME-warm-start (the layout of the paper's
Figure 5). Unfinished studies are reported as far as they are.

    python -m benchmark.report headline --at "50,000 to 100,000" "distance at 20,000"

adds a table of the mean return in that span and of the distance at that step.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro

from baselines.common import task_name
from benchmark.sweep import RESULTS, ROOT, Study, load_study, result
from evaluate import InputError, command_line

# THE PAPER'S FIGURES

TASKS = ["Hopper", "Walker2d", "HalfCheetah", "Ant", "Point2D"]
TABLE1 = {  # best evaluation of a million steps (on-policy: more), mean ± std over five seeds
    "DDPG": "2122.9±590.7 1519.4±881.8 3349.1±1489.6 339.0±109.2 19.7±13.3",
    "DDPG+IL": "2378.4±906.1 1867.8±489.5 5603.9±1129.9 575.1±215.4 47.5±16.8",
    "DDPG+GILD": "2804.0±235.4 2632.1±373.0 9987.7±511.9 971.6±296.7 71.0±8.7",
    "TD3": "1320.8±413.9 1426.6±1413.0 3251.3±1135.4 1712.3±562.8 24.0±10.7",
    "TD3+IL": "2437.9±890.2 2488.5±903.7 5843.9±1321.0 2660.2±395.5 55.8±13.8",
    "TD3+GILD": "3538.6±104.6 4113.6±280.5 9997.6±754.9 4864.6±699.1 75.1±9.7",
    "SAC": "2235.1±569.6 1643.2±809.5 3946.2±485.2 2106.8±718.0 43.6±17.2",
    "SAC+IL": "2989.6±263.3 3102.1±476.5 6503.2±802.5 3370.8±466.3 67.1±14.4",
    "SAC+GILD": "3470.6±85.2 4840.4±243.8 11161.5±552.6 5335.3±246.9 79.8±6.5",
    "PPO": "1332.5±1356.3 6.3±13.3 -10.3±514.2 637.6±191.3 23.6±15.5",
    "PPO+IL": "1831.7±279.8 2649.5±86.8 2781.3±61.7 1759.8±7.7 43.2±8.6",
    "LOGO": "3465.8±88.2 4537.5±293.4 5264.0±486.5 4589.5±992.9 77.8±8.0",
    "Meta-Critic": "3185.2±526.9 3807.0±1377.1 6811.6±3981.0 1588.9±782.8 68.6±23.7",
    "DiffAIL": "2494.3±77.5 2848.3±153.4 5978.6±237.0 3650.1±183.9 51.3±4.1",
}
TABLE2 = {"DDPG": (971.6, 883.1), "TD3": (4864.6, 4259.4), "SAC": (5335.3, 4851.0)}  # gain, intuitive; Ant
TABLE3 = {  # minutes, mean over four tasks
    "DDPG": 118, "DDPG+IL": 178, "DDPG+MC": 443, "DDPG+GILD": 261, "DDPG+GILD+1%ws": 125,
    "TD3": 133, "TD3+IL": 186, "TD3+MC": 478, "TD3+GILD": 275, "TD3+GILD+1%ws": 138,
    "SAC": 280, "SAC+IL": 364, "SAC+MC": 947, "SAC+GILD": 564, "SAC+GILD+1%ws": 299,
    "PPO": 1431, "PPO+IL": 1591, "LOGO": 4056,
}  # fmt: skip
EXPERT = {  # dense return of a fully trained policy, published (demos/README.md): 100 when normalised
    "ddpg": {"Hopper": 1860, "Walker2d": 3098, "HalfCheetah": 8577, "Ant": 889, "Point2D": 83.8},
    "td3": {"Hopper": 3564, "Walker2d": 4683, "HalfCheetah": 9637, "Ant": 4372, "Point2D": 83.8},
    "sac": {"Hopper": 3542, "Walker2d": 5007, "HalfCheetah": 12139, "Ant": 5850, "Point2D": 83.8},
}

# A RUN'S SCORES: functions of its result, a structured array with a row per evaluation

SECOND_HALF = "mean of the second half"
SCORES = {
    "best evaluation": lambda run: run["return_mean"].max(),
    "last evaluation": lambda run: run["return_mean"][-1],
    "mean of the last five": lambda run: run["return_mean"][-5:].mean(),
    # by steps: some runs have a row for step 0
    SECOND_HALF: lambda run: run["return_mean"][run["global_step"] > run["global_step"][-1] / 2].mean(),
    "sparse return, mean of the last five": lambda run: run["sparse_return"][-5:].mean(),
    # of runs of 30,000 steps, evaluated every 5,000, with a warm start from 10,000 to 20,000
    "distance at first": lambda run: run["imitation_distance"][1],
    "after the warm start": lambda run: run["imitation_distance"][3],
    "share of the first": lambda run: run["imitation_distance"][3] / run["imitation_distance"][1],
    "lowest in between": lambda run: run["lowest_of_batches"][3] / run["imitation_distance"][1],
    "rewarded episodes": lambda run: run["rewarded_episodes"][-1],
}
COLUMNS = {  # as --at names them
    "return": "return_mean",
    "distance": "imitation_distance",
    "mean of Q": "q_mean",
    "slope of f": "f_slope",
    "rewarded episodes": "rewarded_episodes",
}
PANELS = {
    "return_mean": "return",
    "sparse_return": "sparse return",
    "q_mean": "critic's mean value",
    "imitation_distance": "imitation distance",
    "f_mean": "mean of f",
    "f_slope": "slope of f",
}

# STATISTICS; `tasks` is a list with an array of scores for each task, a score per seed


def t_quantile(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t: t = sqrt(n) tan x, with x of density ~ cos(x)^(n - 1)."""
    x = np.linspace(0, np.pi / 2, 100_001)
    weight = np.cos((x[1:] + x[:-1]) / 2) ** (freedom - 1)
    share = np.concatenate([[0], np.cumsum(weight) / weight.sum()])
    return freedom**0.5 * np.tan(np.interp(0.95, share, x))


def half_width(scores) -> float:
    """Half the 95 % interval of the mean, Student's t."""
    return t_quantile(len(scores) - 1) * np.std(scores, ddof=1) / len(scores) ** 0.5


def iqm(tasks) -> float:
    """The interquartile mean: of all runs together, without the lowest and the highest quarter."""
    scores = np.sort(np.concatenate(tasks))
    cut = len(scores) // 4
    return scores[cut : len(scores) - cut].mean()


def improvement(tasks, others) -> float:
    """The probability that a run scores higher than one of `others`, ties half, mean over the tasks."""
    pairs = [a[:, None] - b[None] for a, b in zip(tasks, others, strict=True)]
    return np.mean([(difference > 0).mean() + (difference == 0).mean() / 2 for difference in pairs])


def profile(tasks, thresholds) -> np.ndarray:
    """The share of runs that score higher than each threshold."""
    return (np.concatenate(tasks)[:, None] > thresholds).mean(0)


def bootstrap(statistic, *groups, repetitions=2_000) -> np.ndarray:
    """The 95 % interval of statistic(*groups), with the seeds of each task drawn anew, by percentiles."""
    rng = np.random.default_rng(0)
    values = [
        statistic(*([rng.choice(scores, len(scores)) for scores in tasks] for tasks in groups))
        for _ in range(repetitions)
    ]
    return np.percentile(values, [2.5, 97.5], axis=0)


# RESULTS


def load(study: Study, results: Path) -> dict[str, dict[str, dict[int, np.ndarray]]]:
    """The runs by task, variant and seed, an array each, also of seeds that the study does not name."""
    runs, names = {}, [path.name for path in (results / study.name).glob("*.csv")]
    for env_id in study.tasks:
        for key, variant in study.variants.items():
            pattern = re.compile(re.escape(f"{key}-{task_name(env_id)}-") + r"(\d+)\.csv")
            more = {int(match[1]) for match in map(pattern.fullmatch, names) if match}
            for seed in sorted(more.union(variant.seeds)):
                path = result(results, study.name, key, env_id, seed)
                if path.exists():
                    table = np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True))
                    runs.setdefault(task_name(env_id), {}).setdefault(key, {})[seed] = table
    return runs


def algorithm(study: Study, key: str) -> str:
    """The algorithm that a variant builds on: `td3` for gild_td3, td3_il, meta_critic_td3."""
    variant = study.variants[key]
    script, base = variant.script.split(".")[-1], {"diffail": "sac", "logo": "ppo"}
    words = [script, *variant.flags]
    return base.get(script) or next(
        (a for w in words for a in ("ddpg", "td3", "sac", "ppo") if a in w), script
    )


def scores(runs, task, key, score=SECOND_HALF) -> np.ndarray:
    return np.array([SCORES[score](run) for run in runs[task][key].values()])


def normalised(study: Study, runs, score=SECOND_HALF) -> dict[str, list[np.ndarray]]:
    """Each variant's scores with Expert = 100, an array per task. Only variants with a run on every task.

    Empty where no variant has more than one run: there is nothing to aggregate.
    """
    tables = {}
    for key in study.variants:
        experts = [EXPERT.get(algorithm(study, key), {}).get(task) for task in runs]
        if all(experts) and all(key in variants for variants in runs.values()):
            pairs = zip(runs, experts, strict=True)
            tables[key] = [100 * scores(runs, task, key, score) / expert for task, expert in pairs]
    return tables if any(sum(map(len, tasks)) > 1 for tasks in tables.values()) else {}


# TABLES


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines]) + "\n"


def plain(number: float) -> str:
    """No digits that mean nothing: 11161, 853, 83.8, 0.0."""
    return f"{number:z.0f}" if abs(number) >= 100 else f"{number:z.1f}"


def summary(values) -> str:
    """Mean ± std over seeds; of three or more also the mean's 95 % interval, which two make useless."""
    text, mean = plain(np.mean(values)), np.mean(values)
    if len(values) > 1:
        text += f" ± {plain(np.std(values, ddof=1))}"
    if len(values) > 2:
        text += f" [{plain(mean - half_width(values))}, {plain(mean + half_width(values))}]"
    return text


def paper_score(row: str | None, task: str) -> str:
    row = (row or "").removesuffix("+1%ws")
    row = "Meta-Critic" if row.endswith("+MC") else row  # the paper does not say on what it ran
    return (
        TABLE1[row].split()[TASKS.index(task)].replace("±", " ± ") if row in TABLE1 and task in TASKS else ""
    )


def score_table(study: Study, runs) -> str:
    """The layout of the paper's Table 1, a row per task and variant."""
    lines = []
    for task, variants in runs.items():
        for key, seeds in variants.items():
            cells = [task, study.variants[key].name, str(len(seeds))]
            cells += [summary(scores(runs, task, key, score)) for score in study.scores]
            lines.append([*cells, paper_score(study.variants[key].paper, task)])
    head = ["task", "", "seeds", *study.scores, "best in the paper"]
    if not any(line[-1] for line in lines):
        head, lines = head[:-1], [line[:-1] for line in lines]
    return markdown(head, lines)


def column_at(name: str) -> tuple[str, int, int]:
    """The column, the first and the last step of "distance at 20,000" or "50,000 to 100,000" (returns)."""
    match = re.fullmatch(r"(?:(.+) at )?([\d,]*\d)(?: to ([\d,]*\d))?", name)
    if not match or (match[1] or "return") not in COLUMNS:
        raise InputError(
            f'--at {name!r} is not like "50,000 to 100,000" or "distance at 20,000" ({", ".join(COLUMNS)})'
        )
    first, last = (int(step.replace(",", "")) for step in (match[2], match[3] or match[2]))
    return COLUMNS[match[1] or "return"], first, last


def mean_at(run, column: str, first: int, last: int) -> float:
    """The mean over the evaluations from one step to another; nan where the run has nothing."""
    there = (run["global_step"] >= first) & (run["global_step"] <= last)
    return run[column][there].mean() if column in run.dtype.names and there.any() else np.nan


def steps_table(study: Study, runs, names: tuple[str, ...]) -> str:
    """Means over seeds of what --at names, a row per task and variant."""
    lines, columns = [], [column_at(name) for name in names]
    for task, variants in runs.items():
        for key, seeds in variants.items():
            means = [np.mean([mean_at(run, *column) for run in seeds.values()]) for column in columns]
            cells = [f"{mean:.2g}" if 0 < abs(mean) < 1 else plain(mean) for mean in means]
            lines.append([task, study.variants[key].name, str(len(seeds)), *cells])
    return markdown(["task", "", "seeds", *names], lines) if names else ""


def compared_with(study: Study, key: str, baseline: str) -> str:
    """The baseline in a variant's own algorithm: DDPG for DDPG+GILD where TD3+GILD is compared with TD3."""
    for other in study.variants:
        if algorithm(study, other) == algorithm(study, key) and role(study, other) == role(study, baseline):
            return other
    return baseline


def difference_table(study: Study, runs, baseline: str) -> str:
    """Paired by seed against the baseline, in the mean over the second half."""
    lines = []
    for task, variants in runs.items():
        for key in variants:
            other = compared_with(study, key, baseline)
            common = sorted(variants[key].keys() & variants.get(other, {}).keys())
            if key == other or not common:
                continue
            a, b = ([SCORES[SECOND_HALF](variants[k][seed]) for seed in common] for k in (key, other))
            gain = np.subtract(a, b)
            interval = f" ± {plain(half_width(gain))}" if len(gain) > 1 else ""
            better = f"{improvement([np.array(a)], [np.array(b)]):.2f}" if len(gain) > 1 else ""
            cells = [task, study.variants[key].name, study.variants[other].name]
            lines.append([*cells, f"{plain(gain.mean())}{interval}", ", ".join(map(plain, gain)), better])
    head = ["task", "", "minus", "difference", "each seed", "probability of improvement"]
    return markdown(head, lines) if lines else ""


def aggregate_table(study: Study, runs, baseline: str) -> str:
    """Over tasks, normalised: interquartile mean and probability of improvement on the baseline."""
    lines, tables = [], normalised(study, runs)
    for key, tasks in tables.items():
        cells = [
            study.variants[key].name,
            f"{np.mean([task.mean() for task in tasks]):.1f}",
            f"{iqm(tasks):.1f}",
        ]
        several = max(map(len, tasks)) > 1
        cells[-1] += " [{:.1f}, {:.1f}]".format(*bootstrap(iqm, tasks)) if several else ""
        if baseline in tables and key != baseline:
            other = tables[baseline]
            cells.append(f"{improvement(tasks, other):.2f}")
            cells[-1] += " [{:.2f}, {:.2f}]".format(*bootstrap(improvement, tasks, other)) if several else ""
        lines.append([*cells, ""][:4])
    versus = f"probability of improvement on {study.variants[baseline].name}"
    return markdown(["", "mean", "interquartile mean", versus], lines) if lines else ""


def has_time(run) -> bool:
    """The oldest results have no wall time, those of a batch have none of their own."""
    return "wall_time" in run.dtype.names and np.isfinite(run["wall_time"][-1])


def time_table(study: Study, runs) -> str:
    """The layout of the paper's Table 3: wall time as a ratio to vanilla on the same tasks."""
    minutes, lines = defaultdict(dict), []  # per 100,000 steps, a mean over seeds, by variant and task
    for key in study.variants:
        for task, variants in runs.items():
            tables = [run for run in variants.get(key, {}).values() if has_time(run)]
            if tables:
                times = [run["wall_time"][-1] / run["global_step"][-1] for run in tables]
                minutes[key][task] = np.mean(times) * 100_000 / 60
    for key, times in minutes.items():
        row, vanilla = study.variants[key].paper, algorithm(study, key)
        base = minutes.get(vanilla, {})
        pairs = [(time, base[task]) for task, time in times.items() if task in base]
        ratio = f"{np.divide(*np.mean(pairs, 0)):.2f}" if pairs else ""
        paper = f"{TABLE3[row] / TABLE3[vanilla.upper()]:.2f}" if ratio and row in TABLE3 else ""
        lines.append([study.variants[key].name, plain(np.mean(list(times.values()))), ratio, paper])
    return (
        markdown(["", "minutes per 100,000 steps", "ratio to vanilla", "ratio in the paper"], lines)
        if lines
        else ""
    )


def meta_loss_table(study: Study, runs) -> str:
    """The layout of the paper's Table 2: a variant with --meta-loss intuitive beside the same one without."""
    flags = {key: " ".join([variant.script, *variant.flags]) for key, variant in study.variants.items()}
    lines = []
    for task, variants in runs.items():
        for intuitive in variants:
            if "--meta-loss intuitive" not in flags[intuitive]:
                continue
            without = flags[intuitive].replace(" --meta-loss intuitive", "")
            gain = next((key for key in variants if flags[key] == without), None)
            cells = [task, study.variants[gain].name if gain else ""]
            for key in (gain, intuitive):
                cells.append(summary(scores(runs, task, key, "best evaluation")) if key else "")
            paper = TABLE2.get(algorithm(study, intuitive)) if task == "Ant" else None
            lines.append([*cells, "{}, {}".format(*paper) if paper else ""])
    head = ["task", "", "meta-loss in Eq. (8)", "intuitive meta-loss", "in the paper (Ant)"]
    return markdown(head, lines) if lines else ""


# FIGURES

COLORS = ["0.45", "tab:orange", "tab:blue", "tab:green", "tab:pink", "tab:red", "tab:purple", "tab:cyan"]
COLORS += ["tab:brown", "black", "tab:olive", "gold"]
matplotlib.rcParams["svg.hashsalt"] = "gild"  # the same figure is the same file


def save_figure(fig, folder: Path, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
    fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(fig)
    return f"{folder.name}/{name}.png"


def role(study: Study, key: str) -> str:
    """A variant's name; with several algorithms RL stands for each, so that like variants have one color."""
    several = len({algorithm(study, other) for other in study.variants}) > 1
    name = study.variants[key].name
    return name.replace(algorithm(study, key).upper(), "RL") if several else name


def colors(study: Study) -> dict[str, str]:
    roles = list(dict.fromkeys(role(study, key) for key in study.variants))
    return {key: COLORS[roles.index(role(study, key)) % len(COLORS)] for key in study.variants}


def line_style(study: Study, key: str) -> str:
    """Algorithms differ in it where they share a panel."""
    algorithms = list(dict.fromkeys(algorithm(study, other) for other in study.variants))
    return ["-", "--", ":", "-."][algorithms.index(algorithm(study, key)) % 4]


def seeds_of(runs) -> str:
    counts = sorted({len(seeds) for variants in runs.values() for seeds in variants.values()})
    if counts == [1]:
        return "one seed"
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seeds"


def demonstrated_return(task: str, algo: str) -> float | None:
    """Of the demonstrations that this algorithm's variants imitate; PPO+IL and LOGO have SAC's."""
    path = ROOT / "demos" / f"{task}-{'sac' if algo == 'ppo' else algo}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file["metadata"])).get("return_mean")


def split(study: Study, keys: list[str]) -> list[list[str]]:
    """The variants of one algorithm in groups of up to six and about the same size, its baseline in each."""
    first = [key for key in keys if key == compared_with(study, key, study.baseline)]
    others = [key for key in keys if key not in first]
    parts = np.array_split(others, max(1, -(-len(others) // 5)))
    return [[*first, *part.tolist()] for part in parts]


def curves(study: Study, runs, folder: Path) -> str:
    """Mean and its 95 % band, each seed thin. A panel per task, algorithm and quantity; several for many."""
    algorithms = list(dict.fromkeys(algorithm(study, key) for key in study.variants))
    cells = []
    for panel, task, algo in product(study.panels, runs, algorithms):
        every = [key for key in study.variants if algorithm(study, key) == algo]
        groups = split(study, [key for key in every if any(key in variants for variants in runs.values())])
        title = f"{task}, {algo.upper()}" if len(algorithms) > 1 else task
        for number, group in enumerate(groups, 1):
            part = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
            if keys := [key for key in group if key in runs[task]]:
                cells.append((panel, number, task, algo, keys, title + part))
    if len(runs) == 3 and len(algorithms) == 1:  # a column per task
        cells.sort(key=lambda cell: (study.panels.index(cell[0]), cell[1]))
    per_panel = len(cells) // len(study.panels)
    columns = -(-per_panel // -(-per_panel // 3)) if per_panel > 1 else min(2, len(cells))  # up to three
    rows = -(-len(cells) // columns)
    size = {"figsize": (9, 1.2 + (2.7 if columns > 1 else 4) * rows), "layout": "constrained"}
    fig, axes = plt.subplots(rows, columns, squeeze=False, **size)
    labels, color = {}, colors(study)
    for axis, (panel, _, task, algo, keys, title) in zip(axes.flat, cells, strict=False):
        for key in keys:
            tables = list(runs[task][key].values())
            if panel not in tables[0].dtype.names:
                continue
            length = min(map(len, tables))
            steps = tables[0]["global_step"][:length] / 1_000
            values = np.array([table[panel][:length] for table in tables])
            (line,) = axis.plot(steps, values.mean(0), color=color[key], linewidth=1.8, zorder=3)
            labels.setdefault(role(study, key), line)
            if len(values) > 1:
                axis.plot(steps, values.T, color=color[key], alpha=0.3, linewidth=0.5)
                rng = np.random.default_rng(0)
                drawn = values[rng.integers(len(values), size=(1_000, len(values)))].mean(1)
                axis.fill_between(
                    steps, *np.percentile(drawn, [2.5, 97.5], 0), color=color[key], alpha=0.12, linewidth=0
                )
        level = demonstrated_return(task, algo) if panel == "return_mean" else None
        if level is not None:
            labels["demonstrations"] = axis.axhline(level, color="black", linestyle=":", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(PANELS[panel])
        axis.set_xlabel("environment steps, in thousands", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(cells) :]:
        axis.remove()
    if "demonstrations" in labels:
        labels["demonstrations"] = labels.pop("demonstrations")  # last
    fig.legend(
        labels.values(), labels, loc="outside lower center", ncols=2 if len(labels) < 9 else 3, fontsize=9
    )
    path = save_figure(fig, folder, study.name)
    caption = f"Thick: mean over {seeds_of(runs)}; thin: each seed; band: 95 % bootstrap interval of the mean"
    caption = "One seed" if seeds_of(runs) == "one seed" else caption
    return f"![{study.name}: learning curves]({path})\n\n*{caption}; dotted: the demonstrations' return.*\n"


def aggregate_figure(study: Study, runs, folder: Path) -> str:
    """Left the layout of the paper's Figure 3, normalised scores; right the performance profile."""
    tables = normalised(study, runs)
    if len(tables) < 2:
        return ""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 1.6 + 0.3 * len(tables)), layout="constrained")
    color = colors(study)
    thresholds = np.linspace(0, max(100, max(max(map(max, tasks)) for tasks in tables.values())), 101)
    for place, (key, tasks) in enumerate(tables.items()):
        value = iqm(tasks)
        left.barh(place, value, color=color[key], height=0.7)
        share = profile(tasks, thresholds)
        right.plot(thresholds, share, color=color[key], linestyle=line_style(study, key), linewidth=1.8)
        if max(map(len, tasks)) > 1:
            low, high = bootstrap(iqm, tasks)
            left.plot([low, high], [place, place], color="black", linewidth=1.5)
            if len(tables) <= 6:  # more bands hide each other
                band = bootstrap(lambda tasks: profile(tasks, thresholds), tasks)
                right.fill_between(thresholds, *band, color=color[key], alpha=0.1, linewidth=0)
    left.set_yticks(range(len(tables)), [study.variants[key].name for key in tables], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("interquartile mean, Expert = 100", fontsize=9)
    right.set_xlabel("normalised score, Expert = 100", fontsize=9)
    right.set_ylabel("share of runs above it", fontsize=9)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    path = save_figure(fig, folder, f"{study.name}-scores")
    seeds = seeds_of({task: {key: variants[key] for key in tables} for task, variants in runs.items()})
    caption = f"{SECOND_HALF.capitalize()}, {', '.join(runs)}, {seeds}"
    lines = "black lines and bands" if len(tables) <= 6 else "black lines"
    caption += "" if seeds == "one seed" else f"; {lines}: 95 % bootstrap intervals"
    return f"![{study.name}: normalised scores]({path})\n\n*{caption}; right in the bars' colors.*\n"


def warm_start_figure(study: Study, runs, folder: Path) -> str:
    """The layout of the paper's Figure 5: the best evaluation against the share of the run with GILD.

    A task with a single share is left out.
    """
    groups = {}  # variants that differ in --ws-frac alone
    for key, variant in study.variants.items():
        if "--ws-frac" in variant.flags:
            at = variant.flags.index("--ws-frac")
            rest = variant.script, *variant.flags[:at], *variant.flags[at + 2 :]
            groups.setdefault(rest, {})[key] = 100 * float(variant.flags[at + 1])
    groups = [group for group in groups.values() if len(group) >= 3]
    runs = {task: v for task, v in runs.items() if any(len(group.keys() & v.keys()) > 1 for group in groups)}
    if not runs:
        return ""
    fig, axes = plt.subplots(
        1, len(runs), figsize=(max(5, 3 * len(runs)), 3), squeeze=False, layout="constrained"
    )
    for axis, (task, variants) in zip(axes[0], runs.items(), strict=True):
        for group in groups:
            keys = sorted((key for key in group if key in variants), key=group.get)
            if not keys:
                continue
            values = [scores(runs, task, key, "best evaluation") for key in keys]
            error = [half_width(v) if len(v) > 2 else 0 for v in values]
            bars = axis.errorbar(
                [group[key] for key in keys],
                [v.mean() for v in values],
                error,
                marker="o",
                capsize=3,
                label=algorithm(study, keys[0]).upper(),
            )
            for key, v in zip(keys, values, strict=True):
                axis.plot([group[key]] * len(v), v, "x", color=bars[0].get_color())
        shares = sorted({share for group in groups for share in group.values()})
        axis.set_xscale("log")
        axis.set_xticks(shares, [f"{share:g}" for share in shares])
        axis.set_xticks([], minor=True)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("iterations with GILD, % of the steps", fontsize=9)
        axis.set_ylabel("best evaluation", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path = save_figure(fig, folder, f"{study.name}-warm-start")
    caption = f"Dots: mean over {seeds_of(runs)}; crosses: each seed"
    caption += "; bars, of three seeds or more: the mean's 95 % interval (t)"
    return f"![{study.name}: warm start]({path})\n\n*{caption}.*\n"


@dataclass
class Args:
    study: tyro.conf.Positional[str]  # a study's name, or its TOML file
    baseline: str | None = None  # the variant to compare the others with; None: the study's
    at: tuple[str, ...] = ()  # another table: "50,000 to 100,000" (returns), "distance at 20,000", and so on
    results: Path = RESULTS  # folder of the results
    figures: Path = ROOT / "benchmark" / "figures"  # folder of the figures


def main(args: Args):
    study = load_study(args.study)
    baseline = args.baseline or study.baseline
    for what, names, allowed in (
        ("variant", [baseline], study.variants),
        ("score", study.scores, SCORES),
        ("panel", study.panels, PANELS),
    ):
        for name in names:
            if name not in allowed:
                raise InputError(f"{study.name} has no {what} {name!r}, only {', '.join(allowed)}")
    runs = load(study, args.results)
    if not runs:
        raise InputError(f"{study.name} has no results yet: python -m benchmark.sweep {args.study}")
    sections = {
        "Mean ± std over seeds [95 % interval of the mean, t; of three seeds or more]": score_table(
            study, runs
        ),
        "Means over seeds": steps_table(study, runs, args.at),
        f"Paired differences by seed, {SECOND_HALF}, ± 95 % interval (t)": difference_table(
            study, runs, baseline
        ),
        f"Over {', '.join(runs)}: {SECOND_HALF}, Expert = 100 [95 % bootstrap]": aggregate_table(
            study, runs, baseline
        ),
        "Meta-loss (the paper's Table 2): best evaluation": meta_loss_table(study, runs),
        "Run time (the paper's Table 3), comparable if each run had a core to itself": time_table(
            study, runs
        ),
        "Learning curves": curves(study, runs, args.figures),
        "Normalised scores (the paper's Figure 3, right)": aggregate_figure(study, runs, args.figures),
        "Warm start (the paper's Figure 5)": warm_start_figure(study, runs, args.figures),
    }
    for title, text in sections.items():
        if text:
            print(f"**{title}**\n\n{text}")


if __name__ == "__main__":
    command_line(main, Args)
