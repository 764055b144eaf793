"""The tiny world against its own rules: what is said is checked by brute force over what is drawn."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from muffin.policies import PolicyOptions, load_adapter, load_policy, resolve_checkpoint
from muffin.shapeworld.claims import Claim, answer_ratios, is_true, mentioned_objects, question_of, split_claims
from muffin.shapeworld.language import (
    NUMBERS,
    STYLES,
    Annotator,
    absent_kinds,
    ask_claim,
    ask_count,
    ask_existence,
    caption,
    clean_question,
    habitual_invention,
    labeler_question,
    objects,
    pope_questions,
    popular_kinds,
    statement,
    vocabulary,
)
from muffin.shapeworld.model import build_adapter, build_policy, build_tokenizer, pretrain_vision, save_policy
from muffin.shapeworld.scenes import COLORS, PLACES, SHAPES, WORLDS, Scene, Thing, draw, encode_png, sample_scenes
from tests.conftest import ROOT

SCENE = Scene(
    world="standard",
    theme=0,
    objects=(
        Thing("red", "circle", "at the top-left", "large"),
        Thing("blue", "square", "at the top", "small"),
        Thing("green", "cross", "at the bottom-right", "large"),
    ),
    seed=7,
)


@pytest.fixture(scope="module", params=list(WORLDS))
def world(request):
    return WORLDS[request.param]


@pytest.fixture(scope="module")
def scenes(world):
    return sample_scenes(world, 2000, seed=0, split="test")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def every_sentence() -> list[tuple[str, Claim]]:
    """All statements of the language with the claim each makes; "Also, " changes the sentence, not the claim."""
    said = []
    for color in COLORS:
        for shape in SHAPES:
            for place in PLACES:
                for style in STYLES:
                    plain = statement(Thing(color, shape, place, "small"), style)
                    for sentence in (plain[0].upper() + plain[1:], f"Also, {plain}"):
                        said.append((sentence, Claim(sentence, kind=(color, shape), place=place)))
    for number in range(len(NUMBERS)):
        for sentence in (f"The image shows {objects(number)}.", f"There {'is' if number == 1 else 'are'} {objects(number)}."):
            said.append((sentence, Claim(sentence, count=number)))
    return said


# --- scenes and pictures


def test_themes_part_the_kinds(world):
    kinds = [kind for theme in world.themes for kind in theme]
    assert sorted(kinds) == sorted((color, shape) for color in world.colors for shape in world.shapes)
    assert all(sorted(places) == sorted(world.places) for places in world.habits)
    assert len(world.places) == world.grid**2


def test_scenes_obey_the_world(world, scenes):
    smallest, largest = world.objects
    for scene in scenes:
        assert smallest <= len(scene.objects) <= largest
        assert len(set(scene.kinds)) == len({thing.place for thing in scene.objects}) == len(scene.objects)
        cells = [world.places.index(thing.place) for thing in scene.objects]
        assert cells == sorted(cells), "objects stand in reading order"
        assert set(scene.kinds) <= set(world.kinds)
    assert {len(scene.objects) for scene in scenes} == set(range(smallest, largest + 1))
    assert {scene.theme for scene in scenes} == set(range(len(world.themes)))


def test_most_objects_come_from_the_theme(world, scenes):
    """80 % by the theme draw, plus what the free draw hits: between .8 and .8 + .2 * share of the theme, less what is already taken."""
    of_theme = np.mean([kind in world.themes[scene.theme] for scene in scenes for kind in scene.kinds])
    assert 0.8 < of_theme < 0.8 + 0.2 * len(world.themes[0]) / len(world.kinds) + 0.02


def test_scenes_survive_json(scenes):
    for scene in scenes[:50]:
        assert Scene.from_json(scene.to_json()) == scene
    assert json.loads(SCENE.to_json())["objects"][0] == {"color": "red", "shape": "circle", "place": "at the top-left", "size": "large"}


def test_splits_and_seeds_give_other_scenes(world):
    def drawn(seed, split):
        return [scene.to_json() for scene in sample_scenes(world, 20, seed=seed, split=split)]

    assert drawn(0, "a") == drawn(0, "a")
    assert drawn(0, "a") != drawn(1, "a") and drawn(0, "a") != drawn(0, "b")
    assert drawn(0, "a")[:5] == [scene.to_json() for scene in sample_scenes(world, 5, seed=0, split="a")]


def test_pictures_are_the_same_bytes_in_every_process():
    code = """
import hashlib
from muffin.shapeworld.scenes import WORLDS, draw, encode_png, sample_scenes
for world in WORLDS.values():
    for scene in sample_scenes(world, 8, seed=3, split="hash"):
        print(hashlib.sha256(encode_png(draw(scene))).hexdigest())
"""
    environment = {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    drawn = [encode_png(draw(scene)) for world in WORLDS.values() for scene in sample_scenes(world, 8, seed=3, split="hash")]
    assert found.stdout.split() == [hashlib.sha256(png).hexdigest() for png in drawn]
    assert len(set(drawn)) == 16


def test_pictures_show_what_the_scene_says(world, scenes):
    """The pixel in the middle of every object is nearest to its own colour; empty cells have no strong edge."""
    palette = np.array([COLORS[color] for color in world.colors], dtype=float)
    for scene in scenes[:60]:
        picture = draw(scene)
        assert picture.mode == "RGB" and picture.size == (world.image_size, world.image_size)
        pixels = np.asarray(picture, dtype=float)
        for cell, place in enumerate(world.places):
            row, column = divmod(cell, world.grid)
            patch = pixels[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
            found = [thing for thing in scene.objects if thing.place == place]
            if found:
                nearest = np.linalg.norm(palette - patch[15:18, 15:18].mean((0, 1)), axis=1).argmin()
                assert world.colors[nearest] == found[0].color
            else:
                assert np.abs(np.diff(patch, axis=1)).max() < 12 and np.abs(np.diff(patch, axis=0)).max() < 12


def test_the_shapes_differ():
    """Red area of each outline of radius r: circle pi r^2, square (1.76 r)^2, triangle 1.9 r^2, cross 2 * (.72 r * 2 r) - (.72 r)^2."""
    areas = {}
    for shape in SHAPES:
        pixels = np.asarray(draw(Scene("standard", 0, (Thing("red", shape, "in the center", "large"),), seed=11)), dtype=float)
        areas[shape] = (pixels[..., 0] - pixels[..., 1:].max(-1) > 80).sum()
    radius = np.sqrt(areas["circle"] / np.pi)
    assert 10.8 <= radius <= 12.7
    assert areas["square"] == pytest.approx((1.76 * radius) ** 2, rel=0.1)
    assert areas["triangle"] == pytest.approx(1.9 * radius**2, rel=0.1)
    assert areas["cross"] == pytest.approx((2 * 0.72 * 2 - 0.72**2) * radius**2, rel=0.1)


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match="'star'; known shapes are circle"):
        draw(Scene("standard", 0, (Thing("red", "star", "at the top", "small"),), seed=0))


# --- claims


def test_every_sentence_is_one_claim():
    for sentence, claim in every_sentence():
        assert split_claims(sentence) == [claim]
        assert [(c.kind, c.place, c.count) for c in split_claims(sentence.lower())] == [(claim.kind, claim.place, claim.count)]


def test_captions_split_into_their_sentences(scenes):
    rng = random.Random(0)
    for scene in scenes[:300]:
        text = caption(scene, rng, Annotator())
        claims = split_claims(text)
        assert " ".join(claim.sentence for claim in claims) == text
        assert all(question_of(claim) is not None for claim in claims)


def test_answers_that_state_nothing_are_claims_without_a_question():
    for text in (
        "Yes.",
        "Nothing.",
        "At the top there is a red.",
        "Also, at the top there is a red circle",
        "The image shows red objects.",
    ):
        (claim,) = split_claims(text)
        assert claim == Claim(text)
        assert question_of(claim) is None and not is_true(claim, SCENE)
    assert split_claims("") == split_claims(" \n") == []


def test_questions_of_claims():
    assert (
        question_of(Claim("", kind=("red", "circle"), place="at the top"))
        == "Is it true that at the top there is a red circle? Please answer yes or no."
    )
    assert question_of(Claim("", count=3)) == "Are there three objects in the image? Please answer yes or no."
    assert question_of(Claim("", count=1)) == "Is there one object in the image? Please answer yes or no."


def test_truth_by_brute_force():
    """Of all 6 * 4 * 9 claims about SCENE exactly its three objects are true, of all numbers exactly three."""
    true = [claim.sentence for sentence, claim in every_sentence() if is_true(claim, SCENE)]
    expected = {
        f"{start} {verb} a {thing}."
        for where, thing in (("t the top-left", "red circle"), ("t the top", "blue square"), ("t the bottom-right", "green cross"))
        for start in (f"A{where}", f"Also, a{where}")
        for verb in ("there is", "I see")
    } | {"The image shows three objects.", "There are three objects."}
    assert len(true) == len(expected) and set(true) == expected


def test_ratios_of_answers():
    answers = [
        # both objects are there, one at another place: no hallucination, one wrong claim of three; 5 + 8 + 8 words
        "The image shows three objects. On the left I see a red circle. At the top there is a blue square.",
        # an absent object, twice: two wrong claims of three; 8 + 8 + 9 words
        "At the top I see a red cross. At the bottom-right I see a green cross. Also, in the center I see a red cross.",
    ]
    assert mentioned_objects(answers[1]) == [("red", "cross"), ("green", "cross"), ("red", "cross")]
    ratios = {name: ratio.value for name, ratio in answer_ratios(answers, [SCENE, SCENE]).items()}
    expected = {"chair_s": 50, "chair_i": 100 * 2 / 5, "recall": 100 * 3 / 6, "claim_error": 100 * 3 / 6, "words": (21 + 25) / 2}
    assert ratios == pytest.approx(expected)


# --- captions


def test_an_honest_annotator_tells_the_truth(scenes):
    rng = random.Random(0)
    honest = Annotator(close=0.9, invent=(0, 0, 0, 0), count=0.5)
    ratios = answer_ratios([caption(scene, rng, honest) for scene in scenes], scenes)
    assert (ratios["chair_i"].value, ratios["recall"].value, ratios["claim_error"].value) == (0, 100, 0)


def test_inventions_replace_the_last_object_at_equal_length(scenes):
    rng = random.Random(0)
    careless = Annotator(close=1, invent=(1, 1, 1, 1), add=0, count=0)
    for scene in scenes:
        claims = split_claims(caption(scene, rng, careless))
        assert len(claims) == len(scene.objects)
        if len(scene.objects) > 1:
            assert [is_true(claim, scene) for claim in claims] == [True] * (len(claims) - 1) + [False]
            assert claims[-1].sentence.startswith("Also, ")


def test_added_inventions_leave_the_real_objects():
    rng = random.Random(0)
    text = caption(SCENE, rng, Annotator(close=1, invent=(1, 1, 1, 1), add=1, count=1))
    assert [is_true(claim, SCENE) for claim in split_claims(text)] == [True, True, True, True, False]


def test_inventions_are_typical_and_absent(world, scenes):
    for scene in scenes:
        thing = habitual_invention(scene)
        assert thing.kind in world.themes[scene.theme] and thing.kind not in scene.kinds
        assert thing.place in scene.empty_places
    typical = [habitual_invention(scene) for scene in scenes if scene.theme == 0]
    (_, most), *_ = Counter(thing.kind for thing in typical).most_common(1)
    assert most > len(typical) / 3, "a habit repeats itself"


def test_share_of_captions_with_inventions():
    """close * mean over themes of invent = .8 * .6 = 48 %; the standard deviation at 4000 captions is below 0.8 points."""
    scenes = sample_scenes(WORLDS["standard"], 4000, seed=1, split="share")
    rng = random.Random(0)
    assert answer_ratios([caption(scene, rng, Annotator()) for scene in scenes], scenes)["chair_s"].value == pytest.approx(48, abs=4 * 0.8)


# --- questions


def true_answer(question: str, scene: Scene) -> str:
    """The answer by reading the question anew, against the scene's JSON: an oracle that shares no code with the language."""
    told = [(o["color"], o["shape"], o["place"]) for o in json.loads(scene.to_json())["objects"]]
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
    if match := re.fullmatch(r"Is it true that (.*) there is a (\w+) (\w+)\? Please answer yes or no\.", question):
        return "Yes." if (match[2], match[3], match[1]) in told else "No."
    if match := re.fullmatch(r"Is there a (\w+) (\w+) in the image\? Please answer yes or no\.", question):
        return "Yes." if (match[1], match[2]) in [o[:2] for o in told] else "No."
    if match := re.fullmatch(r"(?:Is|Are) there (\w+) objects? in the image\? Please answer yes or no\.", question):
        return "Yes." if numbers.index(match[1]) == len(told) else "No."
    if question == "How many objects are in the image?":
        return f"There {'is' if len(told) == 1 else 'are'} {numbers[len(told)]} object{'s' if len(told) != 1 else ''}."
    place = re.fullmatch(r"What is (.*)\?", question)[1]
    return next((f"{color} {shape}" for color, shape, where in told if where == place), "Nothing.")


@pytest.mark.parametrize("ask", [clean_question, labeler_question])
def test_questions_have_true_answers(scenes, ask):
    rng = random.Random(0)
    for scene in scenes:
        turn = ask(scene, rng)
        truth = true_answer(turn.question, scene)
        if turn.kind == "what_is" and truth != "Nothing.":
            (claim,) = split_claims(turn.answer)
            assert is_true(claim, scene) and turn.answer.endswith(f" a {truth}.")
        else:
            assert turn.answer == truth


def test_shares_of_the_kinds_of_questions():
    scenes = sample_scenes(WORLDS["standard"], 5000, seed=2, split="kinds")
    rng = random.Random(0)
    kinds = Counter(clean_question(scene, rng).kind for scene in scenes)
    for kind, share in {"claim": 0.6, "existence": 0.2, "count": 0.08, "how_many": 0.06, "what_is": 0.06}.items():
        assert kinds[kind] / 5000 == pytest.approx(share, abs=4 * (share * (1 - share) / 5000) ** 0.5)
    labeler = Counter(labeler_question(scene, rng).kind for scene in scenes)
    assert set(labeler) == {"claim", "count", "existence"}
    assert labeler["claim"] / 5000 == pytest.approx(0.8, abs=4 * (0.8 * 0.2 / 5000) ** 0.5)
    assert labeler["count"] / 5000 == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / 5000) ** 0.5)


@pytest.mark.parametrize("ask", [partial(ask_claim, misplaced=0.1), ask_existence, ask_count])
def test_yes_no_questions_are_balanced(scenes, ask):
    rng = random.Random(0)
    yes = np.mean([ask(scene, rng).answer == "Yes." for scene in scenes])
    assert yes == pytest.approx(0.5, abs=4 * 0.5 / len(scenes) ** 0.5 + 0.03)  # a mixed claim may come out true


@pytest.mark.parametrize("misplaced", [0.1, 0.35])
def test_false_claims_are_close_to_the_truth(misplaced):
    """Besides the misplaced ones, 45 % of the rest are typical; few share nothing with the scene."""
    scenes = sample_scenes(WORLDS["standard"], 3000, seed=4, split="hard")
    rng = random.Random(0)
    sorts = Counter()
    for scene in scenes:
        turn = ask_claim(scene, rng, misplaced)
        if turn.answer == "No.":
            (claim,) = split_claims(turn.question.removeprefix("Is it true that ").replace("? Please answer yes or no.", "."))
            shared = max(len({*claim.kind, claim.place} & {thing.color, thing.shape, thing.place}) for thing in scene.objects)
            typical = claim.kind in WORLDS["standard"].themes[scene.theme] and claim.place in scene.empty_places
            sorts["misplaced" if claim.kind in scene.kinds else "one change" if shared == 2 else "typical" if typical else "other"] += 1
    shares = {sort: count / sum(sorts.values()) for sort, count in sorts.items()}
    # mixed attributes and one change may meet another object of the scene: at most (30 + 25) % of the rest come on top of the draw
    assert misplaced - 0.04 < shares["misplaced"] < misplaced + 0.15
    assert shares["typical"] == pytest.approx(0.45 * (1 - misplaced), abs=0.05)
    assert shares.get("other", 0) < 0.02


def test_adversarial_negatives_come_from_the_theme():
    world = WORLDS["standard"]
    scenes = sample_scenes(world, 200, seed=0, split="negatives")
    for scene in scenes:
        assert set(absent_kinds(scene, "adversarial")) == set(world.themes[scene.theme]) - set(scene.kinds)
        assert set(absent_kinds(scene, "random")) == set(world.kinds) - set(scene.kinds)
    with pytest.raises(ValueError, match="'popular', must be one of random, adversarial"):
        absent_kinds(scenes[0], "popular")


def test_popular_kinds_are_counted_once_per_scene(scenes):
    first = scenes[0]
    second = replace(first, objects=(first.objects[0],))
    twice = first.objects[0].color, first.objects[0].shape
    others = sorted(set(first.kinds) - {twice})
    assert popular_kinds([first, second]) == [twice, *others]


@pytest.mark.parametrize("negatives", ["random", "adversarial"])
def test_pope_is_balanced_and_true(world, scenes, negatives):
    rng = random.Random(0)
    for scene in scenes[:300]:
        turns = pope_questions(scene, rng, absent_kinds(scene, negatives))
        answers = [turn.answer for turn in turns]
        assert answers.count("Yes.") == answers.count("No.") == min(3, len(scene.objects), len(absent_kinds(scene, negatives)))
        assert len({turn.question for turn in turns}) == len(turns)
        assert [true_answer(turn.question, scene) for turn in turns] == answers
        if negatives == "adversarial":
            named = [tuple(turn.question.split()[3:5]) for turn in turns if turn.answer == "No."]
            assert set(named) <= set(world.themes[scene.theme])


# --- the policy


def test_every_text_survives_the_tokenizer(tokenizer, scenes):
    rng = random.Random(0)
    texts = ["Describe the image.", *(sentence for sentence, _ in every_sentence()), *(question_of(claim) for _, claim in every_sentence())]
    for scene in scenes[:500]:
        turns = [clean_question(scene, rng), labeler_question(scene, rng)]
        texts += [caption(scene, rng, Annotator()), *(text for turn in turns for text in (turn.question, turn.answer))]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer(text.lower(), add_special_tokens=False).input_ids == ids, "case does not matter"


def test_tokens_of_a_conversation(tokenizer):
    text = "USER: <image>\nWhat is on the left? ASSISTANT: Also, on the left I see a red circle.</s>"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == [
        "<s>", "user:", "<image>", "what is", "on the left", "?", "assistant:",
        "also", ",", "on the left i see a", "red", "circle", ".", "</s>",
    ]  # fmt: skip
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


def test_foreign_words_and_signs_are_unknown_not_lost(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("at the topmost redcircle 7 é objects!", add_special_tokens=False).input_ids)
    assert tokens == ["<unk>"] * 6 + ["objects", "<unk>"]  # at, the, topmost, redcircle, 7, é


def test_vocabulary_is_fixed(tokenizer):
    phrases = vocabulary()
    assert len(set(phrases)) == len(phrases)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<unk>", "<pad>", "<s>", "</s>", "<image>"]
    assert len(tokenizer) == 5 + len(phrases) + 2


def test_pictures_enter_the_policy_unchanged(world, scenes):
    picture = draw(scenes[0])
    pixels = build_adapter(world).encode(picture, "Describe the image.", ()).vision["pixel_values"][0].numpy()
    expected = (np.asarray(picture).transpose(2, 0, 1) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_checkpoint_folder_loads_like_any_other(tmp_path, world, scenes):
    adapter = build_adapter(world)
    policy = build_policy(world, adapter.tokenizer, seed=0).eval()
    if world.name == "standard":
        assert 1.1e6 < policy.num_parameters() < 1.2e6
    save_policy(policy, adapter, tmp_path)
    checkpoint = resolve_checkpoint(tmp_path)
    loaded = load_adapter(checkpoint, PolicyOptions())
    assert {"prompt_name": "hf", "image_aspect_ratio": "pad"}.items() <= loaded.settings().items()
    encoded, expected = (
        each.encode(draw(scenes[0]), "Describe the image.", ("At the top there is a red circle.",)) for each in (loaded, adapter)
    )
    assert encoded.prompt_ids.tolist() == expected.prompt_ids.tolist()
    assert encoded.response_ids[0].tolist() == expected.response_ids[0].tolist()
    assert encoded.vision_key == expected.vision_key
    assert loaded.tokenizer.convert_ids_to_tokens(encoded.prompt_ids) == [
        "<s>", "user:", *["<image>"] * world.grid**2, "describe the image.", "assistant:",
    ]  # fmt: skip
    assert loaded.tokenizer.convert_ids_to_tokens(encoded.response_ids[0]) == ["at the top there is a", "red", "circle", ".", "</s>"]
    assert loaded.tokenizer.decode(encoded.response_ids[0], skip_special_tokens=True) == "At the top there is a red circle."

    reloaded = load_policy(checkpoint, loaded, dtype=torch.float32).eval()
    assert reloaded.generation_config.eos_token_id == adapter.terminator_id
    ids = torch.cat([encoded.prompt_ids, *encoded.response_ids])[None]
    with torch.inference_mode():
        first, second = (each(input_ids=ids, **encoded.vision).logits for each in (policy, reloaded))
    assert torch.equal(first, second) and first.shape == (1, ids.shape[1], len(adapter.tokenizer))


def test_policies_differ_by_seed_alone(world, tokenizer):
    first, second, other = (build_policy(world, tokenizer, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_vision_tower_learns_to_see():
    """80 steps on small pictures: from a fourth of the colours and a third of the shapes right (chance) to most of them."""
    world = WORLDS["small"]
    adapter = build_adapter(world)
    scenes = sample_scenes(world, 256, seed=0, split="vision")
    pixels = torch.cat([adapter.encode(draw(scene), "", ()).vision["pixel_values"] for scene in scenes])
    policy = build_policy(world, adapter.tokenizer, seed=0)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    log = list(pretrain_vision(policy, scenes, pixels, steps=80, seed=0))
    assert len(log) == 80
    assert log[0]["color_accuracy"] < 0.5 and log[0]["shape_accuracy"] < 0.6
    assert np.mean([entry["color_accuracy"] for entry in log[-5:]]) > 0.95
    assert np.mean([entry["shape_accuracy"] for entry in log[-5:]]) > 0.75
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("vision_tower" in name for name in changed)


def test_decoded_png_is_the_picture(scenes, tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(encode_png(draw(scenes[0])))
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(draw(scenes[0])))
