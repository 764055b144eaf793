"""The way from prompts to pairs by its three recipes: generate_responses, score_claims, build_pairs."""

import base64
import json
import math
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from muffin import provenance
from muffin.chat_generation import request_seed
from muffin.claims import split_by_rules
from muffin.generation import Decoding, generate
from muffin.hallucination import wrong_claims
from muffin.pairs import load_preferences, load_prompts
from muffin.policies import Checkpoint, PolicyOptions, encode_pair, load_adapter, load_policy
from muffin.shapeworld.claims import answer_ratios
from muffin.shapeworld.language import DESCRIBE
from muffin.shapeworld.scenes import WORLDS, Scene, draw, encode_png, sample_scenes
from tests.openai_server import serve

PROMPT_COLUMNS = ["ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path"]
ANSWER_COLUMNS = ["prompt_row", "answer_number", "answer", "truncated", "failure"]
SIDE_COLUMNS = ["answer_number", "claims", "p_yes", "p_no", "score"]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow_cache")


@pytest.fixture
def run(load_recipe) -> Callable:
    """run("generate_responses", **flags) calls the recipe's main with the flags."""

    def function(recipe: str, **flags):
        return load_recipe(f"data/{recipe}.py").main([word for name, value in flags.items() for word in (f"--{name}", str(value))])

    return function


@pytest.fixture
def generation(tiny_llava_path, tiny_rows_path, tmp_path) -> dict:
    return {
        "model_name_or_path": tiny_llava_path,
        "data_path": tiny_rows_path,
        "output_dir": tmp_path / "answers",
        "num_answers": 3,
        "temperature": 0.9,
        "max_new_tokens": 10,
        "dtype": "float32",
        "batch_size": 4,
        "shard_rows": 10,
        "num_workers": 0,
    }


@pytest.fixture
def labeling(tiny_llava_path, tmp_path) -> dict:
    return {
        "model_name_or_path": tiny_llava_path,
        "data_path": tmp_path / "answers",
        "output_dir": tmp_path / "judged",
        "dtype": "float32",
        "batch_tokens": 2000,
        "shard_rows": 30,
        "num_workers": 0,
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def rows(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_from_prompts_to_pairs(run, generation, labeling, tmp_path, tiny_llava_path, tiny_rows_path, capsys):
    summary = run("generate_responses", **generation)
    assert (summary.prompts, summary.answers, summary.failures) == (24, 72, 0)
    assert sorted(contents(tmp_path / "answers")) == ["muffin_answers.json", *(f"shard-0000{n}-of-00003.parquet" for n in range(3))]
    answers = rows(tmp_path / "answers")
    assert list(answers[0]) == PROMPT_COLUMNS + ANSWER_COLUMNS
    assert [(row["prompt_row"], row["answer_number"]) for row in answers] == [(row, number) for row in range(24) for number in range(3)]
    assert summary.truncated == sum(row["truncated"] for row in answers)

    adapter = load_adapter(Checkpoint(tiny_llava_path), PolicyOptions())
    model = load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32).eval()
    prompts = load_prompts(tiny_rows_path)
    for row in (0, 13, 23):
        prompt = prompts[row]
        (alone,) = generate(model, adapter, [adapter.encode(prompt.image, prompt.question, ())], [row], Decoding(3, 0.9, 10))
        assert [(each["answer"], each["truncated"]) for each in answers[3 * row : 3 * row + 3]] == [(a.text, a.truncated) for a in alone]
        assert answers[3 * row]["image"]["bytes"] == prompt.image_bytes and answers[3 * row]["idx"] == prompt.idx

    judged_summary = run("score_claims", **labeling)
    judged = rows(tmp_path / "judged")
    assert [[row[name] for name in PROMPT_COLUMNS + ANSWER_COLUMNS[:4]] for row in judged] == [
        [row[name] for name in PROMPT_COLUMNS + ANSWER_COLUMNS[:4]] for row in answers
    ]
    for row in judged:
        split = split_by_rules(row["question"], row["answer"])
        assert (row["claims"], row["claim_questions"]) == ([c.text for c in split], [c.question for c in split])
        if split and row["failure"] is None:
            assert row["score"] == -sum(p_yes <= p_no for p_yes, p_no in zip(row["p_yes"], row["p_no"], strict=True))
            assert all(0 < p_yes + p_no < 1 for p_yes, p_no in zip(row["p_yes"], row["p_no"], strict=True))
        else:
            assert row["score"] is None and row["failure"]
    assert judged_summary.claims == sum(len(row["claims"]) for row in judged if row["failure"] is None) > 60
    assert 0 < judged_summary.accepted < 1

    capsys.readouterr()
    statistics = run("build_pairs", data_path=tmp_path / "judged", output_dir=tmp_path / "pairs", max_pairs_per_prompt=1)
    printed = capsys.readouterr().out
    pairs = load_preferences(tmp_path / "pairs")
    assert printed.startswith(f"{len(pairs)} pairs for {statistics.prompts_with_pairs} of 24 prompts in {tmp_path / 'pairs'}\n")
    assert statistics.pairs == statistics.prompts_with_pairs == len(pairs) > 0
    assert sum(statistics.scores.values()) == statistics.judged == sum(row["score"] is not None for row in judged)
    assert sum(statistics.gaps.values()) == len(pairs)
    assert json.loads((tmp_path / "pairs" / "statistics.json").read_text())["pairs"] == len(pairs)
    by_place = {(row["image"]["bytes"], row["question"], row["idx"], row["answer_number"]): row for row in judged}
    kept = [name for name in PROMPT_COLUMNS if name not in ("chosen", "rejected")]
    assert pairs.table.column_names == [*kept, "chosen", "rejected", *(f"{s}_{n}" for s in ("chosen", "rejected") for n in SIDE_COLUMNS)]
    for pair, stored in zip(pairs, pairs.table.to_list(), strict=True):
        encode_pair(adapter, pair)
        for side in ("chosen", "rejected"):
            answer = by_place[pair.image_bytes, pair.question, pair.idx, stored[f"{side}_answer_number"]]
            assert stored[side] == answer["answer"]
            assert {name: stored[f"{side}_{name}"] for name in SIDE_COLUMNS} == {name: answer[name] for name in SIDE_COLUMNS}
        assert stored["chosen_score"] > stored["rejected_score"]


def test_a_killed_run_goes_on(run, generation, labeling, tmp_path, load_recipe, monkeypatch):
    """A generation that dies in its second shard, a labeling that dies in its third: each ends with the files of an undisturbed one."""
    run("generate_responses", **generation)
    run("score_claims", **labeling)
    answers, judged = contents(tmp_path / "answers"), contents(tmp_path / "judged")

    generation["output_dir"], labeling["output_dir"] = tmp_path / "answers2", tmp_path / "judged2"
    for recipe, function, flags, expected, dies_at in (
        ("generate_responses", "generate", generation, answers, 4),
        ("score_claims", "give_feedback", labeling, judged, 3),
    ):
        module = load_recipe(f"data/{recipe}.py")
        whole, calls = getattr(module, function), []

        def dies(*args, whole=whole, calls=calls, dies_at=dies_at):
            calls.append(args)
            if len(calls) == dies_at:
                raise KeyboardInterrupt
            return whole(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, function, dies)
            run(recipe, **flags)
        begun = contents(flags["output_dir"])
        assert 1 < len([name for name in begun if name in expected]) < len(expected)
        run(recipe, **flags)
        assert contents(flags["output_dir"]) == expected
        monkeypatch.setattr(module, "load_policy", None)
        run(recipe, **flags)  # nothing is missing: no model is loaded


def test_other_settings_are_refused(run, generation, labeling, tmp_path):
    run("generate_responses", **generation | {"max_rows": 2})
    with pytest.raises(ValueError, match="settings.temperature: the run in this folder has 0.9, this one 0.8"):
        run("generate_responses", **generation | {"max_rows": 2, "temperature": 0.8})
    run("score_claims", **labeling)
    with pytest.raises(ValueError, match="settings.splitter: the run in this folder has rules, this one shapeworld"):
        run("score_claims", **labeling | {"splitter": "shapeworld"})
    with pytest.raises(ValueError, match="answer, answer_number, failure, prompt_row, truncated, which this command writes"):
        run("generate_responses", **generation | {"data_path": tmp_path / "answers", "output_dir": tmp_path / "again"})
    with pytest.raises(ValueError, match="only --labeler policy has a model"):
        run("score_claims", **labeling | {"labeler": "shapeworld_truth"})


def test_prompts_that_cannot_be_used_keep_a_row(run, generation, labeling, tmp_path, tiny_rows_path):
    broken = pq.read_table(tiny_rows_path).slice(0, 4).to_pylist()
    broken[1]["image"]["bytes"] = b"no image"
    broken[2]["question"] = "What is </s>?"
    pq.write_table(pa.Table.from_pylist(broken), tmp_path / "broken.parquet")
    summary = run("generate_responses", **generation | {"data_path": tmp_path / "broken.parquet", "num_answers": 2})
    assert (summary.prompts, summary.answers, summary.failures) == (4, 4, 2)
    answers = rows(tmp_path / "answers")
    assert [(row["prompt_row"], row["answer_number"], row["answer"] is None) for row in answers] == [
        (0, 0, False),
        (0, 1, False),
        (1, 0, True),
        (2, 0, True),
        (3, 0, False),
        (3, 1, False),
    ]
    assert answers[2]["failure"].startswith("image does not decode") and "'</s>'" in answers[3]["failure"]
    run("score_claims", **labeling)
    judged = rows(tmp_path / "judged")
    assert [row["failure"] for row in judged[2:4]] == [row["failure"] for row in answers[2:4]]
    assert [row["score"] for row in judged[2:4]] == [None, None]

    for row in broken:
        row["image"]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(broken), tmp_path / "all_broken.parquet")
    with pytest.raises(ValueError, match="no prompt could be used; the first failed because image does not decode"):
        run("generate_responses", **generation | {"data_path": tmp_path / "all_broken.parquet", "output_dir": tmp_path / "none"})


# --- a server as splitter and labeler


def speaking_server(body: dict) -> str | tuple[int, str]:
    """Splits at full stops, asks "Is it so: ...?", and says yes with .8 to every question that is of even length."""
    content = body["messages"][0]["content"]
    if not isinstance(content, str):
        even = len(content[1]["text"]) % 2 == 0
        top = [{"token": "Yes", "logprob": math.log(0.8 if even else 0.1)}, {"token": " no", "logprob": math.log(0.2 if even else 0.9)}]
        choice = {"message": {"content": "Yes"}, "finish_reason": "length", "logprobs": {"content": [{"top_logprobs": top}]}}
        return 200, json.dumps({"model": "m", "choices": [choice]})
    if "Answer: " in content:
        parts = [part.strip() for part in content.rpartition("Answer: ")[2].split(".") if part.strip()]
        return "\n".join(f"{number}. {part}." for number, part in enumerate(parts, 1)) or "NONE"
    items = [line for line in content.splitlines() if line[:1].isdigit()]
    return "\n".join(f"{number}. Is it so: {item}" for number, item in enumerate(items, 1))


def test_a_server_generates(run, generation, tmp_path, tiny_rows_path):
    """Answers name their request's seed; one request fails for good, one answer is cut, one picture is broken."""
    broken = pq.read_table(tiny_rows_path).slice(0, 3).to_pylist()
    broken[1]["image"]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(broken), tmp_path / "broken.parquet")
    unlucky, cut = request_seed(7, 0, 1), request_seed(7, 2, 2)

    def answer(body):
        picture, text = body["messages"][0]["content"]
        if body["seed"] == unlucky:
            return 400, "{}"
        choice = {"message": {"content": f" {body['seed']} {text['text']}\n"}, "finish_reason": "length" if body["seed"] == cut else "stop"}
        return 200, json.dumps({"model": "m", "choices": [choice]})

    flags = generation | {"data_path": tmp_path / "broken.parquet", "model_name_or_path": "served", "generator": "endpoint", "seed": 7}
    with serve(answer) as server:
        summary = run("generate_responses", **flags, base_url=server.url)
        assert len(server.requests) == 6
        assert {(body["model"], body["temperature"], body["max_tokens"]) for body in server.requests} == {("served", 0.9, 10)}
        url = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
        assert base64.b64decode(url.partition(",")[2]) in [row["image"]["bytes"] for row in broken]
    answers = rows(tmp_path / "answers")
    assert (summary.prompts, summary.answers, summary.truncated, summary.failures) == (3, 5, 1, 2)
    expected = [(row, k) for row, count in ((0, 3), (1, 1), (2, 3)) for k in range(count)]
    assert [(row["prompt_row"], row["answer_number"]) for row in answers] == expected
    for row, (number, k) in zip(answers, expected, strict=True):
        if (number, k) == (0, 1) or number == 1:
            assert row["answer"] is None and ("request failed" if number == 0 else "does not decode") in row["failure"]
        else:
            assert row["answer"] == f"{request_seed(7, number, k)} {row['question']}" and row["truncated"] == ((number, k) == (2, 2))
    with pytest.raises(ValueError, match="--generator endpoint with --base_url None"):
        run("generate_responses", **flags)
    beams = flags | {"num_answers": 1, "temperature": 0, "num_beams": 2}
    with pytest.raises(ValueError, match="--generator endpoint with --num_beams 2"):
        run("generate_responses", **beams, base_url="http://localhost:1/v1")


def test_beams(run, generation, tmp_path):
    flags = generation | {"num_answers": 1, "temperature": 0, "shard_rows": 24}
    first, second, greedy = (
        [row["answer"] for row in beam_rows(run, flags, tmp_path / name, beams)] for name, beams in (("a", 3), ("b", 3), ("c", 1))
    )
    assert first == second and first != greedy and len(first) == len(greedy) == 24
    with pytest.raises(ValueError, match="num_beams"):  # an output folder keeps its settings
        run("generate_responses", **flags | {"output_dir": tmp_path / "a", "num_beams": 2})


def beam_rows(run, flags: dict, folder: Path, num_beams: int) -> list[dict]:
    run("generate_responses", **flags | {"output_dir": folder, "num_beams": num_beams})
    return rows(folder)


def test_a_server_splits_and_labels(run, world_answers, tmp_path):
    folder, scenes = world_answers
    flags = {"data_path": folder, "column_map": "image=picture,question=ask", "shard_rows": 5, "num_workers": 0}
    with serve(speaking_server) as server:
        models = {"labeler": "endpoint", "labeler_model": "eyes", "labeler_base_url": server.url}
        models |= {"splitter": "endpoint", "splitter_model": "words", "splitter_base_url": server.url}
        summary = run("score_claims", output_dir=tmp_path / "judged", **flags, **models)
        asked = len(server.requests)
        again = run("score_claims", output_dir=tmp_path / "judged", **flags, **models)
        assert again == summary and len(server.requests) == asked, "what is finished is not asked again"
        (tmp_path / "judged" / "shard-00001-of-00003.parquet").unlink()
        run("score_claims", output_dir=tmp_path / "judged", **flags, **models)
        assert len(server.requests) == asked, "replies are stored beside the shards"
    judged = rows(tmp_path / "judged")
    assert summary.answers == len(judged) == 12 and summary.failures == 3
    for row in judged:
        parts = [part.strip() for part in row["answer"].split(".") if part.strip()]
        assert row["claims"] == [f"{part}." for part in parts]
        assert row["claim_questions"] == [f"Is it so: {n}. {part}. Please answer yes or no." for n, part in enumerate(parts, 1)]
        assert row["score"] == (-sum(len(question) % 2 for question in row["claim_questions"]) if parts else None)
    manifest = json.loads((tmp_path / "judged" / "muffin_labeler.json").read_text())
    assert manifest["labeler"] == {"endpoint": "eyes"}
    assert (manifest["settings"]["splitter_model"], manifest["settings"]["splitter_prompt"]) == ("words", "muffin-claims-1")

    for wrong, message in (
        ({"splitter": "llm"}, "--splitter_model is missing with --splitter llm"),
        ({"splitter_base_url": "http://x"}, "--splitter_base_url means nothing with --splitter rules"),
        ({"labeler": "endpoint", "labeler_model": "m"}, "--labeler_base_url is missing with --labeler endpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            run("score_claims", output_dir=tmp_path / "none", **flags, **({"labeler": "shapeworld_truth"} | wrong))


# --- the tiny world: ground truth as labeler, and columns of other names


@pytest.fixture
def world_answers(tmp_path) -> tuple[Path, list[Scene]]:
    """Four answers to each of three scenes: true, true but for the last sentence, the same again, no statement at all."""
    scenes = sample_scenes(WORLDS["small"], 3, 0, "test")
    table = []
    for number, scene in enumerate(scenes):
        sentences = [f"{thing.place} there is a {thing.color} {thing.shape}." for thing in scene.objects]
        place, color = scene.objects[-1].place, next(c for c in ("red", "green", "blue") if c != scene.objects[-1].color)
        wrong = " ".join([*sentences[:-1], f"{place} there is a {color} {scene.objects[-1].shape}."])
        for k, answer in enumerate([wrong, " ".join(sentences), wrong, ""]):
            table.append(
                {
                    "picture": {"bytes": encode_png(draw(scene)), "path": None},
                    "ask": DESCRIBE,
                    "scene": scene.to_json(),
                    "prompt_row": number,
                    "answer_number": k,
                    "answer": answer,
                    "truncated": False,
                    "failure": None,
                }
            )
    (tmp_path / "answers").mkdir()
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "answers" / "made.parquet")
    return tmp_path / "answers", scenes


def test_ground_truth_as_labeler(run, world_answers, tmp_path):
    folder, scenes = world_answers
    names = {"column_map": "image=picture,question=ask"}
    summary = run(
        "score_claims", data_path=folder, output_dir=tmp_path / "judged", labeler="shapeworld_truth", splitter="shapeworld", **names
    )
    judged = rows(tmp_path / "judged")
    assert [row["score"] for row in judged] == [-1, 0, -1, None] * 3
    assert summary.failures == 3 and {row["failure"] for row in judged[3::4]} == {
        "no claims: the answer states nothing that can be checked"
    }
    ratios = answer_ratios([row["answer"] for row in judged], [scene for scene in scenes for _ in range(4)])
    assert ratios["claim_error"].value == pytest.approx(100 * (1 - summary.accepted))
    assert ratios["claim_error"].value == wrong_claims([[p > 0 for p in row["p_yes"]] for row in judged]).value > 0

    statistics = run("build_pairs", data_path=tmp_path / "judged", output_dir=tmp_path / "pairs", **names)
    assert (statistics.different, statistics.candidates, statistics.capped, statistics.pairs) == (3, 3, 3, 3)
    assert (statistics.scores, statistics.gaps) == ({0: 3, -1: 6}, {1: 3})
    pairs = load_preferences(tmp_path / "pairs")  # under muffin's own names
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(judged[n]["answer"], judged[n - 1]["answer"]) for n in (1, 5, 9)]
    assert [pair.image_bytes for pair in pairs] == [judged[n]["picture"]["bytes"] for n in (0, 4, 8)]

    with pytest.raises(ValueError, match="no pair with --min_score_gap 2"):
        run("build_pairs", data_path=tmp_path / "judged", output_dir=tmp_path / "none", min_score_gap=2, **names)
    with pytest.raises(ValueError, match="lacks claim_questions, claims, p_no, p_yes, score; make it with data/score_claims.py"):
        run("build_pairs", data_path=folder, output_dir=tmp_path / "none", **names)
