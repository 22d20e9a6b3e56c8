"""Autograd functions behind the updates and the gates."""
