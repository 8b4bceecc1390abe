"""The scripts repeat each other on purpose: what is the same in several of them is the same to the letter."""

import ast
import tomllib
from difflib import SequenceMatcher
from itertools import combinations

import pytest
from packaging.requirements import Requirement

from tests.conftest import ALGORITHMS, ROOT

SCRIPTS = [f"gild_{a}.py" for a in ALGORITHMS]
SCRIPTS += [f"baselines/{a}{il}.py" for a in ALGORITHMS for il in ("", "_il")]
# what no algorithm has in a version of its own
COMMON = {"InputError", "SPARSE_THRESHOLDS", "SparseReward", "task_name", "make_env", "ReplayBuffer", "mlp"}
COMMON |= {"DemonstrationBuffer", "GILD", "rl_weight", "gradient", "step", "fit_imitation", "evaluate"}
COMMON |= {"save_policy", "make_run_dir", "can_compile", "cuda_graphs"}


def blocks(script):
    """The source of each top-level function, class and constant, by name."""
    source = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(source).body:
        name = getattr(node, "name", None) or getattr(getattr(node, "targets", [None])[0], "id", None)
        if name:
            found[name] = ast.get_source_segment(source, node)
    return found


def algorithm_of(script):
    return script.removesuffix(".py").removeprefix("gild_").removeprefix("baselines/").removesuffix("_il")


@pytest.mark.parametrize(("one", "other"), list(combinations(SCRIPTS, 2)))
def test_shared_blocks_are_identical(one, other):
    a, b = blocks(one), blocks(other)
    shared = COMMON.copy()
    if algorithm_of(one) == algorithm_of(other):
        shared |= set(a) - {"Args", "train"}
        if algorithm_of(one) == "sac":
            shared -= {"Actor"}  # the inverse of the squashing is GILD's and IL's
        if one.endswith("_il.py") != other.endswith("_il.py"):
            shared -= {"actor_gradients"}  # IL's has the imitation term
    assert "make_env" in a and "evaluate" in b
    for name in shared & set(a) & set(b):
        assert a[name] == b[name], name


def test_envs_has_the_scripts_wrapper():
    ours, theirs = blocks("envs/sparse.py"), blocks("gild_td3.py")
    for name in ("SparseReward", "SPARSE_THRESHOLDS"):
        assert ours[name] == theirs[name]


def body(script):
    """The code lines after the docstring, without indentation and comments."""
    source = (ROOT / script).read_text()
    docstring = ast.parse(source).body[0]
    lines = source.splitlines()[docstring.end_lineno :]
    return [line for line in (line.split("  # ")[0].strip() for line in lines) if line]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("larger", ["gild_{}.py", "baselines/{}_il.py"])
def test_a_baseline_is_its_gild_script_without_gild(algorithm, larger):
    """Taken from the vanilla script to the GILD or IL script, lines are added and next to none is changed."""
    vanilla, script = body(f"baselines/{algorithm}.py"), body(larger.format(algorithm))
    changed = []
    for kind, start, end, _, _ in SequenceMatcher(None, vanilla, script, autojunk=False).get_opcodes():
        if kind in ("replace", "delete"):
            changed += vanilla[start:end]
    allowed = [f'exp_name: str = "{algorithm}"', "def learn("]  # a name, and an iteration's batches
    if larger.endswith("_il.py"):  # the actor's gradient: its arguments, equation, loss and log
        allowed += ["def actor_gradients(", '"""The gradient of Eq. (2)', "loss = rl_loss(", "phi_grad, "]
        allowed += ["loss, log_prob = rl_loss(", 'log = {"losses/actor_loss": loss.detach()}']
    allowed = tuple(allowed)
    assert all(line.startswith(allowed) for line in changed), changed
    assert len(script) > len(vanilla)


def test_the_inline_metadata_admits_the_pinned_versions():
    """`uv run gild_td3.py` reads its packages from the script; requirements.txt pins those of the results."""
    headers = {
        (ROOT / script).read_text().split('"""')[0] for script in SCRIPTS if script.startswith("gild_")
    }
    (header,) = headers
    lines = [line.removeprefix("# ") for line in header.splitlines()]
    assert lines[0] == "/// script" and lines[-1] == "///"
    ranges = tomllib.loads("\n".join(lines[1:-1]))["dependencies"]
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {pin.name: pin for pin in (Requirement(line) for line in pins if not line.startswith("#"))}
    for wanted in map(Requirement, ranges):
        (version,) = (specifier.version for specifier in pinned.pop(wanted.name).specifier)
        assert wanted.specifier.contains(version), wanted
    assert not pinned
