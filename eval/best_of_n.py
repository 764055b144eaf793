"""Best of N: what is gained by drawing N answers and keeping the one with the highest DPO reward.

    python eval/best_of_n.py --model_name_or_path aligned/ --reference_name_or_path llava-hf/llava-1.5-7b-hf --data_path answers/ \\
        --output_dir best_of_n/

Candidates: data/generate_responses.py --num_answers 32 --temperature 1, by the reference, the policy or any other model. Try both: the
reward picks well among answers of the reference, whose mistakes it was trained against; among the policy's own it may pick what only
looks good (over-optimisation). Each is scored with beta * log(pi/pi_ref), all candidates of a prompt in one shared-prefix row. For N = 1,
2, 4 ... 32 the curves are exact expectations over all draws of N of the candidates: by reward (sum, and mean over tokens), by the
policy's mean log-prob, at random, and by an oracle where the truth is known (column `scene` of shapeworld, or --truth_column). 95 %
intervals are over images.

Output: best_of_n.json, best_of_n.png, rewards.parquet (every candidate with its rewards, without its image) and selected.parquet (the best
candidate of each prompt by --select, in the form that eval/chair.py, eval/pope.py and eval/amber.py read as --answers).
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from muffin import figures
from muffin.generation import ANSWER_FEATURES
from muffin.hallucination import Estimate, Ratio, divide, mean_words, percentile_interval, resample_sums, sum_per_image
from muffin.inspection import best_of_n_table
from muffin.pairs import PromptDataset, load_prompts, parse_column_map
from muffin.policies import EncodedResponses, PolicyAdapter, PolicyOptions
from muffin.provenance import write_atomically
from muffin.reward import AnswerReward, RewardModel, load_reward_model, selection_weights
from muffin.scoring import batch_by_tokens
from muffin.shapeworld.claims import answer_ratios
from muffin.shapeworld.scenes import Scene
from muffin.shards import WorkStream, with_columns, write_table

logger = logging.getLogger(__name__)

REWARD_FEATURES = datasets.Features(
    {name: datasets.Value("float64") for name in ("reward_sum", "reward_mean", "policy_mean_logp")} | {"tokens": datasets.Value("int64")}
)
RANDOM, ORACLE = "random", "oracle"


@dataclass
class BestOfNOptions:
    model_name_or_path: str = field(metadata={"help": "Trained policy: folder or hub id of a model, or folder of a LoRA adapter."})
    data_path: str = field(metadata={"help": "Candidates: folder of data/generate_responses.py, several answers per prompt."})
    output_dir: str = field(metadata={"help": "Folder for the results; those of an earlier run are replaced."})
    reference_name_or_path: str | None = field(
        default=None, metadata={"help": "What the policy was trained from; default: the base model of a LoRA adapter."}
    )
    dpo_beta: float = field(default=0.1, metadata={"help": "Scale of the reward, usually 0.1; it changes no choice."})
    truth_column: str | None = field(
        default=None, metadata={"help": "Column of numbers that say how good a candidate is (more is better), such as score."}
    )
    select: Literal["reward_mean", "reward_sum", "policy_mean_logp"] = field(
        default="reward_mean", metadata={"help": "What the answers of selected.parquet are the best by."}
    )
    max_n: int = field(default=32, metadata={"help": "Largest N, at most the number of candidates per prompt."})
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        default="auto", metadata={"help": "Precision of weights and arithmetic; auto is bfloat16 where the hardware computes in it."}
    )
    batch_tokens: int = field(default=8192, metadata={"help": "Tokens of one forward, usually 2048 to 32768; a larger prompt still runs."})
    column_map: str = field(default="", metadata={"help": "Own column names: question=prompt,image=picture."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths in the data start from; default: the data's."})
    num_workers: int = field(default=4, metadata={"help": "Processes that decode and encode images; 0 to 16."})

    def __post_init__(self) -> None:
        if self.max_n < 1 or self.batch_tokens < 1 or self.num_workers < 0:
            raise ValueError(
                f"--max_n {self.max_n} and --batch_tokens {self.batch_tokens} must be at least 1, "
                f"--num_workers {self.num_workers} at least 0"
            )


OPTIONS = (PolicyOptions, BestOfNOptions)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    policy_options, options = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    candidates = load_prompts(options.data_path, column_map=parse_column_map(options.column_map), image_root=options.image_root)
    prompts, unanswered = rows_of_prompts(candidates.table, options.data_path)
    truth = truth_of(candidates.table, options.truth_column)
    model = load_reward_model(
        options.model_name_or_path,
        options.reference_name_or_path,
        beta=options.dpo_beta,
        dtype=options.dtype,
        options=policy_options,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    scored, refused = score_prompts(model, candidates, prompts, options)

    rows = [row for prompt in scored for row in prompt.rows]
    images = [prompt.image for prompt in scored for _ in prompt.rows]
    rewards = [reward for prompt in scored for reward in prompt.rewards]
    columns = {
        "reward_sum": [reward.sum for reward in rewards],
        "reward_mean": [reward.mean for reward in rewards],
        "policy_mean_logp": [reward.policy_mean_logp for reward in rewards],
        "tokens": [len(reward.per_token) for reward in rewards],
    }
    sizes = [len(prompt.rows) for prompt in scored]
    numbers = [n for n in (2**power for power in range(options.max_n.bit_length())) if n <= min(options.max_n, *sizes)]
    scores = {name: columns[name] for name in ("reward_mean", "reward_sum", "policy_mean_logp")} | {RANDOM: [0.0] * len(rows)}
    if truth.scores is not None:
        scores[ORACLE] = [truth.scores[row] for row in rows]
    metrics = {name: Ratio(ratio.numerators[rows], ratio.denominators[rows], ratio.scale) for name, ratio in truth.metrics.items()}
    curves, gains = draw_curves(scores, metrics, sizes, numbers, images)

    result = {
        "n": numbers,
        "prompts": len(scored),
        "prompts_left_out": {"without answers": unanswered, "that cannot be encoded": len(refused)},
        "candidates_per_prompt": sorted(set(sizes)),
        "beta": options.dpo_beta,
        "intervals_over": f"{len(set(images))} images",
        "curves": {
            name: {metric: [vars(estimate) for estimate in line] for metric, line in lines.items()} for name, lines in curves.items()
        },
        f"gain_over_random_at_{numbers[-1]}": {
            name: {metric: vars(estimate) for metric, estimate in gain.items()} for name, gain in gains.items()
        },
    }
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(output_dir / "best_of_n.json", (json.dumps(result, indent=1) + "\n").encode())
    title = f"{len(scored)} prompts, {len(rows)} candidates"
    figures.best_of_n(best_of_n_table(result), f"best of N: {title}").savefig(output_dir / "best_of_n.png", dpi=120)
    write_rewards(candidates, rows, columns, sizes, options, output_dir)
    print(table_of(curves, numbers, title))
    return result


def rows_of_prompts(table: datasets.Dataset, data_path: str) -> tuple[list[list[int]], int]:
    """Rows of the candidates of each prompt, in order, and the number of prompts without any."""
    missing = sorted(set(ANSWER_FEATURES).difference(table.column_names))
    if missing:
        raise ValueError(f"--data_path {data_path} lacks {', '.join(missing)}; make it with data/generate_responses.py")
    prompts: dict[int, list[tuple[int, int]]] = {}
    for row, answer in enumerate(table.select_columns(["prompt_row", "answer_number", "failure"])):
        found = prompts.setdefault(answer["prompt_row"], [])
        if answer["failure"] is None:
            found.append((answer["answer_number"], row))
    answered = [[row for _, row in sorted(prompts[prompt])] for prompt in sorted(prompts) if prompts[prompt]]
    if not answered:
        raise ValueError(f"--data_path {data_path} holds no answers")
    return answered, len(prompts) - len(answered)


@dataclass(frozen=True)
class Truth:
    """What is known about all candidates. metrics: name -> counts; scores: what the oracle prefers the highest of; None if nothing is."""

    metrics: dict[str, Ratio]
    scores: list[float] | None


def truth_of(table: datasets.Dataset, column: str | None) -> Truth:
    """Of --truth_column, else of shapeworld's scenes: fewest wrong claims, then most of the objects. Words are always counted."""
    answers = [answer or "" for answer in table["answer"]]
    if column is not None:
        if column not in table.column_names:
            raise ValueError(f"--truth_column {column}: found the columns {', '.join(table.column_names)}")
        answered = [failure is None for failure in table["failure"]]
        unknown = [row for row, value in enumerate(table[column]) if answered[row] and not isinstance(value, int | float)]
        if unknown:
            raise ValueError(f"--truth_column {column}: row {unknown[0]} holds {table[column][unknown[0]]!r}, want a number in every row")
        scores = [float(value) if known else 0.0 for value, known in zip(table[column], answered, strict=True)]
        return Truth({column: Ratio(np.array(scores), np.ones(len(scores)), scale=1.0), "words": mean_words(answers)}, scores)
    if "scene" not in table.column_names:
        return Truth({"words": mean_words(answers)}, None)
    ratios = answer_ratios(answers, [Scene.from_json(scene) for scene in table["scene"]])
    recall = divide(ratios["recall"].numerators, ratios["recall"].denominators)
    return Truth(ratios, (recall / 2 - ratios["claim_error"].numerators).tolist())


# --- rewards


@dataclass(frozen=True)
class EncodedPrompt:
    """The candidates of a prompt, ready for packing; the reason in place of the tokens when they cannot be encoded."""

    rows: list[int]
    encoded: EncodedResponses | None
    reason: str = ""


@dataclass(frozen=True)
class ScoredPrompt:
    """image: equal for equal images."""

    rows: list[int]
    image: str
    rewards: list[AnswerReward]


@dataclass(frozen=True)
class CandidateEncoder:
    """Rows of a prompt -> EncodedPrompt, in worker processes."""

    candidates: PromptDataset
    adapter: PolicyAdapter

    def __call__(self, rows: list[int]) -> EncodedPrompt:
        try:
            prompt = self.candidates[rows[0]]
            answers = self.candidates.table.select(rows)["answer"][:]
            return EncodedPrompt(rows, self.adapter.encode(prompt.image, prompt.question, answers))
        except ValueError as error:
            return EncodedPrompt(rows, None, str(error))


def score_prompts(
    model: RewardModel, candidates: PromptDataset, prompts: list[list[int]], options: BestOfNOptions
) -> tuple[list[ScoredPrompt], list[EncodedPrompt]]:
    """All prompts with rewards, in order, and those that cannot be encoded. Raises ValueError when that is all of them."""
    stream = WorkStream(CandidateEncoder(candidates, model.adapter), options.num_workers)
    refused: list[EncodedPrompt] = []

    def usable() -> Iterator[EncodedPrompt]:
        for prompt in stream.results(prompts):
            if prompt.encoded is None:
                refused.append(prompt)
            else:
                yield prompt

    scored = []
    with tqdm(total=len(prompts), desc="scoring", unit="prompt") as progress:
        for batch in batch_by_tokens(usable(), options.batch_tokens, model.adapter):
            rewards = model.score([prompt.encoded for prompt in batch])
            scored += [ScoredPrompt(p.rows, p.encoded.vision_key, found) for p, found in zip(batch, rewards, strict=True)]
            progress.update(len(batch))
    if refused:
        logger.warning("%d prompts cannot be encoded, the first (row %d) because %s", len(refused), refused[0].rows[0], refused[0].reason)
    if not scored:
        raise ValueError(f"no prompt can be encoded; the first because {refused[0].reason}")
    return scored, refused


# --- curves

Lines = dict[str, dict[str, list[Estimate]]]


def draw_curves(
    scores: dict[str, list[float]], metrics: dict[str, Ratio], sizes: Sequence[int], numbers: Sequence[int], images: Sequence[str]
) -> tuple[Lines, dict[str, dict[str, Estimate]]]:
    """{selector: {metric: an estimate per N}}, and the gains over the random choice at the largest N, paired over images.

    scores: selector -> what it prefers the highest of, per candidate; sizes: candidates of each prompt, in a row; images: per candidate.
    """
    keys, columns = [], []
    for selector, values in scores.items():
        for n in numbers:
            weights = np.array(expected_choices(values, sizes, n))
            for metric, ratio in metrics.items():
                keys.append((selector, n, metric))
                columns += [weights * ratio.numerators, weights * ratio.denominators]
    per_image = sum_per_image(np.stack(columns, axis=1), images)
    scales = np.array([metrics[metric].scale for _, _, metric in keys])
    points = dict(zip(keys, values_of(per_image.sum(axis=0), scales), strict=True))
    resampled = dict(zip(keys, values_of(resample_sums(per_image), scales).T, strict=True))

    def difference(selector: str, metric: str) -> Estimate:
        this, other = (selector, numbers[-1], metric), (RANDOM, numbers[-1], metric)
        return Estimate(float(points[this] - points[other]), *percentile_interval(resampled[this] - resampled[other]))

    curves = {
        selector: {
            metric: [Estimate(float(points[selector, n, metric]), *percentile_interval(resampled[selector, n, metric])) for n in numbers]
            for metric in metrics
        }
        for selector in scores
    }
    return curves, {selector: {metric: difference(selector, metric) for metric in metrics} for selector in scores if selector != RANDOM}


def expected_choices(scores: Sequence[float], sizes: Sequence[int], n: int) -> list[float]:
    """`selection_weights` of each prompt's candidates, in a row."""
    weights: list[float] = []
    for size in sizes:
        weights += selection_weights(scores[len(weights) : len(weights) + size], n)
    return weights


def values_of(sums: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(..., 2 M) sums, numerators and denominators in turn -> (..., M) ratios."""
    return scales * divide(sums[..., 0::2], sums[..., 1::2])


def table_of(curves: Lines, numbers: Sequence[int], title: str) -> str:
    lines = [f"best of N: {title}; expected value, 95 % interval at N = {numbers[-1]}"]
    for metric in curves[RANDOM]:
        lines.append(f"{metric:<18}" + "".join(f"{f'N={n}':>9}" for n in numbers))
        for selector, by_metric in curves.items():
            last = by_metric[metric][-1]
            values = "".join(f"{estimate.value:9.2f}" for estimate in by_metric[metric])
            lines.append(f"  {selector:<16}{values}   [{last.low:.2f}, {last.high:.2f}]")
    return "\n".join(lines)


def write_rewards(
    candidates: PromptDataset,
    rows: list[int],
    columns: dict[str, list[Any]],
    sizes: Sequence[int],
    options: BestOfNOptions,
    output_dir: Path,
) -> None:
    """rewards.parquet and selected.parquet."""
    image = parse_column_map(options.column_map).get("image", "image")
    without_image = candidates.table.remove_columns([image] if image in candidates.table.column_names else [])
    write_table(with_columns(without_image, rows, REWARD_FEATURES, columns), output_dir / "rewards.parquet")
    best, start = [], 0
    for size in sizes:
        best.append(max(range(start, start + size), key=lambda number: columns[options.select][number]))
        start += size
    chosen = {name: [values[number] for number in best] for name, values in columns.items()}
    table = with_columns(candidates.table, [rows[number] for number in best], REWARD_FEATURES, chosen)
    write_table(table, output_dir / "selected.parquet")


if __name__ == "__main__":
    main()
