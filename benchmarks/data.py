"""How fast preference pairs are read, measured in tokens, de-duplicated and divided, and how much memory that takes.

python benchmarks/data.py --pairs 100000

Prints seconds and peak memory of this package's way, and of the same work done row by row as one would at first: one
call of the tokenizer for each text, and whole texts in a set for the duplicates. Both run in processes of their own,
one after the other; the ratios are of their seconds. Nothing is asserted.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time

from rlhf_lab.data.dataset import Dataset
from rlhf_lab.data.readers import read_table
from rlhf_lab.data.tables import prompt_of
from rlhf_lab.data.templates import Template
from rlhf_lab.engine.tokenizer import load_tokenizer

LIMIT = 512  # tokens, of prompts and of responses
RECURS = 0.05  # share of the rows that are there twice
SHARES = {"train": 0.7, "candidate": 0.1, "safety": 0.1, "held_out": 0.1}


def write(file: Path, pairs: int, tokenizer: str) -> None:
    """Pairs of responses of 20 to 80 words of the tokenizer's vocabulary to prompts of 20, a few of them twice."""
    rng = random.Random(0)
    words = [word for word in load_tokenizer(tokenizer, []).get_vocab() if word.isalpha()]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    with file.open("w") as out:
        for _ in range(pairs):
            line = json.dumps({"prompt": text(20, 20), "chosen": text(20, 80), "rejected": text(20, 80)}) + "\n"
            out.write(line * (2 if rng.random() < RECURS else 1))


def ours(file: Path, template: Template) -> int:
    data = Dataset(
        path=str(file),
        revision=None,
        columns={},
        template="auto",
        max_prompt_tokens=LIMIT,
        max_response_tokens=LIMIT,
        bad_rows="drop",
        on_conflict="drop",
        train_size=None,
        train_split="train",
        eval_splits=None,
        eval_size=10**9,
        hold_out=0.0,
        seed=0,
        shares=SHARES,
        on_overlap="error",
    )
    return sum(len(data.preferences(split, template)) for split in SHARES)


def row_by_row(file: Path, template: Template) -> int:
    """Reads, measures and de-duplicates; it neither divides nor settles contradictions."""
    seen: set[tuple[str, ...]] = set()
    kept = 0
    for row in read_table(file):
        prompt, both = prompt_of(row["prompt"]), (row["chosen"], row["rejected"])
        identity = (prompt.id, *both)
        fits = len(template.prompt_tokens(prompt)) <= LIMIT
        fits = fits and all(len(template.response_tokens(text)) <= LIMIT for text in both)
        kept += fits and identity not in seen
        seen.add(identity)
    return kept


WAYS = {"ours": ours, "row_by_row": row_by_row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--tokenizer", default="embedded:tiny", help="embedded:tiny, a folder, or a hub id")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # one of them, in this process
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        template = Template(load_tokenizer(arguments.tokenizer, []), "auto")
        template.responses_tokens(["warm"])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun, worked = perf_counter(), process_time()
        kept = WAYS[arguments.way](arguments.file, template)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        told = {"kept": kept, "seconds": perf_counter() - begun, "cpu": process_time() - worked}
        print(json.dumps({**told, "peak_mib": peak / 1024, "grown_mib": (peak - before) / 1024}))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        write(file, arguments.pairs, arguments.tokenizer)
        size = file.stat().st_size / 2**20
        print(f"{arguments.pairs:,} pairs and {RECURS:.0%} of them twice, {size:.0f} MiB, {arguments.tokenizer}")
        found = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--file", str(file), "--tokenizer", arguments.tokenizer]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            *progress, last = answer.splitlines()
            found[way] = json.loads(last)
            print(f"  {way:<11}", "  ".join(f"{name} {value:,.1f}" for name, value in found[way].items()))
            if progress:
                print(f"              {len(progress)} lines of progress, the last: {progress[-1].strip()}")
        for what in ("seconds", "cpu"):
            print(f"  row by row takes {found['row_by_row'][what] / found['ours'][what]:.1f} times our {what}")


if __name__ == "__main__":
    main()
