"""The scripts repeat each other on purpose: what several of them have is the same in each, to the letter."""

import ast
import shutil
import tomllib
from difflib import SequenceMatcher
from itertools import combinations

import pytest
from packaging.requirements import Requirement

from tests import copies
from tests.conftest import ALGORITHMS, ROOT

FORMS = "gild_{}.py", "baselines/{}.py", "baselines/{}_il.py"
SCRIPTS = [form.format(algorithm) for form in FORMS for algorithm in ALGORITHMS]
LONGEST = {"gild_ddpg.py": 406, "gild_td3.py": 416, "gild_sac.py": 451}  # lines before PLUMBING


def algorithm_part(script):
    return (ROOT / script).read_text("utf-8").split(copies.START)[0]


def blocks(script):
    """The source of each top-level function, class and constant, by name; a gild script's PLUMBING apart."""
    source = algorithm_part(script)
    found = {}
    for node in ast.parse(source).body:
        name = getattr(node, "name", None) or getattr(getattr(node, "targets", [None])[0], "id", None)
        if name:
            lines = [*getattr(node, "decorator_list", []), node]
            found[name] = [ast.get_source_segment(source, line) for line in lines]
    return found


# the blocks that two scripts share and that differ; every other pair is linked by these
DIFFERENT = {}
for _a in ALGORITHMS:
    _gild, _vanilla, _il = (form.format(_a) for form in FORMS)
    DIFFERENT[_gild, _vanilla] = {"Args", "train", "rl_loss", "actor_gradient"}  # GILD and IL need Q too
    DIFFERENT[_gild, _il] = {"Args", "train", "actor_gradient"}  # IL's has the imitation term
for _form in FORMS:
    _ddpg, _td3, _sac = (_form.format(_a) for _a in ALGORITHMS)
    critics = {"Args", "train", "Critic", "critic_loss", "rl_loss", "meta_loss", "critic_gradient"}
    samples = {"Actor", "act", "il_loss", "actor_gradient", "gild_gradients", "clone"}  # SAC's are stochastic
    DIFFERENT[_ddpg, _td3], DIFFERENT[_td3, _sac] = critics, critics | samples
EVERYWHERE = {"mlp", "gradient", "step", "update_target"}


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_two_scripts_share_is_identical(one, other):
    a, b = blocks(one), blocks(other)
    shared = a.keys() & b.keys()
    assert shared >= EVERYWHERE
    assert {name for name in shared if a[name] != b[name]} == DIFFERENT[one, other] & shared
    if one.startswith("gild") and other.startswith("gild"):
        assert {"GILD", "rl_weight", "fit_imitation"} <= shared - DIFFERENT[one, other]


def arguments(script):
    """The line of each argument, with its default and its help text, by name."""
    lines = algorithm_part(script).splitlines()
    (args,) = (node for node in ast.parse(algorithm_part(script)).body if getattr(node, "name", "") == "Args")
    fields = (node for node in args.body if isinstance(node, ast.AnnAssign))
    return {node.target.id: lines[node.lineno - 1] for node in fields}


# what it is the learning rate of, N also of demonstrations, and where [-1, 1] is first named
REWORDED = {"learning_rate", "batch_size", "exploration_noise"}


def test_arguments_have_one_default_and_one_help_text():
    for one, other in combinations(SCRIPTS, 2):
        a, b = arguments(one), arguments(other)
        shared = a.keys() & b.keys()
        assert len(shared) >= 22
        for name in shared:
            if name in REWORDED:
                assert a[name].split("#")[0] == b[name].split("#")[0], (one, other)
            else:
                assert a[name] == b[name], (one, other)
            assert "#" in a[name]


def test_the_plumbing_of_a_gild_script_is_the_baselines():
    common = (ROOT / "baselines" / "common.py").read_text("utf-8")
    section = common[common.index(copies.START) :]
    assert section.count("\n\n\ndef ") + section.count("\n\n\nclass ") >= 16
    for script in LONGEST:
        text = (ROOT / script).read_text("utf-8")
        assert text.count(copies.START) == 1 and text.endswith('":\n    main(train, Args)\n')
        assert text[text.index(copies.START) : text.index(copies.END)] == section


def test_fix_restores_the_copies(tmp_path, monkeypatch, capsys):
    scripts = [tmp_path / script for script in LONGEST]
    (tmp_path / "baselines").mkdir()
    for name in ("baselines/common.py", *LONGEST):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(copies, "ROOT", tmp_path)
    monkeypatch.setattr(copies, "SCRIPTS", scripts)
    assert copies.main(copies.Args()) == 0 and capsys.readouterr().out == ""
    whole = {path: path.read_text("utf-8") for path in scripts}
    one, _, other = scripts
    one.write_text(whole[one].replace("def evaluate(", "def evaluates(", 1), "utf-8")
    (before, after) = whole[other].split(copies.START)
    other.write_text(before + copies.START + after.replace("received_signals = []\n", "", 1), "utf-8")
    assert copies.main(copies.Args()) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [one.name, other.name]
    copies.main(copies.Args(fix=True))
    assert whole == {path: path.read_text("utf-8") for path in scripts}


@pytest.mark.parametrize("script", LONGEST)
def test_the_algorithm_stays_short(script):
    assert algorithm_part(script).count("\n") <= LONGEST[script]


def test_envs_has_the_scripts_wrapper():
    source = (ROOT / "baselines" / "common.py").read_text("utf-8")
    ours = blocks("envs/sparse.py")
    for name in ("SparseReward", "SPARSE_THRESHOLDS", "InputError"):
        assert ours[name][0] in source, name


def lines_of(script):
    """The lines after the docstring, without the import of baselines.common."""
    source = (ROOT / script).read_text("utf-8")
    docstring, *rest = ast.parse(source).body
    lines = source.splitlines()
    for node in rest:
        if isinstance(node, ast.ImportFrom) and node.module == "baselines.common":
            lines[node.lineno - 1 : node.end_lineno] = []
    return lines[docstring.end_lineno :]


# the lines of a vanilla script that its GILD or IL script has in another form
CHANGED = ["learning_rate: float", "batch_size: int", '"""Eq. (2): L_RL', "return -critic", "loss = rl_loss("]
CHANGED += ["return (alpha * log_prob - q)", "loss, log_prob = rl_loss(", "noise = torch.randn_like("]
CHANGED += ["phi_grad, actor_log = update_actor(", "phi_grad, log_prob, actor_log = update_actor("]
CHANGED += ["if global_step <= args.learning_starts"]
GILD_CHANGED = ["from dataclasses import", "update_critic, update_actor = ", "policy = {"]
IL_CHANGED = ["def actor_gradient(", '"""The gradient of Eq. (2)', "return gradient(loss", 'log = {"losses']


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("larger", ["gild_{}.py", "baselines/{}_il.py"])
def test_a_diff_with_the_vanilla_script_shows_the_method(algorithm, larger):
    """Lines are added, a dozen at most are changed, and PLUMBING is one block."""
    vanilla, script = lines_of(f"baselines/{algorithm}.py"), lines_of(larger.format(algorithm))
    changed, added = [], []
    for kind, start, end, start_2, end_2 in SequenceMatcher(None, vanilla, script, False).get_opcodes():
        changed += vanilla[start:end] if kind in ("replace", "delete") else []
        added += ["\n".join(script[start_2:end_2])] if kind in ("replace", "insert") else []
    changed = [line.strip() for line in changed if line]
    allowed = (*CHANGED, *(GILD_CHANGED if larger.startswith("gild") else IL_CHANGED))
    assert len(changed) <= 12 and all(line.startswith(allowed) for line in changed), changed
    if larger.startswith("gild"):
        common = (ROOT / "baselines" / "common.py").read_text("utf-8")
        assert common[common.index(copies.START) :].strip() in added[-1]
        assert added[-1].count("\n") <= common.count("\n")


def test_the_inline_metadata_admits_the_pinned_versions():
    """`uv run gild_td3.py` reads its packages from the script; requirements.txt pins those of the results."""
    headers = {algorithm_part(script).split("# /// script\n")[1].split("# ///\n")[0] for script in LONGEST}
    (header,) = headers
    ranges = tomllib.loads("\n".join(line.removeprefix("# ") for line in header.splitlines()))["dependencies"]
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {pin.name: pin for pin in (Requirement(line) for line in pins if not line.startswith("#"))}
    for wanted in map(Requirement, ranges):
        (version,) = (specifier.version for specifier in pinned.pop(wanted.name).specifier)
        assert wanted.specifier.contains(version), wanted
    assert not pinned
