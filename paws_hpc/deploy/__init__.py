"""A finished run put to use: its networks in formats of other libraries, and its answers about image files."""

from paws_hpc.deploy.formats import FORMATS, load_exported, write_export
from paws_hpc.deploy.networks import HEADS, Network, load_network

__all__ = ["FORMATS", "HEADS", "Network", "load_exported", "load_network", "write_export"]
