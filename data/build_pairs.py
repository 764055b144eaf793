"""Build preference pairs from judged answers: of two answers to a prompt, the one with fewer rejected claims is chosen.

    python data/build_pairs.py --data_path judged/ --output_dir pairs/

Next: eval/muffin_inference_logp.py on the output, which is an ordinary preference data set. Takes seconds and needs no model.

Output: pairs.parquet, all columns of the prompt with chosen and rejected, and for either side answer_number, claims, p_yes, p_no, score
(chosen_claims, rejected_claims, ...); statistics.json, what is printed.
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import HfArgumentParser

from muffin.feedback import FEEDBACK_FEATURES
from muffin.generation import ANSWER_FEATURES
from muffin.pair_selection import ScoredAnswer, balance_lengths, candidate_pairs, cap_pairs, mean_lengths
from muffin.pairs import REFERENCE_COLUMNS, load_prompts, normal_columns, parse_column_map
from muffin.provenance import write_atomically
from muffin.shards import with_columns, write_table

SIDE_FEATURES = {"answer_number": ANSWER_FEATURES["answer_number"]} | {
    name: FEEDBACK_FEATURES[name] for name in ("claims", "p_yes", "p_no", "score")
}
PAIR_FEATURES = datasets.Features(
    {"chosen": datasets.Value("string"), "rejected": datasets.Value("string")}
    | {f"{side}_{name}": feature for side in ("chosen", "rejected") for name, feature in SIDE_FEATURES.items()}
)
# Columns about single answers, and log-probs of pairs that these are not.
DROPPED = {*ANSWER_FEATURES, *FEEDBACK_FEATURES, *REFERENCE_COLUMNS, "logps", "logps_key"}


@dataclass
class PairOptions:
    data_path: str = field(metadata={"help": "Judged answers: folder of data/score_claims.py."})
    output_dir: str = field(metadata={"help": "Folder for pairs.parquet; that of an earlier run is replaced."})
    min_score_gap: int = field(default=1, metadata={"help": "Least difference in rejected claims that makes a pair, usually 1 to 3."})
    max_pairs_per_prompt: int = field(default=2, metadata={"help": "Pairs drawn per prompt, usually 1 to 10; RLAIF-V takes 2."})
    balance_lengths: bool = field(
        default=True, metadata={"help": "Leave out pairs with a much shorter chosen answer until mean lengths are as alike as they get."}
    )
    seed: int = field(default=0, metadata={"help": "Of the draw of pairs."})
    column_map: str = field(default="", metadata={"help": "Own column names, which get muffin's in the output: question=prompt."})

    def __post_init__(self) -> None:
        if self.max_pairs_per_prompt < 1:
            raise ValueError(f"--max_pairs_per_prompt {self.max_pairs_per_prompt} must be at least 1")


OPTIONS = (PairOptions,)


@dataclass(frozen=True)
class RowPair:
    """A pair by the rows of its answers in the judged data."""

    chosen_row: int
    rejected_row: int
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PairStatistics:
    """What became of the answers.

    judged: answers with a score, of `scores`; truncated: of those, cut at the token limit. different: combinations of two different answers
    to a prompt; candidates: of those, with enough score gap (the rest are ties); capped: after --max_pairs_per_prompt; pairs: after the
    length balance. Words are means per answer, shares in percent of the pairs; gaps: pairs by score gap.
    """

    prompts: int
    prompts_with_pairs: int
    answers: int
    judged: int
    truncated: int
    different: int
    candidates: int
    capped: int
    pairs: int
    words_before_balance: tuple[float, float]
    words: tuple[float, float]
    share_chosen_shorter: float
    share_chosen_longer: float
    scores: dict[int, int]
    gaps: dict[int, int]


def main(argv: list[str] | None = None) -> PairStatistics:
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    column_map = parse_column_map(options.column_map)
    judged = load_prompts(options.data_path, column_map=column_map).table
    needed = {*ANSWER_FEATURES, *FEEDBACK_FEATURES}
    if missing := sorted(needed.difference(judged.column_names)):
        raise ValueError(f"--data_path {options.data_path} lacks {', '.join(missing)}; make it with data/score_claims.py")
    answers = judged.select_columns(sorted(needed)).to_list()
    prompts: dict[int, list[int]] = {}
    for row in sorted(range(len(answers)), key=lambda row: (answers[row]["prompt_row"], answers[row]["answer_number"])):
        prompts.setdefault(answers[row]["prompt_row"], []).append(row)

    candidates = {prompt: pairs_of(answers, rows, options.min_score_gap) for prompt, rows in prompts.items()}
    capped = [pair for prompt, found in candidates.items() for pair in cap_pairs(found, options.max_pairs_per_prompt, options.seed, prompt)]
    pairs = balance_lengths(capped) if options.balance_lengths else capped
    if not pairs:
        raise ValueError(
            f"{len(answers)} answers to {len(prompts)} prompts gave no pair with --min_score_gap {options.min_score_gap}; "
            "look at the columns score and failure, lower --min_score_gap, or generate with more --num_answers or --temperature"
        )
    statistics = describe(answers, prompts, sum(map(len, candidates.values())), capped, pairs)

    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    table = normal_columns(judged.remove_columns(sorted(DROPPED.intersection(judged.column_names))), column_map)
    columns = {name: [value(answers, pair, name) for pair in pairs] for name in PAIR_FEATURES}
    write_table(with_columns(table, [pair.chosen_row for pair in pairs], PAIR_FEATURES, columns), output_dir / "pairs.parquet")
    write_atomically(output_dir / "statistics.json", (json.dumps(asdict(statistics), indent=1) + "\n").encode())
    print(report(statistics, output_dir))
    return statistics


def pairs_of(answers: list[dict[str, Any]], rows: list[int], min_score_gap: int) -> list[RowPair]:
    """The candidates among a prompt's answers, which are `rows` of `answers`."""
    scored = [ScoredAnswer(answers[row]["answer"] or "", answers[row]["score"]) for row in rows]
    found = candidate_pairs(scored, min_score_gap)
    return [RowPair(rows[pair.chosen_number], rows[pair.rejected_number], pair.chosen, pair.rejected) for pair in found]


def value(answers: list[dict[str, Any]], pair: RowPair, name: str) -> Any:
    """The value of one of PAIR_FEATURES."""
    side, _, column = name.partition("_")
    row = pair.chosen_row if side == "chosen" else pair.rejected_row
    return answers[row][column or "answer"]


def describe(
    answers: list[dict[str, Any]], prompts: dict[int, list[int]], candidates: int, capped: list[RowPair], pairs: list[RowPair]
) -> PairStatistics:
    judged = [answer for answer in answers if answer["score"] is not None]
    texts = {
        prompt: {answers[row]["answer"].strip() for row in rows if answers[row]["score"] is not None} for prompt, rows in prompts.items()
    }
    longer = [len(pair.chosen.split()) - len(pair.rejected.split()) for pair in pairs]
    gaps = Counter(answers[pair.chosen_row]["score"] - answers[pair.rejected_row]["score"] for pair in pairs)
    return PairStatistics(
        prompts=len(prompts),
        prompts_with_pairs=len({answers[pair.chosen_row]["prompt_row"] for pair in pairs}),
        answers=len(answers),
        judged=len(judged),
        truncated=sum(bool(answer["truncated"]) for answer in judged),
        different=sum(math.comb(len(distinct), 2) for distinct in texts.values()),
        candidates=candidates,
        capped=len(capped),
        pairs=len(pairs),
        words_before_balance=mean_lengths(capped),
        words=mean_lengths(pairs),
        share_chosen_shorter=100 * sum(words < 0 for words in longer) / len(pairs),
        share_chosen_longer=100 * sum(words > 0 for words in longer) / len(pairs),
        scores=dict(sorted(Counter(answer["score"] for answer in judged).items(), reverse=True)),
        gaps=dict(sorted(gaps.items())),
    )


def report(found: PairStatistics, output_dir: Path) -> str:
    tied = 100 * (1 - found.candidates / found.different)
    lines = [
        f"{found.pairs} pairs for {found.prompts_with_pairs} of {found.prompts} prompts in {output_dir}",
        f"answers: {found.answers}, judged {found.judged}, of those truncated {found.truncated}",
        f"combinations of different answers: {found.different}, tied {tied:.1f} %, candidates {found.candidates}, "
        f"after the cap {found.capped}, after the length balance {found.pairs}",
        "mean words, chosen / rejected: {:.1f} / {:.1f} before the balance, {:.1f} / {:.1f} after".format(
            *found.words_before_balance, *found.words
        ),
        f"chosen is shorter in {found.share_chosen_shorter:.1f} %, longer in {found.share_chosen_longer:.1f} % of the pairs",
        f"score gaps: {', '.join(f'{gap} x {count}' for gap, count in found.gaps.items())}",
        "answers by score:",
    ]
    most = max(found.scores.values())
    lines += [f"{score:>6} {count:>7} {'#' * math.ceil(40 * count / most)}" for score, count in found.scores.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
