"""Published multimodal checkpoints: one file per layout, and the folders that hold them."""
