"""Every bad row is found, named and kept; a row that takes its worker down is one of them."""

import io
import json
import logging
import os
import signal
import time
from collections.abc import Sequence

import datasets
import pytest
import torch
from PIL import Image

from muffin import preflight as preflight_module
from muffin.pairs import PreferenceDataset, RowError, load_preferences
from muffin.policies.base import EncodedResponses
from muffin.preflight import check_rows, preflight


class WordPolicy:
    """As much of an adapter as pre-flight needs: one token per word. Some questions make it misbehave."""

    model_max_length = 8

    def settings(self) -> dict[str, int]:
        return {"model_max_length": self.model_max_length}

    def encode(self, image: Image.Image, question: str, responses: Sequence[str]) -> EncodedResponses:
        if question == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if question == "hang":
            time.sleep(600)
        if question == "slow":
            time.sleep(0.2)
        if question == "program error":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        if "</s>" in question:
            raise ValueError("the question holds </s>")
        room = self.model_max_length - len(question.split())
        if room < 1:
            raise ValueError(f"the prompt leaves no room within --model_max_length {self.model_max_length}")
        ids = tuple(torch.tensor([sum(word.encode()) for word in response.split()][:room]) for response in responses)
        return EncodedResponses(torch.arange(len(question.split())), ids, {}, "", torch.arange(len(question.split())))


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((16, 16), 50).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def rows_of(n: int, changes: dict[int, dict] | None = None) -> PreferenceDataset:
    """n good rows with idx r0, r1, ... and `changes` by position."""
    rows = [
        {"image": {"bytes": picture(), "path": None}, "question": "what is it", "chosen": "a cat", "rejected": "a dog", "idx": f"r{number}"}
        | (changes or {}).get(number, {})
        for number in range(n)
    ]
    return PreferenceDataset(datasets.Dataset.from_list(rows))


def found(faults: list[RowError]) -> list[tuple[int, int | str, str]]:
    return [(fault.position, fault.idx, fault.reason) for fault in faults]


ZOO = {
    1: {"image": {"bytes": picture()[:-60], "path": None}},
    2: {"chosen": None},
    3: {"rejected": "a cat"},
    5: {"question": "odd </s>"},
    6: {"question": "far too many words for a prompt of eight"},
    7: {"question": "six words that leave two free", "chosen": "a cat and more", "rejected": "a cat or less"},
    8: {"idx": "r0", "image": None},
}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_finds_every_bad_row(num_workers):
    faults = found(check_rows(rows_of(10, ZOO), WordPolicy(), num_workers=num_workers))
    assert [(position, idx) for position, idx, _ in faults] == [(1, "r1"), (2, "r2"), (3, "r3"), (5, "r5"), (6, "r6"), (7, "r7"), (8, "r0")]
    reasons = {position: reason for position, _, reason in faults}
    assert "does not decode" in reasons[1]
    assert reasons[2] == "chosen is null"
    assert reasons[3] == "chosen and rejected are the same text"
    assert reasons[5] == "the question holds </s>"
    assert reasons[6] == "the prompt leaves no room within --model_max_length 8"
    assert reasons[7].startswith("chosen and rejected are the same 2 tokens once encoded")
    assert reasons[8] == "image is null"


def test_checks_only_the_given_positions():
    assert [fault.position for fault in check_rows(rows_of(10, ZOO), WordPolicy(), num_workers=2, positions=[9, 5, 2])] == [2, 5]
    assert check_rows(rows_of(10, ZOO), WordPolicy(), num_workers=2, positions=[]) == []


def test_row_that_kills_its_worker():
    dataset = rows_of(12, {2: {"question": "kill"}, 3: {"chosen": ""}, 9: {"question": "kill", "idx": None}, 11: {"chosen": ""}})
    faults = found(check_rows(dataset, WordPolicy(), num_workers=2))
    assert [(position, idx) for position, idx, _ in faults] == [(2, "r2"), (3, "r3"), (9, 9), (11, "r11")]
    assert all("killed the process that read and encoded it" in faults[number][2] for number in (0, 2))


def test_row_that_never_comes_back(monkeypatch):
    monkeypatch.setattr(preflight_module, "ROW_TIMEOUT_S", 1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds that a loader waits for workers to leave
    faults = found(check_rows(rows_of(3, {1: {"question": "hang"}}), WordPolicy(), num_workers=1))
    assert [(position, idx) for position, idx, _ in faults] == [(1, "r1")]
    assert "took longer than 1 s" in faults[0][2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_program_errors_are_not_bad_rows(num_workers, caplog):
    dataset = rows_of(6, {number: {"question": "slow"} for number in (2, 4, 5)} | {3: {"question": "program error"}})
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        check_rows(dataset, WordPolicy(), num_workers=num_workers)
    assert not caplog.records  # the slow rows beside it are no suspects
    assert "while checking row 3" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


class CountingPolicy(WordPolicy):
    """Records the questions it encodes; for checks in this process."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, image: Image.Image, question: str, responses: Sequence[str]) -> EncodedResponses:
        self.encoded.append(question)
        return super().encode(image, question, responses)


def test_good_rows_pass_and_are_not_checked_again(tmp_path):
    dataset, policy, report = rows_of(3), CountingPolicy(), tmp_path / "out" / "preflight.json"
    for _ in range(2):
        assert preflight(dataset, policy, bad_rows="fail", report_path=report, num_workers=0) is dataset
        assert len(policy.encoded) == 3
    assert [path.name for path in report.parent.iterdir()] == ["preflight.json"]
    assert json.loads(report.read_text())["bad_rows"] == []


def test_fail_names_the_rows(tmp_path):
    report = tmp_path / "preflight.json"
    with pytest.raises(ValueError) as caught:
        preflight(rows_of(10, ZOO), WordPolicy(), bad_rows="fail", report_path=report, num_workers=2)
    message = str(caught.value)
    assert message.startswith("7 of 10 rows cannot be used:")
    assert "       2  r2            chosen is null\n" in message
    assert "--bad_rows skip" in message and str(report) in message
    assert json.loads(report.read_text())["bad_rows"][1] == {"position": 2, "idx": "r2", "reason": "chosen is null"}


def test_fail_shows_the_first_twenty(tmp_path):
    dataset = rows_of(25, {number: {"chosen": None} for number in range(1, 25)})
    with pytest.raises(ValueError, match="24 of 25 rows") as caught:
        preflight(dataset, WordPolicy(), bad_rows="fail", report_path=tmp_path / "r.json", num_workers=0)
    assert str(caught.value).count("chosen is null") == 20
    assert "... and 4 more" in str(caught.value)
    assert len(json.loads((tmp_path / "r.json").read_text())["bad_rows"]) == 24


def test_skip_leaves_them_out(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        kept = preflight(rows_of(10, ZOO), WordPolicy(), bad_rows="skip", report_path=tmp_path / "r.json", num_workers=2)
    assert [pair.idx for pair in kept] == ["r0", "r4", "r9"]
    assert "7 of 10 rows cannot be used" in caplog.text and "chosen is null" in caplog.text


def test_report_serves_both_decisions(tmp_path):
    dataset, policy, report = rows_of(4, {2: {"question": "odd </s>"}}), CountingPolicy(), tmp_path / "r.json"
    with pytest.raises(ValueError, match="1 of 4 rows"):
        preflight(dataset, policy, bad_rows="fail", report_path=report, num_workers=0)
    policy.encoded.clear()
    assert len(preflight(dataset, policy, bad_rows="skip", report_path=report, num_workers=0)) == 3
    assert policy.encoded == ["odd </s>"]


def test_mended_images_are_noticed(tmp_path):
    rows = [{"image": name, "question": "what", "chosen": "a", "rejected": "b"} for name in ("a.jpg", "b.jpg")]
    dataset = PreferenceDataset(datasets.Dataset.from_list(rows), image_root=tmp_path)
    (tmp_path / "a.jpg").write_bytes(picture())
    with pytest.raises(ValueError, match="image file cannot be read"):
        preflight(dataset, WordPolicy(), bad_rows="fail", report_path=tmp_path / "r.json", num_workers=0)
    (tmp_path / "b.jpg").write_bytes(picture())
    assert len(preflight(dataset, WordPolicy(), bad_rows="fail", report_path=tmp_path / "r.json", num_workers=0)) == 2


def test_other_rows_or_settings_are_checked_anew(tmp_path):
    report, policy = tmp_path / "r.json", CountingPolicy()

    def rows_checked(dataset: PreferenceDataset, skip_positions: Sequence[int] = ()) -> int:
        policy.encoded.clear()
        preflight(dataset, policy, bad_rows="skip", report_path=report, num_workers=0, skip_positions=skip_positions)
        return len(policy.encoded)

    dataset = rows_of(4)
    assert rows_checked(dataset) == 4
    assert rows_checked(dataset) == 0
    assert rows_checked(dataset.select([0, 1, 2])) == 3
    assert rows_checked(dataset, skip_positions=[1, 3]) == 2
    assert rows_checked(dataset, skip_positions=[3, 1]) == 0
    assert rows_checked(dataset) == 4
    policy.model_max_length = 9
    assert rows_checked(dataset) == 4


def test_skip_positions_are_taken_as_good(tmp_path):
    dataset = rows_of(3, {1: {"question": "odd </s>"}})
    assert len(preflight(dataset, WordPolicy(), bad_rows="fail", report_path=tmp_path / "r.json", num_workers=0, skip_positions=[1])) == 3


def test_nothing_left(tmp_path):
    dataset = rows_of(2, {0: {"chosen": None}, 1: {"question": "odd </s>"}})
    with pytest.raises(ValueError, match="no row is left of 2") as caught:
        preflight(dataset, WordPolicy(), bad_rows="skip", report_path=tmp_path / "r.json", num_workers=0)
    assert "chosen is null" in str(caught.value)
    with pytest.raises(ValueError, match="no row is left of 0"):
        preflight(dataset.select([]), WordPolicy(), bad_rows="fail", report_path=tmp_path / "r.json", num_workers=0)


def test_damaged_report_and_wrong_flag(tmp_path):
    (tmp_path / "r.json").write_text('{"key": ')
    with pytest.raises(ValueError, match="r.json is no pre-flight report .*; remove it"):
        preflight(rows_of(1), WordPolicy(), bad_rows="fail", report_path=tmp_path / "r.json", num_workers=0)
    with pytest.raises(ValueError, match="--bad_rows drop: want fail or skip"):
        preflight(rows_of(1), WordPolicy(), bad_rows="drop", report_path=tmp_path / "r.json", num_workers=0)


def test_real_rows(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow_cache")
    policy = WordPolicy()
    policy.model_max_length = 2048
    dataset = load_preferences(samples / "rlaifv_photos" / "photos_30.parquet")
    assert check_rows(dataset, policy, num_workers=2) == []
