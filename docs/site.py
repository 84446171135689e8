"""A hook of MkDocs: links from a page to files outside docs/, which the site does not have, become their paths."""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r'(!?)\[([^\]]*)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)')
ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Returns the page's text with such links replaced.

    Raises:
        FileNotFoundError: for a link to a file that does not exist.
    """
    folder = Path(page.file.abs_src_path).parent

    def replace(match: re.Match[str]) -> str:
        target = (folder / match[3]).resolve()
        if not target.exists():
            raise FileNotFoundError(f'{page.file.src_path}: {match[0]}: there is no {target}.')
        if target.is_relative_to(ROOT / 'docs'):
            return match[0]
        path, text = target.relative_to(ROOT).as_posix(), match[2].replace('\\', '').strip('`')
        return f'`{path}`' if text in (path, target.name) else f'{match[2]} (`{path}`)'

    return LINK.sub(replace, markdown)
