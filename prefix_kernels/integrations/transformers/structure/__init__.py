"""The structure of a Transformers model: where its attentions are, the shape of their keys, and what is supported."""
