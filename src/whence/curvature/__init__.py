"""Preconditioners: what stands for the inverse of the Hessian."""
