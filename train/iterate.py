"""The whole RLAIF-V loop in one command: answers, claims, feedback, pairs, reference log-probs, DPO, evaluation, choice of a checkpoint;
N rounds, each from the policy of the one before (arXiv:2405.17220, section 3).

    python train/iterate.py --model_name_or_path llava-hf/llava-1.5-7b-hf --labeler_name_or_path llava-hf/llava-1.5-13b-hf \
        --data_path prompts.parquet --output_dir runs/rlaifv

Every stage is one of the recipes that can be run by itself, in a process of its own, with the flags that the manifest shows. Defaults are
the paper's settings; --generation_flags and its like give other flags to a stage's recipe and win over what this command passes (paths in
them count from the repository's folder). --world runs the same loop in the tiny image world, whose policy and labeler are trained from
nothing first (kept in --cache_dir).
Killed: the same command again; finished stages are not repeated and recipes go on where they were.

Output: report.html (eval/report.py); results.json (before, after-1, ..., after; the chosen checkpoints; seconds); manifest.json (every
stage: command, seconds, hashes of its files); prompts/ (own data, divided); evaluation-N/ (of the policy after round N; 0 is the start);
and per round round-N/answers, judged, pairs, scored, policy, choice, merged and manifest.json, in the last one also rescored/: pairs that
the trained policy scored again. In the tiny world before-after.png as well.
"""

import json
import logging
import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from muffin.checkpoint_choice import LABELER, MEASURES, choose, doubt, read_measured
from muffin.checkpoints import complete_checkpoints
from muffin.policies import PolicyOptions
from muffin.provenance import read_reference, reference_id, write_atomically
from muffin.shapeworld.cold_start import LEAST_ROUNDS, ColdStartOptions, Images, cold_start
from muffin.stages import Ledger, Stage, check_flags

logger = logging.getLogger("train.iterate")

ROOT = Path(__file__).resolve().parents[1]
REPORT = "report"
GREEDY = ("--num_answers", "1", "--temperature", "0")
SAMPLED = ("--num_answers", "2", "--temperature", "1")
WORLD_METRICS = {"chair_s": "CHAIRs", "chair_i": "CHAIRi", "recall": "recall", "claim_error": "wrong claims", "words": "words"}
OWN_METRICS = {
    "rejected_share": "% of claims rejected",
    "rejected_claims": "rejected per answer",
    "accepted_claims": "accepted per answer",
    "words": "words",
}
FLAGS = {  # option -> the recipe that it is for
    "generation_flags": "data/generate_responses.py",
    "labeling_flags": "data/score_claims.py",
    "pair_flags": "data/build_pairs.py",
    "scoring_flags": "eval/muffin_inference_logp.py",
    "training_flags": "train/dpo.py",
    "evaluation_flags": "data/generate_responses.py",
    "benchmark_flags": "eval/run_benchmarks.py",
}


# Flags that the loop gives itself; --generation_flags may name the model of a server.
RESERVED = {
    "--model_name_or_path",
    "--data_path",
    "--output_dir",
    "--resume_from_checkpoint",
    "--lora_enable",
    "--merge_lora",
    "--data_root",
}


@dataclass
class IterateOptions:
    output_dir: str = field(metadata={"help": "Folder of the run; a run that was killed is resumed from it."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Policy to start from: folder or hub id of a full model. In --world the cold start makes it."}
    )
    data_path: str | None = field(
        default=None, metadata={"help": "Own images and questions; see data/select_prompts.py, which divides them over the rounds."}
    )
    labeler_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Who judges claims: folder or hub id of a policy, or self: each round's own start. For a server: --labeling_flags."
        },
    )
    iterations: int = field(
        default=4,
        metadata={
            "help": "Rounds, usually 1 to 4; each starts from the policy of the last one. Own data is divided by it: it cannot grow."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the division of the data, and of all sampling and training."})
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        default="auto", metadata={"help": "Precision of every stage; auto is bfloat16 where the hardware computes in it."}
    )
    nproc_per_node: str | None = field(default=None, metadata={"help": "Processes of a stage, through torchrun: a number, or gpu for all."})
    column_map: str = field(default="", metadata={"help": "Own column names: question=prompt,image=picture."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths in the data start from; default: the data's."})
    images_per_round: int | None = field(
        default=None, metadata={"help": "Images that a round generates answers for; default: an equal share (--world: 256)."}
    )
    choice_images: int = field(default=100, metadata={"help": "Images, apart from all others, that checkpoints are chosen on."})
    heldout_images: int = field(default=200, metadata={"help": "Images, apart from all others, that policies are evaluated on."})
    lora_enable: bool = field(default=False, metadata={"help": "Train LoRA adapters, merged after each round, instead of all weights."})
    learning_rate: float | None = field(default=None, metadata={"help": "Of DPO; default: 1e-5 for LoRA, 5e-7 for all weights."})
    num_train_epochs: float = field(default=4.0, metadata={"help": "Epochs of DPO per round."})
    checkpoints_per_epoch: int = field(
        default=4, metadata={"help": "Checkpoints that the next round's start is chosen from; 0 takes the end of the training."}
    )
    choose_by: Literal["labeler", "chair", "objhal", "amber", "mmhal", "shapeworld_chair"] = field(
        default="labeler",
        metadata={"help": "What checkpoints are chosen by: the labeler on the choice images, or a benchmark (no longer held out then)."},
    )
    min_capability: float = field(
        default=0.9, metadata={"help": "Share of its start's accepted claims (or recall) that a chosen checkpoint has to keep, 0 to 1."}
    )
    benchmarks: str = field(
        default="", metadata={"help": "Also evaluate with these parts of eval/run_benchmarks.py, by commas: chair,pope."}
    )
    benchmark_root: str | None = field(default=None, metadata={"help": "Folder with their files, for --benchmarks and --choose_by."})
    generation_flags: str = field(
        default="", metadata={"help": "Flags for data/generate_responses.py, in one pair of quotes: '--num_answers 4 --temperature 1'."}
    )
    labeling_flags: str = field(default="", metadata={"help": "Flags for data/score_claims.py."})
    pair_flags: str = field(default="", metadata={"help": "Flags for data/build_pairs.py."})
    scoring_flags: str = field(default="", metadata={"help": "Flags for eval/muffin_inference_logp.py."})
    training_flags: str = field(default="", metadata={"help": "Flags for train/dpo.py."})
    evaluation_flags: str = field(default="", metadata={"help": "Flags for data/generate_responses.py where answers are evaluated."})
    benchmark_flags: str = field(default="", metadata={"help": "Flags for eval/run_benchmarks.py: a judge, a batch size."})
    rescored_pairs: int = field(
        default=1000, metadata={"help": "Pairs of the last round that the trained policy scores again, to look at rewards; 0 for none."}
    )
    report: bool = field(default=True, metadata={"help": "End with report.html, which takes matplotlib and pandas."})
    redo_changed: bool = field(
        default=False, metadata={"help": "Remove what earlier flags made, and all after it, and make it again, instead of stopping."}
    )
    cache_dir: str = field(default="outputs/cache", metadata={"help": "Folder of the tiny world's cold starts."})

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.checkpoints_per_epoch < 0:
            raise ValueError(
                f"--iterations {self.iterations} must be at least 1, --checkpoints_per_epoch {self.checkpoints_per_epoch} at least 0"
            )
        if not 0 <= self.min_capability <= 1:
            raise ValueError(f"--min_capability {self.min_capability}: want a share, 0 to 1")
        if self.checkpoints_per_epoch and self.choose_by == LABELER and self.choice_images < 1:
            raise ValueError("--choice_images 0: the labeler chooses checkpoints on these; or take the last with --checkpoints_per_epoch 0")
        if (self.benchmarks or self.choose_by != LABELER) and self.benchmark_root is None:
            raise ValueError("--benchmarks and --choose_by BENCHMARK need --benchmark_root, the folder with the benchmarks' files")
        for name in ("model_name_or_path", "data_path", "labeler_name_or_path", "image_root", "benchmark_root"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, absolute(value, f"--{name}", hub=name not in ("image_root", "benchmark_root")))


def absolute(value: str, flag: str, hub: bool) -> str:
    """A path from wherever this is called, since stages run in the repository's folder. Raises ValueError when nothing is there.

    hub: whether it may be a hub id (owner/name) instead, or "self" for the labeler.
    """
    if Path(value).exists():
        return str(Path(value).resolve())
    if hub and (re.fullmatch(r"[\w.-]+/[\w.-]+", value) or (flag == "--labeler_name_or_path" and value == "self")):
        return value
    raise ValueError(
        f"{flag} {value}: no such file or folder" + (", and not a hub id (owner/name); mend the path" if hub else "; mend the path")
    )


OPTIONS = (PolicyOptions, ColdStartOptions, IterateOptions)


@dataclass(frozen=True)
class Run:
    """What all rounds share.

    start: the policy of the first round. labeler: folder or hub id; "self" for each round's own start; None where --labeling_flags name
    one. labeling: flags of data/score_claims.py. truth: images carry their ground truth (the tiny world), which then evaluates.
    """

    options: IterateOptions
    policy_flags: list[str]
    folder: Path
    ledger: Ledger
    start: str
    prompts: list[Path]
    choice: Path
    heldout: Path
    labeler: str | None
    labeling: tuple[str, ...] = ()
    truth: bool = False

    def round(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def evaluation(self, number: int) -> Path:
        return self.folder / f"evaluation-{number}"

    def moment(self, number: int) -> str:
        """What results call the policy after that many rounds."""
        return {0: "before", self.options.iterations: "after"}.get(number, f"after-{number}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    start = time.perf_counter()
    policy, world, options = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    check_options(world, options)
    folder = Path(options.output_dir).resolve()
    with new_ledger(folder, options) as ledger:
        run = in_world(world, policy, options, ledger) if world.world else on_data(policy, options, ledger)
        evaluate(run, 0, run.start)
        policy_now, choices = run.start, {}
        for number in range(1, options.iterations + 1):
            policy_now, choices[f"round-{number}"] = improve(run, number, policy_now)
            evaluate(run, number, policy_now)
            write_manifest(run, number, choices[f"round-{number}"])
        rescore(run, policy_now)
        moments = measure_world(run) if run.truth else read_evaluations(run)
        seconds = {name: each for name, each in ledger.seconds.items() if name != REPORT}
        results = {**moments, "choice": choices, "policy": policy_now, "seconds": seconds}
        write_atomically(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        if options.report:
            page = folder / "report.html"
            ledger.run(Stage(REPORT, ("eval/report.py", "--run", str(folder), "--output", str(page)), page))
    shown = (WORLD_METRICS, "percent, words per answer") if run.truth else (OWN_METRICS, "by the labeler")
    print(format_results(results, *shown))
    print(f"\n{time.perf_counter() - start:.0f} s; policy: {policy_now}\nnumbers: {folder / 'results.json'}, stages: {ledger.file}")
    if options.report:
        print(f"to look at: {page}")
    return results


def check_options(world: ColdStartOptions, options: IterateOptions) -> None:
    """Raise ValueError, before anything runs, for options that contradict each other and for flags that a recipe does not have."""
    own = {"--model_name_or_path": options.model_name_or_path, "--data_path": options.data_path}
    if world.world and any(own.values()):
        raise ValueError(f"--world {world.world} brings its own policy and images; leave out {' and '.join(own)}, or --world")
    if not world.world and not all(own.values()):
        missing = [flag for flag, value in own.items() if value is None]
        raise ValueError(f"{' and '.join(missing)} missing; give what is missing, or --world standard for the tiny image world")
    named = names_labeler(options)
    if named and options.labeler_name_or_path:
        raise ValueError(f"--labeler_name_or_path {options.labeler_name_or_path} and --labeling_flags both name a labeler; keep one")
    if not world.world and not named and not options.labeler_name_or_path:
        raise ValueError(
            "no labeler: give --labeler_name_or_path MODEL (or self), or a server in --labeling_flags '--labeler endpoint ...'"
        )
    if options.report and not (find_spec("matplotlib") and find_spec("pandas")):
        raise ValueError("--report True draws with matplotlib and pandas: pip install -c constraints.txt -e '.[eval]', or --report False")
    for option, recipe in FLAGS.items():
        if words := shlex.split(getattr(options, option)):
            check_flags(
                ROOT / recipe, words, f"--{option}", RESERVED - ({"--model_name_or_path"} if option == "generation_flags" else set())
            )


def names_labeler(options: IterateOptions) -> bool:
    return "--labeler" in shlex.split(options.labeling_flags)


def new_ledger(folder: Path, options: IterateOptions) -> Ledger:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if options.nproc_per_node is None:
        environment["OMP_NUM_THREADS"] = "1"  # a stage and its workers, and stages side by side, share few cores
    return Ledger(folder, root=ROOT, environment=environment, redo_changed=options.redo_changed)


# --- where images, policy and labeler come from


def on_data(policy: PolicyOptions, options: IterateOptions, ledger: Ledger) -> Run:
    prompts = ledger.folder / "prompts"
    command = ["data/select_prompts.py", "--data_path", options.data_path, "--output_dir", str(prompts), "--seed", str(options.seed)]
    command += ["--rounds", str(options.iterations), "--heldout_images", str(options.heldout_images)]
    command += ["--choice_images", str(options.choice_images if options.checkpoints_per_epoch else 0)]
    for name in ("images_per_round", "column_map", "image_root"):
        command += [f"--{name}", str(value)] if (value := getattr(options, name)) else []
    ledger.run(Stage("prompts", tuple(command), prompts))
    return Run(
        options,
        policy.flags(),
        ledger.folder,
        ledger,
        start=options.model_name_or_path,
        prompts=[prompts / f"round-{number + 1}" for number in range(options.iterations)],
        choice=prompts / "choice",
        heldout=prompts / "heldout",
        labeler=options.labeler_name_or_path,
    )


def in_world(world: ColdStartOptions, policy: PolicyOptions, options: IterateOptions, ledger: Ledger) -> Run:
    rounds = max(options.iterations, LEAST_ROUNDS)
    images = Images(rounds, options.images_per_round or 256, options.choice_images, options.heldout_images)
    cold = cold_start(world, images, seed=options.seed, cache_dir=Path(options.cache_dir).resolve(), root=ROOT)
    with new_ledger(cold.folder, options) as cache:
        for stage in cold.stages():
            cache.run(stage)
    return Run(
        options,
        policy.flags(),
        ledger.folder,
        ledger,
        start=str(cold.policy),
        prompts=[cold.world / f"prompts-{number + 1}.parquet" for number in range(options.iterations)],
        choice=cold.world / "choice.parquet",
        heldout=cold.world / "heldout.parquet",
        labeler=options.labeler_name_or_path or (None if names_labeler(options) else str(cold.labeler)),
        labeling=("--splitter", "shapeworld"),
        truth=True,
    )


# --- one round


def improve(run: Run, number: int, policy: str) -> tuple[str, dict[str, Any]]:
    """What RLAIF-V does with the current policy. Returns the next one, and the choice among this round's checkpoints."""
    options, folder, seed = run.options, run.round(number), run.options.seed + number
    name = f"round-{number}"
    answers, judged, pairs, scored, trained = (folder / part for part in ("answers", "judged", "pairs", "scored", "policy"))
    run.ledger.run(generate(run, f"{name}/answers", policy, run.prompts[number - 1], answers, seed, shlex.split(options.generation_flags)))
    run.ledger.run(judge(run, f"{name}/judged", policy, answers, judged))
    selection = ("data/build_pairs.py", "--data_path", str(judged), "--output_dir", str(pairs), "--seed", str(seed))
    run.ledger.run(Stage(f"{name}/pairs", (*selection, *shlex.split(options.pair_flags)), pairs))
    run.ledger.run(score(run, f"{name}/scored", policy, pairs, scored))
    run.ledger.run(train(run, f"{name}/policy", policy, scored, trained, seed))
    if options.checkpoints_per_epoch == 0:
        chosen, choice = trained, {"chosen": "the end of the training"}
    else:
        chosen, choice = choose_checkpoint(run, number, policy)
    if not options.lora_enable:
        return str(chosen), choice
    merged = folder / "merged"
    command = ("train/merge_lora.py", "--model_name_or_path", str(chosen), "--output_dir", str(merged), "--dtype", options.dtype)
    run.ledger.run(Stage(f"{name}/merged", (*command, *run.policy_flags), merged))
    return str(merged), choice


def choose_checkpoint(run: Run, number: int, policy: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to go on from, by answers about the choice images; see muffin/checkpoint_choice.py."""
    options = run.options
    candidates = {folder.name: folder for folder in complete_checkpoints(run.round(number) / "policy")}
    if not candidates:
        raise ValueError(
            f"no complete checkpoint in {run.round(number) / 'policy'}; let --training_flags leave --save_strategy as it is, "
            "or take the end of the training with --checkpoints_per_epoch 0"
        )
    measured = []
    for name, model in {"start": policy, **candidates}.items():
        folder = run.round(number) / "choice" / name
        stage = f"round-{number}/choice/{name}"
        if options.choose_by == LABELER:
            answers = generate(
                run, f"{stage}/answers", str(model), run.choice, folder / "answers", options.seed, evaluation_words(run, GREEDY)
            )
            judge_answers(run, stage, policy, answers, folder)
            measured.append(read_measured(name, folder / "rejected.json", LABELER))
        else:
            run.ledger.run(benchmark(run, f"{stage}/benchmarks", str(model), options.choose_by.partition("_")[0], folder / "benchmarks"))
            measured.append(read_measured(name, folder / "benchmarks" / "benchmarks.json", options.choose_by))
    start, *others = measured
    chosen = choose(start, others, options.min_capability)
    measure = MEASURES[options.choose_by]
    numbers = f"{measure.hallucination} {chosen.hallucination:.2f}, {measure.capability} {chosen.capability:.2f}"
    logger.info("round %d goes on from %s: %s", number, chosen.name, numbers)
    if (warning := doubt(start, chosen, options.min_capability)) is not None:
        logger.warning("round %d: %s %s", number, chosen.name, warning)
    choice = {"chosen": chosen.name, "by": options.choose_by, **asdict(measure), "measured": [asdict(each) for each in measured]}
    return candidates[chosen.name], choice


def evaluate(run: Run, number: int, policy: str) -> None:
    """Answers about the held-out images; with own data also what the labeler thinks of them; benchmarks."""
    options, folder, name = run.options, run.evaluation(number), f"evaluation-{number}"
    greedy = generate(run, f"{name}/greedy", policy, run.heldout, folder / "greedy", options.seed, evaluation_words(run, GREEDY))
    if run.truth:
        run.ledger.run(
            greedy, generate(run, f"{name}/t1", policy, run.heldout, folder / "t1", options.seed, evaluation_words(run, SAMPLED))
        )
    elif options.heldout_images:
        judge_answers(run, name, run.start, greedy, folder)
    if options.benchmarks:
        run.ledger.run(benchmark(run, f"{name}/benchmarks", policy, options.benchmarks, folder / "benchmarks"))


def rescore(run: Run, policy: str) -> None:
    """Pairs of the last round under the policy that it made, for eval/report.py."""
    if run.options.rescored_pairs:
        folder, limit = run.round(run.options.iterations), ("--max_rows", str(run.options.rescored_pairs))
        name = f"{folder.name}/rescored"
        run.ledger.run(score(run, name, policy, folder / "pairs", folder / "rescored", *limit))


# --- stages


def generate(run: Run, name: str, policy: str, data: Path, output: Path, seed: int, words: Sequence[str]) -> Stage:
    command = ("data/generate_responses.py", "--model_name_or_path", policy, "--data_path", str(data), "--output_dir", str(output))
    return Stage(name, (*command, "--seed", str(seed), *numerics(run), *words), output, run.options.nproc_per_node)


def evaluation_words(run: Run, decoding: Sequence[str]) -> list[str]:
    return [*shlex.split(run.options.evaluation_flags), *decoding]


def judge(run: Run, name: str, policy: str, answers: Path, output: Path) -> Stage:
    """Claims and verdicts. policy: who judges with --labeler_name_or_path self."""
    command = [
        "data/score_claims.py",
        "--data_path",
        str(answers),
        "--output_dir",
        str(output),
        "--dtype",
        run.options.dtype,
        *run.labeling,
    ]
    if run.labeler is not None:
        command += ["--model_name_or_path", policy if run.labeler == "self" else run.labeler]
    return Stage(name, (*command, *shlex.split(run.options.labeling_flags)), output, run.options.nproc_per_node)


def judge_answers(run: Run, name: str, policy: str, answers: Stage, folder: Path) -> None:
    """Run a generation, then what the labeler thinks of its answers, into `folder`/rejected.json."""
    run.ledger.run(answers)
    run.ledger.run(judge(run, f"{name}/judged", policy, answers.output, folder / "judged"))
    result = folder / "rejected.json"
    run.ledger.run(
        Stage(f"{name}/rejected", ("eval/rejected_claims.py", "--answers", str(folder / "judged"), "--output", str(result)), result)
    )


def score(run: Run, name: str, policy: str, pairs: Path, output: Path, *more: str) -> Stage:
    command = ("eval/muffin_inference_logp.py", "--model_name_or_path", policy, "--data_path", str(pairs), "--output_dir", str(output))
    command += ("--lora_enable", str(run.options.lora_enable), *numerics(run), *shlex.split(run.options.scoring_flags), *more)
    return Stage(name, command, output, run.options.nproc_per_node)


def train(run: Run, name: str, policy: str, scored: Path, output: Path, seed: int) -> Stage:
    options = run.options
    rate = options.learning_rate or (1e-5 if options.lora_enable else 5e-7)
    command = ["train/dpo.py", "--model_name_or_path", policy, "--data_path", str(scored), "--output_dir", str(output)]
    command += [
        "--lora_enable",
        str(options.lora_enable),
        "--learning_rate",
        str(rate),
        "--num_train_epochs",
        str(options.num_train_epochs),
    ]
    command += ["--dpo_beta", "0.1", "--weight_decay", "0.01", "--lr_scheduler_type", "cosine", "--warmup_steps", "0.05"]
    command += ["--seed", str(seed), "--resume_from_checkpoint", "last", *numerics(run)]
    if options.checkpoints_per_epoch:
        share = 1 / (options.checkpoints_per_epoch * options.num_train_epochs)  # of all steps
        command += ["--save_strategy", "steps", "--save_steps", f"{share:.6g}"]
    else:
        command += ["--save_strategy", "no"]
    return Stage(name, (*command, *shlex.split(options.training_flags)), output, options.nproc_per_node)


def benchmark(run: Run, name: str, policy: str, benchmarks: str, output: Path) -> Stage:
    options = run.options
    command = ["eval/run_benchmarks.py", "--model_name_or_path", policy, "--benchmarks", benchmarks, "--data_root", options.benchmark_root]
    command += ["--output_dir", str(output), "--dtype", options.dtype, *run.policy_flags]
    command += ["--nproc_per_node", options.nproc_per_node] if options.nproc_per_node else []
    return Stage(name, (*command, *shlex.split(options.benchmark_flags)), output)


def numerics(run: Run) -> list[str]:
    """Flags of everything that runs the policy."""
    return ["--dtype", run.options.dtype, *run.policy_flags]


# --- results


def write_manifest(run: Run, number: int, choice: dict[str, Any]) -> None:
    """What the round was made of and what came out, apart from times, so that it is the same however often the run was killed."""
    folder = run.round(number)
    states = json.loads((folder / "policy" / "trainer_state.json").read_text())
    logged = [entry for entry in states["log_history"] if "loss" in entry]
    stages = {name: stage for name, stage in run.ledger.stages.items() if name.startswith(f"{folder.name}/")}
    manifest = {
        "round": number,
        "seed": run.options.seed + number,
        "stages": {name: {key: stage[key] for key in ("command", "sha256")} for name, stage in stages.items()},
        "reference": reference_id(read_reference(folder / "scored")),
        "pairs": json.loads((folder / "pairs" / "statistics.json").read_text()),
        "training": {"steps": states["global_step"], "first": logged[0], "last": logged[-1]},
        "choice": choice,
        "evaluation": {} if run.truth else read_evaluation(run, number),
    }
    write_atomically(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())


def read_evaluations(run: Run) -> dict[str, Any]:
    """{"before": {"greedy": {number: value, number_interval: [low, high]}, "benchmarks": {...}}, "after-1": ..., "after": ...}"""
    return {run.moment(number): read_evaluation(run, number) for number in range(run.options.iterations + 1)}


def read_evaluation(run: Run, number: int) -> dict[str, Any]:
    folder, found = run.evaluation(number), {}
    if (folder / "rejected.json").exists():
        result = json.loads((folder / "rejected.json").read_text())
        found["greedy"] = {name: result[name] for name in OWN_METRICS}
        found["greedy"] |= {f"{name}_interval": result["intervals"][name] for name in OWN_METRICS}
    if run.options.benchmarks:
        found["benchmarks"] = json.loads((folder / "benchmarks" / "benchmarks.json").read_text())["results"]
    return found


def measure_world(run: Run) -> dict[str, Any]:
    """Every evaluation against the ground truth, percent, and labeler and pairs of the last round; results as in `read_evaluations`."""
    output, last, final = run.folder / "measures.json", run.round(run.options.iterations), run.options.iterations
    command = ["eval/shapeworld.py", "--output", str(output), "--answers"]
    command += [f"{run.moment(number)}-{name}={run.evaluation(number) / name}" for number in range(final + 1) for name in ("greedy", "t1")]
    command += ["--judged_dir", str(last / "judged"), "--pairs_dir", str(last / "pairs")]
    command += ["--gallery", str(run.folder / "before-after.png"), "--gallery_columns", "before-greedy", "after-greedy"]
    run.ledger.run(Stage("measures", tuple(command), output))
    measured = json.loads(output.read_text())
    results: dict[str, Any] = {}
    for name, estimates in measured["answers"].items():
        moment, _, decoding = name.rpartition("-")
        results.setdefault(moment, {})[decoding] = flat(estimates)
    return {**results, "labeler": flat(measured["labeler"]), "pairs": flat(measured["pairs"])}


def flat(estimates: dict[str, dict[str, float]]) -> dict[str, Any]:
    values = {name: round(each["value"], 2) for name, each in estimates.items()}
    return values | {f"{name}_interval": [round(each["low"], 2), round(each["high"], 2)] for name, each in estimates.items()}


def format_results(results: dict[str, Any], metrics: dict[str, str], unit: str) -> str:
    """The table that the run ends with: a column for every moment, 95 % bootstrap intervals over images."""
    moments = [name for name in results if name == "before" or name.startswith("after")]

    def cell(numbers: dict[str, Any], metric: str) -> str:
        low, high = numbers[f"{metric}_interval"]
        return f"{numbers[metric]:5.1f} [{low:.1f}, {high:.1f}]"

    lines = ["", f"{'':<24}" + "".join(f"{moment:>22}" for moment in moments)]
    for decoding, title in (("greedy", "greedy"), ("t1", "temperature 1")):
        if decoding in results["before"]:
            lines.append(title)
            for metric, name in metrics.items():
                lines.append(f"  {name:<22}" + "".join(f"{cell(results[moment][decoding], metric):>22}" for moment in moments))
    for title, names in (("labeler", ("accuracy", "tpr", "fpr")), ("pairs", ("right", "tie", "wrong"))):
        if title in results:
            lines.append(f"{title:<10}" + "   ".join(f"{name} {cell(results[title], name)}" for name in names))
    lines += [f"{name} went on from {choice['chosen']}" for name, choice in results["choice"].items()]
    lines.append(f"{unit}; 95 % bootstrap intervals over images")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
