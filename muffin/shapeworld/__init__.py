"""A tiny procedural image world in which a policy learns to hallucinate and can be aligned: scenes -> language -> claims, and a model."""
