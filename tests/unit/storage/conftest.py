from tests.support.disk import small_disk
from tests.support.s3 import s3, s3_server

__all__ = ["s3", "s3_server", "small_disk"]
