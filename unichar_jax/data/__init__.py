"""From character folders to packed batches: reading, checks, templates, images, packing, loading."""
