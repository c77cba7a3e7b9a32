"""Which part of the project may import which, and who may look at the command line and the
environment."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "models",
    "kernels",
    "sparsity",
    "preprocess",
    "training",
    "experiments",
    "benchmarks",
)
LIBRARIES = ("kernels", "models", "sparsity", "training")
ENTRY_SCRIPTS = {"main_learnable_skewness", "main_inference", "config"}
EVERYTHING = {"models", "kernels", "sparsity", "training", "preprocess", "config"}
ALLOWED = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "sparsity": {"sparsity", "kernels.AttentionStatistics"},
    "training": {"training", "models", "sparsity", "kernels"},
    "preprocess": {
        "preprocess",
        "training.data",
        "training.errors",
        "training.peak",
        "training.recording.files",
    },
    # they run the commands, and measure whatever they need
    "experiments": {"experiments", *EVERYTHING},
    "benchmarks": {"benchmarks", *EVERYTHING},
}
# modules of training and kernels that are programs too, or whose one switch comes from outside
READS_OUTSIDE = {
    "training/data/inspect.py": "python -m training.data.inspect",
    "kernels/native.py": "SAT_CPU_ISA forces an instruction set",
}


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path):
    """Names of the project's modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    own = (*PACKAGES, *ENTRY_SCRIPTS)
    return {name for name in names if name.split(".")[0] in own}


def allowed(package, name):
    return any(name == good or name.startswith(good + ".") for good in ALLOWED[package])


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    for path in sources(package):
        for name in imported(path):
            parent = name.rpartition(".")[0]
            # "from training.data import safe_pickle" names the packages first
            if any(good.startswith(name + ".") for good in ALLOWED[package]):
                continue
            assert allowed(package, name) or allowed(package, parent), f"{path} imports {name}"


def test_only_entry_scripts_read_config():
    for package in (*LIBRARIES, "preprocess"):
        for path in sources(package):
            assert "config" not in {name.split(".")[0] for name in imported(path)}, path


def reads_outside(path):
    """Whether a file mentions sys.argv, os.environ or os.getenv, or parses arguments itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("argv", "environ", "getenv"):
            return True
    return False


def test_only_entry_scripts_read_arguments_and_environment():
    for package in LIBRARIES:
        for path in sources(package):
            name = str(path.relative_to(ROOT))
            assert not reads_outside(path) or name in READS_OUTSIDE, name
    for path in sources("preprocess"):
        # sources tells tensorflow to be quiet, which it takes from the environment alone
        if path.name not in ("__main__.py", "download.py", "driver.py", "sources.py"):
            assert not reads_outside(path), path


def test_the_rule_would_notice():
    assert all(sources(package) for package in (*LIBRARIES, "preprocess"))
    assert not allowed("kernels", "training.loop") and not allowed("models", "training")
    assert not allowed("sparsity", "kernels.BlockLayout") and not allowed("sparsity", "models")
    assert allowed("preprocess", "training.data.safe_pickle")
    assert not allowed("preprocess", "training.loop")
    assert not allowed("preprocess", "training.recording.checkpoint")
    assert reads_outside(ROOT / "main_inference.py")


def test_nothing_but_scripts_imports_tensorflow():
    for package in LIBRARIES:
        for path in sources(package):
            assert "import tensorflow" not in path.read_text(), path


def test_the_repository_speaks_of_itself_alone():
    words = ["/work" + "/", "/root" + "/", "pypi" + ".org", "../" + "shared"]
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if any(part.startswith(".") or part in ("data", "runs", "logs") for part in parts):
            continue
        if path.suffix in (".py", ".md", ".sh", ".txt", ".cpp", ".cu", ".h", ".cuh", ".toml"):
            text = path.read_text()
            assert not [word for word in words if word in text], path
