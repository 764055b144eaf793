"""The judged benchmarks from their command lines, on stored replies: scores by hand, and what is missing."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from muffin.judge import Reply


class StoredJudge:
    """Replies in the order of the prompts; None is a failed request."""

    name = "stored"

    def __init__(self, replies: Sequence[str | None]) -> None:
        self.replies = list(replies)
        self.prompts: list[str] = []

    def ask(self, prompts):
        self.prompts += prompts
        taken, self.replies = self.replies[: len(prompts)], self.replies[len(prompts) :]
        assert len(taken) == len(prompts)
        return [Reply(text) if text is not None else Reply(None, "request failed: 503") for text in taken]

    def describe(self):
        return {"model": "stored", "date": "2026-01-01"}


@pytest.fixture
def run(load_recipe, monkeypatch):
    """run("eval/mmhal.py", replies, **flags): the recipe's result, and the judge that gave the replies."""

    def function(path: str, replies: Sequence[str | None], **flags):
        recipe, judge = load_recipe(path), StoredJudge(replies)
        monkeypatch.setattr(recipe, "load_judge", lambda options, output, environment: judge)
        result = recipe.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
        assert judge.replies == []
        assert json.loads(Path(flags["output"]).read_text()) == json.loads(json.dumps(result))
        return result, judge

    return function


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- MMHal-Bench


@pytest.fixture
def mmhal_files(tmp_path) -> dict[str, Path]:
    kinds = ("attribute", "adversarial", "comparison", "attribute", "counting")
    template = [
        {
            "question_type": kind,
            "image_id": f"i{n}",
            "image_content": ["Cat"],
            "question": f"Q{n}?",
            "gt_answer": f"G{n}.",
            "model_answer": "",
        }
        for n, kind in enumerate(kinds)
    ]
    answers = [{"image_id": f"i{n}", "question": f"Q{n}?", "answer": "word " * (n + 1)} for n in reversed(range(5))]
    (tmp_path / "template.json").write_text(json.dumps(template))
    return {
        "questions": tmp_path / "template.json",
        "answers": write_lines(tmp_path / "answers.jsonl", answers),
        "output": tmp_path / "mmhal.json",
    }


def test_mmhal_by_hand(run, mmhal_files, capsys):
    replies = ["All agrees.\nRating: 5", "It invents a dog.\nRating: 1", None, "Rating: 3", "I cannot tell."]
    result, judge = run("eval/mmhal.py", replies, **mmhal_files)
    # grades 5 1 3; one of three below 3; informative 2 + 1 + 0 of 3 each; words 1, 2, 4
    expected = {"score": 3, "hallucination_rate": 100 / 3, "informativeness": 100 * 3 / 9, "words": 7 / 3}
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert (result["score attribute"], result["score adversarial"]) == (4, 1)
    assert "score comparison" not in result and "score counting" not in result
    assert result["missing"] == {"request failed: 503": 1, "no readable rating": 1} and result["answers"] == 5
    assert result["judge"] == {"model": "stored", "date": "2026-01-01", "prompt": "muffin-mmhal-1"}
    assert "stored under the prompt muffin-mmhal-1 only; published" in result["comparable_with"] in capsys.readouterr().out
    assert result["intervals_over"] == "3 images" and result["per_image"]["images"] == ["i0", "i1", "i3"]
    assert [row["rating"] for row in result["per_answer"]] == [5, 1, None, 3, None]
    assert result["per_answer"][2]["failure"] == "request failed: 503"
    assert "Q2?" in judge.prompts[2] and "word word word" in judge.prompts[2] and "G2." in judge.prompts[2]  # matched by image_id


def test_mmhal_takes_the_filled_template(run, mmhal_files):
    template = json.loads(mmhal_files["questions"].read_text())
    filled = mmhal_files["questions"].with_name("filled.json")
    filled.write_text(json.dumps([row | {"model_answer": f"A{n}."} for n, row in enumerate(template)]))
    result, judge = run("eval/mmhal.py", ["Rating: 6"] * 5, **mmhal_files | {"answers": filled})
    assert result["score"] == 6 and result["hallucination_rate"] == 0 and result["informativeness"] == 100 and result["missing"] == {}
    assert all(f"A{n}." in prompt for n, prompt in enumerate(judge.prompts))


def test_mmhal_of_reviews_made_elsewhere(load_recipe, mmhal_files, tmp_path):
    def completion(text):
        return {"model": "gpt-4-1106-preview", "choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    reviews = [completion("Rating: 6"), completion("rating: 2"), None, {"review": "Rating: 0"}, "Rating: 4"]
    (tmp_path / "reviews.json").write_text(json.dumps(reviews))
    flags = [word for name, value in mmhal_files.items() for word in (f"--{name}", str(value))]
    result = load_recipe("eval/mmhal.py").main([*flags, "--reviews", str(tmp_path / "reviews.json")])
    assert result["score"] == (6 + 2 + 0 + 4) / 4 and result["hallucination_rate"] == 50
    assert result["rules"] == {"judge": "gpt-4-1106-preview", "prompt": "of the stored reviews"}
    assert result["missing"] == {"request failed: no review is stored": 1}
    (tmp_path / "reviews.json").write_text("\n".join(map(json.dumps, reviews[:3])))
    with pytest.raises(ValueError, match="reviews.json holds 3 reviews of 5 answers"):
        load_recipe("eval/mmhal.py").main([*flags, "--reviews", str(tmp_path / "reviews.json")])


def test_a_judge_that_never_answers_is_an_error(run, mmhal_files):
    with pytest.raises(ValueError, match="none of the 5 answers has a grade"):
        run("eval/mmhal.py", [None] * 5, **mmhal_files)
    assert not mmhal_files["output"].exists()


# --- RefoMB


@pytest.fixture
def refomb_files(tmp_path) -> dict[str, Path]:
    rows = [{"image_url": f"http://x/{n % 2}.jpg", "question": f"Q{n}?", "description": f"D{n}."} for n in range(3)]
    own = [{"image_url": row["image_url"], "question": row["question"], "answer": f"own {n}"} for n, row in enumerate(rows)]
    return {
        "questions": write_lines(tmp_path / "q.jsonl", rows),
        "reference_answers": write_lines(tmp_path / "g.jsonl", [row | {"answer": f"gpt {n}"} for n, row in enumerate(rows)][::-1]),
        "answers": write_lines(tmp_path / "a.jsonl", own[::-1]),
        "output": tmp_path / "refomb.json",
    }


def test_refomb_by_hand(run, refomb_files, capsys):
    published = ["B is better.\nChoice: B", "Choice: A", "no idea"]
    published_hall = ["Choice: B", "Choice: C"]  # asked about readable reviews only
    swapped = ["Choice: B", "Choice: C", "Choice: A"]
    swapped_hall = ["Choice: A", None, "who knows"]
    result, judge = run("eval/refomb.py", [*published, *swapped, *published_hall, *swapped_hall], **refomb_files)
    # as published the policy is B: win, loss, missing; swapped it is A: loss, tie, win
    expected = {"win_rate": 50, "win_rate_swapped": 50, "hall_win_rate": 75, "hall_win_rate_swapped": 100}
    # both orders: the first won and lost (1/2), the second lost and tied (1/4)
    expected |= {"win_rate_balanced": 100 * 0.75 / 2, "same_verdict": 0, "words": 2}
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert result["missing"] == {"published": {"no readable choice": 1}, "swapped": {}}
    assert result["missing_hall"] == {"published": 1, "swapped": 2}
    assert result["intervals_over"] == "2 images" and result["rules"]["orders"] == ["published", "swapped"]
    assert judge.prompts[0].index("gpt 0") < judge.prompts[0].index("own 0")
    assert judge.prompts[3].index("own 0") < judge.prompts[3].index("gpt 0")
    assert "B is better." in judge.prompts[6] and "D0." not in judge.prompts[6]  # the review alone
    assert result["per_answer"][0]["published"] == {"review": published[0], "hall_review": "Choice: B", "points": 1, "hall_points": 1}
    assert result["per_answer"][1]["swapped"]["failure"] == "request failed: 503"
    assert "published RefoMB numbers are by gpt-4-1106-preview" in capsys.readouterr().out


def test_refomb_as_published(run, refomb_files):
    result, _ = run("eval/refomb.py", ["Choice: C"] * 6, **refomb_files, order="published")
    assert result["win_rate"] == result["hall_win_rate"] == 50
    assert "win_rate_swapped" not in result and "win_rate_balanced" not in result


def test_refomb_names_a_question_without_answer(run, refomb_files):
    lines = refomb_files["answers"].read_text().replace("Q1?", "Q7?")
    refomb_files["answers"].write_text(lines)
    with pytest.raises(ValueError, match=r"1 questions have no answer, the first is key http://x/1.jpg Q1\?"):
        run("eval/refomb.py", [], **refomb_files)


# --- Object HalBench


def test_objects_listed_by_the_judge(run, tmp_path):
    (tmp_path / "synonyms.txt").write_text("person, man\ndog, puppy\ndining table, table\n")
    (tmp_path / "truth.json").write_text(json.dumps({"1": ["person"], "2": ["dog", "dining table"], "3": ["dog"], "4": ["dog"]}))
    captions = ["Two men with a puppy, a puppy.", "There is one dog at a table.", "A small dog sleeps.", "A dog."]
    rows = [{"image_id": n + 1, "caption": text} for n, text in enumerate(captions)]
    flags = {
        "answers": write_lines(tmp_path / "a.jsonl", rows),
        "synonyms": tmp_path / "synonyms.txt",
        "truth": tmp_path / "truth.json",
        "output": tmp_path / "objhal.json",
    }
    result, judge = run("eval/object_halbench.py", ['["two men", "puppy", "puppies"]', '["dog", "table"]', "a dog"], **flags)
    assert len(judge.prompts) == 3  # "A dog." is too short to be asked about, and names nothing
    # person dog | dog, dining table | missing | nothing: one of four mentions, one of three captions, one of two that name something
    expected = {"chair_i": 25, "chair_s": 100 / 3, "chair_s_refined": 50, "recall": 100 * 3 / 4}
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert result["missing"] == {"no readable list": 1} and result["per_image"]["images"] == ["1", "2", "4"]
    assert result["rules"] == {"judge": "stored", "prompt": "muffin-objects-1", "lemmatizer": "simple"}
    assert result["per_caption"][0]["objects"] == ["person", "dog"] and result["per_caption"][2]["objects"] is None
    with pytest.raises(ValueError, match="none of the 1 captions has a list"):
        run("eval/object_halbench.py", [None], **flags | {"answers": write_lines(tmp_path / "b.jsonl", rows[:1])})
