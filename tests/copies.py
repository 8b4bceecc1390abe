"""The gild scripts' PLUMBING is baselines/common.py's, to the letter.

python -m tests.copies          # names the scripts whose copy differs
python -m tests.copies --fix    # rewrites the copies from baselines/common.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
SCRIPTS = [ROOT / f"gild_{algorithm}.py" for algorithm in ("ddpg", "td3", "sac")]
START, END = "# PLUMBING", '\n\nif __name__ == "__main__":'


@dataclass
class Args:
    fix: bool = False  # rewrite the copies that differ


def with_copy(script: str, common: str) -> str:
    """The script's text with the PLUMBING of `common`."""
    before, after = script[: script.index(START)], script[script.index(END) :]
    return before + common[common.index(START) :] + after


def main(args: Args) -> int:
    common = (ROOT / "baselines" / "common.py").read_text("utf-8")
    texts = {path: path.read_text("utf-8") for path in SCRIPTS}
    stale = [path for path, text in texts.items() if with_copy(text, common) != text]
    for path in stale:
        print(
            f"{path.name}: its PLUMBING {'was rewritten' if args.fix else 'differs from baselines/common.py'}"
        )
        if args.fix:
            path.write_text(with_copy(texts[path], common), "utf-8")
    return 0 if args.fix else len(stale)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
