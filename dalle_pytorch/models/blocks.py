"""What transformers of stage two are made of, whichever network it is: for sharding, compiling, optimisers and logs."""

from dalle_pytorch.models import bart, transformer

BLOCKS = (transformer.Block, bart.Block)
"""A layer: attention and feed-forward."""
STACKS = (transformer.Transformer, bart.Encoder, bart.Decoder)
"""All layers, without embeddings and heads."""
