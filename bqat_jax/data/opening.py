"""Opens data sets on disk: finds them by name, prepares them and checks their files.

Errors of TensorFlow Datasets and ArrayRecord are of many kinds and are caught here.
"""

import errno
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath
from tensorflow_datasets.core.constants import DATA_DIR
from tensorflow_datasets.core.naming import parse_builder_name_kwargs

from bqat_jax.data.caching import NOT_WISHED, Cache
from bqat_jax.errors import UserError
from bqat_jax.registry import suggest
from bqat_jax.storage import explain, explained, filesystem_of, is_local, scheme_of, upload, wait_for_lock

logger = logging.getLogger(__name__)

# 'name', 'name/config', 'name:1.0.0', 'name/config:1.0.0'. Other forms refer to hubs of other libraries.
NAME = re.compile(r'(?P<name>[a-z]\w*)(/\w[\w.\-]*)?(:(\d+|\*)(\.(\d+|\*)){2})?')
CANNOT_WRITE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENOSPC,
    errno.EDQUOT,
)
OTHER_DIRECTORY = 'Use a folder: --config.data.dir=DIR.'
DIRECT = ('gs',)  # schemes that ArrayRecord can read
# Files that are checked in parallel: on network disks each takes a while.
THREADS = 16
MESSAGE_LENGTH = 300


def open_builder(name: str, directory: str | None, registered: Mapping[str, Any], cache: Cache = NOT_WISHED) -> Any:
    """Returns the builder of a prepared data set; prepares a registered one if needed.

    Args:
        name: 'name', 'name/config', 'name:1.0.0' or 'name/config:1.0.0'.
        directory: folder of prepared data sets, local or in a bucket; None for TensorFlow Datasets' default.
        registered: builder classes of data sets that prepare themselves, by name.
        cache: cache of data sets in buckets.

    Raises:
        UserError: if the data set does not exist, is not prepared as ArrayRecord, or cannot be prepared.
    """
    tfds.disable_progress_bar()
    match = NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f'data.name={name!r} is not the name of a data set. Write name, name/config or name:1.0.0, such as '
            f"'cifar10', in lower case.{suggest(name.lower(), registered)}"
        )
    if directory is not None:
        directory = os.path.expanduser(directory)
        if is_local(directory) and os.path.exists(directory) and not os.path.isdir(directory):
            raise UserError(f'data.dir={directory!r} is a file. {OTHER_DIRECTORY}')
    is_registered = match['name'] in registered
    builder = _make_builder(name, directory, registered.get(match['name']))
    if is_registered and not _ask(name, builder, builder.is_prepared):
        _prepare(name, builder)
        # A builder made before another process prepared the data set does not see it.
        builder = _make_builder(name, directory, registered[match['name']])
    is_prepared = _ask(name, builder, builder.is_prepared)
    has_description = is_prepared and (builder.data_path / 'dataset_info.json').exists()
    if is_prepared and not has_description:
        raise UserError(
            f'data.name={name!r}: {builder.data_path} has no dataset_info.json, so its content is unknown. '
            + _prepare_again(is_registered)
        )
    file_format = _ask(name, builder, lambda: builder.info.file_format)
    if is_prepared and is_registered and file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f'data.name={name!r} is prepared as {file_format.value} in {builder.data_path}, and only array_record can '
            f'be read. {_prepare_again(is_registered)}'
        )
    if not is_prepared or file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f'data.name={name!r} is not prepared as ArrayRecord in {builder.data_path}'
            + (f' (it is there as {file_format.value})' if is_prepared else '')
            + '. If it is elsewhere, set --config.data.dir=DIR. To prepare it, once, in another virtual '
            'environment (it needs TensorFlow):\n'
            f'  pip install tensorflow-cpu tensorflow-datasets array_record\n'
            f"  python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='DIR', "
            f"file_format='array_record').download_and_prepare()\""
        )
    if is_local(builder.data_path):
        return builder
    if scheme_of(builder.data_path) in DIRECT and not cache.is_wished:
        return builder
    with explained(f'data.dir={directory!r}: the files of {builder.data_path} cannot be fetched', builder.data_path):
        local = cache.fetch(builder.data_path, epath.Path(str(directory)))
    return _make_builder(name, str(local), registered.get(match['name']))


def describe_data(name: str, builder: Any) -> tuple[Any, list[str]]:
    """Returns the features and the names of the splits of a data set, from the files beside its records.

    Raises:
        UserError: if these files are damaged.
    """
    path = builder.data_path / 'features.json'
    try:
        json.loads(path.read_text(encoding='utf-8'))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f'data.name={name!r}: {path} cannot be read ({brief(error)}), so the content of the data set is unknown. '
            'Copy or prepare it again.'
        ) from error
    return _ask(name, builder, lambda: (builder.info.features, sorted(builder.info.splits)))


def describe_origin(builder: Any) -> dict[str, Any]:
    """Returns a data set's metadata on its origin, such as versions; {} if it has none."""
    try:
        return {str(key): value for key, value in dict(builder.info.metadata or {}).items()}
    except Exception:  # metadata that is not a dictionary, or needs another package
        return {}


def check_files(instructions: Any) -> None:
    """Checks that the files of a split exist and have the number of records in the data set's description.

    Args:
        instructions: TensorFlow Datasets' file instructions.

    Raises:
        UserError: naming the first file that is missing, truncated or of another length.
    """
    expected = {str(file.filename): file.examples_in_shard for file in instructions}
    for path in expected:
        if not is_local(path):  # ArrayRecord waits a quarter of an hour for a missing bucket
            with explained(f'{path} cannot be read', epath.Path(path)):
                filesystem_of(path).info(path)
    with ThreadPoolExecutor(THREADS) as threads:
        for (path, count), actual in zip(expected.items(), threads.map(_count_records, expected), strict=True):
            if actual != count:
                raise UserError(
                    f'{path} has {actual} records, and dataset_info.json beside it says {count}. Copy or prepare the '
                    'data set again.'
                )


def brief(error: BaseException) -> str:
    """Returns the type of an error and the beginning of its message, on one line."""
    text = ' '.join(str(error).split())
    if len(text) > MESSAGE_LENGTH:
        text = text[:MESSAGE_LENGTH] + ' ...'
    return f'{type(error).__name__}: {text}'


def _count_records(path: str) -> int:
    try:
        reader = array_record_module.ArrayRecordReader(path)
        try:
            return reader.num_records()
        finally:
            reader.close()
    except Exception as error:  # ArrayRecord raises RuntimeError, and others for paths that are not files
        raise UserError(
            f'{path} cannot be read: {brief(error)}. It is missing or damaged. Copy or prepare the data set again.'
        ) from error


def _make_builder(name: str, directory: str | None, registered: Any) -> Any:
    try:
        if registered is None:
            return tfds.builder(name, data_dir=directory)
        _, options = parse_builder_name_kwargs(name, data_dir=directory)
        return registered(**options)
    except tfds.core.DatasetNotFoundError as error:
        folder = epath.Path(directory or DATA_DIR) / re.split('[/:]', name)[0]
        if folder.is_dir():
            raise UserError(
                f'data.name={name!r}: {folder} holds no prepared data set of this name, with dataset_info.json and '
                'features.json. Copy or prepare it again.'
            ) from error
        raise UserError(
            f'data.name={name!r}: TensorFlow Datasets has no dataset of that name'
            + (f', and {directory} holds none.' if directory else '.')
            + ' Correct the name, or set its folder (--config.data.dir=DIR).'
        ) from error
    except (AssertionError, ValueError) as error:
        if not isinstance(error, json.JSONDecodeError):
            raise UserError(
                f'data.name={name!r}: TensorFlow Datasets has no such data set ({brief(error)}). Correct its '
                'configuration or version, or leave them out.'
            ) from error
        raise _damaged(name, directory, error) from error
    except Exception as error:  # a damaged dataset_info.json, a folder that cannot be read
        raise _damaged(name, directory, error) from error


def _ask(name: str, builder: Any, question: Any) -> Any:
    try:
        return question()
    except Exception as error:  # description files are read lazily and may be damaged in any way
        raise _damaged(name, builder.data_path, error) from error


def _damaged(name: str, directory: Any, error: Exception) -> UserError:
    where = f' in {directory}' if directory else ''
    if directory and not is_local(directory) and not isinstance(error, json.JSONDecodeError | ImportError):
        why = str(error) if isinstance(error, UserError) else explain(error, epath.Path(directory))
        return UserError(f'data.name={name!r} cannot be opened{where}: {why}')
    if isinstance(error, ImportError):
        return UserError(
            f'data.name={name!r}{where}: one of its features needs a package that is not installed ({brief(error)}); '
            'images and labels need none. Use another data set, or prepare it without that feature.'
        )
    return UserError(
        f'data.name={name!r} cannot be opened{where}: {brief(error)}. Its files are damaged or may not be read. Copy '
        f'or prepare it again, or set its folder (--config.data.dir=DIR).'
    )


def _prepare_again(is_registered: bool) -> str:
    if is_registered:
        return 'Delete that folder to prepare it again, or use another (--config.data.dir=DIR).'
    return 'Copy or prepare it again.'


def _prepare_in_bucket(name: str, builder: Any) -> None:
    """Prepares a data set locally and sends it to its bucket, dataset_info.json last.

    Several processes may do so at once: they send equal files.
    """
    target = builder.data_path
    with tempfile.TemporaryDirectory(prefix='bqat_jax_') as folder:
        local = type(builder)(data_dir=folder, config=builder.builder_config, version=str(builder.version))
        _prepare(name, local)
        logger.info('Sending the data set %s to %s.', name, target)
        files = [file for file in Path(local.data_path).rglob('*') if file.is_file()]
        for file in sorted(files, key=lambda file: file.name == 'dataset_info.json'):
            inside = file.relative_to(local.data_path).as_posix()
            with explained(f'data.name={name!r}: {target}/{inside} cannot be written', target):
                upload(file, target / inside)


def _prepare(name: str, builder: Any) -> None:
    """Prepares a data set unless it is prepared; one process does, and the others wait."""
    if not is_local(builder.data_path):
        _prepare_in_bucket(name, builder)
        return
    path = Path(builder.data_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(path.with_name(f'.{path.name}.lock')):
            if builder.is_prepared():
                return
            logger.info('Preparing the data set %s in %s.', name, path)
            builder.download_and_prepare(file_format='array_record')
    except Exception as error:  # the builder may be user code
        # Without locks another process may have finished first.
        if (path / 'dataset_info.json').exists():
            return
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            remedy = 'Use a folder that can be written (--config.data.dir=DIR).'
        else:
            remedy = f'Correct {type(builder).__module__}.{type(builder).__qualname__}, which generates it.'
        raise UserError(f'data.name={name!r} cannot be prepared in {path}: {brief(error)}. {remedy}') from error
