"""The page about a run: its numbers, what it leaves out, and that nothing in the data can act on it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import datasets
import pandas as pd
import pytest

from tests.small_run import INVENTED, TRUE, write_run
from tests.tiny import preference_rows

VOID = {"meta", "img", "br", "source"}
HOSTILE = " <script>alert(1)</script> \"><img onerror=alert(2) src=x> \u202egnp.exe\u2066 \u200f & &amp; '--> </title></style>"


class Page(HTMLParser):
    """Reads a page; fails on tags that do not balance."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]


@pytest.fixture
def report(load_recipe, tmp_path, monkeypatch):
    """report(**flags) writes the page and returns it with the panels that were left out."""
    monkeypatch.setattr(load_recipe("eval/report.py"), "DPI", 20)

    def function(**flags) -> tuple[Page, list[str]]:
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        left_out = load_recipe("eval/report.py").main([*words, "--output", str(tmp_path / "page" / "report.html")])
        return Page(tmp_path / "page" / "report.html"), left_out

    return function


@pytest.fixture(scope="module")
def run(tiny_llava_path, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small", tiny_llava_path)


def test_all_panels_of_a_run(report, run, load_recipe):
    page, left_out = report(run=run)
    assert left_out == [] and page.of_class("left-out") == []
    panels = [panel.title for panel in load_recipe("eval/report.py").PANELS]
    assert [title for title in panels if title not in page.text] == []
    assert "Run small" in page.text
    assert sum(tag == "article" for tag, _ in page.tags) == 4

    # margins 0.3, 0.1, 0, -0.4 with beta 0.2: the mean is 0, one of four is below 0, and the lowest is shown first
    facts = dict(zip(page.words, page.words[1:], strict=False))
    assert (facts["beta"], facts["pairs"], facts["mean margin"], facts["margins below 0"]) == ("0.2", "4", "0.000", "25.0 %")
    assert [word for word in page.words if word.startswith("margin ")] == [
        f"margin {margin}, idx {idx}" for margin, idx in (("−0.400", 3), ("0.000", 2), ("+0.100", 1), ("+0.300", 0))
    ]
    # 12 claims: 5 true counts with P(yes) 0.9, 4 true objects with 0.6, 2 invented ones with 0.25, a wrong count with 0.5, which rejects
    assert (facts["claims judged"], facts["claims accepted"]) == ("12", "75.0 %")
    assert facts["labeler: right, AUROC"] == "100.0 %, 1.000"
    assert facts["answers that invent an object, % (greedy)"] == "40.0 → 10.0"


def test_pairs_show_verdicts_and_the_sign_of_every_token(report, run):
    page, _ = report(run=run, max_pairs=1)
    assert sum(tag == "article" for tag, _ in page.tags) == 1  # the fourth pair: chosen lost 1.0 at its first token, rejected gained it
    start = page.words.index("margin −0.400, idx 3")
    words = page.words[start:]
    assert words[words.index(INVENTED) + 2] == "[0.25, false]" and words[words.index(TRUE) + 2] == "[0.60, true]"
    assert [tag for tag, _ in page.tags].count("del") == 1
    assert "chosen: reward −0.200" in "".join(words) and "rejected: reward +0.200" in "".join(words)
    # both begin with COUNT, so the shift is in the shared beginning: grey, without a sign, its value in the title
    shared = page.of_class("shared")
    assert [each["title"] for each in (shared[0], shared[len(shared) // 2])] == ["−0.2000", "+0.2000"]
    assert not page.of_class("up3") and not page.of_class("down3")
    page, _ = report(run=run, max_pairs=4)
    assert {each["title"] for each in page.of_class("up3")} == {"+0.1000"}  # the first token of chosen of the second pair
    assert "+++" in page.words and "−−−" not in page.words


def test_signs_of_tokens_by_hand(load_recipe):
    """The largest is 0.5: two thirds and more of it make three signs, a third (0.167) two, a tenth (0.05) one; what is shared has none."""
    rewards = [(5.0, True), (0.5, False), (-0.2, False), (0.06, False), (-0.01, False)]
    rows = [{"side": "chosen", "text": f"t{n}\n", "shared": shared, "reward": reward} for n, (reward, shared) in enumerate(rewards)]
    written = load_recipe("eval/report.py").token_html(pd.DataFrame(rows), "chosen")
    assert re.findall(r'class="token (\w+)" title="(.*?)">t\d↵<i>(.*?)</i></span></span><br><span>', written) == [
        ("shared", "+5.0000", "&nbsp;"),
        ("up3", "+0.5000", "+++"),
        ("down2", "−0.2000", "−−"),
        ("up1", "+0.0600", "+"),
        ("none", "−0.0100", "&nbsp;"),
    ]


def test_lines_break_between_words(load_recipe):
    """Tokens of a word share a span that does not break, which a text without spaces may not fill a line with."""
    texts = ["The", " cobbl", "estones", ".", " A", *["好"] * 30]
    rows = [{"side": "chosen", "text": text, "shared": False, "reward": 0.0} for text in texts]
    written = load_recipe("eval/report.py").token_html(pd.DataFrame(rows), "chosen")
    words = [re.sub(r"<i>.*?</i>|<.*?>", "", word) for word in re.split(r"(?<=</span>)</span><span>", written)]
    assert words == ["The", " cobblestones.", " A" + "好" * 22, "好" * 8]


def test_hostile_text_is_only_shown(report, tiny_llava_path, tmp_path):
    run = write_run(tmp_path / "<b>run", tiny_llava_path, more=HOSTILE)
    results = json.loads((run / "results.json").read_text())
    results["before"][f"greedy{HOSTILE}"] = results["before"]["greedy"]
    (run / "results.json").write_text(json.dumps(results))
    page, left_out = report(run=run)
    assert left_out == []
    check_harmless(page)
    for part in ("<script>alert(1)</script>", '"><img onerror=alert(2) src=x>', "&amp;", "</title></style>", "<U+202E>gnp.exe<U+2066>"):
        assert part in page.text, "it is shown as it was written"
    assert "Run <b>run" in page.text


def check_harmless(page: Page) -> None:
    """Nothing runs, nothing loads, nothing changes the direction of the text."""
    assert not {"script", "iframe", "object", "embed", "link", "form", "a", "svg", "base", "b"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:image/").startswith("data:image/")
        assert "href" not in attributes
    assert not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c") & set(page.source)
    assert "url(" not in page.source and "@import" not in page.source
    assert [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ]


def test_a_page_needs_no_network(report, run):
    page, _ = report(run=run)
    check_harmless(page)
    assert "http:" not in page.source and "https:" not in page.source


def test_without_truth_its_panels_are_left_out(report, tiny_llava_path, tmp_path):
    run = write_run(tmp_path / "photos", tiny_llava_path, truth=False)
    page, left_out = report(run=run)
    assert left_out == [
        "The labeler against the truth",
        "The order of pairs against the truth",
        "Hallucination and capability",
        "Checkpoints",
        "Before and after",
    ]
    assert page.text.count("have no column `scene`") == 2 and "[0.25]" in page.words
    facts = dict(zip(page.words, page.words[1:], strict=False))
    assert (facts["claims judged"], facts["claims accepted"]) == ("12", "75.0 %")


def test_own_images_are_shown_with_the_labelers_verdicts(report, tiny_llava_path, tmp_path):
    """Two held-out images, of the second the answer failed; the rounds are ordered by number, not by name."""
    run = write_run(tmp_path / "photos", tiny_llava_path, truth=False)
    image = preference_rows(1)[0]["image"]
    for number, word in ((0, "dog"), (2, "cat"), (10, "owl")):
        verdicts = {"p_yes": [0.8, 0.1], "p_no": [0.2, 0.9], "claims": ["There is a <b>chair</b>.", f"There is a {word}."]}
        row = {"image": image, "question": "What is there?", "answer": "x", "failure": None} | verdicts
        rows = [row, row | {"question": "And here?", "failure": "no claims", "p_yes": None, "p_no": None, "claims": None}]
        folder = run / f"evaluation-{number}" / "judged"
        folder.mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    page, left_out = report(run=run)
    assert "Before and after" not in left_out
    assert "There is a dog." in page.text and "There is a owl." in page.text and "There is a cat." not in page.text
    assert page.source.count("<del>There is a owl.</del>") == 1
    assert "There is a &lt;b&gt;chair&lt;/b&gt;." in page.source and "And here?" not in page.text


def test_folders_by_name_and_what_would_make_the_rest(report, run, capsys):
    last = run / "round-1"
    page, left_out = report(scored=last / "scored", judged=last / "judged", best_of_n=run / "best_of_n" / "best_of_n.json")
    assert left_out == [
        "Training",
        "Margins",
        "Reward and length",
        "Pairs with the lowest margins",
        "Hallucination and capability",
        "Checkpoints",
        "Before and after",
    ]
    assert len(page.of_class("left-out")) == 7
    assert "no training run; made by train/dpo.py (--policy)" in page.text
    assert "no pairs scored by the trained policy; made by eval/muffin_inference_logp.py with the trained policy" in page.text
    assert "0.1 (assumed; give --beta)" in page.words
    assert "3 of 10 panels" in capsys.readouterr().out

    # without a tokenizer the pairs stand without their tokens; with --beta the margins have another scale
    folders = {"scored": last / "scored", "rescored": last / "rescored"}
    page, left_out = report(**folders, beta=0.4, heldout_scored=folders["rescored"], heldout_rescored=folders["scored"])
    assert "margin −0.800, idx 3" in page.words and not page.of_class("tokens")
    assert "Left out: rewards of tokens: no tokenizer; give the trained policy (--policy)" in page.text
    page, left_out = report(**folders, policy=last / "policy")
    assert len(page.of_class("tokens")) == 8 and "−0.400" in page.text


def test_what_cannot_be_used_is_said_in_its_place(report, run, tiny_llava_path, tmp_path):
    (tmp_path / "policy").mkdir()
    page, left_out = report(run=run, policy=tmp_path / "policy")
    assert left_out == ["Training"]
    assert "policy holds no trainer_state.json" in page.text and "holds neither config.json" in page.text
    with pytest.raises(ValueError, match="nothing to report: give --run"):
        report()
    with pytest.raises(ValueError, match="--judged .*nowhere does not exist"):
        report(run=run, judged=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no folder round-N"):
        report(run=tmp_path)
    with pytest.raises(ValueError, match="--max_pairs 0 must be at least 1"):
        report(run=run, max_pairs=0)
