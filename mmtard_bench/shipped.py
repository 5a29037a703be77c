"""Where files that come with the package are. Imports without torch."""

from pathlib import Path


def suite_folder() -> Path:
    """Where the suites that ship are: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "suite_files"
    return installed if installed.is_dir() else package.parent / "suites"
