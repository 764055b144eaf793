"""Answer files in the forms that scripts write, and which answer belongs to which question."""

import json

import datasets
import pytest

from muffin.answers import answer_text, match_answers, read_rows


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_json_forms(tmp_path):
    rows = [{"question_id": 1, "text": "a\u2028b"}, {"question_id": 2, "text": "c"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    assert read_rows(write(tmp_path / "a.jsonl", lines), "--answers") == rows
    assert read_rows(write(tmp_path / "lines.json", lines), "--answers") == rows  # as POPE's own files
    assert read_rows(write(tmp_path / "list.json", json.dumps(rows)), "--answers") == rows
    assert read_rows(write(tmp_path / "chair.json", json.dumps({"overall": 1, "sentences": rows})), "--answers") == rows
    assert read_rows(write(tmp_path / "coco.json", json.dumps({"overall": {}, "imgToEval": {"5": rows[0]}})), "--answers") == rows[:1]
    assert read_rows(write(tmp_path / "one.jsonl", json.dumps(rows[0])), "--answers") == rows[:1]


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="--answers .*none.jsonl: no such file"):
        read_rows(tmp_path / "none.jsonl", "--answers")
    with pytest.raises(ValueError, match=r"--questions .*a.jsonl, line 2: neither JSON nor JSON lines"):
        read_rows(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": \n'), "--questions")
    with pytest.raises(ValueError, match="want JSON objects"):
        read_rows(write(tmp_path / "b.json", "[1, 2]"), "--answers")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(write(tmp_path / "c.json", "[]"), "--answers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no .*parquet"):
        read_rows(tmp_path / "empty", "--answers")


def test_parquet_is_read_without_images_and_only_when_complete(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "answer": datasets.Value("string")})
    for number, answer in enumerate(("yes", "no")):
        row = {"image": {"bytes": b"\x89PNG", "path": "a.png"}, "answer": answer}
        datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / f"shard-0000{number}-of-00002.parquet")
    assert read_rows(tmp_path, "--answers") == [{"answer": "yes"}, {"answer": "no"}]
    assert read_rows(tmp_path / "shard-00001-of-00002.parquet", "--answers") == [{"answer": "no"}]
    (tmp_path / "shard-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="found 1 files of the 2 shards"):
        read_rows(tmp_path, "--answers")


@pytest.mark.parametrize("name", ["text", "answer", "response", "caption"])
def test_the_usual_names_of_an_answer(name):
    assert answer_text({"prompt": "What?", name: "A cat."}, "row 0") == "A cat."


def test_a_failure_is_not_an_answer():
    with pytest.raises(ValueError, match="row 3 was not answered: image does not decode"):
        answer_text({"answer": None, "failure": "image does not decode"}, "row 3")
    with pytest.raises(ValueError, match="row 4: found the columns id, output; want a text in one of answer"):
        answer_text({"id": 4, "output": "A cat."}, "row 4")
    assert answer_text({"answer": "", "failure": None}, "row 5") == ""


QUESTIONS = [{"question_id": 1, "text": "Is there a cat?"}, {"question_id": 2, "text": "Is there a dog?"}]


def test_answers_are_matched_by_id_and_never_by_text():
    answers = [{"question_id": "2", "prompt": "Is there a cat?", "text": "two"}, {"question_id": "1", "prompt": "typo", "text": "one"}]
    assert [row["text"] for row in match_answers(QUESTIONS, answers)] == ["one", "two"]


def test_answers_without_ids_are_matched_by_order():
    answers = [{"text": "one", "prompt": "Is there a dog?"}, {"text": "two", "prompt": "Is there a cat?"}]
    assert [row["text"] for row in match_answers(QUESTIONS, answers)] == ["one", "two"]
    half = [{"question_id": 2, "text": "one"}, {"text": "two"}]
    assert [row["text"] for row in match_answers(QUESTIONS, half)] == ["one", "two"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"question_id": 1, "text": "a"}], "found 1 answers to 2 questions"),
        ([{"question_id": 1, "text": "a"}, {"question_id": 1, "text": "b"}], "--answers: id 1 occurs 2 times"),
        ([{"question_id": 1, "text": "a"}, {"question_id": 3, "text": "b"}], "1 questions have no answer, the first is question_id 2"),
        ([{"prompt_row": 0, "answer": "a"}, {"prompt_row": 0, "answer": "b"}], "several answers per question"),
    ],
)
def test_mismatches_are_errors(answers, message):
    with pytest.raises(ValueError, match=message):
        match_answers(QUESTIONS, answers)
