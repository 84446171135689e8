"""Small files, written so that a reader never sees half of one."""

import json
import os
from typing import Any

from bqat_jax.distributed.processes import is_first, wait_for_all
from bqat_jax.errors import UserError
from bqat_jax.storage.places import Place, filesystem_of, is_local


def write_bytes(path: Place, content: bytes) -> None:
    """Writes a file atomically: a reader, or a kill, finds the old content or the new, never half of it."""
    if not is_local(path):  # an object is there when it is there whole
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
    """Returns the JSON object that a file holds.

    Args:
        path: of the file.
        **fields: the entries that it must have, with their types.

    Raises:
        UserError: if it is not JSON, or not such an object.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise damaged(path, f'it is not JSON ({error})') from error
    if not isinstance(content, dict):
        raise damaged(path, f'it holds a {type(content).__name__}, and no object')
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            raise damaged(path, f'its entry {name!r} is missing, or of another type')
    return content


def damaged(path: Place, why: str) -> UserError:
    """Returns the error for a file of a run's that is not as it was written."""
    return UserError(f'{path} is damaged: {why}. Put it back as it was, or take another --workdir.')


def write_once(path: Place, value: Any) -> None:
    """Writes JSON by the first of several processes; in all of them the file is there afterwards."""
    if is_first():
        write_json(path, value)
    wait_for_all(f'written {path}')
