"""Images of any source → a store: plan, write, finish, repair."""

from paws_hpc.packing.repair import RepairReport, repair
from paws_hpc.packing.sources import SOURCES, ArraySource, ImageFolder, Source, SourceConfig, open_source
from paws_hpc.packing.writer import (
    PackOptions,
    PackReport,
    Part,
    PartReport,
    pack,
    pack_part,
    plan_pack,
    planned_listing,
)

__all__ = [
    "SOURCES",
    "ArraySource",
    "ImageFolder",
    "PackOptions",
    "PackReport",
    "Part",
    "PartReport",
    "RepairReport",
    "Source",
    "SourceConfig",
    "open_source",
    "pack",
    "pack_part",
    "plan_pack",
    "planned_listing",
    "repair",
]
