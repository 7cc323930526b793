"""Images on disk: packed into immutable HDF5 shards, read at random by position or key (shards/FORMAT.md)."""

from paws_hpc.store.decode import decode_jpeg
from paws_hpc.store.faults import Fault
from paws_hpc.store.format import Manifest, Omission, RecordError, StoreError
from paws_hpc.store.reader import ImageStore, Keys
from paws_hpc.store.repair import RepairReport, repair
from paws_hpc.store.sources import SOURCES, ArraySource, ImageFolder, Source, SourceConfig, open_source
from paws_hpc.store.staging import StageReport, Staging, stage, start_staging
from paws_hpc.store.verify import verify
from paws_hpc.store.writer import PackOptions, PackReport, Part, PartReport, pack, pack_part, plan_pack, planned_listing

__all__ = [
    "SOURCES",
    "ArraySource",
    "Fault",
    "ImageFolder",
    "ImageStore",
    "Keys",
    "Manifest",
    "Omission",
    "PackOptions",
    "PackReport",
    "Part",
    "PartReport",
    "RecordError",
    "RepairReport",
    "Source",
    "SourceConfig",
    "StageReport",
    "Staging",
    "StoreError",
    "decode_jpeg",
    "open_source",
    "pack",
    "pack_part",
    "plan_pack",
    "planned_listing",
    "repair",
    "stage",
    "start_staging",
    "verify",
]
