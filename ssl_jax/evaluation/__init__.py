"""What an encoder is worth: its features, and k-NN on them."""
