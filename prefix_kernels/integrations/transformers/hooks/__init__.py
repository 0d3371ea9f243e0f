"""The hooks of a prepared model: prefixes go into its layers, and its positions move."""
