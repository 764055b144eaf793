"""The whole loop in the small world: every stage through its recipe, the measured drop, and going on after a kill."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SMALL = ["--world", "small", "--train_images", "800", "--heldout_images", "100", "--prompt_images", "96", "--seed", "0"]
COLD = ["--vision_steps", "100", "--sft_steps", "250", "--labeler_steps", "2"]


@pytest.fixture
def in_process(load_recipe, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages call their recipe's main here instead of in a process of its own (five seconds of imports each); names what ran."""
    ran: list[str] = []

    def run(command, cwd, env):
        assert command[0] == sys.executable
        assert (Path(cwd) / command[1]).is_file()
        ran.append(command[1])
        load_recipe(command[1]).main(command[2:])
        return SimpleNamespace(wait=lambda: 0, returncode=0, terminate=lambda: None)

    monkeypatch.setattr(load_recipe("train/iterate.py").subprocess, "Popen", run)
    return ran


def test_small_world_with_true_labels(load_recipe, in_process: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    """With the ground truth as labeler, hallucination at temperature 1 falls; the files are what README promises."""
    iterate = load_recipe("train/iterate.py")
    flags = [*SMALL, *COLD, "--labeler", "oracle", "--dpo_learning_rate", "8e-4", "--output_dir", str(tmp_path / "run")]
    flags += ["--cache_dir", str(tmp_path / "cache")]
    iterate.main(flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert set(before) == {"greedy", "t1"}
    assert {"chair_s", "chair_i", "recall", "claim_error", "words"} <= set(before["greedy"])
    assert before["t1"]["chair_s"] > 25  # the careless annotator has been learnt
    assert after["t1"]["chair_s"] < 0.8 * before["t1"]["chair_s"]
    assert results["labeler"]["accuracy"] == 100  # the labels are the truth
    assert results["pairs"]["right"] == 100
    assert set(results["seconds"]) >= {"world", "policy", "labeler", "round-1/scored", "round-1/policy", "measures"}
    assert (tmp_path / "run" / "before-after.png").stat().st_size > 10_000
    assert "wrong claims" in capsys.readouterr().out

    # the same command again: everything is done, nothing runs; with one stage undone, that stage alone
    first, in_process[:] = list(in_process), []
    assert first[:3] == ["data/make_shapeworld.py", "train/sft.py", "train/sft.py"]
    assert iterate.main(flags) == results
    assert in_process == []
    manifest = tmp_path / "run" / "manifest.json"
    stages = json.loads(manifest.read_text())
    hashes = stages.pop("measures")["sha256"]
    manifest.write_text(json.dumps(stages))
    iterate.main(flags)
    assert in_process == ["eval/shapeworld.py"]
    assert json.loads(manifest.read_text())["measures"]["sha256"] == hashes

    # another labeler: its stage and all after it run again, the answers before it stay
    in_process[:] = []
    iterate.main([*flags, "--labeler", "self"])
    assert in_process[0] == "data/score_claims.py"
    assert in_process[-1] == "eval/shapeworld.py"
    assert len(in_process) == 7
    assert json.loads((tmp_path / "run" / "results.json").read_text())["labeler"]["accuracy"] < 100


def test_a_failing_stage_stops_the_run(load_recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    iterate = load_recipe("train/iterate.py")
    monkeypatch.setattr(
        iterate.subprocess, "Popen", lambda command, cwd, env: SimpleNamespace(wait=lambda: 3, returncode=3, terminate=lambda: None)
    )
    with pytest.raises(SystemExit, match="stage world failed with exit code 3"):
        iterate.main(["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")])
    (cold,) = (tmp_path / "cache").iterdir()
    assert "seconds" not in json.loads((cold / "manifest.json").read_text())["world"]


def test_compare_runs_by_hand(load_recipe, tmp_path: Path):
    def moment(chair_s: float) -> dict:
        names = ("chair_s", "chair_i", "recall", "claim_error", "words")
        values = dict.fromkeys(names, chair_s) | {f"{name}_interval": [chair_s - 1, chair_s + 1] for name in names}
        return {"greedy": values, "t1": values}

    run = tmp_path / "demo-0"
    run.mkdir()
    results = {"before": moment(40.0), "after": moment(10.0), "labeler": {"accuracy": 90.0, "fpr": 20.0}}
    (run / "results.json").write_text(json.dumps(results | {"pairs": {"right": 70.0, "tie": 25.0, "wrong": 5.0}}))
    table = load_recipe("eval/compare_runs.py").main(["--runs", str(run), "--output", str(tmp_path / "seeds.md")])
    row = table.splitlines()[2].split(" | ")
    assert row[1] == "40.0 [39.0, 41.0] -> 10.0 [9.0, 11.0]"
    assert row[-2:] == ["90.0 / 20.0", "70.0 / 25.0 / 5.0 |"]
    assert (tmp_path / "seeds.md").read_text() == table + "\n"
    with pytest.raises(ValueError, match="demo-1 has no results.json"):
        load_recipe("eval/compare_runs.py").main(["--runs", str(tmp_path / "demo-1")])
