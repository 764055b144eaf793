"""One table out of several runs of train/iterate.py: what README quotes, and what scripts/demo_seeds.sh prints.

    python eval/compare_runs.py --runs outputs/demo-0 outputs/demo-1 outputs/demo-2 --output outputs/seeds.md

Percent of held-out images or claims, before -> after; greedy decoding with 95 % bootstrap intervals over images.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

COLUMNS = {
    "CHAIRs": ("greedy", "chair_s"),
    "CHAIRs, T = 1": ("t1", "chair_s"),
    "CHAIRi": ("greedy", "chair_i"),
    "recall": ("greedy", "recall"),
    "wrong claims": ("greedy", "claim_error"),
    "words": ("greedy", "words"),
}


@dataclass
class CompareOptions:
    runs: list[str] = field(metadata={"help": "Folders of train/iterate.py, each with results.json."})
    output: str | None = field(default=None, metadata={"help": "Markdown file for the table; it is printed in any case."})
    numbers: str | None = field(default=None, metadata={"help": "JSON file for the numbers of all runs, by their names."})


OPTIONS = (CompareOptions,)
KEPT = ("before", "after", "labeler", "pairs", "choice")  # of a run's results: what does not depend on the machine's speed


def main(argv: list[str] | None = None) -> str:
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    table = "\n".join(
        [f"| run | {' | '.join(COLUMNS)} | labeler accuracy / fpr | pairs right / tie / wrong |", "|---" * (len(COLUMNS) + 3) + "|"]
    )
    results = {Path(run).name: read_results(Path(run)) for run in options.runs}
    for name, found in results.items():
        table += "\n" + table_row(name, found)
    if options.numbers:
        kept = {name: {key: found[key] for key in KEPT if key in found} for name, found in results.items()}
        Path(options.numbers).write_text(json.dumps(kept, indent=1) + "\n")
    if options.output:
        Path(options.output).write_text(table + "\n")
    print(table)
    return table


def read_results(run: Path) -> dict[str, Any]:
    """Raises ValueError when the run has not ended."""
    file = run / "results.json"
    if not file.exists():
        raise ValueError(f"--runs {run} has no results.json; run scripts/demo.sh --output_dir {run} to its end")
    return json.loads(file.read_text())


def table_row(name: str, results: dict[str, Any]) -> str:
    cells = [f"{cell(results['before'], *column)} -> {cell(results['after'], *column)}" for column in COLUMNS.values()]
    labeler, pairs = results["labeler"], results["pairs"]
    cells.append(f"{labeler['accuracy']:.1f} / {labeler['fpr']:.1f}")
    cells.append(f"{pairs['right']:.1f} / {pairs['tie']:.1f} / {pairs['wrong']:.1f}")
    return f"| {name} | {' | '.join(cells)} |"


def cell(moment: dict[str, Any], decoding: str, metric: str) -> str:
    low, high = moment[decoding][f"{metric}_interval"]
    return f"{moment[decoding][metric]:.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
