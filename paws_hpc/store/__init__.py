"""Images on disk: immutable HDF5 shards, read at random by position or key (shards/FORMAT.md)."""

from paws_hpc.store.decode import decode_jpeg
from paws_hpc.store.format import Manifest, RecordError, StoreError
from paws_hpc.store.index import Keys
from paws_hpc.store.reader import ImageStore

__all__ = ["ImageStore", "Keys", "Manifest", "RecordError", "StoreError", "decode_jpeg"]
