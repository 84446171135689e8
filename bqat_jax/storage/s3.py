"""An fsspec file system for S3 and compatible stores."""

import asyncio
from typing import Any

from botocore.exceptions import ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from bqat_jax.storage.patience import TRANSIENT_STATUS, Patient


class S3(Patient, S3FileSystem):
    """S3FileSystem that retries, and never creates a bucket.

    Endpoint, region and credentials are those of boto: AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE and so on.
    """

    scheme = 's3'
    retries = 1  # `repeat` retries

    def __init__(self, *args: Any, **kwargs: Any):
        """Takes the arguments of S3FileSystem."""
        once = {'retries': {'max_attempts': 0}, 'connect_timeout': 30, 'read_timeout': 60}
        super().__init__(*args, **{'config_kwargs': once, **kwargs})

    @staticmethod
    def is_transient(error: Exception) -> bool:
        """Returns whether a request that failed with an error may succeed later."""
        cause = error if isinstance(error, ClientError) else error.__cause__
        if isinstance(cause, ClientError):
            status = cause.response.get('ResponseMetadata', {}).get('HTTPStatusCode')
            return status in TRANSIENT_STATUS
        # s3fs passes on TimeoutErrors of asyncio and of sockets.
        passing = (HTTPClientError, BotoConnectionError, ConnectionError, TimeoutError, asyncio.TimeoutError)
        return isinstance(error, passing) or isinstance(cause, passing)

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        place = '/'.join(str(kwargs[key]) for key in ('Bucket', 'Key') if key in kwargs)
        what = f's3://{place}: {method}'
        return await self.repeat(lambda: super(S3, self)._call_s3(method, *args, **kwargs), what)

    async def _list_two(self, path: str) -> tuple[str, list[str], bool]:
        bucket, key, _ = self.split_path(path.rstrip('/'))
        if not key:
            return key, [], True
        try:
            reply = await self._call_s3('list_objects_v2', Bucket=bucket, Prefix=key, Delimiter='/', MaxKeys=2)
        except FileNotFoundError:  # the bucket does not exist
            return key, [], False
        keys = [item['Key'] for item in reply.get('Contents', [])]
        return key, keys + [item['Prefix'] for item in reply.get('CommonPrefixes', [])], reply.get('IsTruncated', False)

    async def _mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Does nothing: buckets have no folders, and a missing bucket is an error."""

    # S3FileSystem binds these to its own methods.
    exists = sync_wrapper(Patient._exists)
    isdir = sync_wrapper(Patient._isdir)
    mkdir = sync_wrapper(_mkdir)
