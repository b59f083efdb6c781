"""The unified model on three streams: decoder, towers, autoencoder, attention and its kernels."""
