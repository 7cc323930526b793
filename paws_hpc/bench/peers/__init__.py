"""The paper's way with the same images: PIL's augmentation, and a DataLoader that trains."""
