"""Scenes of the tiny image world: what can stand in a picture, how scenes are drawn at random, how a scene becomes pixels.

A picture is a grid of cells with at most one coloured shape per cell. Every scene has a theme, a set of objects that tend to occur
together (the world's "table and chair"): most of its objects come from there, and a careless annotator invents from there too.
Randomness comes from `random.Random(str)` and `numpy.random.RandomState`, whose streams are fixed: a seed gives the same scene and
the same PNG bytes in every process.
"""

import io
import json
import random
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLORS = {
    "red": (214, 48, 49),
    "green": (52, 152, 72),
    "blue": (52, 90, 214),
    "yellow": (240, 210, 52),
    "purple": (142, 68, 173),
    "orange": (240, 138, 36),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
PLACES = (
    "at the top-left",
    "at the top",
    "at the top-right",
    "on the left",
    "in the center",
    "on the right",
    "at the bottom-left",
    "at the bottom",
    "at the bottom-right",
)
CELL_PIXELS = 32
SUPERSAMPLING = 4

Kind = tuple[str, str]  # (color, shape): what an object is, wherever it stands


@dataclass(frozen=True)
class World:
    """What can occur in pictures of one size.

    grid: cells per side; places: their names, row by row.
    themes: disjoint sets of kinds that occur together. habits: per theme, the places where its invented object is put, favourite first.
    objects: smallest and largest number of objects in a scene.
    """

    name: str
    grid: int
    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    places: tuple[str, ...]
    themes: tuple[tuple[Kind, ...], ...]
    habits: tuple[tuple[str, ...], ...]
    objects: tuple[int, int]

    @property
    def kinds(self) -> list[Kind]:
        """Every colour with every shape."""
        return [(color, shape) for color in self.colors for shape in self.shapes]

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels."""
        return self.grid * CELL_PIXELS


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `size` is drawn but never put into words."""

    color: str
    shape: str
    place: str
    size: str

    @property
    def kind(self) -> Kind:
        """Colour and shape."""
        return self.color, self.shape


@dataclass(frozen=True)
class Scene:
    """The ground truth of one picture; `seed` fixes everything about the drawing that words do not tell."""

    world: str
    theme: int
    objects: tuple[Thing, ...]
    seed: int

    @property
    def kinds(self) -> list[Kind]:
        """Kinds of the objects in it, with repetitions."""
        return [thing.kind for thing in self.objects]

    @property
    def empty_places(self) -> list[str]:
        """Places without an object."""
        taken = {thing.place for thing in self.objects}
        return [place for place in WORLDS[self.world].places if place not in taken]

    def holds(self, color: str, shape: str, place: str) -> bool:
        """Whether such an object stands at that place."""
        return any((thing.color, thing.shape, thing.place) == (color, shape, place) for thing in self.objects)

    def to_json(self) -> str:
        """The scene as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """What `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "objects": tuple(Thing(**thing) for thing in fields["objects"])})


def _world(name: str, grid: int, colors: tuple[str, ...], shapes: tuple[str, ...], places: tuple[str, ...], themes: int) -> World:
    kinds = [(color, shape) for color in colors for shape in shapes]
    random.Random(1234).shuffle(kinds)
    habit = random.Random(99)
    return World(
        name=name,
        grid=grid,
        colors=colors,
        shapes=shapes,
        places=places,
        themes=tuple(tuple(kinds[number::themes]) for number in range(themes)),
        habits=tuple(tuple(habit.sample(places, len(places))) for _ in range(themes)),
        objects=(2, 4) if grid == 3 else (1, 3),
    )


WORLDS = {
    "standard": _world("standard", 3, tuple(COLORS), SHAPES, PLACES, themes=4),
    "small": _world("small", 2, ("red", "green", "blue", "yellow"), SHAPES[:3], (PLACES[0], PLACES[2], PLACES[6], PLACES[8]), themes=3),
}


def sample_scene(world: World, rng: random.Random, from_theme: float = 0.8) -> Scene:
    """A random scene without two objects of one kind; each object is of the scene's theme with probability `from_theme`."""
    count = rng.randint(*world.objects)
    theme = rng.randrange(len(world.themes))
    cells = sorted(rng.sample(range(len(world.places)), count))
    things: list[Thing] = []
    for cell in cells:
        taken = {thing.kind for thing in things}
        pool = [kind for kind in (world.themes[theme] if rng.random() < from_theme else world.kinds) if kind not in taken]
        color, shape = rng.choice(pool)
        things.append(Thing(color, shape, world.places[cell], rng.choice(SIZES)))
    return Scene(world.name, theme, tuple(things), rng.randrange(1 << 30))


def sample_scenes(world: World, count: int, seed: int, split: str) -> list[Scene]:
    """`count` scenes that depend on nothing but the arguments; splits of one seed are independent."""
    rng = random.Random(f"shapeworld/{world.name}/{split}/{seed}")
    return [sample_scene(world, rng) for _ in range(count)]


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, `World.image_size` squared, anti-aliased shapes with a soft shadow on a shaded ground."""
    world = WORLDS[scene.world]
    rng = np.random.RandomState(scene.seed)
    canvas = _ground(world.image_size, rng)
    for thing in scene.objects:
        row, column = divmod(world.places.index(thing.place), world.grid)
        radius = rng.uniform(7.0, 8.5) if thing.size == "small" else rng.uniform(11.0, 12.5)
        shift = rng.uniform(-1.5, 1.5, size=2)
        color = np.clip(np.array(COLORS[thing.color]) + rng.uniform(-16, 16, size=3), 0, 255)
        mask = Image.new("L", (CELL_PIXELS * SUPERSAMPLING,) * 2)
        _outline(ImageDraw.Draw(mask), thing.shape, CELL_PIXELS / 2 + shift[0], CELL_PIXELS / 2 + shift[1], radius)
        mask = mask.reduce(SUPERSAMPLING)
        shadow = np.asarray(mask.filter(ImageFilter.GaussianBlur(1.6)), dtype=np.float32)[..., None] / 255
        alpha = np.asarray(mask, dtype=np.float32)[..., None] / 255
        cell = canvas[row * CELL_PIXELS : (row + 1) * CELL_PIXELS, column * CELL_PIXELS : (column + 1) * CELL_PIXELS]
        cell[2:, 1:] *= 1 - 0.45 * shadow[:-2, :-1]
        light = np.linspace(1.06, 0.92, CELL_PIXELS, dtype=np.float32)[:, None, None]
        cell[:] = cell * (1 - alpha) + color * light * alpha
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))


def encode_png(image: Image.Image) -> bytes:
    """PNG file bytes, equal for equal pictures."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _ground(size: int, rng: np.random.RandomState) -> np.ndarray:
    """(size, size, 3) float32: a muted colour with a light fall-off, faint stripes and a few soft blotches.

    Whole numbers, the same relief in all channels: a quarter less to store as PNG.
    """
    base = rng.randint(105, 215, size=3)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    angle, frequency, light = rng.uniform(0, 2 * np.pi), rng.uniform(4, 22), rng.uniform(0, 2 * np.pi)
    stripes = 9 * np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + light)
    slope = 36 * (np.cos(light) * x + np.sin(light) * y)
    blotches = Image.fromarray(rng.uniform(-16, 16, size=(7, 7)).astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    relief = np.round(stripes + slope + np.asarray(blotches))
    return (base + relief[..., None]).astype(np.float32)


def _outline(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float) -> None:
    """Fill `shape` around (x, y), all in cell pixels, on a supersampled mask."""
    x, y, radius = x * SUPERSAMPLING, y * SUPERSAMPLING, radius * SUPERSAMPLING
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    elif shape == "square":
        half = radius * 0.88
        pen.rectangle((x - half, y - half, x + half, y + half), fill=255)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius * 0.9), (x + radius, y + radius * 0.9)], fill=255)
    elif shape == "cross":
        arm = radius * 0.36
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=255)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=255)
    else:
        raise ValueError(f"cannot draw shape {shape!r}; known shapes are {', '.join(SHAPES)}")
