"""What a labeler thinks of a policy's answers: claims that it rejects and accepts per answer, words; with 95 % intervals over images.

    python eval/rejected_claims.py --answers judged/ --output rejected.json

--answers is a folder of data/score_claims.py on greedy answers of data/generate_responses.py: a measure of hallucination on the user's own
images, without a benchmark's ground truth. It compares policies that one labeler judged with one splitter, and is as good as that labeler;
a policy that was trained on the labeler's judgements learns its blind spots, so confirm on a benchmark (eval/chair.py, eval/pope.py).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from muffin.answers import answer_text, first_of, read_rows
from muffin.feedback import NO_CLAIMS
from muffin.hallucination import claim_ratios, estimate, format_table, mean_words
from muffin.provenance import write_atomically


@dataclass
class RejectedClaimsOptions:
    answers: str = field(metadata={"help": "Judged answers: folder of data/score_claims.py."})
    output: str = field(metadata={"help": "JSON file for the result."})


OPTIONS = (RejectedClaimsOptions,)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    rows = read_rows(options.answers, "--answers")
    if missing := sorted({"p_yes", "p_no", "failure"}.difference(rows[0])):
        raise ValueError(f"--answers {options.answers} lacks {', '.join(missing)}; make it with data/score_claims.py")
    judged = [
        row for row in rows if row["failure"] in (None, NO_CLAIMS)
    ]  # an answer without claims is an answer, an image that fails is none
    if not judged:
        raise ValueError(f"--answers {options.answers}: no answer could be judged; the first failed because {rows[0]['failure']}")
    texts = [answer_text(row, "--answers") for row in judged]
    accepted = [
        [p_yes is not None and p_yes > p_no for p_yes, p_no in zip(row["p_yes"] or [], row["p_no"] or [], strict=True)] for row in judged
    ]
    images = [str(first_of(row, ("image_path", "prompt_row"))) for row in judged]
    estimates = estimate(claim_ratios(accepted) | {"words": mean_words(texts)}, images)
    result: dict[str, Any] = {name: each.value for name, each in estimates.items()} | {
        "answers": len(judged),
        "failures": len(rows) - len(judged),
        "claims": sum(map(len, accepted)),
        "intervals_over": f"{len(set(images))} images",
        "intervals": {name: [each.low, each.high] for name, each in estimates.items()},
    }
    print(format_table(f"{len(judged)} answers, {result['claims']} claims, {result['failures']} answers not judged", estimates, 2))
    write_atomically(Path(options.output), (json.dumps(result, indent=1) + "\n").encode())
    return result


if __name__ == "__main__":
    main()
