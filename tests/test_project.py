"""What the project promises about itself: one-way imports, no pickle, a tidy top level, nothing of this machine.

Each rule is a function of a folder, and is also run on a folder with a planted violation.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room may import rooms of earlier rows, and itself. Rooms of one row may not import each other.
ROWS = [
    {"files", "devices", "versions"},
    {"sequence", "config", "rng"},
    {"tokenization"},
    {"modalities"},
    {"model", "objectives"},
    {"data", "sampling"},
    {"evaluation"},
    {"training"},
    {"hub"},
    {"cli"},
]
LEVEL = {room: level for level, row in enumerate(ROWS) for room in row}
TOP_LEVEL = {
    ".ci", ".gitignore", "LICENSE", "Makefile", "README.md", "benchmarks", "configs", "constraints.txt",
    "data_pipelines", "docs", "mmgen", "models", "pyproject.toml", "tests", "tokenizers",
}  # fmt: skip
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# In two pieces, so that this file does not break its own rule.
MACHINE_PATH = re.compile(r"(?<![\w./-])/" + r"(?:work|tmp|root|home)/")


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of everything that a module of `package` imports, at the top or within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level else relative
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def modules(folder: Path) -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def import_violations(root: Path) -> list[str]:
    """Imports of the package under `root` that do not point one way."""
    found = []
    for path, tree in modules(root / "mmgen"):
        parts = path.relative_to(root).with_suffix("").parts
        if len(parts) == 2 and parts[1] in ("__init__", "__main__"):
            continue  # the package's face: it may show anything
        room = parts[1]
        if room not in LEVEL:
            found.append(f"{path.relative_to(root)}: the room {room!r} has no place in the order")
            continue
        for line, name in imported(tree, ".".join(parts[:-1])):
            words = name.split(".")
            if words[0] in ("data_pipelines", "benchmarks", "tests"):
                found.append(f"{path.relative_to(root)}:{line}: mmgen imports {name}")
            elif words[0] == "mmgen" and words[1:] != ["__version__"]:
                other = words[1] if len(words) > 1 else ""
                if other != room and LEVEL.get(other, len(ROWS)) >= LEVEL[room]:
                    found.append(f"{path.relative_to(root)}:{line}: {room} imports {name}")
    return found


def pickle_uses(root: Path) -> list[str]:
    """Uses of pickle, open or hidden, in the package and the pipelines."""
    found = []
    for folder in ("mmgen", "data_pipelines"):
        for path, tree in modules(root / folder):
            where = path.relative_to(root)
            names = [(line, name.split(".")[0]) for line, name in imported(tree, folder)]
            found += [f"{where}:{line}: imports {name}" for line, name in names if name in PICKLES]
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    hidden = (
                        (called == "torch.load" and given.get("weights_only") != "True")
                        or called == "torch.save"
                        or given.get("allow_pickle", "False") != "False"
                    )
                    found += [f"{where}:{node.lineno}: {called} pickles"] if hidden else []
    return found


def tracked(root: Path) -> list[Path]:
    """Files that git has or would take (all but ignored ones), relative to `root`."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listing.stdout.split("\0") if name and (root / name).is_file()]


def machine_paths(root: Path, files: list[Path]) -> list[str]:
    """Lines of text files that name a folder of somebody's machine."""
    found = []
    for file in files:
        data = (root / file).read_bytes()
        if b"\0" not in data[:8192]:
            lines = data.decode("utf-8", "replace").splitlines()
            found += [
                f"{file}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)
            ]
    return found


def oversized(root: Path, files: list[Path]) -> list[str]:
    """Files over 5 MB; shards of a bundled data set, and the weights of a model, may have up to 16 MB."""

    def limit(file: Path) -> float:
        return 16e6 if file.suffix == ".tar" or file.parts[0] == "models" else 5e6

    return [str(file) for file in files if (root / file).stat().st_size > limit(file)]


def test_imports_point_one_way() -> None:
    assert import_violations(ROOT) == []


def test_no_pickle_is_written_or_read() -> None:
    assert pickle_uses(ROOT) == []


def test_the_top_level_holds_what_it_should() -> None:
    found = {file.parts[0] for file in tracked(ROOT)}
    assert found == TOP_LEVEL, f"unexpected {found - TOP_LEVEL}, missing {TOP_LEVEL - found}"


def test_no_file_names_a_folder_of_this_machine() -> None:
    assert machine_paths(ROOT, tracked(ROOT)) == []


def test_no_file_is_large() -> None:
    assert oversized(ROOT, tracked(ROOT)) == []


def test_tokenizers_is_hugging_faces_from_the_root() -> None:
    """A Python file in the folder of assets would shadow the package, and break transformers."""
    assert list((ROOT / "tokenizers").rglob("*.py")) == []
    program = "import tokenizers; print(tokenizers.Tokenizer.__name__, tokenizers.__file__)"
    command = [sys.executable, "-c", program]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert shown[0] == "Tokenizer" and not Path(shown[1]).is_relative_to(ROOT / "tokenizers")


def test_importing_the_package_is_cheap_and_gives_its_version() -> None:
    program = "import sys, mmgen; print(mmgen.__version__); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def plant(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path.relative_to(root)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mmgen/sequence.py", "from mmgen.model.trunk import Trunk"),
        ("mmgen/model/trunk.py", "from mmgen.objectives import path"),
        ("mmgen/objectives/path.py", "import mmgen.model"),
        ("mmgen/data/pack.py", "from mmgen import sampling"),
        ("mmgen/sampling/plan.py", "def f():\n    from mmgen.data import pack"),
        ("mmgen/model/trunk.py", "from ..training import trainer"),
        ("mmgen/training/trainer.py", "import mmgen.cli.main"),
        ("mmgen/training/trainer.py", "from mmgen import load"),
        ("mmgen/data/shards.py", "from data_pipelines import emoji"),
        ("mmgen/helpers/a.py", ""),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, name: str, text: str) -> None:
    plant(tmp_path, "mmgen/__init__.py", "from mmgen.training.trainer import train")
    plant(tmp_path, "mmgen/cli/main.py", "from mmgen import __version__\nfrom mmgen.training import trainer")
    plant(
        tmp_path,
        "mmgen/sampling/sampler.py",
        "from mmgen.objectives import path\nfrom . import plan\nimport torch",
    )
    assert import_violations(tmp_path) == []
    plant(tmp_path, name, text)
    assert len(import_violations(tmp_path)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.save(x, f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, allow_pickle=flag)",
    ],
)
def test_a_planted_pickle_is_found(tmp_path: Path, text: str) -> None:
    harmless = "import numpy as np, torch\nnp.load(f, allow_pickle=False)\ntorch.load(f, weights_only=True)"
    plant(tmp_path, "mmgen/data/a.py", harmless)
    assert pickle_uses(tmp_path) == []
    plant(tmp_path, "data_pipelines/b.py", text)
    assert len(pickle_uses(tmp_path)) == 1


def test_planted_paths_and_large_files_are_found(tmp_path: Path) -> None:
    files = [plant(tmp_path, "docs/a.md", "see docs/work/notes, https://x.org/home/a and ./tmp/x"),
             plant(tmp_path, "bundle.tar", "\0" * 6_000_000)]  # fmt: skip
    assert machine_paths(tmp_path, files) == [] == oversized(tmp_path, files)
    files.append(plant(tmp_path, "configs/b.yaml", "data: /" + "work/main/data"))
    files.append(plant(tmp_path, "c.bin", "\0" * 5_000_001))
    assert [line.split(":")[0] for line in machine_paths(tmp_path, files)] == ["configs/b.yaml"]
    assert oversized(tmp_path, files) == ["c.bin"]
