"""How a judge stands a server that fails and is partial: python benchmarks/judge.py [comparisons, two calls each].

Half way the process that asks is killed. What is printed is said in tests/judges/campaign.py, `Findings`.
"""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.judges.campaign import campaign


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(count, Path(folder))
    for name, value in asdict(found).items():
        print(f"{name:16} {value:.4f}" if isinstance(value, float) else f"{name:16} {value}")
    print(f"{'calls a second':16} {found.calls / found.seconds:.1f}")


if __name__ == "__main__":
    main()
