"""Write the table of what ``make test-faults`` injected and what came of it."""

import argparse
import json
from pathlib import Path

from benchmarks.pairs import conditions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="what the tests have counted, one JSON object a line")
    parser.add_argument("--out", type=Path, required=True, help="the table")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.report.read_text().splitlines()]
    table = ["| row | injections | outcome |", "|---|---|---|"]
    table += [f"| {row['row']} | {row['injections']:,} | {row['outcome']} |" for row in rows]
    head = ["# Faults injected", "", *conditions("make test-faults", ("torch", "accelerate", "safetensors")), ""]
    args.out.write_text("\n".join([*head, *table]) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
