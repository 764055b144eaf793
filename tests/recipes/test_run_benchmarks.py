"""Benchmarks of tiny policies in one command, and the comparison of two of them."""

import json
import shutil

import datasets
import pytest
from PIL import Image

from muffin import provenance
from muffin.shapeworld.model import build_adapter, build_policy, save_policy
from muffin.shapeworld.scenes import WORLDS


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow_cache")


@pytest.fixture(scope="module")
def world(tmp_path_factory, load_recipe):
    """A small world with two untrained policies in it."""
    folder = tmp_path_factory.mktemp("world")
    sizes = ["--train_images", "8", "--heldout_images", "12", "--prompt_images", "2", "--vision_steps", "1"]
    load_recipe("data/make_shapeworld.py").main(["--output_dir", str(folder), "--world", "small", *sizes])
    adapter = build_adapter(WORLDS["small"])
    for seed in (0, 1):
        save_policy(build_policy(WORLDS["small"], adapter.tokenizer, seed), adapter, folder / f"policy-{seed}")
    return folder


@pytest.fixture
def recipe(load_recipe, monkeypatch):
    """The recipe, with the recipes that it starts run in this process; `started` lists them."""
    module = load_recipe("eval/run_benchmarks.py")
    module.started = []

    def run_here(*words):
        module.started.append(words[0])
        load_recipe(words[0]).main(list(words[1:]))

    monkeypatch.setattr(module, "run_recipe", run_here)
    return module


FAST = ("--dtype", "float32", "--num_workers", "0")


def test_benchmarks_of_two_policies_and_their_difference(recipe, world, tmp_path, capsys):
    summaries = [
        recipe.main(["--model_name_or_path", str(world / f"policy-{seed}"), "--benchmarks", "shapeworld", "--data_root", str(world)]
                    + ["--output_dir", str(tmp_path / str(seed)), *FAST])
        for seed in (0, 1)
    ]  # fmt: skip
    assert recipe.started == ["data/generate_responses.py", "eval/pope.py", "data/generate_responses.py", "eval/chair.py"] * 2
    table = capsys.readouterr().out
    kinds = ["random", "popular", "adversarial"]
    assert set(summaries[0]["results"]) == {"shapeworld_pope", *(f"shapeworld_pope {kind}" for kind in kinds), "shapeworld_chair"}
    stored = json.loads((tmp_path / "0" / "benchmarks.json").read_text())
    assert stored == summaries[0] and "per_image" not in stored["results"]["shapeworld_pope random"]
    for title, number in (("shapeworld_pope popular", "accuracy"), ("shapeworld_chair", "recall")):
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {title} ")][:1]
        digits = 3 if number == "accuracy" else 1
        assert f"{number} {summaries[0]['results'][title][number]:.{digits}f} [" in line and "words" in line

    found = recipe.main(["--compare", str(tmp_path / "0"), str(tmp_path / "1"), "--output_dir", str(tmp_path / "both")])
    assert json.loads((tmp_path / "both" / "comparison.json").read_text()) == found
    for title, numbers in found["differences"].items():
        for name, each in numbers.items():
            first, second = (summary["results"][title][name] for summary in summaries)
            assert each["first"] == pytest.approx(first) and each["change"]["value"] == pytest.approx(second - first)
            assert each["change"]["low"] <= each["change"]["value"] <= each["change"]["high"]
    assert "second - first, 95 % interval, same images" in capsys.readouterr().out

    results = [str(tmp_path / str(seed) / "shapeworld_chair" / "result.json") for seed in (0, 1)]
    alone = recipe.main(["--compare", *results])
    assert alone["differences"] == {"result": found["differences"]["shapeworld_chair"]}
    same = recipe.main(["--compare", results[0], results[0]])
    assert all(each["change"] == {"value": 0, "low": 0, "high": 0} for each in same["differences"]["result"].values())


def test_best_of_n_on_candidates_of_policy_and_reference(load_recipe, world, tmp_path):
    """What scripts/demo_benchmarks.sh does with the demo's policies."""
    for name in ("policy-0", "policy-1"):
        data = ["--data_path", str(world / "heldout.parquet"), "--output_dir", str(tmp_path / name), "--max_rows", "6", *FAST]
        decoding = ["--num_answers", "4", "--temperature", "1", "--max_new_tokens", "16"]
        load_recipe("data/generate_responses.py").main(["--model_name_or_path", str(world / name), *data, *decoding])
        models = ["--model_name_or_path", str(world / "policy-1"), "--reference_name_or_path", str(world / "policy-0")]
        files = ["--data_path", str(tmp_path / name), "--output_dir", str(tmp_path / f"{name}-best")]
        result = load_recipe("eval/best_of_n.py").main([*models, *files, *FAST])
        assert result["n"] == [1, 2, 4] and result["prompts"] == 6
        for lines in result["curves"].values():  # one candidate is no choice
            assert lines["words"][0] == result["curves"]["random"]["words"][0]
        assert result["curves"]["oracle"]["claim_error"][-1]["value"] <= result["curves"]["random"]["claim_error"][-1]["value"]
        assert (tmp_path / f"{name}-best" / "best_of_n.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_goes_on(recipe, world, tmp_path):
    flags = ["--model_name_or_path", str(world / "policy-0"), "--benchmarks", "shapeworld", "--data_root", str(world)]
    whole = recipe.main([*flags, "--output_dir", str(tmp_path / "run"), *FAST])
    answers = tmp_path / "run" / "shapeworld_pope" / "answers"
    before = {file.name: file.stat().st_mtime_ns for file in answers.glob("shard-*")}
    shutil.rmtree(tmp_path / "run" / "shapeworld_chair")
    assert recipe.main([*flags, "--output_dir", str(tmp_path / "run"), *FAST])["results"] == whole["results"]
    assert {file.name: file.stat().st_mtime_ns for file in answers.glob("shard-*")} == before
    with pytest.raises(ValueError, match="policy"):  # answers of another policy are not taken for this one's
        recipe.main([*flags, "--output_dir", str(tmp_path / "run"), *FAST, "--model_name_or_path", str(world / "policy-1")])


def test_what_is_missing_is_named_before_anything_runs(recipe, tmp_path):
    start = ["--model_name_or_path", "M", "--data_root", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    for flags, message in (
        ([*start, "--benchmarks", "pope"], r"found no pope/\*pope\*.json"),
        ([*start, "--benchmarks", "shapeworld"], "lacks pope.parquet, which shapeworld_pope needs"),
        ([*start, "--benchmarks", "chair"], "lacks chair/questions.jsonl, which chair needs"),
        ([*start, "--benchmarks", "pop"], "--benchmarks pop: want names out of"),
        (start[:4], "--output_dir missing; to compare"),
        (["--compare", "a", "b", "--model_name_or_path", "M"], "--compare takes two results and no --model_name_or_path"),
        (["--compare", str(tmp_path), str(tmp_path)], "found no .*/result.json"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.main(flags)
    assert recipe.started == []


def test_commands_of_the_benchmarks_parse(recipe, load_recipe, tmp_path):
    """Every flag of every part is one of its recipe's."""
    from transformers import HfArgumentParser

    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "coco_pope_random.json").write_text("")
    _, _, options = HfArgumentParser(recipe.OPTIONS).parse_args_into_dataclasses(
        ["--model_name_or_path", "M", "--data_root", "D", "--output_dir", "O", "--nproc_per_node", "gpu"]
    )
    for parts in (make(tmp_path) for make in recipe.PARTS.values()):
        for part in parts:
            words = recipe.generation(part, tmp_path, recipe.PolicyOptions(), options)
            assert words[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "gpu"]
            assert words[5] == "data/generate_responses.py"
            for path, *flags in (words[5:], [*part.score, "--answers", "A", "--output", "B"]):
                HfArgumentParser(load_recipe(path).OPTIONS).parse_args_into_dataclasses(flags, look_for_args_file=False)


def test_a_judged_benchmark_waits_for_its_judge_and_then_counts(recipe, world, tmp_path):
    """Two questions of MMHal-Bench; the judge is a file."""
    (tmp_path / "mmhal" / "images").mkdir(parents=True)
    rows = [
        {"question_type": "other", "image_id": f"i{n}", "image_src": f"http://x/{n}.png", "image_content": ["Cat"]}
        | {"question": "Describe the image.", "gt_answer": "A cat.", "model_answer": ""}
        for n in range(2)
    ]
    for n in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / "mmhal" / "images" / f"{n}.png")
    (tmp_path / "mmhal" / "mmhal-bench_answer_template.json").write_text(json.dumps(rows))
    output = tmp_path / "out"
    flags = ["--model_name_or_path", str(world / "policy-0"), "--benchmarks", "mmhal", "--data_root", str(tmp_path), *FAST]
    flags += ["--output_dir", str(output), "--judge_model", "m"]
    with pytest.raises(SystemExit, match="not scored: mmhal"):
        recipe.main(flags)
    requests = [json.loads(line) for line in (output / "mmhal" / "result.requests.jsonl").read_text().splitlines()]
    with (output / "mmhal" / "result.replies.jsonl").open("w") as file:
        for request in requests:
            body = {"choices": [{"message": {"content": "Rating: 2"}, "finish_reason": "stop"}], "model": "m"}
            file.write(json.dumps({"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}}) + "\n")
    result = recipe.main(flags)["results"]["mmhal"]
    assert (result["score"], result["hallucination_rate"], result["informativeness"]) == pytest.approx((2, 100, 100 * 2 / 3))
    assert result["rules"] == {"judge": "m", "prompt": "muffin-mmhal-1"} and result["missing"] == {}


@pytest.mark.slow
def test_recipes_run_as_processes(load_recipe, world, tmp_path):
    recipe = load_recipe("eval/run_benchmarks.py")
    flags = ["--benchmarks", "shapeworld", "--data_root", str(world), "--output_dir", str(tmp_path), *FAST]
    assert recipe.main(["--model_name_or_path", str(world / "policy-0"), *flags])["results"]["shapeworld_chair"]["captions"] == 12
    with pytest.raises(SystemExit, match="failed with exit code 1; mend the cause above"):
        recipe.main(["--model_name_or_path", str(world / "policy-1"), *flags])
