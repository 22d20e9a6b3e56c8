"""Old module names of this package, and the private names of Lightning and TensorBoard that it uses."""
