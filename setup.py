"""Packaging of muffin. Only the library is installed; the recipes in data/, eval/ and train/ are run from the checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ENGINES = ["deepspeed>=0.19"]
EVAL = ["matplotlib>=3.10", "nltk>=3.10", "openai>=3.0", "pandas>=2.2"]
NOTEBOOK = ["ipykernel>=7.0", "matplotlib>=3.10", "nbclient>=0.10", "nbconvert>=7.16", "nbformat>=5.10", "pandas>=2.2"]
BENCH = ["trl>=1.16"]
TEST = ["protobuf>=6.0", "pytest>=9.0", "pytest-xdist>=3.8", "ruff==0.17.6", "tensorboard>=2.20"]

setup(
    name="muffin",
    version=re.search(r'__version__ = "(.+)"', Path(__file__).with_name("muffin").joinpath("__init__.py").read_text())[1],
    description="Align vision-language models with preference data and stored reference log-probs",
    license="Apache-2.0",
    python_requires=">=3.11",  # transformers 5.23's own lower bound
    packages=find_packages(include=["muffin", "muffin.*"]),
    install_requires=[
        "torch>=2.10",
        "transformers>=5.23",
        "accelerate>=1.15",
        "datasets>=5.0",
        "pillow>=12.0",
        "peft>=0.21",
        "bitsandbytes>=0.49",
        "sentencepiece>=0.2.1",  # tokenizers of checkpoints in the original LLaVA layout
        "tqdm>=4.67",
    ],
    extras_require={
        "cuda": ["flash-attn>=2.8"],  # needs torch to build: pip install --no-build-isolation -e ".[cuda]", after the rest
        "engines": ENGINES,
        "eval": EVAL,
        "notebook": NOTEBOOK,
        "bench": BENCH,
        "dev": sorted({*ENGINES, *EVAL, *NOTEBOOK, *BENCH, *TEST}),
    },
)
