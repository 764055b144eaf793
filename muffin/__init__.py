"""muffin: align vision-language models with preference data and stored reference log-probs."""

__version__ = "0.1.0"
