import hypothesis
from tests.support.disk import small_disk
from tests.support.s3 import s3, s3_server

__all__ = ["s3", "s3_server", "small_disk"]

# The same examples every time, and no opinion about how busy the machine is.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")
