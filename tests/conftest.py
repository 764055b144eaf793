"""Fixtures that every test may use. Nothing here, or in any test, needs a network, a GPU or files outside the checkout.

--samples=DIR: folder of real samples (rlaifv_photos/, amber/, ...); tests that take the fixture `samples` are skipped without it.
--chaos: the kills of tests/chaos/ in full number, on the real commands (`make chaos`); --chaos_seed=N: at other moments.
--tokenizers=DIR: folder of real tokenizers (llama2/tokenizer.model); by default `tokenizers` beside the samples folder.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by transformers and datasets when they are imported, below and by the tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="muffin-arrow-cache-")  # opened data is copied there

import pytest
import torch

from tests import tiny

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
NEEDS_SAMPLES = "needs real samples: "


def pytest_addoption(parser: pytest.Parser) -> None:
    def folder(path: str) -> Path:
        return Path(path).resolve()

    parser.addoption("--samples", type=folder, help="folder of real samples; tests that take them are skipped without it")
    parser.addoption("--tokenizers", type=folder, help="folder of real tokenizers; default: `tokenizers` beside --samples")
    parser.addoption("--chaos", action="store_true", help="kill the real commands, in full number")
    parser.addoption("--chaos_seed", type=int, default=0, help="seed of the moments of the kills")


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report.nodeid for report in terminalreporter.stats.get("skipped", []) if NEEDS_SAMPLES in str(report.longrepr)]
    if skipped:
        names = ", ".join(skipped)
        terminalreporter.write_line(f"{len(skipped)} tests on real samples were skipped (give them with --samples=DIR): {names}")


def load_module(path: str | Path) -> ModuleType:
    """The recipe file at `path` (relative to the repository root), executed once per session under a name of its own.

    It stands in sys.modules because dataclasses and HfArgumentParser look their module up there.
    """
    file = ROOT / path
    name = "_".join(["recipe", *file.relative_to(ROOT).with_suffix("").parts])
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@pytest.fixture(scope="session")
def load_recipe() -> Callable[[str | Path], ModuleType]:
    """`load_recipe("train/dpo.py")` gives the recipe as a module; call its `main([...flags...])`."""
    return load_module


@pytest.fixture(scope="session")
def samples(pytestconfig: pytest.Config) -> Path:
    """The folder of real samples given with --samples."""
    folder = pytestconfig.getoption("--samples")
    if folder is None:
        pytest.skip(NEEDS_SAMPLES + "give their folder with --samples=DIR")
    if not folder.is_dir():
        pytest.fail(f"--samples {folder} is not a folder")
    return folder


@pytest.fixture(scope="session")
def llama2_tokenizer_model(pytestconfig: pytest.Config) -> Path:
    """The real Llama-2 sentencepiece model (Vicuna's and LLaVA-1.5's)."""
    folder, samples = pytestconfig.getoption("--tokenizers"), pytestconfig.getoption("--samples")
    if folder is None and samples is None:
        pytest.skip(NEEDS_SAMPLES + "give llama2/tokenizer.model with --tokenizers=DIR, or have `tokenizers` beside --samples=DIR")
    model = (folder or samples.parent / "tokenizers") / "llama2" / "tokenizer.model"
    if folder is None and not model.is_file():
        pytest.skip(NEEDS_SAMPLES + f"no {model}; give its folder with --tokenizers=DIR")
    if not model.is_file():
        pytest.fail(f"--tokenizers {folder} holds no llama2/tokenizer.model")
    return model


@pytest.fixture(scope="session")
def tiny_llava_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA-1.5 checkpoint with 16 image tokens (tests.tiny.tiny_llava). Shared by all tests: read only."""
    return tiny.tiny_llava(tmp_path_factory.mktemp("tiny_llava"))


@pytest.fixture(scope="session")
def tiny_rows_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of 24 RLAIF-V-style rows on 8 small images (tests.tiny.write_parquet). Shared by all tests: read only."""
    return tiny.write_parquet(tmp_path_factory.mktemp("tiny_rows") / "rows.parquet", 24)


@pytest.fixture
def small_nltk(monkeypatch):
    """nltk's interface over a few words, its data being downloads."""
    nltk = ModuleType("nltk")
    nltk.word_tokenize = lambda text: text.replace(".", " .").split()
    tags = {"Two": "CD", "two": "CD", "men": "NNS", "seated": "VBN", "benches": "NNS", ".": "."}
    nltk.pos_tag = lambda words: [(word, tags.get(word, "NN")) for word in words]
    forms = {("men", "n"): "man", ("seated", "v"): "seat", ("benches", "n"): "bench"}

    class Lemmatizer:
        def lemmatize(self, word, pos="n"):
            return forms.get((word, pos), word)

    nltk.stem = ModuleType("nltk.stem")
    nltk.stem.WordNetLemmatizer = Lemmatizer
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    english = ModuleType("pattern.en")
    english.singularize = lambda word: {"benches": "bench", "men": "man"}.get(word, word)
    monkeypatch.setitem(sys.modules, "pattern", ModuleType("pattern"))
    monkeypatch.setitem(sys.modules, "pattern.en", english)
