"""train/dpo.py end to end on a tiny policy: it starts at ln 2, learns, resumes, is loaded again; and refuses what it must."""

import json
import math
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from muffin.pairs import load_preferences
from muffin.policies import PolicyOptions, load_adapter, load_policy, resolve_checkpoint
from tests.scored import plain_token_logps, scored_rows, write_rows
from tests.tiny import tiny_llava, write_parquet

ROWS = 12
LORA = ["--lora_enable", "True", "--lora_r", "8", "--learning_rate", "1e-3"]
FULL = ["--learning_rate", "3e-4"]


@pytest.fixture(scope="module")
def rows_and_reference(tiny_llava_path, tmp_path_factory):
    return scored_rows(tiny_llava_path, write_parquet(tmp_path_factory.mktemp("rows") / "rows.parquet", ROWS))


@pytest.fixture(scope="module")
def scored(rows_and_reference, tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("scored"), *rows_and_reference)


@pytest.fixture(scope="module")
def train(load_recipe, tiny_llava_path, scored):
    """`train(output_dir, *flags)` runs the recipe; flags given later win."""

    def run(output_dir: Path, *flags: str) -> TrainerState:
        fixed = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(scored), "--output_dir", str(output_dir)]
        settings = ["--dtype", "float32", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--disable_tqdm", "True"]
        return load_recipe("train/dpo.py").main([*fixed, *settings, "--save_strategy", "no", *flags])

    return run


def losses(state: TrainerState) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}


def mean_chosen_logp(checkpoint: Path, data: Path) -> float:
    """Of the policy in a folder, loaded as any later command loads it; plain form."""
    found = resolve_checkpoint(checkpoint)
    adapter = load_adapter(found, PolicyOptions())
    policy = load_policy(found, adapter, dtype=torch.float32).eval()
    assert all(parameter.requires_grad for parameter in policy.parameters())  # a merged adapter can be trained on, too
    dataset = load_preferences(data)
    with torch.no_grad():
        return sum(float(plain_token_logps(policy, adapter, dataset[position])[0].sum()) for position in range(ROWS)) / ROWS


@pytest.mark.parametrize("flags", [FULL, [*LORA, "--merge_lora", "True"]], ids=["full", "lora"])
def test_starts_at_ln2_learns_and_is_loaded_again(flags, train, scored, tmp_path):
    state = train(tmp_path / "run", "--max_steps", "20", "--eval_data_path", str(scored), *flags)
    by_step = losses(state)
    assert by_step[1] == pytest.approx(math.log(2), abs=1e-4)
    assert sum(by_step[step] for step in range(16, 21)) / 5 < 0.6

    trained = [entry["eval_logps/chosen"] for entry in state.log_history if "eval_logps/chosen" in entry][-1]
    assert mean_chosen_logp(tmp_path / "run", scored) == pytest.approx(trained, rel=1e-5)
    before = sum(load_preferences(scored)[position].ref_win_logp for position in range(ROWS)) / ROWS
    assert abs(trained - before) > 0.1
    if "--merge_lora" in flags:
        assert not (tmp_path / "run" / "merged" / "adapter_config.json").exists()
        assert mean_chosen_logp(tmp_path / "run" / "merged", scored) == pytest.approx(trained, rel=1e-5)

    saved = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert saved["log_history"] == state.log_history
    options = json.loads((tmp_path / "run" / "options.json").read_text())
    assert options["DPOArguments"]["dpo_beta"] == 0.1 and options["DPOArguments"]["max_steps"] == 20
    assert options["DataOptions"]["data_path"] == str(scored) and options["LoraOptions"]["lora_alpha"] == 16


@pytest.mark.parametrize("lora_enable", ["False", "True"])
def test_bfloat16_starts_within_the_gate(lora_enable, train, load_recipe, tiny_llava_path, scored, tmp_path):
    flags = ["--dtype", "bfloat16", "--lora_enable", lora_enable]
    given = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(scored), "--output_dir", str(tmp_path / "scored")]
    load_recipe("eval/muffin_inference_logp.py").main([*given, *flags, "--num_workers", "0"])
    state = train(tmp_path / "run", "--data_path", str(tmp_path / "scored"), "--max_steps", "2", "--max_rows", "4", *flags)
    assert losses(state)[1] == pytest.approx(math.log(2), abs=5e-3)


@pytest.mark.parametrize("flags", [FULL, LORA], ids=["full", "lora"])
def test_resumed_run_equals_the_uninterrupted_one(flags, train, scored, tmp_path):
    flags = [*flags, "--max_steps", "9", "--save_strategy", "steps", "--save_steps", "7", "--gradient_accumulation_steps", "2"]
    whole = losses(train(tmp_path / "whole", *flags))
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-7", resumed / "checkpoint-7")  # in the middle of an epoch, 3 steps each
    (resumed / "checkpoint-8").mkdir()  # a kill while it was written
    state = train(resumed, *flags, "--resume_from_checkpoint", "last")
    again = losses(state)
    assert [again[step] for step in (8, 9)] == [whole[step] for step in (8, 9)]
    assert mean_chosen_logp(resumed, scored) == mean_chosen_logp(tmp_path / "whole", scored)


def test_last_without_a_checkpoint_starts_anew(train, tmp_path):
    state = train(tmp_path / "run", "--max_steps", "1", "--resume_from_checkpoint", "last")
    assert losses(state)[1] == pytest.approx(math.log(2), abs=1e-4)


def test_other_ways_through_the_data(train, tmp_path):
    """Workers, grouped prompts, gradient checkpointing under LoRA, a trained vision tower: the same beginning, and no error."""
    for number, flags in enumerate(
        (
            ["--dataloader_num_workers", "2", "--group_by_prompt", "True"],
            ["--lora_enable", "True", "--activation_checkpointing", "True"],
            ["--freeze_vision_tower", "False", "--train_sampling_strategy", "sequential"],
        )
    ):
        state = train(tmp_path / str(number), "--max_steps", "2", *flags)
        assert losses(state)[1] == pytest.approx(math.log(2), abs=1e-4)


@pytest.fixture(scope="module")
def unscored(tmp_path_factory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("unscored") / "rows.parquet", ROWS)


OTHER_REDUCTIONS = {
    "sums": [],
    "weighted averages": ["--dpo_token_weighted", "True", "--dpo_use_average", "True", "--dpo_beta", "5"],
    "checkpointed": ["--activation_checkpointing", "True", "--gradient_accumulation_steps", "2"],
}


@pytest.mark.parametrize("case", OTHER_REDUCTIONS)
def test_disabled_adapter_is_the_stored_reference(case, train, scored, unscored, tmp_path):
    """Step by step and in evaluation the same numbers as with stored log-probs, on rows that have never had any."""
    flags = [*LORA, "--lora_dropout", "0", "--max_steps", "8", *OTHER_REDUCTIONS[case], "--eval_strategy", "steps", "--eval_steps", "4"]
    stored = train(tmp_path / "stored", *flags, "--eval_data_path", str(scored))
    data = ["--data_path", str(unscored), "--eval_data_path", str(unscored)]
    state = train(tmp_path / "run", *flags, *data, "--reference", "adapter_disabled")
    assert losses(state)[1] == pytest.approx(math.log(2), abs=1e-6)
    assert min(losses(state).values()) < 0.66  # far from where a reference that follows the policy would stay
    assert losses(state) == pytest.approx(losses(stored), abs=1e-5)
    evaluations = [[entry for entry in each.log_history if "eval_loss" in entry] for each in (state, stored)]
    assert len(evaluations[0]) == len(evaluations[1]) == 3
    for ours, theirs in zip(*evaluations, strict=True):
        for name in ("eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4 if name != "eval_loss" else 1e-5)
    assert mean_chosen_logp(tmp_path / "run", scored) == pytest.approx(mean_chosen_logp(tmp_path / "stored", scored), abs=1e-3)


def test_disabled_adapter_reads_no_stored_values(train, rows_and_reference, unscored, tmp_path):
    """Values of another policy, without keys, and a list too short: nothing is refused, and the losses are as without them."""
    rows, reference = rows_and_reference
    wrong = [{**row, "ref_win_logp": -1.0, "ref_rej_per_token_logp": [-9.0], "logps_key": None} for row in rows]
    flags = [*LORA, "--max_steps", "3", "--reference", "adapter_disabled", "--data_path"]
    expected = losses(train(tmp_path / "plain", *flags, str(unscored)))
    assert losses(train(tmp_path / "wrong", *flags, str(write_rows(tmp_path / "data", wrong, reference)))) == expected


def test_resumed_run_keeps_the_base_as_its_reference(train, unscored, tmp_path):
    flags = [*LORA, "--reference", "adapter_disabled", "--data_path", str(unscored), "--max_steps", "6", "--save_strategy", "steps"]
    whole = losses(train(tmp_path / "whole", *flags, "--save_steps", "4"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    again = losses(train(tmp_path / "resumed", *flags, "--resume_from_checkpoint", "last"))
    assert [again[step] for step in (5, 6)] == [whole[step] for step in (5, 6)]


def test_disabled_adapter_in_bfloat16_starts_at_ln2(train, unscored, tmp_path):
    flags = [*LORA, "--dtype", "bfloat16", "--data_path", str(unscored), "--max_steps", "2", "--lora_dropout", "0"]
    by_step = losses(train(tmp_path / "run", *flags, "--reference", "adapter_disabled"))
    assert by_step[1] == pytest.approx(math.log(2), abs=1e-6)  # the same forward twice, so that even bfloat16 agrees with itself
    assert by_step[2] != pytest.approx(math.log(2), abs=1e-6)


@pytest.fixture(scope="module")
def photos(load_recipe, samples, llama2_tokenizer_model, tmp_path_factory) -> tuple[Path, Path]:
    """A policy with LLaVA-1.5's tokenizer, image size and 576 image tokens, and 30 real rows scored with it."""
    folder = tmp_path_factory.mktemp("photos")
    policy = tiny_llava(folder / "policy", image_size=336, sentencepiece_model=llama2_tokenizer_model)
    rows = samples / "rlaifv_photos" / "photos_30.parquet"
    flags = ["--model_name_or_path", str(policy), "--data_path", str(rows), "--output_dir", str(folder / "scored")]
    load_recipe("eval/muffin_inference_logp.py").main([*flags, "--dtype", "float32", "--num_workers", "0"])
    return policy, folder / "scored"


@pytest.mark.parametrize("flags", [FULL, LORA], ids=["full", "lora"])
def test_real_rows_start_at_ln2_and_are_learnt(flags, photos, train, tmp_path):
    policy, data = photos
    given = ["--model_name_or_path", str(policy), "--data_path", str(data), "--max_rows", "5", "--per_device_train_batch_size", "1"]
    by_step = losses(train(tmp_path / "run", *given, "--max_steps", "20", *flags))
    assert by_step[1] == pytest.approx(math.log(2), abs=1e-4)
    assert sum(by_step[step] for step in range(16, 21)) / 5 < 0.6  # the fourth epoch of five rows


# --- what it refuses


def test_disabled_adapter_needs_an_adapter(train, unscored, tmp_path):
    with pytest.raises(ValueError, match="--reference adapter_disabled needs --lora_enable True"):
        train(tmp_path / "run", "--data_path", str(unscored), "--reference", "adapter_disabled")
    with pytest.raises(ValueError, match="--accept_foreign_logps True means nothing with --reference adapter_disabled"):
        train(tmp_path / "run", *LORA, "--reference", "adapter_disabled", "--accept_foreign_logps", "True")
    with pytest.raises(ValueError, match="stores no reference log-probs(.|\n)*or, with LoRA: --reference adapter_disabled"):
        train(tmp_path / "run", *LORA, "--data_path", str(unscored))


def test_data_without_log_probs_names_the_command_that_adds_them(train, tiny_rows_path, tiny_llava_path, tmp_path):
    with pytest.raises(ValueError, match="stores no reference log-probs") as error:
        train(tmp_path / "run", "--data_path", str(tiny_rows_path), "--image_aspect_ratio", "crop")
    command = (
        f"python eval/muffin_inference_logp.py --model_name_or_path {tiny_llava_path} --data_path {tiny_rows_path} --output_dir SCORED"
    )
    flags = "--dtype float32 --lora_enable False --image_aspect_ratio crop --model_max_length 2048"
    assert f"{command} {flags}" in str(error.value)


def test_foreign_data_is_refused_or_accepted_explicitly(train, tmp_path):
    with pytest.raises(ValueError, match="prompt_name: stored log-probs were made with llava_v1, this run has vicuna_v1"):
        train(tmp_path / "run", "--prompt_name", "vicuna_v1", "--max_steps", "1")
    state = train(tmp_path / "run", "--prompt_name", "vicuna_v1", "--max_steps", "1", "--accept_foreign_logps", "True")
    assert math.isfinite(losses(state)[1]) and abs(losses(state)[1] - math.log(2)) > 1e-4


def test_values_that_no_key_covers_are_refused_by_the_gate(train, rows_and_reference, tmp_path):
    rows, reference = rows_and_reference
    names = ("logp", "avg_logp", "per_token_logp")
    swap = {f"ref_{a}_{name}": f"ref_{b}_{name}" for name in names for a, b in (("win", "rej"), ("rej", "win"))}
    swapped = [{name: row[swap.get(name, name)] for name in row} for row in rows]
    with pytest.raises(ValueError, match="stored columns of chosen and rejected are swapped"):
        train(tmp_path / "run", "--data_path", str(write_rows(tmp_path / "swapped", swapped, reference)), "--max_steps", "1")


def test_rlaifv_json_logps(train, rows_and_reference, tmp_path):
    rows, reference = rows_and_reference
    order = ["ref_win_logp", "ref_win_avg_logp", "ref_win_per_token_logp", "ref_rej_logp", "ref_rej_avg_logp", "ref_rej_per_token_logp"]
    as_json = []
    for row in rows:
        noisy = [[-7.0, *row[name]] if name.endswith("per_token_logp") else row[name] for name in order]  # they cover the prompt, too
        kept = {name: value for name, value in row.items() if name not in (*order, "logps_key")}
        as_json.append({**kept, "logps": json.dumps(noisy)})
    folder = write_rows(tmp_path / "json", as_json, reference)
    with pytest.raises(ValueError, match="--accept_foreign_logps True"):
        train(tmp_path / "run", "--data_path", str(folder), "--max_steps", "1")
    accepted = ["--data_path", str(folder), "--max_steps", "1", "--accept_foreign_logps", "True"]
    assert losses(train(tmp_path / "run", *accepted))[1] == pytest.approx(math.log(2), abs=1e-4)
    with pytest.raises(ValueError, match=r"(?s)only sums and averages are usable.*muffin_inference_logp"):
        train(tmp_path / "weighted", *accepted, "--dpo_token_weighted", "True")


def test_bad_rows_fail_or_are_left_out(train, rows_and_reference, tmp_path):
    rows, reference = rows_and_reference
    folder = write_rows(tmp_path / "bad", [*rows[:3], {**rows[3], "chosen": None}, *rows[4:]], reference)
    with pytest.raises(ValueError, match="chosen is null"):
        train(tmp_path / "run", "--data_path", str(folder), "--max_steps", "1")
    state = train(tmp_path / "run", "--data_path", str(folder), "--bad_rows", "skip", "--num_train_epochs", "1")
    assert state.max_steps == 6 and losses(state)[1] == pytest.approx(math.log(2), abs=1e-4)  # 11 rows, 2 a step


def test_contradictions_are_refused(train, tmp_path):
    with pytest.raises(ValueError, match="--merge_lora True needs --lora_enable True"):
        train(tmp_path / "run", "--merge_lora", "True")
    with pytest.raises(ValueError, match="--freeze_vision_tower False contradicts --lora_enable True"):
        train(tmp_path / "run", "--lora_enable", "True", "--freeze_vision_tower", "False")
    with pytest.raises(ValueError, match="want a complete checkpoint-N folder"):
        train(tmp_path / "run", "--resume_from_checkpoint", str(tmp_path))
    train(tmp_path / "run", "--max_steps", "1", "--save_strategy", "steps", *LORA)
    with pytest.raises(ValueError, match="already holds checkpoint-1"):
        train(tmp_path / "run", "--max_steps", "1")
    with pytest.raises(ValueError, match="is itself a LoRA adapter"):
        train(tmp_path / "second", "--model_name_or_path", str(tmp_path / "run"), *LORA)


def test_resuming_against_another_reference_is_refused(train, tmp_path):
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2", "--accept_foreign_logps", "True"]
    train(tmp_path / "run", *flags)
    other = tiny_llava(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="trained against another reference policy(.|\n)*weights"):
        train(tmp_path / "run", *flags, "--model_name_or_path", str(other), "--resume_from_checkpoint", "last")


# --- several processes


def _one_of_two(rank: int, port: int, main, flags: list[str], results) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"  # unset, accelerate would take as many threads as there are cores in each process
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)  # inherited from the test process, which runs alone
    state = main(flags)
    wrapped = PartialState().num_processes
    results.put((rank, wrapped, losses(state), [entry for entry in state.log_history if "eval_loss" in entry][-1]))


@pytest.mark.parametrize("more", [[], [*LORA, "--lora_dropout", "0", "--reference", "adapter_disabled"]], ids=["full", "adapter disabled"])
def test_two_processes_equal_one(more, train, load_recipe, tiny_llava_path, scored, tmp_path):
    flags = ["--max_steps", "4", "--learning_rate", "1e-4", "--eval_data_path", str(scored), "--per_device_eval_batch_size", "5", *more]
    alone = train(tmp_path / "alone", *flags, "--per_device_train_batch_size", "4")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    fixed = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(scored), "--output_dir", str(tmp_path / "two")]
    settings = ["--dtype", "float32", "--logging_steps", "1", "--disable_tqdm", "True", "--save_strategy", "no"]
    command = [*fixed, *settings, *flags, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    main = load_recipe("train/dpo.py").main
    processes = [fork.Process(target=_one_of_two, args=(rank, port, main, command, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = [entry for entry in alone.log_history if "eval_loss" in entry][-1]
    for _, processes_seen, by_step, evaluation in (results.get(), results.get()):
        assert processes_seen == 2
        assert by_step == pytest.approx(losses(alone), rel=1e-5)
        for name in ("eval_loss", "eval_rewards/chosen", "eval_rewards/accuracies", "eval_logps/rejected"):
            # rewards are differences of sums near 200 nats, which float32 holds to 2e-5
            assert evaluation[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5)
