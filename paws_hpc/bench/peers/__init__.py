"""What other libraries do with the same images: loaders and packers, PIL's augmentation, a DataLoader that trains."""
