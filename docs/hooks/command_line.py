"""Fill the command line's page from the commands themselves while the documentation is built."""

import subprocess
import sys
from typing import Any

PAGE = "reference/command_line.md"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """
    Put what typer says of the commands below the page's own text.

    :param markdown: The page's own text.
    :param page: The page, as mkdocs has it.
    :return: The page's text.
    """
    if page.file.src_uri != PAGE:
        return markdown
    command = [sys.executable, "-m", "typer", "actsparse.cli", "utils", "docs", "--name", "actsparse"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Its first line is a title of its own.
    return markdown + told.partition("\n")[2]
