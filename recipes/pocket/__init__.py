"""The pocket's networks, trained from scratch: autoencoder, U-Net with text encoder, CLIP, network of siblings."""
