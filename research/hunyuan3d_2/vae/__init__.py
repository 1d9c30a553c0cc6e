"""ShapeVAE: a surface to a set of latent tokens, and these to a signed field (section 3.1)."""
