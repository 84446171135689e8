"""Small files, written atomically."""

import json
import os
from typing import Any

from bqat_jax.distributed.processes import is_first, wait_for_all
from bqat_jax.errors import UserError
from bqat_jax.storage.places import Place, filesystem_of, is_local


def write_bytes(path: Place, content: bytes) -> None:
    """Writes a file atomically: readers see the old content or the new, even after a kill."""
    if not is_local(path):  # objects appear only when complete
        filesystem_of(path).pipe_file(str(path), content)
        return
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Place, text: str) -> None:
    """Writes a text file in UTF-8, atomically."""
    write_bytes(path, text.encode('utf-8'))


def write_json(path: Place, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + '\n')


def read_json(path: Place, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
        path: the file.
        **fields: required entries with their types.

    Raises:
        UserError: if it is not JSON, or not such an object.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise damaged(path, f'it is not JSON ({error})') from error
    if not isinstance(content, dict):
        raise damaged(path, f'it holds a {type(content).__name__}, not an object')
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            raise damaged(path, f'its entry {name!r} is missing, or of another type')
    return content


def damaged(path: Place, why: str) -> UserError:
    """Returns the error for a damaged file of a run."""
    return UserError(f'{path} is damaged: {why}. Restore the file, or use another --workdir.')


def write_once(path: Place, value: Any) -> None:
    """Writes JSON in the first process; all processes see the file afterwards."""
    if is_first():
        write_json(path, value)
    wait_for_all(f'written {path}')
