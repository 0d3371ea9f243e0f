"""The functions that Transformers calls by name: attention, its torch baseline, and the mask."""
