"""The prefixes that one call of a prepared model sees."""
