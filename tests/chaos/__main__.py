"""Kill runs at random moments and say how many of the kills lost nothing.

python -m tests.chaos                                        20 kills of each family
python -m tests.chaos --family "best of n" --chain 3         one chain of kills again
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.doom import forget_library
from tests.chaos.families import FAMILIES
from tests.chaos.harness import MOST_KILLS, Chain, Trial


def chains(trial: Trial, kills: int, seed: int, only: int | None) -> list[Chain]:
    """Chains until there were `kills` kills, or the one that is asked for; the first also builds its artifacts."""
    done: list[Chain] = []
    number = 0 if only is None else only
    while (left := kills - sum(len(chain.kills) for chain in done)) > 0:
        most = min(left, MOST_KILLS)
        moments = trial.drawn(number, seed, most=most, from_nothing=number == 0)
        done.append(trial.chain(number, moments, from_nothing=number == 0))
        if only is not None:
            break
        number += 1
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="only these (default: all)")
    parser.add_argument("--kills", type=int, default=20, help="of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", type=int, help="only this one")
    parser.add_argument("--folder", type=Path, help="where to run; what was lost stays there to be looked at")
    typed = parser.parse_args()
    work = typed.folder or Path(tempfile.mkdtemp(prefix="chaos"))
    rows: list[tuple[str, int, int]] = []
    for family in typed.family or FAMILIES:
        folder = work.resolve() / family.replace(" ", "_")
        trial = Trial(
            folder, FAMILIES[family], artifacts=None, say=lambda line, f=family: print(f"{f}: {line}", flush=True)
        )
        if trouble := trial.control():
            print(f"{family}: differs from itself even undisturbed: {'; '.join(trouble)}")
        done = chains(trial, typed.kills, typed.seed, typed.chain)
        rows.append((family, sum(chain.survived for chain in done), sum(len(chain.kills) for chain in done)))
    forget_library()
    print("\n| family | kills survived / kills |\n| --- | --- |")
    for family, survived, kills in rows:
        print(f"| {family} | {survived} / {kills} |")
    survived, kills = sum(row[1] for row in rows), sum(row[2] for row in rows)
    print(f"| all | {survived} / {kills} |")
    if survived < kills:
        print(f"what was lost is in {work}")
    return int(survived < kills)


if __name__ == "__main__":
    sys.exit(main())
