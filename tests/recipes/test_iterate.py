"""The whole loop in the small world: every stage through its recipe, the measured drop, and going on after a kill."""

import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from muffin import stages
from muffin.pairs import load_preferences, load_prompts
from tests.openai_server import serve
from tests.tiny import write_parquet

SMALL = ["--world", "small", "--train_images", "800", "--heldout_images", "100", "--images_per_round", "96", "--choice_images", "8"]
COLD = ["--vision_steps", "100", "--sft_steps", "250", "--labeler_steps", "2", "--iterations", "1", "--seed", "0", "--dtype", "float32"]
GENERATION = "--max_new_tokens 80 --batch_size 64 --shard_rows 256 --num_workers 0"
DPO = ["--lora_enable", "True", "--learning_rate", "8e-4", "--num_train_epochs", "2", "--checkpoints_per_epoch", "0"]
DPO += ["--generation_flags", f"--num_answers 8 --temperature 1 {GENERATION}", "--evaluation_flags", GENERATION]
DPO += ["--pair_flags", "--max_pairs_per_prompt 4", "--scoring_flags", "--num_workers 0"]
DPO += ["--training_flags", "--lora_alpha 128 --lora_dropout 0 --per_device_train_batch_size 32 --disable_tqdm True"]
ORACLE = ["--labeling_flags", "--labeler shapeworld_truth --num_workers 0"]


@pytest.fixture
def in_process(load_recipe, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages call their recipe's main here instead of in a process of its own (five seconds of imports each); names what ran."""
    ran: list[str] = []

    def run(stage, root, environment, lock):
        recipe, *flags = stage.words
        assert (root / recipe).is_file()
        ran.append(stage.name)
        load_recipe(recipe).main(flags)
        return SimpleNamespace(wait=lambda: 0, returncode=0, terminate=lambda: None)

    monkeypatch.setattr(stages, "launch", run)
    return ran


def test_small_world_with_true_labels(load_recipe, in_process: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    """With the ground truth as labeler, hallucination at temperature 1 falls; the files are what README promises."""
    iterate = load_recipe("train/iterate.py")
    flags = [*SMALL, *COLD, *DPO, *ORACLE, "--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]
    iterate.main(flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert set(before) == {"greedy", "t1"}
    assert {"chair_s", "chair_i", "recall", "claim_error", "words"} <= set(before["greedy"])
    assert before["t1"]["chair_s"] > 25  # the careless annotator has been learnt
    assert after["t1"]["chair_s"] < 0.8 * before["t1"]["chair_s"]
    assert results["labeler"]["accuracy"] == 100  # the labels are the truth
    assert results["pairs"]["right"] == 100
    assert set(results["seconds"]) >= {"round-1/scored", "round-1/policy", "round-1/merged", "round-1/rescored", "measures"}
    assert (tmp_path / "run" / "before-after.png").stat().st_size > 10_000
    assert "struck" in (tmp_path / "run" / "report.html").read_text()
    assert "wrong claims" in capsys.readouterr().out

    # the trained policy prefers what it was taught to: pairs scored again by it
    scored, rescored = (load_preferences(tmp_path / "run" / "round-1" / name) for name in ("scored", "rescored"))
    margins = [
        (new.ref_win_logp - old.ref_win_logp) - (new.ref_rej_logp - old.ref_rej_logp) for old, new in zip(scored, rescored, strict=True)
    ]
    assert sum(margin > 0 for margin in margins) > 0.7 * len(margins)

    manifest = json.loads((tmp_path / "run" / "round-1" / "manifest.json").read_text())
    assert manifest["training"]["first"]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert set(manifest["stages"]) == {f"round-1/{name}" for name in ("answers", "judged", "pairs", "scored", "policy", "merged")}
    assert manifest["stages"]["round-1/pairs"]["sha256"].keys() == {"pairs/pairs.parquet"}
    assert (
        manifest["reference"] == json.loads((tmp_path / "run" / "round-1" / "scored" / "muffin_reference.json").read_text())["reference_id"]
    )

    # the same command again: everything is done, nothing runs; with one stage undone, that stage alone
    first, in_process[:] = list(in_process), []
    assert first[:5] == ["world", "policy", "labeler", "evaluation-0/greedy", "evaluation-0/t1"]
    assert iterate.main(flags) == results
    assert in_process == []
    ledger = tmp_path / "run" / "manifest.json"
    noted = json.loads(ledger.read_text())
    hashes = noted.pop("measures")["sha256"]
    ledger.write_text(json.dumps(noted))
    iterate.main(flags)
    assert in_process == ["measures"]
    assert json.loads(ledger.read_text())["measures"]["sha256"] == hashes

    # another labeler: its stage and all after it run again, the answers before it stay
    in_process[:] = []
    other = [*flags, "--labeling_flags", "--num_workers 0", "--labeler_name_or_path", "self"]
    with pytest.raises(ValueError, match=r"stage round-1/judged, made with other flags:\n  - --labeler: shapeworld_truth then, None now"):
        iterate.main(other)
    assert in_process == []
    iterate.main([*other, "--redo_changed", "True"])
    assert in_process[0] == "round-1/judged"
    assert in_process[-2:] == ["measures", "report"]
    assert len(in_process) == 10
    assert json.loads((tmp_path / "run" / "results.json").read_text())["labeler"]["accuracy"] < 100


def test_own_data_two_rounds_with_choice_of_checkpoints(load_recipe, in_process, tiny_llava_path, tmp_path: Path, capsys, monkeypatch):
    """Real recipes on a tiny LLaVA with noise for images: the second round starts from the checkpoint that the labeler chose."""
    write_parquet(tmp_path / "rows.parquet", 72)  # three rows on each of 24 images
    monkeypatch.chdir(tmp_path)  # stages run elsewhere: paths are made absolute
    flags = ["--model_name_or_path", str(tiny_llava_path), "--labeler_name_or_path", "self", "--data_path", "rows.parquet"]
    flags += ["--output_dir", str(tmp_path / "run"), "--iterations", "2", "--dtype", "float32"]
    flags += ["--choice_images", "3", "--heldout_images", "4", "--learning_rate", "1e-3", "--num_train_epochs", "1"]
    flags += ["--checkpoints_per_epoch", "2", "--min_capability", "0", "--rescored_pairs", "3"]
    flags += [
        "--generation_flags",
        "--num_answers 6 --temperature 1 --max_new_tokens 24 --num_workers 0",
        "--scoring_flags",
        "--num_workers 0",
    ]
    flags += ["--labeling_flags", "--num_workers 0", "--evaluation_flags", "--max_new_tokens 24 --num_workers 0"]
    flags += ["--training_flags", "--per_device_train_batch_size 4 --disable_tqdm True --logging_steps 1"]
    results = load_recipe("train/iterate.py").main(flags)
    run = tmp_path / "run"

    assert json.loads((run / "manifest.json").read_text())["prompts"]["command"][2] == str(tmp_path / "rows.parquet")
    parts = {name: len(load_prompts(run / "prompts" / name)) for name in ("round-1", "round-2", "choice", "heldout")}
    assert parts == {"round-1": 24, "round-2": 24, "choice": 3, "heldout": 4}  # (24 - 7) // 2 images each, one left over
    for number in (1, 2):
        folder = run / f"round-{number}"
        choice = results["choice"][f"round-{number}"]
        checkpoints = sorted(path.name for path in (folder / "policy").glob("checkpoint-*"))
        assert [each["name"] for each in choice["measured"]] == ["start", *sorted(checkpoints, key=lambda name: int(name.split("-")[1]))]
        numbers = {each["name"]: each["hallucination"] for each in choice["measured"]}
        assert numbers[choice["chosen"]] == min(numbers[name] for name in checkpoints)
        rejected = json.loads((folder / "choice" / choice["chosen"] / "rejected.json").read_text())
        assert rejected["rejected_share"] == numbers[choice["chosen"]]
        assert rejected["answers"] == 3
    noted = json.loads((run / "manifest.json").read_text())
    start = str(run / "round-1" / "policy" / results["choice"]["round-1"]["chosen"])
    for stage in ("round-2/answers", "round-2/judged", "round-2/scored", "round-2/policy"):  # judged: the labeler is the round's own start
        command = noted[stage]["command"]
        assert command[command.index("--model_name_or_path") + 1] == start
    judged = noted["evaluation-2/judged"]["command"]  # one labeler judges all evaluations
    assert judged[judged.index("--model_name_or_path") + 1] == str(tiny_llava_path)
    assert list(results)[:3] == ["before", "after-1", "after"]
    assert {"rejected_share", "accepted_claims", "words_interval"} <= set(results["after"]["greedy"])
    assert len(load_preferences(run / "round-2" / "rescored")) == 3
    assert (tmp_path / "run" / "report.html").exists()
    assert "accepted per answer" in capsys.readouterr().out
    assert json.loads((run / "round-2" / "manifest.json").read_text())["evaluation"] == results["after"]


def speaking(body: dict) -> tuple[int, str]:
    """A model that describes, splits, asks and judges; about every other claim it says yes."""
    content = body["messages"][0]["content"]
    text = content if isinstance(content, str) else content[1]["text"]
    choice: dict = {"finish_reason": "stop"}
    if not isinstance(content, str):
        assert content[0]["image_url"]["url"].startswith("data:image/")
    if body.get("logprobs"):
        p_yes = (zlib.crc32(text.encode()) % 100 + 0.5) / 100
        top = [{"token": "Yes", "logprob": math.log(p_yes)}, {"token": "No", "logprob": math.log(1 - p_yes)}]
        choice |= {"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}
    elif not isinstance(content, str):  # an answer, by the request's seed
        seed = body["seed"]
        choice["message"] = {"content": " ".join(f"There are {(seed >> k) % 97} things." for k in range(1 + seed % 4))}
    elif "Answer: " in text:
        parts = [part.strip() for part in text.rpartition("Answer: ")[2].split(".") if part.strip()]
        choice["message"] = {"content": "\n".join(f"{number}. {part}." for number, part in enumerate(parts, 1))}
    else:
        items = [line for line in text.splitlines() if line[:1].isdigit()]
        choice["message"] = {"content": "\n".join(f"{number}. Is it so: {item}" for number, item in enumerate(items, 1))}
    return 200, json.dumps({"model": "m", "choices": [choice]})


@pytest.fixture(params=["drawn", "photos"])
def images(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "photos":
        return request.getfixturevalue("samples") / "rlaifv_photos" / "photos_30.parquet"
    return write_parquet(tmp_path / "rows.parquet", 30)


def test_servers_generate_split_and_judge(load_recipe, in_process, images: Path, tiny_llava_path, tmp_path: Path):
    """One round in which everything but the policy is a server that speaks OpenAI's protocol."""
    with serve(speaking) as server:
        flags = ["--model_name_or_path", str(tiny_llava_path), "--data_path", str(images), "--output_dir", str(tmp_path / "run")]
        flags += ["--iterations", "1", "--dtype", "float32", "--choice_images", "2", "--heldout_images", "2", "--report", "False"]
        flags += ["--lora_enable", "True", "--learning_rate", "1e-3", "--num_train_epochs", "1", "--checkpoints_per_epoch", "1"]
        flags += ["--generation_flags", f"--generator endpoint --base_url {server.url} --model_name_or_path served --num_answers 6"]
        labeling = f"--labeler endpoint --labeler_model judge --labeler_base_url {server.url} --num_workers 0"
        flags += ["--labeling_flags", f"{labeling} --splitter endpoint --splitter_model splits --splitter_base_url {server.url}"]
        flags += ["--scoring_flags", "--num_workers 0", "--evaluation_flags", "--max_new_tokens 16 --num_workers 0"]
        flags += ["--training_flags", "--per_device_train_batch_size 8 --disable_tqdm True --lora_r 4"]
        results = load_recipe("train/iterate.py").main(flags)
    run = tmp_path / "run"
    asked = {name: sum(body["model"] == name for body in server.requests) for name in ("served", "judge", "splits")}
    prompts = len(load_prompts(run / "prompts" / "round-1"))
    assert asked["served"] == 6 * prompts  # the policy itself answers what is evaluated
    assert asked["judge"] > asked["splits"] > 0
    pairs = load_preferences(run / "round-1" / "rescored")
    assert len(pairs) > prompts / 2
    assert all(pair.chosen.startswith("There are") for pair in pairs)
    training = json.loads((run / "round-1" / "manifest.json").read_text())["training"]
    assert training["first"]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert Path(results["policy"]) == run / "round-1" / "merged"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--world", "small", "--data_path", "."], "--world small brings its own policy and images"),
        (["--data_path", "."], "--model_name_or_path missing"),
        (["--data_path", ".", "--model_name_or_path", "a/model"], "no labeler"),
        (["--world", "small", "--labeler_name_or_path", "self", *ORACLE], "both name a labeler"),
        (["--data_path", "gone.parquet"], "--data_path gone.parquet: no such file or folder, and not a hub id"),
        (["--world", "small", "--labeler_name_or_path", "/labler"], "--labeler_name_or_path /labler: no such file or folder"),
        (["--image_root", "a/b"], "--image_root a/b: no such file or folder; mend the path"),
        (["--world", "small", "--training_flags", "--output_dir x"], "--training_flags: --output_dir of train/dpo.py is given by the job"),
        (["--world", "small", "--training_flags", "--learning_rat 1"], "--training_flags: train/dpo.py refuses --learning_rat"),
        (["--world", "small", "--iterations", "0"], "--iterations 0 must be at least 1"),
        (["--world", "small", "--min_capability", "2"], "--min_capability 2.0: want a share"),
        (["--world", "small", "--choice_images", "0"], "--choice_images 0"),
        (["--world", "small", "--benchmarks", "pope"], "need --benchmark_root"),
    ],
)
def test_contradictions_are_refused_before_anything_runs(load_recipe, in_process: list[str], tmp_path: Path, flags, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("train/iterate.py").main(["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path), *flags])
    assert in_process == []
    assert not (tmp_path / "run").exists()


def test_compare_runs_by_hand(load_recipe, tmp_path: Path):
    def moment(chair_s: float) -> dict:
        names = ("chair_s", "chair_i", "recall", "claim_error", "words")
        values = dict.fromkeys(names, chair_s) | {f"{name}_interval": [chair_s - 1, chair_s + 1] for name in names}
        return {"greedy": values, "t1": values}

    run = tmp_path / "demo-0"
    run.mkdir()
    results = {"before": moment(40.0), "after": moment(10.0), "labeler": {"accuracy": 90.0, "fpr": 20.0}}
    (run / "results.json").write_text(json.dumps(results | {"pairs": {"right": 70.0, "tie": 25.0, "wrong": 5.0}}))
    flags = ["--runs", str(run), "--output", str(tmp_path / "seeds.md"), "--numbers", str(tmp_path / "seeds.json")]
    table = load_recipe("eval/compare_runs.py").main(flags)
    row = table.splitlines()[2].split(" | ")
    assert row[1] == "40.0 [39.0, 41.0] -> 10.0 [9.0, 11.0]"
    assert row[-2:] == ["90.0 / 20.0", "70.0 / 25.0 / 5.0 |"]
    assert (tmp_path / "seeds.md").read_text() == table + "\n"
    assert json.loads((tmp_path / "seeds.json").read_text())["demo-0"]["after"]["t1"]["recall_interval"] == [9.0, 11.0]
    with pytest.raises(ValueError, match="demo-1 has no results.json"):
        load_recipe("eval/compare_runs.py").main(["--runs", str(tmp_path / "demo-1")])
