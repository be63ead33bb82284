"""What every diffusion model shares: keyed noise, draws, output functions, and the measure of a training."""
