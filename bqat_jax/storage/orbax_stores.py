"""Makes Orbax support S3, and sets the retries of its stores.

Orbax supports gs:// and rejects every other address that is not a local path ("Checkpoint path should be absolute").
Three of its functions decide this and are replaced here. A test compares their source with that of the version they
were written for (`ORBAX`), and another test runs on s3://. Orbax's pull request #2739 would make this file superfluous.
"""

import functools
import importlib.metadata
import inspect
import os
from typing import Any

from orbax.checkpoint import CheckpointManagerOptions
from orbax.checkpoint._src.path import atomicity, gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from bqat_jax.errors import UserError
from bqat_jax.storage.patience import LONGEST_PAUSE
from bqat_jax.storage.places import bucket_of, patience_of, scheme_of

# The version that the replacement was written for and tested with.
ORBAX = '0.12.8'
# The functions that are replaced.
REPLACED = (
    (tensorstore_utils, '_use_gcs_driver'),
    (tensorstore_utils, '_normalize_path'),
    (gcs_utils, 'get_kvstore_for_gcs'),
)


@functools.cache
def replace_stores() -> None:
    """Replaces the three functions; a second call does nothing."""
    for module, name in REPLACED:
        if not inspect.isfunction(getattr(module, name, None)):
            raise UserError(
                f'orbax-checkpoint {importlib.metadata.version("orbax-checkpoint")} has no function {name}, which runs '
                f'in buckets need. Install the tested version: pip install orbax-checkpoint=={ORBAX}.'
            )
    normalize = tensorstore_utils._normalize_path
    tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(('gs://', 's3://'))
    tensorstore_utils._normalize_path = lambda path: normalize(path).replace('s3:/', 's3://')
    gcs_utils.get_kvstore_for_gcs = describe_store


def check_version(directory: Any) -> None:
    """Checks that the installed version of Orbax supports checkpoints in a folder of S3.

    Raises:
        UserError: for another version than the tested one.
    """
    version = importlib.metadata.version('orbax-checkpoint')
    if scheme_of(directory) == 's3' and version != ORBAX:
        raise UserError(
            f'{directory}: checkpoints in s3:// were tested with orbax-checkpoint {ORBAX} only, and {version} is '
            f'installed. Install the tested one: pip install orbax-checkpoint=={ORBAX}.'
        )


def options_for(directory: Any) -> dict[str, Any]:
    """Returns options of a CheckpointManager for a folder: in S3 a commit file completes a checkpoint."""
    if scheme_of(directory) != 's3':
        return {}
    assert 'temporary_path_class' in inspect.signature(CheckpointManagerOptions).parameters
    return {'temporary_path_class': atomicity.CommitFileTemporaryPath}


def describe_store(address: str) -> dict[str, Any]:
    """Returns TensorStore's spec of a folder or file in a bucket."""
    scheme, bucket = scheme_of(address), bucket_of(address)
    path = address.removeprefix(f'{scheme}://{bucket}').lstrip('/')
    retries = {'max_retries': _retries(patience_of(scheme)), 'initial_delay': '1s', 'max_delay': f'{LONGEST_PAUSE:g}s'}
    if scheme == 'gs':
        driver = os.environ.get('TENSORSTORE_GCS_BACKEND', 'gcs')
        own = {'gcs_request_retries': retries} if driver == 'gcs' else {}
        return {'driver': driver, 'bucket': bucket, 'path': path, **own}
    store: dict[str, Any] = {'driver': 's3', 'bucket': bucket, 'path': path, 's3_request_retries': retries}
    # TensorStore does not read these variables.
    endpoint = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL')
    region = os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION')
    if endpoint:
        store['endpoint'] = endpoint
    if region or endpoint:
        store['aws_region'] = region or 'us-east-1'
    if os.environ.get('AWS_ACCESS_KEY_ID'):  # otherwise it looks for files and logs each missing one
        store['aws_credentials'] = {'type': 'environment'}
    return store


def _retries(patience: float) -> int:
    """The number of retries, after pauses of 1, 2, 4, .. seconds, within the patience in seconds."""
    count, waited = 0, 0.0
    while (waited := waited + min(2.0**count, LONGEST_PAUSE)) <= patience:
        count += 1
    return max(count, 1)
