"""Trains the pocket's networks from scratch: autoencoder, U-Net with text encoder, CLIP, siblings network."""
