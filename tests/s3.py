"""An S3 server on a socket of this machine: moto's, which speaks the protocol and keeps objects in memory."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import boto3
from moto.server import ThreadedMotoServer


class S3:
    """A running server. `environment` is how the AWS tools find it."""

    def __init__(self, url: str) -> None:
        self.environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "flowpp",
            "AWS_SECRET_ACCESS_KEY": "a secret of this test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id="flowpp",
            aws_secret_access_key="a secret of this test",
        )

    def new_store(self) -> str:
        """The URL of a folder in an empty bucket."""
        bucket = f"bucket-{secrets.token_hex(8)}"
        self.client.create_bucket(Bucket=bucket)
        return f"s3://{bucket}/folder"

    def objects(self, store: str) -> dict[str, int]:
        """The names and bytes of all objects in a store's bucket."""
        found = self.client.list_objects_v2(Bucket=store.split("/")[2]).get("Contents", [])
        return {each["Key"].removeprefix("folder/"): each["Size"] for each in found}

    def uploads(self, store: str) -> list[str]:
        """The names of objects that are being uploaded in parts."""
        found = self.client.list_multipart_uploads(Bucket=store.split("/")[2]).get("Uploads", [])
        return [each["Key"].removeprefix("folder/") for each in found]


@contextmanager
def running_s3() -> Iterator[S3]:
    """A server, of this process's environment while the block runs."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        s3 = S3("http://{}:{}".format(*server.get_host_and_port()))
        with patch.dict(os.environ, s3.environment):
            yield s3
        s3.client.close()
    finally:
        server.stop()
