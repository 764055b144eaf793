"""The rule-based benchmarks and best-of-N from their command lines, on answers by hand and on what data/generate_responses.py writes."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from muffin import provenance
from muffin.generation import ANSWER_FEATURES
from muffin.policies import PolicyOptions
from muffin.reward import load_reward_model
from muffin.shapeworld.model import build_adapter, build_policy, save_policy
from muffin.shapeworld.scenes import WORLDS, Scene, Thing, draw, encode_png

WORLD = WORLDS["small"]
SCENES = [
    Scene("small", 0, (Thing("red", "circle", WORLD.places[0], "large"), Thing("blue", "square", WORLD.places[1], "small")), 1),
    Scene("small", 0, (Thing("green", "triangle", WORLD.places[2], "large"),), 2),
]
PICTURES = [{"bytes": encode_png(draw(scene)), "path": f"{number}.png"} for number, scene in enumerate(SCENES)]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow_cache")


@pytest.fixture
def run(load_recipe) -> Callable:
    """run("eval/pope.py", **flags) calls the recipe's main with the flags."""

    def function(recipe: str, **flags):
        return load_recipe(recipe).main([word for name, value in flags.items() for word in (f"--{name}", str(value))])

    return function


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_prompts(path: Path, rows: list[dict]) -> Path:
    """Rows of shapeworld, each on the picture number `picture`."""
    filled = [
        {"image": PICTURES[row["picture"]], "image_path": f"{row['picture']}.png", "scene": SCENES[row["picture"]].to_json()}
        | {name: value for name, value in row.items() if name != "picture"}
        for row in rows
    ]
    table = datasets.Dataset.from_list(filled)
    types = {
        name: datasets.Image() if name == "image" else ANSWER_FEATURES.get(name, feature)  # a column of nulls has no type
        for name, feature in table.features.items()
    }
    table.cast(datasets.Features(types)).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> list[Path]:
    """Two untrained policies of the tiny world."""
    adapter = build_adapter(WORLD)
    folders = [tmp_path_factory.mktemp(f"policy-{seed}") for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        save_policy(build_policy(WORLD, adapter.tokenizer, seed), adapter, folder)
    return folders


def generate(run, policy: Path, data: Path, output: Path) -> Path:
    flags = {"num_answers": 1, "temperature": 0, "max_new_tokens": 8, "dtype": "float32", "num_workers": 0}
    run("data/generate_responses.py", model_name_or_path=policy, data_path=data, output_dir=output, **flags)
    return output


# --- POPE


def pope_files(tmp_path: Path) -> dict[str, Path]:
    rows = [("a", "yes", "Yes, it is."), ("a", "no", "No"), ("b", "yes", "There is not."), ("b", "no", "yes"), ("c", "yes", "Yes")]
    questions = [{"question_id": n, "image": i, "text": "Is there?", "label": truth} for n, (i, truth, _) in enumerate(rows)]
    answers = [{"question_id": n, "prompt": "Is ther?", "text": text} for n, (_, _, text) in enumerate(rows)]
    return {
        "questions": write_lines(tmp_path / "q.json", questions),
        "answers": write_lines(tmp_path / "a.jsonl", answers[::-1]),
        "output": tmp_path / "pope.json",
    }


def test_pope_by_hand(run, tmp_path, capsys):
    files = pope_files(tmp_path)
    result = run("eval/pope.py", **files)
    assert json.loads(files["output"].read_text()) == result
    expected = {"tp": 2, "fp": 1, "tn": 1, "fn": 1, "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5}
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert result["questions"] == 5 and result["unclear"] == 0 and result["intervals_over"] == "3 images"
    assert result["intervals"]["accuracy"] == [0, 1]  # all of the draws may be of image b, or of c
    assert "accuracy      0.6000   [0.0000, 1.0000]" in capsys.readouterr().out


def test_pope_refuses_answers_to_other_questions(run, tmp_path):
    files = pope_files(tmp_path)
    files["answers"].write_text(files["answers"].read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match="found 4 answers to 5 questions"):
        run("eval/pope.py", **files)
    assert not files["output"].exists()


def test_pope_on_generated_answers(run, tmp_path, policies):
    rows = [
        {"picture": n // 2, "question": "Is there a red circle in the image?", "chosen": truth, "kind": kind}
        for n, (truth, kind) in enumerate([("Yes.", "random"), ("Yes.", "adversarial"), ("No.", "random"), ("No.", "adversarial")])
    ]
    data = write_prompts(tmp_path / "pope.parquet", rows)
    answers = generate(run, policies[0], data, tmp_path / "answers")
    result = run("eval/pope.py", questions=data, answers=answers, output=tmp_path / "pope.json")
    assert result["tp"] + result["fn"] == result["fp"] + result["tn"] == 2
    assert result["intervals_over"] == "2 images"
    assert {kind: part["questions"] for kind, part in result["kinds"].items()} == {"adversarial": 2, "random": 2}


# --- CHAIR


def test_chair_by_hand(run, tmp_path):
    (tmp_path / "synonyms.txt").write_text("person, man\ndog, puppy\ndining table, table\n")
    captions = [
        {"image": "COCO_val2014_000000000007.jpg", "caption": "Two men, a puppy and a puppy."},
        {"image_id": 8, "answer": "A table."},
        {"image_id": 8, "text": "A man at a table."},
    ]
    flags = {
        "answers": write_lines(tmp_path / "a.jsonl", captions),
        "synonyms": tmp_path / "synonyms.txt",
        "truth": write_json(tmp_path / "truth.json", {"7": ["person"], "8": ["dining table", "dog"]}),
        "output": tmp_path / "chair.json",
    }
    result = run("eval/chair.py", **flags)
    assert json.loads(flags["output"].read_text()) == result
    # mentions: person dog dog | table | person table; hallucinated 2, 0, 1 of 6; covered 1/1, 1/2, 1/2
    values = {name: result[name] for name in ("chair_s", "chair_i", "recall", "chair_s_refined", "f1", "words")}
    expected = {
        "chair_s": 200 / 3,
        "chair_i": 300 / 6,
        "recall": 300 / 5,
        "chair_s_refined": 200 / 3,
        "f1": 2 * 60 * 50 / 110,
        "words": 14 / 3,
    }
    assert values == pytest.approx(expected)
    assert result["rules"] == {"lemmatizer": "simple"} and result["intervals_over"] == "2 images"
    assert result["per_caption"][0] == {
        "image": "7",
        "objects": ["person", "dog", "dog"],
        "truth": ["person"],
        "CHAIRs": 1,
        "CHAIRi": pytest.approx(2 / 3),
        "Recall": 1.0,
    }
    with pytest.raises(ValueError, match="--lemmatizer stored: row 0"):
        run("eval/chair.py", **flags, lemmatizer="stored")
    write_json(flags["truth"], {"7": []})
    with pytest.raises(ValueError, match="2 pictures have no true objects, the first is image_id 8"):
        run("eval/chair.py", **flags)
    with pytest.raises(ValueError, match="give one"):
        run("eval/chair.py", **flags, coco_annotations=tmp_path)
    with pytest.raises(ValueError, match="--synonyms is missing"):
        run("eval/chair.py", answers=flags["answers"], output=flags["output"])


def test_chair_of_shapeworld_by_hand(run, tmp_path):
    place = WORLD.places[0].capitalize()
    rows = [
        {"picture": 0, "question": "Describe.", "answer": f"{place} there is a red circle. Also, {WORLD.places[1]} there is a red cross."},
        {"picture": 1, "question": "Describe.", "answer": f"{place} I see a green triangle."},
    ]
    result = run("eval/chair.py", answers=write_prompts(tmp_path / "a.parquet", rows), output=tmp_path / "chair.json")
    values = {name: result[name] for name in ("chair_s", "chair_i", "recall")}
    assert values == pytest.approx({"chair_s": 50, "chair_i": 100 / 3, "recall": 200 / 3})
    assert result["rules"] == {"lemmatizer": "shapeworld"}


def test_chair_on_generated_answers(run, tmp_path, policies):
    data = write_prompts(tmp_path / "heldout.parquet", [{"picture": n, "question": "Describe the image."} for n in (0, 1)])
    answers = generate(run, policies[0], data, tmp_path / "answers")
    result = run("eval/chair.py", answers=answers, output=tmp_path / "chair.json")
    assert result["captions"] == 2 and result["intervals_over"] == "2 images"


def test_chair_on_captions_of_the_original_script(run, tmp_path, samples):
    folder = samples / "chair"
    flags = {"answers": folder / "captions_100.json", "synonyms": folder / "synonyms_refine.txt", "output": tmp_path / "chair.json"}
    stored = run("eval/chair.py", **flags, lemmatizer="stored")
    # two say "pedestrian", which the script's own synonyms lack
    assert stored["agreement"]["stored"] == {"same objects": 98, "same CHAIRs": 100, "same CHAIRi": 98, "of captions": 100}
    assert run("eval/chair.py", **flags)["agreement"] == stored["agreement"]  # whatever --lemmatizer is
    assert stored["agreement"]["simple"]["same objects"] == 80


def test_agreement_of_every_lemmatizer(run, tmp_path, small_nltk, capsys):
    """As if made by parts of speech: "seated" is a chair there, and nowhere else."""
    (tmp_path / "synonyms.txt").write_text("person, man\nchair, seat\nbench\n")
    captions = [("Two men seated .", ["person", "chair"], ["two", "man", "seat", "."]), ("A bench .", ["bench"], ["a", "bench", "."])]
    rows = [
        {"image_id": number, "caption": text, "mscoco_gt_words": ["person", "bench"], "mscoco_generated_words": objects, "words": words}
        for number, (text, objects, words) in enumerate(captions)
    ]
    flags = {"answers": write_json(tmp_path / "a.json", {"sentences": rows}), "synonyms": tmp_path / "synonyms.txt"}
    found = run("eval/chair.py", **flags, output=tmp_path / "chair.json", lemmatizer="nltk-pos")
    both = {"same objects": 2, "same CHAIRs": 2, "same CHAIRi": 2, "of captions": 2}
    one = {"same objects": 1, "same CHAIRs": 1, "same CHAIRi": 1, "of captions": 2}
    assert found["agreement"] == {"simple": one, "chair": one, "rlaifv": one, "nltk-pos": both, "stored": both}
    assert found["chair_i"] == pytest.approx(100 / 3)
    assert "nltk-pos  same objects 2, same CHAIRs 2" in capsys.readouterr().out


# --- AMBER


@pytest.fixture
def amber_files(tmp_path) -> dict[str, Path]:
    annotations = [
        {"id": 1, "type": "generative", "truth": ["sky", "road"], "hallu": ["cloud"]},
        {"id": 2, "type": "generative", "truth": ["dog"], "hallu": ["sky"]},
        {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 4, "type": "relation", "truth": "no"},
    ]
    (tmp_path / "safe_words.txt").write_text("light\n")
    return {
        "annotations": write_json(tmp_path / "annotations.json", annotations),
        "relation": write_json(tmp_path / "relation.json", {"sky": [], "road": ["street"], "cloud": [], "dog": ["puppy"], "light": []}),
        "safe_words": tmp_path / "safe_words.txt",
        "output": tmp_path / "amber.json",
    }


def test_amber_by_hand(run, tmp_path, amber_files, capsys):
    responses = {4: "No.", 1: "Clouds over a street in bright light.", 2: "A puppy.", 3: "No"}
    answers = write_json(tmp_path / "a.json", [{"id": number, "response": text} for number, text in responses.items()])
    queries = write_json(tmp_path / "q.json", [{"id": n, "image": f"AMBER_{1 + n % 2}.jpg", "query": ""} for n in range(1, 5)])
    rules = {"extractor": "vocabulary", "similarity": "exact"}
    result = run("eval/amber.py", **amber_files, answers=answers, queries=queries, **rules)
    assert json.loads(amber_files["output"].read_text()) == result
    # nouns cloud, street, light | puppy: 1 of 4, 100 / 4.001 = 24.994; road and dog of 3: 66.644; 1 of 2 clean: 50.025; cloud of 2 traps
    assert {name: result[name] for name in ("CHAIR", "Cover", "Hal", "Cog")} == {"CHAIR": 25.0, "Cover": 66.6, "Hal": 50.0, "Cog": 50.0}
    # "No." is no answer: 1 of 2 right, 1 of 2 noes found, the one said is right: precision 100 / 1.001, F1 = 2 * .999 * .5 / 1.4991
    assert [result[f"all {name}"] for name in ("accuracy", "precision", "recall", "F1")] == [50.0, 99.9, 50.0, 66.6]
    assert result["existence recall"] == 99.9 and result["relation recall"] == 0
    assert result["score"] == (100 - 25.0 + 66.6) / 2
    assert result["neither_yes_nor_no"] == 1
    assert result["answered"]["generative"] == "2 of 2" and result["answered"]["relation"] == "1 of 1"
    assert result["rules"] == {**rules, "answer_rule": "exact"} and result["as_published"] is False
    assert result["intervals_over"] == "2 images"
    assert result["intervals"]["CHAIR"] == pytest.approx([0, 33.33], abs=0.01)  # image 1 has nothing wrong, image 2 one noun of three
    assert "extractor vocabulary, similarity exact" in capsys.readouterr().out

    spoken = run("eval/amber.py", **amber_files, answers=answers, **rules, answer_rule="first_word")
    assert spoken["relation recall"] == 99.9 and spoken["neither_yes_nor_no"] == 0
    assert spoken["intervals_over"] == "4 images"


def test_amber_of_part_of_the_questions(run, tmp_path, amber_files):
    rules = {"extractor": "vocabulary", "similarity": "exact"}
    answers = write_lines(tmp_path / "a.jsonl", [{"response": "Sky."}, {"response": "Dog."}])
    result = run("eval/amber.py", **amber_files, answers=answers, **rules)
    assert result["answered"]["generative"] == "2 of 2" and result["answered"]["relation"] == "0 of 1"
    assert "all F1" not in result and "score" not in result
    for rows, message in (
        ([{"response": "a"}] * 3, "found 3 answers without ids, want 4, or 2 descriptions"),
        ([{"id": 1, "response": "a"}] * 2, "id 1 occurs 2 times"),
        ([{"id": 9, "response": "a"}], "1 ids are not in --annotations, the first is 9"),
    ):
        with pytest.raises(ValueError, match=message):
            run("eval/amber.py", **amber_files, answers=write_lines(tmp_path / "b.jsonl", rows), **rules)


def test_amber_says_what_is_missing(run, tmp_path, amber_files, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    answers = write_json(tmp_path / "a.json", [{"id": 1, "response": "A cloud."}])
    result = run("eval/amber.py", **amber_files, answers=answers, similarity="exact")
    assert result["rules"]["extractor"] == "vocabulary"
    with pytest.raises(ValueError, match="python -m nltk.downloader"):
        run("eval/amber.py", **amber_files, answers=answers, extractor="nltk")


# --- best of N

RIGHT = f"{WORLD.places[0].capitalize()} there is a red circle."
WRONG = f"{WORLD.places[0].capitalize()} there is a green circle."
ANSWERS = [
    [RIGHT, WRONG, f"{RIGHT} Also, {WORLD.places[3]} there is a red square.", RIGHT],
    [f"{WORLD.places[2].capitalize()} I see a green triangle.", WRONG, f"{WRONG} {WRONG}", ""],
]
WRONG_CLAIMS = [[0, 1, 1, 0], [0, 1, 2, 0]]
CLAIMS = [[1, 1, 2, 1], [1, 1, 2, 0]]


@pytest.fixture
def candidates(tmp_path) -> Path:
    rows = [
        {"picture": prompt, "question": "Describe the image.", "quality": float(-WRONG_CLAIMS[prompt][number])}
        | {"prompt_row": prompt, "answer_number": number, "answer": text, "truncated": False, "failure": None}
        for prompt, texts in enumerate(ANSWERS)
        for number, text in enumerate(texts)
    ]
    failed = {"prompt_row": 2, "answer_number": 0, "answer": None, "truncated": None, "failure": "image does not decode"}
    rows.append({"picture": 0, "question": "Describe the image.", "quality": None, **failed})
    return write_prompts(tmp_path / "candidates.parquet", rows)


@pytest.fixture
def flags(policies, candidates, tmp_path) -> dict:
    return {
        "model_name_or_path": policies[1],
        "reference_name_or_path": policies[0],
        "data_path": candidates,
        "output_dir": tmp_path / "best",
        "dtype": "float32",
        "num_workers": 0,
    }


def test_best_of_n(run, flags, policies, capsys):
    result = run("eval/best_of_n.py", **flags)
    output = flags["output_dir"]
    assert json.loads((output / "best_of_n.json").read_text()) == result
    assert (output / "best_of_n.png").read_bytes().startswith(b"\x89PNG")
    assert result["n"] == [1, 2, 4] and result["prompts"] == 2
    assert result["prompts_left_out"] == {"without answers": 1, "that cannot be encoded": 0}
    assert set(result["curves"]) == {"reward_mean", "reward_sum", "policy_mean_logp", "random", "oracle"}

    # Rewards are the reward model's.
    model = load_reward_model(policies[1], policies[0], dtype="float32", options=PolicyOptions())
    rewards = [model.reward(draw(scene), "Describe the image.", texts) for scene, texts in zip(SCENES, ANSWERS, strict=True)]
    rows = pq.read_table(output / "rewards.parquet").to_pylist()
    assert "image" not in rows[0] and len(rows) == 8
    for row, reward in zip(rows, [reward for each in rewards for reward in each], strict=True):
        assert row["reward_sum"] == pytest.approx(reward.sum, abs=1e-5) and row["tokens"] == len(reward.per_token)
        assert row["reward_mean"] == pytest.approx(reward.mean, abs=1e-5)
        assert row["policy_mean_logp"] == pytest.approx(reward.policy_mean_logp, abs=1e-5)

    # Without a choice: all candidates, whatever N. The oracle with all four: no wrong claim, and of those the one that covers most.
    def curve(selector, metric):
        return [point["value"] for point in result["curves"][selector][metric]]

    assert curve("random", "claim_error") == pytest.approx([100 * 5 / 9] * 3)
    assert all(curves["claim_error"][0]["value"] == pytest.approx(100 * 5 / 9) for curves in result["curves"].values())
    assert curve("oracle", "claim_error")[-1] == 0
    assert curve("oracle", "recall")[-1] == pytest.approx(100 * 2 / 3)  # 1 of 2 and 1 of 1 objects

    # In between, by drawing every two of four and keeping the better.
    for selector, column in (("reward_sum", "reward_sum"), ("reward_mean", "reward_mean"), ("policy_mean_logp", "policy_mean_logp")):
        wrong = total = 0.0
        for prompt in range(2):
            scores = [row[column] for row in rows[4 * prompt : 4 * prompt + 4]]
            for pair in combinations(range(4), 2):
                best = max(scores[k] for k in pair)
                winners = [k for k in pair if scores[k] == best]
                wrong += sum(WRONG_CLAIMS[prompt][k] for k in winners) / len(winners)
                total += sum(CLAIMS[prompt][k] for k in winners) / len(winners)
        assert curve(selector, "claim_error")[1] == pytest.approx(100 * wrong / total)
        gain = result["gain_over_random_at_4"][selector]["claim_error"]
        assert gain["value"] == pytest.approx(curve(selector, "claim_error")[-1] - 100 * 5 / 9)
        assert gain["low"] <= gain["value"] <= gain["high"]

    selected = pq.read_table(output / "selected.parquet").to_pylist()
    for prompt, row in enumerate(selected):
        assert row["reward_mean"] == max(each["reward_mean"] for each in rows[4 * prompt : 4 * prompt + 4])
        assert row["image"]["bytes"] == PICTURES[prompt]["bytes"]
    assert run("eval/chair.py", answers=output / "selected.parquet", output=output / "chair.json")["captions"] == 2
    assert "N=4" in capsys.readouterr().out


def test_best_of_n_with_a_column_of_truth(run, flags):
    result = run("eval/best_of_n.py", **flags, truth_column="quality", max_n=3, select="reward_sum")
    assert result["n"] == [1, 2]
    random, oracle = (result["curves"][name]["quality"] for name in ("random", "oracle"))
    assert [point["value"] for point in random] == pytest.approx([-5 / 8] * 2)
    # best of two: first prompt 5 of 6 pairs hold a 0; second prompt (0, -1, -2, 0): the pair (-1, -2) gives -1
    assert oracle[1]["value"] == pytest.approx((-1 / 6 - 1 / 6) / 2)
    rows = pq.read_table(flags["output_dir"] / "rewards.parquet").to_pylist()
    selected = pq.read_table(flags["output_dir"] / "selected.parquet").to_pylist()
    assert [row["reward_sum"] for row in selected] == [max(row["reward_sum"] for row in rows[s : s + 4]) for s in (0, 4)]


def test_best_of_n_leaves_out_what_cannot_be_encoded(run, flags, candidates):
    rows = pq.read_table(candidates).to_pylist()
    rows[2]["answer"] = "A </s> in the middle."
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(candidates)
    result = run("eval/best_of_n.py", **flags)
    assert result["prompts"] == 1 and result["prompts_left_out"] == {"without answers": 1, "that cannot be encoded": 1}


def test_best_of_n_names_what_it_needs(run, flags, tmp_path):
    with pytest.raises(ValueError, match="--truth_column nothing: found the columns"):
        run("eval/best_of_n.py", **flags, truth_column="nothing")
    with pytest.raises(ValueError, match="--truth_column question: row 0 holds 'Describe the image.', want a number"):
        run("eval/best_of_n.py", **flags, truth_column="question")
    prompts = write_prompts(tmp_path / "prompts.parquet", [{"picture": 0, "question": "Describe the image."}])
    with pytest.raises(ValueError, match="lacks answer, answer_number, failure, prompt_row, truncated; make it with data/generate_resp"):
        run("eval/best_of_n.py", **{**flags, "data_path": prompts})
    with pytest.raises(ValueError, match="--max_n 0"):
        run("eval/best_of_n.py", **flags, max_n=0)
