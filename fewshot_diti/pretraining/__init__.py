"""Training of a backbone from scratch: images and captions, then the autoencoder, then U-Net and text encoder."""
