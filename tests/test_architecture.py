"""The rules of the house, held by a walk over the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import doremi_mix
from doremi_mix.stages import STAGES

PACKAGE = Path(doremi_mix.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
# What the core may not know of: settings, run directories, stages, the command line.
SHELL = (
    "config",
    "config_file",
    "checks",
    "run",
    "stages",
    "cli",
    "pipeline",
    "summary",
    "plan",
    "replicas",
    "distributed",
    "filtering",
    "filter_steps",
    "row_statistics",
    "rejections",
    "score_store",
    "row_jobs",
    "row_workers",
    "hosts",
    "executors",
    "cluster",
    "cli_export",
    "cli_models",
    "cli_stages",
    "finetune_plan",
    "fingerprints",
)
CORE = [
    path
    for path in MODULES
    if path.relative_to(PACKAGE).parts[0]
    not in {*SHELL, *(f"{name}.py" for name in SHELL), "__main__.py", "__init__.py"}
]
HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "sentencepiece",
    "pyarrow",
    "matplotlib",
    "wandb",
    "tensorboard",
    "peft",
    "lm_eval",
    "evaluate",
    "rouge_score",
    "bitsandbytes",
}


def imported(path, *, top_level_only=False):
    """Full names of what a module imports; those for type checking are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_knows_nothing_of_the_shell(path):
    forbidden = {f"doremi_mix.{name}" for name in SHELL}
    assert not {name for name in imported(path) if any(name == f or name.startswith(f"{f}.") for f in forbidden)}


def test_errors_and_types_import_no_other_module_of_ours():
    for name in ("errors.py", "types.py"):
        ours = {module for module in imported(PACKAGE / name) if module.startswith("doremi_mix")}
        assert ours <= {"doremi_mix.errors"}


def test_stages_do_not_import_the_command_line():
    for path in (PACKAGE / "stages").glob("*.py"):
        assert not {n for n in imported(path) if n.startswith(("doremi_mix.cli", "doremi_mix.pipeline"))}


def test_every_stage_has_its_module_and_no_module_is_left_over():
    modules = {path.stem for path in (PACKAGE / "stages").glob("*.py")} - {"__init__", "training"}
    assert modules == {stage.name for stage in STAGES}


def test_no_room_without_a_name():
    assert not {"utils", "common", "helpers", "misc"} & {path.stem for path in MODULES}


LIGHT = "import sys; {statement}; print(sorted({{name.partition('.')[0] for name in sys.modules}} & {heavy!r}))"


@pytest.mark.parametrize(
    "statement",
    [
        "import doremi_mix",
        "import doremi_mix.cli",
        "from doremi_mix import learn, DomainWeights",
        "import doremi_mix.stages.load, doremi_mix.mixture, doremi_mix.tokens",
    ],
)
def test_importing_loads_nothing_heavy(statement):
    code = LIGHT.format(statement=statement, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_no_torch():
    code = (
        "import sys, contextlib\nfrom doremi_mix.cli import main\nsys.argv = ['doremi-mix', '--help']\n"
        f"try:\n    main()\nfinally:\n    assert not {HEAVY!r} & set(sys.modules), sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert stage.name.replace("_", "-") in done.stdout
    for preset in ("tiny: 0.7 M parameters", "120m: 110.1 M parameters", "280m: 285.6 M parameters"):
        assert preset in done.stdout
