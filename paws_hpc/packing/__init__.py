"""Images of any source → a store: plan, write, finish, repair."""

from paws_hpc.packing.packer import PackReport, pack, plan_pack, planned_listing
from paws_hpc.packing.plan import PackOptions
from paws_hpc.packing.repair import repair
from paws_hpc.packing.sources import SOURCES, ArraySource, ImageFolder, Source, SourceConfig, open_source

__all__ = [
    "SOURCES",
    "ArraySource",
    "ImageFolder",
    "PackOptions",
    "PackReport",
    "Source",
    "SourceConfig",
    "open_source",
    "pack",
    "plan_pack",
    "planned_listing",
    "repair",
]
