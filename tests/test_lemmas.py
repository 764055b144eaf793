"""Reducing words without data, and what is said when data are missing."""

import sys

import pytest

from muffin import lemmas
from muffin.lemmas import MissingResource, known_singular, simple_lemmas, tokens


def test_tokens():
    assert tokens("The dog's, mid-air jump.\nTwo") == ["the", "dog", "'", "s", ",", "mid-air", "jump", ".", "two"]


@pytest.mark.parametrize(
    ("word", "singular"),
    [
        ("dogs", "dog"),
        ("buses", "bus"),
        ("bus", "bus"),
        ("benches", "bench"),
        ("knives", "knife"),
        ("calves", "calf"),
        ("puppies", "puppy"),
        ("ties", "tie"),
        ("policemen", "policeman"),
        ("geese", "goose"),
        ("glasses", "glass"),
        ("skies", "skies"),  # not a ski
        ("skis", "skis"),
        ("tables", "tables"),  # not known: left alone
        ("seated", "seated"),
    ],
)
def test_plurals_of_known_words(word, singular):
    known = {"dog", "bus", "bench", "knife", "calf", "puppy", "tie", "policeman", "goose", "glass", "ski", "skis", "seat"}
    assert known_singular(word, known) == singular


def test_simple_lemmas():
    assert simple_lemmas({"dog", "man"})("Two DOGS and men.") == ["two", "dog", "and", "man", "."]


@pytest.mark.parametrize("rule", [lemmas.wordnet_noun_lemmas, lemmas.wordnet_pos_lemmas, lemmas.wordnet_nouns])
def test_missing_nltk_data_are_named(rule, monkeypatch):
    pytest.importorskip("nltk")
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(MissingResource, match="python -m nltk.downloader punkt_tab wordnet averaged_perceptron_tagger_eng"):
        rule()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(MissingResource, match="pip install nltk"):
        lemmas.wordnet_noun_lemmas()
    monkeypatch.setitem(sys.modules, "pattern.en", None)
    with pytest.raises(MissingResource, match="pip install pattern"):
        lemmas.pattern_singulars()


def test_variants_differ_as_published(small_nltk):
    """Only the variant by part of speech makes a chair of "seated"."""
    text = "Two men seated."
    assert lemmas.wordnet_noun_lemmas()(text) == ["two", "man", "seated", "."]
    assert lemmas.wordnet_pos_lemmas()(text) == ["two", "man", "seat", "."]
    assert lemmas.pattern_singulars()(text) == ["two", "man", "seated", "."]
    assert lemmas.wordnet_nouns()("Two Men seated. benches") == ["Men", "bench"]  # AMBER keeps the case, and nouns only
