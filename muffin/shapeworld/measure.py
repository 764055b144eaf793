"""What the tiny world's ground truth says about answers, about the labeler that judged them, and about the pairs made of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from muffin.hallucination import Estimate, Ratio, estimate
from muffin.shapeworld.claims import answer_ratios, is_true, split_claims
from muffin.shapeworld.scenes import Scene

Row = Mapping[str, Any]

# Text of the gallery: colours are told apart without colour vision by the strike-through and the underline that go with them.
BLACK, INVENTED, MISPLACED = (30, 30, 30), (190, 30, 45), (150, 95, 0)
FONT_SIZE, LINE, MARGIN = 15, 21, 14


def describe_answers(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Of rows with `answer`, `scene` and `image_path`: chair_s, chair_i, recall, claim_error in percent, and words per answer."""
    ratios = answer_ratios([row["answer"] for row in rows], [Scene.from_json(row["scene"]) for row in rows])
    return estimate(ratios, [row["image_path"] for row in rows])


def describe_labeler(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Of judged answers: accuracy, tpr (true claims accepted) and fpr (false claims accepted) in percent, over all claims."""
    right, accepted_true, true, accepted_false, false = (np.zeros(len(rows)) for _ in range(5))
    for number, row in enumerate(rows):
        scene = Scene.from_json(row["scene"])
        truths = [is_true(claim, scene) for claim in split_claims(row["answer"])]
        accepted = [p_yes is not None and p_yes > p_no for p_yes, p_no in zip(row["p_yes"] or [], row["p_no"] or [], strict=True)]
        for truth, yes in zip(truths, accepted, strict=True) if accepted else ():
            right[number] += truth == yes
            true[number] += truth
            false[number] += not truth
            accepted_true[number] += truth and yes
            accepted_false[number] += yes and not truth
    ratios = {"accuracy": Ratio(right, true + false), "tpr": Ratio(accepted_true, true), "fpr": Ratio(accepted_false, false)}
    return estimate(ratios, [row["image_path"] for row in rows])


def describe_pairs(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Of preference pairs: percent in which chosen truly has fewer wrong claims (right), as many (tie), or more (wrong)."""
    difference = np.array([chosen - rejected for chosen, rejected in map(wrong_claims, rows)])
    ones = np.ones(len(rows))
    orders = {"right": difference < 0, "tie": difference == 0, "wrong": difference > 0}
    return estimate({name: Ratio(held.astype(float), ones) for name, held in orders.items()}, [row["image_path"] for row in rows])


def wrong_claims(pair: Row) -> tuple[int, int]:
    """How many claims of chosen and of rejected are false; `pair` has scene, chosen and rejected."""
    scene = Scene.from_json(pair["scene"])
    chosen, rejected = (sum(not is_true(claim, scene) for claim in split_claims(pair[side])) for side in ("chosen", "rejected"))
    return chosen, rejected


def draw_gallery(columns: Mapping[str, Sequence[str]], images: Sequence[Image.Image], scenes: Sequence[Scene]) -> Image.Image:
    """A picture of pictures: every image with one answer per column ("before", "after"), wrong statements marked.

    An object that is not in the picture is red and struck through; one that is, but elsewhere, is brown and underlined.
    """
    side, width = 176, 380
    pen_height = LINE * 9
    row_height = max(side, pen_height) + MARGIN
    sheet = Image.new("RGB", (MARGIN * 2 + side + len(columns) * (width + MARGIN), 58 + row_height * len(images)), "white")
    pen = ImageDraw.Draw(sheet)
    font, bold = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(FONT_SIZE + 3)
    for column, name in enumerate(columns):
        pen.text((MARGIN * 2 + side + column * (width + MARGIN), 8), name, fill=BLACK, font=bold)
    legend = [("struck through: object is not in the picture", INVENTED), ("underlined: object is elsewhere", MISPLACED)]
    for column, (text, colour) in enumerate(legend):
        pen.text((MARGIN * 2 + side + column * (width + MARGIN), 32), text, fill=colour, font=font)
    for row, (image, scene) in enumerate(zip(images, scenes, strict=True)):
        top = 58 + row * row_height
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (MARGIN, top))
        for column, answers in enumerate(columns.values()):
            _write_answer(pen, font, answers[row], scene, left=MARGIN * 2 + side + column * (width + MARGIN), top=top, width=width)
    return sheet


def _write_answer(
    pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont, answer: str, scene: Scene, *, left: int, top: int, width: int
) -> None:
    """The answer's sentences, one after the other, wrapped at `width` pixels, each marked by its truth."""
    x, y = left, top
    for claim in split_claims(answer):
        invented = claim.kind is not None and claim.kind not in scene.kinds
        colour = INVENTED if invented else BLACK if is_true(claim, scene) else MISPLACED
        for word in claim.sentence.split():
            length = pen.textlength(word + " ", font=font)
            if x + length > left + width:
                x, y = left, y + LINE
            pen.text((x, y), word, fill=colour, font=font)
            if colour is not BLACK:
                height = y + FONT_SIZE * (0.62 if invented else 1.12)
                pen.line([x, height, x + length, height], fill=colour, width=2)
            x += length
