"""Conventions that keep the tree in order: import direction, file names, options, shell scripts, no traces of a machine.

Recipes (data/, eval/, train/) follow one convention that this file relies on: each exposes

    OPTIONS: tuple[type, ...] = (ScriptOptions, DPOConfig)      # the option dataclasses, in the order of the parser

and builds its parser with `HfArgumentParser(OPTIONS)`. A flag is then an own field of one of them, or inherited from transformers.
Shell scripts call recipes as `[launcher ...] (data|eval|train)/NAME.py --flag value ... "$@"`.

Every check is a function from a tree to a list of findings; the tests run it on this repository and on a small tree that breaks the rule.
"""

import ast
import contextlib
import importlib
import importlib.metadata
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from inspect import isclass, isfunction, isroutine
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from transformers import HfArgumentParser, TrainingArguments

from muffin.policies import PolicyAdapter
from tests.conftest import ROOT
from tests.policies import test_conformance
from tests.policies.tiny_families import FAMILIES

# A module imports only modules above it. A line without a file yet is fine, a module without a line is not.
IMPORT_ORDER = (
    "pairs",
    "policies.base",
    "policies.*",  # the families
    "policies",
    "packing",
    "attention",
    "logps",
    "losses",
    "metrics",
    "flops",
    "provenance",
    "rehearsal",
    "preflight",
    "shards",
    "scoring",
    "reference_gate",
    "batches",
    "muon",
    "checkpoints",
    "policy_trainer",
    "pair_log",
    "trainer",
    "sft",
    "training_run",
    "planner",
    "stages",
    "generation",
    "claims",
    "feedback",
    "chat",
    "judge",
    "chat_feedback",
    "chat_generation",
    "pair_selection",
    "hallucination",
    "image_counts",
    "answers",
    "lemmas",
    "pope",
    "chair",
    "amber",
    "object_halbench",
    "mmhal",
    "refomb",
    "benchmarks",
    "checkpoint_choice",
    "reward",
    "shapeworld",  # a package: its modules may import each other
    "inspection",
    "figures",
)
RECIPE_FOLDERS = ("data", "eval", "train")
SKIPPED_FOLDERS = {".venv", ".git", "build", "dist", "outputs", "runs", "__pycache__", ".pytest_cache", ".ruff_cache"}


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (root / folder).rglob("*.py") if "__pycache__" not in file.parts)


def module_name(root: Path, file: Path) -> str:
    """muffin/policies/base.py -> muffin.policies.base; a package's __init__.py is the package."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(file: Path, module: str) -> Iterator[str]:
    """Absolute dotted names that `file` imports, anywhere in it; `from a import b` gives a.b."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


# --- imports


def place(module: str) -> int | None:
    """Line of muffin.`module` in IMPORT_ORDER; None when it has none."""
    if module in IMPORT_ORDER:
        return IMPORT_ORDER.index(module)
    package = module.partition(".")[0]
    if package == "policies":
        return IMPORT_ORDER.index("policies.*")
    return IMPORT_ORDER.index(package) if package == "shapeworld" else None


def upward_imports(root: Path) -> list[str]:
    files = {module_name(root, file): file for file in python_files(root, "muffin")}
    findings = []
    for module, file in files.items():
        if module == "muffin":
            continue
        inside = module.removeprefix("muffin.")
        own_place = place(inside)
        if own_place is None:
            findings.append(f"{module} has no line in IMPORT_ORDER")
            continue
        for name in imported_names(file, module):
            target = name if name in files else name.rpartition(".")[0]
            if target not in files or target in (module, "muffin"):
                continue
            target_place = place(target.removeprefix("muffin."))
            same_package = inside.startswith("shapeworld") and target.startswith("muffin.shapeworld")
            if target_place is not None and target_place >= own_place and not same_package:
                findings.append(f"{module} imports {target}, which is not above it in IMPORT_ORDER")
    return findings


def recipe_imports(root: Path) -> list[str]:
    """Nothing imports a recipe: not the library, not another recipe."""
    recipes = python_files(root, *RECIPE_FOLDERS)
    roots = {*RECIPE_FOLDERS, "scripts", "tests", *(recipe.stem for recipe in recipes)}
    return [
        f"{file.relative_to(root)} imports {name}"
        for file in (*python_files(root, "muffin"), *recipes)
        for name in imported_names(file, module_name(root, file))
        if name.partition(".")[0] in roots
    ]


def test_modules_import_only_modules_above_them():
    assert upward_imports(ROOT) == []


def test_nothing_imports_a_recipe():
    assert recipe_imports(ROOT) == []


@pytest.mark.parametrize("module", [module_name(ROOT, file) for file in python_files(ROOT, "muffin")])
def test_every_module_imports(module):
    importlib.import_module(module)


def test_import_checks_find_what_they_forbid(tmp_path):
    write_tree(
        tmp_path,
        {
            "muffin/__init__.py": "",
            "muffin/pairs.py": "def late():\n    from muffin import logps",
            "muffin/policies/__init__.py": "from . import one\nfrom .base import Policy",
            "muffin/policies/base.py": "from ..pairs import Pair",
            "muffin/policies/one.py": "from muffin.policies import two\nimport muffin.policies.base",
            "muffin/policies/two.py": "import dpo",
            "muffin/logps.py": "from muffin.packing import pack",
            "muffin/packing.py": "import torch",
            "muffin/surprise.py": "",
            "muffin/shapeworld/__init__.py": "from muffin.shapeworld.draw import draw",
            "muffin/shapeworld/draw.py": "import muffin.pairs",
            "train/dpo.py": "from eval.score import main",
            "train/sft.py": "import torch",
            "eval/score.py": "from muffin.pairs import Pair",
        },
    )
    assert upward_imports(tmp_path) == [
        "muffin.pairs imports muffin.logps, which is not above it in IMPORT_ORDER",
        "muffin.policies.one imports muffin.policies.two, which is not above it in IMPORT_ORDER",
        "muffin.surprise has no line in IMPORT_ORDER",
    ]
    assert recipe_imports(tmp_path) == ["muffin/policies/two.py imports dpo", "train/dpo.py imports eval.score.main"]


# --- names and layout


def misnamed_files(root: Path) -> list[str]:
    """Names that say nothing, and recipes that a library of the same name would be imported for (their folder leads sys.path)."""
    libraries = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), "muffin"}
    vague = {"util", "utils", "common", "helper", "helpers", "misc"}
    files = python_files(root, "muffin", "tests", *RECIPE_FOLDERS)
    findings = [f"{file.relative_to(root)}: say what it holds" for file in files if file.stem in vague]
    for recipe in python_files(root, *RECIPE_FOLDERS):
        if recipe.name == "__init__.py":
            findings.append(f"{recipe.relative_to(root)}: recipe folders are no packages")
        elif recipe.stem in libraries:
            findings.append(f"{recipe.relative_to(root)} shadows the library {recipe.stem}")
    return findings


def test_files_are_well_named():
    assert misnamed_files(ROOT) == []


def test_name_check_finds_what_it_forbids(tmp_path):
    write_tree(tmp_path, {"muffin/utils.py": "", "data/datasets.py": "", "train/types.py": "", "eval/__init__.py": "", "eval/score.py": ""})
    assert misnamed_files(tmp_path) == [
        "muffin/utils.py: say what it holds",
        "data/datasets.py shadows the library datasets",
        "eval/__init__.py: recipe folders are no packages",
        "train/types.py shadows the library types",
    ]


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="the tree is complete once it has a README")
def test_the_checks_have_something_to_check():
    """So that the other tests do not pass because a folder is empty or was renamed."""
    assert len(python_files(ROOT, "muffin")) > 10
    assert (ROOT / "data" / "README.md").is_file()
    assert recipe_paths(ROOT, "eval") and recipe_paths(ROOT, "train")
    assert scripts(ROOT)


# --- every public name says what it is


CONTRACTS = (PolicyAdapter,)  # protocols that classes follow without inheriting from them


def undocumented(module: ModuleType) -> list[str]:
    """Public classes, functions, methods and properties that `module` defines without a docstring, own or inherited."""
    findings = [] if module.__doc__ else [f"{module.__name__} has no docstring"]
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__ or not (isclass(value) or isfunction(value)):
            continue
        if not value.__doc__ or value.__doc__.startswith(f"{name}("):  # what @dataclass writes
            findings.append(f"{module.__name__}.{name} has no docstring")
        if isclass(value):
            methods = [
                member
                for member, each in vars(value).items()
                if not member.startswith("_") and (isroutine(each) or isinstance(each, property | cached_property))
            ]
            findings += [f"{module.__name__}.{name}.{member} has no docstring" for member in methods if not inherited_doc(value, member)]
    return findings


def inherited_doc(owner: type, member: str) -> str | None:
    """The docstring of a method, of the method that it overrides, or of the protocol's."""
    docs = [getattr(base.__dict__[member], "__doc__", None) for base in (*owner.__mro__, *CONTRACTS) if member in base.__dict__]
    return next(filter(None, docs), None)


@pytest.mark.parametrize("module", [module_name(ROOT, file) for file in python_files(ROOT, "muffin")])
def test_public_names_are_documented(module):
    assert undocumented(importlib.import_module(module)) == []


class Documented:
    """What a method inherits."""

    def inherited(self) -> None:
        """Said once."""

    def missing(self) -> None: ...


class Inheriting(Documented):
    """Overrides one."""

    def inherited(self) -> None: ...


@dataclass
class Undocumented:
    number: int = 0

    @property
    def double(self) -> int:
        return 2 * self.number

    @classmethod
    def make(cls) -> "Undocumented":
        return cls()


def test_docstring_check_finds_what_it_forbids():
    module = ModuleType("example", "Examples.")
    for value in (Documented, Inheriting, Undocumented):
        setattr(module, value.__name__, value)
        value.__module__ = "example"
    assert undocumented(module) == [
        "example.Documented.missing has no docstring",
        "example.Undocumented has no docstring",
        "example.Undocumented.double has no docstring",
        "example.Undocumented.make has no docstring",
    ]


# --- the library is quiet


def loud_code(root: Path) -> list[str]:
    """The library logs instead of printing, takes its settings as arguments, and lets errors it does not understand pass."""
    findings = []
    for file in python_files(root, "muffin"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                findings.append(f"{file.relative_to(root)}:{node.lineno} prints; use logging.getLogger(__name__)")
            elif text in ("os.environ", "os.getenv", "environ", "getenv"):
                findings.append(f"{file.relative_to(root)}:{node.lineno} reads the environment; take an argument")
            elif text == "logging.basicConfig":
                findings.append(f"{file.relative_to(root)}:{node.lineno} sets logging up; recipes do that")
            elif isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")):
                findings.append(f"{file.relative_to(root)}:{node.lineno} catches everything; name the error")
    return findings


def test_library_is_quiet():
    assert loud_code(ROOT) == []


def test_quiet_check_finds_what_it_forbids(tmp_path):
    code = "import os\nprint('x')\nos.environ['A']\ntry:\n    pass\nexcept Exception:\n    pass\n'print(1) os.environ'"
    write_tree(tmp_path, {"muffin/a.py": code})
    assert sorted(finding.partition(" ")[0] for finding in loud_code(tmp_path)) == ["muffin/a.py:2", "muffin/a.py:3", "muffin/a.py:6"]


# --- recipes and their options


def recipe_paths(root: Path, *folders: str) -> list[str]:
    return [str(file.relative_to(root)) for file in python_files(root, *(folders or RECIPE_FOLDERS)) if file.name != "__init__.py"]


def attributes_read(file: Path) -> set[str]:
    """Names read as `.name`, outside __post_init__: validation alone is no use of an option."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    validation = {id(node) for function in functions if function.name == "__post_init__" for node in ast.walk(function)}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in validation]
    return {node.attr for node in attributes if isinstance(node.ctx, ast.Load)}


def dead_options(options: tuple[type, ...], read: set[str]) -> list[str]:
    """Fields nobody reads. A field that transformers defined (a changed default) is transformers' to read."""
    findings = []
    for option_class in options:
        libraries = [base for base in option_class.__mro__ if is_dataclass(base) and base.__module__.startswith(("transformers.", "trl."))]
        inherited = {option.name for base in libraries for option in fields(base)}
        own = [option.name for option in fields(option_class) if option.name not in inherited]
        findings += [f"{option_class.__name__}.{name} has no reader" for name in own if name not in read]
    return findings


@pytest.mark.parametrize("path", recipe_paths(ROOT))
def test_recipe_exposes_its_options(path, load_recipe):
    source = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    parsers = [
        ast.unparse(node) for node in ast.walk(source) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("HfArgumentParser")
    ]
    assert parsers == ["HfArgumentParser(OPTIONS)"], f"{path} builds its parser once, as HfArgumentParser(OPTIONS)"
    recipe = load_recipe(path)
    HfArgumentParser(recipe.OPTIONS)
    assert recipe.__doc__ and Path(path).name in recipe.__doc__, f"{path}: the docstring gives the exact command"
    assert callable(recipe.main)


@pytest.mark.parametrize("path", recipe_paths(ROOT))
def test_every_option_is_read(path, load_recipe):
    read = set().union(*(attributes_read(file) for file in (ROOT / path, *python_files(ROOT, "muffin"))))
    assert dead_options(load_recipe(path).OPTIONS, read) == []


@dataclass
class ExampleOptions(TrainingArguments):
    learning_rate: float = field(default=5e-7)
    dpo_beta: float = field(default=0.1)
    dead_beta: float = field(default=0.1)


def test_option_check_finds_dead_options(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text("def __post_init__(self):\n    self.dead_beta\n\ndef main(options):\n    options.dead_beta = options.dpo_beta\n")
    assert attributes_read(file) == {"dpo_beta"}
    assert dead_options((ExampleOptions,), attributes_read(file)) == ["ExampleOptions.dead_beta has no reader"]


# --- shell scripts


def scripts(root: Path) -> list[str]:
    return [str(file.relative_to(root)) for file in sorted((root / "scripts").rglob("*.sh"))]


def recipe_commands(script: str) -> Iterator[tuple[str, list[str]]]:
    """(recipe path, words after it) of each command that calls a recipe; continued lines are one command."""
    for line in script.replace("\\\n", " ").splitlines():
        call = re.search(r"\b((?:data|eval|train)/[\w/]+\.py)[\"']?(?=\s|$)(.*)", line.strip())
        if call and not line.lstrip().startswith("#"):
            yield call[1], shlex.split(call[2], comments=True)


def script_findings(
    root: Path, path: str, options_of: Callable[[str], tuple[type, ...]], flags_of: Callable[[str], dict[str, str]] = lambda recipe: {}
) -> list[str]:
    """What is wrong with the script at `path`; `options_of` gives the OPTIONS of a recipe, `flags_of` its options that hold flags for
    another recipe, with that recipe."""
    script = (root / path).read_text(encoding="utf-8")
    lines = script.splitlines()
    findings = []
    if not (lines[:1] == ["#!/usr/bin/env bash"] and lines[1:2] and lines[1].startswith("# ")):
        findings.append("starts with #!/usr/bin/env bash and a comment (hardware, time, expected numbers)")
    if "set -euo pipefail" not in lines:
        findings.append("lacks set -euo pipefail")
    if re.search(r"=\([^)]*--\w", script):
        findings.append("keeps flags in an array; write them on the command, where they are checked")
    commands = list(recipe_commands(script))
    calls = re.findall(r"^\s*(?:srun .*)?(scripts/\S+\.sh) (.*?)(?: &)?$", script.replace("\\\n", " "), re.MULTILINE)
    findings += [f"calls {other}, which does not exist" for other, _ in calls if not (root / other).is_file()]
    if not any(words[-1:] == ["$@"] for _, words in [*commands, *((other, shlex.split(words)) for other, words in calls)]):
        findings.append('ends no recipe command with "$@"')
    for recipe, words in commands:
        if not (root / recipe).is_file():
            findings.append(f"calls {recipe}, which does not exist")
        else:
            findings += flag_findings(recipe, HfArgumentParser(options_of(recipe)), words)
            for option, other in flags_of(recipe).items():
                for flag, value in pairwise(words):
                    if flag == f"--{option}" and "$" not in value:
                        findings += flag_findings(other, HfArgumentParser(options_of(other)), shlex.split(value))
    return findings


def flag_findings(recipe: str, parser: HfArgumentParser, words: list[str]) -> list[str]:
    """Unknown flags, and literal values that the recipe's parser refuses (values with a shell variable are not looked at)."""
    groups: list[list[str]] = []
    for word in words:
        if word in ("|", "||", "&&", ";", "&", ">", ">>", "2>&1"):
            break
        if word.startswith("--") and " " not in word:
            groups.append(word.split("=", 1))
        elif word != "$@" and groups:
            groups[-1].append(word)
    unknown = [flag for flag, *_ in groups if flag not in parser._option_string_actions or "-" in flag[2:]]
    if unknown:
        return [f"passes {flag}, which {recipe} does not have" for flag in unknown]
    for action in parser._actions:
        action.required = False
    literal = [word for group in groups if not any("$" in word for word in group) for word in group]
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            parser.parse_args(literal)
    except SystemExit:
        return [f"{recipe}: {message.getvalue().strip().splitlines()[-1]}"]
    return []


def passed_on(recipe: ModuleType) -> dict[str, str]:
    """FLAGS of a recipe that hands flags on."""
    return vars(recipe).get("FLAGS", {})


@pytest.mark.parametrize("path", scripts(ROOT))
def test_script_parses_against_its_recipe(path, load_recipe):
    assert script_findings(ROOT, path, lambda recipe: load_recipe(recipe).OPTIONS, lambda recipe: passed_on(load_recipe(recipe))) == []


@dataclass
class ExampleRecipeOptions:
    model_name_or_path: str
    dpo_beta: float = 0.1


def test_script_check_finds_what_it_forbids(tmp_path):
    head = "#!/usr/bin/env bash\n# One H100, 3 hours.\nset -euo pipefail\n"
    good = 'torchrun --nproc_per_node 8 train/dpo.py \\\n    --model_name_or_path "$1" \\\n    --dpo_beta=0.1 \\\n    "$@"\n'
    write_tree(
        tmp_path,
        {
            "train/dpo.py": "",
            "scripts/array.sh": head + 'flags=(\n  --x 1\n)\npython train/dpo.py "${flags[@]}" "$@"\n',
            "scripts/good.sh": head + good,
            "scripts/job.sh": head + 'srun \\\n    scripts/good.sh "$@" &\nsrun scripts/lost.sh "$@"\n',
            "scripts/loose.sh": "python train/dpo.py --dpo_beta 0.1\npython train/gone.py\n",
            "scripts/more/unknown.sh": head + 'python train/dpo.py --model_name_or_path a --dpo_betta 0.1 --dpo_b 0.1 "$@"\n',
            "scripts/more/value.sh": head + 'python train/dpo.py --dpo_beta high "$@"\n',
        },
    )
    array, good, job, loose, unknown, value = (
        script_findings(tmp_path, script, lambda recipe: (ExampleRecipeOptions,)) for script in scripts(tmp_path)
    )
    assert [finding.partition(" ")[0] for finding in array] == ["keeps"]
    assert good == []
    assert job == ["calls scripts/lost.sh, which does not exist"]
    assert [finding.partition(" ")[0] for finding in loose] == ["starts", "lacks", "ends", "calls"]
    assert unknown == ["passes --dpo_betta, which train/dpo.py does not have", "passes --dpo_b, which train/dpo.py does not have"]
    assert len(value) == 1 and "argument --dpo_beta" in value[0] and "'high'" in value[0]


# --- no traces of a machine


def text_files(root: Path) -> list[Path]:
    """Files git tracks or would add; in a tree without git, every file outside the folders that tools make."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listing.returncode == 0:
        files = [root / name for name in listing.stdout.split("\0") if name]
    else:
        files = [file for file in root.rglob("*") if not SKIPPED_FOLDERS.intersection(file.relative_to(root).parts)]
    suffixes = {".py", ".sh", ".md", ".toml", ".txt", ".cfg", ".json", ".jsonl", ".yaml", ".yml", ".ipynb", ".html", ".csv", ""}
    return sorted(file for file in files if file.is_file() and file.suffix in suffixes)


def machine_traces(root: Path) -> list[str]:
    """Absolute paths of some machine, and addresses of package indexes."""
    folders = "|".join(("home", "root", "work", "tmp", "mnt", "opt", "srv", "scratch", "Users"))
    trace = re.compile(rf"(?<![\w.~}})/-])/(?:{folders})/\w[\w./-]*|\b[\w.-]*(?:{'|'.join(('pypi', 'pythonhosted'))})\.[a-z]+/\S*")
    findings = []
    for file in text_files(root):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        findings += [
            f"{file.relative_to(root)}:{number} names {found[0]}"
            for number, line in enumerate(text.splitlines(), start=1)
            for found in trace.finditer(line)
        ]
    return findings


def test_no_file_names_a_machine():
    assert machine_traces(ROOT) == []


def test_trace_check_finds_what_it_forbids(tmp_path):
    home, index = "/".join(["", "home", "me", "x"]), ".".join(["pypi", "org"]) + "/simple"
    fine = "output/home/x http://a.b/home/x $DIR/tmp/x /dev/null /usr/bin/env ../tmp/x"
    write_tree(tmp_path, {"a.py": f"open('{home}')", "run": f"cd {home}", "b.md": f"https://{index}", "c.txt": fine, ".venv/d.py": home})
    assert machine_traces(tmp_path) == [f"a.py:1 names {home}", f"b.md:1 names {index}", f"run:1 names {home}"]


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def test_conformance_suite_is_families_times_checks():
    """Every check runs for every family: no check is narrowed, no family left out."""

    class Collected:
        def pytest_collection_modifyitems(self, items):
            self.names = [item.name for item in items]

    collected = Collected()
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/policies/test_conformance.py")], plugins=[collected])
    checks = [name for name in vars(test_conformance) if name.startswith("test_")]
    assert len(checks) > 20
    assert sorted(collected.names) == sorted(f"{check}[{family}]" for check in checks for family in FAMILIES)
