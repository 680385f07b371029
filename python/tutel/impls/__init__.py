"""Historic import paths; each module only hands on what stands elsewhere."""
