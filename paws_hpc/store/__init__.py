"""Images on disk: immutable HDF5 shards, read at random by position or key (shards/FORMAT.md)."""

from paws_hpc.store.decode import decode_jpeg
from paws_hpc.store.faults import Fault
from paws_hpc.store.format import Manifest, Omission, RecordError, StoreError
from paws_hpc.store.local_copy import StageReport, Staging, stage, start_staging
from paws_hpc.store.reader import ImageStore, Keys
from paws_hpc.store.verify import verify

__all__ = [
    "Fault",
    "ImageStore",
    "Keys",
    "Manifest",
    "Omission",
    "RecordError",
    "StageReport",
    "Staging",
    "StoreError",
    "decode_jpeg",
    "stage",
    "start_staging",
    "verify",
]
