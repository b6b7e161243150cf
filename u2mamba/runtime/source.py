"""Checksums of source files: detect that the code has changed since a run or a cache was written."""

import ast
from pathlib import Path
from zlib import crc32

PUBLISHED_LOADER = 217065225  # source_checksum of data_loader.py, which a test compares with what a run does
SETTINGS = {"Config", "PRESETS"}  # of a script; compared as settings, not as code


def source_checksum(path: Path) -> int:
    """CRC-32 of a file's syntax tree without comments, docstrings, and the values of Config and PRESETS.

    A file that Python cannot parse counts by its bytes. Raises OSError.
    """
    text = path.read_bytes()
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return crc32(text)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node) is not None:
            node.body.pop(0)
        if isinstance(node, ast.ClassDef) and node.name in SETTINGS:
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    field.value = None
    tree.body = [n for n in tree.body if not (isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in SETTINGS)]
    return crc32(ast.unparse(tree).encode())  # ast.unparse gives the same text on all Python versions


def source_checksums(root: Path) -> dict[str, int]:
    """`source_checksum` of each file that decides what a run computes, so without u2mamba/fast/."""
    files = [root / "u2mamba_train.py", root / "data_loader.py", *(root / "model").rglob("*.py")]
    files += [path for path in (root / "u2mamba").rglob("*.py") if "fast" not in path.relative_to(root).parts]
    return {path.relative_to(root).as_posix(): source_checksum(path) for path in sorted(files) if path.is_file()}
