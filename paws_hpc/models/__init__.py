"""Networks: backbones, heads, the encoder that puts them together, and batch normalisation over ranks."""
