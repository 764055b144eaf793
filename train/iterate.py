"""The whole RLAIF-V loop in one command: answers, claims, feedback, pairs, reference log-probs, DPO, evaluation; N rounds.

    python train/iterate.py --output_dir outputs/demo

Every stage is one of the recipes that a user runs on real data, in a process of its own, with the flags that the manifest shows. Here
the data are the tiny image world and the policy is trained from nothing first (the cold start: vision, then language; about two
minutes). A cold start is kept in --cache_dir under a key of the code and the settings that made it, so the next run begins at round 1.
Killed: run the command again; finished stages are not repeated and recipes go on where they were.

Output: results.json (before, after, labeler, seconds), manifest.json (every stage: command, seconds, hashes of its files),
before-after.png (held-out images with both answers), round-N/ (answers, judged, pairs, scored, policy).
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from muffin.provenance import hash_fields, hash_files, write_atomically

logger = logging.getLogger("train.iterate")

ROOT = Path(__file__).resolve().parents[1]
METRICS = {"chair_s": "CHAIRs", "chair_i": "CHAIRi", "recall": "recall", "claim_error": "wrong claims", "words": "words"}
DECODINGS = {"greedy": ("--num_answers", "1", "--temperature", "0"), "t1": ("--num_answers", "2", "--temperature", "1")}
NUMERICS = ("--dtype", "float32")  # of everything but the cold start: a tiny model gains little from bfloat16


@dataclass
class ColdStartOptions:
    """What the cold-started policy and labeler depend on."""

    seed: int = field(default=0, metadata={"help": "Of the world's images and texts, and of all training and sampling."})
    world: Literal["standard", "small"] = field(default="standard", metadata={"help": "3x3 cells, or 2x2 (for tests)."})
    train_images: int = field(default=6000, metadata={"help": "Images of the cold start."})
    heldout_images: int = field(default=200, metadata={"help": "Images of the evaluation, the same for every seed."})
    prompt_images: int = field(default=256, metadata={"help": "Images that each round generates answers for."})
    iterations: int = field(default=1, metadata={"help": "Rounds; each starts from the policy of the last one."})
    vision_steps: int = field(default=200, metadata={"help": "Steps of the vision tower's pre-training, 64 images each."})
    sft_steps: int = field(default=800, metadata={"help": "Steps of the policy's cold start, 64 rows each."})
    labeler_steps: int = field(default=350, metadata={"help": "Steps that turn a copy of the policy into the labeler, 80 rows each."})


@dataclass
class IterateOptions:
    output_dir: str = field(metadata={"help": "Folder of the run; a run that was killed is resumed from it."})
    cache_dir: str = field(default="outputs/cache", metadata={"help": "Folder of cold starts, one for every code and settings."})
    labeler: Literal["trained", "self", "oracle"] = field(
        default="trained", metadata={"help": "Who judges claims: a policy trained to, the policy itself, or the ground truth."}
    )
    full: bool = field(default=False, metadata={"help": "Train all weights in DPO instead of a LoRA adapter."})
    num_answers: int = field(default=8, metadata={"help": "Answers per image and round."})
    max_pairs_per_prompt: int = field(default=4, metadata={"help": "Pairs per image and round."})
    dpo_epochs: float = field(default=2.0, metadata={"help": "Epochs of DPO per round."})
    dpo_learning_rate: float | None = field(default=None, metadata={"help": "Default: 5e-4 for LoRA, 2e-4 for --full True."})


OPTIONS = (ColdStartOptions, IterateOptions)


@dataclass(frozen=True)
class Stage:
    """One recipe with its flags; `output` is the file or folder that it makes."""

    name: str
    command: tuple[str, ...]
    output: Path


class Ledger:
    """The manifest of a folder: its stages in order, with what command, and for finished ones how long they took and what they made."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "manifest.json"
        self.stages: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def run(self, *stages: Stage) -> None:
        """Run stages that are not finished yet, all at once: those given together do not depend on each other."""
        todo = [stage for stage in stages if not self.finished(stage)]
        for stage in todo:
            print(f"\n== {stage.name}: python {' '.join(stage.command)}", flush=True)
            self.begin(stage)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # stages and workers share few cores
        start = time.perf_counter()
        processes = [subprocess.Popen([sys.executable, *stage.command], cwd=ROOT, env=environment) for stage in todo]
        for stage, process in zip(todo, processes, strict=True):
            if process.wait() != 0:
                for other in processes:
                    other.terminate()
                raise SystemExit(f"stage {stage.name} failed with exit code {process.returncode}; mend the cause above and run this again")
            self.finish(stage, time.perf_counter() - start)

    def finished(self, stage: Stage) -> bool:
        known = self.stages.get(stage.name, {})
        return "seconds" in known and known["command"] == list(stage.command)

    def begin(self, stage: Stage) -> None:
        """Note what is about to run. What this stage and all after it made with another command goes; a killed stage keeps its parts."""
        names = list(self.stages)
        if stage.name in names and self.stages[stage.name]["command"] != list(stage.command):
            for name in names[names.index(stage.name) :]:
                output = Path(self.stages.pop(name)["output"])
                output.unlink() if output.is_file() else shutil.rmtree(output, ignore_errors=True)
        self.stages.setdefault(stage.name, {"command": list(stage.command), "output": str(stage.output)})
        self.save()

    def finish(self, stage: Stage, seconds: float) -> None:
        files = [
            file
            for file in (stage.output, *sorted(stage.output.rglob("*")))
            if file.suffix in (".parquet", ".safetensors") or file == stage.output
        ]
        names = [str(file.relative_to(stage.output.parent)) for file in files if file.is_file()]
        hashes = hash_files([stage.output.parent / name for name in names])
        self.stages[stage.name] |= {"seconds": round(seconds, 1), "sha256": dict(zip(names, hashes, strict=True))}
        self.save()

    def save(self) -> None:
        write_atomically(self.file, (json.dumps(self.stages, indent=1) + "\n").encode())

    @property
    def seconds(self) -> dict[str, float]:
        return {name: stage["seconds"] for name, stage in self.stages.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    start = time.perf_counter()
    world, options = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    output_dir = Path(options.output_dir).resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    cold = Path(options.cache_dir).resolve() / cold_start_key(world)
    cold.mkdir(parents=True, exist_ok=True)

    cache = Ledger(cold)
    warm = cache.finished(train_labeler(world, cold))
    cache.run(make_world(world, cold))
    cache.run(cold_start(world, cold))
    cache.run(train_labeler(world, cold))

    ledger = Ledger(output_dir)
    policies = [cold / "policy"]
    evaluations = evaluate("before", policies[0], cold, output_dir, world.seed)
    ledger.run(*evaluations)
    for number in range(1, world.iterations + 1):
        folder = output_dir / f"round-{number}"
        for stage in improve(number, policies[-1], cold, folder, world, options):
            ledger.run(stage)
        policies.append(folder / "policy" if options.full else folder / "policy" / "merged")
        name = "after" if number == world.iterations else f"after-{number}"
        evaluations += (found := evaluate(name, policies[-1], cold, output_dir, world.seed))
        ledger.run(*found)
    ledger.run(measure(evaluations, output_dir, world.iterations))

    results = collect(output_dir, cache.seconds | ledger.seconds)
    write_atomically(output_dir / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    print(report(results))
    print(f"\n{time.perf_counter() - start:.0f} s ({'the cold start was cached' if warm else 'cold start included'})")
    print(f"numbers: {output_dir / 'results.json'}   picture: {output_dir / 'before-after.png'}   stages: {ledger.file}")
    return results


def cold_start_key(world: ColdStartOptions) -> str:
    """Hash of the settings and of the code that the cold start runs."""
    code = [*sorted((ROOT / "muffin").rglob("*.py")), ROOT / "data" / "make_shapeworld.py", ROOT / "train" / "sft.py", Path(__file__)]
    settings = json.dumps(asdict(world), sort_keys=True)
    return hash_fields([settings, *(part for file in code for part in (str(file.relative_to(ROOT)), file.read_bytes()))])[:16]


# --- stages


def make_world(world: ColdStartOptions, cold: Path) -> Stage:
    command = ["data/make_shapeworld.py", "--output_dir", str(cold / "world"), "--seed", str(world.seed), "--world", world.world]
    command += ["--train_images", str(world.train_images), "--heldout_images", str(world.heldout_images)]
    command += ["--prompt_images", str(world.prompt_images), "--iterations", str(world.iterations)]
    return Stage("world", (*command, "--vision_steps", str(world.vision_steps)), cold / "world")


def cold_start(world: ColdStartOptions, cold: Path) -> Stage:
    """The policy learns to describe as the careless annotator does, and to answer questions."""
    return sft("policy", cold / "world" / "policy", cold / "world" / "sft.parquet", cold / "policy", world.sft_steps, 64, 4e-3, world.seed)


def train_labeler(world: ColdStartOptions, cold: Path) -> Stage:
    data = cold / "world" / "labeler.parquet"
    return sft("labeler", cold / "policy", data, cold / "labeler", world.labeler_steps, 80, 2e-3, world.seed + 1)


def sft(name: str, model: Path, data: Path, output: Path, steps: int, rows: int, muon: float, seed: int) -> Stage:
    """Constant learning rate, then linear decay over the last 35 % of the steps."""
    schedule = {"num_decay_steps": round(0.35 * steps), "decay_type": "linear"}
    command = ["train/sft.py", "--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(output)]
    command += ["--sft_use_average", "True", "--freeze_vision_tower", "False", "--muon_learning_rate", str(muon), "--learning_rate", "3e-3"]
    command += ["--per_device_train_batch_size", str(rows), "--max_steps", str(steps), "--warmup_steps", "20", "--seed", str(seed)]
    command += ["--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", json.dumps(schedule)]
    command += ["--save_strategy", "no", "--logging_steps", "25", "--dataloader_num_workers", "1"]
    return Stage(name, tuple(command), output)


def generate(name: str, model: Path, data: Path, output: Path, seed: int, *decoding: str) -> Stage:
    command = ["data/generate_responses.py", "--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(output)]
    command += [*decoding, "--max_new_tokens", "80", "--batch_size", "64", "--shard_rows", "256", "--num_workers", "0"]
    return Stage(name, (*command, "--seed", str(seed), *NUMERICS), output)


def evaluate(name: str, policy: Path, cold: Path, output_dir: Path, seed: int) -> list[Stage]:
    """Answers about the held-out images, greedy and at temperature 1."""
    data = cold / "world" / "heldout.parquet"
    return [
        generate(f"{name}-{decoding}", policy, data, output_dir / f"{name}-{decoding}", seed, *flags)
        for decoding, flags in DECODINGS.items()
    ]


def improve(number: int, policy: Path, cold: Path, folder: Path, world: ColdStartOptions, options: IterateOptions) -> list[Stage]:
    """One round: what RLAIF-V does with the current policy (arXiv:2405.17220, section 3)."""
    seed = world.seed + number
    prompts = cold / "world" / f"prompts-{number}.parquet"
    answers, judged, pairs, scored, trained = (folder / name for name in ("answers", "judged", "pairs", "scored", "policy"))
    labelers = {
        "trained": ("--model_name_or_path", str(cold / "labeler")),
        "self": ("--model_name_or_path", str(policy)),
        "oracle": ("--labeler", "shapeworld_truth"),
    }
    decoding = ("--num_answers", str(options.num_answers), "--temperature", "1")
    feedback = ("data/score_claims.py", "--data_path", str(answers), "--output_dir", str(judged), "--splitter", "shapeworld")
    selection = ("data/build_pairs.py", "--data_path", str(judged), "--output_dir", str(pairs), "--seed", str(seed))
    scoring = ("eval/muffin_inference_logp.py", "--model_name_or_path", str(policy), "--data_path", str(pairs), "--output_dir", str(scored))
    lora = ("--lora_enable", str(not options.full))
    rate = options.dpo_learning_rate or (2e-4 if options.full else 5e-4)
    training = ("train/dpo.py", "--model_name_or_path", str(policy), "--data_path", str(scored), "--output_dir", str(trained), *lora)
    training += () if options.full else ("--lora_r", "64", "--lora_alpha", "128", "--lora_dropout", "0", "--merge_lora", "True")
    training += ("--learning_rate", str(rate), "--dpo_beta", "0.1", "--per_device_train_batch_size", "32", "--weight_decay", "0.01")
    training += ("--num_train_epochs", str(options.dpo_epochs), "--lr_scheduler_type", "cosine", "--warmup_steps", "0.05")
    training += ("--save_strategy", "no", "--logging_steps", "4", "--dataloader_num_workers", "1", "--seed", str(seed), *NUMERICS)
    return [
        generate(f"round-{number}/answers", policy, prompts, answers, seed, *decoding),
        Stage(f"round-{number}/judged", (*feedback, *labelers[options.labeler], *NUMERICS, "--num_workers", "1"), judged),
        Stage(f"round-{number}/pairs", (*selection, "--max_pairs_per_prompt", str(options.max_pairs_per_prompt)), pairs),
        Stage(f"round-{number}/scored", (*scoring, *lora, *NUMERICS, "--num_workers", "1"), scored),
        Stage(f"round-{number}/policy", training, trained),
    ]


def measure(evaluations: Sequence[Stage], output_dir: Path, iterations: int) -> Stage:
    last = output_dir / f"round-{iterations}"
    command = ["eval/shapeworld.py", "--output", str(output_dir / "measures.json"), "--answers"]
    command += [f"{stage.name}={stage.output}" for stage in evaluations]
    command += ["--judged_dir", str(last / "judged"), "--pairs_dir", str(last / "pairs")]
    command += ["--gallery", str(output_dir / "before-after.png"), "--gallery_columns", "before-greedy", "after-greedy"]
    return Stage("measures", tuple(command), output_dir / "measures.json")


# --- results


def collect(output_dir: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """{"before": {"greedy": {metric: value, metric_interval: [low, high]}, "t1": ...}, "after", "labeler", "pairs", "seconds"}, percent."""
    measured = json.loads((output_dir / "measures.json").read_text())
    results: dict[str, Any] = {}
    for name, estimates in measured["answers"].items():
        moment, _, decoding = name.rpartition("-")
        results.setdefault(moment, {})[decoding] = flat(estimates)
    return {**results, "labeler": flat(measured["labeler"]), "pairs": flat(measured["pairs"]), "seconds": seconds}


def flat(estimates: dict[str, dict[str, float]]) -> dict[str, Any]:
    values = {name: round(each["value"], 2) for name, each in estimates.items()}
    return values | {f"{name}_interval": [round(each["low"], 2), round(each["high"], 2)] for name, each in estimates.items()}


def report(results: dict[str, Any]) -> str:
    """The table that the run ends with."""

    def cell(numbers: dict[str, Any], metric: str) -> str:
        low, high = numbers[f"{metric}_interval"]
        return f"{numbers[metric]:5.1f} [{low:.1f}, {high:.1f}]"

    lines = ["", f"{'':<16}{'before':>24}{'after':>24}"]
    for decoding, title in (("greedy", "greedy"), ("t1", "temperature 1")):
        lines.append(title)
        for metric, name in METRICS.items():
            cells = [cell(results[moment][decoding], metric) for moment in ("before", "after")]
            lines.append(f"  {name:<14}{cells[0]:>24}{cells[1]:>24}")
    for title, names in (("labeler", ("accuracy", "tpr", "fpr")), ("pairs", ("right", "tie", "wrong"))):
        lines.append(f"{title:<10}" + "   ".join(f"{name} {cell(results[title], name)}" for name in names))
    lines.append("percent (words: per answer), 95 % bootstrap intervals over images")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
