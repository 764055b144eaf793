"""Objects that a judge lists: what counts as a list, and what its phrases name."""

import pytest

from muffin.chair import LEMMATIZERS, read_vocabulary
from muffin.object_halbench import extraction_prompt, is_short, objects_named, parse_objects


@pytest.mark.parametrize(
    ("reply", "objects"),
    [
        ('["two dogs", "dining table"]', ["two dogs", "dining table"]),
        ('```json\n["dog",\n "cat"]\n```', ["dog", "cat"]),
        ("Nothing can be seen: []", []),
        ('["dog" "cat"]', None),
        ("dog, cat", None),
        ('[["dog"], ["cat"]]', None),
        ('["dog", 3]', None),
        ("", None),
    ],
)
def test_lists_are_read(reply, objects):
    assert parse_objects(reply) == objects


def test_objects_count_once(tmp_path):
    (tmp_path / "synonyms.txt").write_text("person, man\ndog, puppy\ndining table, table\n")
    vocabulary = read_vocabulary(tmp_path / "synonyms.txt")
    listed = ["two puppies", "a big dog", "wooden dining table", "camel", "men"]
    assert objects_named(listed, vocabulary, LEMMATIZERS["simple"](vocabulary)) == ["dog", "dining table", "person"]


def test_short_answers_are_not_sent():
    assert is_short("A dog runs") and not is_short("A dog is running")
    assert "A {dog} runs." in extraction_prompt("A {dog} runs.")
