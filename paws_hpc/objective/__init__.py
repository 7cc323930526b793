"""The PAWS objective, the contrastive losses around it, and what is watched while it trains."""
