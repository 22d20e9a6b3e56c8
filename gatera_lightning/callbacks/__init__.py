"""Lightning callbacks, one in each file; none of them changes the numbers of a training step."""
