"""Storage in local folders and buckets (gs://, s3://): paths, small files, and exclusive access to a workdir."""

from bqat_jax.storage.arrays import KeptArrays
from bqat_jax.storage.checking import (
    address_in,
    chain_of,
    check_listed,
    check_objects,
    check_reachable,
    explain,
    explained,
    is_of_bucket,
    is_refused,
)
from bqat_jax.storage.files import damaged, read_json, write_bytes, write_json, write_once, write_text
from bqat_jax.storage.leases import Hold, InUse, Lost
from bqat_jax.storage.locks import held, wait_for_lock
from bqat_jax.storage.moving import COMMIT_FILE, Spool, fetched, files_below, local_copy, move_folder, upload
from bqat_jax.storage.patience import BucketError
from bqat_jax.storage.places import Place, filesystem_of, is_local, place, scheme_of, set_patience, shorten_patience

__all__ = [
    'COMMIT_FILE',
    'BucketError',
    'Hold',
    'InUse',
    'KeptArrays',
    'Lost',
    'Place',
    'Spool',
    'address_in',
    'chain_of',
    'check_listed',
    'check_objects',
    'check_reachable',
    'damaged',
    'explain',
    'explained',
    'fetched',
    'files_below',
    'filesystem_of',
    'held',
    'is_local',
    'is_of_bucket',
    'is_refused',
    'local_copy',
    'move_folder',
    'place',
    'read_json',
    'scheme_of',
    'set_patience',
    'shorten_patience',
    'upload',
    'wait_for_lock',
    'write_bytes',
    'write_json',
    'write_once',
    'write_text',
]
