"""The tiny world's beginning, as stages: its images, a policy that learns to describe them as a careless annotator does, and a labeler.

It takes minutes, so a cold start is kept in a folder under a key of its settings and of the code that made it.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from muffin.provenance import hash_fields
from muffin.stages import Stage

RECIPES = ("data/make_shapeworld.py", "train/sft.py")
LEAST_ROUNDS = 4  # images are drawn for this many rounds at least, so that runs of one to four rounds share a cold start


@dataclass
class ColdStartOptions:
    """What the cold-started policy and labeler depend on."""

    world: Literal["standard", "small"] | None = field(
        default=None,
        metadata={"help": "Run in the tiny image world (3x3 cells, or small: 2x2) with its own policy and labeler instead of own data."},
    )
    train_images: int = field(default=6000, metadata={"help": "Images of the tiny world's cold start."})
    vision_steps: int = field(default=200, metadata={"help": "Steps of its vision tower's pre-training, 64 images each."})
    sft_steps: int = field(default=800, metadata={"help": "Steps of its policy's cold start, 64 rows each."})
    labeler_steps: int = field(default=350, metadata={"help": "Steps that turn a copy of its policy into the labeler, 80 rows each."})


@dataclass(frozen=True)
class Images:
    """How many images the world has for what, beside those of the cold start."""

    rounds: int
    per_round: int
    choice: int
    heldout: int


@dataclass(frozen=True)
class ColdStart:
    """A folder `world/` (data/make_shapeworld.py), `policy/` and `labeler/`."""

    options: ColdStartOptions
    images: Images
    seed: int
    folder: Path

    @property
    def world(self) -> Path:
        """Folder of the images and of the newborn policy."""
        return self.folder / "world"

    @property
    def policy(self) -> Path:
        """Folder of the policy that the rounds start from."""
        return self.folder / "policy"

    @property
    def labeler(self) -> Path:
        """Folder of the labeler."""
        return self.folder / "labeler"

    def stages(self) -> tuple[Stage, Stage, Stage]:
        """In their order; each needs the one before."""
        return self._make_world(), self._train_policy(), self._train_labeler()

    def _make_world(self) -> Stage:
        command = ["data/make_shapeworld.py", "--output_dir", str(self.world), "--seed", str(self.seed), "--world", self.options.world]
        command += ["--train_images", str(self.options.train_images), "--vision_steps", str(self.options.vision_steps)]
        command += ["--iterations", str(self.images.rounds), "--prompt_images", str(self.images.per_round)]
        command += ["--choice_images", str(self.images.choice), "--heldout_images", str(self.images.heldout)]
        return Stage("world", tuple(command), self.world)

    def _train_policy(self) -> Stage:
        """It learns to describe as the annotator does, and to answer questions."""
        start, data = self.world / "policy", self.world / "sft.parquet"
        return sft("policy", start, data, self.policy, steps=self.options.sft_steps, rows=64, muon_learning_rate=4e-3, seed=self.seed)

    def _train_labeler(self) -> Stage:
        start, data, steps = self.policy, self.world / "labeler.parquet", self.options.labeler_steps
        return sft("labeler", start, data, self.labeler, steps=steps, rows=80, muon_learning_rate=2e-3, seed=self.seed + 1)


def cold_start(options: ColdStartOptions, images: Images, *, seed: int, cache_dir: Path, root: Path) -> ColdStart:
    """The cold start of these settings and of the code at `root`, in its folder of `cache_dir`; nothing is made yet."""
    code = [*sorted((root / "muffin").rglob("*.py")), *(root / recipe for recipe in RECIPES)]
    settings = json.dumps([asdict(options), asdict(images), seed], sort_keys=True)
    key = hash_fields([settings, *(part for file in code for part in (str(file.relative_to(root)), file.read_bytes()))])[:16]
    return ColdStart(options, images, seed, cache_dir / key)


def sft(name: str, model: Path, data: Path, output: Path, *, steps: int, rows: int, muon_learning_rate: float, seed: int) -> Stage:
    """Supervised training of all weights: constant learning rate, then linear decay over the last 35 % of the steps."""
    schedule = {"num_decay_steps": round(0.35 * steps), "decay_type": "linear"}
    command = ["train/sft.py", "--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(output)]
    command += ["--sft_use_average", "True", "--freeze_vision_tower", "False", "--muon_learning_rate", str(muon_learning_rate)]
    command += ["--learning_rate", "3e-3", "--per_device_train_batch_size", str(rows), "--max_steps", str(steps), "--warmup_steps", "20"]
    command += ["--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", json.dumps(schedule), "--seed", str(seed)]
    command += ["--save_strategy", "no", "--logging_steps", "25", "--dataloader_num_workers", "1"]
    return Stage(name, tuple(command), output)
