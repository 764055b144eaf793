"""Tables of results and of differences, from counts by hand."""

import numpy as np
import pytest

from muffin.benchmarks import BENCHMARKS, compare_results, format_comparison, format_results, read_result
from muffin.chair import chair_scores, count_captions
from muffin.image_counts import ImageCounts, estimate_counts, result_of, write_result

TRUTH = {"cat"}


def chair_result(*captions, rules="simple", images=None):
    """Of captions, each a list of objects; the pictures show cats."""
    images = images or [f"{number}.jpg" for number in range(len(captions))]
    counts = count_captions(captions, [TRUTH] * len(captions), [" ".join(objects) for objects in captions], images)
    return {"benchmark": "chair", "rules": {"lemmatizer": rules}} | result_of(estimate_counts(counts, chair_scores), counts)


def test_no_hallucination_number_without_a_capability_number():
    assert all(each.hallucination and each.capability and "words" in each.capability for each in BENCHMARKS.values())
    for benchmark in BENCHMARKS.values():
        columns = {"pope": 6, "amber": 45, "chair": 8, "mmhal": 21, "refomb": 14}
        name = next(name for name, each in BENCHMARKS.items() if each is benchmark)
        assert set(benchmark.formula(np.ones(columns[name]))).issuperset((*benchmark.hallucination, *benchmark.capability))


def test_table_of_results():
    result = chair_result(["cat", "dog"], ["cat"])
    table = format_results({"coco": result | {"kinds": {"small": chair_result([])}}}).splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == ["benchmark", "hallucination", "capability, length"]
    name, hallucination, capability = (cell.strip() for cell in table[2].split("|")[1:-1])
    assert name == "coco"
    assert hallucination == "chair_s 50.0 [0.0, 100.0]; chair_s_refined 50.0 [0.0, 100.0]; chair_i 33.3 [0.0, 50.0]"
    assert capability.startswith("recall 100.0 [100.0, 100.0]; f1 80.0 ") and capability.endswith("words 1.5 [1.0, 2.0]")
    assert table[3].split("|")[1].strip() == "coco small" and "chair_i 0.0 [0.0, 0.0]" in table[3]
    assert len({len(line) for line in table}) == 1


def test_differences_of_two_policies():
    first = {"coco": chair_result(["cat", "dog"], ["cat"], ["dog"]), "other": chair_result([])}
    second = {"coco": chair_result(["cat"], ["cat"], ["dog", "cup"])}
    found = compare_results(first, second)
    assert list(found) == ["coco"]
    # captions with a hallucination 2 of 3 -> 1 of 3; mentions 2 of 4 -> 2 of 4; covered 2 of 3 in both
    assert (found["coco"]["chair_s"].first, found["coco"]["chair_s"].second) == pytest.approx((200 / 3, 100 / 3))
    assert found["coco"]["chair_s"].change.value == pytest.approx(-100 / 3)
    assert found["coco"]["chair_i"].change.value == found["coco"]["recall"].change.value == 0
    table = format_comparison(found, {"coco": "chair"})
    assert "| coco      | chair_s         | 66.7  | 33.3   | -33.3 [-100.0, +0.0]" in table
    assert "*" not in table


def test_a_difference_that_no_resample_undoes_is_marked():
    found = compare_results({"coco": chair_result(["dog"], ["dog"])}, {"coco": chair_result(["cat"], ["cat"])})
    assert "| -100.0 [-100.0, -100.0] *" in format_comparison(found, {"coco": "chair"})


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="coco: the first was scored with rules {'lemmatizer': 'simple'}, the second with"):
        compare_results({"coco": chair_result([])}, {"coco": chair_result([], rules="chair")})
    with pytest.raises(ValueError, match="no benchmark in common: the first has coco, the second pope"):
        compare_results({"coco": chair_result([])}, {"pope": chair_result([])})
    with pytest.raises(ValueError, match="no image in common"):
        compare_results({"coco": chair_result([])}, {"coco": chair_result([], images=["x"])})
    for content in ("[1]", "{", '{"benchmark": "chair"}', '{"benchmark": "new", "per_image": {}}'):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(ValueError, match="is no result of a benchmark"):
            read_result(tmp_path / "result.json")
    with pytest.raises(ValueError, match="is no result of a benchmark"):
        read_result(tmp_path / "nothing.json")
    result = chair_result(["cat"])
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result
    assert ImageCounts.from_json(result["per_image"]).images == ("0.jpg",)
