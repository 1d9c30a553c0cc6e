"""Hunyuan3D-DiT: a flow-matching transformer from image tokens to shape latents (Hunyuan3D 2.0, section 3.2)."""
