"""What the ground truth says about answers, labels and pairs of the tiny world: two scenes, numbers by hand."""

import numpy as np
import pytest
from PIL import Image

from muffin.shapeworld.measure import describe_answers, describe_labeler, describe_pairs, draw_gallery
from muffin.shapeworld.scenes import Scene, Thing, draw

RED_CIRCLE = Thing(color="red", shape="circle", size="large", place="at the top")
BLUE_CROSS = Thing(color="blue", shape="cross", size="small", place="on the left")
SCENES = [Scene("standard", 0, (RED_CIRCLE, BLUE_CROSS), seed=1), Scene("standard", 1, (RED_CIRCLE,), seed=2)]

TRUE = "At the top there is a red circle."
ELSEWHERE = "In the center there is a red circle."  # the object is there, the place is wrong
INVENTED = "On the right there is a green square."
COUNT = "The image shows two objects."


def row(number: int, **columns) -> dict:
    return {"scene": SCENES[number].to_json(), "image_path": f"{number}.png", **columns}


def test_answers():
    rows = [row(0, answer=f"{TRUE} {INVENTED}"), row(0, answer=f"{COUNT} {ELSEWHERE}"), row(1, answer=TRUE)]
    found = {name: estimate.value for name, estimate in describe_answers(rows).items()}
    assert found == pytest.approx(
        {
            "chair_s": 100 * 1 / 3,  # one answer of three names an absent object
            "chair_i": 100 * 1 / 4,  # one mention of four
            "recall": 100 * 3 / 5,  # the red circle every time, the blue cross never
            "claim_error": 100 * 2 / 5,  # the invented and the misplaced one, of five claims
            "words": (8 + 8 + 5 + 8 + 8) / 3,
        }
    )


def test_labeler():
    """Claims true, false | true; accepted, accepted | rejected; an answer that could not be judged counts nowhere."""
    rows = [
        row(0, answer=f"{TRUE} {INVENTED}", p_yes=[0.9, 0.6], p_no=[0.1, 0.3]),
        row(1, answer=TRUE, p_yes=[0.5], p_no=[0.5]),  # a tie rejects
        row(1, answer="", p_yes=None, p_no=None),
    ]
    found = describe_labeler(rows)
    assert found["accuracy"].value == pytest.approx(100 * 1 / 3)
    assert found["tpr"].value == pytest.approx(100 * 1 / 2)
    assert found["fpr"].value == pytest.approx(100 * 1 / 1)


def test_pairs():
    rows = [
        row(0, chosen=TRUE, rejected=INVENTED),
        row(0, chosen=f"{TRUE} {ELSEWHERE}", rejected=INVENTED),
        row(1, chosen=INVENTED, rejected=TRUE),
        row(1, chosen=TRUE, rejected=INVENTED),
    ]
    assert {name: estimate.value for name, estimate in describe_pairs(rows).items()} == {"right": 50.0, "tie": 25.0, "wrong": 25.0}


def test_gallery_marks_what_is_wrong():
    """True text is black alone; an invented object brings red, a misplaced one brown, each with its line."""

    def colours(answer: str) -> set[tuple[int, ...]]:
        sheet = draw_gallery({"before": [answer]}, [draw(SCENES[0])], [SCENES[0]])
        assert isinstance(sheet, Image.Image)
        text = np.asarray(sheet)[58:, 204:].reshape(-1, 3)  # right of the picture, below the legend
        return {tuple(int(v) for v in colour) for colour in np.unique(text, axis=0)}

    red, brown = (190, 30, 45), (150, 95, 0)
    assert {red, brown}.isdisjoint(colours(TRUE))
    assert red in colours(INVENTED) and brown not in colours(INVENTED)
    assert brown in colours(ELSEWHERE) and red not in colours(ELSEWHERE)
