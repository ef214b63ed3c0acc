"""The tokenized text of the distributed tests, for runs that save."""

from tests.distributed.conftest import text

__all__ = ["text"]
