"""A sweep as one small file: its results and the files that unfinished runs need to resume."""

import io
import json
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

from bqat_jax.errors import UserError
from bqat_jax.experiment.low_precision import CHECKPOINTS, QUANTIZERS_FILE
from bqat_jax.experiment.partner import DIRECTORY, FACTS, TRAINING
from bqat_jax.experiment.workdir import CONFIG, ENVIRONMENT
from bqat_jax.storage import Place, fetched, write_bytes
from bqat_jax.sweeps.tables import TABLES

RESULT, ERROR, METRICS = 'result.json', 'error.json', 'metrics.jsonl'
MANIFEST, VERSION = 'pack.json', 1
FINAL, PARTNER = f'{DIRECTORY}/final', f'{DIRECTORY}/{FACTS}'
# Largest size of an unpacked pack: a foreign file must not fill the disk.
MOST_BYTES, MOST_FILES = 2 * 2**30, 200_000
# Zip files store a date; a fixed one makes the pack reproducible.
DATE = (1980, 1, 1, 0, 0, 0)

_FOLDER = r'(?:[A-Za-z0-9][A-Za-z0-9 _.+,-]*/)+'
_CHECKPOINT = r'[0-9]+(?:/[A-Za-z0-9_][A-Za-z0-9_.]*){1,6}'
_RUN_FILE = '|'.join(
    re.escape(name) for name in (CONFIG, ENVIRONMENT, RESULT, ERROR, QUANTIZERS_FILE, METRICS, PARTNER)
)
_IN_RUN = f'(?:{_RUN_FILE}|(?:{CHECKPOINTS}|{FINAL}|{TRAINING})/{_CHECKPOINT})'
_KNOWN = re.compile(f'{re.escape(TABLES)}|{_FOLDER}{_IN_RUN}', re.ASCII)
_END_OF_RUN = re.compile(f'/(?={_IN_RUN}$)', re.ASCII)


def write_pack(file: Place, workdir: Place) -> None:
    """Writes a sweep's results, and the newest and the best checkpoint of every unfinished run, atomically.

    A finished run is packed as its result and config, a partner with its weights.

    Raises:
        UserError: if the pack would be too large to be unpacked.
    """
    contents = {MANIFEST: json.dumps({'version': VERSION, 'workdir': str(workdir)}).encode()}
    if (workdir / TABLES).is_file():
        contents[TABLES] = (workdir / TABLES).read_bytes()
    for run in _runs_below(workdir):
        prefix = run.relative_to(workdir).as_posix()
        contents |= {f'{prefix}/{name}': path.read_bytes() for name, path in _needed(run)}
    size = sum(map(len, contents.values()))
    if size > MOST_BYTES or len(contents) > MOST_FILES:
        raise UserError(
            f'sweep_pack={file}: {len(contents)} files of {size / 2**20:.0f} MiB are too many for a pack, which holds '
            f'{MOST_BYTES / 2**20:.0f} MiB. Leave sweep_pack unset and copy the workdir {workdir}.'
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            archive.writestr(zipfile.ZipInfo(name, DATE), contents[name], zipfile.ZIP_DEFLATED)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, buffer.getvalue())


def unpack(file: Place, workdir: Place) -> int:
    """Unpacks the files that a workdir lacks; returns their number.

    A run that was started here keeps its files, unless the pack has its result. In configs, the path of a partner in
    the sweep's former workdir is replaced by that in this one.

    Raises:
        UserError: if the file is not a pack of a sweep, or holds foreign files. Nothing is written then.
    """
    contents = _read(file)
    manifest = _manifest(file, contents.pop(MANIFEST, b''))
    runs: dict[str, dict[str, bytes]] = {}
    for name, content in contents.items():
        run, rest = ('', name) if '/' not in name else _split(name)
        runs.setdefault(run, {})[rest] = content
    written = 0
    for run, files in sorted(runs.items()):
        folder = workdir / run if run else workdir
        if not _is_wanted(folder, files):
            continue
        if CONFIG in files:
            files[CONFIG] = _moved(files[CONFIG], manifest['workdir'], str(workdir), file)
        # Files that mark a run as started or finished come last: after a kill in between, it is unpacked again.
        for rest in sorted(files, key=lambda rest: (rest in (RESULT, ERROR, PARTNER), rest == CONFIG, rest)):
            path = folder / rest
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, files[rest])
                written += 1
    return written


def _is_wanted(folder: Place, files: Mapping[str, bytes]) -> bool:
    """Whether to unpack a run: the workdir lacks it, or has it unfinished while the pack has its result."""
    marks = {RESULT, ERROR, PARTNER}
    if any((folder / mark).exists() for mark in marks):
        return False
    return bool(marks & set(files)) or not (folder / CONFIG).exists()


def _runs_below(folder: Place) -> Iterator[Place]:
    """The workdirs of runs and partners below a folder."""
    for path in sorted(folder.iterdir(), key=str):
        if path.name != 'compiled' and path.is_dir() and _KNOWN.fullmatch(f'{path.name}/{CONFIG}'):
            if (path / CONFIG).is_file():
                yield path
            else:
                yield from _runs_below(path)


def _needed(run: Place) -> Iterator[tuple[str, Place]]:
    """Yields names and paths of the files of a run to pack."""
    finished = [name for name in (RESULT, ERROR) if (run / name).is_file()]
    names = [CONFIG, ENVIRONMENT, *finished]
    if not finished:
        names += [QUANTIZERS_FILE, METRICS]
        if (run / PARTNER).is_file() and not (run / CHECKPOINTS).is_dir():
            names.append(PARTNER)  # the partner that all runs share
            yield from _checkpoints(run, FINAL)
        elif not (run / PARTNER).is_file():
            yield from _checkpoints(run, TRAINING)
        yield from _checkpoints(run, CHECKPOINTS)
    yield from ((name, run / name) for name in names if (run / name).is_file())


def _checkpoints(run: Place, name: str) -> Iterator[tuple[str, Place]]:
    """The files of the newest and of the best checkpoint in a folder."""
    folder = run / name
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if not steps:
        return
    for step in {str(path): path for path in (max(steps, key=lambda x: int(x.name)), max(steps, key=_score))}.values():
        for path in _files(step):
            yield path.relative_to(run).as_posix(), path


def _score(checkpoint: Place) -> float:
    try:
        return float(json.loads((checkpoint / 'metrics' / 'metrics').read_bytes())['score'])
    except (OSError, ValueError, KeyError, TypeError):  # it has no score
        return float('-inf')


def _files(folder: Place) -> Iterator[Place]:
    for path in sorted(folder.iterdir(), key=str):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _split(name: str) -> tuple[str, str]:
    """Splits a name into the run's folder and the path in it."""
    cut = _END_OF_RUN.search(name)
    assert cut is not None  # the name was checked
    return name[: cut.start()], name[cut.end() :]


def _read(file: Place) -> dict[str, bytes]:
    """The files of a pack by name; all names and sizes are checked before anything is read."""
    try:
        with fetched(file) as local, zipfile.ZipFile(local) as archive:
            members = archive.infolist()
            for member in members:
                _check(file, member)
            names = [member.filename for member in members]
            if len(set(names)) < len(names):
                raise _refused(file, 'it has a file twice')
            size = sum(member.file_size for member in members)
            if size > MOST_BYTES or len(members) > MOST_FILES:
                raise _refused(file, f'its {len(members)} files would take {size / 2**20:.0f} MiB')
            return {member.filename: archive.read(member) for member in members}
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise _refused(file, f'it is not a readable zip file ({error})') from error


def _check(file: Place, member: zipfile.ZipInfo) -> None:
    name = member.filename
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise _refused(file, f'{name!r} is not a regular file')
    # `orig_filename` is the stored name; `filename` is truncated at a NUL.
    is_known = name == MANIFEST or (_KNOWN.fullmatch(name) and '..' not in name.split('/'))
    if not is_known or member.orig_filename != name:
        raise _refused(file, f'{member.orig_filename!r} is not the name of a file of a sweep')


def _manifest(file: Place, content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get('workdir'), str):
        raise _refused(file, f'it has no {MANIFEST} of a sweep')
    if manifest.get('version') != VERSION:
        raise _refused(file, f'it has version {manifest.get("version")!r}, and this program reads version {VERSION}')
    return manifest


def _moved(content: bytes, former: str, now: str, file: Place) -> bytes:
    """A run's config, with the partner's path in the sweep's current workdir."""
    try:
        config = json.loads(content)
        partner = config['partner']['workdir']
    except (ValueError, KeyError, TypeError) as error:
        raise _refused(file, f'a {CONFIG} in it is not a config') from error
    if isinstance(partner, str) and partner.startswith(f'{former}/'):
        config['partner']['workdir'] = now + partner.removeprefix(former)
    return (json.dumps(config, indent=2) + '\n').encode()


def _refused(file: Place, why: str) -> UserError:
    return UserError(f'sweep_pack={file}: {why}. Use a file that a sweep has written, or a new name.')
